"""The program `limner`, also as `python -m limner`: its options are imported where Ctrl-C is heard already."""

from __future__ import annotations

from backbone.io.console import run_program


def main() -> None:
    """The console script."""
    run_program("limner")


if __name__ == "__main__":
    main()
