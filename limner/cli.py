"""The command `limner`: the three programs as its groups, each imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from backbone.cli.commands import LazyProgram, Programs, command_group
from backbone.io.console import run_app


class Limner(Programs):
    """`customize`, `edit` and `align`."""

    programs: ClassVar[Mapping[str, LazyProgram]] = {
        "customize": LazyProgram(
            "customize.cli", "Teach a diffusion model a new concept from a handful of images."
        ),
        "edit": LazyProgram("edit.cli", "Change what the words say of an image, and nothing else."),
        "align": LazyProgram("align.cli", "Tune a diffusion model to preferences: yours, or a scorer's."),
    }


app = command_group("Personalise, edit and align text-to-image diffusion models.", cls=Limner)


def main() -> None:
    """The console script."""
    run_app(app)
