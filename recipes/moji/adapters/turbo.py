"""`moji-turbo`: a LoRA with which `moji` draws in 4 steps without guidance.

    python -m recipes.moji.adapters.turbo draw --count 2500     the teacher's trajectories: 50 minutes of one core
    python -m recipes.moji.adapters.turbo train                 the student: an hour of one core
    python -m recipes.moji.adapters.turbo compare               the error of each step on held-out trajectories
    python -m recipes.moji.adapters.turbo export                a folder that `--model` takes, at most 10 MB

The base draws with guidance, 16 steps of DPM-Solver++ from noise to a clean latent, and its states at the 4 noise
levels of a DDIM schedule are kept. One DDIM step of the student has to lead from each of them to the next (Salimans &
Ho 2022, progressive distillation, here in one stage; guidance is distilled along: Meng et al. 2023). A state follows
from the one before it, so the target is no mean over many images; it is drawn once and trained on several times.
Everything is read through `Backbone`, so it runs on any pipeline of `moji`'s kind. Continues from its last
checkpoint, `turbo.safetensors` in the work directory, to the same weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DDIMScheduler
from torch import Tensor

from backbone.adapters.lora import LORA_WEIGHTS, add_lora, load_lora, lora_parameters, save_lora
from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.diffusion.losses import squared_error
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, generator
from backbone.diffusion.samplers import deterministic_step, dpmpp_2m
from backbone.diffusion.schedules import vp_schedule
from backbone.io.console import UserError, run_app
from backbone.io.files import read_header, read_tensors, write_json, write_tensors, write_text
from backbone.models.locate import FEW_STEP, OWN
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from backbone.training.optimizer import warm_stable_decay
from backbone.world.scene import TRAINING_SEEDS, sample_scene
from recipes.moji.training.run import (
    ADAPTER_GRID,
    TRAINING,
    LoopSettings,
    Training,
    export_adapter,
    fill,
    losses_on_grid,
    make_readable,
    read_trained,
)

NAME = "few_step"  # of the adapter
STEPS = 4  # of the student
SUBSTEPS = 4  # of the teacher for each of the student's
SHARD = 100  # trajectories of a file
HELD_OUT = 50  # the last trajectories, which are never trained on
LARGEST = 10 * 10**6  # bytes of the folder that is carried along
CARD = """# moji-turbo

A LoRA on `{base}` for sampling in 4 steps without guidance. In diffusers, load it with `load_lora_weights`, use the
`DDIMScheduler` beside it, and set `num_inference_steps=4, guidance_scale=1`. The weights are those of optimiser
step {step} of `recipes/moji/adapters/turbo.py`. Apache-2.0; the glyphs that `moji` draws are Noto Color Emoji by
Google, SIL Open Font License 1.1.
"""
app = script_app()


@dataclass(frozen=True, kw_only=True)
class TurboSettings(LoopSettings):
    """Settings of the distillation."""

    steps: int = 1_200
    batch: int = 24
    learning_rate: float = 1e-3
    model: Annotated[str, Option("The base that is distilled.", TRAINING)] = "moji"
    rank: Annotated[int, Option("Rank of the LoRA.", TRAINING, min=1)] = 32
    decay: Annotated[
        int, Option("Steps of linear learning-rate decay to zero, at the end.", TRAINING, min=1)
    ] = 400
    warmup: Annotated[int, Option("Steps of linear learning-rate warm-up.", TRAINING)] = 50
    begin_from: Annotated[
        Path | None, Option("A folder of this kind whose LoRA to begin with; its rank counts.", TRAINING)
    ] = None
    rounded: Annotated[
        bool, Option("Train the weights as they are exported: on a grid, which packs well.", TRAINING)
    ] = False


# The teacher ---------------------------------------------------------------------------------------------------


@app.command()
def draw(
    count: Annotated[
        int, typer.Option(help="How many trajectories, of the scenes from seed 0.", min=1)
    ] = 2_500,
    first: Annotated[
        int,
        typer.Option(
            help=f"The first to draw, a multiple of {SHARD}: several processes share the work.", min=0
        ),
    ] = 0,
    model: Annotated[str, typer.Option(help="The base that is distilled.")] = "moji",
    guidance: Annotated[
        float, typer.Option(help="The base's guidance scale, which is distilled along.", min=1)
    ] = 4.0,
    device: Annotated[str, typer.Option(help="Where to draw.")] = "cpu",
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Draws the base's trajectories; finished files are kept."""
    base = Backbone.open(model, device=device)
    if first % SHARD:
        raise UserError(f"--first {first} is no multiple of {SHARD}: files begin at those.")
    for begin in range(first, min(count, len(TRAINING_SEEDS)), SHARD):
        path = workdir / "trajectories" / f"{begin:06d}.safetensors"
        if not path.exists():
            seeds = range(begin, min(begin + SHARD, count))
            captions = [sample_scene(seed).caption_for_training() for seed in seeds]
            states = draw_trajectories(base, captions, guidance, seed=begin)
            write_tensors(
                path, {"states": states}, {"captions": json.dumps(captions), "guidance": str(guidance)}
            )
            print(path, flush=True)


