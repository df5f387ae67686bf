"""Learned words bundled in an adapter's file, as by OneTrainer and AUTOMATIC1111: `bundle_emb.WORD.KEY`.

KEY is `string_to_param.*` or `emb_params` of a model with one encoder, `clip_l` and `clip_g` of one with two.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from backbone.adapters.config import check_tensors
from backbone.adapters.embeddings import add_tokens, name_vector_tokens
from backbone.io.console import UserError
from backbone.io.files import read_header, read_tensors
from backbone.models.model import Backbone
from customize.formats.words import ALONE, SLOTS, WordFile, check_word, fit_to_encoders, refuse_unlike_counts

BUNDLED = "bundle_emb."


def read_bundle(path: Path) -> dict[str, WordFile]:
    """The words that a file bundles, by name; {} without any.

    Raises `UserError` for vectors of encoders that are not supported, and for output vectors of an encoder.
    """
    if not any(name.startswith(BUNDLED) for name in read_header(path).shapes):
        return {}
    tensors, metadata = read_tensors(path)
    bundled = {name: value for name, value in tensors.items() if name.startswith(BUNDLED)}
    check_tensors(path, bundled)
    by_token: dict[str, dict[str, Tensor]] = {}
    for name, value in bundled.items():
        key = next((key for key in (*SLOTS, *ALONE) if name.endswith(f".{key}")), None)
        token = name[len(BUNDLED) : -len(key) - 1] if key else ""
        if key is None or not token or value.ndim not in (1, 2):
            raise UserError(
                f"{path} bundles {name} of the shape {list(value.shape)}, and only words that CLIP reads are read "
                "here. Learn the word anew without it."
            )
        vectors = by_token.setdefault(token, {})
        if SLOTS.get(key, "") in vectors:
            raise UserError(f"{path} bundles the word {token} twice (also as {key}). Download it again.")
        vectors[SLOTS.get(key, "")] = value.reshape(-1, value.shape[-1])
    words = {
        token: WordFile(dict(sorted(vectors.items())), token, metadata, "OneTrainer")
        for token, vectors in by_token.items()
    }
    for word in words.values():
        refuse_unlike_counts(word.vectors, path)
    return words


def holds_words_alone(path: Path) -> bool:
    """Whether a file contains only bundled words, and no adapter."""
    names = read_header(path).shapes
    return bool(names) and all(name.startswith(BUNDLED) for name in names)


def fit_bundle(
    words: Mapping[str, WordFile], model: Backbone, file: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, str]]:
    """The words' vectors by the model's encoders, and each token's words.

    Adds them to the model. Raises `UserError` for words that it already has, and for vectors of another model.
    """
    rows: dict[str, dict[str, Tensor]] = {}
    tokens: dict[str, str] = {}
    for token, word in words.items():
        check_word(token, model, file)
        rows[token] = fit_to_encoders(word, model, file)
        names = name_vector_tokens(token, len(next(iter(rows[token].values()))))
        add_tokens(model.text_encoder, rows[token], tokens=names)
        tokens[token] = " ".join(names)
    return rows, tokens
