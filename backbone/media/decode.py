"""Decoding image files: formats, orientation, colour profiles, transparency, size limits."""

from __future__ import annotations

import difflib
import io
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO

from PIL import Image, ImageCms, ImageOps, UnidentifiedImageError

from backbone.io.console import UserError

MAX_PIXELS = 400_000_000
MAX_FULL_SIZE_PIXELS = (
    178_000_000  # a larger JPEG is decoded at half its size: at 400 MP it would take 1.6 GB
)


class BadImageError(UserError):
    """An image that cannot be used. `reason` is the predicate of a sentence whose subject is `name`."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}. Replace or remove it.")
        self.name = name
        self.reason = reason


def open_rgb(path: str | Path, *, at_least: int | None = None) -> Image.Image:
    """Decode an image file to 8-bit sRGB: first frame, EXIF orientation applied, transparency blended onto white.

    16-bit values are scaled and an embedded ICC profile is applied (CMYK too). `at_least` is the shorter side that
    will be needed, in pixels: a JPEG is then decoded at ½, ¼ or ⅛ of its size (libjpeg's draft mode) where twice
    `at_least` remains, which is much faster. Without it, a JPEG of more than 178 megapixels comes at half its size.

    Raises `BadImageError` for a file that is missing, forbidden, empty, damaged, no image, or above 400 megapixels.
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
            str(path), "does not exist" + (f" (nearest name: {near.name})" if near else "")
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
_EXIF_ERRORS = (SyntaxError, ValueError, TypeError, KeyError, IndexError, OSError, struct.error)
_pillow_limit = threading.RLock()


def decode(file: IO[bytes], name: str, at_least: int | None) -> Image.Image:
    """`open_rgb` of an open file; `name` is what error messages call it."""
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
        # In place, pixels are turned before the EXIF block is rewritten, where a damaged tag may raise.
        with suppress(*_EXIF_ERRORS):
            ImageOps.exif_transpose(image, in_place=True)
        return _flatten_on_white(image)
    except MemoryError as error:
        raise BadImageError(name, "needs more memory than there is") from error
    except _DECODER_ERRORS as error:
        raise BadImageError(name, _describe_error(start, error)) from error


def _flatten_on_white(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = _to_8_bit(image)
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    rgba = image.convert("RGBA")
    background = Image.new("RGB", image.size, "white")
    background.paste(_to_srgb(rgba.convert("RGB"), profile), mask=rgba.getchannel("A"))
    return background


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Map 16-bit, 32-bit and float grey to mode L, full scale to full scale; other modes pass through."""
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
    """Convert to RGB through the embedded ICC profile, or plainly if it is missing, broken or for other channels."""
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


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Lift Pillow's decompression-bomb limit: a global that warns at 89 megapixels, where MAX_PIXELS is an error."""
    with _pillow_limit:
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
    """The file beside a missing path whose name is most similar, or None."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / near[0] if near else None
