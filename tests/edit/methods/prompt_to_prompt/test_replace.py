"""Edits by words over an inversion, on tiny models."""

from __future__ import annotations

import dataclasses
from typing import Any, cast

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from backbone.adapters.lora import activate_adapters, add_lora, lora_parameters
from backbone.io.console import UserError
from backbone.models.model import Backbone
from edit.attention.alignment import align, read_prompt
from edit.inversion.inversion import Inversion, invert, reconstruct, select_settings
from edit.methods.prompt_to_prompt.plan import plan_control
from edit.methods.prompt_to_prompt.regions import (
    Regions,
    changes_only_colours,
    changes_only_places,
    changes_only_styles,
    choose_compared_prompts,
    find_blended_words,
    only_adds_or_removes,
    refuse_ambiguous_auto,
)
from edit.methods.prompt_to_prompt.replace import align_prompts, replace
from edit.methods.prompt_to_prompt.settings import PRESETS, ReplaceSettings
from edit.settings import Method
from tests.edit.models import paths, photo, tiny_on

SOURCE, TARGET = "a cat in the snow", "a dog in the snow"
STEPS = 5
EVERYWHERE = ReplaceSettings(blend=())


@pytest.fixture(scope="module")
def inversion(kept: Backbone) -> Inversion:
    return invert(kept, photo(), SOURCE, steps=STEPS)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """The one of `moji`, which knows more words."""
    return Backbone.open("moji", device="cpu").text_encoder.tokenizer


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


