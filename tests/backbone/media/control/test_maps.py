"""Maps as people give them: Canny's edges, sizes, and what is commonly wrong, each in one sentence."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from backbone.cli.conditions import ControlOptions, RequestedControl, RequestedMap, check_strength, parse_map
from backbone.io.console import UserError
from backbone.media.clips import read_film
from backbone.media.control.maps import MapTarget, as_hints, canny, compute_map, read_map, read_maps
from backbone.media.sources import decode
from backbone.media.sources.decode import open_rgb
from backbone.media.transforms import crop_and_resize
from tests.backbone.media.sources.test_pictures import profile_with_exponent

PALETTE = {"sky": (160, 208, 248), "dog": (248, 0, 0)}
SIZE = (64, 64)


def ring(*, ink: Any = 255, paper: Any = 0, side: int = 64, width: int = 2) -> Image.Image:
    """A circle on paper."""
    image = Image.new("RGB", (side, side), paper if isinstance(paper, tuple) else (paper,) * 3)
    colour = ink if isinstance(ink, tuple) else (ink,) * 3
    box = [side // 4, side // 4, 3 * side // 4, 3 * side // 4]
    ImageDraw.Draw(image).ellipse(box, outline=colour, width=width)
    return image


def photograph(side: int = 64) -> Image.Image:
    """Smooth colours, as a photograph's."""
    rows, columns = np.mgrid[0:side, 0:side] / side
    pixels = np.stack([rows, columns, (rows + columns) / 2], -1) * 200 + 20
    return Image.fromarray(pixels.astype(np.uint8))


def refused(path: Path, image: Image.Image | None, said: str = "sketch", how: str = "") -> str:
    if image is not None:
        image.save(path)
    with pytest.raises(UserError) as error:
        read_map(RequestedMap(said, str(path), how), MapTarget(SIZE, PALETTE))
    return str(error.value)


def test_canny_finds_the_outline_of_a_disc_one_pixel_wide() -> None:
    image = Image.new("RGB", SIZE, "white")
    ImageDraw.Draw(image).ellipse([16, 16, 48, 48], fill=(30, 60, 200))
    edges = canny(as_hints(image)[0])
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    rows, columns = edges.nonzero().T
    radius = ((rows - 32.0) ** 2 + (columns - 32.0) ** 2).sqrt()
    assert float((radius - 16).abs().max()) < 1.6
    assert 80 < len(rows) < 140  # its circumference is 100
    assert not canny(torch.full((3, 8, 8), 0.7)).any()


def test_weak_edges_count_where_they_hang_together_with_strong_ones() -> None:
    """A step whose height falls along it: |dx| of 4 × its height, from above 200 to below 100."""
    heights = torch.linspace(80, 0, 33)[:, None].round()
    step = torch.cat([torch.zeros(33, 16), heights.expand(-1, 16)], 1) / 255
    edges = canny(step.expand(3, -1, -1))
    kept = edges.any(1)
    assert bool(kept[heights[:, 0] * 4 > 101].all()) and not bool(kept[heights[:, 0] * 4 < 80].any())
    lonely = canny((step.clamp(max=30 / 255)).expand(3, -1, -1))  # nowhere above 200
    assert not lonely.any()


@pytest.mark.parametrize("kind", ["edges", "sketch", "lines"])
def test_a_map_found_in_a_picture_does_not_depend_on_the_file_s_format(kind: str, tmp_path: Path) -> None:
    scene = ring(ink=(200, 30, 30), paper=(90, 180, 90), width=6)
    expected = compute_map(kind, scene)
    assert np.array(expected).any()
    for name in ("scene.png", "scene.bmp", "scene.webp", "scene.tif"):
        how: dict[str, Any] = {"lossless": True} if name.endswith("webp") else {}
        scene.save(tmp_path / name, **how)
        found = read_map(RequestedMap(kind, str(tmp_path / name), "auto"), MapTarget(SIZE))
        assert np.array_equal(np.array(found), np.array(expected)), name


