"""How well an image obeys a map: agreement of edges, and what the map takes off the loss."""

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
    """Of lines: how many of those that were drawn were asked for, of those asked for drawn, and the harmonic mean."""

    precision: float
    recall: float

    @property
    def f1(self) -> float:
        """0 where nothing agrees … 1."""
        total = self.precision + self.recall
        return 2 * self.precision * self.recall / total if total else 0.0


def agreement(asked: Tensor, drawn: Tensor, *, reach: int = 1) -> Agreement:
    """Of two line maps [H, W], 0 or 1: a line within `reach` pixels of another agrees with it. Empty maps agree."""
    precision = _measure_covered(drawn, asked, reach)
    return Agreement(precision, _measure_covered(asked, drawn, reach))


def _measure_covered(lines: Tensor, by: Tensor, reach: int) -> float:
    """The share of the pixels of `lines` that have one of `by` within reach."""
    near = F.max_pool2d(by.float()[None, None], 2 * reach + 1, 1, reach)[0, 0]
    count = float((lines > 0).sum())
    return float((near * (lines > 0)).sum()) / count if count else 1.0


def edge_agreement(asked: Tensor, picture: Tensor) -> Agreement:
    """Of a line map [3, H, W] and the edges of a picture [3, H, W], both in 0…1."""
    return agreement(asked.amax(0) > 0.5, canny(picture) > 0)


@dataclass(frozen=True)
class HeldOutMaps:
    """Pairs that are not trained on: clean latents [N, C, H, W], maps [N, 3, H, W] in 0…1, and their prompts."""

    clean: Tensor
    maps: Tensor
    conditions: Conditions

    def __len__(self) -> int:
        return len(self.clean)


@torch.no_grad()
def measure_loss(model: Backbone, network: ControlNetwork | None, held: HeldOutMaps, *, seed: int) -> float:
    """The denoising loss over the same pairs, noise and levels each time: under the maps, or for no network without."""
    path, total = model.path, 0.0
    for k in range(LEVELS):
        random = generator(seed, "obedience", k)
        noise = torch.randn(held.clean.shape, generator=random)
        place = (torch.arange(len(held)) + 0.5) / len(held)
        index = ((k + place) / LEVELS * len(path.levels)).long().clamp(max=len(path.levels) - 1)
        level = path.levels[index]
        clean = held.clean.cpu()
        conditions = held.conditions
        if network is not None:
            with model.autocast():
                control = Control.of(network, held.maps.to(model.device))
            conditions = replace(conditions, controls=(control,))
        noisy = add_noise(clean, noise, level).to(model.device)
        wanted = target(clean, noise, level, path.prediction_type).to(model.device)
        total += float(squared_error(model.predict(noisy, index, conditions), wanted, None).mean())
    return total / LEVELS


def mean_agreement(each: Sequence[Agreement]) -> Agreement:
    """The mean of several."""
    return Agreement(
        sum(one.precision for one in each) / len(each), sum(one.recall for one in each) / len(each)
    )
