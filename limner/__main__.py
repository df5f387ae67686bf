"""The program `limner`, also as `python -m limner`: its options are imported where Ctrl-C is heard already."""

from __future__ import annotations

from backbone.io.console import run_app


def app() -> None:
    """The command."""
    from limner.cli import app

    app()


def main() -> None:
    """The console script."""
    run_app(app)


if __name__ == "__main__":
    main()
