"""Clips edited by words: one inversion of all frames, the source's attention over frames and time."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffVideoToVideoPipeline
from PIL import Image, ImageColor
from torch import Tensor
from typer.testing import CliRunner

from backbone.cli.conditions import RequestedControl, parse_map
from backbone.diffusion.noise import add_noise
from backbone.evaluation.motion import TRACK
from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors
from backbone.io.run_folder import CONDITION_FILE
from backbone.media.clips import Film, encode_webp, read_film
from backbone.models.clips.frames import link_frames
from backbone.models.clips.motion import attach_motion, frames_as_rows
from backbone.models.model import Backbone
from backbone.models.sample import Frames, draw_initial_noise
from edit.attention.control import AttentionControl
from edit.attention.install import control_attention
from edit.cli import app
from edit.inversion.inversion import reconstruct
from edit.layout import NO_LAYOUT
from edit.masks import compute_difference_maps
from edit.methods.clip import (
    ClipEdit,
    ClipRedraw,
    close_over_time,
    edit_clip,
    invert_film,
    open_clip_layout,
    redraw_film,
)
from edit.run.run import replay
from tests.backbone.test_control import controlnet
from tests.tiny import tiny_motion_adapter

SOURCE = "a dog in the snow"


@pytest.fixture(scope="module")
def film() -> Film:
    """Four frames in which a square walks over noise."""
    noise = torch.randint(0, 255, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    frames = []
    for number in range(4):
        pixels = noise.clone()
        pixels[20:40, 10 * number : 10 * number + 20] = torch.tensor([200, 40, 40], dtype=torch.uint8)
        frames.append(Image.fromarray(pixels.numpy()))
    return Film(tuple(frames), 8.0, "walk.webp", "0")


@pytest.fixture(scope="module")
def moving(tiny_folder: Path) -> Backbone:
    """With an adapter, opened once; a test leaves it as it is."""
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    attach_motion(model.denoiser, tiny_motion_adapter())
    return model


@pytest.mark.slow
def test_video_to_video_is_diffusers_own(moving: Backbone, tiny_folder: Path, film: Film) -> None:
    pipeline = AnimateDiffVideoToVideoPipeline.from_pretrained(
        tiny_folder, motion_adapter=tiny_motion_adapter()
    )
    pipeline.set_progress_bar_config(disable=True)
    ours = redraw_film(moving, film, "a cat in the snow", ClipRedraw(strength=0.5, steps=6, guidance=3.0))
    noise = draw_initial_noise(moving, 0, 0, 0, frames=Frames(4))[None]
    noisy = add_noise(ours.encoded.latent, noise, moving.schedule(6)[3])
    theirs = pipeline(
        prompt="a cat in the snow", latents=noisy, strength=0.5, num_inference_steps=6,
        guidance_scale=3.0, output_type="latent",
    ).frames  # fmt: skip
    torch.testing.assert_close(ours.latents, theirs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("linked", ["by an adapter", "by attention"])
def test_an_inversion_of_all_frames_leads_back_and_an_edit_to_the_same_words_changes_nothing(
    linked: str, kept: Backbone, moving: Backbone, film: Film
) -> None:
    model = moving if linked == "by an adapter" else kept
    inversion = invert_film(model, film, SOURCE, method="edit-friendly", steps=4)
    assert inversion.states.shape == (5, 4, 4, 8, 8)
    if linked == "by an adapter":
        torch.testing.assert_close(reconstruct(inversion), inversion.clean, atol=1e-3, rtol=0)
    same = edit_clip(inversion, [SOURCE], ClipEdit(guidance=1.0, cross=1.0, self_attention=1.0, threshold=0))
    torch.testing.assert_close(same.latents[0], inversion.clean, atol=1e-3, rtol=0)


@pytest.mark.parametrize("method", ["null-text", "negative-prompt"])
@pytest.mark.parametrize("linked", ["by an adapter", pytest.param("by attention", marks=pytest.mark.slow)])
def test_a_sampled_source_is_guided_as_its_inversion_says(
    linked: str, method: str, kept: Backbone, moving: Backbone, film: Film
) -> None:
    model = moving if linked == "by an adapter" else kept
    made: dict[str, Any] = {"guidance": 3.0, "iterations": 5} if method == "null-text" else {}
    inversion = invert_film(model, film, SOURCE, method=method, steps=3, **made)
    assert (inversion.empties is not None) == (method == "null-text")
    asked = ClipEdit(cross=1.0, self_attention=1.0, threshold=0, guidance=None if made else 3.0)
    same = edit_clip(inversion, [SOURCE], asked).latents[0]
    if (
        method == "negative-prompt"
    ):  # guided by itself it is the conditional prediction, as the inversion's was
        unguided = edit_clip(inversion, [SOURCE], replace(asked, guidance=1.0)).latents[0]
        torch.testing.assert_close(same, unguided, atol=1e-4, rtol=0)
    else:
        plain = replace(inversion, empties=None)
        without = edit_clip(plain, [SOURCE], asked).latents[0]
        assert (same - inversion.clean).square().mean() < (without - inversion.clean).square().mean()
        with pytest.raises(UserError, match="was made for guidance 3, not 5"):
            edit_clip(inversion, [SOURCE], ClipEdit(guidance=5.0))


def test_outside_the_place_frames_are_the_sources_own_pixels(moving: Backbone, film: Film) -> None:
    inversion = invert_film(moving, film, SOURCE, steps=3)
    result = edit_clip(inversion, ["a cat in the snow", "a red dog in the snow"], ClipEdit(threshold=0.6))
    assert result.masks is not None and result.masks.shape == (2, 4, 8, 8)
    assert 0 < result.masks.mean() < 1 and len(result.films) == 2 and len(result.films[0]) == 4
    large = torch.nn.functional.interpolate(result.masks, (64, 64), mode="bilinear", align_corners=False)
    outside = (large == 0)[:, :, None].expand(-1, -1, 3, -1, -1)
    source = result.encoded.pixels[None].expand_as(result.pixels)
    assert outside.any() and torch.equal(result.pixels[outside], source[outside])
    assert (result.pixels != source).any()


def test_a_target_of_another_motion_changes_nothing_of_the_one_beside_it(
    moving: Backbone, film: Film
) -> None:
    inversion = invert_film(moving, film, SOURCE, steps=3)
    targets = ["a dog moving left in the snow", "a cat in the snow"]
    together = edit_clip(inversion, targets, ClipEdit(threshold=0.6))
    assert together.prompts == tuple(targets) and [one.target.text for one in together.alignments] == targets
    for n, target in enumerate(targets):
        alone = edit_clip(inversion, [target], ClipEdit(threshold=0.6))
        torch.testing.assert_close(together.latents[n], alone.latents[0], atol=1e-3, rtol=0)
        assert together.masks is not None and alone.masks is not None
        assert torch.equal(together.masks[n], alone.masks[0])
        assert together.nfe > alone.nfe


def predictions(model: Backbone, control: AttentionControl | None, clips: Tensor) -> Tensor:
    text = model.encode_prompts([SOURCE, "a cat in the snow"])
    predict, level = model.predictor(text), model.schedule(4)[1]
    if control is None:
        return predict(clips, level).noise
    with control_attention(model.denoiser, control):
        return predict(clips, level).noise


def test_frames_that_are_kept_are_the_source_s_and_the_others_move_otherwise(
    moving: Backbone, film: Film
) -> None:
    inversion = invert_film(moving, film, "a dog, moving right", steps=2)
    kept = edit_clip(inversion, ["a dog, moving left"], ClipEdit(threshold=0, keep_frames=(0, -1)))
    source = inversion.image
    assert torch.equal(kept.pixels[0, [0, 3]], source[[0, 3]]) and not torch.equal(
        kept.pixels[0, 1], source[1]
    )
    for numbers, said in (((4,), "has none of that number"), ((0, 1, 2, 3), "names every frame")):
        with pytest.raises(UserError, match=said):
            edit_clip(inversion, ["a dog, moving left"], ClipEdit(keep_frames=numbers))


def test_the_sources_attention_is_taken_frame_by_frame(kept: Backbone) -> None:
    """Without anything over time a clip's frames are pictures, so controlling both is the same."""
    clips = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    control = AttentionControl(1, clips=2, self_attention="layout")
    together = predictions(kept, control, clips)
    for frame in range(3):
        alone = predictions(kept, AttentionControl(1, self_attention="layout"), clips[:, :, frame])
        torch.testing.assert_close(together[:, :, frame], alone, atol=1e-5, rtol=0)
    assert (together - predictions(kept, None, clips)).abs().max() > 1e-4


