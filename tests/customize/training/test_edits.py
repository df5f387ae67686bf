"""Edits are learned from pairs: what is saved edits here and in diffusers, and held-out pairs choose the best."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionInstructPix2PixPipeline
from PIL import Image
from typer.testing import CliRunner

import edit.cli
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import generator
from backbone.io.console import UserError
from backbone.io.files import read_json, read_jsonl, read_tensors
from backbone.media.transforms import to_image, to_tensor
from backbone.models.model import Backbone
from customize.cli import app
from customize.data.edit_pairs import hold_out, read_edit_pairs
from customize.evaluation.edits import HeldOutEdits, find_changed_pixels, measure_edits
from customize.formats.convert import import_adapter
from customize.objectives.instruction_edits import draw_dropout
from customize.settings import resolve_settings
from edit.methods.instruct import instruct
from edit.run.open import Opening, load_model
from tests.backbone.media.test_registration import moved, picture

TOLD = ["make it snow", "paint it red", "add a cat", "remove the dog"]
HERE = ("--precision", "fp32", "--device", "cpu")


def write(path: Path, seed: int, *, edited: bool = False) -> None:
    """A small image, or what an edit made of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(seed)[:, :64, :64].clone()
    if edited:
        image[:, 20:40, 24:48] = 0.9
    to_image(image).save(path)


def lay(folder: Path) -> Path:
    """Four pairs of images before and after an edit."""
    for number, told in enumerate(TOLD):
        write(folder / "source" / f"{number}.png", number)
        write(folder / "target" / f"{number}.png", number, edited=True)
        (folder / "target" / f"{number}.txt").write_text(told)
    return folder


