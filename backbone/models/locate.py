"""Finding a model by its name, folder, file or hub id."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from backbone.families.location import Location, hub_file
from backbone.families.registry import families
from backbone.families.single_file import checkpoint as single_file
from backbone.io.console import UserError, notify_once, quote
from backbone.io.files import read_header, read_json
from backbone.io.records import read_as
from backbone.io.run_folder import CONCEPT_FILE
from backbone.io.weights import refuse_other_numbers, refuse_shard
from backbone.io.written import written_path

WEIGHTS = (".safetensors", ".ckpt", ".gguf", ".sft")
JOIN = "+"  # between the files of one model: transformer.safetensors+vae.safetensors+text_encoder.safetensors
# The models carried along
OWN = {name: Path(__file__).parents[1] / name for name in ("moji", "moji-flow", "moji-turbo")}
FEW_STEP = "few_step.json"  # of a folder whose adapter makes a few-step model of a base
ADAPTER = "pytorch_lora_weights.safetensors"
FEW_STEP_MODELS = {  # the few-step model that goes with a base
    "moji": "moji-turbo",
    "z-image": "z-image-turbo",
    "flux2-klein": "flux2-klein-distilled",
    "krea2": "krea2-turbo",
}


# diffusers' other pipelines of the same parts; that a UNet reads more than latents is seen by its config
SAME_PARTS = re.compile(
    r"(StableDiffusion|StableDiffusionXL|StableDiffusion3|Flux|Chroma|QwenImage|ZImage)(?:Img2Img|Inpaint)Pipeline"
    r"|LatentConsistencyModel(?:Img2Img)?Pipeline"
)
EMBEDDED = OWN["moji"]
MODULAR_INDEX = "modular_model_index.json"
PARTS = (
    *("unet", "transformer", "vae", "scheduler", "text_encoder", "text_encoder_2", "text_encoder_3"),
    *("tokenizer", "tokenizer_2", "tokenizer_3"),
)


def locate(model: str) -> Location:
    """Locate a model by its name; `UserError` where there is none."""
    place = place_of(model)
    if place != model and (Path(model) / "model_index.json").is_file():
        notify_once(
            f"{model} is the model of that name, and not the folder that lies here. That is --model ./{model}"
        )
    path = written_path(place)
    absolute = Path(os.path.abspath(path))  # parts load later, from whatever folder is the working one then
    if path.is_dir():
        index = path / "model_index.json"
        if (path / FEW_STEP).is_file():
            return _locate_with_adapter(model, absolute)
        if not index.exists() and (path / CONCEPT_FILE).exists():
            raise UserError(f"{path} is a run, not a whole model. Give it with --concept {quote(path)}.")
        if not index.exists() and (path / MODULAR_INDEX).is_file():
            raise UserError(
                f"{path} is a modular pipeline of diffusers ({MODULAR_INDEX}), whose components lie elsewhere. Name "
                f"the model that they are of{_list_sources(path / MODULAR_INDEX)}."
            )
        if not index.exists():
            raise UserError(
                f"{path} is not a diffusers model: it has no model_index.json. {_name_near(path)}"
            )
        return Location(model, str(absolute), read_index(index))
    if model in OWN:
        raise UserError(
            f"The embedded model is missing from {path}, so this is not a whole installation. Install again."
        )

    # One checkpoint file, or several joined: a transformer, an autoencoder and text encoders
    files = [written_path(one) for one in split_files(place)]
    if path.name == "model_index.json" and path.is_file():
        raise UserError(f"{path} is one file of a model. Name its folder: {path.parent}.")
    whole = written_path(place.split(JOIN)[0]) if JOIN in place else path
    if whole != path and whole.is_dir() and not path.exists():
        raise UserError(
            f"{whole} is a whole model, whose other components lie in it: --vae and --text-encoder have no effect. "
            "Leave them out."
        )
    if path.is_file() or len(files) > 1:
        return _locate_files(model, [Path(os.path.abspath(one)) for one in files])
    if path.suffix.lower() in WEIGHTS:
        raise UserError(f"There is no file {path}. Check the spelling, and the folder that it is named from.")

    # A hub id, or nothing at all
    is_id = place.count("/") == 1 and not place.startswith((".", "/", "~")) and not path.parent.exists()
    if place != model or is_id:
        index = hub_file(place, "model_index.json")
        # The cache keeps each commit in a folder of that name: all other files come from the same one.
        return Location(model, place, read_index(index), revision=index.parent.name)
    renamed = (
        " Where a run's model lies now is said by --model FOLDER, beside RUN, --resume RUN or --concept RUN."
    )
    near = nearest_name(model)
    suggestion = f" Did you mean {near}?" if near else ""
    raise UserError(
        f"There is no model {model}.{suggestion} Name one of {', '.join(known_names())}, a diffusers folder, "
        f"a checkpoint file, or a hub id.{renamed if path.is_absolute() else ''}"
    )


def _name_near(folder: Path) -> str:
    """Which model may be meant by a folder that is none: the one that it lies in, those in it, or single files.

    In the hub's cache a model lies two levels below its folder.
    """
    if (folder.parent / "model_index.json").is_file():
        return f"It is a component of one: name {folder.parent}."
    within = sorted(
        str(file.parent) for level in ("*", "*/*") for file in folder.glob(f"{level}/model_index.json")
    )
    files = (
        sorted(map(str, folder.glob("[!.]*.safetensors"))) if not (folder / "config.json").exists() else []
    )
    if matches := within or files:
        remainder = f" and {len(matches) - 3} more" if len(matches) > 3 else ""
        return f"Name what lies in it: {', '.join(matches[:3])}{remainder}."
    return "Name the folder that `save_pretrained` wrote."


def _list_sources(index: Path) -> str:
    """The models from which a modular pipeline takes its components, to follow a sentence; empty where none is said."""
    specs = [value[-1] for value in read_json(index).values() if isinstance(value, list) and value]
    named = [spec.get("pretrained_model_name_or_path") for spec in specs if isinstance(spec, dict)]
    models = dict.fromkeys(name for name in named if isinstance(name, str))
    return f": {' or '.join(models)}" if models else ""


def _locate_with_adapter(name: str, folder: Path) -> Location:
    """A few-step model that is an adapter on a base: the base's files, and before them those of the folder."""
    record = folder / FEW_STEP
    base = read_as(str, read_json(record).get("base"), record, "base")
    if not (folder / ADAPTER).is_file():
        raise UserError(
            f"{folder} lacks {ADAPTER}, the adapter of a few-step model. Copy the whole folder again."
        )
    location = locate(base)
    if location.few_step is not None:
        raise UserError(f"{record} is damaged: its base {base} is a few-step adapter itself. Restore it.")
    return replace(location, name=name, few_step=folder)


