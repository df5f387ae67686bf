"""Shared by the recipes of this folder: the real commands with their run times, and attribute accuracy.

The classifier was trained without `moji` and its scorer. Differences are paired (same prompt, same noise), with a
bootstrap interval over prompts. Images, rankings and runs that an --out folder holds already are kept; classification
is always repeated.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from align.comparison.compare import measure_diversity
from align.comparison.sides import side_image_name, tuned_side_name
from align.pairs.records import RANKING, SAMPLES, SCORES
from align.pairs.samples import read_samples
from align.settings import FILE, SUMMARY
from backbone.evaluation.statistics import Interval, cluster_bootstrap, wilson_interval
from backbone.io.console import UserError, notify
from backbone.io.files import read_json, read_jsonl, write_json
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from backbone.world.rendering.render import render
from backbone.world.scene import Scene
from benchmarks.judges.classifier import Classifier, Prediction, prepare_images
from benchmarks.moji import QUESTIONS
from recipes.align.prompts import STEPS, TRUE_PICTURES, write_prompts


@dataclass(frozen=True, kw_only=True)
class ComparisonSettings:
    """How both sides of a comparison are drawn and scored.

    guidance    flags of `align compare` about guidance
    scale       LoRA scale of the tuned side
    """

    model: str
    scorers: Sequence[str]
    per_prompt: int = 2
    guidance: Sequence[object] = ()
    scale: float = 1.0
    seed: int = 7


@dataclass(frozen=True)
class Comparison:
    """A tuned model against its base on held-out prompts, n images a side.

    base, tuned   share of images whose attributes are all right for the classifier
    difference    tuned minus base, paired
    wins          scorer → win rate of the tuned model
    diversity     as a share of the base's
    of_right      the same over prompts whose images are all right on both sides: diversity that is not mistakes
    """

    n: int
    base: Interval
    tuned: Interval
    difference: Interval
    wins: dict[str, Interval]
    diversity: float
    of_right: float = float("nan")


Row = tuple[str, Comparison, Mapping[str, Any]]  # of a table: a run's name, its result, seconds by step


def run_align(*arguments: object) -> None:
    """Run the `align` command in its own process."""
    words = [str(argument) for argument in arguments]
    notify("align " + " ".join(words))
    subprocess.run([sys.executable, "-m", "align.cli", *words], check=True)


def run_once(record: Path, product: Path, *arguments: object, resume: Sequence[object] = ()) -> float:
    """Run an `align` command unless its `product` exists; returns its seconds, which the file `record` keeps.

    A command that was stopped is run again, or as `resume`, and its seconds add up. Raises `UserError` if
    `record` is of other arguments, whose product would pass for this one's.
    """
    words = [str(argument) for argument in arguments]
    step: dict[str, Any] = {"arguments": words, "seconds": 0.0, "finished": False}
    begun = record.exists()
    if begun:
        step = read_json(record)
    if step["arguments"] != words:
        raise UserError(
            f"{record} is of another run: align {' '.join(step['arguments'])}. Choose another --out."
        )
    if step["finished"] and product.exists():
        return float(step["seconds"])
    began = time.perf_counter()
    write_json(record, step)
    try:
        run_align(*(resume if resume and begun else words))
        step["finished"] = True
    finally:
        step["seconds"] = round(step["seconds"] + time.perf_counter() - began, 1)
        write_json(record, step)
    return float(step["seconds"])


def sample_and_rank(
    out: Path,
    scenes: Sequence[Scene],
    *,
    model: str,
    per_prompt: int,
    scorer: str | Path,
    rules: Sequence[str] = ("best-worst",),
    margin: float = 0.0,
) -> tuple[Path, dict[str, float]]:
    """Sample and rank images of these scenes, once; returns the folder, and the seconds of both steps."""
    folder, steps = out / "pairs", out / "steps"
    prompts = write_prompts(
        out / "prompts.jsonl", scenes, hard_negatives=bool({"same-noise", "best-hard-negative"} & set(rules))
    )
    if (folder / SAMPLES).exists() and len(read_json(folder / SAMPLES)["prompts"]) != len(scenes):
        raise UserError(f"{folder} has the pictures of other prompts. Choose another --out.")
    drawing = run_once(
        steps / "sampling.json", folder / SAMPLES,
        "sample", "--prompts", prompts, "--count", per_prompt, "--model", model, "--out", folder,
        *STEPS,
    )  # fmt: skip
    ranking = run_once(
        steps / "ranking.json", folder / RANKING,
        "rank", folder, "--scorer", scorer, *(word for rule in rules for word in ("--rule", rule)), "--margin", margin,
    )  # fmt: skip
    return folder, {"sampling": drawing, "ranking": ranking}


def train(out: Path, name: str, *arguments: object) -> tuple[Path, float]:
    """Run `align train`, once; returns the run folder and the seconds."""
    run = out / "runs" / name
    words = ("train", *arguments, "--out", run)
    begun = (run / FILE).exists()
    return run, run_once(
        out / "steps" / f"{name}.json",
        run / SUMMARY,
        *words,
        resume=("train", "--resume", run) if begun else (),
    )


@dataclass(frozen=True)
class RankingQuality:
    """Agreement of a scorer's ranking with the classifier, over a prompt's own images; intervals over prompts.

    n              images
    right          share of images whose attributes are all right for the classifier
    any_right      share of prompts with a right image: the ceiling for best-of-n
    agreement      how often a right image of a prompt scores higher than a wrong one (AUC)
    best, worst    share right of each prompt's best and worst image by the scorer
    good, bad      share of the pairs whose chosen image alone is right, and whose chosen image alone is wrong
    """

    n: int
    right: Interval
    any_right: float
    agreement: Interval
    best: float
    worst: float
    pairs: int
    good: float
    bad: float

    def __str__(self) -> str:
        return (
            f"Of {self.n} pictures {self.right} are all right, and {self.any_right:.0%} of the prompts have one. "
            f"The scorer puts a right picture above a wrong one in {self.agreement} of cases; its best pictures are "
            f"right in {self.best:.0%}, its worst in {self.worst:.0%}. Of {self.pairs} pairs {self.good:.0%} prefer a "
            f"right picture to a wrong one and {self.bad:.0%} the reverse; the others are even for the classifier."
        )


def measure_ranking(folder: Path, scenes: Sequence[Scene], classifier: Classifier) -> RankingQuality:
    """Compare a ranked folder's order with the classifier, on the prompts' own images."""
    _, pictures = read_samples(folder)
    own_images = [names[: int(read_json(folder / SAMPLES)["per_prompt"])] for names in pictures]
    files = [(i, name) for i, names in enumerate(pictures) for name in names]
    predictions = classifier.classify([Image.open(folder / name).convert("RGB") for _, name in files])
    right = {
        name: float(is_all_right(scenes[i], prediction))
        for (i, name), prediction in zip(files, predictions, strict=True)
    }
    score = {name: sum(scores.values()) for name, scores in read_json(folder / SCORES)["scores"].items()}
    orders = [
        [float(score[a] > score[b]) for a in names for b in names if right[a] > right[b]]
        for names in own_images
    ]
    best, worst = ([right[pick(names, key=score.__getitem__)] for names in own_images] for pick in (max, min))
    pairs = [(right[pair["chosen"]], right[pair["rejected"]]) for pair in read_jsonl(folder / RANKING)]
    return RankingQuality(
        n=sum(map(len, own_images)),
        right=cluster_bootstrap([[right[name] for name in names] for names in own_images]),
        any_right=sum(max(right[name] for name in names) for names in own_images) / len(own_images),
        agreement=cluster_bootstrap(orders),
        best=sum(best) / len(best),
        worst=sum(worst) / len(worst),
        pairs=len(pairs),
        good=sum(a > b for a, b in pairs) / len(pairs),
        bad=sum(a < b for a, b in pairs) / len(pairs),
    )


def compare_with_base(
    run: Path,
    scenes: Sequence[Scene],
    classifier: Classifier,
    settings: ComparisonSettings,
    *,
    out: Path,
    base_images: Path | None = None,
    tuned_images: Path | None = None,
) -> Comparison:
    """Run `align compare` of a run against its base on these scenes, then classify both sides' images.

    `base_images` and `tuned_images` are folders of images that another comparison sampled alike, to be copied.
    """
    prompts = write_prompts(
        out.with_name(f"{out.name}.jsonl"), scenes
    )  # a comparison's folder holds its own alone
    tuned, per_prompt = tuned_side_name(settings.scale), settings.per_prompt
    for side, source in (("base", base_images), (tuned, tuned_images)):
        if source is not None and source != out / side and not (out / side).exists():
            shutil.copytree(source, out / side)
    flags = [word for scorer in settings.scorers for word in ("--scorer", scorer)]
    run_align(
        "compare", settings.model, run, "--prompts", prompts, "--count", per_prompt, *flags, "--seed", settings.seed,
        *STEPS, *settings.guidance, "--scale", settings.scale, "--out", out,
    )  # fmt: skip
    result = read_json(out / "compare.json")
    keys = [(i, j) for i in range(len(scenes)) for j in range(per_prompt)]
    images = {side: _read_images(out, side, keys) for side in ("base", tuned)}
    right = {side: score_correctness(images[side], scenes, keys, classifier) for side in images}
    # Paired differences, grouped by prompt for the bootstrap.
    differences = [
        [right[tuned][i * per_prompt + j] - right["base"][i * per_prompt + j] for j in range(per_prompt)]
        for i in range(len(scenes))
    ]
    diversity = result["diversity"]
    return Comparison(
        n=len(keys),
        base=wilson_interval(sum(right["base"]), len(keys)),
        tuned=wilson_interval(sum(right[tuned]), len(keys)),
        difference=cluster_bootstrap(differences),
        wins={scorer: Interval(**sides[tuned]["rate"]) for scorer, sides in result["wins"].items()},
        diversity=diversity[tuned] / diversity["base"] if diversity else float("nan"),
        of_right=measure_kept_diversity(
            right[tuned],
            right["base"],
            measure_diversity(images[tuned], keys),
            measure_diversity(images["base"], keys),
            keys,
        ),
    )


def measure_kept_diversity(
    tuned_right: Sequence[float],
    base_right: Sequence[float],
    tuned: Mapping[int, float],
    base: Mapping[int, float],
    keys: Sequence[tuple[int, int]],
) -> float:
    """Diversity of the tuned side over the base's, on prompts whose images are all right on both sides."""
    wrong = {i for (i, _), *both in zip(keys, tuned_right, base_right, strict=True) if not all(both)}
    good = sorted({i for i, _ in keys} - wrong)
    base_total = sum(base[i] for i in good)
    return sum(tuned[i] for i in good) / base_total if base_total else float("nan")


