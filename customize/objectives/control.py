"""Training a control network of the frozen model.

The loss is the model's own (Zhang et al. 2023, eq. 5), with the map among the conditions. Two things speed training up:
the layout is decided at the noisier levels, so most samples are drawn from these until the last third of the run; and
some prompts are dropped, so that the network has to recognise the content in the map.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control, ControlNetwork
from backbone.data.prefetch import Movable, StepLoader
from backbone.diffusion.losses import squared_error
from backbone.diffusion.noise import add_noise, generator, target
from backbone.distributed import processes
from backbone.io.files import write_json
from backbone.io.run_folder import CONDITION_FILE
from backbone.models.compiled import CompiledBlocks
from backbone.models.control import ControlRecord
from backbone.models.encode import Posteriors, Prompts, View, encode_texts, encode_views
from backbone.models.locate import OWN
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from backbone.training.base_predictions import draw_stratified_levels
from backbone.training.optimizer import make_adamw
from backbone.training.run import Objective
from backbone.world.rendering.record import load_labels
from customize.control_settings import ControlSettings
from customize.data.control_pairs import ControlPair
from customize.objectives.control_networks import save_network
from customize.objectives.dreambooth import expand_weights, weigh_levels

REMEMBERED = 1 << 29  # bytes of maps kept in memory
NOISY = 0.45  # share of the levels above which layouts are decided
FALLING = 2 / 3  # share of the run after which noisy levels are drawn less and less often


@dataclass(frozen=True, eq=False)
class Batch(Movable):
    """B samples: noisy latents [B, C, H, W], indices of their levels [B], targets, weights [B, 1, H, W], maps."""

    on_host: ClassVar[tuple[str, ...]] = ("level",)

    noisy: Tensor
    level: Tensor
    target: Tensor
    weight: Tensor
    maps: Tensor
    conditions: Conditions


class ControlSource(Protocol):
    """Encoded images with their captions and maps, indexed by image.

    kinds       the kinds of its maps
    conditions  the encoded captions, concatenated, with the empty prompt last
    """

    @property
    def kinds(self) -> Sequence[str]: ...
    @property
    def conditions(self) -> Prompts | Conditions: ...
    def __len__(self) -> int: ...

    def latents(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Clean latents [B, C, H, W], drawn from the images' posteriors."""
        ...

    def captions(self, rows: Tensor) -> Tensor:
        """Indices of the images' captions in `conditions` [B]."""
        ...

    def maps(self, rows: Tensor, random: torch.Generator) -> Tensor:
        """Maps [B, 3, H, W] in 0…1."""
        ...


