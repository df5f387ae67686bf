"""Learned words (textual inversion, Gal et al. 2023) in other tools' files: read into a run, and written for a tool.

| written by | keys | encoders |
|---|---|---|
| diffusers, a run of one encoder | the token: `<cat-toy>`, [D] or [W, D] | one; `learned_embeds_2` is the second's |
| A1111, OneTrainer, kohya | `emb_params` [W, D] | one |
| ComfyUI, kohya, OneTrainer, diffusers' advanced scripts | `clip_l`, `clip_g` [W, D] | both CLIPs |
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.adapters.concept import PLACEHOLDER, Concept, check_token, name_call, read_concept
from backbone.adapters.config import check_tensors
from backbone.adapters.embeddings import (
    EMBEDDINGS_FILE,
    add_tokens,
    name_vector_tokens,
    save_embeddings,
    split_by_encoder,
)
from backbone.io.console import UserError, format_count, notify, quote
from backbone.io.files import (
    PICKLE_SUFFIXES,
    read_header,
    read_tensors,
    write_tensors,
)
from backbone.io.run_folder import CONCEPT_FILE as CONCEPT
from backbone.io.run_folder import check_new_file
from backbone.models.model import Backbone
from customize.formats.adapter import FileFormat, in_genitive
from customize.formats.metadata import write_import_record
from customize.formats.write import check_folder, fill_output

Encoders = Mapping[str, Tensor]  # text encoder (a slot's name) → vectors [W, D]
SLOTS = {
    "clip_l": "text_encoder",
    "clip_h": "text_encoder",
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",  # diffusers' advanced scripts at first
    "text_encoders_1": "text_encoder_2",
}
KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
SUFFIXES = ("", ".safetensors", ".sft")  # of files of words
ALONE = ("emb_params", "string_to_param.*")  # of the model's only encoder
OTHERS = ("t5", "t5xxl")  # encoders whose words are not learned here
WIDTHS: dict[tuple[int, ...], str] = {
    (768,): "Stable Diffusion 1.x",
    (1024,): "Stable Diffusion 2.x",
    (768, 1280): "Stable Diffusion XL",
}
NUMBERED = re.compile(r"_[1-9]\d*$")  # of the second vector and those behind it, as diffusers calls them


@dataclass(frozen=True)
class WordFile:
    """A tool's file of one learned word: vectors by encoder, "" if the file names none.

    `token` is the file's own name for it, "" without one.
    """

    vectors: Encoders
    token: str
    metadata: Mapping[str, str]
    file_format: str


def find_word_file(path: Path) -> Path | None:
    """The file of learned words that a path names, which may be the folder of diffusers' script; None for any other."""
    if path.is_dir():
        path = path / EMBEDDINGS_FILE if not (path / CONCEPT).is_file() else path
    if not path.is_file() or path.suffix.lower() not in SUFFIXES:
        return None
    shapes = read_header(path).shapes
    keys = {*SLOTS, *ALONE}
    if keys & set(shapes) or (shapes and all(_is_placeholder(NUMBERED.sub("", name)) for name in shapes)):
        return path
    is_single = len(shapes) == 1 and all(len(shape) in (1, 2) for shape in shapes.values())
    return path if is_single and not any("." in name for name in shapes) else None


def _is_placeholder(name: str) -> bool:
    token, _, slot = name.partition("/")
    return slot in KEYS or PLACEHOLDER.fullmatch(token) is not None


