"""Whole edits on every family of models: in Python, and by the commands on their folders."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.families.base import TextSegment
from backbone.io.console import UserError
from edit.attention.alignment import align, tokenize_prompt
from edit.cli import main
from edit.inversion.inversion import METHODS, Inversion, invert, reconstruct, select_settings
from edit.methods.flow_edit import flow_edit
from edit.methods.prompt_to_prompt.replace import replace
from edit.methods.prompt_to_prompt.settings import PRESETS, ReplaceSettings
from edit.methods.remove import locate_word, remove
from edit.methods.sdedit import sdedit
from edit.settings import Method
from tests.edit.attention.test_joint import Found, processors_of, wearing_a_lora
from tests.edit.conftest import FAMILIES, NEWER, SLOWLY, TRANSFORMERS, Open
from tests.edit.methods.prompt_to_prompt.test_replace import left_half
from tests.edit.models import photo
from tests.tiny import tiny_t5_tokenizer, tiny_tokenizer

SOURCE, TARGET, OTHER = "a cat in the snow", "a dog in the snow", "a red cat in the snow"
STEPS = 3
EVERYWHERE = ReplaceSettings(blend=())
TOLD = ("flux-dev", "flux-schnell", "flux2-dev")  # asked once a step, with the prompt alone

every = pytest.mark.parametrize("name", [*FAMILIES, *SLOWLY])
# Of Stable Diffusion itself the same is asked beside each method; XL has its UNet's kinds of layers
each = pytest.mark.parametrize("name", [pytest.param("xl", marks=pytest.mark.slow), *TRANSFORMERS, *SLOWLY])
transformers = pytest.mark.parametrize("name", [*TRANSFORMERS, *SLOWLY])


@pytest.fixture(scope="module")
def inverted(family: Open) -> Callable[..., Inversion]:
    """A picture's inversion by a family's name, made once."""
    return cache(lambda name, **options: invert(family(name), photo(), SOURCE, **{"steps": STEPS} | options))


def deviation(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


# In Python --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FAMILIES, NEWER[0], *SLOWLY[1:]])
def test_the_source_row_is_the_stored_trajectory_at_any_guidance(
    inverted: Callable[..., Inversion], name: str
) -> None:
    inversion = inverted(name)
    for guidance in (1.0, 6.0):
        edited = replace(inversion, [TARGET, OTHER], ReplaceSettings(guidance=guidance, heatmaps=("snow",)))
        assert edited.trajectory is not None
        assert torch.equal(edited.trajectory[:, 0], inversion.states)
        assert torch.equal(edited.source_latent, inversion.clean)


@every
def test_an_edit_without_words_or_injection_is_the_plain_guided_walk(
    inverted: Callable[..., Inversion], name: str
) -> None:
    inversion = inverted(name)
    edited = replace(
        inversion, SOURCE, ReplaceSettings(guidance=6.0, cross=0.0, self_attention=0.0, blend=())
    )
    assert deviation(edited.latents[0], reconstruct(inversion, guidance=6.0)) < 1e-4
    if name != "flux-schnell":  # which knows but one guidance
        assert deviation(edited.latents[0], reconstruct(inversion, guidance=1.0)) > 1e-3


@each
def test_words_and_layout_each_change_the_way(inverted: Callable[..., Inversion], name: str) -> None:
    inversion = inverted(name)
    asked: list[dict[str, Any]] = [
        {"cross": 0.0, "self_attention": 0.0},
        {"cross": 1.0, "self_attention": 0.0},
        {"cross": 0.0, "self_attention": 1.0},
        {"cross": 1.0, "self_attention": 1.0},
        {"cross": 1.0, "self_attention": 1.0, "weights": {"dog": 3.0}},
    ]
    found = [replace(inversion, TARGET, ReplaceSettings(**options, blend=())).latents for options in asked]
    for n, one in enumerate(found):
        assert all(deviation(one, other) > 1e-6 for other in found[:n])


@each
def test_several_targets_are_each_what_they_are_alone(inverted: Callable[..., Inversion], name: str) -> None:
    inversion = inverted(name)
    together = replace(inversion, [TARGET, OTHER], ReplaceSettings(threshold=0.6))
    for n, target in enumerate((TARGET, OTHER)):
        assert (
            deviation(
                together.latents[n], replace(inversion, target, ReplaceSettings(threshold=0.6)).latents[0]
            )
            < 1e-4
        )


@each
def test_an_edit_changes_only_where_it_may(inverted: Callable[..., Inversion], name: str) -> None:
    """Inside the user's mask, and in the place that the attention finds for the words."""
    inversion = inverted(name)
    edited = replace(inversion, TARGET, ReplaceSettings(mask=left_half(), blend=()))
    assert torch.equal(edited.latents[0][..., 4:], inversion.clean[..., 4:])
    assert deviation(edited.latents[0][..., :4], inversion.clean[..., :4]) > 1e-4
    edited = replace(inversion, TARGET, ReplaceSettings(blend=("dog",), threshold=0.999))
    assert edited.masks is not None
    kept = edited.masks[0] == 0
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(edited.latents[0][:, kept], inversion.clean[:, kept])
    assert deviation(edited.latents[0][:, ~kept], inversion.clean[:, ~kept]) > 1e-4


