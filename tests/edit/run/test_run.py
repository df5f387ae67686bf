"""`edit` as a person uses it: commands in, run folders out, mistakes answered in a sentence."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from backbone.adapters.concept import Concept
from backbone.adapters.lora import add_lora, lora_parameters, save_lora
from backbone.io.console import UserError, printed_once
from backbone.io.files import write_json
from backbone.io.prompts import one_prompt
from backbone.models.model import Backbone
from edit.checks import parse_swap, parse_weight, parse_window
from edit.cli import app, main
from edit.inversion.inversion import identify
from edit.run.commands import run_flow_edit
from tests.edit.methods.prompt_to_prompt.test_replace import left_half
from tests.edit.models import photo

Edit = Callable[..., int]
WORDS = ("--source", "a cat in the snow", "--target", "a dog in the snow")


def test_the_example_can_be_edited_at_once(tmp_path: Path) -> None:
    for _ in range(2):  # a second time it is there already
        done = CliRunner().invoke(app, ["example", str(tmp_path / "cat")])
        assert done.exit_code == 0
    assert (
        f"edit invert-and-replace {tmp_path}/cat/scene.png --source {tmp_path}/cat/scene.txt" in done.stderr
    )
    assert Image.open(tmp_path / "cat/scene.png").size == (128, 128)
    assert one_prompt(str(tmp_path / "cat/scene.txt"), "--source") == "a cat in a park"
    (tmp_path / "cat/scene.txt").rename(tmp_path / "cat/mine.txt")
    assert isinstance(CliRunner().invoke(app, ["example", str(tmp_path / "cat")]).exception, UserError)


@pytest.fixture
def edit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_folder: Path) -> Edit:
    """Runs `edit` in an empty folder with a picture in it; gives the exit code."""
    monkeypatch.chdir(tmp_path)
    photo().save("photo.png")

    def call(*arguments: str) -> int:
        model = () if "--model" in arguments else ("--model", str(tiny_folder))
        quick = (*model, "--precision", "fp32", "--device", "cpu")
        steps = () if {"--inversion", "--steps"} & set(arguments) else ("--steps", "2")
        more = () if arguments[0] == "replay" else (*quick, *steps)
        monkeypatch.setattr(sys, "argv", ["edit", *arguments, *more])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0)

    return call


def record(folder: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path(folder, "run.json").read_text())
    return found


def test_an_edit_leaves_everything_that_it_should(edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    code = edit("invert-and-replace", "photo.png", *WORDS, "--target", "a red cat in the snow", "--heatmap", "snow",
                "--trajectory", "--guidance", "3")  # fmt: skip
    assert code == 0, capsys.readouterr().err
    assert {path.name for path in Path("runs/edit-photo").iterdir()} >= {
        *("source.png", "edit_0.png", "edit_1.png", "reconstruction.png", "sheet.png", "heatmap_snow.png"),
        *("trajectory.gif", "report.html", "run.json", "README.md", "inversion.safetensors"),
    }
    said = record("runs/edit-photo")
    looks = 2 * 3  # three prompts at both rungs, for the places where they differ
    assert said["nfe"] == said["nfe_of_inversion"] + looks + 2 * 5 == 18
    assert said["reconstruction_psnr_db"] == said["autoencoder_psnr_db"]
    assert [one["prompt"] for one in said["edits"]] == ["a dog in the snow", "a red cat in the snow"]
    assert said["edits"][0]["psnr_db"] > 0 and "seconds" in said and "peak_memory_mb" in said
    assert "replaced" in said["alignment"][0]
    err = capsys.readouterr().err
    assert "replaced" in err and "runs/edit-photo/sheet.png" in err
    assert "edit replay runs/edit-photo/run.json" in Path("runs/edit-photo/README.md").read_text()
    texts: Any = Image.open("runs/edit-photo/edit_1.png").info
    assert texts["prompt"] == "a red cat in the snow"
    assert "Steps: 2, Sampler: direct, CFG scale: " in texts["parameters"]
    assert "Edit: invert-and-replace, " in texts["parameters"]
    assert "Source: a cat in the snow, Control: prompt-to-prompt" in texts["parameters"]
    assert json.loads(texts["limner"])["edit_number"] == 1
    report = Path("runs/edit-photo/report.html").read_text()
    assert "What became of the words" in report and "edit replay" in report
    title = "a cat in the snow: prompt-to-prompt on direct inversion, 2 steps"
    assert f"<h1>{title}</h1>" in report and f"# {title}\n" in Path("runs/edit-photo/README.md").read_text()
    assert "data:image/gif" in report and "peak memory, MB" in report
    width, height = Image.open("runs/edit-photo/sheet.png").size
    assert width > height  # a row for each edit, nothing but the source repeated


def test_what_was_not_measured_is_not_said_to_be_and_a_folder_with_a_blank_is_quoted(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("sdedit", "photo.png", "--prompt", "a cat")
    assert edit(*asked, "--no-metrics", "--out", "a cat") == 0
    err, readme = capsys.readouterr().err, Path("a cat/README.md").read_text()
    assert "a cat/report.html has the details." in err and "measure" not in err and "figures" not in readme
    assert "    edit replay 'a cat/run.json'\n" in readme
    assert edit(*asked, "--out", "two") == 0
    assert "two/report.html measures it." in capsys.readouterr().err
    assert "with figures" in Path("two/README.md").read_text()


def test_an_edit_is_repeated_exactly_and_only_with_the_same_picture(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("invert-and-replace", "photo.png", *WORDS, "--out", "one", "--method", "edit-friendly") == 0
    assert edit("replay", "one/run.json", "--out", "two") == 0
    for name in ("edit_0.png", "reconstruction.png"):
        assert Image.open(f"one/{name}").tobytes() == Image.open(f"two/{name}").tobytes()
    assert record("two")["settings"] == record("one")["settings"]
    photo(seed=3).save("photo.png")
    assert edit("replay", "one", "--out", "three") == 2
    assert "photo.png has changed" in capsys.readouterr().err
    Path("photo.png").unlink()  # or it lies in another folder than this one
    assert edit("replay", "one", "--out", "three") == 2
    assert f"photo.png is missing. It was looked for from {Path.cwd()}" in " ".join(
        capsys.readouterr().err.split()
    )
    assert not Path("three").exists()


def test_a_replay_has_the_defaults_that_the_model_had_at_that_time(
    edit: Edit, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    write_json(model / "limner.json", {"guidance": 3.0, "edit": {"self_attention": 0.0}})
    words = ("--model", str(model), *WORDS, "--target", "a red cat in the snow")
    assert edit("invert-and-replace", "photo.png", *words, "--out", "one") == 0
    assert record("one")["defaults"] == {"guidance": 3.0, "edit": {"self_attention": 0.0}}
    write_json(
        model / "limner.json", {"guidance": 6.0, "guidance_stop": 0.5, "edit": {"self_attention": 1.0}}
    )
    assert edit("replay", "one", "--out", "again") == 0
    assert Image.open("one/edit_0.png").tobytes() == Image.open("again/edit_0.png").tobytes()
    write_json(Path("one/run.json"), record("one") | {"defaults": {"guidance": "much"}})
    capsys.readouterr()
    assert edit("replay", "one", "--out", "refused") == 2
    assert "guidance in one/run.json is much, which is not a number" in " ".join(
        capsys.readouterr().err.split()
    )


def test_an_inversion_serves_any_number_of_edits(edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    assert edit("invert", "photo.png", "--prompt", "a cat in the snow", "--check") == 0
    err = capsys.readouterr().err
    assert "The autoencoder alone" in err and "guidance 1:" in err
    file = ("--inversion", "photo.safetensors")
    assert edit("invert-and-replace", *file, "--target", "a dog in the snow", "--out", "a") == 0
    assert record("a")["nfe_of_inversion"] == 2
    assert not Path("a/inversion.safetensors").exists()
    settings = record("a")["settings"]
    assert not {"steps", "method", "iterations"} & set(settings) and record("a")["steps"] == 2
    for name, value in (("--steps", "20"), ("--method", "null-text"), ("--seed", "1")):
        assert edit("invert-and-replace", *file, "--target", "a dog in the snow", name, value) == 2
        assert f"{name} has no effect" in capsys.readouterr().err
    assert edit("remove", *file, "--remove", "cat", "--strength", "0.5", "--seed", "3", "--out", "b") == 0
    assert "Without cat: “in the snow”" in capsys.readouterr().err
    assert edit("replay", "b", "--out", "again") == 0
    assert Image.open("b/edit_0.png").tobytes() == Image.open("again/edit_0.png").tobytes()
    assert edit("compose", *file, "--toward", "a red cat=2", "--away", "snow=1", "--out", "c") == 0
    assert record("c")["settings"]["toward"] == [["a red cat", 2.0], ["snow", -1.0]]
    assert edit("invert-and-replace", *file, "--source", "a dog", "--target", "a cat") == 2
    assert "Leave --source out" in capsys.readouterr().err
    assert edit("invert", "photo.png", "--prompt", "a cat") == 2
    assert "exists already" in capsys.readouterr().err


def test_other_commands_write_run_folders_that_can_be_repeated(edit: Edit) -> None:
    left_half().save("mask.png")
    photo(seed=2).save("other.png")
    commands = {
        "sd": (
            "sdedit",
            "photo.png",
            "--prompt",
            "a dog",
            "--strength",
            "0.5",
            "--mask",
            "mask.png",
            "--count",
            "2",
        ),
        "fe": ("flow-edit", "photo.png", *WORDS, "--trajectory"),
        "bt": (
            "interpolate",
            "photo.png",
            "other.png",
            "--prompts",
            "a cat",
            "--prompts",
            "a dog",
            "--count",
            "3",
        ),
        "mc": ("invert-and-replace", "photo.png", *WORDS, "--control", "masactrl"),
    }
    for name, command in commands.items():
        assert edit(*command, "--out", name) == 0
        assert {"run.json", "report.html", "sheet.png", "edit_0.png"} <= {
            path.name for path in Path(name).iterdir()
        }
    assert edit("replay", "sd", "--out", "again") == 0
    assert Image.open("sd/edit_1.png").tobytes() == Image.open("again/edit_1.png").tobytes()
    assert (Path("sd/edit_1.png").exists(), Path("bt/trajectory.gif").exists()) == (True, True)


def test_a_photograph_of_1200_by_900_is_edited_whole(edit: Edit) -> None:
    photo(1200, 900).save("photo.png")
    mask = Image.new("L", (1200, 900))
    mask.paste(255, (0, 0, 600, 900))
    mask.save("mask.png")
    asked = ("photo.png", "--mask", "mask.png", "--no-metrics", "--out")
    assert edit("sdedit", *asked, "one", "--prompt", "a dog") == 0
    assert edit("invert-and-replace", *asked, "two", *WORDS) == 0
    assert edit("remove", *asked, "three", "--source", "a cat in the snow") == 0
    assert Image.open("one/edit_0.png").size == Image.open("three/edit_0.png").size == (80, 48)


def test_a_concept_is_worn_and_its_token_understood(
    edit: Edit, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = add_lora(tiny.denoiser, "x", rank=2, alpha=4.0, targets=("to_q", "to_v"))
    for value in lora_parameters(tiny.denoiser, "x").values():
        value.data.fill_(0.3)
    assert adapter
    save_lora(Path("dog/weights.safetensors"), tiny.denoiser, "x")
    concept = Concept(
        "lora", str(tiny.location.name), tiny.fingerprint, {"[V]": "bcd"}, "dog", "weights.safetensors"
    )
    concept.write(Path("dog"))
    words = ("--source", "a cat in the snow", "--target", "a [V] dog in the snow")
    assert (
        edit("invert-and-replace", "photo.png", *words, "--concept", "dog", "--out", "worn", "--blend", "[V]")
        == 0
    )
    assert record("worn")["concepts"][0]["tokens"] == {"[V]": "bcd"}
    assert "[V] dog" in record("worn")["alignment"][0]
    assert edit("invert-and-replace", "photo.png", *words) == 2
    assert "No given concept owns the token [V]" in capsys.readouterr().err


def test_a_concept_that_no_prompt_of_an_edit_calls_is_said(
    edit: Edit, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    add_lora(tiny.denoiser, "x", rank=2, alpha=4.0, targets=("to_q", "to_v"))
    save_lora(Path("dog/weights.safetensors"), tiny.denoiser, "x")
    name, owned = str(tiny.location.name), {"[V]": "bcd"}
    Concept("lora", name, tiny.fingerprint, owned, "dog", "weights.safetensors").write(Path("dog"))
    worn, said = ("--concept", "dog", "--no-metrics"), "has [V], the token of dog"
    calls = ("invert-and-replace", "photo.png", "--source", "a [V] dog", "--target", "a cat", *worn)
    assert edit(*calls, "--out", "a") == 0
    from_file = ("invert-and-replace", "--inversion", "a/inversion.safetensors", "--target", "a cat", *worn)
    assert edit(*from_file) == 0
    assert edit("invert", "photo.png", "--source", "a dog", *worn[:2], "--out", "b.safetensors") == 0
    assert said not in capsys.readouterr().err
    for command in (
        ("invert-and-replace", "photo.png", *WORDS),
        ("invert-and-replace", "--inversion", "b.safetensors", "--target", "a cat"),
        ("flow-edit", "photo.png", *WORDS),
        ("compose", "photo.png", "--source", "a cat", "--toward", "a dog=1"),
        ("invert-and-replace", "photo.png", *WORDS, "--dry-run"),
    ):
        assert edit(*command, *worn) == 0
        assert said in capsys.readouterr().err
        printed_once.clear()


def test_words_may_stand_in_files(edit: Edit) -> None:
    Path("cat.txt").write_text("a cat in the snow\n")
    Path("targets.txt").write_text("a dog in the snow\na red cat in the snow\n")
    assert (
        edit(
            "invert-and-replace", "photo.png", "--source", "cat.txt", "--target", "targets.txt", "--out", "a"
        )
        == 0
    )
    assert record("a")["settings"]["source"] == "a cat in the snow"
    assert record("a")["settings"]["targets"] == ["a dog in the snow", "a red cat in the snow"]
    Path("both.txt").write_text("a cat\na dog\n")
    assert (
        edit("interpolate", "photo.png", "photo.png", "--prompts", "both.txt", "--count", "3", "--out", "b")
        == 0
    )
    assert record("b")["settings"]["second_prompt"] == "a dog"


def test_a_concept_s_strength_is_part_of_an_edit_and_of_an_inversion(
    edit: Edit, tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    add_lora(tiny.denoiser, "x", rank=2, alpha=4.0, targets=("to_q", "to_v"))
    for number, value in enumerate(lora_parameters(tiny.denoiser, "x").values()):
        # Not all the same, which a layer norm's outputs would cancel: they have a mean of 0
        value.data.normal_(std=0.3, generator=torch.Generator().manual_seed(number))
    for folder in ("dog", "dog/best"):
        save_lora(Path(folder, "weights.safetensors"), tiny.denoiser, "x")
        name, owned = str(tiny.location.name), {"[V]": "bcd"}
        Concept("lora", name, tiny.fingerprint, owned, "dog", "weights.safetensors").write(Path(folder))
    worn = ("--concept", "dog", "--scale", "0.5")
    assert edit("sdedit", "photo.png", "--prompt", "a [V] dog", *worn, "--out", "half") == 0
    assert "Using the best checkpoint of" in capsys.readouterr().err
    assert (record("half")["scale"], record("half")["settings"]["concepts"]) == (0.5, ["dog/best"])
    assert edit("replay", "half", "--out", "again") == 0
    assert Image.open("half/edit_0.png").tobytes() == Image.open("again/edit_0.png").tobytes()
    assert edit("sdedit", "photo.png", "--prompt", "a [V] dog", *worn[:2], "--out", "whole") == 0
    assert Image.open("half/edit_0.png").tobytes() != Image.open("whole/edit_0.png").tobytes()
    assert edit("invert", "photo.png", "--source", "a [V] dog", *worn) == 0
    made = ("invert-and-replace", "--inversion", "photo.safetensors", "--target", "a red [V] dog")
    assert edit(*made, *worn[:2]) == 2
    assert "another scale" in capsys.readouterr().err
    assert edit(*made, *worn) == 0


def test_a_dry_run_prints_what_becomes_of_the_words_and_writes_nothing(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    assert edit("invert-and-replace", *WORDS, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "replaced" in out and "predicts the two prompts differently" in out
    assert [path.name for path in Path().iterdir()] == ["photo.png"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("invert-and-replace", "nowhere.png", *WORDS), "nowhere.png does not exist"),
        (("invert-and-replace", "photo.png", "--target", "a dog"), "Give --source"),
        (("invert-and-replace", *WORDS), "nothing to edit"),
        (("invert-and-replace", "photo.png", "--source", " ", "--target", "a dog"), "source prompt is empty"),
        (("invert-and-replace", "photo.png", "--source", "a cat", "--target", ""), "target prompt is empty"),
        (("invert-and-replace", "photo.png", "--source", "cat", "--target", "dog"), "share no words"),
        (
            ("invert-and-replace", "photo.png", *WORDS, "--cross", "2"),
            "--cross is 2 and must lie between 0 and 1",
        ),
        (("invert-and-replace", "photo.png", *WORDS, "--reweight", "dog"), "not a word and a number"),
        (("invert-and-replace", "photo.png", *WORDS, "--window", "dog=a:b"), "not a word and its window"),
        (("invert-and-replace", "photo.png", *WORDS, "--swap", "dog"), "not a pair of words"),
        (("invert-and-replace", "photo.png", *WORDS, "--blend", "snwo"), "Did you mean “snow”"),
        (
            ("invert-and-replace", "photo.png", *WORDS, "--mask", "wide.png"),
            "20 × 10 pixels",
        ),
        (("invert-and-replace", "photo.png", *WORDS, "--blend", "none", "--blend", "cat"), "--blend none is"),
        (
            (
                *("invert-and-replace", "photo.png", "--source", "auto cat"),
                "--target",
                "auto dog",
                "--blend",
                "auto",
            ),
            "“auto” is a word of a prompt too",
        ),
        (("invert-and-replace", "photo.png", *WORDS, "--mask", "black.png"), "lets nothing change"),
        (("invert-and-replace", "photo.png", *WORDS, "--steps", "1"), "1 step is too few to invert"),
        (("sdedit", "photo.png", "--prompt", "a", "--strength", "0.2"), "less than one of 2 steps"),
        (
            ("remove", "photo.png", "--source", "a cat", "--remove", "cat", "--negative", "red"),
            "At guidance 1",
        ),
        (("invert-and-replace", "photo.png", *WORDS, "--inversion", "x"), "both given"),
        (("invert-and-replace", "--inversion", "x", "--target", "a"), "x does not exist"),
        (("invert-and-replace", "--inversion", "no.safetensors", "--target", "a cat"), "no inversion"),
        (
            ("invert-and-replace", "--inversion", "x", "--target", "a", "--steps", "3"),
            "--steps has no effect",
        ),
        (("compose", "--inversion", "x", "--toward", "a=1", "--seed", "3"), "--seed has no effect"),
        (("invert-and-replace", "photo.png", *WORDS, "--concept", "x"), "There is no run folder x"),
        (("invert", "photo.png", "--prompt", "a cat", "--out", "x.pt"), "does not end in .safetensors"),
        (("sdedit", "photo.png", "--prompt", ""), "prompt is empty"),
        (("sdedit", "full", "--prompt", "a"), "full is a folder, not a picture. Name another file."),
        (("sdedit", "photo.png", "--prompt", "a", "--mask", "full"), "not a picture. Name another file."),
        (("sdedit", "photo.png", "--prompt", "a", "--strength", "1.5"), "between 0 and 1"),
        (("sdedit", "photo.png", "--prompt", "a", "--out", "full"), "full is not empty"),
        (("remove", "photo.png", "--source", "a cat"), "Neither a word to remove nor a mask"),
        (("remove", "photo.png", "--source", "a cat", "--remove", "dog"), "not in the prompt"),
        (("remove", "photo.png", "--source", "a cat in snow", "--remove", "in"), "“in” names no thing"),
        (
            ("sdedit", "photo.png", "--prompt", "a", "--count", "100000000"),
            "--count is 100000000 and must lie",
        ),
        (("sdedit", "photo.png", "--prompt", "a", "--steps", "10000000"), "--steps is 10000000 and must lie"),
        (("sdedit", "photo.png", "--prompt", "a", "--condition", "edges"), "and in an edit edges=auto"),
        (("compose", "photo.png", "--source", "a cat"), "no prompt to compose with"),
        (("interpolate", "photo.png", "photo.png", "--prompts", "a"), "need two prompts, not 1 prompt. Give"),
        (("replay", "nowhere"), "nowhere does not exist"),
        (("replay", "photo.png"), "photo.png is no run.json. Name the run.json of an edit"),
        (("invert-and-replace", "--inversion", ".", "--target", "a"), "there is no inversion.safetensors"),
        (("invert-and-replace", "--inversion", "old", "--target", "a"), "file: old/inversion.safetensors"),
        (("sdedit", "photo.png", "--prompt", "nowhere.txt"), "nowhere.txt does not exist"),
        (("sdedit", "photo.png", "--prompt", "a", "--scale", "2"), "--scale has no effect without --concept"),
        (("invert-and-replace", "photo.png", *WORDS, "--iterations", "2"), "--iterations has no effect"),
        (("invert", "photo.png", "--source", "a cat", "--guidance", "2"), "--guidance has no effect"),
        (("replay", "other.json"), "no record of an edit"),
        (("replay", "list.json"), "no record of an edit"),
        (("replay", "newest.json", "--out", "new"), "that this version does not know (newer). Update"),
        (("replay", "newer.json", "--out", "new"), "settings that this version does not know"),
    ],
)
def test_mistakes_are_answered_in_a_sentence_and_leave_nothing(
    edit: Edit,
    tiny_folder: Path,
    arguments: tuple[str, ...],
    complaint: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from backbone.io.files import write_tensors, write_text

    Image.new("L", (20, 10), 255).save("wide.png")
    Image.new("L", (64, 64)).save("black.png")
    Path("full").mkdir()
    write_text("old/inversion.safetensors", "")
    Path("full/something").touch()
    Path("other.json").write_text("{}")
    Path("list.json").write_text('{"command": ["sdedit"]}')
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    newer = {
        "command": "sdedit", "model": str(tiny_folder), "precision": "fp32", "identity": identify(model),
        "settings": {"image": "photo.png", "prompt": "a", "steps": 2, "device": "cpu", "newer": 1},
    }  # fmt: skip
    Path("newer.json").write_text(json.dumps(newer))
    words = {"image": "photo.png", "source": "a cat", "targets": ["a dog"], "steps": 2, "newer": 1}
    newest = newer | {"command": "invert-and-replace", "settings": {**words, "device": "cpu"}}
    Path("newest.json").write_text(json.dumps(newest))
    import torch

    write_tensors("no.safetensors", {"x": torch.ones(1)})
    before = sorted(Path().rglob("*"))
    assert edit(*arguments) == 2
    err = capsys.readouterr().err.strip().splitlines()
    assert err[-1].startswith("Error: ") and complaint in err[-1], err
    assert sorted(Path().rglob("*")) == before


def test_every_image_is_read_once_and_the_model_opened_once(
    edit: Edit, monkeypatch: pytest.MonkeyPatch
) -> None:
    from backbone.media.sources.decode import open_mask, open_rgb

    read: list[str] = []
    opened: list[str] = []
    open_model = Backbone.open

    def reading(path: str | Path) -> Image.Image:
        read.append(str(path))
        return open_rgb(path)

    def reading_mask(path: str | Path) -> Image.Image:
        read.append(str(path))
        return open_mask(path)

    def opening(model: str, **how: Any) -> Backbone:
        opened.append(model)
        return open_model(model, **how)

    monkeypatch.setattr("edit.pictures.open_named", reading)
    monkeypatch.setattr("edit.pictures.open_mask", reading_mask)
    monkeypatch.setattr(Backbone, "open", opening)
    left_half().save("mask.png")
    assert edit("sdedit", "photo.png", "--prompt", "a dog", "--mask", "mask.png", "--out", "one") == 0
    assert (sorted(read), len(opened)) == (["mask.png", "photo.png"], 1)
    assert edit("replay", "one", "--out", "two") == 0
    assert (read[2:], len(opened)) == (["photo.png", "mask.png"], 2)
    assert record("one")["files"].keys() == {"photo.png", "mask.png"}


def test_what_options_say() -> None:
    assert parse_weight("silver cat=2.5", "--reweight") == ("silver cat", 2.5)
    assert parse_window("cat=0.2:0.8", "--window") == ("cat", (0.2, 0.8))
    assert parse_window("cat=0.8", "--window") == ("cat", (0.0, 0.8))
    assert parse_swap("red cat = tiger") == ("red cat", "tiger")
    for wrong in ("cat", "=2", "cat=", "cat=x"):
        with pytest.raises(UserError):
            parse_weight(wrong, "--reweight")


def test_a_target_that_says_what_the_source_says_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stopped(Exception):
        pass

    def stop(*_: Any, **__: Any) -> None:
        raise Stopped

    class Loaded:
        model = SimpleNamespace(
            path=SimpleNamespace(count_noised_steps=lambda steps, strength: steps), defaults={"guidance": 4.0}
        )

        def resolve(self, prompt: str) -> str:
            return prompt

        def layout(self, *_: Any) -> None:
            return None

    monkeypatch.setattr("edit.run.commands.flow_edit", stop)
    loaded: Any = Loaded()
    with pytest.raises(Stopped):
        run_flow_edit(loaded, image=photo(), source="a cat", targets=["A  cat", "a dog"])
    assert "“A  cat” says what the source says, so what changes" in (told := capsys.readouterr().err)
    assert "a dog" not in told
    with pytest.raises(Stopped):
        run_flow_edit(loaded, image=photo(), source="a cat", targets=["a cat"], guidance=1.0)
    assert "its guidance is the source's, so nothing changes" in capsys.readouterr().err


def test_a_seed_without_effect_and_a_target_that_stands_twice_are_said(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    said = ("--no-metrics", "--guidance", "2", "--seed", "3")
    assert edit("invert-and-replace", "photo.png", *WORDS, *WORDS[2:], *said, "--out", "a") == 0
    err = capsys.readouterr().err
    assert (
        "--seed 3 changes nothing: nothing is random here. An inversion by --method edit-friendly is." in err
    )
    assert "“a dog in the snow” is given 2 times" in err
    friendly = ("--method", "edit-friendly")
    assert edit("invert-and-replace", "photo.png", *WORDS, *said, *friendly, "--out", "b") == 0
    assert edit("sdedit", "photo.png", "--prompt", "a dog", *said, "--out", "c") == 0
    assert "changes nothing" not in (err := capsys.readouterr().err) and "2 times" not in err
    twice = ("--toward", "a painting=1", "--away", "a painting=1")
    assert edit("compose", "photo.png", "--source", "a cat", *twice) == 2
    assert "which is 0 in all" in capsys.readouterr().err


def test_an_interpolation_from_an_image_to_itself_is_said(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    photo(seed=1).save("other.png")
    same = "Both ends are the same image"
    for end, prompt, said in (
        ("photo.png", "a cat", True),
        ("photo.png", "a dog", False),
        ("other.png", "a cat", False),
    ):
        words = ("--prompts", "a cat", "--prompts", prompt, "--count", "3", "--out", f"{end}-{prompt}")
        assert edit("interpolate", "photo.png", end, *words) == 0
        assert (same in " ".join(capsys.readouterr().err.split())) is said


def test_a_scorer_that_is_none_is_refused_before_anything_is_edited(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("empty").mkdir()
    assert edit("invert-and-replace", "photo.png", *WORDS, "--scorer", "empty", "--out", "a") == 2
    err = capsys.readouterr().err
    assert "empty holds no scorer" in err and "Inverting" not in err and not Path("a").exists()


def test_a_place_that_is_filled_without_noise_is_said_to_be(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    left_half().save("half.png")
    smooth = ("--mask", "half.png", "--strength", "0", "--no-metrics")
    assert edit("remove", "photo.png", "--source", "a cat", *smooth, "--out", "a") == 0
    err = " ".join(capsys.readouterr().err.split())
    assert "the place is filled from its surroundings" in err and "nothing is changed" not in err


def test_what_no_step_or_no_place_is_left_for_is_said(edit: Edit, capsys: pytest.CaptureFixture[str]) -> None:
    late = ("--strength", "0.5", "--steps", "4", "--no-metrics", "--guidance", "2")
    idle = ("--cross", "0.4", "--self", "0.2", "--window", "dog=0.1:0.3")
    assert edit("invert-and-replace", "photo.png", *WORDS, *late, *idle, "--out", "a") == 0
    said = capsys.readouterr().err
    for name in ("--cross 0.4", "--self 0.2", "--window dog=0.1:0.3"):
        assert f"{name} has no effect: none of the last 2 of 4 steps" in said
    assert edit("invert-and-replace", "photo.png", *WORDS, *late, "--self", "0.8", "--out", "b") == 0
    assert "no effect" not in capsys.readouterr().err
    nowhere = ("--threshold", "1", "--target", "a red cat in the snow", "--out", "c")
    assert edit("invert-and-replace", "photo.png", *WORDS, *late, *nowhere) == 0
    assert capsys.readouterr().err.count("Nothing was changed for ") == 2


def test_a_prompt_that_still_names_what_is_removed_is_said(
    edit: Edit, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ("remove", "photo.png", "--source", "a cat in the snow", "--remove", "cat", "--steps", "2")
    more = ("--mask", "mask.png", "--no-metrics")
    left_half().save("mask.png")
    assert edit(*asked, *more, "--prompt", "a Cat on a hill", "--out", "a") == 0
    assert "still names “cat”, so it may be drawn again" in " ".join(capsys.readouterr().err.split())
    assert edit(*asked, *more, "--prompt", "a hill", "--out", "b") == 0
    assert "still names" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("remove", "photo.png", "--source", "a cat", "--remove", "dog"), "not in the prompt"),
        (("remove", "photo.png", "--source", "a cat", "--mask", "small.png"), "The mask is 5 × 9 pixels"),
        (("invert-and-replace", "photo.png", *WORDS, "--mask", "small.png"), "The mask is 5 × 9 pixels"),
    ],
)
def test_words_and_masks_are_looked_at_before_an_image_is_inverted(
    edit: Edit, arguments: tuple[str, ...], complaint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("L", (5, 9), 255).save("small.png")
    assert edit(*arguments) == 2
    said = capsys.readouterr().err
    assert complaint in said and "Inverting" not in said
