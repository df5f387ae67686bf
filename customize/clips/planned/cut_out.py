"""A thing that moves over one drawing: cut out of it, and composited over its background, frame by frame.

    CutOut(boxes, shifts, room=8).move(drawing)    # boxes of the poses in it; one frame for each row of shifts

Within its box a thing is what differs from its rows' median and from the pixels next to the box, and, in rows that
differ between the two sides, from the pixels above and below it. The background behind it is filled row by row with the
row's pixels that are most like the row above, as in `moji`'s world, whose skies and grounds change from top to bottom.
Its shadow, darker ground, moves along with it and stays on the ground.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

LEAST_DIFFERENCE = 0.1  # difference from its rows that makes a pixel a thing's, of 1
BESIDE = 3  # pixels left and right of a hole that its filling is taken from
FARTHER = (0, 6, 12)  # distances of these from the hole, in pixels
REACH = 4.0  # pixels over which the nearest ones fade into the filling
LIGHT_IN_SHADOW = 0.5, 0.985  # share of the ground's light in a shadow: least, most
MOST_AT_THING = 0.93  # the most for pixels that were taken for a thing
TINTED = 0.06  # difference of colour from the ground, above which darker pixels are no shadow
FEET = 0.85  # share of a thing's height, from the top, below which its shadow is searched
STILL = (0.0, 0.0, 1.0, 0.0)  # the identity: no shift, growth 1, no turn
SMALLEST = 0.2  # of a pose's box: what is smaller is no thing
Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Box = tuple[float, float, float, float]  # left, top, right, bottom


@dataclass(frozen=True, eq=False)
class CutOut:
    """Things that are cut out of a drawing, in its pixels, and how they move.

    boxes   where the pose of each thing placed it
    shifts  [F, N, 4]: how far it has gone to the right and down, its growth and its turn in degrees, clockwise
    room    around a box, in which the thing may have been drawn too
    things  [N, H, W]: the pixels of each, if they are known
    behind  [H, W, 3] in 0…1: what is behind them, NaN where that is not known; None if nothing is known
    """

    boxes: Sequence[Box]
    shifts: NDArray[np.floating]
    room: float
    things: Bools | None = None
    behind: Floats | None = None

    def move(self, drawing: Image.Image) -> list[Image.Image]:
        """The frames, of the drawing's size; those in which nothing has moved are the drawing itself."""
        pixels = np.asarray(drawing.convert("RGB"), dtype=float) / 255
        boxes = [
            (left - self.room, top - self.room, right + self.room, bottom + self.room)
            for left, top, right, bottom in self.boxes
        ]
        things = self.things
        if things is None:
            least = [SMALLEST * (box[2] - box[0]) * (box[3] - box[1]) for box in self.boxes]
            things = find_things(pixels, boxes, least=least)

        # Things without their shadows, and the ground without either
        shade, dark = find_shadows(pixels, things, boxes)
        things = things & ~dark
        ground = fill_rows(pixels, _grow(things.any(0) | dark, 3))
        if self.behind is not None:
            ground = np.where(np.isnan(self.behind), ground, self.behind)
        pieces = [_CutPiece.of(pixels, thing, shade, box) for thing, box in zip(things, boxes, strict=True)]

        # Frame by frame: shadows on the ground, then the things, those with the lowest foot last
        order = sorted(range(len(pieces)), key=lambda k: pieces[k].foot)
        frames = []
        for shift in self.shifts:
            if np.array_equal(shift, np.broadcast_to(STILL, shift.shape)):
                frames.append(drawing.convert("RGB"))
                continue
            frame = ground.copy()
            for piece, (right, _, grown, _) in zip(pieces, shift, strict=True):
                frame *= 1 - piece.shadow_at(right, grown)[..., None]
            for k in order:
                frame = pieces[k].lay_over(frame, *shift[k])
            frames.append(Image.fromarray((frame.clip(0, 1) * 255).round().astype(np.uint8)))
        return frames


def find_things(pixels: Floats, boxes: Sequence[Box], *, least: Sequence[float]) -> Bools:
    """[N, H, W]: masks of the things in pixels [H, W, 3]; pixels in two boxes belong to the nearer one.

    A thing with fewer pixels that differ from its rows than its `least` becomes the ellipse in its box.
    """
    inside = np.stack([_make_box_mask(box, pixels.shape[:2]) for box in boxes])
    distances = np.stack([_measure_distance(box, pixels.shape[:2]) for box in boxes])
    nearest, anywhere = distances.argmin(0), np.any(inside, axis=0)
    usual, usual_down = _find_medians(pixels, anywhere), _find_medians(pixels.swapaxes(0, 1), anywhere.T)
    masks = []
    for k, (box_mask, distance) in enumerate(zip(inside, distances, strict=True)):
        # How far each pixel is from the usual colours of its row, and where rows vary from those of its column
        rows = np.stack([usual[:, None], *_sample_beside(pixels, box_mask, anywhere, usual)])  # [S, H, 1, 3]
        differs = _least_difference(pixels, rows)
        mixed = np.abs(rows - usual[:, None]).max((0, 2, 3)) > LEAST_DIFFERENCE
        columns = _sample_beside(pixels.swapaxes(0, 1), box_mask.T, anywhere.T, usual_down)  # above and below
        if columns:
            over = _least_difference(pixels, np.stack(columns).swapaxes(1, 2))
            differs[mixed] = np.minimum(differs, over)[mixed]
        # Opened, holes filled, and the part that is connected to the middle of the box
        solid = (soften(differs * box_mask, 1.0) > LEAST_DIFFERENCE) & box_mask & (nearest == k)
        solid &= _grow(~_grow(~solid, 1), 1)
        solid = fill_holes(grow_within(solid & (distance < 0.5), solid))
        masks.append(solid if solid.sum() > least[k] else (distance < 1) & (nearest == k))
    return np.stack(masks)


