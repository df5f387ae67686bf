"""Make preferences with scorers: score the images of each prompt, and pair those that differ enough."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from align.collect.scorers import combine_scores, open_scorer
from align.pairs.prompts import strip_tokens
from align.pairs.records import RANKING, SAMPLES, SCORES, SamplesRecord
from align.pairs.samples import count_images, image_name, prompt_and_noise, read_samples, sample_index
from backbone.io.console import UserError, notify
from backbone.io.files import atomic_write, read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.io.prompts import Prompt
from backbone.io.run_folder import hold_folder, refuse_unwritable
from backbone.media.sources.decode import open_rgb
from backbone.media.sources.pictures import check_images
from backbone.media.sources.record import ImageRecord

Rule = Literal["best-worst", "all", "own", "same-noise", "best-hard-negative"]
RowPair: TypeAlias = tuple[int, int]
"""Rows of two images that are compared."""


@dataclass(frozen=True)
class RankedPair:
    """Two images of prompt `prompt`, the better-scored first, and the difference of their scores."""

    prompt: int
    chosen: str
    rejected: str
    margin: float


def rank_samples(
    folder: Path,
    scorers: Sequence[str],
    *,
    weights: Sequence[float] = (),
    rules: Sequence[Rule] = ("best-worst",),
    margin: float = 0.0,
    agree: bool = False,
) -> int:
    """Score a folder of `align sample`, write `scores.json` and `ranking.jsonl`; returns the number of pairs.

    rules     which images of a prompt are compared (the union of all, each pair once):
              best-worst           its best and its worst
              all                  every two
              own                  every two that are no hard negatives
              same-noise           each hard negative with the prompt's own image from the same noise
              best-hard-negative   each hard negative with one of the prompt's best own images
    margin    least difference of scores that makes a pair; of several scorers, of their combined standard scores
    agree     keep only pairs on whose order all scorers agree (Pareto order)

    Raises `UserError` where no pair is left.
    """
    if repeated := next((scorer for scorer in scorers if list(scorers).count(scorer) > 1), None):
        raise UserError(f"--scorer {repeated} is named twice, and would count once. Leave one out.")
    refuse_unwritable(folder)  # before anything is scored
    began = time.perf_counter()
    prompts, images = read_samples(folder)
    files = [(i, name) for i, names in enumerate(images) for name in names]
    check_images([ImageRecord(folder / name) for _, name in files])
    concepts = read_json(folder / SAMPLES, SamplesRecord).concepts
    plain_prompts = [replace(prompt, text=strip_tokens(prompt.text, concepts)) for prompt in prompts]
    scores = {scorer: score_images(folder, scorer, plain_prompts, files) for scorer in scorers}
    single_scores = list(scores.values())
    _say_constant(scores)
    total = (
        single_scores[0]
        if len(single_scores) == 1
        else combine_scores(single_scores, list(weights) or [1.0] * len(single_scores))
    )
    # Several rules may compare the same two images; the first mention counts.
    row_pairs = (rows for rule in rules for rows in select_rows(rule, prompts, files, folder, total))
    unique = list({frozenset(rows): rows for rows in row_pairs}.values())
    pairs = list(order_pairs(files, unique, total, single_scores if agree else [], margin=margin))
    if not pairs:
        apart = f"differ by more than {margin:g}" if margin else "differ in score"
        remedy = "Lower --margin" if margin else "Take a scorer that tells them apart"
        raise UserError(
            f"No two pictures of a prompt in {folder} {apart}{' in the order of all scorers' * agree}. {remedy}, or "
            "draw more pictures of each prompt."
        )
    by_file = _list_by_file(scores, files)
    seconds = round(time.perf_counter() - began, 2)
    lines = "".join(_format_line(pair, prompts) for pair in pairs)
    # Both files or neither: with a full disk one of them could be incomplete
    with (
        hold_folder(folder),
        atomic_write(folder / SCORES) as scored,
        atomic_write(folder / RANKING) as ranked,
    ):
        write_json(scored, {"scorers": list(scores), "seconds": seconds, "scores": by_file})
        write_text(ranked, lines)
    return len(pairs)


def _say_constant(scores: Mapping[str, Tensor]) -> None:
    """Print which of several scorers gives all images the same number, so that the others decide alone."""
    for scorer, values in scores.items():
        if len(scores) > 1 and bool((values == values[0]).all()):
            notify(
                f"{scorer} gives every image the same number, {float(values[0]):g}, so it decides nothing."
            )


def _list_by_file(
    scores: Mapping[str, Tensor], files: Sequence[tuple[int, str]]
) -> dict[str, dict[str, float]]:
    """Each image's score by each scorer, as in `scores.json`."""
    return {
        name: {scorer: round(float(values[row]), 6) for scorer, values in scores.items()}
        for row, (_, name) in enumerate(files)
    }