def left_half(size: tuple[int, int] = (64, 64)) -> Image.Image:
    mask = Image.new("L", size)
    ImageDraw.Draw(mask).rectangle((0, 0, size[0] // 2 - 1, size[1]), fill=255)
    return mask


@paths
def test_the_source_row_is_the_trajectory_at_any_guidance(tiny_folder: Any, path: Any) -> None:
    model = tiny_on(tiny_folder, *path)
    inversion = invert(model, photo(), SOURCE, steps=STEPS)
    for guidance in (1.0, 7.5):
        edited = replace(inversion, TARGET, ReplaceSettings(guidance=guidance, blend=()))
        assert edited.trajectory is not None
        assert torch.equal(edited.trajectory[:, 0], inversion.states)
        assert torch.equal(edited.source_latent, inversion.clean)


@pytest.mark.parametrize("method", ["renoise", "edit-friendly", "reversible"])
def test_other_exact_methods_overwrite_the_source_row_too(kept: Backbone, method: Method) -> None:
    inversion = invert(kept, photo(), SOURCE, steps=STEPS, method=method)
    edited = replace(inversion, TARGET, EVERYWHERE)
    assert torch.equal(edited.source_latent, inversion.clean)


def test_a_guided_target_does_not_swing_away_from_a_reversible_trajectory(kept: Backbone) -> None:
    """The two-step rule damps nothing: what a strongly guided target added to it would grow from step to step."""
    size = {}
    methods: tuple[Method, ...] = ("direct", "reversible")
    for method in methods:
        inversion = invert(kept, photo(), SOURCE, steps=30, method=method)
        edited = replace(
            inversion, TARGET, ReplaceSettings(guidance=15.0, cross=0.0, self_attention=0.0, blend=())
        )
        size[method] = float(deviation(edited.latents[0], inversion.clean))
    assert size["reversible"] < 1.5 * size["direct"]


@pytest.mark.parametrize("method", ["ddim", "negative-prompt", "null-text"])
def test_methods_that_sample_the_source_arrive_where_their_replay_does(
    kept: Backbone, method: Method
) -> None:
    inversion = invert(
        kept, photo(), SOURCE, steps=3, method=method, **select_settings(method, guidance=3.0, iterations=1)
    )
    options: dict[str, Any] = {} if method == "null-text" else {"guidance": 3.0}
    edited = replace(inversion, TARGET, ReplaceSettings(**options, blend=()))
    assert deviation(edited.source_latent, reconstruct(inversion, guidance=3.0)) < 1e-4


def test_an_edit_that_changes_no_word_is_the_guided_walk(inversion: Inversion) -> None:
    """The check that can fail: nothing is overwritten in the target's row."""
    edited = replace(
        inversion, SOURCE, ReplaceSettings(guidance=7.5, cross=0.0, self_attention=0.0, blend=())
    )
    assert deviation(edited.latents[0], reconstruct(inversion, guidance=7.5)) < 1e-4
    assert deviation(edited.latents[0], inversion.clean) > 1e-2


def test_attention_of_a_source_that_says_the_same_changes_nothing_unguided(inversion: Inversion) -> None:
    """At first: later the two rows stand elsewhere, since the source's is put back on its trajectory."""

    def first(share: float) -> Tensor:
        settings = ReplaceSettings(guidance=1.0, cross=share, self_attention=share, blend=())
        trajectory = replace(inversion, SOURCE, settings).trajectory
        assert trajectory is not None
        return trajectory[1, 1]

    assert deviation(first(1.0), first(0.0)) < 1e-5


def test_the_words_change_the_picture_and_windows_say_how_much(inversion: Inversion) -> None:
    def latent(cross: float, self_attention: float) -> Tensor:
        settings = ReplaceSettings(cross=cross, self_attention=self_attention, blend=())
        return replace(inversion, TARGET, settings).latents[0]

    assert deviation(latent(1.0, 1.0), latent(0.0, 0.0)) > 1e-3
    assert deviation(latent(1.0, 0.0), latent(0.0, 0.0)) > 1e-4


def test_several_targets_are_each_what_they_are_alone(inversion: Inversion) -> None:
    targets = [TARGET, "a red cat in the snow"]
    together = replace(inversion, targets)
    for n, target in enumerate(targets):
        assert deviation(together.latents[n], replace(inversion, target).latents[0]) < 1e-4
    assert len(together.images) == 2


@pytest.mark.parametrize(
    ("keep", "blend"), [(("snow",), ()), ((), ("snow",)), (("dog",), ("auto",)), (("red",), ("auto",))]
)
def test_places_of_words_do_not_depend_on_the_targets_beside_them(
    tiny: Backbone, keep: tuple[str, ...], blend: tuple[str, ...]
) -> None:
    """Of a style, attention is taken for longer, and only some of the targets have the words that are kept."""
    tiny.defaults["edit"] = {"cross": 0.0, "self_attention": 0.1, "style_self_attention": 0.9}
    inversion = invert(tiny, photo(), SOURCE, steps=8)
    targets = [TARGET, "a red cat in the snow", "a watercolor of a cat in the snow"]
    asked = ReplaceSettings(blend=blend, keep=keep, threshold=0.9, guidance=4.0, heatmaps=("cat", "snow"))
    together = replace(inversion, targets, asked)
    for n, target in enumerate(targets):
        alone = replace(
            inversion,
            target,
            dataclasses.replace(asked, keep=[word for word in keep if word in f"{SOURCE} {target}"]),
        )
        for word in asked.heatmaps:
            heat = together.heatmaps[word][1 + n]
            torch.testing.assert_close(heat, alone.heatmaps[word][1], atol=1e-6, rtol=1e-4)
        masks = torch.ones_like(inversion.clean[0]) if alone.masks is None else alone.masks[0]
        assert together.masks is not None and torch.equal(together.masks[n], masks)
        assert deviation(together.latents[n], alone.latents[0]) < 1e-3


@pytest.mark.parametrize("targets", [1, 3])
def test_an_edit_asks_for_one_row_and_two_for_each_target(kept: Backbone, targets: int) -> None:
    inversion = invert(kept, photo(), SOURCE, steps=10)
    edited = replace(inversion, [TARGET] * targets, ReplaceSettings(cross=0.8, self_attention=0.4, blend=()))
    assert inversion.nfe == 10
    assert edited.nfe == 8 * (1 + 2 * targets) + 2 * 2 * targets, "no source row once no window is open"
    unguided = replace(inversion, [TARGET] * targets, ReplaceSettings(guidance=1.0, cross=0.8, blend=()))
    assert unguided.nfe == 8 * (1 + targets) + 2 * targets


def test_a_model_says_until_when_the_sources_attention_is_taken_unless_it_is_asked_for(
    tiny: Backbone,
) -> None:
    inversion = invert(tiny, photo(), SOURCE, steps=10)
    tiny.__dict__["defaults"] = {**tiny.defaults, "edit": {"cross": 0.0, "self_attention": 0.2}}
    assert replace(inversion, TARGET, EVERYWHERE).nfe == 2 * 3 + 8 * 2
    assert replace(inversion, TARGET, ReplaceSettings(cross=0.5, blend=())).nfe == 5 * 3 + 5 * 2


def test_a_target_of_another_colour_alone_may_keep_the_source_s_layout_for_longer(tiny: Backbone) -> None:
    inversion = invert(tiny, photo(), SOURCE, steps=10)
    coloured = SOURCE.replace("cat", "red cat")
    shares = {"cross": 0.0, "self_attention": 0.2, "colour_self_attention": 0.5}
    tiny.__dict__["defaults"] = {**tiny.defaults, "edit": shares}
    both = replace(inversion, [coloured, TARGET], EVERYWHERE)
    assert both.nfe == 5 * 5 + 5 * 4
    for number, target in enumerate([coloured, TARGET]):
        alone = replace(inversion, target, EVERYWHERE)
        assert alone.nfe == (5 * 3 + 5 * 2, 2 * 3 + 8 * 2)[number]
        assert deviation(alone.latents[0], both.latents[number]) < 1e-4
    asked = replace(inversion, coloured, ReplaceSettings(self_attention=0.2, blend=()))
    assert asked.nfe == 2 * 3 + 8 * 2


def test_a_target_of_another_style_alone_may_keep_the_source_s_layout_for_longer(tiny: Backbone) -> None:
    inversion = invert(tiny, photo(), SOURCE, steps=10)
    shares = {"cross": 0.0, "self_attention": 0.2, "style_self_attention": 0.8}
    tiny.__dict__["defaults"] = {**tiny.defaults, "edit": shares}
    assert replace(inversion, f"a watercolor of {SOURCE}", EVERYWHERE).nfe == 8 * 3 + 2 * 2
    assert replace(inversion, f"a watercolor of {TARGET}", EVERYWHERE).nfe == 2 * 3 + 8 * 2


@pytest.mark.parametrize(
    ("source", "target", "alone"),
    [
        ("a dog in a park", "an orange dog in a park", True),
        ("a red dog", "a dark blue dog", True),
        ("a red dog", "a dog", True),
        ("a red dog", "a red cat", False),
        ("a red dog", "a blue cat", False),
        ("a dog", "a dog", False),
    ],
)
def test_a_target_says_nothing_but_colours_otherwise(
    tokenizer: Any, source: str, target: str, alone: bool
) -> None:
    assert (
        changes_only_colours(align(read_prompt(tokenizer, source), read_prompt(tokenizer, target))) is alone
    )


@pytest.mark.parametrize(
    ("weights", "alone"),
    [({"red": 3.0}, True), ({"dog": 3.0}, False), ({"red": 3.0, "dog": 2.0}, False), ({}, False)],
)
def test_weights_of_colours_change_nothing_but_colours(
    tokenizer: Any, weights: dict[str, float], alone: bool
) -> None:
    prompt = read_prompt(tokenizer, "a red dog")
    assert changes_only_colours(align(prompt, prompt), weights) is alone


@pytest.mark.parametrize(
    ("target", "free"),
    [
        ("a dog wearing a crown in a park", True),
        ("a dog", True),  # without the park
        ("a red dog in a park", False),
        ("a cat wearing a crown in a park", False),
        ("a dog in a park", False),
        ("a watercolor of a dog in a park", True),  # whose place is unknown, so that nothing is freed
    ],
)
def test_what_is_put_on_or_taken_off_alone_is_free_of_the_source_s_outlines(
    tokenizer: Any, target: str, free: bool
) -> None:
    source = read_prompt(tokenizer, "a dog in a park")
    assert only_adds_or_removes(align(source, read_prompt(tokenizer, target))) is free


@pytest.mark.parametrize(
    ("source", "target", "alone"),
    [
        ("a dog at night", "a dog in the city", True),
        ("a dog at night", "a dog in space", True),
        ("a dog under the sea", "a dog on a wooden table", True),
        ("a dog in a park", "a dog in the snow", False),  # told as what somebody wears is
        ("a woman in a dress", "a woman in armour", False),
        ("a dog", "a dog on the beach", False),
        ("a dog at night", "a cat in the snow", False),
        ("a dog in a park", "a cat in the snow", False),
        ("a dog in a park", "a cat in a park", False),
        ("a dog in a park", "a dog wearing a crown in a park", False),
        ("a dog in a park", "a dog in a park", False),
    ],
)
def test_a_target_says_nothing_but_another_place(
    tokenizer: Any, source: str, target: str, alone: bool
) -> None:
    assert changes_only_places(align(read_prompt(tokenizer, source), read_prompt(tokenizer, target))) is alone


def test_places_are_freed_where_the_prompts_are_predicted_differently(inversion: Inversion) -> None:
    source = inversion.prompt
    targets = [f"{source} wearing a crown", f"a watercolor of {source}"]
    settings = ReplaceSettings(threshold=0.5).resolve(inversion.model)
    regions = Regions(inversion, align_prompts(inversion.model, source, targets, settings), settings)
    assert regions.find_freed() is None
    assert list(regions.pairs) == [0]
    differs = torch.zeros(regions.size)
    differs[0, :2] = torch.tensor([1.0, 0.4])
    regions.differences[0] = differs[None]
    freed = regions.find_freed()
    assert freed is not None
    crown, watercolor = freed
    assert crown.nonzero().tolist() == [[0, 0]] and not watercolor.any()


@pytest.mark.parametrize(
    ("target", "share", "whole"),
    [
        (TARGET, 0.4, False),
        (TARGET, 0.6, True),
        ("a cat at night", 0.25, False),
        ("a cat at night", 0.4, True),  # another place
    ],
)
def test_what_differs_in_more_than_half_of_the_picture_changes_all_of_it(
    inversion: Inversion, target: str, share: float, whole: bool
) -> None:
    settings = ReplaceSettings(place_self_attention=0.8, self_attention=0.2, cross=0.0)
    alignments = align_prompts(inversion.model, inversion.prompt, [target], settings)
    regions = Regions(inversion, alignments, settings)
    differs = torch.zeros(regions.size).flatten()
    differs[: round(share * differs.numel())] = 0.3
    regions.differences[0] = differs.view(1, *regions.size)
    assert regions.find_whole() == ({0} if whole else set())
    masks = regions.masks(None)
    assert masks is not None and masks[0].mean() == pytest.approx(1 if whole else share, abs=0.05)
    plan = plan_control(alignments, settings, 10, inversion.model.device, whole_scene=regions.find_whole())
    assert sum(taken for (taken,) in plan.controlled) == (8 if whole else 2)
    regions.user_mask = torch.zeros(regions.size)  # the user's own mask holds in any case
    masks = regions.masks(None)
    assert masks is not None and not masks.any()


@pytest.mark.parametrize(
    ("source", "target", "alone"),
    [
        ("a dog in a park", "a watercolor of a dog in a park", True),
        ("a pencil sketch of a dog", "a neon drawing of a dog", True),
        ("a photo of a dog", "a dog", True),
        ("a dog", "a dog in pixel art style", True),
        ("a dog", "a watercolor of a cat", False),
        ("a dog in a park", "a watercolor of a red dog in a park", False),
        ("a dog", "a dog", False),
        ("a dog", "a dog in a park", False),
    ],
)
def test_a_target_says_nothing_but_how_it_is_made_otherwise(
    tokenizer: Any, source: str, target: str, alone: bool
) -> None:
    assert changes_only_styles(align(read_prompt(tokenizer, source), read_prompt(tokenizer, target))) is alone


def test_outside_the_mask_the_latent_is_the_pictures_own(inversion: Inversion) -> None:
    edited = replace(inversion, TARGET, ReplaceSettings(mask=left_half(), blend=()))
    assert edited.masks is not None and edited.masks[0].mean() == 0.5
    assert torch.equal(edited.latents[0][..., 4:], inversion.clean[..., 4:])
    assert deviation(edited.latents[0][..., :4], inversion.clean[..., :4]) > 1e-3


@pytest.mark.parametrize(("blend", "threshold"), [("auto", 0.8), ("snow", 0.97)])
def test_outside_the_places_of_words_the_latent_is_the_pictures_own(
    inversion: Inversion, blend: str, threshold: float
) -> None:
    edited = replace(inversion, TARGET, ReplaceSettings(blend=(blend,), threshold=threshold))
    assert edited.masks is not None
    kept = edited.masks[0] == 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(edited.latents[0][:, kept], inversion.clean[:, kept])


@pytest.mark.parametrize(("steps", "strength"), [(7, 1.0), (4, 1.0), (3, 0.4), (8, 0.5), (8, 0.13)])
def test_words_have_their_places_at_any_number_of_steps_and_any_strength(
    kept: Backbone, steps: int, strength: float
) -> None:
    """Although no target takes anything from the source by then, so that its row is not needed otherwise."""
    inversion = invert(kept, photo(), SOURCE, steps=steps)
    for blend, keep in ((("snow",), ()), ((), ("snow",))):
        asked = ReplaceSettings(
            cross=0.0, self_attention=0.1, blend=blend, keep=keep, heatmaps=("dog",), strength=strength,
            threshold=0.97 if blend else 0.9,
        )  # fmt: skip
        edited = replace(inversion, TARGET, asked)
        assert edited.masks is not None and 0 < edited.masks.mean() < 1
        outside = edited.masks[0] == 0
        assert torch.equal(edited.latents[0][:, outside], inversion.clean[:, outside])
        assert edited.heatmaps["dog"][1].any()


def test_words_to_keep_and_a_mask_narrow_the_place(inversion: Inversion) -> None:
    def mask(**options: Any) -> Tensor:
        found = replace(inversion, TARGET, ReplaceSettings(**options)).masks
        assert found is not None
        return found[0]

    wide, kept = mask(threshold=0.0), mask(threshold=0.9, blend=(), keep=("snow",))
    assert wide.all() and not kept.all() and kept.any()
    assert torch.equal(mask(threshold=0.0, mask=left_half()), mask(mask=left_half(), blend=()))


@pytest.mark.parametrize(
    ("source", "target", "weighted", "expected"),
    [
        ("a cat in the snow", "a dog in the snow", {}, [("a cat in the snow", "a dog in the snow")]),
        (
            "a cat in the snow",
            "a red cat in the snow",
            {"red": 2.0},
            [("a cat in the snow", "a red cat in the snow")],
        ),
        (
            "a red cat in the snow",
            "a red cat in the snow",
            {"red": 2.0},
            [("a cat in the snow", "a red cat in the snow")],
        ),
        # It says the same in other capitals and with other spaces
        (
            "a red cat in the snow",
            "A red  cat in the snow",
            {"red cat": 2.0},
            [("A in the snow", "A red  cat in the snow")],
        ),
        # Words that both have are weighted beside others that differ
        (
            "a red cat in the snow",
            "a red dog in the snow",
            {"red": 0.0},
            [
                ("a red cat in the snow", "a red dog in the snow"),
                ("a dog in the snow", "a red dog in the snow"),
            ],
        ),
        (
            "a red cat in the snow",
            "a red dog in the snow",
            {"red": 1.0, "dog": 2.0, "cat": 2.0},
            [("a red cat in the snow", "a red dog in the snow")],
        ),
        ("a cat in the snow", "a cat in the snow", {}, [("a cat in the snow", "a cat in the snow")]),
        ("a cat in the snow", "a watercolor of a cat in the snow", {}, []),
        ("a red cat in the snow", "a watercolor of a red cat in the snow", {"red": 2.0}, []),
    ],
)
def test_an_edit_happens_where_the_prompts_differ_unless_that_says_how_it_is_drawn(
    kept: Backbone,
    source: str,
    target: str,
    weighted: dict[str, float],
    expected: list[tuple[str, str]],
) -> None:
    tokenizer = kept.text_encoder.tokenizer
    alignment = align(read_prompt(tokenizer, source), read_prompt(tokenizer, target))
    assert list(choose_compared_prompts(alignment, weighted)) == expected


def test_a_weighted_word_s_place_may_change_beside_that_of_the_words_that_differ(
    inversion: Inversion,
) -> None:
    target, weights = "a dog in the snow", {"snow": 3.0}

    def mask(targets: str, weights: dict[str, float]) -> Tensor:
        found = replace(inversion, targets, ReplaceSettings(weights=weights, threshold=0.6)).masks
        assert found is not None and not found.all()
        return found[0]

    words, weighted = mask(target, {}), mask(target, weights)
    assert torch.equal(weighted.maximum(words), weighted) and not torch.equal(weighted, words)
    # In another spelling of the source's prompt the weight counts as it does there
    spelled = mask("A cat  in the snow", weights)
    assert spelled.any() and torch.equal(spelled, mask(SOURCE, weights))


def test_a_word_that_is_called_auto_is_a_word_like_others(kept: Backbone) -> None:
    """The default, which goes by predictions, does not take it for the word to blend."""
    found = []
    for word in ("auto", "utoa"):
        source, target = f"a {word} cat in the snow", f"a {word} dog in the snow"
        alignment = align(*(read_prompt(kept.text_encoder.tokenizer, prompt) for prompt in (source, target)))
        assert find_blended_words(alignment, ("auto",)) == ([], [])
        refuse_ambiguous_auto((), [alignment])
        found.append(replace(invert(kept, photo(), source, steps=STEPS), target).nfe)
        if word == "auto":
            with pytest.raises(UserError, match="name the word together with a neighbour"):
                refuse_ambiguous_auto(("auto",), [alignment])
            named = find_blended_words(alignment, ("auto cat",))[0]
            assert "".join(one.text for one in named) == "autocat"
    assert found[0] == found[1]


def test_where_nothing_differs_nothing_changes_at_any_guidance(inversion: Inversion) -> None:
    edited = replace(inversion, SOURCE, ReplaceSettings(guidance=9.0))
    assert torch.equal(edited.latents[0], inversion.clean)


def test_weights_reach_the_picture(inversion: Inversion) -> None:
    latents = [
        replace(inversion, SOURCE, ReplaceSettings(weights={"cat": weight}, cross=1.0, blend=())).latents[0]
        for weight in (1.0, 2.0, 4.0)
    ]
    assert 1e-5 < deviation(latents[1], latents[0]) < deviation(latents[2], latents[0])


@pytest.mark.parametrize("control", PRESETS)
def test_a_weight_counts_where_no_word_takes_the_source_s_attention(
    inversion: Inversion, control: str
) -> None:
    settings = dataclasses.replace(PRESETS[control], cross=0.0, blend=())
    latents = [
        replace(inversion, SOURCE, dataclasses.replace(settings, weights={"cat": weight})).latents[0]
        for weight in (1.0, 3.0)
    ]
    assert deviation(latents[0], latents[1]) > 1e-5


def test_a_swap_that_nothing_reads_is_said(inversion: Inversion, capsys: pytest.CaptureFixture[str]) -> None:
    swaps = (("cat", "dog"),)
    replace(inversion, TARGET, ReplaceSettings(swaps=swaps))
    replace(inversion, TARGET, ReplaceSettings(swaps=swaps, cross=0.0, keep=("snow",)))
    assert not capsys.readouterr().err
    replace(inversion, TARGET, ReplaceSettings(swaps=swaps, cross=0.0))
    assert "--swap has no effect here" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["null-text", "negative-prompt"])
def test_nothing_stays_away_from_what_an_inversion_has_replaced(kept: Backbone, method: Any) -> None:
    inversion = invert(kept, photo(), SOURCE, method=method, steps=2, **select_settings(method, iterations=1))
    with pytest.raises(UserError, match=f"inversion by {method} puts .* in the place of a negative prompt"):
        replace(inversion, TARGET, ReplaceSettings(negative="snow"))


def test_nothing_stays_away_from_what_a_model_s_own_guidance_of_1_never_predicts(tiny: Backbone) -> None:
    tiny.__dict__["defaults"] = {**tiny.defaults, "guidance": 1.0}
    inversion = invert(tiny, photo(), SOURCE, steps=2)
    with pytest.raises(UserError, match="At guidance 1 the negative prompt “snow” has no effect"):
        replace(inversion, TARGET, ReplaceSettings(negative="snow"))
    replace(inversion, TARGET, ReplaceSettings(negative="snow", guidance=2.0))


def test_strength_0_leaves_the_picture_and_less_strength_changes_less(kept: Backbone) -> None:
    inversion = invert(kept, photo(), SOURCE, steps=10)
    latents = [
        replace(inversion, TARGET, ReplaceSettings(strength=s, blend=())).latents[0] for s in (0.0, 0.3, 1.0)
    ]
    assert torch.equal(latents[0], inversion.clean)
    assert deviation(latents[1], inversion.clean) < deviation(latents[2], inversion.clean)


def test_heat_maps_are_read_and_change_nothing(inversion: Inversion) -> None:
    plain, edited = (
        replace(inversion, TARGET),
        replace(inversion, TARGET, ReplaceSettings(heatmaps=("snow", "dog"))),
    )
    assert edited.heatmaps["snow"].shape[0] == 2 and edited.heatmaps["snow"].ndim == 3
    assert not edited.heatmaps["dog"][0].any(), "the source does not say it"
    assert edited.heatmaps["dog"][1].any()
    assert deviation(edited.latents, plain.latents) < 1e-4


@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "prompt-to-prompt"])
@pytest.mark.parametrize("method", ["direct", "ddim"])
def test_presets_hold_the_picture_without_its_words(kept: Backbone, preset: str, method: Method) -> None:
    """Even prompts that share no word; and they change what a plain guided walk gives."""
    inversion = invert(kept, photo(), SOURCE, steps=STEPS, method=method)
    edited = replace(inversion, "red", PRESETS[preset])
    plain = replace(inversion, "red", ReplaceSettings(cross=0.0, self_attention=0.0, blend=()))
    assert deviation(edited.latents, plain.latents) > 1e-3
    assert edited.masks is None


