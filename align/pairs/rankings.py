"""Rankings as they are published: several images of a prompt in an order, read as pairs of its images.

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
OTHERS = ("chosen", "rejected", "label", "label_0", "path1")  # columns of other layouts, which say more
ToPicture = Callable[[Any], ImageRecord | None]


@dataclass(frozen=True)
class Placed:
    """An image with its place among those of its prompt, of which the least is the best, and where that is said."""

    picture: ImageRecord
    place: float
    where: str


@dataclass
class Ranking:
    """What is said of the images of one prompt."""

    prompt: str
    user: str
    images: list[Placed] = field(default_factory=list)
    orders: bool = True  # whether images of one place are a tie: all that is not preferred is in no order

    def pairs(self) -> Iterator[Pair]:
        """Every two of the images, the better one first."""
        for one, other in combinations(self.images, 2):
            better, worse = (one, other) if one.place <= other.place else (other, one)
            tie = one.place == other.place
            if self.orders or not tie or len(self.images) == 2:
                name = better.where if better.where == worse.where else f"{better.where} with {worse.where}"
                label = 0.5 if tie else 1.0
                yield Pair(self.prompt, better.picture, worse.picture, label, name, self.user)


class Rankings(dict[str, Ranking]):
    """Rankings of which every image has a row of its own, by who ranked and the prompt's number or words."""

    def add(
        self,
        preferences: Preferences,
        row: Mapping[str, Any],
        said: Ranking,
        where: str,
        to_picture: ToPicture,
    ) -> None:
        """Add a row: its pairs where it holds several images, else its image to those of its prompt.

        `said` is the row's prompt and user; what is wrong with the row becomes one of the problems.
        """
        row = {name: value for name, value in row.items() if value is not None}
        columns = ranking_columns(row)
        if columns is None:  # an image that nobody has placed
            preferences.skipped += 1
            return
        images, places = (row[name] for name in columns)
        several = isinstance(images, (list, tuple))
        said.orders = columns[1] != PREFERRED
        try:
            if not several:
                images, places = [images], [places]
            said.images += _read_places(images, places, columns, where, to_picture)
        except UserError as error:
            preferences.problems.append(str(error))
            return
        if several:
            preferences.pairs += said.pairs()
            preferences.skipped += len(said.images) < 2
        elif said.images:
            key = f"{said.user}/{row.get('prompt_id') or normalize_prompt(said.prompt)}"
            self.setdefault(key, Ranking(said.prompt, said.user)).images += said.images
        else:
            preferences.skipped += 1

    def add_to(self, preferences: Preferences) -> None:
        """Add the pairs of images with rows of their own; one that is alone with its prompt counts as not labelled."""
        for ranking in self.values():
            preferences.pairs += ranking.pairs()
            preferences.skipped += len(ranking.images) == 1


def ranking_columns(names: Collection[str], embedded: Collection[str] = ()) -> tuple[str, str] | None:
    """The columns of a ranking's images and of their places; None where `names` are of another layout.

    Of several columns of images one of those that hold them, `embedded`, and not their names.
    """
    by_use = sorted(IMAGES, key=lambda name: name not in embedded)
    images, places = (next((name for name in known if name in names), None) for known in (by_use, PLACES))
    return None if images is None or places is None or set(OTHERS) & set(names) else (images, places)


def _read_places(
    images: Sequence[Any], places: Any, columns: tuple[str, str], where: str, to_picture: ToPicture
) -> Iterator[Placed]:
    """The images that have a place; `UserError` where the two columns do not fit each other."""
    if not isinstance(places, (list, tuple)) or len(places) != len(images):
        raise UserError(
            f"{where} has {len(images)} images in {columns[0]} and not as many places in {columns[1]}"
        )
    known = [place for place in places if place is not None]
    for place in known:
        number = isinstance(place, (int, float)) and -math.inf < place < math.inf
        if not number or (columns[1] == PREFERRED and place not in (0, 1)):
            wanted = "0 or 1" if columns[1] == PREFERRED else "a number, 1 for the best"
            raise UserError(f"{where} has {place!r} in {columns[1]}, and {wanted} is wanted")
    for image, place in zip(images, places, strict=True):
        picture = to_picture(image)
        if picture is None:
            raise UserError(f"{where} names no picture")
        if place is not None:
            yield Placed(picture, -place if columns[1] == PREFERRED else place, where)
