"""Pictures from the user's disk: found, opened upright in 8-bit sRGB, checked all at once, cut square.

A source is a folder of pictures (captions in `name.txt` beside `name.jpg`, in `metadata.jsonl` or in
`metadata.csv`; masks in `name.mask.png`, white = train), one picture, a Parquet file, a folder written by
`datasets`, or the id of a dataset. Reading the list opens no picture, so that `check` can report all bad ones
together.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import math
import os
import re
import struct
import threading
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeAlias

from PIL import Image, ImageCms, UnidentifiedImageError

from backbone.console import UserError

if TYPE_CHECKING:
    import torch

SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".avif", ".jp2", ".ppm", ".pgm", ".heic", ".heif"}
)
MASK_ENDING = ".mask.png"
METADATA = ("metadata.jsonl", "metadata.csv")
CAPTION_COLUMNS = ("text", "prompt", "caption")
LARGEST_PIXELS = 400_000_000
HALVED_PIXELS = (
    178_000_000  # a JPEG above this is decoded at half its size at most: at 400 it would take 1.6 GB
)
Place: TypeAlias = tuple[float, float]
CROPS: dict[str, Place] = {
    "center": (0.5, 0.5),
    "top": (0.5, 0.0),
    "bottom": (0.5, 1.0),
    "left": (0.0, 0.5),
    "right": (1.0, 0.5),
}


@dataclass(frozen=True)
class Picture:
    """One picture: where it lies and what is known about it. Nothing has been opened yet."""

    path: Path  # of the file; for a dataset's row a name that no file has, like `org/name/000012`
    caption: str | None = None
    mask: Path | None = None  # white = train
    row: Row | None = None  # where the bytes come from instead of `path`

    def read(self) -> bytes:
        """The encoded bytes, as they are stored: what a cache hashes."""
        return self.path.read_bytes() if self.row is None else self.row.read()

    def open(self, *, at_least: int | None = None) -> Image.Image:
        """The picture as `open_rgb` gives it."""
        if self.row is None:
            return open_rgb(self.path, at_least=at_least)
        return _decode(io.BytesIO(self.read()), str(self.path), at_least)

    def open_mask(self) -> Image.Image | None:
        """The mask, upright, mode L, white = train; None without one."""
        return None if self.mask is None else open_rgb(self.mask).convert("L")


@dataclass(frozen=True)
class Row:
    """One row of a `datasets` table whose image column holds encoded bytes (or the path of a file)."""

    table: Any
    column: str
    index: int

    def read(self) -> bytes:
        value = self.table[self.index][self.column]
        if isinstance(value, Mapping):
            value = value["bytes"] if value["bytes"] is not None else Path(value["path"]).read_bytes()
        if not isinstance(value, bytes):
            raise UserError(f"Row {self.index} has no picture in its column {self.column!r}. Remove the row.")
        return value


class BadPicture(UserError):
    """A picture that cannot be used: `reason` continues the sentence that begins with its name."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} {reason}. Replace or remove it.")
        self.name = name
        self.reason = reason


