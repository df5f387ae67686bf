"""Preferences from the user's disk: one record, many doors, all bad records reported together.

| door                    | what it looks like                                                                     |
|-------------------------|----------------------------------------------------------------------------------------|
| a folder of `align`     | `samples.json`, with `choices.jsonl` (`align label`) or `ranking.jsonl` (`align rank`)  |
| a JSON-lines file       | `prompt` with `chosen` and `rejected`, with `image_0`, `image_1` and `label_0`, or with |
|                         | `image` and `label`; names of pictures are relative to the file                         |
| two folders             | `chosen/` and `rejected/`, or `w/` and `l/`, pictures of equal names, captions beside   |
| Parquet, or a dataset   | Pick-a-Pic's columns; `prompt`, `chosen` and `rejected`; or `image` and `label`         |

Parquet files are read a row group at a time, so that a table larger than the memory can be walked. Nothing here
imports torch, and nothing is ever written into a source.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from align.choices import CHOICES, Choice, effective, read_choices
from backbone.console import UserError
from backbone.files import content_hash, read_json
from backbone.images import BadPicture, Picture, Row, read_folder

SAMPLES = "samples.json"
RANKING = "ranking.jsonl"
SCORES = "scores.json"
PROMPT_COLUMNS = ("prompt", "caption", "text")
FOLDER_PAIRS = (("chosen", "rejected"), ("w", "l"))
SHOWN_PROBLEMS = 20


@dataclass(frozen=True)
class Pair:
    """Two pictures of one prompt. `label` is the probability that the first is better: 1, 0, or ½ for a tie."""

    prompt: str
    first: Picture
    second: Picture
    label: float
    name: str  # how a message calls it: “row 12 of pairs.parquet”
    user: str = ""
    both_bad: bool = False  # a tie in which neither is wanted

    @property
    def pictures(self) -> tuple[Picture, Picture]:
        """Both."""
        return self.first, self.second

    @property
    def is_tie(self) -> bool:
        """Whether neither was preferred."""
        return self.label == 0.5

    @property
    def ordered(self) -> Pair:
        """The same pair with the better picture first; a tie as it is."""
        if self.label >= 0.5:
            return self
        return replace(self, first=self.second, second=self.first, label=1 - self.label)


@dataclass(frozen=True)
class Single:
    """One picture of a prompt that was judged by itself."""

    prompt: str
    picture: Picture
    good: bool
    name: str
    user: str = ""

    @property
    def pictures(self) -> tuple[Picture]:
        """The picture."""
        return (self.picture,)


Record: TypeAlias = Pair | Single


@dataclass
class Preferences:
    """What a source holds: records in its order, and what is wrong with it so far, a sentence each."""

    source: str
    pairs: list[Pair] = field(default_factory=list)
    singles: list[Single] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    passed_over: int = 0  # rows without a label, skipped pairs
    made_by: dict[str, Any] = field(default_factory=dict)  # what a folder of `align sample` says of its model

    @property
    def records(self) -> list[Record]:
        """Pairs, then single pictures."""
        return [*self.pairs, *self.singles]


def read(
    source: str | Path, *, user: str | None = None, limit: int | None = None, split: str = "train"
) -> Preferences:
    """The preferences of a source; `user` keeps one person's, `limit` the first so many rows.

    Opens no picture; `check` does. `UserError`: no such source, or one that no door fits.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        found = _read_folder(path, limit)
    elif path.is_file():
        found = _read_file(path, limit)
    elif re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", str(source)) and not path.parent.exists():
        found = _from_table(_hub_table(str(source), split, limit), str(source), limit)
    else:
        raise UserError(
            f"{path} does not exist. Give pairs: a folder, a .jsonl or .parquet file, or a dataset."
        )
    if user is not None:
        _keep_user(found, user)
    return found


def check(found: Preferences, *, skip_bad: bool = False) -> Preferences:
    """Opens every picture; one `UserError` lists all that is wrong, a line each.

    With `skip_bad` the bad records are left out instead, and only an empty or useless rest is an error.
    """
    problems = list(found.problems)
    good: list[Record] = []
    for record in found.records:
        reasons = list(_reasons(record))
        problems += [f"{record.name} {reason}" for reason in reasons]
        if not reasons:
            good.append(record)
    kept = replace(
        found,
        pairs=[record for record in good if isinstance(record, Pair)],
        singles=[record for record in good if isinstance(record, Single)],
        problems=problems,
    )
    whole = list(_reasons_for_all(kept))
    if whole or (problems and not skip_bad):
        raise UserError(_listing(found, problems, whole))
    return kept


