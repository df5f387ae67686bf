"""How well a concept was learned: likeness to the subject, obedience to prompts, what became of the class, variety.

The four figures of Ruiz et al. 2023 (§ 4) by a CLIP scorer: CLIP-I with the subject's pictures, CLIP-T with the
prompts, PRES (likeness of the class's pictures to the subject; lower is better) and DIV (variety among pictures of one
prompt). While a concept trains they are taken from fixed noise and fixed prompts, together with the denoising loss at
fixed noise and levels, and the checkpoint with the best `rating` is kept. Likeness can be measured by another model
than obedience: a DINO, which reads no text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from backbone.adapters.concept import Concept, spoken
from backbone.evaluation.clip import (
    Eye,
    Scorer,
    clip_i,
    diversity,
    load_eye,
    load_scorer,
    prior_drift,
    text_scores,
)
from backbone.evaluation.statistics import interval
from backbone.io.console import UserError
from backbone.media.pictures import Picture
from backbone.media.transforms import square
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from customize.settings import Settings

VALIDATION_PROMPTS = (
    "a {} in the snow",
    "a {} at night",
    "a {} on the beach",
    "a {} in the city",
)
SAMPLING_STEPS = 12  # of the sampler: what the figures say is settled by then


@dataclass(frozen=True)
class Scorers:
    """What measures likeness, and what measures obedience: the same one where it reads text, or none."""

    image_encoder: Scorer | Eye
    clip: Scorer | None

    @classmethod
    def load(cls, named: str | Path | None, own: Path | None) -> Scorers | None:
        """From the folder that was named, and the model's own; None where there is neither."""
        folder = named or own
        if folder is None:
            return None
        eye = load_eye(folder)
        if isinstance(eye, Scorer):
            return cls(eye, eye)
        return cls(eye, None if own is None else load_scorer(own))

    def embed_for_prompts(self, pictures: Sequence[Image], seen: Tensor) -> Tensor:
        """The reader's vectors [B, D] of pictures of which the eye's are known."""
        assert self.clip is not None
        return seen if self.clip is self.image_encoder else self.clip.embed_images(pictures)


@dataclass(frozen=True)
class ConceptMetrics:
    """One evaluation. The likenesses are cosines of the scorer; the loss is a mean over fixed draws."""

    step: int
    subject_fidelity: float  # CLIP-I or DINO with the subject's pictures
    prompt_fidelity: float  # CLIP-T with the prompts, the token read as the class
    prior_preservation: float  # PRES: the class's pictures and the subject's, lower is better
    diversity: float  # DIV among the class's pictures
    loss: float
    rating: float


class Evaluator:
    """Measures a model in training, always on the same noise, prompts and draws."""

    def __init__(
        self,
        model: Backbone,
        scorers: Scorers,
        concept: Concept,
        settings: Settings,
        pictures: Sequence[Picture],
    ) -> None:
        self.model, self.scorers, self.settings = model, scorers, settings
        noun = settings.class_noun
        self.subject_requests = [
            Request(spoken(p.format(settings.called()), [concept]), (i, 0))
            for i, p in enumerate(VALIDATION_PROMPTS)
        ]
        plain = settings.subjects()[0].filled(settings.class_prompt)
        self.class_requests = [
            Request(plain, (len(VALIDATION_PROMPTS), j)) for j in range(len(VALIDATION_PROMPTS))
        ]
        side = model.resolution
        self.subject = scorers.image_encoder.embed_images(
            [square(picture.open(), side) for picture in pictures]
        )
        self.texts = self.clip.embed_texts([prompt.format(noun) for prompt in VALIDATION_PROMPTS])
        self.baseline: ConceptMetrics | None = None

    @property
    def clip(self) -> Scorer:
        """What measures obedience; `UserError` where nothing here reads."""
        if self.scorers.clip is None:
            raise UserError(
                "The scorer that was named reads no text, and the model has none of its own, so that nothing says "
                "whether prompts are obeyed. Name a CLIP folder with --scorer, or train with --evaluate-every 0."
            )
        return self.scorers.clip

    def measure(self, step: int, loss: float) -> tuple[ConceptMetrics, list[Image]]:
        """The figures now, and the pictures that they come from: one for each prompt, then the class.

        The first call measures where the model starts from, which `rating` is relative to.
        """
        drawn = list(
            sample(
                self.model,
                [*self.subject_requests, *self.class_requests],
                steps=SAMPLING_STEPS,
                guidance=self.settings.guidance,
                seed=self.settings.seed,
            )
        )
        vectors = self.scorers.image_encoder.embed_images(drawn)
        asked, plain = vectors[: len(self.subject_requests)], vectors[len(self.subject_requests) :]
        read = self.scorers.embed_for_prompts(drawn[: len(self.subject_requests)], asked)
        found = ConceptMetrics(
            step=step,
            subject_fidelity=clip_i(asked, self.subject),
            prompt_fidelity=float(text_scores(read, self.texts).mean()),
            prior_preservation=prior_drift(plain, self.subject),
            diversity=diversity(plain),
            loss=loss,
            rating=0.0,
        )
        self.baseline = self.baseline or found
        return self.with_rating(found), drawn

    def with_rating(self, figures: ConceptMetrics) -> ConceptMetrics:
        """The same with its rating: see `rating`."""
        assert self.baseline is not None
        most = mean_similarity(self.subject)
        value = rate_checkpoint(figures, start=self.baseline, most=most)
        return replace(figures, rating=value)


