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
from backbone.io.files import explain_unread_format, read_header, read_json
from backbone.io.records import read_as
from backbone.io.run_folder import CONCEPT_FILE
from backbone.io.weights import refuse_other_numbers, refuse_shard
from backbone.io.written import written_path

WEIGHTS = (".safetensors", ".ckpt", ".gguf", ".sft")
JOIN = "+"  # between the files of one model: transformer.safetensors+vae.safetensors+text_encoder.safetensors
# The embedded models
OWN = {name: Path(__file__).parents[1] / name for name in ("moji", "moji-flow", "moji-turbo")}
FEW_STEP = "few_step.json"  # in a folder whose adapter makes a few-step model of a base
ADAPTER = "pytorch_lora_weights.safetensors"
FEW_STEP_MODELS = {  # the few-step model that goes with a base
    "moji": "moji-turbo",
    "z-image": "z-image-turbo",
    "flux2-klein": "flux2-klein-distilled",
    "krea2": "krea2-turbo",
}


# diffusers' other pipelines of the same components; a UNet's config tells whether it reads more than latents
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
    source = resolve_model_name(model)
    if source != model and (Path(model) / "model_index.json").is_file():
        notify_once(
            f"{model} is the model of that name, and not the folder that lies here. That is --model ./{model}"
        )
    path = written_path(source)
    absolute = Path(os.path.abspath(path))  # components load later, when the working folder may have changed
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
                f"{path} is not a diffusers model: it has no model_index.json. {_suggest_near(path)}"
            )
        return Location(model, str(absolute), read_index(index))
    if model in OWN:
        raise UserError(
            f"The embedded model is missing from {path}, so this is not a whole installation. Install again."
        )

    # One checkpoint file, or several joined: a transformer, an autoencoder and text encoders
    files = [written_path(file) for file in split_files(source)]
    if path.name == "model_index.json" and path.is_file():
        raise UserError(f"{path} is one file of a model. Name its folder: {path.parent}.")
    first = written_path(source.split(JOIN)[0]) if JOIN in source else path
    if first != path and first.is_dir() and not path.exists():
        raise UserError(
            f"{first} is a whole model, whose other components lie in it: --vae and --text-encoder have no effect. "
            "Leave them out."
        )
    if path.is_file() or len(files) > 1:
        return _locate_files(model, [Path(os.path.abspath(file)) for file in files])
    if path.suffix.lower() in WEIGHTS:
        raise UserError(f"There is no file {path}. Check the spelling, and the folder that it is named from.")

    # A hub id, or nothing at all
    is_id = source.count("/") == 1 and not source.startswith((".", "/", "~")) and not path.parent.exists()
    if source != model or is_id:
        index = hub_file(source, "model_index.json")
        # The cache keeps each commit in a folder of that name: all other files come from the same one.
        return Location(model, source, read_index(index), revision=index.parent.name)
    renamed = (
        " Where a run's model lies now is said by --model FOLDER, beside RUN, --resume RUN or --concept RUN."
    )
    near = nearest_name(model)
    suggestion = f" Did you mean {near}?" if near else ""
    raise UserError(
        f"There is no model {model}.{suggestion} Name one of {', '.join(known_names())}, a diffusers folder, "
        f"a checkpoint file, or a hub id.{renamed if path.is_absolute() else ''}"
    )


def _suggest_near(folder: Path) -> str:
    """Suggest a model for a folder that is none: the one around it, those inside it, or single files.

    In the hub's cache a model lies two levels below its folder. Raises `UserError` if only files of kinds that are not
    read lie in it.
    """
    if (folder.parent / "model_index.json").is_file():
        return f"It is a component of one: name {folder.parent}."
    folders = sorted(
        str(file.parent) for level in ("*", "*/*") for file in folder.glob(f"{level}/model_index.json")
    )
    files = (
        sorted(map(str, folder.glob("[!.]*.safetensors"))) if not (folder / "config.json").exists() else []
    )
    if matches := folders or files:
        remainder = f" and {len(matches) - 3} more" if len(matches) > 3 else ""
        return f"Name what lies in it: {', '.join(matches[:3])}{remainder}."
    for path in sorted(folder.glob("[!.]*")):
        if reason := explain_unread_format(path):
            raise UserError(reason)
    return "Name the folder that `save_pretrained` wrote."


