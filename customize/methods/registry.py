"""What a method trains: an adapter, words of the token's own, or the denoiser's weights; and which method trains what.

Each part sets itself up on the model, names its trainable tensors, and writes the file that a concept is read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from backbone.io.console import UserError
from backbone.models.model import Backbone
from customize.methods.lora import Adapter, TextAdapter
from customize.methods.textual_inversion import Words
from customize.methods.weights import CROSS_ATTENTION, INPUT, Weights
from customize.settings import METHODS, Settings


class Trainable(Protocol):
    """Trainable parameters: an adapter, token embeddings, or weights of the denoiser itself."""

    parameters: dict[str, Tensor]  # fp32, by names that no other part uses
    learning_rate: float
    begins: float  # the share of the run after which it is trained …
    ends: float  # … and the one until which it is

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        """Writes its file; gives the field of `Concept` that names it."""
        ...


def trainable(model: Backbone, settings: Settings) -> list[Any]:
    """What the method of these settings trains, set up on the model.

    Raises `UserError` for an unknown method.
    """
    text = [TextAdapter(model, settings)] if settings.train_text_encoder else []
    match settings.method:
        # The new channels themselves, which are few, and an adapter behind them
        case "lora" if model.widened:
            return [Weights(model, settings, pattern=INPUT), Adapter(model, settings)]
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


def changes_denoiser(settings: Settings) -> bool:
    """Whether the method moves the denoiser, so that a class has to be preserved."""
    return settings.method != "textual-inversion"
