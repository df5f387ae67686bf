"""Textures with natural-image statistics: dead leaves and 1/f noise."""

from __future__ import annotations

import math
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from backbone.world.rendering.render import SIZE

Pixels = NDArray[np.uint8]


def draw_texture(seed: int) -> Pixels:
    """A texture [H, W, 3]: dead leaves (55 %), 1/f noise (30 %) or a blend of both."""
    random = Random(f"{seed}/texture")
    chance = random.random()
    if chance < 0.55:
        return dead_leaves(random)
    if chance < 0.85:
        return one_over_f(random)
    blend = random.uniform(0.3, 0.7)
    return (blend * dead_leaves(random) + (1 - blend) * one_over_f(random)).astype(np.uint8)


def dead_leaves(random: Random) -> Pixels:
    """Dead-leaves model: occluding shapes whose radii follow a power law of exponent 3 (Lee, Mumford & Huang 2001)."""
    side = 2 * SIZE
    image = Image.new("RGB", (side, side), sample_colour(random))
    pen = ImageDraw.Draw(image)
    smallest, largest = 2 * random.uniform(1.5, 4), 2 * random.uniform(24, 60)
    for _ in range(random.randint(60, 900)):
        # Inverse of the cumulative distribution of p(r) ∝ r⁻³ between the smallest and the largest
        share = random.random()
        radius = 1 / math.sqrt(share / smallest**2 + (1 - share) / largest**2)
        x, y = random.uniform(0, side), random.uniform(0, side)
        corners = random.choice((0, 0, 3, 4, 5))
        if corners == 0:
            stretch = random.uniform(0.5, 1)
            pen.ellipse(
                (x - radius, y - radius * stretch, x + radius, y + radius * stretch),
                fill=sample_colour(random),
            )
        else:
            turn = random.uniform(0, math.tau)
            points = [
                (
                    x + radius * math.cos(turn + math.tau * k / corners),
                    y + radius * math.sin(turn + math.tau * k / corners),
                )
                for k in range(corners)
            ]
            pen.polygon(points, fill=sample_colour(random))

    # At half the size, with a little 1/f noise
    flat = np.asarray(image.reduce(2), dtype=np.float32)
    return (
        (flat + random.uniform(0, 0.5) * (one_over_f(random).astype(np.float32) - 128))
        .clip(0, 255)
        .astype(np.uint8)
    )


def one_over_f(random: Random) -> Pixels:
    """Coloured noise of amplitude 1/f^p, p from 0.9 to 1.8, around a random colour."""
    source = np.random.default_rng(random.getrandbits(32))
    rows, columns = np.fft.fftfreq(SIZE)[:, None], np.fft.rfftfreq(SIZE)[None]

    # Complex white noise in the spectrum, scaled by 1/f^p
    amplitude = np.maximum(np.hypot(rows, columns), 1 / SIZE) ** -random.uniform(0.9, 1.8)
    spectrum = source.normal(size=(3, SIZE, SIZE // 2 + 1)) + 1j * source.normal(
        size=(3, SIZE, SIZE // 2 + 1)
    )
    noise = np.fft.irfft2(spectrum * amplitude, s=(SIZE, SIZE))
    noise /= noise.std()

    # Three channels, correlated by a random mixing matrix
    mixing = np.eye(3) * random.uniform(0.2, 1) + source.normal(size=(3, 3)) * 0.3 + 0.5
    mixed = np.einsum("ij,jhw->hwi", mixing, noise)
    spread = random.uniform(16, 60)
    noisy: Pixels = (
        (np.array(sample_colour(random)) + spread * mixed / mixed.std()).clip(0, 255).astype(np.uint8)
    )
    return noisy


def sample_colour(random: Random) -> tuple[int, int, int]:
    """A random colour, more often greyish."""
    grey, vivid = random.randint(0, 255), random.random() ** 1.5
    red, green, blue = (round(grey + vivid * (random.randint(0, 255) - grey)) for _ in range(3))
    return red, green, blue