def read_folder(
    source: str | Path, *, caption_column: str | None = None, image_column: str | None = None
) -> list[Picture]:
    """The pictures of a source in natural order (2.jpg before 10.jpg), or in a table's own order.

    Files without an image suffix and hidden ones are passed over; a file with such a suffix counts, whatever
    it holds. If a folder holds no picture itself, those in its subfolders are taken (kohya's `10_sks dog/`).
    Captions come from metadata first, then from `.txt` files. `caption_column` and `image_column` name
    columns of a table whose names differ from text, prompt or caption and file_name or image. UserError:
    nothing there, no picture in it, captions that cannot be read, a dataset that cannot be loaded.
    """
    path = Path(source).expanduser()
    columns = _Columns(caption_column, image_column)
    named = caption_column or image_column
    if path.is_dir():
        if _is_dataset_folder(path):
            return _table_pictures(_load_saved(path), str(source), columns)
        pictures = _folder_pictures(path, columns)
        for subfolder in [] if pictures else _visible(path):
            if subfolder.is_dir():
                pictures += _folder_pictures(subfolder, columns)
        if pictures:
            folders = [path, *(folder for folder in _visible(path) if folder.is_dir())]
            if named and not any((folder / name).is_file() for folder in folders for name in METADATA):
                raise UserError(
                    f"{path} has no {' or '.join(METADATA)}, so it has no column {named!r}. Write one, or name none."
                )
            return pictures
        if tables := [file for file in _visible(path) if file.suffix.lower() == ".parquet"]:
            return _table_pictures(_load_parquet(tables), str(source), columns)
        raise UserError(_nothing_in(path))
    if path.exists():
        if path.suffix.lower() == ".parquet":
            return _table_pictures(_load_parquet([path]), str(source), columns)
        if path.suffix.lower() not in SUFFIXES and path.suffix:
            raise UserError(
                f"{path} is a {path.suffix} file, neither a picture nor a folder of pictures. "
                "Give a folder with .jpg or .png files in it."
            )
        if named:
            raise UserError(f"{path} is a single picture, so it has no column {named!r}. Name no column.")
        return [Picture(path, *_beside(path))]
    if _could_be_dataset(str(source), path):
        return _table_pictures(_load_from_hub(str(source)), str(source), columns)
    near = _nearest(path)
    remedy = f"Did you mean {near}?" if near else "Give a folder of pictures, or a dataset's id (org/name)."
    raise UserError(f"{path} does not exist. {remedy}")


def check(pictures: Iterable[Picture]) -> None:
    """Opens every picture and mask. One UserError lists all that cannot be used, a line each with its
    reason."""
    bad: list[tuple[str, str]] = []
    count = 0
    for picture in pictures:
        count += 1
        try:
            size = picture.open(at_least=64).size
        except BadPicture as error:
            bad.append((error.name, error.reason))
            continue
        try:
            mask = picture.open_mask()
            if mask is not None:
                _fits(mask.size, size, picture)
        except BadPicture as error:
            bad.append((error.name, error.reason))
    if bad:
        lines = "\n".join(f"  {name} {reason}" for name, reason in bad)
        heading = (
            f"{len(bad)} of {count} pictures cannot be used" if count > 1 else "The picture cannot be used"
        )
        raise UserError(
            f"{heading}:\n{lines}\nReplace or remove {'it' if len(bad) == 1 else 'them'}, then run again."
        )


def open_rgb(path: str | Path, *, at_least: int | None = None) -> Image.Image:
    """The picture in a file: RGB, 8 bits, sRGB, upright (EXIF), the first frame, transparency laid on white.

    16-bit values are scaled, an embedded ICC profile is applied (CMYK too). `at_least`: the shorter side that
    will be needed; a JPEG is then decoded at ½, ¼ or ⅛ of its size where twice that remains, which is much
    faster. Without it, a JPEG of more than 178 megapixels comes at half its size.
    BadPicture if the file is missing, forbidden, empty, damaged, no picture, or larger than 400 megapixels.
    """
    path = Path(path)
    if path.is_dir():
        raise BadPicture(str(path), "is a folder with a picture's name")
    try:
        with path.open("rb") as file:
            return _decode(file, str(path), at_least)
    except FileNotFoundError as error:
        near = _nearest(path)
        raise BadPicture(
            str(path), "does not exist" + (f" (nearest: {near.name})" if near else "")
        ) from error
    except PermissionError as error:
        raise BadPicture(str(path), "may not be read (permission denied)") from error


def square(image: Image.Image, size: int, *, crop: str = "center") -> Image.Image:
    """The largest square at `crop` (a key of CROPS), resized to size × size with Lanczos in one pass."""
    return fitted(image, (size, size), crop=crop)


