"""How attention is computed, and contexts that change it and put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

LARGEST = 32  # a side of the latents


@contextmanager
def fast_attention_backward(model: nn.Module, *, device: str = "", side: int = 0) -> Iterator[None]:
    """Inside the `with`, attention whose backward pass is fast on a device, which is the model's if left out.

    On a CPU the backward of fused attention takes a third of a small UNet's step, so the plain product of matrices is
    used there (same result up to rounding). Elsewhere nothing changes, nor for attention of another kind (over text
    and picture jointly, say), nor for latents of more than 32 × 32: the plain product keeps a matrix of (H·W)² numbers
    a head for its backward pass. `side` is the latents', where the network's config does not say it.
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
