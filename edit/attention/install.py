"""Attention control as data: what an edit changes in a denoiser's attention, without a materialised map.

Rows of a call are in one order: the source first, then N targets, then the unconditional rows. Prompt-to-prompt
(Hertz et al. 2022) replaces a target's map P_t by one made from the source's, and every such change is linear in the
map, so it can be made on the side of V, where scaled-dot-product attention stays fast:

    self-attention   SDPA(q_s, k_s, V_t)
    cross-attention  SDPA(q_s, k_s, (M·diag c)·V_t) + SDPA(q_t, k_t, diag(d)·V_t)
                     c = α·a·e        d = α·(1 − a)·e + 1 − α

with M, a, e, α as in `edit.attention.alignment`; a term that is zero is left out, and with it its queries and keys.
The contents of the source in the target's layout (MasaCtrl, Cao et al. 2023, eq. 6) are SDPA(q_t, k_s, V_s). Maps for
masks and heat maps are read through a V of one-hot columns, padded to the head's width, at one resolution only.

    control = AttentionControl(targets=1)
    with control_attention(denoiser, control):
        control.cross = make_cross(mapping, from_source, weight, window)   # and predict; None: nothing is changed

Layers over text and picture jointly are in `edit.attention.joint`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import nn

from backbone.families.base import AttentionLayout
from backbone.io.console import UserError
from edit.attention.control import UNET, AttentionControl
from edit.attention.joint import JointProcessor
from edit.attention.separate import Processor, find_feature_layer, gather_features


@contextmanager
def control_attention(
    denoiser: nn.Module, control: AttentionControl, attention: AttentionLayout = UNET
) -> Iterator[None]:
    """Inside the `with`, the denoiser computes attention as `control` says; afterwards, also after an error, as before.

    `attention` describes it for its family. Raises `UserError` for a denoiser whose attention is computed by other
    processors than diffusers' standard ones.
    """
    layers = attention_layers(denoiser)
    processors = {name: layer.processor for name, layer in layers.items()}
    foreign = {
        type(p).__name__
        for p in processors.values()
        if type(p) not in attention.joint_inputs and not isinstance(p, (AttnProcessor, AttnProcessor2_0))
    }
    if foreign or not processors:
        reason = f"is computed by {', '.join(sorted(foreign))}" if foreign else "cannot be reached"
        raise UserError(
            f"The attention of this model {reason}, which cannot be edited. Take the model without it."
        )

    # Processors and the hook on the residual features are always restored
    hook = None
    try:
        for name, processor in processors.items():
            read = attention.joint_inputs.get(type(processor))
            layers[name].set_processor(
                Processor(control, processor, name)
                if read is None
                else JointProcessor(control, processor, name, read)
            )
        convolution = find_feature_layer(denoiser)
        if convolution is not None:
            hook = convolution.register_forward_hook(partial(gather_features, control))
        yield
    finally:
        if hook is not None:
            hook.remove()
        for name, processor in processors.items():
            layers[name].set_processor(processor)


def attention_layers(denoiser: nn.Module) -> dict[str, Any]:
    """The layers that compute attention by a processor of diffusers, by the processor's name."""
    return {
        f"{name}.processor": layer
        for name, layer in denoiser.named_modules()
        if hasattr(layer, "processor") and hasattr(layer, "set_processor")
    }
