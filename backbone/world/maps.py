"""The world's ground-truth maps of a scene: labels, depth, poses, lines, and sketches as by hand.

Everything is read from the `Record` that drawing the scene fills, so a map and the picture agree to the pixel:

    sketch   the outlines of the things, 2 px, white on black; `HandStyle` makes them a hand's
    lines    the outlines of everything, things and place
    labels   what each pixel shows, in the colours of labels.json
    depth    grey: white is near, the sky is black
    pose     a stick for each thing: red from its foot to its top, green from its left to its right, a disc at the
             top and at the right; nearer things are drawn later

`edges` are found in the picture itself, not here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from backbone.world.rendering.record import SIZE, Part, Record, Stick, load_labels
from backbone.world.rendering.render import Rendering, render
from backbone.world.scene import Scene

KINDS = ("sketch", "lines", "labels", "depth", "pose")  # that are drawn from a record
UPWARDS, RIGHTWARDS = (255, 64, 64), (64, 255, 64)  # a stick's colours
PENS = 4  # sticks are drawn this many times larger, then reduced
Grid = NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class Layers:
    """A picture's parts by pixel.

    record    the parts, farthest first
    part      [128, 128]  number of the visible part
    depth     [128, 128]  0 far … 1 near
    """

    record: Record
    part: NDArray[np.int64]
    depth: NDArray[np.float32]

    @property
    def things(self) -> list[int]:
        """The numbers of the parts that are things, farthest first."""
        return [number for number, part in enumerate(self.record.parts) if part.stick is not None]

    @property
    def labels(self) -> NDArray[np.uint8]:
        """The number of the label of each pixel [128, 128]."""
        numbers = {label: number for number, label in enumerate(load_labels())}
        return np.array([numbers[part.label] for part in self.record.parts], np.uint8)[self.part]


@dataclass(frozen=True)
class HandStyle:
    """A hand's way of drawing outlines: width in pixels, share of the outline in gaps, wobble in pixels."""

    width: float = 2.0
    gaps: float = 0.0
    wobble: float = 0.0


def look_at(scene: Scene) -> tuple[Rendering, Layers]:
    """Render a scene; its picture and its layers."""
    record = Record()
    rendering = render(scene, record=record)
    return rendering, find_visible(record)


def find_visible(record: Record) -> Layers:
    """The visible part at each pixel, which is the nearest one of opacity ½ or more, and its depth."""
    rows = np.arange(SIZE, dtype=np.float32)[:, None]
    slope = ((rows - record.horizon) / max(SIZE - record.horizon, 1)).clip(0, 1)
    nearest, depth = np.zeros((SIZE, SIZE), np.int64), np.zeros((SIZE, SIZE), np.float32)
    for number, part in enumerate(record.parts):
        shape = find_opaque(part)
        nearest[shape] = number
        if part.depth is not None:
            part_depth = np.full_like(slope, part.depth)
        elif part.foot is not None:
            part_depth = np.full_like(
                slope, (part.foot - record.horizon) / max(SIZE - record.horizon, 1)
            ).clip(0, 1)
        else:
            part_depth = slope
        depth = np.where(shape, part_depth, depth)
    return Layers(record, nearest, depth)


