"""The noise algebra: inverses, singular ends, known answers."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

from backbone.diffusion.losses import denoising_score_matching, min_snr, uniform, variance
from backbone.diffusion.noise import (
    Estimate,
    Level,
    PredictionType,
    SingularLevel,
    add_noise,
    convert,
    estimate,
    flow,
    guided_predictor,
    predictor,
    randn_like,
    scale_to_unit_variance,
    score,
    target,
    to_sigma_space,
    tweedie,
    tweedie_ve,
    tweedie_vp,
    ve,
    vp,
)
from tests.backbone.mixture import THREE_MODES

KINDS: tuple[PredictionType, ...] = get_args(PredictionType)
INSIDE = torch.tensor([0.01, 0.2, 0.5, 0.9, 0.99], dtype=torch.float64)
PATHS = {"vp": vp(INSIDE), "ve": ve(0.01 + 80 * INSIDE**3), "flow": flow(INSIDE)}
paths = pytest.mark.parametrize("level", PATHS.values(), ids=PATHS.keys())


def tensors(count: int, seed: int = 0) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(5, 3, 4, 4, generator=generator, dtype=torch.float64) for _ in range(count))


# Levels


def test_every_path_is_the_same_formula() -> None:
    x0, eps = tensors(2)
    assert_equal(add_noise(x0, eps, vp(0.36)), 0.6 * x0 + 0.8 * eps)
    assert_equal(add_noise(x0, eps, ve(3.0)), x0 + 3 * eps)
    assert_equal(add_noise(x0, eps, flow(0.25)), 0.75 * x0 + 0.25 * eps)


@paths
def test_a_level_for_each_sample_is_that_level_for_one_sample(level: Level) -> None:
    x0, eps = tensors(2)
    together = add_noise(x0, eps, level)
    for i, alone in enumerate(level):
        assert_equal(together[i : i + 1], add_noise(x0[i : i + 1], eps[i : i + 1], alone))


@paths
def test_snr_sigma_and_log_snr_say_the_same(level: Level) -> None:
    assert_equal(level.snr, level.sigma**-2)
    assert_equal(level.log_snr, level.snr.log())


def test_a_ladder_counts_slices_flips_and_moves() -> None:
    schedule = vp(torch.tensor([0.1, 0.5, 1.0]), time=torch.tensor([900, 400, 0]))
    assert len(schedule) == 3 and [int(level.time) for level in schedule if level.time is not None] == [
        900,
        400,
        0,
    ]
    assert_equal(schedule[1:].flip().a, schedule.a[[2, 1]])
    cast = schedule.to("cpu", torch.bfloat16)
    assert cast.a.dtype is torch.bfloat16 and cast.time is not None and cast.time.dtype is torch.int64


def test_a_level_takes_its_dtype_from_the_state() -> None:
    x0, eps = (x.float() for x in tensors(2))
    assert add_noise(x0, eps, PATHS["vp"]).dtype is torch.float32
    assert add_noise(x0.bfloat16(), eps.bfloat16(), PATHS["vp"]).dtype is torch.bfloat16


def test_a_level_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="differ in shape"):
        Level(torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="differ in shape"):
        vp(torch.ones(3), time=torch.tensor(1))
    with pytest.raises(ValueError, match="not \\(2, 2\\)"):
        vp(torch.ones(2, 2))
    x0, eps = tensors(2)
    with pytest.raises(ValueError, match="2 levels for 5 samples"):
        add_noise(x0, eps, vp(torch.tensor([0.1, 0.2])))


# Conversions


@paths
@pytest.mark.parametrize("source", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_converting_there_and_back_returns_the_prediction(
    level: Level, source: PredictionType, other: PredictionType
) -> None:
    prediction, noisy = tensors(2)
    there = convert(prediction, noisy, level, source, other)
    assert_equal(convert(there, noisy, level, other, source), prediction)


@paths
@pytest.mark.parametrize("kind", KINDS)
def test_the_target_is_estimated_as_the_truth(level: Level, kind: PredictionType) -> None:
    x0, eps = tensors(2)
    found = estimate(target(x0, eps, level, kind), add_noise(x0, eps, level), level, kind)
    assert_equal(found.clean, x0)
    assert_equal(found.noise, eps)


@paths
@pytest.mark.parametrize("kind", KINDS)
def test_both_halves_of_any_prediction_make_up_the_noisy_state(level: Level, kind: PredictionType) -> None:
    prediction, noisy = tensors(2)
    assert_equal(add_noise(*estimate(prediction, noisy, level, kind), level), noisy)


@paths
@pytest.mark.parametrize("kind", KINDS)
def test_converting_goes_through_both_halves(level: Level, kind: PredictionType) -> None:
    prediction, noisy = tensors(2)
    halves = estimate(prediction, noisy, level, "v_prediction")
    assert_equal(convert(prediction, noisy, level, "v_prediction", kind), target(*halves, level, kind))


@pytest.mark.parametrize("end", [vp(0.0), vp(1.0), flow(1.0), flow(0.0)], ids=["a=0", "b=0", "t=1", "t=0"])
@pytest.mark.parametrize("kind", ["v_prediction", "flow"])
def test_v_and_flow_are_read_natively_at_both_ends(end: Level, kind: PredictionType) -> None:
    x0, eps = tensors(2)
    found = estimate(target(x0, eps, end, kind), add_noise(x0, eps, end), end, kind)
    assert_equal(found.clean, x0)
    assert_equal(found.noise, eps)


def test_what_divides_by_zero_raises() -> None:
    prediction, noisy = tensors(2)
    for noise_alone in (vp(0.0), flow(1.0)):
        for kind in ("epsilon", "score"):
            with pytest.raises(SingularLevel, match="a = 0"):
                estimate(prediction, noisy, noise_alone, kind)
        with pytest.raises(SingularLevel):
            convert(prediction, noisy, noise_alone, "epsilon", "v_prediction")
        with pytest.raises(SingularLevel):
            tweedie(noisy, prediction, noise_alone)
        with pytest.raises(SingularLevel):
            to_sigma_space(noise_alone)
    for clean_alone in (vp(1.0), ve(0.0), flow(0.0)):
        with pytest.raises(SingularLevel, match="b = 0"):
            estimate(prediction, noisy, clean_alone, "sample")
        with pytest.raises(SingularLevel, match="b = 0"):
            convert(prediction, noisy, clean_alone, "epsilon", "score")
        with pytest.raises(SingularLevel, match="b = 0"):
            score(Estimate(prediction, noisy), clean_alone)


def test_one_singular_sample_in_a_batch_raises() -> None:
    prediction, noisy = tensors(2)
    with pytest.raises(SingularLevel):
        estimate(prediction, noisy, flow(torch.tensor([0.1, 0.5, 1.0, 0.2, 0.3])), "epsilon")


def test_the_halves_that_are_defined_at_the_ends_convert() -> None:
    prediction, noisy = tensors(2)
    assert_equal(convert(prediction, noisy, flow(1.0), "epsilon", "score"), -prediction)
    assert_equal(convert(prediction, noisy, flow(1.0), "sample", "epsilon"), noisy)
    assert_equal(convert(prediction, noisy, flow(0.0), "epsilon", "sample"), noisy)


def test_an_unknown_kind_is_named() -> None:
    prediction, noisy = tensors(2)
    with pytest.raises(ValueError, match=r"'eps'\. Known are epsilon, sample"):
        estimate(prediction, noisy, vp(0.5), "eps")  # type: ignore[arg-type]


# Score and Tweedie


@paths
def test_the_score_is_the_gradient_of_the_log_density(level: Level) -> None:
    level = level[2]
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(THREE_MODES.log_density(x, level).sum(), x)
    assert_equal(score(THREE_MODES.predict(x, level), level), gradient)


@paths
def test_tweedie_turns_the_score_into_the_posterior_mean(level: Level) -> None:
    level = level[1]
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    exact = THREE_MODES.predict(x, level)
    assert_equal(tweedie(x, score(exact, level), level), exact.clean)


def test_the_three_forms_of_tweedie_agree() -> None:
    noisy, s = tensors(2)
    alpha_bar, sigma = INSIDE[1], torch.tensor(2.5, dtype=torch.float64)
    assert_equal(tweedie_vp(noisy, s, alpha_bar), (noisy + (1 - alpha_bar) * s) / alpha_bar.sqrt())
    assert_equal(tweedie_vp(noisy, s, alpha_bar), tweedie(noisy, s, vp(alpha_bar)))
    assert_equal(tweedie_ve(noisy, s, sigma), noisy + sigma**2 * s)


# Predicting


def test_guidance_extrapolates_the_raw_prediction() -> None:
    noisy, conditional, unconditional = tensors(3)
    level = PATHS["vp"]
    asked = guided_predictor(
        lambda x, at: estimate(conditional, x, at, "epsilon"),
        lambda x, at: estimate(unconditional, x, at, "epsilon"),
        7.5,
    )(noisy, level)
    raw = unconditional + 7.5 * (conditional - unconditional)
    assert_equal(asked.noise, raw)
    assert_equal(asked.clean, estimate(raw, noisy, level, "epsilon").clean)


def test_guidance_of_one_never_asks_the_unconditional() -> None:
    def forbidden(noisy: Tensor, level: Level) -> Estimate:
        raise AssertionError("asked")

    x = torch.zeros(5, 2, dtype=torch.float64)
    level = vp(0.5)
    expected = THREE_MODES.predict(x, level).noise
    assert_equal(guided_predictor(THREE_MODES.predict, forbidden, 1.0)(x, level).noise, expected)


def test_a_network_is_conditioned_on_the_level_s_time() -> None:
    noisy, _ = tensors(2)
    predict = predictor(lambda x, time: x * time, "epsilon")
    assert_equal(predict(noisy, vp(0.5, time=torch.tensor(7))).noise, 7 * noisy)
    with pytest.raises(ValueError, match="time"):
        predict(noisy, vp(0.5))


@paths
def test_an_estimate_is_the_same_on_every_scale(level: Level) -> None:
    x = torch.randn(5, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direct = THREE_MODES.predict(x, level[1])
    scaled = scale_to_unit_variance(THREE_MODES.predict)(x, level[1])
    assert_equal(scaled.clean, direct.clean)
    assert_equal(scaled.noise, direct.noise)


def test_fresh_noise_for_a_sample_does_not_depend_on_its_neighbours() -> None:
    def seeded(*seeds: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    batch = randn_like(torch.empty(3, 2, 4), seeded(1, 2, 3))
    assert torch.equal(batch[1:2], randn_like(torch.empty(1, 2, 4), seeded(2)))
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        randn_like(torch.empty(3, 2), seeded(1, 2))


# Learning


def test_the_loss_by_hand() -> None:
    clean = torch.tensor([[[1.0, 2.0]], [[0.0, -1.0]]])
    noise = torch.tensor([[[0.5, 0.5]], [[1.0, 1.0]]])
    level = vp(torch.tensor([0.36, 0.64]))
    prediction = torch.tensor([[[0.5, 1.5]], [[4.0, 1.0]]])
    loss = denoising_score_matching(prediction, clean, noise=noise, level=level, prediction_type="epsilon")
    torch.testing.assert_close(loss, torch.tensor([0.5, 4.5]))
    weighted = denoising_score_matching(
        prediction,
        clean,
        noise=noise,
        level=level,
        prediction_type="epsilon",
        weight=torch.tensor([2.0, 0.0]),
    )
    torch.testing.assert_close(weighted, torch.tensor([1.0, 0.0]))
    v = denoising_score_matching(
        torch.zeros(2, 1, 2), clean, noise=noise, level=level, prediction_type="v_prediction"
    )
    # v is 0.6·(½, ½) − 0.8·(1, 2) = (−0.5, −1.3), and 0.8·(1, 1) − 0.6·(0, −1) = (0.8, 1.4)
    torch.testing.assert_close(v, torch.tensor([0.97, 1.3]))


def test_the_loss_of_a_half_precision_network_is_compared_in_float32() -> None:
    x0, eps = (x.bfloat16() for x in tensors(2))
    assert (
        denoising_score_matching(x0, x0, noise=eps, level=vp(0.5), prediction_type="flow").dtype
        is torch.float32
    )


@paths
def test_denoising_score_matching_is_least_for_the_true_score(level: Level) -> None:
    generator = torch.Generator().manual_seed(0)
    clean = THREE_MODES.sample(20000, generator)
    noise = randn_like(clean, generator)
    for here in level[1:4]:
        noisy = add_noise(clean, noise, here)
        exact = score(THREE_MODES.predict(noisy, here), here)

        def loss(prediction: Tensor, level: Level = here) -> float:
            per_sample = denoising_score_matching(
                prediction, clean, noise=noise, level=level, prediction_type="score"
            )
            return float(per_sample.mean())

        assert loss(exact) < loss(1.1 * exact) and loss(exact) < loss(0.9 * exact)
        assert loss(exact) < loss(exact + 0.1 / here.b)


@paths
@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weighs_the_error_in_x0_alike_for_every_kind(level: Level, kind: PredictionType) -> None:
    noisy, prediction, error = tensors(3)
    wrong = (
        estimate(prediction + error, noisy, level, kind).clean
        - estimate(prediction, noisy, level, kind).clean
    )
    in_x0 = level.snr.clamp(max=5) * wrong.square().flatten(1).mean(1)
    assert_equal(min_snr(level, 5.0, kind) * error.square().flatten(1).mean(1), in_x0)


def test_min_snr_as_the_paper_prints_it() -> None:
    level = PATHS["vp"]
    capped = level.snr.clamp(max=5)
    assert_equal(min_snr(level, 5.0, "sample"), capped)
    assert_equal(min_snr(level, 5.0, "epsilon"), capped / level.snr)
    assert_equal(min_snr(level, 5.0, "v_prediction"), capped / (level.snr + 1))


@pytest.mark.parametrize("kind", KINDS)
def test_weights_are_finite_at_both_ends(kind: PredictionType) -> None:
    for ends in (vp(torch.tensor([0.0, 1.0])), flow(torch.tensor([1.0, 0.0]))):
        for weight in (min_snr(ends, prediction_type=kind), uniform(ends), variance(ends)):
            assert weight.shape == (2,) and bool(weight.isfinite().all())


def assert_equal(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