def test_over_time_a_target_looks_where_the_source_looks(moving: Backbone) -> None:
    clips = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    plain = predictions(moving, None, clips)
    controlled = predictions(moving, AttentionControl(1, clips=2, temporal=True), clips)
    torch.testing.assert_close(controlled[0], plain[0], atol=1e-5, rtol=0)
    assert (controlled[1] - plain[1]).abs().max() > 1e-5
    same = torch.cat([clips[:1], clips[:1]])
    text = moving.encode_prompts([SOURCE] * 2)
    with control_attention(moving.denoiser, AttentionControl(1, clips=2, temporal=True)):
        rows = moving.predictor(text)(same, moving.schedule(4)[1]).noise
    torch.testing.assert_close(rows[0], rows[1], atol=1e-5, rtol=0)


def test_frames_linked_by_attention_see_the_first_and_the_one_before(kept: Backbone) -> None:
    clips = torch.randn(2, 4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    other = clips.clone()
    other[:, :, 2] = 0
    one, two = (
        predictions(kept, AttentionControl(0, clips=2, across_frames=True), x) for x in (clips, other)
    )
    changed = (one - two).abs().amax((0, 1, 3, 4)) > 1e-6
    assert changed.tolist() == [False, False, True, True]
    assert frames_as_rows(clips).shape[0] == 8


def test_frames_of_one_prompt_do_not_look_at_those_of_another(kept: Backbone, film: Film) -> None:
    """Else it would matter which of two prompts comes first."""
    inversion = invert_film(kept, film, SOURCE, steps=2)
    with link_frames(kept, 4):
        maps = [
            compute_difference_maps(inversion, [pair])[0] for pair in ((SOURCE, "a cat"), ("a cat", SOURCE))
        ]
    torch.testing.assert_close(*maps, atol=1e-5, rtol=0)


def test_a_place_counts_in_the_frames_around_it() -> None:
    place = torch.zeros(5, 2, 2)
    place[2, 0, 0] = 1
    assert close_over_time(place)[:, 0, 0].tolist() == [0, 1, 1, 1, 0]
    assert close_over_time(place, everywhere=True)[:, 0, 0].tolist() == [1] * 5
    assert close_over_time(place).sum() == 3


def test_a_clip_is_edited_under_the_maps_of_its_own_frames(
    kept: Backbone, film: Film, tmp_path: Path
) -> None:
    net = controlnet(kept.denoiser, tmp_path / "net", 0)
    found = RequestedControl(parse_map("edges=auto"), str(net))
    layout = open_clip_layout(kept, film, [found])
    (condition,) = layout.conditions
    assert len(condition.maps) == 4 and condition.maps[0] != condition.maps[3]
    assert layout.sides == ((True, True),)
    inversion = invert_film(kept, film, SOURCE, steps=2, layout=layout)
    assert not torch.equal(inversion.states[0], invert_film(kept, film, SOURCE, steps=2).states[0])
    result = edit_clip(inversion, ["a cat in the snow"], ClipEdit())
    assert result.facts["conditions"][0]["of"] == "both"
    off = open_clip_layout(kept, film, [replace(found, scale=0.0)])
    plain, under, none = (
        redraw_film(kept, film, "a cat", ClipRedraw(steps=2, guidance=3.0), layout=one).latents
        for one in (NO_LAYOUT, layout, off)
    )
    assert torch.equal(plain, none) and (plain - under).abs().max() > 1e-4


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["clip", *map(str, words)])


