"""Cost of control: pictures and training steps under a ControlNet and a T2I-Adapter, beside diffusers', in one run.

    python -m benchmarks.speed.control                                moji's shape, some minutes on two cores
    python -m benchmarks.speed.control --shape sd15 --device cuda

Pictures are guided samples without decoding; diffusers' are of its own pipelines with the same weights, noise and
prompts. A training step of theirs is restated from the order of its evaluations in `examples/controlnet/
train_controlnet.py` (encoding left out on both sides): noise, the ControlNet, the UNet with its residuals, the squared
error, backward, clipping, AdamW. A T2I-Adapter is evaluated once for a picture, a ControlNet and the LoRA of
a T2I-Adapter at every step for every row that is controlled.
Sides are interleaved, medians are shown with the quartiles. Writes `control_speed-SHAPE.md` and `.json`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
import torch.nn.functional as F
import typer
from diffusers import (
    DDPMScheduler,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
)
from torch import Tensor, nn

from backbone.cli.commands import run_main
from backbone.cli.sampling import ALL_STEPS
from backbone.conditions.control import Control, ControlNetwork
from backbone.diffusion.noise import add_noise
from backbone.io.files import write_json, write_text
from backbone.models.cache import encode_prompts_cached
from backbone.models.control import make_control_network
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, sample_latents
from benchmarks.speed.shapes import time_in_turns, write_model_folder

PROMPT = "a dog in the snow"
LORA_RANK = 32  # of moji's own
Side = Callable[[], Any]


def main(
    shape: Annotated[
        Literal["moji", "sd15"], typer.Option(help="The model whose layer widths are measured.")
    ] = "moji",
    steps: Annotated[int, typer.Option(min=1, help="Sampler steps of a picture.")] = 25,
    batch: Annotated[int, typer.Option(min=1, help="Batch size of a training step.")] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Repeats of each side.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "fp32",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/control"),
) -> None:
    """Times every side and writes the table."""
    with write_model_folder(shape) as folder:
        model = Backbone.open(folder, device=device, precision=precision)
        timings = time_sides(model, steps=steps, batch=batch, repeats=repeats)
    note = f"{steps} steps, guidance, {precision}, {device}, batch {batch}, {repeats} repeats"
    write_results(out, shape, timings, note)


def time_sides(
    model: Backbone, *, steps: int, batch: int, repeats: int
) -> dict[str, tuple[float, float, float]]:
    """The quartiles of every side's seconds."""
    nets = {
        "ControlNet": make_control_network(model, "controlnet"),
        "T2I-Adapter": make_control_network(model, "t2i-adapter"),
    }
    for net in nets.values():
        nn.Module.to(net.module, model.dtype).eval().requires_grad_(False)
    pictures = {"no control": make_our_draw(model, [], steps)}
    for name, net in nets.items():
        pictures[name] = make_our_draw(model, [Control.of(net, make_blank_map(model))], steps)
        pictures[f"{name}, diffusers"] = make_their_draw(model, name, net, steps)
    with_lora = make_control_network(model, "t2i-adapter", lora_rank=LORA_RANK)
    nn.Module.to(with_lora.module, model.dtype).eval().requires_grad_(False)
    pictures["T2I-Adapter with a LoRA"] = make_our_draw(
        model, [Control.of(with_lora, make_blank_map(model))], steps
    )
    prompted = Control.of(with_lora, make_blank_map(model), prompted=True)
    pictures["T2I-Adapter with a LoRA, prompted rows alone"] = make_our_draw(model, [prompted], steps)
    trained = make_control_network(model, "controlnet")
    training = {
        "a step": make_our_step(model, trained, batch),
        "a step, train_controlnet.py": make_their_step(model, trained, batch),
    }
    seconds = time_in_turns({**pictures, **training}, repeats, model.device.type)
    return {name: compute_quartiles(values) for name, values in seconds.items()}


def make_blank_map(model: Backbone) -> Tensor:
    """A map without anything on it."""
    return torch.zeros(1, 3, model.resolution, model.resolution, device=model.device)


def make_our_draw(model: Backbone, controls: list[Control], steps: int) -> Side:
    """Our guided sample."""
    requests = [Request(PROMPT, (0, 0))]

    def draw() -> Tensor:
        return next(
            sample_latents(
                model,
                requests,
                steps=steps,
                guidance=4.0,
                guided=ALL_STEPS,
                sampler="ddim",
                seed=0,
                controls=controls,
            )
        )

    return draw


