"""How well a concept was learned: subject fidelity, prompt fidelity, prior preservation, diversity.

The four metrics of Ruiz et al. 2023 (§ 4): CLIP-I with the subject's images, CLIP-T with the prompts, PRES (similarity
of the class's images to the subject; lower is better) and DIV (diversity among images of one prompt). Validation
during training uses the same noise and prompts every time, and the checkpoint with the best `rating` is kept. Subject
fidelity may be measured by DINO, which reads no text, and prompt fidelity by CLIP.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Generic, Protocol, TypeVar

from PIL.Image import Image
from torch import Tensor

from backbone.adapters.concept import BEST, Concept, resolve_placeholder_tokens
from backbone.distributed.processes import is_sharded
from backbone.evaluation.clip import (
    Scorer,
    VisionEncoder,
    clip_i,
    diversity,
    load_image_encoder,
    load_scorer,
    prior_drift,
    prompt_precision,
    text_scores,
)
from backbone.evaluation.statistics import bootstrap_mean
from backbone.io.console import UserError
from backbone.io.progress import progress
from backbone.io.run_folder import CONCEPT_FILE
from backbone.models.few_step.model import SamplingDefaults, get_sampling_defaults
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from customize.settings import Settings

VALIDATION_PROMPTS = (
    "a {} in the snow",
    "a {} at night",
    "a {} on the beach",
    "a {} in the city",
)
SAMPLING_STEPS = 12  # more steps do not change the ranking of checkpoints
# Student's t exceeded by chance in 5 % of cases, for 1, 2 … degrees of freedom; the last one for all more
STUDENT = (6.31, 2.92, 2.35, 2.13, 2.02, 1.94, 1.89, 1.86, 1.83, 1.81, 1.80, 1.78, 1.77, 1.76, 1.75)


@dataclass(frozen=True)
class Scorers:
    """The image encoder for subject fidelity, and the CLIP for prompt fidelity: the same model, another, or None."""

    image_encoder: Scorer | VisionEncoder
    clip: Scorer | None

    @classmethod
    def load(cls, path: str | Path | None, default: Path | None) -> Scorers | None:
        """Load the scorer that the user chose, and for prompts the model's own; None if there is neither."""
        folder = path or default
        if folder is None:
            return None
        encoder = load_image_encoder(folder)
        if isinstance(encoder, Scorer):
            return cls(encoder, encoder)
        return cls(encoder, None if default is None else load_scorer(default))

    def embed_for_prompts(self, images: Sequence[Image], vectors: Tensor) -> Tensor:
        """CLIP's vectors [B, D] of images; `vectors` are the image encoder's, reused if that is the same model."""
        assert self.clip is not None
        return vectors if self.clip is self.image_encoder else self.clip.embed_images(images)


@dataclass(frozen=True)
class ConceptMetrics:
    """Metrics of one validation: cosine similarities, and the denoising loss over fixed noise and levels."""

    step: int
    subject_fidelity: float  # CLIP-I or DINO with the subject's images
    prompt_fidelity: float  # CLIP-T with the prompts, the token replaced by the class
    prior_preservation: float  # PRES: the class's images with the subject's, lower is better
    diversity: float  # DIV among the class's images
    loss: float
    rating: float
    ratings: tuple[float, ...] = ()  # each prompt's contribution to the rating (`compute_pseudo_ratings`)
    prompt_precision: float = 1.0  # CLIP's probability of an image's own prompt among all; 1 in older logs


