"""The command `limner`: the three programs as its groups, each imported when it is called."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from backbone.console import run
from backbone.io.commands import Group, command_group


class Programs(Group):
    """`customize`, `edit` and `align`."""

    elsewhere: ClassVar[Mapping[str, tuple[str, str]]] = {
        "customize": ("customize.cli", "Teach a diffusion model a new concept from a handful of images."),
        "edit": ("edit.cli", "Change what the words say of an image, and nothing else."),
        "align": ("align.cli", "Tune a diffusion model to preferences: yours, or a scorer's."),
    }


app = command_group("Personalise, edit and align text-to-image diffusion models.", cls=Programs)


def main() -> None:
    """The console script."""
    run(app)
