"""Whatever a camera, an editor or a careless download leaves becomes upright sRGB, or a clear reason."""

from __future__ import annotations

import io
import json
import os
import struct
import tarfile
import unicodedata
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, PngImagePlugin

from backbone.io.console import UserError, printed_names, printed_once
from backbone.io.run_folder import refuse_unwritable
from backbone.io.written import refuse_dead_link
from backbone.media.sources.decode import (
    BadImageError,
    map_from_image,
    open_as,
    open_loaded,
    open_mask,
    open_named,
    open_rgb,
)
from backbone.media.sources.pictures import check_images, describe_unused, list_images
from backbone.media.sources.record import ImageRecord
from backbone.media.sources.tables import caption_at, name_tar_columns
from backbone.media.sources.tars import name_column
from backbone.media.transforms import (
    CROPS,
    CropPosition,
    bucket_sizes,
    crop_and_resize,
    crop_box,
    crop_square,
    mask_to_tensor,
    nearest_bucket,
    to_image,
    to_tensor,
    working_size,
)


def scene(width: int = 48, height: int = 32) -> Image.Image:
    """Four different quarters, so that every turn and mirror shows, with smooth shading for JPEG's sake."""
    y, x = np.mgrid[0:height, 0:width]
    pixels = np.stack([x * 200 // width, y * 200 // height, 60 + 60 * (x < width // 2)], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def write(path: Path, image: Image.Image | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or scene()).save(path, **options)
    return path


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference in grey levels; infinite for different sizes."""
    if first.size != second.size:
        return float("inf")
    a, b = (np.asarray(image.convert("RGB"), dtype=np.float64) for image in (first, second))
    return float(np.abs(a - b).mean())


def reason(path: Path) -> str:
    with pytest.raises(BadImageError) as caught:
        open_rgb(path)
    assert str(path) in str(caught.value)
    return caught.value.reason


# Upright sRGB in 8 bits


STORED_AS = {  # what a camera writes for each EXIF orientation: the inverse of the turn that rights it
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".tiff"])
@pytest.mark.parametrize("orientation", STORED_AS)
def test_every_exif_orientation_is_turned_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright, turn = scene(), STORED_AS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / f"x{suffix}", upright if turn is None else upright.transpose(turn), exif=exif)
    assert difference(open_rgb(path), upright) < 4
    small = open_rgb(path, at_least=4)
    assert small.width > small.height
    assert difference(small, upright.resize(small.size)) < 6


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0MM\0*\0\0\0\xff", b"Exif\0\0junk", b"Exif\0\0II*\0\x08\0\0\0\xff\xff\0"]
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_exif_does_not_spoil_the_picture(tmp_path: Path, exif: bytes) -> None:
    assert difference(open_rgb(write(tmp_path / "x.jpg", exif=exif)), scene()) < 4


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    layered = scene().convert("RGBA")
    layered.putalpha(Image.linear_gradient("L").resize(layered.size))
    expected = Image.new("RGBA", layered.size, "white")
    expected.alpha_composite(layered)
    for name in ("x.png", "x.tiff"):
        assert difference(open_rgb(write(tmp_path / name, layered)), expected) <= 1
    clear = Image.new("LA", (4, 4), (0, 0))
    assert open_rgb(write(tmp_path / "la.png", clear)).getpixel((1, 1)) == (255, 255, 255)


def test_transparent_palettes_and_colour_keys_become_white(tmp_path: Path) -> None:
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((0, 0), 1)
    for name in ("x.png", "x.gif"):
        opened = open_rgb(write(tmp_path / name, palette, transparency=0))
        assert opened.getpixel((0, 0)) == (200, 100, 50)
        assert opened.getpixel((2, 2)) == (255, 255, 255)
    half = open_rgb(write(tmp_path / "half.png", palette, transparency=bytes([128, 255])))
    assert half.getpixel((2, 2)) == pytest.approx((132, 137, 142), abs=1)
    keyed = Image.new("RGB", (4, 4), (1, 2, 3))
    opened = open_rgb(write(tmp_path / "keyed.png", keyed, transparency=(1, 2, 3)))
    assert opened.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "LAB"])
def test_every_plain_mode_opens_as_the_same_picture(tmp_path: Path, mode: str) -> None:
    stored = lab(scene()) if mode == "LAB" else scene().convert(mode)
    opened = open_rgb(write(tmp_path / "x.tiff", stored))
    assert opened.mode == "RGB"
    assert difference(opened, stored) < 2


def lab(image: Image.Image) -> Image.Image:
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    converted = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    assert converted is not None
    return converted


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".pgm"])
def test_sixteen_bits_are_scaled_and_not_cut(tmp_path: Path, suffix: str) -> None:
    values = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    opened = np.asarray(open_rgb(write(tmp_path / f"x{suffix}", Image.fromarray(values))))
    assert np.abs(opened[..., 0] - values / 257).max() <= 0.51
    assert (opened[..., 0] == opened[..., 2]).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_see_through_value_of_grey_is_white_and_masked_out_whatever_its_bits(
    tmp_path: Path, bits: int
) -> None:
    # As programs that make PNGs small write black and white on transparent ground
    row = [0, 0, 1, 1] * 8  # 0 is black, 1 is see-through
    packed = int("".join(f"{value:0{bits}b}" for value in row), 2).to_bytes(4 * bits, "big")
    chunks = {
        "IHDR": struct.pack(">IIBBBBB", 32, 8, bits, 0, 0, 0, 0),
        "tRNS": struct.pack(">H", 1),
        "IDAT": zlib.compress((b"\0" + packed) * 8),
        "IEND": b"",
    }
    file = tmp_path / "grey.png"
    file.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + b"".join(
            struct.pack(">I", len(data))
            + (both := name.encode() + data)
            + struct.pack(">I", zlib.crc32(both))
            for name, data in chunks.items()
        )
    )
    assert np.asarray(open_rgb(file))[0, :, 1].tolist() == [0, 0, 255, 255] * 8
    assert not np.asarray(open_mask(file)).any()
    assert np.asarray(open_as(file, map_from_image))[0, :, 3].tolist() == [255, 255, 0, 0] * 8


def test_a_see_through_colour_of_16_bits_is_white(tmp_path: Path) -> None:
    row = struct.pack(">HHH", 300, 400, 500) * 4 + struct.pack(">HHH", 65535, 0, 0) * 4
    chunks = {
        "IHDR": struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0),
        "tRNS": struct.pack(">HHH", 300, 400, 500),
        "IDAT": zlib.compress((b"\0" + row) * 8),
        "IEND": b"",
    }
    whole = [
        struct.pack(">I", len(data)) + (both := name.encode() + data) + struct.pack(">I", zlib.crc32(both))
        for name, data in chunks.items()
    ]
    (file := tmp_path / "rgb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(whole))
    assert np.asarray(open_rgb(file))[0, :, 1].tolist() == [255] * 4 + [0] * 4


def test_a_bitmap_whose_fourth_channel_nobody_filled_is_not_see_through(tmp_path: Path) -> None:
    # As programs of Windows write screenshots: 32 bits, masks for four channels, zeros in the last one
    pixels = np.full((4, 4, 4), (200, 10, 0, 0), dtype=np.uint8)
    head = struct.pack("<IiiHHIIiiII", 108, 4, 4, 1, 32, 3, pixels.nbytes, 2835, 2835, 0, 0)
    head += struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000) + b"BGRs" + bytes(48)
    start = b"BM" + struct.pack("<IHHI", 14 + len(head) + pixels.nbytes, 0, 0, 14 + len(head))
    (file := tmp_path / "x.bmp").write_bytes(start + head + pixels.tobytes())
    assert open_rgb(file).getpixel((0, 0)) == (0, 10, 200)
    pixels[0, :, 3] = 255  # of which somebody filled a part
    file.write_bytes(start + head + pixels.tobytes())
    assert open_rgb(file).getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("white", [255, 65535, 2**31 - 1])
def test_whole_numbers_of_32_bits_have_the_smallest_full_scale_that_holds_them(
    tmp_path: Path, white: int
) -> None:
    values = np.array([[0, white // 2], [white, white]], dtype=np.int32)
    shown = np.asarray(open_rgb(write(tmp_path / "i.tiff", Image.fromarray(values))))[..., 0]
    assert np.abs(shown - [[0, 127.5], [255, 255]]).max() <= 1


@pytest.mark.parametrize(
    ("kind", "full", "tags"),
    [
        ("uint16", 65535, {262: 0}),  # 0 is white
        ("float32", 1, {262: 0}),
        ("int16", 32767, {}),
        ("uint32", 2**32 - 1, {}),
    ],
)
def test_a_tiff_says_what_its_numbers_mean(
    tmp_path: Path, kind: str, full: int, tags: dict[int, int]
) -> None:
    shown = np.linspace(0, 1, 16).reshape(4, 4)
    stored = (1 - shown if tags else shown) * full
    for name, opened in (("i.tiff", open_rgb), ("i.mask.tiff", open_mask)):
        file = write_tiff(tmp_path / name, stored.astype(kind), tags)
        values = np.asarray(opened(file).convert("L"))
        assert np.abs(values - shown * 255).max() <= 1
    if kind == "int16":
        assert "below 0" in reason(write_tiff(tmp_path / "ct.tiff", (stored - 1024).astype(kind), tags))


def write_tiff(path: Path, values: np.ndarray[Any, Any], tags: dict[int, int]) -> Path:
    """A grey TIFF of any type of numbers, of which Pillow writes some."""
    height, width = values.shape
    entries = {256: width, 257: height, 258: 8 * values.itemsize, 259: 1, 262: 1, 277: 1, 278: height}
    entries |= {279: values.nbytes, 339: {"u": 1, "i": 2, "f": 3}[values.dtype.kind]}
    entries |= {273: 8 + 2 + 12 * (len(entries) + 1) + 4} | tags  # where the values begin
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, entries[tag]) for tag in sorted(entries))
    header = struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + directory + bytes(4)
    path.write_bytes(header + values.astype(values.dtype.newbyteorder("<")).tobytes())
    return path


def test_floating_point_between_zero_and_one_is_scaled_and_anything_else_refused(tmp_path: Path) -> None:
    values = np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)
    opened = np.asarray(open_rgb(write(tmp_path / "x.tiff", Image.fromarray(values))))
    assert np.abs(opened[..., 1] - values * 255).max() <= 0.51
    assert "floating-point" in reason(write(tmp_path / "hdr.tiff", Image.fromarray(values * 7)))


def test_cmyk_becomes_rgb(tmp_path: Path) -> None:
    cyan = Image.new("CMYK", (16, 16), (255, 0, 0, 0))
    for name in ("x.jpg", "x.tiff"):
        red, green, blue = np.asarray(open_rgb(write(tmp_path / name, cyan)))[8, 8]
        assert red < 10
        assert green > 245
        assert blue > 245


def test_the_embedded_profile_of_a_cmyk_picture_decides_its_colours(tmp_path: Path) -> None:
    inks = Image.new("CMYK", (32, 16), (0, 0, 0, 0))
    inks.paste((0, 255, 0, 0), (0, 0, 16, 16))
    for name in ("x.jpg", "x.tiff"):
        opened = np.asarray(open_rgb(write(tmp_path / name, inks, icc_profile=profile_with_green_magenta())))
        red, green, _ = opened[8, 4].astype(int)
        assert green > red + 60  # this press prints green where it is asked for magenta
        assert opened[8, 28].min() > 245


def test_the_embedded_profile_of_an_rgb_picture_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGBA", (8, 8), (250, 10, 30, 255))
    for name in ("x.png", "x.webp"):
        path = write(tmp_path / name, image, icc_profile=profile_with_red_for_green())
        red, green, _ = np.asarray(open_rgb(path))[4, 4]
        assert green > 200 > 60 > red
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), b"not a profile"):
        path = write(tmp_path / "plain.png", image, icc_profile=profile)
        assert open_rgb(path).getpixel((4, 4)) == (250, 10, 30)


def srgb(light: Any) -> Any:
    """IEC 61966-2-1: linear light 0…1 to values 0…255."""
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * np.power(light, 1 / 2.4) - 0.055)


@pytest.mark.parametrize("exponent", [1.0, 1.8, 2.2])
@pytest.mark.parametrize("name", ["sRGB", "aRGB"])
def test_a_profile_counts_by_its_curves_and_not_by_its_name(
    tmp_path: Path, exponent: float, name: str
) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    profile = profile_with_exponent(exponent).replace("sRGB".encode("utf-16-be"), name.encode("utf-16-be"))
    path = write(tmp_path / "x.png", Image.fromarray(values), icc_profile=profile)
    opened = np.asarray(open_rgb(path), dtype=float)
    assert np.abs(opened - srgb((values / 255) ** exponent)).mean() < 1


@pytest.mark.parametrize(
    ("points", "profile", "said"),
    [
        ((31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000), None, False),  # sRGB's own
        ((31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000), None, True),  # Adobe RGB
        ((31270, 32900, 64000, 33000, 21000, 71000, 15000, 6000), 2.2, False),  # which its profile overrides
    ],
)
def test_primaries_in_a_png_s_header_are_said_not_to_be_applied(
    tmp_path: Path,
    points: tuple[int, ...],
    profile: float | None,
    said: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {} if profile is None else {"icc_profile": profile_with_exponent(profile)}
    path = write(tmp_path / "x.png", **options)
    body = b"cHRM" + struct.pack(">8I", *points)
    chunk = struct.pack(">I", 32) + body + struct.pack(">I", zlib.crc32(body))
    stored = path.read_bytes()
    path.write_bytes(stored[:33] + chunk + stored[33:])
    open_rgb(path)
    assert ("a PNG's cHRM" in " ".join(capsys.readouterr().err.split())) is said


@pytest.mark.parametrize(("suffix", "mark"), [(".png", b"cICP"), (".avif", b"colrnclx")])
def test_a_colour_space_that_numbers_alone_name_is_said_not_to_be_applied(
    tmp_path: Path, suffix: str, mark: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    for (primaries, curve), said in (
        ((1, 13), ""),
        ((12, 13), "Display P3,"),
        ((9, 16), "BT.2020 in PQ (HDR),"),
    ):
        path = write(tmp_path / f"{primaries}{suffix}")
        stored = path.read_bytes()
        if suffix == ".png":
            body = mark + bytes([primaries, curve, 0, 1])
            chunk = struct.pack(">I", 4) + body + struct.pack(">I", zlib.crc32(body))
            stored = stored[:33] + chunk + stored[33:]
        else:
            at = stored.index(mark) + len(mark)
            stored = stored[:at] + struct.pack(">HH", primaries, curve) + stored[at + 4 :]
        path.write_bytes(stored)
        printed_once.clear()
        open_rgb(path)
        told = capsys.readouterr().err
        assert f"that their colours are {said}" in told if said else not told


@pytest.mark.parametrize(
    ("space", "index", "said"),
    [(2, "", True), (0xFFFF, "R03", True), (0xFFFF, "", False), (1, "R98", False)],
)
def test_adobe_rgb_that_a_camera_names_without_a_profile_is_said_not_to_be_applied(
    space: int, index: str, said: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769).update({0xA001: space} | ({0xA005: {1: index}} if index else {}))
    exif[0x112] = 6  # on its side
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.jpg", exif=exif)
    printed_once.clear()
    assert open_rgb(tmp_path / "a.jpg").size == (32, 48)
    assert ("Adobe RGB" in capsys.readouterr().err) == said


def test_a_grey_profile_counts_beside_transparency_and_a_png_s_own_exponent_does(tmp_path: Path) -> None:
    values = np.arange(256, dtype=np.uint8).reshape(16, 16)
    expected = srgb(values / 255)[..., None].repeat(3, 2)
    grey = Image.fromarray(values)
    layered = Image.merge("LA", (grey, Image.new("L", grey.size, 255)))
    for image in (grey, layered):
        path = write(tmp_path / "grey.png", image, icc_profile=grey_profile_of_light())
        assert np.abs(np.asarray(open_rgb(path), dtype=float) - expected).mean() < 1
    for gamma, wanted in ((1.0, expected), (0.45455, np.stack([values] * 3, -1))):
        content = write(tmp_path / "x.png", grey).read_bytes()
        data = b"gAMA" + struct.pack(">I", round(gamma * 100_000))
        chunk = struct.pack(">I", 4) + data + struct.pack(">I", zlib.crc32(data))
        (tmp_path / "x.png").write_bytes(content[:33] + chunk + content[33:])
        assert np.abs(np.asarray(open_rgb(tmp_path / "x.png"), dtype=float) - wanted).mean() < 1


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png"])
def test_of_an_animation_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    options = {"lossless": True} if suffix == ".webp" else {}
    path = write(tmp_path / f"x{suffix}", frames[0], save_all=True, append_images=frames[1:], **options)
    assert open_rgb(path).getpixel((4, 4)) == (255, 0, 0)


def test_a_wrong_suffix_does_no_harm_if_the_content_is_a_picture(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jpg")
    assert difference(open_rgb(path.rename(tmp_path / "x.png")), scene()) < 4


def test_decoding_small_gives_the_same_square_as_decoding_whole(tmp_path: Path) -> None:
    path = write(tmp_path / "x.jpg", scene(800, 600), quality=95)
    small, whole = open_rgb(path, at_least=64), open_rgb(path)
    assert min(small.size) == 150
    assert whole.size == (800, 600)
    assert difference(crop_square(small, 64), crop_square(whole, 64)) < 1.5


def test_a_jpeg_too_large_to_hold_comes_at_half_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("backbone.media.sources.decode.MAX_FULL_SIZE_PIXELS", 80 * 60 - 1)
    assert open_rgb(write(tmp_path / "x.jpg", scene(80, 60))).size == (40, 30)
    assert open_rgb(write(tmp_path / "x.png", scene(80, 60))).size == (80, 60)


# What cannot be used, and why


def huge(path: Path, width: int, height: int) -> Path:
    """A PNG whose header promises width × height grey pixels and whose data ends at once."""
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), (b"IDAT", zlib.compress(b""))]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in [*chunks, (b"IEND", b"")]
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


def cut(path: Path, part: float) -> Path:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * part)])
    return path


def contains(content: bytes) -> Callable[[Path], Path]:
    def make(path: Path) -> Path:
        path.write_bytes(content)
        return path

    return make


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "empty.jpg": (contains(b""), "is empty"),
    "text.png": (contains("a note, nämlich".encode()), "is text"),
    "page.jpg": (contains(b"\n<!DOCTYPE html><html>404</html>"), "is a web page"),
    "pointer.jpg": (contains(b"version https://git-lfs.github.com/spec/v1\noid"), "Git LFS"),
    "phone.heic": (contains(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"), "HEIC"),
    "noise.webp": (contains(bytes(range(256))), "is not a picture"),
    "cut.jpg": (lambda path: cut(write(path, scene(400, 300)), 0.5), "is cut off"),
    "cut.png": (lambda path: cut(write(path, scene(400, 300)), 0.5), "is cut off"),
    "header.jpg": (lambda path: cut(write(path, scene(400, 300)), 0.02), "is "),
    "cut.gif": (lambda path: cut(write(path, scene(400, 300)), 0.5), "is "),
    "cut.webp": (lambda path: cut(write(path, scene(400, 300)), 0.5), "is "),
    "cut.tiff": (lambda path: cut(write(path, scene(400, 300)), 0.5), "is "),
    "huge.png": (lambda path: huge(path, 30_000, 20_000), "400 megapixels are the most"),
    "bomb.tiff": (lambda path: huge(path, 60_000, 60_000), "400 megapixels are the most"),
    "nothing.png": (lambda path: huge(path, 20, 20), "is "),
    "folder.png": (lambda path: path.mkdir() or path, "is a folder"),  # type: ignore[func-returns-value]
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    make, why = BAD[name]
    assert reason(make(tmp_path / name)).startswith(("is ", "has "))
    assert why in reason(tmp_path / name)
    with pytest.raises(BadImageError, match=why):
        open_named(tmp_path / name)


def test_a_see_through_picture_that_is_named_is_said_to_be_white_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene(8, 8).convert("RGBA").save(tmp_path / "opaque.png")
    Image.new("RGBA", (8, 8)).save(tmp_path / "clear.png")
    open_named(tmp_path / "opaque.png")
    assert not capsys.readouterr().err
    assert open_named(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    assert "clear.png: its transparent parts are white" in capsys.readouterr().err


def test_much_packed_text_beside_the_pixels_is_no_damage(tmp_path: Path) -> None:
    notes, limit = PngImagePlugin.PngInfo(), PngImagePlugin.MAX_TEXT_CHUNK
    notes.add_text("workflow", "a node " * 200_000, zip=True)
    scene(40, 30).save(tmp_path / "x.png", pnginfo=notes)
    assert open_named(tmp_path / "x.png").size == (40, 30)
    assert limit == PngImagePlugin.MAX_TEXT_CHUNK


def test_between_178_and_400_megapixels_no_bomb_is_suspected(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 89_478_485)  # Pillow's own, whatever ran before
    path = write(tmp_path / "x.jpg", Image.new("L", (20_000, 9_500), 90))
    opened = open_rgb(path, at_least=64)
    assert opened.size == (2_500, 1_188)
    assert opened.getpixel((5, 5)) == (90, 90, 90)
    assert not recwarn.list
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_a_forbidden_file_is_refused_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forbid(path: Path, mode: str = "r") -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", forbid)  # a chmod would not hold back root
    assert reason(tmp_path / "x.png") == "may not be read (permission denied)"


@pytest.mark.parametrize("address", ["https://example.org/dog.png", "file:///dog.png", "s3://pets/dog.png"])
def test_an_address_is_told_to_be_none_of_a_file(address: str) -> None:
    with pytest.raises(BadImageError, match=f"{address} is an address, and images are read from files"):
        open_named(address)
    assert reason(Path("C:/dog.png")).startswith("does not exist")


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    write(tmp_path / "dog 1.jpg")
    assert reason(tmp_path / "dog1.jpg") == "does not exist (nearest name: dog 1.jpg)"


def test_check_lists_every_bad_file_at_once(tmp_path: Path) -> None:
    write(tmp_path / "good.jpg")
    write(tmp_path / "ünicode and spaces.png")
    for name, (make, _) in BAD.items():
        make(tmp_path / name)
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    with pytest.raises(UserError) as caught:
        check_images(list_images(tmp_path))
    heading, *lines, remedy = str(caught.value).splitlines()
    assert heading == f"{len(BAD) + 1} of {len(BAD) + 3} images cannot be used:"
    assert remedy == "Replace or remove them, then run again."
    assert len(lines) == len(BAD) + 1
    for name, (_, why) in BAD.items():
        assert sum(name in line and why in line for line in lines) == 1


def test_check_is_content_with_good_pictures(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    write(tmp_path / "a.mask.png", Image.new("L", (96, 64), 255))
    check_images(list_images(tmp_path))


# Folders


def test_pictures_come_in_natural_order_and_other_files_are_passed_over(tmp_path: Path) -> None:
    for name in ("10.png", "2.JPG", "1 déjà vu.jpeg", "犬.webp", ".hidden.png", "._2.JPG"):
        write(tmp_path / name, format="PNG")
    for name in ("Thumbs.db", ".DS_Store", "notes.txt", "settings.json", "clip.mov", "README"):
        (tmp_path / name).write_bytes(b"\xff\0 anything")
    assert [picture.path.name for picture in list_images(tmp_path)] == [
        "1 déjà vu.jpeg",
        "2.JPG",
        "10.png",
        "犬.webp",
    ]


def test_captions_lie_beside_their_pictures(tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        write(tmp_path / name)
    (tmp_path / "a.txt").write_bytes("\ufeffa [V] dog,\r\n on  grass\n".encode())
    (tmp_path / "c.txt").write_text(" \n")
    write(tmp_path / "d.png")
    (tmp_path / "d.Caption").write_text("a [V] dog")
    write(tmp_path / "e.png")
    (tmp_path / "e.TXT").write_text("a dog")
    assert [picture.caption for picture in list_images(tmp_path)] == [
        "a [V] dog, on grass",
        None,
        None,
        "a [V] dog",
        "a dog",
    ]
    write(tmp_path / "e.jpg")
    (tmp_path / "e.TXT").rename(tmp_path / "e.jpg.txt")  # by the whole name, as some taggers write it
    (tmp_path / "e.png.txt").write_text("the same dog")
    captions = {picture.path.name: picture.caption for picture in list_images(tmp_path)}
    assert (captions["e.jpg"], captions["e.png"]) == ("a dog", "the same dog")
    (tmp_path / "e.caption").write_text("another dog")
    with pytest.raises(UserError, match=r"e\..* and e\..* are both the caption of e\.(png|jpg)"):
        list_images(tmp_path)


def test_a_streamed_tar_s_columns_are_called_as_an_unpacked_one_s() -> None:
    names = name_tar_columns(["jpg", "jpg.txt", "json.seed", "json.caption", "__key__"])
    assert names == {
        "jpg": "image",
        "jpg.txt": name_column("jpg.txt"),
        "json.seed": "seed",
        "json.caption": name_column("caption"),
        "__key__": "__key__",
    }
    assert names["jpg.txt"] == name_column("txt") != names["jpg"]


@pytest.mark.parametrize("column", ["text", "prompt", "caption"])
def test_captions_come_from_metadata_before_text_files(tmp_path: Path, column: str) -> None:
    for name in ("1.png", "2.png", "sub/3.png"):
        write(tmp_path / name)
    (tmp_path / "1.txt").write_text("from the text file")
    (tmp_path / "2.txt").write_text("from the text file")
    lines = [{"file_name": "1.png", column: "from metadata"}, {"file_name": "./sub/3.png", column: "three"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    found = {
        picture.path.relative_to(tmp_path).as_posix(): picture.caption for picture in list_images(tmp_path)
    }
    assert found == {"1.png": "from metadata", "2.png": "from the text file", "sub/3.png": "three"}


def test_metadata_may_be_a_csv_with_columns_of_any_name(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text('bild,words\n1.png,"a dog, ""sitting"",\non grass"\n')
    (picture,) = list_images(tmp_path, image_column="bild", caption_column="words")
    assert picture.caption == 'a dog, "sitting", on grass'
    with pytest.raises(UserError, match=r"no column 'wrds'; it has 'bild', 'words'"):
        list_images(tmp_path, image_column="bild", caption_column="wrds")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_a_table_is_read_whatever_separates_its_columns(tmp_path: Path, separator: str) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text(
        separator.join(["File_Name", "Text\r\n1.png", "a dog, sitting\r\n"])
    )
    (picture,) = list_images(tmp_path)
    assert picture.caption == "a dog, sitting"


@pytest.mark.parametrize(
    ("rows", "says"),
    [
        (
            "1.png,a dog, sitting on grass\n",
            r"Line 2 of .*metadata\.csv has 3 cells, and the first line names 2",
        ),
        (
            '1.png,"a dog on grass\n2.png,a cat\n',
            r"Line 2 of .*metadata\.csv: its quotation marks do not close",
        ),
        ('1.png,a dog\n2.png,"a cat\n3.png,"a cow"\n', r"Line 3 of .*: its quotation marks do not close"),
        ('1.png,"a dog\n2.png,a screen of 27"\n', r"goes on over the line “2\.png,a screen of 27”"),
        (
            f'1.png,"{"a dog " * 30_000}"\n',
            r"Line 2 of .*: its quotation marks do not close a cell \(field larger",
        ),
    ],
)
def test_a_table_s_texts_are_never_cut_short_in_silence(tmp_path: Path, rows: str, says: str) -> None:
    for name in ("1.png", "2.png", "3.png"):
        write(tmp_path / name)
    (tmp_path / "metadata.csv").write_text(f"file_name,text\n{rows}")
    with pytest.raises(UserError, match=says):
        list_images(tmp_path)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("<!DOCTYPE html>\n<p>Not found", "a web page"),
        (r"{\rtf1\ansi a dog}", "an RTF document"),
        ('{"caption": "a dog"}', "JSON"),
    ],
)
def test_a_file_of_another_kind_is_no_caption(tmp_path: Path, text: str, what: str) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text(text)
    with pytest.raises(UserError, match=rf"1\.txt is {what}.*, and a caption is plain text"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl", "metadata.csv", "train.parquet"])
def test_a_pointer_of_git_in_place_of_words_is_told(tmp_path: Path, name: str) -> None:
    write(tmp_path / "1.png")
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:ab\n")
    source = tmp_path / name if name.endswith("parquet") else tmp_path
    with pytest.raises(
        UserError, match=rf"{name} is a Git LFS pointer, not the file itself\. Run `git lfs pull`"
    ):
        list_images(source)


def test_a_list_or_a_cell_that_says_nothing_takes_no_caption_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "1.txt").write_text("\ufeff \u200b\n")
    assert list_images(tmp_path)[0].caption is None
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "text": null, "caption": "a dog"}')
    assert list_images(tmp_path)[0].caption == "a dog"
    (tmp_path / "metadata.jsonl").write_text("\n")
    list_images(tmp_path)
    assert "metadata.jsonl names no image, so no caption comes from it" in capsys.readouterr().err


def test_what_spreadsheets_write_around_cells_is_no_part_of_them(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "metadata.csv").write_text('\nfile_name, text,,\n1.png, "a dog, sitting",,\n,,,\n')
    assert [one.caption for one in list_images(tmp_path)] == ["a dog, sitting"]
    (tmp_path / "metadata.csv").write_text("file_name,text,text\n1.png,a dog,a cat\n")
    with pytest.raises(UserError, match=r"metadata\.csv has two columns 'text'"):
        list_images(tmp_path)


@pytest.mark.parametrize("name", ["1.txt", "1.caption", "metadata.jsonl", "metadata.csv"])
def test_a_caption_that_is_a_link_to_nothing_is_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "1.png")
    (tmp_path / name).symlink_to(tmp_path / "moved" / name)
    with pytest.raises(UserError, match=rf"{name} is a link to .*moved/{name}, which is not there"):
        list_images(tmp_path)


def test_twelve_bits_kept_in_sixteen_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    values = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    Image.fromarray(values * 16).save(tmp_path / "1.png")
    check_images(list_images(tmp_path))
    assert not capsys.readouterr().err
    Image.fromarray(values).save(tmp_path / "1.png")
    check_images(list_images(tmp_path))
    assert "1.png has 16-bit values up to 4095 of 65535, so it is nearly black" in capsys.readouterr().err


def test_frames_of_a_file_of_another_name_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scene().save(tmp_path / "1.jpg", format="WEBP", save_all=True, append_images=[scene().rotate(180)])
    scene().save(tmp_path / "2.jpg", format="MPO", save_all=True, append_images=[scene()])
    check_images(list_images(tmp_path))
    assert capsys.readouterr().err == f"{tmp_path}/1.jpg has 2 frames or pages, of which the first counts.\n"


def test_of_see_through_images_it_is_said_once_that_they_are_white(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_names.cache_clear()
    Image.new("RGBA", (64, 64)).save(tmp_path / "1.png")
    Image.new("RGBA", (64, 64)).save(tmp_path / "2.png")
    Image.new("RGBA", (64, 64), "red").save(tmp_path / "0.png")
    check_images(list_images(tmp_path))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path}/1.png is see-through: its transparent parts are white")


def test_links_to_nothing_among_images_are_said(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "more").symlink_to(tmp_path / "moved")
    assert describe_unused(tmp_path, list_images(tmp_path)) == [f"Not used in {tmp_path}: more."]
    (tmp_path / "2.png").symlink_to(tmp_path / "moved.png")
    with pytest.raises(UserError, match=r"2\.png is a link to .*moved\.png, which is not there"):
        check_images(list_images(tmp_path))


def test_a_table_whose_texts_are_no_captions_is_said_to_have_none(
    tmp_path: Path, table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "1.png", "description": "a dog"}')
    assert list_images(tmp_path)[0].caption is None
    assert "metadata.jsonl has no column text, prompt or caption" in capsys.readouterr().err
    assert list_images(tmp_path, caption_column="description")[0].caption == "a dog"
    table.rename_column("prompt", "description").save_to_disk(str(tmp_path / "saved"))
    assert list_images(tmp_path / "saved")[0].caption is None
    assert "It has description: name the one with caption_column" in capsys.readouterr().err


def test_splits_to_measure_with_are_left_out_and_said(
    tmp_path: Path, table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    for name in ("train", "validation"):
        write(tmp_path / "folder" / name / "1.png")
        (tmp_path / "files" / "data").mkdir(parents=True, exist_ok=True)
        table.to_parquet(str(tmp_path / "files" / "data" / f"{name}-00000-of-00001.parquet"))
    datasets.DatasetDict(test=table, train=table.select([0])).save_to_disk(str(tmp_path / "saved"))
    for name, count, said in (
        ("folder", 1, "validation/, of other splits than train"),
        ("files", 2, "validation-00000-of-00001.parquet, of other splits than train"),
        ("saved", 1, "saved is learned from; left out: test (2 rows)"),
    ):
        found = list_images(tmp_path / name)
        assert len(found) == count and "validation" not in str(found[0].path)
        assert said in capsys.readouterr().err
    (tmp_path / "folder" / "train").rename(tmp_path / "folder" / "trainval")
    (tmp_path / "folder" / "validation").rename(tmp_path / "folder" / "held_out")
    assert len(list_images(tmp_path / "folder")) == 1
    (tmp_path / "folder" / "trainval").rename(
        tmp_path / "folder" / "dog"
    )  # then it is no split beside another
    assert len(list_images(tmp_path / "folder")) == 2


def test_arrow_files_are_tables(tmp_path: Path, table: Any) -> None:
    table.save_to_disk(str(tmp_path / "saved"))
    (file,) = (tmp_path / "saved").glob("*.arrow")
    found = list_images(file)
    assert [one.caption for one in found] == ["a dog", None]
    assert [one.read() for one in found] == [one.read() for one in list_images(tmp_path / "saved")]


def test_captions_of_tars_are_read_however_their_files_are_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def pack(name: str, *files: str) -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for file in files:
                buffer = io.BytesIO()
                scene().save(buffer, "JPEG")
                stored = "\ufeffa dog\r\non grass".encode() if "t" in file.lower() else buffer.getvalue()
                member = tarfile.TarInfo(file)
                member.size = len(stored)
                tar.addfile(member, io.BytesIO(stored))
        return tmp_path / name

    for number, names in enumerate((("1.jpg", "1.caption"), ("1.JPG", "1.TXT"), ("1.jpeg", "1.text"))):
        (one,) = list_images(pack(f"{number}.tar", *names))
        assert one.caption == "a dog on grass" and difference(one.open(), scene()) < 5
    assert "no captions" not in capsys.readouterr().err
    with pytest.raises(UserError, match="names have dots"):
        list_images(pack("dots.tar", "i.v1.01.jpg", "i.v1.01.txt", "i.v1.02.jpg", "i.v1.02.txt"))


def test_a_folder_that_was_packed_as_it_is_gives_its_images_with_their_captions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Captions behind all images, other formats, one caption alone, a member twice, and what a system leaves."""

    def pack(name: str, files: Mapping[str, bytes]) -> Path:
        with tarfile.open(tmp_path / name, "w") as tar:
            for file, content in files.items():
                member = tarfile.TarInfo(file)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        return tmp_path / name

    stored = {}
    for kind in ("JPEG", "PNG", "TIFF"):
        buffer = io.BytesIO()
        scene().save(buffer, kind)
        stored[kind] = buffer.getvalue()
    folder = dict.fromkeys(("./._dog", "dog/._1.jpg", "__MACOSX/dog/1.jpg", "dog/Thumbs.db"), b"Mac OS X")
    folder |= {"dog/README.md": b"My dog.", "dog/1.jpg": stored["JPEG"], "dog/2.png": stored["PNG"]}
    folder |= {"dog/3.tiff": stored["TIFF"]} | {f"dog/{n}.jpg": stored["JPEG"] for n in range(4, 12)}
    folder |= {"dog/1.txt": b"a dog", "dog/11.jpg.txt": b"another dog"}
    found = list_images(pack("dog.tar", folder))
    assert [one.caption for one in found] == ["a dog", *[None] * 9, "another dog"]
    assert all(difference(one.open(), scene()) < 5 for one in found)
    assert "Not used in" in (said := capsys.readouterr().err) and "of that name: dog/README.md." in said
    images = {name: content for name, content in folder.items() if name[-3:] != "txt"}
    with pytest.raises(UserError, match=r"holds dog/metadata\.jsonl, .*Unpack it, and give that folder"):
        list_images(
            pack("list.tar", {**images, "dog/metadata.jsonl": b'{"file_name": "1.jpg", "text": "a"}'})
        )
    with pytest.raises(UserError, match="names have dots"):  # of which one was read, and the other was not
        list_images(pack("dots.tar", {f"v1.{part} dog.jpg": stored["JPEG"] for part in (5, 6)}))


def test_metadata_may_be_parquet_and_its_names_of_splits_count(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"file_name": f"{split}/1.png", "text": split} for split in ("train", "test")]
    for row in rows:
        write(tmp_path / row["file_name"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "metadata.parquet")
    (one,) = list_images(tmp_path)
    assert (one.caption, one.path) == ("train", tmp_path / "train" / "1.png")
    assert describe_unused(tmp_path, [one]) == [f"Not used in {tmp_path}: 1 image in test/."]


def test_of_a_table_s_several_captions_and_images_it_is_said_which_count(
    tmp_path: Path, table: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    masks = table.select_columns(["picture"]).rename_column("picture", "mask")
    wide = datasets.concatenate_datasets([table.add_column("caption", ["a cat", "a cow"]), masks], axis=1)
    wide.save_to_disk(str(tmp_path / "saved"))
    found = list_images(tmp_path / "saved", image_column="picture")
    assert [one.caption for one in found] == ["a dog", None]
    said = "has captions in prompt and in caption: prompt is read. Name another with caption_column"
    assert said in capsys.readouterr().err
    assert describe_unused(tmp_path / "saved", found) == [
        f"Not used in {tmp_path / 'saved'}: the images in mask; those in picture are."
    ]
    assert (
        list_images(tmp_path / "saved", image_column="picture", caption_column="caption")[1].caption
        == "a cow"
    )
    assert "has captions" not in capsys.readouterr().err


def test_names_in_metadata_match_whatever_their_unicode_form(tmp_path: Path) -> None:
    write(tmp_path / "cafe\u0301.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": "caf\u00e9.png", "text": "a cup"}))
    (picture,) = list_images(tmp_path)
    assert picture.caption == "a cup"
    check_images([picture])


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ('{"file_name": "1.png"}\n{"file_name": ', "Line 2 of .* is not JSON"),
        ('["1.png"]', "Line 1 of .* is not a JSON object"),
        ('{"text": "a dog"}', "Line 1 of .* names no image"),
        ('{"file_name": "1.png", "text": 7}', "caption that is not text"),
        ('{"file_name": "../1.png"}', "outside the folder"),
        ('{"file_name": "/etc/1.png"}', "outside the folder"),
        ('{"file_name": "1.png"}\n{"file_name": "./1.png"}', "a second time"),
    ],
)
def test_faulty_metadata_is_named_with_its_line(tmp_path: Path, content: str, complaint: str) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "metadata.jsonl").write_text(content)
    with pytest.raises(UserError, match=complaint):
        list_images(tmp_path)


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["metadata.csv", "metadata.tsv", "metadata.jsonl", "metadata.json", "1.txt"])
def test_utf_16_is_read_where_its_mark_says_so(tmp_path: Path, name: str, order: str) -> None:
    write(tmp_path / "1.png")
    texts = {
        ".csv": "file_name,text\r\n1.png,a naïve 猫\r\n",
        ".tsv": "file_name\ttext\r\n1.png\ta naïve 猫\r\n",  # Excel's “Unicode Text”
        ".jsonl": '{"file_name": "1.png", "text": "a naïve 猫"}\r\n',
        ".json": '[{"file_name": "1.png", "text": "a naïve 猫"}]',
        ".txt": "a naïve 猫\r\n",
    }
    content = f"\ufeff{texts[Path(name).suffix]}".encode(order)
    (tmp_path / name).write_bytes(content)
    (found,) = list_images(tmp_path)
    assert found.caption == "a naïve 猫"
    (tmp_path / name).write_bytes(content[:-1])
    with pytest.raises(UserError, match=rf"{name} is not whole UTF-16 text\. Save it as UTF-8"):
        list_images(tmp_path)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-32", "utf-16-le"])
