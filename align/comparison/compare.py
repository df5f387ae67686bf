"""Compare two models on the same prompts, seeds, sampler and guidance, by scorers or blind by a person.

A win is an image of the tuned model that a scorer puts above the base's image from the same noise. Ties count half in
the win rate and are reported. The interval is Wilson's, over images. Use a scorer that the model was not trained on,
and look at diversity: a model that always draws one image can win every comparison.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from align.collect.sample import sample_images
from align.collect.scorers import ImageScorer, load_clip_scorer, open_scorer
from align.comparison.report import build_report
from align.comparison.sides import (
    BASE,
    Side,
    WinRate,
    find_training_scorers,
    side_image_name,
    tuned_side_name,
)
from align.pairs.prompts import group_by_category, strip_tokens
from align.settings import ComparisonSettings
from backbone.adapters.apply import check_concept_fits, load_concepts
from backbone.adapters.concept import Concept, read_concept, summarize_concepts, trained_resolution
from backbone.cli.sampling import SamplingSettings, default_early_scale
from backbone.cli.values.build import take_fields
from backbone.evaluation.clip import diversity
from backbone.evaluation.statistics import interval_of_clusters, wilson_interval
from backbone.io.console import UserError, notify
from backbone.io.files import read_json, refuse_filled, write_json
from backbone.io.progress import progress
from backbone.io.prompts import Prompt
from backbone.io.records import read_as
from backbone.io.report import write_report
from backbone.io.run_folder import hold_folder, package_versions, refuse_among_others
from backbone.media.parameters import describe_concepts, describe_drawing
from backbone.media.sheet import save_png
from backbone.media.sources.decode import open_rgb
from backbone.models.model import Backbone
from backbone.models.sample import find_latent_size, resolve_sampling

RESULT = "compare.json"
REPORT = "report.html"
DRAWN = "drawn.json"  # in the folder of a side: how its images were drawn


def _refuse_equal_sides(base: Side, tuned: Sequence[Side], sampling: SamplingSettings) -> None:
    """`UserError` if both sides would sample the same images."""
    for side in tuned:
        base_facts, side_facts = (
            (
                item.model,
                item.concepts,
                item.concepts and item.scale,
                item.override(sampling),
            )
            for item in (base, side)
        )
        if base_facts == side_facts:
            raise UserError(
                f"Both sides are {base.name} at the same settings, so every image would be a tie. Name another run or "
                "model, or give --tuned-guidance."
            )


def compare_models(
    base: Side,
    tuned: Side,
    prompts: Sequence[Prompt],
    out: Path,
    settings: ComparisonSettings,
) -> dict[str, Any]:
    """Sample both sides, score them, write `compare.json` and `report.html`; returns the result.

    The tuned side is compared at each of the scales with the same base images. Images that exist already are kept, so
    that a comparison that was stopped goes on; raises `UserError` when they were sampled with other settings.
    """
    began = time.perf_counter()

    # The base, and the tuned side at every scale
    tuned_sides = {
        tuned_side_name(scale): dataclasses.replace(tuned, scale=scale) for scale in settings.scale
    }
    sides = {BASE: base, **tuned_sides}
    if not any((out / name / DRAWN).is_file() for name in sides):  # no comparison was begun there
        refuse_among_others(out)
        refuse_filled(out)
    _refuse_scales(tuned, settings.scale)
    score_functions = {name: open_scorer(name) for name in dict.fromkeys(settings.scorers)}
    trained_on = sorted(find_training_scorers(tuned) & set(settings.scorers))
    if trained_on:
        notify(
            f"{', '.join(trained_on)} also chose what {tuned.name} was trained on. Compare by another scorer as well."
        )

    # Images of every prompt from the same noise on all sides, then their scores
    keys = [(i, j) for i in range(len(prompts)) for j in range(settings.count)]
    opened, sampling = _open_sides(sides, settings)
    _refuse_equal_sides(base, list(tuned_sides.values()), sampling)
    with hold_folder(out):
        _sample_sides(out, opened, prompts, keys, sampling)
        sampled = time.perf_counter()
        images = {name: [open_rgb(out / side_image_name(name, *key)) for key in keys] for name in sides}
        scores = _score_sides(images, sides.values(), [prompts[i].text for i, _ in keys], score_functions)
        result = {
            "base": base,
            "tuned": dataclasses.replace(tuned, scale=settings.scale[0]),
            "sampling": sampling,
            "per_prompt": settings.count,
            "prompts": len(prompts),
            "tie": settings.tie,
            "trained_on": trained_on,
            **_count_all_wins(scores, list(tuned_sides), prompts, keys, tie=settings.tie),
            "diversity": (
                {name: _mean_diversity(images[name], keys) for name in sides} if settings.count > 1 else {}
            ),
            "seconds": {
                "sample": round(sampled - began, 2),
                "score": round(time.perf_counter() - sampled, 2),
            },
            "versions": package_versions(),
        }
        write_json(out / RESULT, result)
        parts = build_report(out, result, prompts, keys, scores)
        title = f"{tuned.name} against {base.name}, {sampling.steps} steps of {sampling.sampler}"
        write_report(out / REPORT, title, parts)
    return result


def count_wins(base: Tensor, tuned: Tensor, keys: Sequence[tuple[int, int]], *, tie: float = 0.0) -> WinRate:
    """Win rate of scores `tuned` [B] over `base` [B]; `keys` (prompt index, sample index) group them by prompt."""
    difference = (tuned - base).double()
    ties = difference.abs() <= tie
    wins = int(((difference > 0) & ~ties).sum())
    losses = int(((difference < 0) & ~ties).sum())
    tie_count = int(ties.sum())
    by_prompt: dict[int, list[float]] = {}
    for (i, _), value in zip(keys, difference.tolist(), strict=True):
        by_prompt.setdefault(i, []).append(value)
    rate = wilson_interval(wins + 0.5 * tie_count, len(keys))
    return WinRate(rate, wins, tie_count, losses, interval_of_clusters(list(by_prompt.values())))


def measure_diversity(images: Sequence[Image], keys: Sequence[tuple[int, int]]) -> dict[int, float]:
    """Prompt index → mean cosine distance between its images, by the embedded CLIP."""
    vectors = load_clip_scorer("moji").embed_images(images)
    rows: dict[int, list[int]] = {}
    for row, (i, _) in enumerate(keys):
        rows.setdefault(i, []).append(row)
    return {i: diversity(vectors[prompt_rows]) for i, prompt_rows in rows.items()}


def _refuse_scales(tuned: Side, scales: Sequence[float]) -> None:
    """Raise `UserError` where a scale is given for a side whose training has no single scale."""
    varied = tuple(scales) != (1.0,)
    if varied and len(tuned.concepts) > 1:
        raise UserError(
            f"{tuned.name} was trained on top of a concept, so its strength is not one number. Leave out --scale."
        )
    if varied and not tuned.concepts:
        raise UserError(f"{tuned.name} is a whole model, so it has no strength to vary. Leave out --scale.")


@dataclass(frozen=True, eq=False)
class OpenedSide:
    """A side with its model, whose weights are not loaded yet, and its concepts."""

    side: Side
    model: Backbone
    concepts: Sequence[Concept]


def _open_sides(
    sides: Mapping[str, Side], settings: ComparisonSettings
) -> tuple[dict[str, OpenedSide], SamplingSettings]:
    """The sides, and the settings with the base model's defaults; user errors are raised before any weights load."""
    opened = {
        name: OpenedSide(
            side,
            Backbone.open(side.model, device=settings.device, precision=settings.precision),
            [read_concept(folder) for folder in side.concepts],
        )
        for name, side in sides.items()
    }
    tuned = next(name for name in sides if name != BASE)
    sampling = resolve_sampling(
        take_fields(SamplingSettings, settings),
        opened[BASE].model,
        resolution=trained_resolution(opened[tuned].concepts),
    )
    _say_of_another_model(opened[BASE], opened[tuned])
    for opened_side in opened.values():
        find_latent_size(opened_side.model, sampling.size)
        for concept in opened_side.concepts:
            check_concept_fits(concept, opened_side.model)
    return opened, sampling