def make_their_draw(model: Backbone, name: str, net: ControlNetwork, steps: int) -> Side:
    """The same by diffusers' pipeline, with the text encoded beforehand as ours is."""
    kind: Any = StableDiffusionControlNetPipeline if name == "ControlNet" else StableDiffusionAdapterPipeline
    part = {"controlnet" if name == "ControlNet" else "adapter": net.module}
    pipeline = kind.from_pretrained(
        model.location.source, unet=model.denoiser, torch_dtype=model.dtype, safety_checker=None, **part
    ).to(model.device)
    pipeline.set_progress_bar_config(disable=True)
    text, empty = (
        encode_prompts_cached(model, [words]).text["hidden"].to(model.dtype) for words in (PROMPT, "")
    )
    noise = draw_initial_noise(model, 0, 0, 0)[None].to(model.device, model.dtype)

    def draw() -> Any:
        return pipeline(
            prompt_embeds=text,
            negative_prompt_embeds=empty,
            image=make_blank_map(model).to(model.dtype),
            latents=noise,
            num_inference_steps=steps,
            guidance_scale=4.0,
            height=model.resolution,
            width=model.resolution,
            output_type="latent",
        )

    return draw


def make_our_step(model: Backbone, net: ControlNetwork, batch: int) -> Side:
    """A training step through the one prediction."""
    optimizer = torch.optim.AdamW(net.module.parameters(), lr=1e-5)
    text = encode_prompts_cached(model, [PROMPT] * batch)
    clean = torch.randn(batch, *model.latent_shape, device=model.device)

    def step() -> None:
        index = torch.randint(len(model.path.levels), (batch,))
        noise = torch.randn_like(clean)
        noisy = add_noise(clean, noise, model.path.levels[index].to(model.device))
        conditions = replace(
            text, controls=(Control.of(net, make_blank_map(model).expand(batch, -1, -1, -1)),)
        )
        loss = F.mse_loss(model.predict(noisy, index, conditions), noise)
        update(loss, net.module, optimizer)

    return step


def make_their_step(model: Backbone, net: ControlNetwork, batch: int) -> Side:
    """A training step in the order of the script."""
    optimizer = torch.optim.AdamW(net.module.parameters(), lr=1e-5)
    scheduler = DDPMScheduler.from_pretrained(
        model.location.source if model.location.folder else "", subfolder="scheduler"
    )
    hidden = encode_prompts_cached(model, [PROMPT] * batch).text["hidden"].to(model.dtype)
    clean = torch.randn(batch, *model.latent_shape, device=model.device)
    unet, controlnet = cast(Any, model.denoiser), cast(Any, net.module)

    def step() -> None:
        noise = torch.randn_like(clean)
        times = torch.randint(0, scheduler.config.num_train_timesteps, (batch,), device=model.device).long()
        noisy = scheduler.add_noise(clean, noise, times)
        with model.autocast():
            down, middle = controlnet(
                noisy,
                times,
                encoder_hidden_states=hidden,
                controlnet_cond=make_blank_map(model).expand(batch, -1, -1, -1),
                return_dict=False,
            )
            predicted = unet(
                noisy.to(model.dtype),
                times,
                encoder_hidden_states=hidden,
                down_block_additional_residuals=[part.to(model.dtype) for part in down],
                mid_block_additional_residual=middle.to(model.dtype),
                return_dict=False,
            )[0]
        update(F.mse_loss(predicted.float(), noise), controlnet, optimizer)

    return step


def update(loss: Tensor, module: Any, optimizer: torch.optim.Optimizer) -> None:
    """Backward, clipping to 1, AdamW."""
    loss.backward()
    torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def compute_quartiles(seconds: list[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    low, middle, high = torch.tensor(seconds).quantile(torch.tensor([0.25, 0.5, 0.75])).tolist()
    return low, middle, high


def write_results(out: Path, shape: str, timings: dict[str, tuple[float, float, float]], note: str) -> None:
    """The table, with each side's ratio to what it is compared with."""
    lines = [f"{shape}: {note}.", "", "| | seconds (quartiles) | against |", "|---|---|---|"]
    for name, (low, middle, high) in timings.items():
        reference = {"a step": "a step, train_controlnet.py"}.get(name)
        reference = reference or (f"{name}, diffusers" if f"{name}, diffusers" in timings else None)
        ratios = (
            []
            if name == "no control" or "step" in name
            else [f"{middle / timings['no control'][1]:.2f} × no control"]
        )
        ratios += [f"{middle / timings[reference][1]:.2f} × {reference}"] if reference else []
        lines.append(f"| {name} | {middle:.3f} ({low:.3f}–{high:.3f}) | {', '.join(ratios)} |")
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / f"control_speed-{shape}.md", "\n".join([*lines, ""]))
    write_json(out / f"control_speed-{shape}.json", {"note": note, "seconds": timings})
    typer.echo("\n".join(lines))


if __name__ == "__main__":
    run_main(main)
