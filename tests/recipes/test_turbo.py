"""The distillation of `moji-turbo`: its loss, its exact resumption, and a folder that is a model."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from backbone.adapters.lora import LORA_WEIGHTS, add_lora
from backbone.diffusion.noise import add_noise, generator
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.models.few_step.model import open_few_step
from backbone.models.model import Backbone
from recipes.moji.adapters.turbo import NAME, Consistency, TurboSettings, app, distil
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TurboSettings]:
    """Of a distillation of a tiny pipeline on random latents of twelve scenes."""
    folder = tmp_path_factory.mktemp("turbo")
    tiny_pipeline(folder / "base")

    def make(name: str, **more: object) -> TurboSettings:
        work = folder / name
        if not work.exists():
            (work / "pictures").mkdir(parents=True)
            (work / "latents").mkdir()
            (work / "pictures" / "scenes-000000.json").write_text(json.dumps([["a dog", "the dog"]] * 12))
            mean = torch.randn(12, 4, 8, 8, generator=generator(0))
            # all but the last shard's held-out scenes are trained on
            for number in range(2):
                write_tensors(
                    work / "latents" / f"{number:03d}.safetensors", {"mean": mean, "std": mean.abs()}
                )
        usual = TurboSettings(
            steps=4, batch=2, rank=2, decay=2, warmup=1, model=str(folder / "base"), workdir=work
        )
        return replace(usual, **more)  # type: ignore[arg-type]

    return make


def test_a_stopped_distillation_ends_at_the_same_weights(settings: Callable[..., TurboSettings]) -> None:
    whole = distil(settings("whole"))
    distil(settings("parts", minutes=0.0))
    parts = distil(settings("parts"))
    assert all(torch.equal(parts.kept[name], value) for name, value in whole.kept.items())
    assert any(".lora_B." in name and value.abs().max() > 0 for name, value in whole.kept.items())


def test_the_loss_is_the_distance_to_the_student_one_guided_step_below(tiny: Backbone) -> None:
    parameters = add_lora(tiny.denoiser, NAME, rank=2, alpha=2.0, targets=("to_q", "to_v"))
    loss = Consistency(tiny, guidance=3.0)
    clean, noise = (torch.randn((2, *tiny.latent_shape), generator=generator(n)) for n in range(2))
    text, empty = tiny.encode_prompts(["a dog"]), tiny.encode_prompts([""])
    place = torch.tensor([30, 0])
    noisy = add_noise(clean, noise, loss.levels[place])
    found = loss.target(noisy, place, text.repeat(2))
    assert loss.levels.time is not None and loss.levels.time[place].tolist() == [619, 19]
    with torch.no_grad():  # an adapter of zeros: the student is the teacher
        there, below = loss.levels[30], loss.levels[29]
        guided = tiny.guided_predictor(text, empty, 3.0)(noisy[:1], there)
        stepped = float(below.a) * guided.clean + float(below.b) * guided.noise
        assert (found[:1] - tiny.predictor(text)(stepped, below).clean).abs().max() < 1e-4
        last = tiny.guided_predictor(text, empty, 3.0)(noisy[1:], loss.levels[0]).clean
        assert (found[1:] - last).abs().max() < 1e-4
        for value in parameters.values():
            value.add_(0.3)
        changed = loss.target(noisy, place, text.repeat(2))
    assert (changed[:1] - found[:1]).abs().max() > 1e-3, "the student is asked below"
    assert (changed[1:] - found[1:]).abs().max() < 1e-6, "the base alone is the teacher"


def test_the_export_is_a_few_step_model_of_its_base(
    settings: Callable[..., TurboSettings], tmp_path: Path
) -> None:
    own = settings("exported")
    training = distil(own)
    out = tmp_path / "few"
    done = CliRunner().invoke(app, ["export", "--out", str(out), "--workdir", str(own.workdir)])
    assert done.exit_code == 0, done.output
    base = Backbone.open(own.model, device="cpu", precision="fp32")
    few = open_few_step(base, str(out))
    times = few.schedule(4).time
    assert times is not None and times[:-1].tolist() == [999, 759, 499, 259]
    assert few.denoiser is not None
    stored = read_tensors(out / LORA_WEIGHTS)[0]
    assert {value.dtype for value in stored.values()} == {torch.float16}
    average = sorted(value.abs().sum().item() for value in training.average.values.values())
    assert sum(float(value.abs().sum()) for value in stored.values()) == pytest.approx(sum(average), rel=1e-2)


def test_latents_of_another_autoencoder_are_refused(settings: Callable[..., TurboSettings]) -> None:
    own = settings("other")
    for path in (own.workdir / "latents").iterdir():
        write_tensors(path, {"mean": torch.zeros(12, 8, 4, 4), "std": torch.ones(12, 8, 4, 4)})
    with pytest.raises(UserError, match="own autoencoder"):
        distil(own)
