"""A small command with options of every kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import typer
from typer.testing import CliRunner

from backbone.cli.command_line import command
from backbone.cli.options import Option


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A little of everything."""

    images: Annotated[
        str, Option("Where they are.", "Data", aliases=("instance-data-dir",), metavar="FOLDER")
    ]
    steps: Annotated[
        int, Option("How many.", "Training", min=1, words={"auto": {"patience": 3}}, by_model=True)
    ] = 10
    rate: Annotated[float, Option("How fast.", "Training", flag="learning-rate", max=1)] = 0.1
    patience: Annotated[int, Option("How long.", "Training", min=0)] = 0


@dataclass(frozen=True, kw_only=True)
class Settings(Parent):
    """With another default, for which nothing is said again."""

    steps: int = 20
    source: Annotated[str, Option("What from.", "Data", argument=True, metavar="SOURCE")] = ""
    prior: Annotated[
        str, Option("Which.", "Loss", choices=("base", "drawn", "off"), switches={"with-prior": "drawn"})
    ] = "base"
    count: Annotated[int, Option("Of drawn.", "Loss", needs={"prior": ("drawn",)})] = 4
    gamma: Annotated[float, Option("γ.", "Loss", implies={"prior": "drawn"})] = 0.0
    flip: Annotated[bool, Option("Mirrored.", "Data", by_model=True)] = False
    fast: Annotated[bool, Option("Quick.", "Data")] = False
    layer: Annotated[tuple[str, ...], Option("Repeatable.", "Data")] = ()


def parse(*words: str) -> dict[str, Any]:
    """The settings that a command line requests, by field name."""
    app, requests = typer.Typer(), list[dict[str, Any]]()

    @app.callback()
    def group() -> None:
        """Several commands."""

    @command(app, Settings)
    def train(requested: dict[str, Any]) -> None:
        """Train."""
        requests.append(requested)

    done = CliRunner().invoke(app, ["train", *words])
    if done.exception is not None:
        raise done.exception
    return requests[0]
