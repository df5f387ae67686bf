"""Published rankings: several images of a prompt in an order, read as pairs of its images.

| HPDv2       | `prompt`, `image_path` or `file_path` (a list) and `human_preference` (1 for what is preferred) or |
|             | `rank` (1 is the best), a list too                                                                 |
| ImageReward | a row for each image: `prompt_id`, `prompt`, `image_path`, `rank`; or a prompt's `generations` and |
|             | `ranking`                                                                                          |

Images of one rank are a tie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import combinations
from typing import Any

from align.pairs.records import Pair, Preferences, normalize_prompt
from backbone.io.console import UserError
from backbone.media.sources.record import ImageRecord

IMAGES = (
    "image_path", "file_path", "image_paths", "file_paths", "generations", "images", "image", "file_name",
)  # fmt: skip
PREFERRED = "human_preference"
RANK_COLUMNS = (PREFERRED, "rank", "ranking", "ranks")
# Columns of other layouts, which take precedence
OTHER_LAYOUTS = ("chosen", "rejected", "label", "label_0", "path1")
ToPicture = Callable[[Any], ImageRecord | None]


@dataclass(frozen=True)
class RankedImage:
    """An image with its rank among its prompt's images (the least is the best) and its location in the source."""

    picture: ImageRecord
    rank: float
    location: str


@dataclass
class Ranking:
    """The ranking of one prompt's images."""

    prompt: str
    user: str
    images: list[RankedImage] = field(default_factory=list)
    equal_is_tie: bool = True  # not where ranks only say which images are preferred

    def pairs(self) -> Iterator[Pair]:
        """All pairs of the images, the better one first."""
        for first, second in combinations(self.images, 2):
            better, worse = (first, second) if first.rank <= second.rank else (second, first)
            tie = first.rank == second.rank
            if self.equal_is_tie or not tie or len(self.images) == 2:
                name = (
                    better.location
                    if better.location == worse.location
                    else f"{better.location} with {worse.location}"
                )
                label = 0.5 if tie else 1.0
                yield Pair(self.prompt, better.picture, worse.picture, label, name, self.user)


class Rankings(dict[str, Ranking]):
    """Rankings with one row per image, by user and the prompt's id or text."""

    def add(
        self,
        preferences: Preferences,
        row: Mapping[str, Any],
        ranking: Ranking,
        location: str,
        to_picture: ToPicture,
    ) -> None:
        """Add a row: its pairs where it holds several images, else its image to those of its prompt.

        `ranking` has the row's prompt and user; an error in the row becomes one of the problems.
        """
        row = {name: value for name, value in row.items() if value is not None}
        columns = ranking_columns(row)
        if columns is None:  # an image without a rank
            preferences.skipped += 1
            return
        images, ranks = (row[name] for name in columns)
        several = isinstance(images, (list, tuple))
        ranking.equal_is_tie = columns[1] != PREFERRED
        try:
            if not several:
                images, ranks = [images], [ranks]
            ranking.images += _read_ranks(images, ranks, columns, location, to_picture)
        except UserError as error:
            preferences.problems.append(str(error))
            return
        if several:
            preferences.pairs += ranking.pairs()
            preferences.skipped += len(ranking.images) < 2
        elif ranking.images:
            key = f"{ranking.user}/{row.get('prompt_id') or normalize_prompt(ranking.prompt)}"
            self.setdefault(key, Ranking(ranking.prompt, ranking.user)).images += ranking.images
        else:
            preferences.skipped += 1

    def add_to(self, preferences: Preferences) -> None:
        """Add the pairs of images with one row each; a prompt's only image counts as unlabelled."""
        for ranking in self.values():
            preferences.pairs += ranking.pairs()
            preferences.skipped += len(ranking.images) == 1


def ranking_columns(names: Collection[str], embedded: Collection[str] = ()) -> tuple[str, str] | None:
    """Find the columns of a ranking's images and of their ranks; None where `names` are of another layout.

    Among several image columns, one with `embedded` images is preferred to one with file names.
    """
    by_use = sorted(IMAGES, key=lambda name: name not in embedded)
    images, ranks = (
        next((name for name in candidates if name in names), None) for candidates in (by_use, RANK_COLUMNS)
    )
    return None if images is None or ranks is None or set(OTHER_LAYOUTS) & set(names) else (images, ranks)


def _read_ranks(
    images: Sequence[Any], ranks: Any, columns: tuple[str, str], location: str, to_picture: ToPicture
) -> Iterator[RankedImage]:
    """The images that have a rank; `UserError` where the two columns do not fit each other."""
    if not isinstance(ranks, (list, tuple)) or len(ranks) != len(images):
        raise UserError(
            f"{location} has {len(images)} images in {columns[0]} and not as many places in {columns[1]}"
        )
    numbers = [parse_number(rank) for rank in ranks]
    for rank, number in zip(ranks, numbers, strict=True):
        if number is None:
            continue
        is_number = isinstance(number, (int, float)) and -math.inf < number < math.inf
        if not is_number or (columns[1] == PREFERRED and number not in (0, 1)):
            expected = "0 or 1" if columns[1] == PREFERRED else "a number, 1 for the best"
            raise UserError(f"{location} has {rank!r} in {columns[1]}, and {expected} is wanted")
    for image, number in zip(images, numbers, strict=True):
        picture = to_picture(image)
        if picture is None:
            raise UserError(f"{location} names no picture")
        if number is not None:
            yield RankedImage(picture, -number if columns[1] == PREFERRED else number, location)


def parse_number(cell: Any) -> Any:
    """Parse a cell that is a number as text (“0,5” too), a database's decimal, or a spreadsheet's TRUE or FALSE; None
    for NaN, a table's missing number; any other cell as it is."""
    if isinstance(cell, str) and cell.strip().lower() in ("true", "false"):
        return float(cell.strip().lower() == "true")
    try:
        number = float(cell.replace(",", ".")) if isinstance(cell, str) else cell
    except ValueError:
        return cell
    number = float(number) if isinstance(number, Decimal) else number
    return None if isinstance(number, float) and math.isnan(number) else number
