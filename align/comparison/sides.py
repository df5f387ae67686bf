"""The two sides of a comparison, the files of their images, and the win rate between them."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from align.pairs.records import SCORES, Scores
from align.settings import is_preference_run, read_settings
from backbone.adapters.concept import BEST, is_run, read_concept
from backbone.cli.sampling import SamplingSettings
from backbone.evaluation.statistics import Interval
from backbone.io.console import UserError, notify
from backbone.io.files import read_json
from backbone.io.run_folder import CONCEPT_FILE
from backbone.models.locate import locate

BASE = "base"


@dataclass(frozen=True)
class Side:
    """A model with concepts applied at a LoRA scale.

    `guidance` and its interval `guided` override those of the comparison, since training can shift the best ones.
    """

    name: str
    model: str
    concepts: tuple[Path, ...] = ()
    scale: float = 1.0
    guidance: float | None = None
    guided: tuple[float | None, float | None] = (None, None)

    def override(self, sampling: SamplingSettings) -> SamplingSettings:
        """The comparison's sampling settings with this side's guidance."""
        guidance = sampling.guidance if self.guidance is None else self.guidance
        start, stop = self.guided
        start = sampling.guidance_start if start is None else start
        stop = sampling.guidance_stop if stop is None else stop
        return dataclasses.replace(sampling, guidance=guidance, guidance_start=start, guidance_stop=stop)

    @classmethod
    def from_name(cls, name: str, model: str | None = None) -> Side:
        """A side from any run folder (with the model and concepts that it was trained on), or from a model's name.

        `model` is the one that a run was trained from, if that has moved.

        Raises `UserError` for names that are neither, and for a run that is not finished.
        """
        folder = Path(name).expanduser()
        if not is_run(folder):
            try:
                locate(name)
            except UserError as error:
                raise UserError(f"{error} It is no run folder either.") from error
            return cls(name, name)
        concept = read_concept(folder)
        if (folder / BEST / CONCEPT_FILE).is_file():
            notify(
                f"{name}: its weights after the last step are compared; its best checkpoint is {folder / BEST}."
            )
        trained_on = read_settings(folder).concepts if is_preference_run(folder) else ()
        return cls(name, model or concept.model, (*map(Path, trained_on), folder))


def make_sides(base: str, tuned: str, model: str | None = None) -> tuple[Side, Side]:
    """The sides of these names (`Side.from_name`); `model` is the one that their runs were trained from.

    Raises `UserError` for a `model` if neither is a run.
    """
    sides = Side.from_name(base, model), Side.from_name(tuned, model)
    if model is not None and not any(side.concepts for side in sides):
        raise UserError("--model has no effect where two models are compared and no run. Leave it out.")
    return sides


@dataclass(frozen=True)
class WinRate:
    """Share of images that the tuned model won by one scorer, ties counted half, with the counts behind it."""

    rate: Interval
    wins: int
    ties: int
    losses: int
    gain: Interval  # mean difference of scores, bootstrapped over prompts

    def as_json(self) -> dict[str, Any]:
        """For compare.json."""
        return {**dataclasses.asdict(self), "rate": self.rate._asdict(), "gain": self.gain._asdict()}


def find_training_scorers(side: Side) -> set[str]:
    """Names of the scorers that ranked a run's training data, according to its records."""
    if not side.concepts or not is_preference_run(side.concepts[-1]):
        return set()
    settings = read_settings(side.concepts[-1])
    scores = (
        Path(settings.pairs).parent / SCORES
        if Path(settings.pairs).is_file()
        else Path(settings.pairs) / SCORES
    )
    ranked = read_json(scores, Scores).scorers if settings.pairs and scores.is_file() else []
    return {settings.online, *ranked} - {""}


def side_image_name(side: str, i: int, j: int) -> str:
    """Path of a side's sample j of prompt i, relative to the comparison's folder."""
    return f"{side}/p{i:05d}-s{j:02d}.png"


def tuned_side_name(scale: float) -> str:
    """Name of the tuned side at a LoRA scale, in the results and of its folder."""
    return "tuned" if scale == 1 else f"tuned-{scale:g}"
