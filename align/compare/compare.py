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

from align.collect.sample import USUAL, Drawing, draw
from align.collect.scorers import open_judge, open_scorer
from align.compare.report import report
from align.compare.sides import BASE, Side, Wins, picture_name, taught_by, tuned_folder
from align.pairs.prompts import by_category, without_tokens
from backbone.adapters.apply import check_concept_fits, load_concepts
from backbone.adapters.concept import Concept, read_concept, summarize_concepts
from backbone.evaluation.clip import diversity
from backbone.evaluation.statistics import cluster_bootstrap, wilson_interval
from backbone.io.console import UserError, notify, progress
from backbone.io.files import content_hash, read_json, write_json
from backbone.io.prompts import Prompt
from backbone.io.report import write_report
from backbone.io.run_folder import package_versions
from backbone.media.decode import open_rgb
from backbone.media.sheet import save_png
from backbone.models.model import Backbone
from backbone.models.sample import latent_size

RESULT = "compare.json"
REPORT = "report.html"


def compare_models(
    base: Side,
    tuned: Side,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    per_prompt: int = 1,
    drawing: Drawing = USUAL,
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
        **{tuned_folder(scale): dataclasses.replace(tuned, scale=scale) for scale in [tuned.scale, *scales]},
    }
    varied = bool(scales) or tuned.scale != 1
    if varied and len(tuned.concepts) > 1:
        raise UserError(
            f"{tuned.name} was trained on top of a concept, so its strength is not one number. Leave out --scale."
        )
    if varied and not tuned.concepts:
        raise UserError(f"{tuned.name} is a whole model, so it has no strength to vary. Leave out --scale.")
    judges = {name: open_judge(name) for name in dict.fromkeys(scorers)}
    known = sorted(taught_by(tuned) & set(scorers))
    if known:
        notify(
            f"{', '.join(known)} also chose what {tuned.name} was trained on. Judge by another scorer as well."
        )
    keys = [(i, j) for i in range(len(prompts)) for j in range(per_prompt)]
    drawing = _draw_all(out, sides, prompts, keys, drawing, device=device, precision=precision)
    drawn = time.perf_counter()
    facts = summarize_concepts([read_concept(folder) for side in sides.values() for folder in side.concepts])
    texts = [without_tokens(prompts[i].text, facts) for i, _ in keys]
    pictures = {name: [open_rgb(out / picture_name(name, *key)) for key in keys] for name in sides}
    scores = {
        scorer: {name: _judged(judge, pictures[name], texts) for name in sides}
        for scorer, judge in judges.items()
    }
    variety = {name: _variety(pictures[name], keys) for name in sides} if per_prompt > 1 else {}
    main = tuned_folder(tuned.scale)
    result = {
        "base": base,
        "tuned": tuned,
        "drawing": drawing,
        "per_prompt": per_prompt,
        "prompts": len(prompts),
        "tie": tie,
        "trained_on": known,
        "wins": {
            scorer: {
                name: versus(by_side[BASE], by_side[name], keys, tie=tie).as_json()
                for name in sides
                if name != BASE
            }
            for scorer, by_side in scores.items()
        },
        "categories": {
            scorer: {
                category: versus(*_rows(by_side, main, keys, numbers), tie=tie).as_json()
                for category, numbers in by_category(prompts).items()
            }
            for scorer, by_side in scores.items()
        },
        "diversity": variety,
        "seconds": {"draw": round(drawn - began, 2), "judge": round(time.perf_counter() - drawn, 2)},
        "versions": package_versions(),
    }
    write_json(out / RESULT, result)
    parts = report(out, result, prompts, keys, scores)
    write_report(out / REPORT, f"{tuned.name} against {base.name}", parts)
    return result


