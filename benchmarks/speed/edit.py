"""Speed of an edit against the references' schedules of network evaluations (NFE), both sides in one run.

    python -m benchmarks.speed.edit                            whole edits on moji, some minutes on two cores
    python -m benchmarks.speed.edit --shape sd15 --device cuda an SD 1.5-shaped UNet: steps timed, totals composed

The references are restated here from their papers and the order of their evaluations, not taken from their code:
Direct Inversion with prompt-to-prompt (Ju et al. 2024: DDIM inversion, a pass for the offsets, a reconstruction that
stores the attention, the edit; 13 rows a step, with whole attention matrices in the last two passes), and null-text
inversion with prompt-to-prompt (Mokady et al. 2023: ten inner iterations a step without an early stop; with gradients
of all weights, as the published code takes them, and with the weights frozen). The first one gives the same picture as
ours, which a test holds. Where it is unclear what a reference does, the faster way is timed. Sides are interleaved,
medians are shown. Encoding and decoding are in every total, importing and loading in none.
Peak memory is measured in a separate process for each side, loading included: the references' parts by diffusers, in
the working precision, ours as every command loads them. Writes `speed-SHAPE.md` and `speed-SHAPE.json`.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import OUTPUT
from backbone.cli.options import Option
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, guide
from backbone.diffusion.samplers import deterministic_step
from backbone.io.console import run_app
from backbone.io.files import write_json, write_text
from backbone.media.transforms import to_image, to_tensor
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from backbone.training.attention import fast_attention_backward
from benchmarks.speed.shapes import read_peak_memory, run_module, time_in_turns, write_model_folder
from edit.attention.alignment import align, read_prompt, steps_inside
from edit.attention.control import AttentionControl, make_cross
from edit.attention.install import control_attention
from edit.inversion.inversion import invert
from edit.inversion.trajectories import invert_ddim
from edit.methods.prompt_to_prompt.replace import replace
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.pictures import encode_image

SOURCE = "a cat in a park"
TARGETS = ("a dog in a park", "a fox in a park", "a red cat in a park", "a cat in the snow")
CROSS, SELF = 0.8, 0.4  # shares of the steps in which the source's attention is injected
INNER = 10  # iterations of null-text inversion at each step
MOST_TOKENS = 32 * 32  # of the maps that the reference stores and whose self-attention it replaces
app = script_app()
SIDES = ("ours", "Direct + P2P", "null-text + P2P", "null-text + P2P, frozen", "ours, four targets")


@dataclass(frozen=True, kw_only=True)
class EditSpeedSettings:
    """Settings of the benchmark."""

    shape: Annotated[
        str, Option("Whole edits of moji, or composed steps.", "Edits", choices=("moji", "sd15"))
    ] = "moji"
    model: Annotated[str, Option("The model of whole edits.", "Edits", needs={"shape": ("moji",)})] = "moji"
    steps: Annotated[int, Option("Steps of an edit.", "Edits", min=2)] = 50
    repeats: Annotated[int, Option("Edits, or timed steps, of each side.", "Edits", min=1)] = 5
    null_text: Annotated[bool, Option("It takes longest.", "Edits")] = True
    memory: Annotated[bool, Option("Also each side's peak.", "Edits")] = True
    side: Annotated[str, Option("One side, once, for its peak memory.", "Edits", hidden=True)] = ""
    device: Annotated[str, Option("cpu or cuda.", "Device")] = "cpu"
    precision: Annotated[str, Option("auto, fp32, bf16 or fp16.", "Device")] = "auto"
    out: Annotated[Path, Option("Where the results go.", OUTPUT)] = Path("build/benchmarks/edit")

    @property
    def sides(self) -> list[str]:
        """Those to time."""
        return [name for name in SIDES if self.null_text or not name.startswith("null-text")]


@settled_command(app, EditSpeedSettings)
def main(settings: EditSpeedSettings) -> None:
    """Times both sides and writes the table."""
    shape, device, precision = settings.shape, settings.device, settings.precision
    if settings.side:
        edit_once(settings)
        return
    if shape == "sd15":
        with write_model_folder("sd15") as folder:
            measured = compose_edits(folder, settings)
            # Without null-text's sides, whose gradients take minutes here
            if settings.memory:
                sampled = [name for name in settings.sides if not name.startswith("null-text")]
                measured["peak_memory_mb"] = measure_peaks(sampled, folder, device, precision)
    else:
        sides = make_whole_edits(
            Backbone.open(settings.model, device=device, precision=precision), settings.steps
        )
        seconds = time_calls({name: sides[name] for name in settings.sides}, settings.repeats)
        measured = {"seconds": seconds, "rows": count_rows(settings.steps)}
        if settings.memory:
            measured["peak_memory_mb"] = measure_peaks(settings.sides, settings.model, device, precision)
    facts = {
        "shape": shape, "steps": settings.steps, "repeats": settings.repeats,
        "machine": f"{device}, {precision}, {torch.get_num_threads()} threads, torch {torch.__version__}", **measured,
    }  # fmt: skip
    text = format_markdown(facts)
    write_json(settings.out / f"speed-{shape}.json", facts)
    write_text(settings.out / f"speed-{shape}.md", text)
    print(text)


def edit_once(settings: EditSpeedSettings) -> None:
    """One side's edit in this process, whose peak memory in MB it prints."""
    model = Backbone.open(settings.model, device=settings.device, precision=settings.precision)
    if not settings.side.startswith("ours"):
        replace_networks(model)
    make_whole_edits(model, settings.steps)[settings.side]()
    print(json.dumps(read_peak_memory(settings.device) * 2**30 / 1e6))


