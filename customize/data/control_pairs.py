"""Images with their maps, as people lay them out for ControlNet and T2I-Adapter.

    pairs/metadata.jsonl     {"file_name": "1.png", "conditioning_image": "maps/1.png", "text": "a dog in the snow"}
    pairs/prompt.json        {"source": "source/0.png", "target": "target/0.png", "prompt": "…"}, as ControlNet's own
    pairs/1.png, 1.txt, 1.sketch.png                            a map beside each image
    pairs/source/1.png, pairs/target/1.png, target/1.txt        two folders with the same names
    images.parquet, org/name                                    a table with a column of maps

Edges, lines and sketches may be left out: they are computed from the image. Nothing is decoded here;
`check_control_pairs` opens every file and reports pairs that cannot be used.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from backbone.cli.conditions import KINDS, SYNONYMS, RequestedMap
from backbone.io.console import UserError, format_count, notify, on_one_line
from backbone.io.files import content_hash
from backbone.io.progress import progress
from backbone.media.control.maps import (
    COMPUTED,
    Palette,
    as_array,
    as_hints,
    compute_map,
    convert_map,
    refuse_wrong_kind,
    resize_map,
)
from backbone.media.sources.columns import CAPTION_COLUMNS, Columns
from backbone.media.sources.decode import BadImageError
from backbone.media.sources.names import IMAGE_SUFFIXES, normalize_name
from backbone.media.sources.pictures import (
    METADATA,
    PROMPT_LIST,
    ListedImages,
    find_lists,
    list_images,
    read_image_list,
)
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import CROPS, crop_and_resize, crop_box
from customize.data.edit_pairs import (
    SOURCES,
    TARGETS,
    find_listed,
    list_partners,
    plain_name,
    read_edit_pairs,
    say_unused,
)

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
IMAGE_COLUMNS = ("filename", "image", "target", "imagepath")
# Of a map beside its image: `1.sketch.png`, `1_canny.png`; OneTrainer's `1-condlabel.png` is of any kind
MAP_STEM = re.compile(r"(.+)[._-](" + "|".join([*KINDS, *SYNONYMS, "condlabel"]) + ")", re.IGNORECASE)
# Of any kind too, where there is such an image: `1_control.png`, `hint_1.png`; and `canny_1.png`
ANY_KIND = ("condlabel", "control", "cond", "condition", "conditioning", "hint", "map")
PERHAPS_MAP = re.compile(
    rf"(?P<stem>.+)[._-](?P<word>{'|'.join(ANY_KIND)})"
    rf"|(?P<first>{'|'.join([*KINDS, *SYNONYMS, *ANY_KIND])})[._-](?P<rest>.+)",
    re.IGNORECASE,
)
IMAGE_FOLDERS = (*TARGETS, "img", "photo", "picture")


@dataclass(frozen=True)
class ControlColumns:
    """Names of a table's columns; "" for the usual ones."""

    image: str = ""
    map: str = ""
    caption: str = ""


@dataclass(frozen=True)
class ControlPair:
    """An image with its caption, and its map; None for a map that is computed from the image."""

    image: ImageRecord
    map: ImageRecord | None

    @property
    def caption(self) -> str:
        """The image's caption; "" without one."""
        return self.image.caption or ""

    def read_map(self, kind: str, size: tuple[int, int]) -> Tensor:
        """The map [3, H, W] in 0…1 at `size` (W, H), cropped like the image."""
        if self.map is None:
            read = compute_map(kind, crop_and_resize(self.image.open(at_least=max(size)), size))
        else:
            stored = self.open_map(kind)
            read = resize_map(stored, kind, size, box=crop_box(stored.size, size, CROPS["center"]))
        return as_hints(read)[0]

    def open_map(self, kind: str) -> Image.Image:
        """The map as stored, or as a picture where its kind is one; `UserError` for a transparent one."""
        assert self.map is not None
        return self.map.open(convert=partial(convert_map, requested=RequestedMap(kind, str(self.map.path))))

    def check_map(self, kind: str, palette: Palette | None) -> None:
        """`UserError` for a file that is no map of the kind, or has another aspect ratio than its image."""
        if self.map is None:
            return
        (width, height), stored = self.image.open().size, self.open_map(kind)
        if abs(stored.width * height / (stored.height * width) - 1) > 0.01:
            raise UserError(
                f"{self.map.path} is {stored.width} × {stored.height} and its image {self.image.path.name} {width} × "
                f"{height}: another shape. Crop them alike."
            )
        refuse_wrong_kind(as_array(stored), RequestedMap(kind, str(self.map.path)), palette)