@torch.no_grad()
def draw_trajectories(
    model: Backbone, captions: Sequence[str], guidance: float, *, seed: int, at_once: int = 20
) -> Tensor:
    """The base's states at the student's levels [N, STEPS + 1, C, h, w] in fp16, noise first and clean last."""
    schedule = vp_schedule(read_alphas(model), STEPS * SUBSTEPS, "trailing")
    empty, trajectories = model.encode_prompts([""]), []
    for first in range(0, len(captions), at_once):
        batch = captions[first : first + at_once]
        noise = torch.randn(len(batch), *model.latent_shape, generator=generator(seed, first))
        text = model.encode_prompts(batch)
        predict = model.guided_predictor(text, empty.repeat(len(batch)), guidance)
        trajectories.append(
            torch.stack(draw_states(noise.to(model.device), predict, schedule), 1).half().cpu()
        )
    return torch.cat(trajectories)


def draw_states(noise: Tensor, predict: Predict, schedule: Schedule) -> list[Tensor]:
    """The teacher's states [B, C, h, w] before every SUBSTEPS of its steps, and the one at the schedule's end."""
    states: list[Tensor] = []

    def record(noisy: Tensor, level: Level) -> Estimate:
        states.append(noisy)
        return predict(noisy, level)

    last = dpmpp_2m(noise, record, schedule)  # which asks for one prediction a step
    return [*states[::SUBSTEPS], last]


def make_student_schedule(model: Backbone) -> Schedule:
    """The student's levels [STEPS + 1], from the noisiest that was trained to clean."""
    return vp_schedule(read_alphas(model), STEPS, "trailing")


def read_alphas(model: Backbone) -> Tensor:
    """The ᾱ [train steps] of the levels that the base was trained at."""
    return model.path.levels.a.square()


# The student ---------------------------------------------------------------------------------------------------


class Trajectories:
    """The teacher's states with their captions; the last ones are held out."""

    def __init__(self, workdir: Path) -> None:
        paths = sorted((workdir / "trajectories").glob("*.safetensors"))
        if not paths:
            raise UserError(
                f"{workdir / 'trajectories'} holds none. Run: python -m recipes.moji.adapters.turbo draw"
            )
        self.states = torch.cat([read_tensors(path)[0]["states"] for path in paths])
        self.captions = [
            caption for path in paths for caption in json.loads(read_header(path).metadata["captions"])
        ]
        self.count = max(1, len(self.states) - HELD_OUT)

    def batch(self, count: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """States [B, C, h, w], the states one step later, the numbers of those steps [B], and captions."""
        rows = torch.randint(self.count, (count,), generator=random)
        steps = torch.randint(STEPS, (count,), generator=random)
        return self.select(rows, steps)

    def held_out(self, step: int) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """The same for all held-out trajectories, at one step."""
        rows = torch.arange(self.count, len(self.states))
        return self.select(rows, torch.full((len(rows),), step))

    def select(self, rows: Tensor, steps: Tensor) -> tuple[Tensor, Tensor, Tensor, list[str]]:
        """The same for trajectories `rows` [B] at `steps` [B]."""
        captions = [self.captions[row] for row in rows.tolist()]
        return self.states[rows, steps].float(), self.states[rows, steps + 1].float(), steps, captions


@settled_command(app, TurboSettings)
def train(settings: TurboSettings) -> None:
    """Distils, or goes on distilling."""
    distil(settings)


def distil(settings: TurboSettings) -> Training:
    """The distillation to its last step, or until the minutes are over."""
    model, data = Backbone.open(settings.model, device=settings.device), Trajectories(settings.workdir)
    if data.states.shape[2:] != model.latent_shape:
        raise UserError(
            f"The states in {settings.workdir} are {tuple(data.states.shape[2:])} and the latents of "
            f"{settings.model} {model.latent_shape}. Draw the trajectories with the base that is distilled."
        )
    parameters = begin_lora(model, settings)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=settings.learning_rate, weight_decay=0.0, fused=True
    )
    checkpoint = settings.workdir / "turbo.safetensors"
    training = Training(settings, checkpoint, parameters, optimizer, decay=0.995, decay_steps=settings.decay)
    training.facts = {"model": name_for_record(settings.model)}
    levels = make_student_schedule(model)

    def losses(step: int) -> Iterator[Tensor]:
        states, targets, steps, captions = data.batch(settings.batch, generator(settings.seed, step))
        predict = model.predictor(model.encode_prompts(captions))
        yield measure_step_error(
            predict, states.to(model.device), targets.to(model.device), levels, steps
        ).mean()

    schedule = warm_stable_decay(settings.steps, warmup=settings.warmup, decay=settings.decay)
    with fast_attention_backward(model.denoiser):
        step_losses = losses_on_grid(losses, parameters, ADAPTER_GRID) if settings.rounded else losses
        training.run(step_losses, schedule, every=100)
    return training


