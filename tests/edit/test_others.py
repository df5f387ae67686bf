"""The methods beside prompt-to-prompt: SDEdit, FlowEdit, composing, removing, interpolating."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.flux import pipeline_flux_inpaint
from diffusers.pipelines.stable_diffusion import pipeline_stable_diffusion_inpaint
from PIL import Image
from torch import Tensor

from backbone.diffusion.noise import generator
from backbone.families.flux.family import pack_latents
from backbone.io.console import UserError
from backbone.media.transforms import to_tensor
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from edit import layout
from edit.inversion.inversion import Inversion, invert
from edit.masks import align_to_edges, compute_evidence_maps, fill_smoothly, weigh_by_colour
from edit.methods.compose import compose
from edit.methods.flow_edit import flow_edit
from edit.methods.interpolate import interpolate, slerp
from edit.methods.prompt_to_prompt.replace import replace as prompt_to_prompt
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.methods.remove import FROM_ABOVE, locate_word, remove
from edit.methods.sdedit import sdedit
from edit.result import Result
from edit.run.commands import run_interpolate, run_remove
from edit.run.open import ModelWithConcepts, Start
from tests.edit.methods.prompt_to_prompt.test_replace import SOURCE, STEPS, TARGET, deviation, left_half
from tests.edit.models import USUAL, paths, photo, tiny_on
from tests.tiny import tiny_flux, tiny_pipeline


def latent_of(model: Backbone, image: Image.Image) -> Tensor:
    return model.encode(to_tensor(image)[None]).mean[0]


@pytest.fixture
def tiny(kept: Backbone) -> Backbone:
    """Nothing here changes it."""
    return kept


@pytest.fixture(scope="module")
def inversion(kept: Backbone) -> Inversion:
    return invert(kept, photo(), SOURCE, steps=STEPS)


# SDEdit


@paths
def test_without_strength_the_picture_stays_and_with_it_changes(tiny_folder: Path, path: Any) -> None:
    model = tiny_on(tiny_folder, *path)
    latents = [sdedit(model, photo(), SOURCE, strength=s, steps=6).latents[0] for s in (0.0, 0.4, 1.0)]
    assert torch.equal(latents[0], latent_of(model, photo()))
    assert deviation(latents[1], latents[0]) > 1e-3
    assert deviation(latents[1], latents[2]) > 1e-3


@paths
def test_at_strength_one_nothing_of_the_picture_is_left(tiny_folder: Path, path: Any) -> None:
    model = tiny_on(tiny_folder, *path)
    for steps in (1, 4):
        one, other = (
            sdedit(model, photo(seed=seed), SOURCE, strength=1.0, steps=steps).latents for seed in (0, 1)
        )
        assert torch.equal(one, other)


def test_of_a_flow_a_part_of_a_step_is_taken_as_a_whole_one_and_else_not_at_all(tiny_folder: Path) -> None:
    for path, steps in ((USUAL[0], 2), (USUAL[-1], 3)):
        model = tiny_on(tiny_folder, *path)
        assert sdedit(model, photo(), SOURCE, strength=0.6, steps=4, guidance=1.0).nfe == steps


def test_a_strength_that_is_no_step_is_refused(tiny: Backbone, inversion: Inversion) -> None:
    edits: list[Callable[[], object]] = [
        lambda: sdedit(tiny, photo(), SOURCE, strength=0.3, steps=3),
        lambda: flow_edit(tiny, photo(), SOURCE, [TARGET], strength=0.3, steps=3),
        lambda: compose(inversion, [("a red dog", 1.0)], strength=0.1),
        lambda: remove(inversion, "cat", strength=0.1),
        lambda: prompt_to_prompt(inversion, TARGET, ReplaceSettings(strength=0.1)),
    ]
    for edit in edits:
        with pytest.raises(UserError, match="is less than one of"):
            edit()


def test_at_less_guidance_than_none_it_is_said_what_becomes_of_the_prompt(
    tiny: Backbone, inversion: Inversion, capsys: pytest.CaptureFixture[str]
) -> None:
    sdedit(tiny, photo(), SOURCE, steps=2, guidance=1.0)
    assert not capsys.readouterr().err
    sdedit(tiny, photo(), SOURCE, steps=2, guidance=0.0)
    assert "At guidance 0 the prompt has no effect at all" in capsys.readouterr().err
    prompt_to_prompt(inversion, TARGET, ReplaceSettings(guidance=0.25))
    assert "At guidance 0.25 the prompt counts for 0.25 of" in capsys.readouterr().err


def test_a_negative_prompt_that_is_the_prompt_is_said(
    tiny: Backbone, inversion: Inversion, capsys: pytest.CaptureFixture[str]
) -> None:
    sdedit(tiny, photo(), "a tall dog", steps=2, negative="a  Tall dog")
    assert "“a  Tall dog” is the prompt and the negative prompt" in capsys.readouterr().err
    prompt_to_prompt(inversion, TARGET, ReplaceSettings(negative=TARGET))
    assert f"“{TARGET}” is the prompt and the negative prompt" in capsys.readouterr().err
    list(sample(tiny, [Request("a big dog", (0, 0), "a big dog")], steps=2, guidance=3.0, seed=0))
    assert "“a big dog” is the prompt and the negative prompt" in capsys.readouterr().err
    list(sample(tiny, [Request("a big dog", (0, 0), "")], steps=2, guidance=3.0, seed=0))
    assert capsys.readouterr().err == ""


def test_a_guidance_scale_without_its_point_is_said(
    tiny: Backbone, inversion: Inversion, capsys: pytest.CaptureFixture[str]
) -> None:
    sdedit(tiny, photo(), SOURCE, steps=2, guidance=750)
    assert "At guidance 750 images burn out: 2 to 12 is usual. Was 7.5 meant?" in capsys.readouterr().err
    prompt_to_prompt(inversion, TARGET, ReplaceSettings(guidance=35))
    assert "At guidance 35 images burn out: 2 to 12 is usual. Was 3.5 meant?" in capsys.readouterr().err


def test_a_noised_picture_depends_on_its_number_and_the_seed_alone(tiny: Backbone) -> None:
    three = sdedit(tiny, photo(), SOURCE, steps=4, count=3).latents
    assert deviation(three[0], sdedit(tiny, photo(), SOURCE, steps=4).latents[0]) < 1e-4
    assert deviation(three[0], three[1]) > 1e-2
    assert deviation(sdedit(tiny, photo(), SOURCE, steps=4, seed=1).latents[0], three[0]) > 1e-2


def test_many_images_are_drawn_in_batches_and_are_the_same_whatever_the_batch(
    tiny: Backbone, inversion: Inversion, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, rows = invert(tiny, photo(seed=1), TARGET, steps=STEPS), list[int]()
    network = tiny.denoiser.register_forward_pre_hook(
        lambda _, given, named: rows.append(len(given[0] if given else named["sample"])), with_kwargs=True
    )
    commands: Sequence[Callable[[], Result]] = (
        lambda: sdedit(tiny, photo(), SOURCE, steps=4, count=5, guidance=1.0, frames=2, mask=left_half()),
        lambda: remove(inversion, mask=left_half(), count=5, frames=2),
        lambda: interpolate(inversion, other, count=7),
    )
    found = []
    for batch in (8, 2):
        monkeypatch.setattr("edit.sampling.BATCH", batch)
        found.append([command() for command in commands])
        assert max(rows) == (7 if batch == 8 else 4)  # the two ends of an interpolation among them
        rows.clear()
    network.remove()
    for whole, parts in zip(*found, strict=True):
        assert deviation(whole.latents, parts.latents) < 1e-4
        assert (whole.estimates is None) == (parts.estimates is None)
        if whole.estimates is not None and parts.estimates is not None:
            assert whole.estimates.shape == parts.estimates.shape
            assert deviation(whole.estimates, parts.estimates) < 1e-4
    assert [one.nfe for one in found[0][:2]] == [one.nfe for one in found[1][:2]]
    assert found[1][2].nfe == STEPS * (2 + 2 + 2 + 2 + 1 + 2)


@pytest.mark.parametrize("count", [0, 257, 100_000_000])
def test_a_count_that_nobody_means_is_refused_before_memory_is_taken(
    tiny: Backbone, inversion: Inversion, count: int
) -> None:
    commands: Sequence[Callable[[], Result]] = (
        lambda: sdedit(tiny, photo(), SOURCE, count=count),
        lambda: remove(inversion, mask=left_half(), count=count),
        lambda: interpolate(inversion, inversion, count=count),
    )
    for command in commands:
        with pytest.raises(UserError, match=r"gives 1 to 256 images|three or more"):
            command()


def test_noising_a_masked_part_leaves_the_rest_of_the_latent(tiny: Backbone) -> None:
    drawn = sdedit(tiny, photo(), SOURCE, steps=4, mask=left_half(), count=2, frames=2)
    assert torch.equal(drawn.latents[1][..., 4:], latent_of(tiny, photo())[..., 4:])
    assert deviation(drawn.latents[1][..., :4], latent_of(tiny, photo())[..., :4]) > 1e-2
    assert drawn.estimates is not None and drawn.estimates.shape[:2] == (2, 2)
    assert drawn.nfe == 2 * 2 * int(4 * 0.6)


@pytest.mark.parametrize(
    ("write", "module", "said"),
    [
        (tiny_pipeline, pipeline_stable_diffusion_inpaint, {"negative_prompt": "red"}),
        (tiny_flux, pipeline_flux_inpaint, {}),
    ],
)
def test_a_masked_part_is_drawn_as_diffusers_inpainting_draws_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, module: Any, said: dict[str, str]
) -> None:
    model = Backbone.open(str(write(tmp_path / "model")), device="cpu", precision="fp32")
    negative = said.get("negative_prompt", "")
    how: dict[str, Any] = {"strength": 0.6, "steps": 10, "guidance": 3.0, "negative": negative}
    ours = sdedit(model, photo(), SOURCE, mask=left_half(), **how)

    # diffusers' own pipeline from the same latent and noise
    noise = torch.randn(model.latent_shape, generator=generator(0, 0, "sdedit"))[None]
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: noise.clone())
    kind = module.FluxInpaintPipeline if write is tiny_flux else module.StableDiffusionInpaintPipeline
    pipeline: Any = kind.from_pretrained(model.location.source)
    pipeline.set_progress_bar_config(disable=True)
    monkeypatch.setattr(pipeline, "_encode_vae_image", lambda *_, **__: ours.encoded.latent.clone())
    theirs = pipeline(
        SOURCE,
        image=photo(),
        mask_image=left_half(),
        height=64,
        width=64,
        strength=0.6,
        num_inference_steps=10,
        guidance_scale=3.0,
        output_type="latent",
        **said,
    ).images
    found = pack_latents(ours.latents) if write is tiny_flux else ours.latents
    torch.testing.assert_close(found, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"prompt": " "}, "empty"),
        ({"strength": 1.2}, "between 0 and 1"),
        ({"steps": 0}, "cannot take"),
        ({"mask": Image.new("L", (5, 5), 255)}, "5 × 5 pixels"),
        ({"mask": Image.new("L", (64, 64))}, "The mask lets nothing change"),
        ({"negative": "red", "guidance": 1.0}, "At guidance 1 the negative prompt “red” has no effect"),
        ({"image": "nowhere.png"}, "does not exist"),
        ({"guidance": -2.0}, "negative"),
    ],
)
def test_what_cannot_be_noised_is_refused(tiny: Backbone, options: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        sdedit(tiny, **{"image": photo(), "prompt": SOURCE, "steps": 2, **options})


# FlowEdit


@paths
def test_flow_edit_towards_the_same_words_leaves_every_bit(tiny_folder: Path, path: Any) -> None:
    model = tiny_on(tiny_folder, *path)
    for guidance in (1.0, 3.0):
        drawn = flow_edit(
            model, photo(), SOURCE, [SOURCE], steps=4, guidance=guidance, source_guidance=guidance
        )
        assert deviation(drawn.latents[0], latent_of(model, photo())) < 1e-5
    changed = flow_edit(model, photo(), SOURCE, [TARGET, SOURCE], steps=4, guidance=3.0)
    assert changed.latents.shape[0] == 2
    assert deviation(changed.latents[0], latent_of(model, photo())) > 1e-3


def test_flow_edit_counts_its_rows(tiny: Backbone) -> None:
    asked = {
        (guidance, own): flow_edit(
            tiny,
            photo(),
            SOURCE,
            [TARGET, TARGET],
            steps=4,
            strength=0.5,
            guidance=guidance,
            source_guidance=own,
            draws=2,
        ).nfe
        for guidance in (1.0, 3.0)
        for own in (1.0, 2.0)
    }
    assert asked == {(1.0, 1.0): 12, (1.0, 2.0): 16, (3.0, 1.0): 20, (3.0, 2.0): 24}


def test_flow_edit_follows_the_two_velocities(tiny: Backbone) -> None:
    """One step by hand: x̃ moves by Δτ times what the target's velocity has over the source's."""
    from backbone.diffusion.noise import generator

    drawn = flow_edit(tiny, photo(), SOURCE, [TARGET], steps=2, strength=0.5, guidance=1.0)
    clean, schedule = latent_of(tiny, photo())[None], tiny.schedule(2)[1:]
    noise = torch.randn(clean.shape, generator=generator(0, 0, 0, "flow edit"))
    tau = schedule.b / (schedule.a + schedule.b)
    noised = ((1 - tau[0]) * clean + tau[0] * noise) * (schedule.a[0] + schedule.b[0])
    source, target = (
        tiny.predictor(tiny.encode_prompts([p]))(noised.float(), schedule[0]) for p in (SOURCE, TARGET)
    )
    move = (target.noise - target.clean) - (source.noise - source.clean)
    assert deviation(drawn.latents, (clean + (tau[1] - tau[0]) * move).float()) < 1e-4


# Composing


def test_composing_with_no_weight_leaves_the_picture_exactly(inversion: Inversion) -> None:
    still = compose(inversion, [("a red dog", 0.0)], strength=1.0)
    assert deviation(still.latents[0], inversion.clean) < 1e-5
    assert still.nfe == STEPS * 4


def test_composing_further_changes_more_and_away_is_another_way(inversion: Inversion) -> None:
    latents = [compose(inversion, [("a red dog", w)]).latents[0] for w in (1.0, 3.0, -1.0)]
    near, far = (deviation(latent, inversion.clean) for latent in latents[:2])
    assert 1e-4 < near < far
    assert deviation(latents[2], latents[0]) > 1e-4


def test_composing_stays_inside_a_mask_and_wants_a_prompt(inversion: Inversion) -> None:
    led = compose(inversion, [("a red dog", 2.0)], mask=left_half())
    assert torch.equal(led.latents[0][..., 4:], inversion.clean[..., 4:])
    with pytest.raises(UserError, match="no prompt to compose with"):
        compose(inversion, [])
    with pytest.raises(UserError, match="empty"):
        compose(inversion, [(" ", 1.0)])


# Removing


def test_removing_leaves_everything_else_exactly(inversion: Inversion) -> None:
    removed = remove(inversion, mask=left_half(), prompt="the snow", count=2)
    assert torch.equal(removed.latents[..., 4:], inversion.clean[..., 4:].expand(2, -1, -1, -1))
    assert deviation(removed.latents[0][..., :4], removed.latents[1][..., :4]) > 1e-2
    # Unguided one sample of each image for each step that is walked; guided two
    walked = int(STEPS * 0.5)
    assert removed.nfe == walked * 2
    assert remove(inversion, mask=left_half(), guidance=3.0, strength=1.0).nfe == STEPS * 2
    # In pixels too, but for one beside the mask
    assert torch.equal(removed.decoded[1:, ..., 33:], removed.decoded[:1, ..., 33:].expand(2, -1, -1, -1))


def test_at_no_strength_the_surroundings_are_continued(inversion: Inversion) -> None:
    removed = remove(inversion, mask=left_half(), strength=0.0)
    inside = torch.zeros(8, 8)
    inside[:, :4] = 1
    assert deviation(removed.latents[0], fill_smoothly(inversion.clean, inside, down=FROM_ABOVE)) < 1e-6
    assert removed.nfe == 0


def test_what_is_drawn_depends_on_nothing_that_was_removed(tiny: Backbone) -> None:
    """Two pictures that differ under the mask alone, on the same trajectory around it."""
    first = invert(tiny, photo(), SOURCE, steps=STEPS)
    states = first.states.clone()
    states[..., :4] = torch.randn(states[..., :4].shape, generator=torch.Generator().manual_seed(0))
    for strength in (0.6, 1.0):
        one, other = (
            remove(inversion, mask=left_half(), strength=strength).latents
            for inversion in (first, replace(first, states=states))
        )
        assert deviation(one, other) < 1e-5


def test_a_word_is_where_the_prompt_without_it_is_predicted_differently(inversion: Inversion) -> None:
    wide, _ = locate_word(inversion, "cat", threshold=0.1)
    narrow, asked = locate_word(inversion, "cat", threshold=0.6)
    assert 0 < narrow.sum() < wide.sum() and bool((wide >= narrow).all())
    removed = remove(inversion, "cat", threshold=0.6)
    assert removed.masks is not None and torch.equal(removed.masks[0], narrow)
    assert removed.nfe == asked + int(STEPS * 0.5)
    with pytest.raises(UserError, match="“cat” is found nowhere"):
        locate_word(inversion, "cat", threshold=1.0)


def test_a_place_of_another_thing_is_not_the_removed_one_s(
    tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leaving out the cat changes the predictions where the dog is too, which the dog's words explain."""
    asked: list[Sequence[str]] = []
    cat, dog = torch.zeros(8, 8), torch.zeros(8, 8)
    cat[:, :3] = dog[:, 5:] = 1.0

    def differences(
        inversion: Inversion, pairs: Sequence[tuple[str, str]], *, sides: tuple[int, int]
    ) -> tuple[Tensor, int]:
        assert sides == (layout.SOURCE, layout.SOURCE)
        return torch.ones(len(pairs), 8, 8) * (cat + dog), 5

    def evidence(inversion: Inversion, prompts: Sequence[str]) -> tuple[Tensor, int]:
        asked.append(prompts)
        return torch.stack([cat, dog]), 7

    monkeypatch.setattr("edit.methods.remove.compute_difference_maps", differences)
    monkeypatch.setattr("edit.methods.remove.compute_evidence_maps", evidence)
    flat = Image.new("RGB", (64, 64), "grey")
    places, nfe = locate_word(invert(tiny, flat, "a cat and a red dog in the snow", steps=STEPS), "cat")
    assert asked == [["a red dog in the snow", "a cat in the snow"]] and nfe == 12
    assert bool(places[:, :16].all()) and not bool(places[:, 40:].any())
    alone, nfe = locate_word(invert(tiny, flat, "a cat in the snow", steps=STEPS), "cat")
    assert len(asked) == 1 and nfe == 5 and bool(alone[:, 48:].all())


