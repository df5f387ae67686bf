"""Rendering scenes: images of 128 × 128 pixels with a mask of every thing, a few milliseconds each."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont, ImageOps

from backbone.io.console import UserError
from backbone.world.rendering.anchors import AccessoryAnchor, find_anchor
from backbone.world.rendering.record import DECORATION, GROUND, WALL, WATER, Part, Record, Stick, find_label
from backbone.world.rendering.record import SIZE as SIZE
from backbone.world.rendering.record import SUPERSAMPLING as SUPERSAMPLING
from backbone.world.rendering.styles import STYLES
from backbone.world.scene import HORIZONS, Scene
from backbone.world.words import Thing, load_vocabulary

FONT_PATHS = (
    "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/noto/NotoColorEmoji.ttf",
    "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
)
FONT_VARIABLE = "LIMNER_EMOJI_FONT"
FLOATING = ("under the sea", "in space")
Colour = tuple[int, int, int]


@dataclass(frozen=True)
class Rendering:
    """An image (RGB) and for each thing a mask (L, 0…255, soft edges, accessories included)."""

    image: Image.Image
    masks: tuple[Image.Image, ...]


def render(scene: Scene, *, without: int | None = None, record: Record | None = None) -> Rendering:
    """Render a scene; the thing of number `without` is left out, its mask is empty, and all else is unchanged.

    `record` is refilled. Raises `UserError` if the emoji font is missing.
    """
    record = Record() if record is None else record
    canvas, horizon = draw_place(scene, record)
    figures = place_figures(scene, horizon)
    masks: dict[int, Image.Image] = {}
    for number in sorted(range(len(figures)), key=lambda number: figures[number].depth or 0.0):
        figure = figures[number]
        painted, mask = draw_figure(canvas.copy(), figure)
        if number == without:
            mask = Image.new("L", mask.size, 0)
        else:
            canvas = painted
            foot = figure.foot if figure.depth is None else None
            record.parts.append(
                Part(find_label(figure.thing.noun), mask, foot, figure.depth, find_stick(figure))
            )
        masks[number] = mask
    picture = canvas.convert("RGB")
    if scene.style:
        picture = STYLES[scene.style](picture)
    return Rendering(picture, tuple(masks[number] for number in range(len(figures))))


def find_font() -> Path:
    """Find the emoji font; `UserError` with how to install it if it is missing."""
    for candidate in (os.environ.get(FONT_VARIABLE), *FONT_PATHS):
        if candidate and Path(candidate).is_file():
            return Path(candidate)
    raise UserError(
        "Rendering new scenes needs the Noto Color Emoji font, which is not on this machine. "
        f"Install it (Debian: apt-get install fonts-noto-color-emoji) or name its file in {FONT_VARIABLE}."
    )


@lru_cache(maxsize=512)
def load_glyph(character: str) -> Image.Image:
    """A glyph as RGBA, cropped to its bounding box."""
    font = ImageFont.truetype(str(find_font()), 109)
    image = Image.new("RGBA", (176, 176), (0, 0, 0, 0))
    ImageDraw.Draw(image).text((16, 16), character, font=font, embedded_color=True)
    box = image.getbbox()
    if box is None:
        raise UserError(f"The font {find_font()} has no glyph for {character!r}. Install a newer one.")
    return image.crop(box)


# --- things ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A thing and its position: longest side, x of its middle and y of its foot (pixels), mirroring, shadow opacity.

    angle  in degrees, clockwise, about its middle; x and foot are those of the upright thing
    depth  0 far … 1 near; None: from its foot
    """

    thing: Thing
    size: float
    x: float
    foot: float
    mirrored: bool
    shadow: float
    angle: float = 0.0
    depth: float | None = None


