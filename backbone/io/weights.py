"""Which weight files a loader may open: whole safetensors files of its own folder, and nothing else.

Loaders of diffusers and transformers follow what lies in the folder: an index that names shards, an adapter's settings
that name another model. A folder may come from anybody, so all that is read here first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, count_of, is_out_of_memory
from backbone.io.files import WRAPPERS, Header, read_header, read_json
from backbone.io.written import describe_link

INDEX = ".safetensors.index.json"
STEMS = ("diffusion_pytorch_model", "model")  # by which diffusers and transformers call a component's weights
VARIANTS = ("fp32", "bf16", "fp16")  # diffusers' names of a component's weights in a precision
NUMBERED = re.compile(r"-\d+-of-(?P<all>\d+)\.safetensors$")
SHARD = re.compile(r"[\w][\w.+-]*\.safetensors")
REDIRECTIONS = ("adapter_config.json",)  # transformers would load the model and the adapter that it names
REDIRECTING = ("transformers_weights", "auto_map")  # settings that name a file or a module
# What lies beside weights that were quantised, which loaders of folders leave out
QUANTIZED = re.compile(
    r"(?:^|\.)(?:scale_weight|weight_scale\w*|scaled_fp8|comfy_quant|absmax|nested_absmax|quant_map)$|\.quant_state\."
    r"|\.(?:qweight|qzeros|wscales)$"
)


@dataclass(frozen=True)
class WeightIndex:
    """An index of shards: the file of each tensor."""

    weight_map: dict[str, str]


def read_weight_index(path: Path) -> dict[str, str]:
    """The shard of each tensor, by name; `UserError` for one that is no safetensors file beside the index."""
    shards = read_json(path, WeightIndex).weight_map
    for name in shards.values():
        if not SHARD.fullmatch(name):
            raise UserError(
                f"{path} names {name[:80]!r}, and only .safetensors files beside it are read. Take the model's "
                "safetensors version."
            )
    if not shards:
        raise UserError(f"{path} is damaged: it names no tensors. Download the model again.")
    return shards


def list_weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a component's folder: those of its index, or the one with the plainest name."""
    if not folder.is_dir():
        return []
    refuse_two_sets(folder)
    for index in _list_indices(folder):
        shards = sorted(set(read_weight_index(index).values()))
        _refuse_missing_shards(index, shards)
        return [folder / name for name in shards]
    files = sorted(folder.glob("[!.]*.safetensors"), key=lambda path: (path.name.count("."), path.name))
    return files[:1]


def find_variant(folder: Path) -> str | None:
    """The precision in the names of a component's weights, as in `model.fp16.safetensors`, where it is the only one.

    None where they are there under the usual name too, which is what is loaded then.
    """
    stem = _stem_of(folder)
    if _has_usual_name(folder, stem):
        return None
    found = [
        name
        for name in VARIANTS
        if any((folder / f"{stem}{end}").is_file() for end in (f".{name}.safetensors", _index_of(name)))
    ]
    return found[0] if len(found) == 1 else None


def _has_usual_name(folder: Path, stem: str) -> bool:
    """Whether the weights are there, whole or in shards, under the name that does not say their precision."""
    return any((folder / f"{stem}{end}").exists() for end in (".safetensors", INDEX))


def _index_of(variant: str) -> str:
    """How the index of shards in a precision ends, behind the stem."""
    return INDEX.replace(".json", f".{variant}.json")


def _list_indices(folder: Path) -> list[Path]:
    """The indices of shards in a component's folder that a loader would follow, the plainest name first."""
    variant = find_variant(folder)
    ending = INDEX if variant is None else _index_of(variant)
    return sorted(folder.glob(f"[!.]*{ending}"), key=lambda path: len(path.name))


def _stem_of(folder: Path) -> str:
    """By which name the weights of a component's folder are looked for: diffusers' or transformers'."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return STEMS[0] if "_class_name" in config else STEMS[1]


def check_weights(folder: Path) -> None:
    """Raise `UserError` unless a loader that is given this folder opens whole safetensors files of it alone."""
    for name in REDIRECTIONS:
        if (folder / name).exists():
            raise UserError(
                f"{folder / name} would load weights from elsewhere. Remove it, or name a folder with the model's own."
            )
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in REDIRECTING:
        if config.get(key):
            raise UserError(
                f"{folder / 'config.json'} names other files with {key}, which are not read. Remove that key."
            )
    for index in _list_indices(folder):
        stored: dict[str, str] = {}
        shards = sorted(set(read_weight_index(index).values()))
        _refuse_missing_shards(index, shards)
        for shard in shards:
            for name in read_weights_header(folder / shard).shapes:
                if (other := stored.setdefault(name, shard)) != shard:
                    raise UserError(
                        f"{folder} holds {name} twice, in {other} and in {shard}. Download the model again."
                    )
    refuse_two_sets(folder)
    _refuse_other_names(folder)
    for path in sorted(folder.glob("[!.]*.safetensors")):
        read_weights_header(path)


def _refuse_missing_shards(index: Path, shards: Sequence[str]) -> None:
    """`UserError` for shards that an index names and that do not lie beside it."""
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        these = missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more"
        raise UserError(
            f"{index.parent} lacks {these} of the {count_of(len(shards), 'file')} that {index.name} names. Download "
            f"{'that' if len(missing) == 1 else 'those'} too."
        )


def refuse_shard(path: Path) -> None:
    """`UserError` for one of several shards, or their index, in the place of a file that is a whole network's."""
    numbered = NUMBERED.search(path.name)
    if path.name.endswith(INDEX):
        what = "lists the files of one part of a model"
    elif numbered and int(numbered["all"]) > 1:
        what = f"is one of {int(numbered['all'])} files of one part of a model"
    else:
        return
    folder = path.absolute().parent.parent
    named = (
        f"Name the model's folder: {folder}"
        if (folder / "model_index.json").is_file()
        else ("Name the model's diffusers folder, in which these parts lie, or its hub id")
    )
    raise UserError(f"{path} {what}. {named}.")


