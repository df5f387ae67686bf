"""`customize clip`: clips of a model with a motion adapter in a folder that can be looked at and repeated."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from PIL import Image, ImageChops
from typer.testing import CliRunner

import backbone.media.clips
from backbone.adapters.apply import check_concept_fits
from backbone.adapters.concept import Concept, read_concept
from backbone.adapters.config import CONFIG_KEY
from backbone.adapters.lora import LORA_WEIGHTS, add_lora, save_lora
from backbone.adapters.motion import Moves, read_motion_lora, set_in_motion
from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors, write_tensors
from backbone.io.run_folder import CHECKPOINT
from backbone.media.clips import encode_webp, read_film
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.motion import read_motion_adapter
from backbone.models.model import Backbone
from backbone.training.run import take_steps
from customize.cli import app
from customize.clips.cli import format_motion_command, refuse_other_scales
from customize.clips.films import CaptionedFilm, list_films
from customize.clips.settings import ADAPTER_FILE, ClipOptions, TrainMotionOptions
from customize.clips.train import (
    MotionLearning,
    Prior,
    draw_prior,
    remove_appearance,
    with_token,
    without_token,
    write_prompts,
)
from tests.tiny import tiny_motion_adapter

LAYER = "down_blocks.0.motion_modules.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("motion") / "adapter"
    tiny_motion_adapter().save_pretrained(folder)
    return folder


def call(*words: str | Path) -> Any:
    return CliRunner().invoke(app, ["clip", *map(str, words)])


def draw(model: Path, adapter: Path, out: Path, *words: str | Path) -> dict[str, Any]:
    usual = ("--model", model, "--motion", adapter, "--device", "cpu", "--precision", "fp32", "--out", out)
    answer = call(*words, *usual, "--frames", "3", "--steps", "2")
    assert answer.exit_code == 0, answer.exception
    return read_json(out / "run.json")


def test_clips_play_and_stand_in_a_folder_with_the_command_that_repeats_them(
    tiny_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    record = draw(tiny_folder, adapter, tmp_path / "one", "a dog", "a cat", "--count", "2", "--batch", "3")
    film = read_film(tmp_path / "one" / "p01-s00.webp")
    assert len(film.frames) == 3 and film.size == (64, 64) and film.fps == 8
    with Image.open(tmp_path / "one" / "p01-s00" / "0002.png") as last:
        assert ImageChops.difference(last, film.frames[2]).getbbox() is None
    assert [clip["prompt"] for clip in record["clips"]] == ["a dog", "a dog", "a cat", "a cat"]
    page = (tmp_path / "one" / "report.html").read_text()
    assert page.count("data:image/webp;base64,") == 4 and "a cat, sample 1" in page
    program, _, *again = shlex.split(record["command"])
    assert program == "customize"
    again[again.index("--batch") + 1] = "1"
    assert call(*again, "--out", tmp_path / "two").exit_code == 0
    both = [read_film(tmp_path / name / "p01-s01.webp").frames[2] for name in ("one", "two")]
    assert int(np.asarray(ImageChops.difference(*both)).max()) <= 1


def test_a_subject_and_a_motion_work_in_one_clip(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    write_run(tmp_path / "dog", model, [layer], "lora", {"[V]": "red"})
    bounce = write_lora(tmp_path / "bounce.safetensors")
    plain = draw(tiny_folder, adapter, tmp_path / "plain", "a red dog")
    with_both = draw(
        tiny_folder, adapter, tmp_path / "both", "a [V] dog", "--concept", tmp_path / "dog", "--lora", bounce
    )
    draw(tiny_folder, adapter, tmp_path / "moved", "a red dog", "--lora", bounce)
    draw(tiny_folder, adapter, tmp_path / "none", "a red dog", "--lora", bounce, "--motion-scale", "0")
    assert with_both["clips"][0]["model_reads"] == "a red dog" and plain["concepts"] == []
    frames = {
        name: read_film(tmp_path / name / "p00-s00.webp").frames[1].tobytes()
        for name in ("plain", "both", "moved", "none")
    }
    assert frames["none"] == frames["plain"]
    assert len(set(frames.values())) == 3


def write_run(folder: Path, model: Backbone, layers: list[str], kind: str, tokens: dict[str, str]) -> None:
    values = add_lora(model.denoiser, "it", rank=2, alpha=2.0, targets=layers)
    for value in values.values():
        torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(0))
    folder.mkdir()
    save_lora(folder / LORA_WEIGHTS, model.denoiser, "it")
    Concept(kind, model.location.name, model.fingerprint, tokens, "dog", weights=LORA_WEIGHTS).write(folder)


def write_lora(
    path: Path, style: str = "unet.{layer}.lora.{end}.weight", ends: tuple[str, str] = ("down", "up")
) -> Path:
    block = LAYER.removesuffix(".to_q")
    old = block.replace(".transformer_blocks", ".temporal_transformer.transformer_blocks").replace(
        "attn1", "attention_blocks.0"
    )
    names = [style.format(layer=LAYER, block=block, old=old, end=end) for end in ends]
    write_tensors(path, dict(zip(names, (torch.ones(2, 16), torch.ones(16, 2)), strict=True)))
    return path


@pytest.mark.parametrize(
    ("style", "ends"),
    [
        ("unet.{layer}.lora.{end}.weight", ("down", "up")),
        ("unet.{layer}.lora_{end}.weight", ("A", "B")),
        ("{layer}.lora_{end}.default.weight", ("A", "B")),
        ("unet.{block}.processor.to_q_lora.{end}.weight", ("down", "up")),
        ("{old}.processor.to_q_lora.{end}.weight", ("down", "up")),
    ],
)
def test_motion_loras_are_read_whatever_wrote_them(style: str, ends: tuple[str, str], tmp_path: Path) -> None:
    tensors, config = read_motion_lora(write_lora(tmp_path / "it.safetensors", style, ends))
    assert set(tensors) == {f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"}
    assert (config.rank, config.layer_alpha(LAYER, rank=2)) == (2, 2.0)


@pytest.mark.parametrize("place", ["beside", "header"])
def test_a_motion_lora_of_peft_has_the_strength_that_its_settings_say(place: str, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "it.safetensors", "base_model.model.{layer}.lora_{end}.weight", ("A", "B"))
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 16, "target_modules": ["to_q"]}
    if place == "beside":
        (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    else:
        write_tensors(file, read_tensors(file)[0], {CONFIG_KEY: json.dumps(settings)})
    tensors, config = read_motion_lora(file)
    assert set(tensors) == {f"unet.{LAYER}.lora_A.weight", f"unet.{LAYER}.lora_B.weight"}
    assert config.layer_alpha(LAYER, rank=2) == 16


@pytest.mark.parametrize("alpha", [torch.zeros(()), torch.ones(2)])
def test_a_motion_lora_s_alpha_is_one_number_other_than_zero(alpha: torch.Tensor, tmp_path: Path) -> None:
    file = write_lora(tmp_path / "it.safetensors")
    write_tensors(file, read_tensors(file)[0] | {f"unet.{LAYER}.alpha": alpha})
    with pytest.raises(UserError, match=r"alpha in .* is no number other than 0"):
        read_motion_lora(file)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--frames", "1"), "must lie between 2"),
        (("--frames", "0"), "must lie between 2"),
        (("--fps", "0"), "must lie between 0.1"),
        (("--frames", "9"), "positions for 8 frames, and 9"),
        (("--frames", "20", "--context-length", "12"), "positions for 8 frames, and 12"),
        (("--frames", "20", "--vram", "1"), "positions for 8 frames, and 20"),
        (("--context-length", "4", "--context-stride", "4"), "do not overlap"),
        (("--frames", "8", "--context-length", "8"), "no effect on clips of 8 frames, which are one window"),
        (("--context-stride", "2"), "--context-stride has no effect without --context-length"),
        (("--free-noise",), "--free-noise has no effect without --context-length"),
        (("--motion-scale", "0.5"), "--motion-scale has no effect without --lora"),
        (("--lora", "{picture}"), "is a LoRA of pictures"),
        (("--lora", "pan.ckpt"), "is a pickle"),
        (("--motion", "{lora}"), "not a motion adapter. Give it with --lora"),
        (("--motion", "{picture}"), "is a LoRA of pictures"),
        (("--motion", "nowhere"), "no motion adapter nowhere"),
        (("--mp4",), "needs the package av"),
    ],
)
def test_what_cannot_be_drawn_is_said_in_a_sentence_and_nothing_is_written(
    words: tuple[str, ...],
    said: str,
    tiny_folder: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backbone.media.clips, "find_spec", lambda name: None)
    tensors = {f"unet.mid_block.attentions.0.to_q.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    write_tensors(tmp_path / "picture.safetensors", tensors)
    places = {"picture": tmp_path / "picture.safetensors", "lora": write_lora(tmp_path / "lora.safetensors")}
    given = [word.format(**places) for word in words]
    named = () if "--motion" in words else ("--motion", adapter)
    out = tmp_path / "out"
    answer = call("a dog", "--model", tiny_folder, *named, *given, "--device", "cpu", "--out", out)
    assert answer.exit_code != 0 and not out.exists()
    message = str(answer.exception) if isinstance(answer.exception, UserError) else answer.output
    assert said in message


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two clips in which a square walks, one of them with a caption."""
    folder = tmp_path_factory.mktemp("walks")
    for name in ("one", "two"):
        frames = [Image.new("RGB", (64, 64), "white") for _ in range(5)]
        for number, frame in enumerate(frames):
            frame.paste((200, 40, 40), (8 * number, 20, 8 * number + 20, 40))
        (folder / f"{name}.webp").write_bytes(encode_webp(frames, 8))
    (folder / "one.txt").write_text("a red square, [M]")
    return folder


