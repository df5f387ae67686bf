"""The parts of a picture of the world, recorded while it is drawn, farthest first.

Drawing a scene fills a `Record`; `backbone.world.maps` reads edges, labels, depth and poses from it, exactly.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw

from backbone.world.words import load_vocabulary

SIZE = 128  # pixels a side
SUPERSAMPLING = 2  # places are drawn this many times larger, then reduced, for smooth edges
SKY, GROUND, WATER, WALL, DECORATION = "sky", "ground", "water", "wall", "decoration"
BACKDROPS = {
    "on a wooden table": WALL,
    "on a white background": WALL,
    "under the sea": WATER,
}  # elsewhere: sky


@dataclass(frozen=True)
class Stick:
    """A thing's pose, in pixels: from its foot to its top, and from its own left to its own right.

    A mirrored thing has its left where others have their right.
    """

    foot: tuple[float, float]
    top: tuple[float, float]
    left: tuple[float, float]
    right: tuple[float, float]


@dataclass(frozen=True, eq=False)
class Part:
    """A part of a picture.

    label  one of `load_labels`
    shape  its opacity (L, 0…255), of the picture's size; of a place's parts also SUPERSAMPLING times as large
    foot   y of the row that it stands on, in pixels; None for the ground, the backdrop, and parts with `depth`
    depth  0 far … 1 near; None: from `foot`
    stick  its pose; None for parts of the place
    """

    label: str
    shape: Image.Image
    foot: float | None = None
    depth: float | None = None
    stick: Stick | None = None


@dataclass
class Record:
    """The parts of a picture from the farthest to the nearest, and the highest horizon of the ground (y, pixels)."""

    horizon: float = SIZE
    parts: list[Part] = field(default_factory=list)

    def begin(self, place: str, horizon: float) -> None:
        """Start with an empty place: only the backdrop."""
        self.horizon = horizon
        self.parts = [
            Part(BACKDROPS.get(place, SKY), Image.new("L", (SIZE, SIZE), 255), foot=None, depth=0.0)
        ]

    def ground(self, label: str, shape: Image.Image, horizon: float) -> None:
        """Add a ground, from its horizon to the lower edge."""
        self.horizon = min(self.horizon, horizon)
        self.parts.append(Part(label, shape))

    def glyph(self, layer: Image.Image, foot: float) -> None:
        """Add a glyph of the place, on a layer (RGBA) of the picture's size."""
        self.parts.append(Part(DECORATION, layer.getchannel("A"), foot=foot))

    def shape(self, label: str, foot: float) -> ImageDraw.ImageDraw:
        """Add a shape of the place; returns a pen that draws it with 255, in supersampled pixels."""
        side = SIZE * SUPERSAMPLING
        self.parts.append(Part(label, Image.new("L", (side, side), 0), foot=foot))
        return ImageDraw.Draw(self.parts[-1].shape)


@cache
def load_labels() -> dict[str, tuple[int, int, int]]:
    """The labels in the order of their numbers, with their colours: five of places, then the nouns'."""
    palette = json.loads(Path(__file__).with_name("labels.json").read_text(encoding="utf-8"))
    return {name: (red, green, blue) for name, (red, green, blue) in palette.items()}


def find_label(noun: str) -> str:
    """The label of a noun, which is the noun itself, or a concept's class."""
    return load_vocabulary().classes.get(noun, noun)
