"""Cost of clips: a drawn clip and a training step of motion layers, beside diffusers' AnimateDiffPipeline, in one run.

    python -m benchmarks.speed.clips                                  moji's shape, some minutes on two cores
    python -m benchmarks.speed.clips --shape sd15 --device cuda --precision fp16

Clips are guided samples without decoding; diffusers' are of its own pipeline with the same weights, noise and text, and
so the two must agree, which is checked first. A training step of theirs is restated from the order of evaluations in
guoyww's `train.py` (encoding left out on both sides): noise, the whole `UNetMotionModel` with everything but the motion
modules frozen, the squared error, backward, clipping, AdamW. Sides are interleaved; medians are shown with the
quartiles. Writes `clips_speed-SHAPE.md` and `.json`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
import typer
from diffusers import AnimateDiffPipeline, DDPMScheduler, MotionAdapter, UNetMotionModel
from torch import Tensor, nn

from backbone.cli.commands import run_main
from backbone.cli.sampling import ALL_STEPS
from backbone.diffusion.noise import add_noise, target
from backbone.io.console import UserError
from backbone.io.files import write_json, write_text
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.motion import attach_motion
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, draw_initial_noise, sample_latents
from backbone.training.attention import fast_attention_backward
from benchmarks.speed.control import Side, compute_quartiles, update
from benchmarks.speed.shapes import time_call, write_model_folder

PROMPT, GUIDANCE = "a dog in the snow", 4.0
DRAWN, STEP = "a clip", "a training step"
AGAINST = {DRAWN: f"{DRAWN}, AnimateDiffPipeline", STEP: f"{STEP}, train.py"}
CLOSE = {"fp32": 1e-3, "bf16": 0.3, "fp16": 0.1}  # how far the two clips may be apart


def main(
    shape: Annotated[
        Literal["moji", "sd15"], typer.Option(help="The model whose layer widths are measured.")
    ] = "moji",
    frames: Annotated[int, typer.Option(min=2, help="Frames of a clip.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of a clip.")] = 25,
    trained: Annotated[int, typer.Option(min=2, help="Frames of a training step's clip.")] = 8,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each side.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32, bf16 or fp16.")] = "fp32",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/clips"),
) -> None:
    """Times every side and writes the table."""
    with write_model_folder(shape) as folder:
        model = Backbone.open(folder, device=device, precision=precision)
        timings, difference = time_sides(model, frames=frames, steps=steps, trained=trained, repeats=repeats)
    if difference > CLOSE[precision]:
        raise UserError(f"The two clips are {difference:.3g} apart, so their times compare nothing.")
    note = (
        f"{frames} frames, {steps} guided steps, {precision}, {device}, {repeats} repeats, "
        f"clips {difference:.1e} apart"
    )
    write_results(out, shape, timings, note)


def time_sides(
    model: Backbone, *, frames: int, steps: int, trained: int, repeats: int
) -> tuple[dict[str, tuple[float, float, float]], float]:
    """The quartiles of every side's seconds, and how far the two clips are apart."""
    adapter = make_random_adapter(model, max(frames, trained))
    theirs = make_their_clip(model, adapter, frames, steps)
    their_training = make_their_step(model, adapter, trained)
    attach_motion(model.denoiser, adapter)
    sides: dict[str, Side] = {
        DRAWN: make_our_clip(model, frames, steps),
        AGAINST[DRAWN]: theirs,
        STEP: make_our_step(model, adapter, trained),
        AGAINST[STEP]: their_training,
    }
    difference = float((sides[DRAWN]().float() - sides[AGAINST[DRAWN]]().float()).abs().max())
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):  # the first warms up
        for name in list(sides) if turn % 2 else reversed(list(sides)):
            seconds[name].append(time_call(sides[name], model.device.type))
    return {name: compute_quartiles(values[1:]) for name, values in seconds.items()}, difference


def make_random_adapter(model: Backbone, frames: int) -> Any:
    """A motion adapter of the model's widths with random weights."""
    config = cast(Any, model.denoiser).config
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=config.block_out_channels,
        motion_layers_per_block=config.layers_per_block,
        motion_norm_num_groups=config.norm_num_groups,
        motion_max_seq_length=max(32, frames),
        use_motion_mid_block=False,
    )
    return nn.Module.to(adapter, model.device, model.dtype).eval()


# Drawing -----------------------------------------------------------------------------------------------------


