"""DreamBooth: a few pictures of a subject, a word that comes to mean it, a class that keeps its meaning.

Ruiz et al. 2023 bind a rare token to the subject by training on “a [V] dog”, and keep “a dog” what it was by a second,
prior-preservation term (eq. 2). What is trained is a question of its own (`customize.methods.registry`): a low-rank
adapter, the token's embedding, some or all of the weights. The prior term needs no class pictures by default: at
noised pictures of the subject, under the class prompt, the network must say what the untouched one said, from a bank
of answers computed once. With `--prior class-images` it learns from pictures of the class that the base draws, as in
the paper.

The phases follow each other so that the encoders and the denoiser are never in memory together:
check the pictures, encode pictures and prompts (remembered on disk), free the encoders, bank the base, train, show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from backbone.diffusion.losses import debiased, min_snr
from backbone.diffusion.noise import Level, PredictionType, add_noise, generator, target
from backbone.distributed import processes
from backbone.families.base import Text
from backbone.io.console import UserError
from backbone.models.model import Backbone
from backbone.training.attention import quick_to_train
from backbone.training.base_predictions import stratified_levels
from backbone.training.loop import (
    Average,
    Report,
    load_checkpoint,
    save_checkpoint,
    train,
)
from backbone.training.optimizer import make_optimizer, make_schedule
from customize.data.dataset import Bucket, Material
from customize.methods.registry import pieces
from customize.settings import Settings

CHECKPOINT = "checkpoint.safetensors"


class Batch(NamedTuple):
    """Noisy latents [B, C, H, W], indices of their levels [B], targets [B, C, H, W], weights [B, 1, H, W]."""

    noisy: Tensor
    levels: Tensor
    wanted: Tensor
    weight: Tensor


class Training:
    """A concept in training: `steps` yields the reports, `save` and `resume` keep it exactly."""

    def __init__(self, model: Backbone, material: Material, settings: Settings) -> None:
        self.model, self.material, self.settings = model, material, settings
        self.pieces = pieces(model, settings)
        self.parameters = {name: value for piece in self.pieces for name, value in piece.parameters.items()}
        self.optimizer = make_optimizer(settings.optimizer, self.pieces, weight_decay=settings.weight_decay)
        self.average = Average(self.parameters, decay=settings.ema_decay) if settings.ema_decay else None
        self.share = share_of(settings)
        self.done = 0

    def steps(self) -> Iterator[Report]:
        """Trains, a report each optimiser step."""
        if self.settings.gradient_checkpointing:
            cast(Any, self.model.denoiser).enable_gradient_checkpointing()
        with quick_to_train(self.model.denoiser):
            for report in train(
                self.losses,
                self.parameters,
                optimizer=self.optimizer,
                lr_schedule=make_schedule(
                    self.settings.lr_scheduler,
                    steps=self.settings.steps,
                    warmup=self.settings.lr_warmup_steps,
                ),
                steps=self.settings.steps,
                done=self.done,
                clip=self.settings.max_grad_norm,
                average=self.average,
                reduce=processes.gradient_averaging(),
            ):
                self.done = report.step
                yield report

    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses of this process's share of one step's micro-batches."""
        share = (step - 1) / self.settings.steps
        for piece in self.pieces:
            for value in piece.parameters.values():
                value.requires_grad_(piece.begins <= share < piece.ends)
        for micro in range(self.settings.gradient_accumulation_steps)[self.share.micros]:
            key = (self.settings.seed, step) if micro == 0 else (self.settings.seed, step, micro)
            yield self.loss(generator(*key), step)

    def loss(self, random: torch.Generator, step: int) -> Tensor:
        """Ruiz et al. 2023, eq. 2: the subject's error plus λ times the change of the class; of this process's rows."""
        settings, material = self.settings, self.material
        bucket = self.bucket(random)
        subject, rows = self.subject_batch(bucket, random)
        parts = [subject]
        if material.has_prior:
            prior, prior_rows = self.prior_batch(bucket, random)
            parts.append(prior)
            rows = torch.cat([rows, prior_rows])
        columns = (torch.cat(column)[self.share.rows] for column in zip(*parts, strict=True))
        (noisy, index, wanted, weight), rows = columns, rows[self.share.rows]
        with self.model.autocast():
            text = self.text(rows)
        time = self.model.path.levels.time
        assert time is not None
        with self.model.autocast(), self.dropout(step):
            prediction = self.model.family.network(self.model.denoiser, text)(
                noisy, time[index].to(noisy.device)
            )
        error = (prediction.float() - wanted).square() * weight.to(wanted)
        each = error.flatten(1).mean(1)
        self.refuse_infinite(each.detach(), rows, step)
        return each.sum() * (self.share.scale / settings.batch)

    def refuse_infinite(self, errors: Tensor, rows: Tensor, step: int) -> None:
        """`UserError` naming the pictures whose error is not finite."""
        bad = [int(row) for row, fine in zip(rows, errors.isfinite().tolist(), strict=True) if not fine]
        if not bad:
            return
        names, prompts = self.material.names, self.material.class_prompts
        culprits = [names[row] if row < len(names) else f"“{prompts[row - len(names)]}”" for row in bad]
        raise UserError(
            f"Training stopped at step {step}: the loss is not finite at {', '.join(dict.fromkeys(culprits))}. "
            "Lower --learning-rate or choose --precision fp32; the last checkpoint holds finite weights."
        )

    def bucket(self, random: torch.Generator) -> Bucket:
        """The pictures that a batch is drawn from, as often as all of them together are."""
        buckets = self.material.buckets
        if len(buckets) == 1:
            return buckets[0]
        share = torch.stack([self.material.share[bucket.rows].sum() for bucket in buckets])
        return buckets[int(torch.multinomial(share, 1, generator=random))]

    def subject_batch(self, bucket: Bucket, random: torch.Generator) -> tuple[Batch, Tensor]:
        """Noised pictures of the subjects, and which of them they are [B]."""
        settings, material, levels = self.settings, self.material, self.model.path.levels
        share = material.share[bucket.rows]
        chosen = bucket.rows[torch.multinomial(share, settings.batch, replacement=True, generator=random)]
        clean = torch.cat([material.posteriors[int(i)].sample(random) for i in chosen])
        noise = torch.randn(clean.shape, generator=random).to(clean.device)
        if settings.noise_offset:
            shift = torch.randn(clean.shape[:2], generator=random)[..., None, None].to(clean.device)
            noise = noise + settings.noise_offset * shift
        index = stratified_levels(settings.batch, len(levels), random)
        level, kind = levels[index], self.model.path.prediction_type
        weight = weighting(level, kind, settings)[:, None, None, None].expand(-1, 1, *clean.shape[-2:])
        if material.masks is not None:
            weight = weight * torch.stack([material.masks[int(row)] for row in chosen])
        wanted = target(clean, noise, level, kind)
        return Batch(add_noise(clean, noise, level), index, wanted, weight), chosen

    def prior_batch(self, bucket: Bucket, random: torch.Generator) -> tuple[Batch, Tensor]:
        """Noised pictures for the class prompts, and which rows of the prompts those are [P].

        Targets are the base's own predictions, or the noise on pictures of the class that it drew.
        """
        material, count = self.material, self.settings.prior_batch
        if bucket.bank is not None and bucket.classes is not None:
            draw = torch.randint(len(bucket.bank), (count,), generator=random)
            noisy = bucket.bank.noisy[draw].to(self.model.device)
            index, wanted = bucket.bank.level[draw], bucket.bank.prediction[draw].to(noisy)
            about = bucket.classes[draw]
        else:
            assert material.drawn is not None and material.drawn_classes is not None
            draw = torch.randint(len(material.drawn), (count,), generator=random)
            clean = material.drawn[draw].to(self.model.device)
            noise = torch.randn(clean.shape, generator=random).to(clean)
            index = stratified_levels(count, len(self.model.path.levels), random)
            level = self.model.path.levels[index]
            noisy = add_noise(clean, noise, level)
            wanted = target(clean, noise, level, self.model.path.prediction_type)
            about = material.drawn_classes[draw]
        share = self.settings.prior_loss_weight * self.settings.batch / count  # λ, over fewer pictures
        weight = torch.full((count, 1, *noisy.shape[-2:]), share)
        return Batch(noisy, index, wanted, weight), len(material.prompts) + about

    def text(self, rows: Tensor) -> Text:
        """The prompts of these rows [B], counted through the pictures' and then the classes'."""
        material = self.material
        if material.text is not None:
            return {name: value[rows.to(value.device)] for name, value in material.text.items()}
        every = [*material.prompts, *material.class_prompts]
        said = [every[int(row)] for row in rows]
        different = list(dict.fromkeys(said))
        found = self.model.text_encoder(different)
        places = torch.tensor([different.index(prompt) for prompt in said])
        return {name: value[places.to(value.device)] for name, value in found.items()}

    @contextmanager
    def dropout(self, step: int) -> Iterator[None]:
        """The network with the adapter's dropout, drawn from the step alone; without dropout as it is."""
        if not self.settings.lora_dropout:
            yield
            return
        self.model.denoiser.train()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(generator(self.settings.seed, step, "dropout").initial_seed())
            yield
        self.model.denoiser.eval()

    def save(self, run: Path) -> None:
        """Writes the checkpoint from which `resume` goes on bit for bit."""
        if not processes.is_main_process():
            return
        save_checkpoint(
            run / CHECKPOINT,
            step=self.done,
            parameters=self.parameters,
            optimizer=self.optimizer,
            average=self.average,
        )

    def resume(self, run: Path) -> None:
        """Goes on where `save` was called last; from the start when it never was."""
        if (run / CHECKPOINT).exists():
            self.done, _ = load_checkpoint(
                run / CHECKPOINT,
                parameters=self.parameters,
                optimizer=self.optimizer,
                average=self.average,
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The averaged weights inside the `with`, where an average is kept."""
        if self.average is None:
            yield
            return
        with self.average.applied():
            yield

    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        """Writes what was learned; gives the fields of `Concept` that name the files."""
        files: dict[str, Any] = {}
        with self.averaged():
            for piece in self.pieces:
                files |= piece.save(run, header)
        return files


# What the settings stand for ---------------------------------------------------------------------------------


def share_of(settings: Settings) -> processes.Share:
    """What this process does of a step. Raises `UserError` for settings that these processes cannot share."""
    if settings.method in ("full", "custom-diffusion"):
        processes.require_whole_model(f"--method {settings.method}")
    if settings.adapter == "dora":
        processes.require_whole_model("DoRA, which measures the base's weights,")
    share = processes.share_of_step(settings.gradient_accumulation_steps, settings.batch)
    if settings.lora_dropout and share.scale > 1:
        raise UserError(
            "--lora-dropout leaves out parts of a whole batch, so that a batch cannot be cut up for "
            f"{share.scale} processes. Add --gradient-accumulation-steps {share.scale} with a smaller "
            "--batch, or leave out the dropout."
        )
    return share


def weighting(level: Level, kind: PredictionType, settings: Settings) -> Tensor:
    """The weight of each sample's error [B], by its noise level."""
    match settings.loss_weighting:
        case "none":
            return torch.ones(len(level))
        case "min-snr":  # Hang et al. 2023
            return min_snr(level, settings.snr_gamma, kind)
        case "debiased":  # Yu et al. 2023
            return debiased(level, kind)
    raise UserError(
        f"There is no weighting {settings.loss_weighting}. Choose one of none, min-snr, debiased."
    )
