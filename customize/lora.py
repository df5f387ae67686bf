"""DreamBooth with LoRA: a few pictures of a subject, a rare word that comes to mean it, a class that keeps its meaning.

Ruiz et al. 2023 (DreamBooth) bind a rare token to the subject by training on “a [V] dog”, and keep “a dog” what it
was by a second, prior-preservation term (eq. 2). Hu et al. 2022 (LoRA) make the weights' change low-rank,
W + (α/r)·B·A. Here the prior term needs no class pictures: at noised pictures of the subject, under the class
prompt, the adapted network must say what the untouched one said, from a bank of answers computed once.

The phases follow each other so that the encoders and the denoiser are never in memory together:
check the pictures, encode pictures and prompts (remembered on disk), free the encoders, bank the base, train, show.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from backbone.adapters import add_lora
from backbone.attention import quick_to_train
from backbone.bank import Bank, bank_of, stratified_levels
from backbone.cache import encoded, encoded_prompts
from backbone.console import UserError
from backbone.families import Text
from backbone.images import Picture
from backbone.loop import (
    Report,
    Schedule,
    generator,
    load_checkpoint,
    save_checkpoint,
    train,
    warm_constant,
    warm_cosine,
)
from backbone.model import Backbone, Posterior
from backbone.noise import add_noise, target
from customize.settings import Settings

ADAPTER = "concept"
CHECKPOINT = "checkpoint.safetensors"


@dataclass(frozen=True)
class Material:
    """What training reads: the subject's latents with their prompts, the class prompt, and the base's answers to it."""

    posteriors: list[Posterior]
    text: Text
    prior: Bank | None
    prior_text: Text | None


def prepare(
    model: Backbone, pictures: Sequence[Picture], prompts: Sequence[str], settings: Settings
) -> Material:
    """Encodes pictures (each [1, C, H, W], mirrored ones behind) and their prompts, then banks the base's answers.

    `prompts` are in the model's words: one for each picture, then the class prompt.
    """
    posteriors = encoded(model, pictures)
    rows = list(range(len(pictures)))
    if settings.flip:
        posteriors += encoded(model, pictures, flip=True)
        rows += rows
    text = encoded_prompts(model, prompts)
    model.free("autoencoder", "text_encoder")
    instance = {name: value[rows] for name, value in text.items()}
    if not settings.prior_batch or not settings.prior_loss_weight:
        return Material(posteriors, instance, None, None)
    class_text = {name: value[-1:] for name, value in text.items()}
    bank = bank_of(model, posteriors, class_text, draws=settings.prior_draws, seed=settings.seed)
    return Material(posteriors, instance, bank, class_text)


@dataclass
class LoraTraining:
    """A LoRA in training: `steps` yields the reports, `save` and `resume` keep it exactly."""

    model: Backbone
    material: Material
    settings: Settings

    def __post_init__(self) -> None:
        layers = self.model.family.lora_targets.get(self.settings.lora_layers)
        if layers is None:
            known = ", ".join(self.model.family.lora_targets)
            raise UserError(
                f"There is no set of layers called {self.settings.lora_layers}. Choose one of {known}."
            )
        self.parameters = add_lora(
            self.model.denoiser,
            ADAPTER,
            rank=self.settings.rank,
            alpha=self.settings.lora_alpha,
            targets=layers,
            dropout=self.settings.lora_dropout,
            seed=self.settings.seed,
        )
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=self.settings.learning_rate, weight_decay=self.settings.weight_decay
        )
        self.done = 0

    def steps(self) -> Iterator[Report]:
        """Trains, a report each optimiser step."""
        with quick_to_train(self.model.denoiser):
            for report in train(
                self.losses,
                self.parameters,
                optimizer=self.optimizer,
                schedule=schedule(self.settings),
                steps=self.settings.steps,
                done=self.done,
                clip=self.settings.max_grad_norm,
            ):
                self.done = report.step
                yield report

    def losses(self, step: int) -> Iterator[Tensor]:
        """The loss of one step, Ruiz et al. 2023, eq. 2: the subject's error plus λ times the change of the class."""
        settings, material, levels = self.settings, self.material, self.model.path.levels
        random = generator(settings.seed, step)
        chosen = torch.randint(len(material.posteriors), (settings.batch,), generator=random)
        clean = torch.cat([material.posteriors[int(i)].sample(random) for i in chosen])
        noise = torch.randn(clean.shape, generator=random).to(clean.device)
        index = stratified_levels(settings.batch, len(levels), random)
        kind = self.model.path.kind
        level = levels[index]
        noisy = add_noise(clean, noise, level)
        text = {name: value[chosen.to(value.device)] for name, value in material.text.items()}
        wanted = target(clean, noise, level, kind)
        weights = torch.ones(len(noisy))
        if material.prior is not None and material.prior_text is not None:
            draw = torch.randint(len(material.prior), (settings.prior_batch,), generator=random)
            noisy = torch.cat([noisy, material.prior.noisy[draw].to(noisy)])
            index = torch.cat([index, material.prior.level[draw]])
            rows = {
                name: value.expand(len(draw), *value.shape[1:]) for name, value in material.prior_text.items()
            }
            text = {name: torch.cat([value, rows[name]]) for name, value in text.items()}
            wanted = torch.cat([wanted, material.prior.prediction[draw].to(wanted)])
            share = settings.prior_loss_weight * settings.batch / settings.prior_batch
            weights = torch.cat([weights, torch.full((len(draw),), share)])
        time = levels.time
        assert time is not None
        with self.model.autocast(), self.dropout(step):
            prediction = self.model.family.network(self.model.denoiser, text)(
                noisy, time[index].to(noisy.device)
            )
        error = (prediction.float() - wanted).square().flatten(1).mean(1)
        yield (weights.to(error) * error).sum() / settings.batch

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
        save_checkpoint(
            run / CHECKPOINT, step=self.done, parameters=self.parameters, optimizer=self.optimizer
        )

    def resume(self, run: Path) -> None:
        """Goes on where `save` was called last; from the start when it never was."""
        if (run / CHECKPOINT).exists():
            self.done, _ = load_checkpoint(
                run / CHECKPOINT, parameters=self.parameters, optimizer=self.optimizer
            )

    @property
    def denoiser(self) -> nn.Module:
        """The network with the adapter in training."""
        return self.model.denoiser


def schedule(settings: Settings) -> Schedule:
    """The learning rate's course by its name."""
    match settings.lr_scheduler:
        case "cosine":
            return warm_cosine(settings.steps, warmup=settings.lr_warmup_steps, floor=0.05)
        case "constant":
            return warm_constant(warmup=settings.lr_warmup_steps)
    raise UserError(f"There is no schedule {settings.lr_scheduler}. Choose cosine or constant.")
