"""New words for a text encoder: rows of their own beside its frozen table of token embeddings.

Gal et al. 2023 (textual inversion) find a word whose embedding draws a subject. Here only the new rows exist as
trainable tensors, so every old word stays bit for bit what it was, and taking the new ones away leaves nothing behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from tokenizers import AddedToken
from torch import Tensor, nn

from backbone.families.base import TextEncoder
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors

EMBEDDINGS_FILE = "learned_embeds.safetensors"


class ExtendedEmbedding(nn.Module):
    """A frozen embedding table [N, D], and learned rows behind it."""

    def __init__(self, table: nn.Embedding) -> None:
        super().__init__()
        self.table = table
        self.rows = nn.ParameterList()

    @property
    def weight(self) -> Tensor:
        """The table, without the new rows."""
        return self.table.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids [B, T] to embeddings [B, T, D]."""
        count = self.table.num_embeddings
        old = self.table(ids.clamp(max=count - 1))
        if not len(self.rows):
            return cast(Tensor, old)
        new = F.embedding((ids - count).clamp(min=0), torch.cat(list(self.rows)).to(old.dtype))
        return torch.where((ids < count)[..., None], old, new)


def add_tokens(
    encoder: TextEncoder, rows: Mapping[str, Tensor], *, tokens: Sequence[str]
) -> dict[str, Tensor]:
    """Teaches an encoder words, each a row of the tensors [W, D] in `rows`, one tensor for each of its `sides`.

    Gives the rows as fp32 leaf tensors by side, ready to be trained. Raises `UserError` for a word that it has already,
    or for rows of another width.
    """
    learned: dict[str, Tensor] = {}
    for slot in encoder.slots:
        values = rows[slot.name]
        table = cast(nn.Embedding | ExtendedEmbedding, slot.model.get_input_embeddings())
        width = table.weight.shape[1]
        if values.shape != (len(tokens), width):
            raise UserError(
                f"The learned words are {tuple(values.shape)} numbers and this model's {slot.name} has words of "
                f"{width}. Give the --model that they were learned on."
            )
        start = table.table.num_embeddings if isinstance(table, ExtendedEmbedding) else table.num_embeddings
        before = (
            start + sum(len(part) for part in table.rows) if isinstance(table, ExtendedEmbedding) else start
        )
        added = slot.tokenizer.add_tokens([AddedToken(word, normalized=False) for word in tokens])
        ids = slot.tokenizer.convert_tokens_to_ids(list(tokens))
        if added != len(tokens) or ids != list(range(before, before + len(tokens))):
            raise UserError(
                f"This model knows one of the words {', '.join(tokens)} already. Choose another token."
            )
        if not isinstance(table, ExtendedEmbedding):
            table = ExtendedEmbedding(table)
            slot.model.set_input_embeddings(table)
        parameter = nn.Parameter(values.detach().clone().float().to(table.weight.device), requires_grad=False)
        table.rows.append(parameter)
        learned[slot.name] = parameter
    return learned


def embed_tokens(encoder: TextEncoder, text: str, *, count: int) -> dict[str, Tensor]:
    """The embeddings of a text's tokens, repeated or cut to `count` rows [count, D], for every side.

    Raises `UserError` for a text without tokens.
    """
    found = {}
    for slot in encoder.slots:
        ids = slot.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise UserError(f"“{text}” has no words to begin with. Give others with --initializer_token.")
        chosen = torch.tensor([ids[k % len(ids)] for k in range(count)], device=slot.model.device)
        found[slot.name] = slot.model.get_input_embeddings()(chosen[None])[0].detach().float()
    return found


def vector_token_names(token: str, count: int) -> list[str]:
    """How a token's vectors are called, as diffusers calls them: `[V]`, `[V]_1`, `[V]_2` …"""
    return [token, *(f"{token}_{k}" for k in range(1, count))]


def save_embeddings(
    path: Path, rows: Mapping[str, Mapping[str, Tensor]], *, metadata: Mapping[str, str]
) -> None:
    """Writes learned words, the rows of each token by side.

    With one text encoder it is a file that diffusers' `load_textual_inversion` reads; with several, a token's rows of
    each are called `token/side`.
    """
    tensors = {
        token if len(sides) == 1 else f"{token}/{side}": value.detach()
        for token, sides in rows.items()
        for side, value in sides.items()
    }
    write_tensors(path, tensors, dict(metadata))


def split_by_encoder(tensors: Mapping[str, Tensor], token: str) -> dict[str, Tensor]:
    """One token's rows [W, D] of each text encoder, from the tensors of a file that `save_embeddings` wrote."""
    own = {
        name.removeprefix(f"{token}/"): rows for name, rows in tensors.items() if name.startswith(f"{token}/")
    }
    return own or {"text_encoder": tensors[token]}


def load_embeddings(path: Path, encoder: TextEncoder, token: str) -> dict[str, Tensor]:
    """Teaches an encoder the words of a file for one token; gives their rows by side.

    Raises `UserError` when the file holds none for this token.
    """
    tensors, _ = read_tensors(path)
    names = [slot.name for slot in encoder.slots]
    keys = [token] if len(names) == 1 else [f"{token}/{name}" for name in names]
    if any(key not in tensors for key in keys):
        raise UserError(
            f"{path} holds no words for {token} and this model. Give the --model it was learned on."
        )
    rows = {
        name: tensors[key].reshape(-1, tensors[key].shape[-1]) for name, key in zip(names, keys, strict=True)
    }
    count = len(next(iter(rows.values())))
    return add_tokens(encoder, rows, tokens=vector_token_names(token, count))
