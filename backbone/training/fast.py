"""A context for fast training steps of a denoiser."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from peft.tuners.lora import LoraLayer
from torch import nn

from backbone.training.attention import fast_attention_backward


@contextmanager
def fast_steps(denoiser: nn.Module, *, device: str = "") -> Iterator[None]:
    """Inside the `with`, a denoiser's attention has a fast backward pass, and only autocast casts a LoRA's inputs.

    `device` is the denoiser's if left out.
    """
    with fast_attention_backward(denoiser, device=device), uncast_inputs(denoiser):
        yield


@contextmanager
def uncast_inputs(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, layers of a plain LoRA do not cast their inputs; for calls under autocast.

    peft casts an input to the factors' fp32, and autocast back: two copies for the same bits, a tenth of a small step.
    peft's own `disable_input_dtype_casting` would also affect DoRA, whose norms are computed in the inputs' precision.
    """
    layers = [
        layer
        for layer in model.modules()
        if isinstance(layer, LoraLayer) and not layer.lora_variant and layer.cast_input_dtype_enabled
    ]
    for layer in layers:
        layer.cast_input_dtype_enabled = False
    try:
        yield
    finally:
        for layer in layers:
            layer.cast_input_dtype_enabled = True