def test_evidence_is_where_a_prompt_explains_the_picture_worse(tiny: Backbone) -> None:
    inversion = invert(tiny, photo(), SOURCE, steps=10)
    maps, nfe = compute_evidence_maps(inversion, [SOURCE, TARGET])
    assert maps.shape == (2, 8, 8) and nfe == 3 * 7 * 3
    assert not bool(maps[0].any()) and bool(maps[1].any())
    again, _ = compute_evidence_maps(inversion, [SOURCE, TARGET])
    assert torch.equal(maps, again)


def test_nothing_but_a_mask_is_filled_without_words(inversion: Inversion) -> None:
    removed = remove(inversion, mask=left_half())
    assert removed.prompts == ("",)
    assert remove(inversion, "cat", mask=left_half()).prompts == ("in the snow",)


def test_a_smooth_filling_is_harmonic_and_leaves_what_is_known() -> None:
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(48.0), indexing="ij")
    plane = torch.stack([2 * x - y, y])  # harmonic itself
    inside = torch.zeros(32, 48)
    inside[8:25, 10:40] = 1
    spoiled = torch.where(inside > 0, torch.full_like(plane, 100.0), plane)
    filled = fill_smoothly(spoiled, inside, rounds=300)
    assert torch.equal(filled[:, inside == 0], plane[:, inside == 0])
    assert deviation(filled, plane) < 0.5
    quick = fill_smoothly(spoiled, inside)
    assert float(quick.min()) >= float(plane.min()) and float(quick.max()) <= float(plane.max())
    assert torch.equal(fill_smoothly(plane, torch.zeros(32, 48)), plane)


