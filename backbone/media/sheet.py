"""Contact sheets: rows of images with captions, titles and coloured frames on one page.

Pillow's built-in font makes a sheet the same on every machine. It covers ASCII; other characters are transliterated.
For other scripts pass `font`, the path of a TrueType file.
"""

from __future__ import annotations

import io
import unicodedata
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from backbone.io.console import UserError
from backbone.io.files import write_bytes

PAGE, INK, QUIET, HAIRLINE = "#fbfaf8", "#26282c", "#6b6f76", "#dddad4"
MARGIN, GAP, SECTION, FRAME = 28, 14, 22, 4
GREEN, RED = "#2e9e5b", "#d1453b"  # frames that go together

_Font: TypeAlias = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclass(frozen=True)
class Cell:
    """An image with a caption below and an optional frame of a colour around it."""

    image: Image.Image
    caption: str = ""
    frame: str | None = None


def draw_sheet(
    rows: Sequence[Sequence[Cell | Image.Image | None]],
    *,
    title: str = "",
    note: str = "",
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    cell: int = 256,
    font: str | Path | None = None,
) -> Image.Image:
    """Draw a page (RGB). Images are shrunk to fit `cell` × `cell` pixels, or enlarged to the largest whole
    multiple that fits, pixel by pixel; None leaves a cell empty.

    `title` and `note` head the page, `row_titles` stand above their rows ("" for none), `column_titles` above the
    first row. Rows may differ in length.
    """
    assert any(rows), "a sheet needs a picture"
    assert len(row_titles) <= len(rows), "more row titles than rows"

    # The page as blocks from top to bottom: heading, then each row's title, pictures and captions
    typeface = _Typeface(font)
    columns = max(len(row) for row in rows)
    width = 2 * MARGIN + columns * cell + (columns - 1) * GAP
    blocks: list[_Block] = _heading_blocks(typeface, title, note, width - 2 * MARGIN)
    for number, row in enumerate(rows):
        row_title = row_titles[number] if number < len(row_titles) else ""
        if blocks:
            blocks.append(_Block(SECTION if row_title or number == 0 else GAP))
        if number == 0 and column_titles:
            # A title may be as wide as the distance to the next one
            wrapped = [typeface.wrap(text, "note", cell + GAP - 2) for text in column_titles]
            blocks += [_column_block(typeface, wrapped, "note", QUIET, cell), _Block(6)]
        if row_title:
            lines = typeface.wrap(row_title, "section", width - 2 * MARGIN)
            blocks += [_text_block(typeface, lines, "section", INK), _Block(6)]
        cells = [item if isinstance(item, Cell) or item is None else Cell(item) for item in row]
        blocks.append(_picture_block(cells, cell))
        captions = [typeface.wrap(item.caption, "caption", cell) if item else [] for item in cells]
        if any(captions):
            blocks += [_Block(6), _column_block(typeface, captions, "caption", QUIET, cell)]

    # Drawn one below another, now that their heights are known
    page = Image.new("RGB", (width, 2 * MARGIN + sum(block.height for block in blocks)), PAGE)
    top = MARGIN
    for block in blocks:
        block.draw_on(page, top)
        top += block.height
    return page


def split_rows(
    cells: Iterable[Cell | Image.Image | None], columns: int
) -> list[list[Cell | Image.Image | None]]:
    """Split cells into rows of `columns`; the last row may be shorter."""
    cells = list(cells)
    return [cells[start : start + columns] for start in range(0, len(cells), columns)]


def number_samples(captions: Sequence[str]) -> list[str]:
    """The captions, with a sample number (from 0, in their order) below each caption that occurs several times."""
    totals, counts = Counter(captions), Counter[str]()
    numbered = []
    for caption in captions:
        numbered.append(f"{caption}\nsample {counts[caption]}" if totals[caption] > 1 else caption)
        counts[caption] += 1
    return numbered