def learn(model: Path, adapter: Path, clips: Path, out: Path, *words: str) -> Any:
    usual = ("--model", model, "--motion", adapter, "--clips", clips, "--out", out, "--device", "cpu")
    words = words or ("--frames", "4")
    few = ("--steps", "2", "--rank", "2", "--precision", "fp32", "--prior-clips", "1", *words)
    return CliRunner().invoke(app, ["train-motion", *map(str, (*usual, *few))])


def test_a_motion_is_learned_apart_from_the_looks_and_drawn_with_a_subject(
    tiny_folder: Path, adapter: Path, walks: Path, tmp_path: Path
) -> None:
    answer = learn(tiny_folder, adapter, walks, tmp_path / "walk")
    assert answer.exit_code == 0, answer.exception
    tensors, config = read_motion_lora(tmp_path / "walk" / LORA_WEIGHTS)
    assert all(".motion_modules." in name for name in tensors) and config.rank == 2
    assert any(bool(value.any()) for name, value in tensors.items() if ".lora_B." in name)
    answer = call(
        *("a dog, [M]", "--concept", tmp_path / "walk", "--frames", "2", "--steps", "1", "--device", "cpu"),
        *("--precision", "fp32", "--out", tmp_path / "drawn"),
    )
    assert answer.exit_code == 0, answer.exception
    record = read_json(tmp_path / "drawn" / "run.json")
    assert record["motion"] == str(adapter)
    assert record["clips"][0]["model_reads"] == "a dog, moving in its own way"
    with pytest.raises(UserError, match="a motion, which a picture cannot have"):
        check_concept_fits(
            read_concept(tmp_path / "walk"), Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        )
    taken = learn(tiny_folder, adapter, walks, tmp_path / "walk")
    assert isinstance(taken.exception, UserError)
    longer = learn(tiny_folder, adapter, walks, tmp_path / "no", "--frames", "6")
    assert "two.webp has 5 frames" in str(longer.exception) or "one.webp has 5 frames" in str(
        longer.exception
    )
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_learned_motion_and_a_subject_each_change_what_a_clip_of_both_shows(
    tiny_folder: Path, adapter: Path, walks: Path, tmp_path: Path
) -> None:
    answer = learn(tiny_folder, adapter, walks, tmp_path / "walk", "--frames", "4", "--learning-rate", "0.1")
    assert answer.exit_code == 0, answer.exception
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    write_run(tmp_path / "dog", model, [layer], "lora", {"[V]": "red"})
    runs = {"[V]": tmp_path / "dog", "[M]": tmp_path / "walk"}
    shown = {}
    for name, tokens in {"both": ("[V]", "[M]"), "subject": ("[V]",), "motion": ("[M]",)}.items():
        concepts = [word for token in tokens for word in ("--concept", runs[token])]
        record = draw(tiny_folder, adapter, tmp_path / name, f"a {tokens[0]} dog, {tokens[-1]}", *concepts)
        shown[name] = read_film(tmp_path / name / "p00-s00.webp").frames[1].tobytes()
        assert len(record["concepts"]) == len(tokens)
    assert len(set(shown.values())) == 3


