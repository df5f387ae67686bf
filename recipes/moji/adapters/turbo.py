"""`moji-turbo`: a LoRA with which `moji` draws in 4 steps without guidance (LCM-LoRA, Luo et al. 2023).

    python -m recipes.moji.data.pictures --scenes 24000         as for `moji`
    python -m recipes.moji.denoiser encode
    python -m recipes.moji.adapters.turbo train --minutes 60        on two cores; a GPU with --device cuda
    python -m recipes.moji.adapters.turbo export                    a folder that `--model` takes, at most 10 MB

Consistency distillation in latents: the student's clean estimate at a noise level has to be its own estimate at the
next of 50 levels below, reached by one guided DDIM step of the frozen base. So guidance is distilled along, and what
the student says at the noisiest level is a sample rather than a mean. The error is a pseudo-Huber one, as published.
Everything is read through `Backbone`, so it runs on any pipeline of `moji`'s kind. Continues from its last checkpoint,
`turbo.safetensors` in the work directory, to the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import LCMScheduler
from torch import Tensor

from backbone.adapters.lora import LORA_WEIGHTS, add_lora, save_lora, use_adapters
from backbone.cli.commands import script_app
from backbone.cli.options import Option, settled_command
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, add_noise, generator, guide
from backbone.diffusion.schedules import DISTILLED
from backbone.io.console import UserError, run_app
from backbone.io.files import read_header, read_tensors, write_json, write_tensors, write_text
from backbone.models.locate import FEW_STEP, OWN
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from backbone.training.loop import warm_stable_decay
from recipes.moji.denoiser import Latents
from recipes.moji.training.run import TRAINING, LoopSettings, Training, fill, make_readable, read_trained

NAME = "few_step"  # of the adapter
LARGEST = 10 * 10**6  # bytes of what is carried along
HUBER = 1e-3
CARD = """# moji-turbo

