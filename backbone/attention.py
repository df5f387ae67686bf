"""How attention is computed, and contexts that change it and put it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from diffusers.models.attention_processor import AttnProcessor
from torch import nn


@contextmanager
def quick_to_train(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, attention whose backward pass is fast on the model's device.

    On a CPU the backward of fused attention takes a third of a small UNet's step, so the plain product of matrices is
    used there (same result up to rounding); elsewhere nothing changes.
    """
    network = cast(Any, model)
    if next(model.parameters()).device.type != "cpu" or not hasattr(model, "set_attn_processor"):
        yield
        return
    before = dict(network.attn_processors)
    network.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        network.set_attn_processor(before)
