"""FlowEdit on clips: nothing is changed by the same words, and frames that are alike stay alike under one noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.media.clips import Film, encode_webp
from backbone.models.clips.motion import attach_motion
from backbone.models.model import Backbone
from edit.cli import app
from edit.methods.clip_flow import ClipFlow, flow_film, noise_of_frames
from tests.tiny import tiny_motion_adapter

SOURCE, TARGET = "a dog in the snow", "a cat in the snow"


def film(step: int) -> Film:
    """Three frames in which a square walks so many pixels a frame."""
    frames = [Image.new("RGB", (64, 64), "white") for _ in range(3)]
    for number, frame in enumerate(frames):
        frame.paste((200, 40, 40), (20 + step * number, 20, 36 + step * number, 40))
    return Film(tuple(frames), 8.0, "walk.webp", "0")


@pytest.mark.parametrize("linked", ["by an adapter", "by attention"])
def test_the_same_words_equally_guided_leave_a_clip_bit_for_bit(linked: str, tiny: Backbone) -> None:
    if linked == "by an adapter":
        attach_motion(tiny.denoiser, tiny_motion_adapter())
    result = flow_film(tiny, film(8), SOURCE, [SOURCE], ClipFlow(guidance=1.0, steps=3))
    assert torch.equal(result.latents, result.encoded.latent.float())
    assert result.facts["shared_noise"] == (0.0 if linked == "by an adapter" else 1.0)
    other = flow_film(tiny, film(8), SOURCE, [TARGET], ClipFlow(guidance=3.0, strength=1.0, steps=3))
    assert (other.latents - result.latents).abs().max() > 1e-3 and other.nfe == 3 * 3


def test_frames_that_are_alike_are_edited_alike_under_one_noise(tiny: Backbone) -> None:
    apart = {}
    for shared in (1.0, 0.0):
        settings = ClipFlow(guidance=3.0, shared=shared, steps=3)
        latents = flow_film(tiny, film(0), SOURCE, [TARGET], settings).latents[0]
        apart[shared] = float((latents[:, 1:] - latents[:, :1]).abs().max())
    assert apart[1.0] < 1e-4 < 1e-3 < apart[0.0]


def test_noise_has_one_variance_whatever_the_frames_share() -> None:
    noise = noise_of_frames(torch.zeros(1, 4, 5, 32, 32), 0.6, 0, 0, 0)
    between = torch.corrcoef(noise[0].transpose(0, 1).flatten(1))
    assert torch.allclose(between[0, 1:], torch.tensor(0.6), atol=0.04) and abs(float(noise.std()) - 1) < 0.03


def call(tmp_path: Path, model: Path, *words: str) -> Any:
    clip = tmp_path / "walk.webp"
    clip.write_bytes(encode_webp(film(8).frames, 8))
    usual = (
        "--model",
        model,
        "--device",
        "cpu",
        "--precision",
        "fp32",
        "--steps",
        "2",
        "--out",
        tmp_path / "out",
    )
    return CliRunner().invoke(app, ["clip", str(clip), "--target", TARGET, *words, *map(str, usual)])


def test_the_command_moves_a_clip_without_an_inversion(tiny_folder: Path, tmp_path: Path) -> None:
    words = ("--source", SOURCE, "--method", "flow-edit", "--shared-noise", "0.5", "--draws", "2")
    answer = call(tmp_path, tiny_folder, *words)
    assert answer.exit_code == 0, answer.exception
    record = read_json(tmp_path / "out" / "run.json")
    assert record["shared_noise"] == 0.5 and record["method"] == "flow-edit"
    assert "--method flow-edit" in record["command"] and "--draws 2" in record["command"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--method", "flow-edit"), "--method has no effect without --source"),
        (("--source", SOURCE, "--draws", "2"), "--draws has no effect without --method flow-edit"),
        (
            ("--source", SOURCE, "--method", "flow-edit", "--cross", "0.5"),
            "--cross has no effect without --method",
        ),
        (
            ("--source", SOURCE, "--method", "flow-edit", "--negative", "a cat"),
            "--negative has no effect with",
        ),
        (("--source", SOURCE, "--method", "flow-edit", "--shared-noise", "2"), "must lie between 0"),
    ],
)
def test_what_flow_edit_cannot_use_is_said(
    words: tuple[str, ...], said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    answer = call(tmp_path, tiny_folder, *words)
    message = str(answer.exception) if isinstance(answer.exception, UserError) else answer.output
    assert answer.exit_code != 0 and said in message and not (tmp_path / "out").exists()
