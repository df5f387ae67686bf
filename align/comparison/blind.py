"""Blind comparison by a person, who chooses without knowing which side is which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.comparison.sides import BASE, side_image_name, tuned_side_name
from align.pairs.choices import CHOICES, Choice, measure_consistency, read_choices, standing_choices
from backbone.evaluation.statistics import Interval, wilson_interval
from backbone.io.console import format_count
from backbone.io.files import write_json
from backbone.io.prompts import Prompt

BLIND = "blind.json"


def iterate_blind_pairs(
    prompts: Sequence[Prompt], per_prompt: int, tuned_scale: float = 1.0
) -> Iterator[tuple[str, str, str, str]]:
    """Yield (pair name, prompt, base's file, tuned's file) of all images to compare on the labelling page."""
    for i, prompt in enumerate(prompts):
        for j in range(per_prompt):
            yield (
                f"p{i:05d}-s{j:02d}",
                prompt.text,
                side_image_name(BASE, i, j),
                side_image_name(tuned_side_name(tuned_scale), i, j),
            )


def summarize_choices(folder: Path) -> dict[str, Any]:
    """Win rate of the tuned side over the pairs answered and not skipped so far, and the labeller's consistency."""
    choices = standing_choices(read_choices(folder / CHOICES))
    first = [choice for choice in choices if not choice.repeat and choice.verdict != "skip"]
    wins = sum(_is_tuned(choice) for choice in first)
    ties = sum(choice.preferred is None for choice in first)
    agreed = measure_consistency(choices)
    return {
        "rate": wilson_interval(wins + 0.5 * ties, len(first))._asdict(),
        "wins": wins,
        "ties": sum(choice.verdict == "tie" for choice in first),
        "both_bad": sum(choice.verdict == "both_bad" for choice in first),
        "losses": len(first) - wins - ties,
        "agreed_with_themselves": {
            "of_repeats": agreed.repeats, **wilson_interval(agreed.agreed, agreed.repeats)._asdict()
        },
    }  # fmt: skip


def write_blind_result(folder: Path) -> dict[str, Any]:
    """Write `summarize_choices` to `blind.json` in the comparison's folder, and return it."""
    result = summarize_choices(folder)
    write_json(folder / BLIND, result)
    return result


def format_blind_result(result: Mapping[str, Any]) -> str:
    """One line for people."""
    count = result["wins"] + result["ties"] + result["both_bad"] + result["losses"]
    agreed = result["agreed_with_themselves"]
    agreement = Interval(agreed["value"], agreed["low"], agreed["high"])
    consistency = (
        f"; on {agreed['of_repeats']} repeats they agreed with themselves {agreement}"
        if agreed["of_repeats"]
        else ""
    )
    pictures = format_count(count, "picture")
    return (
        f"blind: tuned wins {Interval(**result['rate'])} of {pictures} ({result['ties']} ties){consistency}"
    )


def _is_tuned(choice: Choice) -> bool:
    return choice.preferred is not None and not choice.preferred.startswith(f"{BASE}/")