def test_clips_of_the_class_are_kept_as_the_base_predicts_them(tiny_folder: Path, adapter: Path) -> None:
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    set_in_motion(model, Moves(str(adapter)))
    asked = TrainMotionOptions(clips="x", motion="y", frames=3, rank=2, prior_clips=1)
    prior = draw_prior(model, ["a dog, [M]", "a dog, [M]"], asked)
    assert prior is not None and prior.clips[0].shape == (4, 3, 8, 8)
    clips = [torch.randn(4, 3, 8, 8)]
    learning = MotionLearning(model, clips, encode_prompts_cached(model, ["a dog", ""]), asked, prior)
    random = torch.Generator().manual_seed(0)
    assert float(learning.measure_drift(prior, random)) < 1e-10  # nothing has been learned yet
    moved = [value for name, value in learning.parameters.items() if ".motion_modules." in name]
    for value in moved:
        torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(1))
    drift = learning.measure_drift(prior, random)
    drift.backward()
    assert float(drift) > 0 and all(value.grad is not None for value in moved)
    assert not any(value.grad is not None and value.grad.any() for value in learning.appearance)
    assert all(value.requires_grad for value in learning.parameters.values())
    assert draw_prior(model, ["a dog"], replace(asked, prior="off")) is None
    assert draw_prior(model, ["a dog"], replace(asked, prior_loss_weight=0.0)) is None


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a dog, [M]", "a dog"),
        ("[M], a dog in the snow", "a dog in the snow"),
        ("a [M] dog", "a dog"),
        ("[M]", ""),
    ],
)
def test_the_class_is_what_a_prompt_says_without_the_token(prompt: str, said: str) -> None:
    assert without_token(prompt, "[M]") == said