def _say_of_another_model(base: OpenedSide, tuned: OpenedSide) -> None:
    """Warn if a run is compared with another model than it was trained from, whose difference then counts too."""
    if tuned.concepts and base.model.fingerprint != tuned.model.fingerprint:
        notify(
            f"{tuned.side.name} was trained from {tuned.side.model}, and {base.side.name} is another model: what they "
            f"differ by is compared too. Both draw with {base.side.name}'s steps and guidance, unless they are given."
        )


def _sample_sides(
    out: Path,
    opened: dict[str, OpenedSide],
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    sampling: SamplingSettings,
) -> None:
    """Sample the missing images of every side, one model in memory at a time; `opened` is emptied."""
    for name, opened_side in opened.items():
        _claim_folder(out / name, opened_side, prompts, opened_side.side.override(sampling))
    for name in list(opened):
        opened_side = opened.pop(name)
        missing = [key for key in keys if not (out / side_image_name(name, *key)).exists()]
        if not missing:
            continue
        side, settings = opened_side.side, opened_side.side.override(sampling)
        load_concepts(opened_side.model, opened_side.concepts, scale=side.scale)
        facts = {"model": side.model, **settings.facts(), **describe_concepts(side.concepts, side.scale)}
        with progress(len(missing), f"drawing {name}") as bar:
            images = sample_images(
                opened_side.model,
                prompts,
                missing,
                settings,
                opened_side.concepts,
                advance=bar.advance_images,
            )
            for key, image in zip(missing, images, strict=True):
                i, j = key
                text = describe_drawing(
                    prompts[i].text, image.size, {**facts, "prompt_number": i, "sample": j}
                )
                save_png(out / side_image_name(name, *key), image, text=text)


