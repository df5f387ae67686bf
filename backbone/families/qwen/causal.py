"""Attention of Qwen-Image 2.1: a token of the text sees those before it, one of an image its own image too.

The noisy image stands last and sees everything. Its positions begin where its row's text ends: the padding of shorter
prompts in a batch takes no positions, so every row is what it is alone. diffusers' own processor counts padding, and
gives each layer a mask of the text.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen
from torch import Tensor

from backbone.families.base import JointAttentionInputs

Segment = tuple[int, int, bool]  # of the tokens before the noisy image: start, end, whether it is text


class CausalAttention:
    """A processor of diffusers' `QwenImage21Attention`."""

    def __init__(self, frequencies: Tensor) -> None:
        """`frequencies` are the rotary ones of a position's first coordinate, which counts through the text."""
        self.frequencies = frequencies

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        attention_mask: None = None,
        rotary_emb: Tensor | None = None,
        segments: list[Segment] | None = None,
        key_valid: Tensor | None = None,
        **cache: None,
    ) -> Any:
        call = self.read(attn, hidden_states, rotary_emb=rotary_emb, segments=segments, key_valid=key_valid)
        query, key, value = call.query, call.key, call.value
        if call.causal:
            return call.project_output(call.attend(query, key, value))
        # Images among the text: each segment sees all before it and, if it is an image, all of itself
        valid = None if key_valid is None else key_valid[:, None, None]
        ends = [end for _, end, _ in segments or ()]
        outputs = []
        for start, end, is_text in (*(segments or ()), (ends[-1], query.shape[2], False)):
            mask = None if valid is None else valid[..., :end]
            if is_text:
                visible = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
                mask = visible if mask is None else mask & visible
            outputs.append(
                F.scaled_dot_product_attention(
                    query[:, :, start:end], key[:, :, :end], value[:, :, :end], attn_mask=mask
                )
            )
        return call.project_output(torch.cat(outputs, dim=2))

    def read(
        self,
        attn: Any,
        hidden: Tensor,
        *,
        rotary_emb: Tensor | None,
        segments: list[Segment] | None,
        key_valid: Tensor | None = None,
        **cache: None,
    ) -> JointAttentionInputs:
        """One call of an attention layer: text tokens, with images among them if there are any, and the noisy image."""
        assert rotary_emb is not None and segments is not None
        context = segments[-1][1] if segments else 0
        rotations = self.shift_back(rotary_emb, context, key_valid)
        query, key, value = (
            project(hidden).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            rotate(norm(x).to(value.dtype), rotations)
            for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )

        def project_output(attended: Tensor) -> Any:
            return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))

        return JointAttentionInputs(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            text=slice(0, context),
            project_output=project_output,
            bias=None if key_valid is None else key_valid[:, None, None],
            causal=all(is_text for _, _, is_text in segments),
        )

    def shift_back(self, rotations: Tensor, context: int, key_valid: Tensor | None) -> Tensor:
        """Rotations [tokens, D/2] with the noisy image moved back to each row's end of text, [B, tokens, D/2]."""
        if key_valid is None:
            return rotations
        padding = (~key_valid).sum(1, keepdim=True)
        angles = padding * self.frequencies.to(rotations.device)
        back = torch.polar(torch.ones_like(angles), -angles)  # [B, of the first coordinate]
        shifted = rotations.repeat(len(key_valid), 1, 1)
        shifted[:, context:, : back.shape[1]] *= back[:, None]
        return shifted


def rotate(x: Tensor, rotations: Tensor) -> Tensor:
    """Heads [B, tokens, heads, D] turned by angles given as complex numbers [tokens, D/2], or [B, tokens, D/2]."""
    if rotations.ndim == 2:
        return cast(Tensor, apply_rotary_emb_qwen(x, rotations, use_real=False))
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotations[:, :, None]).flatten(3).to(x.dtype)
