"""A model's default settings: its `limner.json`, every key of which may be left out.

    {"steps": 25, "guidance": 4.0, "sampler": "ancestral", "learning_rates": {"pairs": 0.001}, "edit": {"cross": 0.0}}

Options of a command take precedence. `align` and `draft` hold settings of `align train`, which reads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from backbone.cli.conditions import KINDS, ROWS
from backbone.cli.few_step import is_called_few_step
from backbone.cli.options import Field, Option, list_fields
from backbone.cli.other_names import find_nearest
from backbone.cli.sampling import Sampler, default_guidance_interval, name_sampler
from backbone.cli.values.convert import convert_value
from backbone.io.console import UserError, notify_once
from backbone.io.files import read_json
from backbone.io.records import read_as

FILE = "limner.json"
LEARNED = ("lora", "full", "textual-inversion", "pivotal", "custom-diffusion", "pairs", "pairs-full")
NETWORKS = ("t2i-adapter", "t2i-adapter-lora", "controlnet", "control-lora")


def _number(help: str, min: float, max: float | None = None) -> Option:
    return Option(help, "Defaults", min=min, max=max)


@dataclass(frozen=True)
class ModelDefaults:
    """Default settings of sampling and training."""

    steps: Annotated[int, _number("Steps of the sampler.", 1)] = 30
    guidance: Annotated[float, _number("Scale of classifier-free guidance.", 0)] = 7.5
    guidance_start: Annotated[float, _number("Share of the steps before guidance begins.", 0, 1)] = 0.0
    guidance_stop: Annotated[float, _number("Share of the steps after which guidance ends.", 0, 1)] = 1.0
    sampler: Annotated[
        str, Option("Sampler.", "Defaults", choices=get_args(Sampler), convert=name_sampler)
    ] = "ddim"
    early_scale: Annotated[float, _number("Strength of concepts in the first steps.", 0)] = 1.0
    early_steps: Annotated[float, _number("Share of the steps that are the first ones.", 0, 1)] = 0.25
    train_steps: Annotated[int, _number("Steps of a training.", 1)] = 500
    evaluation_steps: Annotated[int, _number("Steps between two evaluations.", 1)] = 50
    learning_rate: Annotated[float, _number("Learning rate.", 0)] = 1e-4
    rank: Annotated[int, _number("Rank of an adapter.", 1)] = 8
    batch: Annotated[int, _number("Images of a step.", 1)] = 1
    prior_batch: Annotated[int, _number("Class samples beside each batch.", 0)] = 1
    prior_draws: Annotated[int, _number("Base-model predictions of the class.", 1)] = 64
    prior_prompts: Annotated[tuple[str, ...], Option("Further prompts of the class.", "Defaults")] = ()
    random_crop: Annotated[int, _number("Random crops of each image.", 0)] = 0
    flip: Annotated[bool, Option("Mirrored images too.", "Defaults")] = False
    lora_layers: Annotated[str, Option("Layers of an adapter.", "Defaults")] = "attention"
    loss_weighting: Annotated[str, Option("Loss weight per timestep.", "Defaults")] = "none"
    sheet_prompts: Annotated[tuple[str, ...], Option("Prompts of a sheet.", "Defaults")] = ()


@dataclass(frozen=True)
class ConditionDefaults:
    """Default strength and steps of a control network."""

    scale: Annotated[float, _number("Strength.", 0)] = 1.0
    start: Annotated[float, _number("Share of the steps that are taken before it acts.", 0, 1)] = 0.0
    stop: Annotated[float, _number("Share of the steps that are taken after which it does not.", 0, 1)] = 1.0
    rows: Annotated[str, Option("Predictions of guidance on which it acts.", "Defaults", choices=ROWS)] = (
        "both"
    )


@dataclass(frozen=True)
class EditDefaults:
    """Default share of the steps with the source's attention, by layer and by what an edit changes."""

    cross: Annotated[float, _number("Cross-attention.", 0, 1)] = 0.8
    self_attention: Annotated[float, _number("Self-attention.", 0, 1)] = 0.4
    colour_self_attention: Annotated[float, _number("Self-attention, where a colour changes.", 0, 1)] = 0.4
    style_self_attention: Annotated[float, _number("Self-attention, where a style changes.", 0, 1)] = 0.4
    place_self_attention: Annotated[float, _number("Self-attention, where most changes.", 0, 1)] = 0.4


