"""New embeddings for the token as trainable parameters (Gal et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from backbone.adapters.embeddings import FILE as WORDS
from backbone.adapters.embeddings import new_words, rows_of, save_words, words_of
from backbone.models.model import Backbone
from customize.settings import Settings


@dataclass
class Words:
    """A token's own rows in the embedding table (Gal et al. 2023), beginning as the class noun's."""

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
            start = rows_of(encoder, first, count=settings.num_vectors)
            rows = new_words(encoder, start, words=words_of(subject.token, settings.num_vectors))
            self.rows[subject.token] = rows
            self.parameters |= {
                f"words.{subject.token}.{side}": value.requires_grad_(True) for side, value in rows.items()
            }
        self.model.text_learned = True

    @property
    def learning_rate(self) -> float:
        return self.settings.words_learning_rate

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        save_words(run / WORDS, self.rows, metadata=header)
        return {"words": WORDS}
