"""DreamBooth: bind a token to a subject from a few images, and preserve its class.

Ruiz et al. 2023 bind a rare token to the subject by training on “a [V] dog”, and keep “a dog” what it was by a second,
prior-preservation term (eq. 2). Which parameters are trained is a separate choice (`customize.methods.registry`): a
low-rank adapter, the token's embedding, some or all of the weights. Prior preservation needs no class images by
default: on the class prompt, at noised images of the subject, the model is regularised towards the frozen base
model's predictions, which are computed once. With `--prior class-images` it learns from generated images of the class,
as in the paper.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from backbone.adapters.concept import checkpoint, read_concept
from backbone.conditions.conditions import Conditions
from backbone.data.prefetch import Movable, StepLoader
from backbone.diffusion.losses import debiased, min_snr, squared_error
from backbone.diffusion.noise import Level, PredictionType, add_noise, generator, target
from backbone.distributed import processes
from backbone.families.base import NoisePath
from backbone.io.console import UserError
from backbone.io.run_folder import CHECKPOINT
from backbone.models.compiled import CompiledBlocks
from backbone.models.model import Backbone
from backbone.training.base_predictions import draw_stratified_levels
from backbone.training.fast import fast_steps
from backbone.training.loop import READ_EVERY, Average
from backbone.training.optimizer import make_optimizer
from backbone.training.run import Objective
from customize.data.dataset import Bucket, TrainingData
from customize.methods.begin import begin_from, copy_learned
from customize.methods.registry import make_trainable
from customize.settings import Settings


@dataclass(frozen=True, eq=False)
class Batch(Movable):
    """B samples of the loss.

    noisy       latents [B, C, …]
    level       indices of their noise levels [B]
    target      what the network should predict [B, C, …]
    weight      loss weights [B, 1, …], one for each position of the latent
    rows        indices of their prompts [B], in the images' prompts followed by the class prompts
    conditions  the encoded prompts; None before they are looked up. If the text encoder is trained they have no
                text, or are None
    """

    on_host: ClassVar[tuple[str, ...]] = ("level", "rows")

    noisy: Tensor
    level: Tensor
    target: Tensor
    weight: Tensor
    rows: Tensor
    conditions: Conditions | None = None

    @staticmethod
    def cat(parts: Sequence[Batch]) -> Batch:
        """The samples of all parts, concatenated, without conditions."""
        columns = zip(*(part.columns() for part in parts), strict=True)
        noisy, level, targets, weight, prompts = map(torch.cat, columns)
        return Batch(noisy, level, targets, weight, prompts)

    def part(self, rows: slice) -> Batch:
        """These samples, without conditions."""
        noisy, level, targets, weight, prompts = (column[rows] for column in self.columns())
        return Batch(noisy, level, targets, weight, prompts)

    def columns(self) -> tuple[Tensor, ...]:
        """The fields with a row for each sample, except the conditions."""
        return self.noisy, self.level, self.target, self.weight, self.rows


class DreamBooth(Objective):
    """DreamBooth's loss with prior preservation, on whatever parameters the method trains."""

    settings: Settings

    def __init__(self, model: Backbone, data: TrainingData, settings: Settings) -> None:
        self.model, self.data, self.settings = model, data, settings
        self.trained = make_trainable(model, settings)
        self.parameters = {name: value for part in self.trained for name, value in part.parameters.items()}
        self.optimizer = make_optimizer(settings.optimizer, self.trained, weight_decay=settings.weight_decay)
        self.average = Average(self.parameters, decay=settings.ema_decay) if settings.ema_decay else None
        self.share = find_share(settings)
        self.pool = len(data.frequency)
        self.batches = StepLoader(self.draw_step, settings.steps, model.device, workers=settings.workers)
        self.figures: dict[str, Tensor | float] = {}
        unread = READ_EVERY * settings.gradient_accumulation_steps  # until the loop reads them
        self.recent: deque[tuple[int, Tensor, Tensor]] = deque(maxlen=unread)
        self.compiled = CompiledBlocks([model.denoiser]) if settings.compile else None
        if settings.gradient_checkpointing:
            cast(Any, model.denoiser).enable_gradient_checkpointing()

    def resume(self, run: Path) -> None:
        """Continue from the last checkpoint; without one start from the weights of the run of `--begin-from`."""
        if self.settings.begin_from and not (run / CHECKPOINT).exists():
            concept = read_concept(checkpoint(self.settings.begin_from))
            begin_from(self.model, self.trained, concept)
            if self.average is not None:
                self.average = Average(self.parameters, decay=self.settings.ema_decay)
        super().resume(run)

    @property
    def images(self) -> int:
        """Images of the subject in a step; class samples are not counted."""
        return self.settings.batch

    def learning(self) -> AbstractContextManager[None]:
        """Fast steps of the denoiser."""
        return fast_steps(self.model.denoiser)

    def close_loader(self) -> None:
        self.batches.close()

    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses [] of this process's share of one step's micro-batches."""
        progress = (step - 1) / self.settings.steps
        for part in self.trained:  # pivotal tuning trains the embedding first, then the adapter
            for value in part.parameters.values():
                value.requires_grad_(part.begins <= progress < part.ends)
        micros = range(self.settings.gradient_accumulation_steps)[self.share.micros]
        for micro, batch in zip(micros, self.batches.at(step), strict=True):
            yield self.compute_loss(batch, step, micro)

    def draw_step(self, step: int) -> list[Batch]:
        """This process's share of a step's micro-batches; a function of the step alone."""
        keys = [
            (self.settings.seed, step) if micro == 0 else (self.settings.seed, step, micro)
            for micro in range(self.settings.gradient_accumulation_steps)[self.share.micros]
        ]
        return [self.draw(generator(*key)) for key in keys]

    def draw(self, random: torch.Generator) -> Batch:
        """A batch; every process draws the same one and keeps its own samples of it."""
        bucket = self.draw_bucket(random)
        parts = [self.draw_subject_batch(bucket, random)]
        if self.data.has_prior:
            parts.append(self.draw_prior_batch(bucket, random))
        batch = Batch.cat(parts).part(self.share.rows)
        encoded = self.data.conditions
        return batch if encoded is None else replace(batch, conditions=encoded[batch.rows])

    def loss(self, random: torch.Generator, step: int) -> Tensor:
        """The loss [] of a newly drawn batch."""
        return self.compute_loss(self.draw(random).to(self.model.device), step)

    def compute_loss(self, batch: Batch, step: int, micro: int = 0) -> Tensor:
        """The loss []: the subject's plus λ times the prior's (Ruiz et al. 2023, eq. 2), mean over the whole batch."""
        conditions = batch.conditions
        # Σ weight·(prediction − target)² / batch; the prior's rows carry λ in their weights
        with self.dropout(step, micro):
            if conditions is None or not conditions.text:
                with self.model.autocast():
                    encoded = self.encode_conditions(batch.rows)
                conditions = encoded if conditions is None else replace(conditions, text=encoded.text)
            prediction = self.model.predict(batch.noisy, batch.level, conditions)
        errors = squared_error(prediction, batch.target, batch.weight)
        self.recent.append((step, batch.rows, errors.detach()))
        return errors.sum() * (self.share.scale / self.settings.batch)

    def explain(self, step: int) -> str:
        """The images whose loss was not finite in a recent step."""
        names, prompts = self.data.names, self.data.class_prompts
        bad = [
            int(row)
            for number, rows, errors in self.recent
            for row, finite in zip(rows, errors.isfinite().tolist(), strict=True)
            if number == step and not finite
        ]
        if not bad:
            return ""
        culprits = [names[row] if row < len(names) else f"“{prompts[row - len(names)]}”" for row in bad]
        return (
            f"the loss is not finite at {', '.join(dict.fromkeys(culprits))}. Lower --learning-rate or choose "
            "--precision fp32."
        )

    def draw_bucket(self, random: torch.Generator) -> Bucket:
        """The bucket of a batch, with the probability of its images."""
        buckets = self.data.buckets
        if len(buckets) == 1:
            return buckets[0]
        frequency = torch.stack([self.data.frequency[bucket.rows].sum() for bucket in buckets])
        return buckets[int(torch.multinomial(frequency, 1, generator=random))]

    def draw_subject_batch(self, bucket: Bucket, random: torch.Generator) -> Batch:
        """Noised images of the subjects, with the targets of the noise path (ε, v or flow velocity)."""
        settings, data, path = self.settings, self.data, self.model.path
        frequency = data.frequency[bucket.rows]
        rows = bucket.rows[torch.multinomial(frequency, settings.batch, replacement=True, generator=random)]

        # x0 ~ N(mean, std²) of the autoencoder's posterior, ε ~ N(0, I)
        mean, std = data.posterior(rows)
        posterior_noise = torch.stack([torch.randn(mean.shape[1:], generator=random) for _ in rows])
        clean = mean + std * posterior_noise
        noise = torch.randn(clean.shape, generator=random)
        if settings.noise_offset:  # a constant shift of each channel (Guttenberg 2023)
            shift = torch.randn(clean.shape[:2], generator=random)
            noise = noise + settings.noise_offset * shift.reshape(*shift.shape, *[1] * (clean.ndim - 2))

        # Noise levels stratified over the batch; the loss weight of each, times the mask's [B, 1, h, w]
        index = draw_stratified_levels(
            settings.batch, len(path.levels), random, make_timestep_weights(path, settings)
        )
        level = path.levels[index]
        by_level = weigh_levels(level, path.prediction_type, settings.loss_weighting, settings.snr_gamma)
        weight = expand_weights(by_level, clean)
        if data.masks is not None:
            weight = weight * torch.stack([data.masks[int(row)] for row in rows])
        return Batch(
            add_noise(clean, noise, level),
            index,
            target(clean, noise, level, path.prediction_type),
            weight,
            rows,
        )

    def draw_prior_batch(self, bucket: Bucket, random: torch.Generator) -> Batch:
        """Prior-preservation samples under the class prompts.

        Targets are the base model's cached predictions; with `--prior class-images` the noise path's own, on
        generated images of the class.
        """
        data, path, count = self.data, self.model.path, self.settings.prior_batch
        if bucket.base is not None and bucket.classes is not None:
            # Cached: (x_t, t) and what the frozen base predicts there
            indices = torch.randint(len(bucket.base), (count,), generator=random)
            noisy, index = bucket.base.noisy[indices], bucket.base.level[indices]
            targets = bucket.base.prediction[indices]
            classes = bucket.classes[indices]
        else:
            # Images of the class: freshly noised, with the noise path's own target
            assert data.class_latents is not None and data.class_rows is not None
            indices = torch.randint(len(data.class_latents), (count,), generator=random)
            clean = data.class_latents[indices]
            noise = torch.randn(clean.shape, generator=random)
            index = draw_stratified_levels(count, len(path.levels), random)
            level = path.levels[index]
            noisy, targets = add_noise(clean, noise, level), target(clean, noise, level, path.prediction_type)
            classes = data.class_rows[indices]
        # λ for the mean over `prior_batch` samples, in a loss that divides by `batch`
        weight = self.settings.prior_loss_weight * self.settings.batch / count
        weights = expand_weights(torch.full((count,), weight), noisy)
        return Batch(noisy, index, targets, weights, len(data.prompts) + classes)

    def encode_conditions(self, rows: Tensor) -> Conditions:
        """The conditions of these rows [B], which index the images' prompts followed by the class prompts."""
        data = self.data
        if data.conditions is not None:
            return data.conditions[rows].to(self.model.device)
        # the text encoder is trained: encode each distinct prompt once, with gradients
        all_prompts = [*data.prompts, *data.class_prompts]
        prompts = [all_prompts[int(row)] for row in rows]
        unique = list(dict.fromkeys(prompts))
        return Conditions(self.model.text_encoder(unique))[[unique.index(prompt) for prompt in prompts]]

    @contextmanager
    def dropout(self, step: int, micro: int = 0) -> Iterator[None]:
        """Inside the `with`, the adapter's dropout, if any, is on; its mask is a function of the micro-batch alone."""
        if not self.settings.lora_dropout:
            yield
            return
        networks = [self.model.denoiser]
        if self.settings.train_text_encoder:
            networks += [slot.model for slot in self.model.text_encoder.slots]
        further = (micro,) if micro else ()
        for network in networks:
            network.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.settings.seed, step, "dropout", *further).initial_seed())
            yield
        for network in networks:
            network.eval()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Inside the `with`, the parameters are their moving averages, if there are any."""
        if self.average is None:
            yield
            return
        with self.average.applied():
            yield

    def return_to(self, folder: Path) -> None:
        """Load the weights that `write` saved to a folder, for sampling; training cannot continue afterwards."""
        copy_learned(self.model, self.trained, read_concept(folder))
        self.average = None

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        """Write the trained weights; return the fields of `Concept` that name the files."""
        files: dict[str, Any] = {}
        with self.averaged():
            for part in self.trained:
                files |= part.save(run, header)
        return files


# Settings to values ---------------------------------------------------------------------------------


def find_share(settings: Settings) -> processes.Share:
    """This process's share of a step. Raises `UserError` for settings that these processes cannot share."""
    if settings.method in ("full", "custom-diffusion"):
        processes.require_whole_model(f"--method {settings.method}")
    if settings.adapter == "dora":
        processes.require_whole_model("DoRA, which measures the base's weights,")
    share = processes.find_share_of_step(settings.gradient_accumulation_steps, settings.batch)
    if settings.lora_dropout and share.scale > 1:
        raise UserError(
            "--lora-dropout leaves out parts of a whole batch, so that a batch cannot be split over "
            f"{share.scale} processes. Add --gradient-accumulation-steps {share.scale} with a smaller "
            "--batch, or leave out the dropout."
        )
    return share


