"""Finding a model by its name, folder, file or hub id."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from backbone.families import checkpoint as single_file
from backbone.families.location import Location, hub_file
from backbone.families.registry import families
from backbone.io.console import UserError
from backbone.io.files import read_header, read_json
from backbone.io.records import read_as

OWN = {name: Path(__file__).parents[1] / name for name in ("moji", "moji-flow")}  # the models carried along


EMBEDDED = OWN["moji"]
PARTS = (
    *("unet", "transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)


def locate(model: str) -> Location:
    """Where a model of this name is; `UserError` when it is nowhere."""
    names = known_names()
    place = names.get(model, model)
    path = Path(place).expanduser()
    if path.is_dir():
        index = path / "model_index.json"
        if not index.exists() and (path / "concept.json").exists():
            raise UserError(f"{path} is a run, not a whole model. Give it with --concept {path}.")
        if not index.exists():
            raise UserError(
                f"{path} is not a diffusers model: it has no model_index.json. "
                "Name the folder that `save_pretrained` wrote."
            )
        return Location(model, str(path), read_index(index))
    if model in OWN:
        raise UserError(
            f"The embedded model is missing from {path}, so this is not a whole installation. Install again."
        )
    if path.is_file():
        return _single_file(model, path)
    if path.suffix.lower() in (".safetensors", ".ckpt"):
        raise UserError(f"There is no file {path}. Check the spelling, and the folder that it is named from.")
    is_id = place.count("/") == 1 and not place.startswith((".", "/", "~")) and not path.parent.exists()
    if model in names or is_id:
        index = hub_file(place, "model_index.json")
        # The cache keeps each commit in a folder of that name: all other files come from the same one.
        return Location(model, place, read_index(index), revision=index.parent.name)
    raise UserError(
        f"There is no model {model}. Name one of {', '.join(names)}, a diffusers folder, "
        "a checkpoint file, or a hub id."
    )


def is_path(model: str) -> bool:
    """Whether `locate` would take this for a folder or file on this machine, rather than for a name or a hub id."""
    return model not in known_names() and Path(model).expanduser().exists()


def read_index(path: Path) -> dict[str, Any]:
    """A `model_index.json`: the pipeline's class, and library and class of each component."""
    index = read_json(path)
    read_as(str, index.get("_class_name", ""), path, "_class_name")
    for part in PARTS:
        if index.get(part) is not None:
            read_as(tuple[str | None, str | None], index[part], path, part)
    return index


def known_names() -> dict[str, str]:
    """Short names, and the folders or hub ids that they stand for."""
    published = {name: place for family in families() for name, place in family.hub_ids.items()}
    return {**{name: str(folder) for name, folder in OWN.items()}, **published}


def _single_file(name: str, path: Path) -> Location:
    header = read_header(path)
    for family in families():
        settings = family.match_checkpoint(header)
        if settings is not None:
            return Location(name, str(path), {"_class_name": family.pipeline_classes[0]}, settings)
    served = ", ".join(family.name for family in families())
    raise UserError(f"{single_file.describe_unknown_file(header)} This version works with {served}.")