def read_control_pairs(
    source: str, kind: str, columns: ControlColumns = ControlColumns()
) -> list[ControlPair]:
    """The pairs of a source, in the order of its list or of the names.

    Raises `UserError` for images without a map, unless the kind is computed from images, and for lists that name
    missing files.
    """
    path = Path(source).expanduser()

    # Pairs of a list, of two folders, or of images with maps next to them
    listed = find_lists(path, (*METADATA, PROMPT_LIST))
    if path.is_dir() and listed:
        pairs = _read_list(listed[0], kind, columns)
    elif path.is_dir() and _has_two_folders(path):
        pairs = [
            ControlPair(replace(pair.target, caption=pair.instruction or None), pair.source)
            for pair in read_edit_pairs(path)
        ]
    elif path.is_dir() and (folders := _find_two_folders(path, kind)):
        pairs = _read_two_folders(*folders)
    else:
        pairs = _read_images(source, kind, columns)
    bare = [pair for pair in pairs if pair.map is None]
    if bare and (len(bare) < len(pairs) or kind not in COMPUTED):
        hint = f", or leave all maps out: {kind} is found in the images" if kind in COMPUTED else ""
        raise UserError(
            f"{len(bare)} of {format_count(len(pairs), 'image')} in {source} have no map (first: "
            f"{bare[0].image.path}). Put {bare[0].image.path.stem}.{kind}.png beside it, or name its map in "
            f"metadata.jsonl{hint}."
        )
    if bare:
        notify(f"{source} has no maps, so its {kind} are found in the images themselves.")
    if path.is_dir() and pairs[0].image.row is None:
        say_unused(
            path,
            [image for pair in pairs for image in (pair.image, pair.map) if image],
            (*METADATA, PROMPT_LIST),
        )
    return pairs


def _list_names(kind: str) -> list[str]:
    """The names of a kind of maps."""
    return [kind, *(word for word, meant in SYNONYMS.items() if meant == kind)]


def _read_list(path: Path, kind: str, columns: ControlColumns) -> list[ControlPair]:
    """The pairs of metadata.jsonl, metadata.csv, metadata.tsv or prompt.json.

    Raises `UserError` if no map is named and other columns name files, which may be maps.
    """
    pairs, records = [], ListedImages()
    words: dict[str, str] = {}  # the lines' other columns, with an example of each
    usual = (*MAP_COLUMNS, *SOURCES, *map(plain_name, _list_names(kind)))
    for location, entry in read_image_list(path):
        image = _find_value(
            entry, columns.image, TARGETS if path.name.lower() == PROMPT_LIST else IMAGE_COLUMNS, location
        )
        if not isinstance(image, str) or not image:
            raise UserError(
                f"{location} names no image (its keys are {', '.join(entry)}). Write it as "
                '{"file_name": "1.png", "conditioning_image": "map-1.png", "text": "a dog in the snow"}.'
            )
        map_name = _find_value(entry, columns.map, usual, location)
        caption = _find_value(entry, columns.caption, CAPTION_COLUMNS, location)
        for what, value in (("map", map_name), ("caption", caption)):
            if value is not None and not isinstance(value, str):
                raise UserError(f"{location} has a {what} that is not text ({value!r}). Put it in quotes.")
        record = records.record(find_listed(path, image, location))
        record = replace(record, caption=" ".join((caption or "").split()) or record.caption)
        pairs.append(
            ControlPair(record, ImageRecord(find_listed(path, map_name, location)) if map_name else None)
        )
        words |= {
            key: value
            for key, value in entry.items()
            if isinstance(value, str) and value not in (image, map_name)
        }
    if not pairs:
        raise UserError(f"{path} names no image. Write a line for each.")
    files = [key for key, value in words.items() if Path(value).suffix.lower() in IMAGE_SUFFIXES]
    if files and all(pair.map is None for pair in pairs):
        raise UserError(
            f"{path} names no maps under a name that is known, but files as {', '.join(files)}. If these are the maps, "
            f"give --conditioning-image-column {files[0]}; else take the column out."
        )
    Columns(columns.caption or None, None).say_caption_column(
        [key for key in words if key not in files], str(path)
    )
    return pairs