def test_lines_survive_being_made_smaller_and_labels_keep_their_colours(tmp_path: Path) -> None:
    ring(side=512, width=2).save(tmp_path / "large.png")
    found = np.array(read_map(RequestedMap("sketch", str(tmp_path / "large.png")), MapTarget(SIZE)))
    assert set(np.unique(found)) == {0, 255} and 60 < (found[..., 0] > 0).sum() < 200
    indexed = Image.new("P", (32, 32))
    indexed.putpalette([value for colour in PALETTE.values() for value in colour])
    ImageDraw.Draw(indexed).rectangle([8, 8, 24, 24], fill=1)
    indexed.save(tmp_path / "labels.png")
    labels = np.array(
        read_map(RequestedMap("labels", str(tmp_path / "labels.png")), MapTarget(SIZE, PALETTE))
    )
    assert {tuple(map(int, colour)) for colour in np.unique(labels.reshape(-1, 3), axis=0)} == set(
        PALETTE.values()
    )
    # a map of the picture's size is taken as it is
    ring().save(tmp_path / "own.png")
    same = read_map(RequestedMap("sketch", str(tmp_path / "own.png")), MapTarget(SIZE))
    assert np.array_equal(np.array(same), np.array(ring()))


def test_a_picture_that_is_given_as_a_map_is_decoded_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, plain = list[str](), decode.decode

    def count(file: Any, name: str, *more: Any, **how: Any) -> Image.Image:
        decoded.append(name)
        return plain(file, name, *more, **how)

    photograph().save(tmp_path / "tile.png")
    monkeypatch.setattr(decode, "decode", count)
    read_map(RequestedMap("tile", str(tmp_path / "tile.png")), MapTarget(SIZE))
    assert decoded == [str(tmp_path / "tile.png")]


def test_a_map_s_values_are_numbers_and_no_profile_changes_them_but_a_picture_s_does(tmp_path: Path) -> None:
    profile = profile_with_exponent(1.0)  # of linear light: as colours, all greys would come out brighter
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
    labels = Image.new("RGB", SIZE, PALETTE["sky"])
    labels.paste(PALETTE["dog"], (8, 8, 40, 40))
    for kind, drawn in (("depth", ramp.convert("RGB")), ("labels", labels), ("normal", photograph())):
        path = tmp_path / f"{kind}.png"
        drawn.save(path, icc_profile=profile)
        found = read_map(RequestedMap(kind, str(path)), MapTarget(SIZE, PALETTE))
        assert np.array_equal(np.array(found), np.array(drawn)), kind
        frames = [drawn, drawn.transpose(Image.Transpose.FLIP_TOP_BOTTOM)]
        frames[0].save(path, save_all=True, append_images=frames[1:], icc_profile=profile, duration=100)
        several = read_maps(RequestedMap(kind, str(path)), MapTarget(SIZE, PALETTE), 2)
        assert np.array_equal(np.array(several[0]), np.array(drawn)), kind
    path = tmp_path / "tile.png"
    photograph().save(path, icc_profile=profile)
    tile = np.array(read_map(RequestedMap("tile", str(path)), MapTarget(SIZE)))
    assert np.array_equal(tile, np.array(open_rgb(path))) and tile.mean() > np.array(photograph()).mean() + 20
    photograph().save(
        tmp_path / "film.png", save_all=True, append_images=[ramp.convert("RGB")], icc_profile=profile
    )
    assert np.array_equal(np.array(read_film(tmp_path / "film.png").frames[0]), tile)