class Evaluator:
    """Validates a model in training, always on the same noise and prompts.

    `images` are the subject's own, cropped; `drawing` are the sampling settings, by default the run's with fewer steps.
    """

    def __init__(
        self,
        model: Backbone,
        scorers: Scorers,
        concept: Concept,
        settings: Settings,
        images: Sequence[Image],
        drawing: SamplingDefaults | None = None,
    ) -> None:
        self.model, self.scorers, self.settings = model, scorers, settings
        self.drawing = drawing or get_sampling_defaults(
            model, steps=SAMPLING_STEPS, guidance=settings.guidance
        )
        noun = settings.class_noun
        self.subject_requests = [
            Request(
                resolve_placeholder_tokens(p.format(settings.name_in_prompt()), [concept], runs=None), (i, 0)
            )
            for i, p in enumerate(VALIDATION_PROMPTS)
        ]
        plain = settings.subjects()[0].fill(settings.class_prompt)
        self.class_requests = [
            Request(plain, (len(VALIDATION_PROMPTS), j)) for j in range(len(VALIDATION_PROMPTS))
        ]
        self.subject = scorers.image_encoder.embed_images(list(images))
        self.texts = self.clip.embed_texts([prompt.format(noun) for prompt in VALIDATION_PROMPTS])
        self.baseline: ConceptMetrics | None = None

    @property
    def clip(self) -> Scorer:
        """The CLIP that measures prompt fidelity; `UserError` if no scorer reads text."""
        if self.scorers.clip is None:
            raise UserError(
                "The scorer that was named reads no text, and the model has none of its own, so prompt fidelity cannot "
                "be measured. Name a CLIP folder with --scorer, or train with --evaluation-steps 0."
            )
        return self.scorers.clip

    def measure(self, step: int, loss: float) -> tuple[ConceptMetrics, list[Image]]:
        """Metrics of the current model, and its samples: one for each prompt, then the class's.

        The first call is the baseline that later ratings are relative to.
        """
        requests = [*self.subject_requests, *self.class_requests]
        with progress(len(requests), f"evaluating step {step}", brief=True) as bar:
            images = list(
                sample(
                    self.model,
                    requests,
                    **asdict(self.drawing),
                    seed=self.settings.seed,
                    advance=bar.advance_images,
                )
            )
        count = len(self.subject_requests)
        vectors = self.scorers.image_encoder.embed_images(images)
        subject_vectors, class_vectors = vectors[:count], vectors[count:]
        prompt_vectors = self.scorers.embed_for_prompts(images[:count], subject_vectors)
        subject_scores = [clip_i(vector, self.subject) for vector in subject_vectors.split(1)]
        precisions = prompt_precision(prompt_vectors, self.texts, logit_scale=self.clip.logit_scale).tolist()
        metrics = ConceptMetrics(
            step=step,
            subject_fidelity=mean(subject_scores),
            prompt_fidelity=float(text_scores(prompt_vectors, self.texts).mean()),
            prior_preservation=prior_drift(class_vectors, self.subject),
            diversity=diversity(class_vectors),
            loss=loss,
            rating=0.0,
            prompt_precision=mean(precisions),
        )
        self.baseline = self.baseline or metrics
        return self.with_rating(metrics, subject_scores, precisions), images

    def with_rating(
        self, metrics: ConceptMetrics, subject_scores: Sequence[float], precisions: Sequence[float]
    ) -> ConceptMetrics:
        """The same metrics with their rating (`rate_checkpoint`), from each image's fidelity and precision."""
        assert self.baseline is not None
        baseline, ceiling = self.baseline, mean_similarity(self.subject)

        def rate(rows: Sequence[int]) -> float:
            rated = replace(
                metrics,
                subject_fidelity=mean(subject_scores[row] for row in rows),
                prompt_precision=mean(precisions[row] for row in rows),
            )
            return rate_checkpoint(rated, baseline=baseline, ceiling=ceiling)

        return replace(
            metrics,
            rating=rate(range(len(subject_scores))),
            ratings=compute_pseudo_ratings(rate, len(subject_scores)),
        )


def rate_checkpoint(metrics: ConceptMetrics, *, baseline: ConceptMetrics, ceiling: float) -> float:
    """Harmonic mean, 0…1, of two shares, by which checkpoints are compared (`EarlyStopping.best`).

    gain            subject fidelity between the untrained model's (0) and that of the subject's images among
                    themselves (1)
    precision_kept  prompt precision relative to the untrained model's. Not CLIP-T, which falls for every subject that
                    is not an average one of its class, so that the images most like the subject would score worst
    """
    gain = (metrics.subject_fidelity - baseline.subject_fidelity) / max(
        ceiling - baseline.subject_fidelity, 1e-3
    )
    precision_kept = metrics.prompt_precision / max(baseline.prompt_precision, 1e-3)
    gain, precision_kept = min(max(gain, 0.0), 1.0), min(max(precision_kept, 0.0), 1.0)
    return 0.0 if gain + precision_kept == 0 else 2 * gain * precision_kept / (gain + precision_kept)


def compute_pseudo_ratings(rate: Callable[[Sequence[int]], float], count: int) -> tuple[float, ...]:
    """The jackknife's pseudo-values of a rating of `count` images (Efron & Tibshirani 1993, ch. 11), one for each.

    `rate` gives the rating of some of the images. Nothing for fewer than two.
    """
    if count < 2:
        return ()
    rows = range(count)
    rating = rate(rows)
    return tuple(
        count * rating - (count - 1) * rate([row for row in rows if row != left_out]) for left_out in rows
    )


