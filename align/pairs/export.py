"""Preferences for other tools: Pick-a-Pic's Parquet columns, or JSON lines with the pictures beside them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from align.pairs.records import Pair, Preferences, Record, normalize_prompt
from backbone.io.console import UserError
from backbone.io.files import content_hash, replacing, write_bytes, write_text
from backbone.media.pictures import Picture

ROWS_PER_GROUP = 100  # pictures of so many rows are in memory at once


def write_parquet(found: Preferences, path: Path) -> Path:
    """Writes pairs with exactly Pick-a-Pic's columns, pictures as they are stored, ties as ½; gives `path`.

    Single judgements have no column there: `UserError` where there are no pairs.
    """
    import pyarrow
    import pyarrow.parquet

    if not found.pairs:
        raise UserError(
            f"{found.source} holds no pairs, and Pick-a-Pic's columns are of pairs. Export to .jsonl."
        )
    binary, text, real, whole = pyarrow.binary(), pyarrow.string(), pyarrow.float64(), pyarrow.int64()
    types = {
        "are_different": pyarrow.bool_(), "best_image_uid": text, "caption": text,
        "created_at": pyarrow.timestamp("ns"), "has_label": pyarrow.bool_(), "image_0_uid": text, "image_0_url": text,
        "image_1_uid": text, "image_1_url": text, "jpg_0": binary, "jpg_1": binary, "label_0": real, "label_1": real,
        "model_0": text, "model_1": text, "ranking_id": whole, "user_id": whole, "num_example_per_prompt": whole,
        "__index_level_0__": whole,
    }  # fmt: skip
    schema = pyarrow.schema(types)
    with replacing(path) as temporary, pyarrow.parquet.ParquetWriter(temporary, schema) as writer:
        rows = list(_iterate_row_groups(found))
        for group in rows:
            writer.write_table(pyarrow.Table.from_pylist(group, schema=schema))
    return path


def write_jsonl(found: Preferences, path: Path) -> Path:
    """Writes a JSON line for each record and the pictures into `NAME-pictures/` beside it; gives `path`."""
    import json

    folder = path.with_name(f"{path.stem}-pictures")
    lines = []
    for record in found.records:
        names = [_store_image(picture, folder) for picture in record.pictures]
        lines.append(json.dumps(_record_fields(record, names), ensure_ascii=False) + "\n")
    write_text(path, "".join(lines))
    return path


def _iterate_row_groups(found: Preferences) -> Iterator[list[dict[str, Any]]]:
    counts = Counter(normalize_prompt(pair.prompt) for pair in found.pairs)
    now = datetime.now(timezone.utc).replace(tzinfo=None)
    model = str(found.provenance.get("model", ""))
    people = {user: number for number, user in enumerate(sorted({pair.user for pair in found.pairs}))}
    for first in range(0, len(found.pairs), ROWS_PER_GROUP):
        group = []
        for index, pair in enumerate(found.pairs[first : first + ROWS_PER_GROUP], start=first):
            stored = [picture.read() for picture in pair.pictures]
            uids = [_image_uid(content) for content in stored]
            best = "tie" if pair.is_tie else uids[0 if pair.label > 0.5 else 1]
            group.append(
                {
                    "are_different": True,
                    "best_image_uid": best,
                    "caption": pair.prompt,
                    "created_at": now,
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
                    "user_id": int(pair.user) if pair.user.isdecimal() else people[pair.user],
                    "num_example_per_prompt": counts[normalize_prompt(pair.prompt)],
                    "__index_level_0__": index,
                }
            )
        yield group


def _image_uid(content: bytes) -> str:
    """A picture's identity in Pick-a-Pic's form (a UUID), from its contents."""
    digest = content_hash(content)
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))


def _record_fields(record: Record, names: list[str]) -> dict[str, Any]:
    if isinstance(record, Pair):
        pictures: dict[str, Any] = {"image_0": names[0], "image_1": names[1]}
        pictures |= {"label_0": record.label, "label_1": 1 - record.label}
    else:
        pictures = {"image": names[0], "label": int(record.good)}
    return {"prompt": record.prompt, **pictures, "user": record.user}


def _store_image(picture: Picture, folder: Path) -> str:
    """Writes a picture under its content's name and gives that, relative to the lines."""
    content = picture.read()
    ending = {b"\x89PNG": ".png", b"\xff\xd8\xff\xe0": ".jpg", b"RIFF": ".webp"}.get(content[:4])
    ending = ending or (".jpg" if content[:2] == b"\xff\xd8" else picture.path.suffix or ".png")
    path = folder / f"{content_hash(content)[:20]}{ending}"
    if not path.exists():
        write_bytes(path, content)
    return f"{folder.name}/{path.name}"
