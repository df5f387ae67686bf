"""Attention control for joint attention: transformers that have text and picture in one sequence.

A row of the map P holds the picture's columns and the words', under one softmax, and its queries are the picture's
positions (p) and the words (w). Every change is made on the sides of Q, K and V, so no map is materialised:

    layout     queries and keys [q_s,p; q_t,w], [k_s,p; k_t,w], values the target's own
    contents   keys and values [k_s,p; k_t,w], [v_s,p; v_t,w], queries the target's own
    words      for the picture's queries  SDPA(q, k, [V_p; diag(d)·V_w]) + SDPA(q_s, k_s, [0; (M·diag c)·V_w])
               with the q and k that the target has after the line above; M, c, d as in `edit.attention.install`

The layout is "Exploring Multimodal Diffusion Transformers for Enhanced Prompt-based Image Editing" (Shin et al. 2025):
only the picture's queries and keys are taken, since with the whole map the words no longer meet their own values.

Both ways of taking the source's self-attention are exact, and so are the words' columns that prompt-to-prompt writes
and the maps that are read. Prompt-to-prompt itself is an approximation here, in two ways: its rows are not renormalised
(the words' columns from the source and the picture's columns of the target sum to 1 + the source's share of words − the
target's; a reweighted row of cross-attention does not sum to 1 either), and the queries of the words, which
cross-attention does not have, are left to the target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.families.base import JointAttentionInputs
from edit.attention.control import never_traced, read_columns

if TYPE_CHECKING:
    from edit.attention.control import AttentionControl, Cross


class JointProcessor:
    """Computes one joint attention layer as `control` says; unchanged where it says nothing.

    `read` is the family's function from a call of the layer to `JointAttentionInputs`. It also serves the second layer
    of blocks with one over the image alone.
    """

    def __init__(
        self, control: AttentionControl, original: Any, name: str, read: Callable[..., JointAttentionInputs]
    ) -> None:
        self.control = control
        self.original = original
        self.name = name
        self.read = read

    @never_traced
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        *arguments: Any,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states_mask: Tensor | None = None,
        image_rotary_emb: Any = None,
        freqs_cis: Tensor | None = None,
        **options: Any,
    ) -> Any:
        # diffusers passes the keyword arguments in a processor's signature, and in some places all of them
        keywords = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "encoder_hidden_states_mask": encoder_hidden_states_mask,
            "image_rotary_emb": image_rotary_emb,
            "freqs_cis": freqs_cis,
            **options,
        }
        keywords = {name: value for name, value in keywords.items() if value is not None}
        control = self.control
        call = (hidden_states, *arguments)
        is_unchanged = control.self_attention == "own" and control.cross is None and control.maps is None
        if is_unchanged and control.hidden is None:
            return self.original(attn, *call, **keywords)
        inputs = self.read(attn, *call, **keywords)
        query, key, value = inputs.query, inputs.key, inputs.value
        picture, has_words = inputs.image, inputs.text.stop > inputs.text.start
        picture_tokens = picture.stop - picture.start
        if not picture_tokens:  # a layer over words alone
            return self.original(attn, *call, **keywords)
        if (visible := control.visible_keys(picture_tokens, key.device)) is not None:
            return inputs.project_output(_attend_visible(inputs, visible))
        # The source's layout (queries and keys) or contents (keys and values), in the picture's part alone
        if control.reaches(self.name, picture_tokens):
            needed, gather = control.source_index_map(len(query), control.controlled_targets)
            source = [needed[index] for index in gather]
            key = _gather_picture(key, picture, source)
            if control.self_attention == "layout":
                query = _gather_picture(query, picture, source)
            else:
                value = _gather_picture(value, picture, source)
        # Maps are read from the attention with these queries and keys
        if control.maps is not None and has_words and control.maps.reads(picture_tokens):
            read = slice(1 + control.targets)
            attend = partial(
                inputs.attend, query[read, :, picture], key[read], rows=read, first=picture.start
            )
            word_columns = control.maps.columns[..., : inputs.text.stop - inputs.text.start]
            columns = F.pad(word_columns, _keys_around_words(inputs))
            control.maps.add(read_columns(attend, query, columns))
        if control.cross is None or not has_words:
            return inputs.project_output(inputs.attend(query, key, value))
        return inputs.project_output(_attend_cross(inputs, query, key, value, control.targets, control.cross))


def _attend_cross(
    inputs: JointAttentionInputs, query: Tensor, key: Tensor, value: Tensor, targets: int, cross: Cross
) -> Tensor:
    """Attention [B, heads, tokens, D] in which the targets' pictures attend to words as `cross` says.

    SDPA(q, k, [V_p; diag(d)·V_w]) + SDPA(q_s, k_s, [0; (M·diag c)·V_w])
    """
    target_rows, picture, text = slice(1, 1 + targets), inputs.image, inputs.text
    other_rows = [0, *range(1 + targets, len(query))]
    attended = torch.empty_like(query)
    # All other rows, and the queries of the targets' words, are left as they are
    attended[other_rows] = inputs.attend(query[other_rows], key[other_rows], value[other_rows], other_rows)
    for outside in (slice(0, picture.start), slice(picture.stop, query.shape[2])):
        if outside.stop > outside.start:
            attended[target_rows, :, outside] = inputs.attend(
                query[target_rows, :, outside],
                key[target_rows],
                value[target_rows],
                target_rows,
                outside.start,
            )
    words = value[target_rows, :, text]  # V_w
    count = words.shape[2]  # with ragged prompts the longest one's; the rest is padding
    updated = value[target_rows].clone()
    updated[:, :, text] = (
        0
        if cross.from_target is None
        else cross.from_target[:, :count].to(value.dtype)[:, None, :, None] * words
    )
    mixed = torch.zeros_like(updated)
    mixed[:, :, text] = cross.from_source[:, :count, :count].to(value.dtype)[:, None] @ words
    query_source, key_source = (x[:1].expand(targets, *x.shape[1:]) for x in (query[:, :, picture], key))
    attended[target_rows, :, picture] = inputs.attend(
        query[target_rows, :, picture], key[target_rows], updated, target_rows, picture.start
    ) + inputs.attend(query_source, key_source, mixed, [0] * targets, picture.start)
    return attended


def _attend_visible(inputs: JointAttentionInputs, visible: Tensor) -> Tensor:
    """Attention without the picture's hidden keys; `visible` are the indices of the others."""
    picture, keys = inputs.image, torch.arange(inputs.key.shape[2], device=visible.device)
    indices = torch.cat([keys[: picture.start], picture.start + visible, keys[picture.stop :]])
    bias = None if inputs.bias is None else inputs.bias[..., indices]
    biased = replace(inputs, bias=bias)
    return biased.attend(inputs.query, inputs.key[:, :, indices], inputs.value[:, :, indices])


def _gather_picture(x: Tensor, picture: slice, source: list[int]) -> Tensor:
    """[B, heads, tokens, D] with the picture's part of each row from the row that `source` names for it."""
    gathered = x.clone()
    gathered[:, :, picture] = x[source][:, :, picture]
    return gathered


def _keys_around_words(inputs: JointAttentionInputs) -> tuple[int, int]:
    """The number of keys before the words, and after them."""
    return inputs.text.start, inputs.key.shape[2] - inputs.text.stop
