"""Bytes of drawing: control networks and references are counted as they are, and what cannot fit is told beforehand."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from backbone.conditions.control import Control
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json, write_tensors
from backbone.memory.count import forward_peak_bytes, tensor_bytes
from backbone.memory.drawing import DrawingEstimator, DrawingWorkload, fit_drawing
from backbone.memory.planner import MemoryEstimator, MemorySettings
from backbone.models.clips.motion import attach_motion, detach_motion, rows_as_clips
from backbone.models.clips.windows import attention_in_windows
from backbone.models.control import open_control
from backbone.models.model import Backbone
from backbone.models.placement import Placement
from customize.cli import app
from tests import tiny as models
from tests.backbone.test_control import adapter, controlnet

PLAIN = MemorySettings("fp32")


@pytest.fixture(params=["controlnet", pytest.param("adapter", marks=pytest.mark.slow)])
def network(request: pytest.FixtureRequest, tiny: Backbone, tmp_path: Path) -> Path:
    if request.param == "adapter":
        return adapter(tmp_path / "net", 0)
    return controlnet(tiny.denoiser, tmp_path / "net", 0)


@pytest.fixture
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The autoencoder's own tensors, which take a while to count, are left out."""
    monkeypatch.setattr(MemoryEstimator, "_count_autoencoder", lambda *call: 0)


