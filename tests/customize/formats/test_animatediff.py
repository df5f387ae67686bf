"""Motion adapters and motion LoRAs under AnimateDiff's own names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from backbone.adapters.lora import LORA_WEIGHTS, add_lora, save_lora
from backbone.adapters.motion import read_motion_lora
from backbone.io.console import UserError
from backbone.io.files import read_header
from backbone.models.clips.motion import attach_motion, read_motion_adapter
from backbone.models.model import Backbone
from customize.cli import app
from customize.formats.animatediff import export_animatediff
from tests.tiny import tiny_motion_adapter

LAYER = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_out.0"


def test_a_motion_lora_under_the_original_names_changes_its_layers_alike(
    tiny: Backbone, tmp_path: Path
) -> None:
    attach_motion(tiny.denoiser, tiny_motion_adapter())
    learned = add_lora(tiny.denoiser, "bounce", rank=2, alpha=6.0, targets=[LAYER])
    for value in learned.values():
        torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    save_lora(tmp_path / LORA_WEIGHTS, tiny.denoiser, "bounce")
    answer = CliRunner().invoke(
        app, ["export", str(tmp_path), "--to", "animatediff", "--out", f"{tmp_path}/it.safetensors"]
    )
    assert answer.exit_code == 0, answer.exception
    names = set(read_header(tmp_path / "it.safetensors").shapes)
    block = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0"
    assert names == {f"{block}.processor.to_out_lora.{end}.weight" for end in ("down", "up")}
    (ours, own), (theirs, plain) = (
        read_motion_lora(tmp_path / name) for name in (LORA_WEIGHTS, "it.safetensors")
    )
    key = f"unet.{LAYER}.lora_B.weight"
    torch.testing.assert_close(theirs[key], ours[key] * 3)
    assert (own.alpha, plain.layer_alpha(LAYER, rank=2)) == (6.0, 2.0)


def test_a_motion_adapter_is_written_as_the_original_file_and_read_back(tmp_path: Path) -> None:
    adapter = tiny_motion_adapter()
    adapter.save_pretrained(tmp_path / "adapter")
    export_animatediff(tmp_path / "adapter", tmp_path / "mm.safetensors")
    shapes = read_header(tmp_path / "mm.safetensors").shapes
    block = "down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0"
    assert (
        shapes[f"{block}.attention_blocks.1.pos_encoder.pe"] == (1, 8, 16)
        and f"{block}.ff_norm.weight" in shapes
    )
    read = read_motion_adapter(str(tmp_path / "mm.safetensors")).state_dict()
    assert all(torch.equal(read[name], value) for name, value in adapter.state_dict().items())


@pytest.mark.parametrize("more", [("--base", "sd1"), ("--model", "moji"), ()])
def test_what_animatediff_s_files_do_not_hold_is_refused(more: tuple[str, ...], tmp_path: Path) -> None:
    words = ["export", str(tmp_path), "--to", "animatediff", "--out", str(tmp_path / "it.safetensors"), *more]
    answer = CliRunner().invoke(app, words)
    assert isinstance(answer.exception, UserError) and not (tmp_path / "it.safetensors").exists()
    assert ("has no effect" if more else "no motion LoRA") in str(answer.exception)