def begin_lora(model: Backbone, settings: TurboSettings) -> dict[str, Tensor]:
    """Adds the LoRA that is trained, a new one or that of `begin_from`, and gives its weights by name."""
    if settings.begin_from is None:
        rank, targets = settings.rank, model.family.lora_targets["all"]
        return add_lora(
            model.denoiser, NAME, rank=rank, alpha=float(rank), targets=targets, seed=settings.seed
        )
    load_lora(settings.begin_from / LORA_WEIGHTS, model.denoiser, NAME)
    parameters = lora_parameters(model.denoiser, NAME)
    for parameter in parameters.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return parameters


def measure_step_error(
    predict: Predict, states: Tensor, targets: Tensor, levels: Schedule, steps: Tensor
) -> Tensor:
    """The squared error [B] of one DDIM step from `states` to the teacher's next states `targets` [B, C, h, w].

    `steps` [B] are the steps' numbers. Their errors count alike in the latents where they end.
    """
    level, below = levels[steps], levels[steps + 1]
    return squared_error(deterministic_step(states, predict(states, level), level, below), targets)


@app.command()
def compare(
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
) -> None:
    """Prints the error of each step on the trajectories that are held out: the base's without the LoRA, and with it."""
    trained, header = read_trained(workdir / "turbo.safetensors", averaged=averaged)
    data, model = Trajectories(workdir), Backbone.open(json.loads(header["facts"])["model"], device="cpu")
    rows = [measure_held_out_errors(model, data)]
    fill(add_trained(model, trained), trained)
    rows.append(measure_held_out_errors(model, data))
    for name, row in zip(("the base", f"step {header['step']}"), rows, strict=True):
        print(f"{name}: " + ", ".join(f"{error:.4f}" for error in row))


@torch.no_grad()
def measure_held_out_errors(model: Backbone, data: Trajectories) -> list[float]:
    """The mean squared error of every step, the noisiest first."""
    levels, errors = make_student_schedule(model), []
    for step in range(STEPS):
        states, targets, steps, captions = data.held_out(step)
        predict = model.predictor(model.encode_prompts(captions))
        errors.append(measure_step_error(predict, states, targets, levels, steps).mean().item())
    return errors


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("build/moji/moji-turbo"),
    averaged: Annotated[bool, typer.Option(help="EMA weights, or the last ones.")] = True,
    workdir: Annotated[Path, typer.Option(help="Where intermediate files go.")] = Path("build/moji"),
) -> None:
    """Writes the adapter in fp16, on the grid, its scheduler and how to draw with it; `UserError` if too large."""
    trained, header = read_trained(workdir / "turbo.safetensors", averaged=averaged)
    base = json.loads(header["facts"])["model"]
    model = Backbone.open(base, device="cpu")
    fill(add_trained(model, trained), trained)
    save_lora(out / LORA_WEIGHTS, model.denoiser, NAME)
    export_adapter(out / LORA_WEIGHTS, out / LORA_WEIGHTS)
    write_scheduler(model, out)
    record: dict[str, Any] = {"base": base, "steps": STEPS, "guidance": 1.0, "sampler": "ddim"}
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


def add_trained(model: Backbone, trained: Mapping[str, Tensor]) -> dict[str, Any]:
    """Adds a LoRA of the trained one's rank, and gives its weights by name."""
    rank = next(len(value) for key, value in trained.items() if ".lora_A." in key)
    targets = model.family.lora_targets["all"]
    return add_lora(model.denoiser, NAME, rank=rank, alpha=float(rank), targets=targets)


def write_scheduler(model: Backbone, out: Path) -> None:
    """The DDIMScheduler of the base's own noise path, at the student's levels."""
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type")
    config = model.location.config("scheduler")
    spaced = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    DDIMScheduler(**{key: config[key] for key in keys}, **spaced).save_pretrained(out / "scheduler")


def name_for_record(model: str) -> str:
    """A base's name for a record that may be carried anywhere: a known name, or a folder's whole path."""
    return model if model in OWN or not Path(model).is_dir() else str(Path(model).absolute())


if __name__ == "__main__":
    run_app(app)
