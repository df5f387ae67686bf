"""Blind comparison: a person chooses without knowing which side is which."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from align.compare.sides import BASE, picture_name, tuned_folder
from align.pairs.choices import CHOICES, Choice, consistency, effective, read_choices
from backbone.evaluation.statistics import Interval, wilson_interval
from backbone.io.files import write_json
from backbone.io.prompts import Prompt

BLIND = "blind.json"


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
        "rate": wilson_interval(wins + 0.5 * even, len(first))._asdict(),
        "wins": wins,
        "ties": sum(choice.verdict == "tie" for choice in first),
        "both_bad": sum(choice.verdict == "both_bad" for choice in first),
        "losses": len(first) - wins - even,
        "agreed_with_themselves": {
            "of_repeats": agreed.repeats, **wilson_interval(agreed.agreed, agreed.repeats)._asdict()
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
