"""The program `customize`, also as `python -m customize`: its options are imported where Ctrl-C is heard already."""

from __future__ import annotations

from backbone.io.console import run_program


def main() -> None:
    """The console script."""
    run_program("customize")


if __name__ == "__main__":
    main()
