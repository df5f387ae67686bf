"""Preference losses as free functions of per-sample errors, with one β for all of them.

An error is the mean over C, H, W of (prediction − target)², in the model's own parameterisation: m for the model in
training, r for its reference, w the preferred picture of a pair, l the other.
The implicit reward of a picture and the logit of a pair are

    h = ½β·(r − m)                 z = h_w − h_l = ½β·[(r_w − m_w) − (r_l − m_l)]

so β is Salesforce's `--beta_dpo` (2000 to 5000 in their runs), whichever loss it goes into. What others call β:

| whose                                               | their β, and where it stands           | β here              |
|-----------------------------------------------------|----------------------------------------|---------------------|
| Wallace et al. 2024, eq. 14 (sums over D)           | −β·T·ω·[(m_w − r_w) − (m_l − r_l)]·D   | 2·β·T·ω·D           |
| Salesforce's DiffusionDPO, diffusers' SDXL script   | −½β·[…], mean over dimensions          | β                   |
| diffusers' `train_diffusion_dpo.py` (SD)            | −β·[…], mean over dimensions           | 2·β                 |
| its `--loss_type ipo`                               | ([…] − 1/(2β))²                        | 2·β, loss β² times  |
| its `--loss_type hinge`                             | max(0, 1 − β·[…])                      | 2·β                 |
| jacklishufan/diffusion-kto `--beta_dpo`             | β·(r − m)                              | 2·β                 |
| mapo-t2i/mapo `--snr_value` s and T training steps  | T·[f(m_w) − f(m_l)], f'(0) = −½s       | s·T to first order  |
| AIDC-AI/Diffusion-SDPO, DPO and DSPO's inner term   | −½β·[…]                                | β                   |

At the start, where m = r, every z is 0: Diffusion-DPO's loss is ln 2, IPO's ¼, hinge's 1, KTO's ½.

A preference p [B] is the probability that the first picture is the better one: 1 for a choice, ½ for a tie (which
then pulls z to 0), something between where a label may be wrong (`smooth_labels`). A tie is never a win.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PairErrors:
    """The errors of B pairs, each [B]: the model's, and the reference's where the loss needs one."""

    winner: Tensor
    loser: Tensor
    reference_winner: Tensor | None = None
    reference_loser: Tensor | None = None

    def __post_init__(self) -> None:
        _require_vectors(
            winner=self.winner,
            loser=self.loser,
            reference_winner=self.reference_winner,
            reference_loser=self.reference_loser,
        )

    @property
    def margin(self) -> Tensor:
        """(r_w − m_w) − (r_l − m_l) [B]: positive where the model has turned towards the winner."""
        if self.reference_winner is None or self.reference_loser is None:
            raise ValueError("the reference's errors are missing: give reference_winner and reference_loser.")
        return (self.reference_winner - self.winner) - (self.reference_loser - self.loser)

    def logit(self, beta: float) -> Tensor:
        """z = ½β·margin [B]."""
        return 0.5 * beta * self.margin


PairLoss = Callable[[PairErrors, float, Tensor | None], Tensor]
"""(errors of B pairs, β, preference [B] or None) → loss [B]."""


def dpo(errors: PairErrors, beta: float, preference: Tensor | None = None) -> Tensor:
    """Diffusion-DPO [B]: −log σ(z) (Wallace et al. 2024, eq. 14); with p: −p·log σ(z) − (1 − p)·log σ(−z).

    The form with p is conservative DPO's (Mitchell 2023); p = ½ is a tie.
    """
    z = errors.logit(beta)
    return _mix(-F.logsigmoid(z), -F.logsigmoid(-z), preference)


def ipo(errors: PairErrors, beta: float, preference: Tensor | None = None) -> Tensor:
    """IPO [B]: (z − (p − ½))² (Azar et al. 2024, eq. 17, times β²/4 so that it is without units).

    A choice aims at z = ½, which is a margin of 1/β; a tie aims at 0.
    """
    z = errors.logit(beta)
    aim = torch.full_like(z, 0.5) if preference is None else _match_dtype(preference, z) - 0.5
    return (z - aim).square()


def hinge(errors: PairErrors, beta: float, preference: Tensor | None = None) -> Tensor:
    """Hinge [B]: max(0, 1 − z) (Zhao et al. 2023, SLiC, on the implicit rewards)."""
    z = errors.logit(beta)
    return _mix(F.relu(1 - z), F.relu(1 + z), preference)


def mapo(
    errors: PairErrors,
    beta: float,
    preference: Tensor | None = None,
    *,
    weight: float = 0.1,
    snr: float = 0.5,
) -> Tensor:
    """MaPO [B], without a reference: m_w − weight·log σ((β/s)·[f(m_w) − f(m_l)]), f(m) = s·m/(e^{s·m} − 1).

    Hong et al. 2024 (MaPO), as their code has it, with s = `snr` and T = β/s, so that the logit is
    −½β·(m_w − m_l) to first order; theirs is β = 500, weight 0.1. With p both pictures' errors are mixed alike.
    """
    z = beta / snr * (_odds(snr * errors.winner) - _odds(snr * errors.loser))
    first = errors.winner - weight * F.logsigmoid(z)
    return _mix(first, errors.loser - weight * F.logsigmoid(-z), preference)


def sft(errors: PairErrors, beta: float = 0.0, preference: Tensor | None = None) -> Tensor:
    """Plain training on the winners [B]: m_w; β plays no part. With p: p·m_w + (1 − p)·m_l."""
    return _mix(errors.winner, errors.loser, preference)


def dspo(errors: PairErrors, beta: float, drift: Tensor, *, pull: float = 1.0) -> Tensor:
    """DSPO [B]: mean over C, H, W of (e − c·(prediction − reference's))² on winners, e = prediction − target.

    Zhu et al. 2025 (DSPO), c = pull·(1 − σ(z)); their pull is their β. With `drift` [B], the mean over C, H, W of
    (prediction − reference's prediction)² on winners, the square opens to (1 − c)·m_w + c·r_w − c·(1 − c)·drift.
    The pairs may not contain ties.
    """
    _require_vectors(winner=errors.winner, drift=drift)
    c = pull * torch.sigmoid(-errors.logit(beta))
    assert errors.reference_winner is not None
    return (1 - c) * errors.winner + c * errors.reference_winner - c * (1 - c) * drift


def kto(
    error: Tensor,
    beta: float,
    reference: Tensor,
    good: Tensor,
    *,
    good_weight: float = 1.0,
    bad_weight: float = 1.0,
    baseline: Tensor | None = None,
) -> Tensor:
    """KTO of single pictures [B]: λ·(1 − σ(±(h − z0))), + for the good ones, − for the bad ones.

    Li et al. 2024 (Diffusion-KTO), with the sigmoid as utility and z0 = `kto_baseline`, or the `baseline` [] of a
    larger batch. `good` [B] is 1 or 0.
    """
    _require_vectors(error=error, reference=reference, good=good)
    reward = 0.5 * beta * (reference - error)
    is_good = good.to(reward) > 0.5
    sign = torch.where(is_good, 1.0, -1.0).to(reward)
    weight = torch.where(is_good, good_weight, bad_weight).to(reward)
    z0 = kto_baseline(reward) if baseline is None else baseline
    return weight * (1 - torch.sigmoid(sign * (reward - z0)))


def kto_baseline(reward: Tensor) -> Tensor:
    """z0 [], the reference point of KTO: the batch's mean implicit reward [B], not below 0, without gradient."""
    return reward.detach().mean().clamp(min=0)


# Around a loss ----------------------------------------------------------------------------------------------


def smooth_labels(preference: Tensor, smoothing: float) -> Tensor:
    """The preference [B] when a share `smoothing` of the labels is wrong: p·(1 − s) + (1 − p)·s."""
    if not 0 <= smoothing <= 0.5:
        raise ValueError(f"label smoothing is between 0 and 0.5, not {smoothing}.")
    return preference * (1 - smoothing) + (1 - preference) * smoothing


def with_sft(loss: Tensor, winner: Tensor, weight: float) -> Tensor:
    """loss + weight·m_w [B]: keeps the winners' error from rising."""
    _require_vectors(loss=loss, winner=winner)
    return loss + weight * winner


def safeguard(winner: Tensor, product: Tensor, *, margin: float = 0.9) -> Tensor:
    """Diffusion-SDPO's scale of each loser's gradient [B], in 0…1: no step raises the winner's error to first order.

    Fu et al. 2025 (Diffusion-SDPO): (1 − μ)·‖e_w‖²/⟨e_w, e_l⟩ where the product is positive, else 1, with
    e = prediction − target, `winner` = mean e_w² [B], `product` = mean e_w·e_l [B] and μ = `margin` in 0…1. Their
    code pools numerator and denominator over the batch; here each pair has its own.
    """
    _require_vectors(winner=winner, product=product)
    winner, product = winner.detach(), product.detach()
    bound = (1 - margin) * winner / product.clamp(min=torch.finfo(product.dtype).tiny)
    return torch.where(product > 0, bound, torch.ones_like(bound)).clamp(0, 1)


def scaled_gradient(error: Tensor, scale: Tensor) -> Tensor:
    """The same error [B], whose gradient is `scale` [B] times as large."""
    _require_vectors(error=error, scale=scale)
    return error.detach() + scale * (error - error.detach())


def accuracy(margin: Tensor) -> Tensor:
    """1 where the margin [B] is positive, 0 where it is negative, ½ where it is 0."""
    _require_vectors(margin=margin)
    return (torch.sign(margin.detach()) + 1) / 2


# The table --------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class PairBatch:
    """The inputs of a preference loss for B records: pairs (G = 2, the preferred image first) or single images (G = 1).

    errors       [G, B] of the model
    preference   [B], as above; of single images 1 for good and 0 for bad
    reference    [G, B], the reference's errors, where the loss needs them
    drift        [B], mean over all dimensions of (prediction − reference's prediction)² on the first images, where
                 the loss needs it
    mean         the mean of values [B] over the whole batch, if these records are a part of it
    """

    errors: Tensor
    preference: Tensor
    reference: Tensor | None = None
    drift: Tensor | None = None
    mean: Callable[[Tensor], Tensor] = torch.mean

    @property
    def pair(self) -> PairErrors:
        """The errors by name."""
        return PairErrors(*self.errors, *(() if self.reference is None else self.reference))

    def figures(self) -> dict[str, Tensor]:
        """The log's figures of these records, [B] each, without gradients."""
        errors, reference = self.errors.detach(), self.reference
        if reference is None:
            return {"winner_error": errors[0], "loser_error": errors[1]}
        if len(errors) == 1:
            sign = 2 * self.preference - 1
            return {
                "accuracy": accuracy(sign * (reference[0] - errors[0])),
                "error_change": errors[0] - reference[0],
            }
        return {
            "accuracy": accuracy(self.pair.margin),
            "winner_change": errors[0] - reference[0],
            "loser_change": errors[1] - reference[1],
        }


class LossSettings(Protocol):
    """The settings of the losses."""

    @property
    def beta(self) -> float: ...
    @property
    def label_smoothing(self) -> float: ...
    @property
    def mapo_weight(self) -> float: ...
    @property
    def dspo_pull(self) -> float: ...


@dataclass(frozen=True)
class PreferenceLoss:
    """A loss, and its needs of the reference.

    loss       (batch, settings) → [B]
    reference  nothing, its errors (which can be cached), or its predictions (computed in every step)
    averaged   (batch, settings) → [B], values whose mean over the whole batch a record's loss depends on
    """

    loss: Callable[[PairBatch, LossSettings], Tensor]
    reference: Literal["nothing", "errors", "predictions"] = "errors"
    averaged: Callable[[PairBatch, LossSettings], Tensor] | None = None


def _wrap_pair_loss(loss: PairLoss) -> Callable[[PairBatch, LossSettings], Tensor]:
    """A loss of errors, β and preference alone."""
    return lambda batch, settings: loss(
        batch.pair, settings.beta, smooth_labels(batch.preference, settings.label_smoothing)
    )


def _mapo(batch: PairBatch, settings: LossSettings) -> Tensor:
    preference = smooth_labels(batch.preference, settings.label_smoothing)
    return mapo(batch.pair, settings.beta, preference, weight=settings.mapo_weight)


def _dspo(batch: PairBatch, settings: LossSettings) -> Tensor:
    assert batch.drift is not None
    return dspo(batch.pair, settings.beta, batch.drift, pull=settings.dspo_pull)


def _rewards(batch: PairBatch, settings: LossSettings) -> Tensor:
    """The implicit rewards [B] of single images."""
    assert batch.reference is not None
    return 0.5 * settings.beta * (batch.reference[0] - batch.errors[0])


def _kto(batch: PairBatch, settings: LossSettings) -> Tensor:
    assert batch.reference is not None
    (error,), (reference,) = batch.errors, batch.reference
    baseline = kto_baseline(batch.mean(_rewards(batch, settings)))
    return kto(error, settings.beta, reference, batch.preference, baseline=baseline)


LOSSES: dict[str, PreferenceLoss] = {
    "dpo": PreferenceLoss(_wrap_pair_loss(dpo)),
    "ipo": PreferenceLoss(_wrap_pair_loss(ipo)),
    "hinge": PreferenceLoss(_wrap_pair_loss(hinge)),
    "kto": PreferenceLoss(_kto, averaged=_rewards),
    "mapo": PreferenceLoss(_mapo, reference="nothing"),
    "dspo": PreferenceLoss(_dspo, reference="predictions"),
    "sft": PreferenceLoss(_wrap_pair_loss(sft), reference="nothing"),
}
"""Every preference loss by its name."""


# Helpers ----------------------------------------------------------------------------------------------------


def _mix(first: Tensor, second: Tensor, preference: Tensor | None) -> Tensor:
    """p·first + (1 − p)·second."""
    if preference is None:
        return first
    p = _match_dtype(preference, first)
    return p * first + (1 - p) * second


def _match_dtype(preference: Tensor, z: Tensor) -> Tensor:
    _require_vectors(preference=preference, logit=z)
    return preference.to(z)


def _odds(x: Tensor) -> Tensor:
    """x/(e^x − 1), 1 at x = 0."""
    safe = torch.where(x == 0, torch.ones_like(x), x)
    return torch.where(x == 0, 1 - x / 2, safe / torch.expm1(safe))


def _require_vectors(**tensors: Tensor | None) -> None:
    """ValueError unless all are [B] with one B."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items() if tensor is not None}
    if any(len(shape) != 1 for shape in shapes.values()) or len(set(shapes.values())) > 1:
        found_shapes = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"errors are one number for each sample, [B], with one B; got {found_shapes}.")