def versus(base: Tensor, tuned: Tensor, keys: Sequence[tuple[int, int]], *, tie: float = 0.0) -> Wins:
    """The wins of the second scores [B] over the first; `keys` say which prompt each picture is of."""
    difference = (tuned - base).double()
    ties = difference.abs() <= tie
    wins = int(((difference > 0) & ~ties).sum())
    losses = int(((difference < 0) & ~ties).sum())
    even = int(ties.sum())
    clusters: dict[int, list[float]] = {}
    for (i, _), value in zip(keys, difference.tolist(), strict=True):
        clusters.setdefault(i, []).append(value)
    rate = wilson_interval(wins + 0.5 * even, len(keys))
    return Wins(rate, wins, even, losses, cluster_bootstrap(list(clusters.values())))


# Blind, by a person -----------------------------------------------------------------------------------------


# Drawing and judging ----------------------------------------------------------------------------------------


def _draw_all(
    out: Path,
    sides: Mapping[str, Side],
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    drawing: Drawing,
    *,
    device: str,
    precision: str,
) -> Drawing:
    """Draws what is missing of every side; gives the drawing with the base model's defaults filled in."""
    models = {
        name: Backbone.open(side.model, device=device, precision=precision) for name, side in sides.items()
    }
    learned = {name: [read_concept(folder) for folder in side.concepts] for name, side in sides.items()}
    drawing = drawing.settled(models[BASE])
    for name, side in sides.items():  # mistakes are answered before any weights load
        latent_size(models[name], drawing.size)
        for concept in learned[name]:
            check_concept_fits(concept, models[name])
        _claim(out / name, models[name], learned[name], side, prompts, side.drawn(drawing))
    for name, side in sides.items():
        model = models.pop(name)
        missing = [key for key in keys if not (out / picture_name(name, *key)).exists()]
        if not missing:
            continue
        load_concepts(model, learned[name], scale=side.scale)
        with progress(len(missing), f"drawing {name}") as bar:
            for key, picture in zip(
                missing, draw(model, prompts, missing, side.drawn(drawing), learned[name]), strict=True
            ):
                save_png(out / picture_name(name, *key), picture, text={"prompt": prompts[key[0]].text})
                bar.advance(images=1)
    return drawing


def _claim(
    folder: Path,
    model: Backbone,
    concepts: Sequence[Concept],
    side: Side,
    prompts: Sequence[Prompt],
    drawing: Drawing,
) -> None:
    """Begins a side's folder, or makes sure that its pictures were drawn in this way."""
    facts: dict[str, Any] = {
        "model": model.fingerprint,
        "concepts": summarize_concepts(concepts),
        "weights": [content_hash(concept.weights_path) for concept in concepts if concept.weights],
        "scale": side.scale,
        "prompts": [prompt.text for prompt in prompts],
        "drawing": drawing.facts(),
    }
    path = folder / "drawn.json"
    if path.exists() and read_json(path) != json.loads(json.dumps(facts)):
        raise UserError(f"{folder} holds pictures that were drawn in another way. Choose another --out.")
    write_json(path, facts)


def _judged(judge: Any, pictures: Sequence[Image], texts: Sequence[str], *, batch: int = 32) -> Tensor:
    return torch.cat(
        [
            judge(pictures[first : first + batch], texts[first : first + batch])
            for first in range(0, len(pictures), batch)
        ]
    )


def varieties(pictures: Sequence[Image], keys: Sequence[tuple[int, int]]) -> dict[int, float]:
    """For each prompt number the mean cosine distance between its pictures, by the embedded scorer."""
    vectors = open_scorer("moji").embed_images(pictures)
    rows: dict[int, list[int]] = {}
    for row, (i, _) in enumerate(keys):
        rows.setdefault(i, []).append(row)
    return {i: diversity(vectors[own]) for i, own in rows.items()}


def _variety(pictures: Sequence[Image], keys: Sequence[tuple[int, int]]) -> float:
    """The mean over prompts."""
    each = varieties(pictures, keys).values()
    return sum(each) / len(each)


def _rows(
    by_side: Mapping[str, Tensor], tuned: str, keys: Sequence[tuple[int, int]], numbers: Sequence[int]
) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    chosen = [row for row, (i, _) in enumerate(keys) if i in set(numbers)]
    return by_side[BASE][chosen], by_side[tuned][chosen], [keys[row] for row in chosen]


# The report -------------------------------------------------------------------------------------------------
