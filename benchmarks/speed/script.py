"""diffusers' own `train_dreambooth_lora.py`, unchanged, beside `customize`: seconds of a step and peak memory.

    python -m benchmarks.speed.script compare train_dreambooth_lora.py      SD 1.5's shape: half an hour
    python -m benchmarks.speed.script compare … --shape moji                    the embedded model's: two minutes

The script is of diffusers' repository (examples/dreambooth) and not part of its package: fetch the file. Every side is
a process of its own that loads one folder of fp32 weights (random ones if the shape is not `moji`'s), takes some steps
and saves: `script` is that file; `restated` loads as it does and then takes the restated step that
`benchmarks.speed.customize` times, which this table is to confirm; `here` opens the model, encodes, frees the encoders,
caches the base's predictions on its class (eight of the usual 64 draws), trains and saves, as `customize train` does.
All have the same five pictures and prompts, rank 4 on attention, one picture a step (and one of its class with the
prior) and bf16. A step lasts from one end of the optimiser's step to the next; the first is not counted. No side draws
pictures: the script's class pictures exist already, and `here` makes no sheets.

Without torchvision, the transforms that the script takes from it are replaced by Pillow's.
"""

from __future__ import annotations

import importlib.util
import json
import runpy
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from enum import Enum
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any, Literal

import torch
import typer
from PIL import Image
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook

from backbone.cli.commands import script_app
from backbone.io.console import UserError, notify, run_app
from backbone.io.files import write_bytes, write_json, write_text
from backbone.media.sources.pictures import list_images
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone
from backbone.training.run import take_steps
from benchmarks.speed.customize import CLASS_PROMPT, PICTURES, PROMPT, Script, make_material, make_settings
from benchmarks.speed.shapes import (
    CLOCKS,
    CLOCKS_OF,
    Clock,
    ClockFlag,
    ResultsFlag,
    describe_machine,
    load_like_script,
    make_random_images,
    read_peak_memory,
    run_module,
    write_model_folder,
    write_section,
)
from customize.data.dataset import SubjectGroup, make_training_data
from customize.objectives.dreambooth import DreamBooth

SIDES = ("script", "restated", "here")
DRAWS = 8
Side = Literal["script", "restated", "here"]

app = script_app(__doc__)


@app.command()
def compare(
    script: Annotated[Path, typer.Argument(help="diffusers' train_dreambooth_lora.py.")],
    shape: Annotated[str, typer.Option(help="sd15 or moji.")] = "sd15",
    steps: Annotated[int, typer.Option(min=2, help="Steps of each side; the first is not counted.")] = 6,
    precision: Annotated[str, typer.Option(help="Of the frozen weights: fp32, bf16 or fp16.")] = "bf16",
    clock: ClockFlag = "wall",
    results: ResultsFlag = None,
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path(
        "build/benchmarks/customize_script"
    ),
) -> None:
    """Every side without and with the prior, each in a process of its own, in turn."""
    if not script.is_file():
        raise UserError(f"There is no {script}. Fetch it from diffusers' repository: examples/dreambooth.")
    measured: dict[str, Any] = {}
    with write_model_folder(shape) as model, tempfile.TemporaryDirectory(prefix="limner-") as folder:
        pictures, side = Path(folder), Backbone.open(model, device="cpu").resolution
        for name, size in (("subject", round(1.25 * side)), ("class", side)):
            for number, content in enumerate(make_random_images(size, PICTURES)):
                write_bytes(pictures / name / f"{number}.jpg", content)
        for suffix in ("", ", prior"):
            for side_name in SIDES:
                flags = ["--steps", str(steps), "--precision", precision, "--clock", clock]
                flags += ["--script", str(script), *(["--prior"] if suffix else [])]
                name = f"{side_name}{suffix}"
                measured[name] = run_module(
                    "benchmarks.speed.script", "side", side_name, model, folder, *flags
                )
                notify(f"{name}: {measured[name]['seconds']:.3f} s a step, {measured[name]['gib']:.2f} GiB")
    command = (
        f"python -m benchmarks.speed.script compare train_dreambooth_lora.py --shape {shape} --steps {steps}"
    )
    facts = {
        "command": f"{command} --precision {precision} --clock {clock}", "shape": shape, "steps": steps,
        "precision": precision, "clock": clock, "machine": describe_machine("cpu"), "sides": measured,
    }  # fmt: skip
    text = format_markdown(facts)
    write_json(out / f"{shape}.json", facts)
    write_text(out / f"{shape}.md", text)
    if results is not None:
        write_section(results, f"`{shape}`, the script itself, 1 a step, cpu", text)
    print(text)


@app.command("side", hidden=True)  # a process of `compare`
def run_side(
    side: Side, model: str, folder: Path, steps: int = 6, precision: str = "bf16", clock: Clock = "wall",
    prior: bool = False, script: Path = Path(),
) -> None:  # fmt: skip
    """The steps of one side; prints their median and this process's peak memory."""
    ends: list[float] = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(CLOCKS_OF[clock]()))
    with tempfile.TemporaryDirectory(prefix="limner-") as out:
        if side == "script":
            run_script(script, model, folder, Path(out), steps=steps, precision=precision, prior=prior)
        elif side == "restated":
            run_restated(model, steps=steps, precision=precision, prior=prior)
        else:
            run_here(model, folder, Path(out), steps=steps, precision=precision, prior=prior)
    hook.remove()
    durations = [end - start for start, end in pairwise(ends)]
    print(
        json.dumps(
            {"seconds": statistics.median(durations), "all": durations, "gib": read_peak_memory("cpu")}
        )
    )


