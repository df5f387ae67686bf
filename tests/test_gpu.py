"""What only a GPU can show: it computes what a CPU does, and nothing inside a step waits for it.

python -m pytest -m gpu
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.models.compiled import CompiledBlocks
from backbone.models.model import Backbone
from backbone.training.checkpoint import load_checkpoint, save_checkpoint
from backbone.training.loop import READ_EVERY, NotFiniteError, train
from backbone.training.optimizer import make_adamw, warm_constant
from backbone.training.run import take_steps
from benchmarks.align import build_training
from benchmarks.gpu import (
    Bench,
    compare_compiled,
    compare_pictures,
    compare_steps,
    draw_edit,
    draw_samples,
)
from benchmarks.speed.customize import make_material, make_settings
from benchmarks.speed.shapes import Parts
from customize.objectives.dreambooth import DreamBooth

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")]


@pytest.fixture
def moji() -> Backbone:
    return Backbone.open("moji", device="cuda", precision="bf16")


def test_a_step_has_the_loss_and_the_gradients_of_a_cpu() -> None:
    found = compare_steps("cuda")
    assert found["loss apart"] < 1e-3 * found["loss"] and found["gradient apart"] < 1e-2


def test_a_sample_looks_as_on_a_cpu(tmp_path: Path) -> None:
    assert compare_pictures(Bench("cuda", False, tmp_path), draw_samples)["pixels apart, of 255"] <= 8


def test_an_edit_looks_as_on_a_cpu(tmp_path: Path) -> None:
    assert compare_pictures(Bench("cuda", False, tmp_path), draw_edit)["pixels apart, of 255"] <= 16


@pytest.mark.parametrize("kind", ["customize", "align"])
def test_no_step_waits_for_the_device(moji: Backbone, kind: str) -> None:
    """As torch itself sees it: any synchronisation raises."""
    parts = Parts(moji, moji.autoencoder, moji.encode_prompts)
    training = (
        DreamBooth(moji, make_material(moji), make_settings(2))
        if kind == "customize"
        else build_training(parts, 2)
    )
    taken = take_steps(training)
    for _ in range(READ_EVERY):
        last = next(taken)
    assert last.is_read
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(READ_EVERY - 1):
            last = next(taken)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not last.is_read


def test_compiled_blocks_have_the_gradients_of_plain_ones(moji: Backbone) -> None:
    training = DreamBooth(moji, make_material(moji), make_settings(2))
    for value in training.parameters.values():
        value.data += 1e-2 * torch.randn_like(value)
    found = compare_compiled(training, CompiledBlocks([moji.denoiser]))
    assert found["loss apart"] < 1e-3 and found["gradient apart"] < 5e-2


def test_what_is_not_finite_reaches_no_weight_and_a_run_goes_on(tmp_path: Path) -> None:
    weight = torch.nn.Parameter(torch.zeros(5, device="cuda"))
    optimizer = make_adamw([{"params": [weight], "lr": 0.1}], weight_decay=0.0)

    def losses(step: int) -> Iterator[Tensor]:
        yield (weight - 3).square().sum() * (float("nan") if step == 4 else 1.0)

    how: dict[str, Any] = {"lr_schedule": warm_constant()}
    list(train(losses, {"w": weight}, optimizer=optimizer, steps=3, **how))
    save_checkpoint(tmp_path / "c.safetensors", step=3, parameters={"w": weight}, optimizer=optimizer)
    before = [weight.detach().clone(), *(value.clone() for value in optimizer.state[weight].values())]
    with pytest.raises(NotFiniteError, match="step 4"):
        list(train(losses, {"w": weight}, optimizer=optimizer, steps=READ_EVERY, done=3, **how))
    after = [weight.detach(), *optimizer.state[weight].values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))
    load_checkpoint(tmp_path / "c.safetensors", parameters={"w": weight}, optimizer=optimizer)
    list(train(lambda step: losses(0), {"w": weight}, optimizer=optimizer, steps=5, done=3, **how))
    assert not torch.equal(weight, before[0])
