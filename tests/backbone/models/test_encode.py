"""Prompts of whole data sets through the text encoder: what is cut off of them is said, and counted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from backbone.io.console import printed_once
from backbone.models import encode
from backbone.models.cache import VARIABLE
from backbone.models.encode import MOST_NAMED, encode_texts
from backbone.models.model import Backbone

LONG = [f"dog number {number} stands in the snow " * 15 for number in range(MOST_NAMED + 2)]


def said_of(model: Backbone, prompts: list[str], capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is said where a process of its own encodes prompts."""
    printed_once.clear()
    capsys.readouterr()
    encode_texts(model, prompts)
    return capsys.readouterr().err.splitlines()


def test_prompts_that_are_cut_off_are_said_and_counted_of_remembered_ones_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert said_of(tiny, ["a dog", LONG[0], LONG[0]], capsys) == said_of(tiny, LONG[:1], capsys)
    first = said_of(tiny, ["a dog", "", *LONG, *LONG], capsys)
    assert len(first) == MOST_NAMED + 1 and all("it will not see" in line for line in first[:MOST_NAMED])
    assert first[MOST_NAMED] == f"The same holds for 2 more of {len(LONG) + 2} prompts."
    monkeypatch.setattr(Backbone, "encode_prompts", None)  # all are remembered
    assert said_of(tiny, ["a dog", "", *LONG], capsys) == first
    assert said_of(tiny, ["a dog", ""], capsys) == []


def test_prompts_of_a_text_encoder_that_learned_words_are_counted_as_well(
    monkeypatch: pytest.MonkeyPatch, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny, "text_learned", True)
    assert said_of(tiny, LONG, capsys)[-1] == f"The same holds for 2 more of {len(LONG)} prompts."


def test_a_table_of_prompts_from_before_they_were_counted_is_read_beside_newer_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    add = encode.ShardWriter.add

    def older(self: Any, columns: dict[str, Any]) -> None:
        add(self, {name: column for name, column in columns.items() if name != encode.CUT})

    with monkeypatch.context() as patch:
        patch.setattr(encode.ShardWriter, "add", older)
        old = encode_texts(tiny, LONG[:1])
    assert said_of(tiny, LONG[:1], capsys) == []
    assert len(said_of(tiny, LONG[:2], capsys)) == 1
    both = encode_texts(tiny, LONG[:2])
    rows = torch.tensor([0])
    assert old[rows].text.keys() == both[rows].text.keys()
    assert all(torch.equal(value, both[rows].text[name]) for name, value in old[rows].text.items())