def place_figures(scene: Scene, horizon: float) -> list[Figure]:
    """The position of every thing of a scene: its pose, or sampled if the scene has no poses.

    Only a pose mirrors a thing. No caption says which way a dog looks, so a model that has seen both draws heads at
    both ends. The random draw that once decided it stays, so that all other numbers of the scenes stay too.
    """
    random = scene.random("layout")
    shadow = 0.0 if scene.place in FLOATING else random.uniform(0.22, 0.42)
    floating = scene.place in FLOATING
    lowest = 120.0
    if scene.poses is not None:
        return [
            Figure(
                thing, pose.size, pose.x, pose.foot, pose.mirrored,
                shadow if pose.foot > horizon else 0.0, pose.angle, pose.depth,
            )
            for thing, pose in zip(scene.figures, scene.poses, strict=True)
        ]  # fmt: skip
    if len(scene.things) == 1 and not scene.pair:
        thing = scene.things[0]
        size = random.uniform(29, 40) if thing.small else random.uniform(60, 82)
        x = random.uniform(30, 98) if thing.small else random.uniform(48, 80)
        foot = random.uniform(76, lowest) if floating else random.uniform(max(horizon + 8, 92), lowest)
        random.random()
        return [Figure(thing, size, x, max(foot, size + 22), False, shadow)]
    figures = []
    for thing, middle in zip(scene.figures, (33.0, 95.0), strict=True):
        size = random.uniform(44, 58)
        foot = random.uniform(80, lowest) if floating else random.uniform(max(horizon + 8, 94), lowest)
        figures.append(Figure(thing, size, middle + random.uniform(-3, 3), foot, False, shadow))
        random.random()
    return figures


def draw_figure(canvas: Image.Image, figure: Figure) -> tuple[Image.Image, Image.Image]:
    """Draw a figure and its shadow on the canvas; returns (canvas, mask)."""
    sprite, left, top = draw_sprite(figure)
    if figure.shadow:
        width, foot = figure.size * 0.8, figure.foot
        if figure.angle % 360 and (bounds := sprite.getbbox()):
            foot = top + bounds[3]
        dark = Image.new("L", canvas.size, 0)
        box = (figure.x - width / 2, foot - width * 0.11, figure.x + width / 2, foot + width * 0.07)
        ImageDraw.Draw(dark).ellipse(box, fill=round(255 * figure.shadow))
        dark = dark.filter(ImageFilter.GaussianBlur(2))
        canvas.paste((12, 12, 24), mask=dark)
    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    layer.paste(sprite, (left, top))
    canvas.paste(layer, mask=layer.getchannel("A"))
    return canvas, layer.getchannel("A")


def draw_sprite(figure: Figure) -> tuple[Image.Image, int, int]:
    """The coloured, mirrored sprite with its accessory, and the pixel of its upper left corner."""
    thing = figure.thing
    body = load_glyph(load_vocabulary().glyph(thing.noun))
    anchor = find_anchor(thing.noun, body)
    if thing.colour:
        body = recolour_glyph(thing.noun, thing.colour)

    # The glyph at the figure's size, with room above and beside it for the accessory
    scale = figure.size / max(body.size)
    size = (max(1, round(body.width * scale)), max(1, round(body.height * scale)))
    margin = round(figure.size * 0.45)
    sprite = Image.new("RGBA", (size[0] + 2 * margin, size[1] + margin), (0, 0, 0, 0))
    sprite.paste(body.resize(size, Image.Resampling.LANCZOS), (margin, margin))
    if thing.accessory:
        draw_accessory(sprite, thing.accessory, anchor, margin, size, figure.size)
    if figure.mirrored:
        sprite = ImageOps.mirror(sprite)
    if figure.angle % 360:
        return turn_sprite(sprite, figure, size[1])
    return sprite, round(figure.x - sprite.width / 2), round(figure.foot - sprite.height)


def turn_sprite(sprite: Image.Image, figure: Figure, height: int) -> tuple[Image.Image, int, int]:
    """A sprite turned about the middle of its body, which has this height, and its upper left corner."""
    middle = sprite.height - height / 2  # accessories stand out above, nothing below
    side = 2 * math.ceil(math.hypot(sprite.width / 2, middle))
    board = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    board.paste(sprite, (round((side - sprite.width) / 2), round(side / 2 - middle)))
    turned = board.rotate(-figure.angle, Image.Resampling.BICUBIC)
    return turned, round(figure.x - side / 2), round(figure.foot - height / 2 - side / 2)


def find_stick(figure: Figure) -> Stick:
    """The pose stick of a figure without its accessory."""
    body = load_glyph(load_vocabulary().glyph(figure.thing.noun))
    scale = figure.size / max(body.size)
    return span_stick(figure, body.width * scale, body.height * scale)


def span_stick(figure: Figure, width: float, height: float) -> Stick:
    """The pose stick of a figure whose body has this width and height."""
    angle = math.radians(figure.angle)
    upwards = height / 2 * math.sin(angle), -height / 2 * math.cos(angle)
    half_width = -width / 2 if figure.mirrored else width / 2
    rightwards = half_width * math.cos(angle), half_width * math.sin(angle)
    x, y = figure.x, figure.foot - height / 2
    return Stick(
        foot=(x - upwards[0], y - upwards[1]),
        top=(x + upwards[0], y + upwards[1]),
        left=(x - rightwards[0], y - rightwards[1]),
        right=(x + rightwards[0], y + rightwards[1]),
    )


