"""The pages of docs/families/: their tables are what the families say of themselves.

`python -m tests.test_family_pages` writes the settings of every page, `python -m tests.test_family_pages --memory` the
plans of memory too, which takes minutes.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from backbone.families.base import Family
from backbone.families.location import Location
from backbone.families.registry import families
from backbone.io.files import write_json
from backbone.models.locate import FEW_STEP_MODELS
from backbone.models.model import Backbone, Task
from benchmarks.memory import CLIPS, SHAPES, SIZES, Shape, count, format_table, lay_out, open_shape
from customize.settings import resolve_settings

FOLDER = Path(__file__).parents[1] / "docs" / "families"
# Names that --model takes, and what else a page's memory is counted of
PAGES: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "stable-diffusion.md": (("sd15",), ("sd15", "Stable Diffusion 2.1")),
    "sdxl.md": (("sdxl",), ("sdxl",)),
    "sd3.md": (("sd3",), ("sd3", "Stable Diffusion 3.5 large")),
    "flux.md": (("flux", "flux-schnell"), ("flux",)),
    "pixart.md": (("pixart",), ()),
    "z-image.md": (("z-image", "z-image-turbo"), ("z-image",)),
    "flux2.md": (
        ("flux2-klein", "flux2-klein-distilled", "flux2-klein-9b", "flux2-dev"),
        ("flux2-klein", "flux2-klein-9b", "flux2-dev"),
    ),
    "qwen-image.md": (
        ("qwen-image", "qwen-image-edit", "qwen-image-edit-2509", "qwen-image-edit-2511", "qwen-image-2.1"),
        ("qwen-image", "qwen-image-edit", "qwen-image-2.1"),
    ),
    "krea2.md": (("krea2", "krea2-turbo"), ("krea2",)),
    "chroma.md": (("chroma",), ("chroma",)),
    "stable-video.md": (("svd", "svd-xt"), ()),
}
# Published models that are counted with another of their shape, or not at all
FURTHER = {
    "flux-schnell": Shape("FluxPipeline", ("flux-schnell", "flux", *CLIPS[1:])),
    "z-image-turbo": Shape("ZImagePipeline", ("z-image-turbo", "z-image")),
    "flux2-klein-distilled": Shape("Flux2KleinPipeline", ("flux2-klein",)),
    "qwen-image-edit-2509": Shape("QwenImageEditPlusPipeline", ("qwen-image",)),
    "qwen-image-edit-2511": Shape("QwenImageEditPlusPipeline", ("qwen-image",)),
    "krea2-turbo": Shape("Krea2Pipeline", ("krea2", "qwen-image")),
    "svd": Shape("StableVideoDiffusionPipeline", ("stable-video-diffusion",)),
    "svd-xt": Shape("StableVideoDiffusionPipeline", ("stable-video-diffusion-xt", "stable-video-diffusion")),
}
DISTILLED = ("flux2-klein-distilled", "krea2-turbo")  # by their model_index.json
BLOCK = "<!-- {0} -->\n\n{1}\n<!-- end of {0} -->"


@cache
def family_of(name: str) -> Family:
    """The family of a short name."""
    return next(family for family in families() if name in family.hub_ids)


def opened(name: str, place: Path) -> Backbone | None:
    """A published model as its configs have it; None where none are carried along."""
    if name not in {**SHAPES, **FURTHER}:
        return None
    shape = {**SHAPES, **FURTHER}[name]
    index = lay_out(shape, place) | {"_class_name": shape.pipeline, "is_distilled": name in DISTILLED}
    write_json(place / "model_index.json", index)
    tasks: dict[bool, Task] = {"Edit" in shape.pipeline: "edit", "Video" in shape.pipeline: "image-to-video"}
    return Backbone.open(str(place), device="cpu", precision="bf16", task=tasks.get(True, "text-to-image"))


def settings_of(page: str) -> str:
    """The table of a page's models, and what its families say beside."""
    lines = [
        "| `--model` | on the hub | steps | guidance | pixels | latents |",
        "|---|---|---|---|---|---|",
    ]
    said = list[str]()
    for name in PAGES[page][0]:
        family = family_of(name)
        with TemporaryDirectory() as place:
            model = opened(name, Path(place))
            shape = None if model is None else model.family.latent_shape(model.location)
            licence = "" if model is None else family.licence(model.location)
            usual = model.defaults if model else of_any_config(family)
            factor = 0 if model is None else model.factor
        size = f"{shape[-1] * factor} × {shape[-2] * factor}" if shape else "by its config"
        latents = " × ".join(map(str, shape)) if shape else "by its config"
        hub = f"`{family.hub_ids[name]}`"
        lines.append(f"| `{name}` | {hub} | {usual['steps']} | {usual['guidance']:g} | {size} | {latents} |")
        if licence and licence not in said:
            said.append(licence)
    return "\n".join([*lines, "", *facts_of(page, said), ""])


def of_any_config(family: Family) -> dict[str, Any]:
    """What a family recommends for sampling whatever its model's configs are, of which none are carried along."""
    return family.sampling_defaults(Location("", "", {}))


