"""Preferences from scorers: each prompt's pictures are scored, and pairs made of those that differ enough."""

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
from align.pairs.prompts import Prompt, strip_tokens
from align.pairs.records import RANKING, SAMPLES, SCORES
from align.pairs.samples import count_images, image_name, prompt_and_noise, read_samples
from backbone.io.console import UserError, progress
from backbone.io.files import read_json, write_json, write_text
from backbone.media.decode import open_rgb
from backbone.media.pictures import Picture, check

Rule = Literal["best-worst", "all", "own", "same-noise", "best-hard-negative"]
RowPair: TypeAlias = tuple[int, int]
"""Rows of two pictures that are compared."""


@dataclass(frozen=True)
class RankedPair:
    """A pair that the scorers made: two pictures of prompt i, the better one first, and by how much."""

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
    """Scores a pairs folder's pictures, writes `scores.json` and `ranking.jsonl`, and gives the number of pairs.

    A rule pairs each prompt's best picture with its worst, or all of them, or all that are no hard negatives
    (`own`); or
    each hard negative with the prompt's own picture from the same noise, or with the prompt's best ones, whichever
    of the
    two is better. What several rules pair is put together, each pair once. `margin` is the least
    difference that makes a pair; of several scorers, in standard deviations of their weighted sum. With `agree` only
    pairs on whose order all scorers agree are kept (a Pareto order).
    """
    began = time.perf_counter()
    prompts, pictures = read_samples(folder)
    files = [(i, name) for i, names in enumerate(pictures) for name in names]
    check(Picture(folder / name) for _, name in files)
    concepts = read_json(folder / SAMPLES).get("concepts", [])
    read = [replace(prompt, text=strip_tokens(prompt.text, concepts)) for prompt in prompts]
    found = {scorer: score_images(folder, scorer, read, files) for scorer in dict.fromkeys(scorers)}
    each = list(found.values())
    total = each[0] if len(each) == 1 else combine_scores(each, list(weights) or [1.0] * len(each))
    matches = (match for rule in rules for match in select_rows(rule, prompts, files, folder, total))
    every = list({frozenset(match): match for match in matches}.values())
    pairs = list(order_pairs(files, every, total, each if agree else [], margin=margin))
    if not pairs:
        raise UserError(
            f"No two pictures of a prompt in {folder} differ by more than {margin:g}. Lower --margin, or draw more "
            "pictures of each prompt."
        )
    seconds = round(time.perf_counter() - began, 2)
    lines = {
        name: {scorer: round(float(one[row]), 6) for scorer, one in found.items()}
        for row, (_, name) in enumerate(files)
    }
    write_json(folder / SCORES, {"scorers": list(found), "seconds": seconds, "scores": lines})
    write_text(folder / RANKING, "".join(_format_line(pair, prompts) for pair in pairs))
    return len(pairs)


def score_images(
    folder: Path, scorer: str, prompts: Sequence[Prompt], files: Sequence[tuple[int, str]], *, batch: int = 32
) -> Tensor:
    """A scorer's numbers [B] for the pictures (prompt number, file)."""
    judge = open_scorer(scorer)
    parts = []
    with progress(len(files), f"scoring with {scorer}") as bar:
        for first in range(0, len(files), batch):
            some = files[first : first + batch]
            images = [open_rgb(folder / name) for _, name in some]
            parts.append(judge(images, [prompts[i].text for i, _ in some]))
            bar.advance(len(some), images=len(some))
    return torch.cat(parts)


def select_rows(
    rule: Rule, prompts: Sequence[Prompt], files: Sequence[tuple[int, str]], folder: Path, total: Tensor
) -> Iterator[RowPair]:
    """Rows of the pictures that meet by this rule; `UserError` where it needs hard negatives and there are none."""
    if rule == "best-worst" or rule == "all":
        return pair_within_prompts(range(len(files)), files, total, rule)
    per_prompt = int(read_json(folder / SAMPLES)["per_prompt"])
    if rule == "own":
        names = {image_name(i, j) for i in range(len(prompts)) for j in range(per_prompt)}
        return pair_within_prompts(
            [row for row, (_, name) in enumerate(files) if name in names], files, total, "all"
        )
    if not any(prompt.hard_negatives for prompt in prompts):
        raise UserError(
            f"{folder} was drawn without hard negatives. Give some prompts a list "
            "`hard_negatives`, or choose other --pairs."
        )
    rows = {name: row for row, (_, name) in enumerate(files)}
    if rule == "same-noise":
        return pair_same_noise(prompts, rows, per_prompt)
    return pair_best_with_negatives(prompts, rows, per_prompt, total)


def pair_within_prompts(
    chosen: Sequence[int], files: Sequence[tuple[int, str]], total: Tensor, rule: Rule = "best-worst"
) -> Iterator[RowPair]:
    """Of the chosen rows those of each prompt that meet: its best and its worst, or all, two and two."""
    rows: dict[int, list[int]] = {}
    for row in chosen:
        rows.setdefault(files[row][0], []).append(row)
    for own in rows.values():
        ordered = sorted(own, key=lambda row: -float(total[row]))
        yield from [(ordered[0], ordered[-1])] if rule == "best-worst" else combinations(ordered, 2)


def pair_same_noise(prompts: Sequence[Prompt], rows: Mapping[str, int], per_prompt: int) -> Iterator[RowPair]:
    """Rows of each hard negative and of the prompt's own picture from the same noise, where both are there."""
    for i, prompt in enumerate(prompts):
        for j in range(per_prompt, count_images(prompt, per_prompt)):
            own, near = image_name(i, prompt_and_noise(prompt, j, per_prompt)[1]), image_name(i, j)
            if own in rows and near in rows:
                yield rows[own], rows[near]


def pair_best_with_negatives(
    prompts: Sequence[Prompt], rows: Mapping[str, int], per_prompt: int, total: Tensor
) -> Iterator[RowPair]:
    """Rows of each prompt's best own pictures, as many as it has hard negatives, and of these in their order."""
    for i, prompt in enumerate(prompts):
        names = [image_name(i, j) for j in range(count_images(prompt, per_prompt))]
        own, near = (
            [rows[n] for n in some if n in rows] for some in (names[:per_prompt], names[per_prompt:])
        )
        yield from zip(sorted(own, key=lambda row: -float(total[row])), near, strict=False)


def order_pairs(
    files: Sequence[tuple[int, str]],
    matches: Sequence[RowPair],
    total: Tensor,
    each: Sequence[Tensor] = (),
    *,
    margin: float = 0.0,
) -> Iterator[RankedPair]:
    """The pairs of those that met: the better picture and the worse, where they differ by more than the margin.

    `each` holds single scorers' numbers that must agree on a pair's order.
    """
    for match in matches:
        better, worse = sorted(match, key=lambda row: -float(total[row]))
        difference = float(total[better] - total[worse])
        if difference > margin and all(float(one[better]) > float(one[worse]) for one in each):
            yield RankedPair(files[better][0], files[better][1], files[worse][1], difference)


def _format_line(pair: RankedPair, prompts: Sequence[Prompt]) -> str:
    import json

    line = {"prompt": prompts[pair.prompt].text, "chosen": pair.chosen, "rejected": pair.rejected}
    return json.dumps({**line, "margin": round(pair.margin, 6)}, ensure_ascii=False) + "\n"