def _list_sources(index: Path) -> str:
    """The models from which a modular pipeline takes its components, to end a sentence; "" where none are named."""
    specs = [value[-1] for value in read_json(index).values() if isinstance(value, list) and value]
    sources = [spec.get("pretrained_model_name_or_path") for spec in specs if isinstance(spec, dict)]
    models = dict.fromkeys(name for name in sources if isinstance(name, str))
    return f": {' or '.join(models)}" if models else ""


def _locate_with_adapter(name: str, folder: Path) -> Location:
    """The location of a few-step adapter and its base: the folder's files take precedence over the base's."""
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
    """Whether `locate` would read this as a local folder or file rather than as a name or a hub id."""
    return resolve_model_name(model) == model and all(
        written_path(file).exists() for file in split_files(model)
    )


def make_model_absolute(model: str) -> str:
    """A model's name as a run stores it: with absolute paths, so that it is found from any folder."""
    if not is_path(model):
        return model
    return join_files(*(os.path.abspath(written_path(file)) for file in split_files(model)))


def read_index(path: Path) -> dict[str, Any]:
    """Read a `model_index.json`: the text-to-image pipeline's class, and each component's library and class."""
    index = read_json(path)
    kind = read_as(str, index.get("_class_name", ""), path, "_class_name")
    if match := SAME_PARTS.fullmatch(kind):
        index["_class_name"] = f"{match[1] or 'StableDiffusion'}Pipeline"
    for part in PARTS:
        if index.get(part) is not None:
            read_as(tuple[str | None, str | None], index[part], path, part)
    return index


def resolve_model_name(model: str) -> str:
    """The folder or hub id of a short name; anything else is returned as it is.

    Families are imported only where a short name is possible: not for the embedded models, nor for paths.
    """
    if model in OWN:
        return str(OWN[model])
    return model if "/" in model else known_names().get(model, model)


def known_names() -> dict[str, str]:
    """Short names and their folders or hub ids."""
    published = {name: source for family in families() for name, source in family.hub_ids.items()}
    return {**{name: str(folder) for name, folder in OWN.items()}, **published}


def nearest_name(model: str) -> str:
    """The short name nearest to another spelling of it or of its published name (SDXL, flux.1-dev); "" if none is near.

    For paths it is "".
    """
    if "/" in model:
        return ""
    candidates = known_names()
    spelled = {
        _squeeze(source.rpartition("/")[2]): name for name, source in candidates.items() if name not in OWN
    }
    spelled |= {_squeeze(name): name for name in candidates}
    near = difflib.get_close_matches(_squeeze(model), spelled, 1, cutoff=0.8)
    return spelled[near[0]] if near else ""


def _squeeze(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def join_files(*files: str) -> str:
    """The name of a model in several files (transformer, autoencoder, text encoder), as `locate` reads it."""
    return JOIN.join(filter(None, files))


def split_files(model: str) -> list[str]:
    """The files joined in a model's name; the name alone where it is one file or folder, or joins none."""
    files = model.split(JOIN)
    joined = len(files) > 1 and all(Path(file).suffix.lower() in WEIGHTS for file in files)
    return files if joined and not written_path(model).exists() else [model]


def _read_index_near(settings: Sequence[Path]) -> dict[str, Any]:
    """Entries of a model_index.json beside a file that neither weights nor configs hold."""
    path = next(
        (folder / "model_index.json" for folder in settings if (folder / "model_index.json").exists()), None
    )
    index = read_index(path) if path else {}
    return {key: index[key] for key in ("is_distilled", "text_encoder_select_layers") if key in index}


def _locate_files(name: str, paths: Sequence[Path]) -> Location:
    """Locate a model of one file, or of a transformer's file and those of its other components, in any order."""
    for path in paths:
        if not path.is_file():
            raise UserError(
                f"There is no file {path}. Check the spelling, and the folder that it is named from."
            )
        refuse_shard(path)
    headers = [read_header(path) for path in paths]
    for header in headers:
        for family in families():
            settings = family.match_checkpoint(header)
            if settings is not None:
                for part_header in headers:
                    refuse_other_numbers(part_header)
                parts = family.find_parts(header, [other for other in headers if other is not header])
                index = {**_read_index_near(settings), "_class_name": family.pipeline_classes[0]}
                return Location(name, str(header.path), index, settings, parts=parts)
    served = ", ".join(family.name for family in families())
    raise UserError(f"{single_file.describe_unknown_file(headers[0])} This version works with {served}.")