@torch.no_grad()
def measure_upper_bound(scenes: Sequence[Scene], classifier: Classifier, name: str, out: Path) -> str:
    """Accuracy and diversity of rendered images of these scenes, two of each, after the model's autoencoder.

    `out` holds a comparison with two images of each scene by the base, whose diversity includes mistakes. Needs the
    emoji font.
    """
    model = Backbone.open(name)
    keys = [(i, j) for i in range(len(scenes)) for j in range(2)]
    rendered: list[Image.Image] = []
    for first in range(0, len(keys), 20):
        batch = [replace(scenes[i], seed=TRUE_PICTURES[2 * i + j]) for i, j in keys[first : first + 20]]
        clean = prepare_images([render(scene).image for scene in batch])
        rendered += [to_image(image) for image in model.decode(model.encode(clean).mean).cpu()]
    right = score_correctness(rendered, scenes, keys, classifier)
    base_images = _read_images(out, "base", keys)
    base_right = score_correctness(base_images, scenes, keys, classifier)
    base_diversity, true_diversity = (measure_diversity(images, keys) for images in (base_images, rendered))
    # The base's diversity by the number of its two images that are right.
    by_count: dict[int, list[float]] = {}
    for i in range(len(scenes)):
        by_count.setdefault(int(sum(base_right[2 * i : 2 * i + 2])), []).append(base_diversity[i])
    base_mean, true_mean = (sum(values.values()) / len(values) for values in (base_diversity, true_diversity))
    parts = ", ".join(
        f"{count} right: {sum(values) / len(values):.3f}" for count, values in sorted(by_count.items())
    )
    return (
        f"True pictures through the autoencoder: {wilson_interval(sum(right), len(right))} all right, "
        f"diversity {true_mean:.3f}, {true_mean / base_mean:.2f} of the base's {base_mean:.3f} "
        f"(of two pictures {parts})."
    )


