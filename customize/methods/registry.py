"""What each method trains: an adapter, token embeddings, or the denoiser's weights.

Each part sets itself up on the model, names its trainable tensors, and writes the file that a concept is read from.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from torch import Tensor

from backbone.io.console import UserError
from backbone.models.model import Backbone
from customize.methods.lora import Adapter, TextAdapter
from customize.methods.textual_inversion import TokenEmbeddings
from customize.methods.weights import CROSS_ATTENTION, INPUT, Weights
from customize.settings import METHODS, Settings


class Trainable(Protocol):
    """Trainable parameters: an adapter, token embeddings, or weights of the denoiser itself.

    parameters    fp32, by names that no other part uses
    begins, ends  the share of the run in which they are trained
    """

    parameters: dict[str, Tensor]
    begins: float
    ends: float

    @property
    def learning_rate(self) -> float:
        """The peak learning rate of these parameters."""
        ...

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        """Write its file; return the field of `Concept` that names it."""
        ...


def make_trainable(model: Backbone, settings: Settings) -> list[Trainable]:
    """Set up the method's trainable parameters on the model, and return them.

    Raises `UserError` for an unknown method.
    """
    text: list[Trainable] = [TextAdapter(model, settings)] if settings.train_text_encoder else []
    match settings.method:
        # New input channels are trained in full, the other layers by an adapter
        case "lora" if model.widened:
            return [Weights(model, settings, pattern=INPUT), Adapter(model, settings), *text]
        case "lora":  # Hu et al. 2022; DreamBooth's loss
            return [Adapter(model, settings), *text]
        case "full":  # Ruiz et al. 2023
            return [Weights(model, settings)]
        case "textual-inversion":  # Gal et al. 2023
            return [TokenEmbeddings(model, settings)]
        case "pivotal":  # first the embedding, then the network (Roich et al. 2022)
            share = settings.words_share
            return [
                TokenEmbeddings(model, settings, ends=share),
                Adapter(model, settings, begins=share),
                *text,
            ]
        case "custom-diffusion":  # Kumari et al. 2023: cross-attention's keys and values, and an embedding
            return [TokenEmbeddings(model, settings), Weights(model, settings, pattern=CROSS_ATTENTION)]
    raise UserError(f"There is no method {settings.method}. Choose one of {', '.join(METHODS)}.")


def changes_denoiser(settings: Settings) -> bool:
    """Whether the method changes the denoiser, so that prior preservation is needed."""
    return settings.method != "textual-inversion"
