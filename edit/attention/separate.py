"""Attention control for UNets, where self- and cross-attention are separate layers."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbone.models.clips.frames import first_and_previous
from edit.attention.control import OVER_TIME, AttentionControl, Cross, Maps, never_traced, read_columns


class Processor:
    """Computes one attention layer as `control` says; unchanged where it says nothing."""

    def __init__(self, control: AttentionControl, original: Any, name: str = "") -> None:
        self.control = control
        self.original = original
        self.name = name

    @never_traced
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        control = self.control
        layer = _Layer(attn, hidden_states, encoder_hidden_states, attention_mask, temb)
        rows_per_prompt = control.rows_each(len(hidden_states))
        if encoder_hidden_states is None:
            if control.across_frames and OVER_TIME not in self.name:
                layer.frames = rows_per_prompt
            if control.reaches(self.name, layer.tokens):
                contents = control.self_attention == "contents" and OVER_TIME not in self.name
                attend = _attend_source_contents if contents else _attend_source_layout
                samples = len(hidden_states) // rows_per_prompt
                index_map = control.source_index_map(samples, control.controlled_targets)
                return layer.project(attend(layer, *(in_rows(index, rows_per_prompt) for index in index_map)))
            visible = control.visible_keys(layer.tokens, hidden_states.device)
            if visible is not None:
                return layer.project(_attend_visible(layer, visible))
            if layer.frames:
                x = layer.hidden
                return layer.project(layer.sdpa(layer.query(x), layer.key(x), layer.value(x), layer.mask))
        else:
            maps = control.maps if control.maps is not None and control.maps.reads(layer.tokens) else None
            if control.cross is not None or maps is not None:
                return layer.project(
                    _attend_cross(layer, control.targets, control.cross, maps, rows_per_prompt)
                )
        return cast(Tensor, self.original(attn, hidden_states, encoder_hidden_states, attention_mask, temb))


def in_rows(samples: list[int], rows_per_sample: int) -> list[int]:
    """The row indices of these samples, with `rows_per_sample` rows each."""
    return (
        [sample * rows_per_sample + row for sample in samples for row in range(rows_per_sample)]
        if rows_per_sample > 1
        else samples
    )


def _attend_source_layout(layer: _Layer, needed: list[int], gather: list[int]) -> Tensor:
    """Targets use the source's attention map: SDPA(q_s, k_s, V_t). Their own queries and keys are not computed."""
    hidden = layer.hidden[needed]
    query, key = layer.query(hidden)[gather], layer.key(hidden)[gather]
    return layer.sdpa(query, key, layer.value(layer.hidden), _gather_mask(layer.mask, needed, gather))


def _attend_source_contents(layer: _Layer, needed: list[int], gather: list[int]) -> Tensor:
    """Targets attend to the source's contents: SDPA(q_t, k_s, V_s)."""
    hidden = layer.hidden[needed]
    key, value = layer.key(hidden)[gather], layer.value(hidden)[gather]
    return layer.sdpa(layer.query(layer.hidden), key, value, _gather_mask(layer.mask, needed, gather))


def _attend_visible(layer: _Layer, visible: Tensor) -> Tensor:
    """Self-attention without hidden keys; `visible` are the indices of the others."""
    hidden, mask = layer.hidden, layer.mask
    key, value = layer.key(hidden)[:, :, visible], layer.value(hidden)[:, :, visible]
    return layer.sdpa(layer.query(hidden), key, value, None if mask is None else mask[..., visible])


def _gather_mask(mask: Tensor | None, needed: list[int], gather: list[int]) -> Tensor | None:
    return None if mask is None else mask[needed][gather]


def find_feature_layer(network: Any) -> nn.Module | None:
    """The convolution whose output holds the coarse structure: at the decoder's second coarsest level.

    `up_blocks.1.resnets.1` of Tumanyan et al. 2023 (layer 4 of the decoder); None for a denoiser without such blocks.
    """
    blocks = getattr(network, "up_blocks", None)
    if not blocks:
        return None
    inner = getattr(blocks[min(1, len(blocks) - 1)], "resnets", None)
    return cast(nn.Module, inner[min(1, len(inner) - 1)].conv2) if inner else None