@each
def test_a_picture_that_is_not_square_is_edited_in_its_own_shape(family: Open, name: str) -> None:
    inversion = invert(family(name), photo(120, 60), SOURCE, steps=STEPS)
    edited = replace(inversion, TARGET, ReplaceSettings(heatmaps=("snow",)))
    assert edited.images[0].size == (96, 48) and torch.equal(edited.source_latent, inversion.clean)
    _, height, width = edited.heatmaps["snow"].shape
    assert width == 2 * height


@each
def test_a_lora_is_worn_through_inversion_and_edit(
    family: Open, inverted: Callable[..., Inversion], name: str
) -> None:
    plain = replace(inverted(name), TARGET, EVERYWHERE)
    inversion = invert(wearing_a_lora(family(name)), photo(), SOURCE, steps=STEPS)
    worn = replace(inversion, TARGET, EVERYWHERE)
    assert torch.equal(worn.source_latent, inversion.clean)
    assert deviation(worn.latents, plain.latents) > 1e-3


@each
def test_the_model_is_bit_for_bit_as_before_after_an_edit_and_after_an_error(
    inverted: Callable[..., Inversion], name: str
) -> None:
    inversion = inverted(name)
    network = inversion.model.denoiser
    processors, before = processors_of(network), reconstruct(inversion, guidance=3.0)
    weights = {key: value.clone() for key, value in network.state_dict().items()}
    replace(inversion, TARGET, PRESETS["masactrl"])

    def stop() -> None:
        raise RuntimeError

    with pytest.raises(RuntimeError):
        replace(inversion, TARGET, progress=stop)
    assert all(processors_of(network)[key] is value for key, value in processors.items())
    assert not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(value, weights[key]) for key, value in network.state_dict().items())
    assert torch.equal(reconstruct(inversion, guidance=3.0), before)


@every
def test_what_an_edit_costs(inverted: Callable[..., Inversion], name: str) -> None:
    """One row for the source and two for each target, or one where the network is told the guidance."""
    inversion = inverted(name, steps=5)
    edited = replace(inversion, [TARGET, OTHER], ReplaceSettings(cross=0.6, self_attention=0.0, blend=()))
    each = 1 if name in TOLD else 2
    assert inversion.nfe == 5
    assert edited.nfe == 3 * (1 + 2 * each) + 2 * 2 * each


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name", [*TRANSFORMERS[:2], *(pytest.param("pixart", marks=pytest.mark.slow), *SLOWLY)]
)
def test_every_inversion_is_edited_or_refused(family: Open, name: str, method: Method) -> None:
    """The exact ones lead back, the others' source row arrives where their replay does."""
    model = family(name)
    if method == "null-text" and name in TOLD:
        with pytest.raises(UserError, match="no prediction without a prompt"):
            invert(model, photo(), SOURCE, method=method, steps=2)
        return
    steps = 3 if method == "reversible" else 2
    inversion = invert(
        model,
        photo(),
        SOURCE,
        method=method,
        steps=steps,
        **select_settings(method, guidance=3.0, iterations=1),
    )
    edited = replace(inversion, TARGET, ReplaceSettings(guidance=3.0, blend=()))
    if inversion.overwrites:
        assert edited.trajectory is not None
        assert torch.equal(edited.trajectory[:, 0], inversion.states[inversion.start(1.0) :])
    else:
        assert deviation(edited.source_latent, reconstruct(inversion, guidance=3.0)) < 1e-4
    if method in ("edit-friendly", "reversible"):
        assert deviation(reconstruct(inversion).float(), inversion.clean) < 1e-4


@transformers
def test_a_whole_edit_of_a_transformer_materialises_no_attention_matrix(family: Open, name: str) -> None:
    inversion = invert(family(name), photo(160, 96), SOURCE, steps=2)
    replace(inversion, TARGET)  # prompts are encoded before the count begins
    with Found(tokenize_prompt(inversion.model.text_encoder.segments, SOURCE).length) as counted:
        replace(inversion, TARGET, ReplaceSettings(weights={"dog": 2.0}, heatmaps=("snow",)))
    assert counted.found == []