def find_base_images(folder: Path) -> Path | None:
    """Folder of the base's images of an earlier comparison; None before the first."""
    return next(iter(sorted(folder.glob("*/base"))), None)


def is_all_right(scene: Scene, prediction: Prediction) -> bool:
    """Whether the classifier finds every attribute that the caption asks for."""
    return all(question.passes(scene, prediction) for question in QUESTIONS if question.applies(scene))


def format_table(rows: Sequence[Row]) -> str:
    """Markdown table with a row for each run, and its seconds."""
    scorers = list(rows[0][1].wins) if rows else []
    rates = [f"win rate, {Path(scorer).stem} (95 %)" for scorer in scorers]
    heads = ["run", "all right", "base", "difference (95 %)", *rates, "diversity", "of right ones"]
    times = list(rows[0][2]) if rows else []
    lines = ["| " + " | ".join([*heads, *times]) + " |", "|" + "---|" * (len(heads) + len(times))]
    for name, comparison, seconds in rows:
        change = comparison.difference
        cells = [
            name, f"{comparison.tuned.value:.1%}", f"{comparison.base.value:.1%}",
            f"{100 * change.value:+.1f} ({100 * change.low:+.1f} to {100 * change.high:+.1f}) points",
            *(str(comparison.wins[scorer]) for scorer in scorers), f"{comparison.diversity:.2f}",
            f"{comparison.of_right:.2f}",
            *(f"{value:.0f} s" if isinstance(value, float) else str(value) for value in seconds.values()),
        ]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", f"n = {rows[0][1].n if rows else 0} pictures a side."])


def _read_images(out: Path, side: str, keys: Sequence[tuple[int, int]]) -> list[Image.Image]:
    return [Image.open(out / side_image_name(side, *key)).convert("RGB") for key in keys]


def score_correctness(
    images: Sequence[Image.Image],
    scenes: Sequence[Scene],
    keys: Sequence[tuple[int, int]],
    classifier: Classifier,
) -> list[float]:
    """1 for each image (i, j) that shows every attribute of its scene, else 0."""
    predictions = classifier.classify(images)
    return [
        float(is_all_right(scenes[i], prediction))
        for (i, _), prediction in zip(keys, predictions, strict=True)
    ]
