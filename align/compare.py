"""Two models side by side: the same prompts, seeds, sampler and guidance, judged by scorers, or by a person blind.

A win is a picture of the tuned model that a judge puts above the base's picture from the same noise. Ties count half
in the win rate and are stated. The interval is Wilson's, over pictures; judge a model by a scorer that it was not
trained on, and look at diversity: a model that always draws one picture can win every comparison.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from align.choices import CHOICES, Choice, consistency, effective, read_choices
from align.pairs import SCORES
from align.prompts import by_category, without_tokens
from align.sampling import USUAL, Drawing, draw
from align.scoring import open_judge, open_scorer
from align.settings import read_settings
from backbone.concept import Concept, described, read_concept
from backbone.console import UserError, progress, say
from backbone.files import content_hash, read_json, write_json
from backbone.images import open_rgb
from backbone.io.prompts import Prompt
from backbone.learned import put_on, refuse_another_model
from backbone.model import Backbone
from backbone.report import heading, paragraph, table, write_report
from backbone.report import picture as shown
from backbone.runs import versions
from backbone.sample import latent_size
from backbone.scorers import diversity
from backbone.sheet import GREEN, Cell, save_png, sheet
from backbone.statistics import Interval, bootstrap, wilson

RESULT = "compare.json"
REPORT = "report.html"
BLIND = "blind.json"
EVALUATIONS = "evaluations.jsonl"  # of a run of align train
BASE = "base"
SHOWN = 24  # prompts whose pictures the report shows


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

    def drawn(self, drawing: Drawing) -> Drawing:
        """How this side is drawn."""
        guidance = drawing.guidance if self.guidance is None else self.guidance
        start, stop = self.guided or drawing.guided
        return dataclasses.replace(drawing, guidance=guidance, guidance_start=start, guidance_stop=stop)

    @classmethod
    def of(cls, name: str, model: str | None = None) -> Side:
        """A run folder (with the model, and the concepts, that it was trained on), or a model's name."""
        folder = Path(name)
        if not (folder / "concept.json").is_file():
            return cls(name, name)
        below = read_settings(folder).concepts if (folder / EVALUATIONS).is_file() else ()
        return cls(name, model or read_concept(folder).model, (*map(Path, below), folder))


@dataclass(frozen=True)
class Wins:
    """What a judge said of n pairs of pictures: the share that the tuned model won, ties counted half."""

    rate: Interval
    wins: int
    ties: int
    losses: int
    gain: Interval  # mean difference of scores, over prompts

    def as_json(self) -> dict[str, Any]:
        """For compare.json."""
        return {**dataclasses.asdict(self), "rate": self.rate._asdict(), "gain": self.gain._asdict()}


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
        say(
            f"{', '.join(known)} also chose what {tuned.name} was trained on. Judge by another scorer as well."
        )
    keys = [(i, j) for i in range(len(prompts)) for j in range(per_prompt)]
    drawing = _draw_all(out, sides, prompts, keys, drawing, device=device, precision=precision)
    drawn = time.perf_counter()
    facts = described([read_concept(folder) for side in sides.values() for folder in side.concepts])
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
        "versions": versions(),
    }
    write_json(out / RESULT, result)
    parts = report(out, result, prompts, keys, scores)
    write_report(out / REPORT, f"{tuned.name} against {base.name}", parts)
    return result


def summary(result: Mapping[str, Any]) -> str:
    """What was found, a line for each judge and strength, for people."""
    lines = []
    for scorer, by_side in result["wins"].items():
        for name, wins in by_side.items():
            rate = Interval(**wins["rate"])
            lines.append(
                f"{scorer}: {name} wins {rate} of {wins['wins'] + wins['ties'] + wins['losses']} pictures against "
                f"{BASE} ({wins['ties']} ties), mean gain {_gain(wins)}"
            )
    if result["diversity"]:
        before = result["diversity"][BASE]
        spread = ", ".join(f"{name} {value:.4f}" for name, value in result["diversity"].items())
        ratio = [value / before for name, value in result["diversity"].items() if name != BASE and before]
        lines.append(f"diversity: {spread}" + (f" ({ratio[0]:.2f} of the base's)" if ratio else ""))
    return "\n".join(lines)


def taught_by(side: Side) -> set[str]:
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
    rate = wilson(wins + 0.5 * even, len(keys))
    return Wins(rate, wins, even, losses, bootstrap(list(clusters.values())))


def picture_name(side: str, i: int, j: int) -> str:
    """The file of a side's sample j of prompt i, relative to the folder."""
    return f"{side}/p{i:05d}-s{j:02d}.png"


# Blind, by a person -----------------------------------------------------------------------------------------


def blind_pairs(
    prompts: Sequence[Prompt], per_prompt: int, tuned_scale: float = 1.0
) -> Iterator[tuple[str, str, str, str]]:
    """(pair's name, prompt, base's file, tuned's file) of every picture that can be compared, for the page."""
    for i, prompt in enumerate(prompts):
        for j in range(per_prompt):
            yield (
                f"p{i:05d}-s{j:02d}",
                prompt.text,
                picture_name(BASE, i, j),
                picture_name(tuned_folder(tuned_scale), i, j),
            )


