"""What the site of docs/ needs beside its pages: the API reference, and links that leave docs/.

Pages link to the repository's files as GitHub understands it (`../benchmarks/results/edit.md`). Markdown and images
among these become part of the site; of anything else the link's text stays. A link to a file that does not exist is a
warning, which `--strict` refuses.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
PACKAGES = ("backbone", "customize", "edit", "align")
OUTSIDE = "repository/"  # where the site has the repository's other files
LINK = re.compile(r"(?P<image>!?)\[(?P<text>[^\[\]]*)\]\((?!\w+:|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
log = logging.getLogger("mkdocs.hooks")


def on_config(config: Any) -> Any:
    """Adds the reference's pages to the end of the navigation."""
    config["nav"].append({"API reference": [f"api/{name}.md" for name in folders()]})
    return config


def folders() -> dict[str, list[str]]:
    """Every package by its dotted name, `backbone.families`, with its modules' names; no folder of examples."""
    found: dict[str, list[str]] = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            *folder, name = path.relative_to(ROOT).with_suffix("").parts
            if not name.startswith("__") and path.with_name("__init__.py").exists():
                found.setdefault(".".join(folder), []).append(name)
    return dict(sorted(found.items()))


def on_files(files: Files, config: Any) -> Files:
    """Adds the pages of the reference, and the files outside docs/ that pages link to."""
    for folder, modules in folders().items():
        text = "\n\n".join([f"# {folder}", *(f"::: {folder}.{name}" for name in modules), ""])
        files.append(File.generated(config, f"api/{folder}.md", content=text))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for link in LINK.finditer(page.content_string):
            path = target(page, link)
            if shown(path) and not files.get_file_from_path(place(path)):
                file = File.generated(config, place(path), abs_src_path=str(ROOT / path))
                file.inclusion = InclusionLevel.NOT_IN_NAV
                files.append(file)
                if file.is_documentation_page():
                    waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Points links that leave docs/ to their place in the site, or leaves the text alone."""

    def changed(link: re.Match[str]) -> str:
        path = target(page.file, link)
        if not (ROOT / path).exists():
            log.warning(f"Doc file '{page.file.src_uri}' contains a link to '{path}', which does not exist.")
        if not shown(path):
            return link["text"]
        there = posixpath.relpath(place(path), posixpath.dirname(page.file.src_uri) or ".")
        return f"{link['image']}[{link['text']}]({there}{link['anchor'] or ''})"

    return LINK.sub(changed, markdown)


def target(page: File, link: re.Match[str]) -> str:
    """The path in the repository that a page's link means."""
    source = page.src_uri
    source = source.removeprefix(OUTSIDE) if source.startswith(OUTSIDE) else f"docs/{source}"
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link["path"]))


def place(path: str) -> str:
    """Where the site has a path of the repository."""
    return path.removeprefix("docs/") if path.startswith("docs/") else OUTSIDE + path


def shown(path: str) -> bool:
    """Whether the site has this file: pages and pictures."""
    return path.endswith((".md", ".png")) and (ROOT / path).is_file()