def find_shadows(pixels: Floats, things: Bools, boxes: Sequence[Box]) -> tuple[Floats, Bools]:
    """[H, W]: the share of the ground's light that shadows take, and where they lie, at the feet of things."""
    # Share of the ground's light at each pixel, by least squares over RGB; a shadow has the ground's colour
    ground = fill_rows(pixels, np.any([_make_box_mask(box, things.shape[1:]) for box in boxes], axis=0))
    light = (pixels * ground).sum(-1) / np.maximum((ground**2).sum(-1), 1e-6)
    of_ground = np.abs(pixels - light[..., None] * ground).max(-1) < TINTED

    # At the feet: the lower rows of a thing's box
    low = np.zeros_like(of_ground)
    for thing, box in zip(things, boxes, strict=True):
        rows = np.flatnonzero(thing.any(1))
        top = rows[0] + FEET * (rows[-1] - rows[0]) if len(rows) else box[3]
        low |= _make_box_mask((box[0], top, box[2], box[3]), low.shape)

    # Darker than the ground, and darker still where things are
    least, most = LIGHT_IN_SHADOW
    shadow = low & of_ground & (light > least) & (light < np.where(things.any(0), MOST_AT_THING, most))
    shade = np.where(shadow, 1 - light, 0.0)
    for row in np.flatnonzero(shadow.any(1)):  # on the ground under a thing too
        under = low[row] & things[:, row].any(0) & ~shadow[row]
        shade[row, under] = np.median(shade[row][shadow[row]])
    return soften(shade, 1.0), shadow


def fill_rows(pixels: Floats, hole: Bools) -> Floats:
    """Pixels [H, W, 3] with a hole [H, W] filled from its rows, blended with the pixels at its ends."""
    usual, filled = _continue_rows(pixels, hole), pixels.copy()
    columns = np.arange(hole.shape[1])
    for row in np.flatnonzero(hole.any(1)):
        inside = columns[hole[row]]
        # Each run of hidden pixels in a row
        for run in np.split(inside, np.flatnonzero(np.diff(inside) > 1) + 1):
            new = np.repeat(usual[row][None], len(run), 0)
            ends = (
                (run[0] - BESIDE, run[0], run - run[0] + 1),
                (run[-1] + 1, run[-1] + 1 + BESIDE, run[-1] + 1 - run),
            )
            # What lies beside its ends differs from what goes on there, by a difference that fades with distance
            for first, last, away in ends:
                beside = pixels[row, max(first, 0) : last]
                if len(beside):
                    new += np.exp(-away / REACH)[:, None] * (beside.mean(0) - usual[row])
            filled[row, run] = new

    # Soft edges
    share = soften(hole.astype(float), 1.0)[..., None]
    return filled * (1 - share) + soften(filled, 1.5) * share


def _continue_rows(pixels: Floats, hole: Bools) -> Floats:
    """[H, 3]: each row's colour inside a hole: its own pixels most like the row above, else its median."""
    colours = list(_find_medians(pixels, hole))
    for row in np.flatnonzero(hole.any(1)):
        # Of the row's own pixels the BESIDE nearest in colour to the row above
        visible = pixels[row][~hole[row]]
        if row and len(visible):
            distances = np.abs(visible - colours[row - 1]).max(-1)
            colours[row] = visible[np.argsort(distances)[:BESIDE]].mean(0)
    return np.stack(colours)


def _find_medians(pixels: Floats, hole: Bools) -> Floats:
    """[H, 3]: the median of every row's pixels outside a hole; rows without such pixels take the nearest rows'."""
    rows = np.flatnonzero(~hole.all(1))
    if not len(rows):
        return np.broadcast_to(np.median(pixels, axis=(0, 1)), (len(pixels), 3))
    medians = np.stack([np.median(pixels[row][~hole[row]], axis=0) for row in rows])
    return np.stack([np.interp(np.arange(len(pixels)), rows, column) for column in medians.T], axis=-1)