def test_the_command_writes_clips_that_play_and_says_how_to_repeat_it(
    tiny_folder: Path, film: Film, tmp_path: Path
) -> None:
    (tmp_path / "walk.webp").write_bytes(encode_webp(film.frames, film.fps))
    usual = ("--model", tiny_folder, "--device", "cpu", "--precision", "fp32", "--steps", "2")
    out = tmp_path / "out"
    answer = call(
        tmp_path / "walk.webp", "--source", SOURCE, "--target", "a cat in the snow", *usual, "--out", out
    )
    assert answer.exit_code == 0, answer.exception
    record = read_json(out / "run.json")
    assert (out / "report.html").read_text().count("data:image/webp;base64,") == 2
    assert len(read_film(out / "edit_0.webp").frames) == 4 and (out / "edit_0" / "0003.png").is_file()
    edit = record["edits"][0]
    assert {"changed_share", "psnr_db", "flicker", "source_flicker", "along", "source_along"} <= set(edit)
    assert 0 <= edit["track_px"] < 128
    page = Image.open(out / "sheet.png").convert("RGB")
    assert ImageColor.getrgb(TRACK) in {
        colour for _, colour in page.getcolors(1 << 24) or ()
    }  # the way it goes
    program, _, *again = shlex.split(record["command"])
    assert program == "edit" and "--source" in again
    with pytest.raises(UserError, match="Repeat it with: edit clip"):
        replay(out / "run.json", out=None)
    assert call(*again, "--out", tmp_path / "again").exit_code == 0
    assert (out / "edit_0" / "0002.png").read_bytes() == (tmp_path / "again/edit_0/0002.png").read_bytes()
    assert (
        call(tmp_path / "walk.webp", "--target", "a cat", *usual, "--out", tmp_path / "drawn").exit_code == 0
    )