def is_within_noise(lower: Sequence[float], higher: Sequence[float]) -> bool:
    """Whether one rating is not below another with 95 % certainty, by Student's t of their paired differences.

    Both are given for the same prompts or pairs, in one order; without them, or for a single one, the noise is unknown.
    """
    if len(lower) < 2 or len(lower) != len(higher):
        return False
    differences = [h - low for low, h in zip(lower, higher, strict=True)]
    certain = STUDENT[min(len(differences) - 1, len(STUDENT)) - 1]
    return mean(differences) <= certain * stdev(differences) / math.sqrt(len(differences))


def mean_similarity(vectors: Tensor) -> float:
    """Mean cosine between different rows of unit vectors [R, D]; 1 for a single row."""
    count = len(vectors)
    if count < 2:
        return 1.0
    return float(((vectors @ vectors.T).sum() - count) / (count * (count - 1)))


class Rated(Protocol):
    """Metrics of one validation, of any objective."""

    @property
    def step(self) -> int: ...
    @property
    def rating(self) -> float: ...
    @property
    def ratings(self) -> Sequence[float]: ...


Measured = TypeVar("Measured", bound=Rated)


class EarlyStopping(Generic[Measured]):
    """Stops training after `patience` validations without a better rating."""

    def __init__(self, patience: int) -> None:
        self.patience = patience
        self.history: list[Measured] = []

    @property
    def best(self) -> Measured:
        """The latest metrics that the highest rating does not beat by more than noise (`is_within_noise`).

        With a handful of images the highest of several ratings is often an early one by chance. As in the
        one-standard-error rule (Breiman et al. 1984) a later checkpoint is preferred, here unless another one is better
        with 95 % certainty, since four images exceed one standard error in a fifth of all cases by chance. The
        untrained model's metrics are returned only while there are no others.
        """
        top = self.highest
        later = [
            metrics
            for metrics in self.history
            if metrics.step > top.step and is_within_noise(metrics.ratings, top.ratings)
        ]
        return max(later, key=lambda metrics: metrics.step, default=top)

    @property
    def highest(self) -> Measured:
        """Metrics with the highest rating, the earliest of equals."""
        trained = [metrics for metrics in self.history if metrics.step] or self.history
        return max(trained, key=lambda metrics: (metrics.rating, -metrics.step))

    def find_earlier_best(self, run: Path, done: int) -> int | None:
        """The step of a run's `best/`, if it is earlier than its last step, `done`.

        None without one, and for a sharded model, whose weights are not read back.
        """
        if not self.history or is_sharded() or not (run / BEST / CONCEPT_FILE).exists():
            return None
        return self.best.step if self.best.step < done else None

    def update(self, metrics: Measured) -> bool:
        """Add a validation; returns whether it is the best so far."""
        self.history.append(metrics)
        return self.best is metrics

    @property
    def should_stop(self) -> bool:
        """Whether the last `patience` validations brought no better rating."""
        return len(self.history) - 1 - self.history.index(self.highest) >= self.patience


def measure_dreambench(
    scorers: Scorers, subject: Tensor, images: Sequence[Image], texts: Sequence[str], *, per_prompt: int
) -> dict[str, Any]:
    """DreamBench metrics by name, each with a bootstrap interval over prompts; arguments as `score_prompts`."""
    values = score_prompts(scorers, subject, images, texts, per_prompt=per_prompt)
    return {name: bootstrap_mean(each) for name, each in values.items()}


def score_prompts(
    scorers: Scorers, subject: Tensor, images: Sequence[Image], texts: Sequence[str], *, per_prompt: int
) -> dict[str, list[float]]:
    """DreamBench metrics by name (CLIP-I or DINO, CLIP-T, DIV), the value of each prompt.

    subject    the image encoder's vectors of the subject's images [R, D]
    images     in the order of prompts, `per_prompt` of each
    texts      the prompts with the class in place of the token

    CLIP-T is left out without a CLIP, and DIV for one image per prompt.
    """
    shape = len(texts), per_prompt
    vectors = scorers.image_encoder.embed_images(list(images))
    groups = vectors.unflatten(0, shape)
    metrics = {scorers.image_encoder.similarity_name: [float(clip_i(group, subject)) for group in groups]}
    if scorers.clip is not None:
        clip_groups = scorers.embed_for_prompts(list(images), vectors).unflatten(0, shape)
        text_vectors = scorers.clip.embed_texts(list(texts))
        metrics["CLIP-T"] = [
            float((group @ text).mean()) for group, text in zip(clip_groups, text_vectors, strict=True)
        ]
    if per_prompt > 1:
        metrics["DIV"] = [float(diversity(group)) for group in groups]
    return metrics