def read_word_file(path: Path) -> WordFile:
    """Read a file of one learned word.

    Raises `UserError` for several words, for vectors of an encoder that learns none here, and for what is no vector.
    """
    tensors, metadata = read_tensors(path)
    check_tensors(path, tensors)
    tensors = _join_numbered(tensors)
    vectors: dict[str, Tensor] = {}
    names: set[str] = set()
    for key, value in tensors.items():
        name, _, slot = key.partition("/")  # a run's own file where the model has several encoders
        if value.ndim not in (1, 2) or (slot and slot not in KEYS):
            raise UserError(f"{path} holds {key} of the shape {list(value.shape)}, which is no learned word.")
        if key in SLOTS or key in ALONE:
            slot = SLOTS.get(key, "")
        elif key in OTHERS or (set(tensors) & {*SLOTS, *ALONE}):
            raise UserError(
                f"{path} holds {key} beside what CLIP reads, and only the CLIPs learn words here. Learn the word "
                "anew without it."
            )
        else:
            names.add(name)
        if slot in vectors and key in {*SLOTS, *ALONE}:
            raise UserError(f"{path} holds vectors of one word twice (also as {key}). Download it again.")
        vectors[slot] = value.reshape(-1, value.shape[-1])
    vectors = dict(sorted(vectors.items()))
    if len(names) > 1:
        listed = ", ".join(sorted(names))
        raise UserError(
            f"{path} holds {len(names)} learned words ({listed}). Save each in a file of its own."
        )
    refuse_unlike_counts(vectors, path)
    token = names.pop() if names else ""
    kind = "diffusers" if token else "A1111" if "" in vectors else "ComfyUI"
    return _add_second_encoder(WordFile(vectors, token if token != "*" else "", metadata, kind), path)


