"""Preferences from scorers: each prompt's pictures are scored, and pairs made of those that differ enough."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from align.pairs import RANKING, SAMPLES, SCORES
from align.prompts import Prompt, without_tokens
from align.samples import read_samples
from align.scoring import open_judge, together
from backbone.console import UserError, progress
from backbone.files import read_json, write_json, write_text
from backbone.images import Picture, check, open_rgb

Rule = Literal["best-worst", "all"]


@dataclass(frozen=True)
class Ranked:
    """A pair that the scorers made: two pictures of prompt i, the better one first, and by how much."""

    prompt: int
    chosen: str
    rejected: str
    margin: float


def rank(
    folder: Path,
    scorers: Sequence[str],
    *,
    weights: Sequence[float] = (),
    rule: Rule = "best-worst",
    margin: float = 0.0,
    agree: bool = False,
) -> int:
    """Scores a pairs folder's pictures, writes `scores.json` and `ranking.jsonl`, and gives the number of pairs.

    `margin` is the least difference that makes a pair; of several scorers, in standard deviations of their weighted
    sum. With `agree` only pairs on whose order all scorers agree are kept (a Pareto order).
    """
    began = time.perf_counter()
    prompts, pictures = read_samples(folder)
    files = [(i, name) for i, names in enumerate(pictures) for name in names]
    check(Picture(folder / name) for _, name in files)
    concepts = read_json(folder / SAMPLES).get("concepts", [])
    read = [replace(prompt, text=without_tokens(prompt.text, concepts)) for prompt in prompts]
    found = {scorer: scores_of(folder, scorer, read, files) for scorer in dict.fromkeys(scorers)}
    each = list(found.values())
    total = each[0] if len(each) == 1 else together(each, list(weights) or [1.0] * len(each))
    pairs = list(paired(files, total, each if agree else [], rule=rule, margin=margin))
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
    write_text(folder / RANKING, "".join(_line(pair, prompts) for pair in pairs))
    return len(pairs)


def scores_of(
    folder: Path, scorer: str, prompts: Sequence[Prompt], files: Sequence[tuple[int, str]], *, batch: int = 32
) -> Tensor:
    """A scorer's numbers [B] for the pictures (prompt number, file)."""
    judge = open_judge(scorer)
    parts = []
    with progress(len(files), f"scoring with {scorer}") as bar:
        for first in range(0, len(files), batch):
            some = files[first : first + batch]
            images = [open_rgb(folder / name) for _, name in some]
            parts.append(judge(images, [prompts[i].text for i, _ in some]))
            bar.advance(len(some), images=len(some))
    return torch.cat(parts)


def paired(
    files: Sequence[tuple[int, str]],
    total: Tensor,
    each: Sequence[Tensor] = (),
    *,
    rule: Rule = "best-worst",
    margin: float = 0.0,
) -> Iterator[Ranked]:
    """The pairs of each prompt: its best against its worst picture, or all that differ by more than the margin.

    `each` holds single scorers' numbers that must agree on a pair's order.
    """
    rows: dict[int, list[int]] = {}
    for row, (i, _) in enumerate(files):
        rows.setdefault(i, []).append(row)
    for i, own in rows.items():
        ordered = sorted(own, key=lambda row: -float(total[row]))
        candidates = [(ordered[0], ordered[-1])] if rule == "best-worst" else list(combinations(ordered, 2))
        for better, worse in candidates:
            difference = float(total[better] - total[worse])
            if difference > margin and all(float(one[better]) > float(one[worse]) for one in each):
                yield Ranked(i, files[better][1], files[worse][1], difference)


def _line(pair: Ranked, prompts: Sequence[Prompt]) -> str:
    import json

    line = {"prompt": prompts[pair.prompt].text, "chosen": pair.chosen, "rejected": pair.rejected}
    return json.dumps({**line, "margin": round(pair.margin, 6)}, ensure_ascii=False) + "\n"
