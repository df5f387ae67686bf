"""Preference training on a random tiny model: what it computes, what it shares, and what it remembers."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from align.objectives.dataset import (
    Item,
    Items,
    NoiseSamples,
    PreferenceData,
    make_batch,
    make_preference_data,
    make_records,
    mean_squares,
    residuals,
)
from align.objectives.losses import PairErrors, dpo
from align.objectives.preference import LEVEL_WEIGHTS, PreferenceTraining
from align.objectives.reference import CachedReference, open_cached_reference, reference_path
from align.pairs.prepared import Prepared
from align.pairs.read import read_preferences
from align.pairs.records import Records, check_preferences, split_held_out, to_singles
from align.settings import PAIR_LOSSES, Settings, as_command, refuse_out_of_reach, resolve_settings
from align.training.monitor import _suggest_remedies
from align.training.prepare import prepare_pairs
from align.training.run import describe_idle_ties
from backbone.adapters.lora import load_lora, use_adapters
from backbone.cli.options import list_fields
from backbone.cli.values.effects import find_unmet, refuse_idle
from backbone.diffusion.noise import generator
from backbone.io.console import UserError
from backbone.models.model import Backbone
from backbone.models.placement import Placement
from backbone.training.loop import accumulate_gradients
from backbone.training.prepared import Cropping
from backbone.training.run import take_steps
from recipes.moji.denoiser import DEFAULTS
from tests.tiny import tiny_pipeline, tiny_stable_diffusion_3, tiny_stable_diffusion_xl

HELD_OUT = 0.3


def settings(**changes: Any) -> Settings:
    base = Settings(
        pairs="pairs.jsonl",
        steps=12,
        batch=3,
        draws=4,
        rank=4,
        learning_rate=2e-3,
        lr_warmup_steps=0,
        held_out=HELD_OUT,
        precision="fp32",
        device="cpu",
        evaluation_draws=1,
    )
    return replace(base, **changes)


def data(model: Backbone, source: Path, asked: Settings) -> PreferenceData:
    found = check_preferences(read_preferences(source))
    records = found.pairs if asked.by_pairs else to_singles(found)
    train, out = split_held_out(records, share=asked.held_out, seed=asked.seed)
    return make_preference_data(model, train, out, asked)


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def training(folder: Path, source: Path, **changes: Any) -> PreferenceTraining:
    """A fresh training on a fresh model."""
    asked = settings(**changes)
    model = opened(folder)
    return PreferenceTraining(model, data(model, source, asked), asked)


def weights(run: PreferenceTraining) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in run.parameters.items()}


def trained(run: PreferenceTraining) -> PreferenceTraining:
    for _ in take_steps(run):
        pass
    return run


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test reads the reference's errors that another one has found in other batches."""
    monkeypatch.setattr("align.objectives.reference.find_cache_folder", lambda: tmp_path / "caches")


@pytest.fixture
def no_cache_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_what_diverges_says_what_to_lower(tiny_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(UserError, match=r"stopped at step 1: .* Lower --learning-rate or --beta"):
        trained(training(tiny_folder, pairs_file, beta=1e36))


# The start --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value", "kind"),
    [
        ("dpo", math.log(2), "epsilon"),
        ("dpo", math.log(2), "v_prediction"),
        ("ipo", 0.25, "epsilon"),
        ("hinge", 1.0, "epsilon"),
        ("kto", 0.5, "epsilon"),
    ],
)
def test_the_first_loss_is_the_known_one(
    tiny_folder: Path, tmp_path: Path, pairs_file: Path, loss: str, value: float, kind: str
) -> None:
    folder = tiny_folder if kind == "epsilon" else tiny_pipeline(tmp_path / "tiny", prediction_type=kind)
    run = training(folder, pairs_file, loss=loss)
    with torch.no_grad():
        (first,) = run.losses(1)
    assert float(first) == pytest.approx(value, abs=1e-4)


def test_an_untouched_model_is_right_half_the_time(tiny_folder: Path, pairs_file: Path) -> None:
    run = training(tiny_folder, pairs_file)
    for figures in run.evaluate().values():
        assert figures.accuracy == (0.5, 0.5, 0.5)
        assert all(share == 0.5 or math.isnan(share) for share in figures.by_level)
        assert figures.winner_change == figures.loser_change == 0


@pytest.mark.parametrize(
    "build", [tiny_stable_diffusion_xl, tiny_stable_diffusion_3], ids=["sdxl", "sd3, a flow"]
)
def test_other_families_train_alike(tmp_path: Path, pairs_file: Path, build: Callable[[Path], Path]) -> None:
    run = training(build(tmp_path / "model"), pairs_file, steps=2)
    with torch.no_grad():
        (first,) = run.losses(1)
    assert float(first) == pytest.approx(math.log(2), abs=1e-4)
    before = weights(run)
    trained(run)
    assert any(not torch.equal(value, before[name]) for name, value in weights(run).items())


