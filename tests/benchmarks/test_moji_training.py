"""The ways of a training step that are compared take the same step."""

from __future__ import annotations

from dataclasses import replace

import pytest

from recipes.moji.training.speed import WAYS, Way, format_markdown, iterate_steps


def test_every_row_differs_from_the_recipe_in_one_thing() -> None:
    recipe, *others = WAYS.values()
    assert recipe == Way()
    assert all(sum(getattr(way, name) != getattr(recipe, name) for name in vars(way)) == 1 for way in others)


@pytest.mark.slow
def test_steps_are_taken_and_timed() -> None:
    way = replace(Way(), batch=1)
    seconds = list(iterate_steps(way, 0, 2))
    assert len(seconds) == 2
    assert min(seconds) > 0


def test_the_table_counts_latents_of_all_processes() -> None:
    medians = dict.fromkeys(WAYS, 2.0)
    text = format_markdown(medians, {"aten::mm": 0.75, "aten::add": 0.25})
    assert "| the recipe, one process | 32 | 2.00 | 16.0 | 1.00 × |" in text
    assert "| the recipe, two processes | 64 | 2.00 | 32.0 | 2.00 × |" in text
    assert text.index("| `aten::mm` | 75.0 % |") < text.index("| `aten::add` | 25.0 % |")
    with pytest.raises(KeyError):
        format_markdown({"an unknown way": 1.0}, {})