def expand_weights(weight: Tensor, latents: Tensor) -> Tensor:
    """Weights [B] expanded to [B, 1, …], the spatial shape of latents [B, C, …]."""
    return weight.reshape(-1, *[1] * (latents.ndim - 1)).expand(-1, 1, *latents.shape[2:])


def make_timestep_weights(path: NoisePath, settings: Settings) -> Tensor | None:
    """Relative probability of each noise level of a path [levels]; None for a uniform distribution.

    As in diffusers' scripts: a portion of the last levels, which are the noisiest, or of the first, or a range of
    timesteps, on a scale on which there are 1000. The levels of a flow are quantiles of its density, whose timesteps
    are not equally far apart.
    """
    if settings.timestep_bias_strategy == "none":
        return None
    count = len(path.levels)
    portion = max(1, round(settings.timestep_bias_portion * count))
    if settings.timestep_bias_strategy == "range":
        # level i of a β schedule is its timestep i, that of a flow t = b
        is_flow = path.prediction_type == "flow"
        timesteps = 1000 * path.levels.b if is_flow else torch.arange(count).double() * 1000 / count
        chosen = (timesteps >= settings.timestep_bias_begin) & (timesteps < settings.timestep_bias_end)
    else:
        number = torch.arange(count)
        chosen = number >= count - portion if settings.timestep_bias_strategy == "later" else number < portion
    weights = torch.ones(count)
    weights[chosen] = settings.timestep_bias_multiplier
    return weights


def weigh_levels(level: Level, kind: PredictionType, weighting: str, snr_gamma: float = 5.0) -> Tensor:
    """The loss weight of each noise level [B]; `UserError` for an unknown `weighting`."""
    match weighting:
        case "none":
            return torch.ones(len(level))
        case "min-snr":  # Hang et al. 2023
            return min_snr(level, snr_gamma, kind)
        case "debiased":  # Yu et al. 2023
            return debiased(level, kind)
    raise UserError(f"There is no weighting {weighting}. Choose one of none, min-snr, debiased.")