@app.command(context_settings={"ignore_unknown_options": True})
def alone(
    script: Annotated[Path, typer.Argument(help="The file.")],
    flags: Annotated[list[str], typer.Argument(help="The script's own flags.")],
) -> None:
    """Run the file with its own flags, with torchvision or the stand-in."""
    if importlib.util.find_spec("torchvision") is None:
        install_stand_in()
    sys.argv = [str(script), *flags]
    runpy.run_path(str(script), run_name="__main__")


def run_script(
    script: Path, model: str, folder: Path, out: Path, *, steps: int, precision: str, prior: bool
) -> None:
    """The file itself."""
    backbone = Backbone.open(model, device="cpu")
    flags: dict[str, object] = {
        "pretrained_model_name_or_path": backbone.location.source, "instance_data_dir": folder / "subject",
        "instance_prompt": PROMPT, "output_dir": out, "resolution": backbone.resolution, "train_batch_size": 1,
        "rank": 4, "max_train_steps": steps, "seed": 0,
        "mixed_precision": "no" if precision == "fp32" else precision,
    }  # fmt: skip
    if prior:
        flags |= {
            "class_data_dir": folder / "class",
            "class_prompt": CLASS_PROMPT,
            "num_class_images": PICTURES,
        }
    alone(script, [*to_flags(flags), *(["--with_prior_preservation"] if prior else [])])


def to_flags(requested: Mapping[str, object]) -> list[str]:
    """Settings as the script's flags: `--name value`."""
    return [word for name, value in requested.items() for word in (f"--{name}", str(value))]


def run_restated(model: str, *, steps: int, precision: str, prior: bool) -> None:
    """Load as the script does, then take its restated steps."""
    parts = load_like_script(model, "cpu", precision)
    restated = Script(parts, DreamBooth(parts.model, make_material(parts.model), make_settings(1)))
    for _ in range(steps):
        restated.step(prior=prior, text_once=False)


def run_here(model: str, folder: Path, out: Path, *, steps: int, precision: str, prior: bool) -> None:
    """What `customize train` does from the pictures to the file, but for drawing."""
    backbone = Backbone.open(model, device="cpu", precision=precision)
    pictures = list_images(str(folder / "subject"))
    settings = replace(
        make_settings(1), steps=steps, prior="base" if prior else "off", prior_draws=DRAWS, model=model
    )
    group = SubjectGroup(pictures, [PROMPT] * len(pictures), CLASS_PROMPT)
    training = DreamBooth(backbone, make_training_data(backbone, [group], settings), settings)
    for _ in take_steps(training):
        pass
    training.save(out)
    training.write(out, {})


# Replacements for torchvision -------------------------------------------------------------------------------


class InterpolationMode(Enum):
    """Pillow's, by torchvision's names."""

    NEAREST = Image.Resampling.NEAREST
    LANCZOS = Image.Resampling.LANCZOS
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC


def install_stand_in() -> None:
    """Register a module `torchvision.transforms` with what the script uses."""
    transforms = ModuleType("torchvision.transforms")
    modules: dict[str, Any] = {
        "InterpolationMode": InterpolationMode, "Compose": compose, "Resize": resize, "CenterCrop": center_crop,
        "RandomCrop": random_crop, "ToTensor": lambda: lambda image: (to_tensor(image) + 1) / 2,
        "Normalize": normalize,
    }  # fmt: skip
    for name, value in modules.items():
        setattr(transforms, name, value)
    package = ModuleType("torchvision")
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


def compose(transforms: Sequence[Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """One after the other."""

    def composed(value: Any) -> Any:
        for transform in transforms:
            value = transform(value)
        return value

    return composed


def resize(size: int, interpolation: InterpolationMode) -> Callable[[Image.Image], Image.Image]:
    """The shorter side to `size`."""

    def act(image: Image.Image) -> Image.Image:
        scale = size / min(image.size)
        width, height = (max(size, round(side * scale)) for side in image.size)
        return image.resize((width, height), interpolation.value)

    return act


def center_crop(size: int) -> Callable[[Image.Image], Image.Image]:
    """The square in the middle."""
    return lambda image: crop(image, (image.width - size) // 2, (image.height - size) // 2, size)


def random_crop(size: int) -> Callable[[Image.Image], Image.Image]:
    """A square somewhere."""

    def act(image: Image.Image) -> Image.Image:
        left, top = (int(torch.randint(0, side - size + 1, ())) for side in image.size)
        return crop(image, left, top, size)

    return act


def crop(image: Image.Image, left: int, top: int, size: int) -> Image.Image:
    """A square of a picture."""
    return image.crop((left, top, left + size, top + size))


def normalize(mean: Sequence[float], std: Sequence[float]) -> Callable[[Tensor], Tensor]:
    """Subtract the mean and divide by the deviation, the same for all channels."""
    return lambda value: (value - mean[0]) / std[0]


# Figures ----------------------------------------------------------------------------------------------------


def format_markdown(facts: dict[str, Any]) -> str:
    """The table as Markdown."""
    sides = facts["sides"]
    lines = [
        f"`{facts['command']}`",
        "",
        f"{facts['precision']}, one picture a step, medians of {facts['steps'] - 1} steps in "
        f"{CLOCKS[facts['clock']]}, a process a side ({facts['machine']}).",
        "",
        "| | a step, s | script / this | peak GiB | this / script "
        "| with prior: a step, s | script / this | peak GiB | this / script |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for side in SIDES:
        cells = [side]
        for suffix in ("", ", prior"):
            values, theirs = sides[side + suffix], sides["script" + suffix]
            cells += [f"{values['seconds']:.3f}", f"{theirs['seconds'] / values['seconds']:.2f}×"]
            cells += [f"{values['gib']:.2f}", f"{values['gib'] / theirs['gib']:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    run_app(app)