def draw_accessory(
    sprite: Image.Image,
    accessory: str,
    anchor: AccessoryAnchor,
    margin: int,
    size: tuple[int, int],
    longest: float,
) -> None:
    """Draw an accessory onto a sprite: sunglasses over the eyes, the others on top of the head."""
    item = load_glyph(load_vocabulary().accessories[accessory])
    over_eyes = accessory == "sunglasses"
    width = (anchor.eyes_width if over_eyes else anchor.hat_width) * longest * (1.08 if over_eyes else 1.0)
    scale = width / item.width
    item = item.resize((max(1, round(width)), max(1, round(item.height * scale))), Image.Resampling.LANCZOS)
    if over_eyes:
        x, y = anchor.eyes_x * size[0], anchor.eyes_y * size[1] - item.height / 2
    else:
        x, y = anchor.hat_x * size[0], anchor.hat_y * size[1] - item.height * 0.82
    left = max(0, min(round(margin + x - item.width / 2), sprite.width - item.width))
    sprite.alpha_composite(item, (left, max(0, round(margin + y))))


@lru_cache(maxsize=2048)
def recolour_glyph(noun: str, colour: str) -> Image.Image:
    """Replace a glyph's hue, keeping its shading; whites and darks stay nearly so."""
    body = load_glyph(load_vocabulary().glyph(noun))
    hue = load_vocabulary().colours[colour]
    pixels = np.asarray(body.convert("RGB").convert("HSV"), dtype=np.float32) / 255
    alpha = np.asarray(body.getchannel("A"), dtype=np.float32) / 255

    # Mean saturation of the opaque part: a grey glyph needs a floor to take a colour at all
    saturation, value = pixels[..., 1], pixels[..., 2]
    vivid = float((saturation * alpha).sum() / alpha.sum())
    floor = 0.12 + 0.6 * max(0.0, 1 - vivid / 0.45)

    # The colour's hue; saturation at least the floor, less of it in the dark; value a little lighter
    new = np.empty_like(pixels)
    new[..., 0] = hue / 360
    new[..., 1] = np.clip(np.maximum(saturation, floor * (0.4 + 0.6 * value)) * 1.1, 0, 1)
    new[..., 2] = value**0.75 if vivid < 0.45 else value**0.9
    if colour == "pink":
        new[..., 1] *= 0.62
        new[..., 2] = 0.25 + 0.75 * new[..., 2]
    image = Image.fromarray((new * 255).round().astype(np.uint8), "HSV").convert("RGB").convert("RGBA")
    image.putalpha(body.getchannel("A"))
    return image


# --- places ---------------------------------------------------------------------------------------------------


def draw_place(scene: Scene, record: Record | None = None) -> tuple[Image.Image, float]:
    """Draw the empty place; returns (canvas [RGBA, 128 × 128], y of the horizon in pixels). `record` is refilled."""
    random = scene.random(f"place/{scene.place}")
    horizon = random.uniform(*HORIZONS)
    record = Record() if record is None else record
    record.begin(scene.place, horizon)
    canvas = PLACES[scene.place](random, horizon, record)
    return canvas, horizon


def draw_gradient(top: Colour, bottom: Colour, random: Random, *, shift: int = 14) -> Image.Image:
    """A vertical gradient between two colours, each jittered by up to about `shift`."""
    ends = np.array(
        [jitter_colour(top, random, shift), jitter_colour(bottom, random, shift)], dtype=np.float32
    )
    rows = np.linspace(0, 1, SIZE * SUPERSAMPLING, dtype=np.float32)[:, None]
    column = ends[0] * (1 - rows) + ends[1] * rows
    pixels = np.broadcast_to(column[:, None, :], (SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING, 3))
    return Image.fromarray(np.ascontiguousarray(pixels.round().astype(np.uint8)), "RGB")