def refuse_another_model(found: Preferences, model: str, fingerprint: str) -> None:
    """`UserError` when a pairs folder was drawn by other weights than those that are to be trained."""
    made = found.made_by.get("fingerprint")
    if made is not None and made != fingerprint:
        raise UserError(
            f"{found.source} was drawn by {found.made_by.get('model')} with other weights than {model} has. Train "
            "that model, or pass --any-model to learn from another model's pictures."
        )


def held_out(records: Sequence[Record], *, share: float, seed: int) -> tuple[list[Record], list[Record]]:
    """(training, held-out) records; no prompt is in both. About `share` of the prompts are held out.

    A prompt's side depends on its words and the seed alone, so more records of other prompts do not move it. At
    least one prompt is held out where there are two and the share is not 0.
    """
    prompts = {normal(record.prompt) for record in records}
    drawn = {prompt: int(content_hash(f"{seed}/{prompt}".encode())[:13], 16) / 16**13 for prompt in prompts}
    out = {prompt for prompt, number in drawn.items() if number < share}
    if share and len(prompts) > 1:
        if not out:
            out = {min(drawn, key=lambda prompt: drawn[prompt])}
        if len(out) == len(prompts):
            out -= {max(drawn, key=lambda prompt: drawn[prompt])}
    elif len(prompts) < 2:
        out = set()
    return (
        [record for record in records if normal(record.prompt) not in out],
        [record for record in records if normal(record.prompt) in out],
    )


def as_singles(found: Preferences) -> list[Single]:
    """The same as judged single pictures: winners good, losers bad, both of a “both bad” bad; ties say nothing."""
    singles = list(found.singles)
    for pair in found.pairs:
        if pair.is_tie and not pair.both_bad:
            continue
        better = pair.ordered
        singles += [
            Single(pair.prompt, better.first, not pair.both_bad, pair.name, pair.user),
            Single(pair.prompt, better.second, False, pair.name, pair.user),
        ]
    return singles


def normal(prompt: str) -> str:
    """A prompt without what does not make it another one: case, spaces, a full stop at the end."""
    return " ".join(prompt.lower().split()).rstrip(" .")


# What can be wrong ------------------------------------------------------------------------------------------


def _reasons(record: Record) -> Iterator[str]:
    if not record.prompt.strip():
        yield "has no prompt"
    sizes = []
    for picture in record.pictures:
        try:
            sizes.append(picture.open(at_least=64).size)
        except BadPicture as error:
            yield f"names a picture that {error.reason} ({error.name})"
        except OSError as error:
            yield f"names a picture that cannot be read ({error})"
        except UserError as error:
            yield f"has no usable picture ({error})"
    if len(sizes) == 2 and not _same_shape(*sizes):
        (width, height), (other_width, other_height) = sizes
        yield f"has pictures of different sizes, {width} × {height} and {other_width} × {other_height}"
    if isinstance(record, Pair) and len(sizes) == 2 and record.first.path == record.second.path:
        yield "has the same picture twice"


def _same_shape(one: tuple[int, int], other: tuple[int, int]) -> bool:
    """Whether two sizes are one, up to what a decoder rounds when it opens a JPEG reduced."""
    return all(abs(a - b) <= 1 for a, b in zip(one, other, strict=True))


def _reasons_for_all(found: Preferences) -> Iterator[str]:
    if not found.records:
        waiting = f" ({found.passed_over} are not labelled yet)" if found.passed_over else ""
        yield f"{found.source} holds no usable pair{waiting}. Choose with `align label`, or rank with `align rank`."
    elif found.pairs and not found.singles and all(pair.is_tie for pair in found.pairs):
        yield f"All {len(found.pairs)} pairs of {found.source} are ties, so nothing is preferred. Choose in some."
    elif found.singles and not found.pairs and len({single.good for single in found.singles}) == 1:
        said, other = ("good", "bad") if found.singles[0].good else ("bad", "good")
        yield f"Every picture of {found.source} is labelled {said}, so nothing is preferred. Label some {other}."


def _listing(found: Preferences, problems: Sequence[str], whole: Sequence[str]) -> str:
    if not problems:
        return "\n".join(whole)
    count = len(found.records)
    shown = [f"  {problem}" for problem in problems[:SHOWN_PROBLEMS]]
    if len(problems) > SHOWN_PROBLEMS:
        shown.append(f"  and {len(problems) - SHOWN_PROBLEMS} more")
    much = f"{len(problems)} {_plural('problem', len(problems))} in {count} {_plural('record', count)}"
    heading = f"{found.source} has {much}:"
    remedy = "Repair or remove them, or leave them out with --skip-bad."
    return "\n".join([heading, *shown, *whole, remedy])