def _sample_beside(pixels: Floats, hole: Bools, unknown: Bools, usual: Floats) -> list[Floats]:
    """[H, 1, 3] each: the existing pixels left and right of a hole, near it and farther away.

    Unknown ones are replaced by the row's `usual` colour [H, 3].
    """
    columns = np.flatnonzero(hole.any(0))
    if not len(columns):
        return []
    left, right = columns[0], columns[-1] + 1
    ends = [(left - away - BESIDE, left - away) for away in FARTHER]
    ends += [(right + away, right + away + BESIDE) for away in FARTHER]
    parts = [slice(max(first, 0), max(last, 0)) for first, last in ends]
    return [
        np.where(np.any(unknown[:, part], axis=1, keepdims=True), usual, pixels[:, part].mean(1))[:, None]
        for part in parts
        if pixels[:, part].size
    ]


def _least_difference(pixels: Floats, references: Floats) -> Floats:
    """[H, W]: how far pixels [H, W, 3] are, in their worst colour, from the nearest of `references` [S, …, 3]."""
    least: Floats = np.abs(pixels - references).max(-1).min(0)
    return least


def grow_within(seed: Bools, mask: Bools) -> Bools:
    """The part of a mask [H, W] that is connected to `seed` (morphological reconstruction, Vincent 1993)."""
    grown, previous = seed & mask, np.zeros_like(seed)
    while (grown != previous).any():
        previous, grown = grown, _grow(grown, 1) & mask
    return grown


def fill_holes(mask: Bools) -> Bools:
    """A mask with its holes filled: all pixels that it separates from the border."""
    outside = np.pad(~mask, 1, constant_values=True)
    border = np.zeros_like(outside)
    border[0] = border[-1] = border[:, 0] = border[:, -1] = True
    filled: Bools = ~grow_within(border, outside)[1:-1, 1:-1]
    return filled


@dataclass(frozen=True, eq=False)
class _CutPiece:
    """A thing by itself: its pixels times their opacity and the opacity [H, W, 4], its shadow, middle and foot."""

    layer: Floats
    shadow: Floats
    middle: tuple[float, float]
    foot: float

    @classmethod
    def of(cls, pixels: Floats, thing: Bools, shade: Floats, box: Box) -> _CutPiece:
        opacity = soften(thing.astype(float), 0.8)[..., None]
        rows, columns = (np.flatnonzero(thing.any(axis)) for axis in (1, 0))
        left, top, right, foot = box
        if len(rows):
            left, top, right, foot = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        own = shade * _make_box_mask(box, thing.shape)
        layer = np.concatenate([pixels * opacity, opacity], axis=-1)
        return cls(layer, own, ((left + right) / 2, (top + foot) / 2), float(foot))

    def shadow_at(self, right: float, scale: float) -> Floats:
        """[H, W]: the share of light that its shadow takes, which neither rises nor turns."""
        return _transform(self.shadow[..., None], (self.middle[0], self.foot), right, 0.0, scale, 0.0)[..., 0]

    def lay_over(self, frame: Floats, right: float, down: float, scale: float, turn: float) -> Floats:
        """A frame [H, W, 3] with the thing over it."""
        moved = _transform(self.layer, self.middle, right, down, scale, turn)
        return frame * (1 - moved[..., 3:]) + moved[..., :3]


def _transform(
    layer: Floats, middle: tuple[float, float], right: float, down: float, scale: float, turn: float
) -> Floats:
    """A layer [H, W, C] in 0…1, rotated and scaled about a point, then shifted."""
    x, y = middle
    cosine, sine = np.cos(np.deg2rad(turn)) / scale, np.sin(np.deg2rad(turn)) / scale
    to_x, to_y = x + right, y + down
    inverse = (cosine, sine, x - cosine * to_x - sine * to_y, -sine, cosine, y + sine * to_x - cosine * to_y)
    channels = [
        Image.fromarray(channel.astype(np.float32)).transform(
            layer.shape[1::-1], Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC
        )
        for channel in np.moveaxis(layer, -1, 0)
    ]
    return np.stack([np.asarray(channel, dtype=float) for channel in channels], axis=-1).clip(0, 1)


def _make_box_mask(box: Box, shape: tuple[int, ...]) -> Bools:
    left, top, right, bottom = box
    y, x = np.ogrid[: shape[0], : shape[1]]
    inside: Bools = (x + 1 > left) & (x < right) & (y + 1 > top) & (y < bottom)
    return inside


def _measure_distance(box: Box, shape: tuple[int, ...]) -> Floats:
    """[H, W]: distance of each pixel from a box's middle; 1 at the middle of its sides."""
    left, top, right, bottom = box
    y, x = np.ogrid[: shape[0], : shape[1]]
    across = (x + 0.5 - (left + right) / 2) / (right - left)
    down = (y + 0.5 - (top + bottom) / 2) / (bottom - top)
    distance: Floats = 2 * np.hypot(across, down)
    return distance


def _grow(mask: Bools, times: int) -> Bools:
    """A mask with the pixels above, below, left and right of it."""
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
    return mask


def soften(values: Floats, radius: float) -> Floats:
    """Values [H, W] or [H, W, C] in 0…1 under a Gaussian blur."""
    if values.ndim == 3:
        return np.stack([soften(channel, radius) for channel in np.moveaxis(values, -1, 0)], axis=-1)
    picture = Image.fromarray((values.clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), dtype=float) / 255
