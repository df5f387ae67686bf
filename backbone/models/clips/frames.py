"""Frames of a clip linked by the attention of a picture model that has no motion adapter.

    with link_frames(model, 16):
        ...  # rows are clips of 16 frames, and each attends to the first frame and the previous one

Keys and values of a UNet's self-attention come from those two frames (Wu et al. 2023, Tune-A-Video, section 4.2), so
that objects look alike in all frames although no temporal layer was trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from backbone.families.unet.family import UNetFamily
from backbone.io.console import UserError
from backbone.models.clips.motion import find_motion
from backbone.models.model import Backbone

SELF_ATTENTION = "attn1"  # a UNet's layer of it, by the end of its name


def first_and_previous(x: Tensor, frames: int) -> Tensor:
    """Tokens [B·F, ..., T, D] of clips → [B·F, ..., 2·T, D], those of the first frame and of the previous one."""
    clips = x.unflatten(0, (-1, frames))
    first = clips[:, :1].expand_as(clips)
    previous = torch.cat([clips[:, :1], clips[:, :-1]], 1)
    return torch.cat([first, previous], -2).flatten(0, 1)


@dataclass
class LinkedAttention:
    """A self-attention processor whose keys and values come from other frames of the clip."""

    plain: Any
    frames: int

    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if encoder_hidden_states is None:
            encoder_hidden_states = first_and_previous(hidden_states, self.frames)
        return cast(
            Tensor, self.plain(attn, hidden_states, encoder_hidden_states=encoder_hidden_states, **kwargs)
        )


@contextmanager
def link_frames(model: Backbone, frames: int) -> Iterator[None]:
    """Inside the `with` a UNet's self-attention links the frames of clips; one with a motion adapter stays as it is.

    Raises `UserError` for a transformer.
    """
    refuse_transformer(model)
    moving = find_motion(model.denoiser) is not None
    layers: dict[str, Any] = {
        name: layer
        for name, layer in model.denoiser.named_modules()
        if name.endswith(SELF_ATTENTION) and not moving
    }
    processors = {name: layer.processor for name, layer in layers.items()}
    try:
        for name, plain in processors.items():
            layers[name].set_processor(LinkedAttention(plain, frames))
        yield
    finally:
        for name, plain in processors.items():
            layers[name].set_processor(plain)


def refuse_transformer(model: Backbone) -> None:
    """`UserError` for a transformer over text and picture jointly, in which frames are not linked."""
    if not isinstance(model.family, UNetFamily):
        raise UserError(
            f"The frames of a clip are linked in a UNet's attention, and {model.location.name} is a transformer. Give "
            "a --model that has a UNet (moji, sd15, sdxl)."
        )
