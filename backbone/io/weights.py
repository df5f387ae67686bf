"""Which weight files a loader may open: complete safetensors files of its own folder, and nothing else.

Loaders of diffusers and transformers follow files in the folder: an index that names shards, an adapter's settings
that name another model. A folder may come from anyone, so all of these are checked here first.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from backbone.io.console import UserError, format_count, is_out_of_memory, notify_once
from backbone.io.files import WRAPPERS, Header, content_hash, read_header, read_json
from backbone.io.written import describe_link

INDEX = ".safetensors.index.json"
SAMPLE = 1 << 12  # bytes read at the beginning, the middle and the end of every tensor
STEMS = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names of a component's weights
VARIANTS = ("fp32", "bf16", "fp16")  # diffusers' names of a component's weights in a precision
LOADERS = (  # loggers whose reports are tables of all keys; the second speaks where the first has a level of its own
    "transformers.modeling_utils", "transformers.distributed.tensor_parallel", "diffusers.models.modeling_utils",
)  # fmt: skip
NUMBERED = re.compile(r"-\d+-of-(?P<all>\d+)\.safetensors$")
SHARD = re.compile(r"[\w][\w.+-]*\.safetensors")
REDIRECTIONS = ("adapter_config.json",)  # transformers would load the model that it names
REDIRECTING = ("transformers_weights", "auto_map")  # settings that name a file or a module
# Tensors beside quantised weights, which loaders of folders ignore
QUANTIZED = re.compile(
    r"(?:^|\.)(?:scale_weight|weight_scale\w*|scaled_fp8|comfy_quant|absmax|nested_absmax|quant_map)$|\.quant_state\."
    r"|\.(?:qweight|qzeros|wscales)$"
)


@dataclass(frozen=True)
class WeightIndex:
    """An index of shards: the file of each tensor."""

    weight_map: dict[str, str]


def read_weight_index(path: Path) -> dict[str, str]:
    """The shard of each tensor, by name; `UserError` for a shard that is not a safetensors file beside the index."""
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
    """The only precision in the names of a component's weights, as in `model.fp16.safetensors`.

    None for several, and if there are weights under the usual name, which are loaded then.
    """
    stem = _find_stem(folder)
    if _has_usual_name(folder, stem):
        return None
    variants = [
        name
        for name in VARIANTS
        if any((folder / f"{stem}{end}").is_file() for end in (f".{name}.safetensors", _name_index(name)))
    ]
    return variants[0] if len(variants) == 1 else None


def _has_usual_name(folder: Path, stem: str) -> bool:
    """Whether weights, in one file or in shards, exist under the name without a precision."""
    return any((folder / f"{stem}{end}").exists() for end in (".safetensors", INDEX))


def _name_index(variant: str) -> str:
    """The name of a variant's index of shards, without the stem."""
    return INDEX.replace(".json", f".{variant}.json")


def _list_indices(folder: Path) -> list[Path]:
    """The indices of shards in a component's folder that a loader would follow, the plainest name first."""
    variant = find_variant(folder)
    ending = INDEX if variant is None else _name_index(variant)
    return sorted(folder.glob(f"[!.]*{ending}"), key=lambda path: len(path.name))


