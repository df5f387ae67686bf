"""The four styles of the world, as filters of a rendered image."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageChops, ImageFilter


def pixel_art(image: Image.Image) -> Image.Image:
    """Blocks of 4 × 4 pixels in quantised colours."""
    small = image.reduce(4)
    levels = np.asarray(small, dtype=np.float32)
    small = Image.fromarray(((levels / 24).round() * 24).clip(0, 255).astype(np.uint8), "RGB")
    return small.resize(image.size, Image.Resampling.NEAREST)


def pencil_sketch(image: Image.Image) -> Image.Image:
    """Grey lines on white: the image divided by its own blur (colour dodge)."""
    grey = np.asarray(image.convert("L"), dtype=np.float32) + 1
    blurred = np.asarray(image.convert("L").filter(ImageFilter.GaussianBlur(4)), dtype=np.float32) + 1
    lines = np.clip(grey / blurred, 0, 1) ** 1.6
    tone = 0.86 + 0.14 * grey / 256
    return Image.fromarray((250 * lines * tone).astype(np.uint8), "L").convert("RGB")


def watercolor(image: Image.Image) -> Image.Image:
    """Bleeding light colours with darker edges."""
    flat = image.filter(ImageFilter.MedianFilter(3)).filter(ImageFilter.GaussianBlur(0.8))
    light = np.asarray(flat, dtype=np.float32)
    grey = light.mean(-1, keepdims=True)
    light = grey + (light - grey) * 1.35
    light = 255 - (255 - light) * 0.72
    spread = np.asarray(morphological_gradient(flat.convert("L"), 3), dtype=np.float32)[..., None]
    return Image.fromarray((light - 0.45 * spread).clip(0, 255).astype(np.uint8), "RGB")


def neon_drawing(image: Image.Image) -> Image.Image:
    """Glowing outlines on black, in the colours of the outlined regions."""
    soft = image.filter(ImageFilter.GaussianBlur(0.6))
    channels = [morphological_gradient(channel, 3) for channel in soft.split()]
    lines = np.stack([np.asarray(channel, dtype=np.float32) for channel in channels], -1)
    strength = np.clip((lines.max(-1, keepdims=True) - 26) / 80, 0, 1)
    brightest = ImageChops.lighter(image, image.filter(ImageFilter.MaxFilter(3)))
    colour = np.asarray(brightest, dtype=np.float32)
    least, most = colour.min(-1, keepdims=True), colour.max(-1, keepdims=True)
    vivid = np.clip((colour - 0.8 * least) / np.maximum(most - 0.8 * least, 1), 0, 1)
    outlines = Image.fromarray((255 * strength * vivid).astype(np.uint8), "RGB")
    glow = np.asarray(outlines.filter(ImageFilter.GaussianBlur(2.5)), dtype=np.float32)
    result = np.asarray(outlines, dtype=np.float32) + 0.8 * glow + np.array([6, 4, 16], dtype=np.float32)
    return Image.fromarray(result.clip(0, 255).astype(np.uint8), "RGB")


def morphological_gradient(channel: Image.Image, width: int) -> Image.Image:
    """Local maximum minus local minimum of a grey image, in windows of `width` pixels."""
    return ImageChops.subtract(
        channel.filter(ImageFilter.MaxFilter(width)), channel.filter(ImageFilter.MinFilter(width))
    )


STYLES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "a pixel art of": pixel_art,
    "a pencil sketch of": pencil_sketch,
    "a watercolor of": watercolor,
    "a neon drawing of": neon_drawing,
}
