"""Fitting `moji`'s denoiser to its scorer: which prompts, and that a share of what is learned is baked."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from backbone.io.files import read_tensors
from backbone.models.locate import EMBEDDED
from recipes.moji.fitted import FittedSettings, main, select_prompts, wears

UNET = "unet/diffusion_pytorch_model.safetensors"


def test_most_prompts_wear_something_in_any_style_and_no_sentence_stands_twice() -> None:
    scenes = select_prompts()
    assert len({scene.caption() for scene in scenes}) == len(scenes)
    worn = [scene for scene in scenes if wears(scene)]
    assert len(worn) > len(scenes) / 2 and any(scene.style for scene in worn)
    assert any(len(scene.things) == 2 for scene in scenes)


@pytest.mark.slow
def test_the_denoiser_alone_changes_and_by_the_share_that_is_asked_for(tmp_path: Path) -> None:
    changes = {}
    for share in (0.5, 1.0):
        main(FittedSettings(steps=1, share=share, out=tmp_path))
        (tmp_path / "moji").rename(found := tmp_path / f"moji-{share}")
        after, before = (read_tensors(folder / UNET)[0] for folder in (found, EMBEDDED))
        changes[share] = {name: after[name].float() - before[name].float() for name in before}
        part = "text_encoder/model.safetensors"
        assert (found / part).read_bytes() == (EMBEDDED / part).read_bytes()
    sizes = {
        share: sum(float(one.square().sum()) for one in of.values()) ** 0.5 for share, of in changes.items()
    }
    assert sizes[1.0] > 0 and sizes[0.5] == pytest.approx(sizes[1.0] / 2, rel=0.3)  # rounded to fp16
    assert torch.isfinite(next(iter(changes[0.5].values()))).all()
