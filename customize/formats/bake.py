"""Bake adapters, fine-tuned weights and learned embeddings into a model: a diffusers folder that any tool loads.

customize merge A:0.8 B:0.5 --bake --model MODEL --out FOLDER
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from backbone.adapters.embeddings import split_by_encoder, vector_token_names
from backbone.io.console import UserError, progress
from backbone.io.files import (
    PICKLE_SUFFIXES,
    fill_folder,
    read_header,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from backbone.io.weights import list_weight_files
from backbone.models.locate import locate
from customize.formats.layer_names import split_component
from customize.formats.merge import MergeInput
from customize.formats.model_weights import (
    WEIGHT_SUFFIX,
    ModelWeights,
    canonical_name,
    refuse_mismatch,
)

TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKEN_EMBEDDING = "embeddings.token_embedding.weight"


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
    weights = ModelWeights(location)
    for part in parts:
        shapes = {name: layer.shape for name, layer in part.adapter.layers.items()}
        refuse_mismatch(shapes, weights, str(part.source))
        for name, value in part.weight_deltas.items():
            if weights.shapes.get(name) != tuple(value.shape):
                raise UserError(
                    f"{part.source} was trained on another model than {model}. Give the --model of the run."
                )
    rows = collect_embeddings(parts)
    with fill_folder(out) as unfinished:
        changed = _copy_merged(folder, unfinished, parts)
        for component, learned in rows.items():
            add_tokens(unfinished, component, learned)
    return changed + len(rows)


def _copy_merged(folder: Path, out: Path, parts: Sequence[MergeInput]) -> int:
    """Copy a model's files, merging the tensors that `parts` change; returns how many those are."""
    names = {name + WEIGHT_SUFFIX for part in parts for name in part.adapter.layers}
    names |= {name for part in parts for name in part.weight_deltas}
    touched = {split_component(name)[0] for name in names}
    changed: set[str] = set()
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [
        path for path in files if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    with progress(len(files), "baking") as bar:
        for path in files:
            relative = path.relative_to(folder)
            component, destination = relative.parts[0], out / relative
            destination.parent.mkdir(parents=True, exist_ok=True)
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
            merged += part.strength * part.weight_deltas[name].float()
    return merged.to(weight.dtype)


def collect_embeddings(parts: Sequence[MergeInput]) -> dict[str, dict[str, Tensor]]:
    """Text encoder → token → embedding vectors [W, D] of all runs; `UserError` where two runs share a token."""
    embeddings: dict[str, dict[str, Tensor]] = {}
    for part in parts:
        if not part.words:
            continue
        assert part.concept is not None
        for token, words in part.concept.tokens.items():
            if words.split()[:1] != [token]:  # existing rare words, which are no embeddings of ours
                continue
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

    Raises `UserError` where the tokenizer has one of them already, or the widths differ.
    """
    from tokenizers import AddedToken
    from transformers import CLIPTokenizer

    tokenizer_folder = folder / TOKENIZERS[component]
    tokenizer = CLIPTokenizer.from_pretrained(str(tokenizer_folder), local_files_only=True)
    names = [word for token, rows in learned.items() for word in vector_token_names(token, len(rows))]
    added = tokenizer.add_tokens([AddedToken(word, normalized=False) for word in names])
    path = next(
        path
        for path in list_weight_files(folder / component)
        if TOKEN_EMBEDDING in _list_canonical_names(component, path)
    )
    tensors, metadata = read_tensors(path)
    key = next(
        name for name in tensors if canonical_name(component, name) == f"{component}.{TOKEN_EMBEDDING}"
    )
    table, rows = tensors[key], torch.cat(list(learned.values()))
    if added != len(names):
        raise UserError(
            f"The tokenizer in {tokenizer_folder} knows one of the words {', '.join(names)} already. "
            "Choose another model."
        )
    if rows.shape[1] != table.shape[1]:
        raise UserError(
            f"The words are {rows.shape[1]} numbers wide, those of this model {table.shape[1]}. Choose another model."
        )
    # The new ids follow one another; rows behind them (padding of the table) stay.
    first = tokenizer.convert_tokens_to_ids(names[0])
    tensors[key] = torch.cat([table[:first], rows.to(table.dtype), table[first + len(names) :]])
    write_tensors(path, tensors, metadata)
    config = read_json(folder / component / "config.json")
    write_json(folder / component / "config.json", {**config, "vocab_size": len(tensors[key])})
    tokenizer.save_pretrained(tokenizer_folder)


def _list_canonical_names(component: str, path: Path) -> set[str]:
    """Names of a file's tensors below the component, as `canonical_name` gives them."""
    return {canonical_name(component, name).partition(".")[2] for name in read_header(path).shapes}