@transformers
def test_controls_that_a_transformer_has_and_one_that_it_has_not(
    inverted: Callable[..., Inversion], name: str
) -> None:
    inversion = inverted(name, steps=5)
    plain = replace(inversion, "red", ReplaceSettings(cross=0.0, self_attention=0.0, blend=()))
    assert deviation(replace(inversion, "red", PRESETS["masactrl"]).latents, plain.latents) > 1e-6
    with pytest.raises(UserError, match="plug-and-play takes the features of a UNet"):
        replace(inversion, "red", PRESETS["plug-and-play"])


@each
def test_a_word_s_place_is_found_and_only_it_is_filled(inverted: Callable[..., Inversion], name: str) -> None:
    inversion = inverted(name, steps=5)
    places, asked = locate_word(inversion, "cat", threshold=0.6)
    assert asked > 0 and 0 < places.sum() < places.numel()
    kept = remove(inversion, "cat", threshold=0.6)
    assert kept.masks is not None and torch.equal(kept.masks[0], places)
    outside = F.adaptive_max_pool2d(places[None, None], inversion.clean.shape[-2:])[0, 0] == 0
    assert torch.equal(kept.latents[0][:, outside], inversion.clean[:, outside])
    assert deviation(kept.latents[0][:, ~outside], inversion.clean[:, ~outside]) > 1e-3


@each
def test_ways_without_attention_keep_what_lies_outside_the_mask(family: Open, name: str) -> None:
    model = family(name)
    options: dict[str, Any] = {"mask": left_half(), "steps": STEPS}
    drawn = [
        sdedit(model, photo(), TARGET, strength=0.7, **options),
        flow_edit(model, photo(), SOURCE, [TARGET], strength=0.7, guidance=4.0, **options),
    ]
    for one in drawn:
        assert torch.equal(one.latents[0][..., 4:], one.clean[..., 4:])
        assert deviation(one.latents[0][..., :4], one.clean[..., :4]) > 1e-4
    same = flow_edit(model, photo(), SOURCE, [SOURCE], guidance=1.0, steps=STEPS)
    assert torch.equal(same.latents[0], same.clean), "a target that says the same moves nothing"


@pytest.mark.parametrize(
    "name",
    [
        *TOLD[:2],
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("flux2-klein-distilled", "flux2-dev")),
    ],
)
def test_a_negative_prompt_that_nobody_would_hear_is_refused(
    family: Open, inverted: Callable[..., Inversion], name: str
) -> None:
    inversion = inverted(name)
    calls: list[Callable[[], object]] = [
        lambda: replace(inversion, TARGET, ReplaceSettings(negative="red")),
        lambda: remove(inversion, "cat", negative="red"),
        lambda: sdedit(family(name), photo(), TARGET, negative="red"),
    ]
    for call in calls:
        with pytest.raises(UserError, match="Leave --negative out"):
            call()


# Words of several tokenizers --------------------------------------------------------------------------------


CLIP, T5 = TextSegment(tiny_tokenizer(), 77), TextSegment(tiny_t5_tokenizer(), 40)


def test_punctuation_stands_apart_where_the_tokenizer_cuts_at_spaces_alone() -> None:
    for text in ("A hat, in  the dog's SNOW!!", " a (red) cat. "):
        read = [[word.text for word in tokenize_prompt([one], text).words] for one in (CLIP, T5)]
        assert read[0] == read[1]


def test_a_word_has_its_tokens_of_every_tokenizer_and_padding_stays_padding() -> None:
    read = tokenize_prompt([CLIP, T5, TextSegment(None, 5)], "a cat in the hat")
    assert read.length == 122
    assert [word.positions for word in read.words[:2]] == [(1, 77), (2, 78)]
    assert read.words[4].positions == (5, 6, 7, 81, 82, 83, 84)
    positions = [position for word in read.words for position in word.positions]
    assert len(set(positions)) == len(positions)
    assert [(s.first, s.words, s.end, s.last) for s in read.sections] == [
        (0, 1, 8, 77), (77, 77, 85, 117), (117, 122, 122, 122)
    ]  # fmt: skip
    same = align(read, read)
    assert torch.equal(same.mapping, torch.eye(122))


