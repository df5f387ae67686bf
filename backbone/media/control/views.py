"""A camera that moves over one drawing: the frames of a clip, for models without camera conditioning.

    views = plan_views(read_camera("pan-left", 16, (128, 128)), (128, 128), multiple=32)
    frames = views.look_at([drawing])                # the drawing is 192 × 128; 16 frames of 128 × 128

The drawing is the plane of a flat picture's camera, at depth 1, so a frame is exactly the drawing under a homography,
and nothing has a parallax unless `Views.nearness` gives each pixel's. If the camera pans, the drawing is larger. If it
zooms out or rolls, the drawing is seen from nearer, by as much as keeps every frame inside it; if the first frame is an
existing picture, nothing is seen from nearer, and the drawing goes on around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from backbone.io.console import UserError
from backbone.media.control.camera import CORNERS, CameraPath, find_homographies
from backbone.media.transforms import to_image, to_tensor

LARGEST = 4.0  # times a frame's area
Floats = NDArray[np.float64]
Size = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Views:
    """A camera's views of a drawing.

    size          (width, height) of a frame, in pixels
    canvas        (width, height) of the drawing
    corner        (x, y) in the drawing of the picture that the same words draw without a camera
    homographies  [F, 3, 3]: from pixels of a frame to pixels of the drawing, as homogeneous coordinates
    pans          [F]: how far the camera has gone to the right, in pixels of the drawing
    nearness      [F or 1, H, W] of the drawing, as 1/depth: the share of a pan by which each pixel moves; None: 1
    """

    size: Size
    canvas: Size
    corner: tuple[int, int]
    homographies: Floats
    pans: Floats
    nearness: Floats | None = None

    def with_nearness(self, nearness: Floats) -> Views:
        """The same views with the nearness of the drawing's pixels [H, W], or [F, H, W] of one for each frame."""
        return replace(self, nearness=nearness.reshape(-1, *self.canvas[::-1]))

    def look_at(self, drawings: Sequence[Image.Image]) -> list[Image.Image]:
        """The camera's frames of one drawing, or of one for each frame."""
        count = len(self.homographies)
        drawings = drawings if len(drawings) == count else [drawings[0]] * count
        if self.nearness is None or not self.pans.any():
            return [
                drawing.transform(
                    self.size,
                    Image.Transform.PERSPECTIVE,
                    tuple((view / view[2, 2]).flat)[:8],
                    Image.Resampling.BICUBIC,
                )
                for drawing, view in zip(drawings, self.homographies, strict=True)
            ]
        nearness = np.broadcast_to(self.nearness, (count, *self.nearness.shape[1:]))
        views = zip(drawings, self.homographies, self.pans, nearness, strict=True)
        return [_draw_with_parallax(*view, self.size) for view in views]

    def lay_out(self, image: Image.Image) -> Image.Image:
        """A map of the picture without a camera, on a black canvas, at that picture's place in the drawing."""
        canvas = Image.new(image.mode, self.canvas)
        canvas.paste(image.resize(self.size) if image.size != self.size else image, self.corner)
        return canvas


def plan_views(
    path: CameraPath, size: Size, *, multiple: int = 1, grid: int = 1, around: bool = False
) -> Views:
    """The views of a path on a drawing.

    multiple  the drawing's sides are multiples of this many pixels
    grid      the picture without a camera is placed at multiples of this many pixels
    around    the drawing goes on around that picture, however far the camera zooms out or rolls

    Raises `UserError` for a path that looks past the drawing, or that needs one more than 4 times as large as a frame.
    """
    # Frame → picture in pixels: diag(w, h, 1)·H⁻¹·diag(w, h, 1)⁻¹, and the box [2, 2] that each view covers
    scale = np.array([*size, 1.0])
    homographies = np.linalg.inv(find_homographies(path)) * scale[:, None] / scale  # in pixels
    boxes = np.stack([_bound_view(view, size, path.name) for view in homographies])  # [F, 2, 2]

    # The drawing is seen from nearer by as much as the largest view exceeds a frame
    middle = np.array(size) / 2
    nearer = 1.0 if around else max(1.0, float(((boxes[:, 1] - boxes[:, 0]) / size).max()))
    boxes = (boxes - middle) / nearer + middle

    # The drawing holds the picture and all views: outwards to the grid, its sides up to the multiple
    low, high = np.minimum(boxes[:, 0].min(0), 0), np.maximum(boxes[:, 1].max(0), size)
    low, high = np.floor(low / grid + 1e-6) * grid, np.ceil(high / grid - 1e-6) * grid
    sides = [math.ceil(side / multiple) * multiple for side in high - low]
    if sides[0] * sides[1] > LARGEST * size[0] * size[1]:
        raise UserError(
            f"--camera {path.name} goes so far that it needs a drawing of {sides[0]} × {sides[1]} pixels, more than "
            f"{LARGEST:g} times a frame of {size[0]} × {size[1]}. Give a shorter path."
        )

    # Frame → drawing: the view of the picture, then the picture's place in the drawing
    corner = (np.array(sides) - (high - low)) // (2 * grid) * grid - low
    shift = middle - middle / nearer + corner
    to_drawing = np.array([[1 / nearer, 0, shift[0]], [0, 1 / nearer, shift[1]], [0, 0, 1]])
    pans = path.positions[:, 0] * path.intrinsics[0, 0] * size[0] / nearer
    return Views(
        size, (sides[0], sides[1]), (int(corner[0]), int(corner[1])), to_drawing @ homographies, pans
    )


def _draw_with_parallax(
    drawing: Image.Image, view: Floats, pan: float, nearness: Floats, size: Size
) -> Image.Image:
    """The view of a drawing whose pixels move by `nearness` [H, W] times a sideways pan; a plane moves by 1.

    The pixel that a plane shows at x + pan lies at s with s − nearness(s)·pan = x, solved row by row.
    """
    # s(x) by row: x as a function of s on the pixels, inverted by interpolation
    width, height = drawing.size
    columns = np.arange(width) + 0.5
    source = np.stack([np.interp(columns - pan, columns - pan * row, columns) for row in nearness])

    # The frame's pixels [H, W] in the drawing, as grid_sample has places (−1…1)
    y, x = np.meshgrid(np.arange(size[1]) + 0.5, np.arange(size[0]) + 0.5, indexing="ij")
    points = np.stack([x, y, np.ones_like(x)], axis=-1) @ view.T
    grid = torch.from_numpy(points[..., :2] / points[..., 2:] * 2 / (width, height) - 1)[None]

    # Their columns replaced by s, then the drawing looked up there
    x_seen = F.grid_sample(
        torch.from_numpy(source)[None, None], grid, padding_mode="border", align_corners=False
    )
    grid[..., 0] = x_seen[:, 0] * 2 / width - 1
    pixels = to_tensor(drawing)[None].double()
    rendered = F.grid_sample(pixels, grid, mode="bicubic", padding_mode="border", align_corners=False)
    return to_image(rendered[0].float())


def _bound_view(view: Floats, size: Size, name: str) -> Floats:
    """The box [2, 2] around a frame's view, in pixels of the first picture."""
    corners = np.concatenate([CORNERS * size, np.ones((4, 1))], axis=1) @ view.T
    if (corners[:, 2] <= 1e-6).any():
        raise UserError(f"--camera {name} looks past what is drawn. Give a path that turns less.")
    points = corners[:, :2] / corners[:, 2:]
    return np.stack([points.min(0), points.max(0)])