def save_png(path: str | Path, image: Image.Image, *, text: Mapping[str, str] | None = None) -> None:
    """Write a PNG atomically with `text` in its iTXt chunks (UTF-8), which `Image.open(path).text` reads."""
    info = PngInfo()
    for key, value in (text or {}).items():
        info.add_itxt(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    write_bytes(path, buffer.getvalue())


# A page is a column of blocks.


@dataclass(frozen=True)
class _Piece:
    left: int
    top: int
    content: Image.Image | str
    font: _Font | None = None
    colour: str | None = None  # of the text, or of the frame


@dataclass(frozen=True)
class _Block:
    height: int
    pieces: Sequence[_Piece] = field(default=())

    def draw_on(self, page: Image.Image, top: int) -> None:
        draw = ImageDraw.Draw(page)
        for piece in self.pieces:
            left, upper = MARGIN + piece.left, top + piece.top
            if isinstance(piece.content, str):
                draw.text((left, upper), piece.content, fill=piece.colour, font=piece.font)
                continue
            width, height = piece.content.size
            edge = FRAME if piece.colour else 1
            outline = (left - edge, upper - edge, left + width + edge - 1, upper + height + edge - 1)
            draw.rectangle(outline, fill=piece.colour or HAIRLINE)
            page.paste(piece.content, (left, upper))


def _heading_blocks(typeface: _Typeface, title: str, note: str, width: int) -> list[_Block]:
    blocks = []
    if title:
        blocks.append(_text_block(typeface, typeface.wrap(title, "title", width), "title", INK))
    if title and note:
        blocks.append(_Block(6))
    if note:
        blocks.append(_text_block(typeface, typeface.wrap(note, "note", width), "note", QUIET))
    return blocks


def _text_block(typeface: _Typeface, lines: Sequence[str], style: str, colour: str) -> _Block:
    step = typeface.line_height(style)
    pieces = [
        _Piece(0, step * number, line, typeface.font(style), colour) for number, line in enumerate(lines)
    ]
    return _Block(step * len(lines), pieces)


def _column_block(
    typeface: _Typeface, texts: Sequence[Sequence[str]], style: str, colour: str, cell: int
) -> _Block:
    step = typeface.line_height(style)
    pieces = [
        _Piece(column * (cell + GAP), step * number, line, typeface.font(style), colour)
        for column, lines in enumerate(texts)
        for number, line in enumerate(lines)
    ]
    return _Block(step * max(len(lines) for lines in texts), pieces)


def _picture_block(cells: Sequence[Cell | None], side: int) -> _Block:
    resized = [_resize_to_cell(cell.image, side) if cell else None for cell in cells]
    height = max((image.height for image in resized if image), default=0)
    pieces = [
        _Piece(
            column * (side + GAP) + (side - image.width) // 2, height - image.height, image, colour=cell.frame
        )
        for column, (cell, image) in enumerate(zip(cells, resized, strict=True))
        if cell and image
    ]
    return _Block(height, pieces)


def _resize_to_cell(image: Image.Image, side: int) -> Image.Image:
    if image.has_transparency_data:
        layered = image.convert("RGBA")
        image = Image.new("RGB", image.size, "white")
        image.paste(layered, mask=layered.getchannel("A"))
    image = image.convert("RGB")
    if factor := side // max(image.size):
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.LANCZOS, reducing_gap=3.0)


# Fonts.

_SIZES = {"title": 26, "section": 16, "note": 14, "caption": 13}
_TRANSLITERATIONS = {
    "–": "-", "—": "-", "−": "-", "×": "x", "→": "->", "←": "<-", "≥": ">=", "≤": "<=",
    "≈": "~", "√": "sqrt ", "ß": "ss", "æ": "ae", "Æ": "Ae", "œ": "oe", "ø": "o", "Ø": "O",
    "ł": "l", "Ł": "L", "đ": "d", "ı": "i", "µ": "u", "μ": "mu", "α": "alpha", "β": "beta",
    "γ": "gamma", "δ": "delta", "Δ": "Delta", "ε": "epsilon", "σ": "sigma", "λ": "lambda", "π": "pi",
    "½": "1/2", "«": '"', "»": '"', "„": '"',
}  # fmt: skip


class _Typeface:
    """Fonts by style, and line breaking."""

    def __init__(self, path: str | Path | None) -> None:
        self.path = path
        self._fonts = {style: self._load(size) for style, size in _SIZES.items()}
        self._missing_glyph = None if path else bytes(self.font("caption").getmask("\uffff"))

    def _load(self, size: int) -> _Font:
        if self.path is None:
            return ImageFont.load_default(size)
        try:
            return ImageFont.truetype(str(self.path), size)
        except OSError as error:
            raise UserError(
                f"{self.path} is not a font that can be read ({error}). Give a .ttf file."
            ) from error

    def font(self, style: str) -> _Font:
        return self._fonts[style]

    def line_height(self, style: str) -> int:
        return round(_SIZES[style] * 1.3)

    def wrap(self, text: str, style: str, width: int, *, most: int = 5) -> list[str]:
        """At most `most` lines no wider than `width` pixels; a longer text ends in an ellipsis."""
        font = self.font(style)
        lines: list[str] = []
        for paragraph in self.transliterate(text).splitlines():
            line = ""
            for word in paragraph.split():
                longer = f"{line} {word}".strip()
                if font.getlength(longer) <= width:
                    line = longer
                    continue
                if line:
                    lines.append(line)
                *full, line = _break_word(word, font, width)
                lines += full
            lines.append(line)
        if len(lines) <= most:
            return lines
        last = lines[most - 1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        return [*lines[: most - 1], last.rstrip() + "…"]

    def transliterate(self, text: str) -> str:
        """Transliterate characters that the font lacks."""
        if self._missing_glyph is None:
            return text
        return "".join(map(self._transliterate_character, text))

    def _transliterate_character(self, character: str) -> str:
        if character.isspace() or character.isascii() or self._has_glyph(character):
            return character
        if character in _TRANSLITERATIONS:
            return _TRANSLITERATIONS[character]
        plain = "".join(part for part in unicodedata.normalize("NFKD", character) if part.isascii())
        return plain or ("" if unicodedata.category(character) in ("Mn", "Cf") else "?")

    def _has_glyph(self, character: str) -> bool:
        return bytes(self.font("caption").getmask(character)) != self._missing_glyph


def _break_word(word: str, font: _Font, width: int) -> list[str]:
    """Break a word that is wider than the line."""
    pieces = [""]
    for character in word:
        if pieces[-1] and font.getlength(pieces[-1] + character) > width:
            pieces.append("")
        pieces[-1] += character
    return pieces
