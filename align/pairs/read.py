"""Read preferences from folders, JSON lines, Parquet files and datasets; all bad records are reported together.

| source                  | layout                                                                                 |
|-------------------------|----------------------------------------------------------------------------------------|
| a folder of `align`     | `samples.json`, with `choices.jsonl` (`align label`) or `ranking.jsonl` (`align rank`)  |
| a JSON-lines file       | `prompt` with `chosen` and `rejected`, with `image_0`, `image_1` and `label_0`, or with |
|                         | `image` and `label`; names of pictures are relative to the file; a .json of such a list |
| a table, .csv or .tsv   | the same columns, names of pictures beside it; an empty cell says nothing              |
| rankings                | HPDv2's and ImageReward's columns (`align.pairs.rankings`), in either or in Parquet     |
| HPDv3                   | `prompt` with `path1`, which was preferred, and `path2`                                 |
| Rapidata                | `prompt`, `image1`, `image2` with `votes_image1` or `weighted_results_image1_preference` |
| two folders             | `chosen/` and `rejected/`, or `w/` and `l/`, pictures of equal names, captions beside;  |
|                         | `good/` and `bad/` of any names: single images, or pairs where all names are the same   |
| Parquet, or a dataset   | Pick-a-Pic's columns; `prompt`, `chosen` and `rejected`; or `image` and `label`         |
| webdataset shards, .tar | the same by what stands after a sample's name: `0001.chosen.jpg`, `0001.txt`, `.json`   |

Parquet files are read one row group at a time, so a table may be larger than memory. Nothing here imports torch, and
nothing is ever written into a source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from itertools import islice, product, zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from align.pairs.choices import CHOICES, Choice, read_choices, standing_choices
from align.pairs.rankings import IMAGES, Rankings
from align.pairs.records import RANKING, SAMPLES, Pair, Preferences, Record, Single
from align.pairs.rows import (
    ORDERED_COLUMNS,
    PAIR_COLUMNS,
    add_row,
    find_columns,
    list_idle_columns,
)
from align.pairs.tables import (
    DatasetTable,
    ParquetTable,
    load_arrow_table,
    load_hub_table,
    load_saved_table,
    load_tar_table,
)
from backbone.io.console import UserError, looks_like_prompt, notify_once, quote, quote_text
from backbone.io.files import read_json
from backbone.io.records import NAMES, is_json_list, iterate_entries, refuse_pipe, resolve_inside
from backbone.io.run_folder import LEFT_BEHIND, RECORD, is_prepared
from backbone.media.sources.columns import find_column
from backbone.media.sources.names import find_in_list, list_visible
from backbone.media.sources.pictures import describe_unused, list_by_name, read_image_list
from backbone.media.sources.record import DatasetRow, ImageRecord
from backbone.media.sources.splits import drop_evaluation_splits
from backbone.media.sources.stream import ITEMS, Stream
from backbone.media.sources.tables import could_be_dataset, find_tables

SPREADSHEETS = (".csv", ".tsv")
# Columns that identify a row's origin
OF_ORIGIN = re.compile(
    r"(^|_)(u?ids?|url|key|model|created_at|date|time|timestamp|source|index|seed|level)(_|\d|$)|^num_",
    re.IGNORECASE,
)
PAIRED_FOLDERS = (
    *(("chosen", "rejected"), ("w", "l"), ("win", "lose"), ("winner", "loser"), ("winners", "losers")),
    *(("preferred", "rejected"), ("accepted", "rejected"), ("better", "worse")),
)
JUDGED_FOLDERS = (
    *(("good", "bad"), ("desirable", "undesirable"), ("like", "dislike"), ("liked", "disliked")),
    *(("likes", "dislikes"), ("positive", "negative")),
)
TABLES: dict[str, Callable[[Sequence[Path]], ParquetTable | DatasetTable]] = {
    ".parquet": ParquetTable,
    ".arrow": load_arrow_table,
    ".tar": load_tar_table,
}


def read_preferences(
    source: str | Path, *, user: str | None = None, limit: int | None = None, split: str | None = None
) -> Preferences:
    """Read the preferences of a source: those of one `user`, or of the first `limit` rows; `split` is that of a dataset
    on the hub (train).

    Images are not opened; `check_preferences` does that. Raises `UserError` for a source that is missing or of no
    known layout.
    """
    path = Path(source).expanduser()
    if split is not None and path.exists():
        raise UserError(f"--split has no effect: {path} is no dataset on the hub. Leave it out.")
    if path.is_dir():
        preferences = _read_folder(path, limit)
    elif path.is_file():
        preferences = _read_file(path, limit)
    elif could_be_dataset(str(source)):
        preferences = _read_table(load_hub_table(str(source), split or "train", limit), str(source), limit)
    else:
        refuse_pipe(path)
        if looks_like_prompt(str(source)):
            raise UserError(
                f"Pairs are wanted, and “{source}” reads as a prompt. Draw its images first: align sample --prompts "
                f"{quote_text(str(source))} --out FOLDER"
            )
        raise UserError(
            f"{path} does not exist. Give pairs: a folder, a .jsonl, .parquet, .arrow or .tar file, or a dataset."
        )
    if user is not None:
        _keep_user(preferences, user)
    say_idle_columns(list(preferences.columns), preferences.source)
    return preferences


def say_idle_columns(names: Sequence[str], source: str) -> None:
    """Print which columns of preferences are not read, except those that identify rows' origin."""
    idle = [name for name in names if not OF_ORIGIN.search(name)]
    if idle:
        others = f" and {len(idle) - 6} more" if idle[6:] else ""
        notify_once(f"Not used from {source}: {', '.join(idle[:6])}{others}. Every choice counts the same.")


