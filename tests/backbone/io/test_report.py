"""A report is one file that a phone can show: nothing is cut off, what is wide scrolls in itself, small stays sharp."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from backbone.io.report import (
    CHARACTER,
    STYLE,
    command_block,
    image_figure,
    image_row,
    line_plot,
    paragraph,
    plot_row,
    table,
    write_report,
)


class Within(HTMLParser):
    """The classes around each table and image."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, str]] = []
        self.around: list[tuple[str, list[str]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        kind = dict(attrs).get("class") or ""
        if tag in ("table", "img", "svg"):
            self.around.append((tag, [name for _, name in self.open if name] + ([kind] if kind else [])))
        if tag not in ("img", "meta", "line", "circle", "polyline"):
            self.open.append((tag, kind))

    def handle_endtag(self, tag: str) -> None:
        while self.open and self.open.pop()[0] != tag:
            pass


@pytest.mark.parametrize(
    "values", [(0.008039, 0.0091), (-0.0006881, -0.0003665), (-1234567.0, 1.0), (3.0, 3.0)]
)
def test_no_label_of_a_plot_is_cut_off(values: tuple[float, float]) -> None:
    plot = line_plot("t", {"a": [(0, values[0]), (10, values[1])]}, level=0.0)
    labels = re.findall(r'<text x="([-\d.]+)" y="([-\d.]+)" text-anchor="(\w+)">([^<]+)</text>', plot)
    assert len(labels) == 5
    for x, y, anchor, text in labels:
        across = len(text) * CHARACTER
        left = float(x) - across if anchor == "end" else float(x)
        assert left >= 0 and left + across <= 440 and 0 < float(y) < 220
    if values[0] == -0.0006881:
        assert "-0.0006881" in plot and "0" in plot


def test_the_names_of_lines_stand_outside_the_drawing() -> None:
    plot = line_plot("Change of error", {"winners": [(0, 0.0), (1, 1.0)], "losers": [(0, 1.0), (1, 0.0)]})
    drawing = plot[plot.index("<svg") : plot.index("</svg>")]
    assert "winners" in plot and "losers" in plot and "Change of error" in plot
    assert not any(name in drawing for name in ("winners", "losers", "Change"))
    assert "winners" not in line_plot("t", {"winners": [(0, 0.0), (1, 1.0)]})  # a single line needs no name


def test_the_only_point_of_a_line_is_seen() -> None:
    assert "<circle" in line_plot("t", {"a": [(0, 1.0)]})


def test_wide_things_scroll_in_themselves_and_never_the_page(tmp_path: Path) -> None:
    parts = [
        table([f"column {n}" for n in range(12)], [range(12)]),
        plot_row([line_plot("t", {"a": [(0, 0.0), (1, 1.0)]}, note="what it says")]),
        image_figure(Image.new("RGB", (1200, 300)), "sheet"),
        image_row([(Image.new("RGB", (128, 128)), "a dog"), (Image.new("RGB", (1024, 512)), "")]),
        command_block("customize train " + "x" * 300),
        paragraph("a/very/long/path" * 40),
    ]
    write_report(tmp_path / "r.html", "t", parts)
    reader = Within()
    reader.feed((tmp_path / "r.html").read_text())
    around = dict(reader.around[:3])
    assert around["table"] == ["scroll"] and around["svg"] == ["curves"] and around["img"] == ["sheet"]
    # What keeps each of them within 390 pixels
    for rule in (".scroll { overflow-x: auto; }", "img, svg, video { max-width: 100%; height: auto; }"):
        assert rule in STYLE
    phone = STYLE[STYLE.index("@media (max-width: 40rem)") :]
    assert "figure.sheet { overflow-x: auto; }" in phone
    assert "overflow-wrap: anywhere" in STYLE and "white-space: pre-wrap" in STYLE


@pytest.mark.parametrize(
    ("size", "shown"),
    [((128, 128), (256, 256)), ((64, 32), (256, 128)), ((200, 100), (200, 100)), ((300, 90), (300, 90))],
)
def test_a_small_image_is_shown_at_whole_factors_pixel_by_pixel(
    size: tuple[int, int], shown: tuple[int, int]
) -> None:
    figure = image_figure(Image.new("RGB", size))
    assert f'width="{shown[0]}" height="{shown[1]}"' in figure
    assert ('class="small"' in figure) == (max(size) <= 256)
    assert "img.small { image-rendering: pixelated; }" in STYLE


def test_a_film_is_shown_as_what_it_is(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "film.gif", save_all=True, append_images=frames[1:])
    assert "data:image/gif;base64," in image_figure(tmp_path / "film.gif")


def test_a_page_loads_nothing_and_runs_no_script(tmp_path: Path) -> None:
    """Said before anything else in it; what it shows itself is allowed: its styles, and images inside of it."""
    write_report(tmp_path / "r.html", "t", [image_figure(Image.new("RGB", (4, 4)))])
    page = (tmp_path / "r.html").read_text()
    policy = re.search('<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)
    assert policy is not None and policy.start() < page.index("<title>")
    rules = dict(rule.split(" ", 1) for rule in policy[1].split("; "))
    assert rules == {
        "default-src": "'none'", "img-src": "data:", "media-src": "data:",
        "style-src": "'unsafe-inline'", "base-uri": "'none'",
        "form-action": "'none'",
    }  # fmt: skip
    assert "<script" not in page and "http://" not in page and "https://" not in page


def test_a_page_renews_itself_only_while_it_is_asked_to(tmp_path: Path) -> None:
    for seconds in (15, 0):
        write_report(tmp_path / "r.html", "t", [], renew=seconds)
        page = (tmp_path / "r.html").read_text()
        assert ('<meta http-equiv="refresh" content="15">' in page) == bool(seconds)