# What a pair shares -----------------------------------------------------------------------------------------


def test_level_noise_and_dropped_prompt_are_shared_in_a_pair(tiny: Backbone, pairs_file: Path) -> None:
    asked = settings(prompt_dropout=0.5)
    ready = data(tiny, pairs_file, asked)
    draws = NoiseSamples("training", 0, 16, len(tiny.path.levels), prompt_dropout=0.5)
    batch = make_batch(tiny, ready, draws, [ready.train[0]] * 16, list(range(16)))
    first, second = batch.target.chunk(2)
    assert torch.equal(first, second)  # the network predicts ε
    assert torch.equal(*batch.index.chunk(2))
    one, other = batch.conditions.text["hidden"].chunk(2)
    assert torch.equal(one, other)
    dropped = sum(torch.equal(row, ready.conditions[[0]].text["hidden"][0]) for row in one)
    assert 0 < dropped < 16
    assert len(set(batch.index[:16].tolist())) == 16


def test_both_pictures_of_a_pair_are_mirrored_or_neither(tiny: Backbone, pairs_file: Path) -> None:
    asked = settings(flip=True)
    ready = data(tiny, pairs_file, asked)
    assert ready.mirrored is not None
    draws = NoiseSamples("training", 0, 16, len(tiny.path.levels), flip=True)
    item = ready.train[0]
    batch = make_batch(tiny, ready, draws, [item] * 16, list(range(16)))
    level = tiny.path.levels[batch.index]
    a, b = level.broadcast_like(batch.noisy)
    clean = (batch.noisy - b * batch.target) / a
    mirrored = draws.mirrors(Items.of([item] * 16), range(16)).tolist()
    assert 0 < sum(mirrored) < 16
    for g, row in enumerate(item.pictures):
        for k, flipped in enumerate(mirrored):
            source = ready.mirrored if flipped else ready.latents
            torch.testing.assert_close(clean[16 * g + k], source[row], atol=2e-3, rtol=1e-2)


def test_both_pictures_of_a_pair_are_cut_at_the_same_place(tiny: Backbone, tmp_path: Path) -> None:
    """The two pictures of a pair are one wide gradient: cut alike they are the same, cut apart they are not."""
    side = tiny.resolution
    across = np.tile(np.linspace(0, 255, 4 * side, dtype=np.uint8), (side, 1))
    for shade, name in enumerate(("first.png", "second.png")):  # a shade apart, since equal ones are refused
        Image.fromarray(np.stack([np.maximum(across, shade)] * 3, -1)).save(tmp_path / name)
    line = {"prompt": "a ramp", "chosen": "first.png", "rejected": "second.png"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(line) + "\n")
    asked = settings(random_crop=4, flip=True, held_out=0.0)
    ready = data(tiny, tmp_path / "pairs.jsonl", asked)
    (item,) = ready.train
    assert len(item.crops) == 4
    firsts, seconds = (ready.latents[[rows[k] for rows in item.crops]] for k in (0, 1))
    distances = (firsts[:, None] - seconds).abs().amax((2, 3, 4))  # of every first cut to every second one
    assert distances.argmin(1).tolist() == list(range(4)), (
        "the nearest second cut is the one at the same place"
    )
    assert len({tuple(ready.latents[rows[0]].flatten().tolist()) for rows in item.crops}) == 4
    draws = NoiseSamples("training", 0, 32, len(tiny.path.levels), crop=True)
    many = Items.of([item] * 32)
    assert {tuple(rows) for rows in draws.rows(many, range(32)).tolist()} == set(item.crops)
    assert replace(draws, crop=False).rows(many, range(32)).tolist() == [list(item.pictures)] * 32


