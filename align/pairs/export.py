"""Export preferences: Parquet with Pick-a-Pic's columns, or JSON lines with the images beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from align.pairs.records import Pair, Preferences, Record, normalize_prompt
from backbone.io.console import UserError
from backbone.io.files import atomic_write, content_hash, write_bytes, write_text
from backbone.media.sources.record import ImageRecord

ROWS_PER_GROUP = 100  # images of one row group are in memory at once


def write_parquet(preferences: Preferences, path: Path) -> Path:
    """Write pairs with exactly Pick-a-Pic's columns, images as they are encoded, ties as ½; returns `path`.

    Users that are no 64-bit integers make `user_id` a column of text, and pairs whose images are both bad add a column
    `both_bad`, since Pick-a-Pic can express neither. Single labelled images have no columns there: raises `UserError`
    where there are no pairs.
    """
    import pyarrow
    import pyarrow.parquet

    if not preferences.pairs:
        raise UserError(
            f"{preferences.source} holds no pairs, and Pick-a-Pic's columns are of pairs. Export to .jsonl."
        )
    binary, text, real, integer = pyarrow.binary(), pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    types = {
        "are_different": pyarrow.bool_(), "best_image_uid": text, "caption": text,
        "created_at": pyarrow.timestamp("ns"), "has_label": pyarrow.bool_(), "image_0_uid": text, "image_0_url": text,
        "image_1_uid": text, "image_1_url": text, "jpg_0": binary, "jpg_1": binary, "label_0": real, "label_1": real,
        "model_0": text, "model_1": text, "ranking_id": integer, "user_id": integer, "num_example_per_prompt": integer,
        "__index_level_0__": integer,
    }  # fmt: skip
    if not _are_whole_numbers(preferences):
        types["user_id"] = text
    if any(pair.both_bad for pair in preferences.pairs):
        types["both_bad"] = pyarrow.bool_()
    schema = pyarrow.schema(types)
    with atomic_write(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        for group in _iterate_row_groups(preferences):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    return path


def write_jsonl(preferences: Preferences, path: Path) -> Path:
    """Write a JSON line per record, and the images into `NAME-pictures/` beside it; returns `path`."""
    import json

    folder = path.with_name(f"{path.stem}-pictures")
    lines = []
    for record in preferences.records:
        names = [_store_image(picture, folder) for picture in record.pictures]
        lines.append(json.dumps(_describe_record(record, names), ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    return path


def _iterate_row_groups(preferences: Preferences) -> Iterator[list[dict[str, Any]]]:
    """Yield Pick-a-Pic rows in groups of `ROWS_PER_GROUP`, so that few images are in memory at once."""
    counts = Counter(normalize_prompt(pair.prompt) for pair in preferences.pairs)
    created = datetime.now(UTC).replace(tzinfo=None)
    model = str(preferences.provenance.get("model", ""))
    numeric_users = _are_whole_numbers(preferences)
    for first in range(0, len(preferences.pairs), ROWS_PER_GROUP):
        group = []
        for index, pair in enumerate(preferences.pairs[first : first + ROWS_PER_GROUP], start=first):
            stored = [picture.read() for picture in pair.pictures]
            uids = [_make_image_uid(content) for content in stored]
            best = "tie" if pair.is_tie else uids[0 if pair.label > 0.5 else 1]
            group.append(
                {
                    "are_different": True,
                    "best_image_uid": best,
                    "caption": pair.prompt,
                    "created_at": created,
                    "has_label": True,
                    "image_0_uid": uids[0],
                    "image_0_url": "",
                    "image_1_uid": uids[1],
                    "image_1_url": "",
                    "jpg_0": stored[0],
                    "jpg_1": stored[1],
                    "label_0": pair.label,
                    "label_1": 1 - pair.label,
                    "model_0": model,
                    "model_1": model,
                    "ranking_id": index,
                    "user_id": (int(pair.user) if numeric_users else pair.user) if pair.user else None,
                    "both_bad": pair.both_bad,
                    "num_example_per_prompt": counts[normalize_prompt(pair.prompt)],
                    "__index_level_0__": index,
                }
            )
        yield group


def _are_whole_numbers(preferences: Preferences) -> bool:
    """Whether every named user is a 64-bit integer in its canonical form."""
    users = {pair.user for pair in preferences.pairs if pair.user}
    numbers = [user for user in users if len(user) < 20 and user.isdecimal()]
    return len(numbers) == len(users) and all(
        str(int(user)) == user and int(user) < 2**63 for user in numbers
    )


def _make_image_uid(content: bytes) -> str:
    """Pick-a-Pic's image id (a UUID), from the hash of the encoded image."""
    digest = content_hash(content)
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))


def _describe_record(record: Record, names: list[str]) -> dict[str, Any]:
    """One JSON line of a record whose images are stored under `names`."""
    if isinstance(record, Pair):
        pictures: dict[str, Any] = {"image_0": names[0], "image_1": names[1]}
        pictures |= {"label_0": record.label, "label_1": 1 - record.label}
        pictures |= {"both_bad": True} if record.both_bad else {}
    else:
        pictures = {"image": names[0], "label": int(record.good)}
    return {"prompt": record.prompt, **pictures, "user": record.user}


def _store_image(picture: ImageRecord, folder: Path) -> str:
    """Write an image under the hash of its content; returns its path relative to the JSON lines."""
    content = picture.read()
    ending = {b"\x89PNG": ".png", b"\xff\xd8\xff\xe0": ".jpg", b"RIFF": ".webp"}.get(content[:4])
    ending = ending or (".jpg" if content[:2] == b"\xff\xd8" else picture.path.suffix or ".png")
    path = folder / f"{content_hash(content)[:20]}{ending}"
    if not path.exists():
        write_bytes(path, content)
    return f"{folder.name}/{path.name}"
