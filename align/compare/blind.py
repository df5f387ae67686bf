"""Blind comparison: a person chooses without knowing which side is which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.compare.sides import BASE, side_image_name, tuned_side_name
from align.pairs.choices import CHOICES, Choice, measure_consistency, read_choices, replay
from align.pairs.prompts import Prompt
from backbone.evaluation.statistics import Interval, wilson
from backbone.io.files import write_json

BLIND = "blind.json"


def iterate_blind_pairs(
    prompts: Sequence[Prompt], per_prompt: int, tuned_scale: float = 1.0
) -> Iterator[tuple[str, str, str, str]]:
    """(pair's name, prompt, base's file, tuned's file) of every picture that can be compared, for the page."""
    for i, prompt in enumerate(prompts):
        for j in range(per_prompt):
            yield (
                f"p{i:05d}-s{j:02d}",
                prompt.text,
                side_image_name(BASE, i, j),
                side_image_name(tuned_side_name(tuned_scale), i, j),
            )


def summarize_choices(folder: Path) -> dict[str, Any]:
    """What the person said so far: the tuned side's win rate over the pairs that were not skipped."""
    choices = replay(read_choices(folder / CHOICES))
    first = [choice for choice in choices if not choice.repeat and choice.verdict != "skip"]
    wins = sum(_is_tuned(choice) for choice in first)
    even = sum(choice.preferred is None for choice in first)
    agreed = measure_consistency(choices)
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


def write_blind_result(folder: Path) -> dict[str, Any]:
    """Writes `blind.json` beside the comparison, and gives what it says."""
    found = summarize_choices(folder)
    write_json(folder / BLIND, found)
    return found


def format_blind_result(found: Mapping[str, Any]) -> str:
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
