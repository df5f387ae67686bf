"""What a preference run has logged, of which anybody may have written a line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from align.objectives.metrics import Figures
from align.settings import EVALUATIONS, REWARDS, Settings
from align.training.reporting.logs import LoggedStep, read_evaluations, read_rewards, read_steps
from align.training.reporting.report import draw_curves, smooth_log
from backbone.evaluation.statistics import Interval
from backbone.io.console import UserError
from backbone.io.files import append_jsonl
from backbone.training.run import LOG

FOUND = Figures(Interval(0.75, 0.5, 1.0), (0.5, math.nan, 1.0, 0.5), -0.01, 0.02, 4, 8)
LINES: dict[str, dict[str, Any]] = {
    EVALUATIONS: {"step": 2, "noise_gap": math.nan, "held_out": FOUND.as_json(), "training": None},
    LOG: {"step": 2, "loss": 0.5, "reward": 0.25, "gradient_norm": 1.0},
    REWARDS: {"round": 0, "reward": 0.5},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for name, line in LINES.items():
        append_jsonl(tmp_path / name, line)
    return tmp_path


def test_what_was_logged_is_read_back_and_drawn(run: Path) -> None:
    (evaluation,), (step,), (reward,) = read_evaluations(run), read_steps(run), read_rewards(run)
    assert evaluation.held_out is not None and evaluation.held_out.accuracy.low == 0.5
    assert evaluation.noise_gap is None and evaluation.held_out.by_level == (0.5, None, 1.0, 0.5)
    assert (step.loss, step.reward, reward.reward) == (0.5, 0.25, 0.5)
    drawn = "".join(draw_curves(run, Settings(loss="draft", online="moji")))
    for title in ("Accuracy, held out", "Mean score of each round", "Reward", "Loss"):
        assert title in drawn
    assert "Accuracy, training" not in drawn and "Seen/unseen" not in drawn  # nothing to draw of these


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (EVALUATIONS, {"step": "2"}, "step is '2'"),
        (EVALUATIONS, {"noise_gap": [1]}, "noise_gap is"),
        (EVALUATIONS, {"held_out": 3}, "held_out is 3"),
        (
            EVALUATIONS,
            {"held_out": {**FOUND.as_json(), "winner_change": "x"}},
            "held_out.winner_change is 'x'",
        ),
        (
            EVALUATIONS,
            {"training": {**FOUND.as_json(), "accuracy": {"value": 1}}},
            "no training.accuracy.low",
        ),
        (LOG, {"loss": None}, "loss is null"),
        (LOG, {"reward": {}}, "reward is {}"),
        (REWARDS, {"round": 0.5}, "round is 0.5"),
    ],
)
def test_a_line_of_another_type_is_named_with_its_file_and_key(
    run: Path, name: str, change: dict[str, Any], said: str
) -> None:
    append_jsonl(run / name, {**LINES[name], **change})
    with pytest.raises(UserError) as caught:
        draw_curves(run, Settings(loss="draft", online="moji"))
    assert f"{name} is damaged" in str(caught.value) and said in str(caught.value)


def test_a_long_log_is_drawn_as_the_means_of_neighbours() -> None:
    log = [LoggedStep(n + 1, float(n), float(n) if n % 2 else None) for n in range(400)]
    points = smooth_log(log)
    assert len(points) == 200 and points[0] == LoggedStep(2, 0.5, 1.0)
    assert [point.step for point in points[-2:]] == [398, 400]