def invoked(*words: object, program: Any = app) -> str:
    done = CliRunner().invoke(program, [str(word) for word in words], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay(tmp_path_factory.mktemp("pairs"))


def flags(pairs: Path, model: Path, out: Path, steps: int) -> tuple[object, ...]:
    return (
        *("train", "--pairs", pairs, "--model", model, "--steps", steps, "--lr-scheduler", "constant", *HERE),
        *(
            "--lr-warmup-steps",
            0,
            "--evaluate-every",
            2,
            "--held-out",
            1,
            "--guidance",
            2,
            "--flip",
            "--out",
            out,
        ),
    )


@pytest.fixture(scope="module")
def run(pairs: Path, tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps that went on to four."""
    out = tmp_path_factory.mktemp("run") / "edits"
    invoked(*flags(pairs, tiny_folder, out, 2))
    said = invoked("train", "--resume", out, "--steps", 4)
    assert "edit instruct PHOTO" in said and "nearer to the true ones" in said
    return out


def test_edits_have_a_learning_rate_of_their_own() -> None:
    words = {"images": "", "token": "", "class_noun": "", "pairs": "edits/"}
    moji = Backbone.open("moji").defaults
    for asked, usual, rate in (
        (words, {"learning_rate": 4e-3}, 1e-4),
        (words | {"method": "full"}, {}, 5e-5),
        (words, {"learning_rates": {"pairs": 3e-4}}, 3e-4),
        (words | {"learning_rate": 2e-4}, moji, 2e-4),
        (words, moji, 1e-3),
        (words | {"pairs": ""}, moji, moji["learning_rate"]),
    ):
        assert resolve_settings(asked, usual).learning_rate == rate


def test_a_model_says_the_rate_of_every_way_to_learn() -> None:
    words = {"images": "x", "token": "[V]", "class_noun": "dog"}
    moji = Backbone.open("moji").defaults
    assert resolve_settings(words | {"method": "full"}, {}).learning_rate == 5e-6  # as published
    # Which moves a small model
    assert resolve_settings(words | {"method": "full"}, moji).learning_rate == 2e-4
    own = {"learning_rates": {"textual-inversion": 2e-2}}
    for method, rate in (("textual-inversion", 2e-2), ("pivotal", 5e-3)):
        assert resolve_settings(words | {"method": method}, own).words_learning_rate == rate


def test_its_adapter_alone_is_none_of_the_text_to_image_model(
    run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    file = run / "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match=r"was learned from edits\. .* reads no image beside the prompt"):
        import_adapter(file, tmp_path / "out", model=str(tiny_folder), token_words="sks")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_as_one_that_was_not(
    run: Path, pairs: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    invoked(*flags(pairs, tiny_folder, tmp_path / "whole", 4))
    for name in ("pytorch_lora_weights.safetensors", "denoiser_delta.safetensors"):
        ours, whole = (read_tensors(folder / name)[0] for folder in (run, tmp_path / "whole"))
        assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in ours)
    assert [line["step"] for line in read_jsonl(run / "evaluations.jsonl")] == [0, 2, 4]
    assert read_jsonl(run / "evaluations.jsonl") == read_jsonl(tmp_path / "whole" / "evaluations.jsonl")


def test_the_run_s_folder_says_how_it_went_and_how_to_repeat_it(run: Path, pairs: Path) -> None:
    command = shlex.split(read_json(run / "settings.json")["command"])
    assert command[command.index("--pairs") + 1] == str(pairs)
    assert command[command.index("--held-out") + 1] == "1" and "--images" not in command
    page = (run / "report.html").read_text()
    assert "edit instruct photo.png" in page and "Background PSNR" in page and "no-cache" not in page
    assert (run / "best" / "concept.json").is_file() and (run / "sheet.png").is_file()
    assert read_json(run / "concept.json")["kind"] == "edits"


def test_the_new_channels_begin_at_zero_and_are_learned(run: Path, tiny_folder: Path) -> None:
    plain = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    wide = Backbone.open(str(tiny_folder), device="cpu", precision="fp32", task="learn-to-edit")
    noisy = torch.randn((1, *plain.latent_shape), generator=torch.Generator().manual_seed(0))
    text, index = plain.encode_prompts(["a red dog"]), torch.tensor([20])
    beside = Conditions(text.text, references=(torch.randn(noisy.shape),))
    assert torch.allclose(plain.predict(noisy, index, text), wide.predict(noisy, index, beside), atol=1e-6)
    delta = read_tensors(run / "denoiser_delta.safetensors")[0]["conv_in.weight"]
    assert delta.shape[1] == 8 and float(delta[:, 4:].abs().max()) > 0
    assert wide.fingerprint == plain.fingerprint


def test_what_was_learned_edits_and_draws_nothing_without_an_instruction(run: Path, tmp_path: Path) -> None:
    write(tmp_path / "photo.png", 9)
    asked = (
        "--steps",
        2,
        "--no-metrics",
        "--background",
        "none",
        "--concept",
        run,
        "--out",
        tmp_path / "edit",
    )
    invoked("instruct", tmp_path / "photo.png", "--instruction", "make it snow", *asked, program=edit.cli.app)
    invoked("replay", tmp_path / "edit", "--out", tmp_path / "again", program=edit.cli.app)
    first, second = (Image.open(tmp_path / name / "edit_0.png").tobytes() for name in ("edit", "again"))
    assert first == second
    for program, words in (
        (app, ("sample", "a dog", "--concept", run)),
        (edit.cli.app, ("sdedit", tmp_path / "photo.png", "--prompt", "a dog", "--concept", run)),
    ):
        done = CliRunner().invoke(program, [str(word) for word in (*words, "--out", tmp_path / "no")])
        assert isinstance(done.exception, UserError) and "edit instruct" in str(done.exception)
        assert not (tmp_path / "no").exists()


def test_the_baked_model_is_diffusers_pipeline_and_gives_the_same_edit(
    run: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    compare_baked(run, tmp_path)
    again = Backbone.open(str(tmp_path / "whole"), device="cpu", precision="fp32", task="edit")
    assert again.most_references == 1 and not again.widened
    with pytest.raises(UserError, match="merge --bake"):
        invoked("export", run, "--out", tmp_path / "lora.safetensors")


def compare_baked(run: Path, tmp_path: Path) -> torch.Tensor:
    """Our edit by a run, which has to be diffusers' own by the model that it is baked into."""
    invoked("merge", run, "--bake", "--out", tmp_path / "whole")
    pipeline = StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / "whole")
    pipeline.set_progress_bar_config(disable=True)
    photo = to_image(picture(3)).resize((64, 64))
    loaded = load_model(Opening(concepts=[str(run)], device="cpu", precision="fp32"), image_count=1).model
    noise = torch.randn((1, *loaded.latent_shape), generator=generator(0, 0, "instruct"))
    theirs = pipeline(
        "a red dog", image=(to_tensor(photo)[None] + 1) / 2, latents=noise, num_inference_steps=3,
        guidance_scale=5.0, image_guidance_scale=1.3, output_type="latent",
    ).images  # fmt: skip
    ours = instruct(loaded, photo, ["a red dog"], steps=3, guidance=5.0, image_guidance=1.3, keep="none")
    assert float((ours.latents - theirs).abs().max()) < 1e-4 * float(theirs.abs().max())
    return ours.latents


def test_text_encoders_learn_to_read_instructions_too(
    run: Path, pairs: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    words = flags(pairs, tiny_folder, tmp_path / "run", 2)
    invoked(*words, "--train-text-encoder", "--text-encoder-lr", 1e-2)
    kept = read_tensors(tmp_path / "run" / "pytorch_lora_weights.safetensors")[0]
    learned = [name for name, value in kept.items() if name.startswith("text_encoder.") and "lora_B" in name]
    assert learned and all(kept[name].abs().max() > 1e-3 for name in learned)
    assert not any(name.startswith("text_encoder.") for name in read_tensors(run / LORA_WEIGHTS)[0])
    compare_baked(tmp_path / "run", tmp_path)


@pytest.mark.parametrize("share", [pytest.param(0.0, marks=pytest.mark.slow), 0.3])
def test_instructions_read_at_every_step_are_those_read_once(
    pairs: Path, tiny_folder: Path, tmp_path: Path, share: float
) -> None:
    losses = []
    for text in (False, True):
        more = ("--train-text-encoder",) if text else ()
        out = tmp_path / f"{text}"
        invoked(*flags(pairs, tiny_folder, out, 1), "--conditioning-dropout", share, *more)
        losses.append(read_jsonl(out / "log.jsonl")[0]["loss"])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.slow
def test_a_model_that_edits_already_learns_an_adapter_alone(pairs: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_instruct_pix2pix

    invoked(*flags(pairs, tiny_instruct_pix2pix(tmp_path / "editor"), tmp_path / "run", 2))
    assert read_json(tmp_path / "run" / "concept.json")["changed"] == ""


def test_a_share_is_told_nothing_shown_nothing_or_both() -> None:
    no_text, no_image = draw_dropout(40_000, 0.05, torch.Generator().manual_seed(0))
    for share in (no_text & ~no_image, no_image & ~no_text, no_text & no_image):
        assert float(share.float().mean()) == pytest.approx(0.05, abs=0.005)


def test_an_edit_is_rated_by_how_much_nearer_it_comes() -> None:
    source, target = picture(0), picture(0)
    target[:, 20:50, 30:70] = 0.9
    held = HeldOutEdits([source], [target], [()], ["x"])
    assert measure_edits(0, held, [source], None).rating == 0
    half, spoiled = (source + target) / 2, target + 0.2 * torch.randn_like(target)
    assert measure_edits(0, held, [half], None).rating == pytest.approx(6.02, abs=0.1)
    background = measure_edits(0, held, [spoiled], None).background_psnr_db
    assert background is not None and background < 25
    place = find_changed_pixels(source, target)
    assert bool((place[22:48, 32:68] == 1).all()) and float(place.mean()) < 0.3


def test_held_out_pairs_are_spread_and_none_is_learned_from(pairs: Path) -> None:
    every = read_edit_pairs(pairs)
    learned, held = hold_out(every, 2)
    assert [pair.target.path.stem for pair in held] == ["1", "3"] and not {*learned} & {*held}
    assert [len(hold_out(some, -1)[1]) for some in (every, every * 2, every * 10, every * 40)] == [0, 1, 4, 8]
    assert hold_out(every, 0) == (every, [])
    with pytest.raises(UserError, match="takes all of them"):
        hold_out(every, 4)


def drift(folder: Path) -> None:
    edited = picture(0)[:, :64, :64].clone()
    edited[:, 20:40, 24:48] = 0.9
    to_image(moved(edited, (3.0, 0.0, 1.0))).save(folder / "target/0.png")


def move_captions(folder: Path) -> None:
    for path in sorted((folder / "target").glob("*.txt")):
        path.rename(folder / "source" / path.name)


def say(*told: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for number in range(len(TOLD)):
            (folder / f"target/{number}.txt").write_text(told[number % len(told)])

    return change


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (drift, "+3.0 px to the right"),
        (lambda f: (f / "target/0.png").write_bytes((f / "source/0.png").read_bytes()), "shows no edit"),
        (lambda f: Image.open(f / "target/0.png").resize((60, 80)).save(f / "target/0.png"), "other shapes"),
        (move_captions, "Swap the two folders"),
        (say("make it snow"), "All pairs have the instruction"),
        (say("a photo of a dog", "a cat in the snow"), "describes an image"),
        (lambda f: (f / "target/0.txt").unlink(), "say nothing of the edit"),
    ],
)
def test_pairs_that_teach_nothing_are_refused(
    change: Callable[[Path], object], complaint: str, tmp_path: Path, tiny_folder: Path
) -> None:
    change(lay(tmp_path / "pairs"))
    words = flags(tmp_path / "pairs", tiny_folder, tmp_path / "run", 2)
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, UserError) and complaint in str(done.exception), done.exception
    assert not (tmp_path / "run").exists()


def test_pairs_that_cannot_be_used_are_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from customize.data.edit_pairs import select_usable_pairs

    drift(lay(tmp_path))
    assert len(select_usable_pairs(read_edit_pairs(tmp_path), skip_bad=True)) == 3
    assert "1 pair of 4 left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (("--images", "x"), "--images has no effect with --pairs"),
        (("--token", "[V]"), "--token has no effect with --pairs"),
        (("--prior", "base"), "--prior has no effect with --pairs"),
        (("--mask", "auto"), "--mask has no effect with --pairs"),
        (("--preview-on", "x"), "--preview-on has no effect with --pairs"),
        (("--text-encoder-lr", "1e-3"), "--text-encoder-lr has no effect without --train-text-encoder"),
        (("--method", "pivotal"), "--pairs has no effect without --method lora or full"),
        (("--held-out", "4"), "takes all of them"),
        (("--held-out", "0", "--patience", "2"), "no evaluation says when to stop"),
        (("--conditioning-dropout", "0.5"), "must lie between"),
    ],
)
def test_what_has_no_effect_beside_pairs_is_refused(
    more: tuple[str, ...], complaint: str, pairs: Path, tmp_path: Path
) -> None:
    done = CliRunner().invoke(app, ["train", "--pairs", str(pairs), *more, "--out", str(tmp_path / "run")])
    assert isinstance(done.exception, UserError) and complaint in str(done.exception), done.exception


def test_a_model_that_cannot_read_an_image_is_refused(pairs: Path, tmp_path: Path) -> None:
    from tests.tiny import tiny_pixart

    words = flags(pairs, tiny_pixart(tmp_path / "pixart"), tmp_path / "run", 2)
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(done.exception, UserError) and "reads no image beside the prompt" in str(done.exception)
    assert not (tmp_path / "run").exists()


def test_references_that_the_model_does_not_read_are_refused(tmp_path: Path, tiny_folder: Path) -> None:
    lay(tmp_path)
    lines = [
        {
            "source": f"source/{k}.png",
            "target": f"target/{k}.png",
            "instruction": told,
            "references": ["target/0.png"],
        }
        for k, told in enumerate(TOLD)
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    done = CliRunner().invoke(app, [str(word) for word in flags(tmp_path, tiny_folder, tmp_path / "run", 2)])
    assert "reads 1 image beside the prompt, and 2 are given" in str(done.exception)
    assert not (tmp_path / "run").exists()