def test_a_horizon_goes_on_behind_what_is_removed() -> None:
    sky = (torch.arange(16) < 7).float()[None, :, None].expand(1, 16, 16)
    inside = torch.zeros(16, 16)
    inside[3:13, 4:11] = 1  # more than half of its edge is ground
    spoiled = torch.where(inside > 0, torch.full_like(sky, 100.0), sky)
    assert deviation(fill_smoothly(spoiled, inside, down=FROM_ABOVE), sky) < 0.5 * deviation(
        fill_smoothly(spoiled, inside), sky
    )


def test_places_are_drawn_along_the_edges_of_the_image() -> None:
    image = -torch.ones(3, 64, 64)
    image[0, 20:44, 20:44] = 1  # a square, and a blurred idea of where it is
    blurred = torch.zeros(64, 64)
    blurred[16:48, 16:48] = 0.5
    blurred[22:42, 22:42] = 1
    found = align_to_edges(blurred, image, radius=10) > 0.6
    square = image[0] > 0
    assert float((found & square).sum() / (found | square).sum()) > 0.95
    flat = align_to_edges(blurred, torch.zeros(3, 64, 64), radius=10)  # no edges: it is only blurred
    assert float(flat.max()) <= 1.001 and float(flat.std()) > 0.1


def test_a_place_has_the_colours_of_its_thing_and_not_those_around_it() -> None:
    image = -torch.ones(3, 64, 64)
    image[2] = 1  # a red square on blue, and a far too wide idea of where it is
    square = torch.zeros(64, 64)
    square[24:40, 24:40] = 1
    image[:, square > 0] = torch.tensor([1.0, -1.0, -1.0])[:, None]
    wide = torch.full((64, 64), 0.05)
    wide[12:52, 12:52] = 0.6
    wide[26:38, 26:38] = 0.9
    assert torch.equal(weigh_by_colour(wide, image) > 0.5, square > 0)
    flat = weigh_by_colour(wide, torch.zeros(3, 64, 64))  # one colour says nothing
    assert deviation(flat, wide) < 1e-4
    for same in (0.0, 1.0):  # nowhere, and everywhere
        assert (
            deviation(weigh_by_colour(torch.full((64, 64), same), image), torch.full((64, 64), same)) < 1e-5
        )


