"""Edits by instruction are diffusers' own, and leave the background as it was."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from backbone.cli.sampling import Sampler
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import generator
from backbone.diffusion.samplers import ddim
from backbone.io.console import UserError
from backbone.media.registration import Registration
from backbone.media.transforms import to_image, to_tensor
from backbone.models.by_instruction import Guidances, instructed_predictor
from backbone.models.model import Backbone
from edit.checks import check_prompt
from edit.cli import app
from edit.masks import mask_to_image
from edit.methods import keep_background as method
from edit.methods.instruct import Keep, instruct
from edit.result import Result
from edit.run.report import describe_drift, tabulate_drift
from tests.edit.models import photo
from tests.tiny import tiny_instruct_pix2pix


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_instruct_pix2pix(tmp_path_factory.mktemp("instruct"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32", task="edit")


def test_an_empty_instruction_is_told_what_one_is() -> None:
    with pytest.raises(UserError, match="Say in words what to do"):
        check_prompt(" ", "instruction")


@pytest.mark.parametrize("steps", [4, pytest.param(20, marks=pytest.mark.slow)])
def test_an_instruction_gives_diffusers_own_latents(folder: Path, model: Backbone, steps: int) -> None:
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn((1, *model.latent_shape), generator=generator(0, 0, "instruct"))
    theirs = pipeline(
        "a red dog", image=(to_tensor(photo())[None] + 1) / 2, latents=noise, num_inference_steps=steps,
        guidance_scale=5.0, image_guidance_scale=1.3, output_type="latent",
    ).images  # fmt: skip
    ours = instruct(model, photo(), ["a red dog"], steps=steps, guidance=5.0, image_guidance=1.3, keep="none")
    assert float((ours.latents - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())


@pytest.mark.parametrize(("sampler", "calls"), [("ancestral", 4), ("heun", 8), ("dpmpp-2m", 4), ("unipc", 4)])
def test_any_sampler_draws_an_edit_and_tells_of_every_step_once(
    model: Backbone, sampler: Sampler, calls: int
) -> None:
    steps: list[None] = []

    def draw(**more: Any) -> Result:
        return instruct(model, photo(), ["a red dog"], steps=4, guidance=5.0, keep="none", **more)

    found = draw(sampler=sampler, progress=lambda: steps.append(None), frames=2)
    assert (found.facts["sampler"], found.nfe, len(steps)) == (sampler, 3 * calls, 4)
    assert found.estimates is not None
    assert torch.equal(found.latents, draw(sampler=sampler).latents)
    assert not torch.allclose(found.latents, draw(sampler="ddim").latents, atol=1e-3)
    assert torch.equal(draw().latents, draw(sampler="ddim").latents)  # this model names none


def drawing_a_square(source: Tensor) -> Tensor:
    """The source shifted by a pixel, with a square in it."""
    drawn = source.roll(1, -1).clone()
    drawn[:, 24:40, 24:40] = torch.tensor([0.9, -0.9, -0.9])[:, None, None]
    return drawn


def test_the_background_stays_over_any_number_of_instructions(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = to_tensor(photo())
    drawn = iter([drawing_a_square(source)] * 3)
    monkeypatch.setattr(model, "decode", lambda latents: next(drawn)[None])
    result = instruct(model, photo(), ["a red dog"] * 3, steps=1)
    assert result.finished is not None and result.masks is not None
    last, outside = result.finished[-1], (result.masks == 0).all(0)
    assert torch.equal(last[:, outside], source[:, outside])
    assert float(outside.float().mean()) > 0.5
    assert bool((last[0, 28:36, 28:36] > 0.8).all())
    drift = result.facts["drift"][0]
    assert drift["shift_right_px"] == pytest.approx(1, abs=0.1)
    assert drift["drift_percent"] == pytest.approx(100 * drift["drift_px"] / 64, abs=0.01)


def test_what_is_drawn_may_be_kept_whole_or_on_the_autoencoder_s_copy(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = to_tensor(photo())
    whole = instruct(model, photo(), ["a red dog"], steps=1, keep="none")
    assert whole.masks is None
    copy = model.decode(model.encode(source[None]).mean)[0]
    drawn = iter([drawing_a_square(source), copy])
    monkeypatch.setattr(model, "decode", lambda latents: next(drawn)[None])
    kept = instruct(model, photo(), ["a red dog"], steps=1, keep="latents")
    assert kept.finished is not None and kept.masks is not None
    outside = kept.masks[0] == 0
    assert torch.equal(kept.finished[0][:, outside], copy[:, outside])


def test_the_autoencoder_s_copy_does_not_decay_over_ten_edits(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copied once, by an autoencoder that would darken it a little more each time."""
    source = to_tensor(photo())
    square = torch.zeros(source.shape[-2:])
    square[24:40, 24:40] = 1
    monkeypatch.setattr(model, "decode", lambda latents: 0.95 * drawing_a_square(source)[None])
    monkeypatch.setattr(
        method, "register_to_source", lambda edited, source, changed: Registration((1.0, 0.0))
    )
    mask = mask_to_image(square, (64, 64))
    result = instruct(model, photo(), ["a red dog"] * 10, steps=1, keep="latents", mask=mask)
    assert result.finished is not None and result.masks is not None
    outside = result.masks[-1] == 0
    assert torch.equal(result.finished[0][:, outside], result.finished[-1][:, outside])
    table = "".join(tabulate_drift(result.prompts, result.facts["drift"]))
    assert table.count("<tr") == 11 and "drift, px" in table


