"""Commands made from dataclasses: they get the requested values, or finished settings."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
from typer.testing import CliRunner

from backbone.cli.command_line import settled_command
from backbone.cli.options import Option
from backbone.io.console import UserError
from tests.backbone.cli.small_command import parse


def test_only_what_was_said_is_asked() -> None:
    assert parse() == {}
    said = parse(
        "from", "--steps", "5", "--learning-rate", "0.5", "--layer", "a", "--layer", "b", "--no-flip"
    )
    expected = {"source": "from", "steps": 5, "rate": 0.5, "layer": ("a", "b"), "flip": False}
    assert said == expected


def test_hyphens_underscores_and_other_spellings_are_the_same() -> None:
    for flag in ("--images", "--instance-data-dir", "--instance_data_dir"):
        assert parse(flag, "x") == {"images": "x"}
    assert parse("--learning_rate", "1") == parse("--learning-rate", "1")


def test_a_plain_yes_can_be_taken_back() -> None:
    assert parse("--fast") == {"fast": True}
    assert parse("--no-fast") == {"fast": False}
    with pytest.raises(UserError, match="--fast and --no-fast"):
        parse("--fast", "--no-fast")


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What two commands share."""

    seed: Annotated[int, Option("Of the noise.", "Sampling")] = 0
    scale: Annotated[tuple[float, ...], Option("Repeatable.", "Sampling", min=0)] = (1.0,)


@dataclass(frozen=True, kw_only=True)
class Edited(Drawn):
    """What one of them has too."""

    NEEDS: ClassVar[dict[str, Any]] = {"seed": {"file": (None,)}}

    image: Annotated[str, Option("Which.", "Data", argument=True, metavar="IMAGE")]
    target: Annotated[tuple[str, ...], Option("What.", "Data")]
    file: Annotated[str | None, Option("Instead.", "Data")] = None
    kept: Annotated[bool, Option("Kept.", "Data")] = True


def parse_edit(*words: str) -> Edited:
    """The settings that the command gets for these words."""
    app, received = typer.Typer(), list[Edited]()

    @app.callback()
    def group() -> None:
        """Several commands."""

    @settled_command(app, Edited)
    def edit(options: Edited) -> None:
        """Edit."""
        received.append(options)

    done = CliRunner().invoke(app, ["edit", *words])
    if done.exception is not None:
        raise done.exception
    return received[0]


def test_a_settled_command_gets_its_settings_made(tmp_path: Path) -> None:
    assert parse_edit("a.png", "--target", "x", "--target", "y", "--scale", "1", "--scale", "0.5") == Edited(
        image="a.png", target=("x", "y"), scale=(1.0, 0.5)
    )
    (tmp_path / "look.yaml").write_text("target: [x]\nscale: 2\nkept: false\n")
    assert parse_edit("a.png", "--config", str(tmp_path / "look.yaml")) == Edited(
        image="a.png", target=("x",), scale=(2.0,), kept=False
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("a.png",), "--target is missing"),
        (("a.png", "--target", "x", "--scale", "-1"), "at least 0"),
        (("a.png", "--target", "x", "--scale", "much"), "not a number"),
        (("a.png", "--target", "x", "--file", "f", "--seed", "3"), "--seed has no effect with --file"),
    ],
)
def test_a_settled_command_refuses_what_is_missing_does_not_fit_or_has_no_effect(
    words: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        parse_edit(*words)


def test_a_settled_command_demands_its_plain_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        parse_edit("--target", "x")
    look = tmp_path / "look.yaml"
    look.write_text("image: a.png\ntarget: [x]\n")
    assert parse_edit("--config", str(look)).image == parse_edit("a.png", f"--config={look}").image == "a.png"
    look.write_text("target: [x]\n")
    with pytest.raises(UserError, match="IMAGE is missing"):
        parse_edit("--config", str(look))
