"""How well a model in training distinguishes preferred images from others, at fixed noise samples.

A record counts as right at a draw where the model's error moved, from the reference's, towards the preference: for a
pair where its margin is positive (the implicit reward's accuracy), for a single picture where its error fell if it is
good and rose if it is bad; no change counts ½. The samples are the same at every evaluation, so that curves are
comparable, and each record has one in every stratum of the noise path.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from align.objectives.dataset import Items, NoiseSamples, PreferenceData, make_batch, mean_squares, residuals
from align.objectives.losses import accuracy
from align.objectives.reference import LiveReference
from align.settings import Settings
from backbone.evaluation.statistics import Interval, interval_of_clusters
from backbone.io.progress import progress
from backbone.models.model import Backbone

QUARTILES = 4


@dataclass(frozen=True)
class Figures:
    """The figures of an evaluation. Errors are relative to the mean of the reference's.

    accuracy         with a 95 % bootstrap interval over records
    by_level         accuracy in each quarter of the noise path, clean to noisy; NaN where no draw fell
    winner_change    (m − r)/mean r over preferred pictures: positive where they have become less likely
    loser_change     the same over the others
    records, draws   the number of records, and of draws of each
    """

    accuracy: Interval
    by_level: tuple[float, ...]
    winner_change: float
    loser_change: float
    records: int
    draws: int

    def as_json(self) -> dict[str, Any]:
        """For summary.json and the log."""
        return {**asdict(self), "accuracy": self.accuracy._asdict()}


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Fixed records at fixed samples, with the reference's errors there [N, E, G]."""

    model: Backbone
    data: PreferenceData
    items: Items
    samples: NoiseSamples
    reference: Tensor
    batch: int

    def __call__(self, network: nn.Module) -> Figures:
        """The figures of a network."""
        return figures(self.items, self.samples, self.errors(network), self.reference)

    def errors(self, network: nn.Module) -> Tensor:
        """A network's errors at the noise samples [N, E, G]."""
        return compute_errors_at(self.model, self.data, self.items, self.samples, network, self.batch)


def make_evaluation(
    model: Backbone,
    data: PreferenceData,
    items: Items,
    live: LiveReference,
    settings: Settings,
    name: str,
) -> Evaluation:
    """Make an evaluation of these records. It runs the reference, so call it while that is available."""
    samples = NoiseSamples(name, settings.seed, settings.evaluation_draws, len(model.path.levels))
    batch = max(1, settings.micro_batch or settings.batch)
    with torch.no_grad(), live.as_reference():
        reference = compute_errors_at(model, data, items, samples, live.network, batch)
    return Evaluation(model, data, items, samples, reference, batch)


def figures(items: Items, samples: NoiseSamples, errors: Tensor, reference: Tensor) -> Figures:
    """The figures of errors and the reference's, both [N, E, G]; ties (preference ½) are not judged."""
    has_preference = items.judged
    is_correct = correctness(items, errors, reference)

    # Accuracy by quarter of the noise levels
    levels = [samples.find_levels(items, [k] * len(items)) for k in range(errors.shape[1])]
    level = torch.stack(levels, dim=1) if levels else torch.empty(len(items), 0)
    quarter = (level * QUARTILES // samples.levels).clamp(max=QUARTILES - 1)

    # Changes of the errors, relative to the reference's mean error
    winner, loser = _split_sides(items, errors - reference)
    scale = float(reference.mean()) if reference.numel() else 1.0
    return Figures(
        accuracy=interval_of_clusters(is_correct[has_preference].tolist()),
        by_level=tuple(
            _mean(is_correct[has_preference][quarter[has_preference] == q]) for q in range(QUARTILES)
        ),
        winner_change=_mean(winner) / scale,
        loser_change=_mean(loser) / scale,
        records=len(has_preference),
        draws=errors.shape[1],
    )


def correctness(items: Items, errors: Tensor, reference: Tensor) -> Tensor:
    """1, ½ or 0 for each record and draw [N, E]."""
    reward = reference - errors
    sign = (2 * items.preference - 1)[:, None]
    margin = reward[..., 0] - reward[..., 1] if errors.shape[2] == 2 else reward[..., 0]
    return accuracy((sign * margin).flatten()).view(margin.shape)


def compute_errors_at(
    model: Backbone,
    data: PreferenceData,
    items: Items,
    samples: NoiseSamples,
    network: nn.Module,
    batch: int,
    ks: Sequence[int] | None = None,
) -> Tensor:
    """A network's errors at noise samples `ks` (all if left out) of each record, float32 on the CPU [N, E, G]."""
    ks = range(samples.count) if ks is None else ks
    indices = [(row, k) for row in range(len(items)) for k in ks]
    parts = []
    with progress(len(indices), "evaluating", brief=True) as bar:
        for first in range(0, len(indices), batch):
            rows, numbers = zip(*indices[first : first + batch], strict=True)
            noised = make_batch(model, data, samples, items[list(rows)], numbers)
            parts.append(mean_squares(residuals(model, network, noised)).T.cpu())
            bar.advance(len(rows))
    shape = len(items), len(ks), items.group
    return torch.cat(parts).view(shape) if parts else torch.empty(shape)


def _split_sides(items: Items, change: Tensor) -> tuple[Tensor, Tensor]:
    """The changes of preferred pictures and of the others."""
    if change.shape[2] == 2:
        return change[items.judged][..., 0], change[items.judged][..., 1]
    good = items.preference > 0.5
    return change[good], change[~good]


def _mean(values: Tensor) -> float:
    return float(values.mean()) if values.numel() else float("nan")