def _find_stem(folder: Path) -> str:
    """The stem of a component's weight files: diffusers' or transformers'."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    return STEMS[0] if "_class_name" in config else STEMS[1]


def check_weights(folder: Path) -> None:
    """Raise `UserError` unless a loader of this folder opens only complete safetensors files in it."""
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
                if (other_shard := stored.setdefault(name, shard)) != shard:
                    raise UserError(
                        f"{folder} holds {name} twice, in {other_shard} and in {shard}. Download the model again."
                    )
    refuse_two_sets(folder)
    _refuse_other_names(folder)
    for path in sorted(folder.glob("[!.]*.safetensors")):
        read_weights_header(path)


def _refuse_missing_shards(index: Path, shards: Sequence[str]) -> None:
    """Raise `UserError` for shards that an index names and that are missing."""
    missing = [name for name in shards if not (index.parent / name).is_file()]
    if missing:
        named_files = missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more"
        raise UserError(
            f"{index.parent} lacks {named_files} of the {format_count(len(shards), 'file')} that {index.name} names. "
            f"Download {'that' if len(missing) == 1 else 'those'} too."
        )


def refuse_shard(path: Path) -> None:
    """Raise `UserError` for one of several shards, or their index, in place of a file with all weights."""
    numbered = NUMBERED.search(path.name)
    if path.name.endswith(INDEX):
        description = "lists the files of one part of a model"
    elif numbered and int(numbered["all"]) > 1:
        description = f"is one of {int(numbered['all'])} files of one part of a model"
    else:
        return
    folder = path.absolute().parent.parent
    remedy = (
        f"Name the model's folder: {folder}"
        if (folder / "model_index.json").is_file()
        else ("Name the model's diffusers folder, in which these parts lie, or its hub id")
    )
    raise UserError(f"{path} {description}. {remedy}.")


def refuse_two_sets(folder: Path) -> None:
    """Raise `UserError` for a file of all weights beside shards: loaders differ in which they take."""
    for index in folder.glob(f"[!.]*{INDEX}"):
        single_file = folder / f"{index.name.removesuffix(INDEX)}.safetensors"
        if single_file.exists():
            raise UserError(
                f"{folder} holds its weights twice, whole ({single_file.name}) and in shards ({index.name}). Remove "
                "the one or the other."
            )


def _refuse_other_names(folder: Path) -> None:
    """Raise `UserError` if there are no safetensors weights, or only under names that loaders do not know."""
    stem = _find_stem(folder)
    if _has_usual_name(folder, stem) or find_variant(folder):
        return
    dead_link = next((path for path in sorted(folder.glob("[!.]*.safetensors")) if not path.exists()), None)
    if dead_link is not None:  # as in a hub's cache whose files were removed
        raise UserError(f"{dead_link} {describe_link(dead_link)}. Download the model again.")
    files = sorted(path.name for path in folder.glob("[!.]*.safetensors"))
    if not files:
        raise UserError(f"{folder} holds no safetensors weights. Take the model's safetensors version.")
    indices = sorted(path.name for path in folder.glob(f"{stem}*.index*.json"))
    if indices:
        remedy = f"Rename {indices[0]} to {stem}{INDEX}"
    elif NUMBERED.search(files[0]):
        raise UserError(f"{folder} holds shards, as {files[0]}, without {stem}{INDEX}. Download that too.")
    else:
        remedy = f"Rename it to {stem}.safetensors"
    raise UserError(
        f"{folder} holds another variant of its weights alone ({files[0]}). {remedy}, or download the usual variant."
    )


def read_weights_header(path: Path) -> Header:
    """The header of a network's file; `UserError` for weights that are not plain floating-point numbers.

    Refused are other types, and weights with scales beside them.
    """
    header = read_header(path)
    refuse_other_numbers(header)
    refuse_scaled(header.shapes, str(path))
    return header


def refuse_scaled(names: Iterable[str], source: str) -> None:
    """Raise `UserError` for quantised weights, by the names of the tensors beside them, which loaders ignore."""
    if (mark := next(filter(QUANTIZED.search, names), None)) is not None:
        raise UserError(
            f"{source} is quantised: it has {mark} beside its weights, which is not read here. Take its version in "
            "fp16, bf16 or fp32."
        )


def refuse_other_numbers(header: Header) -> None:
    """Raise `UserError` for weights of integer, complex or boolean types, which loaders would use as they are."""
    for name, dtype in header.dtypes.items():
        if name.endswith((".weight", ".bias")) and not dtype.startswith(("F", "BF")):
            raise UserError(
                f"{header.path} is quantised, or holds no floating-point weights: {name} has the type {dtype}. "
                "Take its version in fp16, bf16 or fp32."
            )


@contextmanager
def refuse_damaged(name: str, part: str) -> Iterator[None]:
    """Inside the `with`, a library's error on a damaged component becomes a `UserError`; lack of memory does not."""
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


