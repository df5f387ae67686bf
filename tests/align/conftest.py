"""What the tests of `align` share: small pictures, and pairs of them behind every door."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner, Result

from align.cli import app
from backbone.io.console import UserError

PROMPTS = ("a red dog", "a cat in the snow", "a dog in the snow", "the cat")

Draw = Callable[[Path, int], Path]


def picture(seed: int, size: tuple[int, int] = (64, 64)) -> Image.Image:
    """Random pixels."""
    random = np.random.default_rng(seed)
    return Image.fromarray(random.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8))


def encoded(seed: int, kind: str = "PNG", size: tuple[int, int] = (64, 64)) -> bytes:
    """A picture's file."""
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind)
    return buffer.getvalue()


def write_lines(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    """A JSON-lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def pairs_file(tmp_path: Path) -> Path:
    """Eight pairs of four prompts as JSON lines; the winners are even-numbered pictures."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    rows: list[dict[str, object]] = []
    for number in range(8):
        for side in range(2):
            picture(2 * number + side).save(folder / f"{2 * number + side}.png")
        rows.append(
            {
                "prompt": PROMPTS[number % 4],
                "chosen": f"{2 * number}.png",
                "rejected": f"{2 * number + 1}.png",
                "user": "ann" if number < 6 else "bob",
            }
        )
    return write_lines(folder / "pairs.jsonl", rows)


# The journey from the door ---------------------------------------------------------------------------------------

FIVE = ("a red dog", "a cat in the snow", "a dog in the snow", "the cat", "a red cat")
BRIGHT = """
def score(images, prompts):
    return [sum(one.convert("L").tobytes()) / one.width / one.height for one in images]
"""
TRAIN = ("--steps", "4", "--train-batch-size", "2", "--rank", "2", "--draws", "2", "--evaluation-draws", "1")


def invoked(*arguments: object) -> Result:
    """A command that ran well in this process: what it printed on either stream."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


def align(*arguments: object) -> str:
    """Runs a command in this process; gives what it printed on stdout."""
    return invoked(*arguments).stdout


def refused(*arguments: object) -> str:
    """Runs a command that is a mistake; gives the sentence that answers it."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


@pytest.fixture(scope="session")
def bright(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scorer of one's own: the brighter, the better."""
    path = tmp_path_factory.mktemp("scorer") / "bright.py"
    path.write_text(BRIGHT)
    return path


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    path.write_text("".join(f"{prompt.split()[0]}\t{prompt}\n" for prompt in FIVE))
    return path


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, prompts: Path) -> Path:
    """A folder of `align sample`: 5 prompts, 2 pictures each."""
    folder = tmp_path_factory.mktemp("drawn") / "pairs"
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
    align("sample", "--prompts", prompts, "--count", 2, "--out", folder, "--steps", 2, *model)
    return folder


@pytest.fixture(scope="session")
def ranked(drawn: Path, bright: Path) -> Path:
    align("rank", drawn, "--scorer", bright)
    return drawn


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory, ranked: Path, tiny_folder: Path) -> Path:
    """A trained run folder."""
    out = tmp_path_factory.mktemp("runs") / "taste"
    where = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--held-out", 0.3)
    align("train", ranked, "--out", out, *where, *TRAIN)
    return out
