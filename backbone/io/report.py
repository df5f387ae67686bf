"""Self-contained HTML reports: headings, tables, line plots (SVG) and images (base64), nothing fetched."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from PIL import Image

from backbone.io.files import write_text

COLOURS = ("#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2")
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #1f2937; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin-top: 2.2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .8rem; border-bottom: 1px solid #e5e7eb; text-align: right; }
th:first-child, td:first-child { text-align: left; }
img { max-width: 100%; } figure { margin: 1rem 0; } figcaption, .note { color: #4b5563; font-size: .9rem; }
pre { background: #f3f4f6; padding: .8rem; overflow-x: auto; white-space: pre-wrap; }
.curves { display: flex; flex-wrap: wrap; gap: 1rem; }
@media (prefers-color-scheme: dark) {
  body { background: #111827; color: #e5e7eb; } pre { background: #1f2937; }
  th, td { border-color: #374151; } figcaption, .note { color: #9ca3af; }
}
"""


def write_report(path: str | Path, title: str, parts: Iterable[str]) -> None:
    """Write a page of HTML fragments, as the functions below return them, atomically."""
    body = "\n".join(parts)
    write_text(
        path,
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_escape(title)}</title>\n<style>{STYLE}</style>\n<h1>{_escape(title)}</h1>\n{body}\n</html>\n",
    )


def heading(text: str) -> str:
    """A section's heading."""
    return f"<h2>{_escape(text)}</h2>"


def paragraph(text: str) -> str:
    """A paragraph."""
    return f"<p>{_escape(text)}</p>"


def command(text: str) -> str:
    """A shell command, verbatim."""
    return f"<pre>{_escape(text)}</pre>"


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; floats have four significant digits."""
    head = "".join(f"<th>{_escape(column)}</th>" for column in columns)
    lines = ("".join(f"<td>{_escape(_format_cell(cell))}</td>" for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def image_figure(image: Image.Image | Path, caption: str = "") -> str:
    """An image (or the bytes of a PNG file) with its caption."""
    if isinstance(image, Path):
        data = image.read_bytes()
    else:
        file = io.BytesIO()
        image.save(file, "PNG")
        data = file.getvalue()
    source = "data:image/png;base64," + base64.b64encode(data).decode()
    figcaption = f"<figcaption>{_escape(caption)}</figcaption>" if caption else ""
    alt = html.escape(caption or "image", quote=True)
    return f'<figure><img alt="{alt}" src="{source}">{figcaption}</figure>'


def plot_row(figures: Iterable[str]) -> str:
    """Plots side by side."""
    return f'<div class="curves">{"".join(figures)}</div>'


def line_plot(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    *,
    marked: float | None = None,
    level: float | None = None,
    size: tuple[int, int] = (440, 240),
) -> str:
    """An SVG line plot of (x, y) points, one line per name, "" without points; points that are not finite are dropped.

    `marked` is the x of a dashed vertical line, `level` the y of a dashed horizontal one; `size` is in pixels.
    """
    series = {
        name: [point for point in line if all(map(math.isfinite, point))] for name, line in series.items()
    }
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    width, height = size
    left, right, top, bottom = 52, 12, 28, 30
    y_values = [y for _, y in points] + ([] if level is None else [level])
    (x0, x1), (y0, y1) = _axis_range([x for x, _ in points]), _axis_range(y_values)

    def to_pixels(x: float, y: float) -> tuple[float, float]:
        across = left + (x - x0) / (x1 - x0) * (width - left - right)
        return across, height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    # Title, y axis with three ticks, x axis with its ends, the dashed lines, then one polyline per series.
    elements = [f'<text x="{left}" y="16" font-weight="600">{_escape(title)}</text>']
    for y in (y0, (y0 + y1) / 2, y1):
        at = to_pixels(x0, y)[1]
        elements.append(
            f'<line x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}" stroke="#9ca3af55"/>'
        )
        elements.append(
            f'<text x="{left - 6}" y="{at + 4:.1f}" text-anchor="end">{_escape(_format_cell(y))}</text>'
        )
    for x, anchor in ((x0, "start"), (x1, "end")):
        at = to_pixels(x, y0)[0]
        elements.append(
            f'<text x="{at:.1f}" y="{height - 10}" text-anchor="{anchor}">{_escape(_format_cell(x))}</text>'
        )
    if marked is not None:
        at = to_pixels(marked, y0)[0]
        line = f'x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{height - bottom}"'
        elements.append(f'<line {line} stroke="currentColor" stroke-dasharray="4 4"/>')
    if level is not None:
        at = to_pixels(x0, level)[1]
        line = f'x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"'
        elements.append(f'<line {line} stroke="currentColor" stroke-dasharray="4 4"/>')
    for number, (name, line_points) in enumerate(series.items()):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (to_pixels(x, y) for x, y in line_points))
        elements.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        if len(series) > 1:
            at = width - right - 8
            elements.append(
                f'<text x="{at}" y="{16 + 14 * number}" text-anchor="end" fill="{colour}">{_escape(name)}</text>'
            )
    shape = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg role="img" {shape} font-size="11" fill="currentColor">{"".join(elements)}</svg>'


def _axis_range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _format_cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _escape(text: str) -> str:
    return html.escape(text, quote=False)
