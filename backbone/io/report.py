"""Self-contained HTML reports: headings, tables, line plots (SVG) and images (base64)."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from backbone.io.files import write_text

SMALL = 256  # pixels a side; images up to this size are enlarged without smoothing
CHARACTER = 6.6  # width of a digit in a plot's labels, in pixels
MOST_DOTS = 30  # lines with more points have no dots
COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937;
  overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } .scroll > table { overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e5e7eb; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img, svg, video { max-width: 100%; height: auto; } img.small { image-rendering: pixelated; }
figure { margin: 1rem 0; max-width: 100%; } figcaption, .note { color: #4b5563; font-size: .9rem; }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
.curves, .pictures { display: flex; flex-wrap: wrap; gap: 1rem; } .curves figure, .pictures figure { margin: 0; }
.curves figcaption { color: inherit; font-weight: 600; } .curves .note { margin: 0; }
.curves figure { max-width: min(27.5rem, 100%); }
.pictures figcaption { max-width: 16rem; }
.legend { font-size: .8rem; } .legend span { margin-right: 1rem; white-space: nowrap; }
@media (max-width: 40rem) {
  figure.sheet { overflow-x: auto; } figure.sheet img { max-width: none; }
  .pictures { gap: .5rem; } .pictures figure { max-width: calc(50% - .25rem); }
}
@media (prefers-color-scheme: dark) {
  body { background: #111827; color: #e5e7eb; } pre { background: #1f2937; }
  th, td { border-color: #374151; } figcaption, .note { color: #9ca3af; }
}
"""


# A page loads nothing, sends nothing and runs no script, whatever its texts and images hold.
POLICY = (
    "default-src 'none'; img-src data:; media-src data:; style-src 'unsafe-inline'; base-uri 'none'; "
    "form-action 'none'"
)


def write_report(path: str | Path, title: str, parts: Iterable[str], *, renew: int = 0) -> None:
    """Write a page of HTML fragments, which the functions below return, atomically.

    A browser reloads it every `renew` seconds; 0: never.
    """
    body = "\n".join(parts)
    refresh = f'<meta http-equiv="refresh" content="{renew}">\n' if renew else ""
    write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n{refresh}'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{_escape(title)}</h1>\n{body}\n</html>\n",
    )


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{_escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{_escape(text)}</p>"


def command_block(text: str) -> str:
    """A shell command, verbatim."""
    return f"<pre>{_escape(text)}</pre>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table, which scrolls if it is wider than the page; floats have four significant digits."""
    head = "".join(f"<th>{_escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{_escape(_format_cell(cell))}</td>" for cell in row) for row in rows)
    body = "".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def image_figure(image: Image.Image | Path, caption: str = "") -> str:
    """An image (or the bytes of an image file) with its caption.

    An image of up to SMALL pixels a side is shown at the largest whole multiple of its size up to SMALL, without
    smoothing; a larger one at its own size, or shrunk to the page, and scrolling on a phone.
    """
    if isinstance(image, Path):
        data = image.read_bytes()
        with Image.open(image) as opened:
            size, kind = opened.size, Image.MIME[opened.format or "PNG"]
    else:
        file = io.BytesIO()
        image.save(file, "PNG")
        data, size, kind = file.getvalue(), image.size, "image/png"
    factor = SMALL // max(size)
    shape = f'width="{size[0] * max(1, factor)}" height="{size[1] * max(1, factor)}"'
    source = f"data:{kind};base64," + base64.b64encode(data).decode()
    figcaption = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    alt = html.escape(caption or "image", quote=True)
    outer, inner = ("", ' class="small"') if factor else (' class="sheet"', "")
    return f'<figure{outer}><img{inner} {shape} alt="{alt}" src="{source}">{figcaption}</figure>'


def film_figure(path: Path, caption: str = "") -> str:
    """A clip that plays: the file `path` with the suffix .mp4 if it exists, else with .webp."""
    film = path.with_suffix(".mp4")
    if not film.is_file():
        return image_figure(path.with_suffix(".webp"), caption)
    source = "data:video/mp4;base64," + base64.b64encode(film.read_bytes()).decode()
    figcaption = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    video = f'<video controls autoplay muted loop playsinline src="{source}"></video>'
    return f"<figure>{video}{figcaption}</figure>"