def facts_of(page: str, licences: list[str]) -> list[str]:
    """Layers, images beside a prompt, control networks, few-step models and licences."""
    names = PAGES[page][0]
    its_families = {type(family): family for family in map(family_of, names)}.values()
    lines = list[str]()
    for family in its_families:
        first, every = (family.lora_targets[kind] for kind in ("attention", "all"))
        more = [layer for layer in every if layer not in first]
        shown = f"- LoRA of {family.name}: `attention` is {listed(first)}; `all` adds {listed(more)}."
        if not any(shown.partition(":")[2] == line.partition(":")[2] for line in lines):
            lines.append(shown)
    for family in its_families:
        lines += [
            f"- `{pipeline}` takes {'one image' if most == 1 else f'up to {most} images'} with the prompt."
            for pipeline, most in ((name, read.max_images) for name, read in family.reads_images.items())
            if ("XL" in pipeline) == (page == "sdxl.md") or "Pix2Pix" not in pipeline
        ]
    controls = getattr(family_of(names[0]), "control_classes", ())
    if controls:
        lines.append(f"- Control networks: {listed([one.__name__ for one in controls])}.")
    lines += [f"- Few-step model: `{FEW_STEP_MODELS[name]}`." for name in names if name in FEW_STEP_MODELS]
    lines += [f"- Printed once when the weights are loaded: “{licence}”" for licence in licences]
    return lines


def listed(names: tuple[str, ...] | list[str]) -> str:
    """Names of layers, those that differ by a block's number once."""
    return ", ".join(
        f"`{one}`"
        for one in dict.fromkeys(re.sub(r"\.\d+\.(?=\w+\.|proj_out)", ".#.", name) for name in names)
    )


def parse_vram(page: str) -> str:
    """The plans of a page's models."""
    rows = []
    for name in PAGES[page][1]:
        with TemporaryDirectory() as place:
            rows.append(count(name, open_shape(name, Path(place)), SIZES))
    return format_table(rows, SIZES)


def block_of(page: str, name: str) -> str | None:
    """What a page has between the marks of a name."""
    text = (FOLDER / page).read_text(encoding="utf-8")
    found = re.search(BLOCK.format(re.escape(name), "(.*?)"), text, flags=re.DOTALL)
    return found and found[1]


def test_every_name_of_a_model_is_on_one_page() -> None:
    named = [name for names, _ in PAGES.values() for name in names]
    assert sorted(named) == sorted(name for family in families() for name in family.hub_ids)
    index = (FOLDER / "index.md").read_text(encoding="utf-8")
    assert [name for name in named if f"`{name}`" not in index] == []
    assert [page for page in PAGES if f"({page})" not in index] == []


def test_every_shape_that_is_counted_is_on_one_page() -> None:
    assert sorted(name for _, names in PAGES.values() for name in names) == sorted(SHAPES)


def test_the_defaults_of_training_are_said_as_they_are(tmp_path: Path) -> None:
    usual = open_shape("sd15", tmp_path).defaults
    run = resolve_settings({"images": "", "token": "[V]", "class_noun": "dog"}, usual)
    said = f"LoRA of rank {run.rank} on {{}}, learning rate {run.learning_rate:.0e}, {run.steps} steps"
    said = said.replace("e-0", "e-")
    index, photographs = (
        " ".join(path.read_text(encoding="utf-8").split())
        for path in (FOLDER / "index.md", FOLDER.parent / "photographs.md")
    )
    assert run.lora_layers == "attention" and run.batch == run.prior_batch == 1
    assert said.format("the layers `attention`") in index and said.format("attention") in photographs


@pytest.mark.parametrize("page", PAGES)
def test_the_settings_of_a_page_are_its_families_own(page: str) -> None:
    assert block_of(page, "settings") == settings_of(page), "python -m tests.test_family_pages writes it"


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page, (_, counted) in PAGES.items() if counted])
def test_the_memory_of_a_page_is_what_the_planner_counts(page: str) -> None:
    assert block_of(page, "memory") == parse_vram(page), (
        "python -m tests.test_family_pages --memory writes it"
    )


def phases_of(page: str, name: str) -> list[str]:
    """GiB of a page's model as it comes: encoding, base predictions, training, previews."""
    row = next(
        line for line in (block_of(page, "memory") or "").splitlines() if line.startswith(f"| `{name}`")
    )
    return re.findall(r"(?:encoding|base predictions|training|previews) ([\d.]+)", row)


def test_the_memory_in_the_readme_and_of_photographs_is_that_of_the_pages() -> None:
    readme, photographs = (
        (FOLDER.parent / name).read_text(encoding="utf-8") for name in ("../README.md", "photographs.md")
    )
    counted = [
        phases_of(page, name)
        for page, name in zip(
            ("stable-diffusion.md", "sdxl.md", "sd3.md"), ("sd15", "sdxl", "sd3"), strict=True
        )
    ]
    flux = phases_of("flux.md", "flux")
    training = " | ".join(phases[2] for phases in counted)
    whole = " | ".join(max(phases, key=float) for phases in counted)
    assert f"| LoRA training, GiB | {training} | " in readme
    assert f"previews included, GiB | {whole} | {flux[3]}* |" in readme
    for phases in counted:
        assert f" | {' | '.join(phases)} |" in photographs
    assert (
        f" | {flux[0]} | {flux[1]} | " in photographs and f"({flux[2]} without) | {flux[3]} |" in photographs
    )


def write(page: str, name: str, text: str) -> None:
    """Puts a text between the marks of a name."""
    path = FOLDER / page
    whole = path.read_text(encoding="utf-8")
    pattern = re.compile(BLOCK.format(re.escape(name), "(.*?)"), flags=re.DOTALL)
    assert pattern.search(whole), f"{path} has no place for {name}."
    path.write_text(pattern.sub(lambda _: BLOCK.format(name, text), whole), encoding="utf-8")


if __name__ == "__main__":
    for page, (_, counted) in PAGES.items():
        write(page, "settings", settings_of(page))
        if counted and "--memory" in sys.argv:
            write(page, "memory", parse_vram(page))
