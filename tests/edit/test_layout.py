"""Edits under control maps: the source under its own, the targets under theirs, in every command; attention apart."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from diffusers.pipelines.controlnet import pipeline_controlnet_img2img
from PIL import Image, ImageDraw
from typer.testing import CliRunner

from backbone.cli.conditions import ControlOptions, RequestedControl, parse_map, say_scales
from backbone.diffusion.noise import generator
from backbone.io.console import UserError, printed_once
from backbone.io.files import read_tensors, write_json, write_tensors
from backbone.io.run_folder import CONDITION_FILE
from backbone.media.control.maps import as_hints, compute_map
from backbone.models.cache import encode_prompts_cached
from backbone.models.control import gather_controls
from backbone.models.model import Backbone
from edit.attention.control import AttentionControl
from edit.attention.install import control_attention
from edit.cli import app
from edit.inversion.inversion import METHODS, Inversion, invert, read_inversion, reconstruct, select_settings
from edit.layout import NO_LAYOUT, SOURCE, TARGET, Layout, RequestedLayout, fill_outlines, open_layout
from edit.masks import compute_difference_maps
from edit.methods.compose import compose
from edit.methods.flow_edit import flow_edit
from edit.methods.instruct import instruct
from edit.methods.prompt_to_prompt.replace import replace as replace_words
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.methods.remove import remove
from edit.methods.sdedit import sdedit
from edit.result import Result
from edit.run.open import merge_layouts
from tests import tiny
from tests.backbone.media.control.test_maps import ring
from tests.backbone.test_control import adapter, controlnet
from tests.backbone.test_control_files import union_net

PROMPT, OTHER = "a cat in the snow", "a dog in the snow"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with its own network for edges and sketches, a ControlNet, an image, and a map."""
    place = tmp_path_factory.mktemp("layout")
    model = Backbone.open(str(tiny.tiny_pipeline(place / "model")), device="cpu", precision="fp32")
    own = place / "model" / "control" / "all"
    adapter(own / "t2i_adapter", 0)
    write_json(own / CONDITION_FILE, {"kinds": ["edges", "sketch"]})
    controlnet(model.denoiser, place / "controlnet", 2)
    scene = ring(ink=(200, 30, 30), paper=(90, 180, 90), width=6)
    scene.save(place / "scene.png")
    moved = Image.new("RGB", (64, 64))
    ImageDraw.Draw(moved).ellipse([4, 4, 24, 24], outline="white", width=2)
    moved.save(place / "moved.png")
    return place


@pytest.fixture(scope="module")
def model(place: Path) -> Backbone:
    return Backbone.open(str(place / "model"), device="cpu", precision="fp32")


def asked(
    place: Path, *targets: str, source: tuple[str, ...] = (), net: str = "", scale: float | None = None
) -> RequestedLayout:
    network = str(place / net) if net else ""
    return RequestedLayout(
        *(
            tuple(RequestedControl(parse_map(one), network, scale) for one in said)
            for said in (targets, source)
        )
    )


def opened(model: Backbone, place: Path, *targets: str, **more: Any) -> Layout:
    return open_layout(model, place / "scene.png", asked(place, *targets, **more))


def test_a_map_from_the_source_holds_for_both_and_a_drawn_one_for_the_targets(
    model: Backbone, place: Path
) -> None:
    layout = opened(
        model, place, "edges=auto", f"sketch={place}/moved.png", source=(f"sketch={place}/moved.png",)
    )
    assert layout.sides == ((True, True), (False, True), (True, False))
    text = encode_prompts_cached(model, [PROMPT, OTHER, OTHER])
    under = layout.attach(text, model.schedule(4), [SOURCE, TARGET, TARGET], unprompted=[2])
    assert [control.scale.tolist() for control in under.controls] == [[1, 1, 1], [0, 1, 1], [1, 0, 0]]
    assert NO_LAYOUT.attach(text, model.schedule(4), [0, 1, 1]) is text