@pytest.fixture
def weights_alone(no_decoding: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the denoiser's calls too."""
    monkeypatch.setattr(MemoryEstimator, "_count_forward", lambda *call: 0)


def drawn(**more: object) -> DrawingWorkload:
    return replace(DrawingWorkload(2, (8, 8), 4.0), **more)  # type: ignore[arg-type]


@pytest.mark.usefixtures("no_decoding")
def test_a_plan_counts_a_control_network_and_its_answer_as_a_real_call_has_them(
    tiny: Backbone, network: Path
) -> None:
    plain = DrawingEstimator(tiny, drawn(), device="cpu").phases(PLAIN)["drawing"]
    counted = DrawingEstimator(tiny, drawn(conditions=(("edges", str(network)),)), device="cpu").phases(
        PLAIN
    )["drawing"]
    control = open_control(tiny, str(network)).network
    assert counted.resident_bytes - plain.resident_bytes == tensor_bytes(control.module.parameters())
    rows = 4  # two images, each with a row without its prompt
    text = tiny.family.spec(tiny.location, tiny.dtype).blank_text(rows, "cpu")
    under = replace(text, controls=(Control.of(control, torch.zeros(rows, 3, 64, 64)),))
    noisy, time = torch.zeros(rows, *tiny.latent_shape), torch.zeros(rows)
    tiny.denoiser.add_module("under", control.module)  # whose weights are no part of the peak either
    real = forward_peak_bytes(
        tiny.denoiser,
        lambda: tiny.family.network(tiny.denoiser, under)(noisy, time),
        device="cpu",
        inputs=[noisy, *under.tensors()],
    )
    assert counted.transient_bytes == pytest.approx(real, rel=0.02) and real > plain.transient_bytes


@pytest.mark.usefixtures("weights_alone")
def test_a_network_in_a_file_is_counted_by_its_header(tiny: Backbone, network: Path) -> None:
    module = open_control(tiny, str(network)).network.module
    file = network.with_suffix(".safetensors")
    write_tensors(file, {name: value.contiguous() for name, value in module.state_dict().items()}, {})
    one, other = (
        DrawingEstimator(tiny, drawn(conditions=(("edges", str(name)),)), device="cpu").phases(PLAIN)[
            "drawing"
        ]
        for name in (network, file)
    )
    assert one.resident_bytes == other.resident_bytes


@pytest.mark.usefixtures("no_decoding")
def test_guidance_takes_a_second_row_and_a_saving_one_image_at_a_time(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MemoryEstimator, "_count_forward", lambda self, precision, rows: rows)
    one_by_one = MemorySettings("fp32", placement=Placement(one_by_one=True))
    for asked, choice, rows in (
        (drawn(), PLAIN, 4),
        (drawn(guidance=1.0), PLAIN, 2),
        (drawn(), one_by_one, 2),
        (drawn(frames=4), PLAIN, 16),
    ):
        phases = DrawingEstimator(tiny, asked, device="cpu").phases(choice)
        assert phases["drawing"].transient_bytes == rows
    assert DrawingEstimator(tiny, drawn(places=(8, 16))).latent_shape == (*tiny.latent_shape[:-2], 8, 16)


@pytest.mark.slow
@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize(("frames", "window"), [(4, None), (12, (8, 2))])
def test_frames_go_through_the_motion_adapter_as_in_a_real_call(
    frames: int, window: tuple[int, int] | None, tiny: Backbone
) -> None:
    adapter = models.tiny_motion_adapter()
    clip = drawn(batch=1, frames=frames, motion=adapter, window=window)
    counted = DrawingEstimator(tiny, clip, device="cpu").phases(PLAIN)["drawing"]
    stills = DrawingEstimator(tiny, drawn(batch=frames), device="cpu").phases(PLAIN)["drawing"]
    assert counted.resident_bytes - stills.resident_bytes == tensor_bytes(adapter.parameters())
    rows = 2 * frames  # each with a row without its prompt
    text = tiny.family.spec(tiny.location, tiny.dtype).blank_text(rows, "cpu")
    noisy, time = torch.zeros(rows, *tiny.latent_shape), torch.zeros(rows)
    attach_motion(tiny.denoiser, adapter)
    by_windows = nullcontext() if window is None else attention_in_windows(tiny.denoiser, *window)
    with rows_as_clips(tiny.denoiser, frames), by_windows:
        real = forward_peak_bytes(
            tiny.denoiser,
            lambda: tiny.family.network(tiny.denoiser, text)(noisy, time),
            device="cpu",
            inputs=[noisy, *text.tensors()],
        )
    detach_motion(tiny.denoiser)
    assert counted.transient_bytes == pytest.approx(real, rel=0.02)
    assert real > stills.transient_bytes


@pytest.mark.usefixtures("weights_alone")
def test_an_image_as_channels_takes_three_rows(tmp_path: Path) -> None:
    folder = models.tiny_instruct_pix2pix(tmp_path / "m")
    model = Backbone.open(str(folder), device="cpu", precision="fp32", task="edit")
    assert DrawingEstimator(model, drawn(batch=1, references=1), device="cpu").count_calls("fp32") == 3


@pytest.mark.slow
@pytest.mark.usefixtures("no_decoding")
@pytest.mark.parametrize("write", [models.tiny_flux2_klein, models.tiny_qwen_image21])
def test_references_are_encoded_and_stand_beside_the_noise(write: Any, tmp_path: Path) -> None:
    model = Backbone.open(str(write(tmp_path / "m")), device="cpu", precision="fp32")
    none, two = (
        DrawingEstimator(model, drawn(places=model.latent_shape[-2:], references=count)).phases(PLAIN)
        for count in (0, 2)
    )
    assert "references" in two and "references" not in none
    assert two["drawing"].transient_bytes > none["drawing"].transient_bytes


@pytest.mark.usefixtures("weights_alone")
@pytest.mark.usefixtures("weights_alone")
def test_a_planned_model_stays_compiled_where_its_base_lies_on_the_device_as_it_is(
    tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for placement, compiles in ((Placement(), True), (Placement(offload=0.5), False)):
        model = Backbone.open(str(tiny_folder), device="cpu", placement=placement, compile=True)
        assert fit_drawing(model, drawn(), 8.0).compiles is compiles
        assert ("not compiled" in capsys.readouterr().err) is not compiles


def test_what_does_not_fit_is_told_before_anything_is_loaded(tmp_path: Path, tiny_folder: Path) -> None:
    shutil.copytree(tiny_folder, tmp_path / "wide", ignore=shutil.ignore_patterns("*.safetensors"))
    config = read_json(tmp_path / "wide" / "unet" / "config.json")
    write_json(tmp_path / "wide" / "unet" / "config.json", config | {"block_out_channels": [8192, 8192]})

    def call(model: Path, *more: object) -> Any:
        words = ("sample", "a dog", "--model", model, "--steps", 1, "--device", "cpu", "--precision", "fp32")
        return CliRunner().invoke(app, [str(one) for one in (*words, *more, "--out", tmp_path / "out")])

    done = call(tmp_path / "wide", "--vram", 0.5)
    assert isinstance(done.exception, UserError)
    assert "does not fit 0.5 GiB: with every saving enabled, drawing needs" in str(done.exception)
    assert "raw smaller images" in str(done.exception) and not (tmp_path / "out").exists()
    done = call(tiny_folder, "--vram", 1)
    assert done.exit_code == 0 and "drawing" in done.stderr
    assert (tmp_path / "out" / "p00-s00.png").exists()
