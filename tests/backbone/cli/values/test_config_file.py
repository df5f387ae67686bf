"""Files of settings: numbers, encodings, files that are not there."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.io.console import UserError
from tests.backbone.cli.small_command import parse


def test_a_number_with_a_zero_before_it_is_no_octal_one(tmp_path: Path) -> None:
    file = tmp_path / "k.yaml"
    for text, steps in (("010", 10), ("+7", 7), ("0x10", 16), ("1_000", 1000)):
        file.write_text(f"steps: {text}\n")
        assert parse("--config", str(file))["steps"] == steps


@pytest.mark.parametrize("ending", ["json", "yaml", "toml"])
def test_a_file_in_utf_16_is_read_and_in_another_encoding_said_to_be_in_one(
    tmp_path: Path, ending: str
) -> None:
    text = {"json": '{"steps": 5}', "yaml": "steps: 5", "toml": "steps = 5"}[ending]
    (tmp_path / f"a.{ending}").write_bytes(text.encode("utf-16"))
    assert parse("--config", str(tmp_path / f"a.{ending}"))["steps"] == 5
    (tmp_path / f"a.{ending}").write_bytes(f"{text}\n# é".encode("latin-1"))
    with pytest.raises(UserError, match=rf"a\.{ending} is not UTF-8 text\. Save it as UTF-8"):
        parse("--config", str(tmp_path / f"a.{ending}"))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        parse("--config", str(tmp_path / "gone.yaml"))
