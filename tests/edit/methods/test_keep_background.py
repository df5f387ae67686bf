"""The background of an edit becomes its source's again, exactly, and the edit stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.media.transforms import to_image
from edit.cli import app
from edit.methods.keep_background import (
    NoBackgroundError,
    drop_specks,
    fill_holes,
    find_change,
    flood_fill,
    keep_background,
)
from tests.backbone.media.test_registration import moved, picture

COLOUR = torch.tensor([0.9, -0.6, -0.8])[:, None, None]


def disc(height: int = 80, width: int = 96) -> Tensor:
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return ((((x - 50) / 18) ** 2 + ((y - 42) / 15) ** 2) < 1).float()


def edited(source: Tensor) -> Tensor:
    """A red disc on the source."""
    return torch.where(disc().bool(), COLOUR, source)


def test_the_background_of_a_drifted_redrawn_edit_is_the_source_s_bit_for_bit() -> None:
    source = picture()
    drifted = moved(edited(source), (2.3, -1.1, 1.015))
    redrawn = (drifted + 0.02 * torch.randn(drifted.shape, generator=torch.Generator().manual_seed(0))).clamp(
        -1, 1
    )
    kept = keep_background(redrawn, source)
    outside = kept.place == 0
    assert torch.equal(kept.image[:, outside], source[:, outside])
    assert float(outside.float().mean()) > 0.6
    inside = disc().bool()
    assert float((kept.place[inside] == 1).float().mean()) > 0.99  # the edit is all there
    assert float((kept.image - COLOUR).abs().amax(0)[inside].median()) < 0.1
    assert kept.registration.shift == pytest.approx((2.3, -1.1), abs=0.1)
    assert kept.drifted_psnr_db is not None and kept.registered_psnr_db is not None
    assert kept.registered_psnr_db > kept.drifted_psnr_db + 8


def test_ten_edits_in_a_row_do_not_wear_the_background() -> None:
    source = picture()
    now = source
    for turn in range(10):
        drifted = moved(edited(now), (0.8, 0.4 * (-1) ** turn, 1.004))
        now = keep_background((0.98 * drifted).clamp(-1, 1), source).image
    far = torch.ones(80, 96).bool()
    far[15:70, 20:80] = False
    assert torch.equal(now[:, far], source[:, far])


def test_an_edit_in_another_tone_keeps_its_place_and_the_background_is_the_source_s() -> None:
    source = picture()
    toned = (0.9 * edited(source) + 0.14).clamp(-1, 1)
    kept = keep_background(toned, source)
    outside = kept.place == 0
    assert torch.equal(kept.image[:, outside], source[:, outside]) and float(outside.float().mean()) > 0.6
    inside = disc().bool()
    assert float((kept.image - COLOUR).abs().amax(0)[inside].median()) < 0.05  # its own colour too
    assert kept.figures["tone_percent"] == pytest.approx(9, abs=1)
    assert kept.registration.shift == (0.0, 0.0) and kept.registration.scale == 1.0
    assert kept.drifted_psnr_db is not None and kept.registered_psnr_db is not None
    assert kept.registered_psnr_db > kept.drifted_psnr_db + 8
    with pytest.raises(NoBackgroundError):
        keep_background(toned, source, align=False)


def test_a_tone_that_is_the_edit_itself_is_left() -> None:
    source = picture()
    brighter = (source + 0.18).clamp(-1, 1)
    with pytest.raises(NoBackgroundError):  # so all of it is taken, and not nothing
        keep_background(brighter, source)
    night = (0.4 * edited(source) - 0.5).clamp(-1, 1)
    with pytest.raises(NoBackgroundError):
        keep_background(night, source)


def test_a_mask_says_where_the_edit_stands() -> None:
    source, mask = picture(), torch.zeros(80, 96)
    mask[:, :48] = 1
    kept = keep_background(edited(source), source, changed=mask)
    assert torch.equal(kept.image[:, :, 56:], source[:, :, 56:])
    assert bool((kept.image[:, 42, 40] == COLOUR[:, 0, 0]).all())


def test_another_background_than_the_source_can_stand() -> None:
    source = picture()
    copy = (0.9 * source).clamp(-1, 1)
    kept = keep_background(edited(source), source, background=copy)
    assert torch.equal(kept.image[:, kept.place == 0], copy[:, kept.place == 0])


def test_an_edit_that_redraws_everything_has_no_background_left() -> None:
    with pytest.raises(UserError, match=r"no background to keep.*--mask"):
        keep_background(-picture(9), picture())


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"source": Image.new("RGB", (64, 64))}, "source is a tensor .* and not Image"),
        ({"edited": torch.zeros(1, 3, 64, 64)}, r"edited is a tensor .* and not \[1, 3, 64, 64\]"),
        ({"edited": torch.zeros(3, 32, 64)}, "edited is 64 × 32 pixels, and the source 64 × 64"),
        ({"changed": torch.zeros(3, 64, 64)}, r"changed is a tensor \[H, W\]"),
    ],
)
def test_what_is_no_tensor_or_of_another_size_is_refused_in_a_sentence(
    given: dict[str, Any], said: str
) -> None:
    usual = {"source": torch.zeros(3, 64, 64), "edited": torch.zeros(3, 64, 64)}
    with pytest.raises(UserError, match=said):
        keep_background(**(usual | given))


def test_a_change_is_whole_without_holes() -> None:
    source, change = picture(), disc()
    ring = edited(source)
    ring[:, 38:46, 45:55] = source[:, 38:46, 45:55]  # a hole in it
    found = find_change(ring, source)
    assert float(found[change.bool()].mean()) > 0.97 and found[42, 50] == 1


def test_parts_that_hang_together_are_followed_round_corners() -> None:
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[0, :5] = mask[:5, 4] = mask[5, 0] = True
    seed = torch.zeros_like(mask)
    seed[0, 0] = True
    assert int(flood_fill(seed, mask).sum()) == 9
    assert int(drop_specks(mask, 2).sum()) == 9
    frame = torch.zeros(6, 6, dtype=torch.bool)
    frame[1:5, 1:5] = True
    frame[2:4, 2:4] = False
    assert int(fill_holes(frame).sum()) == 16


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    source = picture()
    before, after = tmp_path / "before.png", tmp_path / "after.png"
    to_image(source).save(before)
    to_image(moved(edited(source), (1.5, 0.0, 1.0))).save(after)
    return before, after


def test_the_command_writes_the_edit_on_its_old_background(files: tuple[Path, Path], tmp_path: Path) -> None:
    said = CliRunner().invoke(app, ["keep-background", *map(str, files), "--out", str(tmp_path / "run")])
    assert said.exit_code == 0, said.output
    figures = json.loads((tmp_path / "run" / "run.json").read_text())
    assert figures["shift_right_px"] == pytest.approx(1.5, abs=0.1)
    assert figures["background_psnr_db_kept"] == 100
    kept, before = (Image.open(path) for path in (tmp_path / "run" / "kept.png", files[0]))
    corner = (0, 0, 20, 80)
    assert kept.crop(corner).tobytes() == before.convert("RGB").crop(corner).tobytes()


def test_an_edit_that_is_found_nowhere_is_said_to_be(files: tuple[Path, Path], tmp_path: Path) -> None:
    saved = tmp_path / "again.jpg"
    Image.open(files[0]).convert("RGB").save(saved, quality=95)
    said = CliRunner().invoke(
        app, ["keep-background", str(files[0]), str(saved), "--out", str(tmp_path / "run")]
    )
    assert said.exit_code == 0 and "again.jpg differs enough to be an edit" in said.output, said.output


def test_an_edit_of_another_size_is_brought_to_its_source_s(files: tuple[Path, Path], tmp_path: Path) -> None:
    Image.open(files[1]).resize((192, 160), Image.Resampling.BICUBIC).save(files[1])
    said = CliRunner().invoke(app, ["keep-background", *map(str, files), "--out", str(tmp_path / "run")])
    assert said.exit_code == 0, said.output
    assert Image.open(tmp_path / "run" / "kept.png").size == (96, 80)


def test_a_mask_may_be_larger_than_its_source(files: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = files
    size = Image.open(before).size
    mask = Image.new("L", size)
    mask.paste(255, (0, 0, size[0] // 2, size[1]))
    kept = []
    for factor in (1, 2):
        mask.resize((factor * size[0], factor * size[1])).save(tmp_path / "mask.png")
        command = ["keep-background", str(before), str(after), "--mask", str(tmp_path / "mask.png")]
        found = CliRunner().invoke(app, [*command, "--out", str(tmp_path / f"run-{factor}")])
        assert found.exception is None, found.exception
        kept.append((tmp_path / f"run-{factor}" / "kept.png").read_bytes())
    assert kept[0] == kept[1]


def test_mistakes_are_a_sentence_and_leave_nothing(files: tuple[Path, Path], tmp_path: Path) -> None:
    before, after = files
    tall, small = tmp_path / "tall.png", tmp_path / "small.png"
    Image.open(after).resize((60, 80)).save(tall)
    Image.new("L", (10, 20), 255).save(small)
    for words, complaint in (
        ([before, before], "nothing was edited"),
        ([before, tall], "other shapes"),
        ([before, tmp_path / "gone.png"], "gone.png"),
        ([before, after, "--mask", small], "The mask is 10 × 20"),
    ):
        command = ["keep-background", *map(str, words), "--out", str(tmp_path / "run")]
        found = CliRunner().invoke(app, command)
        assert isinstance(found.exception, UserError) and complaint in str(found.exception), found.output
        assert not (tmp_path / "run").exists()
    shutil.copy(before, tmp_path / "source.png")
    found = CliRunner().invoke(app, ["keep-background", str(before), str(tall)])
    assert "source.png in its place, which was cropped as the edit was" in str(found.exception)