def test_no_level_below_the_least_noise_is_drawn() -> None:
    draws, items = NoiseSamples("training", 0, 7, 1000, lowest=300), Items.of([Item((0, 1), 1, 1.0, "a")] * 7)
    levels = sorted(draws.find_levels(items, range(7)).tolist())
    assert [(level - 300) // 100 for level in levels] == list(range(7))


@pytest.mark.parametrize(
    "loss", ["dpo", "sft", *(pytest.param(name, marks=pytest.mark.slow) for name in ("ipo", "kto", "mapo"))]
)
def test_weights_multiply_the_errors_before_the_loss(
    tiny_folder: Path, pairs_file: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    """Twice the weight is twice the β where the loss knows errors only through it, and twice the error elsewhere."""
    monkeypatch.setitem(LEVEL_WEIGHTS, "debiased", lambda level, kind: torch.full((len(level),), 2.0))
    plain = training(tiny_folder, pairs_file, loss=loss, beta=100.0, mapo_weight=0.0)
    heavy = training(
        tiny_folder, pairs_file, loss=loss, beta=100.0, mapo_weight=0.0, loss_weighting="debiased"
    )
    for run in (plain, heavy):
        with torch.no_grad():
            for number, value in enumerate(run.parameters.values()):
                value.copy_(0.1 * torch.randn(value.shape, generator=generator(0, number)))
    chosen = plain.list_samples(1)
    light, found = plain.loss(chosen)[0], heavy.loss(chosen)[0]
    if loss in ("mapo", "sft"):
        torch.testing.assert_close(found, 2 * light)
    else:
        twice = training(tiny_folder, pairs_file, loss=loss, beta=200.0)
        with torch.no_grad():
            for name, value in twice.parameters.items():
                value.copy_(plain.parameters[name])
        torch.testing.assert_close(found, twice.loss(chosen)[0])


def test_debiased_weights_raise_noisy_levels_and_min_snr_lowers_clean_ones(tiny: Backbone) -> None:
    levels = tiny.path.levels[torch.tensor([20, 990])]
    clean, noisy = LEVEL_WEIGHTS["debiased"](levels, "epsilon").tolist()
    assert clean < 0.2 and noisy > 5
    clean, noisy = LEVEL_WEIGHTS["min-snr"](levels, "epsilon").tolist()
    assert clean < 0.1 and noisy == 1


def test_a_draw_follows_from_seed_record_and_number_alone() -> None:
    item, other = Item((0, 1), 1, 1.0, "a"), Item((0, 1), 1, 1.0, "b")
    draws = NoiseSamples("training", 0, 8, 1000)

    def noise(of: Item, k: int, draws: NoiseSamples = draws) -> Tensor:
        return draws.noise(Items.of([of]), [k], (4, 2, 2))

    assert torch.equal(noise(item, 3), noise(replace(item, prompt=9), 3))
    for changed in (
        noise(other, 3),
        noise(item, 4),
        noise(item, 3, replace(draws, seed=1)),
        noise(item, 3, replace(draws, name="held-out")),
    ):
        assert not torch.equal(changed, noise(item, 3))


def test_the_levels_of_a_record_s_draws_are_stratified() -> None:
    draws = NoiseSamples("training", 0, 10, 1000)
    levels = draws.find_levels(Items.of([Item((0,), 0, 1.0, "a")] * 10), range(10)).tolist()
    assert sorted(level // 100 for level in levels) == list(range(10))
    assert levels != sorted(levels)


def test_every_pass_visits_every_record_once_at_one_draw(tiny_folder: Path, pairs_file: Path) -> None:
    run = training(tiny_folder, pairs_file, batch=2, held_out=0.0)
    for number in range(3):
        chosen = [cell for step in range(4 * number + 1, 4 * number + 5) for cell in run.list_samples(step)]
        assert sorted(row for row, _ in chosen) == list(range(8))
        assert {k for _, k in chosen} == {number}


def test_the_better_picture_comes_first(tiny: Backbone, tmp_path: Path, pairs_file: Path) -> None:
    found = check_preferences(read_preferences(pairs_file))
    turned = [replace(pair, first=pair.second, second=pair.first, label=0.0) for pair in found.pairs]
    ready, other = (
        make_preference_data(tiny, found.pairs, [], settings()),
        make_preference_data(tiny, turned, [], settings()),
    )
    for one, two in zip(ready.train, other.train, strict=True):
        assert one.key == two.key
        assert torch.equal(ready.latents[one.pictures[0]], other.latents[two.pictures[0]])


# Learning ---------------------------------------------------------------------------------------------------


def told_apart(ready: PreferenceData) -> PreferenceData:
    """The same records with latents that a model can tell apart: winners are positive, losers negative."""
    sign = torch.zeros(len(ready.latents), 1, 1, 1)
    for item in [*ready.train, *ready.held_out]:
        for place, row in enumerate(item.pictures):
            good = place == 0 if len(item.pictures) == 2 else item.preference > 0.5
            sign[row] = 1 if good else -1
    return replace(ready, latents=sign + 0.1 * ready.latents[:])


@pytest.mark.parametrize(
    "loss",
    [
        "dpo",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("kto", "mapo", "ipo", "hinge", "dspo")),
    ],
)
def test_training_learns_the_preference(tiny_folder: Path, pairs_file: Path, loss: str) -> None:
    """Of held-out prompts, at draws that training never visits."""
    asked = settings(
        loss=loss, steps=30, batch=4, draws=16, reference={"dspo": "live"}.get(loss, "cached"),
        beta=20.0 if loss in ("ipo", "kto") else 2000.0,  # these two have an aim, which a large β makes small
        learning_rate=1e-2, mapo_weight=1.0, evaluation_draws=8, prompt_dropout=0.0, lora_layers="all",
    )  # fmt: skip
    model = opened(tiny_folder)
    run = PreferenceTraining(model, told_apart(data(model, pairs_file, asked)), asked)
    trained(run)
    figures = run.evaluate()["held_out"]
    assert figures.winner_change < figures.loser_change
    if asked.by_pairs:
        assert figures.accuracy.value > 0.75


@pytest.mark.slow
def test_sft_lowers_the_winners_error_and_the_safeguard_holds_the_loser_back(
    tiny_folder: Path, pairs_file: Path
) -> None:
    plain = trained(training(tiny_folder, pairs_file, loss="sft", steps=20, held_out=0.0, learning_rate=1e-2))
    assert plain.evaluate()["training"].winner_change < 0
    free = trained(training(tiny_folder, pairs_file, steps=20, held_out=0.0, learning_rate=2e-2))
    held = trained(
        training(tiny_folder, pairs_file, steps=20, held_out=0.0, learning_rate=2e-2, safeguard=0.9)
    )
    assert held.evaluate()["training"].winner_change < free.evaluate()["training"].winner_change


def test_a_tie_trains_towards_indifference_and_never_as_a_win(tiny_folder: Path, pairs_file: Path) -> None:
    model = opened(tiny_folder)
    asked = settings(ties="model", held_out=0.0)
    pairs = [replace(pair, label=0.5) for pair in check_preferences(read_preferences(pairs_file)).pairs[:1]]
    wins = check_preferences(read_preferences(pairs_file)).pairs[1:2]
    run = PreferenceTraining(model, make_preference_data(model, [*pairs, *wins], [], asked), asked)
    with torch.no_grad():
        loss, _ = run.loss([(0, 0), (1, 0)])
    assert loss.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-4)
    tie, _ = run.loss([(0, 0)])
    win, _ = run.loss([(1, 0)])

    def pull(loss: Tensor) -> float:
        gradients = torch.autograd.grad(loss.sum(), list(run.parameters.values()), allow_unused=True)
        return max(float(one.abs().max()) for one in gradients if one is not None)

    assert pull(tie) < 1e-2 * pull(win)  # at indifference nothing pulls, up to rounding times β


def test_records_that_are_all_ties_have_no_gap(tiny_folder: Path, pairs_file: Path) -> None:
    model = opened(tiny_folder)
    asked = settings(ties="model", held_out=0.0, steps=1, batch=1)
    pairs = [replace(pair, label=0.5) for pair in check_preferences(read_preferences(pairs_file)).pairs[:1]]
    run = trained(PreferenceTraining(model, make_preference_data(model, pairs, [], asked), asked))
    assert math.isnan(run.measure_noise_gap())


def test_a_tie_adds_nothing_to_the_winners_error(tiny_folder: Path, pairs_file: Path) -> None:
    model = opened(tiny_folder)
    found = check_preferences(read_preferences(pairs_file)).pairs
    pairs = [replace(found[0], label=0.5), found[1]]
    losses = []
    for weight in (0.0, 2.0):
        model = opened(tiny_folder)
        asked = settings(ties="model", held_out=0.0, sft_weight=weight)
        run = PreferenceTraining(model, make_preference_data(model, pairs, [], asked), asked)
        with torch.no_grad():
            losses.append(run.loss([(0, 0), (1, 0)])[0])
    added = losses[1] - losses[0]
    assert float(added[0]) == pytest.approx(0.0, abs=1e-5)
    assert float(added[1]) > 0.1


def test_micro_batches_add_up_to_the_whole_batch(tiny_folder: Path, pairs_file: Path) -> None:
    changes = {"batch": 5, "steps": 3, "beta": 200.0}  # a large β makes much of what rounding does
    whole = trained(training(tiny_folder, pairs_file, **changes))
    parts = trained(training(tiny_folder, pairs_file, micro_batch=2, **changes))
    for name, value in weights(whole).items():
        torch.testing.assert_close(parts.parameters[name].detach(), value, atol=2e-4, rtol=0)


@pytest.mark.parametrize("loss", ["dpo", "kto", "mapo", "dspo"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_gradient_of_a_step_is_the_same_in_any_micro_batches(
    tiny_folder: Path, pairs_file: Path, loss: str, size: int
) -> None:
    found = []
    for at_once in (0, size):
        reference = "live" if loss == "dspo" else "cached"
        run = training(
            tiny_folder, pairs_file, batch=5, loss=loss, micro_batch=at_once, beta=50.0, reference=reference
        )
        for number, parameter in enumerate(run.parameters.values()):
            parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator("off", number))
        trained, _ = accumulate_gradients(run.losses(1), run.parameters)
        found.append(
            (torch.cat([value.grad.flatten() for value in trained if value.grad is not None]), run.figures)
        )
    (whole, said), (parts, also) = found
    assert float(whole.norm()) > 0
    assert float((parts - whole).norm() / whole.norm()) < 1e-4  # rounding, which Adam makes a share of a step
    assert {name: float(value) for name, value in also.items()} == pytest.approx(
        {name: float(value) for name, value in said.items()}, rel=1e-4, abs=1e-6
    )


def test_the_loss_of_a_step_is_the_loss_of_its_errors(tiny_folder: Path, pairs_file: Path) -> None:
    run = training(tiny_folder, pairs_file)
    for parameter in run.parameters.values():
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    chosen = run.list_samples(1)
    with torch.no_grad():
        loss, _ = run.loss(chosen)
        batch = make_batch(
            run.model,
            run.data,
            run.samples,
            [run.data.train[row] for row, _ in chosen],
            [k for _, k in chosen],
        )
        now = mean_squares(residuals(run.model, run.model.denoiser, batch))
        with use_adapters(run.model.denoiser, []):
            before = mean_squares(residuals(run.model, run.model.denoiser, batch))
    torch.testing.assert_close(loss, dpo(PairErrors(*now, *before), run.settings.beta))


# The reference ----------------------------------------------------------------------------------------------


def test_the_cached_reference_trains_as_the_live_one_does(
    tiny_folder: Path, pairs_file: Path, no_cache_yet: Path
) -> None:
    changes = {"steps": 8, "draws": 2}  # every draw comes twice, once from the cache
    live = trained(training(tiny_folder, pairs_file, reference="live", **changes))
    from_cache = trained(training(tiny_folder, pairs_file, reference="cached", **changes))
    for name, value in weights(live).items():
        torch.testing.assert_close(from_cache.parameters[name].detach(), value, atol=2e-4, rtol=0)
    assert isinstance(from_cache.reference, CachedReference)
    assert from_cache.live.nfe < live.live.nfe


def test_a_full_run_s_cached_reference_trains_as_a_frozen_copy_does(
    tiny_folder: Path, pairs_file: Path, no_cache_yet: Path
) -> None:
    changes = {"full": True, "steps": 8, "draws": 2, "learning_rate": 1e-4}
    copied = trained(training(tiny_folder, pairs_file, reference="copy", **changes))
    from_cache = trained(training(tiny_folder, pairs_file, reference="cached", **changes))
    for name, value in weights(copied).items():
        torch.testing.assert_close(from_cache.parameters[name].detach(), value, atol=1e-5, rtol=0)


def test_the_base_is_asked_once_for_each_draw_and_never_by_a_second_run(
    tiny_folder: Path, pairs_file: Path, no_cache_yet: Path
) -> None:
    first = training(tiny_folder, pairs_file, steps=8, draws=2)
    trained(first)
    assert isinstance(first.reference, CachedReference)
    assert first.live.nfe == 2 * first.reference.filled
    first.reference.merge()
    second = trained(training(tiny_folder, pairs_file, steps=8, draws=2, loss="ipo"))
    assert second.live.nfe == 0


def test_every_other_setting_of_the_draws_has_another_cached_reference(
    tiny_folder: Path, pairs_file: Path
) -> None:
    changes: list[dict[str, Any]] = [
        {}, {"seed": 1}, {"draws": 5}, {"prompt_dropout": 0.2}, {"batch": 2}, {"flip": True}, {"held_out": 0.0},
    ]  # fmt: skip
    caches = [training(tiny_folder, pairs_file, **change).reference for change in changes]
    assert len({cache.key for cache in caches if isinstance(cache, CachedReference)}) == len(changes)


def test_another_model_or_another_picture_has_another_cached_reference(
    tiny_folder: Path, tmp_path: Path, pairs_file: Path
) -> None:
    from tests.align.conftest import picture

    one = training(tiny_folder, pairs_file)
    other_model = training(tiny_pipeline(tmp_path / "other", seed=3), pairs_file)
    picture(99).save(pairs_file.parent / "0.png")
    other_picture = training(tiny_folder, pairs_file)
    asked, model = settings(), opened(tiny_folder)
    assert model.denoiser is not None
    model.placement = Placement(quantize="8bit")  # the errors of other weights
    other_weights = PreferenceTraining(model, data(model, pairs_file, asked), asked)
    caches = [run.reference for run in (one, other_model, other_picture, other_weights)]
    assert len({cache.key for cache in caches if isinstance(cache, CachedReference)}) == 4


def test_what_changes_only_the_training_shares_the_cached_reference(
    tiny_folder: Path, pairs_file: Path
) -> None:
    one = training(tiny_folder, pairs_file).reference
    other = training(tiny_folder, pairs_file, loss="ipo", beta=7.0, learning_rate=1e-5, rank=2).reference
    assert isinstance(one, CachedReference) and isinstance(other, CachedReference)
    assert one.key == other.key


def test_a_damaged_cached_reference_begins_anew(
    tiny_folder: Path, pairs_file: Path, no_cache_yet: Path
) -> None:
    run = trained(training(tiny_folder, pairs_file, steps=4))
    assert isinstance(run.reference, CachedReference)
    path = reference_path(run.reference.key)
    path.unlink()
    path.write_bytes(b"broken")
    again = training(tiny_folder, pairs_file, steps=4)
    assert isinstance(again.reference, CachedReference) and again.reference.filled == 0


def test_a_cached_reference_that_is_read_only_is_read_and_what_is_new_stays_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIMNER_CACHE", str(tmp_path))
    live: Any = None
    first = open_cached_reference(live, "ab", (2, 3, 1))
    first.values[0, 0] = 7.0
    plain = np.lib.format.open_memmap

    def closed(path: Path, mode: str) -> Any:
        if mode == "r+":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, mode)

    monkeypatch.setattr(np.lib.format, "open_memmap", closed)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    second = open_cached_reference(live, "ab", (2, 3, 1))
    assert float(second.values[0, 0, 0]) == 7.0
    second.values[1, 1] = 8.0
    assert float(first.values[1, 1, 0]) != 8.0


def test_a_new_adapter_on_a_concept_is_measured_against_the_concept(
    tiny_folder: Path, tmp_path: Path, pairs_file: Path
) -> None:
    """Concept on, new adapter off: training on top of a concept starts with ln 2 as any other does."""
    below = trained(training(tiny_folder, pairs_file, steps=6, learning_rate=2e-2))
    below.write(tmp_path, {})
    model = opened(tiny_folder)
    load_lora(tmp_path / "pytorch_lora_weights.safetensors", model.denoiser, "concept_0")
    # The cache is known by the concepts' files, and here is none
    asked = settings(reference="live", steps=3)
    run = PreferenceTraining(model, data(model, pairs_file, asked), asked, base=["concept_0"])
    with torch.no_grad():
        (first,) = run.losses(1)
        batch = make_batch(model, run.data, run.samples, run.data.train[:1], [0])
        with use_adapters(model.denoiser, []):
            base = residuals(model, model.denoiser, batch)
        reference = run.live.residuals(batch)
    assert float(first) == pytest.approx(math.log(2), abs=1e-4)
    assert not torch.allclose(base, reference, atol=1e-4)
    before = {name: value.clone() for name, value in model.denoiser.named_parameters() if "concept_0" in name}
    trained(run)
    after = dict(model.denoiser.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_only_the_adapter_changes(tiny_folder: Path, pairs_file: Path) -> None:
    run = training(tiny_folder, pairs_file, steps=3)
    before = {name: value.detach().clone() for name, value in run.model.denoiser.named_parameters()}
    trained(run)
    for name, value in run.model.denoiser.named_parameters():
        assert torch.equal(value, before[name]) == (name not in run.parameters)


# Going on ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("full", [False, True], ids=["lora", "full"])
def test_a_resumed_run_ends_bit_for_bit_as_a_whole_one(
    tiny_folder: Path, tmp_path: Path, pairs_file: Path, no_cache_yet: Path, full: bool
) -> None:
    changes = {"full": full, "steps": 5, "learning_rate": 1e-4 if full else 2e-3}
    whole = weights(trained(training(tiny_folder, pairs_file, **changes)))
    first = training(tiny_folder, pairs_file, **changes)
    for report in take_steps(first):
        if report.step == 2:
            first.save(tmp_path)
        if report.step == 4:  # two steps that the checkpoint does not know
            break
    second = training(tiny_folder, pairs_file, **changes)
    second.resume(tmp_path)
    assert second.done == 2
    trained(second)
    for name, value in whole.items():
        assert torch.equal(second.parameters[name].detach(), value)


def test_gradient_checkpointing_changes_nothing(tiny_folder: Path, pairs_file: Path) -> None:
    plain = trained(training(tiny_folder, pairs_file, steps=3))
    saving = trained(training(tiny_folder, pairs_file, steps=3, gradient_checkpointing=True))
    for name, value in weights(plain).items():
        torch.testing.assert_close(saving.parameters[name].detach(), value, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_the_gap_between_visited_and_fresh_draws_grows_when_few_draws_are_learned_by_heart(
    tiny_folder: Path, pairs_file: Path
) -> None:
    run = training(
        tiny_folder,
        pairs_file,
        draws=1,
        steps=40,
        batch=8,
        held_out=0.0,
        learning_rate=2e-2,
        lora_layers="all",
    )
    assert math.isnan(run.measure_noise_gap())
    trained(run)
    assert run.measure_noise_gap() > 0.1


# Settings ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"loss": "ppo"}, "loss is ppo"),
        ({"full": True, "reference": "live"}, "base is gone"),
        ({"reference": "copy"}, "adapter off"),
        ({"loss": "dspo"}, "predictions"),
        ({"loss": "kto", "ties": "model"}, "tie"),
        ({"held_out": 1.0}, "below 1"),
        ({"label_smoothing": 0.7}, "between 0 and 0.5"),
        ({"label_smoothing": 0.5}, "nothing would be learned from them"),
        ({"safeguard": 2.0}, "at most 1"),
        ({"loss_weighting": "heavy"}, "none, min-snr, debiased"),
        ({"least_noise": 1.0}, "below 1"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_refused(changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        settings(**changes)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"micro_batch": 5}, "--micro-batch 5 is more than the batch of 4: it has no effect"),
        ({"micro_batch": 4}, ""),
        (
            {"loss": "draft", "reward_steps": 9, "sample_steps": 8},
            "--reward-steps 9 is more than the sampler's 8",
        ),
        ({"loss": "draft", "reward_steps": 8, "sample_steps": 8}, ""),
        ({"loss": "ddpo", "clip_range": 0.1, "steps": 4, "rounds": 4}, "in one step a round"),
        ({"loss": "ddpo", "clip_range": 0.1, "steps": 8, "rounds": 4}, ""),
        ({"loss": "ddpo", "steps": 4, "rounds": 4}, ""),
    ],
)
def test_a_number_beyond_what_others_leave_it_is_refused(asked: dict[str, Any], complaint: str) -> None:
    more = {"online": "moji", "prompts": "p.txt", "reference": "live"} if "loss" in asked else {"pairs": "p"}
    wanted: dict[str, Any] = {**more, **asked}
    found = Settings(**wanted)
    if not complaint:
        refuse_out_of_reach(found, asked)
        return
    with pytest.raises(UserError, match=complaint):
        refuse_out_of_reach(found, asked)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"loss": "sft", "reference": "live"}, "sft learns without the base's errors"),
        ({"loss": "mapo", "reference": "cached"}, "mapo learns without the base's errors"),
        ({"loss": "mapo", "full": True, "reference": "copy"}, ""),  # by which the noise gap is measured
        ({"loss": "kto", "reference": "live"}, ""),
        ({"loss": "mapo", "mapo_weight": 0.0, "beta": 500.0}, "--mapo-weight 0 the winners alone .* --beta"),
        ({"loss": "dspo", "reference": "live", "dspo_pull": 0.0, "safeguard": 0.5}, "--safeguard is of what"),
        ({"loss": "dspo", "reference": "live", "dspo_pull": 0.0}, ""),
        ({"loss": "mapo", "mapo_weight": 0.0, "beta": 500.0, "label_smoothing": 0.1}, ""),
        ({"on_winner_rise": "stop", "steps": 20}, "looks every 50 steps .* and there are 20"),
        ({"on_winner_rise": "stop", "steps": 20, "evaluation_steps": 5}, ""),
        ({"on_winner_rise": "warn", "steps": 20}, ""),
    ],
)
def test_what_a_loss_leaves_unread_is_refused(asked: dict[str, Any], complaint: str) -> None:
    found = Settings(pairs="p", **asked)
    if not complaint:
        refuse_out_of_reach(found, asked)
        return
    with pytest.raises(UserError, match=f"{complaint}.*no effect. Leave it out."):
        refuse_out_of_reach(found, asked)


