"""A row of a file, a table or a stream as a pair, a single image or part of a ranking.

The names of its columns are listed below. An ambiguous row is a problem, which is a sentence that begins with the row's
location; all problems of a source are reported together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from decimal import Decimal
from typing import Any

from align.pairs.rankings import Ranking, Rankings, ToPicture, parse_number, ranking_columns
from align.pairs.records import Pair, Preferences, Record, Single
from backbone.io.console import UserError
from backbone.io.records import NAMES
from backbone.media.sources.columns import join_lines
from backbone.media.sources.record import ImageRecord

GOOD = (
    *("good", "desirable", "like", "liked", "win", "winner", "positive", "chosen", "preferred", "accepted"),
    *("better", "best", "upvote", "thumbs_up", "\N{THUMBS UP SIGN}"),
)
BAD = (
    *("bad", "undesirable", "dislike", "disliked", "lose", "loser", "negative", "rejected"),
    *("worse", "worst", "downvote", "thumbs_down", "\N{THUMBS DOWN SIGN}"),
)
YES, NO = ("true", "1", "1.0", "yes", "y", "t"), ("false", "0", "0.0", "no", "n", "f")
PROMPT_COLUMNS = ("prompt", "caption", "text")
PAIR_COLUMNS = (("jpg_0", "jpg_1"), ("image_0", "image_1"), ("image1", "image2"))
# Columns of votes for each image of a pair (Rapidata's); the first that a row has counts
VOTES = tuple(
    (name.format(1), name.format(2)) for name in ("weighted_results_image{}_preference", "votes_image{}")
)
ORDERED_COLUMNS = (  # the better one first; the last HPDv3's
    *(("chosen", "rejected"), ("winner", "loser"), ("preferred", "rejected"), ("better", "worse")),
    ("path1", "path2"),
)
OF_ALL = frozenset({"user", "user_id", "has_label", "are_different", "prompt_id"})  # read of any row
COLUMNS = (
    "chosen and rejected, path1 and path2, image_0, image_1 and label_0, image1, image2, votes_image1 and "
    "votes_image2, image and label, or image_path and rank"
)


def find_columns(
    names: Sequence[str], embedded: Sequence[str], source: str
) -> tuple[tuple[str, str] | None, set[str]]:
    """The columns of a ranking's images and ranks, if a table has them, and all columns of pictures."""
    ranking = ranking_columns(names, embedded) if set(PROMPT_COLUMNS) & set(names) else None
    return ranking, _find_picture_columns(names, source) if ranking is None else {ranking[0]}


def _find_picture_columns(names: Sequence[str], source: str) -> set[str]:
    """The columns of a table that hold pictures; `UserError` where the columns are no pairs'."""
    has_prompt = any(name in names for name in PROMPT_COLUMNS)
    required = (
        *(
            {*images, *labels}
            for images in (("jpg_0", "jpg_1"), ("image_0", "image_1"))
            for labels in (("label_0",), ("label_1",), ("image_0_uid", "image_1_uid", "best_image_uid"))
        ),
        *({"image1", "image2", *votes} for votes in VOTES),
        *map(set, ORDERED_COLUMNS),
        {"image", "label"},
    )
    if not has_prompt or not any(needed <= set(names) for needed in required):
        raise UserError(
            f"{source} has the columns {', '.join(names)}. Pairs need caption with jpg_0, jpg_1, label_0 (Pick-a-Pic), "
            "prompt with chosen and rejected, or path1 and path2 (HPDv3), or image1, image2, votes_image1 and "
            "votes_image2 (Rapidata), prompt with image and label, or prompt with image_path and rank."
        )
    return {"image", *(name for columns in (*PAIR_COLUMNS, *ORDERED_COLUMNS) for name in columns)} & set(
        names
    )


def add_row(
    preferences: Preferences,
    rankings: Rankings,
    row: Mapping[str, Any],
    location: str,
    to_picture: ToPicture,
) -> None:
    """Add one row as a pair, a single image or part of a ranking, or its problem; `to_picture` reads a column."""
    idle = dict.fromkeys(list_idle_columns(row))
    if ranking_columns(row):
        preferences.columns.update(idle)
        rankings.add(
            preferences, row, Ranking(_read_prompt(row, location), _read_user(row)), location, to_picture
        )
        return
    record = _read_row(row, location, to_picture)
    if record is None:
        preferences.skipped += 1
    elif isinstance(record, str):
        preferences.problems.append(record)
    else:
        preferences.columns.update(idle)
        if isinstance(record, Pair):
            preferences.pairs.append(record)
        else:
            preferences.singles.append(record)


