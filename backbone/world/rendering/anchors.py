"""Where accessories attach to each noun's glyph; estimated from the silhouette for any other glyph."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image


@dataclass(frozen=True)
class AccessoryAnchor:
    """Positions as fractions of the glyph's width and height, widths as fractions of its longest side."""

    hat_x: float
    hat_y: float
    hat_width: float
    eyes_x: float
    eyes_y: float
    eyes_width: float


# In per cent of a square around the glyph (glyph in the middle, standing on its bottom edge):
# hat x, hat y, hat width, eyes x, eyes y, eyes width.
SQUARES: dict[str, tuple[int, int, int, int, int, int]] = {
    "dog": (28, 8, 40, 28, 27, 34), "cat": (36, 14, 32, 34, 34, 30), "rabbit": (30, 36, 28, 26, 46, 26),
    "horse": (20, 16, 26, 20, 27, 22), "cow": (17, 22, 26, 15, 34, 24), "pig": (26, 18, 34, 20, 42, 34),
    "elephant": (32, 14, 34, 34, 32, 30), "tiger": (18, 36, 28, 17, 45, 26), "monkey": (33, 8, 40, 34, 30, 34),
    "bird": (25, 26, 28, 20, 36, 24), "penguin": (42, 6, 34, 38, 16, 26), "duck": (24, 9, 28, 20, 20, 26),
    "owl": (50, 10, 44, 50, 31, 48), "turtle": (20, 47, 32, 18, 58, 28), "snake": (34, 6, 28, 30, 14, 24),
    "fish": (42, 37, 30, 22, 68, 26), "shark": (30, 9, 32, 26, 24, 26), "whale": (32, 43, 34, 38, 60, 30),
    "octopus": (72, 12, 36, 66, 38, 36), "crab": (50, 42, 26, 50, 46, 28), "butterfly": (50, 30, 24, 50, 36, 20),
    "snail": (24, 25, 26, 24, 30, 24), "bee": (26, 33, 30, 22, 44, 28), "fox": (50, 26, 44, 50, 58, 46),
    "bear": (50, 12, 46, 50, 44, 40), "panda": (50, 16, 46, 50, 48, 50), "lion": (52, 8, 46, 50, 42, 44),
    "frog": (50, 20, 42, 50, 26, 66), "dinosaur": (18, 6, 28, 15, 14, 22), "car": (52, 40, 36, 50, 50, 40),
    "bus": (50, 35, 38, 40, 48, 44), "bicycle": (38, 40, 28, 52, 50, 36), "train": (68, 24, 34, 35, 50, 36),
    "airplane": (60, 18, 30, 82, 14, 26), "rocket": (88, 9, 26, 62, 34, 32), "sailboat": (50, 6, 28, 50, 55, 36),
    "tractor": (58, 22, 38, 58, 38, 32), "pizza": (55, 9, 36, 58, 45, 40), "doughnut": (50, 25, 38, 50, 48, 44),
    "hamburger": (50, 6, 44, 50, 26, 48), "cake": (50, 24, 36, 50, 66, 42), "apple": (50, 18, 44, 46, 48, 48),
    "banana": (52, 8, 28, 52, 40, 34), "pineapple": (50, 8, 34, 50, 62, 36), "strawberry": (44, 10, 42, 52, 48, 46),
    "watermelon": (30, 22, 40, 46, 48, 44), "carrot": (80, 14, 34, 50, 58, 32), "house": (52, 10, 38, 50, 40, 44),
    "castle": (50, 6, 30, 50, 48, 44), "tent": (50, 37, 34, 40, 66, 40), "backpack": (45, 10, 42, 44, 46, 48),
    "boot": (44, 8, 40, 44, 38, 36), "guitar": (92, 10, 26, 30, 62, 36), "violin": (90, 8, 26, 32, 66, 34),
    "drum": (50, 29, 44, 50, 66, 46), "camera": (50, 23, 40, 56, 55, 48), "clock": (50, 10, 40, 50, 40, 48),
    "chair": (42, 6, 36, 44, 22, 34), "umbrella": (50, 8, 34, 50, 36, 44), "balloon": (52, 8, 40, 52, 32, 44),
    "gift": (50, 10, 40, 50, 60, 46), "ball": (50, 8, 48, 50, 40, 48), "robot": (50, 22, 44, 50, 42, 52),
    "ghost": (50, 8, 46, 50, 28, 42), "snowman": (50, 20, 36, 50, 33, 32), "rose": (50, 8, 40, 50, 34, 42),
    "sunflower": (50, 8, 40, 50, 40, 38), "mushroom": (50, 8, 44, 50, 36, 48), "tree": (50, 8, 42, 50, 34, 44),
    "cactus": (50, 6, 34, 50, 34, 34), "pumpkin": (50, 17, 44, 50, 52, 54), "peacock": (48, 26, 22, 45, 32, 18),
    "lobster": (50, 44, 24, 50, 50, 20), "sloth": (24, 29, 30, 20, 42, 28), "t-rex": (24, 17, 28, 22, 24, 22),
    "hippopotamus": (28, 39, 30, 20, 50, 26), "mammoth": (34, 9, 34, 34, 34, 28), "canoe": (40, 46, 30, 40, 62, 32),
    "telescope": (15, 12, 26, 30, 22, 28), "accordion": (52, 16, 40, 50, 50, 44), "pinata": (50, 10, 34, 50, 48, 40),
    "nesting dolls": (50, 6, 28, 50, 18, 24), "fire engine": (50, 26, 38, 30, 48, 40),
    "poodle": (44, 9, 30, 38, 30, 24),
}  # fmt: skip


def find_anchor(noun: str, glyph: Image.Image) -> AccessoryAnchor:
    """The anchor of a noun; estimated from the silhouette for an unknown one."""
    if noun not in SQUARES:
        return guess_anchor(glyph)
    hat_x, hat_y, hat_width, eyes_x, eyes_y, eyes_width = (part / 100 for part in SQUARES[noun])
    longest = max(glyph.size)
    width, height = glyph.width / longest, glyph.height / longest

    def across(x: float) -> float:
        return (x - (1 - width) / 2) / width

    def down(y: float) -> float:
        return (y - (1 - height)) / height

    return AccessoryAnchor(across(hat_x), down(hat_y), hat_width, across(eyes_x), down(eyes_y), eyes_width)


def guess_anchor(glyph: Image.Image) -> AccessoryAnchor:
    """Estimate an anchor: a hat on the middle of the silhouette's top tenth, eyes a little below."""
    alpha = np.asarray(glyph.getchannel("A"), dtype=np.float32)
    tenth = alpha[: max(1, len(alpha) // 10)].sum(0)
    x = float((tenth * np.arange(len(tenth))).sum() / max(tenth.sum(), 1) / len(tenth))
    return AccessoryAnchor(x, 0.06, 0.36, x, 0.26, 0.34)