def is_path(model: str) -> bool:
    """Whether `locate` would take this for a folder or file on this machine, rather than for a name or a hub id."""
    return place_of(model) == model and all(written_path(one).exists() for one in split_files(model))


def absolute_model(model: str) -> str:
    """A model's name as a run keeps it: with the whole paths of its folder or files, so that it is found anywhere."""
    if not is_path(model):
        return model
    return join_files(*(os.path.abspath(written_path(one)) for one in split_files(model)))


def read_index(path: Path) -> dict[str, Any]:
    """A `model_index.json`: the class of the pipeline that draws from words, library and class of each component."""
    index = read_json(path)
    kind = read_as(str, index.get("_class_name", ""), path, "_class_name")
    if same := SAME_PARTS.fullmatch(kind):
        index["_class_name"] = f"{same[1] or 'StableDiffusion'}Pipeline"
    for part in PARTS:
        if index.get(part) is not None:
            read_as(tuple[str | None, str | None], index[part], path, part)
    return index


def place_of(model: str) -> str:
    """The folder or hub id that a short name stands for; anything else stands for itself.

    No other family is imported for the models carried along, nor for what no short name looks like: a path.
    """
    if model in OWN:
        return str(OWN[model])
    return model if "/" in model else known_names().get(model, model)


def known_names() -> dict[str, str]:
    """Short names, and the folders or hub ids that they stand for."""
    published = {name: place for family in families() for name, place in family.hub_ids.items()}
    return {**{name: str(folder) for name, folder in OWN.items()}, **published}


def nearest_name(model: str) -> str:
    """The short name that is meant by another spelling of it or of its published name (SDXL, flux.1-dev); "" if none.

    Of what looks like a path none is meant.
    """
    if "/" in model:
        return ""
    candidates = known_names()
    spelled = {
        _squeeze(place.rpartition("/")[2]): name for name, place in candidates.items() if name not in OWN
    }
    spelled |= {_squeeze(name): name for name in candidates}
    near = difflib.get_close_matches(_squeeze(model), spelled, 1, cutoff=0.8)
    return spelled[near[0]] if near else ""


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def join_files(*files: str) -> str:
    """The name of a model whose autoencoder and text encoder lie in files of their own; `locate` understands it."""
    return JOIN.join(filter(None, files))


def split_files(model: str) -> list[str]:
    """The files that a model's name joins; the name alone where it is that of a file or folder, or joins none."""
    files = model.split(JOIN)
    joined = len(files) > 1 and all(Path(one).suffix.lower() in WEIGHTS for one in files)
    return files if joined and not written_path(model).exists() else [model]


def _read_beside(settings: Sequence[Path]) -> dict[str, Any]:
    """What a model_index.json beside a file says that no weights and no config do."""
    path = next(
        (folder / "model_index.json" for folder in settings if (folder / "model_index.json").exists()), None
    )
    index = read_index(path) if path else {}
    return {key: index[key] for key in ("is_distilled", "text_encoder_select_layers") if key in index}


def _locate_files(name: str, paths: Sequence[Path]) -> Location:
    """A model of one file, or of a transformer's file and those of its other components, in whatever order."""
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"There is no file {path}. Check the spelling, and the folder that it is named from."
            )
        if path.suffix.lower() == ".gguf":
            raise UserError(
                f"{path} is GGUF, which is not read. Take the model's .safetensors, and --vram GIB plans a base of 4 "
                "or 8 bits."
            )
        refuse_shard(path)
    headers = [read_header(path) for path in paths]
    for header in headers:
        for family in families():
            settings = family.match_checkpoint(header)
            if settings is not None:
                for one in headers:
                    refuse_other_numbers(one)
                parts = family.find_parts(header, [other for other in headers if other is not header])
                index = {**_read_beside(settings), "_class_name": family.pipeline_classes[0]}
                return Location(name, str(header.path), index, settings, parts=parts)
    served = ", ".join(family.name for family in families())
    raise UserError(f"{single_file.describe_unknown_file(headers[0])} This version works with {served}.")