def image_row(images: Iterable[tuple[Image.Image, str]]) -> str:
    """Images with captions, side by side, those above SMALL pixels a side shrunk to it."""
    figures = (image_figure(_shrink(image), caption) for image, caption in images)
    return f'<div class="pictures">{"".join(figures)}</div>'


def _shrink(image: Image.Image) -> Image.Image:
    if max(image.size) <= SMALL:
        return image
    smaller = image.copy()
    smaller.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
    return smaller


def plot_row(figures: Iterable[str]) -> str:
    """Plots side by side."""
    return f'<div class="curves">{"".join(figures)}</div>'


def line_plot(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    marked: float | None = None,
    level: float | None = None,
    size: tuple[int, int] = (440, 220),
    note: str = "",
) -> str:
    """A line plot of (x, y) points in SVG, one line per name; "" without points. Infinite and NaN points are dropped.

    The title and the legend are above it, a `note` on what the curve shows below. `marked` is the x of a dashed
    vertical line, `level` the y of a dashed horizontal one; `size` is in pixels.
    """
    series = {
        name: [point for point in line if all(map(math.isfinite, point))] for name, line in series.items()
    }
    series = {name: line for name, line in series.items() if line}
    points = [point for line in series.values() for point in line]
    if not points:
        return ""

    # Ranges of both axes, with room on the left for the widest label
    (width, height), levels = size, [] if level is None else [level]
    (x0, x1), (y0, y1) = _axis_range([x for x, _ in points]), _axis_range([y for _, y in points] + levels)
    y_labels = {y: _escape(_format_cell(y)) for y in (y0, (y0 + y1) / 2, y1)}
    left = 16 + math.ceil(CHARACTER * max(map(len, y_labels.values())))
    right, top, bottom = 12, 12, 30

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    # The y axis with three ticks, the x axis with its ends, the dashed lines, then one line per series.
    elements = []
    for y, label in y_labels.items():
        position = to_pixels(x0, y)[1]
        elements.append(
            f'<line x1="{left}" x2="{width - right}" y1="{position:.1f}" y2="{position:.1f}" stroke="#9ca3af55"/>'
        )
        elements.append(f'<text x="{left - 6}" y="{position + 4:.1f}" text-anchor="end">{label}</text>')
    for x, anchor in ((x0, "start"), (x1, "end")):
        position = to_pixels(x, y0)[0]
        elements.append(
            f'<text x="{position:.1f}" y="{height - 10}" text-anchor="{anchor}">{_escape(_format_cell(x))}</text>'
        )
    ends = [] if marked is None else [(to_pixels(marked, y0), to_pixels(marked, y1))]
    ends += [] if level is None else [(to_pixels(x0, level), to_pixels(x1, level))]
    for (a, b), (c, d) in ends:
        line = f'x1="{a:.1f}" x2="{c:.1f}" y1="{b:.1f}" y2="{d:.1f}"'
        elements.append(f'<line {line} stroke="currentColor" stroke-dasharray="4 4"/>')
    for colour, line_points in zip(itertools.cycle(COLOURS), series.values(), strict=False):
        pixels = [to_pixels(x, y) for x, y in line_points]
        if len(pixels) > 1:
            path = " ".join(f"{a:.1f},{b:.1f}" for a, b in pixels)
            elements.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(pixels) <= MOST_DOTS:
            elements += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>' for a, b in pixels]
    shape = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    drawing = f'<svg role="img" {shape} font-size="11" fill="currentColor">{"".join(elements)}</svg>'
    heading_html = f"<figcaption>{_escape(title)}</figcaption>{_legend(series)}"
    return f"<figure>{heading_html}{drawing}{_note(note)}</figure>"


def _legend(names: Iterable[str]) -> str:
    """The lines' names in their colours, if there are several."""
    names = list(names)
    if len(names) < 2:
        return ""
    spans = [
        f'<span style="color:{colour}">■ {_escape(name)}</span>'
        for colour, name in zip(itertools.cycle(COLOURS), names, strict=False)
    ]
    return f'<div class="legend">{"".join(spans)}</div>'


def _note(text: str) -> str:
    return f'<p class="note">{_escape(text)}</p>' if text else ""


def _axis_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _format_cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return html.escape(text, quote=False)