def test_a_clip_may_be_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(2):
        ring(width=number + 2).save(tmp_path / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    assert len(read_film(".").frames) == 2
    (tmp_path / "1.png").unlink()
    with pytest.raises(UserError, match="has one frame"):
        read_film(".")
    assert parse_map("sketch=scan.png:Inverted") == RequestedMap("sketch", "scan.png", "inverted")


def test_a_depth_map_of_millimetres_is_said_to_be_dark(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, most in (("mm", 12_000), ("full", 65_535)):
        depth = np.tile(np.linspace(0, most, 64).astype(np.uint16), (64, 1))
        Image.fromarray(depth).save(tmp_path / f"{name}.png")
        read_map(RequestedMap("depth", str(tmp_path / f"{name}.png")), MapTarget(SIZE))
        assert ("mm.png is dark everywhere" in capsys.readouterr().err) == (name == "mm")


def test_a_depth_map_of_distances_is_told_how_it_is_inverted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A floor that comes nearer towards the bottom, as nearness, and as distances in a TIFF of floats."""
    nearness = np.repeat(np.linspace(0, 1, 64, dtype=np.float32)[:, None], 64, 1)
    Image.fromarray(nearness).save(tmp_path / "near.tif")
    Image.fromarray(1 - nearness).save(tmp_path / "far.tif")
    target = MapTarget(SIZE)
    near = read_map(RequestedMap("depth", str(tmp_path / "near.tif")), target)
    assert np.array_equal(np.asarray(near)[:, 0, 0], (nearness[:, 0] * 255).round())
    assert "darker" not in capsys.readouterr().err
    read_map(RequestedMap("depth", str(tmp_path / "far.tif")), target)
    assert "far.tif:inverted." in " ".join(capsys.readouterr().err.split())
    turned = read_map(RequestedMap("depth", str(tmp_path / "far.tif"), "inverted"), target)
    assert np.abs(np.asarray(turned).astype(int) - np.asarray(near)).max() <= 1
    read_map(RequestedMap("depth", str(tmp_path / "near.tif"), "inverted"), target)
    assert "leave :inverted out" in capsys.readouterr().err


def test_black_on_white_is_said_and_inverted_where_that_is_asked(tmp_path: Path) -> None:
    path = tmp_path / "scan.png"
    said = refused(path, ring(ink=0, paper=250))
    assert "black on white" in said and f"--condition sketch={path}:inverted" in said
    found = read_map(RequestedMap("sketch", str(path), "inverted"), MapTarget(SIZE))
    assert np.array(found).max() == 255 and np.array(found).mean() < 60
    ring().save(path)
    assert "Leave :inverted out" in refused(path, None, how="inverted")


@pytest.mark.parametrize("kind", ["sketch", "edges", "lines"])
def test_a_photograph_is_no_map_of_lines(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "photo.png"
    said = refused(path, photograph(), kind)
    assert "looks like a photograph" in said and f"customize map {kind} {path}" in said
    assert f"{kind}={path}:auto" in said
    assert "photograph" in refused(path, photograph().convert("L"), kind)


@pytest.mark.parametrize(
    ("image", "kind", "words"),
    [
        (Image.new("RGB", SIZE), "sketch", "shows nothing"),
        (Image.new("RGB", SIZE), "pose", "shows nothing"),
        (Image.new("RGB", SIZE, "white"), "sketch", "is white everywhere"),
        (Image.new("L", SIZE, 128), "depth", "one colour everywhere"),
        (Image.new("L", SIZE, 150), "sketch", "one colour everywhere"),
        (Image.new("RGB", SIZE, PALETTE["dog"]), "labels", "one colour everywhere"),
        (ring(ink=1), "sketch", "values of 0 and 1, and white is 255"),
        (photograph(), "depth", "is in colours, and a depth map is grey"),
        (photograph(), "pose", "no pose on black"),
        (ring(ink=(248, 0, 8), paper=PALETTE["sky"]), "labels", "#f80008 .*nearest is dog #f80000"),
        (photograph(), "labels", "colours that no label has"),
        (
            ring(side=96).resize((96, 64)),
            "sketch",
            "96 × 64 pixels and the picture 64 × 64: another shape. Crop the map",
        ),
        (Image.new("RGBA", SIZE, (255, 255, 255, 0)), "sketch", "is see-through"),
    ],
    ids=lambda value: value if isinstance(value, str) else "map",
)
def test_what_is_no_map_is_refused_in_a_sentence(
    image: Image.Image, kind: str, words: str, tmp_path: Path
) -> None:
    path = tmp_path / "map.png"
    said = refused(path, image, kind)
    assert re.search(words, said) and str(path) in said


def test_beside_an_image_to_edit_a_map_of_another_shape_is_told_a_remedy_that_an_edit_has(
    tmp_path: Path,
) -> None:
    ring().save(tmp_path / "map.png")
    target = MapTarget((96, 64), drawn_on=(300, 200))
    for kind, remedy in (("edges", "--condition edges=auto"), ("depth", "Make the map of the whole image.")):
        with pytest.raises(UserError, match="another shape") as refusal:
            read_map(RequestedMap(kind, str(tmp_path / "map.png")), target)
        assert remedy in str(refusal.value) and "--width" not in str(refusal.value)


def noise_in_blocks(size: tuple[int, int]) -> Image.Image:
    """A picture with edges everywhere."""
    blocks = np.random.default_rng(0).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.mark.parametrize("own", [(203, 151), (151, 203), (1000, 751)])
def test_the_map_of_the_very_image_is_the_one_that_is_found_in_it(
    own: tuple[int, int], tmp_path: Path
) -> None:
    """The image is cropped at parts of pixels, and so is a picture or a map of its size."""
    image, size = noise_in_blocks(own), (96, 64) if own[0] > own[1] else (64, 96)
    image.save(tmp_path / "scene.png")
    target = MapTarget(size, None, own)
    found = read_map(RequestedMap("edges", "", "auto"), target, picture=crop_and_resize(image, size))
    again = read_map(RequestedMap("edges", str(tmp_path / "scene.png"), "auto"), target)
    assert again.tobytes() == found.tobytes()


def test_a_file_that_is_no_picture_is_refused(tmp_path: Path) -> None:
    assert "does not exist" in refused(tmp_path / "none.png", None)
    (tmp_path / "text.png").write_text("no picture")
    assert str(tmp_path / "text.png") in refused(tmp_path / "text.png", None)
    assert "No sketch was found" in refused(
        tmp_path / "plain.png", Image.new("RGB", SIZE, "green"), how="auto"
    )
    with pytest.raises(UserError, match="found by another network"):
        compute_map("depth", ring())


def test_conditions_are_understood_in_the_words_of_other_tools() -> None:
    assert parse_map("sketch=a.png") == RequestedMap("sketch", "a.png")
    assert parse_map("canny=photo.png:auto") == RequestedMap("edges", "photo.png", "auto")
    assert parse_map("scribble=C:/a.png:inverted") == RequestedMap("sketch", "C:/a.png", "inverted")
    assert parse_map("edges=auto") == RequestedMap("edges", "", "auto")
    assert parse_map("drawing.png") == RequestedMap("map", "drawing.png")
    assert parse_map("sketch=~/a.png") == RequestedMap(
        "sketch", str(Path.home() / "a.png")
    )  # no shell does it
    for said, words in (
        ("sketch", "names no map"),
        ("sketch=", "names no map"),
        ("smell=a.png", "no condition smell"),
        ("labels=a.png:inverted", "turns the colours of labels round"),
        ("openpose=a.png:inverted", "turns the colours of pose round"),
    ):
        with pytest.raises(UserError, match=words):
            parse_map(said)
    with pytest.raises(UserError, match=r"edges=MAP.png, .* edges=PHOTO.png:auto, and in an edit edges=auto"):
        parse_map("canny")


def test_a_condition_that_is_given_twice_is_refused_and_at_other_steps_is_another() -> None:
    twice = ("edges=a.png", "canny=a.png")
    with pytest.raises(UserError, match=r"--condition edges=a.png is given twice. Give it once"):
        _ = ControlOptions(condition=twice).controls
    with pytest.raises(UserError, match="edges=auto is given twice"):
        _ = ControlOptions(condition=("edges=auto", "edges=auto"), condition_scale=(0.5, 1.0)).controls
    for more in ({"condition_start": (0.0, 0.5)}, {"controlnet": ("one", "other")}):
        assert len(ControlOptions(condition=twice, **more).controls) == 2


def test_values_are_one_for_all_or_one_for_each() -> None:
    asked = ControlOptions(
        condition=("sketch=a.png", "depth=b.png"), condition_scale=(0.7,), condition_stop=(0.5, 1.0)
    ).controls
    assert [(one.scale, one.stop, one.start, one.network) for one in asked] == [
        (0.7, 0.5, None, ""),
        (0.7, 1.0, None, ""),
    ]
    with pytest.raises(UserError, match="--condition-scale has 3 values for 2 conditions"):
        _ = ControlOptions(condition=("sketch=a.png", "depth=b.png"), condition_scale=(1, 1, 1)).controls
    with pytest.raises(UserError, match="--controlnet has no effect without a condition"):
        _ = ControlOptions(controlnet=("net",)).controls


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"scale": -0.1}, "not between 0 and 2"),
        ({"scale": 2.5}, "not between 0 and 2"),
        ({"scale": float("nan")}, "not between 0 and 2"),
        ({"start": 0.5, "stop": 0.5}, "never acts"),
        ({"start": 0.9, "stop": 0.2}, "never acts"),
        ({"start": -0.1}, "never acts"),
        ({"stop": 1.5}, "never acts"),
    ],
)
def test_a_strength_that_is_none_is_refused(how: dict[str, float], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check_strength(RequestedControl(RequestedMap("sketch", "a.png"), **how))  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["sketch=map.png:0.5", "sketch:0.5=map.png", "sketch=map.png:auto:1"])
def test_a_strength_behind_a_map_is_answered_with_the_option_for_it(text: str) -> None:
    with pytest.raises(
        UserError, match=r"ends in a number. Leave it out and use --condition-scale (0\.5|1)\."
    ):
        parse_map(text)


def test_a_map_whose_name_ends_in_a_number_is_read(tmp_path: Path) -> None:
    path = tmp_path / "map:2"
    path.touch()
    assert parse_map(f"sketch={path}").path == str(path)