def list_idle_columns(row: Mapping[str, Any]) -> list[str]:
    """The columns of a row that its layout does not read."""
    prompt = next((name for name in PROMPT_COLUMNS if isinstance(row.get(name), str) and row[name]), "")
    used = {*OF_ALL, prompt}
    if ranking := ranking_columns(row):
        used |= {*ranking}
    elif columns := _find_both(row, PAIR_COLUMNS):
        votes = _find_both(row, VOTES) or ()
        used |= {*columns, "label_0", "label_1", "tie", "both_bad", *(() if "label_0" in row else votes)}
    elif columns := _find_both(row, ORDERED_COLUMNS):
        used |= {*columns, "tie", "both_bad"}
    else:
        used |= {next((name for name in ("image", "file_name") if name in row), ""), "label"}
    return [name for name, value in row.items() if name not in used and value not in (None, "")]


def _find_both(row: Mapping[str, Any], layouts: Sequence[tuple[str, str]]) -> tuple[str, str] | None:
    """The first layout of two columns that a row has both of."""
    return next((names for names in layouts if names[0] in row and names[1] in row), None)


def _read_prompt(row: Mapping[str, Any], location: str) -> str:
    prompts = (join_lines(row[name], location) for name in PROMPT_COLUMNS if isinstance(row.get(name), str))
    return next(filter(None, prompts), "")


def _read_user(row: Mapping[str, Any]) -> str:
    user = row.get("user_id") if row.get("user_id") is not None else row.get("user") or ""
    if isinstance(user, float):  # a number of a table's column in which some are missing
        user = "" if math.isnan(user) else f"{user:.0f}" if user.is_integer() else user
    return str(user)


def _read_row(row: Mapping[str, Any], location: str, to_picture: ToPicture) -> Record | str | None:
    """One row as a pair or a single image, the problem with it, or None where it has no label."""
    prompt, user = _read_prompt(row, location), _read_user(row)
    # Pick-a-Pic's unlabelled rows
    if any(_is_false(row.get(name)) for name in ("has_label", "are_different")) or _has_no_votes(row):
        return None
    foreign = next((name for name in PROMPT_COLUMNS if isinstance(row.get(name), (list, dict, int))), None)
    if foreign is not None and not prompt:
        return f"{location} has a {foreign} that is no text, but {NAMES[type(row[foreign])]}"
    columns = _find_both(row, PAIR_COLUMNS)
    try:
        if columns is not None:
            pictures = [to_picture(row[name]) for name in columns]
            return _read_labelled_pair(row, pictures, prompt, location, user)
        ordered = _find_both(row, ORDERED_COLUMNS)
        if ordered is not None:
            pictures = [to_picture(row[name]) for name in ordered]
            return _read_chosen_pair(row, pictures, prompt, location, user)
        column = next((name for name in ("image", "file_name") if name in row), None)
        if column is None:
            return (
                f"{location} has {', '.join(row) or 'nothing'}, and none of the columns of pairs ({COLUMNS})"
            )
        return _read_labelled_single(row, to_picture(row[column]), prompt, location, user)
    except UserError as error:  # a name outside the folder
        return str(error)


def _is_false(value: Any) -> bool:
    """Whether a cell means no: as a boolean, as a number, or as text."""
    return value.strip().lower() in NO if isinstance(value, str) else value is not None and value == 0


def _is_true(value: Any) -> bool:
    """Whether a cell means yes, in the same forms."""
    return value.strip().lower() in YES if isinstance(value, str) else value == 1


def _read_labelled_pair(
    row: Mapping[str, Any], pictures: Sequence[ImageRecord | None], prompt: str, location: str, user: str
) -> Pair | str:
    """A pair from `label_0` and `label_1` (Pick-a-Pic) or from votes (Rapidata), or the problem with it."""
    votes = _find_both(row, VOTES)
    label = _parse_pair_label(row) if votes is None or "label_0" in row else _count_votes(row, votes)
    first, second = pictures
    if problem := _describe_unclear_tie(row, location):
        return problem
    if flag := next((name for name in ("tie", "both_bad") if _is_true(row.get(name))), ""):
        if label not in (None, 0.5):
            return f"{location} says {flag}, and that one of the images is preferred"
        label = 0.5
    if label is None and votes is not None and "label_0" not in row:
        return f"{location} has votes that are no numbers ({', '.join(f'{n} = {row[n]}' for n in votes)})"
    if label is None and not {"label_0", "label_1", "best_image_uid"} & set(row):
        return f"{location} has {', '.join(row)}, and no label_0 that says which image is preferred (1: the first one)"
    if label is None:
        labels = f"label_0 = {row.get('label_0')}, label_1 = {row.get('label_1')}"
        return f"{location} has labels that are no choice ({labels})"
    if first is None or second is None:
        return f"{location} names no picture"
    return Pair(prompt, first, second, label, location, user, label == 0.5 and _is_true(row.get("both_bad")))


