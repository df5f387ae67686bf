"""Control maps: computed from a picture, or the true ones of a scene of moji's world."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image

from backbone.io.console import UserError, notify
from backbone.media.control.maps import COMPUTED, compute_map
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.sources.decode import open_named
from backbone.media.transforms import crop_square
from backbone.world.maps import draw_maps, look_at
from backbone.world.rendering.record import SIZE
from backbone.world.scene import Scene

CROPPED = 0.15  # share of a picture below which cropping is not reported: cameras' aspect ratios

PICTURE, SHEET = "picture.png", "sheet.png"
WHAT = {  # below each map of a sheet
    "sketch": "outlines of things, 2 px, white on black",
    "lines": "every line, white on black",
    "edges": "Canny's edges, white on black",
    "labels": "what is where, by colour",
    "depth": "grey, white is near",
    "pose": "red from foot to top, green from left to right",
}


def render_maps(scene: Scene, kinds: Sequence[str]) -> tuple[Image, dict[str, Image]]:
    """A scene's picture, and its true maps of these kinds; edges are those of the picture.

    Raises `UserError` for a kind that a scene does not have, and where the font is missing.
    """
    rendered, layers = look_at(scene)
    maps = draw_maps(layers)
    for kind in kinds:
        if kind != "edges" and kind not in maps:
            raise UserError(f"A scene has no {kind}. Choose from edges, {', '.join(maps)}.")
    return rendered.image, {
        kind: compute_map(kind, rendered.image) if kind == "edges" else maps[kind] for kind in kinds
    }


def compute_maps(
    path: str, kinds: Sequence[str], *, model: str | None = None, resolution: int = 0
) -> tuple[Image, dict[str, Image]]:
    """A picture cropped to the model's square, and the maps computed from it; all kinds if none are given.

    Raises `UserError` for a kind that needs a network that is not available.
    """
    unavailable = [kind for kind in kinds if kind not in COMPUTED]
    if unavailable:
        raise UserError(
            f"A map of {unavailable[0]} of a photograph is made by a network that is not here. Draw the map, or take "
            f"that of a scene: customize map {unavailable[0]} --scene 7. Found without one: {', '.join(COMPUTED)}."
        )
    opened = open_named(path)
    lost = 1 - min(opened.size) / max(opened.size)
    if lost > CROPPED:
        notify(
            f"{path} is {opened.width} × {opened.height} pixels and a map square: {min(lost, 0.99):.0%} of it is "
            f"cropped off, at both ends alike. Beside --condition, KIND={path}:auto finds the map in the shape that "
            "is drawn."
        )
    picture = crop_square(opened, resolution or _find_resolution(model))
    return picture, {kind: compute_map(kind, picture) for kind in kinds or COMPUTED}


def _find_resolution(model: str | None) -> int:
    """The resolution of a model, moji's if none is named, in pixels a side."""
    if model is None:
        return SIZE
    from backbone.models.model import Backbone

    return Backbone.open(model).resolution


def save_map(path: Path, image: Image) -> None:
    """Write a map as PNG; labels keep their palette."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(path, image)


def save_maps(folder: Path, picture: Image, maps: Mapping[str, Image], title: str) -> dict[str, str]:
    """Write the picture, its maps and a sheet of them; return the names of the files by kind."""
    save_png(folder / PICTURE, picture)
    files = {kind: f"{kind}.png" for kind in maps}
    for kind, image in maps.items():
        save_map(folder / files[kind], image)
    cells = [Cell(picture, "the picture")]
    cells += [Cell(image.convert("RGB"), f"{kind}: {WHAT[kind]}") for kind, image in maps.items()]
    save_png(folder / SHEET, draw_sheet([cells[:4], cells[4:]] if len(cells) > 4 else [cells], title=title))
    return files
