"""Preference optimisation: pairs, a loss of errors, a reference, over the one training loop.

Diffusion-DPO (Wallace et al. 2024) and its relatives raise the likelihood of preferred pictures over the others',
relative to the model that training began with. Both pictures of a pair are noised with one ε to one level, so their
errors differ by the images alone. The records and noise samples of a step follow from the step's number, so
a run that was stopped goes on bit for bit, and the reference's errors can be cached (`align.objectives.reference`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from align.objectives.dataset import (
    Batch,
    NoiseSamples,
    PreferenceData,
    StepBatches,
    mean_squares,
    residuals,
    split_micro_batches,
)
from align.objectives.losses import (
    LOSSES,
    PairBatch,
    safeguard,
    scaled_gradient,
    with_sft,
)
from align.objectives.metrics import Figures, compute_errors_at, correctness, make_evaluation
from align.objectives.reference import (
    CachedReference,
    LiveReference,
    RecordSamples,
    Reference,
    open_cached_reference,
    reference_key,
)
from align.settings import WITH_BETA, Settings
from backbone.adapters.concept import Concept
from backbone.adapters.lora import (
    LORA_WEIGHTS,
    activate_adapters,
    add_lora,
    save_lora,
    say_useless_rank,
    use_adapters,
)
from backbone.data.prefetch import StepLoader
from backbone.diffusion.losses import debiased, min_snr, uniform
from backbone.diffusion.noise import Level, PredictionType
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.io.console import UserError, notify_once
from backbone.io.files import content_hash, write_tensors
from backbone.io.progress import progress
from backbone.models.compiled import CompiledBlocks
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from backbone.training.fast import fast_steps
from backbone.training.optimizer import make_adamw
from backbone.training.run import Objective

ADAPTER = "taste"
CHANGED = "weights_change.safetensors"  # of a full run: the change of the denoiser's weights
LEVEL_WEIGHTS: dict[str, Callable[[Level, PredictionType], Tensor]] = {
    "none": lambda level, kind: uniform(level),
    "min-snr": lambda level, kind: min_snr(level, prediction_type=kind),
    "debiased": debiased,
}
MAX_EVALUATED = 1000  # most held-out records on which a run is evaluated
GAP_RECORDS = 64  # training records whose seen noise samples are compared with unseen ones


@dataclass
class PreferenceTraining(Objective):
    """Preference optimisation of a model on pairs or single images that were judged.

    `base` names the adapters of the model that training begins with (`backbone.adapters.apply.load_concepts`), and
    `concepts` are the concepts that they came from.
    """

    model: Backbone
    data: PreferenceData
    settings: Settings
    base: Sequence[str] = ()
    concepts: Sequence[Concept] = ()
    figures: dict[str, Tensor | float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings, levels = self.settings, len(self.model.path.levels)
        self.scales = ("--beta",) if settings.loss in WITH_BETA else ()
        self.share = find_share(settings)
        if settings.gradient_checkpointing:
            cast(Any, self.model.denoiser).enable_gradient_checkpointing()
        self.samples = NoiseSamples(
            "training",
            settings.seed,
            settings.draws,
            levels,
            settings.prompt_dropout,
            settings.flip,
            crop=settings.random_crop > 0,
            lowest=int(settings.least_noise * levels),
        )
        self.start: dict[str, Tensor] = {}
        self._as_reference: Callable[[], AbstractContextManager[None]] = nullcontext
        network = self._unfreeze_weights() if settings.full else self._add_adapter()
        self.live = LiveReference(self.model, network, self._as_reference)
        self.compiled = CompiledBlocks([self.model.denoiser, network]) if settings.compile else None
        self.train_on(self.data)
        self.optimizer = make_adamw(
            [{"params": list(self.parameters.values()), "lr": settings.learning_rate}],
            weight_decay=settings.weight_decay,
        )

    def train_on(self, data: PreferenceData) -> None:
        """Continue training on these data; the reference's errors on them are computed again."""
        settings = self.settings
        self.set_data(data)
        cached = settings.reference == "cached" and data.train
        self.reference: Reference = self._open_reference_cache() if cached else self.live
        fresh, held_out = data.train[self.gap_rows], data.held_out.select(MAX_EVALUATED)
        if len(held_out) < len(data.held_out):
            notify_once(
                f"Of {len(data.held_out)} held-out records {MAX_EVALUATED} are judged, chosen by their contents."
            )
        parts = {"held_out": ("held-out", held_out), "training": ("fresh", fresh)}
        with self._evaluation_mode():  # of several processes rank 0 evaluates, or all together
            self.evaluations = {
                name: make_evaluation(self.model, data, items, self.live, settings, samples)
                for name, (samples, items) in parts.items()
                if processes.is_participant()
            }
        if (
            settings.full
            and isinstance(self.reference, CachedReference)
            and LOSSES[settings.loss].reference != "nothing"
        ):
            self.fill_reference_cache(self.reference)

    def set_data(self, data: PreferenceData) -> None:
        """Make the batches of these data from now on."""
        self.data = data
        self.pool = len(data.train) * data.train.group
        self.__dict__.pop("gap_rows", None)
        self.steps = StepBatches(data, self.samples, self.settings, self.share)
        self.batches = StepLoader(
            self.steps, self.settings.steps, self.model.device, workers=self.settings.workers
        )

    # Training ------------------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """The number of images in a step: two per pair, or one per single image."""
        return self.settings.batch * self.data.train.group

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Fast steps of the denoiser; training mode only where diffusers needs it to checkpoint gradients."""
        with fast_steps(self.model.denoiser):
            self.model.denoiser.train(self.settings.gradient_checkpointing)
            try:
                yield
            finally:
                self.model.denoiser.eval()

    def close_loader(self) -> None:
        self.batches.close()

    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses [] of this process's share of a step's micro-batches.

        They are scaled so that the loop's mean over them, and over processes, is the mean over records.
        """
        parts = self.steps.list_micro_batches(step)
        gathered: list[dict[str, Tensor]] = []
        batches: Iterable[Batch] = (clean.add_noise(self.model.path) for clean in self.batches.at(step))
        pair_batches: Sequence[PairBatch | None] = [None] * len(parts)
        # A loss that depends on the whole batch's mean (KTO) gets it first, if the batch is split
        is_split = len(parts) > 1 or (processes.world_size() > 1 and self.share.scale == 1)
        if is_split and LOSSES[self.settings.loss].averaged:
            batches = list(batches)
            pair_batches = self._precompute_batches(parts, batches)
        for part, batch, precomputed in zip(parts, batches, pair_batches, strict=True):
            loss, figures = self.loss(part, batch, precomputed)
            gathered.append(figures)
            yield loss.mean() * (len(part) * len(parts) * processes.world_size() / self.settings.batch)
        self.figures = {
            name: processes.reduce_mean(torch.cat([figures[name] for figures in gathered]))
            for name in gathered[0]
        }

    @torch.no_grad()
    def _precompute_batches(
        self, parts: Sequence[RecordSamples], batches: Sequence[Batch]
    ) -> list[PairBatch]:
        """A step's micro-batches with their mean, for a loss that depends on the mean over the whole batch.

        It takes one more prediction of each, without gradients.
        """
        averaged = LOSSES[self.settings.loss].averaged
        assert averaged is not None
        pair_batches = [self.make_pair_batch(part, batch) for part, batch in zip(parts, batches, strict=True)]
        mean = processes.reduce_mean(torch.cat([averaged(batch, self.settings) for batch in pair_batches]))
        return [replace(batch, mean=lambda values: mean) for batch in pair_batches]

    def loss(
        self, samples: RecordSamples, noised: Batch | None = None, precomputed: PairBatch | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [B] at these (record, noise index), and figures [B] for the log.

        `noised` is their batch if it has been read, `precomputed` that of `_precompute_batches`.
        """
        settings = self.settings
        batch = self.make_pair_batch(
            samples, self.read_batch(samples) if noised is None else noised, precomputed
        )
        loss = LOSSES[settings.loss].loss(batch, settings)
        if settings.sft_weight and settings.by_pairs:
            decided = (batch.preference != 0.5).to(loss)  # in a tie neither image is preferred
            loss = with_sft(loss, batch.errors[0] * decided, settings.sft_weight)
        return loss, batch.figures()

    def read_batch(self, samples: RecordSamples) -> Batch:
        """The batch of these (record, noise index)."""
        return self.steps.read(samples).to(self.model.device).add_noise(self.model.path)

    def make_pair_batch(
        self, samples: RecordSamples, batch: Batch, precomputed: PairBatch | None = None
    ) -> PairBatch:
        """The errors at these (record, noise index) of the model, and of the reference as far as the loss needs it.

        With `precomputed`, for a loss of errors alone, only the model's errors are computed again.
        """
        settings, path = self.settings, self.model.path

        # Residuals [2, B, C, H, W] of the winner and the loser
        residual = residuals(self.model, self.model.denoiser, batch)
        # Both images of a pair are at one level, so that one weight per record is enough.
        level = path.levels[batch.index[: len(batch)]]
        weight = LEVEL_WEIGHTS[settings.loss_weighting](level, path.prediction_type)
        weight = send(weight.to(residual.dtype), residual.device)
        errors = weight * mean_squares(residual)
        if settings.safeguard >= 0:  # scales down the gradient that raises the loser's error
            winner, loser = errors
            product = weight * (residual[0] * residual[1]).detach().flatten(1).mean(1)
            loser = scaled_gradient(loser, safeguard(winner, product, margin=settings.safeguard))
            errors = torch.stack([winner, loser])
        if precomputed is not None:
            return replace(precomputed, errors=errors)
        reference = drift = None
        match LOSSES[settings.loss].reference:
            case "errors":
                reference = weight * self.reference.errors(batch, samples)
            case "predictions":
                reference_residual = self.live.residuals(batch)
                reference = weight * mean_squares(reference_residual)
                drift = weight * (residual[0] - reference_residual[0]).square().flatten(1).mean(1)
        # Other processes have the rest of the batch
        batch_mean = processes.reduce_mean if self.share.scale > 1 else torch.mean
        return PairBatch(errors, send(batch.preference, errors.device), reference, drift, batch_mean)

    def list_samples(self, step: int) -> list[tuple[int, int]]:
        """The (record, noise index) of a step, for all processes."""
        return self.steps.list_samples(step)

    def evaluate(self) -> dict[str, Figures]:
        """The figures of the held-out records and of some training records, at noise that training never sees."""
        with torch.no_grad(), self._evaluation_mode():
            figures = {
                name: evaluation(self.model.denoiser)
                for name, evaluation in self.evaluations.items()
                if evaluation.items
            }
        return figures

    def measure_noise_gap(self) -> float:
        """The seen/unseen-noise gap: accuracy at noise that training saw minus at unseen noise, same training records.

        NaN before the first pass, and where all records are ties. Where it grows, training fits the noise samples and
        not the images: more `--draws` help.
        """
        if self.settings.online or not self.data.train:
            return math.nan  # every round has its own pictures
        passes = self.done * self.settings.batch // len(self.data.train)
        ks = range(min(passes, self.settings.draws, self.settings.evaluation_draws))
        rows = self.gap_rows
        reference = self._read_reference(rows, ks) if rows and ks else None
        if reference is None:
            return math.nan
        items, fresh = self.data.train[rows], self.evaluations["training"]
        with torch.no_grad(), self._evaluation_mode():
            network = self.model.denoiser
            visited = compute_errors_at(self.model, self.data, items, self.samples, network, fresh.batch, ks)
            seen_accuracy = correctness(items, visited, reference).mean()
            return float(seen_accuracy - correctness(items, fresh.errors(network), fresh.reference).mean())

    # Saving --------------------------------------------------------------------------------------------------

    def save(self, run: Path) -> None:
        """Write the checkpoint, and save the reference's errors that all processes have computed."""
        super().save(run)
        if isinstance(self.reference, CachedReference):
            self.reference.merge()

    def write(self, run: Path, header: dict[str, str]) -> dict[str, str]:
        """Write what was learned; return the fields of `Concept` that name the files."""
        if not self.settings.full:
            save_lora(run / LORA_WEIGHTS, self.model.denoiser, ADAPTER, metadata=header)
            return {"weights": LORA_WEIGHTS}
        changed = {
            name: (value.detach().cpu() - self.start[name]).bfloat16()
            for name, value in self.parameters.items()
        }
        write_tensors(run / CHANGED, changed, header)
        return {"changed": CHANGED}

    def fill_reference_cache(self, cached: CachedReference) -> None:
        """Evaluate the base at every sample that training will take, in training's own batches."""
        steps = [step for step in range(1, self.settings.steps + 1) if self._has_unknown(cached, step)]
        with progress(len(steps), "the base's errors") as bar, self._evaluation_mode(), self.stepping():
            for step in steps:
                for samples in self.steps.list_micro_batches(step):
                    cached.errors(self.read_batch(samples), samples)
                bar.advance(images=self.settings.batch)
                cached.flush()
        cached.merge()

    @cached_property
    def gap_rows(self) -> list[int]:
        """Rows of training records that are not ties, at most 64, chosen by their contents."""
        preferred = self.data.train.judged
        order = np.argsort(self.data.train.keys[preferred.numpy()], kind="stable")
        return [int(row) for row in preferred[torch.from_numpy(order[:GAP_RECORDS])]]

    # Parts ---------------------------------------------------------------------------------------------------

    def _add_adapter(self) -> nn.Module:
        self.parameters = add_trained_lora(self.model, self.settings, self.base)
        self._as_reference = partial(use_adapters, self.model.denoiser, list(self.base))
        return self.model.denoiser

    def _unfreeze_weights(self) -> nn.Module:
        if self.base:
            raise UserError(
                "Full weights are not trained below an adapter. Train a LoRA, or merge the concept first."
            )
        denoiser = self.model.denoiser.float()
        self.parameters = {name: value.requires_grad_(True) for name, value in denoiser.named_parameters()}
        self.start = {name: value.detach().clone().cpu() for name, value in self.parameters.items()}
        if self.settings.reference == "copy":
            with fast_attention_backward(denoiser):  # the copy keeps these processors
                return copy.deepcopy(denoiser).requires_grad_(False).eval()
        return denoiser  # before training the denoiser is its own reference

    def _open_reference_cache(self) -> CachedReference:
        settings, model = self.settings, self.model
        records = content_hash(self.data.train.keys.tobytes())
        facts = (
            "reference errors, version 2",
            model.fingerprint,
            model.dtype,
            *model.placement.rounding,
            model.device.type,
            settings.full,
            model.resolution,
            [concept.hash_files() for concept in self.concepts],
            (settings.seed, settings.draws, settings.prompt_dropout, settings.flip),
            (settings.random_crop, settings.least_noise),
            # The noise samples that share a batch, which determines the errors to the last bit
            (settings.batch, settings.micro_batch),
            records,
            *([processes.world_size()] if self.share.scale > 1 else []),
            *(["compiled"] if settings.compile else []),
        )
        return open_cached_reference(
            self.live,
            reference_key(*facts),
            (len(self.data.train), settings.draws, self.data.train.group),
        )

    def _has_unknown(self, cached: CachedReference, step: int) -> bool:
        return any(bool(torch.isnan(cached.values[row, k, 0])) for row, k in self.list_samples(step))

    def _read_reference(self, rows: Sequence[int], ks: Sequence[int]) -> Tensor | None:
        """The reference's errors at training's noise samples [N, E, G]; None where it no longer exists."""
        # Compiled blocks round differently: their errors are not compared with those of an evaluation
        comparable = self.compiled is None or self.settings.full
        if isinstance(self.reference, CachedReference) and comparable:
            self.reference.flush()
            errors = self.reference.values[torch.tensor(rows)][:, torch.tensor(ks)]
            if not torch.isnan(errors).any():
                return errors
            if self.settings.full:
                return None
        items = self.data.train[list(rows)]
        batch = self.evaluations["training"].batch
        with torch.no_grad(), self._evaluation_mode(), self.live.as_reference():
            return compute_errors_at(self.model, self.data, items, self.samples, self.live.network, batch, ks)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Evaluation mode, with attention as in training: an untrained network has exactly its reference's errors."""
        was_training = self.model.denoiser.training
        self.model.denoiser.eval()
        try:
            with fast_attention_backward(self.model.denoiser):
                yield
        finally:
            self.model.denoiser.train(was_training)


def add_trained_lora(model: Backbone, settings: Settings, base: Sequence[str]) -> dict[str, Tensor]:
    """Add the LoRA to train to the denoiser, in addition to the adapters `base`; return its tensors.

    `UserError` for a set of layers that the family does not know.
    """
    layers = model.find_lora_layers(settings.lora_layers)
    parameters = add_lora(
        model.denoiser,
        ADAPTER,
        rank=settings.rank,
        alpha=settings.lora_alpha,
        targets=layers,
        seed=settings.seed,
    )
    say_useless_rank(parameters)
    activate_adapters(model.denoiser, [*base, ADAPTER])
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def find_share(settings: Settings) -> processes.Share:
    """This process's share of a step. Raises `UserError` for a batch that these processes cannot share."""
    if settings.full or settings.online:
        processes.require_whole_model("--full" if settings.full else "--online")
    parts = split_micro_batches([(0, 0)] * settings.batch, settings)
    return processes.find_share_of_step(len(parts), min(len(part) for part in parts))
