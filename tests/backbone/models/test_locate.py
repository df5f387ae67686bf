"""Where a model lies, by what is asked for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from backbone.io.console import UserError
from backbone.io.files import write_json
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


def test_a_folder_that_is_called_as_a_short_name_is_said_not_to_be_meant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_json(tmp_path / "moji" / "model_index.json", {})
    assert locate.locate("moji").source == str(OWN["moji"])
    assert "not the folder that lies here. That is --model ./moji" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("index", "named"),
    [
        ({"vae": ["diffusers", "AutoencoderKL", {"pretrained_model_name_or_path": "a/b"}]}, "of: a/b."),
        ({"_class_name": "X", "vae": [None, None, {"pretrained_model_name_or_path": None}]}, "of."),
    ],
)
def test_a_modular_pipeline_is_said_to_be_one_with_the_models_that_it_names(
    tmp_path: Path, index: dict[str, Any], named: str
) -> None:
    write_json(tmp_path / "modular_model_index.json", index)
    with pytest.raises(UserError, match=rf"is a modular pipeline.* Name the model that they are {named}$"):
        locate.locate(str(tmp_path))


def test_a_part_of_a_whole_model_is_not_taken_for_its_file(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match=rf"is one file of a model\. Name its folder: {tiny_folder}"):
        locate.locate(str(tiny_folder / "model_index.json"))
    vae = tiny_folder / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(UserError, match=r"is a whole model, .* --vae and --text-encoder have no effect"):
        locate.locate(locate.join_files(str(tiny_folder), str(vae)))


def test_a_folder_that_is_no_model_names_the_one_that_is_meant(tmp_path: Path) -> None:
    model = tmp_path / "models--org--name" / "snapshots" / "0a1b"
    write_json(model / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    write_json(model / "unet" / "config.json", {})
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "dream.safetensors").touch()
    (tmp_path / "none").mkdir()
    for folder, said in (
        (model.parents[1], f"Name what lies in it: {model}."),
        (model.parent, f"Name what lies in it: {model}."),
        (model / "unet", f"It is a component of one: name {model}."),
        (
            tmp_path / "checkpoints",
            f"Name what lies in it: {tmp_path / 'checkpoints' / 'dream.safetensors'}.",
        ),
        (tmp_path / "none", "Name the folder that `save_pretrained` wrote."),
    ):
        with pytest.raises(UserError, match=f"it has no model_index.json. {re.escape(said)}"):
            locate.locate(str(folder))
