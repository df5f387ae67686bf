"""Decoding image files: formats, orientation, colour profiles, transparency, size limits."""

from __future__ import annotations

import difflib
import errno
import io
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from PIL import Image, ImageChops, ImageCms, ImageOps, PngImagePlugin, UnidentifiedImageError

from backbone.io.console import UserError, notify_once, on_one_line
from backbone.io.records import is_pointer
from backbone.io.written import describe_link

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Convert = Callable[[Image.Image], Image.Image]  # from a stored image to the one that is used
MAX_PIXELS = 400_000_000
DARK_16_BIT = 4096
# A larger JPEG is decoded at half its size: at 400 MP it would take 1.6 GB
MAX_FULL_SIZE_PIXELS = 178_000_000


class BadImageError(UserError):
    """An image that cannot be used. `reason` is the predicate of a sentence whose subject is `name`."""

    def __init__(self, name: str, reason: str, remedy: str = "Replace or remove it.") -> None:
        name, reason = on_one_line(name), on_one_line(reason)
        super().__init__(f"{name} {reason}. {remedy}")
        self.name = name
        self.reason = reason


@contextmanager
def named_alone() -> Iterator[None]:
    """Inside the `with`, an image is one that the user named, so that another name is the remedy for a bad one."""
    try:
        yield
    except BadImageError as error:
        remedy = "Check the spelling." if error.reason.startswith("does not exist") else "Name another file."
        raise BadImageError(error.name, error.reason, remedy) from error