def test_the_command_that_repeats_a_clip_holds_the_guidance_that_was_the_model_s_own(
    tiny_folder: Path, film: Film, tmp_path: Path
) -> None:
    (tmp_path / "walk.webp").write_bytes(encode_webp(film.frames, film.fps))
    shutil.copytree(tiny_folder, own := tmp_path / "own")
    (own / "limner.json").write_text('{"guidance": 3}')
    words = (
        "--source",
        SOURCE,
        "--target",
        "a cat in the snow",
        "--model",
        own,
        "--device",
        "cpu",
        "--steps",
        "2",
    )
    assert call(tmp_path / "walk.webp", *words, "--out", tmp_path / "out").exit_code == 0
    _, _, *again = shlex.split(read_json(tmp_path / "out" / "run.json")["command"])
    (own / "limner.json").write_text('{"guidance": 8}')
    assert call(*again, "--out", tmp_path / "again").exit_code == 0
    frames = [(tmp_path / name / "edit_0/0002.png").read_bytes() for name in ("out", "again")]
    assert frames[0] == frames[1]


def test_the_command_that_repeats_a_clip_holds_how_strongly_its_control_network_acted(
    kept: Backbone, tiny_folder: Path, film: Film, tmp_path: Path
) -> None:
    (tmp_path / "walk.webp").write_bytes(encode_webp(film.frames, film.fps))
    record = controlnet(kept.denoiser, tmp_path / "net", 0) / CONDITION_FILE
    record.write_text('{"defaults": {"scale": 0.5, "stop": 0.75, "rows": "prompted"}}')
    words: tuple[Any, ...] = (
        *("--target", "a cat in the snow", "--model", tiny_folder, "--device", "cpu", "--steps", "4"),
        *("--strength", 1, "--condition", "edges=auto", "--controlnet", tmp_path / "net"),
    )
    assert call(tmp_path / "walk.webp", *words, "--out", tmp_path / "out").exit_code == 0
    _, _, *again = shlex.split(read_json(tmp_path / "out" / "run.json")["command"])
    record.unlink()
    assert call(*again, "--out", tmp_path / "again").exit_code == 0
    assert call(tmp_path / "walk.webp", *words, "--out", tmp_path / "other").exit_code == 0
    frames = [(tmp_path / name / "edit_0/0002.png").read_bytes() for name in ("out", "again", "other")]
    assert frames[0] == frames[1] != frames[2]


