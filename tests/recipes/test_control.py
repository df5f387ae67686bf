"""The recipe of the embedded control network: true maps, a run that is gone on with, an export that is found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors
from backbone.models.control import list_embedded_controls, open_control
from backbone.models.model import Backbone
from backbone.training.run import drive
from benchmarks.judges.reader import load_reader
from recipes.moji.adapters import control
from recipes.moji.reader import ReaderSettings, train_reader
from tests.tiny import tiny_moji


def test_without_scenes_it_says_how_they_are_made(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"recipes\.moji\.adapters\.control prepare"):
        control.train_network(control.TrainSettings(workdir=tmp_path))


@pytest.mark.font
@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_its_network_is_found_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_moji(tmp_path / "model")
    monkeypatch.setattr(control, "HELD_OUT_SEEDS", range(990_000, 990_006))
    work: dict[str, Any] = {"model": str(model), "workdir": tmp_path / "work"}
    control.prepare_scenes(control.PrepareSettings(**work, scenes=6, workers=1))
    again = {**work, "batch": 2, "look": 2}
    control.train_network(control.TrainSettings(**again, steps=4, name="whole"))
    real = drive

    def half(objective: control.WorldTraining, run: Path, **how: Any) -> bool:
        return real(objective, run, **{**how, "until": 2})

    with monkeypatch.context() as patch:
        patch.setattr(control, "drive", half)
        control.train_network(control.TrainSettings(**again, steps=4, name="halves"))
    control.train_network(control.TrainSettings(**again, steps=4, name="halves"))
    whole, halves = (
        read_tensors(tmp_path / "work" / name / "t2i_adapter" / control.WEIGHTS)[0]
        for name in ("whole", "halves")
    )
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    control.export_network(control.ExportSettings(**work, name="whole"))
    opened = Backbone.open(str(model), device="cpu", precision="fp32")
    assert set(list_embedded_controls(opened)) == set(control.KINDS)
    network = open_control(opened, str(list_embedded_controls(opened)["pose"]))
    assert network.record.base == opened.fingerprint and "dog" in network.record.palette

    train_reader(ReaderSettings(**work, steps=2, batch=2))
    reader = load_reader(tmp_path / "work" / "reader")
    assert reader is not None
    read = reader.read([Image.new("RGB", (128, 128))] * 3)
    assert read.labels.shape == read.depth.shape == (3, 128, 128)
    facts = read_json(tmp_path / "work" / "reader" / "reader.json")
    assert facts["step"] == 2 and 0 <= facts["accuracy"] <= 1