def test_what_covers_all_of_the_image_cannot_be_removed(tiny: Backbone, inversion: Inversion) -> None:
    nearly = Image.new("L", (64, 64), 255)
    nearly.paste(0, (0, 0, 64, 2))  # less than a place of the latent
    for mask in (Image.new("L", (64, 64), 255), nearly):
        with pytest.raises(UserError, match="nothing is left from which its place could be filled"):
            remove(inversion, mask=mask)
    start = Start(image=photo(), source=SOURCE)
    with pytest.raises(UserError, match="nothing is left from which"):  # before anything is inverted
        run_remove(ModelWithConcepts(tiny, (), 1.0), start, mask=Image.new("L", (64, 64), 255))


def test_a_word_that_is_not_there_cannot_be_removed(inversion: Inversion) -> None:
    with pytest.raises(UserError, match="Did you mean “snow”"):
        remove(inversion, "snwo")
    with pytest.raises(UserError, match="empty"):
        remove(inversion, "")
    part = replace(inversion, prompt="a cat-like dog in the snow")
    for mask in (None, left_half()):
        with pytest.raises(UserError, match="Did you mean"):
            remove(inversion, "cats", mask=mask)
        with pytest.raises(UserError, match="as a part of another word alone"):
            remove(part, "cat", mask=mask)
        for word in ("in", "The", "in the"):
            with pytest.raises(UserError, match=f"“{word}” names no thing .* one of the prompt: “cat”"):
                remove(inversion, word, mask=mask)
    with pytest.raises(UserError, match="between 0 and 1"):
        remove(inversion, "cat", strength=2.0)


