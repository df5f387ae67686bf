"""Paths as people write them."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from backbone.io.console import UserError
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


def test_what_only_a_shell_or_windows_reads_is_told_how_it_is_written_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("NOWHERE", raising=False)
    (tmp_path / "dog" / "a").mkdir(parents=True)
    for written, meant in {
        "$HOME/dog": r"a variable.* Write /home/me/dog\.",
        "${HOME}/dog": r"Write /home/me/dog\.",
        "$HOME": r"Write /home/me\.",
        "%HOME%\\dog": "a variable",
        "$NOWHERE/dog": "NOWHERE is not set here",
        "C:\\Users\\me\\dog": r"under WSL it is /mnt/c/Users/me/dog\.",
        "dog\\a": r"Write dog/a\.",
    }.items():
        with pytest.raises(UserError, match=meant):
            written_path(written)
    for word in ("$NOWHERE", "a cat \\(cartoon\\)", "100%", "$5"):
        assert str(written_path(word)) == word
    (tmp_path / "$HOME").mkdir()
    assert written_path("$HOME").is_dir()