def score_images(
    folder: Path, scorer: str, prompts: Sequence[Prompt], files: Sequence[tuple[int, str]], *, batch: int = 32
) -> Tensor:
    """Scores [B] of the images (prompt index, file) for their prompts."""
    score = open_scorer(scorer)
    parts = []
    with progress(len(files), f"scoring with {scorer}") as bar:
        for first in range(0, len(files), batch):
            chunk = files[first : first + batch]
            images = [open_rgb(folder / name) for _, name in chunk]
            parts.append(score(images, [prompts[i].text for i, _ in chunk]))
            bar.advance(len(chunk), images=len(chunk))
    return torch.cat(parts)


def select_rows(
    rule: Rule, prompts: Sequence[Prompt], files: Sequence[tuple[int, str]], folder: Path, total: Tensor
) -> Iterator[RowPair]:
    """Yield the pairs of rows that a rule compares; `UserError` where it needs hard negatives and there are none."""
    if rule == "best-worst" or rule == "all":
        return pair_within_prompts(range(len(files)), files, total, rule)
    per_prompt = read_json(folder / SAMPLES, SamplesRecord).per_prompt
    if rule == "own":
        own_rows = [row for row, (_, name) in enumerate(files) if sample_index(name) < per_prompt]
        return pair_within_prompts(own_rows, files, total, "all")
    if not any(prompt.hard_negatives for prompt in prompts):
        raise UserError(
            f"{folder} was drawn without hard negatives. Give some prompts a list `hard_negatives`, or choose "
            "another --rule."
        )
    rows = {name: row for row, (_, name) in enumerate(files)}
    if rule == "same-noise":
        return pair_same_noise(prompts, rows, per_prompt)
    return pair_best_with_negatives(prompts, rows, per_prompt, total)


def pair_within_prompts(
    rows: Sequence[int], files: Sequence[tuple[int, str]], total: Tensor, rule: Rule = "best-worst"
) -> Iterator[RowPair]:
    """Yield index pairs to compare for each prompt: (best, worst), or all combinations."""
    by_prompt: dict[int, list[int]] = {}
    for row in rows:
        by_prompt.setdefault(files[row][0], []).append(row)
    for prompt_rows in by_prompt.values():
        ordered = sorted(prompt_rows, key=lambda row: -float(total[row]))
        yield from [(ordered[0], ordered[-1])] if rule == "best-worst" else combinations(ordered, 2)


def pair_same_noise(prompts: Sequence[Prompt], rows: Mapping[str, int], per_prompt: int) -> Iterator[RowPair]:
    """Yield (own, hard negative) rows of images from the same noise; `rows` maps the files that exist to rows."""
    for i, prompt in enumerate(prompts):
        for j in range(per_prompt, count_images(prompt, per_prompt)):
            _, noise = prompt_and_noise(prompt, j, per_prompt)
            image, negative = image_name(i, noise), image_name(i, j)
            if image in rows and negative in rows:
                yield rows[image], rows[negative]


def pair_best_with_negatives(
    prompts: Sequence[Prompt], rows: Mapping[str, int], per_prompt: int, total: Tensor
) -> Iterator[RowPair]:
    """Yield (own, hard negative) rows: a prompt's best own images, best first, with its hard negatives in order."""
    for i, prompt in enumerate(prompts):
        names = [image_name(i, j) for j in range(count_images(prompt, per_prompt))]
        images, negatives = (
            [rows[name] for name in part if name in rows] for part in (names[:per_prompt], names[per_prompt:])
        )
        yield from zip(sorted(images, key=lambda row: -float(total[row])), negatives, strict=False)


def order_pairs(
    files: Sequence[tuple[int, str]],
    row_pairs: Sequence[RowPair],
    total: Tensor,
    single_scores: Sequence[Tensor] = (),
    *,
    margin: float = 0.0,
) -> Iterator[RankedPair]:
    """Yield pairs as (better, worse) by `total`, where they differ by more than the margin.

    Each of `single_scores` must agree on the order.
    """
    for rows in row_pairs:
        better, worse = sorted(rows, key=lambda row: -float(total[row]))
        difference = float(total[better] - total[worse])
        has_agreement = all(float(scores[better]) > float(scores[worse]) for scores in single_scores)
        if difference > margin and has_agreement:
            yield RankedPair(files[better][0], files[better][1], files[worse][1], difference)


def _format_line(pair: RankedPair, prompts: Sequence[Prompt]) -> str:
    import json

    line = {"prompt": prompts[pair.prompt].text, "chosen": pair.chosen, "rejected": pair.rejected}
    return json.dumps({**line, "margin": round(pair.margin, 6)}, ensure_ascii=False) + "\n"
