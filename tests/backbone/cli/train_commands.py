"""The `train` commands, and settings to call them with."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import align.cli
import customize.cli
from backbone.io.console import UserError

TRAINS = {"customize": customize.cli.app, "align": align.cli.app}
DOG = {"images": "my dog", "token": "[V]", "class_noun": "dog", "token_words": "fgh"}
TWO = {"subject": ("cat:[W]:cat:bcd",)}
ONLINE = {"online": "moji", "prompts": "p.txt"}
USUAL = {
    "rank": 8,
    "steps": 25,
    "guidance": 4.0,
    "align": {"learning_rate": 2e-4, "beta": 500.0, "safeguard": 0.6},
    "sheet_prompts": ["a {}"],
}


def parse_train(app: typer.Typer, line: str, monkeypatch: pytest.MonkeyPatch, module: Any) -> dict[str, Any]:
    """The settings that a command line requests of an app's `train`, without training; `module` holds its `start`."""
    import shlex

    requests: list[dict[str, Any]] = []

    def remember(requested: dict[str, Any], defaults: dict[str, Any]) -> None:
        requests.append(requested)
        raise UserError("requested")

    with monkeypatch.context() as patch:
        patch.setattr(module, "resolve_settings", remember)
        done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert isinstance(done.exception, UserError) and requests, done.output + str(done.exception)
    return requests[-1]