class PairData:
    """A user's encoded pairs, followed by the mirrored ones if `flip`. A `ControlSource`."""

    def __init__(self, model: Backbone, pairs: Sequence[ControlPair], kind: str, *, flip: bool) -> None:
        self.pairs, self.kinds = pairs, (kind,)
        self.size = model.resolution, model.resolution
        flips = (False, True) if flip else (False,)
        encoded = encode_views(model, [View(pair.image, self.size) for pair in pairs], flips, std=True)
        places = [(part, row) for part in range(len(flips)) for row in range(len(pairs))]
        self.posteriors = Posteriors([encoded[flip] for flip in flips], places, model.device)
        self.conditions = encode_texts(model, [*(pair.caption for pair in pairs), ""])
        cached = max(1, REMEMBERED // (3 * self.size[0] * self.size[1]))
        self._bytes = lru_cache(maxsize=cached)(self._read)

    def __len__(self) -> int:
        return len(self.posteriors)

    def latents(self, rows: Tensor, random: torch.Generator) -> Tensor:
        return self.posteriors.gather(rows).sample(random)

    def captions(self, rows: Tensor) -> Tensor:
        return rows % len(self.pairs)

    def maps(self, rows: Tensor, random: torch.Generator) -> Tensor:
        count = len(self.pairs)
        hints = [self._bytes(int(row) % count).float() / 255 for row in rows]
        kind = self.kinds[0]
        return torch.stack(
            [mirror_map(hint, kind) if row >= count else hint for row, hint in zip(rows, hints, strict=True)]
        )

    def _read(self, number: int) -> Tensor:
        return (self.pairs[number].read_map(self.kinds[0], self.size) * 255).round().byte()


def mirror_map(hints: Tensor, kind: str) -> Tensor:
    """The map [3, H, W] in 0…1 of the mirrored image.

    The horizontal component of a normal (red) is negated; black pixels, which have no normal, stay black.
    """
    mirrored = hints.flip(-1)
    if kind == "normal":
        red = torch.where(mirrored.amax(0) > 0, 1 - mirrored[0], mirrored[0])
        mirrored = torch.cat([red[None], mirrored[1:]])
    return mirrored


class ControlTraining(Objective):
    """The denoising loss under maps; a control network's parameters are trained."""

    settings: ControlSettings

    def __init__(
        self, model: Backbone, network: ControlNetwork, data: ControlSource, settings: ControlSettings
    ) -> None:
        self.model, self.network, self.data, self.settings = model, network, data, settings
        self.parameters = {
            name: value for name, value in network.module.named_parameters() if value.requires_grad
        }
        groups: list[dict[str, Any]] = [
            {"params": list(self.parameters.values()), "lr": settings.learning_rate}
        ]
        self.optimizer = make_adamw(groups, weight_decay=settings.weight_decay)
        self.share = processes.find_share_of_step(settings.gradient_accumulation_steps, settings.batch)
        self.pool = len(data)
        self.batches = StepLoader(self.draw_step, settings.steps, model.device, workers=settings.workers)
        self.figures: dict[str, Tensor | float] = {}
        self.compiled = CompiledBlocks([model.denoiser, network.module]) if settings.compile else None
        for network_part in (model.denoiser, network.module) if settings.gradient_checkpointing else ():
            if getattr(
                network_part, "_supports_gradient_checkpointing", False
            ):  # a T2I-Adapter has nothing to recompute
                cast(Any, network_part).enable_gradient_checkpointing()

    @property
    def images(self) -> int:
        return self.settings.batch

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Attention with a fast backward pass, in the denoiser and in the control network."""
        with ExitStack() as stack:
            stack.enter_context(fast_attention_backward(self.model.denoiser))
            if hasattr(self.network.module, "attn_processors"):
                side = self.model.latent_shape[-1]
                stack.enter_context(fast_attention_backward(self.network.module, side=side))
            yield

    def close_loader(self) -> None:
        self.batches.close()

    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses of this process's share of one step's micro-batches."""
        for batch in self.batches.at(step):
            yield self.compute_loss(batch)

    def draw_step(self, step: int) -> list[Batch]:
        """This process's share of a step's micro-batches; a function of the step alone."""
        micros = range(self.settings.gradient_accumulation_steps)[self.share.micros]
        return [self.draw(generator(self.settings.seed, "control", step, micro), step) for micro in micros]

    def draw(self, random: torch.Generator, step: int) -> Batch:
        """A batch; every process draws the same one and keeps its own samples of it."""
        settings, data, path = self.settings, self.data, self.model.path
        rows = torch.randint(len(data), (settings.batch,), generator=random)

        # x0, ε and noise levels, as in every denoising loss
        clean = data.latents(rows, random)
        noise = torch.randn(clean.shape, generator=random)
        index = self.draw_levels(random, step)
        level = path.levels[index]
        weight = expand_weights(weigh_levels(level, path.prediction_type, settings.loss_weighting), clean)

        # Drop the prompt of some samples and the map of others
        wordless = torch.rand(settings.batch, generator=random) < settings.prompt_dropout
        with_map = torch.rand(settings.batch, generator=random) >= settings.map_dropout
        prompts = torch.where(wordless, len(data.conditions) - 1, data.captions(rows))
        maps = data.maps(rows, random) * with_map.reshape(-1, 1, 1, 1)
        mine = torch.arange(settings.batch)[self.share.rows]
        return Batch(
            add_noise(clean, noise, level)[mine],
            index[mine],
            target(clean, noise, level, path.prediction_type)[mine],
            weight[mine],
            maps[mine],
            data.conditions[prompts[mine]],
        )

    def draw_levels(self, random: torch.Generator, step: int) -> Tensor:
        """Indices of noise levels [B]: a share of them from the noisier levels; at the end all are uniform."""
        count, levels = self.settings.batch, len(self.model.path.levels)
        remaining = min(1.0, (1 - step / self.settings.steps) / (1 - FALLING))
        uniform = draw_stratified_levels(count, levels, random)
        first = round(NOISY * levels)
        noisy = first + (uniform * (levels - first)) // levels
        noisier = torch.rand(count, generator=random) < self.settings.noisy_share * max(0.0, remaining)
        return torch.where(noisier, noisy, uniform)

    def compute_loss(self, batch: Batch) -> Tensor:
        """The denoising loss []; its mean over processes is the mean over the whole batch."""
        with self.model.autocast():
            control = Control.of(self.network, batch.maps)
        prediction = self.model.predict(
            batch.noisy, batch.level, replace(batch.conditions, controls=(control,))
        )
        errors = squared_error(prediction, batch.target, batch.weight)
        return errors.sum() * (self.share.scale / self.settings.batch)

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        """Write the network as diffusers saves it, and `condition.json` beside it."""
        with self.averaged():
            save_network(self.network.module, self.settings.kind, run)
        write_json(run / CONDITION_FILE, self.record())
        return {}

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the `with`, the parameters are their moving averages, if there are any."""
        with nullcontext() if self.average is None else self.average.applied():
            yield

    def record(self) -> ControlRecord:
        """The contents of `condition.json`."""
        kinds = tuple(self.data.kinds)
        return ControlRecord(
            kinds=kinds,
            palette=load_labels() if "labels" in kinds and self.settings.model in OWN else {},
            base=self.model.fingerprint,
            model=self.settings.model,
        )