def test_targets_that_are_measured_otherwise_are_told_in_one_table_and_the_bar_counts_them_all(
    tiny_folder: Path, film: Film, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One says another motion and is not to stay on its way, one says what the source says and is not scored."""
    bars: list[list[int]] = []

    @contextmanager
    def counted(total: int | None, what: str, **_: Any) -> Iterator[Any]:
        bars.append([total or 0, 0])
        count = bars[-1]

        def advance() -> None:
            count[1] += 1

        yield SimpleNamespace(advance=advance)

    monkeypatch.setattr("edit.run.clip.progress", counted)
    (tmp_path / "walk.webp").write_bytes(encode_webp(film.frames, film.fps))
    targets = "a dog moving left in the snow", "a cat in the snow", SOURCE
    said = [word for target in targets for word in ("--target", target)]
    usual = ("--model", tiny_folder, "--device", "cpu", "--precision", "fp32", "--steps", "2")
    out = tmp_path / "out"
    answer = call(tmp_path / "walk.webp", "--source", SOURCE, *said, *usual, "--out", out)
    assert answer.exit_code == 0, answer.exception
    edits = read_json(out / "run.json")["edits"]
    assert ["track_px" in edit for edit in edits] == [False, True, True]
    assert "track px" in (out / "report.html").read_text()
    inverting, editing = bars
    assert inverting == [2, 2] and editing == [4, 4]


def test_a_clip_s_inversion_serves_further_edits(tiny_folder: Path, film: Film, tmp_path: Path) -> None:
    clip, adapter, still = tmp_path / "walk.webp", tmp_path / "adapter", tmp_path / "still.png"
    clip.write_bytes(encode_webp(film.frames, film.fps))
    film.frames[0].save(still)
    tiny_motion_adapter().save_pretrained(adapter)
    model = ("--model", tiny_folder, "--device", "cpu", "--precision", "fp32")
    usual, target = (*model, "--motion", adapter), ("--target", "a cat in the snow")

    def run(command: str, *words: str | Path) -> str:
        answer = CliRunner().invoke(app, [command, *map(str, words)])
        return str(answer.exception) if answer.exit_code else ""

    assert not run(
        "clip", clip, "--source", SOURCE, *target, *usual, "--steps", "2", "--out", tmp_path / "one"
    )
    made, file = tmp_path / "one" / "inversion.safetensors", tmp_path / "walk.safetensors"
    assert not run("invert", clip, "--clip", "--source", SOURCE, *usual, "--steps", "2", "--out", file)
    assert not run("clip", "--inversion", file, *target, *usual, "--out", tmp_path / "two")
    frames = [(tmp_path / name / "edit_0" / "0002.png").read_bytes() for name in ("one", "two")]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["steps"] == 2
    assert frames[0] == frames[1] and torch.equal(*(read_tensors(one)[0]["states"] for one in (made, file)))
    assert read_film(tmp_path / "two" / "source.webp").fps == film.fps
    assert "--motion and --scale that it was made with" in run("clip", "--inversion", file, *target, *model)
    assert "of a clip" in run("invert-and-replace", "--inversion", file, *target, *model)
    assert "both given" in run("clip", clip, "--inversion", file, *target, *usual)
    assert "the prompt “a dog in the snow”" in run(
        "clip", "--inversion", file, "--source", "a car", *target, *usual
    )
    assert not run(
        "invert", still, "--source", SOURCE, *model, "--steps", "2", "--out", tmp_path / "still.safetensors"
    )
    assert "of an image" in run("clip", "--inversion", tmp_path / "still.safetensors", *target, *model)
    assert "--check is for images" in run("invert", clip, "--clip", "--check", "--source", SOURCE, *model)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((*("--target", "a cat"),), "There is nothing to edit"),
        (("nowhere.webp", "--target", "a cat"), "There is no clip nowhere.webp"),
        (("{still}", "--target", "a cat"), "has one frame"),
        (("{unlike}", "--target", "a cat"), "differ in size: frame 0 has 64 × 64 pixels and frame 1 32 × 64"),
        (("{text}", "--target", "a cat"), "cannot be read as a clip"),
        (("film.mp4", "--target", "a cat"), "no film film.mp4"),
        (("{clip}", "--target", "a cat", "--cross", "0.5"), "--cross has no effect without --source"),
        (("{clip}", "--source", "a dog", "--target", "a cat", "--keep-frames", "some"), "some is no frame"),
        (("{clip}", "--target", "a cat", "--source", "a dog", "--temporal", "0.5"), "without --motion"),
        (("{clip}", "--target", "a cat", "--target", "a dog"), "Without --source one clip"),
        (("{clip}", "--target", "a cat", "--condition", "sketch={still}"), "nothing reads sketch maps"),
        (("{clip}", "--target", "a cat", "--motion", "nowhere"), "no motion adapter nowhere"),
        (("{clip}", "--target", "a cat", "--motion", "{short}"), "has positions for 2 frames, and"),
    ],
)
def test_what_is_no_clip_or_has_no_effect_is_said(
    words: tuple[str, ...], said: str, tiny_folder: Path, film: Film, tmp_path: Path
) -> None:
    (tmp_path / "clip.webp").write_bytes(encode_webp(film.frames, film.fps))
    (tmp_path / "text.gif").write_text("no clip")
    film.frames[0].save(tmp_path / "still.png")
    (tmp_path / "unlike").mkdir()
    for number, frame in enumerate((film.frames[0], film.frames[1].resize((32, 64)))):
        frame.save(tmp_path / "unlike" / f"{number}.png")
    tiny_motion_adapter(motion_max_seq_length=2).save_pretrained(tmp_path / "short")
    names = {"clip": "clip.webp", "still": "still.png", "unlike": "unlike", "text": "text.gif"}
    names["short"] = "short"
    places = {name: tmp_path / place for name, place in names.items()}
    out = tmp_path / "out"
    answer = call(*(word.format(**places) for word in words), "--model", tiny_folder, "--out", out)
    message = str(answer.exception) if isinstance(answer.exception, UserError) else answer.output
    assert answer.exit_code != 0 and said in message and not out.exists()


def test_a_share_in_which_no_sampled_step_of_a_clip_lies_is_said(
    tiny_folder: Path, film: Film, tmp_path: Path
) -> None:
    (tmp_path / "clip.webp").write_bytes(encode_webp(film.frames, film.fps))
    tiny_motion_adapter().save_pretrained(tmp_path / "motion")
    model = ("--model", tiny_folder, "--precision", "fp32", "--motion", tmp_path / "motion", "--steps", "4")
    words = ("--source", SOURCE, "--target", "a cat in the snow", "--strength", "0.5", "--temporal", "0.4")
    shares = ("--self", "0.2", "--cross", "0.8", "--out", tmp_path / "out")
    answer = call(tmp_path / "clip.webp", *words, *shares, *model)
    assert not answer.exit_code
    for share, said in (("--temporal 0.4", True), ("--self 0.2", True), ("--cross 0.8", False)):
        assert (f"{share} has no effect: none of the last 2 of 4 steps" in answer.stderr) is said


def test_a_gif_of_unlike_durations_is_made_even_and_its_transparency_white(
    film: Film, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "plain.webp").write_bytes(encode_webp(film.frames, 8))
    assert len(read_film(tmp_path / "plain.webp").frames) == 4 and not capsys.readouterr().err
    clear = [frame.convert("RGBA") for frame in film.frames]
    for frame in clear:
        frame.putpixel((0, 0), (0, 0, 0, 0))
    clear[0].save(
        tmp_path / "odd.webp",
        save_all=True,
        append_images=clear[1:],
        duration=[50, 100, 50, 50],
        lossless=True,
    )
    read = read_film(tmp_path / "odd.webp")
    assert len(read.frames) == 5 and read.fps == 20 and read.frames[0].getpixel((0, 0)) == (255, 255, 255)
    said = capsys.readouterr().err
    assert "its 4 frames have unequal durations" in said and "transparent parts are white" in said