def test_a_picture_that_is_not_square_is_edited_in_its_own_shape(kept: Backbone) -> None:
    inversion = invert(kept, photo(120, 60), SOURCE, steps=3)
    edited = replace(inversion, TARGET, ReplaceSettings(heatmaps=("snow",)))
    assert edited.images[0].size == edited.reconstruction.size == (96, 48)
    assert edited.heatmaps["snow"].shape[-2] < edited.heatmaps["snow"].shape[-1]


def test_a_lora_is_worn_through_inversion_and_edit(tiny: Backbone) -> None:
    plain = replace(invert(tiny, photo(), SOURCE, steps=3), TARGET, EVERYWHERE)
    add_lora(tiny.denoiser, "subject", rank=2, alpha=4.0, targets=("to_q", "to_k", "to_v", "to_out.0"))
    for value in lora_parameters(tiny.denoiser, "subject").values():
        value.data = torch.randn(value.shape, generator=torch.Generator().manual_seed(1)) / 2
    activate_adapters(tiny.denoiser, ["subject"])
    inversion = invert(tiny, photo(), SOURCE, steps=3)
    worn = replace(inversion, TARGET, EVERYWHERE)
    assert torch.equal(worn.source_latent, inversion.clean)
    assert deviation(worn.latents, plain.latents) > 1e-3


