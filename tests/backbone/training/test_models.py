"""The model of a run as its settings place it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from backbone.training.models import open_model

USUAL: dict[str, Any] = {
    "device": "cpu", "precision": "fp32", "quantize": "", "cpu_offload": 0.0, "vae_tiling": False,
    "text_on_cpu": False, "one_by_one": False, "sample_steps": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"cpu_offload": 0.5}, "--cpu-offload has no effect on a CPU"),
        (
            {"text_on_cpu": True, "cpu_offload": 1.0},
            "--cpu-offload and --text-on-cpu have no effect on a CPU",
        ),
        ({"vae_tiling": True}, ""),
        ({}, ""),
    ],
)
def test_what_a_cpu_has_anyway_is_said(
    asked: dict[str, Any], said: str, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is not refused: the same settings may serve on a GPU."""
    open_model(SimpleNamespace(model=str(tiny_folder), **{**USUAL, **asked}))
    found = " ".join(capsys.readouterr().err.split())
    assert said in found and ("no effect" in found) == bool(said)