def _find_value(entry: dict[str, Any], column: str, usual: Sequence[str], location: str) -> Any:
    """The value of the named column, or else of the first usual one that exists."""
    if column:
        if column not in entry:
            raise UserError(
                f"{location} has no column {column!r}; it has {', '.join(entry)}. Name one of them."
            )
        return entry[column]
    by_name = {plain_name(key): value for key, value in reversed(list(entry.items()))}
    return next((by_name[name] for name in usual if by_name.get(name)), None)


def _has_two_folders(folder: Path) -> bool:
    names = {plain_name(path.name) for path in folder.iterdir() if path.is_dir()}
    return bool(names & set(SOURCES)) and bool(names & set(TARGETS))


def _find_two_folders(folder: Path, kind: str) -> tuple[Path, Path] | None:
    """The folders of images and of their maps, the latter named after maps or the kind; None if there are none."""
    below = {plain_name(path.name): path for path in sorted(folder.iterdir()) if path.is_dir()}
    words = (*SOURCES, "map", "hint", *_list_names(kind))
    images, maps = (
        next((below[plain_name(name)] for name in names if plain_name(name) in below), None)
        for names in (IMAGE_FOLDERS, words)
    )
    return None if images is None or maps is None else (images, maps)


def _read_two_folders(images: Path, map_folder: Path) -> list[ControlPair]:
    """The pairs of two folders, matched by file name."""
    pictures, maps = list_partners(images, map_folder)
    return [
        ControlPair(replace(picture, caption=picture.caption or maps[name].caption), maps[name])
        for name, picture in pictures.items()
    ]


def _read_images(source: str, kind: str, columns: ControlColumns) -> list[ControlPair]:
    """Images with maps next to them (`1.png`, `1.sketch.png`), or the rows of a table."""
    images = list_images(source, image_column=columns.image or None, caption_column=columns.caption or None)
    if images[0].row is not None:
        names = images[0].row.table.column_names
        usual = (*MAP_COLUMNS, *map(plain_name, _list_names(kind)))
        column = columns.map or next((name for name in names if plain_name(name) in usual), "")
        maps = list_images(source, image_column=column) if column else [None] * len(images)
        if len(maps) != len(images):
            raise UserError(
                f"{source} has {format_count(len(images), 'image')} and {format_count(len(maps), 'map')} in {column}. "
                "Give each image one map."
            )
        return [ControlPair(image, map_image) for image, map_image in zip(images, maps, strict=True)]
    if columns.map:
        raise UserError(
            f"{source} has no metadata.jsonl, so it has no column {columns.map!r}. Write one, or name none."
        )
    return _pair_with_maps_beside(images, kind)