def _plural(noun: str, count: int) -> str:
    return noun if count == 1 else noun + "s"


def _keep_user(found: Preferences, user: str) -> None:
    users = sorted({record.user for record in found.records if record.user})
    if user not in users:
        known = f"It has {', '.join(users[:10])}" if users else "It names no users"
        raise UserError(f"{found.source} has no choices by {user}. {known}.")
    found.pairs = [pair for pair in found.pairs if pair.user == user]
    found.singles = [single for single in found.singles if single.user == user]


# Folders ----------------------------------------------------------------------------------------------------


def _read_folder(folder: Path, limit: int | None) -> Preferences:
    if (folder / SAMPLES).is_file():
        return _from_samples(folder, limit)
    for better, worse in FOLDER_PAIRS:
        if (folder / better).is_dir() and (folder / worse).is_dir():
            return _from_two_folders(folder, better, worse, limit)
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        return _from_table(_saved_table(folder), str(folder), limit)
    tables = sorted(folder.glob("*.parquet")) or sorted(folder.glob("data/*.parquet"))
    if tables:
        return _from_table(ParquetTable(tables), str(folder), limit)
    lines = sorted(folder.glob("*.jsonl"))
    if len(lines) == 1:
        return _from_lines(lines[0], limit)
    raise UserError(
        f"{folder} holds no pairs: neither samples.json, nor chosen/ and rejected/, w/ and l/, one .jsonl or .parquet "
        "files. Make some with `align sample`."
    )


def _from_samples(folder: Path, limit: int | None) -> Preferences:
    present = [folder / name for name in (CHOICES, RANKING) if (folder / name).is_file()]
    if len(present) > 1:
        raise UserError(
            f"{folder} holds choices and a ranking. Name the one to learn from: {present[0]} or {present[1]}."
        )
    if not present:
        raise UserError(
            f"{folder} holds pictures and no preferences yet. Run `align label {folder}` or `align rank {folder}`."
        )
    return _from_lines(present[0], limit)


def _from_two_folders(folder: Path, better: str, worse: str, limit: int | None) -> Preferences:
    found = Preferences(str(folder))
    first, second = (
        {_stem(picture): picture for picture in read_folder(folder / side)} for side in (better, worse)
    )
    for stem, winner in list(first.items())[:limit]:
        if stem not in second:
            found.problems.append(f"{winner.path} has no picture of that name in {worse}/")
            continue
        loser = second[stem]
        found.pairs.append(
            Pair(winner.caption or loser.caption or "", winner, loser, 1.0, f"{better}/{winner.path.name}")
        )
    if limit is None:
        found.problems += [
            f"{second[stem].path} has no picture of that name in {better}/"
            for stem in second
            if stem not in first
        ]
    return found


def _stem(picture: Picture) -> str:
    return picture.path.stem


# Files of lines ---------------------------------------------------------------------------------------------


def _read_file(path: Path, limit: int | None) -> Preferences:
    match path.suffix.lower():
        case ".jsonl":
            return _from_lines(path, limit)
        case ".parquet":
            return _from_table(ParquetTable([path]), str(path), limit)
    raise UserError(
        f"{path} is a {path.suffix or 'file without an ending'}; pairs are a folder, .jsonl or .parquet."
    )


def _from_lines(path: Path, limit: int | None) -> Preferences:
    found = Preferences(str(path), made_by=_made_by(path.parent))
    if path.name == CHOICES:
        choices = effective(read_choices(path))
        for choice in [choice for choice in choices if not choice.repeat][:limit]:
            _add_choice(found, choice, path.parent)
        return found
    for number, line in enumerate(_objects(path, found), start=1):
        if limit is not None and number > limit:
            break
        _add_row(found, line, f"line {number} of {path}", lambda value: _picture_at(value, path.parent))
    return found


def _objects(path: Path, found: Preferences) -> Iterator[dict[str, Any]]:
    import json

    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (json.JSONDecodeError, UnicodeDecodeError):
            found.problems.append(f"line {number} of {path} is not JSON")
            continue
        if isinstance(value, dict):
            yield value
        else:
            found.problems.append(f"line {number} of {path} is not a JSON object")


def _picture_at(value: Any, folder: Path) -> Picture | None:
    if not isinstance(value, str) or not value:
        return None
    return Picture(folder / value.replace("\\", "/"))


