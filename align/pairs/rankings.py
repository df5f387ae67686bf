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
PLACES = (PREFERRED, "rank", "ranking", "ranks")
OTHERS = (
    "chosen",
    "rejected",
    "label",
    "label_0",
    "path1",
)  # columns of other layouts, which take precedence
ToPicture = Callable[[Any], ImageRecord | None]


@dataclass(frozen=True)
class Placed:
    """An image with its rank among those of its prompt, the least being the best, and its location in the source."""

    picture: ImageRecord
    rank: float
    location: str


@dataclass
class Ranking:
    """The ranking of one prompt's images."""

    prompt: str
    user: str
    images: list[Placed] = field(default_factory=list)
    orders: bool = True  # whether images of equal rank are a tie: images that are not preferred have no order

    def pairs(self) -> Iterator[Pair]:
        """All pairs of the images, the better one first."""
        for one, other in combinations(self.images, 2):
            better, worse = (one, other) if one.rank <= other.rank else (other, one)
            tie = one.rank == other.rank
            if self.orders or not tie or len(self.images) == 2:
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
        images, places = (row[name] for name in columns)
        several = isinstance(images, (list, tuple))
        ranking.orders = columns[1] != PREFERRED
        try:
            if not several:
                images, places = [images], [places]
            ranking.images += _read_places(images, places, columns, location, to_picture)
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
    """The columns of a ranking's images and of their ranks; None where `names` are of another layout.

    Of several image columns, one with `embedded` images is preferred to one with file names.
    """
    by_use = sorted(IMAGES, key=lambda name: name not in embedded)
    images, places = (next((name for name in known if name in names), None) for known in (by_use, PLACES))
    return None if images is None or places is None or set(OTHERS) & set(names) else (images, places)


def _read_places(
    images: Sequence[Any], places: Any, columns: tuple[str, str], location: str, to_picture: ToPicture
) -> Iterator[Placed]:
    """The images that have a rank; `UserError` where the two columns do not fit each other."""
    if not isinstance(places, (list, tuple)) or len(places) != len(images):
        raise UserError(
            f"{location} has {len(images)} images in {columns[0]} and not as many places in {columns[1]}"
        )
    said, places = places, [parse_number(place) for place in places]
    for as_said, place in zip(said, places, strict=True):
        if place is None:
            continue
        number = isinstance(place, (int, float)) and -math.inf < place < math.inf
        if not number or (columns[1] == PREFERRED and place not in (0, 1)):
            expected = "0 or 1" if columns[1] == PREFERRED else "a number, 1 for the best"
            raise UserError(f"{location} has {as_said!r} in {columns[1]}, and {expected} is wanted")
    for image, place in zip(images, places, strict=True):
        picture = to_picture(image)
        if picture is None:
            raise UserError(f"{location} names no picture")
        if place is not None:
            yield Placed(picture, -place if columns[1] == PREFERRED else place, location)


def parse_number(cell: Any) -> Any:
    """A cell that is a number as text (“0,5” too) or a decimal of a database as that number, and spreadsheets' TRUE and
    FALSE; None for NaN, which is how tables leave a number out; any other as it is."""
    if isinstance(cell, str) and cell.strip().lower() in ("true", "false"):
        return float(cell.strip().lower() == "true")
    try:
        number = float(cell.replace(",", ".")) if isinstance(cell, str) else cell
    except ValueError:
        return cell
    number = float(number) if isinstance(number, Decimal) else number
    return None if isinstance(number, float) and math.isnan(number) else number
