"""Two models side by side: the same prompts, seeds, sampler and guidance, judged by scorers, or by a person blind.

A win is a picture of the tuned model that a judge puts above the base's picture from the same noise. Ties count half
in the win rate and are stated. The interval is Wilson's, over pictures; judge a model by a scorer that it was not
trained on, and look at diversity: a model that always draws one picture can win every comparison.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from align.collect.sample import DEFAULT_SAMPLING, SamplingSettings, sample_images
from align.collect.scorers import load_clip_scorer, open_scorer
from align.compare.report import build_report
from align.compare.sides import BASE, Side, WinRate, find_training_scorers, side_image_name, tuned_side_name
from align.pairs.prompts import Prompt, group_by_category, strip_tokens
from backbone.adapters.apply import put_on, refuse_another_model
from backbone.adapters.concept import Concept, described, read_concept
from backbone.evaluation.clip import diversity
from backbone.evaluation.statistics import bootstrap, wilson
from backbone.io.console import UserError, progress, say
from backbone.io.files import content_hash, read_json, write_json
from backbone.io.report import write_report
from backbone.io.run_folder import versions
from backbone.media.decode import open_rgb
from backbone.media.sheet import save_png
from backbone.models.model import Backbone

RESULT = "compare.json"
REPORT = "report.html"


def compare_models(
    base: Side,
    tuned: Side,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    per_prompt: int = 1,
    sampling: SamplingSettings = DEFAULT_SAMPLING,
    scorers: Sequence[str] = ("moji",),
    scales: Sequence[float] = (),
    tie: float = 0.0,
    device: str = "auto",
    precision: str = "auto",
) -> dict[str, Any]:
    """Draws both sides, lets every scorer judge, writes `compare.json` and `report.html`, and gives what was found.

    `scales` are further strengths of the tuned side's concepts, each judged against the same base pictures. `tie` is
    the difference of scores up to which two pictures are even. Pictures that are there already are kept, so that a
    comparison that was stopped goes on; `UserError` when they were drawn in another way.
    """
    began = time.perf_counter()
    sides = {
        BASE: base,
        **{
            tuned_side_name(scale): dataclasses.replace(tuned, scale=scale)
            for scale in [tuned.scale, *scales]
        },
    }
    varied = "--scale" if scales else "--tuned-scale" if tuned.scale != 1 else ""
    if varied and len(tuned.concepts) > 1:
        raise UserError(
            f"{tuned.name} was trained on top of a concept, so its strength is not one number. Leave out {varied}."
        )
    if varied and not tuned.concepts:
        raise UserError(f"{tuned.name} is a whole model, so it has no strength to vary. Leave out {varied}.")
    judges = {name: open_scorer(name) for name in dict.fromkeys(scorers)}
    known = sorted(find_training_scorers(tuned) & set(scorers))
    if known:
        say(
            f"{', '.join(known)} also chose what {tuned.name} was trained on. Judge by another scorer as well."
        )
    keys = [(i, j) for i in range(len(prompts)) for j in range(per_prompt)]
    sampling = _sample_sides(out, sides, prompts, keys, sampling, device=device, precision=precision)
    drawn = time.perf_counter()
    facts = described([read_concept(folder) for side in sides.values() for folder in side.concepts])
    texts = [strip_tokens(prompts[i].text, facts) for i, _ in keys]
    pictures = {name: [open_rgb(out / side_image_name(name, *key)) for key in keys] for name in sides}
    scores = {
        scorer: {name: _score_in_batches(judge, pictures[name], texts) for name in sides}
        for scorer, judge in judges.items()
    }
    variety = {name: _mean_diversity(pictures[name], keys) for name in sides} if per_prompt > 1 else {}
    main = tuned_side_name(tuned.scale)
    result = {
        "base": base,
        "tuned": tuned,
        "sampling": sampling,
        "per_prompt": per_prompt,
        "prompts": len(prompts),
        "tie": tie,
        "trained_on": known,
        "wins": {
            scorer: {
                name: count_wins(by_side[BASE], by_side[name], keys, tie=tie).as_json()
                for name in sides
                if name != BASE
            }
            for scorer, by_side in scores.items()
        },
        "categories": {
            scorer: {
                category: count_wins(*_select_rows(by_side, main, keys, numbers), tie=tie).as_json()
                for category, numbers in group_by_category(prompts).items()
            }
            for scorer, by_side in scores.items()
        },
        "diversity": variety,
        "seconds": {"draw": round(drawn - began, 2), "judge": round(time.perf_counter() - drawn, 2)},
        "versions": versions(),
    }
    write_json(out / RESULT, result)
    parts = build_report(out, result, prompts, keys, scores)
    write_report(out / REPORT, f"{tuned.name} against {base.name}", parts)
    return result


def count_wins(base: Tensor, tuned: Tensor, keys: Sequence[tuple[int, int]], *, tie: float = 0.0) -> WinRate:
    """The wins of the second scores [B] over the first; `keys` say which prompt each picture is of."""
    difference = (tuned - base).double()
    ties = difference.abs() <= tie
    wins = int(((difference > 0) & ~ties).sum())
    losses = int(((difference < 0) & ~ties).sum())
    even = int(ties.sum())
    clusters: dict[int, list[float]] = {}
    for (i, _), value in zip(keys, difference.tolist(), strict=True):
        clusters.setdefault(i, []).append(value)
    rate = wilson(wins + 0.5 * even, len(keys))
    return WinRate(rate, wins, even, losses, bootstrap(list(clusters.values())))


# Blind, by a person -----------------------------------------------------------------------------------------


# Drawing and judging ----------------------------------------------------------------------------------------


def _sample_sides(
    out: Path,
    sides: Mapping[str, Side],
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    sampling: SamplingSettings,
    *,
    device: str,
    precision: str,
) -> SamplingSettings:
    """Draws what is missing of every side; gives the drawing with the base model's defaults filled in."""
    models = {
        name: Backbone.open(side.model, device=device, precision=precision) for name, side in sides.items()
    }
    learned = {name: [read_concept(folder) for folder in side.concepts] for name, side in sides.items()}
    sampling = sampling.resolve(models[BASE])
    for name, side in sides.items():  # mistakes are answered before any weights load
        for concept in learned[name]:
            refuse_another_model(concept, models[name])
        _claim_folder(out / name, models[name], learned[name], side, prompts, side.override(sampling))
    for name, side in sides.items():
        model = models.pop(name)
        missing = [key for key in keys if not (out / side_image_name(name, *key)).exists()]
        if not missing:
            continue
        put_on(model, learned[name], scale=side.scale)
        with progress(len(missing), f"drawing {name}") as bar:
            for key, picture in zip(
                missing,
                sample_images(model, prompts, missing, side.override(sampling), learned[name]),
                strict=True,
            ):
                save_png(out / side_image_name(name, *key), picture, text={"prompt": prompts[key[0]].text})
                bar.advance(images=1)
    return sampling


