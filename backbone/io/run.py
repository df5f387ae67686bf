"""A finished run as a value, for notebooks."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from backbone.io.files import read_json, read_jsonl
from backbone.io.records import RunRecord


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder of `customize train` or `align train`. It serves wherever a `concept` is asked for.

    A notebook shows its sheet, if it has one.
    """

    path: Path

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved settings that it was trained with."""
        return read_json(self.path / "settings.json", RunRecord).settings

    @property
    def command(self) -> str:
        """The command that repeats it."""
        return read_json(self.path / "settings.json", RunRecord).command

    @property
    def log(self) -> list[dict[str, Any]]:
        """A line for every optimiser step: `step`, `loss`, `learning_rate` …"""
        return read_jsonl(self.path / "log.jsonl")

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        settings = self.settings
        return f"Run({str(self.path)!r}, model={settings['model']!r}, steps={settings['steps']})"

    def _repr_png_(self) -> bytes | None:
        sheet = self.path / "sheet.png"
        return sheet.read_bytes() if sheet.is_file() else None

    def _repr_html_(self) -> str | None:
        """A line with the report's address, where there is no sheet to show."""
        if (self.path / "sheet.png").is_file() or not (self.path / "report.html").is_file():
            return None
        return f"<code>{escape(repr(self))}</code>: {escape(str(self.path / 'report.html'))}"