def test_each_tokenizer_s_tokens_take_attention_from_their_own_kind() -> None:
    source, target = (
        tokenize_prompt([CLIP, T5], text) for text in ("a cat in the snow", "red hat in the snow")
    )
    mapping = align(source, target).mapping
    assert not mapping[:77, 77:].any() and not mapping[77:, :77].any()
    hat = target.words[1].positions
    assert mapping[2, list(hat[:3])].tolist() == pytest.approx([1 / 3] * 3)
    assert mapping[78, list(hat[3:])].tolist() == pytest.approx([1 / 4] * 4)
    snow = [prompt.words[-1].positions for prompt in (source, target)]
    assert all(mapping[old, new] == 1 for old, new in zip(*snow, strict=True))
    ends = [[section.end for section in prompt.sections] for prompt in (source, target)]
    assert all(mapping[old, new] == 1 for old, new in zip(*ends, strict=True))


def test_the_first_word_that_was_added_is_nobody_s_where_no_token_begins_a_prompt() -> None:
    added = align(*(tokenize_prompt([T5], text) for text in ("cat in the snow", "red cat in the snow")))
    assert added.from_source[0] == 0 and added.mapping[0, 1] == 1


def test_what_one_tokenizer_cut_off_is_still_a_word_of_another() -> None:
    text = "a cat in the snow " * 3
    read = tokenize_prompt([TextSegment(tiny_tokenizer(), 8), T5], text)
    assert [word.text for word in read.words] == text.split()
    assert read.words[0].positions == (1, 8) and read.words[-1].positions == (22,)


# By the commands --------------------------------------------------------------------------------------------


@pytest.fixture
def edit(
    family_folder: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Runs `edit` with a family's folder, in an empty one with a picture and a mask; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    photo().save("photo.png")
    photo(seed=2).save("other.png")
    left_half().save("mask.png")

    def call(name: str, *arguments: str) -> int:
        quick = (
            "--model",
            str(family_folder(name)),
            "--precision",
            "fp32",
            "--device",
            "cpu",
            *(() if "--inversion" in arguments else ("--steps", "2")),
        )
        monkeypatch.setattr(sys, "argv", ["edit", *arguments, *(() if arguments[0] == "replay" else quick)])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return call


def record(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "run.json").read_text())
    return found


@pytest.mark.parametrize(
    "name",
    ["flux-dev", *(pytest.param(name, marks=pytest.mark.slow) for name in ("xl", "sd3", "pixart")), *SLOWLY],
)
def test_every_command_works_on_every_family(
    edit: Callable[..., int], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit(name, "invert", "photo.png", "--prompt", SOURCE, "--check") == 0, capsys.readouterr().err
    file = ("--inversion", "photo.safetensors")
    commands = {
        "ir": ("invert-and-replace", *file, "--target", TARGET, "--target", OTHER, "--heatmap", "snow",
               "--trajectory", "--reweight", "dog=2"),
        "mc": ("invert-and-replace", *file, "--target", TARGET, "--control", "masactrl", "--mask", "mask.png"),
        "sd": ("sdedit", "photo.png", "--prompt", "a dog", "--strength", "0.5", "--mask", "mask.png"),
        "fe": ("flow-edit", "photo.png", "--source", SOURCE, "--target", TARGET),
        "rm": ("remove", *file, "--remove", "cat"),
        "ld": ("compose", *file, "--toward", "a red cat=2"),
        "bt": ("interpolate", "photo.png", "other.png", "--prompt", SOURCE, "--prompt", TARGET, "--count", "3"),
    }  # fmt: skip
    for out, command in commands.items():
        assert edit(name, *command, "--out", out) == 0, capsys.readouterr().err
        assert {"run.json", "report.html", "sheet.png"} <= {path.name for path in Path(out).iterdir()}
    for out in ("ir", "mc"):
        said = record(out)
        assert said["reconstruction_psnr_db"] == said["autoencoder_psnr_db"], "the source's row is exact"
    assert Path("ir/heatmap_snow.png").exists() and Path("ir/mask_0.png").exists()
    source, changed = (Image.open(f"mc/{one}.png") for one in ("reconstruction", "edit_0"))
    assert source.tobytes() != changed.tobytes()
    assert edit(name, "replay", "ir", "--out", "again") == 0
    assert Image.open("ir/edit_1.png").tobytes() == Image.open("again/edit_1.png").tobytes()


def test_what_a_family_cannot_do_is_answered_before_the_picture_is_inverted(
    edit: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--source", SOURCE, "--target", TARGET)
    for name, wish, complaint in (
        ("sd3", ("--control", "plug-and-play"), "features of a UNet"),
        ("flux-dev", ("--negative", "red"), "Leave --negative out"),
        ("flux-dev", ("--method", "null-text"), "no prediction without a prompt"),
    ):
        assert edit(name, "invert-and-replace", "photo.png", *words, *wish) == 2
        assert complaint in capsys.readouterr().err
    assert not Path("runs").exists()