def _keep_user(preferences: Preferences, user: str) -> None:
    users = sorted({record.user for record in preferences.records if record.user})
    if user not in users:
        available = f"It has {', '.join(users[:10])}" if users else "It names no users"
        raise UserError(f"{preferences.source} has no choices by {user}. {available}.")
    preferences.pairs = [pair for pair in preferences.pairs if pair.user == user]
    preferences.singles = [single for single in preferences.singles if single.user == user]


# Folders ----------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, limit: int | None) -> Preferences:
    if is_prepared(folder):
        raise UserError(
            f"{folder} is prepared for training and holds no images. Name what it was prepared from, or align train it."
        )
    if (folder / SAMPLES).is_file():
        return _read_samples_folder(folder, limit)
    folders = {path.name.lower(): path.name for path in folder.iterdir() if path.is_dir()}
    for better, worse in PAIRED_FOLDERS:
        if better in folders and worse in folders:
            return _read_two_folders(folder, folders[better], folders[worse], limit)
    for good, bad in JUDGED_FOLDERS:
        if good in folders and bad in folders:
            return _read_judged_folders(folder, folders[good], folders[bad], limit)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _read_table(load_saved_table(folder), str(folder), limit)
    for parent, suffix in product((folder, folder / "data"), TABLES):  # in data/ as on the hub
        if tables := find_tables(parent, suffix):
            return _read_table(TABLES[suffix](tables), str(folder), limit)
    of_a_run = LEFT_BEHIND if (folder / RECORD).is_file() else ()
    lines = (
        sorted(path for path in folder.glob("[!.]*.jsonl") if path.name not in of_a_run)
        or [path for path in sorted(folder.glob("[!.]*.json")) if is_json_list(path)]
        or [path for path in sorted(folder.iterdir()) if path.suffix.lower() in SPREADSHEETS]
    )
    if len(lines := drop_evaluation_splits(lines, folder)) == 1:
        _say_of_other_lists(folder, lines[0])
        return _read_lines(lines[0], limit)
    if below := sorted(name for name in folders.values() if _may_hold_pairs(folder / name)):
        listed = ", ".join(f"{name}/" for name in below[:5])
        raise UserError(
            f"{folder} holds no pairs, but folders in which some may be: {listed}. Name one of these."
        )
    raise UserError(
        f"{folder} holds no pairs: neither samples.json, nor chosen/ and rejected/, good/ and bad/, one .jsonl, .json "
        "list or .csv, .parquet, .arrow or .tar files. Make some with `align sample`."
    )