def test_guidance_is_over_three_predictions(model: Backbone) -> None:
    """e(∅, ∅) + s_I·(e(image, ∅) − e(∅, ∅)) + s_T·(e(image, text) − e(image, ∅))."""
    from edit.pictures import encode_image

    image, schedule = encode_image(model, photo()), model.schedule(4)
    noisy = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    reference = model.encode_reference(image.pixels[None])
    text, empty = (model.encode_prompts([words]) for words in ("a red dog", ""))

    def alone(words: Conditions, beside: Tensor) -> Tensor:
        return model.predictor(Conditions(words.text, references=(beside,)))(noisy, schedule[0]).noise

    none = alone(empty, torch.zeros_like(reference))
    seen, told = alone(empty, reference), alone(text, reference)
    guided = instructed_predictor(model, text, empty, [reference], Guidances(5.0, 1.3))(
        noisy, schedule[0]
    ).noise
    torch.testing.assert_close(guided, none + 1.3 * (seen - none) + 5 * (told - seen), atol=1e-4, rtol=1e-4)


def test_outside_of_the_guided_steps_image_and_instruction_are_followed_alone(model: Backbone) -> None:
    from edit.pictures import encode_image

    image, schedule = encode_image(model, photo()), model.schedule(4)
    text, empty = (model.encode_prompts([words]) for words in ("make it red", ""))
    shown = [model.encode_reference(image.pixels[None])]
    noise = torch.randn((1, *model.latent_shape), generator=generator(0, 0, "instruct"))
    guided = instructed_predictor(model, text, empty, shown, Guidances(5.0, 1.3))
    half = ddim(noise, guided, schedule[:3])
    expected = ddim(half, model.predictor(replace(text, references=tuple(shown))), schedule[2:])
    how: dict[str, Any] = {
        "steps": 4,
        "guidance": 5.0,
        "image_guidance": 1.3,
        "keep": "none",
        "sampler": "ddim",
    }
    ours = instruct(model, photo(), "make it red", guidance_stop=0.5, **how)
    torch.testing.assert_close(ours.latents, expected, atol=1e-4, rtol=1e-4)
    assert ours.nfe == 3 * 2 + 2 and (ours.facts["guidance_start"], ours.facts["guidance_stop"]) == (0.0, 0.5)
    assert (
        instruct(model, photo(), "make it red", **{**how, "sampler": "heun"}, guidance_stop=0.5).nfe
        == 3 * 3 + 5
    )
    with pytest.raises(UserError, match=r"Guidance from 0.5 to 0.2 of the steps"):
        instruct(model, photo(), "make it red", guidance_start=0.5, guidance_stop=0.2, **how)
    with pytest.raises(UserError, match=r"None of 4 steps lies between 0 and 0.1 of them"):
        instruct(model, photo(), "make it red", guidance_stop=0.1, **how)


def test_a_record_is_repeated_by_its_own_share_and_an_older_one_guided_in_all_steps(
    folder: Path, tmp_path: Path
) -> None:
    photo().save(tmp_path / "photo.png")

    def drawn(name: str, *words: str) -> bytes:
        said = CliRunner().invoke(app, [*words, "--out", str(tmp_path / name)])
        assert said.exit_code == 0, said.output or repr(said.exception)
        return Image.open(tmp_path / name / "edit_0.png").tobytes()

    words = ["instruct", str(tmp_path / "photo.png"), "--instruction", "make it snow", "--model", str(folder)]
    words += ["--steps", "4", "--background", "none", "--no-metrics"]
    always, part = drawn("always", *words), drawn("part", *words, "--guidance-stop", "0.5")
    assert drawn("again", "replay", str(tmp_path / "part")) == part != always
    record = json.loads((tmp_path / "part" / "run.json").read_text())
    assert (record.pop("guidance_start"), record.pop("guidance_stop")) == (0.0, 0.5)
    (tmp_path / "part" / "run.json").write_text(json.dumps(record))
    assert drawn("older", "replay", str(tmp_path / "part")) == always


