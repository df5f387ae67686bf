"""Inversions of a picture on tiny models: what leads back, how exactly, and the file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from backbone.adapters.concept import Concept
from backbone.io.console import UserError
from backbone.io.files import write_tensors
from backbone.media.transforms import to_image, working_size
from backbone.models.model import Backbone
from edit.inversion.inversion import (
    METHODS,
    identify,
    identities,
    invert,
    read_inversion,
    reconstruct,
    select_settings,
)
from edit.inversion.null_text import optimize_null_texts
from edit.settings import Method
from tests.edit.models import PATHS, paths, photo, tiny_on

PROMPT = "a cat in the snow"
STEPS = 6


@pytest.fixture
def tiny(kept: Backbone) -> Backbone:
    """Nothing here changes it."""
    return kept


def miss(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


@paths
@pytest.mark.parametrize("method", ["edit-friendly", "reversible"])
def test_exact_methods_lead_back_to_the_latent(tiny_folder: Path, path: Any, method: Method) -> None:
    model = tiny_on(tiny_folder, *path)
    inversion = invert(model, photo(), PROMPT, method=method, steps=STEPS)
    assert miss(reconstruct(inversion), inversion.clean) < 1e-5


@paths
def test_fixed_points_lead_back_better_than_plain_inversion(tiny_folder: Path, path: Any) -> None:
    model = tiny_on(tiny_folder, *path)
    plain, better = (invert(model, photo(), PROMPT, method=m, steps=2 * STEPS) for m in ("ddim", "renoise"))
    assert miss(reconstruct(better), better.clean) < max(0.5 * miss(reconstruct(plain), plain.clean), 1e-4)


@paths
def test_every_method_ends_at_the_autoencoders_latent(tiny_folder: Path, path: Any) -> None:
    model = tiny_on(tiny_folder, *path)
    for method in METHODS:
        inversion = invert(
            model, photo(), PROMPT, method=method, steps=3, **select_settings(method, iterations=1)
        )
        latent = model.encode(inversion.image[None]).mean[0]
        assert torch.equal(inversion.clean, latent)
        assert inversion.states.shape == (4, *latent.shape)


def test_plain_inversion_is_one_evaluation_a_step(tiny: Backbone) -> None:
    for method in METHODS:
        inversion = invert(
            tiny, photo(), PROMPT, method=method, steps=3, **select_settings(method, iterations=2)
        )
        if method in ("renoise", "null-text"):
            assert 3 < inversion.nfe <= 6 * 3
        else:
            assert inversion.nfe == 3


@pytest.mark.parametrize(
    "kind", [*(pytest.param(kind, marks=pytest.mark.slow) for kind in ("epsilon", "v_prediction")), "flow"]
)
def test_null_texts_do_not_lead_further_away_with_more_iterations(tiny_folder: Path, kind: str) -> None:
    """The mean over pictures of how far a guided walk ends from the latent."""
    path: Any = next(path for path in PATHS if path[0] == kind)
    model = tiny_on(tiny_folder, *path)
    misses = []
    for iterations in (0, 2, 10):
        total = 0.0
        for seed in range(2):
            inversion = invert(
                model,
                photo(seed=seed),
                PROMPT,
                method="null-text",
                steps=5,
                guidance=7.5,
                iterations=iterations,
            )
            total += float((reconstruct(inversion, guidance=7.5) - inversion.clean).square().mean())
        misses.append(total)
    assert misses[0] >= misses[1] >= misses[2]
    assert misses[2] < misses[0]


def test_null_texts_are_optimised_in_half_precision_as_in_full(tiny_folder: Path) -> None:
    """Guided by them, the source is retraced as well, and better than without."""
    errors = {}
    for precision in ("fp32", "fp16"):
        model = Backbone.open(str(tiny_folder), device="cpu", precision=precision)
        for iterations in (0, 4):
            how = select_settings("null-text", guidance=4.0, iterations=iterations)
            inversion = invert(model, photo(), PROMPT, method="null-text", steps=4, **how)
            off = reconstruct(inversion, guidance=4.0).float() - inversion.encoded.latent[0].float()
            errors[precision, iterations] = float(off.square().mean().sqrt())
    full, half = (errors[precision, 4] / errors[precision, 0] for precision in ("fp32", "fp16"))
    assert half < 0.99 and half == pytest.approx(full, rel=0.01)


def test_a_null_text_of_no_iterations_is_the_empty_prompt(tiny: Backbone) -> None:
    inversion = invert(tiny, photo(), PROMPT, method="null-text", steps=3, iterations=0)
    assert inversion.empties is not None
    empty = tiny.encode_prompts([""]).text["hidden"][0]
    assert all(torch.equal(found, empty) for found in inversion.empties)
    assert inversion.nfe == 3 + 2 * 3


def test_null_texts_leave_no_gradient_and_no_processor_behind(tiny: Backbone) -> None:
    denoiser: Any = tiny.denoiser
    before = dict(denoiser.attn_processors)
    invert(tiny, photo(), PROMPT, method="null-text", steps=2, iterations=2)
    assert denoiser.attn_processors == before
    assert all(p.grad is None and not p.requires_grad for p in denoiser.parameters())


def test_a_null_text_step_that_already_lands_stops_at_once(tiny: Backbone) -> None:
    """At guidance 1 the embedding has no say, so nothing is tried once the walk is where it should be."""
    schedule = tiny.schedule(3)
    text = tiny.encode_prompts([PROMPT])
    predict = tiny.predictor(text)
    states = [torch.randn(1, *tiny.latent_shape, generator=torch.Generator().manual_seed(0))]
    from backbone.diffusion.samplers import trajectory

    states = list(trajectory(states[0], predict, schedule))
    _, asked = optimize_null_texts(
        tiny,
        torch.stack(states),
        schedule,
        conditional=predict,
        empty=tiny.encode_prompts([""]),
        guidance=1.0,
    )
    assert asked == 3 * 2


def test_negative_prompt_inversion_is_not_driven_off_by_guidance(tiny: Backbone) -> None:
    inversion = invert(tiny, photo(), PROMPT, method="negative-prompt", steps=STEPS)
    assert miss(reconstruct(inversion, guidance=7.5), reconstruct(inversion)) < 1e-4
    plain = invert(tiny, photo(), PROMPT, method="ddim", steps=STEPS)
    assert miss(reconstruct(plain, guidance=7.5), plain.clean) > miss(
        reconstruct(inversion, guidance=7.5), plain.clean
    )


def test_noise_maps_follow_from_the_seed(tiny: Backbone) -> None:
    def states(seed: int) -> Tensor:
        return invert(tiny, photo(), PROMPT, method="edit-friendly", steps=3, seed=seed).states

    assert torch.equal(states(0), states(0))
    assert not torch.equal(states(0), states(1))


@pytest.mark.parametrize("method", METHODS)
def test_the_file_gives_everything_back(tiny: Backbone, tmp_path: Path, method: Method) -> None:
    inversion = invert(
        tiny, photo(), PROMPT, method=method, steps=3, **select_settings(method, iterations=1, seed=5)
    )
    inversion.write(tmp_path / "one.safetensors")
    again = read_inversion(tmp_path / "one.safetensors", tiny)
    for name in ("states", "noise", "empties"):
        first, second = getattr(inversion, name), getattr(again, name)
        assert (first is None and second is None) or (
            torch.equal(first, second) and first.dtype == second.dtype
        )
    for name in ("a", "b", "time"):
        assert torch.equal(getattr(inversion.schedule, name), getattr(again.schedule, name))
    for name in ("method", "prompt", "identity", "nfe", "seed", "guidance"):
        assert getattr(inversion, name) == getattr(again, name)
    assert miss(again.image, inversion.image) < 1e-6
    assert dict(again.facts) == dict(inversion.facts)
    assert miss(reconstruct(again, guidance=2.0), reconstruct(inversion, guidance=2.0)) == 0


def test_an_inversion_of_another_model_or_other_concepts_is_refused(tiny: Backbone, tmp_path: Path) -> None:
    from tests.tiny import tiny_pipeline

    file = tmp_path / "one.safetensors"
    invert(tiny, photo(), PROMPT, steps=2).write(file)
    other = Backbone.open(str(tiny_pipeline(tmp_path / "other", seed=1)), device="cpu", precision="fp32")
    with pytest.raises(UserError, match="other weights"):
        read_inversion(file, other)
    write_tensors(tmp_path / "weights.safetensors", {"x": torch.ones(1)})
    concept = Concept(
        "lora", "tiny", tiny.fingerprint, {"[V]": "bcd"}, "dog", "weights.safetensors", folder=tmp_path
    )
    with pytest.raises(UserError, match="--concept"):
        read_inversion(file, tiny, accepted=identities(tiny, [concept]))


def test_an_inversion_from_before_every_tensor_counted_is_its_model_s(tiny: Backbone, tmp_path: Path) -> None:
    now, before = identities(tiny)
    assert now == identify(tiny) != before
    replace(invert(tiny, photo(), PROMPT, steps=2), identity=before).write(tmp_path / "one.safetensors")
    assert read_inversion(tmp_path / "one.safetensors", tiny).identity == now


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda path: path.write_bytes(b"PK\x03\x04"), "pickle"),
        (lambda path: write_tensors(path, {"x": torch.ones(1)}), "no inversion"),
    ],
)
def test_a_file_that_is_no_inversion_is_refused(
    tiny: Backbone, tmp_path: Path, change: Callable[[Path], None], complaint: str
) -> None:
    file = tmp_path / "one.safetensors"
    change(file)
    with pytest.raises(UserError, match=complaint):
        read_inversion(file, tiny)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"method": "other"}, "method is other, which is none of direct"),
        ({"prompt": " "}, "empty"),
        ({"steps": 0}, "cannot take"),
        ({"steps": 2000}, "cannot take"),
        ({"image": "nowhere.png"}, "does not exist"),
        ({"iterations": 50}, "iterations is a setting of the method null-text alone, and this one is direct"),
        ({"guidance": 3.0, "method": "ddim"}, "guidance is a setting of the method null-text alone"),
        ({"seed": 1, "method": "renoise"}, "seed is a setting of the method edit-friendly alone"),
    ],
)
def test_what_cannot_be_inverted_is_refused(tiny: Backbone, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        invert(tiny, **{"image": photo(), "prompt": PROMPT, "steps": 2, **options})


@pytest.mark.parametrize("method", METHODS)
def test_too_few_steps_to_invert_are_refused(tiny: Backbone, method: Method) -> None:
    least = 3 if method == "reversible" else 2
    with pytest.raises(UserError, match=f"too few to invert an image by {method}. Take at least {least}"):
        invert(tiny, photo(), "a cat", method=method, steps=least - 1)
    states = invert(
        tiny, photo(), "a cat", method=method, steps=least, **select_settings(method, iterations=1)
    ).states
    assert float((states[0] - states[-1]).square().mean().sqrt()) > 0.05  # it went somewhere


def test_a_picture_keeps_its_shape_and_stands_upright(tiny: Backbone, tmp_path: Path) -> None:
    image = photo(200, 100)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    inversion = invert(tiny, tmp_path / "turned.jpg", PROMPT, steps=2)
    assert to_image(inversion.image).size == (48, 96)
    assert inversion.states.shape[-2:] == (12, 6)
    assert inversion.facts["size"] == [100, 200]
    assert miss(reconstruct(invert(tiny, image, PROMPT, steps=3, method="reversible")), torch.zeros(1)) < 100


@pytest.mark.parametrize(
    ("size", "found"),
    [
        ((500, 500), (512, 512)),
        ((4000, 3000), (592, 448)),
        ((3000, 4000), (448, 592)),
        ((9000, 100), (720, 368)),
        ((1, 1), (512, 512)),
    ],
)
def test_working_sizes(size: tuple[int, int], found: tuple[int, int]) -> None:
    assert working_size(size, area=512 * 512, unit=16) == found


def test_without_guidance_nothing_is_left_for_null_text_to_optimise(tiny: Backbone) -> None:
    with pytest.raises(UserError, match="At guidance 1 nothing is predicted without a prompt"):
        invert(tiny, photo(), PROMPT, method="null-text", steps=2, guidance=1.0)
