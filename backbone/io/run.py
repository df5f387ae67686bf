"""A finished run as a value, for notebooks."""

from __future__ import annotations

import os
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from backbone.io.console import UserError
from backbone.io.files import read_json, read_jsonl
from backbone.io.records import RunRecord
from backbone.io.written import written_path


@dataclass(frozen=True, repr=False)
class Run:
    """A run folder of `customize train` or `align train`, which can be given as a `concept`.

    A notebook shows its sheet, if it has one. Its path is absolute, so the working folder may change.
    """

    path: Path

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(os.path.abspath(written_path(self.path))))

    @property
    def settings(self) -> dict[str, Any]:
        """The resolved settings of the training."""
        return read_json(self.path / "settings.json", RunRecord).settings

    @property
    def command(self) -> str:
        """The command that repeats the training."""
        return read_json(self.path / "settings.json", RunRecord).command

    @property
    def log(self) -> list[dict[str, Any]]:
        """A line for every optimiser step: `step`, `loss`, `learning_rate` …"""
        return read_jsonl(self.path / "log.jsonl")

    def __fspath__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        """Its path, relative to the working folder if it is inside."""
        try:
            return str(self.path.relative_to(Path.cwd()))
        except (OSError, ValueError):  # it is outside, or the working folder is gone
            return str(self.path)

    def __repr__(self) -> str:
        try:
            settings = self.settings
        except (UserError, OSError):
            return f"Run({str(self)!r}, which is no run folder)"
        return f"Run({str(self)!r}, model={settings['model']!r}, steps={settings['steps']})"

    def _repr_png_(self) -> bytes | None:
        sheet = self.path / "sheet.png"
        return sheet.read_bytes() if sheet.is_file() else None

    def _repr_html_(self) -> str | None:
        """A line with the report's path, if there is no sheet."""
        if (self.path / "sheet.png").is_file() or not (self.path / "report.html").is_file():
            return None
        return f"<code>{escape(repr(self))}</code>: {escape(str(self.path / 'report.html'))}"
