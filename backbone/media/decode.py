"""Decoding image files: formats, orientation, colour profiles, transparency, size limits."""

from __future__ import annotations

import difflib
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING

from PIL import Image, ImageCms, UnidentifiedImageError

from backbone.io.console import UserError

if TYPE_CHECKING:
    pass


MAX_PIXELS = 400_000_000


MAX_FULL_SIZE_PIXELS = (
    178_000_000  # a JPEG above this is decoded at half its size at most: at 400 it would take 1.6 GB
)


class BadImageError(UserError):
    """A picture that cannot be used: `reason` continues the sentence that begins with its name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}. Replace or remove it.")
        self.name = name
        self.reason = reason


def open_rgb(path: str | Path, *, at_least: int | None = None) -> Image.Image:
    """The picture in a file: RGB, 8 bits, sRGB, upright (EXIF), the first frame, transparency laid on white.

    16-bit values are scaled, an embedded ICC profile is applied (CMYK too). `at_least`: the shorter side that
    will be needed; a JPEG is then decoded at ½, ¼ or ⅛ of its size where twice that remains, which is much
    faster. Without it, a JPEG of more than 178 megapixels comes at half its size.
    BadImageError if the file is missing, forbidden, empty, damaged, no picture, or larger than 400 megapixels.
    """
    path = Path(path)
    if path.is_dir():
        raise BadImageError(str(path), "is a folder with a picture's name")
    try:
        with path.open("rb") as file:
            return decode(file, str(path), at_least)
    except FileNotFoundError as error:
        near = nearest_path(path)
        raise BadImageError(
            str(path), "does not exist" + (f" (nearest: {near.name})" if near else "")
        ) from error
    except PermissionError as error:
        raise BadImageError(str(path), "may not be read (permission denied)") from error


_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "MPO", "PPM", "AVIF", "JPEG2000")


_DECODER_ERRORS = (
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


_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


_ORIENTATION = 0x0112


_size_limit = threading.RLock()


def decode(file: IO[bytes], name: str, at_least: int | None) -> Image.Image:
    start = file.read(512)
    if not start:
        raise BadImageError(name, "is empty (0 bytes)")
    try:
        with _without_pillow_limit():
            image = Image.open(file, formats=_readable_formats())
        width, height = image.size
        if width * height > MAX_PIXELS:
            reason = f"has {width} × {height} pixels; {MAX_PIXELS // 10**6} megapixels are the most"
            raise BadImageError(name, reason)
        if at_least is not None:
            image.draft(None, (2 * at_least, 2 * at_least))
        elif width * height > MAX_FULL_SIZE_PIXELS:
            image.draft(None, (width // 2, height // 2))
        image.load()
        rgb = _flatten_on_white(image)
        turn = _UPRIGHT.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)
    except MemoryError as error:
        raise BadImageError(name, "needs more memory than there is") from error
    except _DECODER_ERRORS as error:
        raise BadImageError(name, _describe_error(start, error)) from error


def _flatten_on_white(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = _to_8_bit(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    layered = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(_to_srgb(layered.convert("RGB"), profile), mask=layered.getchannel("A"))
    return page


def _to_8_bit(image: Image.Image) -> Image.Image:
    """16- and 32-bit grey as mode L, full scale to full scale; other modes as they are."""
    if not (image.mode.startswith("I") or image.mode == "F"):
        return image
    import numpy as np

    values = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise ValueError("floating-point values outside 0…1")
        white = 1.0
    else:
        white = 65535.0 if values.max() <= 65535 else float(2**31 - 1)
    return Image.fromarray((values * (255 / white)).round().clip(0, 255).astype(np.uint8))


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB through the embedded profile; without one, or with one that is broken or for other channels,
    plainly."""
    if not profile:
        return image.convert("RGB")
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        channels = {"RGB": "RGB", "GRAY": "L", "CMYK": "CMYK"}.get(source.profile.xcolor_space.strip())
        if channels == "RGB" and image.mode != "CMYK":
            image = image.convert("RGB")
        if image.mode != channels or "sRGB" in (source.profile.profile_description or ""):
            return image.convert("RGB")
        converted = ImageCms.profileToProfile(
            image,
            source,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode="RGB",
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError):
        return image.convert("RGB")
    assert converted is not None
    return converted


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1…8; 1 where the EXIF block is absent or damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error):
        return 1


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Pillow's own limit is a global that warns at 89 megapixels; ours is a sentence at 400."""
    with _size_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@lru_cache(maxsize=1)
def _readable_formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _describe_error(start: bytes, error: BaseException) -> str:
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the picture (run `git lfs pull`)"
    if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heif", b"mif1", b"msf1", b"hevc"):
        return "is in HEIC format, which is not read (convert it to JPEG)"
    if start.lstrip()[:1] == b"<":
        return "is a web page or an SVG drawing, not a picture of pixels"
    if not isinstance(error, UnidentifiedImageError):
        cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
        return "is cut off before its end" if cut else f"is damaged ({error})"
    if b"\0" not in start and all(byte >= 9 for byte in start):
        return "is text, not a picture"
    return "is not a picture in a format that is read"


def nearest_path(path: Path) -> Path | None:
    """What lies beside a missing path under almost its name."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / near[0] if near else None