def draw_ground(
    canvas: Image.Image,
    top: Colour,
    bottom: Colour,
    horizon: float,
    random: Random,
    record: Record,
    label: str = GROUND,
) -> None:
    """Fill the area below the horizon with a gradient, slightly sloped."""
    side = SIZE * SUPERSAMPLING
    earth = draw_gradient(top, bottom, random).resize((side, side))
    mask = Image.new("L", (side, side), 0)
    slope = random.uniform(-3, 3) * SUPERSAMPLING
    line = horizon * SUPERSAMPLING
    ImageDraw.Draw(mask).polygon([(0, line - slope), (side, line + slope), (side, side), (0, side)], fill=255)
    squeezed = earth.resize((side, max(1, side - round(line) + 8)))
    filled = Image.new("RGB", (side, side), earth.getpixel((0, 0)))
    filled.paste(squeezed, (0, round(line) - 8))
    canvas.paste(filled, mask=mask)
    record.ground(label, mask, horizon)


def jitter_colour(colour: Colour, random: Random, amount: int) -> Colour:
    """Jitter a colour, mostly in brightness."""
    light = random.uniform(-amount, amount)
    red, green, blue = (
        min(255, max(0, round(part + light + random.uniform(-amount / 2, amount / 2)))) for part in colour
    )
    return red, green, blue


def downsample(canvas: Image.Image) -> Image.Image:
    return canvas.reduce(SUPERSAMPLING).convert("RGBA")


def paste_glyph(
    canvas: Image.Image,
    character: str,
    height: float,
    x: float,
    foot: float,
    mirrored: bool,
    record: Record,
) -> None:
    """Paste a glyph that belongs to the place (a tree, the moon) on the downsampled canvas; sizes in pixels."""
    item = load_glyph(character)
    scale = height / item.height
    item = item.resize((max(1, round(item.width * scale)), max(1, round(height))), Image.Resampling.LANCZOS)
    if mirrored:
        item = ImageOps.mirror(item)
    layer = Image.new("RGBA", canvas.size, (0, 0, 0, 0))
    layer.paste(item, (round(x - item.width / 2), round(foot - item.height)))
    canvas.alpha_composite(layer)
    record.glyph(layer, foot)


def plant(
    canvas: Image.Image,
    character: str,
    random: Random,
    record: Record,
    *,
    count: int,
    heights: tuple[float, float],
    ground: float,
    feet: tuple[float, float],
) -> None:
    """Paste glyphs near the side edges of the downsampled canvas: heights, and feet below `ground`, in pixels."""
    for _ in range(count):
        paste_glyph(
            canvas,
            character,
            random.uniform(*heights),
            sample_edge_x(random),
            ground + random.uniform(*feet),
            random.random() < 0.5,
            record,
        )


def sample_edge_x(random: Random) -> float:
    """Sample an x near the left or right edge, in pixels."""
    return random.uniform(4, 26) if random.random() < 0.5 else random.uniform(102, 124)


