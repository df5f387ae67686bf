"""New embeddings for the token as trainable parameters (Gal et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from backbone.adapters.embeddings import (
    EMBEDDINGS_FILE,
    add_tokens,
    embed_tokens,
    name_vector_tokens,
    save_embeddings,
    split_by_encoder,
)
from backbone.io.files import read_tensors
from backbone.models.model import Backbone
from customize.settings import Settings


@dataclass
class TokenEmbeddings:
    """New rows of the embedding table for a token (Gal et al. 2023), initialised from the class noun's."""

    model: Backbone
    settings: Settings
    begins: float = 0.0
    ends: float = 1.0
    parameters: dict[str, Tensor] = field(init=False)
    rows: dict[str, dict[str, Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        settings, encoder = self.settings, self.model.text_encoder
        self.rows, self.parameters = {}, {}
        for subject in settings.subjects():
            first = settings.initializer_token or subject.class_noun
            start = embed_tokens(encoder, first, count=settings.num_vectors)
            rows = add_tokens(encoder, start, tokens=name_vector_tokens(subject.token, settings.num_vectors))
            self.rows[subject.token] = rows
            self.parameters |= {
                f"words.{subject.token}.{slot}": value.requires_grad_(True) for slot, value in rows.items()
            }
        self.model.text_learned = True

    @property
    def learning_rate(self) -> float:
        return self.settings.words_learning_rate

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        save_embeddings(run / EMBEDDINGS_FILE, self.rows, metadata=header)
        return {"words": EMBEDDINGS_FILE}

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Load the embeddings that `save` wrote."""
        tensors, _ = read_tensors(path)
        for token, rows in self.rows.items():
            saved = split_by_encoder(tensors, token)
            for slot, value in rows.items():
                value.copy_(saved[slot])
