"""Attention of Qwen-Image 2.1: a token of the text sees those before it, one of an image its own image too.

The image that is drawn stands last and sees everything. It stands where its row's text ends: of prompts of unlike
length in one call the shorter ones' padding is no place, so that every row is what it is alone. diffusers' own
processor counts padding, and gives each layer a mask of the text that as many rows share.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.transformers.transformer_qwenimage21 import apply_rotary_emb_qwen
from torch import Tensor

from backbone.families.base import JointAttentionInputs

Segment = tuple[int, int, bool]  # of the tokens before the drawn image: start, end, whether it is text


class CausalAttention:
    """A processor of diffusers' `QwenImage21Attention`."""

    def __init__(self, frequencies: Tensor) -> None:
        """`frequencies` are those of a place's first coordinate, which counts through the text."""
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
        found = []
        for start, end, is_text in (*(segments or ()), (ends[-1], query.shape[2], False)):
            mask = None if valid is None else valid[..., :end]
            if is_text:
                seen = torch.ones(end - start, end, dtype=torch.bool, device=query.device).tril(start)
                mask = seen if mask is None else mask & seen
            found.append(
                F.scaled_dot_product_attention(
                    query[:, :, start:end], key[:, :, :end], value[:, :, :end], attn_mask=mask
                )
            )
        return call.project_output(torch.cat(found, dim=2))

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
        """One call of an attention layer: text tokens, images among them if there are any, and the drawn image."""
        assert rotary_emb is not None and segments is not None
        before = segments[-1][1] if segments else 0
        turns = self.moved_back(rotary_emb, before, key_valid)
        query, key, value = (
            project(hidden).unflatten(-1, (attn.heads, -1)) for project in (attn.to_q, attn.to_k, attn.to_v)
        )
        query, key = (
            turn(norm(x).to(value.dtype), turns) for norm, x in ((attn.norm_q, query), (attn.norm_k, key))
        )

        def project_output(attended: Tensor) -> Any:
            return attn.to_out[1](attn.to_out[0](attended.transpose(1, 2).flatten(2)))

        return JointAttentionInputs(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            text=slice(0, before),
            project_output=project_output,
            bias=None if key_valid is None else key_valid[:, None, None],
            causal=all(is_text for _, _, is_text in segments),
        )

    def moved_back(self, turns: Tensor, before: int, key_valid: Tensor | None) -> Tensor:
        """Rotations [tokens, D/2] with the drawn image where each row's text ends, [B, tokens, D/2]."""
        if key_valid is None:
            return turns
        padding = (~key_valid).sum(1, keepdim=True)
        angles = padding * self.frequencies.to(turns.device)
        back = torch.polar(torch.ones_like(angles), -angles)  # [B, of the first coordinate]
        moved = turns.repeat(len(key_valid), 1, 1)
        moved[:, before:, : back.shape[1]] *= back[:, None]
        return moved


def turn(x: Tensor, turns: Tensor) -> Tensor:
    """Heads [B, tokens, heads, D] turned by angles given as complex numbers [tokens, D/2], or [B, tokens, D/2]."""
    if turns.ndim == 2:
        return cast(Tensor, apply_rotary_emb_qwen(x, turns, use_real=False))
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns[:, :, None]).flatten(3).to(x.dtype)
