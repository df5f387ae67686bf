"""A context that changes how attention is computed, and restores it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

LARGEST = 32  # a side of the latents


@contextmanager
def fast_attention_backward(model: nn.Module, *, device: str = "", side: int = 0) -> Iterator[None]:
    """Inside the `with`, attention has a backward pass that is fast on the device, the model's if left out.

    On a CPU the backward of fused attention takes a third of a small UNet's step, so the plain matrix product is used
    there (same result up to rounding). Nothing changes elsewhere, for other attention (such as over text and picture
    jointly), and for latents above 32 × 32: the plain product keeps a matrix of (H·W)² numbers a head for its
    backward pass. `side` is the latents', for a network whose config lacks it.
    """
    network = cast(Any, model)
    on_cpu = (device or next(model.parameters()).device.type) == "cpu"
    processors = dict(getattr(model, "attn_processors", {}))
    plain = processors and all(type(processor) is AttnProcessor2_0 for processor in processors.values())
    if not on_cpu or not plain or (side or network.config.sample_size) > LARGEST:
        yield
        return
    network.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        network.set_attn_processor(processors)