# Whole edits --------------------------------------------------------------------------------------------------


def make_whole_edits(model: Backbone, steps: int) -> dict[str, Callable[[], Any]]:
    """Every side as a call from a picture to an edited picture (four of them in the last)."""
    image, guidance = sample_image(model), float(model.defaults["guidance"])

    def ours(count: int) -> list[Image.Image]:
        inversion = invert(model, image, SOURCE, steps=steps)
        settings = ReplaceSettings(cross=CROSS, self_attention=SELF, guidance=guidance, blend=())
        edited = replace(inversion, TARGETS[:count], settings)
        return edited.images

    return {
        "ours": lambda: ours(1),
        "ours, four targets": lambda: ours(4),
        "Direct + P2P": lambda: decode_images(
            model, run_direct_reference(model, image, TARGETS[0], steps=steps, guidance=guidance)
        ),
        "null-text + P2P": lambda: decode_images(
            model,
            run_null_text_reference(
                model, image, TARGETS[0], steps=steps, guidance=guidance, weights="trained"
            ),
        ),
        "null-text + P2P, frozen": lambda: decode_images(
            model,
            run_null_text_reference(
                model, image, TARGETS[0], steps=steps, guidance=guidance, weights="frozen"
            ),
        ),
    }


def replace_networks(model: Backbone) -> None:
    """Gives a model the denoiser and the autoencoder that diffusers' `from_pretrained` makes of its files."""
    for name, kind, part in (
        ("denoiser", UNet2DConditionModel, "unet"),
        ("autoencoder", AutoencoderKL, "vae"),
    ):
        network = cast(Any, kind).from_pretrained(
            model.location.source, subfolder=part, torch_dtype=model.dtype
        )
        model.__dict__[name] = network.to(model.device).eval().requires_grad_(False)