def test_scales_add_up_on_each_side_for_itself(
    model: Backbone, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = f"sketch={place}/moved.png"
    opened(model, place, moved, source=(moved,))  # one acts on the source, and one on the targets
    assert "add up" not in capsys.readouterr().err
    opened(model, place, "edges=auto", source=(moved,))  # both act on the source
    assert "scales add up to 2;" in capsys.readouterr().err


def test_a_condition_of_scale_zero_is_said_to_have_no_effect(capsys: pytest.CaptureFixture[str]) -> None:
    say_scales([RequestedControl(parse_map("edges=a.png"), scale=0.0)])
    assert capsys.readouterr().err == "At --condition-scale 0 edges=a.png has no effect.\n"


def test_each_target_s_map_from_the_source_is_blank_in_a_place_of_its_own(
    model: Backbone, place: Path
) -> None:
    layout = opened(model, place, "edges=auto", f"sketch={place}/moved.png")
    text = encode_prompts_cached(model, [PROMPT, OTHER, OTHER])
    size = model.latent_shape[-2:]
    under = layout.attach_with_blank(text, model.schedule(4), [torch.zeros(size), torch.ones(size)])
    usual = layout.attach(text, model.schedule(4), [SOURCE, TARGET, TARGET])
    empty = layout.blank(torch.ones(size)).attach(text, model.schedule(4), [SOURCE, TARGET, TARGET])
    level = model.schedule(4)[0]
    noisy = torch.randn(3, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    said, as_usual, blank = (model.predictor(one)(noisy, level).clean for one in (under, usual, empty))
    torch.testing.assert_close(said[:2], as_usual[:2], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(said[2], blank[2], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(said[2], as_usual[2], atol=1e-4)


EXACT = ("edit-friendly", "reversible")  # the others miss by more on a random network


@pytest.mark.parametrize(
    "method", [*EXACT, *(pytest.param(one, marks=pytest.mark.slow) for one in METHODS[:4])]
)
def test_every_inversion_is_made_under_its_map(model: Backbone, place: Path, method: Any) -> None:
    """Its trajectory is another one than without, and what retraces it exactly does so under the map alone."""
    layout = opened(model, place, "edges=auto", net="controlnet")
    how: dict[str, Any] = {"method": method, **select_settings(method, steps=4, iterations=1)}
    plain, under = (
        invert(model, place / "scene.png", PROMPT, layout=one, **how) for one in (NO_LAYOUT, layout)
    )
    if method != "edit-friendly":  # whose states are drawn, not walked
        assert not torch.allclose(plain.states[0], under.states[0], atol=1e-3)
    if method in EXACT:
        assert float((reconstruct(under) - under.clean).abs().max()) < 1e-3
        without = reconstruct(replace(under, layout=NO_LAYOUT))
        assert float((without - under.clean).abs().max()) > 0.01


def test_an_edit_to_the_same_words_under_the_source_s_map_changes_nothing(
    model: Backbone, place: Path
) -> None:
    layout = opened(model, place, "edges=auto", net="controlnet")
    inversion = invert(model, place / "scene.png", PROMPT, method="edit-friendly", steps=4, layout=layout)
    result = replace_words(inversion, PROMPT, ReplaceSettings(guidance=1.0, blend=()))
    torch.testing.assert_close(result.latents[0], inversion.clean, rtol=0, atol=1e-4)
    moved = flow_edit(model, place / "scene.png", PROMPT, PROMPT, steps=4, guidance=1.0, layout=layout)
    assert torch.equal(moved.latents[0], moved.clean)
    target = opened(model, place, f"sketch={place}/moved.png")
    assert not torch.allclose(
        flow_edit(model, place / "scene.png", PROMPT, PROMPT, steps=4, guidance=1.0, layout=target).latents[
            0
        ],
        moved.clean,
        atol=1e-3,
    )


def test_attention_control_and_a_controlnet_leave_each_other_alone(model: Backbone, place: Path) -> None:
    """Controlled attention under a map is as with the map's residuals alone, and the net's own layers are its own."""
    layout = opened(model, place, "edges=auto", net="controlnet")
    net: Any = layout.controls[0].network.module
    before = dict(net.attn_processors)
    calls: list[int] = []
    handle = net.register_forward_hook(lambda *_: calls.append(1))
    text = layout.attach(encode_prompts_cached(model, [PROMPT, OTHER]), model.schedule(4), [SOURCE, TARGET])
    attention = model.family.attention(model.denoiser, text)
    noisy = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    level = model.schedule(4)[1]
    plain = model.predictor(text)(noisy, level)
    with control_attention(model.denoiser, AttentionControl(1), attention):
        within = model.predictor(text)(noisy, level)
        assert all(net.attn_processors[name] is layer for name, layer in before.items())
    after = model.predictor(text)(noisy, level)
    handle.remove()
    torch.testing.assert_close(within.noise, plain.noise, rtol=0, atol=1e-5)  # nothing is replaced
    assert torch.equal(after.noise, plain.noise) and len(calls) == 3


def test_the_place_is_asked_under_the_same_maps(model: Backbone, place: Path) -> None:
    """Equal words under one map differ nowhere; the map that moved is part of the place."""
    layout = opened(model, place, "edges=auto", net="controlnet")
    inversion = invert(model, place / "scene.png", PROMPT, steps=4, layout=layout)
    same, nfe = compute_difference_maps(inversion, [(PROMPT, PROMPT)])
    assert float(same.abs().max()) < 1e-3 and nfe > 0
    other = replace(inversion, layout=opened(model, place, f"sketch={place}/moved.png"))
    differs, _ = compute_difference_maps(other, [(PROMPT, PROMPT)])
    assert float(differs.max()) == pytest.approx(1.0)
    moved = other.layout.find_moved((8, 8))
    assert moved is not None and bool(moved[:4, :4].all()) and not bool(moved[5:, 5:].any())
    assert layout.find_moved((8, 8)) is None


def test_a_closed_outline_encloses_its_place_and_an_open_one_does_not() -> None:
    box = torch.zeros(9, 9, dtype=torch.bool)
    box[2:7, 2:7] = True
    ring_ = box.clone()
    ring_[3:6, 3:6] = False
    assert torch.equal(fill_outlines(ring_), box.float())
    ring_[2, 4] = False
    assert fill_outlines(ring_)[4, 4] == 0


def test_an_inversion_s_file_keeps_the_maps_that_it_was_made_under(
    model: Backbone, place: Path, tmp_path: Path
) -> None:
    layout = opened(model, place, "edges=auto", f"sketch={place}/moved.png")
    inversion = invert(model, place / "scene.png", PROMPT, steps=4, layout=layout)
    inversion.write(tmp_path / "scene.safetensors")
    again = read_inversion(tmp_path / "scene.safetensors", model)
    assert [one.facts["kind"] for one in again.layout.conditions] == ["edges"]
    assert again.layout.sides == ((True, True),)
    torch.testing.assert_close(reconstruct(again), reconstruct(inversion), rtol=0, atol=1e-6)


def test_a_map_that_acts_in_none_of_the_steps_that_are_taken_is_refused(model: Backbone, place: Path) -> None:
    early = RequestedControl(parse_map("edges=auto"), stop=0.4)
    layout = open_layout(model, place / "scene.png", RequestedLayout((early,)))
    how: dict[str, Any] = {"steps": 4, "layout": layout}

    for command in (
        partial(sdedit, model, place / "scene.png", OTHER),
        partial(flow_edit, model, place / "scene.png", PROMPT, OTHER),
    ):
        with pytest.raises(UserError, match=r"None of 2 steps lies between 0 and 0\.4"):
            command(strength=0.5, **how)
        command(strength=0.75, **how)
        command(strength=0.0, **how)


def test_a_map_that_acts_in_none_of_the_steps_that_an_inversion_s_edit_samples_is_said(
    model: Backbone, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    early = RequestedControl(parse_map(f"sketch={place}/moved.png"), stop=0.4)
    layout = open_layout(model, place / "scene.png", RequestedLayout((early,)))
    plain, under = (
        invert(model, place / "scene.png", PROMPT, steps=4, layout=one) for one in (NO_LAYOUT, layout)
    )
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 20, 20))

    def reworded(inversion: Inversion, *, strength: float) -> Result:
        return replace_words(inversion, OTHER, ReplaceSettings(strength=strength, blend=()))

    commands: tuple[Callable[..., Result], ...] = (
        partial(compose, toward=[(OTHER, 2.0)]),
        partial(remove, mask=mask),
        reworded,
    )
    for command in commands:
        for strength, acts in ((0.5, False), (1.0, True), (0.0, True)):
            printed_once.clear()
            capsys.readouterr()
            same = torch.equal(*(command(one, strength=strength).latents for one in (plain, under)))
            said = (
                "sketch has no effect from 0 to 0.4 of the 4 steps: only the last 2"
                in capsys.readouterr().err
            )
            assert (same, said) == (not acts or strength == 0, not acts)


@pytest.mark.parametrize(
    ("strength", "start", "stop", "guess"),
    [(0.6, 0.0, 0.5, False), (0.5, 0.3, 0.8, False), (0.6, 0.0, 0.7, True)],
)
def test_a_share_under_sdedit_is_one_of_the_steps_taken_as_in_diffusers(
    model: Backbone,
    place: Path,
    monkeypatch: pytest.MonkeyPatch,
    strength: float,
    start: float,
    stop: float,
    guess: bool,
) -> None:
    how: dict[str, Any] = {"start": start, "stop": stop, "guess": guess, "scale": 0.9}
    requested = RequestedControl(parse_map(f"sketch={place}/moved.png"), str(place / "controlnet"), **how)
    layout = open_layout(model, place / "scene.png", RequestedLayout((requested,)))
    ours = sdedit(model, place / "scene.png", OTHER, strength=strength, steps=10, guidance=3.0, layout=layout)

    # diffusers' own pipeline from the same latent, noise and map
    noise = torch.randn(model.latent_shape, generator=generator(0, 0, "sdedit"))[None]
    monkeypatch.setattr(pipeline_controlnet_img2img, "randn_tensor", lambda *_, **__: noise)
    pipeline = pipeline_controlnet_img2img.StableDiffusionControlNetImg2ImgPipeline.from_pretrained(
        model.location.source, controlnet=ControlNetModel.from_pretrained(place / "controlnet")
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        OTHER,
        image=ours.encoded.latent,
        control_image=as_hints(layout.conditions[0].map),
        strength=strength,
        num_inference_steps=10,
        guidance_scale=3.0,
        control_guidance_start=start,
        control_guidance_end=stop,
        controlnet_conditioning_scale=0.9,
        guess_mode=guess,
        output_type="latent",
    ).images
    torch.testing.assert_close(ours.latents, theirs, rtol=0, atol=1e-4)


def test_sdedit_draws_under_its_targets_map(model: Backbone, place: Path) -> None:
    layout = opened(model, place, f"sketch={place}/moved.png")
    how: dict[str, Any] = {"steps": 4, "guidance": 2.0}
    plain, under = (
        sdedit(model, place / "scene.png", OTHER, layout=one, **how) for one in (NO_LAYOUT, layout)
    )
    assert plain.nfe == under.nfe and not torch.allclose(plain.latents, under.latents, atol=1e-3)


def test_an_instruction_is_followed_under_a_map_of_a_net_that_reads_no_image(
    place: Path, tmp_path: Path
) -> None:
    """The net was made for the plain model, whose UNet has half of the input's channels."""
    folder = str(tiny.tiny_instruct_pix2pix(tmp_path / "model"))
    told = Backbone.open(folder, device="cpu", precision="fp32", task="edit")
    layout = opened(told, place, "edges=auto", net="controlnet")
    how: dict[str, Any] = {"keep": "none", "steps": 2}
    plain, under = (
        instruct(told, place / "scene.png", ["make it red"], layout=one, **how) for one in (NO_LAYOUT, layout)
    )
    assert not torch.allclose(plain.latents, under.latents, atol=1e-3)


def test_kinds_of_a_union_net_are_fused_on_each_side_as_on_that_side_alone(
    place: Path, tmp_path: Path
) -> None:
    """Edges hold for both, and a sketch for the targets: their rows are those that drawing under both has."""
    model = Backbone.open(
        str(tiny.tiny_stable_diffusion_xl(tmp_path / "model")), device="cpu", precision="fp32"
    )
    union_net(model, place / "union")
    layout = opened(model, place, "edges=auto", f"sketch={place}/moved.png", net="union")
    text, schedule = encode_prompts_cached(model, [PROMPT, OTHER]), model.schedule(4)
    under = layout.attach(text, schedule, [SOURCE, TARGET])
    assert [control.scale.tolist() for control in under.controls] == [[1, 0], [0, 1]]

    noisy = torch.randn((2, *model.latent_shape[-3:]), generator=generator(0))
    both = model.predictor(under)(noisy, schedule[1]).noise
    edges, sketch = layout.conditions
    for row, conditions in enumerate([[edges], [edges, sketch]]):
        controls = tuple(control.during(schedule) for control in gather_controls(conditions))
        alone = model.predictor(replace(text[row : row + 1], controls=controls))
        torch.testing.assert_close(both[row : row + 1], alone(noisy[row : row + 1], schedule[1]).noise)


def test_each_of_several_instructions_is_followed_under_the_map_of_the_image_that_it_edits(
    place: Path, tmp_path: Path
) -> None:
    """The second one is the edit of the first one's result, by itself; a map from a file stays."""
    folder = str(tiny.tiny_instruct_pix2pix(tmp_path / "model"))
    told = Backbone.open(folder, device="cpu", precision="fp32", task="edit")
    how: dict[str, Any] = {"keep": "none", "steps": 2}
    words = ["make it red", "make it blue"]
    layout = opened(told, place, "edges=auto", f"sketch={place}/moved.png", net="controlnet")
    both = instruct(told, place / "scene.png", words, layout=layout, **how)
    first = both.images[0]
    second = layout.in_image(first)
    assert second.conditions[0].map.tobytes() == compute_map("edges", first).tobytes()
    assert second.conditions[0].map.tobytes() != layout.conditions[0].map.tobytes()
    assert second.conditions[1] is layout.conditions[1]

    # Under the first image's map, as if it were from a file, the second is another
    kept = instruct(told, place / "scene.png", words, layout=replace_maps(layout, "given.png"), **how)
    assert torch.equal(both.latents[0], kept.latents[0])
    assert not torch.equal(both.latents[1], kept.latents[1])


def replace_maps(layout: Layout, name: str) -> Layout:
    """A layout whose maps are said to be from files."""
    return Layout(
        tuple(replace(one, facts={**one.facts, "map": name}) for one in layout.conditions), layout.sides
    )


# The commands -----------------------------------------------------------------------------------------------


def invoked(place: Path, name: str, *arguments: object) -> Any:
    model = ("--model", place / "model", "--precision", "fp32", "--device", "cpu", "--steps", 4)
    words = (name, *arguments, *model)
    return CliRunner().invoke(app, [str(one) for one in words])


COMMANDS: dict[str, tuple[str, ...]] = {
    "invert-and-replace": ("{}/scene.png", "--source", PROMPT, "--target", OTHER, "--no-metrics"),
    "sdedit": ("{}/scene.png", "--prompt", OTHER, "--no-metrics"),
    "flow-edit": ("{}/scene.png", "--source", PROMPT, "--target", OTHER, "--no-metrics"),
    "remove": ("{}/scene.png", "--source", PROMPT, "--mask", "{}/mask.png", "--no-metrics"),
    "compose": ("{}/scene.png", "--source", PROMPT, "--toward", "red=2", "--no-metrics"),
    "interpolate": ("{}/scene.png", "{}/scene.png", "--prompts", PROMPT, "--prompts", OTHER, "--count", "3"),
}


QUICK = ("sdedit", "remove")


@pytest.mark.parametrize(
    "name", [pytest.param(one, marks=[pytest.mark.slow] * (one not in QUICK)) for one in COMMANDS]
)
def test_every_command_edits_under_maps_and_records_them(name: str, place: Path, tmp_path: Path) -> None:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle([16, 16, 40, 40], fill=255)
    mask.save(place / "mask.png")
    words = [one.replace("{}", str(place)) for one in COMMANDS[name]]
    under = ("--condition", "edges=auto", "--controlnet", place / "controlnet", "--condition-stop", "0.8")
    for out, more in (("plain", ()), ("under", under)):
        done = invoked(place, name, *words, *more, "--out", tmp_path / out)
        assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads((tmp_path / "under" / "run.json").read_text())
    first = record["conditions"][0]
    assert (first["kind"], first["stop"], first["map"]) == ("edges", 0.8, "auto")
    assert (tmp_path / "under" / "condition_0_edges.png").exists()
    middle = "edit_1.png" if name == "interpolate" else "edit_0.png"
    images = [np.array(Image.open(tmp_path / out / middle)) for out in ("plain", "under")]
    assert not np.array_equal(images[0], images[1])
    if name == "remove":  # the removed thing's own lines are not drawn again
        blank = np.array(Image.open(tmp_path / "under" / "condition_1_edges.png"))
        assert not blank[18:38, 18:38].any() and blank.any()
    if name == "sdedit":
        again = CliRunner().invoke(app, ["replay", str(tmp_path / "under"), "--out", str(tmp_path / "again")])
        assert again.exit_code == 0, again.output
        assert np.array_equal(np.array(Image.open(tmp_path / "again" / middle)), images[1])
        # an older record, of a network that acts on prompted rows alone by now, meant both
        write_json(place / "controlnet" / "condition.json", {"defaults": {"rows": "prompted"}})
        del record["settings"]["condition_rows"]
        write_json(tmp_path / "under" / "run.json", record)
        again = CliRunner().invoke(app, ["replay", str(tmp_path / "under"), "--out", str(tmp_path / "older")])
        (place / "controlnet" / "condition.json").unlink()
        assert again.exit_code == 0, again.output
        assert np.array_equal(np.array(Image.open(tmp_path / "older" / middle)), images[1])
        assert json.loads((tmp_path / "older" / "run.json").read_text())["conditions"][0]["rows"] == "both"


@pytest.mark.parametrize(
    ("name", "more", "idle"),
    [
        ("remove", (), True),  # its own guidance is 1
        ("remove", ("--guidance", "2"), False),
        ("sdedit", ("--guidance", "1"), True),
        ("sdedit", (), False),
        ("flow-edit", ("--guidance", "1"), True),
        ("flow-edit", ("--guidance", "1", "--source-guidance", "2"), False),
        ("invert-and-replace", ("--guidance", "1"), True),
        ("interpolate", (), True),
        ("compose", (), False),
    ],
)
def test_rows_of_guidance_that_there_is_none_of_are_said_to_have_no_effect(
    name: str, more: tuple[str, ...], idle: bool, place: Path, tmp_path: Path
) -> None:
    mask = Image.new("L", (64, 64))
    ImageDraw.Draw(mask).rectangle([16, 16, 40, 40], fill=255)
    mask.save(place / "mask.png")
    words = [one.replace("{}", str(place)) for one in COMMANDS[name]]
    under = (
        "--condition",
        "edges=auto",
        "--controlnet",
        place / "controlnet",
        "--condition-rows",
        "prompted",
    )
    printed_once.clear()
    done = invoked(place, name, *words, *more, *under, "--out", tmp_path / "out")
    assert done.exit_code == 0, done.output
    assert ("so --condition-rows has no effect" in done.stderr) is idle


def test_a_control_network_that_was_trained_anew_under_its_name_is_told(
    model: Backbone, place: Path, tmp_path: Path
) -> None:
    shutil.copytree(place / "controlnet", net := tmp_path / "net")
    layout = opened(model, place, "edges=auto", net=str(net))
    invert(model, place / "scene.png", PROMPT, steps=2, layout=layout).write(tmp_path / "i.safetensors")
    under = ("--condition", "edges=auto", "--controlnet", net)
    words = (place / "scene.png", "--prompt", OTHER, "--no-metrics")
    assert invoked(place, "sdedit", *words, *under, "--out", tmp_path / "e").exit_code == 0
    assert "weights" not in layout.conditions[0].brief()

    (weights,) = net.glob("*.safetensors")
    tensors, metadata = read_tensors(weights)
    write_tensors(weights, {name: value + 1 for name, value in tensors.items()}, metadata)
    with pytest.raises(UserError, match=r"has other weights than when .*i\.safetensors was written"):
        read_inversion(tmp_path / "i.safetensors", model)
    again = CliRunner().invoke(app, ["replay", str(tmp_path / "e"), "--out", str(tmp_path / "again")])
    assert isinstance(again.exception, UserError) and not (tmp_path / "again").exists()
    assert "has other weights than when" in str(again.exception)


@pytest.mark.parametrize("target", ["edges=auto", "edges={}/moved.png"])
def test_a_replay_is_controlled_as_strongly_as_the_edit_was(place: Path, tmp_path: Path, target: str) -> None:
    shutil.copytree(place / "controlnet", net := tmp_path / "net")
    write_json(net / CONDITION_FILE, {"defaults": {"scale": 2.0, "stop": 0.9}})
    under = ("--condition", target.format(place), "--controlnet", net)
    words = (place / "scene.png", "--prompt", OTHER, "--no-metrics")
    assert invoked(place, "sdedit", *words, *under, "--out", tmp_path / "e").exit_code == 0
    write_json(net / CONDITION_FILE, {"defaults": {"scale": 0.5, "stop": 1.0}})
    again = CliRunner().invoke(app, ["replay", str(tmp_path / "e"), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, again.output
    first, second = (Image.open(tmp_path / name / "edit_0.png").tobytes() for name in ("e", "again"))
    assert first == second


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--condition", "depth=auto", "--controlnet", "{}/controlnet"), "found by another network"),
        (("--condition", "pose=auto"), "nothing reads pose maps"),
        (("--source-condition", "sketch={}/moved.png"), "has no effect"),
        (
            ("--condition", "edges=auto", "--source-condition", "sketch={}/moved.png"),
            "stands beside no --condition sketch",
        ),
        (("--condition", "sketch={}/scene.png"), "looks like a photograph"),
        (("--condition", "sketch={}/nowhere.png"), "does not exist"),
        (("--condition", "edges=auto", "--condition-scale", "nan"), "condition-scale"),
        (("--condition", "edges=auto", "--guess-mode"), "guess mode has no effect"),
    ],
    ids=str,
)
def test_a_mistake_is_one_sentence_and_writes_nothing(
    place: Path, tmp_path: Path, more: tuple[str, ...], words: str
) -> None:
    said = [one.replace("{}", str(place)) for one in (*COMMANDS["invert-and-replace"], *more)]
    done = invoked(place, "invert-and-replace", *said, "--out", tmp_path / "out")
    assert isinstance(done.exception, UserError) and words in str(done.exception), (
        done.output,
        done.exception,
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_inversion_without_a_map_has_none_to_find(place: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.safetensors"
    assert invoked(place, "invert", place / "scene.png", "--source", PROMPT, "--out", file).exit_code == 0
    edit = ("invert-and-replace", "--inversion", file, "--target", OTHER, "--no-metrics", "--condition")
    model = ("--model", str(place / "model"), "--precision", "fp32", "--device", "cpu")
    done = CliRunner().invoke(app, [str(one) for one in (*edit, "edges=auto", *model)])
    assert "was inverted without edges" in str(done.exception)
    out = ("--out", tmp_path / "out")
    done = CliRunner().invoke(app, [str(one) for one in (*edit, f"sketch={place}/moved.png", *model, *out)])
    assert done.exit_code == 0, (done.output, done.exception)
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert [one["of"] for one in record["conditions"]] == ["targets"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--condition-scale", "0.5"), None),
        (
            ("--condition-scale", "0.2"),
            "inverted under edges with --condition-scale 0.5, which holds for the edit",
        ),
        (
            ("--condition-stop", "0.4"),
            "with --condition-stop 1.0, which holds for the edit too, so 0.4 has no",
        ),
        (("--condition-rows", "prompted"), "with --condition-rows both, which holds"),
        (("--controlnet", "{}/controlnet"), "so --controlnet .*controlnet has no effect"),
    ],
)
def test_an_inversion_s_map_acts_in_the_edit_as_in_the_inversion_or_the_edit_is_refused(
    words: tuple[str, ...], said: str | None, place: Path, tmp_path: Path
) -> None:
    model = Backbone.open(str(place / "model"), device="cpu", precision="fp32")
    inversion = invert(
        model, place / "scene.png", PROMPT, steps=2, layout=opened(model, place, "edges=auto", scale=0.5)
    )
    options = ControlOptions(
        condition=("edges=auto",),
        controlnet=tuple(value.format(place) for flag, value in [words] if flag == "--controlnet"),
        condition_scale=tuple(float(value) for flag, value in [words] if flag == "--condition-scale"),
        condition_stop=tuple(float(value) for flag, value in [words] if flag == "--condition-stop"),
        condition_rows=next((value for flag, value in [words] if flag == "--condition-rows"), ""),
    )

    def merged() -> Layout:
        return merge_layouts(inversion, options.controls, lambda _: NO_LAYOUT, "inversion.safetensors")

    if said is None:
        assert len(merged().conditions) == 1
    else:
        with pytest.raises(UserError, match=said):
            merged()
