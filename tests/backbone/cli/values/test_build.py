"""Settings made in Python: what is wrong is named, prompts may stand in files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import align.settings
import customize.settings
from backbone.cli.options import list_fields
from backbone.cli.sampling import SamplingSettings
from backbone.cli.values.build import build
from backbone.cli.values.convert import convert_value
from backbone.io.console import UserError
from customize.control_settings import ControlSettings
from edit.settings import PaintOptions
from tests.backbone.cli.small_command import Settings


def test_a_mistake_in_python_names_the_argument() -> None:
    with pytest.raises(UserError, match=r"no setting step\. Did you mean steps"):
        build(Settings, {"images": "x", "step": 3})
    with pytest.raises(UserError, match=r"no setting instance_data_dir\. It is images here"):
        build(Settings, {"instance_data_dir": "x"})
    with pytest.raises(
        UserError, match=r"no setting epochs\. That is steps here\. It counts optimiser steps"
    ):
        build(Settings, {"images": "x", "epochs": 3})
    with pytest.raises(
        UserError, match=r"no setting init_image\. It draws from words\. To change an image: edit sdedit"
    ):
        build(SamplingSettings, {"init_image": "a.png"})
    with pytest.raises(UserError, match="images is missing"):
        build(Settings, {})
    with pytest.raises(UserError, match="lr_scheduler is cosin"):
        customize.settings.Settings(images="x", token="[V]", class_noun="dog", lr_scheduler="cosin")
    for name, value, meant in (
        *(("prior", "false", "off"), ("precision", "float16", "fp16")),
        *(("quantize", "4bit", "nf4"), ("quantize", "int8", "8bit")),
    ):
        said: dict[str, Any] = {"images": "x", "token": "[V]", "class_noun": "dog", name: value}
        with pytest.raises(UserError, match=f"{name} is {value}, which is none of .* That is {meant} here"):
            customize.settings.Settings(**said)
    for kind in ("dora", "LoKr"):
        with pytest.raises(
            UserError, match=f"{kind}, which is a kind of adapter .* Write --adapter {kind.lower()}"
        ):
            customize.settings.Settings(images="x", token="[V]", class_noun="dog", method=kind)
    with pytest.raises(UserError, match="quantize is off, which is the default"):
        customize.settings.Settings(images="x", token="[V]", class_noun="dog", quantize="off")
    with pytest.raises(UserError, match=r"snr_gamma is 0; it is at least 0\.01"):
        customize.settings.Settings(
            images="x", token="[V]", class_noun="dog", loss_weighting="min-snr", snr_gamma=0
        )
    with pytest.raises(UserError, match="rank is 0"):
        align.settings.Settings(rank=0)


def test_one_prompt_may_stand_in_a_file_whatever_it_is_of(tmp_path: Path) -> None:
    one, several = tmp_path / "one.txt", tmp_path / "several.txt"
    one.write_text("\ufeffblurred, dark\n", encoding="utf-8")
    several.write_text("blurred\ndark\n")
    assert SamplingSettings(negative=str(one)).negative == "blurred, dark"
    assert build(PaintOptions, {"image": "x", "target": str(one)}).target == "blurred, dark"
    assert convert_value(list_fields(ControlSettings)["validation_prompt"], (str(one),), "x") == (
        "blurred, dark",
    )
    for name, said in ((str(several), "holds 2 prompts"), ("nope.txt", "nope.txt does not exist")):
        with pytest.raises(UserError, match=said):
            SamplingSettings(negative=name)
