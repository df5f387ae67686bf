"""What every method shares: the noise algebra and its samplers below, models, adapters and training above."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__: str

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """`__version__`, which is read from the installation when it is asked for."""
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version

            try:
                return version("limner")
            except PackageNotFoundError:  # a source tree that was never installed
                return "0+unknown"
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