def sample_image(model: Backbone) -> Image.Image:
    """A smooth picture; its content does not affect the time."""
    small = torch.rand(3, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    side = model.resolution
    return to_image(torch.nn.functional.interpolate(small[None], (side, side), mode="bicubic")[0])


def decode_images(model: Backbone, latents: Tensor) -> list[Image.Image]:
    return [to_image(picture) for picture in model.decode(latents)]


@torch.no_grad()
def run_direct_reference(
    model: Backbone, image: Image.Image, target: str, *, steps: int, guidance: float
) -> Tensor:
    """The source's and the target's latents [2, C, H, W] by the reference's four passes."""
    schedule = model.schedule(steps)
    clean = encode_image(model, image).latent
    states = invert_ddim(clean, model.predictor(encode_prompts_cached(model, [SOURCE])), schedule)
    text = encode_four_rows(model, target)
    predict = model.predictor(text)
    offsets = []  # from the guided steps to the trajectory
    for number, (level, next_level) in enumerate(pairwise(schedule)):
        pair = states[number].expand(2, *clean.shape[1:])
        stepped = deterministic_step(
            pair, apply_guidance(predict(torch.cat([pair, pair]), level), guidance), level, next_level
        )
        offsets.append(states[number + 1] - stepped[:1])
    edit = Edit.of(model, target, steps)
    for editing in (False, True):  # the reconstruction only stores the maps
        noisy = states[0].repeat(2, 1, 1, 1)
        with materialise_attention(model.denoiser, edit):
            for number, (level, next_level) in enumerate(pairwise(schedule)):
                edit.begin(number, editing=editing)
                noisy = deterministic_step(
                    noisy,
                    apply_guidance(predict(torch.cat([noisy, noisy]), level), guidance),
                    level,
                    next_level,
                )
                noisy = torch.cat([noisy[:1] + offsets[number], noisy[1:]])
    return noisy


def run_null_text_reference(
    model: Backbone,
    image: Image.Image,
    target: str,
    *,
    steps: int,
    guidance: float,
    weights: Literal["trained", "frozen"],
) -> Tensor:
    """The latents [2, C, H, W] by null-text inversion, ten inner iterations a step, then the edit."""
    with torch.no_grad():
        schedule = model.schedule(steps)
        clean = encode_image(model, image).latent
        prompted, empty = (encode_prompts_cached(model, [prompt]) for prompt in (SOURCE, ""))
        conditional = model.predictor(prompted)
        states = invert_ddim(clean, conditional, schedule)
    noisy, embedding, embeddings = states[0], empty.text["hidden"], []
    with enable_weight_gradients(model.denoiser) if weights == "trained" else nullcontext():
        for number, (level, next_level) in enumerate(pairwise(schedule)):
            with torch.no_grad():
                prompted_estimate = conditional(noisy, level)
            moving = embedding.detach().clone().requires_grad_(True)
            optimizer = torch.optim.Adam([moving], lr=1e-2 * (1 - number / (2 * steps)))
            with fast_attention_backward(model.denoiser):
                for _ in range(INNER):
                    unprompted_estimate = model.predictor(Conditions({**empty.text, "hidden": moving}))(
                        noisy, level
                    )
                    reached = deterministic_step(
                        noisy, guide(prompted_estimate, unprompted_estimate, guidance), level, next_level
                    )
                    loss = (reached - states[number + 1]).square().mean()
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    loss.item()
            embedding = moving.detach()
            embeddings.append(embedding)
            with torch.no_grad():
                hidden = torch.cat([embedding, prompted.text["hidden"]])
                predict_pair = model.predictor(Conditions({**prompted.text, "hidden": hidden}))
                noisy = deterministic_step(
                    noisy,
                    apply_guidance(predict_pair(torch.cat([noisy, noisy]), level), guidance),
                    level,
                    next_level,
                )
    model.denoiser.zero_grad(set_to_none=True)
    with torch.no_grad():
        noisy = states[0].repeat(2, 1, 1, 1)
        text, edit = encode_four_rows(model, target), Edit.of(model, target, steps)
        with materialise_attention(model.denoiser, edit):
            for number, (level, next_level) in enumerate(pairwise(schedule)):
                edit.begin(number, editing=True)
                hidden = torch.cat([embeddings[number].expand(2, -1, -1), text.text["hidden"][2:]])
                predict = model.predictor(Conditions({**text.text, "hidden": hidden}))
                noisy = deterministic_step(
                    noisy,
                    apply_guidance(predict(torch.cat([noisy, noisy]), level), guidance),
                    level,
                    next_level,
                )
    return noisy


def encode_four_rows(model: Backbone, target: str) -> Conditions:
    """Without a prompt twice, then the source and the target."""
    return encode_prompts_cached(model, ["", "", SOURCE, target])


def apply_guidance(estimate: Estimate, guidance: float) -> Estimate:
    """The second half of the rows guided by the first, which has no prompt."""
    (clean, clean_prompted), (noise, noise_prompted) = (half.chunk(2) for half in estimate)
    return guide(Estimate(clean_prompted, noise_prompted), Estimate(clean, noise), guidance)


# Attention with whole matrices --------------------------------------------------------------------------------


@dataclass
class Edit:
    """The reference's controller: its settings, and the maps that it stores."""

    mapping: Tensor
    from_source: Tensor
    cross: Tensor  # [S], 1 inside the window
    self_attention: Tensor
    step: int = 0
    editing: bool = True
    stored: list[Tensor] = field(default_factory=list)
    summed: list[Tensor] = field(default_factory=list)

    @classmethod
    def of(cls, model: Backbone, target: str, steps: int) -> Edit:
        """The edit of SOURCE into a target."""
        tokenizer = model.text_encoder.tokenizer
        alignment = align(read_prompt(tokenizer, SOURCE), read_prompt(tokenizer, target))
        mapping, from_source = alignment.mapping.to(model.device), alignment.from_source.to(model.device)
        return cls(mapping, from_source, steps_inside(steps, (0.0, CROSS)), steps_inside(steps, (0.0, SELF)))

    def begin(self, step: int, *, editing: bool) -> None:
        """A step begins: what the last one stored is added up."""
        if step == 0:
            self.summed = []
        if self.stored:
            self.summed = (
                [a + b for a, b in zip(self.summed, self.stored, strict=True)] if self.summed else self.stored
            )
        self.stored, self.step, self.editing = [], step, editing

    def edit(self, maps: Tensor, *, across: bool) -> Tensor:
        """Maps [4, heads, Q, K], the last row's taken from the one before in open windows; small ones are stored."""
        if self.editing:
            source, target = maps[2], maps[3]
            if across:
                window = float(self.cross[self.step])
                from_source = self.from_source.to(maps.dtype)
                new = (source @ self.mapping.to(maps.dtype)) * from_source + target * (1 - from_source)
                maps = torch.cat([maps[:3], (new * window + target * (1 - window))[None]])
            elif maps.shape[-2] <= MOST_TOKENS and self.self_attention[self.step]:
                maps = torch.cat([maps[:3], source[None]])
        if maps.shape[-2] <= MOST_TOKENS:
            self.stored.append(maps[2:])
        return maps


class FullMatrixProcessor:
    """A diffusers attention processor that makes the whole matrix and hands it to an `Edit`."""

    def __init__(self, edit: Edit) -> None:
        self.edit = edit

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        text = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        query, key, value = (
            layer(x).unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for layer, x in ((attn.to_q, hidden_states), (attn.to_k, text), (attn.to_v, text))
        )
        maps = (query @ key.transpose(-1, -2) * attn.scale).softmax(-1)
        maps = self.edit.edit(maps, across=encoder_hidden_states is not None)
        return cast(Tensor, attn.to_out[1](attn.to_out[0]((maps @ value).transpose(1, 2).flatten(2))))


@contextmanager
def materialise_attention(denoiser: nn.Module, edit: Edit) -> Iterator[None]:
    """Inside the `with`, all attention is made of whole matrices."""
    network = cast(Any, denoiser)
    processors = dict(network.attn_processors)
    try:
        network.set_attn_processor({name: FullMatrixProcessor(edit) for name in processors})
        yield
    finally:
        network.set_attn_processor(processors)


@contextmanager
def enable_weight_gradients(denoiser: nn.Module) -> Iterator[None]:
    """Inside the `with`, every weight takes a gradient, as in a pipeline that was never frozen."""
    required = {name: value.requires_grad for name, value in denoiser.named_parameters()}
    try:
        denoiser.requires_grad_(True)
        yield
    finally:
        for name, value in denoiser.named_parameters():
            value.requires_grad_(required[name])


# Steps of a large network, composed ---------------------------------------------------------------------------


def compose_edits(folder: str, settings: EditSpeedSettings) -> dict[str, Any]:
    """Totals from the medians of warm steps of a model with the shape of SD 1.5 (or another), encoding and decoding."""
    precision = "bf16" if settings.precision == "auto" else settings.precision
    kinds = Steps(Backbone.open(folder, device=settings.device, precision=precision)).list_kinds()
    if not settings.null_text:
        kinds = {name: call for name, call in kinds.items() if not name.startswith("inner")}
    t, steps = time_calls(kinds, settings.repeats), settings.steps
    return {"steps_seconds": t, "seconds": add_up(t, steps), "composed": True, "rows": count_rows(steps)}


def add_up(t: Mapping[str, float], steps: int) -> dict[str, float]:
    """Seconds of each side's whole edit from those of its kinds of steps."""
    open_steps = count_opened(steps)
    closed_steps = steps - open_steps
    walk = steps * (2 * t["1 row"] + t["2 rows"] + t["4 rows, whole matrices"])
    totals = {
        "ours": steps * t["1 row"] + open_steps * t["3 rows, edited"] + closed_steps * t["2 rows"],
        "Direct + P2P": steps * (t["1 row"] + t["4 rows"] + 2 * t["4 rows, whole matrices"]),
        "ours, four targets": steps * t["1 row"]
        + open_steps * t["9 rows, edited"]
        + closed_steps * t["8 rows"],
    }
    if "inner iteration" in t:
        totals["null-text + P2P"] = walk + steps * INNER * t["inner iteration"]
        totals["null-text + P2P, frozen"] = walk + steps * INNER * t["inner iteration, frozen"]
    for name in totals:
        totals[name] += t["encoding"] + t["decoding, 5" if "four" in name else "decoding, 2"]
    return totals


class Steps:
    """The kinds of steps that edits are made of, each a call that can be timed."""

    def __init__(self, model: Backbone) -> None:
        self.model, self.unet = model, cast(Any, model.denoiser)
        self.random, self.time = torch.Generator().manual_seed(0), torch.tensor(500, device=model.device)

    def list_kinds(self) -> dict[str, Callable[[], Any]]:
        """All of them by name."""
        model = self.model
        picture = to_tensor(sample_image(model))[None]
        return {
            "encoding": partial(model.encode, picture),
            "decoding, 2": lambda: model.decode(torch.zeros(2, *model.latent_shape)),
            "decoding, 5": lambda: model.decode(torch.zeros(5, *model.latent_shape)),
            **{f"{rows} row{'s' * (rows > 1)}": partial(self.step, rows) for rows in (1, 2, 4, 8)},
            "3 rows, edited": partial(self.step_edited, self.make_control(1)),
            "9 rows, edited": partial(self.step_edited, self.make_control(4)),
            "4 rows, whole matrices": self.step_with_maps,
            "inner iteration": partial(self.optimize_null_text, "trained"),
            "inner iteration, frozen": partial(self.optimize_null_text, "frozen"),
        }

    def random_states(self, rows: int) -> Tensor:
        """Random states [B, 77, D] of prompts."""
        width = self.unet.config.cross_attention_dim
        return torch.randn(rows, 77, width, generator=self.random).to(self.model.device, self.model.dtype)

    def predict(self, rows: int, text: Tensor | None = None) -> Tensor:
        """The network on this many random rows."""
        noisy = torch.randn(rows, *self.model.latent_shape, generator=self.random)
        text = self.random_states(rows) if text is None else text
        return cast(Tensor, self.unet(noisy.to(text.device, text.dtype), self.time, text).sample)

    @torch.no_grad()
    def step(self, rows: int) -> None:
        """A step without an edit."""
        self.predict(rows)

    def make_control(self, targets: int) -> AttentionControl:
        """Our control of this many targets beside their source."""
        device = self.model.device
        ones = torch.ones(targets, 77, device=device)
        cross = make_cross(torch.eye(77, device=device).expand(targets, 77, 77), ones, ones, ones)
        control = AttentionControl(targets, cross=cross)
        control.self_attention = "layout"
        return control

    @torch.no_grad()
    def step_edited(self, control: AttentionControl) -> None:
        """A step of ours while the maps are held: the source, and two rows a target."""
        with control_attention(self.unet, control):
            self.predict(1 + 2 * control.targets)

    @torch.no_grad()
    def step_with_maps(self) -> None:
        """A step of the reference, which keeps whole matrices of attention."""
        device = self.model.device
        edit = Edit(torch.eye(77, device=device), torch.ones(77, device=device), torch.ones(1), torch.ones(1))
        with materialise_attention(self.unet, edit):
            edit.begin(0, editing=True)
            self.predict(4)

    def optimize_null_text(self, weights: Literal["trained", "frozen"]) -> None:
        """An iteration of null-text, with the network's own gradients as in the reference, or without."""
        trained = enable_weight_gradients(self.unet) if weights == "trained" else nullcontext()
        with trained, fast_attention_backward(self.unet):
            self.predict(1, self.random_states(1).requires_grad_(True)).float().square().mean().backward()
        self.unet.zero_grad(set_to_none=True)


# Timing -------------------------------------------------------------------------------------------------------


def time_calls(calls: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Median seconds of each call: one warm-up of each, then all of them in turn, `repeats` times."""
    seconds = time_in_turns(calls, repeats, "cuda" if torch.cuda.is_available() else "cpu")
    return {name: statistics.median(values) for name, values in seconds.items()}


def count_rows(steps: int) -> dict[str, int]:
    """How many rows the denoiser evaluates in one edit, by side (a null-text iteration also goes backward)."""
    open_steps = count_opened(steps)

    def ours(targets: int) -> int:
        return steps + open_steps * (1 + 2 * targets) + (steps - open_steps) * 2 * targets

    null_text = steps * (1 + 1 + INNER + 2 + 4)
    return {
        "ours": ours(1), "Direct + P2P": 13 * steps, "null-text + P2P": null_text,
        "null-text + P2P, frozen": null_text, "ours, four targets": ours(4),
    }  # fmt: skip


def count_opened(steps: int) -> int:
    """In how many steps a window of cross-attention is open."""
    return int(steps_inside(steps, (0.0, CROSS)).sum())


def measure_peaks(sides: Sequence[str], model: str, device: str, precision: str) -> dict[str, float]:
    """Each side's peak in MB, in a process of its own that edits in two steps: they show it as well as fifty."""
    flags = ["--model", model, "--steps", "2", "--device", device, "--precision", precision]
    return {side: run_module("benchmarks.speed.edit", "--side", side, *flags) for side in sides}


def format_markdown(facts: dict[str, Any]) -> str:
    """The table: seconds, how many times ours, rows, memory."""
    seconds, ours = facts["seconds"], facts["seconds"]["ours"]
    description = (
        "composed from medians of warm steps, encoding and decoding"
        if facts.get("composed")
        else "whole edits"
    )
    lines = [
        f"{facts['shape']}, {facts['steps']} steps, {description}, medians of {facts['repeats']} ({facts['machine']})",
        "",
        "| side | seconds | × ours | rows | peak MB |",
        "|---|---|---|---|---|",
    ]
    for name, value in seconds.items():
        times = f"{value / ours:.2f}"
        if name == "ours, four targets":
            rival = 4 * seconds["Direct + P2P"]
            times = f"four edits of Direct + P2P take {rival / value:.2f} × as long"
        memory = facts.get("peak_memory_mb", {}).get(name)
        memory_text = "–" if memory is None else f"{memory:.0f}"
        lines.append(f"| {name} | {value:.2f} | {times} | {facts['rows'][name]} | {memory_text} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_app(app)