def blind_result(folder: Path) -> dict[str, Any]:
    """What the person said so far: the tuned side's win rate over the pairs that were not skipped."""
    choices = effective(read_choices(folder / CHOICES))
    first = [choice for choice in choices if not choice.repeat and choice.verdict != "skip"]
    wins = sum(_is_tuned(choice) for choice in first)
    even = sum(choice.preferred is None for choice in first)
    agreed = consistency(choices)
    return {
        "rate": wilson(wins + 0.5 * even, len(first))._asdict(),
        "wins": wins,
        "ties": sum(choice.verdict == "tie" for choice in first),
        "both_bad": sum(choice.verdict == "both_bad" for choice in first),
        "losses": len(first) - wins - even,
        "agreed_with_themselves": {
            "of_repeats": agreed.repeats, **wilson(agreed.agreed, agreed.repeats)._asdict()
        },
    }  # fmt: skip


def save_blind(folder: Path) -> dict[str, Any]:
    """Writes `blind.json` beside the comparison, and gives what it says."""
    found = blind_result(folder)
    write_json(folder / BLIND, found)
    return found


def blind_summary(found: Mapping[str, Any]) -> str:
    """What the person said, for people."""
    asked = found["wins"] + found["ties"] + found["both_bad"] + found["losses"]
    agreed = found["agreed_with_themselves"]
    again = Interval(agreed["value"], agreed["low"], agreed["high"])
    said = (
        f"; on {agreed['of_repeats']} repeats they agreed with themselves {again}"
        if agreed["of_repeats"]
        else ""
    )
    return f"blind: tuned wins {Interval(**found['rate'])} of {asked} pictures ({found['ties']} ties){said}"


def _is_tuned(choice: Choice) -> bool:
    return choice.preferred is not None and not choice.preferred.startswith(f"{BASE}/")


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
            refuse_another_model(concept, models[name])
        _claim(out / name, models[name], learned[name], side, prompts, side.drawn(drawing))
    for name, side in sides.items():
        model = models.pop(name)
        missing = [key for key in keys if not (out / picture_name(name, *key)).exists()]
        if not missing:
            continue
        put_on(model, learned[name], scale=side.scale)
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
        "concepts": described(concepts),
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


def tuned_folder(scale: float) -> str:
    """The folder of the tuned side at a strength, and its name in the results."""
    return "tuned" if scale == 1 else f"tuned-{scale:g}"


# The report -------------------------------------------------------------------------------------------------


def report(
    out: Path,
    result: Mapping[str, Any],
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    scores: Mapping[str, Mapping[str, Tensor]],
) -> list[str]:
    """The parts of the comparison's `report.html`."""
    drawing: Drawing = result["drawing"]
    tuned: Side = result["tuned"]
    own = tuned.drawn(drawing).said()
    other = "" if own == drawing.said() else f" (the tuned side {own})"
    every = [
        (scorer, name, str(Interval(**wins["rate"])), *_counts(wins), _gain(wins))
        for scorer, by_side in result["wins"].items()
        for name, wins in by_side.items()
    ]
    titles = ("win rate (95 %)", "wins", "ties", "losses", "mean gain (95 %)")
    parts = [
        paragraph(
            f"{len(prompts)} prompts, {result['per_prompt']} pictures of each from the same noise; "
            f"{drawing.sampler}, {drawing.steps} steps, guidance {drawing.said()}{other}, seed {drawing.seed}."
        ),
        *(
            [paragraph(f"{', '.join(result['trained_on'])} also chose what the tuned model was trained on.")]
            if result["trained_on"]
            else []
        ),
        heading("How often is the tuned picture better?"),
        table(("judge", "side", *titles), every),
        paragraph(
            f"Ties (a difference of at most {result['tie']:g}) count half. The win rate's interval is Wilson's over "
            "pictures, the gain's a bootstrap over prompts."
        ),
    ]
    if result["diversity"]:
        before = result["diversity"][BASE]
        spread = [
            (name, f"{value:.4f}", f"{value / before:.2f}" if before else "–")
            for name, value in result["diversity"].items()
        ]
        parts.append(heading("Do the pictures of a prompt still differ?"))
        parts.append(table(("side", "mean cosine distance", "of the base's"), spread))
    for scorer, groups in result["categories"].items():
        if len(groups) > 1:
            rows = [
                (name or "none", str(Interval(**wins["rate"])), *_counts(wins), _gain(wins))
                for name, wins in groups.items()
            ]
            parts += [heading(f"By category, {scorer}"), table(("category", *titles), rows)]
    return [*parts, *_side_by_side(out, prompts, keys, scores)]


def _side_by_side(
    out: Path,
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    scores: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[str]:
    """The first picture of the first prompts from every side, the better one framed."""
    scorer, by_side = next(iter(scores.items()))
    yield heading("Side by side")
    yield paragraph(f"A green frame: the better one for {scorer}.")
    for row, (i, j) in enumerate(keys):
        if j or i >= SHOWN:
            continue
        values = {name: float(scores[row]) for name, scores in by_side.items()}
        best = max(values.values()) if len(set(values.values())) > 1 else None
        cells = [
            Cell(
                open_rgb(out / picture_name(name, i, j)),
                f"{name}, {value:.3f}",
                GREEN if value == best else None,
            )
            for name, value in values.items()
        ]
        yield shown(sheet([cells]), prompts[i].text)


def _counts(wins: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(wins["wins"]), str(wins["ties"]), str(wins["losses"])


def _gain(wins: Mapping[str, Any]) -> str:
    gain = wins["gain"]
    if math.isnan(gain["value"]):
        return "–"
    return f"{gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
