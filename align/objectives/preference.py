"""Preference optimisation: pairs, a loss of errors, a reference, over the one training loop.

Diffusion-DPO (Wallace et al. 2024) and its relatives raise the likelihood of preferred pictures over the others',
relative to the model that training began with. Both pictures of a pair are noised with one ε to one level, so their
errors differ by the pictures alone. Which draw of which record a step visits follows from the step's number, so a
run that was stopped goes on bit for bit, and the reference's errors can be banked (`align.objectives.reference`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from align.objectives.dataset import Draws, Material, batch_of, mean_squares, residuals
from align.objectives.losses import (
    PAIR_LOSSES,
    WITHOUT_REFERENCE,
    PairErrors,
    accuracy,
    dspo,
    kto,
    kto_baseline,
    mapo,
    safeguard,
    scaled_gradient,
    smoothed,
    with_sft,
)
from align.objectives.metrics import Figures, errors_at, judge, rightness
from align.objectives.reference import Bank, Cells, Live, Reference, bank_key, open_bank
from align.settings import Settings
from backbone.adapters.concept import Concept
from backbone.adapters.lora import LORA_WEIGHTS, activate_adapters, add_lora, save_lora, use_adapters
from backbone.diffusion.losses import debiased, min_snr, uniform
from backbone.diffusion.noise import Level, PredictionType, generator
from backbone.distributed import processes
from backbone.io.console import UserError, progress
from backbone.io.files import content_hash, write_tensors
from backbone.models.model import Backbone
from backbone.training.attention import quick_to_train
from backbone.training.loop import (
    Report,
    load_checkpoint,
    save_checkpoint,
    train,
)
from backbone.training.optimizer import make_schedule

ADAPTER = "taste"
CHECKPOINT = "checkpoint.safetensors"
CHANGED = "weights_change.safetensors"  # of a full run: how far the denoiser's weights moved
LEVEL_WEIGHTS: dict[str, Callable[[Level, PredictionType], Tensor]] = {
    "none": lambda level, kind: uniform(level),
    "min-snr": lambda level, kind: min_snr(level, prediction_type=kind),
    "debiased": debiased,
}
WATCHED = 64  # training records whose banked draws are compared with fresh ones


@dataclass
class PreferenceTraining:
    """A model in preference training: `steps` yields the reports, `save` and `resume` keep it exactly.

    `base` names the adapters that belong to where training began (`backbone.adapters.apply.load_concepts`), and
    `concepts` the run folders that they came from.
    """

    model: Backbone
    material: Material
    settings: Settings
    base: Sequence[str] = ()
    concepts: Sequence[Concept] = ()
    figures: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        settings, levels = self.settings, len(self.model.path.levels)
        self.share = share_of(settings)
        if settings.gradient_checkpointing:
            cast(Any, self.model.denoiser).enable_gradient_checkpointing()
        self.draws = Draws(
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
        network = self._full_weights() if settings.full else self._adapter()
        self.live = Live(self.model, network, self._as_reference)
        self.take(self.material)
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )
        self.done = 0

    def take(self, material: Material) -> None:
        """Learns from this material from now on, what was learned so far kept; its reference is asked anew."""
        settings = self.settings
        self.material = material
        self.__dict__.pop("watched", None)
        self._pass: tuple[int, list[int]] = (-1, [])
        banked = settings.reference == "bank" and material.train
        self.reference: Reference = self._bank() if banked else self.live
        fresh = [self.material.train[row] for row in self.watched]
        asked = {"held-out": ("held-out", material.held_out), "training": ("fresh", fresh)}
        with self._evaluation_mode():  # of several processes the writer judges, or all together
            self.judges = {
                name: judge(self.model, material, items, self.live, settings, draws)
                for name, (draws, items) in asked.items()
                if processes.is_participant()
            }
        if settings.full and isinstance(self.reference, Bank) and settings.loss not in WITHOUT_REFERENCE:
            self.fill(self.reference)

    # Training ------------------------------------------------------------------------------------------------

    def steps(self, *, until: int | None = None) -> Iterator[Report]:
        """Trains, to the end or `until` a step, a report each; `figures` then holds what the step's batch showed."""
        with quick_to_train(self.model.denoiser), self._training_mode():
            for report in train(
                self.losses,
                self.parameters,
                optimizer=self.optimizer,
                lr_schedule=make_schedule(
                    self.settings.lr_scheduler,
                    steps=self.settings.steps,
                    warmup=self.settings.lr_warmup_steps,
                ),
                steps=self.settings.steps if until is None else until,
                done=self.done,
                clip=self.settings.max_grad_norm,
                reduce=processes.gradient_averaging(),
            ):
                self.done = report.step
                yield report

    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses of this process's share of a step's micro-batches.

        They are scaled so that the loop's mean over them, and over processes, is the mean over records.
        """
        parts = self._micro(self.visits(step))
        gathered: list[dict[str, Tensor]] = []
        for part in parts:
            loss, figures = self.loss(part)
            gathered.append(figures)
            yield loss.mean() * (len(part) * len(parts) * processes.world_size() / self.settings.batch)
        self.figures = {
            name: float(processes.reduce_mean(torch.cat([figures[name] for figures in gathered])))
            for name in gathered[0]
        }

    def loss(self, cells: Cells) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss [B] at these cells, and figures [B] for the log."""
        settings = self.settings
        items = [self.material.train[row] for row, _ in cells]
        batch = batch_of(self.model, self.material, self.draws, items, [k for _, k in cells])
        path = self.model.path
        weight = LEVEL_WEIGHTS[settings.loss_weighting](
            path.levels[batch.index[: len(batch)]], path.prediction_type
        )
        residual = residuals(self.model, self.model.denoiser, batch)
        weight = weight.to(residual)
        error = weight * mean_squares(residual)
        preference = batch.preference.to(error.device)
        reference_residual = self.live.residuals(batch) if settings.loss == "dspo" else None
        if reference_residual is not None:
            reference: Tensor | None = weight * mean_squares(reference_residual)
        elif settings.loss in WITHOUT_REFERENCE:
            reference = None
        else:
            reference = weight * self.reference.errors(batch, cells)
        if settings.loss == "kto":
            assert reference is not None
            sign = 2 * preference - 1
            baseline = None
            if self.share.scale > 1:  # these are a part of a batch that others have the rest of
                baseline = kto_baseline(
                    processes.reduce_mean(0.5 * settings.beta * (reference[0] - error[0]))
                )
            return kto(error[0], settings.beta, reference[0], preference, baseline=baseline), {
                "accuracy": accuracy(sign * (reference[0] - error[0]).detach()),
                "error_change": (error[0] - reference[0]).detach(),
            }
        winner, loser = error
        if settings.safeguard >= 0:
            product = weight * (residual[0] * residual[1]).detach().flatten(1).mean(1)
            loser = scaled_gradient(loser, safeguard(winner, product, margin=settings.safeguard))
        pair = PairErrors(winner, loser, *(reference if reference is not None else ()))
        if reference_residual is not None:
            drift = weight * (residual[0] - reference_residual[0]).square().flatten(1).mean(1)
            loss = dspo(pair, settings.beta, drift, pull=settings.dspo_pull)
        else:
            loss = self._pair_loss(pair, smoothed(preference, settings.label_smoothing))
        if settings.sft_weight:
            wins = (preference != 0.5).to(winner)  # of a tie neither picture is what is wanted
            loss = with_sft(loss, winner * wins, settings.sft_weight)
        return loss, self._pair_figures(pair)

    def visits(self, step: int) -> list[tuple[int, int]]:
        """The cells (record, k) of a step, counted from 1: pass after pass over the records, each in its own order.

        Pass p visits every record once, at its draw p mod K; the levels of a record's draws are in random order.
        """
        count, size = len(self.material.train), self.settings.batch
        numbers = range((step - 1) * size, step * size)
        return [(self._order(n // count)[n % count], (n // count) % self.settings.draws) for n in numbers]

    def evaluate(self) -> dict[str, Figures]:
        """The figures of the held-out records and of some training records, at draws that training never visits."""
        with torch.no_grad(), self._evaluation_mode():
            found = {name: one(self.model.denoiser) for name, one in self.judges.items() if one.items}
        return found

    def gap(self) -> float:
        """Accuracy at visited draws minus accuracy at fresh draws, of the same training records; NaN before any.

        Where it grows, training has learned the draws and not the pictures: more `--draws` help.
        """
        if self.settings.online or not self.material.train:
            return math.nan  # every round has pictures of its own
        passes = self.done * self.settings.batch // len(self.material.train)
        ks = range(min(passes, self.settings.draws, self.settings.evaluation_draws))
        rows = self.watched
        reference = self._reference_at(rows, ks) if ks else None
        if reference is None:
            return math.nan
        items, fresh = [self.material.train[row] for row in rows], self.judges["training"]
        with torch.no_grad(), self._evaluation_mode():
            network = self.model.denoiser
            visited = errors_at(self.model, self.material, items, self.draws, network, fresh.batch, ks)
            known = rightness(items, visited, reference).mean()
            return float(known - rightness(items, fresh.errors(network), fresh.reference).mean())

    # Keeping -------------------------------------------------------------------------------------------------

    def save(self, run: Path) -> None:
        """Writes the checkpoint from which `resume` goes on bit for bit, and the bank."""
        if processes.is_main_process():
            save_checkpoint(
                run / CHECKPOINT, step=self.done, parameters=self.parameters, optimizer=self.optimizer
            )
        if isinstance(self.reference, Bank):
            self.reference.save()

    def resume(self, run: Path) -> None:
        """Goes on where `save` was called last; from the start when it never was."""
        if (run / CHECKPOINT).exists():
            self.done, _ = load_checkpoint(
                run / CHECKPOINT, parameters=self.parameters, optimizer=self.optimizer
            )

    def write(self, run: Path, header: dict[str, str]) -> dict[str, str]:
        """Writes what was learned; gives the fields of `Concept` that name the files."""
        if not self.settings.full:
            save_lora(run / LORA_WEIGHTS, self.model.denoiser, ADAPTER, metadata=header)
            return {"weights": LORA_WEIGHTS}
        moved = {
            name: (value.detach().cpu() - self.start[name]).bfloat16()
            for name, value in self.parameters.items()
        }
        write_tensors(run / CHANGED, moved, header)
        return {"changed": CHANGED}

    def fill(self, bank: Bank) -> None:
        """Asks the base at every cell that training will visit, in training's own batches."""
        wanted = [step for step in range(1, self.settings.steps + 1) if self._unknown(bank, step)]
        with progress(len(wanted), "the base's errors") as bar, self._evaluation_mode():
            for step in wanted:
                for cells in self._micro(self.visits(step)):
                    items = [self.material.train[row] for row, _ in cells]
                    ks = [k for _, k in cells]
                    bank.errors(batch_of(self.model, self.material, self.draws, items, ks), cells)
                bar.advance(images=self.settings.batch)
        bank.save()

    @cached_property
    def watched(self) -> list[int]:
        """Rows of training records that are not ties, at most 64, chosen by their contents."""
        rows = [row for row, item in enumerate(self.material.train) if item.preference != 0.5]
        return sorted(rows, key=lambda row: content_hash(f"watched/{self.material.train[row].key}".encode()))[
            :WATCHED
        ]

    # Parts ---------------------------------------------------------------------------------------------------

    def _adapter(self) -> nn.Module:
        self.parameters = new_adapter(self.model, self.settings, self.base)
        self._as_reference = partial(use_adapters, self.model.denoiser, list(self.base))
        return self.model.denoiser

    def _full_weights(self) -> nn.Module:
        if self.base:
            raise UserError(
                "Full weights are not trained below an adapter. Train a LoRA, or merge the concept first."
            )
        denoiser = self.model.denoiser.float()
        self.parameters = {name: value.requires_grad_(True) for name, value in denoiser.named_parameters()}
        self.start = {name: value.detach().clone().cpu() for name, value in self.parameters.items()}
        if self.settings.reference == "copy":
            with quick_to_train(denoiser):  # the copy keeps it
                return copy.deepcopy(denoiser).requires_grad_(False).eval()
        return denoiser  # until training begins it is its own reference

    def _bank(self) -> Bank:
        settings, model = self.settings, self.model
        records = content_hash("\n".join(item.key for item in self.material.train).encode())
        facts = (
            "reference errors, version 1",
            model.fingerprint,
            model.dtype,
            model.device.type,
            settings.full,
            model.resolution,
            [_contents(concept) for concept in self.concepts],
            (settings.seed, settings.draws, settings.prompt_dropout, settings.flip),
            (settings.random_crop, settings.least_noise),
            (
                settings.batch,
                settings.micro_batch,
            ),  # which draws share a batch, to the last bit of their errors
            records,
            *([processes.world_size()] if self.share.scale > 1 else []),
        )
        group = len(self.material.train[0].pictures)
        return open_bank(self.live, bank_key(*facts), (len(self.material.train), settings.draws, group))

    def _unknown(self, bank: Bank, step: int) -> bool:
        return any(bool(torch.isnan(bank.values[row, k, 0])) for row, k in self.visits(step))

    def _micro(self, cells: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """This process's share of a step's cells, in micro-batches."""
        parts = micro_batches(cells, self.settings)[self.share.micros]
        return [part[self.share.rows] for part in parts]

    def _order(self, number: int) -> list[int]:
        """The order of a pass over the records."""
        if self._pass[0] != number:
            random = generator(self.settings.seed, "pass", number)
            self._pass = (number, torch.randperm(len(self.material.train), generator=random).tolist())
        return self._pass[1]

    def _pair_loss(self, pair: PairErrors, preference: Tensor) -> Tensor:
        settings = self.settings
        if settings.loss == "mapo":
            return mapo(pair, settings.beta, preference, weight=settings.mapo_weight)
        return PAIR_LOSSES[settings.loss](pair, settings.beta, preference)

    def _pair_figures(self, pair: PairErrors) -> dict[str, Tensor]:
        winner, loser = pair.winner.detach(), pair.loser.detach()
        if pair.reference_winner is None or pair.reference_loser is None:
            return {"winner_error": winner, "loser_error": loser}
        return {
            "accuracy": accuracy(pair.margin),
            "winner_change": winner - pair.reference_winner,
            "loser_change": loser - pair.reference_loser,
        }

    @contextmanager
    def _training_mode(self) -> Iterator[None]:
        """diffusers saves memory only in training mode; nothing else depends on it, there is no dropout."""
        self.model.denoiser.train(self.settings.gradient_checkpointing)
        try:
            yield
        finally:
            self.model.denoiser.eval()

    def _reference_at(self, rows: Sequence[int], ks: Sequence[int]) -> Tensor | None:
        """The reference's errors at training's draws [N, E, G]; None where nobody can say any more."""
        if isinstance(self.reference, Bank):
            known = self.reference.values[torch.tensor(rows)][:, torch.tensor(ks)]
            if not torch.isnan(known).any():
                return known
            if self.settings.full:
                return None
        items = [self.material.train[row] for row in rows]
        batch = self.judges["training"].batch
        with torch.no_grad(), self._evaluation_mode(), self.live.as_reference():
            return errors_at(self.model, self.material, items, self.draws, self.live.network, batch, ks)

    @contextmanager
    def _evaluation_mode(self) -> Iterator[None]:
        """Nothing drawn, and attention as in training, so that an untouched network errs exactly as its reference."""
        before = self.model.denoiser.training
        self.model.denoiser.eval()
        try:
            with quick_to_train(self.model.denoiser):
                yield
        finally:
            self.model.denoiser.train(before)


def new_adapter(model: Backbone, settings: Settings, base: Sequence[str]) -> dict[str, Tensor]:
    """Puts the LoRA that is to be trained on the denoiser, beside the adapters `base`; gives its tensors.

    `UserError` for a set of layers that the family does not know.
    """
    layers = model.family.lora_targets.get(settings.lora_layers)
    if layers is None:
        known = ", ".join(model.family.lora_targets)
        raise UserError(f"There is no set of layers called {settings.lora_layers}. Choose one of {known}.")
    parameters = add_lora(
        model.denoiser,
        ADAPTER,
        rank=settings.rank,
        alpha=settings.lora_alpha,
        targets=layers,
        seed=settings.seed,
    )
    activate_adapters(model.denoiser, [*base, ADAPTER])
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return parameters


def micro_batches(cells: Cells, settings: Settings) -> list[list[tuple[int, int]]]:
    """A step's cells, as many at a time as fit."""
    size = settings.micro_batch or len(cells)
    return [list(cells[first : first + size]) for first in range(0, len(cells), size)]


def share_of(settings: Settings) -> processes.Share:
    """What this process does of a step. Raises `UserError` for a batch that these processes cannot share."""
    if settings.full or settings.online:
        processes.require_whole_model("--full" if settings.full else "--online")
    parts = micro_batches([(0, 0)] * settings.batch, settings)
    return processes.share_of_step(len(parts), min(len(part) for part in parts))


def _contents(concept: Concept) -> str:
    """A concept by its files."""
    files = [name for name in (concept.weights, concept.words, concept.changed) if name]
    return "/".join(content_hash(concept.folder / name) for name in files)