def _claim_folder(
    folder: Path,
    model: Backbone,
    concepts: Sequence[Concept],
    side: Side,
    prompts: Sequence[Prompt],
    sampling: SamplingSettings,
) -> None:
    """Begins a side's folder, or makes sure that its pictures were drawn in this way."""
    facts: dict[str, Any] = {
        "model": model.fingerprint,
        "concepts": described(concepts),
        "weights": [content_hash(concept.weights_path) for concept in concepts if concept.weights],
        "scale": side.scale,
        "prompts": [prompt.text for prompt in prompts],
        "sampling": sampling.as_json(),
    }
    path = folder / "drawn.json"
    if path.exists() and read_json(path) != json.loads(json.dumps(facts)):
        raise UserError(f"{folder} holds pictures that were drawn in another way. Choose another --out.")
    write_json(path, facts)


def _score_in_batches(
    judge: Any, pictures: Sequence[Image], texts: Sequence[str], *, batch: int = 32
) -> Tensor:
    return torch.cat(
        [
            judge(pictures[first : first + batch], texts[first : first + batch])
            for first in range(0, len(pictures), batch)
        ]
    )


def measure_diversity(pictures: Sequence[Image], keys: Sequence[tuple[int, int]]) -> dict[int, float]:
    """For each prompt number the mean cosine distance between its pictures, by the embedded scorer."""
    vectors = load_clip_scorer("moji").embed_images(pictures)
    rows: dict[int, list[int]] = {}
    for row, (i, _) in enumerate(keys):
        rows.setdefault(i, []).append(row)
    return {i: diversity(vectors[own]) for i, own in rows.items()}


def _mean_diversity(pictures: Sequence[Image], keys: Sequence[tuple[int, int]]) -> float:
    """The mean over prompts."""
    each = measure_diversity(pictures, keys).values()
    return sum(each) / len(each)


def _select_rows(
    by_side: Mapping[str, Tensor], tuned: str, keys: Sequence[tuple[int, int]], numbers: Sequence[int]
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    chosen = [row for row, (i, _) in enumerate(keys) if i in set(numbers)]
    return by_side[BASE][chosen], by_side[tuned][chosen], [keys[row] for row in chosen]


# The report -------------------------------------------------------------------------------------------------
