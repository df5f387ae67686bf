"""How closely an image follows a map: agreement of edges, and how much the map lowers the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control, ControlNetwork
from backbone.diffusion.losses import squared_error
from backbone.diffusion.noise import add_noise, generator, target
from backbone.media.control.maps import canny
from backbone.models.model import Backbone

LEVELS = 4  # noise levels of each held-out pair at which the loss is measured


class Agreement(NamedTuple):
    """Agreement of lines with a map: precision, recall, and their harmonic mean F1."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """Their harmonic mean: 0 if nothing agrees, at most 1."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def measure_agreement(expected: Tensor, actual: Tensor, *, reach: int = 1) -> Agreement:
    """Agreement of two line maps [H, W] of 0 or 1: lines agree within `reach` pixels. Empty maps agree."""
    precision = _measure_covered(actual, expected, reach)
    return Agreement(precision, _measure_covered(expected, actual, reach))


def _measure_covered(lines: Tensor, others: Tensor, reach: int) -> float:
    """The share of the pixels of `lines` that have one of `others` within reach."""
    covered = F.max_pool2d(others.float()[None, None], 2 * reach + 1, 1, reach)[0, 0]
    count = float((lines > 0).sum())
    return float((covered * (lines > 0)).sum()) / count if count else 1.0


def measure_edge_agreement(expected: Tensor, picture: Tensor) -> Agreement:
    """Agreement of a line map [3, H, W] with the edges of a picture [3, H, W], both in 0…1."""
    return measure_agreement(expected.amax(0) > 0.5, canny(picture) > 0)


@dataclass(frozen=True)
class HeldOutMaps:
    """Held-out pairs: clean latents [N, C, H, W], maps [N, 3, H, W] in 0…1, and their prompts."""

    clean: Tensor
    maps: Tensor
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.clean)


@torch.no_grad()
def measure_loss(
    model: Backbone, network: ControlNetwork | None, held_out: HeldOutMaps, *, seed: int
) -> float:
    """The denoising loss, always over the same pairs, noise and levels: under the maps, or without for no network."""
    path, total = model.path, 0.0
    for k in range(LEVELS):
        random = generator(seed, "obedience", k)
        noise = torch.randn(held_out.clean.shape, generator=random)
        place = (torch.arange(len(held_out)) + 0.5) / len(held_out)
        index = ((k + place) / LEVELS * len(path.levels)).long().clamp(max=len(path.levels) - 1)
        level = path.levels[index]
        clean = held_out.clean.cpu()
        conditions = held_out.conditions
        if network is not None:
            with model.autocast():
                control = Control.of(network, held_out.maps.to(model.device))
            conditions = replace(conditions, controls=(control,))
        noisy = add_noise(clean, noise, level).to(model.device)
        targets = target(clean, noise, level, path.prediction_type).to(model.device)
        total += float(squared_error(model.predict(noisy, index, conditions), targets, None).mean())
    return total / LEVELS


def average_agreements(agreements: Sequence[Agreement]) -> Agreement:
    """The mean of several."""
    return Agreement(
        sum(agreement.precision for agreement in agreements) / len(agreements),
        sum(agreement.recall for agreement in agreements) / len(agreements),
    )