def test_captions_in_another_encoding_are_refused_by_name(tmp_path: Path, encoding: str) -> None:
    write(tmp_path / "1.png")
    (tmp_path / "1.txt").write_bytes("naïve".encode(encoding))
    with pytest.raises(UserError, match=r"1\.txt is not UTF-8"):
        list_images(tmp_path)
    write(tmp_path / "2.png")
    (tmp_path / "2.txt").write_bytes("naïve".encode(encoding))
    with pytest.raises(UserError, match=r"1\.txt is not UTF-8 text\. .* 1 more beside it: no UTF-8 either"):
        list_images(tmp_path)


def test_a_picture_that_only_metadata_knows_is_among_the_bad_ones(tmp_path: Path) -> None:
    write(tmp_path / "dog1.png")
    (tmp_path / "bad.png").touch()
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "dog2.png", "text": "a dog"}')
    with pytest.raises(UserError, match="2 of 3 images") as caught:
        check_images(list_images(tmp_path))
    assert "dog2.png does not exist (nearest name: dog1.png)" in str(caught.value)


def test_masks_lie_beside_their_pictures_and_are_no_pictures(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    white = Image.new("1", (48, 32), 0)
    white.paste(1, (0, 0, 24, 32))
    write(tmp_path / "a.mask.png", white)
    write(tmp_path / "b.jpg")
    first, second = list_images(tmp_path)
    assert second.open_mask() is None
    mask = first.open_mask()
    assert mask is not None
    weights = mask_to_tensor(mask)
    assert weights.shape == (1, 32, 48)
    assert weights[..., :24].eq(1).all()
    assert weights[..., 24:].eq(0).all()


def disc() -> Any:
    """White inside a circle [64, 64], bool; a little less than a fifth of the whole."""
    y, x = np.mgrid[0:64, 0:64]
    return (x - 32) ** 2 + (y - 32) ** 2 < 16**2


def painted(encoding: str) -> Image.Image:
    """The disc as a mask in one of the encodings in which programs and people leave them."""
    inside = disc()
    white = (255 * inside).astype(np.uint8)
    match encoding:
        case "white on transparent":
            return Image.fromarray(np.stack([white, white, white, white], -1))
        case "white everywhere, transparent outside":
            return Image.fromarray(np.stack([np.full_like(white, 255)] * 3 + [white], -1))
        case "grey and alpha":
            return Image.merge("LA", (Image.new("L", (64, 64), 255), Image.fromarray(white)))
        case "0 and 1":
            return Image.fromarray(inside.astype(np.uint8))
        case "1 bit":
            return Image.fromarray(white).convert("1")
        case "16 bits":
            return Image.fromarray((65535 * inside).astype(np.uint16))
        case "16 bits of 0 and 255":
            return Image.fromarray((255 * inside).astype(np.uint16))
        case "16 bits of 0 and 1":
            return Image.fromarray(inside.astype(np.uint16))
        case "float":
            return Image.fromarray(inside.astype(np.float32))
        case "RGB":
            return Image.fromarray(white).convert("RGB")
        case "red" | "blue" | "dark green":
            colour = {"red": (255, 0, 0), "blue": (0, 0, 255), "dark green": (0, 120, 30)}[encoding]
            return Image.fromarray(inside[..., None] * np.array(colour, np.uint8))
    image = Image.fromarray(inside.astype(np.uint8)).convert("P")
    image.putdata(inside.astype(np.uint8).ravel().tolist())
    image.putpalette([0, 0, 0, *{"white palette": (255, 255, 255), "red palette": (128, 0, 0)}[encoding]])
    return image


ENCODINGS = (
    *("white on transparent", "white everywhere, transparent outside", "grey and alpha", "0 and 1", "1 bit"),
    *(
        "16 bits",
        "16 bits of 0 and 255",
        "16 bits of 0 and 1",
        "float",
        "RGB",
        *("red", "blue", "dark green"),
        "white palette",
        "red palette",
    ),
)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_mask_is_the_same_in_whatever_encoding_it_was_painted(tmp_path: Path, encoding: str) -> None:
    suffix = ".tiff" if encoding == "float" else ".png"
    path = write(tmp_path / f"1.mask{suffix}", painted(encoding))
    mask = open_mask(path)
    assert mask.mode == "L"
    assert np.array_equal(np.asarray(mask), 255 * disc())
    assert float(mask_to_tensor(mask).mean()) == pytest.approx(0.196, abs=0.01)


@pytest.mark.parametrize("hole", [False, True])
def test_a_photograph_is_no_mask_and_a_soft_or_coloured_stroke_is_one(tmp_path: Path, hole: bool) -> None:
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    photograph = Image.fromarray(values).resize((256, 256), Image.Resampling.BICUBIC)
    if hole:  # what other programs take for a mask: see-through where it may change
        photograph.putalpha(Image.fromarray(np.uint8(255 - 255 * disc())).resize((256, 256)))
    with pytest.raises(BadImageError, match=r"photo\.png has the colours of a photograph, and a mask"):
        open_mask(write(tmp_path / "photo.png", photograph))
    ramp = Image.radial_gradient("L").convert("RGB")
    colour, ground = (Image.new("RGB", (256, 256), colour) for colour in ((255, 200, 60), "black"))
    stroke = Image.composite(colour, ground, Image.radial_gradient("L"))
    for number, soft in enumerate((ramp, stroke)):
        assert np.asarray(open_mask(write(tmp_path / f"{number}.png", soft))).max() > 127
        if soft is stroke:
            assert np.asarray(open_mask(tmp_path / f"{number}.png")).max() == 255
        soft.save(tmp_path / "soft.jpg", quality=60)
        assert np.asarray(open_mask(tmp_path / "soft.jpg")).max() > 127


def test_a_mask_s_greys_are_left_as_they_are_whatever_its_colour_profile(tmp_path: Path) -> None:
    shades = Image.linear_gradient("L")
    path = write(tmp_path / "1.mask.png", shades, icc_profile=grey_profile_of_light())
    assert difference(open_mask(path), shades) == 0


@pytest.mark.parametrize("orientation", STORED_AS)
def test_a_mask_turns_with_its_picture(tmp_path: Path, orientation: int) -> None:
    upright, turn = scene().convert("L"), STORED_AS[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "x.mask.png", upright if turn is None else upright.transpose(turn), exif=exif)
    assert difference(open_mask(path), upright) == 0


def test_onetrainers_masks_are_masks_and_its_condition_images_are_left_out(tmp_path: Path) -> None:
    for name in ("1.png", "1-condlabel.png", "2.jpg"):
        write(tmp_path / name)
    for name, value in (("1-masklabel.png", 255), ("2-MASKLABEL.PNG", 0)):
        write(tmp_path / name, Image.new("L", (48, 32), value), format="PNG")
    first, second = list_images(tmp_path)
    assert [one.path.name for one in (first, second)] == ["1.png", "2.jpg"]
    assert [one.open_mask().getextrema() for one in (first, second)] == [(255, 255), (0, 0)]  # type: ignore[union-attr]
    assert describe_unused(tmp_path, [first, second]) == [f"Not used in {tmp_path}: 1-condlabel.png."]
    write(tmp_path / "1.mask.png", Image.new("L", (48, 32)))
    with pytest.raises(UserError, match=r"are both the mask of 1\.png"):
        list_images(tmp_path)
    for name in ("1.mask.png", "1-masklabel.png"):
        (tmp_path / name).unlink()
    for name in (
        "1_masklabel.png",
        "1.png.mask.png",
        "1.masklabel.png",
    ):  # written by hand, or by another tool
        write(tmp_path / name, Image.new("L", (48, 32), 255))
        first, second = list_images(tmp_path)
        assert first.mask == tmp_path / name and second.path.name == "2.jpg"
        (tmp_path / name).unlink()


def test_a_mask_without_picture_or_of_another_shape_is_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.jpg")
    write(tmp_path / "a.mask.png", Image.new("L", (32, 48)))
    with pytest.raises(UserError, match=r"a mask of 32 × 48, another aspect ratio than its image a\.jpg"):
        check_images(list_images(tmp_path))
    write(tmp_path / "c.mask.png")
    with pytest.raises(UserError, match=r"c\.mask\.png is a mask, but there is no image"):
        list_images(tmp_path)


def test_metadata_may_be_a_json_list_and_its_name_in_any_case(tmp_path: Path) -> None:
    write(tmp_path / "1.png")
    rows = [{"file_name": "1.png", "text": "a dog"}]
    for name, text in (
        ("metadata.json", json.dumps(rows, indent=2)),
        ("metadata.jsonl", json.dumps(rows)),
        ("Metadata.JSONL", json.dumps(rows[0])),
        ("METADATA.CSV", "file_name,text\n1.png,a dog\n"),
    ):
        (tmp_path / name).write_text(text)
        (found,) = list_images(tmp_path)
        assert found.caption == "a dog", name
        assert describe_unused(tmp_path, [found]) == []
        (tmp_path / name).unlink()
    (tmp_path / "metadata.json").write_text(json.dumps([*rows, {"text": "a cat"}]))
    with pytest.raises(UserError, match=r"Entry 2 of .*metadata\.json names no image"):
        list_images(tmp_path)
    # another tool's record of that name
    (tmp_path / "metadata.json").write_text('{"1": {"caption": "a cat"}}')
    (found,) = list_images(tmp_path)
    assert found.caption is None and "metadata.json" in describe_unused(tmp_path, [found])[0]


def test_metadata_names_images_in_whatever_case_and_spelling(tmp_path: Path) -> None:
    write(tmp_path / "sub" / "caf\u00e9.png")
    write(tmp_path / "1.PNG", format="PNG")
    rows = [{"file_name": "sub/cafe\u0301.png", "text": "a caf\u00e9"}, {"file_name": "1.png", "text": "one"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert [(one.path.name, one.caption) for one in list_images(tmp_path)] == [
        ("1.PNG", "one"),
        ("caf\u00e9.png", "a caf\u00e9"),
    ]


def test_a_cache_of_tables_that_cannot_be_written_is_not_the_table_s_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def closed(*_: object, **__: object) -> None:
        try:
            raise PermissionError(13, "Permission denied", str(tmp_path / "cache" / "datasets"))
        except OSError as error:
            raise datasets.exceptions.DatasetGenerationError("it failed") from error

    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setattr(datasets.config, "HF_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets, "load_dataset", closed)
    with pytest.raises(UserError, match=r"cache/datasets, which is not writable.*HF_HOME"):
        list_images(tmp_path / "x.parquet")


def broken_link(path: Path) -> Path:
    path.parent.mkdir()
    path.symlink_to("gone.png")
    return path


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
def test_what_never_ends_is_listed_like_any_bad_file(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    os.mkfifo(tmp_path / "1.png")
    (tmp_path / "2.png").symlink_to("/dev/zero")
    with pytest.raises(BadImageError, match="is a pipe or a device"):
        open_named(tmp_path / "1.png")
    assert reason(broken_link(tmp_path / "a" / "3.png")) == "is a link to gone.png, which is not there"
    with pytest.raises(
        UserError, match=r"2 of 3 images(.|\n)*1\.png is a pipe or a device(.|\n)*2\.png is a pipe"
    ):
        check_images(list_images(tmp_path))


def test_a_name_in_another_encoding_is_listed_like_any_bad_file(tmp_path: Path) -> None:
    write(tmp_path / "0.png")
    try:
        (tmp_path / "0.png").rename(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png"))
    except OSError:
        pytest.skip("this system's names are UTF-8")
    with pytest.raises(UserError, match="caf\ufffd\\.png has a name that is no text in UTF-8: rename it"):
        check_images(list_images(tmp_path))


def test_further_frames_and_pages_are_said_not_to_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue", "green")]
    for name in ("1.gif", "2.tif"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    frames[0].save(tmp_path / "3.png")
    check_images(list_images(tmp_path))
    said = capsys.readouterr().err
    assert "1.gif has 3 frames or pages, of which the first counts. The same holds for 1 other image." in said
    for name in ("1.gif", "2.tif"):
        (tmp_path / name).unlink()
    check_images(list_images(tmp_path))
    assert not capsys.readouterr().err


def test_an_image_in_memory_is_read_as_its_file_is(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x112] = 6
    ramp = np.tile(np.arange(64, dtype=np.uint8) * 4, (32, 1))
    seen = Image.merge("RGBA", [Image.fromarray(ramp)] * 4)
    profile = profile_with_exponent(1.0)
    cases: list[tuple[str, Image.Image, dict[str, Any]]] = [
        ("turned.png", seen.convert("RGB"), {"exif": exif}),
        ("clear.png", seen, {}),
        ("light.png", seen.convert("RGB"), {"icc_profile": profile}),
        ("deep.png", Image.fromarray(ramp.astype(np.uint16) * 257), {}),
    ]
    for name, image, how in cases:
        image.save(tmp_path / name, **how)
        with Image.open(tmp_path / name) as opened:
            assert open_loaded(opened).tobytes() == open_rgb(tmp_path / name).tobytes(), name


def test_a_table_may_name_the_files_of_its_images(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    for number in range(2):
        write(tmp_path / "photos" / f"{number}.png")
    rows = [{"file_name": f"photos/{number}.png", "text": f"dog {number}"} for number in range(3)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    found = list_images(tmp_path / "x.parquet")
    assert found[1].open().tobytes() == open_rgb(tmp_path / "photos" / "1.png").tobytes()
    with pytest.raises(UserError, match=r"1 of 3 images cannot be used:\n .*photos/2\.png does not exist"):
        check_images(found)


def test_subfolders_are_read_only_where_the_folder_has_no_pictures_itself(tmp_path: Path) -> None:
    write(tmp_path / "10_sks dog" / "1.png")
    write(tmp_path / "2_dog" / "1.png")
    (tmp_path / "2_dog" / "1.txt").write_text("a dog")
    write(tmp_path / ".cache" / "1.png")
    found = [(picture.path.parent.name, picture.caption) for picture in list_images(tmp_path)]
    assert found == [("2_dog", "a dog"), ("10_sks dog", None)]
    write(tmp_path / "0.png")
    assert [picture.path.name for picture in list_images(tmp_path)] == ["0.png"]


def test_what_a_folder_holds_beside_its_pictures_is_said_in_a_line(tmp_path: Path) -> None:
    for name in ("1.png", "1_mask.png", "more/1.png", "more/deeper/2.png", "more/deeper/3.png", "empty/x"):
        write(tmp_path / name, format="PNG")
    for name in ("2.jxl", "3.tga", "meta_cap.json", "a.npz", "b.npz", "c.npz", "Thumbs.db", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "1.txt").write_text("a dog")
    (tmp_path / "4.txt").write_text("of a picture that is gone")
    line, doubt = describe_unused(tmp_path, list_images(tmp_path))
    assert line == (
        f"Not used in {tmp_path}: 1 image in more/, 2 images in more/deeper/, 2.jxl, 3.tga, 4.txt, "
        "3 .npz files (a.npz, …), meta_cap.json."
    )
    assert "1_mask.png counts as an image" in doubt and "1.mask.png" in doubt
    assert describe_unused(tmp_path / "more" / "deeper", list_images(tmp_path / "more" / "deeper")) == []


def test_images_that_are_called_as_maps_of_others_are_said(tmp_path: Path) -> None:
    for name in ("1.png", "1_depth.png", "1-Canny.png", "my pose.png", "2.png"):
        write(tmp_path / name)
    (doubt,) = describe_unused(tmp_path, list_images(tmp_path))
    assert doubt.startswith("1-Canny.png counts as an image of its own, and is called as a map")
    assert doubt.endswith("So does 1 other of such a name.")


def test_names_in_a_list_may_begin_with_its_own_folder_and_be_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "dogs" / "dogs"  # what lies above is not looked at
    for name in ("1.png", "2.png", "a/3.png", "../4.png"):
        write(folder / name)
    rows = [{"file_name": "dogs/1.png", "text": "a"}, {"file_name": 2, "text": "b"}]
    rows += [{"file_name": "dogs/a/3", "text": "c"}]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    found = {record.path.relative_to(folder).as_posix(): record.caption for record in list_images(folder)}
    assert found == {"1.png": "a", "2.png": "b", "a/3.png": "c"}
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": "dogs/4.png", "text": "a"}))
    with pytest.raises(UserError, match=r"dogs/dogs/dogs/4\.png does not exist"):
        check_images(list_images(folder))


def test_a_folder_of_captions_and_a_mask_of_another_spelling_are_said(tmp_path: Path) -> None:
    for name in ("1.png", "mask_1.png", "1.alpha.png"):
        write(tmp_path / name)
    (tmp_path / "captions").mkdir()
    (tmp_path / "captions" / "1.txt").write_text("a dog")
    line, *doubts = describe_unused(tmp_path, list_images(tmp_path))
    assert line == f"Not used in {tmp_path}: 1 caption in captions/."
    assert [doubt.split()[0] for doubt in doubts] == ["1.alpha.png", "mask_1.png"]


def test_a_folder_of_masks_beside_one_of_images_is_none_of_images(tmp_path: Path) -> None:
    for name in ("images/1.png", "Masks/1.png"):
        write(tmp_path / name)
    with pytest.raises(
        UserError, match=r"Masks holds images of the same names as .*images.* as 1\.mask\.png"
    ):
        list_images(tmp_path)
    (tmp_path / "Masks").rename(tmp_path / "more")
    assert len(list_images(tmp_path)) == 2


def test_pictures_that_lie_deeper_are_named(tmp_path: Path) -> None:
    write(tmp_path / "img" / "10_sks dog" / "1.png")
    (tmp_path / "log").mkdir()
    with pytest.raises(UserError, match=r"but folders that hold some: img.10_sks dog\. Give one of these"):
        list_images(tmp_path)


def test_what_a_system_keeps_on_a_disk_and_what_is_closed_is_no_folder_of_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "dog" / "1.png")
    for name in ("lost+found", "System Volume Information", "$RECYCLE.BIN", "@eaDir", "#recycle"):
        write(tmp_path / name / "2.png")
    assert [picture.path.name for picture in list_images(tmp_path)] == ["1.png"]
    # A folder may be listed, and its entries not looked at
    stat = Path.stat

    def refused(self: Path, **more: Any) -> Any:
        if self == tmp_path / "1.pdf":
            raise PermissionError(13, "Permission denied", str(self))
        return stat(self, **more)

    (tmp_path / "dog" / "1.png").rename(tmp_path / "1.pdf")
    monkeypatch.setattr(Path, "stat", refused)
    with pytest.raises(UserError, match="holds no images"):
        list_images(tmp_path)


def test_a_whole_disk_is_not_looked_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(9):
        write(tmp_path / f"{number:02}" / "a" / "1.png")
    monkeypatch.setattr("backbone.media.sources.pictures.MOST_FOLDERS", 12)
    with pytest.raises(UserError, match=r"folders that hold some: 00/a, 01/a\. Give one"):
        list_images(tmp_path)


def test_a_link_to_itself_is_listed_like_any_bad_file(tmp_path: Path) -> None:
    write(tmp_path / "good.png")
    (tmp_path / "bad.png").touch()
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    with pytest.raises(UserError, match=r"2 of 3 images(.|\n)*loop\.png is a link that leads to itself"):
        check_images(list_images(tmp_path))


def test_one_picture_is_a_source_too(tmp_path: Path) -> None:
    path = write(tmp_path / "dog 1.png")
    (tmp_path / "dog 1.txt").write_text("a dog")
    (picture,) = list_images(path)
    assert picture == ImageRecord(path, "a dog")
    assert picture.read() == path.read_bytes()


def test_sources_without_pictures_say_what_they_are(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it is empty"):
        list_images(tmp_path)
    for name in ("a.txt", "b.txt", "c.mov"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"holds no images \(only 2 \.txt, 1 \.mov\)"):
        list_images(tmp_path)
    with pytest.raises(UserError, match=r"is a \.txt file, neither an image nor a folder"):
        list_images(tmp_path / "a.txt")
    (tmp_path / "dogs.zip").touch()
    with pytest.raises(UserError, match=r"is a \.zip file.*Unpack it, and give that folder"):
        list_images(tmp_path / "dogs.zip")
    (tmp_path / "dogs.jsonl").touch()
    with pytest.raises(UserError, match=r"call it metadata\.jsonl, beside the images"):
        list_images(tmp_path / "dogs.jsonl")
    (tmp_path / "dataset.toml").touch()
    with pytest.raises(UserError, match="give the folder of images that it names"):
        list_images(tmp_path / "dataset.toml")


def test_a_mistyped_folder_is_not_looked_for_on_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "photos" / "dogs" / "1.png")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"photos.dog does not exist\. Did you mean photos.dogs\?"):
        list_images("photos/dog")
    with pytest.raises(UserError, match=r"cats does not exist\. Give a folder"):
        list_images("cats")
    with pytest.raises(UserError, match=r"Patterns are not read: give the folder photos.dogs"):
        list_images("photos/dogs/*.png")


# Tables


@pytest.fixture
def table() -> Any:
    import datasets

    buffer = io.BytesIO()
    scene().save(buffer, "PNG")
    rows = [{"bytes": buffer.getvalue(), "path": None}, {"bytes": b"broken", "path": None}]
    features = datasets.Features({"picture": datasets.Image(), "prompt": datasets.Value("string")})
    return datasets.Dataset.from_dict({"picture": rows, "prompt": ["a dog", None]}, features=features)


def test_a_saved_dataset_is_read_by_its_image_column_and_its_bad_rows_are_listed(
    tmp_path: Path, table: Any
) -> None:
    table.save_to_disk(str(tmp_path / "saved"))
    first, second = list_images(tmp_path / "saved")
    assert (first.caption, second.caption) == ("a dog", None)
    assert difference(first.open(), scene()) == 0
    with pytest.raises(UserError, match=r"1 of 2 images(.|\n)*000001 is text"):
        check_images([first, second])
    with pytest.raises(UserError, match=r"no column 'img'; it has 'picture', 'prompt'"):
        list_images(tmp_path / "saved", image_column="img")


def test_an_id_is_loaded_by_the_datasets_library_and_failing_that_is_one_sentence(
    table: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backbone.media.sources.tables.hub_answers", lambda name, kind: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda name: {"test": table, "train": table.select([0])})
    (picture,) = list_images("somebody/dogs")
    assert difference(picture.open(), scene()) == 0

    def unreachable(name: str) -> None:
        raise ConnectionError(f"Couldn't reach '{name}' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(UserError, match=r"somebody/dogs is no folder here, and no dataset .*Couldn't reach"):
        list_images("somebody/dogs")


def test_without_a_connection_an_id_is_answered_at_once_and_the_cache_alone_is_asked(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    before = datasets.config.HF_HUB_OFFLINE
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backbone.media.sources.tables.hub_answers", lambda name, kind: False)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    with pytest.raises(UserError, match="pics/dog is no folder here, and no dataset of that name"):
        list_images("pics/dog")
    assert datasets.config.HF_HUB_OFFLINE is before


def test_a_parquet_file_with_raw_bytes_is_a_table_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    buffer = io.BytesIO()
    scene().save(buffer, "PNG")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = datasets.Dataset.from_dict({"jpg_0": [buffer.getvalue()], "caption": ["a dog"]})
    rows.to_parquet(str(tmp_path / "train.parquet"))
    for source in (tmp_path, tmp_path / "train.parquet"):
        (picture,) = list_images(source, image_column="jpg_0")
        assert picture.caption == "a dog"
        assert difference(picture.open(), scene()) == 0
    with pytest.raises(UserError, match="no image column; it has jpg_0, caption"):
        list_images(tmp_path)


# Squares and tensors


@pytest.mark.parametrize("size", [(50, 30), (30, 50), (30, 30), (1, 1), (300, 2)])
def test_a_square_is_square_and_of_the_size_asked_for(size: tuple[int, int]) -> None:
    assert crop_square(scene(*size), 16).size == (16, 16)


def test_no_crop_reaches_beyond_its_image_whatever_its_size() -> None:
    """Photographs of all shapes, at the sizes of models of 128 to 1024 pixels."""
    random = np.random.default_rng(0)
    sizes = [(wide, high) for wide in range(64, 6001) for high in random.integers(64, 6001, 2).tolist()]
    sizes += [(wide, wide * 3 // 4) for wide in range(86, 6001)] + [(1200, 900), (6000, 64), (64, 6000)]
    for number, size in enumerate(sizes):
        side = (128, 512, 768, 1024)[number % 4]
        target = working_size(size, area=side**2, unit=16)
        for position in (CropPosition(0.5, 0.5), CropPosition(1.0, 0.0)):
            left, top, right, bottom = crop_box(size, target, position)
            assert 0 <= left < right <= size[0] and 0 <= top < bottom <= size[1], (size, target)
            # one side is the image's own, and the shape is the target's
            assert right - left == size[0] or bottom - top == size[1]
            assert (right - left) * target[1] == pytest.approx((bottom - top) * target[0], rel=1e-9)
            near = crop_box(size, target, CropPosition(*position[:2], side=0.7))
            assert near[2] - near[0] == pytest.approx(0.7 * (right - left))
            assert near[0] >= 0 and near[2] <= size[0] + 1e-6 and near[1] >= 0 and near[3] <= size[1] + 1e-6


@pytest.mark.parametrize("size", [(1200, 900), (900, 1600), (64, 64), (6000, 64), (2689, 1921), (65, 67)])
def test_an_image_of_any_size_is_cropped_and_resized(size: tuple[int, int]) -> None:
    image = Image.new("RGB", size, "red")
    for side in (128, 512):
        target = working_size(size, area=side**2, unit=16)
        for crop in CROPS:
            assert crop_and_resize(image, target, crop=crop).getextrema() == ((255, 255), (0, 0), (0, 0))


def test_a_square_of_its_own_size_is_the_picture_itself() -> None:
    assert difference(crop_square(scene(32, 32), 32), scene(32, 32)) == 0


def test_the_crop_keeps_the_named_part() -> None:
    wide = Image.new("RGB", (30, 10), "#00ff00")
    wide.paste("#ff0000", (0, 0, 10, 10))
    wide.paste("#0000ff", (20, 0, 30, 10))
    for crop, colour in {"left": (255, 0, 0), "center": (0, 255, 0), "right": (0, 0, 255)}.items():
        assert crop_square(wide, 10, crop=crop).getcolors() == [(100, colour)]
    assert crop_square(wide.transpose(Image.Transpose.ROTATE_270), 10, crop="top").getcolors() == [
        (100, (255, 0, 0))
    ]
    with pytest.raises(UserError, match="no crop named 'centre'"):
        crop_square(wide, 10, crop="centre")


def test_tensors_run_from_minus_one_to_one_and_back_without_loss() -> None:
    every = Image.fromarray(np.arange(768, dtype=np.uint16).astype(np.uint8).reshape(16, 16, 3))
    tensor = to_tensor(every)
    assert tensor.shape == (3, 16, 16)
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    assert (tensor.min().item(), tensor.max().item()) == (-1, 1)
    assert tensor[:, 0, 1].tolist() == pytest.approx([3 / 127.5 - 1, 4 / 127.5 - 1, 5 / 127.5 - 1])
    for dtype in (torch.float32, torch.float64):
        assert difference(to_image(tensor.to(dtype)), every) == 0


def test_values_outside_the_range_are_clipped_and_not_numbers_are_refused() -> None:
    tensor = torch.tensor([-5.0, 0.0, float("inf")]).reshape(3, 1, 1)
    assert to_image(tensor).getpixel((0, 0)) == (0, 128, 255)
    with pytest.raises(UserError, match="NaN"):
        to_image(tensor * float("nan"))


# Profiles, made by hand


def profile_with_red_for_green() -> bytes:
    """sRGB's profile under another name, its red and green primaries exchanged."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        tag = slice(132 + 12 * number, 136 + 12 * number)
        other = {b"rXYZ": b"gXYZ", b"gXYZ": b"rXYZ"}
        profile[tag] = other.get(bytes(profile[tag]), bytes(profile[tag]))
    return (
        bytes(profile)
        .replace("sRGB".encode("utf-16-be"), "aRGB".encode("utf-16-be"))
        .replace(b"sRGB b", b"aRGB b")
    )


def profile_with_exponent(exponent: float) -> bytes:
    """sRGB's profile with the same name and primaries, its values light to the power of 1/exponent."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = b"curv" + bytes(4) + struct.pack(">IH", 1, round(exponent * 256))
    for number in range(struct.unpack_from(">I", profile, 128)[0]):
        kind, start, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if kind.endswith(b"TRC"):
            profile[start : start + len(curve)] = curve
    return bytes(profile)


def grey_profile_of_light() -> bytes:
    """A profile of one channel whose values are linear light."""
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = [(b"wtpt", white), (b"kTRC", b"curv" + bytes(8))]
    return assemble_profile(tags, b"mntr", b"GRAY", b"XYZ ")


def assemble_profile(tags: list[tuple[bytes, bytes]], *kinds: bytes) -> bytes:
    """An ICC profile of these tags; `kinds` are its device class, colour space and connection space."""
    start, index, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for kind, data in tags:
        index += kind + struct.pack(">II", start + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", start + len(body), bytes(4), 0x02400000, *kinds)
    header += struct.pack(">6H4s", 2025, 1, 1, 0, 0, 0, b"acsp") + bytes(24) + bytes(4)
    header += struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + index + body


def profile_with_green_magenta() -> bytes:
    """A CMYK press (ICC.1:2001 lut8Type, two grid points an ink) whose paper is white, whose magenta is green
    and all of whose other mixtures are black."""
    lab = {(0, 0, 0, 0): (255, 128, 128), (0, 1, 0, 0): (150, 60, 170)}
    grid = [
        lab.get((c, m, y, k), (0, 128, 128)) for c in (0, 1) for m in (0, 1) for y in (0, 1) for k in (0, 1)
    ]
    identity = bytes(range(256))
    matrix = struct.pack(">9i", *(65536 if index % 4 == 0 else 0 for index in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + matrix
    table += identity * 4 + bytes(value for node in grid for value in node) + identity * 3
    name = b"test press\0"
    description = b"desc" + bytes(4) + struct.pack(">I", len(name)) + name + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = [(b"desc", description), (b"wtpt", white), (b"A2B0", table), (b"A2B1", table)]
    tags = [(kind, data + bytes(-len(data) % 4)) for kind, data in tags]
    return assemble_profile(tags, b"prtr", b"CMYK", b"Lab ")


def test_buckets_have_the_resolutions_area_at_most_and_sides_of_one_to_two() -> None:
    sizes = bucket_sizes(512)
    assert {(512, 512), (320, 640), (640, 320), (384, 640), (448, 576)} <= set(sizes)
    assert all(width % 64 == height % 64 == 0 and width * height <= 512 * 512 for width, height in sizes)
    assert all(max(size) <= 2 * min(size) for size in sizes)
    assert set(sizes) == {(height, width) for width, height in sizes}


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((1000, 1000), (512, 512)), ((4000, 3000), (576, 448)), ((300, 600), (320, 640)), ((9, 90), (320, 640))],
)
def test_a_picture_goes_to_the_bucket_of_its_shape(size: tuple[int, int], nearest: tuple[int, int]) -> None:
    assert nearest_bucket(size, bucket_sizes(512)) == nearest


@pytest.mark.parametrize("kind", ["APP1", "exif", "generic"])
@pytest.mark.parametrize("turn", [3, 6])
def test_profiles_that_imagemagick_writes_as_text_into_a_png_count(
    tmp_path: Path, kind: str, turn: int
) -> None:
    exif = Image.Exif()
    exif[0x0112] = turn
    data = b"Exif\0\0" + exif.tobytes().removeprefix(b"Exif\0\0")
    text = PngImagePlugin.PngInfo()
    text.add_text(f"Raw profile type {kind}", f"\n{kind.lower()}\n{len(data):8}\n{data.hex()}\n", zip=True)
    written = write(tmp_path / "1.png", scene(), pnginfo=text)
    expected = scene().transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[turn])
    assert np.array_equal(np.asarray(open_rgb(written)), np.asarray(expected))
    with Image.open(written) as opened:
        assert np.array_equal(np.asarray(open_loaded(opened)), np.asarray(expected))


@pytest.mark.parametrize("text", ["", "\nexif\n 4\nzz", "\nAPP1\n 12\n" + "00" * 12, "icc"])
def test_a_damaged_profile_written_as_text_is_none(tmp_path: Path, text: str) -> None:
    for kind in ("APP1", "icc", "xmp"):
        info = PngImagePlugin.PngInfo()
        info.add_text(f"Raw profile type {kind}", text)
        written = write(tmp_path / f"{kind}.png", scene(), pnginfo=info)
        assert np.array_equal(np.asarray(open_rgb(written)), np.asarray(scene()))


def test_a_colour_profile_written_as_text_is_applied(tmp_path: Path) -> None:
    profile = profile_with_exponent(1.0)
    plain = write(tmp_path / "1.png", scene(), icc_profile=profile)
    for kind in ("icc", "icm"):
        info = PngImagePlugin.PngInfo()
        info.add_text(f"Raw profile type {kind}", f"\n{kind}\n{len(profile):8}\n{profile.hex()}\n", zip=True)
        written = write(tmp_path / f"{kind}.png", scene(), pnginfo=info)
        assert np.array_equal(np.asarray(open_rgb(written)), np.asarray(open_rgb(plain)))


def test_fitting_crops_what_is_too_much_and_nothing_else() -> None:
    picture = Image.new("RGB", (300, 100), "red")
    picture.paste("blue", (100, 0, 200, 100))
    middle = crop_and_resize(picture, (50, 50))
    assert middle.getpixel((9, 25)) == middle.getpixel((40, 25)) == (0, 0, 255)  # edges blend a little
    assert crop_and_resize(picture, (60, 20)).getpixel((5, 5)) == (255, 0, 0)


@pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl", "metadata.csv"])
def test_marks_that_nobody_sees_are_left_out_of_captions_and_said_inside_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    def caption(text: str) -> str | None:
        printed_names.cache_clear()
        capsys.readouterr()
        written = {"1.txt": text, "metadata.csv": f'file_name,text\n1.png,"{text}"\n'}
        lines = json.dumps({"file_name": "1.png", "text": text}, ensure_ascii=False)
        (tmp_path / name).write_text(written.get(name, lines), encoding="utf-8")
        return list_images(tmp_path)[0].caption

    write(tmp_path / "1.png")
    assert caption("a d\u200bog\ufeff and \u200e \u00ad a cat\u2060") == "a dog and a cat"
    line = capsys.readouterr().err
    assert name in line and "has zero-width characters inside its caption. They are left out." in line
    for kept in ("نمی\u200cخواهم", "a family \U0001f468\u200d\U0001f469\u200d\U0001f467", "a dog\u200d"):
        assert caption(f"\ufeff{kept}\u200b") == kept.rstrip("\u200d")
        assert not capsys.readouterr().err


@pytest.mark.parametrize("name", ["1.txt", "metadata.jsonl", "metadata.csv"])
@pytest.mark.parametrize("mark", ["\x1b[31m", "\x00", "\x07", "\x7f"])
def test_a_control_character_in_a_caption_is_refused_with_where_it_stands(
    tmp_path: Path, name: str, mark: str
) -> None:
    write(tmp_path / "1.png")
    text = f"a {mark}dog"
    written = {"1.txt": text, "metadata.csv": f"file_name,text\n1.png,{text}\n"}
    (tmp_path / name).write_text(written.get(name, json.dumps({"file_name": "1.png", "text": text})))
    with pytest.raises(UserError, match=rf"{name}.*(no text|plain text).*\.") as refused:
        list_images(tmp_path)
    assert mark not in str(refused.value)


def test_characters_as_web_pages_write_them_are_read_as_what_they_mean(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_names.cache_clear()
    for number, (text, meant) in enumerate(
        [
            ("a dog &amp; a cat, R&D; AT&T &c.", "a dog & a cat, R&D; AT&T &c."),
            (
                "a &quot;big&quot; dog&#39;s&nbsp;house &#x2013; &amp;quot;x&amp;quot;",
                'a "big" dog\'s house – "x"',
            ),
        ]
    ):
        write(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(text)
        assert list_images(tmp_path)[number].caption == meant
        assert caption_at(text, None, "Row 1 of a.parquet") == meant
    assert capsys.readouterr().err.count("They are read as what they mean.") == 1


def test_a_captioner_s_marks_at_which_a_tokenizer_would_end_the_text_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    printed_names.cache_clear()
    for number, text in enumerate(
        ("<s>a dog</s><pad><pad>", "a dog<|endoftext|>", "<|im_start|> a dog<|im_end|>\n<|endoftext|>")
    ):
        write(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(text)
        assert list_images(tmp_path)[number].caption == "a dog"
        assert caption_at(text, None, "Row 1 of a.parquet") == "a dog"
    assert capsys.readouterr().err.count("marks of the program that wrote its caption") == 1
    assert caption_at("a <s1> dog, <cat-toy>, <3", None, "Row 1") == "a <s1> dog, <cat-toy>, <3"


def test_a_list_may_name_its_images_without_their_endings(tmp_path: Path) -> None:
    for name in ("dog1.png", "dog2.JPG", "dog.3.png", "4.png", "4.jpg", "sub/é.webp"):
        write(tmp_path / name)
    rows = ["file_name,text", "dog1,a", "dog2,b", "dog.3,c", "sub/e\u0301,d"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows))
    captions = {str(one.path.relative_to(tmp_path)): one.caption for one in list_images(tmp_path)}
    assert captions == {
        "dog1.png": "a", "dog2.JPG": "b", "dog.3.png": "c", "sub/é.webp": "d", "4.png": None, "4.jpg": None,
    }  # fmt: skip
    (tmp_path / "metadata.csv").write_text("file_name,text\n4,a\n")
    with pytest.raises(UserError, match=r"metadata.csv names 4, and there are 4.jpg and 4.png. Write"):
        list_images(tmp_path)


def test_control_characters_in_a_table_that_others_wrote_are_left_out_and_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    printed_names.cache_clear()
    for row, text in enumerate(("a\x07 dog", b"a \x1bdog", "a dog\x00")):
        assert caption_at(text, None, f"Row {row} of images.parquet") == "a dog"
    line = "Row 0 of images.parquet has zero-width characters inside its caption. They are left out.\n"
    assert capsys.readouterr().err == line


def test_a_caption_or_mask_beside_two_images_of_one_name_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("1.png", "1.jpg", "2.png"):
        write(tmp_path / name)
        (tmp_path / name).with_suffix(".txt").write_text("a dog")
    assert [one.caption for one in list_images(tmp_path)] == ["a dog"] * 3
    line = capsys.readouterr().err
    assert "1.txt is used for 1.jpg and 1.png, which share a name." in line and "So it is" not in line
    write(tmp_path / "1.mask.png", Image.new("L", (48, 32)))
    list_images(tmp_path)
    assert "The same holds for 1 other file." in capsys.readouterr().err
    lines = [{"file_name": name, "text": f"a {name}"} for name in ("1.png", "1.jpg")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (tmp_path / "1.mask.png").unlink()
    list_images(tmp_path)
    assert not capsys.readouterr().err


def test_a_name_of_two_lines_is_shown_on_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("1.png", "a\nError: b.png", "c\nd.xyz"):
        (tmp_path / name).write_bytes(b"no image")
    Image.new("RGB", (64, 64)).save(tmp_path / "1.png")
    pictures = list_images(tmp_path)
    (said,) = describe_unused(tmp_path, pictures)
    assert "c\\nd.xyz" in said and "\n" not in said
    with pytest.raises(UserError) as error:
        open_rgb(tmp_path / "a\nError: b.png")
    assert "a\\nError: b.png" in str(error.value) and "\n" not in str(error.value)


def test_two_images_of_one_name_but_for_unicode_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("NFC", "NFD"):
        Image.new("RGB", (64, 64)).save(tmp_path / unicodedata.normalize(form, "\u00e9.png"))
    if len(list(tmp_path.iterdir())) < 2:
        pytest.skip("this file system spells all names in one way")
    assert len(list_images(tmp_path)) == 1
    assert "have one name, but for how Unicode spells it" in capsys.readouterr().err


def test_a_link_to_itself_is_said_to_be_one(tmp_path: Path) -> None:
    link = tmp_path / "a.png"
    link.symlink_to(link)
    for read in (open_rgb, refuse_dead_link):
        with pytest.raises(UserError, match=r"a\.png is a link that leads to itself"):
            read(link)
    folder = tmp_path / "out"
    folder.symlink_to(folder)
    with pytest.raises(UserError, match=r"out is a link that leads to itself\. Make a folder there"):
        refuse_unwritable(folder)
    with pytest.raises(UserError, match=r"out is a link that leads to itself\. Make a folder there"):
        refuse_unwritable(folder / "dog")