def gather_features(
    control: AttentionControl, module: nn.Module, inputs: Any, output: Tensor
) -> Tensor | None:
    """A forward hook: the features [B, C, h, w] with the targets' replaced by the source's; None: unchanged."""
    if control.features == "own":
        return None
    rows_per_sample = control.rows_each(len(output))
    needed, gather = (
        in_rows(index, rows_per_sample) for index in control.source_index_map(len(output) // rows_per_sample)
    )
    return output[needed][gather]


def _attend_cross(
    layer: _Layer, targets: int, cross: Cross | None, maps: Maps | None, rows_per_prompt: int = 1
) -> Tensor:
    """The targets' cross-attention from the source's map and their own [B, heads, queries, D], and maps read from it.

        SDPA(q_s, k_s, (M·diag c)·V_t) + SDPA(q_t, k_t, diag(d)·V_t)

    The first term is computed for all rows; the source and the unconditional rows have their own queries, keys and
    values in it. The second is left out where d = 0, and with it the targets' queries and keys. A sample has
    `rows_per_prompt` rows.
    """
    text, value = layer.text, layer.value(layer.text)
    first, last = rows_per_prompt, (1 + targets) * rows_per_prompt
    target_rows, read_rows = slice(first, last), slice(last)
    if cross is not None and cross.from_target is None and maps is None:
        # The targets' own queries and keys are not needed, so they are not made
        mask = layer.mask
        query_source = layer.query(_drop_rows(layer.hidden, target_rows))
        key_source = layer.key(_drop_rows(text, target_rows))
    else:
        query, key, mask = layer.query(layer.hidden), layer.key(text), layer.mask
        if maps is not None:
            read_mask = None if mask is None else mask[read_rows]
            attend = partial(layer.sdpa, query[read_rows], key[read_rows], mask=read_mask)
            maps.add(read_columns(attend, query, maps.columns.repeat_interleave(rows_per_prompt, 0)))
        if cross is None:
            return layer.sdpa(query, key, value, mask)
        query_source, key_source = _drop_rows(query, target_rows), _drop_rows(key, target_rows)
    # (M·diag c)·V_t for the targets, V for the others
    from_source = cross.from_source.to(value.dtype).repeat_interleave(rows_per_prompt, 0)
    values = torch.cat([value[:first], from_source[:, None] @ value[target_rows], value[last:]])
    mask_source = (
        None if mask is None else _repeat_source(_drop_rows(mask, target_rows), targets, rows_per_prompt)
    )
    query_source, key_source = (
        _repeat_source(x, targets, rows_per_prompt) for x in (query_source, key_source)
    )
    attended = layer.sdpa(query_source, key_source, values, mask_source)
    if cross.from_target is None:
        return attended
    # diag(d)·V_t
    own_share = cross.from_target.to(value.dtype).repeat_interleave(rows_per_prompt, 0)
    weighted = own_share[:, None, :, None] * value[target_rows]
    from_target = layer.sdpa(
        query[target_rows], key[target_rows], weighted, None if mask is None else mask[target_rows]
    )
    return torch.cat([attended[:first], attended[target_rows] + from_target, attended[last:]])


def _drop_rows(x: Tensor, rows: slice) -> Tensor:
    """All rows but these."""
    return torch.cat([x[: rows.start], x[rows.stop :]])


def _repeat_source(x: Tensor, targets: int, rows_per_prompt: int) -> Tensor:
    """Rows without the targets' → all rows, with the source's as the targets'."""
    return torch.cat([x[:rows_per_prompt].repeat(1 + targets, *[1] * (x.ndim - 1)), x[rows_per_prompt:]])


@dataclass
class _Layer:
    """One call of a diffusers `Attention`: what surrounds the product of queries, keys and values.

    With `frames`, rows are the frames of clips, and keys and values those of the first frame and the one before (Wu et
    al. 2023, Tune-A-Video, section 4.2).
    """

    attn: Any
    states: Tensor
    encoder_states: Tensor | None
    attention_mask: Tensor | None
    temb: Tensor | None
    frames: int = 0
    shape: tuple[int, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.shape = tuple(self.states.shape)

    @property
    def tokens(self) -> int:
        """The number of queries."""
        return self.shape[1] if len(self.shape) == 3 else self.shape[2] * self.shape[3]

    @cached_property
    def hidden(self) -> Tensor:
        """The input of the query projection [B, queries, C]."""
        x = self.states
        if self.attn.spatial_norm is not None:
            x = self.attn.spatial_norm(x, self.temb)
        if x.ndim == 4:
            x = x.flatten(2).transpose(1, 2)
        if self.attn.group_norm is not None:
            x = self.attn.group_norm(x.transpose(1, 2)).transpose(1, 2)
        return x

    @property
    def text(self) -> Tensor:
        """The input of cross-attention's key and value projections [B, T, D]."""
        assert self.encoder_states is not None
        if self.attn.norm_cross:
            return cast(Tensor, self.attn.norm_encoder_hidden_states(self.encoder_states))
        return self.encoder_states

    @property
    def mask(self) -> Tensor | None:
        """[B, heads, 1 or queries, keys], or None."""
        if self.attention_mask is None:
            return None
        batch = self.shape[0]
        keys = self.tokens if self.encoder_states is None else self.encoder_states.shape[1]
        mask = self.attn.prepare_attention_mask(self.attention_mask, keys, batch)
        return cast(Tensor, mask.view(batch, self.attn.heads, -1, mask.shape[-1]))

    def query(self, x: Tensor) -> Tensor:
        query = self._split_heads(self.attn.to_q(x))
        return query if self.attn.norm_q is None else self.attn.norm_q(query)

    def key(self, x: Tensor) -> Tensor:
        key = self._split_heads(self.attn.to_k(x))
        return key if self.attn.norm_k is None else self.attn.norm_k(key)

    def value(self, x: Tensor) -> Tensor:
        return self._split_heads(self.attn.to_v(x))

    def sdpa(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if self.frames:
            key, value = first_and_previous(key, self.frames), first_and_previous(value, self.frames)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=self.attn.scale)

    def project(self, attended: Tensor) -> Tensor:
        """Concatenate the heads, apply the output projection and the residual, and restore the input's shape."""
        x = attended.transpose(1, 2).flatten(2)
        x = self.attn.to_out[1](self.attn.to_out[0](x))
        if len(self.shape) == 4:
            x = x.transpose(1, 2).reshape(self.shape)
        if self.attn.residual_connection:
            x = x + self.states
        return cast(Tensor, x / self.attn.rescale_output_factor)

    def _split_heads(self, x: Tensor) -> Tensor:
        return cast(Tensor, x.unflatten(-1, (self.attn.heads, -1)).transpose(1, 2))
