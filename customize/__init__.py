"""Teaches a model a new concept from a handful of images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__: str

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name == "__version__":
            from backbone import __version__

            return __version__
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
