"""Bake adapters, fine-tuned weights and learned embeddings into a model: a diffusers folder that any tool loads.

customize merge A:0.8 B:0.5 --bake --model MODEL --out FOLDER
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.adapters.embeddings import name_vector_tokens, spaces_are_letters, split_by_encoder
from backbone.io.console import UserError
from backbone.io.files import (
    PICKLE_SUFFIXES,
    list_files,
    raise_os_errors,
    read_header,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from backbone.io.progress import progress
from backbone.io.weights import list_weight_files
from backbone.models.locate import locate
from customize.formats.layers.names import split_component
from customize.formats.merging.merge import MergeInput
from customize.formats.model_weights import (
    WEIGHT_SUFFIX,
    ModelWeights,
    canonical_name,
    refuse_mismatch,
)
from customize.formats.write import check_folder, fill_output

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
INPUT = "unet.conv_in.weight"
EDITORS = {  # class of pipeline → its editing counterpart, whose UNet reads an image's latents too
    "StableDiffusionPipeline": "StableDiffusionInstructPix2PixPipeline",
    "StableDiffusionXLPipeline": "StableDiffusionXLInstructPix2PixPipeline",
}
TOKEN_EMBEDDING = re.compile(r"(^|\.)(token_embedding|shared|embed_tokens)\.weight$")  # of CLIP, T5, Qwen
READ_TOKENIZERS = ("CLIPTokenizer", "T5Tokenizer", "Qwen2Tokenizer")


def bake(parts: Sequence[MergeInput], model: str, out: Path) -> int:
    """Write a copy of `model`'s diffusers folder with all updates merged; returns the number of changed tensors.

    W + Σ strength·(W' − W) is exact for LoRA, LoHa, LoKr, DoRA and fine-tuned weights; tensors keep their dtype.
    Learned embeddings get rows in the token-embedding table and tokens in the tokenizer.
    Raises `UserError`, before anything is written, for a model that is no folder or does not fit.
    """
    location = locate(model)
    folder = location.folder
    if folder is None:
        raise UserError(f"{model} is not a diffusers folder on this machine. Save it as one to bake into it.")
    check_folder(out, [folder, *(part.source for part in parts)])
    weights = ModelWeights(location)
    for part in parts:
        shapes = {name: layer.shape for name, layer in part.adapter.layers.items()}
        refuse_mismatch(shapes, weights.shapes, str(part.source), model)
        _refuse_other_scales(part, weights.shapes)
        for name, value in part.weight_deltas.items():
            if not _fits(weights.shapes.get(name), name, value):
                raise UserError(
                    f"{part.source} was trained on another model than {model}. Give the --model of the run."
                )
    rows = collect_embeddings(parts)
    with fill_output(out) as unfinished:
        changed = _copy_merged(folder, unfinished, parts)
        if any(_is_wider(weights.shapes[INPUT], part.weight_deltas) for part in parts if part.weight_deltas):
            name_editor(unfinished)
        for component, learned in rows.items():
            add_tokens(unfinished, component, learned)
    return changed + len(rows)


def _refuse_other_scales(part: MergeInput, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """`UserError` for DoRA scales over the inputs that are not one for each input of the model's own layer.

    Reading alone cannot tell the number of a kernel's inputs from how many numbers a row of it has.
    """
    for name, layer in part.adapter.layers.items():
        inputs = shapes[name + WEIGHT_SUFFIX][1]
        if layer.magnitude is not None and layer.magnitude.ndim == 2 and layer.magnitude.numel() != inputs:
            raise UserError(
                f"The DoRA scales of {name} in {part.source} are {list(layer.magnitude.shape)} for a layer of {inputs} "
                "inputs. Export the file again."
            )


def _is_wider(shape: Sequence[int], deltas: Mapping[str, Tensor]) -> bool:
    """Whether changes are of a UNet that was given input channels for an image's latents."""
    return INPUT in deltas and deltas[INPUT].shape[1] == 2 * shape[1]


def _fits(shape: tuple[int, ...] | None, name: str, delta: Tensor) -> bool:
    """Whether a change is of a tensor of this shape, or of the input that was widened."""
    if shape == tuple(delta.shape):
        return True
    return shape is not None and name == INPUT and (shape[0], 2 * shape[1], *shape[2:]) == tuple(delta.shape)


def name_editor(folder: Path) -> None:
    """Change the configs of a copied model with a widened input to those of an editor by instruction."""
    index, config = read_json(folder / "model_index.json"), read_json(folder / "unet" / "config.json")
    write_json(folder / "model_index.json", {**index, "_class_name": EDITORS[index["_class_name"]]})
    write_json(folder / "unet" / "config.json", {**config, "in_channels": 2 * int(config["in_channels"])})


def _copy_merged(folder: Path, out: Path, parts: Sequence[MergeInput]) -> int:
    """Copy a model's files, merging the tensors that `parts` change; returns how many those are."""
    names = {name + WEIGHT_SUFFIX for part in parts for name in part.adapter.layers}
    names |= {name for part in parts for name in part.weight_deltas}
    touched = {split_component(name)[0] for name in names}
    changed: set[str] = set()
    files = [
        path
        for path in list_files(folder)
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    with progress(len(files), "baking") as bar:
        for path in files:
            relative = path.relative_to(folder)
            component, destination = relative.parts[0], out / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
            # W + Σ strength·ΔW if a part changes W; all other files are copied
            if component in touched and path.suffix == ".safetensors":
                tensors, metadata = read_tensors(path)
                for key in tensors:
                    name = canonical_name(component, key)
                    if name in names:
                        tensors[key] = _merge_tensor(name, tensors[key], parts)
                        changed.add(name)
                write_tensors(destination, tensors, metadata)
            elif not (component in touched and path.suffix in PICKLE_SUFFIXES):  # which hold the old weights
                shutil.copyfile(path, destination)
            bar.advance()
    assert changed == names
    return len(changed)


def _merge_tensor(name: str, weight: Tensor, parts: Sequence[MergeInput]) -> Tensor:
    """One weight with the updates of all parts added, computed in float32, in the weight's dtype."""
    base = weight.float()
    merged = base.clone()
    for part in parts:
        layer = (
            part.adapter.layers.get(name.removesuffix(WEIGHT_SUFFIX))
            if name.endswith(WEIGHT_SUFFIX)
            else None
        )
        if layer is not None:
            merged += layer.merge_into(weight, part.strength) - base
        if name in part.weight_deltas:
            delta = part.weight_deltas[name].float()
            if delta.shape != merged.shape:  # input channels for an image, which begin at zero
                merged = torch.cat([merged, merged.new_zeros(delta[:, merged.shape[1] :].shape)], 1)
            merged += part.strength * delta
    return _cast_to(weight.dtype, name, merged)


def _cast_to(dtype: torch.dtype, name: str, value: Tensor) -> Tensor:
    """A merged tensor in the model's dtype; `UserError` if that holds no such numbers."""
    cast_value = value.to(dtype)
    if bool(torch.isfinite(cast_value).all()):
        return cast_value
    kind = str(dtype).removeprefix("torch.")
    model = ", or bake into a model in fp32" if bool(torch.isfinite(value).all()) else ""
    raise UserError(
        f"Nothing was written: {name} would be larger than numbers of {kind} can be. Lower the strengths, take another "
        f"adapter{model}."
    )


def collect_embeddings(parts: Sequence[MergeInput]) -> dict[str, dict[str, Tensor]]:
    """Text encoder → token → embedding vectors [W, D] of all runs; `UserError` if two runs share a token."""
    embeddings: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        if not part.words:
            continue
        assert part.concept is not None
        for token in part.concept.learned_tokens:
            for component, rows in split_by_encoder(part.words, token).items():
                by_token = embeddings.setdefault(component, {})
                if token in by_token:
                    raise UserError(
                        f"Two of the runs learned a word called {token}. Bake one after the other."
                    )
                by_token[token] = rows.reshape(-1, rows.shape[-1])
    return embeddings


def add_tokens(folder: Path, component: str, learned: Mapping[str, Tensor]) -> None:
    """Add tokens and their embedding vectors [W, D] to a text encoder of a diffusers folder and its tokenizer.

    Raises `UserError` if the tokenizer has one of them already, or the widths differ.
    """
    from tokenizers import AddedToken

    tokenizer_folder = folder / TOKENIZERS[component]
    tokenizer = _load_tokenizer(folder, TOKENIZERS[component])
    names = [word for token, rows in learned.items() for word in name_vector_tokens(token, len(rows))]
    takes_space = spaces_are_letters(tokenizer)
    added = tokenizer.add_tokens([AddedToken(word, normalized=False, lstrip=takes_space) for word in names])
    # The file that holds the embedding table [V, D]
    path, keys = next(
        (path, keys)
        for path in list_weight_files(folder / component)
        if (keys := [name for name in read_header(path).shapes if TOKEN_EMBEDDING.search(name)])
    )
    tensors, metadata = read_tensors(path)
    table, rows = tensors[keys[0]], torch.cat(list(learned.values()))
    if added != len(names):
        raise UserError(
            f"The tokenizer in {tokenizer_folder} knows one of the words {', '.join(names)} already. "
            "Choose another model."
        )
    if rows.shape[1] != table.shape[1]:
        raise UserError(
            f"The words are {rows.shape[1]} numbers wide, those of this model {table.shape[1]}. Choose another model."
        )
    # The new ids are consecutive; rows after them (padding of the table) stay
    first = tokenizer.convert_tokens_to_ids(names[0])
    new = _cast_to(table.dtype, f"the embedding of {names[0]}", rows)
    longer = torch.cat([table[:first], new, table[first + len(names) :]])
    write_tensors(path, tensors | {key: longer.clone() for key in keys}, metadata)
    config = read_json(folder / component / "config.json")
    inner = config.get("text_config", config)  # of a language model that reads pictures too
    inner["vocab_size"] = len(longer)
    write_json(folder / component / "config.json", config)
    with raise_os_errors(tokenizer_folder):
        tokenizer.save_pretrained(tokenizer_folder)


def _load_tokenizer(folder: Path, name: str) -> Any:
    """A tokenizer of a diffusers folder, of the class that its model_index.json says."""
    import transformers

    kind = str(read_json(folder / "model_index.json").get(name, ["", ""])[1]).removesuffix("Fast")
    if kind not in READ_TOKENIZERS:
        raise UserError(
            f"The {name} of {folder} is a {kind or 'tokenizer of unknown kind'}, to which no word is added here. Keep "
            "the run beside the model."
        )
    return getattr(transformers, kind).from_pretrained(str(folder / name), local_files_only=True)