def make_our_clip(model: Backbone, frames: int, steps: int) -> Side:
    """Our guided clip."""
    requests = [Request(PROMPT, (0, 0))]

    def draw() -> Tensor:
        return next(
            sample_latents(
                model,
                requests,
                steps=steps,
                guidance=GUIDANCE,
                guided=ALL_STEPS,
                sampler="ddim",
                seed=0,
                frames=Frames(frames),
            )
        )

    return draw


def make_their_clip(model: Backbone, adapter: Any, frames: int, steps: int) -> Side:
    """The same by diffusers' pipeline, with the text encoded beforehand as ours is."""
    kind: Any = AnimateDiffPipeline
    pipeline = kind.from_pretrained(
        model.location.source, unet=model.denoiser, motion_adapter=adapter, torch_dtype=model.dtype
    ).to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    text, empty = (
        encode_prompts_cached(model, [words]).text["hidden"].to(model.dtype) for words in (PROMPT, "")
    )
    noise = draw_initial_noise(model, 0, 0, 0, frames=Frames(frames))[None].to(model.device, model.dtype)

    def draw() -> Tensor:
        latents: Tensor = pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=empty,
            latents=noise,
            num_frames=frames,
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=model.resolution,
            width=model.resolution,
            output_type="latent",
        ).frames
        return latents

    return draw


# Training ----------------------------------------------------------------------------------------------------


def make_our_step(model: Backbone, adapter: Any, frames: int) -> Side:
    """A step of the motion layers through the one prediction, attention as in our trainings."""
    model.denoiser.requires_grad_(False)
    adapter.requires_grad_(True)
    optimizer = torch.optim.AdamW(adapter.parameters(), lr=1e-5)
    text = encode_prompts_cached(model, [PROMPT])
    channels, height, width = model.latent_shape
    clean = torch.randn(1, channels, frames, height, width, device=model.device)

    def step() -> None:
        adapter.requires_grad_(True)
        index = torch.randint(len(model.path.levels), (1,))
        noise = torch.randn_like(clean)
        level = model.path.levels[index].to(model.device)
        targets = target(clean, noise, level, model.path.prediction_type)
        with fast_attention_backward(model.denoiser):
            loss = F.mse_loss(model.predict(add_noise(clean, noise, level), index, text), targets)
            update(loss, adapter, optimizer)
        adapter.requires_grad_(False)

    adapter.requires_grad_(False)
    return step


def make_their_step(model: Backbone, adapter: Any, frames: int) -> Side:
    """A step in the order of guoyww's script: everything but the motion modules is frozen."""
    unet: Any = UNetMotionModel.from_unet2d(cast(Any, model.denoiser), adapter).to(model.device, model.dtype)
    unet.requires_grad_(False)
    layers = [value for name, value in unet.named_parameters() if ".motion_modules." in name]
    optimizer = torch.optim.AdamW(layers, lr=1e-5)
    scheduler = DDPMScheduler.from_pretrained(model.location.source, subfolder="scheduler")
    hidden = encode_prompts_cached(model, [PROMPT]).text["hidden"].to(model.dtype).repeat(frames, 1, 1)
    channels, height, width = model.latent_shape
    clean = torch.randn(1, channels, frames, height, width, device=model.device)
    is_velocity = model.path.prediction_type == "v_prediction"

    def step() -> None:
        for value in layers:
            value.requires_grad_(True)
        noise = torch.randn_like(clean)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (1,), device=model.device).long()
        noisy = scheduler.add_noise(clean, noise, times)
        targets = scheduler.get_velocity(clean, noise, times) if is_velocity else noise
        with model.autocast():
            predicted = unet(noisy.to(model.dtype), times, encoder_hidden_states=hidden, return_dict=False)[0]
        update(F.mse_loss(predicted.float(), targets), unet, optimizer)
        for value in layers:
            value.requires_grad_(False)

    return step


def write_results(out: Path, shape: str, timings: dict[str, tuple[float, float, float]], note: str) -> None:
    """The table, with each side's ratio to what it is compared with."""
    lines = [f"{shape}: {note}.", "", "| | seconds (quartiles) | ours to theirs |", "|---|---|---|"]
    for name, (low, middle, high) in timings.items():
        reference = AGAINST.get(name)
        ratio = f"{middle / timings[reference][1]:.2f}" if reference else ""
        lines.append(f"| {name} | {middle:.3f} ({low:.3f}–{high:.3f}) | {ratio} |")
    write_text(out / f"clips_speed-{shape}.md", "\n".join(lines) + "\n")
    write_json(out / f"clips_speed-{shape}.json", {"note": note, "seconds": timings})
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