def rate_checkpoint(figures: ConceptMetrics, *, start: ConceptMetrics, most: float) -> float:
    """The one number that chooses the best checkpoint, the harmonic mean of two shares:

    how far the likeness has come from where it started to that of the subject's pictures among themselves, and how much
    of the obedience to prompts is left. 0 before training; 1 for a subject that is met and prompts followed as before.
    """
    gain = (figures.subject_fidelity - start.subject_fidelity) / max(most - start.subject_fidelity, 1e-3)
    kept = figures.prompt_fidelity / max(start.prompt_fidelity, 1e-3)
    gain, kept = min(max(gain, 0.0), 1.0), min(max(kept, 0.0), 1.0)
    return 0.0 if gain + kept == 0 else 2 * gain * kept / (gain + kept)


def mean_similarity(vectors: Tensor) -> float:
    """The mean cosine among different pictures [R, D]; 1 for one picture."""
    count = len(vectors)
    if count < 2:
        return 1.0
    return float(((vectors @ vectors.T).sum() - count) / (count * (count - 1)))


class EarlyStopping:
    """Says when to stop: after so many evaluations without a better rating."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.history: list[ConceptMetrics] = []

    @property
    def best(self) -> ConceptMetrics:
        """The evaluation with the highest rating, the earlier one of equals; the start only while it is alone."""
        trained = [figures for figures in self.history if figures.step] or self.history
        return max(trained, key=lambda figures: (figures.rating, -figures.step))

    def update(self, figures: ConceptMetrics) -> bool:
        """Takes an evaluation; whether it is the best so far."""
        self.history.append(figures)
        return self.best is figures

    @property
    def should_stop(self) -> bool:
        """Whether it no longer improves."""
        return len(self.history) - 1 - self.history.index(self.best) >= self.patience


Draw = Callable[[Sequence[Request]], list[Image]]


def measure_dreambench(
    scorers: Scorers, subject: Tensor, pictures: Sequence[Image], texts: Sequence[str], *, per_prompt: int
) -> dict[str, Any]:
    """The figures of the DreamBench protocol: pictures in the order of prompts, `per_prompt` of each.

    `subject` holds the eye's vectors of the real pictures [R, D]; `texts` are the prompts with the class alone.
    Intervals are over prompts, whose pictures belong together. Without a reader there is no CLIP-T.
    """
    vectors = scorers.image_encoder.embed_images(list(pictures))
    groups = vectors.unflatten(0, (len(texts), per_prompt))
    found: dict[str, Any] = {
        scorers.image_encoder.likeness: interval([clip_i(group, subject) for group in groups])
    }
    if scorers.clip is not None:
        read = scorers.embed_for_prompts(list(pictures), vectors).unflatten(0, (len(texts), per_prompt))
        wanted = scorers.clip.embed_texts(list(texts))
        obedience = [float((group @ text).mean()) for group, text in zip(read, wanted, strict=True)]
        found["CLIP-T"] = interval(obedience)
    if per_prompt > 1:
        found["DIV"] = interval([diversity(group) for group in groups])
    return found