# Interpolating


def test_the_ends_of_an_interpolation_are_the_pictures_themselves(tiny: Backbone) -> None:
    first, second = (invert(tiny, photo(seed=k), p, steps=3) for k, p in enumerate((SOURCE, TARGET)))
    result = interpolate(first, second, count=4)
    assert torch.equal(result.latents[0], first.clean) and torch.equal(result.latents[3], second.clean)
    assert result.nfe == 3 * (2 + 2)
    same = interpolate(first, first, count=3)
    assert deviation(same.latents[1], first.clean) < 1e-4, (
        "between a picture and itself there is nothing else"
    )


def test_inversions_that_do_not_fit_are_refused(tiny: Backbone, inversion: Inversion) -> None:
    with pytest.raises(UserError, match="size or in steps"):
        interpolate(inversion, invert(tiny, photo(120, 60), SOURCE, steps=STEPS))
    with pytest.raises(UserError, match="three or more"):
        interpolate(inversion, inversion, count=2)


def test_fewer_frames_than_none_are_refused(tiny: Backbone) -> None:
    with pytest.raises(UserError, match=r"frames is -1\. Give the number"):
        sdedit(tiny, photo(), SOURCE, steps=4, frames=-1)


def test_images_of_two_shapes_are_refused_before_either_is_inverted(tiny: Backbone) -> None:
    loaded = ModelWithConcepts(tiny)
    with pytest.raises(
        UserError, match=r"The first image is 60 × 60 pixels and the second 120 × 60: other shapes"
    ):
        run_interpolate(
            loaded, first=photo(60, 60), second=photo(120, 60), first_prompt=SOURCE, second_prompt=TARGET
        )


def test_the_great_circle() -> None:
    x, y = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 3.0])
    assert torch.allclose(slerp(x, y, 0.0), x) and torch.allclose(slerp(x, y, 1.0), y, atol=1e-6)
    assert torch.allclose(slerp(x, y, 0.5), torch.tensor([2.0, 2.0]) / 2**0.5)
    assert torch.allclose(slerp(x, x, 0.3), x)
