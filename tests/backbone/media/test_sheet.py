"""A sheet shows every picture whole, every word of a caption that fits, and is the same on every machine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.media.sheet import GREEN, PAGE, Cell, draw_sheet, number_samples, save_png, split_rows

COLOURS = ["#ff0000", "#00ff00", "#0000ff", "#ffff00", "#ff00ff"]


def plain(colour: str, width: int = 40, height: int = 40) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def area(page: Image.Image, colour: str) -> tuple[int, int, int, int] | None:
    """The box that encloses every pixel of exactly this colour: left, top, right, bottom."""
    same = np.asarray(page) == np.asarray(Image.new("RGB", (1, 1), colour))
    return Image.fromarray(same.all(axis=-1)).getbbox()


def size(box: tuple[int, int, int, int] | None) -> tuple[int, int]:
    assert box is not None
    return box[2] - box[0], box[3] - box[1]


def test_every_picture_is_shown_whole_and_none_covers_another() -> None:
    page = draw_sheet(
        [[plain(colour) for colour in COLOURS[:3]], [plain(colour) for colour in COLOURS[3:]]], cell=80
    )
    assert [size(area(page, colour)) for colour in COLOURS] == [(80, 80)] * 5


def test_pictures_keep_their_shape_and_stand_on_one_line() -> None:
    page = draw_sheet(
        [[plain(COLOURS[0], 80, 40), plain(COLOURS[1], 30, 60), plain(COLOURS[2], 60, 60)]], cell=60
    )
    wide, tall, even = (area(page, colour) for colour in COLOURS[:3])
    assert (size(wide), size(tall), size(even)) == ((60, 30), (30, 60), (60, 60))
    assert wide is not None
    assert tall is not None
    assert even is not None
    assert wide[3] == tall[3] == even[3]


def test_a_picture_of_the_cells_size_is_not_resampled() -> None:
    values = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    page = np.asarray(draw_sheet([[Image.fromarray(values)]], cell=32))
    top = (page.shape[0] - 32) // 2
    assert (page[top : top + 32, top : top + 32] == values).all()


def test_a_small_picture_is_enlarged_by_whole_factors_and_never_blurred() -> None:
    values = np.random.default_rng(0).integers(0, 255, (12, 20, 3), dtype=np.uint8)
    page = np.asarray(draw_sheet([[Image.fromarray(values)]], cell=50))
    top = (page.shape[0] - 24) // 2
    assert (
        page[top : top + 24, 33:73] == values.repeat(2, 0).repeat(2, 1)
    ).all()  # 28 of margin, 5 of the cell


def test_words_make_room_and_leave_the_pictures_as_they_are() -> None:
    bare = draw_sheet([[plain(COLOURS[0])]], cell=120)
    told = draw_sheet(
        [[Cell(plain(COLOURS[0]), "a [V] dog wearing a crown in a park")]],
        title="dog",
        note="seed 0",
        row_titles=["Samples"],
        column_titles=["base"],
        cell=120,
    )
    assert told.width == bare.width
    assert told.height > bare.height + 5 * 14
    assert size(area(told, COLOURS[0])) == size(area(bare, COLOURS[0])) == (120, 120)


def test_longer_captions_take_more_lines_up_to_five() -> None:
    heights = [
        draw_sheet([[Cell(plain(COLOURS[0]), "word " * count)]], cell=100).height
        for count in (1, 6, 9, 30, 300)
    ]
    assert heights == sorted(heights)
    assert heights[0] < heights[1] < heights[3]
    assert heights[3] == heights[4]
    unbroken = draw_sheet([[Cell(plain(COLOURS[0]), "w" * 300)]], cell=100)
    margin = np.asarray(unbroken)[:, -20:]
    assert (margin == margin[0, 0]).all()


def test_a_frame_surrounds_its_picture() -> None:
    page = draw_sheet([[Cell(plain(COLOURS[0]), frame=GREEN), plain(COLOURS[1])]], cell=60)
    picture, frame = area(page, COLOURS[0]), area(page, GREEN)
    assert picture is not None
    assert frame == (picture[0] - 4, picture[1] - 4, picture[2] + 4, picture[3] + 4)


def test_a_place_can_stay_free_and_rows_may_differ_in_length() -> None:
    page = draw_sheet([[None, plain(COLOURS[0])], [plain(COLOURS[1])]], cell=60)
    right, left = area(page, COLOURS[0]), area(page, COLOURS[1])
    assert right is not None
    assert left is not None
    assert right[0] >= left[2]
    assert page.getpixel((left[0] + 30, right[1] + 30)) == Image.new("RGB", (1, 1), PAGE).getpixel((0, 0))


def test_transparent_and_grey_pictures_are_shown_on_white() -> None:
    page = draw_sheet(
        [[Image.new("RGBA", (8, 8), (255, 0, 0, 0)), Image.new("L", (8, 8), 7), Image.new("1", (8, 8), 1)]]
    )
    assert size(area(page, "#ffffff"))[0] > 400
    assert size(area(page, "#070707")) == (256, 256)


def test_letters_that_the_font_lacks_are_spelled_with_those_it_has() -> None:
    def said(caption: str) -> bytes:
        return draw_sheet([[Cell(plain(COLOURS[0]), caption)]], cell=200).tobytes()

    assert said("naïve café") == said("naive cafe")
    assert said("2 × 3 – σ → x") == said("2 x 3 - sigma -> x")
    assert said("犬 dog") == said("? dog") != said("dog")


def test_a_font_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.ttf").write_text("no font")
    with pytest.raises(UserError, match=r"x\.ttf is not a font"):
        draw_sheet([[plain(COLOURS[0])]], font=tmp_path / "x.ttf")


def test_samples_of_one_prompt_are_numbered_and_those_of_others_are_not() -> None:
    assert number_samples(["a", "b", "a"]) == ["a\nsample 0", "b", "a\nsample 1"]


def test_cells_fall_into_rows_in_reading_order() -> None:
    cells = [plain(colour) for colour in COLOURS]
    assert split_rows(cells, 2) == [cells[0:2], cells[2:4], cells[4:]]


def test_a_saved_sheet_is_the_same_bytes_again_and_carries_its_text(tmp_path: Path) -> None:
    page = draw_sheet([[Cell(plain(COLOURS[0]), "a dog")]], title="dog")
    for name in ("a.png", "b.png"):
        save_png(tmp_path / "deep" / name, page, text={"prompt": "naïve 犬", "seed": "0"})
    assert (tmp_path / "deep" / "a.png").read_bytes() == (tmp_path / "deep" / "b.png").read_bytes()
    with Image.open(tmp_path / "deep" / "a.png") as saved:
        saved.load()
        assert saved.info == {"prompt": "naïve 犬", "seed": "0"}
        assert saved.tobytes() == page.tobytes()
