"""The weights themselves as trainable parameters: all of them, or cross-attention (Kumari et al. 2023)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from backbone.io.console import UserError
from backbone.io.files import write_tensors
from backbone.models.model import Backbone
from customize.settings import Settings

CHANGED = "denoiser_delta.safetensors"
CROSS_ATTENTION = r"attn2\.to_[kv]\."
INPUT = r"^conv_in\."  # of a UNet whose input is widened by the channels of an image


def select_weights(denoiser: nn.Module, pattern: str) -> dict[str, Tensor]:
    """The weights whose names match; for `CROSS_ATTENTION` only those of layers that attend to the text.

    Stable Diffusion 3.5's `attn2` attends to the image.
    """
    matching: dict[str, Tensor] = {
        name: value for name, value in denoiser.named_parameters() if re.search(pattern, name)
    }
    if pattern != CROSS_ATTENTION:
        return matching
    layers = {name: denoiser.get_submodule(name.rpartition(".to_")[0]) for name in matching}
    return {
        name: matching[name] for name, layer in layers.items() if getattr(layer, "is_cross_attention", False)
    }


@dataclass
class Weights:
    """The denoiser's weights whose names match a pattern; the file holds their difference from the base model's."""

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
        selected = select_weights(denoiser, self.pattern)
        if not selected:
            raise UserError(
                f"{self.model.location.name} attends to text and image jointly, and --method custom-diffusion trains "
                "cross-attention. Choose another --method."
            )
        self.start = {name: value.detach().clone().cpu() for name, value in selected.items()}
        for value in selected.values():
            value.data = value.data.float()
            value.requires_grad_(True)
        self.parameters = dict(selected)

    @property
    def learning_rate(self) -> float:
        return self.settings.learning_rate

    @torch.no_grad()
    def forget(self) -> None:
        """Restore the base model's weights."""
        for name, value in self.parameters.items():
            value.copy_(self.start[name])

    def save(self, run: Path, header: Mapping[str, str]) -> dict[str, str]:
        changed = {
            name: (value.detach().float().cpu() - self.start[name].float()).half()
            for name, value in self.parameters.items()
        }
        write_tensors(run / CHANGED, changed, dict(header))
        return {"changed": CHANGED}
