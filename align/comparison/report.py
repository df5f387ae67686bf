"""The report of a comparison: win rates, diversity, and images side by side."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from align.comparison.sides import BASE, Side, side_image_name
from backbone.cli.sampling import SamplingSettings
from backbone.evaluation.statistics import Interval
from backbone.io.console import format_count
from backbone.io.prompts import Prompt
from backbone.io.report import heading, image_figure, paragraph, table
from backbone.media.sheet import GREEN, Cell, draw_sheet
from backbone.media.sources.decode import open_rgb

PROMPTS_SHOWN = 24  # prompts whose pictures the report shows


def format_summary(result: Mapping[str, Any]) -> str:
    """Summary of a result for people: a line for each scorer and LoRA scale, and one for diversity."""
    lines = []
    for scorer, by_side in result["wins"].items():
        for name, wins in by_side.items():
            rate = Interval(**wins["rate"])
            pictures = format_count(wins["wins"] + wins["ties"] + wins["losses"], "picture")
            lines.append(
                f"{scorer}: {name} wins {rate} of {pictures} against {BASE} ({wins['ties']} ties), mean gain "
                f"{_format_gain(wins)}"
            )
    if result["diversity"]:
        base_diversity = result["diversity"][BASE]
        spread = ", ".join(f"{name} {value:.4f}" for name, value in result["diversity"].items())
        ratio = [
            value / base_diversity
            for name, value in result["diversity"].items()
            if name != BASE and base_diversity
        ]
        lines.append(f"diversity: {spread}" + (f" ({ratio[0]:.2f} of the base's)" if ratio else ""))
    return "\n".join(lines)


def build_report(
    out: Path,
    result: Mapping[str, Any],
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    scores: Mapping[str, Mapping[str, Tensor]],
) -> list[str]:
    """Build the parts of the comparison's `report.html`."""
    sampling: SamplingSettings = result["sampling"]
    tuned: Side = result["tuned"]
    guidance, tuned_guidance = sampling.describe_guidance(), tuned.override(sampling).describe_guidance()
    difference = "" if tuned_guidance == guidance else f" (the tuned side {tuned_guidance})"

    # Win rates of every side, for every scorer
    rows = [
        (scorer, name, str(Interval(**wins["rate"])), *_format_counts(wins), _format_gain(wins))
        for scorer, by_side in result["wins"].items()
        for name, wins in by_side.items()
    ]
    titles = ("win rate (95 %)", "wins", "ties", "losses", "mean gain (95 %)")
    parts = [
        paragraph(
            f"{len(prompts)} prompts, {result['per_prompt']} pictures of each from the same noise; "
            f"{sampling.sampler}, {sampling.steps} steps, guidance {guidance}{difference}, "
            f"seed {sampling.seed}."
        ),
        *(
            [paragraph(f"{', '.join(result['trained_on'])} also chose what the tuned model was trained on.")]
            if result["trained_on"]
            else []
        ),
        heading("How often is the tuned picture better?"),
        table(("scorer", "side", *titles), rows),
        paragraph(
            f"Ties (a difference of at most {result['tie']:g}) count half. The win rate's interval is Wilson's over "
            "pictures, the gain's a bootstrap over prompts."
        ),
    ]

    # Diversity, win rates by category, and images side by side
    if result["diversity"]:
        base_diversity = result["diversity"][BASE]
        spread = [
            (name, f"{value:.4f}", f"{value / base_diversity:.2f}" if base_diversity else "–")
            for name, value in result["diversity"].items()
        ]
        parts.append(heading("Do the pictures of a prompt still differ?"))
        parts.append(table(("side", "mean cosine distance", "of the base's"), spread))
    for scorer, groups in result["categories"].items():
        if len(groups) > 1:
            category_rows = [
                (name or "none", str(Interval(**wins["rate"])), *_format_counts(wins), _format_gain(wins))
                for name, wins in groups.items()
            ]
            parts += [heading(f"By category, {scorer}"), table(("category", *titles), category_rows)]
    return [*parts, *_draw_side_by_side(out, prompts, keys, scores)]


def _draw_side_by_side(
    out: Path,
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    scores: Mapping[str, Mapping[str, Tensor]],
) -> Iterator[str]:
    """Sheets of the first image of the first prompts from every side, the better one framed."""
    scorer, by_side = next(iter(scores.items()))
    yield heading("Side by side")
    yield paragraph(f"A green frame: the better one for {scorer}.")
    for row, (i, j) in enumerate(keys):
        if j or i >= PROMPTS_SHOWN:
            continue
        values = {name: float(scores[row]) for name, scores in by_side.items()}
        best = max(values.values()) if len(set(values.values())) > 1 else None
        cells = [
            Cell(
                open_rgb(out / side_image_name(name, i, j)),
                f"{name}, {value:.3f}",
                GREEN if value == best else None,
            )
            for name, value in values.items()
        ]
        yield image_figure(draw_sheet([cells]), prompts[i].text)


def _format_counts(wins: Mapping[str, Any]) -> tuple[str, str, str]:
    return str(wins["wins"]), str(wins["ties"]), str(wins["losses"])


def _format_gain(wins: Mapping[str, Any]) -> str:
    gain = wins["gain"]
    if math.isnan(gain["value"]):
        return "–"
    if math.isnan(gain["low"]):
        return f"{gain['value']:+.4f} (no interval: one prompt)"
    return f"{gain['value']:+.4f} ({gain['low']:+.4f} to {gain['high']:+.4f})"
