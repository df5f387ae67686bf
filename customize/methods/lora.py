"""Low-rank adapters on the denoiser and the text encoders as trainable parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from torch import Tensor

from backbone.adapters.config import AdapterType
from backbone.adapters.lora import (
    LORA_WEIGHTS,
    LYCORIS_WEIGHTS,
    AdapterKind,
    add_lora,
    save_lora,
    say_useless_rank,
)
from backbone.io.console import UserError
from backbone.models.model import Backbone
from customize.settings import Settings

ADAPTER = "concept"  # peft's name of the adapter
TEXT_LAYERS = ("q_proj", "k_proj", "v_proj", "out_proj")


@dataclass
class Adapter:
    """A low-rank adapter on the denoiser's layers, and on the text encoder's with `--train-text-encoder`."""

    model: Backbone
    settings: Settings
    begins: float = 0.0
    ends: float = 1.0
    parameters: dict[str, Tensor] = field(init=False)

    def __post_init__(self) -> None:
        settings = self.settings
        layers = self.model.find_lora_layers(settings.lora_layers)
        self.parameters = add_lora(
            self.model.denoiser,
            ADAPTER,
            rank=settings.rank,
            alpha=settings.lora_alpha,
            targets=layers,
            seed=settings.seed,
            kind=AdapterKind(cast(AdapterType, settings.adapter), settings.lora_dropout, settings.ranks()),
        )
        say_useless_rank(self.parameters)
        if not self.model.widened:  # which learns to follow instructions
            self.model.subject_adapters.add(ADAPTER)

    @property
    def learning_rate(self) -> float:
        return self.settings.learning_rate

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        name = LORA_WEIGHTS if self.settings.adapter in ("lora", "dora") else LYCORIS_WEIGHTS
        text = {slot.name: slot.model for slot in self.model.text_encoder.slots} if self.with_text else {}
        save_lora(run / name, self.model.denoiser, ADAPTER, metadata=header, text_encoders=text)
        return {"weights": name}

    @property
    def with_text(self) -> bool:
        """Whether the text encoders get an adapter too."""
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
        for slot in self.model.text_encoder.slots:
            tensors = add_lora(
                slot.model,
                ADAPTER,
                rank=self.settings.rank,
                alpha=self.settings.lora_alpha,
                targets=TEXT_LAYERS,
                seed=self.settings.seed,
                kind=AdapterKind(dropout=self.settings.lora_dropout),
            )
            self.parameters |= {f"{slot.name}.{name}": value for name, value in tensors.items()}
        self.model.text_learned = True

    @property
    def learning_rate(self) -> float:
        return self.settings.text_encoder_lr

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        return {}


def refuse_other_encoders(model: Backbone) -> None:
    """`UserError` for text encoders that cannot carry an adapter: all but CLIP."""
    for slot in model.text_encoder.slots:
        names = (name.rpartition(".")[2] for name, _ in slot.model.named_modules())
        if not set(TEXT_LAYERS) & set(names):
            raise UserError(
                f"The {slot.name} of {model.location.name} is a {type(slot.model).__name__}, which carries no adapter "
                "here or in diffusers. Leave out --train-text-encoder."
            )
