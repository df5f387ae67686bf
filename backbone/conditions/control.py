"""A control: a map of a picture's layout as a second condition, and the network that reads it.

    control = Control.of(network, maps, scale=0.8, stop=0.7)
    conditions = replace(text, controls=(control,))

ControlNet (Zhang et al. 2023) and T2I-Adapter (Mou et al. 2024) both give tensors that are added inside the denoiser.
The family knows the layers (`backbone.families.control`); this module knows which rows are controlled, how strongly and
at which steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from backbone.diffusion.noise import Schedule
from backbone.diffusion.transfer import send
from backbone.io.console import UserError

Residuals = dict[str, list[Tensor]]
"""Tensors [B, …] that are added inside the denoiser, by the name of its argument."""


class ControlNetwork(Protocol):
    """A network of one family that reads maps.

    module         diffusers' class, which is trained and saved
    prompted_only  whether it was made to act only with a prompt, as in guess mode
    takes_guess    whether it reads the prompt, so that guess mode changes something
    """

    module: nn.Module
    prompted_only: bool
    takes_guess: bool

    def for_kind(self, kind: str) -> ControlNetwork:
        """The network set to one of the kinds of maps that it reads; `UserError` for another kind."""
        ...

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        """The hints [B, …] of maps [B, 3, H, W] in 0…1, which depend on the map alone. Differentiable."""
        ...

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        """The residuals for one call of the denoiser with the arguments `inputs`."""
        ...


@dataclass(frozen=True, eq=False)
class Control:
    """B rows controlled by one network.

    hints        tensors [B, …] of `network.read`
    scale        [B], in CPU memory; a row of 0 is not controlled, bit for bit
    start, stop  the share of the steps that are taken, from noise, at which it acts
    prompted     it acts only on rows with a prompt, so that guidance amplifies it
    guess        guess mode: as `prompted`, and shallow layers are controlled less
    frames       rows are clips of this many frames, each with hints of its own [B, F, …]; 0: one for all of a row
    times        the network's times from `start` to `stop`, lowest and highest; `during` fills them in
    """

    network: ControlNetwork
    hints: tuple[Tensor, ...]
    scale: Tensor
    start: float = 0.0
    stop: float = 1.0
    prompted: bool = False
    guess: bool = False
    frames: int = 0
    times: tuple[float, float] | None = None

    @classmethod
    def of(
        cls,
        network: ControlNetwork,
        maps: Tensor,
        *,
        scale: float | Tensor = 1.0,
        start: float = 0.0,
        stop: float = 1.0,
        prompted: bool = False,
        guess: bool = False,
    ) -> Control:
        """The control of maps [B, 3, H, W] in 0…1, at one scale or one for each [B]."""
        scales = torch.as_tensor(scale, dtype=torch.float32).expand(len(maps))
        prompted = prompted or guess or network.prompted_only
        return cls(network, network.read(maps), scales, start, stop, prompted, guess)

    def __len__(self) -> int:
        return len(self.scale)

    def as_clip(self) -> Control:
        """Rows of equal strength, one for each frame, as one row that is a clip."""
        hints = tuple(value[None] for value in self.hints)
        return replace(self, hints=hints, scale=self.scale[:1], frames=len(self))

    def in_window(self, window: slice) -> Control:
        """The control of these frames of every clip."""
        if not self.frames:
            return self
        return replace(
            self,
            hints=tuple(value[:, window] for value in self.hints),
            frames=len(range(self.frames)[window]),
        )

    def for_frames(self, frames: int) -> Control:
        """B clips of this many frames as B·F rows; `UserError` for hints of another number of frames."""
        if not self.frames:
            return self.rows(torch.arange(len(self)).repeat_interleave(frames))
        if self.frames != frames:
            raise UserError(
                f"A condition has maps for {self.frames} frames, and the clip has {frames}. Give one for each."
            )
        hints = tuple(value.flatten(0, 1) for value in self.hints)
        return replace(self, hints=hints, scale=self.scale.repeat_interleave(frames), frames=0)

    def acting_steps(self, steps: int) -> list[int]:
        """The steps i of S = `steps` at which it acts: those with start ≤ i/S and (i + 1)/S ≤ stop, as in diffusers."""
        return [i for i in range(steps) if i / steps >= self.start and (i + 1) / steps <= self.stop]

    def during(self, schedule: Schedule) -> Control:
        """The control with the `times` of its `acting_steps`.

        The schedule [S + 1] is that of the steps that are taken, at a strength below 1 those after its level. Raises
        `UserError` if there is no such step.
        """
        assert schedule.time is not None
        steps, times = len(schedule) - 1, schedule.time.double().tolist()
        acting = self.acting_steps(steps)
        if not acting:
            raise UserError(
                f"None of {steps} steps lies between {self.start:g} and {self.stop:g}, so the condition would change "
                "nothing. Let it begin earlier or end later."
            )

        # A call knows its time alone: bounds half way between the times of the steps in and out
        first, last = acting[0], acting[-1]
        low = (times[last] + times[last + 1]) / 2 if last + 1 < steps else -math.inf
        high = (times[first] + times[first - 1]) / 2 if first > 0 else math.inf
        return replace(self, times=(low, high))

    def at(self, time: Tensor) -> Control:
        """The control at these times [] or [B] of the network: rows outside of `times` are not controlled."""
        if self.times is None:
            assert (self.start, self.stop) == (0, 1), "`during` a schedule tells which times a share of it is"
            return self
        (low, high), time = self.times, time.cpu()
        acts = (low <= time) & (time <= high)
        return replace(self, scale=self.scale * acts.to(self.scale))

    def unprompted(self) -> Control:
        """The control of the rows without a prompt."""
        return replace(self, scale=torch.zeros_like(self.scale)) if self.prompted else self

    def off(self, rows: int) -> Control:
        """This many rows without control."""
        hints = tuple(value.new_zeros(rows, *value.shape[1:]) for value in self.hints)
        return replace(self, hints=hints, scale=self.scale.new_zeros(rows))

    def rows(self, index: Tensor) -> Control:
        """These rows."""
        return self.apply(lambda value: value[send(index, value.device)])

    def apply(self, change: Callable[[Tensor], Tensor]) -> Control:
        """Apply a function to every tensor."""
        return replace(self, hints=tuple(map(change, self.hints)), scale=change(self.scale))

    def to(self, device: torch.device) -> Control:
        """The control with its hints on another device."""
        return replace(self, hints=tuple(send(value, device) for value in self.hints))

    def is_like(self, other: Control) -> bool:
        """Whether rows of both can stand in one batch."""
        same_action = self.network is other.network and self.acts_like(other)
        return same_action and (self.frames, self.times) == (other.frames, other.times)

    def acts_like(self, other: Control) -> bool:
        """Whether both act at the same steps and on the same rows of guidance."""
        return all(
            getattr(self, name) == getattr(other, name) for name in ("start", "stop", "prompted", "guess")
        )


def repeat_controls(controls: Sequence[Control], rows: int) -> tuple[Control, ...]:
    """Expand controls of one row each to this many rows, without copies."""
    return tuple(control.apply(lambda value: value.expand(rows, *value.shape[1:])) for control in controls)


def join_controls(parts: Sequence[tuple[tuple[Control, ...], int]]) -> tuple[Control, ...]:
    """Concatenate the rows of several (controls, rows); a part without controls is not controlled."""
    template = next((controls for controls, _ in parts if controls), ())
    filled = [controls or tuple(control.off(rows) for control in template) for controls, rows in parts]
    return tuple(_join_rows(column) for column in zip(*filled, strict=True))


def _join_rows(column: Sequence[Control]) -> Control:
    first = column[0]
    assert all(first.is_like(other) for other in column), "rows under different networks in one batch"
    hints = (_concatenate(values) for values in zip(*(control.hints for control in column), strict=True))
    scale = torch.cat([control.scale for control in column])
    return replace(first, hints=tuple(hints), scale=scale)


def _concatenate(values: Sequence[Tensor]) -> Tensor:
    """Concatenate hints, in the memory layout of the first one's rows."""
    row = values[0][:1]
    is_channels_last = row.ndim == 4 and row.is_contiguous(memory_format=torch.channels_last)
    joined = torch.cat([*values])
    return joined.contiguous(memory_format=torch.channels_last) if is_channels_last else joined