def open_rgb(path: str | Path, *, at_least: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit sRGB: first frame, EXIF orientation applied, transparency blended onto white.

    16-bit values are scaled and an embedded ICC profile is applied (CMYK too). `at_least` is the shorter side that
    will be needed, in pixels: a JPEG is then decoded at ½, ¼ or ⅛ of its size (libjpeg's draft mode) where twice
    `at_least` remains, which is much faster. Without it, a JPEG of more than 178 megapixels comes at half its size.

    Raises `BadImageError` for a file that is missing, forbidden, empty, damaged, no image, or above 400 megapixels.
    """
    return open_as(path, flatten_on_white, at_least=at_least)


def open_named(path: str | Path) -> Image.Image:
    """`open_rgb` of a picture that the user has named; a line says if it is see-through or has further frames."""
    if further := describe_further_frames(Path(path)):
        notify_once(further)

    def flatten(image: Image.Image) -> Image.Image:
        if is_see_through(image):
            notify_once(f"{path}: its transparent parts are white.")
        return flatten_on_white(image)

    with named_alone():
        return open_as(path, flatten)


def open_mask(path: str | Path) -> Image.Image:
    """Decode a mask to mode L, EXIF orientation applied: white counts, and a transparent background is black.

    Masks come in many encodings, so the values' full scale is the smallest of 1, 255 and 65535 that holds them, and a
    palette of black and one colour is black and white. Colour profiles do not count. Raises `BadImageError` as
    `open_rgb` does.
    """
    return open_as(path, mask_from_image)


def open_bytes(path: Path) -> bytes:
    """The encoded bytes of an image file; `BadImageError` for one that cannot be opened."""
    with _open(path) as file:
        return file.read()


def open_loaded(image: Image.Image) -> Image.Image:
    """An image in memory as `open_rgb` would have read it; `BadImageError` if it cannot be used."""
    return convert_loaded(image, flatten_on_white)


def convert_loaded(image: Image.Image, convert: Convert) -> Image.Image:
    """An image in memory or of an open file, upright and converted; `BadImageError` if it cannot be used."""
    if not image.width or not image.height:
        raise BadImageError("The image", "has no pixels")
    try:
        _unpack_text_profiles(image)
        return convert(ImageOps.exif_transpose(image))
    except DECODER_ERRORS as error:
        raise BadImageError("The image", f"cannot be used ({error})") from error


def open_as(path: str | Path, convert: Convert, *, at_least: int | None = None) -> Image.Image:
    """Decode an image file with another `convert`; otherwise as `open_rgb`."""
    path = Path(path)
    with _open(path) as file:
        return decode(file, str(path), convert, at_least=at_least)


def count_frames(path: Path) -> int:
    """The number of frames of an animated file, whatever its suffix; 1 for a file that cannot be read.

    The further frames of an MPO are other views of the first and do not count.
    """
    if not path.is_file():  # opening a pipe would block
        return 1
    try:
        with without_pillow_limit(), Image.open(path) as opened:
            return 1 if opened.format == "MPO" else int(getattr(opened, "n_frames", 1))
    except DECODER_ERRORS:
        return 1


def describe_further_frames(path: Path) -> str:
    """A sentence on the frames or pages of a file that are not read; "" if it has one."""
    if (count := count_frames(path)) < 2:
        return ""
    return f"{path} has {count} frames or pages, of which the first counts."


def read_size(file: IO[bytes]) -> tuple[int, int]:
    """(width, height) from an image file's header; nothing is decoded."""
    with without_pillow_limit():
        return Image.open(file, formats=_readable_formats()).size


@contextmanager
def _open(path: Path) -> Iterator[IO[bytes]]:
    """Open an image file; `BadImageError` for one that cannot be opened."""
    try:
        if path.is_dir():
            raise BadImageError(str(path), "is a folder, not a picture")
        if path.exists() and not path.is_file():
            raise BadImageError(str(path), "is a pipe or a device, not a picture")  # reading may never end
        file = path.open("rb")
    except FileNotFoundError as error:
        if path.is_symlink():
            raise BadImageError(str(path), describe_link(path)) from error
        if re.match(r"[a-z][a-z0-9]+:/", str(path)):  # a Path keeps one of two slashes
            scheme, _, address = str(path).partition(":/")
            remedy = f"name it /{address}" if scheme == "file" else "download it"
            url = f"{scheme}://{'/' * (scheme == 'file')}{address}"
            raise BadImageError(url, f"is an address, and images are read from files ({remedy})") from error
        nearest = nearest_path(path)
        raise BadImageError(
            str(path), "does not exist" + (f" (nearest name: {nearest.name})" if nearest else "")
        ) from error
    except PermissionError as error:
        raise BadImageError(str(path), "may not be read (permission denied)") from error
    except OSError as error:
        if path.is_symlink() and error.errno == errno.ELOOP:
            raise BadImageError(str(path), describe_link(path)) from error
        # a name too long, a disk that fails
        raise BadImageError(
            str(path), f"cannot be read ({(error.strerror or str(error)).lower()})"
        ) from error
    with file:
        yield file


# Colour spaces that differ from sRGB, by ITU-T H.273's numbers of primaries and curves
_PRIMARIES = {9: "BT.2020", 11: "DCI-P3", 12: "Display P3"}
_CURVES = {8: "linear light", 16: "PQ (HDR)", 18: "HLG (HDR)"}


def _find_code_points(start: bytes) -> str:
    """The colour space that a PNG (cICP) or an AVIF (nclx) names by numbers, from its first bytes; "" for sRGB's."""
    primaries = curve = 0
    if (position := start.find(b"cICP")) >= 0 and start.startswith(b"\x89PNG"):
        primaries, curve = (int.from_bytes(start[position + n : position + n + 1]) for n in (4, 5))
    elif (position := start.find(b"colrnclx")) >= 0:
        primaries, curve = (int.from_bytes(start[position + n : position + n + 2]) for n in (8, 10))
    return " in ".join(filter(None, (_PRIMARIES.get(primaries), _CURVES.get(curve))))


def _unpack_text_profiles(image: Image.Image) -> None:
    """Add the EXIF block, XMP and colour profile that ImageMagick and exiftool write as text into a PNG."""
    for name in [str(name) for name in image.info if str(name).startswith("Raw profile type ")]:
        kind, text = name.removeprefix("Raw profile type ").lower(), image.info[name]
        try:
            data = bytes.fromhex("".join(str(text).split("\n")[3:]))
        except ValueError:
            if kind == "exif":  # Pillow reads it itself, and would stumble
                del image.info[name]
            continue
        if data.startswith(b"Exif\0\0"):
            image.info.setdefault("exif", data)
        elif data.startswith(XMP_START) or kind == "xmp":
            image.info.setdefault("xmp", data.removeprefix(XMP_START))
        elif kind in ("icc", "icm") and data:
            image.info.setdefault("icc_profile", data)


def _is_adobe_rgb(image: Image.Image) -> bool:
    """Whether the EXIF block names Adobe RGB, as in the DCF standard (R03), or by the number 2."""
    with suppress(*_EXIF_ERRORS):
        exif = image.getexif()
        if exif and exif.get_ifd(0x8769).get(0xA001) in (2, 0xFFFF):
            return exif.get_ifd(0x8769)[0xA001] == 2 or str(exif.get_ifd(0xA005).get(1, "")).startswith("R03")
    return False


def _has_other_primaries(image: Image.Image) -> bool:
    """Whether a PNG names primaries that lie farther from sRGB's than rounding and other white points explain."""
    said: Sequence[float] = image.info.get("chromaticity") or ()
    return len(said) == 8 and any(abs(said[n + 2] - own) > 0.02 for n, own in enumerate(SRGB_PRIMARIES))


SRGB_PRIMARIES = (0.64, 0.33, 0.3, 0.6, 0.15, 0.06)  # red, green, blue: x and y (IEC 61966-2-1)
# A mask is no photograph: fewer of its pixels than COLOURFUL have channels that differ by more than COLOURED, or
# they are of at most this many colours, of 16 values a channel.
COLOURED, COLOURFUL, MASK_COLOURS = 24, 0.1, 64
XMP_START = b"http://ns.adobe.com/xap/1.0/\0"
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000")
DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    IndexError,
    KeyError,
    EOFError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)
_TIFF_BITS, _TIFF_GREY, _TIFF_KIND = 258, 262, 339  # tags: bits, whether 0 is white, signed or not (TIFF 6.0)
_EXIF_ERRORS = (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error)
_pillow_limit = threading.RLock()


def decode(file: IO[bytes], name: str, convert: Convert, *, at_least: int | None = None) -> Image.Image:
    """The first frame of an open file, upright and converted; `name` is its name in error messages."""
    start = file.read(512)
    if not start:
        raise BadImageError(name, "is empty (0 bytes)")
    try:
        with without_pillow_limit():
            image = Image.open(file, formats=_readable_formats())
        if (space := _find_code_points(start)) and (
            start.startswith(b"\x89PNG") or "icc_profile" not in image.info
        ):
            notify_once(
                f"Images say by code points (CICP) that their colours are {space}, which is not applied: they are "
                "read as sRGB, duller than they are. Convert them to sRGB first."
            )
        width, height = image.size
        if width * height > MAX_PIXELS:
            reason = f"has {width} × {height} pixels; {MAX_PIXELS // 10**6} megapixels are the most"
            raise BadImageError(name, reason)
        # A JPEG is decoded at a half, a quarter or an eighth if that is enough
        if at_least is not None:
            image.draft(None, (2 * at_least, 2 * at_least))
        elif width * height > MAX_FULL_SIZE_PIXELS:
            image.draft(None, (width // 2, height // 2))
        image.load()
        _unpack_text_profiles(image)
        _scale_transparent_value(image, start)
        if "icc_profile" not in image.info and _is_adobe_rgb(image):
            notify_once(
                "Images say by their EXIF block that their colours are Adobe RGB, which is not applied without a "
                "profile: they are read as sRGB, duller than they are. Convert them to sRGB first."
            )
        if not {"icc_profile", "srgb"} & set(image.info) and _has_other_primaries(image):
            notify_once(
                "Images say by the primaries in their header (a PNG's cHRM) that their colours are not sRGB's, which "
                "is not applied without a profile: they are read as sRGB. Convert them to sRGB first."
            )
        # In place, pixels are turned before the EXIF block is rewritten, where a damaged tag may raise.
        with suppress(*_EXIF_ERRORS):
            ImageOps.exif_transpose(image, in_place=True)
        return convert(image)
    except BadImageError as error:
        raise BadImageError(name, error.reason) from error
    except MemoryError as error:
        raise BadImageError(name, "needs more memory than there is") from error
    except DECODER_ERRORS as error:
        raise BadImageError(name, _describe_error(start, error)) from error


def lay_on_white(image: Image.Image) -> Image.Image:
    """An image in any mode as RGB by its stored values alone: transparency blended onto white, no profile applied."""
    stored = map_from_image(image)
    if stored.mode == "RGB":
        return stored
    ground = Image.new("RGB", stored.size, "white")
    ground.paste(stored, mask=stored.getchannel("A"))
    return ground


def flatten_on_white(image: Image.Image) -> Image.Image:
    """An image in any mode as 8-bit sRGB: see `open_rgb`."""
    stored, opacity = image.info, _find_opacity(image)
    image = _to_8_bit(image)
    if opacity is None:
        return _to_srgb(image, stored)
    grey = image.mode in ("L", "LA", "La")
    opaque = image.convert("L") if grey else image.convert("RGBA").convert("RGB")
    background = Image.new("RGB", image.size, "white")
    background.paste(_to_srgb(opaque, stored), mask=opacity)
    return background


def _find_opacity(image: Image.Image) -> Image.Image | None:
    """Each pixel's opacity, mode L; None for an image without transparency."""
    if not image.has_transparency_data:
        return None
    if not image.mode.startswith("I"):
        opacity = image.convert("RGBA").getchannel("A")
        # A bitmap that is see-through everywhere has a channel that nobody filled
        return None if image.format in ("BMP", "DIB") and not opacity.getbbox() else opacity
    import numpy as np

    # Of a PNG's 16-bit grey, one value is see-through, which Pillow keeps and does not convert
    return Image.fromarray(np.where(np.asarray(image) == image.info["transparency"], 0, 255).astype(np.uint8))


def _scale_transparent_value(image: Image.Image, start: bytes) -> None:
    """Give the see-through value of a PNG of 2 or 4 bits of grey, or 16 of RGB, the scale of its pixels."""
    bits, kind = start[24:25], start[25:26]
    full = {b"\x02": 3, b"\x04": 15}.get(bits)
    if image.format != "PNG" or "transparency" not in image.info:
        return
    if kind == b"\0" and full:
        image.info["transparency"] = image.info["transparency"] * 255 // full
    elif kind == b"\x02" and bits == b"\x10":  # Pillow keeps the upper halves of the pixels
        image.info["transparency"] = tuple(value >> 8 for value in image.info["transparency"])


def describe_unused_range(image: Image.Image) -> str:
    """A predicate on the unused range of a 16-bit image that is nearly black (12 bits stored in 16); else ""."""
    if not image.mode.startswith("I;16"):
        return ""
    brightest = cast(tuple[int, int], image.getextrema())[1]
    if not 0 < brightest < DARK_16_BIT:
        return ""
    return (
        f"has 16-bit values up to {brightest} of 65535, so it is nearly black. If they are of 12 bits or less, scale "
        "them to 16."
    )


def is_see_through(image: Image.Image) -> bool:
    """Whether an image has see-through pixels; animated WebPs are always decoded with an alpha channel."""
    opacity = _find_opacity(image)
    return opacity is not None and opacity.getextrema()[0] != 255


def mask_from_image(image: Image.Image) -> Image.Image:
    """An image in any mode as a mask (mode L): see `open_mask`. `BadImageError` for a photograph."""
    import numpy as np

    if _is_photograph(image):
        raise BadImageError(
            "The mask",
            "has the colours of a photograph, and a mask is white where it counts and black elsewhere (where the "
            "photograph is see-through, say)",
        )
    if image.mode == "F" or image.mode.startswith("I"):
        values, full = _read_grey(image)
        if not (np.isfinite(values).all() and values.min() >= 0):
            raise ValueError("a mask's values are 0 or more")
    else:
        rgb, full = image.convert("RGBA").convert("RGB"), 255.0
        values = np.asarray(rgb.convert("L"), dtype=np.float64)
        has_two_values = len(np.unique(values)) == 2 and values.min() == 0
        if values.max() and (
            (has_two_values and image.mode == "P") or _has_one_hue(np.asarray(rgb, dtype=np.float64))
        ):
            values = values / values.max()
    scales = (1.0, 255.0, 65535.0 if image.mode == "F" else min(full, 65535.0))
    white = next((scale for scale in scales if values.max() <= scale), values.max())
    values = values * (255 / white)
    if (opacity := _find_opacity(image)) is not None:
        values = values * np.asarray(opacity) / 255
    return Image.fromarray(values.round().clip(0, 255).astype(np.uint8))


def _has_one_hue(pixels: NDArray[np.float64]) -> bool:
    """Whether an image [H, W, 3] has black and one colour, with soft edges or not, as quick masks do."""
    import numpy as np

    flat = pixels.reshape(-1, 3)
    colour = flat[flat.sum(1).argmax()]
    if np.ptp(colour) <= COLOURED:
        return False
    share = flat @ colour / (colour @ colour)
    return bool((np.abs(flat - share[:, None] * colour).max(1) <= COLOURED).mean() > 0.99)


def _is_photograph(image: Image.Image) -> bool:
    """Whether an image has many colours: a painted mask is grey or has few, however soft its edges are."""
    import numpy as np

    if image.mode in ("1", "L", "LA", "La", "F") or image.mode.startswith("I"):
        return False
    small = image.convert("RGBA").reduce(max(1, min(image.size) // 256))
    pixels = np.asarray(small)[np.asarray(small)[..., 3] > 127][:, :3]
    if not len(pixels) or float((np.ptp(pixels.astype(int), axis=1) > COLOURED).mean()) < COLOURFUL:
        return False
    return len(np.unique(pixels // 16, axis=0)) > MASK_COLOURS


def map_from_image(image: Image.Image) -> Image.Image:
    """An image in any mode as a map, whose values are numbers and no colours: no colour profile is applied.

    RGB; RGBA if any pixel is see-through.
    """
    opacity = _find_opacity(image)
    rgb = _to_8_bit(image)
    if opacity is None:
        return rgb.convert("RGB")
    rgb = rgb.convert("RGBA").convert("RGB")
    if opacity.getextrema()[0] != 255:
        rgb.putalpha(opacity)
    return rgb


def _read_grey(image: Image.Image) -> tuple[NDArray[np.float64], float]:
    """The values [H, W] of an image of mode I, I;16 or F, and the largest value of their type.

    A TIFF may have 0 for white, signed values of 16 bits, or unsigned ones of 32, which Pillow returns as signed.
    """
    import numpy as np

    tags = getattr(image, "tag_v2", {})  # a TIFF's
    bits, kind = ((tags.get(tag) or (0,))[0] for tag in (_TIFF_BITS, _TIFF_KIND))
    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        full = 1.0
    elif image.mode.startswith("I;16"):
        full = 65535.0
    elif (bits, kind) == (16, 2):
        full = 2.0**15 - 1
    elif tags and (bits, kind) != (32, 2):
        full, values = 2.0**32 - 1, values % 2.0**32
    else:
        full = 2.0**31 - 1
    if tags.get(_TIFF_GREY) == 0:
        values = full - values
    return values, full


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Map 16-bit, 32-bit and float grey to mode L, full scale to full scale; other modes pass through."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    import numpy as np

    values, white = _read_grey(image)
    if image.mode == "F":
        if not np.isfinite(values).all():
            raise BadImageError(
                "The image", "has floating-point values that are no numbers: fill these in first"
            )
        if not (values.min() >= 0 and values.max() <= 1):
            reason = "has floating-point values outside 0…1: scale them to it, or save it in 8 or 16 bits"
            raise BadImageError("The image", reason)
    elif values.min() < 0:
        raise BadImageError("The image", "has values below 0, which are no grey: save it in 8 or 16 bits")
    elif white > 65535:  # values of 32 bits: the smallest full scale that holds them
        white = next(scale for scale in (255.0, 65535.0, 2.0**31 - 1, white) if values.max() <= scale)
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, stored: Mapping[str | tuple[int, int], Any]) -> Image.Image:
    """Convert to RGB through the embedded ICC profile, or plainly if it is missing, broken or for other channels.

    A PNG may hold only the exponent of its values (the gAMA chunk), which the profile or the sRGB chunk overrides.
    """
    profile = stored.get("icc_profile")
    if not profile:
        exponent = 0.45455 if "srgb" in stored else stored.get("gamma") or 0.45455
        image = image.convert("RGB")
        return image if abs(exponent / 0.45455 - 1) < 0.02 else image.point(_srgb_curve(exponent) * 3)

    # The profile is for the channels that it names
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        channels = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
        if channels == "RGB" and image.mode != "CMYK":
            image = image.convert("RGB")
        elif channels == "L" and image.mode == "1":
            image = image.convert("L")
        if image.mode != channels:
            return image.convert("RGB")
        transform = ImageCms.buildTransform(
            source,
            ImageCms.createProfile("sRGB"),
            image.mode,
            "RGB",
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
        if image.mode == "RGB" and _is_identity(transform):
            return image
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
    assert converted is not None
    return converted


def _srgb_curve(exponent: float) -> list[int]:
    """The sRGB values of the 256 values light^`exponent` (IEC 61966-2-1)."""
    light = [(value / 255) ** (1 / exponent) for value in range(256)]
    return [round(255 * (12.92 * y if y <= 0.0031308 else 1.055 * y ** (1 / 2.4) - 0.055)) for y in light]


def _is_identity(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether a transform of RGB leaves colours unchanged, up to rounding: names of profiles tell nothing."""
    levels = range(0, 256, 15)
    colours = bytes(
        value for red in levels for green in levels for blue in levels for value in (red, green, blue)
    )
    probe = Image.frombytes("RGB", (len(levels) ** 2, len(levels)), colours)
    converted = ImageCms.applyTransform(probe, transform)
    assert converted is not None
    return max(ImageChops.difference(probe, converted).tobytes()) <= 1


@contextmanager
def without_pillow_limit() -> Iterator[None]:
    """Lift two of Pillow's limits, which are globals, while a header is read.

    The limit on decompression bombs warns at 89 megapixels, where MAX_PIXELS is an error; the limit on a PNG's packed
    text reports damage for an image with a megabyte of notes.
    """
    with _pillow_limit:
        limits = Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK
        Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = None, PngImagePlugin.MAX_TEXT_MEMORY
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS, PngImagePlugin.MAX_TEXT_CHUNK = limits


@lru_cache(maxsize=1)
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _describe_error(start: bytes, error: BaseException) -> str:
    if is_pointer(start):
        return "is a Git LFS pointer, not the picture (run `git lfs pull`)"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc"):
        return "is in HEIC format, which is not read (convert it to JPEG)"
    if start.lstrip()[:1] == b"<":
        return "is a web page or an SVG drawing, not a picture of pixels"
    if not isinstance(error, UnidentifiedImageError):
        truncated = "truncated" in str(error).lower() or isinstance(error, EOFError)
        return "is cut off before its end" if truncated else f"is damaged ({error})"
    if b"\0" not in start and all(byte >= 9 for byte in start):
        return "is text, not a picture"
    return "is not a picture in a format that is read"


def nearest_path(path: Path) -> Path | None:
    """The file beside a missing path with the most similar name, or None."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return None
    matches = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / matches[0] if matches else None