def test_the_model_is_as_before_after_an_edit_and_after_an_error(inversion: Inversion) -> None:
    denoiser = cast(Any, inversion.model.denoiser)
    processors, hooks = dict(denoiser.attn_processors), [m._forward_hooks for m in denoiser.modules()]
    weights = {name: value.clone() for name, value in denoiser.state_dict().items()}
    replace(inversion, TARGET, PRESETS["plug-and-play"])

    def stop() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace(inversion, TARGET, progress=stop)
    assert all(denoiser.attn_processors[name] is value for name, value in processors.items())
    assert not any(hooks)
    assert all(torch.equal(value, weights[name]) for name, value in denoiser.state_dict().items())


class Softmax(TorchDispatchMode):
    """Counts operations that make a whole attention matrix."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "softmax" in str(operation):
            self.found.append(str(operation))
        return operation(*args, **(kwargs or {}))


def test_a_whole_edit_materialises_no_attention_matrix(inversion: Inversion) -> None:
    inversion.model.text_encoder  # noqa: B018 (loaded, and prompts encoded, before the count begins)
    replace(inversion, TARGET, EVERYWHERE)
    with Softmax() as counted:
        replace(inversion, TARGET, ReplaceSettings(cross=0.6, weights={"dog": 2.0}, blend=()))
        replace(inversion, TARGET)
    assert counted.found == []


def test_frames_show_the_way(inversion: Inversion) -> None:
    edited = replace(inversion, [TARGET, SOURCE], ReplaceSettings(frames=3))
    assert edited.estimates is not None and edited.estimates.shape[:2] == (3, 2)
    assert replace(inversion, TARGET).estimates is None


@pytest.mark.parametrize(
    ("target", "options", "complaint"),
    [
        ("ship", {}, "share no words"),
        ("", {}, "empty"),
        (TARGET, {"blend": ("snwo",)}, "Did you mean “snow”"),
        (TARGET, {"keep": ("hat",)}, "not in any"),
        (TARGET, {"weights": {"cat": 2.0}}, "not in the prompt"),
        (TARGET, {"windows": {"dog": (0.0, 1.5)}}, "between 0 and 1"),
        (
            TARGET,
            {"windows": {"dog": (0.8, 0.2)}},
            r"begins at 0\.8 and ends before, at 0\.2\. Write 0\.2:0\.8",
        ),
        (TARGET, {"weights": {"dog": float("nan")}}, "no number"),
        (TARGET, {"cross": 1.5}, "between 0 and 1"),
        (TARGET, {"strength": -0.1}, "between 0 and 1"),
        (TARGET, {"guidance": -1.0}, "negative"),
        (TARGET, {"mask": Image.new("L", (20, 10), 255)}, "20 × 10 pixels"),
        (TARGET, {"swaps": (("ship", "dog"),)}, "not in the prompt"),
        ([], {}, "no target"),
    ],
)
def test_mistakes_are_answered(
    inversion: Inversion, target: str, options: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        replace(inversion, target, ReplaceSettings(**options))


def test_a_null_text_inversion_is_edited_with_its_own_guidance(kept: Backbone) -> None:
    inversion = invert(kept, photo(), SOURCE, method="null-text", steps=2, guidance=3.0, iterations=1)
    assert replace(inversion, TARGET).facts["guidance"] == 3.0
    with pytest.raises(UserError, match="made for guidance 3, not 5"):
        replace(inversion, TARGET, ReplaceSettings(guidance=5.0))


def test_around_an_edit_the_picture_is_what_the_autoencoder_alone_makes_of_it(inversion: Inversion) -> None:
    """Half a latent beyond the mask and further, whatever the decoder makes of the edit."""
    edited = replace(inversion, TARGET, ReplaceSettings(mask=left_half(), guidance=9.0, blend=()))
    alone, inside = inversion.model.decode(torch.cat([inversion.clean[None], edited.latents]))
    assert torch.equal(edited.decoded[0], alone)
    assert torch.equal(edited.decoded[1][..., 36:], alone[..., 36:])
    assert deviation(edited.decoded[1][..., :28], inside[..., :28]) < 1e-6
    assert deviation(inside[..., :28], alone[..., :28]) > 1e-3
