"""The restated references do what ours does, by the evaluations that they are said to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from backbone.models.model import Backbone
from benchmarks.speed import edit as edit_speed
from benchmarks.speed.edit import (
    CROSS,
    SELF,
    SOURCE,
    TARGETS,
    EditSpeedSettings,
    add_up,
    compose_edits,
    count_rows,
    run_direct_reference,
    run_null_text_reference,
    sample_image,
    time_calls,
)
from edit.inversion.inversion import invert
from edit.methods.prompt_to_prompt.replace import replace
from edit.methods.prompt_to_prompt.settings import ReplaceSettings

STEPS = 4


@pytest.fixture
def rows(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many samples the denoiser is asked about, call by call."""
    found: list[int] = []
    forward = cast(Any, tiny.denoiser).forward

    def counted(sample: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        found.append(len(sample))
        return forward(sample, *arguments, **more)

    monkeypatch.setattr(tiny.denoiser, "forward", counted)
    return found


@pytest.mark.parametrize("target", [TARGETS[0], TARGETS[2]], ids=["replaced", "refined"])
def test_direct_inversion_as_published_and_ours_give_the_same_edit(
    tiny: Backbone, rows: list[int], target: str
) -> None:
    image = sample_image(tiny)
    reference = run_direct_reference(tiny, image, target, steps=STEPS, guidance=4.0)
    assert sum(rows) == 13 * STEPS == count_rows(STEPS)["Direct + P2P"]
    rows.clear()
    ours = replace(
        invert(tiny, image, SOURCE, steps=STEPS),
        target,
        ReplaceSettings(cross=CROSS, self_attention=SELF, guidance=4.0, blend=()),
    )
    assert sum(rows) < 0.35 * 13 * STEPS
    assert torch.allclose(reference[1], ours.latents[0], atol=1e-3)
    assert torch.allclose(reference[0], ours.source_latent, atol=1e-3)


@pytest.mark.parametrize("weights", ["trained", "frozen"])
def test_null_text_as_published_takes_its_evaluations_and_leaves_nothing_behind(
    tiny: Backbone, rows: list[int], weights: Any
) -> None:
    latents = run_null_text_reference(
        tiny, sample_image(tiny), TARGETS[0], steps=2, guidance=4.0, weights=weights
    )
    assert torch.isfinite(latents).all()
    assert sum(rows) == count_rows(2)["null-text + P2P"]
    assert all(p.grad is None and not p.requires_grad for p in tiny.denoiser.parameters())


def test_our_own_rows_are_counted_rightly(tiny: Backbone, rows: list[int]) -> None:
    for count, name in ((1, "ours"), (4, "ours, four targets")):
        rows.clear()
        replace(
            invert(tiny, sample_image(tiny), SOURCE, steps=5),
            TARGETS[:count],
            ReplaceSettings(cross=CROSS, blend=()),
        )
        assert sum(rows) == count_rows(5)[name]


def test_sides_are_timed_in_turn_and_the_first_time_does_not_count() -> None:
    calls: list[str] = []
    found = time_calls({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2)
    assert calls == ["a", "b"] * 3 and set(found) == {"a", "b"}


def test_totals_are_composed_of_steps_and_the_autoencoder(tiny_folder: Path) -> None:
    asked = EditSpeedSettings(shape="sd15", steps=5, repeats=1, null_text=False, precision="fp32")
    found = compose_edits(str(tiny_folder), asked)
    t, total = found["steps_seconds"], found["seconds"]
    around = t["encoding"] + t["decoding, 2"]
    assert list(total) == asked.sides and "inner iteration" not in t
    assert total["ours"] == pytest.approx(5 * t["1 row"] + 4 * t["3 rows, edited"] + t["2 rows"] + around)
    walks = t["1 row"] + t["4 rows"] + 2 * t["4 rows, whole matrices"]
    assert total["Direct + P2P"] == pytest.approx(5 * walks + around)


def test_null_text_is_composed_of_its_inner_iterations() -> None:
    kinds = (
        "1 row",
        "2 rows",
        "4 rows",
        "8 rows",
        "3 rows, edited",
        "9 rows, edited",
        "4 rows, whole matrices",
    )
    t = dict.fromkeys((*kinds, "inner iteration", "inner iteration, frozen", "encoding"), 1.0)
    totals = add_up({**t, "inner iteration": 3.0, "decoding, 2": 1.0, "decoding, 5": 2.0}, 5)
    assert totals["null-text + P2P"] == 5 * (2 + 1 + 1) + 5 * 10 * 3 + 2
    assert totals["null-text + P2P, frozen"] == 5 * (2 + 1 + 1) + 5 * 10 + 2
    assert totals["ours, four targets"] == 5 + 5 + 3


def test_the_table_compares_four_edits_with_four(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {
        "shape": "moji",
        "steps": 50,
        "repeats": 1,
        "machine": "",
        "rows": count_rows(50),
        "seconds": {"ours": 2.0, "Direct + P2P": 8.0, "ours, four targets": 4.0},
    }
    text = edit_speed.format_markdown(facts)
    assert "| Direct + P2P | 8.00 | 4.00 | 650 |" in text
    assert "take 8.00 × as long" in text and "| ours | 2.00 | 1.00 | 190 |" in text
