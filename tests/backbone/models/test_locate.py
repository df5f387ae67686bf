"""Where a model lies, by what is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from backbone.io.console import UserError
from backbone.models import locate
from backbone.models.locate import OWN, is_path


def test_a_path_is_told_from_a_name_without_importing_every_family(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> Any:
        raise AssertionError("every family is imported")

    monkeypatch.setattr(locate, "families", refuse)
    assert is_path(str(tmp_path)) and not is_path(str(tmp_path / "none"))
    assert OWN and not any(is_path(name) for name in OWN)


def test_a_short_name_is_no_path_even_where_a_folder_is_called_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("sd15", "mine"):
        (tmp_path / name).mkdir()
    assert is_path("mine") and not is_path("sd15")


def test_a_part_of_a_whole_model_is_not_taken_for_its_file(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=rf"is one file of a model\. Name its folder: {tiny_folder}"):
        locate.locate(str(tiny_folder / "model_index.json"))
    vae = tiny_folder / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"is a whole model, .* --vae and --text-encoder have no effect"):
        locate.locate(locate.join_files(str(tiny_folder), str(vae)))
