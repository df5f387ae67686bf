"""The distillation of `moji-turbo`: its trajectories, its error, its exact resumption, and a folder that is a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler
from typer.testing import CliRunner

from backbone.adapters.lora import LORA_WEIGHTS
from backbone.diffusion.noise import Estimate, add_noise, generator
from backbone.diffusion.samplers import dpmpp_2m
from backbone.diffusion.schedules import vp_schedule
from backbone.io.console import UserError
from backbone.io.files import read_header, read_tensors, write_tensors
from backbone.models.few_step.model import open_few_step
from backbone.models.model import Backbone
from recipes.moji.adapters.turbo import (
    STEPS,
    SUBSTEPS,
    TurboSettings,
    app,
    distil,
    draw,
    draw_states,
    draw_trajectories,
    make_student_schedule,
    measure_step_error,
    read_alphas,
)
from tests.tiny import tiny_pipeline


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TurboSettings]:
    """Of a distillation of a tiny pipeline on two trajectories that it drew."""
    folder = tmp_path_factory.mktemp("turbo")
    tiny_pipeline(folder / "base")
    drawn = folder / "drawn"
    words = ["draw", "--count", "2", "--model", str(folder / "base"), "--workdir", str(drawn)]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output

    def make(name: str, **more: object) -> TurboSettings:
        work = folder / name
        if not work.exists():
            work.mkdir()
            (work / "trajectories").symlink_to(drawn / "trajectories")
        usual = TurboSettings(
            steps=4, batch=2, rank=2, decay=2, warmup=1, model=str(folder / "base"), workdir=work
        )
        return replace(usual, **more)  # type: ignore[arg-type]

    return make


def test_the_teacher_s_states_are_those_of_its_guided_sampler_at_the_student_s_levels(tiny: Backbone) -> None:
    states = draw_trajectories(tiny, ["a dog", "a cat"], 3.0, seed=0).float()
    assert states.shape == (2, 5, *tiny.latent_shape)
    text, empty = tiny.encode_prompts(["a dog", "a cat"]), tiny.encode_prompts(["", ""])
    fine = vp_schedule(read_alphas(tiny), STEPS * SUBSTEPS, "trailing")
    with torch.no_grad():
        last = dpmpp_2m(states[:, 0], tiny.guided_predictor(text, empty, 3.0), fine)
    assert (last - states[:, -1]).abs().max() < 5e-3 * states.abs().max()  # kept in half precision
    clean, noise = (torch.randn((2, *tiny.latent_shape), generator=generator(n)) for n in range(2))
    levels = make_student_schedule(tiny)
    known = draw_states(add_noise(clean, noise, fine[0]), lambda noisy, level: Estimate(clean, noise), fine)
    for state, level in zip(known, levels, strict=True):  # where x0 is known, any solver goes straight to it
        assert torch.allclose(state, add_noise(clean, noise, level), atol=1e-5)


def test_the_error_is_that_of_diffusers_step_where_it_lands(tiny: Backbone) -> None:
    here, there = (torch.randn((2, *tiny.latent_shape), generator=generator(n)) for n in range(2))
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        timestep_spacing="trailing", prediction_type=tiny.path.prediction_type,
    )  # fmt: skip
    scheduler.set_timesteps(4)
    text = tiny.encode_prompts(["a dog", "a cat"])
    with torch.no_grad():
        found = measure_step_error(
            tiny.predictor(text), here, there, make_student_schedule(tiny), torch.tensor([1, 3])
        )
        for row, time in ((0, 749), (1, 249)):
            output = tiny.denoiser(
                here[row : row + 1], time, encoder_hidden_states=text[row : row + 1].text["hidden"]
            )
            landed = scheduler.step(output.sample, time, here[row : row + 1]).prev_sample
            assert (landed - there[row]).square().mean() == pytest.approx(found[row].item(), rel=1e-4)


def test_a_stopped_distillation_ends_at_the_same_weights(settings: Callable[..., TurboSettings]) -> None:
    whole = distil(settings("whole"))
    distil(settings("parts", minutes=0.0))
    parts = distil(settings("parts"))
    assert all(torch.equal(parts.weights[name], value) for name, value in whole.weights.items())
    assert any(".lora_B." in name and value.abs().max() > 0 for name, value in whole.weights.items())


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
    assert times is not None and times[:-1].tolist() == [999, 749, 499, 249]
    assert float(few.schedule(4).b[-1]) == 0
    assert few.denoiser is not None
    stored = read_tensors(out / LORA_WEIGHTS)[0]
    assert {value.dtype for value in stored.values()} == {torch.float16}
    average = sorted(value.abs().sum().item() for value in training.average.values.values())
    assert sum(float(value.abs().sum()) for value in stored.values()) == pytest.approx(sum(average), rel=1e-2)


def test_a_distillation_begins_from_an_exported_one_on_the_grid(
    settings: Callable[..., TurboSettings], tmp_path: Path
) -> None:
    first = settings("first", steps=40, rank=4)
    distil(first)
    words = ["export", "--out", str(tmp_path), "--workdir", str(first.workdir), "--no-averaged"]
    assert CliRunner().invoke(app, words).exit_code == 0
    stored = {
        key.removeprefix("unet."): value.float()
        for key, value in read_tensors(tmp_path / LORA_WEIGHTS)[0].items()
    }
    later = settings("later", steps=1, begin_from=tmp_path, rounded=True, learning_rate=0.0)
    for name, value in distil(later).weights.items():
        assert torch.equal(value, stored[name.replace(".few_step", "")])
    with pytest.raises(FileNotFoundError, match=r"pytorch_lora_weights\.safetensors"):
        distil(replace(later, begin_from=tmp_path / "elsewhere", workdir=settings("none").workdir))


def test_several_processes_draw_trajectories_apart(
    settings: Callable[..., TurboSettings], tmp_path: Path
) -> None:
    base = settings("apart").model
    words = ["draw", "--count", "101", "--first", "100", "--model", base, "--workdir", str(tmp_path)]
    assert CliRunner().invoke(app, words).exit_code == 0
    assert [path.name for path in (tmp_path / "trajectories").iterdir()] == ["000100.safetensors"]
    with pytest.raises(UserError, match="no multiple of 100"):
        draw(count=101, first=50, model=base, workdir=tmp_path)


@pytest.mark.slow
def test_the_errors_of_base_and_student_stand_below_each_other(
    settings: Callable[..., TurboSettings],
) -> None:
    own = settings("compared", steps=30, learning_rate=3e-3)
    distil(own)
    done = CliRunner().invoke(app, ["compare", "--workdir", str(own.workdir), "--no-averaged"])
    assert done.exit_code == 0, done.output
    base, student = (
        [float(number) for number in line.split(": ")[1].split(", ")]
        for line in done.output.splitlines()[-2:]
    )
    assert len(base) == len(student) == 4 and sum(student) < sum(base)


def test_what_was_not_drawn_by_this_base_is_refused(
    settings: Callable[..., TurboSettings], tmp_path: Path
) -> None:
    own = settings("other")
    with pytest.raises(UserError, match=r"Run: python -m recipes\.moji\.adapters\.turbo draw"):
        distil(replace(own, workdir=tmp_path))
    path = own.workdir / "trajectories" / "000000.safetensors"
    assert read_header(path).metadata["guidance"] == "4.0"
    write_tensors(
        tmp_path / "trajectories" / path.name,
        {"states": torch.zeros(2, 5, 8, 4, 4)},
        read_header(path).metadata,
    )
    with pytest.raises(UserError, match="Draw the trajectories with the base"):
        distil(replace(own, workdir=tmp_path))