def _join_numbered(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with `<a>`, `<a>_1`, `<a>_2`, the vectors of one word in diffusers, as one tensor [V, width]."""
    joined = dict(tensors)
    for name, first in tensors.items():
        further: list[str] = []
        while f"{name}_{len(further) + 1}" in tensors:
            further.append(f"{name}_{len(further) + 1}")
        rows = [first, *(tensors[key] for key in further)]
        if further and all(row.ndim and row.numel() == first.shape[-1] for row in rows):
            joined[name] = torch.stack([row.flatten() for row in rows])
            for key in further:
                joined.pop(key, None)
    return joined


def refuse_unlike_counts(vectors: Mapping[str, Tensor], path: Path) -> None:
    """`UserError` for one word's vectors [V, width] by encoder, unless each encoder has equally many."""
    if len({len(rows) for rows in vectors.values()}) > 1:
        counts = ", ".join(f"{KEYS[slot]} {len(rows)}" for slot, rows in vectors.items())
        raise UserError(
            f"{path} holds another number of vectors for each encoder ({counts}). Export it again."
        )


def _add_second_encoder(words: WordFile, path: Path) -> WordFile:
    """The word with its second encoder's vectors, which diffusers' script for SDXL writes to another file."""
    second = path.with_name(path.name.replace("learned_embeds", "learned_embeds_2", 1))
    if set(words.vectors) != {""} or second == path or not second.is_file():
        return words
    second_words = read_word_file(second)
    if set(second_words.vectors) != {""}:
        return words
    return replace(
        words, vectors={"text_encoder": words.vectors[""], "text_encoder_2": second_words.vectors[""]}
    )


def import_words(
    file: Path,
    out: Path,
    *,
    model: str | None,
    token: str | None,
    class_noun: str = "",
    words: WordFile | None = None,
) -> str:
    """Write a tool's file of a learned word, which may be read already, to a run folder; returns a sentence to print.

    Raises `UserError`, before anything is written, if the model is unknown or reads other vectors.
    """
    words = words or read_word_file(file)
    if out.suffix.lower() in (".safetensors", *PICKLE_SUFFIXES):
        raise UserError(
            f"{file} holds a learned word. Name a folder with --out, or write it for another tool: customize export "
            f"{quote(file)} --to diffusers --out {quote(out.with_suffix('.safetensors'))}"
        )
    check_folder(out, [file])
    model_name = model or words.metadata.get("base_model")
    if not model_name:
        raise UserError(f"{file} does not say which model it is for. Name it with --model.")
    opened = Backbone.open(model_name, device="cpu", precision="fp32")
    vectors = fit_to_encoders(words, opened, file)
    token = token or words.token or "[V]"
    check_word(token, opened, file)
    names = name_vector_tokens(token, len(next(iter(vectors.values()))))
    if not any(rows.any() for rows in vectors.values()):
        notify(f"{file} holds vectors of zeros alone. Was the word trained?")
    add_tokens(opened.text_encoder, vectors, tokens=names)
    with fill_output(out) as unfinished:
        save_embeddings(
            unfinished / EMBEDDINGS_FILE,
            {token: vectors},
            metadata={"format": "pt", "base_model": model_name},
        )
        concept = Concept(
            kind="textual-inversion",
            model=model_name,
            fingerprint=opened.fingerprint,
            tokens={token: " ".join(names)},
            class_noun=class_noun,
            words=EMBEDDINGS_FILE,
            folder=out,
        )
        counted = format_count(len(names), "learned vector")
        write_import_record(unfinished, concept, file)
    return f"{out}: {counted} for {token}. Next: {name_call(token, class_noun, out)}"


def check_word(token: str, model: Backbone, file: Path) -> None:
    """Raise `UserError` for a name of a file's word that is no token, or an ordinary word of the model."""
    try:
        check_token(token, model.text_encoder.tokenizer.get_vocab())
    except UserError as error:
        raise UserError(
            f"{file} holds a word that is called {token}. {error} Give it with --token."
        ) from error


def fit_to_encoders(words: WordFile, model: Backbone, file: Path) -> dict[str, Tensor]:
    """The vectors by the model's own encoders; `UserError` if these are others, or of another width."""
    slots = {
        slot.name: slot.model.get_input_embeddings().weight.shape[1] for slot in model.text_encoder.slots
    }

    # A file that names no encoder is for a model with one
    vectors = dict(words.vectors)
    if set(vectors) == {""} and len(slots) == 1:
        vectors = {next(iter(slots)): vectors[""]}
    widths = {slot: rows.shape[1] for slot, rows in vectors.items()}
    if widths == slots:
        return vectors
    if widths.items() < slots.items():
        lacking, kind = sorted(set(slots) - set(widths)), WIDTHS.get(tuple(widths.values()))
        raise UserError(
            f"{file} holds vectors for {name_slots(sorted(widths))} alone, and {model.location.name} reads a word with "
            f"{name_slots(lacking)} too. Learn the word for both"
            + (f", or give the --model if it was learned on {kind}." if kind else ".")
        )
    file_widths, model_widths = (
        " and ".join(
            f"{width}" + (f" ({KEYS.get(slot, slot)})" if slot else "") for slot, width in sizes.items()
        )
        for sizes in (widths, slots)
    )
    kind = WIDTHS.get(tuple(widths.values()))
    raise UserError(
        f"{file} holds vectors of width {file_widths}"
        + (f", as {kind} reads them" if kind else "")
        + ", and "
        f"{model.location.name} reads width {model_widths}. Give the --model that the word was learned on."
    )


def name_slots(slots: Sequence[str]) -> str:
    """The names of text encoders in tools' files."""
    return " and ".join(KEYS.get(slot, slot) for slot in slots)


def read_words(source: Path) -> tuple[dict[str, Encoders], dict[str, str]] | None:
    """Token → vectors by encoder, and metadata, of a run that learned words alone, or of a tool's file of one word.

    None for anything else. A word without a name in its file takes the file's name.
    """
    if source.is_dir() and (source / CONCEPT).is_file():
        concept = read_concept(source)
        if not concept.words or concept.weights or concept.changed:
            return None
        return _read_own_words(concept)
    file = find_word_file(source)
    if file is None:
        return None
    words = read_word_file(file)
    return {words.token or file.stem: words.vectors}, dict(words.metadata)


def _read_own_words(concept: Concept) -> tuple[dict[str, Encoders], dict[str, str]]:
    """The learned words of a run; `UserError` if its file lacks vectors for one of its tokens."""
    path = concept.folder / concept.words
    tensors, metadata = read_tensors(path)
    check_tensors(path, tensors)
    words: dict[str, Encoders] = {}
    for token in concept.learned_tokens:
        rows = {
            name: value
            for name, value in tensors.items()
            if name in (token, *(f"{token}/{key}" for key in KEYS))
        }
        if not rows or any(value.ndim not in (1, 2) for value in rows.values()):
            raise UserError(f"{path} holds no vectors for {token}. Train the concept again.")
        words[token] = split_by_encoder(rows, token)
    return words, metadata


def export_words(
    source: Path,
    words: Mapping[str, Encoders],
    metadata: Mapping[str, str],
    out: Path,
    file_format: FileFormat,
    *,
    dtype: torch.dtype | None = None,
) -> str:
    """Write learned words for a tool, one file each, as tools read them; returns a sentence to print.

    Several have their words in their files' names. Raises `UserError` for a file that is there already.
    """
    paths = list_word_files(out, list(words)) if len(words) > 1 else {next(iter(words)): out}
    for path in paths.values():
        check_new_file(path)
    header = {key: value for key, value in metadata.items() if key in ("format", "base_model")}
    for token, path in paths.items():
        rows = {slot: value if dtype is None else value.to(dtype) for slot, value in words[token].items()}
        if any(not bool(torch.isfinite(value.float()).all()) for value in rows.values()):
            raise UserError(
                f"Nothing was written: {source} is not finite in that precision. Leave out --precision."
            )
        write_tensors(path, name_for_tool(token, rows, file_format), {**header, "token": token})
    written = ", ".join(f"{path} for {token}" for token, path in paths.items())
    tool = "Write a file's name in prompts there." if file_format != "diffusers" else ""
    return f"In {in_genitive(file_format)} format: {written}. {tool}".rstrip()


def name_for_tool(token: str, vectors: Encoders, file_format: FileFormat) -> dict[str, Tensor]:
    """A word's vectors under the keys by which a tool knows them."""
    rows = {slot: value.reshape(-1, value.shape[-1]) for slot, value in vectors.items()}
    if len(rows) > 1:
        return {KEYS[slot]: value for slot, value in rows.items()}
    ((slot, value),) = rows.items()
    key = KEYS[slot] if slot == "text_encoder_2" else ALONE[0]  # the second encoder is no tool's only one
    return {token if file_format == "diffusers" else key: value}


def list_word_files(out: Path, tokens: list[str]) -> dict[str, Path]:
    """A file for each of several words, beside `out` and called after it and the word."""
    paths: dict[str, Path] = {}
    for token in tokens:
        stem = f"{out.stem}-{re.sub(r'[^A-Za-z0-9]', '', token) or 'word'}"
        number, path = 2, out.with_name(f"{stem}.safetensors")
        while path in paths.values():
            number, path = number + 1, out.with_name(f"{stem}-{number}.safetensors")
        paths[token] = path
    return paths


def export_beside(concept: Concept, out: Path, file_format: FileFormat) -> list[Path]:
    """Files of the words that a run learned beside an adapter, for a tool: the run's own, or written beside `out`.

    Tools read one word to a file, and where a model has several encoders, those of kohya and ComfyUI by their names.
    Raises `UserError` for a file that is there already.
    """
    words_file = concept.folder / concept.words
    words, _ = _read_own_words(concept)
    encoders = {slot for vectors in words.values() for slot in vectors}
    if not encoders <= set(KEYS) or (len(words) == 1 and (file_format == "diffusers" or len(encoders) == 1)):
        return [words_file]
    paths = list_word_files(out, list(words))
    for path in paths.values():
        check_new_file(path)
    for token, path in paths.items():
        write_tensors(path, name_for_tool(token, words[token], file_format), {"token": token})
    return list(paths.values())


def inspect_words(source: Path) -> dict[str, Any] | None:
    """Vectors, widths and mean lengths of each learned word by encoder, and the model's family; None for no words."""
    learned = read_words(source)
    if learned is None:
        return None
    words, metadata = learned
    described: dict[str, Any] = {}
    for token, vectors in words.items():
        encoders: dict[str, dict[str, Any]] = {
            KEYS.get(slot, slot) or "its only encoder": {
                "vectors": len(rows),
                "width": rows.shape[1],
                "norm": float(rows.float().norm(dim=1).mean()),
            }
            for slot, rows in ((slot, value.reshape(-1, value.shape[-1])) for slot, value in vectors.items())
        }
        base = WIDTHS.get(tuple(encoder["width"] for encoder in encoders.values()), "another model")
        described[token] = {"base": base, "encoders": encoders}
    return {"file": str(source), "words": described, "metadata": metadata}


def describe_words(facts: Mapping[str, Any]) -> str:
    """The facts of `inspect_words` as lines of text."""
    lines = [f"file       {facts['file']}"]
    for token, word in facts["words"].items():
        lines += [f"word       {token}, of {word['base']}"]
        lines += [
            f"vectors    {encoder['vectors']} of {encoder['width']} numbers, {encoder['norm']:.4g} long, for {name}"
            for name, encoder in word["encoders"].items()
        ]
    return "\n".join([*lines, *(f"metadata   {key}: {value}" for key, value in facts["metadata"].items())])
