"""Queries, keys and values of the joint attention of diffusers' transformers (SD3, FLUX and the like)."""

from __future__ import annotations

from typing import Any, cast

from torch import Tensor, nn

# Of a layer over text and image, which have separate projections
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")


def project_qkv(attn: Any, hidden: Tensor) -> list[Tensor]:
    """Query, key and value [B, heads, tokens, D] of image tokens [B, tokens, C], or of a whole sequence."""
    return [
        _apply_norm(attn.norm_q, _split_heads(attn.to_q(hidden), attn.heads)),
        _apply_norm(attn.norm_k, _split_heads(attn.to_k(hidden), attn.heads)),
        _split_heads(attn.to_v(hidden), attn.heads),
    ]


def project_text_qkv(attn: Any, hidden: Tensor) -> list[Tensor]:
    """Query, key and value of text tokens [B, tokens, C], by the layer's separate text projections."""
    return [
        _apply_norm(attn.norm_added_q, _split_heads(attn.add_q_proj(hidden), attn.heads)),
        _apply_norm(attn.norm_added_k, _split_heads(attn.add_k_proj(hidden), attn.heads)),
        _split_heads(attn.add_v_proj(hidden), attn.heads),
    ]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return cast(Tensor, x.unflatten(-1, (heads, -1)).transpose(1, 2))


def _apply_norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else cast(Tensor, norm(x))


def later_half_prefixes(blocks: nn.ModuleList, name: str) -> tuple[str, ...]:
    """Name prefixes of the later half of a list of equal blocks."""
    return tuple(f"{name}.{number}." for number in range(len(blocks) // 2, len(blocks)))