def draw_dots(
    canvas: Image.Image, random: Random, *, count: int, below: float, sizes: tuple[float, float]
) -> None:
    """Draw white dots, stars or snowflakes, above a height in pixels."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(count):
        x, y = random.uniform(0, SIZE) * SUPERSAMPLING, random.uniform(0, below) * SUPERSAMPLING
        radius = random.uniform(*sizes) * SUPERSAMPLING
        pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=(250, 250, 245))


def draw_clouds(canvas: Image.Image, random: Random, horizon: float) -> None:
    """Draw up to two soft clouds."""
    pen = ImageDraw.Draw(canvas)
    for _ in range(random.choice((0, 0, 1, 2))):
        x, y = random.uniform(10, 118) * SUPERSAMPLING, random.uniform(10, horizon - 26) * SUPERSAMPLING
        for _ in range(4):
            dx, dy, radius = (
                random.uniform(-11, 11) * SUPERSAMPLING,
                random.uniform(-2, 2) * SUPERSAMPLING,
                random.uniform(4, 7) * SUPERSAMPLING,
            )
            pen.ellipse(
                (x + dx - radius * 1.3, y + dy - radius, x + dx + radius * 1.3, y + dy + radius),
                fill=(246, 250, 253),
            )


def draw_park(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((126, 192, 244), (200, 230, 250), random)
    draw_clouds(canvas, random, horizon)
    draw_ground(canvas, (122, 194, 88), (84, 160, 60), horizon, random, record)
    pen = ImageDraw.Draw(canvas)
    for _ in range(random.randint(3, 8)):
        x, y = random.uniform(0, 128) * SUPERSAMPLING, random.uniform(horizon + 8, 126) * SUPERSAMPLING
        for lean in (-2, 0, 2):
            pen.line(
                (x, y, x + lean * SUPERSAMPLING, y - 4 * SUPERSAMPLING),
                fill=(64, 138, 48),
                width=SUPERSAMPLING,
            )
    small = downsample(canvas)
    plant(
        small,
        "🌳",
        random,
        record,
        count=random.choice((1, 1, 2)),
        heights=(26, 44),
        ground=horizon,
        feet=(2, 10),
    )
    return small


def draw_desert(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((250, 206, 138), (252, 226, 178), random)
    if random.random() < 0.5:
        # The sun
        x, y, radius = (
            random.uniform(16, 112) * SUPERSAMPLING,
            random.uniform(14, 34) * SUPERSAMPLING,
            random.uniform(8, 12) * SUPERSAMPLING,
        )
        sun = x - radius, y - radius, x + radius, y + radius
        ImageDraw.Draw(canvas).ellipse(sun, fill=(255, 240, 196))
        record.shape(DECORATION, foot=0).ellipse(sun, fill=255)

    # Sand with a few dunes' crests, then cacti
    draw_ground(canvas, (232, 186, 112), (214, 158, 84), horizon, random, record)
    pen = ImageDraw.Draw(canvas)
    for _ in range(random.randint(2, 5)):
        x, y, width = (
            random.uniform(0, 110) * SUPERSAMPLING,
            random.uniform(horizon + 8, 126) * SUPERSAMPLING,
            random.uniform(14, 30) * SUPERSAMPLING,
        )
        pen.arc((x, y, x + width, y + 6 * SUPERSAMPLING), 190, 350, fill=(200, 146, 78), width=SUPERSAMPLING)
    small = downsample(canvas)
    plant(
        small,
        "🌵",
        random,
        record,
        count=random.choice((1, 1, 2)),
        heights=(18, 34),
        ground=horizon,
        feet=(3, 12),
    )
    return small


def draw_beach(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((116, 192, 246), (196, 230, 250), random)
    draw_clouds(canvas, random, horizon)
    sea = horizon - random.uniform(12, 20)
    draw_ground(canvas, (34, 128, 200), (60, 160, 216), sea, random, record, WATER)
    draw_ground(canvas, (246, 222, 160), (234, 202, 132), horizon, random, record)
    small = downsample(canvas)
    plant(
        small,
        "🌴",
        random,
        record,
        count=int(random.random() < 0.9),
        heights=(38, 58),
        ground=horizon,
        feet=(4, 12),
    )
    return small


def draw_snow(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((150, 176, 208), (206, 220, 236), random)
    draw_ground(canvas, (240, 244, 250), (226, 234, 246), horizon, random, record)
    small = downsample(canvas)
    plant(
        small,
        "🌲",
        random,
        record,
        count=random.choice((1, 2)),
        heights=(30, 48),
        ground=horizon,
        feet=(2, 10),
    )
    flakes = small.convert("RGB").resize((SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING))
    draw_dots(flakes, random, count=random.randint(14, 26), below=124, sizes=(0.7, 1.3))
    return downsample(flakes)


def draw_night(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((8, 10, 40), (32, 36, 92), random, shift=8)
    draw_dots(canvas, random, count=random.randint(12, 22), below=horizon - 4, sizes=(0.4, 0.9))
    draw_ground(canvas, (20, 44, 34), (10, 24, 20), horizon, random, record)
    small = downsample(canvas)
    moon = random.uniform(18, 26)
    paste_glyph(small, "🌕", moon, random.uniform(16, 112), random.uniform(10, 18) + moon, False, record)
    return small


def draw_sunset(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((92, 42, 116), (250, 132, 74), random)
    x, radius = random.uniform(20, 108) * SUPERSAMPLING, random.uniform(12, 18) * SUPERSAMPLING
    y = horizon * SUPERSAMPLING - random.uniform(0, 4) * SUPERSAMPLING
    sun = x - radius, y - radius, x + radius, y + radius
    ImageDraw.Draw(canvas).ellipse(sun, fill=(255, 206, 84))
    record.shape(DECORATION, foot=0).ellipse(sun, fill=255)
    draw_ground(canvas, (84, 50, 74), (40, 26, 48), horizon, random, record)
    return downsample(canvas)


def draw_city(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((150, 184, 214), (214, 222, 232), random)
    pen = ImageDraw.Draw(canvas)

    # Buildings side by side, each with rows of windows
    x = random.uniform(-12, 0)
    while x < SIZE:
        width, height = random.uniform(14, 26), random.uniform(24, 52)
        wall = jitter_colour(
            random.choice(((120, 112, 132), (96, 116, 120), (142, 122, 112), (104, 108, 140))), random, 10
        )
        top = horizon - height
        building = (
            x * SUPERSAMPLING,
            top * SUPERSAMPLING,
            (x + width) * SUPERSAMPLING,
            (horizon + 6) * SUPERSAMPLING,
        )
        pen.rectangle(building, fill=wall)
        record.shape(WALL, foot=horizon + 6).rectangle(building, fill=255)
        for row in range(int(height // 7)):
            for column in range(int((width - 3) // 5)):
                left, upper = x + 3 + column * 5, top + 4 + row * 7
                lit = random.random() < 0.7
                pen.rectangle(
                    (
                        left * SUPERSAMPLING,
                        upper * SUPERSAMPLING,
                        (left + 2) * SUPERSAMPLING,
                        (upper + 3) * SUPERSAMPLING,
                    ),
                    fill=(252, 232, 150) if lit else (70, 74, 92),
                )
        x += width + random.uniform(0, 4)
    draw_ground(canvas, (128, 130, 134), (92, 94, 98), horizon, random, record)
    return downsample(canvas)


def draw_wooden_table(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((226, 212, 196), (206, 192, 174), random)
    draw_ground(canvas, (172, 114, 66), (140, 88, 46), horizon, random, record)
    pen = ImageDraw.Draw(canvas)
    y = horizon + random.uniform(8, 13)
    while y < SIZE:
        pen.line(
            (0, y * SUPERSAMPLING, SIZE * SUPERSAMPLING, y * SUPERSAMPLING),
            fill=(108, 66, 34),
            width=SUPERSAMPLING,
        )
        y += random.uniform(9, 14)
    return downsample(canvas)


def draw_under_the_sea(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((48, 156, 222), (12, 56, 122), random)
    pen = ImageDraw.Draw(canvas)
    for _ in range(random.randint(5, 10)):
        x, y, radius = (
            random.uniform(4, 124) * SUPERSAMPLING,
            random.uniform(6, 110) * SUPERSAMPLING,
            random.uniform(1.6, 4) * SUPERSAMPLING,
        )
        pen.ellipse(
            (x - radius, y - radius, x + radius, y + radius), outline=(206, 236, 250), width=SUPERSAMPLING
        )
    small = downsample(canvas)
    plant(
        small,
        "🪸",
        random,
        record,
        count=random.choice((1, 2)),
        heights=(16, 30),
        ground=0.0,
        feet=(122, 130),
    )
    return small


def draw_space(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((10, 8, 30), (26, 14, 50), random, shift=7)
    draw_dots(canvas, random, count=random.randint(26, 44), below=128, sizes=(0.4, 1.0))
    small = downsample(canvas)
    height = random.uniform(16, 26)
    paste_glyph(
        small,
        "🪐",
        height,
        random.uniform(16, 112),
        random.uniform(8, 16) + height,
        random.random() < 0.5,
        record,
    )
    return small


def draw_forest(random: Random, horizon: float, record: Record) -> Image.Image:
    canvas = draw_gradient((88, 132, 112), (120, 160, 128), random)
    draw_ground(canvas, (64, 100, 52), (40, 70, 34), horizon, random, record)
    small = downsample(canvas)
    for step in range(5):
        x = 10 + step * 27 + random.uniform(-8, 8)
        paste_glyph(
            small,
            "🌲",
            random.uniform(44, 66),
            x,
            horizon + random.uniform(0, 8),
            random.random() < 0.5,
            record,
        )
    return small


def draw_white(random: Random, horizon: float, record: Record) -> Image.Image:
    del random, horizon, record
    return Image.new("RGBA", (SIZE, SIZE), (253, 253, 253, 255))


PLACES: dict[str, Callable[[Random, float, Record], Image.Image]] = {
    "in a park": draw_park,
    "in the desert": draw_desert,
    "on the beach": draw_beach,
    "in the snow": draw_snow,
    "at night": draw_night,
    "at sunset": draw_sunset,
    "in the city": draw_city,
    "on a wooden table": draw_wooden_table,
    "under the sea": draw_under_the_sea,
    "in space": draw_space,
    "in a forest": draw_forest,
    "on a white background": draw_white,
}


def to_array(image: Image.Image) -> NDArray[np.uint8]:
    """An image as uint8 [H, W, 3]."""
    return np.asarray(image.convert("RGB"), dtype=np.uint8)