def refuse_two_sets(folder: Path) -> None:
    """`UserError` for a file of all weights beside shards of them: some loaders take the one, some the others."""
    for index in folder.glob(f"[!.]*{INDEX}"):
        whole = folder / f"{index.name.removesuffix(INDEX)}.safetensors"
        if whole.exists():
            raise UserError(
                f"{folder} holds its weights twice, whole ({whole.name}) and in shards ({index.name}). Remove the one "
                "or the other."
            )


def _refuse_other_names(folder: Path) -> None:
    """`UserError` where the weights are no safetensors, or under names that are not looked for."""
    stem = _stem_of(folder)
    if _has_usual_name(folder, stem) or find_variant(folder):
        return
    lost = next((path for path in sorted(folder.glob("[!.]*.safetensors")) if not path.exists()), None)
    if lost is not None:  # as in a hub's cache of which files were removed
        raise UserError(f"{lost} {describe_link(lost)}. Download the model again.")
    found = sorted(path.name for path in folder.glob("[!.]*.safetensors"))
    if not found:
        raise UserError(f"{folder} holds no safetensors weights. Take the model's safetensors version.")
    indices = sorted(path.name for path in folder.glob(f"{stem}*.index*.json"))
    if indices:
        remedy = f"Rename {indices[0]} to {stem}{INDEX}"
    elif NUMBERED.search(found[0]):
        raise UserError(f"{folder} holds shards, as {found[0]}, without {stem}{INDEX}. Download that too.")
    else:
        remedy = f"Rename it to {stem}.safetensors"
    raise UserError(
        f"{folder} holds another variant of its weights alone ({found[0]}). {remedy}, or download the usual variant."
    )


def read_weights_header(path: Path) -> Header:
    """The header of a network's file; `UserError` for one whose weights are not the numbers that are stored.

    So are those of other kinds than floating-point numbers, and those with scales beside them.
    """
    header = read_header(path)
    refuse_other_numbers(header)
    refuse_scaled(header.shapes, str(path))
    return header


def refuse_scaled(names: Iterable[str], where: str) -> None:
    """`UserError` for weights that were quantised, told by names of what lies beside them: loaders leave that out."""
    if (mark := next(filter(QUANTIZED.search, names), None)) is not None:
        raise UserError(
            f"{where} is quantised: it has {mark} beside its weights, which is not read here. Take its version in "
            "fp16, bf16 or fp32."
        )


def refuse_other_numbers(header: Header) -> None:
    """`UserError` for weights of whole, complex or boolean numbers: loaders take them for what they say."""
    for name, kind in header.kinds.items():
        if name.endswith((".weight", ".bias")) and not kind.startswith(("F", "BF")):
            raise UserError(
                f"{header.path} is quantised, or holds no floating-point weights: {name} has the type {kind}. "
                "Take its version in fp16, bf16 or fp32."
            )


@contextmanager
def refuse_damaged(name: str, part: str) -> Iterator[None]:
    """Turn what a library raises on a damaged component into a `UserError`; running out of memory stays what it is."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise UserError(
            f"The {part} of {name} could not be loaded ({reason}). Restore it, or download the model again."
        ) from error


def refuse_wordless(tokenizer: Any, whose: str) -> None:
    """`UserError` for a tokenizer without a vocabulary, which transformers makes of a folder that lacks its files.

    Every word would be the unknown one, or none. `whose` begins the sentence.
    """
    pieces = tokenizer("the quick brown fox jumps over a lazy dog", add_special_tokens=False)["input_ids"]
    if len(set(pieces) - set(tokenizer.all_special_ids)) < 2:
        raise UserError(
            f"{whose} knows no words: its vocabulary (tokenizer.json, or the files that stand for it) is missing. "
            "Restore it, or download the model again."
        )


def refuse_missing(network: Any, found: Mapping[str, Any], name: str, part: str) -> Any:
    """The network, unless some of its weights were not in its files, and are random, or were quantised there."""
    refuse_scaled(map(str, found.get("unexpected_keys", ())), f"The {part} of {name}")
    wrapped = filter(None, (WRAPPERS.search(str(key)) for key in found.get("unexpected_keys", ())))
    if mark := next((match[0] for match in wrapped), ""):
        tool, remedy = ("torch.compile", ", network._orig_mod") if "_orig" in mark else ("its training", "")
        raise UserError(
            f"The {part} of {name} was saved as {tool} wraps it ({mark} in its names). Save the network "
            f"itself{remedy}."
        )
    if any(".base_layer." in str(key) for key in found.get("unexpected_keys", ())):
        raise UserError(
            f"The {part} of {name} was saved with an adapter on it (base_layer in its names). Merge the adapter there "
            "(fuse_lora and unload_lora_weights, or peft's merge_and_unload), and save it again."
        )
    missing = sorted({str(key) for key in (*found["missing_keys"], *found.get("mismatched_keys", ()))})
    if missing:
        raise UserError(
            f"The {part} of {name} is not whole: {len(missing)} of its weights are missing or have another shape "
            f"({missing[0]} …). Download the model again."
        )
    return network
