"""The console script `align`. It has no commands yet and says so."""

from __future__ import annotations

from typing import NoReturn

import typer

from backbone.console import UserError, run

app = typer.Typer(rich_markup_mode=None, add_completion=False)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def align(context: typer.Context) -> None:
    """Tuning a model to preferences is being built here: there are no `align` commands yet.

    What works today is `customize`: see `customize --help`.
    """
    if context.args:
        raise UserError(
            f"`align {context.args[0]}` does not exist: align has no commands yet. See `customize --help`."
        )
    typer.echo(context.get_help())


def main() -> NoReturn:
    """Runs the console script and ends the process."""
    run(app)


if __name__ == "__main__":
    main()