A LoRA on `{base}` that makes a latent consistency model of it: 4 steps, no guidance. In diffusers: load it with
`load_lora_weights` and take the `LCMScheduler` beside it. From optimiser step {step} of
`recipes/moji/adapters/turbo.py`. Apache-2.0; the glyphs that `moji` draws are Noto Color Emoji by Google, SIL Open Font
License 1.1.
"""
app = script_app()


@dataclass(frozen=True, kw_only=True)
class TurboSettings(LoopSettings):
    """What the distillation is asked for."""

    steps: int = 4_000
    batch: int = 24
    learning_rate: float = 1e-3
    model: Annotated[str, Option("The base that is distilled.", TRAINING)] = "moji"
    rank: Annotated[int, Option("Rank of the LoRA.", TRAINING, min=1)] = 32
    guidance: Annotated[
        float, Option("Guidance scale of the teacher, which is distilled into the student.", TRAINING, min=1)
    ] = 4.0
    decay: Annotated[
        int, Option("Steps of linear learning-rate decay to zero, at the end.", TRAINING, min=1)
    ] = 400
    warmup: Annotated[int, Option("Steps of linear learning-rate warm-up.", TRAINING)] = 50


@settled_command(app, TurboSettings)
def train(settings: TurboSettings) -> None:
    """Distils, or goes on distilling."""
    distil(settings)


def distil(settings: TurboSettings) -> Training:
    """The distillation to its last step, or until the minutes are over."""
    model = Backbone.open(settings.model, device=settings.device)
    tokenizer = model.text_encoder.slots[0].tokenizer
    data = Latents(settings.workdir, tokenizer, settings.device)
    if data.mean.shape[1:] != model.latent_shape:
        raise UserError(
            f"The latents in {settings.workdir} are {tuple(data.mean.shape[1:])} and those of {settings.model} "
            f"{model.latent_shape}. Encode the pictures with its own autoencoder."
        )
    parameters = add_lora(
        model.denoiser,
        NAME,
        rank=settings.rank,
        alpha=float(settings.rank),
        targets=model.family.lora_targets["all"],
        seed=settings.seed,
    )
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True
    )
    checkpoint = settings.workdir / "turbo.safetensors"
    training = Training(settings, checkpoint, parameters, optimizer, decay=0.995, falling=settings.decay)
    training.facts = {"model": named_in_a_record(settings.model)}
    consistency = Consistency(model, settings.guidance)

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(settings.seed, step)
        clean, tokens = data.batch(settings.batch, random)
        noise = torch.randn(clean.shape, generator=random).to(settings.device)
        place = torch.randint(DISTILLED, (settings.batch,), generator=random)
        with torch.no_grad():
            encoder = model.text_encoder.slots[0].model
            text = Conditions({"hidden": encoder(tokens).last_hidden_state.float()})
        yield consistency.loss(clean, noise, place, text)

    schedule = warm_stable_decay(settings.steps, warmup=settings.warmup, decay=settings.decay)
    with fast_attention_backward(model.denoiser):
        training.run(losses, schedule, every=100)
    return training


class Consistency:
    """The loss of consistency distillation on a model whose denoiser carries the student's adapter.

    levels   the DISTILLED levels, clean to noisy, of which the first has the clean image below it
    """

    def __init__(self, model: Backbone, guidance: float) -> None:
        self.model, self.guidance = model, guidance
        stride = len(model.path.levels) // DISTILLED
        self.levels = model.path.levels[torch.arange(1, DISTILLED + 1) * stride - 1]
        self.empty = model.encode_prompts([""])

    def loss(self, clean: Tensor, noise: Tensor, place: Tensor, text: Conditions) -> Tensor:
        """The pseudo-Huber error [] of the clean estimates at levels number `place` [B], 0 the least noisy one."""
        level = self.levels[place]
        noisy = add_noise(clean, noise, level)
        wanted = self.target(noisy, place, text)
        found = self.model.predictor(text)(noisy, level).clean
        return ((found - wanted).square() + HUBER**2).sqrt().mean() - HUBER

    @torch.no_grad()
    def target(self, noisy: Tensor, place: Tensor, text: Conditions) -> Tensor:
        """What the student says one level below [B, …], where a guided DDIM step of the base leads.

        Below the least noisy level there is only the base's clean estimate.
        """
        with use_adapters(self.model.denoiser, ()):
            teacher = self.guided(noisy, self.levels[place], text)
        below = self.levels[(place - 1).clamp(min=0)]
        student = self.model.predictor(text)(add_noise(teacher.clean, teacher.noise, below), below).clean
        last = (place == 0).reshape(-1, *[1] * (noisy.ndim - 1)).to(noisy.device)
        return torch.where(last, teacher.clean, student)

    def guided(self, noisy: Tensor, level: Level, text: Conditions) -> Estimate:
        """The guided estimate at levels [B], in one call of twice the batch."""
        twice = Level(
            *(torch.cat([part, part]) for part in (level.a, level.b, level.time) if part is not None)
        )
        both = Conditions.cat([text, self.empty.repeat(len(text))])
        found = self.model.predictor(both)(torch.cat([noisy, noisy]), twice)
        (clean, clean_empty), (noise, noise_empty) = (part.chunk(2) for part in found)
        return guide(Estimate(clean, noise), Estimate(clean_empty, noise_empty), self.guidance)


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/moji/moji-turbo"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    steps: Annotated[int, typer.Option(help="Sampler steps that the model is to be used with.", min=1)] = 4,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Writes the adapter in fp16, its scheduler and how it is drawn with; `UserError` where it is too large."""
    kept, header = read_trained(workdir / "turbo.safetensors", averaged=averaged)
    base = json.loads(header["facts"])["model"]
    model = Backbone.open(base, device="cpu")
    rank = next(len(value) for key, value in kept.items() if ".lora_A." in key)
    parameters = add_lora(
        model.denoiser, NAME, rank=rank, alpha=float(rank), targets=model.family.lora_targets["all"]
    )
    fill(parameters, kept)
    save_lora(out / LORA_WEIGHTS, model.denoiser, NAME)
    whole, said = read_tensors(out / LORA_WEIGHTS)
    write_tensors(out / LORA_WEIGHTS, {key: value.half() for key, value in whole.items()}, said)
    write_scheduler(model, out)
    record: dict[str, Any] = {"base": base, "steps": steps, "guidance": 1.0, "sampler": "consistency"}
    write_json(out / FEW_STEP, record)
    write_text(out / "README.md", CARD.format(base=base, step=header["step"]))
    make_readable(out)
    size = (out / LORA_WEIGHTS).stat().st_size
    if size > LARGEST:
        raise UserError(
            f"{out} takes {size / 1e6:.1f} MB, and at most 10 are carried along. Distil at a lower --rank."
        )
    layers = len(read_header(out / LORA_WEIGHTS).shapes) // 2
    print(f"{out}: step {header['step']}, {layers} layers, {size / 1e6:.1f} MB")


def write_scheduler(model: Backbone, out: Path) -> None:
    """The LCMScheduler of the base's own noise path."""
    known = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    said = model.location.config("scheduler")
    LCMScheduler(**{key: said[key] for key in known}, clip_sample=False).save_pretrained(out / "scheduler")


def named_in_a_record(model: str) -> str:
    """A base's name for a record that may be carried anywhere: a known name, or a folder's whole path."""
    return model if model in OWN or not Path(model).is_dir() else str(Path(model).absolute())


if __name__ == "__main__":
    run_app(app)