def find_opaque(part: Part) -> Grid:
    """Where a part has opacity ½ or more [128, 128], visible or hidden."""
    shape = part.shape if part.shape.width == SIZE else part.shape.reduce(part.shape.width // SIZE)
    return np.asarray(shape) > 127


def draw_maps(layers: Layers) -> dict[str, Image.Image]:
    """The maps of all KINDS: RGB of the picture's size, `labels` with a palette."""
    return {
        "sketch": draw_sketch(layers, HandStyle(), Random(0)),
        "lines": draw_lines(layers),
        "labels": draw_labels(layers.labels),
        "depth": Image.fromarray((255 * layers.depth).round().astype(np.uint8), "L").convert("RGB"),
        "pose": draw_sticks([part.stick for part in layers.record.parts if part.stick is not None]),
    }


def draw_labels(labels: NDArray[np.uint8]) -> Image.Image:
    """Numbers of labels [128, 128] as an indexed picture in their colours."""
    image = Image.fromarray(labels, "P")
    image.putpalette([value for colour in load_labels().values() for value in colour])
    return image


def draw_lines(layers: Layers) -> Image.Image:
    """Where two parts meet: white on black, 2 px wide."""
    part = layers.part
    lines = np.zeros(part.shape, bool)
    for axis in (0, 1):
        borders = np.diff(part, axis=axis) != 0
        lines |= np.pad(borders, [(0, int(axis == 0)), (0, int(axis == 1))])
        lines |= np.pad(borders, [(int(axis == 0), 0), (int(axis == 1), 0)])
    return Image.fromarray(lines.astype(np.uint8) * 255, "L").convert("RGB")


def draw_sticks(sticks: Sequence[Stick], size: tuple[int, int] = (SIZE, SIZE)) -> Image.Image:
    """Poses: RGB on black of `size` (width, height), the last stick above the others."""
    image = Image.new("RGB", (size[0] * PENS, size[1] * PENS))
    pen = ImageDraw.Draw(image)
    for stick in sticks:
        for start, end, colour in ((stick.left, stick.right, RIGHTWARDS), (stick.foot, stick.top, UPWARDS)):
            ends = [tuple((value + 0.5) * PENS for value in point) for point in (start, end)]
            pen.line([*ends[0], *ends[1]], fill=colour, width=2 * PENS)
            x, y = ends[1]
            radius = 3 * PENS
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image.reduce(PENS)


# --- a hand's sketch ------------------------------------------------------------------------------------------


def draw_sketch(layers: Layers, style: HandStyle, random: Random) -> Image.Image:
    """The outlines of all things as a hand draws them: white on black, RGB.

    A thing's outline ends where a nearer one hides it.
    """
    return draw_by_hand([layers.part == number for number in layers.things], style, random)


def sample_hand(random: Random) -> HandStyle:
    """Sample the style of a hand: a quarter are steady and close their lines, the others do not."""
    if random.random() < 0.25:
        return HandStyle(width=random.uniform(1.5, 2.5))
    return HandStyle(random.uniform(1, 3), random.uniform(0, 0.25), random.uniform(0, 2))


def draw_by_hand(shapes: Sequence[Grid], style: HandStyle, random: Random) -> Image.Image:
    """Outlines of shapes [128, 128]: a pen follows each, off by up to the wobble, lifted at the gaps."""
    image = Image.new("L", (SIZE * PENS // 2, SIZE * PENS // 2))
    scale, pen = image.width / SIZE, ImageDraw.Draw(image)
    for shape in shapes:
        # The outline's pixels at the pen's resolution
        large = Image.fromarray(shape.astype(np.uint8) * 255, "L").resize(
            image.size, Image.Resampling.BICUBIC
        )
        rows, columns = np.nonzero(find_outline(np.asarray(large) > 127))
        # Smooth fields move the pen, press it, and lift it where one is below the quantile `gaps`
        shift = [smooth_field(random)[rows, columns] * style.wobble * scale for _ in range(2)]
        pressure = 1 + 0.25 * smooth_field(random)[rows, columns] * min(style.wobble, 1)
        height = smooth_field(random)[rows, columns]
        down = height >= np.quantile(height, style.gaps) if len(height) else np.zeros(0, bool)
        radius = style.width * scale / 2 * pressure
        for x, y, r in zip((columns + shift[0])[down], (rows + shift[1])[down], radius[down], strict=True):
            pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
    small = np.asarray(image.reduce(round(scale))) > 100
    return Image.fromarray(small.astype(np.uint8) * 255, "L").convert("RGB")


def find_outline(shape: Grid) -> Grid:
    """The border pixels of a shape [H, W], which have a neighbour outside of it; the picture's edge does not count."""
    padded = np.pad(shape, 1, mode="edge")
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return shape & ~inside


def smooth_field(random: Random) -> NDArray[np.float32]:
    """Smooth random numbers [H, W], mostly within −1…1, that change over some 16 pixels of the picture."""
    coarse = np.array([[random.uniform(-1, 1) for _ in range(9)] for _ in range(9)], np.float32)
    size = SIZE * PENS // 2, SIZE * PENS // 2
    return np.asarray(Image.fromarray(coarse, "F").resize(size, Image.Resampling.BICUBIC))
