"""Textual inversion embeddings (Gal et al. 2023): new tokens beside a text encoder's frozen embedding table.

Only the new vectors are trainable tensors, so every old token stays the same bit for bit, and dropping the new ones
restores the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn

from backbone.adapters.config import check_tensors
from backbone.families.base import TextEncoder
from backbone.io.console import UserError, format_count, notify_once
from backbone.io.files import read_tensors, write_tensors

EMBEDDINGS_FILE = "learned_embeds.safetensors"


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table [N, D] followed by trainable rows, from the tokenizer's first free id.

    Some tables (T5's, Qwen's) have more rows than their tokenizer has tokens; the surplus is never looked up.
    """

    def __init__(self, table: nn.Embedding, first: int) -> None:
        super().__init__()
        self.table, self.first = table, first
        self.rows = nn.ParameterList()

    @property
    def weight(self) -> Tensor:
        """The frozen table [N, D] alone."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] → embeddings [B, T, D]."""
        count = self.first
        old = self.table(ids.clamp(max=count - 1))
        if not len(self.rows):
            return cast(Tensor, old)
        new = F.embedding((ids - count).clamp(min=0), torch.cat(list(self.rows)).to(old.dtype))
        return torch.where((ids < count)[..., None], old, new)


def add_tokens(
    encoder: TextEncoder, rows: Mapping[str, Tensor], *, tokens: Sequence[str]
) -> dict[str, Tensor]:
    """Add tokens to every text encoder, with initial embeddings `rows`: for each slot's name a tensor [tokens, D].

    Returns the new embeddings by slot name, as fp32 leaf parameters. Raises `UserError` for a token that the tokenizer
    already has, or for embeddings of another width.
    """
    learned: dict[str, Tensor] = {}
    for slot in encoder.slots:
        values = rows[slot.name]
        table = cast(nn.Embedding | ExtendedEmbedding, slot.model.get_input_embeddings())
        width = table.weight.shape[1]
        if values.shape != (len(tokens), width):
            raise UserError(
                f"The learned embeddings have the shape {tuple(values.shape)} and those of this model's {slot.name} "
                f"the width {width}. Give the --model that they were learned on."
            )
        # New ids follow the tokenizer's words, or words added earlier
        next_id = min(len(slot.tokenizer), table.weight.shape[0])
        if isinstance(table, ExtendedEmbedding):
            next_id = table.first + sum(len(earlier) for earlier in table.rows)
        takes_space = spaces_are_letters(slot.tokenizer)
        added = slot.tokenizer.add_tokens(
            [AddedToken(word, normalized=False, lstrip=takes_space) for word in tokens]
        )
        ids = slot.tokenizer.convert_tokens_to_ids(list(tokens))
        if added != len(tokens) or ids != list(range(next_id, next_id + len(tokens))):
            raise UserError(
                f"This model knows one of the tokens {', '.join(tokens)} already. Choose another token."
            )
        # The new rows lie beside the table, whose weights do not change
        if not isinstance(table, ExtendedEmbedding):
            table = ExtendedEmbedding(table, next_id)
            slot.model.set_input_embeddings(table)
        parameter = nn.Parameter(values.detach().clone().float().to(table.weight.device), requires_grad=False)
        table.rows.append(parameter)
        learned[slot.name] = parameter
    return learned


def embed_tokens(encoder: TextEncoder, text: str, *, count: int) -> dict[str, Tensor]:
    """The embeddings of a text's tokens by slot name, repeated or cut to `count` rows [count, D].

    Raises `UserError` for a text without tokens.
    """
    embeddings = {}
    for slot in encoder.slots:
        text = f" {text.strip()}" if text.strip() and spaces_are_letters(slot.tokenizer) else text
        ids = slot.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"“{text}” has no words to begin with. Give others with --initializer-token.")
        if count < len(ids):
            notify_once(
                f"“{text.strip()}” has {len(ids)} tokens here, and a new word begins with "
                f"{format_count(count, 'vector')}: with the first. Give another word with --initializer-token, or "
                "more vectors with --num-vectors."
            )
        repeated = torch.tensor([ids[k % len(ids)] for k in range(count)], device=slot.model.device)
        embeddings[slot.name] = slot.model.get_input_embeddings()(repeated[None])[0].detach().float()
    return embeddings


def spaces_are_letters(tokenizer: Any) -> bool:
    """Whether a word's token includes the space before it, so that it differs at the start of a prompt."""
    first, inside = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("dog", " dog"))
    return bool(first != inside)


def name_vector_tokens(token: str, count: int) -> list[str]:
    """diffusers' names of a token's vectors in the tokenizer: `[V]`, `[V]_1`, `[V]_2` …"""
    return [token, *(f"{token}_{k}" for k in range(1, count))]


def save_embeddings(
    path: Path, rows: Mapping[str, Mapping[str, Tensor]], *, metadata: Mapping[str, str]
) -> None:
    """Write the embedding vectors [W, D] of each token, by token and slot name.

    With one text encoder, diffusers' `load_textual_inversion` reads the file; with several, keys are `token/slot`.
    """
    tensors = {
        token if len(by_slot) == 1 else f"{token}/{slot}": vectors.detach()
        for token, by_slot in rows.items()
        for slot, vectors in by_slot.items()
    }
    write_tensors(path, tensors, dict(metadata))


def split_by_encoder(tensors: Mapping[str, Tensor], token: str) -> dict[str, Tensor]:
    """A token's embeddings [W, D] by slot name, from the tensors of a file of `save_embeddings`."""
    prefix = f"{token}/"
    by_slot = {name.removeprefix(prefix): rows for name, rows in tensors.items() if name.startswith(prefix)}
    return by_slot or {"text_encoder": tensors[token]}


def load_embeddings(path: Path, encoder: TextEncoder, token: str) -> dict[str, Tensor]:
    """Add a token with the embeddings of a file to every text encoder; returns them [W, D] by slot name.

    Raises `UserError` if the file has none for this token.
    """
    tensors, _ = read_tensors(path)
    check_tensors(path, tensors)
    names = [slot.name for slot in encoder.slots]
    keys = [token] if len(names) == 1 else [f"{token}/{name}" for name in names]
    if any(key not in tensors for key in keys):
        raise UserError(
            f"{path} holds no embeddings for {token} and this model. Give the --model it was learned on."
        )
    rows = {
        name: tensors[key].reshape(-1, tensors[key].shape[-1]) for name, key in zip(names, keys, strict=True)
    }
    count = len(next(iter(rows.values())))
    return add_tokens(encoder, rows, tokens=name_vector_tokens(token, count))