def test_a_token_counts_as_a_whole_word_and_stands_in_every_prompt() -> None:
    assert without_token("a dog moving, mov", "mov") == "a dog moving"
    assert with_token("a dog moving", "mov") == "a dog moving, mov"
    assert with_token("mov, a dog", "mov") == "mov, a dog"
    assert with_token(" ", "mov") == "mov"


def test_what_captions_of_clips_say_to_other_programs_is_plain_text_and_said(
    tiny: Backbone, walks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = list_films(str(walks))[0].film
    told = [CaptionedFilm(first, one) for one in ("{token}, a (red:1.3) dog in {place}", "", "a dog " * 60)]
    asked = TrainMotionOptions(clips="walks", motion="adapter", prompt="a clip")
    motion = Concept("motion", "tiny", "f", {"[M]": asked.token_words}, "")
    prompts = write_prompts(told, asked, motion, tiny)
    assert (
        prompts[0].text.startswith("[M], a (red") and prompts[1].resolved == "a clip, moving in its own way"
    )
    lines = capsys.readouterr().err
    for line in ("hold {place}", "hold “(red:1.3)", "reads 77, the token [M] not among them"):
        assert line in lines


@pytest.mark.parametrize(
    ("scales", "motions", "said"),
    [
        ({"motion_scale": 0.5}, (False,), "--motion-scale has no effect: no --concept is a motion"),
        ({"motion_scale": 0.5}, (False, True), ""),
        ({"motion_scale": 0.5, "lora": (Path("a"),), "motion": "m"}, (False,), ""),
        ({"scale": 0.5}, (True, True), "--scale has no effect: every --concept is a motion"),
        ({"scale": 0.5}, (False, True), ""),
    ],
)
def test_a_strength_of_concepts_that_are_not_there_is_refused(
    scales: dict[str, Any], motions: tuple[bool, ...], said: str
) -> None:
    runs = tuple(Path(str(number)) for number in range(len(motions)))
    asked = ClipOptions(words=("a dog",), concepts=runs, **scales)
    if not said:
        refuse_other_scales(asked, motions)
        return
    with pytest.raises(UserError, match=said):
        refuse_other_scales(asked, motions)


def test_a_prompt_for_clips_that_all_have_captions_is_said(
    tiny: Backbone, walks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = list_films(str(walks))[0].film
    motion = Concept("motion", "tiny", "f", {"[M]": "moving"}, "")
    for prompt, captions, said in (
        ("a clip of a dog", ("a dog", "a dog"), True),
        ("a clip of a dog", ("a dog", ""), False),
        (TrainMotionOptions.prompt, ("a dog", "a dog"), False),
    ):
        asked = TrainMotionOptions(clips="walks", motion="adapter", prompt=prompt)
        write_prompts([CaptionedFilm(first, one) for one in captions], asked, motion, tiny)
        assert ("--prompt has no effect" in capsys.readouterr().err) == said


def test_captions_of_clips_are_read_as_those_of_images(walks: Path, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    frames = read_film(walks / "one.webp").frames
    (clips / "three.left").mkdir(parents=True)
    for number, frame in enumerate(frames):
        frame.save(clips / "three.left" / f"{number}.png")
    with pytest.raises(UserError, match=r"holds no frames itself.*three\.left"):
        read_film(clips)
    for name in ("one", "two"):
        shutil.copy(walks / f"{name}.webp", clips)
    (clips / "one.caption").write_bytes("\ufeffa red square\r\n".encode())
    (clips / "three.left.txt").write_text("to the left")

    def said() -> dict[str, str]:
        return {Path(one.film.name).name: one.caption for one in list_films(str(clips))}

    assert said() == {"one.webp": "a red square", "two.webp": "", "three.left": "to the left"}
    (clips / "metadata.jsonl").write_text('{"file_name": "two.webp", "text": "a blue square"}')
    assert said()["two.webp"] == "a blue square"
    (clips / "three.left.txt").write_bytes("zur\xfcck".encode("latin-1"))
    with pytest.raises(UserError, match=r"three\.left\.txt is not UTF-8"):
        said()


@contextmanager
def stopped_at_the_second_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside the `with`, whatever learns a motion stops before its second step."""
    plain = MotionLearning.losses

    def stopped(self: MotionLearning, step: int) -> Iterator[torch.Tensor]:
        if step == 2:
            raise UserError("stopped")
        return plain(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(MotionLearning, "losses", stopped)
        yield


def test_a_motion_goes_on_bit_for_bit(tiny_folder: Path, adapter: Path, tmp_path: Path) -> None:
    clips = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]

    def begin() -> MotionLearning:
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        set_in_motion(model, Moves(str(adapter)))
        asked = TrainMotionOptions(clips="x", motion="y", frames=3, rank=2, steps=2)
        conditions = encode_prompts_cached(model, ["a dog", ""])
        return MotionLearning(model, clips, conditions, asked, Prior(clips, conditions))

    whole, first, second = begin(), begin(), begin()
    list(take_steps(whole))
    next(iter(take_steps(first)))
    first.save(tmp_path)
    second.resume(tmp_path)
    assert [step.step for step in take_steps(second)] == [2]
    assert all(torch.equal(second.parameters[name], value) for name, value in whole.parameters.items())
    assert any(not torch.equal(first.parameters[name], value) for name, value in whole.parameters.items())


@pytest.mark.slow
def test_a_motion_that_was_stopped_goes_on_to_the_same_weights(
    tiny_folder: Path, adapter: Path, walks: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = ("--frames", "3", "--checkpointing-steps", "1")
    assert learn(tiny_folder, adapter, walks, tmp_path / "whole", *few).exit_code == 0
    latest = (*few, "--resume", "latest")  # begins where no step was saved, and then goes on
    with stopped_at_the_second_step(monkeypatch):
        assert learn(tiny_folder, adapter, walks, tmp_path / "parts", *latest).exit_code != 0
    assert (tmp_path / "parts" / CHECKPOINT).exists()
    vain = CliRunner().invoke(app, ["train-motion", "--resume", str(tmp_path / "parts"), "--steps", "9"])
    assert "so --steps has no effect" in str(vain.exception)
    changed = ("--frames", "4", *latest[2:])
    other = learn(tiny_folder, adapter, walks, tmp_path / "parts", *changed)
    assert "so --frames has no effect" in str(other.exception)
    monkeypatch.chdir(tmp_path)  # from anywhere
    for words in (("parts/latest", "--steps", "2"), ("parts/checkpoint-2",)):
        answer = CliRunner().invoke(app, ["train-motion", "--resume", *words])
        assert answer.exit_code == 0, answer.exception
    monkeypatch.chdir(adapter.parent)
    assert learn(tiny_folder, Path(adapter.name), walks, tmp_path / "parts", *latest).exit_code == 0
    whole, parts = (read_motion_lora(tmp_path / name / LORA_WEIGHTS)[0] for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())
    nothing = CliRunner().invoke(app, ["train-motion", "--resume", str(tmp_path)])
    assert "holds no run of train-motion" in str(nothing.exception)


WHOLE = ("--method", "full", "--frames", "3", "--prior", "off")


def learn_whole(model: Path, walks: Path, out: Path, *words: str | Path) -> Any:
    usual = (
        "--model",
        model,
        "--clips",
        walks,
        "--out",
        out,
        "--device",
        "cpu",
        "--steps",
        "2",
        "--rank",
        "2",
    )
    precision = () if "--precision" in words else ("--precision", "fp32")
    return CliRunner().invoke(app, ["train-motion", *map(str, (*usual, *precision, *WHOLE, *words))])


def test_all_weights_of_an_adapter_are_learned_into_one_that_diffusers_draws_with(
    tiny_folder: Path, adapter: Path, walks: Path, tmp_path: Path
) -> None:
    answer = learn_whole(tiny_folder, walks, tmp_path / "run", "--motion", adapter, "--learning-rate", "0.01")
    assert answer.exit_code == 0, answer.exception
    run = tmp_path / "run"
    assert f'customize clip "a dog in a park" --motion {run}' in answer.output
    assert not (run / "concept.json").exists()
    learned, before = (MotionAdapter.from_pretrained(folder) for folder in (run, adapter))
    moved = {
        name: bool((value != before.state_dict()[name]).any()) for name, value in learned.state_dict().items()
    }
    assert all(changed for name, changed in moved.items() if name.endswith("proj_out.weight"))
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    set_in_motion(model, Moves(str(run)))
    theirs: Any = AnimateDiffPipeline.from_pretrained(tiny_folder, motion_adapter=learned)
    conditions = encode_prompts_cached(model, ["a dog"])
    clip, index = torch.randn(1, 4, 3, 8, 8), torch.tensor([500])
    words = conditions.text["hidden"].repeat_interleave(3, 0)
    wanted = theirs.unet(clip, index, encoder_hidden_states=words).sample
    torch.testing.assert_close(model.predict(clip, index, conditions), wanted, atol=1e-5, rtol=0)


def test_a_new_adapter_is_begun_from_the_model_s_widths_and_keeps_pictures(
    tiny_folder: Path, walks: Path, tmp_path: Path
) -> None:
    answer = learn_whole(tiny_folder, walks, tmp_path / "run", "--precision", "bf16")
    assert answer.exit_code == 0, answer.exception
    assert "A new motion adapter of 0.1 M parameters starts from nothing" in answer.output
    learned = read_motion_adapter(str(tmp_path / "run"))
    assert all(value.dtype is torch.float32 for value in learned.state_dict().values())
    answer = call(
        *("a dog", "--model", tiny_folder, "--motion", tmp_path / "run", "--frames", "2", "--steps", "1"),
        *("--device", "cpu", "--out", tmp_path / "drawn"),
    )
    assert answer.exit_code == 0, answer.exception


@pytest.mark.slow
@pytest.mark.parametrize("more", [(), ("--gradient-checkpointing",), ("--vram", "1")])
def test_a_whole_adapter_that_was_stopped_goes_on_to_the_same_weights(
    more: tuple[str, ...],
    tiny_folder: Path,
    adapter: Path,
    walks: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words: tuple[str | Path, ...] = ("--motion", adapter, "--checkpointing-steps", "1", *more)
    assert learn_whole(tiny_folder, walks, tmp_path / "whole", *words).exit_code == 0
    with stopped_at_the_second_step(monkeypatch):
        assert learn_whole(tiny_folder, walks, tmp_path / "parts", *words).exit_code != 0
    assert not (tmp_path / "parts" / "config.json").exists()
    vain = CliRunner().invoke(app, ["train-motion", "--resume", str(tmp_path / "parts"), "--steps", "9"])
    assert "so --steps has no effect" in str(vain.exception)
    monkeypatch.chdir(tmp_path / "parts")  # from anywhere
    answer = CliRunner().invoke(app, ["train-motion", "--resume", str(tmp_path / "parts"), "--steps", "2"])
    assert answer.exit_code == 0, answer.exception
    whole, parts = (read_motion_adapter(str(tmp_path / name)).state_dict() for name in ("whole", "parts"))
    assert all(torch.equal(parts[name], value) for name, value in whole.items())


@pytest.mark.parametrize("method", ["lora", "full"])
def test_computing_again_in_the_backward_pass_gives_the_same_gradients(
    method: str, tiny_folder: Path, adapter: Path
) -> None:
    found = []
    for again in (False, True):
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        set_in_motion(model, Moves(str(adapter)))
        asked = TrainMotionOptions(clips="x", motion="y", method=method, frames=3, rank=2)
        asked = replace(asked, gradient_checkpointing=again)
        clips = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
        conditions = encode_prompts_cached(model, ["a dog", ""])
        prior = Prior(clips, conditions) if method == "lora" else None
        learning = MotionLearning(model, clips, conditions, asked, prior)
        for name, value in learning.parameters.items():
            if ".lora_B." in name:
                torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(1))
        for loss in learning.losses(0):
            loss.backward()
        found.append({name: value.grad for name, value in learning.parameters.items()})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, atol=1e-6, rtol=1e-4)
    assert any(
        gradient is not None and gradient.any()
        for name, gradient in found[0].items()
        if "motion_modules" in name
    )


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--token", "[W]"), "--token has no effect without --method lora"),
        (("--prior", "base"), "--prior"),
        (("--frames", "9", "--motion", "{adapter}"), "has 5 frames, and --frames is 9"),
        (("--motion", "nowhere"), "no motion adapter nowhere"),
        (("--vram", "0.1", "--clips", "nowhere"), "There is no folder nowhere"),
    ],
)
def test_what_a_whole_adapter_cannot_learn_is_said_and_nothing_is_written(
    words: tuple[str, ...], said: str, tiny_folder: Path, adapter: Path, walks: Path, tmp_path: Path
) -> None:
    given = [word.format(adapter=adapter) for word in words]
    usual = ("--model", tiny_folder, "--method", "full", "--device", "cpu", "--out", tmp_path / "run")
    clips = () if "--clips" in words else ("--clips", walks)
    frames = () if "--frames" in words else ("--frames", "3")
    answer = CliRunner().invoke(app, ["train-motion", *map(str, (*usual, *clips, *frames, *given))])
    message = str(answer.exception) if isinstance(answer.exception, UserError) else answer.output
    assert answer.exit_code != 0 and said in message and not (tmp_path / "run").exists()


def test_the_words_of_an_adapter_are_heard_while_its_motion_is_learned(
    tiny_folder: Path, adapter: Path, tmp_path: Path
) -> None:
    shutil.copytree(adapter, tmp_path / "worded")
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    torch.nn.init.normal_(
        add_lora(model.denoiser, "words", rank=2, alpha=2.0, targets=[layer])[f"{layer}.lora_B.words.weight"]
    )
    save_lora(tmp_path / "worded" / LORA_WEIGHTS, model.denoiser, "words")
    said = []
    for name in ("worded", "plain"):
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        set_in_motion(model, Moves(str(adapter if name == "plain" else tmp_path / name)))
        asked = TrainMotionOptions(clips="x", motion="y", frames=3, rank=2)
        clip = torch.randn(1, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        learning = MotionLearning(model, [clip[0]], encode_prompts_cached(model, ["a dog", ""]), asked)
        said.append(learning.predict(clip, learning.conditions[[0]], torch.Generator().manual_seed(1))[0])
    assert (said[0] - said[1]).abs().max() > 1e-4


def test_what_all_frames_have_in_common_is_no_part_of_the_loss_without_looks() -> None:
    clip = torch.randn(1, 2, 4, 3, 3)
    common = torch.randn(1, 2, 1, 3, 3)
    one, two = remove_appearance(clip, 1), remove_appearance(clip + common, 1)
    torch.testing.assert_close(two - one, (2**0.5 - 1) * common.expand_as(clip))
    assert torch.allclose(remove_appearance(clip, 1, beta=0.0), clip)


def test_the_command_that_draws_a_motion_asks_for_its_frames_and_its_model(tmp_path: Path) -> None:
    learned = TrainMotionOptions(clips="c", motion="m", model="my model", frames=4, token="<$M>")
    assert (
        format_motion_command(learned, tmp_path / "a run")
        .split(" --motion ")[1]
        .endswith("'my model' --frames 4")
    )
    (tmp_path / ADAPTER_FILE).touch()
    words = shlex.split(format_motion_command(replace(learned, frames=16), tmp_path))
    assert words == ["customize", "clip", "a dog in a park, <$M>", "--concept", str(tmp_path)]


def test_a_motion_s_token_is_no_ordinary_word(
    tiny_folder: Path, adapter: Path, walks: Path, tmp_path: Path
) -> None:
    answer = learn(tiny_folder, adapter, walks, tmp_path / "run", "--frames", "3", "--token", "dog")
    assert "“dog” is an ordinary word" in str(answer.exception) and not (tmp_path / "run").exists()
    answer = learn(tiny_folder, adapter, walks, tmp_path / "run", "--frames", "9")
    assert "has 5 frames, and --frames is 9" in str(answer.exception)