def _pair_with_maps_beside(images: Sequence[ImageRecord], kind: str) -> list[ControlPair]:
    """Images, each with the map of this kind next to it, if any; maps of other kinds are skipped, which is printed.

    Raises `UserError` for a map without an image, for two maps of one image, and for maps in a folder of their own.
    """
    stems = {_normalize_stem(image.path) for image in images}
    maps_of: dict[Path, Path] = {}
    other_maps: list[Path] = []
    folders = sorted({stem.parent for stem in stems})
    for path in [file for folder in folders for file in _list_image_files(folder)]:
        match, perhaps = MAP_STEM.fullmatch(path.stem), PERHAPS_MAP.fullmatch(path.stem)
        stem_part, word = (match[1], match[2]) if match else ("", "")
        if perhaps and not match:
            stem_part, word = perhaps["stem"] or perhaps["rest"], perhaps["word"] or perhaps["first"]
        stem, word = path.with_name(normalize_name(stem_part or path.name)), word.lower()
        if not stem_part or (
            stem not in stems and (match is None or not path.stem.lower().endswith(f".{word}"))
        ):
            continue  # an image whose name has such an ending
        if stem not in stems:
            raise UserError(f"{path} is a map, but there is no image {stem}.* beside it. Remove it.")
        if word not in (kind, *ANY_KIND) and SYNONYMS.get(word) != kind:
            other_maps.append(path)
        elif stem in maps_of:
            raise UserError(
                f"{maps_of[stem]} and {path.name} are both the {kind} map of {stem.name}. Keep one of them."
            )
        else:
            maps_of[stem] = path
    if other_maps:
        notify(
            f"{format_count(len(other_maps), 'map')} of other kinds than {kind} not used (first: {other_maps[0]})."
        )
    maps = {*maps_of.values(), *other_maps}
    pictures = [image for image in images if image.path not in maps]
    if not maps_of:
        _refuse_folder_of_maps(pictures)
    map_records = {stem: ImageRecord(path) for stem, path in maps_of.items()}
    return [ControlPair(image, map_records.get(_normalize_stem(image.path))) for image in pictures]


def _normalize_stem(path: Path) -> Path:
    """An image's path without its suffix, its name in NFC."""
    return path.with_name(normalize_name(path.stem))


def _list_image_files(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.iterdir()) if path.suffix.lower() in IMAGE_SUFFIXES]


def _refuse_folder_of_maps(pictures: Sequence[ImageRecord]) -> None:
    """`UserError` for images of the same names in two folders, one without captions: these may be maps."""
    first_by_stem: dict[str, ImageRecord] = {}
    for picture in pictures:
        earlier = first_by_stem.setdefault(picture.path.stem, picture)
        if earlier.path.parent != picture.path.parent and not (earlier.caption and picture.caption):
            raise UserError(
                f"{earlier.path.parent} and {picture.path.parent} both hold an image {picture.path.stem}. If one of "
                "them holds the maps, call it source/ and the other target/; else give every image a name or a caption "
                "of its own."
            )


# Checking -----------------------------------------------------------------------------------------------------


def check_control_pairs(
    pairs: Sequence[ControlPair],
    kind: str,
    size: tuple[int, int],
    *,
    palette: Palette | None = None,
    wordless: bool = False,
) -> None:
    """Open every image and map once. `size` (W, H) is the training size, `palette` that of labels, if known.

    Raises `UserError` that lists everything unusable: unreadable files, maps of another aspect ratio than their image,
    files that are no maps of the kind; and for maps that are all equal, or missing captions unless `wordless`.
    """
    if len(pairs) < 2:
        raise UserError("One pair teaches nothing about maps. Give some hundred at least.")
    bad: list[str] = []
    hashes: Counter[str] = Counter()
    with progress(len(pairs), "reading pairs", brief=True) as bar:
        for pair in pairs:
            try:
                pair.image.open(at_least=32)
                pair.check_map(kind, palette)
                hashes[content_hash(pair.read_map(kind, size).numpy().tobytes())] += 1
            except BadImageError as error:
                bad.append(f"{error.name} {error.reason}.")
            except UserError as error:
                bad.append(str(error))
            bar.advance_images(1)
    if bad:
        lines = "\n".join(f"  {on_one_line(sentence)}" for sentence in bad)
        raise UserError(f"{len(bad)} of {len(pairs)} pairs cannot be used:\n{lines}")
    if len(hashes) == 1:
        raise UserError(
            f"All {len(pairs)} maps are equal, so they say nothing of their images. Give each image its own {kind} map."
        )
    words = {pair.caption for pair in pairs}
    if len(words) == 1 and not wordless:
        reason = f"All captions are “{words.pop()}”" if words != {""} else "No image has a caption"
        raise UserError(
            f"{reason}, so the network would learn to ignore the prompt. Write one for each image, or "
            "train without words: --prompt-dropout 1."
        )
