"""Image sources: list the images of a folder or dataset with their captions and masks, and check that all decode.

A source is a folder of images (captions in `name.txt`, `name.jpg.txt` or `name.caption` beside `name.jpg`, in
`metadata.jsonl`, `.json` or `.csv`; masks in `name.mask.png` or OneTrainer's `name-masklabel.png`, white = train), a
single image, a Parquet file, webdataset shards (.tar), a folder saved by `datasets`, or a dataset id on the hub.
`list_images` decodes nothing, so that `check_images` can report all unusable files at once; `describe_unused` reports a
folder's other files.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

from backbone.io.console import (
    BROKEN,
    UserError,
    format_count,
    notify,
    notify_once,
    on_one_line,
    show_text,
)
from backbone.io.progress import progress
from backbone.io.records import (
    check_parsed,
    is_json_list,
    iterate_entries,
    iterate_rows,
    read_text,
    refuse_pipe,
)
from backbone.io.written import refuse_dead_link, written_path
from backbone.media.shapes import is_same_shape
from backbone.media.sources.columns import Columns, join_lines, refuse_control
from backbone.media.sources.decode import BadImageError, describe_further_frames, nearest_path
from backbone.media.sources.names import (
    CAPTION_SUFFIXES,
    IMAGE_SUFFIXES,
    SYSTEM_FILES,
    find_in_list,
    list_visible,
    natural_sort_key,
    normalize_name,
)
from backbone.media.sources.record import DatasetRow, ImageRecord
from backbone.media.sources.splits import drop_evaluation_splits
from backbone.media.sources.tables import (
    TABLES,
    could_be_dataset,
    fetched_folder,
    find_tables,
    holds_images,
    is_dataset_folder,
    list_table,
    load_from_hub,
    load_saved,
)

MASK_STEM = re.compile(r"(.+)(?:\.mask|[-_.]masklabel)", re.IGNORECASE)  # ours, and OneTrainer's
# OneTrainer's images for a condition, which show no subject
CONDITION_STEM = re.compile(r".+[-_.]condlabel", re.IGNORECASE)
PERHAPS_MASK = re.compile(r"(.+)[-_. ](?:mask|matte|seg|segmentation|alpha)|mask[-_. ](.+)", re.IGNORECASE)
PERHAPS_MAP = re.compile(
    r"(.+)[-_. ](?:depth|canny|edges?|normals?|normalbae|(?:open)?pose|lineart|lines|mlsd|hed|softedge|pidi|scribble|"
    r"sketch|labels?)",
    re.IGNORECASE,
)
MASK_FOLDERS = frozenset({"mask", "masks", "matte", "mattes", "segmentation", "segmentations"})
# Contents of caption files that are no captions, by the pattern of their beginning
NO_CAPTION = {
    r"<!doctype|<html|<\?xml": "a web page",
    r"\{\\rtf": "an RTF document",
    r"\{\s*\"[^\"]*\"\s*:": "JSON",
}
ARCHIVES = frozenset({".zip", ".gz", ".tgz", ".7z", ".rar", ".xz", ".bz2", ".zst"})
CONFIGURATIONS = frozenset({".toml", ".yaml", ".yml"})
MOST_FOLDERS = 3000  # that are searched for images to report
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "metadata.json", "metadata.parquet")
PROMPT_LIST = "prompt.json"  # of ControlNet's own pairs, which is JSON lines


def list_images(
    source: str | Path, *, caption_column: str | None = None, image_column: str | None = None
) -> list[ImageRecord]:
    """List the images of a source in natural order (2.jpg before 10.jpg), or in a table's own order.

    Hidden files and files without an image suffix are skipped; a file with such a suffix counts, whatever it holds.
    A folder without images of its own stands for those of its subfolders (kohya's `10_sks dog/`). Captions come from
    metadata first, then from `.txt` files. `caption_column` and `image_column` name columns that are not called text,
    prompt or caption, and file_name, image or image_path. For a folder's other files see `describe_unused`.

    Raises `UserError` for a source that does not exist or has no images, unreadable captions, or a dataset that
    cannot be loaded.
    """
    path = written_path(source)
    columns = Columns(caption_column, image_column)
    if path.is_dir():
        return _list_source_folder(path, str(source), columns)
    if path.exists():
        if (suffix := path.suffix.lower()) in TABLES:
            refuse_pipe(path)
            return list_table(TABLES[suffix]([path]), str(source), columns, folder=path.parent)
        if path.suffix.lower() not in IMAGE_SUFFIXES and path.suffix:
            raise UserError(
                f"{path} is a {path.suffix} file, neither an image nor a folder of images. {_suggest_source(path)}"
            )
        if column := columns.caption or columns.image:
            raise UserError(f"{path} is a single picture, so it has no column {column!r}. Name no column.")
        return [_read_companions(path, _Companions(path.parent))]
    if could_be_dataset(str(source)):
        fetched = fetched_folder()
        return list_table(load_from_hub(str(source)), str(source), columns, folder=fetched, fetched=fetched)
    nearest = nearest_path(path)
    remedy = f"Did you mean {nearest}?" if nearest else "Give a folder of images, or a dataset id (org/name)."
    if "*" in path.name and path.parent.is_dir():  # a shell expands it unless it is quoted
        remedy = f"Patterns are not read: give the folder {path.parent}, or a copy of these images in one of their own."
    raise UserError(f"{path} does not exist. {remedy}")


def _list_source_folder(path: Path, source: str, columns: Columns) -> list[ImageRecord]:
    """The images of a saved dataset, of a folder or its subfolders, or of its tables; `UserError` if it has none."""
    if is_dataset_folder(path):
        return list_table(load_saved(path), source, columns, folder=path)
    pictures = _list_folder(path, columns)
    subfolders = [] if pictures else [folder for folder in list_visible(path) if _is_user_folder(folder)]
    for subfolder in drop_evaluation_splits(subfolders, path):
        pictures += _list_folder(subfolder, columns)
    if pictures:
        _refuse_folder_of_masks(pictures)
        folders = [path, *filter(_is_user_folder, list_visible(path))]
        column = columns.caption or columns.image
        if column and not any(find_lists(folder) for folder in folders):
            raise UserError(
                f"{path} has no {' or '.join(METADATA)}, so it has no column {column!r}. Write one, or name none."
            )
        return pictures
    for folder, suffix in product((path, path / "data"), TABLES):  # in data/ as on the hub
        if tables := find_tables(folder, suffix):
            return list_table(TABLES[suffix](tables), source, columns, folder=folder)
    raise UserError(_describe_empty_folder(path))


def _suggest_source(path: Path) -> str:
    """The remedy for a file that is itself no source of images."""
    suffix = path.suffix.lower()
    if suffix in ARCHIVES:
        return "Unpack it, and give that folder."
    if suffix in (".jsonl", ".csv", ".json"):
        name = f"metadata{suffix}"
        return (
            f"If it is a list of images with their captions, call it {name}, beside the images, each named by its path "
            "from there, and give that folder."
        )
    if suffix in CONFIGURATIONS:
        return (
            "If it is another program's configuration of its data, give the folder of images that it names."
        )
    return "Give a folder with .jpg or .png files in it."


def list_by_name(folder: Path) -> dict[str, ImageRecord]:
    """A folder's images by their names without suffix, in NFC; in subfolders with the subfolder's name, `a/1`.

    Raises `UserError` if two images have one name.
    """
    records: dict[str, ImageRecord] = {}
    for picture in list_images(folder):
        name = normalize_name(picture.path.relative_to(folder).with_suffix("").as_posix())
        if name in records:
            raise UserError(
                f"{records[name].path} and {picture.path.name} have one name, and images are paired by their names. "
                "Keep one of them."
            )
        records[name] = picture
    return records


class ListedImages:
    """The images that a list names, each with the caption and the mask beside it; each folder is read once."""

    def __init__(self) -> None:
        self._companions: dict[Path, _Companions] = {}

    def record(self, path: Path) -> ImageRecord:
        """The image of this path; `UserError` if it has two captions or two masks."""
        if path.parent not in self._companions:
            self._companions[path.parent] = _Companions(path.parent)
        return _read_companions(path, self._companions[path.parent])


def read_captions(folder: Path, paths: Sequence[Path]) -> dict[Path, str]:
    """The captions of a folder's files or subfolders, from its metadata or beside them; "" for none.

    Raises `UserError` for text that cannot be read, for two captions of one file, and for a caption of a file that is
    not among `paths`.
    """
    metadata, companions = _read_metadata_captions(folder, Columns(None, None)), _Companions(folder)
    by_name = {normalize_name(name): caption for name, (caption, _) in metadata.items()}
    names = {normalize_name(path.name) for path in paths}
    for name, (_, list_file) in metadata.items():
        if normalize_name(name) not in names:
            raise UserError(
                f"{list_file} names {name}, and there is no such clip. Take it out, or put it there."
            )
    captions = {}
    for path in paths:
        caption = by_name.get(normalize_name(path.name))
        # A folder's name has no suffix to take away
        file = path.with_name(f"{path.name}.folder") if path.is_dir() else path
        captions[path] = caption or _read_companions(file, companions).caption or ""
    return captions


def check_images(pictures: Sequence[ImageRecord]) -> None:
    """Decode every image and mask once; one `UserError` lists all unusable ones, a line each with the reason."""
    bad: list[tuple[str, str]] = []
    notices: list[str] = []
    with progress(len(pictures), "reading", brief=True) as bar:
        for picture in pictures:
            try:
                if picture.row is None:
                    refuse_name(picture.path)
                size = picture.open(at_least=64).size
                mask = picture.open_mask()
                if mask is not None:
                    _check_mask_shape(mask.size, size, picture)
                if picture.row is None and (further := describe_further_frames(picture.path)):
                    notices.append(further)
            except BadImageError as error:
                bad.append((error.name, error.reason))
            bar.advance_images(1)
    refuse_bad_images(bad, len(pictures))
    if notices:
        notify(
            notices[0]
            + (f" The same holds for {format_count(len(notices) - 1, 'other image')}." if notices[1:] else "")
        )


def refuse_name(path: Path) -> None:
    """`BadImageError` for a file name that is not UTF-8, which no record can hold."""
    if BROKEN.search(path.name):
        raise BadImageError(show_text(path.name), "has a name that is no text in UTF-8: rename it")


def refuse_bad_images(bad: Sequence[tuple[str, str]], count: int) -> None:
    """`UserError` that lists the unusable ones of `count` images, given as (name, reason)."""
    if bad:
        lines = "\n".join(f"  {on_one_line(f'{name} {reason}')}" for name, reason in bad)
        heading = f"{len(bad)} of {count} images cannot be used" if count > 1 else "The image cannot be used"
        raise UserError(
            f"{heading}:\n{lines}\nReplace or remove {'it' if len(bad) == 1 else 'them'}, then run again."
        )


def _check_mask_shape(mask_size: tuple[int, int], image_size: tuple[int, int], record: ImageRecord) -> None:
    """Raise `BadImageError` for a mask that is not its image scaled."""
    if not is_same_shape(mask_size, image_size):
        width, height = mask_size
        reason = f"is a mask of {width} × {height}, another aspect ratio than its image {record.path.name}"
        raise BadImageError(str(record.mask), reason)


# Folders.


def _list_folder(folder: Path, columns: Columns) -> list[ImageRecord]:
    """The images of a folder and those that its metadata names, with captions and masks, in natural order."""
    metadata = _read_metadata_captions(folder, columns)
    companions, images = _Companions(folder), ListedImages()  # metadata may name images in subfolders
    paths: dict[str, Path] = {}
    for image in companions.images:
        if (existing := paths.setdefault(normalize_name(image.name), image)) != image:
            notify_once(
                f"{on_one_line(str(existing))} and another file beside it have one name, but for how Unicode spells "
                "it (é as one character or two). The first counts; rename the other, or remove it if it is a copy."
            )
    stems = {normalize_name(name) for file in paths.values() for name in (file.stem, file.name)}
    for stem, masks in companions.masks.items():
        if stem not in stems:
            raise UserError(
                f"{masks[0]} is a mask, but there is no image {stem}.* beside it. Rename or remove it."
            )
    parts = sorted({name.split("/")[0] for name in metadata if "/" in name})
    training_folders = drop_evaluation_splits([folder / part for part in parts], folder)
    for name in metadata:
        if "/" not in name or folder / name.split("/")[0] in training_folders:
            paths.setdefault(normalize_name(name), folder / name)
    by_key = {normalize_name(name): entry for name, entry in metadata.items()}
    pictures = []
    for key, path in sorted(paths.items(), key=lambda item: natural_sort_key(item[0])):
        picture = images.record(path)
        caption, file = by_key.get(key, (None, None))
        pictures.append(replace(picture, caption=caption, caption_file=file) if caption else picture)
    _say_shared(pictures)
    return pictures


def _say_shared(pictures: Sequence[ImageRecord]) -> None:
    """Say which captions and masks are shared by two images of one name."""
    owners: dict[Path, list[str]] = {}
    for picture in pictures:
        for file in (picture.caption_file, picture.mask):
            if file is not None and file.suffix.lower() in (*CAPTION_SUFFIXES, *IMAGE_SUFFIXES):
                owners.setdefault(file, []).append(picture.path.name)
    shared = [(file, names) for file, names in owners.items() if len(names) > 1]
    if shared:
        (file, names), *others = shared
        also = f" The same holds for {format_count(len(others), 'other file')}." if others else ""
        notify_once(
            f"{file} is used for {' and '.join(names)}, which share a name. If that is wrong, rename one of them and "
            f"give it a file of its own.{also}"
        )


def _refuse_folder_of_masks(pictures: Sequence[ImageRecord]) -> None:
    """`UserError` for a subfolder that holds the masks of another one, as `images/` and `masks/` do."""
    names: dict[Path, set[str]] = {}
    for picture in pictures:
        names.setdefault(picture.path.parent, set()).add(normalize_name(picture.path.stem))
    for masks in [folder for folder in names if folder.name.lower() in MASK_FOLDERS]:
        for images in [folder for folder in names if folder != masks and names[folder] & names[masks]]:
            name = min(names[images] & names[masks])
            raise UserError(
                f"{masks} holds images of the same names as {images}, as masks would be called. Put them beside their "
                f"images, as {name}.mask.png, and give {images}; or give {images} alone."
            )


class _Companions:
    """A folder's images, and the captions and masks beside them by their image's stem."""

    def __init__(self, folder: Path) -> None:
        self.images: list[Path] = []
        self.captions: dict[str, list[Path]] = {}
        self.masks: dict[str, list[Path]] = {}
        for file in list_visible(folder) if folder.is_dir() else []:
            stem, suffix = normalize_name(file.stem), file.suffix.lower()
            if suffix in CAPTION_SUFFIXES:
                refuse_dead_link(file)
            if suffix in CAPTION_SUFFIXES and file.is_file():
                self.captions.setdefault(stem, []).append(file)
            elif suffix not in IMAGE_SUFFIXES or CONDITION_STEM.fullmatch(stem):
                continue
            elif mask := MASK_STEM.fullmatch(stem):
                self.masks.setdefault(mask[1], []).append(file)
            else:
                self.images.append(file)


def _read_companions(path: Path, companions: _Companions) -> ImageRecord:
    """The record of an image with its caption and its mask; `UserError` if it has two of one kind."""
    stems = dict.fromkeys((normalize_name(path.stem), normalize_name(path.name)))  # 1.txt or 1.jpg.txt
    captions = [file for stem in stems for file in companions.captions.get(stem, [])]
    masks = [file for stem in stems for file in companions.masks.get(stem, [])]
    for kind, files in (("caption", captions), ("mask", masks)):
        if len(files) > 1:
            raise UserError(
                f"{files[0]} and {files[1].name} are both the {kind} of {path.name}. Keep one of them."
            )
    caption = join_lines(_read_caption(captions[0], companions), captions[0]) if captions else None
    mask, caption_file = masks[0] if masks else None, captions[0] if captions else None
    return ImageRecord(path, caption, mask, caption_file=caption_file)


def _read_metadata_captions(folder: Path, columns: Columns) -> dict[str, tuple[str | None, Path]]:
    """File name (relative, `/` between folders) → caption and its file, from the folder's metadata."""
    return {
        name: (caption, metadata)
        for metadata in find_lists(folder)
        for name, caption in _read_list(metadata, columns).items()
    }


def read_listed(list_file: Path) -> dict[Path, str]:
    """The files or folders beside a list that it names, in its order, each with its caption; "" for none.

    Raises `UserError` for a list that cannot be read, and for names outside of its folder.
    """
    captions = _read_list(list_file, Columns(None, None))
    return {list_file.parent / name: caption or "" for name, caption in captions.items()}


def _read_list(metadata: Path, columns: Columns) -> dict[str, str | None]:
    """File name (relative, `/` between folders) → caption, from a list."""
    captions: dict[str, str | None] = {}
    text_columns: dict[str, None] = {}  # in the order of their first use
    for location, entry in read_image_list(metadata):
        text_columns |= {name: None for name, value in entry.items() if isinstance(value, str)}
        name_column = columns.find("image", list(entry), location)
        name = entry.get(name_column) if name_column else None
        name = str(name) if type(name) is int else name  # 1 for 1.jpg
        if not isinstance(name, str) or not name:
            reason = f"its keys are {', '.join(entry)}" if entry else "it is empty"
            raise UserError(
                f"{location} names no image ({reason}). Call the key of the files file_name, as in "
                '{"file_name": "1.jpg", "text": "…"}.'
            )
        filled = [key for key, value in entry.items() if columns.caption or value not in (None, "")]
        caption_column = columns.find("caption", filled, location)
        caption = entry.get(caption_column) if caption_column else None
        if caption is not None and not isinstance(caption, str):
            raise UserError(f"{location} has a caption that is not text ({caption!r}). Put it in quotes.")
        refuse_control(caption or "", location)
        folder = metadata.parent
        name = find_in_list(metadata, name, location).relative_to(folder).as_posix()
        if name in captions:
            raise UserError(f"{location} names {name} a second time. Keep one line for each image.")
        captions[name] = join_lines(caption, location)
    columns.say_caption_column(list(text_columns), str(metadata))
    if not captions:
        notify_once(
            f"{metadata} names no image, so no caption comes from it. Write a line for each, or remove it."
        )
    return captions


def find_lists(folder: Path, names: Sequence[str] = METADATA) -> list[Path]:
    """The file of a folder that lists its images, whatever the case of its name; `UserError` for two of them.

    A .json counts only if it is a list: other tools keep other records under the same names.
    """
    candidates = [
        path for path in (sorted(folder.iterdir()) if folder.is_dir() else []) if path.name.lower() in names
    ]
    for path in candidates:
        refuse_dead_link(path)
    lists = [
        path
        for path in candidates
        if path.is_file()
        and (path.suffix.lower() != ".json" or path.name.lower() == PROMPT_LIST or is_json_list(path))
        and (path.suffix.lower() != ".parquet" or _names_files(path))
    ]
    if len(lists) > 1:
        raise UserError(f"{folder} holds both {lists[0].name} and {lists[1].name}. Keep one of them.")
    return lists


def _names_files(table: Path) -> bool:
    """Whether a Parquet file names its images instead of holding them."""
    import pyarrow.parquet

    try:
        return bool("file_name" in pyarrow.parquet.read_schema(table).names)
    except (OSError, ValueError):
        return False


def read_image_list(metadata: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of a list of images, each with its place for messages; `UserError` for an entry of another kind."""
    if metadata.suffix.lower() == ".parquet":
        import pyarrow.parquet

        for number, row in enumerate(pyarrow.parquet.read_table(metadata).to_pylist()):
            yield f"Row {number} of {metadata}", row
        return
    text = _read_checked_text(metadata)
    if metadata.suffix.lower() in (".csv", ".tsv"):
        yield from iterate_rows(text, metadata)
        return
    for location, entry in iterate_entries(text, metadata):
        if isinstance(entry, UserError):
            raise entry
        if not isinstance(entry, dict):
            raise UserError(f"{location} is not a JSON object. Write {{…}} for each image.")
        yield location, entry


def _read_caption(path: Path, companions: _Companions) -> str:
    """The text of a caption file; `UserError` for another encoding, with the number of such files beside it."""
    try:
        text = _read_checked_text(path)
    except UserError as error:
        others = [file for files in companions.captions.values() for file in files if file != path]
        count = sum(not _is_text(file) for file in others)
        raise UserError(f"{error}{f' {count} more beside it: no UTF-8 either.' if count else ''}") from error
    if kind := next(
        (kind for pattern, kind in NO_CAPTION.items() if re.match(pattern, text.lstrip(), re.I)), ""
    ):
        raise UserError(f"{path} is {kind}, and a caption is plain text. Replace or remove it.")
    return refuse_control(text, path)


def _is_text(path: Path) -> bool:
    try:
        _read_checked_text(path)
    except (UserError, OSError):
        return False
    return True


def _read_checked_text(path: Path) -> str:
    return check_parsed(read_text(path), f"{path} is not UTF-8 text")


def _is_user_folder(path: Path) -> bool:
    """Whether a path is a folder, and not one that the system keeps on every disk."""
    return os.path.isdir(path) and path.name.lower() not in SYSTEM_FILES


def _describe_empty_folder(folder: Path) -> str:
    kinds = Counter(path.suffix.lower() or "other" for path in list_visible(folder) if os.path.isfile(path))
    contents = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(4))
    deeper = _count_below(folder, IMAGE_SUFFIXES, levels=5)
    if deeper:
        names = [str(below.relative_to(folder)) for below in deeper]
        listing = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        return f"{folder} holds no images itself, but folders that hold some: {listing}. Give one of these."
    empty = "" if any(list_visible(folder)) else "; it is empty"
    return (
        f"{folder} holds no images{f' (only {contents})' if contents else empty}. "
        "Put .jpg, .png or .webp files there, or give another folder."
    )


# Unused files.


def describe_unused(source: str | Path, pictures: Sequence[ImageRecord]) -> list[str]:
    """Sentences on a folder's other contents: unused files and subfolders, images named like masks or maps."""
    root = written_path(source)
    used = {path for image in pictures for path in (image.path, image.mask, image.caption_file) if path}
    if pictures and (row := pictures[0].row) is not None:
        return _describe_other_images(row, source)
    if not root.is_dir() or not pictures:
        return []
    folders = sorted({root, *(path.parent for path in used)})
    used |= {path for folder in folders for path in find_lists(folder)}

    # Files beside the images, by their kind, and folders of images further below
    files = [
        path
        for folder in folders
        for path in list_visible(folder)
        if not os.path.isdir(path) and path not in used and path.name.lower() not in SYSTEM_FILES
    ]
    kinds: dict[str, list[str]] = {}
    for path in files:
        kinds.setdefault(path.suffix.lower(), []).append(str(path.relative_to(root)))
    parts = [
        f"{format_count(count, noun)} in {folder.relative_to(root)}/"
        for noun, endings in (("image", IMAGE_SUFFIXES), ("caption", CAPTION_SUFFIXES))
        for folder, count in _count_below(root, endings, levels=5).items()
        if folder not in folders and folder != root
    ]
    for kind, names in kinds.items():
        parts += names if len(names) < 3 else [f"{len(names)} {kind or 'other'} files ({names[0]}, …)"]
    listing = on_one_line(", ".join(parts[:8])) + (f" and {len(parts) - 8} more" if len(parts) > 8 else "")
    sentences = [f"Not used in {root}: {listing}."] if parts else []

    # Images that are named like another image's mask or map
    stems = {picture.path.stem.casefold() for picture in pictures}
    for picture in pictures:
        match = PERHAPS_MASK.fullmatch(picture.path.stem)
        owner = match[1] or match[2] if match else ""
        if owner and owner.casefold() in stems:
            sentences.append(
                f"{picture.path.name} counts as an image of its own. If it is the mask of {owner}, name it "
                f"{owner}.mask.png."
            )
    maps = [
        picture.path
        for picture in pictures
        if (match := PERHAPS_MAP.fullmatch(picture.path.stem)) and match[1].casefold() in stems
    ]
    if maps:
        more = f" So does {format_count(len(maps) - 1, 'other')} of such a name." if maps[1:] else ""
        sentences.append(
            f"{maps[0].name} counts as an image of its own, and is called as a map of another is. If it is one, move "
            f"it away, or learn it with customize train-control.{more}"
        )
    return sentences


def _describe_other_images(row: DatasetRow, source: str | Path) -> list[str]:
    """A sentence on the image columns of a row's table other than the listed one."""
    features = getattr(row.table, "features", None) or {}
    columns = [name for name, kind in features.items() if name != row.column and holds_images(kind)]
    if not columns:
        return []
    return [f"Not used in {source}: the images in {', '.join(columns)}; those in {row.column} are."]


def _count_below(folder: Path, endings: Collection[str], *, levels: int) -> dict[Path, int]:
    """The number of files of these endings in each folder below, `levels` deep, if it has any.

    Forbidden folders are left out, and all after the first MOST_FOLDERS: a whole disk is not searched.
    """
    counts: dict[Path, int] = {}
    level = [folder]
    searched = 0
    for _ in range(levels):
        below: list[Path] = []
        for parent in level[: MOST_FOLDERS - searched]:
            try:
                entries = [entry for entry in os.scandir(parent) if not entry.name.startswith(".")]
            except OSError:
                continue
            folders = [entry for entry in entries if entry.is_dir(follow_symlinks=False)]
            below += [parent / entry.name for entry in folders if entry.name.lower() not in SYSTEM_FILES]
            count = sum(
                Path(entry.name).suffix.lower() in endings for entry in entries if entry not in folders
            )
            if count:
                counts[parent] = count
        searched += len(level)
        level = sorted(below, key=lambda path: natural_sort_key(path.name))
        if searched >= MOST_FOLDERS:
            break
    return counts