def check_tokenizer(tokenizer: Any, name: str) -> None:
    """Raise `UserError` for a tokenizer with which no prompt can be read; `name` begins the message.

    Its length may hold no word, or be no number; its special tokens may be missing from its vocabulary; or all of this
    may be missing: transformers makes such a tokenizer of a folder without its files, and every word is the unknown
    token, or none.
    """
    length, remedy = tokenizer.model_max_length, "or download the model again."
    if not isinstance(length, int) or length < 3:
        raise UserError(
            f"{name} says model_max_length {length}, which holds no prompt. Restore its tokenizer_config.json, {remedy}"
        )
    pieces = tokenizer("the quick brown fox jumps over a lazy dog", add_special_tokens=False)["input_ids"]
    try:
        special = set(tokenizer.all_special_ids)
    except RecursionError:  # it looks up its unknown token, which is unknown
        raise UserError(
            f"{name} has special tokens that its vocabulary lacks. Restore it, {remedy}"
        ) from None
    if len(set(pieces) - special) < 2:
        raise UserError(
            f"{name} knows no words: its vocabulary (tokenizer.json, or the files that stand for it) is missing. "
            f"Restore it, {remedy}"
        )


@contextmanager
def silence_warnings(*names: str) -> Iterator[None]:
    """Raise the level of these loggers to ERROR inside the body."""
    levels = {name: logging.getLogger(name).level for name in names}
    try:
        for name in names:
            logging.getLogger(name).setLevel(logging.ERROR)
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def load_whole(load: Callable[[], tuple[Any, Mapping[str, Any]]], name: str, part: str) -> Any:
    """The network that `load` returns, together with the library's loading info, if its files hold all of its weights.

    `load` calls diffusers' or transformers' `from_pretrained(…, output_loading_info=True)`. `name` and `part` are those
    of the component in messages. Raises `UserError` as `refuse_damaged` and `require_whole` do.
    """
    with refuse_damaged(name, part), silence_warnings(*LOADERS):
        network, loading_info = load()
    return require_whole(network, loading_info, name, part)


def require_whole(network: Any, loading_info: Mapping[str, Any], name: str, part: str) -> Any:
    """The network; `UserError` if weights were missing in its files, so that they are random, or were quantised.

    Prints which tensors of the files it has no use for.
    """
    unexpected = sorted(map(str, loading_info.get("unexpected_keys", ())))
    refuse_scaled(unexpected, f"The {part} of {name}")
    wrapped = filter(None, map(WRAPPERS.search, unexpected))
    if mark := next((match[0] for match in wrapped), ""):
        tool, remedy = ("torch.compile", ", network._orig_mod") if "_orig" in mark else ("its training", "")
        raise UserError(
            f"The {part} of {name} was saved as {tool} wraps it ({mark} in its names). Save the network "
            f"itself{remedy}."
        )
    if any(".base_layer." in key for key in unexpected):
        raise UserError(
            f"The {part} of {name} was saved with an adapter on it (base_layer in its names). Merge the adapter there "
            "(fuse_lora and unload_lora_weights, or peft's merge_and_unload), and save it again."
        )
    missing = sorted(
        {str(key) for key in (*loading_info["missing_keys"], *loading_info.get("mismatched_keys", ()))}
    )
    if missing:
        raise UserError(
            f"The {part} of {name} is not whole: {len(missing)} of its weights are missing or have another shape "
            f"({missing[0]} …). Download the model again."
        )
    if unexpected:
        notify_once(
            f"The {part} of {name} holds {format_count(len(unexpected), 'tensor')} that its config.json has no use "
            f"for, as {unexpected[0]}. It is loaded without."
        )
    return network


def hash_weights(files: Iterable[Path]) -> str:
    """A hash of the names, types, shapes and samples of all tensors in safetensors files, the same for one or many.

    Raises as `read_header` does.
    """
    entries = []
    for path in files:
        read_header(path)  # refuses damaged files
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            for name, entry in header.items():
                begin, end = entry["data_offsets"]
                samples = b""
                for offset in sorted(
                    {begin, max(begin, (begin + end - SAMPLE) // 2), max(begin, end - SAMPLE)}
                ):
                    file.seek(8 + length + offset)
                    samples += file.read(min(SAMPLE, end - offset))
                entries.append(f"{name}:{entry['dtype']}:{entry['shape']}:{content_hash(samples)}")
    return content_hash("\n".join(sorted(entries)).encode())
