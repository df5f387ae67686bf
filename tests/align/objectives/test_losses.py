"""The preference losses: what they say at the start, against the papers' own words, and in numbers worked by hand."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from align.objectives.losses import (
    PairErrors,
    PairLoss,
    accuracy,
    dpo,
    dspo,
    hinge,
    ipo,
    kto,
    kto_baseline,
    mapo,
    safeguard,
    scaled_gradient,
    sft,
    smooth_labels,
    with_sft,
)

PAIR_LOSSES: dict[str, PairLoss] = {"dpo": dpo, "ipo": ipo, "hinge": hinge, "mapo": mapo, "sft": sft}
BETA = 2000.0


def errors(winner: float, loser: float, reference_winner: float, reference_loser: float) -> PairErrors:
    return PairErrors(
        *(torch.tensor([value]) for value in (winner, loser, reference_winner, reference_loser))
    )


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mean_square(x: Tensor) -> Tensor:
    return x.square().flatten(1).mean(1)


# At the start -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value"), [(dpo, math.log(2)), (ipo, 0.25), (hinge, 1.0)], ids=["dpo", "ipo", "hinge"]
)
def test_an_untouched_model_has_the_known_loss(
    loss: Callable[[PairErrors, float], Tensor], value: float
) -> None:
    start = errors(0.31, 0.17, 0.31, 0.17)
    assert float(loss(start, BETA)) == pytest.approx(value, abs=1e-7)


def test_an_untouched_model_has_kto_loss_of_one_half() -> None:
    same = torch.tensor([0.3, 0.2])
    assert kto(same, BETA, same, torch.tensor([1.0, 0.0])).tolist() == [0.5, 0.5]


def test_accuracy_counts_ties_as_one_half() -> None:
    assert accuracy(torch.tensor([0.1, -0.1, 0.0])).tolist() == [1.0, 0.0, 0.5]


# Against the papers' own words ------------------------------------------------------------------------------


def test_dpo_is_equation_14_of_the_paper_in_loss_and_gradient() -> None:
    """With β_paper·T·ω·D = ½·β: the paper sums over dimensions, here they are averaged."""
    shape, steps, omega = (3, 4, 8, 8), 1000, 0.7
    dimensions = 4 * 8 * 8
    noise, reference_w, reference_l = (drawn(*shape, seed=seed) for seed in (1, 2, 3))
    said_w, said_l = (drawn(*shape, seed=seed).requires_grad_() for seed in (4, 5))
    beta = 3.0
    beta_paper = 0.5 * beta / (steps * omega * dimensions)

    def norm2(x: Tensor) -> Tensor:
        return (x**2).sum(dim=(1, 2, 3))

    inside = (
        norm2(noise - said_w)
        - norm2(noise - reference_w)
        - (norm2(noise - said_l) - norm2(noise - reference_l))
    )
    paper = -torch.log(torch.sigmoid(-beta_paper * steps * omega * inside)).mean()
    ours = dpo(
        PairErrors(*(mean_square(said - noise) for said in (said_w, said_l, reference_w, reference_l))), beta
    ).mean()
    assert ours.item() == pytest.approx(paper.item(), rel=1e-12)
    wanted = torch.autograd.grad(paper, (said_w, said_l))
    got = torch.autograd.grad(ours, (said_w, said_l))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_dspo_is_the_square_that_its_errors_open() -> None:
    noise, reference_w, reference_l, said_l = (drawn(2, 4, 3, 3, seed=seed) for seed in (1, 2, 3, 4))
    said_w = drawn(2, 4, 3, 3, seed=5).requires_grad_()
    beta, pull = 4.0, 0.8
    pair = PairErrors(*(mean_square(said - noise) for said in (said_w, said_l, reference_w, reference_l)))
    ours = dspo(pair, beta, mean_square(said_w - reference_w), pull=pull).mean()
    lack = (1 - torch.sigmoid(pair.logit(beta)))[:, None, None, None]
    literal = (said_w - noise - pull * lack * (said_w - reference_w)).square().mean()
    assert ours.item() == pytest.approx(literal.item(), rel=1e-12)
    (one,) = torch.autograd.grad(ours, said_w, retain_graph=True)
    (other,) = torch.autograd.grad(literal, said_w)
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


def test_the_safeguard_stops_the_winner_from_getting_worse_to_first_order() -> None:
    """A step against the gradient of m_w − λ·m_l, both taken at one shared prediction, cannot raise m_w."""
    for seed in range(8):
        e_w, e_l = drawn(1, 16, seed=seed), 3 * drawn(1, 16, seed=seed) + drawn(1, 16, seed=100 + seed)
        scale = safeguard(mean_square(e_w), (e_w * e_l).mean(1), margin=0.25)
        direction = 2 * e_w - float(scale) * 2 * e_l
        decrease = float((2 * e_w * direction).sum())
        assert decrease >= 0.25 * float((2 * e_w).square().sum()) - 1e-12


def test_losers_that_pull_the_other_way_are_not_held_back() -> None:
    scale = safeguard(torch.tensor([1.0, 1.0, 1.0]), torch.tensor([-0.5, 0.0, 10.0]), margin=0.9)
    assert scale.tolist() == pytest.approx([1.0, 1.0, 0.01])


# Properties -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge", "mapo"])
def test_a_step_against_the_gradient_favours_the_winner(name: str) -> None:
    winner = torch.tensor([0.3], requires_grad=True)
    loser = torch.tensor([0.3], requires_grad=True)
    pair = PairErrors(winner, loser, winner.detach(), loser.detach())
    PAIR_LOSSES[name](pair, 10.0, None).sum().backward()
    assert winner.grad is not None and loser.grad is not None
    assert float(winner.grad) > 0 > float(loser.grad)


@pytest.mark.parametrize("name", ["dpo", "ipo", "hinge"])
def test_a_tie_does_not_prefer_either(name: str) -> None:
    tie = torch.tensor([0.5])
    forward = PAIR_LOSSES[name](errors(0.2, 0.4, 0.3, 0.3), 5.0, tie)
    backward = PAIR_LOSSES[name](errors(0.4, 0.2, 0.3, 0.3), 5.0, tie)
    assert float(forward) == pytest.approx(float(backward))


@pytest.mark.parametrize("name", ["dpo", "ipo"])
def test_a_tie_is_least_where_the_model_is_indifferent(name: str) -> None:
    tie = torch.tensor([0.5])
    even = PAIR_LOSSES[name](errors(0.3, 0.3, 0.3, 0.3), 5.0, tie)
    assert float(even) < float(PAIR_LOSSES[name](errors(0.2, 0.4, 0.3, 0.3), 5.0, tie))


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_swapping_the_pictures_and_the_preference_changes_nothing(name: str) -> None:
    loss = PAIR_LOSSES[name]
    one = loss(errors(0.2, 0.5, 0.25, 0.45), 5.0, torch.tensor([0.8]))
    other = loss(errors(0.5, 0.2, 0.45, 0.25), 5.0, torch.tensor([0.2]))
    assert float(one) == pytest.approx(float(other))


def test_a_preference_of_one_is_no_preference() -> None:
    pair = errors(0.2, 0.5, 0.25, 0.45)
    for loss in PAIR_LOSSES.values():
        assert torch.equal(loss(pair, 5.0, None), loss(pair, 5.0, torch.tensor([1.0])))


def test_kto_pushes_good_pictures_down_in_error_and_bad_ones_up() -> None:
    error = torch.tensor([0.3, 0.3], requires_grad=True)
    kto(error, BETA, error.detach(), torch.tensor([1.0, 0.0])).sum().backward()
    assert error.grad is not None
    assert float(error.grad[0]) > 0 > float(error.grad[1])


def test_scaling_a_gradient_keeps_the_value() -> None:
    error = torch.tensor([0.3, 0.7], requires_grad=True)
    scaled = scaled_gradient(error, torch.tensor([0.0, 0.25]))
    assert torch.equal(scaled.detach(), error.detach())
    scaled.sum().backward()
    assert error.grad is not None
    assert error.grad.tolist() == [0.0, 0.25]


@pytest.mark.parametrize("shape", [(), (2, 3)])
def test_errors_that_are_not_one_for_each_sample_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="one number for each sample"):
        PairErrors(torch.zeros(shape), torch.zeros(shape))


def test_errors_of_different_batches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"winner \[2\], loser \[3\]"):
        PairErrors(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="one B"):
        dpo(errors(0, 0, 0, 0), 1.0, torch.zeros(2))
    with pytest.raises(ValueError, match="one B"):
        kto(torch.zeros(2), 1.0, torch.zeros(2), torch.zeros(3))


def test_a_missing_reference_is_named() -> None:
    with pytest.raises(ValueError, match="reference"):
        dpo(PairErrors(torch.zeros(1), torch.zeros(1)), 1.0)


# Worked by hand ---------------------------------------------------------------------------------------------
# m_w = 0.20, m_l = 0.50, r_w = 0.25, r_l = 0.45, β = 40: z = 20·[(0.05) − (−0.05)] = 2.

HAND = (0.20, 0.50, 0.25, 0.45)


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (dpo, 0.1269280),  # −log σ(2)
        (ipo, 2.25),  # (2 − ½)²
        (hinge, 0.0),
        (sft, 0.20),
    ],
    ids=["dpo", "ipo", "hinge", "sft"],
)
def test_hand_worked_values(loss: Callable[[PairErrors, float], Tensor], value: float) -> None:
    assert float(loss(errors(*HAND), 40.0)) == pytest.approx(value, abs=1e-6)


def test_hand_worked_values_of_ties_and_smoothing() -> None:
    half, most = torch.tensor([0.5]), smooth_labels(torch.tensor([1.0]), 0.1)
    assert float(most) == pytest.approx(0.9)
    assert float(dpo(errors(*HAND), 40.0, half)) == pytest.approx(1.1269280, abs=1e-6)  # (0.1269 + 2.1269)/2
    assert float(dpo(errors(*HAND), 40.0, most)) == pytest.approx(0.3269280, abs=1e-6)  # .9·.1269 + .1·2.1269
    assert float(ipo(errors(*HAND), 40.0, half)) == pytest.approx(4.0, abs=1e-5)
    assert float(hinge(errors(*HAND), 40.0, half)) == pytest.approx(1.5, abs=1e-5)


def test_hand_worked_value_of_mapo() -> None:
    """s = ½: f(0.2) = 0.1/(e^0.1 − 1) = 0.950833, f(0.5) = 0.25/(e^0.25 − 1) = 0.880203; β/s = 20."""
    value = 0.20 - 0.1 * math.log(1 / (1 + math.exp(-20 * (0.950833 - 0.880203))))
    assert float(mapo(errors(*HAND), 10.0)) == pytest.approx(value, abs=1e-5)
    assert value == pytest.approx(0.2218, abs=1e-4)


def test_mapo_logit_is_dpo_s_without_a_reference_to_first_order() -> None:
    small = errors(0.002, 0.005, 0.0, 0.0)
    z = math.log(1 / (math.expm1(float(mapo(small, 100.0, weight=1.0)) - 0.002)))
    assert z == pytest.approx(-0.5 * 100 * (0.002 - 0.005), rel=1e-2)


def test_mapo_is_smooth_where_an_error_is_zero() -> None:
    winner = torch.zeros(1, requires_grad=True)
    mapo(PairErrors(winner, torch.ones(1)), 1.0).sum().backward()
    assert winner.grad is not None and torch.isfinite(winner.grad).all()


def test_hand_worked_values_of_kto() -> None:
    """β = 40: h = 20·0.05 = 1 and 20·(−0.05) = −1, so z0 = 0; then σ(1) = 0.731059 both times."""
    error, reference = torch.tensor([0.20, 0.50]), torch.tensor([0.25, 0.45])
    good = torch.tensor([1.0, 0.0])
    assert kto(error, 40.0, reference, good).tolist() == pytest.approx([0.268941, 0.268941], abs=1e-6)
    weighted = kto(error, 40.0, reference, good, good_weight=2.0, bad_weight=0.5)
    assert weighted.tolist() == pytest.approx([0.537883, 0.134471], abs=1e-6)
    both = kto(error[:1], 40.0, reference[:1], good[:1])  # alone, h = z0 = 1
    assert both.tolist() == pytest.approx([0.5], abs=1e-6)


def test_the_baseline_is_never_negative_and_carries_no_gradient() -> None:
    reward = torch.tensor([-1.0, -3.0], requires_grad=True)
    assert float(kto_baseline(reward)) == 0
    assert not kto_baseline(reward).requires_grad


def test_hand_worked_value_of_dspo() -> None:
    """z = 2, c = σ(−2) = 0.119203: 0.880797·0.20 + 0.119203·0.25 − 0.119203·0.880797·0.01."""
    value = dspo(errors(*HAND), 40.0, torch.tensor([0.01]))
    assert float(value) == pytest.approx(0.204910, abs=1e-6)


def test_the_winners_error_joins_with_its_weight() -> None:
    assert with_sft(torch.tensor([0.5]), torch.tensor([0.2]), 0.5).tolist() == pytest.approx([0.6])


def test_impossible_smoothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"between 0 and 0\.5"):
        smooth_labels(torch.ones(1), 0.7)
