"""The program `customize`, also as `python -m customize`: its options are imported where Ctrl-C is heard already."""

from __future__ import annotations

from backbone.io.console import run_app


def app() -> None:
    """The command."""
    from customize.cli import app

    app()


def main() -> None:
    """The console script."""
    run_app(app)


if __name__ == "__main__":
    main()