def _may_hold_pairs(folder: Path) -> bool:
    """Whether a folder that is no run has a list or table in it, or two folders with the names of pairs' folders."""
    if (folder / RECORD).is_file():
        return False
    inside = list_visible(folder)
    folders = {path.name.lower() for path in inside if path.is_dir()}
    has_two_folders = any({*both} <= folders for both in (*PAIRED_FOLDERS, *JUDGED_FOLDERS))
    endings = {".jsonl", *SPREADSHEETS, *TABLES}
    return (
        has_two_folders
        or SAMPLES in {path.name for path in inside}
        or any(path.suffix.lower() in endings for path in inside)
    )


def _say_of_other_lists(folder: Path, used: Path | None) -> None:
    """Print which lists of a folder are not read."""
    endings = (".jsonl", ".json", *SPREADSHEETS)
    names = [path.name for path in list_visible(folder) if path.suffix.lower() in endings and path != used]
    if names:
        notify_once(f"Not used in {folder}: {', '.join(names[:6])}{' …' if names[6:] else ''}.")


def _read_samples_folder(folder: Path, limit: int | None) -> Preferences:
    present = [folder / name for name in (CHOICES, RANKING) if (folder / name).is_file()]
    if len(present) > 1:
        raise UserError(
            f"{folder} holds choices and a ranking. Name the one to learn from: {present[0]} or {present[1]}."
        )
    if not present:
        raise UserError(
            f"{folder} holds pictures and no preferences yet. Run `align label {quote(folder)}` or `align rank "
            f"{quote(folder)}`."
        )
    return _read_lines(present[0], limit)


def _read_two_folders(folder: Path, better: str, worse: str, limit: int | None) -> Preferences:
    preferences = Preferences(str(folder))
    first, second = _list_both(folder, better, worse)
    for stem, winner in list(first.items())[:limit]:
        if stem not in second:
            preferences.problems.append(f"{winner.path} has no picture of that name in {worse}/")
            continue
        loser = second[stem]
        if winner.caption and loser.caption and winner.caption != loser.caption:
            preferences.problems.append(
                f"{better}/{stem} says “{winner.caption}” and {worse}/{stem} “{loser.caption}”, "
                "and a pair has one prompt"
            )
            continue
        preferences.pairs.append(
            Pair(
                winner.caption or loser.caption or "",
                winner,
                loser,
                1.0,
                str(winner.path.relative_to(folder)),
            )
        )
    if limit is None:
        preferences.problems += [
            f"{second[stem].path} has no picture of that name in {better}/"
            for stem in second
            if stem not in first
        ]
    return preferences


def _list_both(
    folder: Path, better: str, worse: str
) -> tuple[dict[str, ImageRecord], dict[str, ImageRecord]]:
    """The images of two folders by their names; prints which other files are there."""
    first, second = (list_by_name(folder / side) for side in (better, worse))
    _say_of_other_lists(folder, None)
    for side, records in ((better, first), (worse, second)):
        for sentence in describe_unused(folder / side, list(records.values())):
            notify_once(sentence)
    return first, second


def _read_judged_folders(folder: Path, good: str, bad: str, limit: int | None) -> Preferences:
    """Good images in one folder and bad ones in another: pairs if names and captions are equal, else single images.

    For a loss of single images both are equivalent.
    """
    first, second = _list_both(folder, good, bad)
    captions = [{name: image.caption or "" for name, image in side.items()} for side in (first, second)]
    if captions[0] == captions[1]:
        return _read_two_folders(folder, good, bad, limit)
    turns = zip_longest(first.values(), second.values())  # so that a limit takes equally many of both
    labelled = [
        (image, is_good)
        for turn in turns
        for image, is_good in zip(turn, (True, False), strict=True)
        if image
    ]
    singles = [
        Single(image.caption or "", image, is_good, str(image.path.relative_to(folder)))
        for image, is_good in labelled[:limit]
    ]
    return Preferences(str(folder), singles=singles)


# Files of lines ---------------------------------------------------------------------------------------------


def _read_file(path: Path, limit: int | None) -> Preferences:
    match path.suffix.lower():
        case ".jsonl" | ".json" | ".csv" | ".tsv":
            return _read_lines(path, limit)
        case suffix if suffix in TABLES:
            return _read_table(TABLES[suffix]([path]), str(path), limit)
    raise UserError(
        f"{path} is a {path.suffix or 'file without an ending'}; pairs are a folder, .jsonl, .json, .csv, .parquet, "
        ".arrow or .tar."
    )