def _read_chosen_pair(
    row: Mapping[str, Any], pictures: Sequence[ImageRecord | None], prompt: str, location: str, user: str
) -> Pair | str:
    """A pair from two columns, the preferred one first, a tie where `tie` is true; or the problem with it."""
    chosen, rejected = pictures
    if chosen is None or rejected is None:
        return f"{location} names no picture"
    if problem := _describe_unclear_tie(row, location):
        return problem
    tie, both_bad = _is_true(row.get("tie")), _is_true(row.get("both_bad"))
    return Pair(prompt, chosen, rejected, 0.5 if tie or both_bad else 1.0, location, user, both_bad)


def _describe_unclear_tie(row: Mapping[str, Any], location: str) -> str:
    """The problem with a row whose `tie` or `both_bad` is neither yes nor no; "" where they are clear."""
    for name in ("tie", "both_bad"):
        value = row.get(name)
        if isinstance(value, str) and value.strip().lower() not in (*YES, *NO, ""):
            return f"{location} has {name} = {value!r}, which is neither yes nor no"
    return ""


def _read_labelled_single(
    row: Mapping[str, Any], picture: ImageRecord | None, prompt: str, location: str, user: str
) -> Single | str:
    """One image from `image` and `label`, or the problem with it."""
    is_good = _parse_single_label(row.get("label"))
    if picture is None:
        return f"{location} names no picture"
    if is_good is None and "label" not in row:
        return f"{location} has {', '.join(row)}, and no label that says whether the image is good"
    if is_good is None:
        problem = f"{location} has the label {row.get('label')!r}, which is neither good nor bad"
        return f"{problem} (write good or bad, 1 or 0, desirable or undesirable)"
    return Single(prompt, picture, is_good, location, user)


def _parse_pair_label(row: Mapping[str, Any]) -> float | None:
    """`label_0` as 0, ½ or 1; None where the two labels are neither a choice nor a tie.

    One of the two is enough, or the name of the better image (Pick-a-Pic's `best_image_uid`).
    """
    first, second = parse_number(row.get("label_0")), parse_number(row.get("label_1"))
    if first is None and second is None and (best := row.get("best_image_uid")):
        is_best = [row.get(f"image_{number}_uid") == best for number in (0, 1)]
        return float(is_best[0]) if sum(is_best) == 1 else None
    if first is None and isinstance(second, (int, float)):
        first = 1 - second
    if not isinstance(first, (int, float)) or first not in (0, 0.5, 1):
        return None
    if second is not None and (not isinstance(second, (int, float)) or first + second != 1):
        return None
    return float(first)


def _count_votes(row: Mapping[str, Any], names: Sequence[str]) -> float | None:
    """1 for more votes for the first image, 0 for the second, ½ for equally many; None where there are none."""
    first, second = (parse_number(row[name]) for name in names)
    if not all(isinstance(votes, (int, float)) and 0 <= votes < math.inf for votes in (first, second)):
        return None
    return 0.5 if first == second else float(first > second)


def _has_no_votes(row: Mapping[str, Any]) -> bool:
    """Whether nobody voted for either image, which is no tie."""
    votes = _find_both(row, VOTES)
    return votes is not None and "label_0" not in row and all(parse_number(row[name]) == 0 for name in votes)


def _parse_single_label(label: Any) -> bool | None:
    """True for good, a word like it, or 1; False for bad, a word like it, 0 or −1; else None."""
    label = float(label) if isinstance(label, Decimal) else label
    if isinstance(label, str):
        word = re.sub(r"(?<=\w)[\s-]+", "_", label.strip().lower())
        is_good, is_bad = word in (*GOOD, *YES, "+1"), word in (*BAD, "-1", "-1.0", *NO)
        return is_good if is_good or is_bad else None
    return {1.0: True, 0.0: False, -1.0: False}.get(label) if isinstance(label, (bool, int, float)) else None
