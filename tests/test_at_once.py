"""Two commands started in the same moment on one place: one does its work, the other says so, nothing is damaged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from PIL import Image

from tests.align.conftest import picture
from tests.commands import Started

pytestmark = pytest.mark.slow
REFUSED = re.compile(
    "Another process is writing|is not empty|already holds a run|exists already|by another process meanwhile"
)
TRAIN = "customize train --images subject --token [V] --class dog --steps 2 --prior off --out here"
PAIRS = {
    "train, train": (TRAIN, f"{TRAIN} --seed 2"),
    "train, sample": (TRAIN, "customize sample dog --steps 2 --out here"),
    "sample, sample": (
        "customize sample dog --steps 8 --out here",
        "customize sample cat --steps 8 --out here",
    ),
    "prepare, prepare": ("customize prepare --images subject --out here",) * 2,
    "prepare, align prepare": (
        "customize prepare --images subject --out here",
        "align prepare pairs --out here",
    ),
    "edit, edit": ("edit sdedit subject/0.png --prompt dog --steps 4 --out here",) * 2,
    "invert, invert": ("edit invert subject/0.png --source dog --steps 8 --out here.safetensors",) * 2,
    "align train, align train": ("align train pairs --steps 2 --out here",) * 2,
}


@pytest.mark.parametrize("name", PAIRS)
def test_of_two_commands_on_one_place_one_is_refused_in_a_sentence(
    name: str, tiny_folder: Path, subject: Path, tmp_path: Path
) -> None:
    for side in ("chosen", "rejected"):
        (tmp_path / "pairs" / side).mkdir(parents=True)
        for number in range(3):
            picture(number + 9 * (side == "chosen")).save(tmp_path / "pairs" / side / f"{number}.png")
            (tmp_path / "pairs" / side / f"{number}.txt").write_text(f"a dog {number}")
    words = [[*call.split(), "--model", str(tiny_folder), "--device", "cpu"] for call in PAIRS[name]]
    begun = [Started(*call, cwd=tmp_path, LIMNER_CACHE=str(tmp_path / "cache")) for call in words]
    said = ["".join(one.communicate()) for one in begun]
    codes = [one.returncode for one in begun]
    # A preparation that is finished is gone on with, should one of the two be late
    assert 0 in codes and (2 in codes or name == "prepare, prepare") and {*codes} <= {0, 2}, said
    for code, parse_prompt in zip(codes, said, strict=True):
        assert "Traceback" not in parse_prompt and (code == 0 or REFUSED.search(parse_prompt)), said
    assert not [path for path in tmp_path.rglob(".*") if path.is_file()], "nothing half-written"
    for path in tmp_path.rglob("here/**/*.png"):
        Image.open(path).load()