def _read_lines(path: Path, limit: int | None) -> Preferences:
    preferences = Preferences(str(path), provenance=_read_provenance(path.parent))
    if path.name == CHOICES:
        choices = standing_choices(read_choices(path))
        for choice in [choice for choice in choices if not choice.repeat][:limit]:
            _add_choice(preferences, choice, path.parent)
        return preferences
    rankings = Rankings()
    for location, entry in islice(_iterate_objects(path, preferences), limit):
        add_row(
            preferences, rankings, entry, location, partial(_find_picture, listed=path, location=location)
        )
    rankings.add_to(preferences)
    if path.name == RANKING:  # its margins are informational
        preferences.columns.clear()
    return preferences


def _iterate_objects(path: Path, preferences: Preferences) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the JSON objects or rows of a file, with their location; invalid ones become problems."""
    if path.suffix.lower() in SPREADSHEETS:
        for location, row in read_image_list(path):
            cells = {
                find_column(name).lower(): cell.strip() for name, cell in row.items() if isinstance(cell, str)
            }
            yield location[0].lower() + location[1:], {name: cell for name, cell in cells.items() if cell}
        return
    refuse_pipe(path)
    for location, value in iterate_entries(path.read_bytes(), path):
        location = location[0].lower() + location[1:]
        if isinstance(value, UserError):
            problem = str(value).removesuffix(". Repair or delete it.")
            preferences.problems.append(problem[0].lower() + problem[1:])
        elif isinstance(value, dict):
            yield location, {find_column(name).lower(): cell for name, cell in value.items()}
        else:
            preferences.problems.append(f"{location} is not a JSON object")


def _find_picture(value: Any, *, listed: Path, location: str) -> ImageRecord | None:
    """The picture of this name next to the list, or in the folder named like the list (HPDv2's `train/`).

    Raises `UserError` for one outside of the folder, and for a value that is no name.
    """
    if isinstance(value, (list, dict)):
        raise UserError(f"{location} has {NAMES[type(value)]} where the name of one image belongs")
    if not isinstance(value, str) or not value:
        return None
    path = find_in_list(listed, value, location)
    below = listed.parent / listed.stem / path.relative_to(listed.parent)
    return ImageRecord(below if not path.exists() and below.exists() else path)


def _add_choice(preferences: Preferences, choice: Choice, folder: Path) -> None:
    if choice.verdict == "skip":
        preferences.skipped += 1
        return
    label = {"left": 1.0, "right": 0.0}.get(choice.verdict, 0.5)
    preferences.pairs.append(
        Pair(
            choice.prompt,
            ImageRecord(resolve_inside(folder, choice.left, folder / CHOICES)),
            ImageRecord(resolve_inside(folder, choice.right, folder / CHOICES)),
            label,
            f"choice {choice.number} of {folder / CHOICES}",
            choice.user,
            choice.verdict == "both_bad",
        )
    )


def _read_provenance(folder: Path) -> dict[str, Any]:
    """The model that sampled a folder's images, from `samples.json`; {} without one."""
    path = folder / SAMPLES
    return read_json(path) if path.is_file() else {}


# Tables -----------------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """One of the images of a row's list."""

    column: str
    number: int
    of: int


def _point_to_images(
    row: Mapping[str, Any], pictures: Set[str], ranking: tuple[str, str] | None, classes: Sequence[str]
) -> dict[str, Any]:
    """The row with references in place of images: the column, and for lists the item.

    A list that is not in the row has as many items as the row has ranks. A `label` that is the number of one of
    `classes` becomes its name.
    """
    pointed: dict[str, Any] = {**row, **{name: name for name in pictures}}
    if classes and isinstance(number := row.get("label"), int):
        pointed["label"] = classes[number] if 0 <= number < len(classes) else None
    if ranking is not None and ranking[0] in pictures and isinstance(row.get(ranking[1]), list):
        stored = row.get(ranking[0])
        count = len(stored if isinstance(stored, list) else row[ranking[1]])
        pointed[ranking[0]] = [Item(ranking[0], number, count) for number in range(count)]
    return pointed


def _read_table(table: ParquetTable | DatasetTable, source: str, limit: int | None) -> Preferences:
    names = table.column_names
    embedded = [name for name in IMAGES if name in names and not table.names_files(name)]
    ranking, pictures = find_columns(names, embedded, source)
    if table.fetched and any(table.names_files(name) for name in pictures):
        raise UserError(
            f"{source} names its images and does not hold them. Download it, and give its folder."
        )
    pictures = {name for name in pictures if not table.names_files(name)}
    preferences, rankings = Preferences(source), Rankings()
    others = set(IMAGES) - {ranking[0]} if ranking is not None and ranking[0] in pictures else set()
    other_columns = [name for name in names if name not in pictures and name not in others]
    classes = table.class_names("label")
    for index, row in enumerate(table.values(other_columns)):
        if limit is not None and index >= limit:
            break
        location = f"row {index} of {source}"

        def picture_at(cell: Any, index: int = index, location: str = location) -> ImageRecord | None:
            if isinstance(cell, Item):
                column, name, item = cell.column, f"{cell.column}-{cell.number}", (cell.number, cell.of)
            elif cell in pictures:
                column, name, item = cell, cell, None
            else:
                return _find_picture(cell, listed=table.folder / table.name, location=location)
            row = DatasetRow(table, column, index, table.folder, table.fetched, item)
            return ImageRecord(Path(source) / f"{index:06d}-{name}", row=row)

        add_row(
            preferences, rankings, _point_to_images(row, pictures, ranking, classes), location, picture_at
        )
    rankings.add_to(preferences)
    return preferences


@dataclass(frozen=True)
class PairStream:
    """The preferences of a dataset that is streamed, of one `user` or of all."""

    stream: Stream
    pictures: Set[str]
    ranking: tuple[str, str] | None
    user: str | None

    @property
    def per_row(self) -> int:
        """The largest number of records of a row."""
        return 1 if self.ranking is None else ITEMS

    def read(self, row: Mapping[str, Any], shard: int, number: int) -> list[Record | str]:
        """A row's records, or its problem; empty for a row without a label or of another user."""

        def to_picture(column: Any) -> ImageRecord:
            if isinstance(column, Item):
                return self.stream.picture(row, column.column, shard, number, column.number)
            return self.stream.picture(row, str(column), shard, number)

        location, preferences = self.stream.describe_row(shard, number), Preferences(self.stream.source)
        if self.ranking is not None:
            row = {
                name: value for name, value in row.items() if name not in IMAGES or name == self.ranking[0]
            }
        pointed = _point_to_images(row, self.pictures, self.ranking, self.stream.classes.get("label", ()))
        add_row(preferences, Rankings(), pointed, location, to_picture)
        if len(preferences.records) > ITEMS:
            return [f"{location} ranks so many images that {len(preferences.pairs)} pairs are made of them"]
        of_user = [record for record in preferences.records if self.user is None or record.user == self.user]
        return [*preferences.problems, *of_user]

    def refuse_none(self, count: int) -> None:
        """`UserError` if there are no records of the requested user."""
        if self.user is not None and not count:
            raise UserError(f"{self.stream.source} has no choices by {self.user}. Ask for another --user.")


def stream_preferences(stream: Stream, *, user: str | None = None) -> PairStream:
    """The preferences of a stream. `UserError` where its columns are no pairs', or name their images."""
    names = stream.column_names
    embedded = [name for name in IMAGES if name in names and name not in stream.names_files]
    ranking, pictures = find_columns(names, embedded, stream.source)
    layouts = (*PAIR_COLUMNS, *ORDERED_COLUMNS, ("image",))
    used = next((columns for columns in layouts if pictures >= {*columns}), tuple(pictures))
    stream.refuse_names(used)
    say_idle_columns(list_idle_columns(dict.fromkeys(names, " ")), stream.source)
    if ranking is not None and ranking[0] not in stream.lists:
        raise UserError(
            f"{stream.source} has a row for each image of a prompt, and a stream is read row by row. Download it, and "
            "give its folder."
        )
    return PairStream(stream, pictures, ranking, user)
