"""Guidance in a part of the steps, and pictures that are drawn anew."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.cli.sampling import Sampler, check_guidance_interval
from backbone.diffusion.noise import Estimate, Level
from backbone.diffusion.samplers import ddim, heun
from backbone.diffusion.schedules import karras_schedule
from backbone.io.console import UserError
from backbone.models.clips.frames import link_frames
from backbone.models.model import Backbone
from backbone.models.sample import (
    Frames,
    GivenLatents,
    Request,
    count_skipped_steps,
    draw_initial_noise,
    find_latent_size,
    limit_guidance,
    sample_latents,
)
from tests.tiny import tiny_flux, tiny_pipeline, tiny_stable_diffusion_3, tiny_stable_diffusion_xl

ASKED = [Request("a dog in the snow", (0, 0)), Request("a red cat", (1, 0))]


@pytest.fixture
def tiny(kept: Backbone) -> Backbone:
    """Nothing here changes it."""
    return kept


def marked(said: list[str], mark: str) -> object:
    def predict(noisy: Tensor, level: Level) -> Estimate:
        said.append(mark)
        return Estimate(torch.zeros_like(noisy), noisy / level.b)

    return predict


@pytest.mark.parametrize(
    ("share", "expected"),
    [((0.2, 0.7), "..#####..."), ((0.0, 0.5), "#####....."), ((0.9, 1.0), ".........#")],
)
def test_a_share_of_the_steps_follows_the_guidance(share: tuple[float, float], expected: str) -> None:
    said: list[str] = []
    schedule = karras_schedule(10, 0.01, 10.0)
    predict = limit_guidance(share, marked(said, "#"), marked(said, "."), schedule)  # type: ignore[arg-type]
    ddim(torch.ones(1, 2), predict, schedule)
    assert "".join(said) == expected


def test_both_looks_of_a_step_of_heun_follow_their_own_levels() -> None:
    said: list[str] = []
    schedule = karras_schedule(4, 0.01, 10.0)
    predict = limit_guidance((0.5, 1.0), marked(said, "#"), marked(said, "."), schedule)  # type: ignore[arg-type]
    heun(torch.ones(1, 2), predict, schedule)
    assert "".join(said).startswith("...##") and set(said[3:]) == {"#"}


@pytest.mark.parametrize(
    ("sampler", "times"), [("ddim", 3), ("ancestral", 3), ("dpmpp-2m", 3), ("unipc", 3), ("heun", 6)]
)
def test_what_was_done_is_told_after_each_prediction_and_adds_up_to_the_images(
    tiny: Backbone, sampler: Sampler, times: int
) -> None:
    told: list[float] = []
    asked = [*ASKED, Request("a dog", (9, 0))]
    drawn = sample_latents(
        tiny, asked, steps=3, guidance=2.0, seed=5, sampler=sampler, batch=2, advance=told.append
    )
    for first, number in ((0, 2), (times, 1)):  # the images of each batch
        next(drawn)
        assert told[first:] == pytest.approx([number / times] * times)


def test_what_is_drawn_is_the_prompt_s_way_and_then_the_guided_one(tiny: Backbone) -> None:
    (ours,) = sample_latents(tiny, ASKED, steps=4, guidance=3.0, seed=5, guided=(0.5, 1.0))
    text = tiny.encode_prompts([request.prompt for request in ASKED])
    empty = tiny.encode_prompts(["", ""])
    schedule = tiny.schedule(4)
    noisy = torch.stack([draw_initial_noise(tiny, 5, *request.key) for request in ASKED])
    half = ddim(noisy, tiny.predictor(text), schedule[:3])
    expected = ddim(half, tiny.guided_predictor(text, empty, 3.0), schedule[2:])
    assert torch.allclose(ours, expected, atol=1e-5)
    (always,) = sample_latents(tiny, ASKED, steps=4, guidance=3.0, seed=5)
    (said,) = sample_latents(tiny, ASKED, steps=4, guidance=3.0, seed=5, guided=(0.0, 1.0))
    assert torch.equal(always, said) and not torch.allclose(always, ours)


@pytest.mark.parametrize(
    "build",
    [tiny_pipeline, tiny_stable_diffusion_xl, tiny_stable_diffusion_3, tiny_flux],
    ids=["sd", "sdxl", "sd3", "flux"],
)
def test_what_is_drawn_anew_is_the_picture_noised_and_walked_down(
    build: Callable[[Path], Path], tmp_path: Path
) -> None:
    """SDEdit, written out: clean latents at the level of the last half, each with its own noise, guided as ever."""
    tiny = Backbone.open(str(build(tmp_path / "model")), device="cpu", precision="fp32")
    clean = torch.randn(2, *tiny.latent_shape, generator=torch.Generator().manual_seed(1))
    how: dict[str, Any] = {"steps": 4, "guidance": 3.0, "seed": 5}
    (ours,) = sample_latents(tiny, ASKED, given=GivenLatents(clean, 0.5), **how)
    text = tiny.encode_prompts([request.prompt for request in ASKED])
    rest = tiny.schedule(4)[2:]
    noise = torch.stack([draw_initial_noise(tiny, 5, *request.key) for request in ASKED])
    start = rest.a[0].float() * clean + rest.b[0].float() * noise
    expected = ddim(start, tiny.guided_predictor(text, tiny.encode_prompts(["", ""]), 3.0), rest)
    assert torch.allclose(ours, expected, atol=1e-5)
    alone = torch.cat(list(sample_latents(tiny, ASKED, given=GivenLatents(clean, 0.5), batch=1, **how)))
    assert torch.allclose(ours, alone, atol=1e-4)


@pytest.mark.parametrize("own", ["ancestral", "heun", "ddim"])
def test_images_are_drawn_by_the_model_s_own_sampler_unless_another_is_named(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch, own: Sampler
) -> None:
    monkeypatch.setitem(tiny.defaults, "sampler", own)
    drawn, by_name, by_another = (draw(tiny, ASKED, sampler=name) for name in (None, own, "dpmpp-2m"))
    assert torch.equal(drawn, by_name) and not torch.equal(drawn, by_another)


def test_clips_have_no_fresh_noise_unless_it_is_named(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(tiny.defaults, "sampler", "ancestral")
    with link_frames(tiny, 3):
        drawn, steady, fresh = (
            draw(tiny, ASKED[:1], frames=Frames(3), sampler=name) for name in (None, "ddim", "ancestral")
        )
    assert torch.equal(drawn, steady) and not torch.equal(drawn, fresh)


def draw(model: Backbone, asked: Sequence[Request], **how: Any) -> Tensor:
    """Latents of three steps."""
    (latents,) = sample_latents(model, asked, steps=3, guidance=2.0, seed=5, **how)
    return latents


def test_a_share_that_leaves_no_step_is_refused() -> None:
    assert [count_skipped_steps(share, 10) for share in (0.1, 0.75, 1.0)] == [9, 2, 0]
    with pytest.raises(UserError, match="is less than one step"):
        count_skipped_steps(0.04, 10)
    with pytest.raises(UserError, match="no share"):
        count_skipped_steps(1.5, 10)


@pytest.mark.parametrize("share", [(0.5, 0.5), (0.7, 0.2), (-0.1, 1.0), (0.0, 1.1)])
def test_what_is_no_share_is_refused(share: tuple[float, float]) -> None:
    with pytest.raises(UserError, match="no share"):
        check_guidance_interval(share)


@pytest.mark.parametrize(
    "build",
    [tiny_pipeline, tiny_stable_diffusion_xl, tiny_stable_diffusion_3, tiny_flux],
    ids=lambda b: b.__name__,
)
def test_every_family_draws_other_sizes(tmp_path: Path, build: Callable[..., Path]) -> None:
    model = Backbone.open(str(build(tmp_path / "model")), device="cpu", precision="fp32")
    wide, high = model.resolution + 2 * model.factor, model.resolution
    (drawn,) = sample_latents(model, ASKED[:1], steps=2, guidance=2.0, seed=0, size=(wide, None))
    assert drawn.shape[-2:] == (high // model.factor, wide // model.factor)
    assert bool(drawn.isfinite().all())
    own, usual = (
        sample_latents(model, ASKED[:1], steps=2, guidance=2.0, seed=0, size=size)
        for size in ((high, high), (None, None))
    )
    assert torch.equal(next(own), next(usual))


def test_a_size_that_the_model_cannot_draw_is_refused_with_the_reason(tmp_path: Path, tiny: Backbone) -> None:
    with pytest.raises(UserError, match=r"multiples of 16 pixels, and the width is 65\. Give 64 or 80"):
        find_latent_size(tiny, (65, None))
    model = Backbone.open(str(tiny_stable_diffusion_3(tmp_path)), device="cpu", precision="fp32")
    most = model.family.longest_side(model.location)
    assert most is not None
    with pytest.raises(
        UserError, match=f"places for {most * model.factor} pixels a side at most, and the height"
    ):
        find_latent_size(model, (None, (most + 2) * model.factor))


def test_what_is_known_of_a_sample_stays_and_the_rest_is_drawn_beside_it(tiny_folder: Path) -> None:
    tiny = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    random = torch.Generator().manual_seed(0)
    clean = torch.randn(len(ASKED), *tiny.latent_shape, generator=random)
    kept = torch.zeros(tiny.latent_shape[-2:], dtype=torch.bool)
    kept[:, : kept.shape[1] // 2] = True
    for sampler in ("ddim", "ancestral", "heun", "dpmpp-2m", "unipc"):
        how: dict[str, Any] = {"steps": 3, "guidance": 2.0, "seed": 1, "sampler": sampler}
        (drawn,) = sample_latents(tiny, ASKED, given=GivenLatents(clean, kept=kept), **how)
        (other,) = sample_latents(tiny, ASKED, given=GivenLatents(clean), **how)
        left = 5 * float(tiny.schedule(3).b[-1])  # a schedule may end before the clean sample
        assert (drawn[..., kept] - clean[..., kept]).abs().max() < left + 1e-5
        assert (drawn[..., ~kept] - clean[..., ~kept]).abs().mean() > 0.1
        assert (drawn - other)[..., ~kept].abs().max() > 1e-4
