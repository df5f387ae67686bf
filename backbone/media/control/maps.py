"""Maps of a picture's layout: their kinds, reading them with checks for common mistakes, Canny's edges.

    sketch   outlines of things, white on black     labels  what each pixel shows, in a palette's colours
    lines    every line, white on black             depth   grey, near is white
    edges    Canny's edges, white on black          pose    a stick for each thing, in colours on black

Two more are for ControlNets alone: `normal` (a surface's directions as colours) and `tile` (a blurred picture).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.cli.conditions import LINE_KINDS, RequestedMap
from backbone.io.console import UserError, notify_once, quote
from backbone.io.written import written_path
from backbone.media.clips import FILMS, read_film
from backbone.media.control.outlines import draw_lines, draw_outlines
from backbone.media.shapes import is_same_shape
from backbone.media.sources.decode import (
    count_frames,
    describe_further_frames,
    flatten_on_white,
    lay_on_white,
    map_from_image,
    named_alone,
    open_as,
    open_rgb,
)
from backbone.media.sources.pictures import list_images
from backbone.media.transforms import CROPS, crop_box, resize_picture

Palette = Mapping[str, tuple[int, int, int]]
Box = tuple[float, float, float, float]  # left, top, right, bottom
COMPUTED = ("edges", "lines", "sketch")  # kinds that are computed from a picture without another network
LOW, HIGH = 100.0, 200.0  # Canny's thresholds, of 0…255, as ControlNets were trained with
GREY = (0.15, 0.85)  # between them a pixel is neither ink nor paper
MOST_GREY, MOST_COLOUR = 0.4, 0.06  # share of grey pixels, mean saturation: beyond, it is no line drawing
FAINT = 85  # of 255: a depth map that stays below gets a notice
DARKER_BELOW = (
    32  # of 255: the mean of a depth map's upper third above its lower one's, beyond which a line says so
)
MANY_COLOURS = 512  # in a map of labels of no known palette


@dataclass(frozen=True)
class MapTarget:
    """The picture that a map is for.

    size      (width, height) in pixels
    palette   of labels, if it is known
    drawn_on  the size of the image that it was cropped from, on which a map may have been drawn
    """

    size: tuple[int, int]
    palette: Palette | None = None
    drawn_on: tuple[int, int] | None = None


def read_map(
    requested: RequestedMap, target: MapTarget, *, picture: Image.Image | None = None
) -> Image.Image:
    """A map as its network reads it: RGB of the picture's size. `auto` computes it from `picture`.

    Raises `UserError` for a file that cannot be read or is see-through, for another shape than the picture's, and for
    an image that is no map of its kind: black on white, a photograph, an empty or full one, colours that no label has.
    """
    if requested.path:
        with named_alone():
            picture = open_as(requested.path, partial(convert_map, requested=requested))
        if further := describe_further_frames(Path(requested.path)):
            notify_once(further)
    assert picture is not None
    return prepare_map(requested, target, picture)


def read_maps(
    requested: RequestedMap, target: MapTarget, frames: int, *, film: Sequence[Image.Image] = ()
) -> list[Image.Image]:
    """The maps of a clip's frames: one each from a folder or an animated file, a still for all, or from `film`.

    Raises `UserError` as `read_map`, and for another number of maps than frames.
    """
    if not requested.path:
        return [read_map(requested, target, picture=frame) for frame in film]
    path = written_path(requested.path)
    if path.is_dir():
        files = [record.path for record in list_images(path)]
        refuse_other_count(requested, len(files), frames)
        return [read_map(replace(requested, path=str(file)), target) for file in files]
    if path.suffix.lower() in FILMS or count_frames(path) > 1:
        maps = read_film(path, convert=flatten_on_white if requested.has_colours else lay_on_white).frames
        refuse_other_count(requested, len(maps), frames)
        return [prepare_map(requested, target, frame) for frame in maps]
    return [read_map(requested, target)] * frames


def refuse_other_count(requested: RequestedMap, count: int, frames: int) -> None:
    """`UserError` for another number of maps than the clip has frames."""
    if count != frames:
        raise UserError(
            f"{requested.path} has {count} maps and the clip {frames} frames. Give a map for each frame, one still for "
            "all, or a network that reads maps of some frames (customize clip --sparsectrl)."
        )


def find_numbered_maps(path: str, frames: int) -> dict[int, Path]:
    """The maps of a folder by their frames: the last number in a name, so `dog_0012.png` is the map of frame 12.

    Or files named with their frames: `0=first.png,15=last.png`, where −1 is the last frame. Raises `UserError` for a
    folder without maps, a name without a number, a number outside of the clip's `frames`, and two maps of one frame.
    """
    pairs = files_by_frame(path)
    if pairs:
        return _index_by_frame(pairs, frames)
    if not written_path(path).is_dir():
        raise UserError(
            f"{path} is no folder. SparseCtrl takes one whose files are named by their frames, as 0000.png, or files "
            "with their frames: 0=first.png,15=last.png."
        )
    by_frame: dict[int, Path] = {}
    for record in list_images(path):
        file = Path(str(record.path))
        numbers = re.findall(r"\d+", file.stem)
        if not numbers:
            raise UserError(
                f"{file} has no number in its name. Name it by the frame that it is of, as 0012.png."
            )
        number = int(numbers[-1])
        if number >= frames:
            raise UserError(
                f"{file} is the map of frame {number}, and a clip of {frames} frames has none of that number: the "
                f"first is 0, the last {frames - 1}. Ask for more --frames, or take it out."
            )
        if number in by_frame:
            raise UserError(
                f"{file} and {by_frame[number].name} are both maps of frame {number}. Take one out."
            )
        by_frame[number] = file
    return dict(sorted(by_frame.items()))


def files_by_frame(text: str) -> list[tuple[int, Path]]:
    """The frames and files of `0=first.png,15=last.png`; an empty list for any other text."""
    if not re.match(r"-?\d+=", text):
        return []
    parts = re.split(r",(?=-?\d+=)", text)
    pairs = [part.partition("=") for part in parts]
    return [(int(number), written_path(file.strip())) for number, _, file in pairs]


def _index_by_frame(pairs: Sequence[tuple[int, Path]], frames: int) -> dict[int, Path]:
    by_frame: dict[int, Path] = {}
    for frame, file in pairs:
        if not -frames <= frame < frames:
            raise UserError(
                f"{frame}={file} is the map of frame {frame}, and a clip of {frames} frames has none of that number: "
                f"the first is 0, the last {frames - 1} or -1."
            )
        number = frame % frames
        if number in by_frame:
            raise UserError(f"{file} and {by_frame[number]} are both of frame {number}. Take one out.")
        by_frame[number] = file
    return dict(sorted(by_frame.items()))


def read_numbered_maps(requested: RequestedMap, target: MapTarget, frames: int) -> dict[int, Image.Image]:
    """The maps of some frames of a clip (see `find_numbered_maps`), as their network reads them.

    Raises `UserError` as `read_map`, and for maps of different sizes.
    """
    maps, sizes = {}, {}
    for number, file in find_numbered_maps(requested.path, frames).items():
        sizes[open_rgb(file).size] = file
        if len(sizes) > 1:
            (first_size, first), (second_size, second) = sizes.items()
            raise UserError(
                f"{first.name} and {second.name} in {requested.path} differ in size: {first_size[0]} × {first_size[1]} "
                f"and {second_size[0]} × {second_size[1]} pixels. Make them alike."
            )
        maps[number] = read_map(replace(requested, path=str(file)), target)
    return maps


def prepare_map(requested: RequestedMap, target: MapTarget, picture: Image.Image) -> Image.Image:
    """A decoded map, or for `auto` the map of a picture, as its network reads it; raises as `read_map`."""
    box: Box = (0, 0, *picture.size)
    if requested.path and target.drawn_on is not None and is_same_shape(picture.size, target.drawn_on):
        box = crop_box(picture.size, target.size, CROPS["center"])  # of parts of pixels, as the image's own
    elif requested.path:
        refuse_other_shape(picture.size, target, requested)
    if requested.is_computed:
        computed = compute_map(requested.kind, resize_picture(picture, target.size, box=box))
        if not computed.getbbox():
            source = requested.path or "the picture"
            raise UserError(
                f"No {requested.kind} was found in {source}: it has no strong outlines. Draw the map yourself."
            )
        return computed
    pixels = as_array(picture)
    if requested.inverted:
        pixels = 255 - pixels
    left, top, right, bottom = map(round, box)
    refuse_wrong_kind(pixels[top:bottom, left:right], requested, target.palette)
    if requested.kind == "depth":
        say_dark_below(pixels[top:bottom, left:right], requested)
    return fit_map(Image.fromarray(pixels), requested, target.size, box=box)


def as_array(image: Image.Image) -> np.ndarray:
    """An RGB image as bytes [H, W, 3]."""
    return np.array(image.convert("RGB"), np.uint8)


def as_hints(image: Image.Image) -> Tensor:
    """A map as a tensor [1, 3, H, W] in 0…1."""
    return torch.from_numpy(as_array(image)).permute(2, 0, 1).float().div(255)[None].contiguous()


def fit_map(image: Image.Image, requested: RequestedMap, size: tuple[int, int], *, box: Box) -> Image.Image:
    """A map's `box` at the picture's size: labels by the nearest pixel, lines by area and thresholded, the rest by
    area."""
    if image.size != size:
        notify_once(
            f"{requested.path or requested.kind} has {image.width} × {image.height} pixels and is brought to "
            f"{size[0]} × {size[1]}."
        )
    return resize_map(image, requested.kind, size, box=box)


def resize_map(
    image: Image.Image, kind: str, size: tuple[int, int], *, box: Box | None = None
) -> Image.Image:
    """A map, or a `box` of it, at another size (W, H), resampled as suits its kind."""
    box = (0, 0, *image.size) if box is None else box
    if (box[2] - box[0], box[3] - box[1]) == size and all(side == int(side) for side in box):
        return image.crop((int(box[0]), int(box[1]), int(box[2]), int(box[3])))
    if kind == "labels":
        return image.resize(size, Image.Resampling.NEAREST, box=box)
    smaller = size[0] < box[2] - box[0]
    resized = image.resize(size, Image.Resampling.BOX if smaller else Image.Resampling.BICUBIC, box=box)
    if kind not in LINE_KINDS:
        return resized
    # A line stays where it keeps half of its white
    ink = as_array(resized).max(2)
    white = (ink >= max(int(ink.max()) / 2, 1)).astype(np.uint8) * 255
    return Image.fromarray(white).convert("RGB")


# Maps of a picture ------------------------------------------------------------------------------------------


def compute_map(kind: str, picture: Image.Image) -> Image.Image:
    """The map of a picture, RGB of its size; `UserError` for a kind that needs another network."""
    if kind not in COMPUTED:
        raise UserError(
            f"A map of {kind} is found by another network, which is not here. Give the map itself: "
            f"--condition {kind}=map.png; without a network there are {', '.join(COMPUTED)}."
        )
    pixels = as_hints(picture)[0]
    draw = {"edges": canny, "lines": draw_lines, "sketch": draw_outlines}[kind]
    white = draw(pixels).mul(255).byte().numpy()
    return Image.fromarray(white).convert("RGB")


def canny(picture: Tensor, low: float = LOW, high: float = HIGH) -> Tensor:
    """Edges [H, W], 0 or 1, of a picture [3, H, W] in 0…1 (Canny 1986), as OpenCV finds them.

    Sobel's gradient of the channel with the largest |dx| + |dy|, thinned across the edge, kept above `high` and where
    it is above `low` and connected to such a pixel.
    """
    # Sobel's gradient of each channel [2, 3, H, W]; the strongest channel counts
    bytes_ = picture.mul(255).round()[:, None]
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=picture.device)
    padded = F.pad(bytes_, (1, 1, 1, 1), mode="replicate")
    gradients = torch.stack([F.conv2d(padded, kernel[None, None])[:, 0] for kernel in (across, across.T)])
    strongest = gradients.abs().sum(0).argmax(0)
    dx, dy = gradients.gather(1, strongest.expand(2, 1, -1, -1))[:, 0]
    strength = _thin_edges(dx, dy)

    # Hysteresis: strong edges grow along weak ones until nothing changes
    edges, weak = strength > high, strength > low
    while True:
        grown = (F.max_pool2d(edges[None].float(), 3, 1, 1)[0] > 0) & weak
        if torch.equal(grown, edges):
            return edges.to(picture.dtype)
        edges = grown


def _thin_edges(dx: Tensor, dy: Tensor) -> Tensor:
    """|dx| + |dy| [H, W] where it exceeds both neighbours across the edge, 0 elsewhere."""
    strength = dx.abs() + dy.abs()
    padded = F.pad(strength, (1, 1, 1, 1))
    height, width = strength.shape

    def neighbour(down: int, right: int) -> Tensor:
        return padded[1 + down : 1 + down + height, 1 + right : 1 + right + width]

    # The gradient's direction, rounded to 0°, 45°, 90° or 135°, says which two neighbours count
    x, y = dx.abs(), dy.abs()
    flat, steep = y < x * 0.41421356, y > x * 2.41421356  # tan 22.5° and tan 67.5°
    falling = dx * dy < 0
    before = torch.where(flat, neighbour(0, -1), torch.where(steep, neighbour(-1, 0), neighbour(-1, -1)))
    after = torch.where(flat, neighbour(0, 1), torch.where(steep, neighbour(1, 0), neighbour(1, 1)))
    slanted = ~flat & ~steep
    before = torch.where(slanted & falling, neighbour(-1, 1), before)
    after = torch.where(slanted & falling, neighbour(1, -1), after)

    # Of two equal neighbours one is kept, as in OpenCV
    ties = torch.where(slanted, strength > after, strength >= after)
    return torch.where((strength > before) & ties, strength, 0)


# Common mistakes --------------------------------------------------------------------------------------------


def convert_map(image: Image.Image, requested: RequestedMap) -> Image.Image:
    """The map that a file stores, RGB: its values as they are, or a picture's colours in sRGB.

    `UserError` for see-through pixels: the colour behind them is unknown.
    """
    stored = map_from_image(image)
    if stored.mode == "RGBA":
        raise UserError(
            f"{requested.path} is see-through in places, so its background is not said. Save it without "
            "transparency, lines white on black."
        )
    return flatten_on_white(image) if requested.has_colours else stored


def refuse_other_shape(size: tuple[int, int], target: MapTarget, requested: RequestedMap) -> None:
    """`UserError` for a map of another shape than the picture."""
    (width, height), (wide, high) = size, target.size
    if is_same_shape(size, target.size):
        return
    if target.drawn_on is None:
        remedy = "Crop the map, or draw a picture of its shape with --width and --height"
    else:
        remedy = "Make the map of the whole image"
        if requested.kind in COMPUTED:
            remedy += f", or let it be found there: --condition {requested.kind}=auto"
    raise UserError(
        f"{requested.path} has {width} × {height} pixels and the picture {wide} × {high}: another shape. {remedy}."
    )


def refuse_wrong_kind(pixels: np.ndarray, requested: RequestedMap, palette: Palette | None) -> None:
    """`UserError` for pixels [H, W, 3] of 0…255 that are no map of this kind."""
    name, kind = requested.path, requested.kind
    if kind in LINE_KINDS:
        refuse_no_lines(pixels, requested)
    elif kind == "labels":
        refuse_foreign_colours(pixels, requested, palette)
    elif kind == "depth" and saturation(pixels) > MOST_COLOUR:
        raise UserError(f"{name} is in colours, and a depth map is grey, near white. Give the depth map.")
    elif kind == "depth" and FAINT > pixels.max() > 0:
        notify_once(
            f"{name} is dark everywhere: its whitest value is {pixels.max()} of 255, and what is near is white in a "
            "depth map. Values in millimetres are none; scale them, near to white."
        )
    elif kind == "pose" and float((pixels.max(2) > 38).mean()) > 0.5:
        raise UserError(f"{name} is no pose on black: most of it is not black. Draw sticks on black.")
    refuse_empty(pixels, requested)


def say_dark_below(pixels: np.ndarray, requested: RequestedMap) -> None:
    """Say that a depth map [H, W, 3] is darker at the bottom, which is near in most pictures, than at the top."""
    grey, third = pixels.mean(2), max(len(pixels) // 3, 1)
    if grey[:third].mean() - grey[-third:].mean() > DARKER_BELOW:
        remedy = (
            "leave :inverted out"
            if requested.inverted
            else f"say --condition {quote(f'depth={requested.path}:inverted')}"
        )
        notify_once(
            f"{requested.path} is darker at its bottom than at its top, and what is near is white in a depth map. If "
            f"it holds distances, {remedy}."
        )


def refuse_no_lines(pixels: np.ndarray, requested: RequestedMap) -> None:
    """`UserError` for a map that is not white lines on black."""
    name, kind = requested.path, requested.kind
    ink = pixels.mean(2) / 255
    if pixels.min() > 215:
        raise UserError(f"{name} is white everywhere, so it says nothing. Draw white lines on black.")
    if pixels.min() > 127:
        refuse_empty(pixels, requested)
    grey = float(((ink > GREY[0]) & (ink < GREY[1])).mean())
    if grey > MOST_GREY or saturation(pixels) > MOST_COLOUR:
        raise UserError(
            f"{name} looks like a photograph, and --condition {kind} takes a map, white lines on black. Make one: "
            f"customize map {kind} {quote(name)} --out {kind}.png, or let it be found: --condition "
            f"{quote(f'{kind}={name}:auto')}."
        )
    if float(ink.mean()) > 0.5:
        remedy = (
            "Leave :inverted out"
            if requested.inverted
            else f"Invert it, or say --condition {quote(f'{kind}={name}:inverted')}"
        )
        raise UserError(f"{name} looks like black on white, and lines are white on black. {remedy}.")


def refuse_empty(pixels: np.ndarray, requested: RequestedMap) -> None:
    """`UserError` for a map of one colour."""
    if pixels.max() == 1:
        raise UserError(f"{requested.path} has values of 0 and 1, and white is 255. Multiply them by 255.")
    if int(np.ptp(pixels.reshape(-1, 3).astype(int), axis=0).max()) < 26:
        raise UserError(
            f"{requested.path} shows nothing: it is one colour everywhere. Draw on it, or leave the condition out."
        )


def refuse_foreign_colours(pixels: np.ndarray, requested: RequestedMap, palette: Palette | None) -> None:
    """`UserError` for colours that no label of the palette has; without a palette for as many as a photograph's."""
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    if palette is None:
        if len(colours) > MANY_COLOURS:
            raise UserError(
                f"{requested.path} has {len(colours)} colours, so it looks like a photograph and no map of labels. "
                "Give the map."
            )
        return
    label_colours = {tuple(colour) for colour in palette.values()}
    foreign = [
        (int(count), tuple(map(int, colour)))
        for colour, count in zip(colours, counts, strict=True)
        if tuple(map(int, colour)) not in label_colours
    ]
    if not foreign:
        return
    total = pixels.shape[0] * pixels.shape[1]
    examples = ", ".join(
        f"{_format_hex(colour)} ({count / total:.1%}; the nearest is {_find_nearest(colour, palette)})"
        for count, colour in sorted(foreign, reverse=True)[:3]
    )
    raise UserError(
        f"{requested.path} has colours that no label has: {examples}{' …' if len(foreign) > 3 else ''}. Use the "
        "labels' own, and save as PNG without smoothing."
    )


def _find_nearest(colour: tuple[int, ...], palette: Palette) -> str:
    """The label with the nearest colour, followed by that colour."""

    def distance(label: str) -> int:
        return sum((a - b) ** 2 for a, b in zip(colour, palette[label], strict=True))

    label = min(palette, key=distance)
    return f"{label} {_format_hex(palette[label])}"


def _format_hex(colour: tuple[int, ...]) -> str:
    return "#" + "".join(f"{value:02x}" for value in colour)


def saturation(pixels: np.ndarray) -> float:
    """The mean difference of the largest and the smallest channel of pixels [H, W, 3], 0…1."""
    return float((pixels.max(2).astype(int) - pixels.min(2)).mean() / 255)