@dataclass(frozen=True)
class ControlDefaults:
    """Default settings of `customize train-control`."""

    steps: Annotated[int, _number("Steps of a training.", 1)] = 5000
    batch: Annotated[int, _number("Images of a step.", 1)] = 4
    rank: Annotated[int, _number("Rank of a control-LoRA.", 1)] = 32


SECTIONS: Mapping[str, type] = {
    "condition": ConditionDefaults,
    "edit": EditDefaults,
    "control": ControlDefaults,
}
# Tables in a section: the table's key, the names it may hold, and the setting whose range its values have
BY_NAME: Mapping[type, tuple[str, tuple[str, ...], Field]] = {
    ModelDefaults: ("learning_rates", LEARNED, list_fields(ModelDefaults)["learning_rate"]),
    ControlDefaults: ("learning_rates", NETWORKS, list_fields(ModelDefaults)["learning_rate"]),
    ConditionDefaults: ("scales", KINDS, list_fields(ConditionDefaults)["scale"]),
}
OF_ALIGN = ("align", "draft")


def read_defaults(file: Path) -> dict[str, Any]:
    """Read a `limner.json`; `UserError`, with the file and the key, for an unknown setting and a value out of range."""
    return parse_defaults(read_json(file), file)


def parse_defaults(contents: Any, file: Path) -> dict[str, Any]:
    """The defaults in the JSON `contents` of a file; raises as `read_defaults`."""
    record = dict(read_as(dict[str, Any], contents, file))
    sections = {
        name: read_as(dict[str, Any], record.pop(name), file, name) for name in OF_ALIGN & record.keys()
    }
    for name in SECTIONS.keys() & record.keys():
        sections[name] = read_section(SECTIONS[name], record.pop(name), file, name)
    return {**sections, **read_section(ModelDefaults, record, file)}


def read_section(declared: type, record: Any, file: str | Path, section: str = "") -> dict[str, Any]:
    """The values of a section, converted to the types of `declared`'s fields; raises as `read_defaults`."""
    fields, values = list_fields(declared), {}
    table_keys = BY_NAME[declared][:1] if declared in BY_NAME else ()
    section_names = () if section else (*SECTIONS, *OF_ALIGN)
    for name, value in read_as(dict[str, Any], record, file, section).items():
        key = f"{section}.{name}" if section else name
        if name in table_keys:
            values[name] = _read_by_name(*BY_NAME[declared][1:], value, file, key)
        elif name not in fields:
            raise UserError(
                f"{file} sets {key}, which is no setting of a model."
                f"{find_nearest(name, [*fields, *table_keys, *section_names])} Leave it out."
            )
        else:
            values[name] = convert_value(fields[name], value, key, file)
    if "sheet_prompts" in values and not values["sheet_prompts"]:
        raise UserError(f"sheet_prompts in {file} is empty. Leave it out, or name a prompt.")
    start, stop = default_guidance_interval(values)
    if declared is ModelDefaults and not start < stop:
        raise UserError(
            f"{file} has guidance from {start:g} to {stop:g} of the steps. Let it end behind its beginning."
        )
    return values


def _read_by_name(
    names: tuple[str, ...], field: Field, record: Any, file: str | Path, key: str
) -> dict[str, float]:
    numbers = {}
    for name, value in read_as(dict[str, Any], record, file, key).items():
        if name not in names:
            raise UserError(
                f"{file} has {key} of {name}, and there are those of {', '.join(names)}.{find_nearest(name, names)}"
            )
        numbers[name] = convert_value(field, value, f"{key}.{name}", file)
    return numbers


def say_few_step_name(source: str, defaults: Mapping[str, Any]) -> None:
    """Warn where a model's name says that it was distilled to few steps, and its `defaults` take many.

    `source` is its file, folder or hub id.
    """
    steps, guidance = int(defaults["steps"]), float(defaults["guidance"])
    if steps > 12 and guidance > 2 and is_called_few_step(Path(source).name):
        notify_once(
            f"{source} is called as one that was distilled to few steps, and nothing beside it says so: it is drawn in "
            f"{steps} steps at guidance {guidance:g}, which burn the images of such a model. If it is one, say "
            "--steps 6 --guidance 1."
        )
