"""Clips longer than a motion adapter has positions for, in windows of frames that overlap.

Either the whole network sees one window after another and its predictions are averaged (`network`: the memory of one
window), or it sees the whole clip and only attention over time goes by windows, with outputs averaged in every
layer (`attention`: Qiu et al. 2023, FreeNoise, section 3.3). A frame's weight falls with its distance from its
window's middle.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from backbone.diffusion.noise import Estimate, Level, Predict
from backbone.models.clips.motion import find_motion

Windows = Literal["network", "attention"]
"""What goes through windows of frames: the network, or attention over time alone."""


def window_starts(frames: int, length: int, stride: int) -> list[int]:
    """The first frames of windows of `length` frames, `stride` apart; the last window ends with the clip."""
    if frames <= length:
        return [0]
    starts = list(range(0, frames - length, stride))
    return [*starts, frames - length]


def window_weights(count: int, device: torch.device | None = None) -> Tensor:
    """The weights [F] of a window's frames where windows overlap: 1, 2 … 2, 1."""
    ramp = torch.arange(1, count + 1, device=device)
    return torch.minimum(ramp, ramp.flip(0)).float()


def predict_in_windows(predict_in: Callable[[slice], Predict], length: int, stride: int) -> Predict:
    """Predictions of a clip's windows, averaged where they overlap; `predict_in` gives the predictor of a window."""
    predictors: dict[int, Predict] = {}

    def predict(noisy: Tensor, level: Level) -> Estimate:
        frames = noisy.shape[2]
        sums = [torch.zeros_like(noisy, dtype=torch.float32) for _ in range(2)]
        weights = torch.zeros(frames, device=noisy.device)
        for start in window_starts(frames, length, stride):
            window = slice(start, start + length)
            if start not in predictors:
                predictors[start] = predict_in(window)
            portion = noisy[:, :, window]
            # Sums of weight·(x̂0, ε̂) and of weights
            weight = window_weights(portion.shape[2], noisy.device)
            for total, part in zip(sums, predictors[start](portion, level), strict=True):
                total[:, :, window] += weight[:, None, None] * part
            weights[window] += weight
        clean, noise = (total / weights[:, None, None] for total in sums)
        return Estimate(clean, noise)

    return predict


@contextmanager
def attention_in_windows(denoiser: nn.Module, length: int, stride: int) -> Iterator[None]:
    """Inside the `with` a motion adapter's layers attend over this many frames at once, and clips may be longer."""
    motion = find_motion(denoiser)
    blocks = [] if motion is None else list(_list_blocks(cast(nn.Module, motion.adapter)))
    previous = [block.__dict__.get("forward") for block in blocks]
    for block in blocks:
        block.forward = partial(_attend_by_windows, block, length, stride)
    try:
        yield
    finally:
        for block, forward in zip(blocks, previous, strict=True):
            del block.forward
            if forward is not None:
                block.forward = forward


def _list_blocks(adapter: nn.Module) -> Iterator[Any]:
    """The transformer blocks of all motion modules."""
    for name, module in adapter.named_modules():
        if name.rpartition(".")[0].endswith(".transformer_blocks"):
            yield module


def _attend_by_windows(block: Any, length: int, stride: int, hidden_states: Tensor, **unused: Any) -> Tensor:
    """A block's output [N, F, C]: averaged attention by windows, then the feed-forward layer on the average."""
    hidden = hidden_states
    total = torch.zeros_like(hidden)
    weights = torch.zeros(hidden.shape[1], device=hidden.device)
    for start in window_starts(hidden.shape[1], length, stride):
        window = slice(start, start + length)
        portion = hidden[:, window]
        # Attention over the window's frames, with positions from 0 in each
        for norm, attention in ((block.norm1, block.attn1), (block.norm2, block.attn2)):
            if attention is not None:
                entering = norm(portion)
                portion = (
                    attention(entering if block.pos_embed is None else block.pos_embed(entering)) + portion
                )
        weight = window_weights(portion.shape[1], hidden.device)
        total[:, window] += weight.to(portion.dtype)[:, None] * portion
        weights[window] += weight
    attended = total / weights.to(total.dtype)[:, None]
    output: Tensor = block.ff(block.norm3(attended)) + attended
    return output
