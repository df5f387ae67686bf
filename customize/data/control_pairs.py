"""Images with their maps, as people lay them out for ControlNet and T2I-Adapter.

    pairs/metadata.jsonl     {"file_name": "1.png", "conditioning_image": "maps/1.png", "text": "a dog in the snow"}
    pairs/prompt.json        {"source": "source/0.png", "target": "target/0.png", "prompt": "…"}, as ControlNet's own
    pairs/1.png, 1.txt, 1.sketch.png                            a map beside each image
    pairs/source/1.png, pairs/target/1.png, target/1.txt        two folders with the same names
    images.parquet, org/name                                    a table with a column of maps

Edges, lines and sketches may be left out: they are found in the image. Nothing is decoded here; `check_control_pairs`
opens everything and says what is wrong with a pair.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from backbone.cli.conditions import SYNONYMS, AskedMap
from backbone.io.console import UserError, count_of, notify, progress
from backbone.io.files import content_hash
from backbone.io.records import inside
from backbone.media.control_maps import (
    COMPUTED,
    Palette,
    as_array,
    as_hints,
    compute_map,
    refuse_wrong_kind,
    resize_map,
)
from backbone.media.decode import BadImageError
from backbone.media.pictures import METADATA, ImageRecord, list_images, read_metadata
from backbone.media.transforms import CROPS, crop_and_resize, crop_box
from customize.data.edit_pairs import SOURCES, TARGETS, plain_name, read_edit_pairs

PROMPT_LIST = "prompt.json"
MAP_COLUMNS = (
    "conditioningimage",
    "conditioning",
    "controlimage",
    "control",
    "condition",
    "map",
    "source",
    "hint",
)
IMAGE_COLUMNS = ("filename", "image", "target", "images", "imagepath")
CAPTION_COLUMNS = ("text", "prompt", "caption")


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns; "" for the usual ones."""

    image: str = ""
    map: str = ""
    caption: str = ""


@dataclass(frozen=True)
class ControlPair:
    """An image with its caption, and the map that it was drawn by; None for a map that is found in the image."""

    image: ImageRecord
    map: ImageRecord | None

    @property
    def caption(self) -> str:
        """What the image shows; "" where nothing says."""
        return self.image.caption or ""

    def read_map(self, kind: str, size: tuple[int, int]) -> Tensor:
        """The map [3, H, W] in 0…1 at `size` (W, H): cropped as the image is."""
        if self.map is None:
            found = compute_map(kind, crop_and_resize(self.image.open(at_least=max(size)), size))
        else:
            drawn = self.map.open()
            box = crop_box(drawn.size, size, CROPS["center"])
            left, top, right, bottom = map(round, box)
            found = resize_map(drawn.crop((left, top, right, bottom)), kind, size)
        return as_hints(found)[0]

    def check_map(self, kind: str, palette: Palette | None) -> None:
        """`UserError` for a map that is none of the kind, or of another shape than its image."""
        if self.map is None:
            return
        (width, height), drawn = self.image.open().size, self.map.open()
        if abs(drawn.width * height / (drawn.height * width) - 1) > 0.01:
            raise UserError(
                f"{self.map.path} is {drawn.width} × {drawn.height} and its image {self.image.path.name} {width} × "
                f"{height}: another shape. Crop them alike."
            )
        refuse_wrong_kind(as_array(drawn), AskedMap(kind, str(self.map.path)), palette)


def read_control_pairs(source: str, kind: str, columns: Columns = Columns()) -> list[ControlPair]:
    """The pairs of a source, in the order of its list or of the names.

    Raises `UserError` for images without a map where the kind is not found in images, and for lists that name other
    files.
    """
    path = Path(source).expanduser()
    listed = [path / name for name in (*METADATA, PROMPT_LIST) if (path / name).is_file()]
    if path.is_dir() and listed:
        pairs = _from_list(listed[0], columns)
    elif path.is_dir() and _has_two_folders(path):
        pairs = [
            ControlPair(replace(one.target, caption=one.instruction or None), one.source)
            for one in read_edit_pairs(path)
        ]
    else:
        pairs = _from_images(source, kind, columns)
    bare = [pair for pair in pairs if pair.map is None]
    if bare and (len(bare) < len(pairs) or kind not in COMPUTED):
        found = f", or leave all maps out: {kind} is found in the images" if kind in COMPUTED else ""
        raise UserError(
            f"{len(bare)} of {count_of(len(pairs), 'image')} in {source} have no map (first: {bare[0].image.path}). "
            f"Put {bare[0].image.path.stem}.{kind}.png beside it, or name its map in metadata.jsonl{found}."
        )
    if bare:
        notify(f"{source} has no maps, so its {kind} are found in the images themselves.")
    return pairs


