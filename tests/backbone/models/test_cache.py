"""The disk cache: where it lies, and what becomes of one that cannot be read or written."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from backbone.io.console import printed_once
from backbone.models.cache import VARIABLE, encode_prompts_cached, find_cache_folder, load_or_compute
from backbone.models.model import Backbone


def computed(value: float = 1.0) -> dict[str, torch.Tensor]:
    return load_or_compute("text", "ab" * 32, lambda: {"x": torch.full((2,), value)})


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_is_known_is_read_again_and_a_damaged_file_is_made_anew(cache: Path) -> None:
    computed(1.0)
    assert computed(2.0)["x"].tolist() == [1.0, 1.0]
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(b"cut off")
    assert computed(3.0)["x"].tolist() == computed(4.0)["x"].tolist() == [3.0, 3.0]


def test_what_a_model_will_not_see_of_a_prompt_is_said_of_a_remembered_one_too(
    cache: Path, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt in ("a dog in the snow", "a red dog " * 60):
        first = encode_prompts_cached(tiny, [prompt]).text
        assert len(list(cache.rglob("*.safetensors"))) == 1
        printed_once.clear()  # as in another process
        capsys.readouterr()
        again = encode_prompts_cached(tiny, [prompt]).text
        assert ("it will not see" in capsys.readouterr().err) == (len(prompt) > 100)
        assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
        next(cache.rglob("*.safetensors")).unlink()


@pytest.mark.parametrize("what", ["unlink", "open"])
def test_a_cache_of_another_user_is_done_without(
    cache: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    computed(1.0)
    (file,) = cache.rglob("*.safetensors")
    file.write_bytes(b"cut off")
    plain = getattr(Path, what)

    def closed(self: Path, *words: Any, **more: Any) -> Any:
        if self.is_relative_to(cache):
            raise PermissionError(13, "Permission denied", str(self))
        return plain(self, *words, **more)

    monkeypatch.setattr(Path, what, closed)
    monkeypatch.setattr("backbone.models.cache.write_tensors", lambda path, *_: closed(Path(path)))
    assert computed(5.0)["x"].tolist() == [5.0, 5.0]
    assert file.exists()


@pytest.mark.parametrize(
    ("named", "found"),
    [
        ({VARIABLE: "~/c"}, "HOME/c"),
        ({VARIABLE: "", "XDG_CACHE_HOME": ""}, "HOME/.cache/limner"),
        ({VARIABLE: "", "XDG_CACHE_HOME": "here"}, "HOME/.cache/limner"),
        ({VARIABLE: "", "XDG_CACHE_HOME": "~/x"}, "HOME/x/limner"),
    ],
)
def test_the_cache_is_never_a_folder_of_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: dict[str, str], found: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in named.items():
        monkeypatch.setenv(name, value)
    assert str(find_cache_folder()) == found.replace("HOME", str(tmp_path))


def test_a_user_without_a_home_has_no_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is run under a number that no line of /etc/passwd has."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(os.path, "expanduser", lambda path: str(path))
    assert computed(6.0)["x"].tolist() == [6.0, 6.0] and computed(7.0)["x"].tolist() == [7.0, 7.0]
