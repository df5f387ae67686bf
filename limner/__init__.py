"""One command for all three programs: `limner customize train …` is `customize train …`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from backbone.cli.lazy import export_lazily

if TYPE_CHECKING:
    __version__: str

__getattr__, __dir__ = export_lazily(__name__, {})