def _add_choice(found: Preferences, choice: Choice, folder: Path) -> None:
    if choice.verdict == "skip":
        found.passed_over += 1
        return
    label = {"left": 1.0, "right": 0.0}.get(choice.verdict, 0.5)
    found.pairs.append(
        Pair(
            choice.prompt,
            Picture(folder / choice.left),
            Picture(folder / choice.right),
            label,
            f"choice {choice.number} of {folder / CHOICES}",
            choice.user,
            choice.verdict == "both_bad",
        )
    )


def _made_by(folder: Path) -> dict[str, Any]:
    path = folder / SAMPLES
    if not path.is_file():
        return {}
    said = read_json(path)
    return said if isinstance(said, dict) else {}


# Tables -----------------------------------------------------------------------------------------------------


class ParquetTable:
    """Rows of local Parquet files; `table[i][column]` reads only that column of that row's group."""

    def __init__(self, files: Sequence[Path]) -> None:
        import pyarrow
        import pyarrow.parquet

        try:
            self.files = [pyarrow.parquet.ParquetFile(file) for file in files]
        except (pyarrow.ArrowInvalid, pyarrow.ArrowIOError) as error:
            raise UserError(f"{files[0]} is not a readable Parquet file ({error}). Save it again.") from error
        self.column_names: list[str] = list(self.files[0].schema_arrow.names)
        self.groups = [
            (file, group, file.metadata.row_group(group).num_rows)
            for file in self.files
            for group in range(file.metadata.num_row_groups)
        ]
        self._kept: dict[str, tuple[int, Any]] = {}

    def __len__(self) -> int:
        return sum(rows for _, _, rows in self.groups)

    def values(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every row with these columns alone, in order."""
        for file, group, _ in self.groups:
            yield from file.read_row_group(group, columns=list(columns)).to_pylist()

    def __getitem__(self, index: int) -> _TableRow:
        return _TableRow(self, index)

    def cell(self, index: int, column: str) -> Any:
        """One value; the row group's column is kept for its neighbours."""
        row = index
        for number, (file, group, rows) in enumerate(self.groups):
            if row < rows:
                if self._kept.get(column, (-1, None))[0] != number:
                    self._kept[column] = (number, file.read_row_group(group, columns=[column]).column(column))
                return self._kept[column][1][row].as_py()
            row -= rows
        raise IndexError(index)


@dataclass(frozen=True)
class _TableRow:
    table: ParquetTable
    index: int

    def __getitem__(self, column: str) -> Any:
        return self.table.cell(self.index, column)


class DatasetTable:
    """The same over a table of `datasets`, pictures left encoded."""

    def __init__(self, table: Any) -> None:
        import datasets

        for name, kind in table.features.items():
            if isinstance(kind, datasets.Image):
                table = table.cast_column(name, datasets.Image(decode=False))
        self.table = table
        self.column_names: list[str] = list(table.column_names)

    def __len__(self) -> int:
        return len(self.table)

    def values(self, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Every row with these columns alone, in order."""
        yield from self.table.select_columns(list(columns))

    def __getitem__(self, index: int) -> Any:
        return self.table[index]


def _saved_table(folder: Path) -> DatasetTable:
    import datasets

    try:
        table = datasets.load_from_disk(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{folder} is not a whole saved dataset ({error}). Save it again.") from error
    return DatasetTable(table["train"] if isinstance(table, dict) else table)


def _hub_table(source: str, split: str, limit: int | None) -> DatasetTable:
    """A dataset of the hub; with a limit only its first rows are fetched."""
    import datasets

    try:
        if limit is None:
            return DatasetTable(datasets.load_dataset(source, split=split))
        rows = datasets.load_dataset(source, split=split, streaming=True).take(limit)
        return DatasetTable(datasets.Dataset.from_list(list(rows), features=rows.features))
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source} is nothing here, and no dataset of that name was loaded ({first}). Check the spelling, or give "
            "a folder, a .jsonl or a .parquet file."
        ) from error


def _from_table(table: ParquetTable | DatasetTable, source: str, limit: int | None) -> Preferences:
    names = table.column_names
    heavy = {"jpg_0", "jpg_1", "chosen", "rejected", "image", "image_0", "image_1"}
    pictures = {name for name in names if name in heavy}
    has_prompt = any(name in names for name in PROMPT_COLUMNS)
    complete = (
        {"jpg_0", "jpg_1", "label_0"},
        {"image_0", "image_1", "label_0"},
        {"chosen", "rejected"},
        {"image", "label"},
    )
    if not has_prompt or not any(needed <= set(names) for needed in complete):
        raise UserError(
            f"{source} has the columns {', '.join(names)}. Pairs need caption with jpg_0, jpg_1, label_0 (Pick-a-Pic), "
            "prompt with chosen and rejected, or prompt with image and label."
        )
    found = Preferences(source)
    light = [name for name in names if name not in pictures]
    for index, row in enumerate(table.values(light)):
        if limit is not None and index >= limit:
            break
        where = f"row {index} of {source}"

        def at(column: Any, index: int = index) -> Picture:
            return Picture(Path(source) / f"{index:06d}-{column}", row=Row(table, str(column), index))

        _add_row(found, {**row, **{name: name for name in pictures}}, where, at)
    return found


# A row of any of them ---------------------------------------------------------------------------------------


def _add_row(
    found: Preferences, row: Mapping[str, Any], where: str, picture: Callable[[Any], Picture | None]
) -> None:
    """Reads one row; `picture` turns what stands in a picture's column into a `Picture`."""
    prompt = next((row[name] for name in PROMPT_COLUMNS if isinstance(row.get(name), str)), "")
    prompt = " ".join(prompt.split())
    user = str(row.get("user_id") if row.get("user_id") is not None else row.get("user") or "")
    if row.get("has_label") is False or row.get("are_different") is False:
        found.passed_over += 1
        return
    pair_names = next(
        (
            names
            for names in (("jpg_0", "jpg_1"), ("image_0", "image_1"))
            if names[0] in row and names[1] in row
        ),
        None,
    )
    if pair_names is not None:
        label = _pair_label(row)
        pictures = [picture(row[name]) for name in pair_names]
        if label is None:
            said = f"label_0 = {row.get('label_0')}, label_1 = {row.get('label_1')}"
            found.problems.append(f"{where} has labels that are no choice ({said})")
        elif pictures[0] is None or pictures[1] is None:
            found.problems.append(f"{where} names no picture")
        else:
            found.pairs.append(Pair(prompt, pictures[0], pictures[1], label, where, user))
        return
    if "chosen" in row and "rejected" in row:
        better, worse = picture(row["chosen"]), picture(row["rejected"])
        if better is None or worse is None:
            found.problems.append(f"{where} names no picture")
        else:
            label = 0.5 if row.get("tie") is True else 1.0
            found.pairs.append(Pair(prompt, better, worse, label, where, user))
        return
    name = next((name for name in ("image", "file_name") if name in row), None)
    good = _single_label(row.get("label"))
    one = picture(row[name]) if name else None
    if one is None:
        found.problems.append(f"{where} names no picture")
    elif good is None:
        found.problems.append(f"{where} has the label {row.get('label')!r}, which is neither good nor bad")
    else:
        found.singles.append(Single(prompt, one, good, where, user))


def _pair_label(row: Mapping[str, Any]) -> float | None:
    """label_0 of a row, None where the two labels are no choice and no tie."""
    first, second = row.get("label_0"), row.get("label_1")
    if not isinstance(first, (int, float)) or first not in (0, 0.5, 1):
        return None
    if second is not None and (not isinstance(second, (int, float)) or first + second != 1):
        return None
    return float(first)


def _single_label(label: Any) -> bool | None:
    if isinstance(label, str):
        return {"good": True, "bad": False, "1": True, "0": False}.get(label.strip().lower())
    known = {1.0: True, 0.0: False, -1.0: False}
    return known.get(float(label)) if isinstance(label, (bool, int, float)) else None


def pair_key(pair: Pair) -> str:
    """A pair by its contents: prompt and both pictures, in their order."""
    parts = [pair.prompt, *(content_hash(picture.read()) for picture in pair.pictures)]
    return content_hash("\n".join(parts).encode())


def counted(records: Iterable[Record]) -> str:
    """“120 pairs (4 ties) of 40 prompts”, for people."""
    records = list(records)
    pairs = [record for record in records if isinstance(record, Pair)]
    ties = sum(pair.is_tie for pair in pairs)
    singles = len(records) - len(pairs)
    said = []
    if pairs:
        said.append(
            f"{len(pairs)} {_plural('pair', len(pairs))}"
            + (f" ({ties} {_plural('tie', ties)})" if ties else "")
        )
    if singles:
        said.append(f"{singles} judged {_plural('picture', singles)}")
    prompts = len({normal(record.prompt) for record in records})
    return f"{' and '.join(said) or 'nothing'} of {prompts} {_plural('prompt', prompts)}"
