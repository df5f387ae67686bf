"""The two sides of a comparison, and how their wins are counted."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.collect.sample import SamplingSettings
from align.pairs.records import SCORES
from align.settings import read_settings
from backbone.adapters.concept import read_concept
from backbone.evaluation.statistics import Interval
from backbone.io.files import read_json

EVALUATIONS = "evaluations.jsonl"  # of a run of align train


BASE = "base"


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a model, with concepts on it, so many times as strong.

    `guidance` and `guided`, the share of the steps that follow it, are this side's own where they are not the
    drawing's: training can move the best ones.
    """

    name: str
    model: str
    concepts: tuple[Path, ...] = ()
    scale: float = 1.0
    guidance: float | None = None
    guided: tuple[float, float] | None = None

    def override(self, sampling: SamplingSettings) -> SamplingSettings:
        """How this side is drawn."""
        guidance = sampling.guidance if self.guidance is None else self.guidance
        start, stop = self.guided or sampling.guided
        return dataclasses.replace(sampling, guidance=guidance, guidance_start=start, guidance_stop=stop)

    @classmethod
    def from_name(cls, name: str, model: str | None = None) -> Side:
        """A run folder (with the model, and the concepts, that it was trained on), or a model's name."""
        folder = Path(name)
        if not (folder / "concept.json").is_file():
            return cls(name, name)
        below = read_settings(folder).concepts if (folder / EVALUATIONS).is_file() else ()
        return cls(name, model or read_concept(folder).model, (*map(Path, below), folder))


@dataclass(frozen=True)
class WinRate:
    """What a judge said of n pairs of pictures: the share that the tuned model won, ties counted half."""

    rate: Interval
    wins: int
    ties: int
    losses: int
    gain: Interval  # mean difference of scores, over prompts

    def as_json(self) -> dict[str, Any]:
        """For compare.json."""
        return {**dataclasses.asdict(self), "rate": self.rate._asdict(), "gain": self.gain._asdict()}


def find_training_scorers(side: Side) -> set[str]:
    """The scorers that chose what a run was trained on, as far as its records say."""
    if not side.concepts or not (side.concepts[-1] / EVALUATIONS).is_file():
        return set()
    settings = read_settings(side.concepts[-1])
    scores = (
        Path(settings.pairs).parent / SCORES
        if Path(settings.pairs).is_file()
        else Path(settings.pairs) / SCORES
    )
    ranked = read_json(scores).get("scorers", []) if settings.pairs and scores.is_file() else []
    return {settings.online, *ranked} - {""}


def side_image_name(side: str, i: int, j: int) -> str:
    """The file of a side's sample j of prompt i, relative to the folder."""
    return f"{side}/p{i:05d}-s{j:02d}.png"


def tuned_side_name(scale: float) -> str:
    """The folder of the tuned side at a strength, and its name in the results."""
    return "tuned" if scale == 1 else f"tuned-{scale:g}"
