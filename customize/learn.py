"""What a method trains: an adapter, words of the token's own, or the denoiser's weights; and which method trains what.

Each piece puts itself on the model, names its trainable tensors, and writes the file that a concept is read from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from torch import Tensor

from backbone.adapters import OTHER_WEIGHTS, WEIGHTS, Kind, add_lora, save_lora
from backbone.console import UserError
from backbone.files import write_tensors
from backbone.model import Backbone
from backbone.new_words import FILE as WORDS
from backbone.new_words import new_words, rows_of, save_words, words_of
from customize.settings import Settings

ADAPTER = "concept"
CHANGED = "denoiser_delta.safetensors"
CROSS_ATTENTION = r"attn2\.to_[kv]\."
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


class Piece(Protocol):
    """One thing that is trained."""

    parameters: dict[str, Tensor]  # trainable, fp32, by names that no other piece uses
    learning_rate: float
    begins: float  # the share of the run after which it is trained …
    ends: float  # … and the one until which it is

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        """Writes its file; gives the field of `Concept` that names it."""
        ...


@dataclass
class Adapter:
    """A low-rank change of the denoiser's layers, and of the text encoder's where asked."""

    model: Backbone
    settings: Settings
    begins: float = 0.0
    ends: float = 1.0
    parameters: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        layers = self.model.family.lora_targets.get(settings.lora_layers)
        if layers is None:
            known = ", ".join(self.model.family.lora_targets)
            raise UserError(
                f"There is no set of layers called {settings.lora_layers}. Choose one of {known}."
            )
        self.parameters = add_lora(
            self.model.denoiser,
            ADAPTER,
            rank=settings.rank,
            alpha=settings.lora_alpha,
            targets=layers,
            dropout=settings.lora_dropout,
            seed=settings.seed,
            kind=cast(Kind, settings.adapter),
            ranks=settings.ranks(),
        )

    @property
    def learning_rate(self) -> float:
        return self.settings.learning_rate

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        name = WEIGHTS if self.settings.adapter in ("lora", "dora") else OTHER_WEIGHTS
        text = {side.name: side.model for side in self.model.text_encoder.sides} if self.with_text else {}
        save_lora(run / name, self.model.denoiser, ADAPTER, metadata=header, text=text)
        return {"weights": name}

    @property
    def with_text(self) -> bool:
        """Whether the text encoders carry it too."""
        return self.settings.train_text_encoder


@dataclass
class TextAdapter:
    """The same adapter on the text encoders, at a learning rate of its own; `Adapter` writes both into one file."""

    model: Backbone
    settings: Settings
    begins: float = 0.0
    ends: float = 1.0
    parameters: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.parameters = {}
        refuse_other_encoders(self.model)
        for side in self.model.text_encoder.sides:
            tensors = add_lora(
                side.model,
                ADAPTER,
                rank=self.settings.rank,
                alpha=self.settings.lora_alpha,
                targets=TEXT_LAYERS,
                dropout=self.settings.lora_dropout,
                seed=self.settings.seed,
            )
            self.parameters |= {f"{side.name}.{name}": value for name, value in tensors.items()}
        self.model.text_learned = True

    @property
    def learning_rate(self) -> float:
        return self.settings.text_encoder_lr

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        return {}


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


@dataclass
class Weights:
    """The denoiser's own weights whose names match a pattern; what is kept is how far they moved."""

    model: Backbone
    settings: Settings
    pattern: str = ""
    begins: float = 0.0
    ends: float = 1.0
    parameters: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        denoiser = self.model.denoiser
        if not self.pattern:
            denoiser.float()  # its norms too
        chosen = {name: value for name, value in denoiser.named_parameters() if re.search(self.pattern, name)}
        if not chosen:
            raise UserError(f"This model has no weights that match {self.pattern}. Choose another --method.")
        self.start = {name: value.detach().clone().cpu() for name, value in chosen.items()}
        for value in chosen.values():
            value.data = value.data.float()
            value.requires_grad_(True)
        self.parameters = dict(chosen)

    @property
    def learning_rate(self) -> float:
        return self.settings.learning_rate

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        moved = {
            name: (value.detach().float().cpu() - self.start[name].float()).half()
            for name, value in self.parameters.items()
        }
        write_tensors(run / CHANGED, moved, dict(header))
        return {"changed": CHANGED}


def refuse_other_encoders(model: Backbone) -> None:
    """`UserError` for text encoders that carry no adapter: those that are no CLIP."""
    for side in model.text_encoder.sides:
        names = (name.rpartition(".")[2] for name, _ in side.model.named_modules())
        if not set(TEXT_LAYERS) & set(names):
            raise UserError(
                f"The {side.name} of {model.location.name} is a {type(side.model).__name__}, which carries no adapter "
                "here or in diffusers. Leave out --train-text-encoder."
            )


def pieces(model: Backbone, settings: Settings) -> list[Any]:
    """What the method of these settings trains, put on the model.

    Raises `UserError` for an unknown method.
    """
    text = [TextAdapter(model, settings)] if settings.train_text_encoder else []
    match settings.method:
        case "lora":  # Hu et al. 2022; DreamBooth's loss
            return [Adapter(model, settings), *text]
        case "full":  # Ruiz et al. 2023
            return [Weights(model, settings)]
        case "textual-inversion":  # Gal et al. 2023
            return [Words(model, settings)]
        case "pivotal":  # first the word, then the network around it (Roich et al. 2022)
            share = settings.words_share
            return [Words(model, settings, ends=share), Adapter(model, settings, begins=share), *text]
        case "custom-diffusion":  # Kumari et al. 2023: keys and values of the cross-attention, and a word
            return [Words(model, settings), Weights(model, settings, pattern=CROSS_ATTENTION)]
    raise UserError(f"There is no method {settings.method}. Choose one of {', '.join(METHODS)}.")


METHODS = {
    "lora": "an adapter on the denoiser (DreamBooth with LoRA, DoRA, LoHa or LoKr)",
    "full": "all of the denoiser's weights (DreamBooth)",
    "textual-inversion": "a word of its own, nothing else",
    "pivotal": "a word of its own first, then an adapter",
    "custom-diffusion": "the cross-attention's keys and values, and a word of its own",
}
OWN_WORDS = (
    "textual-inversion",
    "pivotal",
    "custom-diffusion",
)  # methods in which the token has rows of its own


def changes_denoiser(settings: Settings) -> bool:
    """Whether the method moves the denoiser, so that a class has to be preserved."""
    return settings.method != "textual-inversion"


def size(every: list[Any]) -> int:
    """How many numbers are trained."""
    return sum(value.numel() for piece in every for value in piece.parameters.values())
