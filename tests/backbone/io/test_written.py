"""Paths as people write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from backbone.io.written import written_path


def two(name: str) -> str:
    """As a Mac's disk has it: a letter and its accent."""
    return unicodedata.normalize("NFD", name)


def test_a_name_is_spelled_as_the_disk_has_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / two("caf\u00e9") / "b" / two("\u00fcber")
    folder.mkdir(parents=True)
    (folder / "\u00e9.png").touch()
    for written in ("caf\u00e9/b/\u00fcber/\u00e9.png", two("caf\u00e9/b/\u00fcber/\u00e9.png")):
        assert written_path(tmp_path / written) == folder / "\u00e9.png"
    monkeypatch.chdir(tmp_path)
    assert written_path("caf\u00e9") == Path(two("caf\u00e9")) and written_path("caf\u00e9/b").is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert written_path("~/caf\u00e9") == tmp_path / two("caf\u00e9")


def test_what_is_not_there_or_could_be_several_stays_as_it_is_written(tmp_path: Path) -> None:
    both = "a\u00e9\u00ef"
    (tmp_path / two(both)).mkdir()
    (tmp_path / (two("a\u00e9") + "\u00ef")).mkdir()
    for name in (both, "n\u00e9w", "caf\u00e9/" + 300 * "\u00e9"):
        assert written_path(tmp_path / name) == tmp_path / name
    (tmp_path / both).mkdir()
    assert written_path(tmp_path / both) == tmp_path / both