def fitted(image: Image.Image, size: tuple[int, int], *, crop: str | Place = "center") -> Image.Image:
    """The largest part of this shape (W, H) at `crop`, resized to it with Lanczos in one pass.

    `crop` is a key of CROPS, or says how much of what is cut off lies left of the part and above it, 0…1 each.
    """
    if isinstance(crop, str) and crop not in CROPS:
        raise UserError(f"There is no crop named {crop!r}. Use one of {', '.join(CROPS)}.")
    place = CROPS[crop] if isinstance(crop, str) else crop
    scale = min(own / wanted for own, wanted in zip(image.size, size, strict=True))
    sides = (size[0] * scale, size[1] * scale)
    left, top = ((own - side) * part for own, side, part in zip(image.size, sides, place, strict=True))
    box = (left, top, min(left + sides[0], image.width), min(top + sides[1], image.height))
    return image.resize(size, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)


def bucket_sizes(resolution: int) -> list[tuple[int, int]]:
    """Sizes (W, H) for pictures that are not cropped square: of the resolution's area or less, sides at most 1 : 2.

    Sides are multiples of 64 (for small models, of a quarter of the resolution), as in NovelAI's aspect buckets.
    """
    step = min(64, resolution // 4)
    sizes = {(resolution, resolution)}
    for short in range(resolution // 2 + step, resolution, step):
        long = min(resolution * resolution // short // step * step, 2 * short)
        sizes |= {(short, long), (long, short)}
    return sorted(sizes)


def nearest_size(size: tuple[int, int], sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Which of the sizes (W, H) has the shape nearest to this one's; of two alike the larger."""
    shape = math.log(size[0] / size[1])
    return min(sizes, key=lambda one: (round(abs(math.log(one[0] / one[1]) - shape), 9), -one[0] * one[1]))


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An RGB picture as float32 [3, H, W] in −1…1."""
    import numpy as np
    import torch

    assert image.mode == "RGB", f"expected RGB, got {image.mode}"
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(127.5).sub(1.0).contiguous()


def to_image(tensor: torch.Tensor) -> Image.Image:
    """[3, H, W] in −1…1, any dtype and device, as an RGB picture, rounded and clipped: the inverse of
    `to_tensor`. UserError for values that are not numbers: what a half-precision decoder gives when it
    overflows."""
    import torch

    assert tensor.shape[:-2] == (3,), f"expected [3, H, W], got {list(tensor.shape)}"
    values = tensor.detach().float().cpu()
    if torch.isnan(values).any():
        raise UserError("The decoded picture holds values that are not numbers. Decode it in fp32 or bf16.")
    bytes_ = values.add(1.0).mul(127.5).round().clamp(0, 255).byte()
    return Image.fromarray(bytes_.permute(1, 2, 0).contiguous().numpy())


def mask_to_tensor(mask: Image.Image) -> torch.Tensor:
    """A mask (mode L) as float32 [1, H, W] in 0…1, 1 = train."""
    import numpy as np
    import torch

    assert mask.mode == "L", f"expected L, got {mask.mode}"
    return torch.from_numpy(np.array(mask)).float().div(255.0)[None]


# Decoding. Order matters: profile and 16-bit scaling before RGB, alpha before orientation is lost.

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


def _decode(file: IO[bytes], name: str, at_least: int | None) -> Image.Image:
    start = file.read(512)
    if not start:
        raise BadPicture(name, "is empty (0 bytes)")
    try:
        with _any_size():
            image = Image.open(file, formats=_formats())
        width, height = image.size
        if width * height > LARGEST_PIXELS:
            reason = f"has {width} × {height} pixels; {LARGEST_PIXELS // 10**6} megapixels are the most"
            raise BadPicture(name, reason)
        if at_least is not None:
            image.draft(None, (2 * at_least, 2 * at_least))
        elif width * height > HALVED_PIXELS:
            image.draft(None, (width // 2, height // 2))
        image.load()
        rgb = _on_white_rgb(image)
        turn = _UPRIGHT.get(_orientation(image))
        return rgb if turn is None else rgb.transpose(turn)
    except MemoryError as error:
        raise BadPicture(name, "needs more memory than there is") from error
    except _DECODER_ERRORS as error:
        raise BadPicture(name, _why(start, error)) from error


def _on_white_rgb(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    image = _eight_bits(image)
    if not image.has_transparency_data:
        return _srgb(image, profile)
    layered = image.convert("RGBA")
    page = Image.new("RGB", image.size, "white")
    page.paste(_srgb(layered.convert("RGB"), profile), mask=layered.getchannel("A"))
    return page


def _eight_bits(image: Image.Image) -> Image.Image:
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


def _srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
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
def _any_size() -> Iterator[None]:
    """Pillow's own limit is a global that warns at 89 megapixels; ours is a sentence at 400."""
    with _size_limit:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _why(start: bytes, error: BaseException) -> str:
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


def _fits(mask: tuple[int, int], picture: tuple[int, int], of: Picture) -> None:
    (mask_width, mask_height), (width, height) = mask, picture
    if abs(mask_width * height - width * mask_height) > 0.02 * mask_width * height:
        reason = f"is a mask of {mask_width} × {mask_height}, another shape than its picture {of.path.name}"
        raise BadPicture(str(of.mask), reason)


# Folders.


@dataclass(frozen=True)
class _Columns:
    caption: str | None
    image: str | None

    def find(self, wanted: str, names: Sequence[str], where: str) -> str | None:
        """The caption or image column among `names`; UserError if the one that was asked for is not there."""
        asked, usual = {
            "caption": (self.caption, CAPTION_COLUMNS),
            "image": (self.image, ("file_name", "image")),
        }[wanted]
        if asked is not None and asked not in names:
            raise UserError(
                f"{where} has no column {asked!r}; it has {', '.join(map(repr, names))}. Name one of them."
            )
        return asked or next((name for name in usual if name in names), None)


def _folder_pictures(folder: Path, columns: _Columns) -> list[Picture]:
    captions = _metadata_captions(folder, columns)
    files = {_key(file.name): file for file in _visible(folder) if file.suffix.lower() in SUFFIXES}
    masks = {key: file for key, file in files.items() if key.endswith(MASK_ENDING)}
    paths = {key: file for key, file in files.items() if key not in masks}
    stems = {_key(file.stem) for file in paths.values()}
    for key, mask in masks.items():
        if (stem := key.removesuffix(MASK_ENDING)) not in stems:
            raise UserError(f"{mask} is a mask, but no picture {stem}.* lies beside it. Rename or remove it.")
    for name in captions:
        paths.setdefault(_key(name), folder / name)
    by_key = {_key(name): caption for name, caption in captions.items()}
    pictures = []
    for key, path in sorted(paths.items(), key=lambda item: _natural(item[0])):
        beside, mask_beside = _beside(path)
        pictures.append(Picture(path, by_key.get(key) or beside, mask_beside))
    return pictures


def _metadata_captions(folder: Path, columns: _Columns) -> dict[str, str | None]:
    """File name (relative, `/` between folders) → caption, from metadata.jsonl or metadata.csv."""
    present = [folder / name for name in METADATA if (folder / name).is_file()]
    if len(present) > 1:
        raise UserError(f"{folder} holds both metadata.jsonl and metadata.csv. Keep one of them.")
    captions: dict[str, str | None] = {}
    for metadata in present:
        for line, entry in _entries(metadata):
            where = f"Line {line} of {metadata}"
            name_column = columns.find("image", list(entry), where)
            name = entry.get(name_column) if name_column else None
            if not isinstance(name, str) or not name:
                raise UserError(
                    f'{where} names no picture. Write it as {{"file_name": "1.jpg", "text": "…"}}.'
                )
            caption_column = columns.find("caption", list(entry), where)
            caption = entry.get(caption_column) if caption_column else None
            if caption is not None and not isinstance(caption, str):
                raise UserError(f"{where} has a caption that is not text ({caption!r}). Put it in quotes.")
            name = os.path.normpath(name.replace("\\", "/"))
            if os.path.isabs(name) or name.startswith(".."):
                raise UserError(f"{where} names {name}, which lies outside the folder. Use names inside it.")
            if name in captions:
                raise UserError(f"{where} names {name} a second time. Keep one line for each picture.")
            captions[name] = _one_line(caption)
    return captions


def _entries(metadata: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = _text(metadata)
    if metadata.suffix == ".csv":
        table = csv.DictReader(io.StringIO(text, newline=""))
        for row in table:
            yield table.line_num, {name: value for name, value in row.items() if name is not None}
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"Line {number} of {metadata} is not JSON ({error.msg}). Repair it.") from error
        if not isinstance(entry, dict):
            raise UserError(f"Line {number} of {metadata} is not a JSON object. Write {{…}} on each line.")
        yield number, entry


def _beside(path: Path) -> tuple[str | None, Path | None]:
    """The caption and the mask that lie beside a picture."""
    text, mask = path.with_suffix(".txt"), path.with_name(path.stem + MASK_ENDING)
    caption = _one_line(_text(text)) if text.is_file() else None
    return caption, mask if mask.is_file() else None


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text. Save it as UTF-8.") from error


def _one_line(caption: str | None) -> str | None:
    return " ".join(caption.split()) or None if caption else None


def _visible(folder: Path) -> list[Path]:
    """What lies in a folder and is not hidden, in natural order."""
    return sorted(
        (path for path in folder.iterdir() if not path.name.startswith(".")),
        key=lambda path: _natural(path.name),
    )


def _key(name: str) -> str:
    """One spelling for names that file systems write in two (é as one character or two)."""
    return unicodedata.normalize("NFC", name)


def _natural(name: str) -> tuple[list[str | int], str]:
    parts = re.split(r"(\d+)", name.casefold())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def _nothing_in(folder: Path) -> str:
    kinds = Counter(path.suffix.lower() or "other" for path in _visible(folder) if path.is_file())
    found = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    return (
        f"{folder} holds no pictures{f' (only {found})' if found else '; it is empty'}. "
        "Put .jpg, .png or .webp files there, or give another folder."
    )


def _nearest(path: Path) -> Path | None:
    """What lies beside a missing path under almost its name."""
    try:
        names = os.listdir(path.parent)
    except OSError:
        return None
    near = difflib.get_close_matches(path.name, names, n=1)
    return path.parent / near[0] if near else None


# Tables of the `datasets` library.


def _is_dataset_folder(path: Path) -> bool:
    return (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()


def _could_be_dataset(source: str, path: Path) -> bool:
    """`org/name`, unless `org` is a folder here: then it is a mistyped path."""
    return re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", source) is not None and not path.parent.exists()


def _load_saved(path: Path) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} is not a whole saved dataset ({error}). Save it again.") from error


def _load_parquet(files: Sequence[Path]) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset("parquet", data_files=[str(file) for file in files])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{files[0]} is not a readable Parquet file ({_first_line(error)}). Save it again."
        ) from error


def _load_from_hub(source: str) -> Any:
    datasets = _datasets()
    try:
        return datasets.load_dataset(source)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"{source} is no folder here, and no dataset of that name was loaded ({_first_line(error)}). "
            "Check the spelling, or give a folder of pictures."
        ) from error


def _table_pictures(table: Any, source: str, columns: _Columns) -> list[Picture]:
    datasets = _datasets()
    if isinstance(table, dict):  # splits
        table = table["train"] if "train" in table else next(iter(table.values()))
    names = list(table.column_names)
    image_column = columns.find("image", names, source) or next(
        (name for name in names if isinstance(table.features[name], datasets.Image)), None
    )
    if image_column is None:
        raise UserError(
            f"{source} has no column of pictures; it has {', '.join(names)}. Name one with image_column."
        )
    if isinstance(table.features[image_column], datasets.Image):
        table = table.cast_column(image_column, datasets.Image(decode=False))
    caption_column = columns.find("caption", names, source)
    captions = list(table[caption_column]) if caption_column else [None] * len(table)
    if not captions:
        raise UserError(f"{source} has no rows. Give another dataset or a folder of pictures.")
    return [
        Picture(
            Path(source) / f"{index:06d}",
            _one_line(caption) if isinstance(caption, str) else None,
            row=Row(table, image_column, index),
        )
        for index, caption in enumerate(captions)
    ]


def _datasets() -> Any:
    import datasets

    return datasets


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
