"""A picture is found again where it lies over another, whatever was painted into it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.media import registration
from backbone.media.registration import Registration, match_tone, register_to_source, undo, warp

DRIFTS = [(0.0, 0.0, 1.0), (1.37, -0.6, 1.0), (5.3, 2.1, 1.02), (-9.0, 6.5, 0.97), (12.0, 0.0, 1.05)]


def picture(seed: int = 0, height: int = 80, width: int = 96) -> Tensor:
    """Blotches of all sizes [3, H, W] in −1…1, without a period."""
    random = torch.Generator().manual_seed(seed)
    layers = [
        F.interpolate(
            torch.randn(1, 3, side, side, generator=random),
            (height, width),
            mode="bicubic",
            align_corners=False,
        )[0]
        / (side / 4) ** 0.5
        for side in (4, 8, 16, 32)
    ]
    return torch.stack(layers).sum(0).tanh()


def moved(source: Tensor, drift: tuple[float, float, float]) -> Tensor:
    """The picture as an editor with this drift gives it back: enlarged, then shifted."""
    right, down, scale = drift
    inverse = torch.tensor([-right / scale, -down / scale, 1 / scale], dtype=torch.float64)
    return warp(source.double(), inverse)[0].float()


def repainted(edited: Tensor) -> Tensor:
    """The same with a quarter of it painted over, and noise everywhere."""
    painted = edited.clone()
    painted[:, 20:60, 30:80] = torch.tensor([0.9, -0.6, -0.8])[:, None, None]
    return (painted + 0.03 * torch.randn(painted.shape, generator=torch.Generator().manual_seed(1))).clamp(
        -1, 1
    )


@pytest.mark.parametrize("drift", DRIFTS)
def test_a_drift_is_found_to_a_tenth_of_a_pixel_beside_an_edit(drift: tuple[float, float, float]) -> None:
    source = picture()
    found = register_to_source(repainted(moved(source, drift)), source)
    assert found.shift == pytest.approx(drift[:2], abs=0.1)
    assert found.scale == pytest.approx(drift[2], abs=0.002)


def test_starts_that_lead_to_one_place_are_followed_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    source, descend, widths = picture(), registration._descend, list[int]()

    def count(p: Tensor, image: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        widths.append(target.shape[-1])
        return descend(p, image, target, weight)

    monkeypatch.setattr(registration, "_descend", count)
    register_to_source(repainted(moved(source, (2.3, -1.1, 1.015))), source)
    assert widths == [48] * registration.STARTS + [96]


def test_what_is_undone_lies_over_the_source_again() -> None:
    source = picture()
    edited = moved(source, (2.4, -1.2, 1.01))
    straight = undo(edited, register_to_source(edited, source))
    inside = (slice(None), slice(8, -8), slice(8, -8))
    before, after = ((one[inside] - source[inside]).square().mean().sqrt() for one in (edited, straight))
    assert after < 0.02 < before / 5


def test_a_picture_lies_exactly_over_itself() -> None:
    source = picture()
    found = register_to_source(source, source)
    assert found == Registration((0.0, 0.0), 1.0, 1.0)
    assert undo(source, found) is source


def test_where_a_picture_has_nothing_the_source_stands() -> None:
    source, beyond = picture(), torch.full((3, 80, 96), 0.25)
    straight = undo(moved(source, (10.0, 0.0, 1.0)), Registration((10.0, 0.0), 1.0), beyond=beyond)
    assert bool((straight[:, :, -9:] == 0.25).all())
    assert bool((straight[:, :, :80] != 0.25).any())


@pytest.mark.parametrize("other", [torch.zeros(3, 80, 96), -picture(7)], ids=["even", "another"])
def test_what_cannot_be_matched_is_left_where_it_is_or_agrees_better(other: Tensor) -> None:
    found, source = register_to_source(other, picture()), picture()
    agreeing = (source - other).abs().amax(0) < 0.12
    assert found.share >= float(agreeing.double().mean())


def test_the_corner_that_moves_farthest_is_the_drift() -> None:
    assert Registration((3.0, 4.0), 1.0).drift((100, 100)) == pytest.approx(5)
    assert Registration((0.0, 0.0), 1.02).drift((100, 200)) == pytest.approx((1**2 + 2**2) ** 0.5)


def test_a_known_place_is_left_out_of_the_fit() -> None:
    source = picture()
    edited = moved(source, (1.5, 0.5, 1.0))
    changed = torch.zeros(80, 96)
    changed[5:75, 20:90] = 1
    edited = torch.where(changed.bool(), picture(5), edited)  # most of it is another picture
    found = register_to_source(edited, source, changed=changed)
    assert found.shift == pytest.approx((1.5, 0.5), abs=0.1)


@pytest.mark.parametrize("change", [(0.9, 0.1), (1.1, -0.08), (1.0, 0.15)])
def test_a_tone_is_found_and_undone_beside_an_edit(change: tuple[float, float]) -> None:
    source, (gain, offset) = 0.8 * picture(), change  # nothing is clipped
    painted = repainted(gain * source + offset)
    found = match_tone(painted, source)
    assert found.gain == pytest.approx((1 / gain,) * 3, abs=0.03)
    assert found.offset == pytest.approx((-offset / gain,) * 3, abs=0.03)
    assert 0 < found.change < 0.25
    apart = (found.undo(painted) - source).abs().amax(0)
    apart[20:60, 30:80] = 0
    assert float(apart.median()) < 0.06


def test_a_picture_of_the_same_tone_and_an_even_one_are_left_as_they_are() -> None:
    source = picture()
    found = match_tone(source, source)
    assert found.gain == pytest.approx((1.0,) * 3) and found.change == pytest.approx(0, abs=1e-9)
    even = torch.full_like(source, 0.3)
    assert match_tone(even, source).gain == (1.0,) * 3


def test_the_tone_of_a_known_place_does_not_count() -> None:
    source = picture()
    changed = torch.zeros(80, 96)
    changed[:, 20:] = 1
    moved_on = torch.where(changed.bool(), 0.5 * source, 0.95 * source)
    assert match_tone(moved_on, source, changed=changed).gain == pytest.approx((1 / 0.95,) * 3, abs=0.01)