def test_the_command_follows_an_instruction_and_another(folder: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    (tmp_path / "then.txt").write_text("make it snow\n")
    words = [
        "instruct",
        str(tmp_path / "photo.png"),
        "--instruction",
        "a green dog",
        "--then",
        str(tmp_path / "then.txt"),
    ]
    out = tmp_path / "run"
    more = ["--model", str(folder), "--steps", "2", "--background", "none", "--no-metrics", "--out", str(out)]
    said = CliRunner().invoke(app, [*words, *more])
    assert said.exit_code == 0, said.output or repr(said.exception)
    record = json.loads((out / "run.json").read_text())
    assert [edit["prompt"] for edit in record["edits"]] == ["a green dog", "make it snow"]
    assert "“a green dog” seems to describe an image" in said.output and "snow” seems" not in said.output
    assert record["drift"] == []
    again = CliRunner().invoke(app, ["replay", str(out), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0, repr(again.exception)
    first, second = (Image.open(place / "edit_1.png").tobytes() for place in (out, tmp_path / "again"))
    assert first == second


@pytest.mark.slow
def test_the_command_plans_for_a_device_and_repeats_it(folder: Path, tmp_path: Path) -> None:
    photo().save(tmp_path / "photo.png")
    words = ["instruct", str(tmp_path / "photo.png"), "--instruction", "make it snow", "--model", str(folder)]
    more = [
        "--steps",
        "1",
        "--keep",
        "none",
        "--no-metrics",
        "--precision",
        "fp32",
        "--device",
        "cpu",
    ]  # as it was called
    out = tmp_path / "run"
    said = CliRunner().invoke(app, [*words, *more, "--vram", "1", "--out", str(out)])
    assert said.exit_code == 0 and "references" in said.output and "drawing" in said.output
    again = CliRunner().invoke(app, ["replay", str(out), "--out", str(tmp_path / "again")])
    assert again.exit_code == 0 and "Memory of the device: 1 GiB" in again.output
    first, second = (Image.open(place / "edit_0.png").tobytes() for place in (out, tmp_path / "again"))
    assert first == second


def test_models_of_either_kind_are_refused_at_the_other_s_door(folder: Path, tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="edit instruct"):
        Backbone.open(str(folder))
    with pytest.raises(UserError, match="reads no image beside the prompt"):
        Backbone.open(str(tiny_folder), task="edit")


def test_a_background_that_is_all_gone_names_the_instruction(
    model: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "decode", lambda latents: 1.0 - 2.0 * (to_tensor(photo()) > 0).float()[None])
    with pytest.raises(UserError, match=r"“a red dog”: .*--background none"):
        instruct(model, photo(), ["a red dog"], steps=1, keep="pixels")
    whole = instruct(model, photo(), ["a red dog"], steps=1)
    assert whole.images[0] == to_image(model.decode(whole.latents)[0])
    assert whole.masks is not None and bool((whole.masks == 1).all())
    assert whole.facts["drift"][0]["changed_share"] == 1
    assert whole.facts["drift"][0]["drift_px"] is None  # nothing was registered


@pytest.mark.parametrize("keep", ["auto", "pixels", "latents"])
def test_instructions_go_on_after_one_that_changes_everything_and_keep_its_background(
    model: Backbone, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], keep: Keep
) -> None:
    source = to_tensor(photo())
    elsewhere = torch.rand(source.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    pictures = [drawing_a_square(source), elsewhere, drawing_a_square(elsewhere.roll(-1, -1))]
    drawn = iter([pictures[0], source, *pictures[1:]] if keep == "latents" else pictures)
    monkeypatch.setattr(model, "decode", lambda latents: next(drawn)[None])
    said = ["make the dog red", "put it in space", "give it a hat"]
    result = instruct(model, photo(), said, steps=1, keep=keep)
    assert result.finished is not None and result.masks is not None
    assert torch.equal(result.finished[1], elsewhere)
    place = (result.finished[2] != elsewhere).any(0)
    assert 0.03 < float(place.float().mean()) < 0.3  # the last one changes a part of that alone
    out = capsys.readouterr()
    assert (out.out + out.err).count(
        "changes nearly everything"
    ) == 1 and "space” changes" in out.out + out.err
    drift = result.facts["drift"]
    assert [one["drift_px"] is None for one in drift] == [False, True, False]
    assert describe_drift(drift[1]) == "all of it as it was drawn" and "undone" in describe_drift(drift[0])
    assert describe_drift({"drift_px": 0.001, "tone_percent": 0.0}) == "the rest did not drift"
    table = "".join(tabulate_drift(said, drift))
    assert "–" in table and "that was undone. What changed nearly everything is as it was drawn." in table
    still = {**drift[0], "drift_px": 0.0, "drift_percent": 0.0, "tone_percent": 0.0}
    assert "anew, and the background was put back.</p>" in "".join(tabulate_drift(said[:1], [still]))
