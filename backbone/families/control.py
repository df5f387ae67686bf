"""Control networks of every family: what they add inside the denoiser, and the protocol by which a family has some.

A ControlNet is called at every step for every controlled row, with the arguments of the denoiser's own call; its
output is scaled by row and summed over all networks. It is never called for rows at scale 0, so they are the base's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from backbone.conditions.control import Control, ControlNetwork, Residuals
from backbone.diffusion.transfer import send
from backbone.io.console import UserError
from backbone.io.files import Header

OF_NO_ROW = ("txt_ids", "img_ids")  # arguments of a denoiser that all rows share


@runtime_checkable
class ControlledFamily(Protocol):
    """A family whose denoiser can be controlled."""

    control_classes: ClassVar[tuple[Any, ...]]  # diffusers' classes of its control networks

    def control_network(
        self, module: nn.Module, denoiser: nn.Module, encode: Callable[..., Tensor]
    ) -> ControlNetwork:
        """Wrap a loaded module of one of those classes as a control network of this denoiser.

        `encode(pictures, shifted=…)` makes latents [B, C, H, W] of pictures [B, 3, 8H, 8W] in −1…1, with the
        autoencoder's shift or without. Raises `UserError` for a module that was made for another denoiser.
        """
        ...


@runtime_checkable
class FilesFamily(Protocol):
    """A controlled family whose networks are also read from one file."""

    def load_control_file(self, header: Header, denoiser: nn.Module, dtype: torch.dtype) -> nn.Module:
        """The network in a file, for this denoiser; `UserError` for one that was made for another."""
        ...


def made_for_another_model(words: str, actual: Any, expected: Any) -> UserError:
    """The error for a control network of another denoiser; the caller adds its name and a remedy."""
    actual_text, expected_text = (
        ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for value in (actual, expected)
    )
    return UserError(
        f"was made for another model: its {words} is {actual_text}, and this model has {expected_text}"
    )


def sum_residuals(controls: Sequence[Control], inputs: Mapping[str, Any], dtype: torch.dtype) -> Residuals:
    """Sum what all controls add in one call of the denoiser with the arguments `inputs`; {} without controls."""
    total: Residuals = {}
    for control in controls:
        rows = control.scale.nonzero().flatten()
        if not len(rows):
            continue
        selected = control if len(rows) == len(control) else control.rows(rows)
        residuals = control.network.residuals(
            selected.hints, _select_rows(inputs, rows, len(control)), guess=control.guess
        )
        for name, parts in residuals.items():
            all_rows = [
                _place_rows(_scale_rows(part, selected.scale).to(dtype), rows, len(control)) for part in parts
            ]
            previous = total.get(name)
            total[name] = (
                all_rows if previous is None else [a + b for a, b in zip(previous, all_rows, strict=True)]
            )
    return total


def _select_rows(inputs: Mapping[str, Any], rows: Tensor, count: int) -> dict[str, Any]:
    """The arguments of a call for some of its `count` rows."""
    if len(rows) == count:
        return dict(inputs)

    def select(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: select(key, item) for key, item in value.items()}
        if not isinstance(value, Tensor) or value.ndim == 0 or name in OF_NO_ROW:
            return value
        return value[send(rows, value.device)]

    return {name: select(name, value) for name, value in inputs.items()}


def _scale_rows(part: Tensor, scale: Tensor) -> Tensor:
    """Residuals [B, …] times one scale a row [B]; the scale is in CPU memory, so nothing waits for it."""
    first = float(scale[0])
    if bool((scale == first).all()):
        return part if first == 1 else part * first
    return part * send(scale, part.device).to(part.dtype).reshape(-1, *[1] * (part.ndim - 1))


def _place_rows(part: Tensor, rows: Tensor, count: int) -> Tensor:
    """Residuals of some rows among zeros for the others."""
    if len(rows) == count:
        return part
    return part.new_zeros(count, *part.shape[1:]).index_copy(0, send(rows, part.device), part)
