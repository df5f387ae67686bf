"""`Conditions`: a denoiser's inputs besides the noisy latents and the time, batched.

A kind of condition (text; a control map, a reference image, a camera) is a field of named tensors [B, …]. Operations on
conditions (taking rows, repeating, joining, moving, dropping the prompt) are written here once for all kinds, so that
training, sampling, caching and guidance never ask which kinds there are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from backbone.conditions.control import Control, join_controls
from backbone.diffusion.transfer import send

Text = dict[str, Tensor]
"""The output of a family's text encoders for B prompts: named tensors [B, …]."""


@dataclass(frozen=True, eq=False)
class Conditions:
    """B conditions.

    text        named tensors [B, …], by the names that the family's network reads
    guidance    guidance scales [B], for a network that is conditioned on them (guidance-distilled)
    references  latents [B, C, h, w] of images, for a network that reads them with the noisy ones
    controls    maps of the layout and the networks that read them
    """

    text: Text
    guidance: Tensor | None = None
    references: tuple[Tensor, ...] = ()
    controls: tuple[Control, ...] = ()

    def __len__(self) -> int:
        return len(next(iter(self.text.values())))

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> Conditions:
        """These rows. An index tensor may lie on any device."""
        if isinstance(rows, slice):
            return self._apply(lambda value: value[rows])
        index = torch.as_tensor(rows)
        return self._apply(lambda value: value[send(index, value.device)])

    def repeat(self, count: int) -> Conditions:
        """Tile all rows `count` times; a single row is expanded without a copy."""
        if len(self) == 1:
            return self._apply(lambda value: value.expand(count, *value.shape[1:]))
        return self._apply(lambda value: value.repeat(count, *[1] * (value.ndim - 1)))

    def in_window(self, window: slice) -> Conditions:
        """The conditions of these frames of every clip."""
        return replace(self, controls=tuple(control.in_window(window) for control in self.controls))

    def for_frames(self, frames: int) -> Conditions:
        """The conditions of B clips for their B·F frames, clip by clip."""
        expanded = replace(self, controls=())[torch.arange(len(self)).repeat_interleave(frames)]
        return replace(expanded, controls=tuple(control.for_frames(frames) for control in self.controls))

    def to(self, device: torch.device) -> Conditions:
        """Move to another device; copies from the CPU to a GPU are asynchronous."""
        sent = replace(self, controls=())._apply(lambda value: send(value, device))
        return replace(sent, controls=tuple(control.to(device) for control in self.controls))

    def pin_memory(self) -> Conditions:
        """The conditions in pinned memory, from which copies to a GPU are asynchronous."""
        return self._apply(lambda value: value.pin_memory())

    def drop(self, dropped: Tensor, empty: Conditions) -> Conditions:
        """Replace prompts by those of `empty` (1 row or B) where `dropped` [B] is true; the rest is unchanged.

        Prompt dropout for classifier-free guidance (Ho & Salimans 2022).
        """

        def substitute(value: Tensor, replacement: Tensor) -> Tensor:
            mask = send(dropped, value.device).reshape(-1, *[1] * (value.ndim - 1))
            return torch.where(mask, replacement, value)

        text = {name: substitute(value, empty.text[name]) for name, value in self.text.items()}
        return replace(self, text=text)

    def at(self, time: Tensor) -> Conditions:
        """The conditions at times [] or [B] of the network, without the controls that act on no row."""
        if not self.controls:
            return self
        acting = (control.at(time) for control in self.controls)
        return replace(self, controls=tuple(control for control in acting if bool(control.scale.any())))

    def drop_references(self, dropped: Tensor) -> Conditions:
        """Remove the images of the rows where `dropped` [B] is true."""
        return replace(self, references=drop_references(self.references, dropped))

    def tensors(self) -> list[Tensor]:
        """All tensors, always in the same order."""
        return [
            *self.text.values(),
            *(() if self.guidance is None else (self.guidance,)),
            *self.references,
            *(value for control in self.controls for value in (*control.hints, control.scale)),
        ]

    @staticmethod
    def cat(parts: Sequence[Conditions]) -> Conditions:
        """Concatenate the rows of all parts; all have the same kinds of conditions.

        Rows of a part without controls are not controlled.
        """

        def concatenate(values: Sequence[Tensor | None]) -> Tensor | None:
            present = [value for value in values if value is not None]
            assert len(present) in (0, len(parts)), "a kind of condition in some parts and not in others"
            return torch.cat(present) if present else None

        return Conditions(
            {name: torch.cat([part.text[name] for part in parts]) for name in parts[0].text},
            concatenate([part.guidance for part in parts]),
            tuple(map(torch.cat, zip(*(part.references for part in parts), strict=True))),
            join_controls([(part.controls, len(part)) for part in parts]),
        )

    def _apply(self, change: Callable[[Tensor], Tensor]) -> Conditions:
        """Apply a function to every tensor."""
        return Conditions(
            {name: change(value) for name, value in self.text.items()},
            None if self.guidance is None else change(self.guidance),
            tuple(change(value) for value in self.references),
            tuple(control.apply(change) for control in self.controls),
        )


def drop_references(references: Sequence[Tensor], dropped: Tensor) -> tuple[Tensor, ...]:
    """Reference latents, zero where `dropped` [B] is true, which tells a network that there is no image."""
    return tuple(
        value * send(~dropped, value.device).to(value).reshape(-1, *[1] * (value.ndim - 1))
        for value in references
    )