def _from_list(path: Path, columns: Columns) -> list[ControlPair]:
    """The pairs of metadata.jsonl, metadata.csv or prompt.json."""
    pairs = []
    for line, entry in read_metadata(path):
        where = f"Line {line} of {path}"
        image = _value(entry, columns.image, TARGETS if path.name == PROMPT_LIST else IMAGE_COLUMNS, where)
        if not isinstance(image, str) or not image:
            raise UserError(
                f'{where} names no image. Write it as {{"file_name": "1.png", "conditioning_image": "map-1.png", '
                '"text": "a dog in the snow"}.'
            )
        drawn = _value(entry, columns.map, (*MAP_COLUMNS, *SOURCES), where)
        caption = _value(entry, columns.caption, CAPTION_COLUMNS, where)
        for what, value in (("map", drawn), ("caption", caption)):
            if value is not None and not isinstance(value, str):
                raise UserError(f"{where} has a {what} that is not text ({value!r}). Put it in quotes.")
        record = replace(_record(path, image, where), caption=" ".join((caption or "").split()) or None)
        pairs.append(ControlPair(record, _record(path, drawn, where) if drawn else None))
    if not pairs:
        raise UserError(f"{path} names no image. Write a line for each.")
    return pairs


def _value(entry: dict[str, Any], named: str, usual: Sequence[str], where: str) -> Any:
    """The value of the column that was named, or else of the first usual one that is there."""
    if named:
        if named not in entry:
            raise UserError(f"{where} has no column {named!r}; it has {', '.join(entry)}. Name one of them.")
        return entry[named]
    by_name = {plain_name(key): value for key, value in reversed(list(entry.items()))}
    return next((by_name[name] for name in usual if by_name.get(name)), None)


def _record(listed: Path, name: str, where: str) -> ImageRecord:
    path = inside(listed.parent, name, where)
    if not path.is_file():
        raise UserError(
            f"{where} names {name}, and there is no such file beside it. Put it there, or take the line out."
        )
    return ImageRecord(path)


def _has_two_folders(folder: Path) -> bool:
    names = {plain_name(path.name) for path in folder.iterdir() if path.is_dir()}
    return bool(names & set(SOURCES)) and bool(names & set(TARGETS))


def _from_images(source: str, kind: str, columns: Columns) -> list[ControlPair]:
    """Images with maps beside them (`1.png`, `1.sketch.png`), or the rows of a table."""
    images = list_images(source, image_column=columns.image or None, caption_column=columns.caption or None)
    if images[0].row is not None:
        names = images[0].row.table.column_names
        column = columns.map or next((one for one in names if plain_name(one) in MAP_COLUMNS), "")
        maps = list_images(source, image_column=column) if column else [None] * len(images)
        return [ControlPair(image, one) for image, one in zip(images, maps, strict=True)]
    if columns.map:
        raise UserError(
            f"{source} has no metadata.jsonl, so it has no column {columns.map!r}. Write one, or name none."
        )
    endings = tuple(f".{word}" for word in (kind, *(word for word, one in SYNONYMS.items() if one == kind)))
    maps_of = {_stem(one.path, endings): one for one in images if one.path.stem.endswith(endings)}
    others = [one for one in images if not one.path.stem.endswith(endings)]
    alone = sorted(set(maps_of) - {str(one.path.with_suffix("")) for one in others})
    if alone:
        raise UserError(
            f"{maps_of[alone[0]].path} is a map, but there is no image {alone[0]}.* beside it. Remove it."
        )
    return [ControlPair(one, maps_of.get(str(one.path.with_suffix("")))) for one in others]


def _stem(path: Path, endings: Sequence[str]) -> str:
    """The path of a map without its kind and its suffix: that of its image without suffix."""
    ending = next(one for one in endings if path.stem.endswith(one))
    return str(path.with_suffix(""))[: -len(ending)]


# Checking -----------------------------------------------------------------------------------------------------


def check_control_pairs(
    pairs: Sequence[ControlPair],
    kind: str,
    size: tuple[int, int],
    *,
    palette: Palette | None = None,
    wordless: bool = False,
) -> None:
    """Open every image and map once. `size` (W, H) is what they are trained at, `palette` that of labels, if known.

    Raises `UserError` that lists what cannot be used: unreadable files, maps of another shape than their image, maps
    that are no maps of the kind; and for maps that are all equal, or captions unless `wordless`.
    """
    if len(pairs) < 2:
        raise UserError("One pair teaches nothing about maps. Give some hundred at least.")
    bad: list[str] = []
    seen: Counter[str] = Counter()
    with progress(len(pairs), "reading pairs", brief=True) as bar:
        for pair in pairs:
            try:
                pair.image.open(at_least=32)
                pair.check_map(kind, palette)
                seen[content_hash(pair.read_map(kind, size).numpy().tobytes())] += 1
            except BadImageError as error:
                bad.append(f"{error.name} {error.reason}.")
            except UserError as error:
                bad.append(str(error))
            bar.advance_images(1)
    if bad:
        lines = "\n".join(f"  {sentence}" for sentence in bad)
        raise UserError(f"{len(bad)} of {len(pairs)} pairs cannot be used:\n{lines}")
    if len(seen) == 1:
        raise UserError(
            f"All {len(pairs)} maps are equal, so they say nothing of their images. Give each image its own {kind} map."
        )
    words = {pair.caption for pair in pairs}
    if len(words) == 1 and not wordless:
        said = f"All captions are “{words.pop()}”" if words != {""} else "No image has a caption"
        raise UserError(
            f"{said}, so the network would learn to draw without hearing the prompt. Write one for each image, or "
            "train without words: --proportion-empty-prompts 1."
        )