@pytest.mark.parametrize("loss", ["sft", "kto", "dpo", "mapo"])
def test_more_weight_on_the_winners_is_of_losses_that_hold_more(loss: str) -> None:
    """A multiple of a loss is the same loss to AdamW."""
    asked = {"pairs": "p", "loss": loss, "sft_weight": 0.5}
    if loss in ("dpo", "mapo"):
        refuse_idle(Settings(**asked), asked)  # type: ignore[arg-type]
        return
    with pytest.raises(UserError, match="--sft-weight has no effect without --loss"):
        refuse_idle(Settings(**asked), asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_what_is_advised_against_spoiled_winners_is_what_the_loss_reads(loss: str) -> None:
    advised = _suggest_remedies(loss)
    known = list_fields(Settings)
    for flag in ("beta", "safeguard", "sft_weight"):
        takes = find_unmet(known[flag], {"loss": loss}) is None
        assert (known[flag].flag in advised) == takes


@pytest.mark.parametrize("size", [(96, 96), (96, 64)])
def test_cuts_of_square_images_are_one_and_that_is_said(
    tiny_folder: Path, tmp_path: Path, size: tuple[int, int], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = []
    for number in range(4):
        Image.new("RGB", size, (40 * number, 90, 30)).save(tmp_path / f"{number}.png")
        lines.append(
            {"prompt": f"a dog {number}", "chosen": f"{number}.png", "rejected": f"{(number + 1) % 4}.png"}
        )
    source = tmp_path / "pairs.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    asked, model = settings(random_crop=2, held_out=0.0), opened(tiny_folder)
    found = data(model, source, asked)
    square = size[0] == size[1]
    assert len(found.latents) == 4 if square else len(found.latents) > 4
    assert ("--random-crop has no effect" in capsys.readouterr().err) == square
    prepare_pairs(read_preferences(source), model, tmp_path / "out", cropping=Cropping(random_crop=2))
    assert ("--random-crop has no effect" in capsys.readouterr().err) == square
    folder = replace(asked, pairs=str(tmp_path / "out"))
    train, out = make_records(Prepared(tmp_path / "out"), folder).split(share=0.0, seed=0)
    make_preference_data(model, train, out, folder)
    assert ("--random-crop has no effect" in capsys.readouterr().err) == square


def test_ties_to_learn_from_that_are_not_there_are_said(pairs_file: Path) -> None:
    found = check_preferences(read_preferences(pairs_file))
    tied = Records([replace(found.pairs[0], label=0.5), *found.pairs[1:]])
    plain, asked = Records(found.pairs), settings(ties="model")
    assert describe_idle_ties(settings(), plain) == describe_idle_ties(asked, tied) == ""
    assert "--ties model has no effect: there are no ties in pairs.jsonl" in describe_idle_ties(asked, plain)


def test_unknown_layers_are_a_clear_mistake(tiny_folder: Path, pairs_file: Path) -> None:
    with pytest.raises(UserError, match="attention, all"):
        training(tiny_folder, pairs_file, lora_layers="everything")


def test_the_repeating_command_names_what_was_chosen() -> None:
    command = as_command(
        Settings(pairs="my pairs", loss="ipo", beta=500.0, full=True, concepts=("a", "b")), Path("out")
    )
    assert command == (
        "align train 'my pairs' --steps 300 --batch 4 --learning-rate 0.0001 --lr-scheduler constant "
        "--loss-weighting none --no-compile --concept a --concept b --loss ipo --beta 500.0 --safeguard -1.0 "
        "--least-noise 0.0 --full --out out"
    )


def test_what_works_with_a_model_serves_where_nothing_was_asked() -> None:
    own = {"beta": 700.0, "learning_rate": 1e-3, "loss_weighting": "debiased", "safeguard": 0.5}
    usual = {"rank": 8, "align": own}
    plain = resolve_settings({"pairs": "p"}, usual)
    assert (plain.rank, plain.beta, plain.learning_rate) == (8, 700.0, 1e-3)
    assert (plain.loss_weighting, plain.safeguard) == ("debiased", 0.5)
    assert resolve_settings({"pairs": "p", "safeguard": -1.0}, usual).safeguard < 0
    assert resolve_settings({"pairs": "p", "loss": "kto"}, usual).safeguard < 0  # which knows no pairs
    asked = resolve_settings({"pairs": "p", "beta": 50.0, "loss_weighting": "none"}, usual)
    assert (asked.beta, asked.loss_weighting) == (50.0, "none")
    assert resolve_settings({"pairs": "p", "loss": "mapo"}, usual).beta == 500.0  # whose scale is another
    assert resolve_settings({"pairs": "p", "loss": "ipo"}, usual).beta == 200.0


def test_the_embedded_model_says_how_it_is_aligned() -> None:
    usual = Backbone.open("moji").defaults
    assert usual["align"] == DEFAULTS["align"]
    found = resolve_settings({"pairs": "p"}, usual)
    for name, value in usual["align"].items():
        assert getattr(found, name) == value and list_fields(Settings)[name].option.by_model
    assert usual["draft"] == DEFAULTS["draft"]
    found = resolve_settings({"pairs": "", "loss": "draft", "online": "moji", "prompts": "p.txt"}, usual)
    assert all(getattr(found, name) == value for name, value in usual["draft"].items())
    assert "--reward-steps 5" in as_command(found, Path("out"))
    assert (
        resolve_settings(
            {"pairs": "", "loss": "ddpo", "online": "moji", "prompts": "p.txt"}, usual
        ).reward_steps
        == 1
    )