def _claim_folder(
    folder: Path, opened: OpenedSide, prompts: Sequence[Prompt], sampling: SamplingSettings
) -> None:
    """Begin a side's folder with a record of its settings; `UserError` where its images have other ones."""
    record: dict[str, Any] = {
        "model": opened.model.fingerprint,
        "concepts": summarize_concepts(opened.concepts),
        "weights": [concept.hash_files() for concept in opened.concepts],
        "scale": opened.side.scale,
        "prompts": [prompt.text for prompt in prompts],
        "sampling": sampling.facts(),
        "early": list(default_early_scale(opened.model.defaults)) if opened.concepts else [],
    }
    path = folder / DRAWN
    if path.exists():
        stored = read_as(dict[str, Any], read_json(path), path)
        stored["model"] = opened.model.renew_fingerprint(stored.get("model"))
        stored.setdefault("early", record["early"])  # which older records leave out
        if stored != json.loads(json.dumps(record)):
            raise UserError(f"{folder} holds pictures that were drawn in another way. Choose another --out.")
    write_json(path, record)


def _score_sides(
    images: Mapping[str, Sequence[Image]],
    sides: Iterable[Side],
    texts: Sequence[str],
    score_functions: Mapping[str, ImageScorer],
) -> dict[str, dict[str, Tensor]]:
    """Scorer → side → the scores [B] of its images for their texts, a concept's class in place of its token."""
    concepts = summarize_concepts([read_concept(folder) for side in sides for folder in side.concepts])
    texts = [strip_tokens(text, concepts) for text in texts]
    return {
        scorer: {name: _score_in_batches(score, images[name], texts) for name in images}
        for scorer, score in score_functions.items()
    }


def _score_in_batches(
    score: ImageScorer, images: Sequence[Image], texts: Sequence[str], *, batch: int = 32
) -> Tensor:
    """Scores [B] of images for their texts."""
    return torch.cat(
        [
            score(images[first : first + batch], texts[first : first + batch])
            for first in range(0, len(images), batch)
        ]
    )


def _mean_diversity(images: Sequence[Image], keys: Sequence[tuple[int, int]]) -> float:
    """Mean of `measure_diversity` over prompts."""
    return statistics.fmean(measure_diversity(images, keys).values())


def _count_all_wins(
    scores: Mapping[str, Mapping[str, Tensor]],
    tuned: Sequence[str],
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    *,
    tie: float,
) -> dict[str, Any]:
    """Win rates of the tuned sides over the base by scorer, and those of the first by category of prompt too."""
    wins = {
        scorer: {name: count_wins(by_side[BASE], by_side[name], keys, tie=tie).as_json() for name in tuned}
        for scorer, by_side in scores.items()
    }
    categories = {
        scorer: _count_by_category(by_side, tuned[0], prompts, keys, tie=tie)
        for scorer, by_side in scores.items()
    }
    return {"wins": wins, "categories": categories}


def _count_by_category(
    by_side: Mapping[str, Tensor],
    tuned: str,
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    *,
    tie: float,
) -> dict[str, Any]:
    """Category → win rate of one scorer's scores over its prompts alone."""
    wins = {}
    for category, indices in group_by_category(prompts).items():
        rows = [row for row, (i, _) in enumerate(keys) if i in set(indices)]
        category_keys = [keys[row] for row in rows]
        wins[category] = count_wins(
            by_side[BASE][rows], by_side[tuned][rows], category_keys, tie=tie
        ).as_json()
    return wins
