"""`customize sample` and `example` from the shell's side: prompts, sizes, checkpoints, JSON."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from typer.testing import CliRunner

from backbone.adapters.concept import BEST, Concept, read_concept
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.io.console import UserError
from backbone.io.prompts import load_prompts, one_prompt, read_prompts
from backbone.media.sheet import save_png
from backbone.media.sources.decode import open_rgb
from backbone.media.sources.pictures import list_images
from backbone.models.model import Backbone
from backbone.models.sample import Request
from customize.cli import app
from customize.data.folders import is_concept_source
from customize.evaluation.dreambench import ImageSet
from customize.formats.write import write_adapter
from customize.sampling import write_index
from customize.settings import Settings
from tests.customize.adapters import modules_of, random_adapter, whole_pipeline

ROOT = Path(__file__).parents[2]
ONE_SUBJECT = Settings(images="dog/", token="[V]", class_noun="dog")


def invoked(*arguments: object) -> Any:
    """A command in this process: its exit code, stdout, stderr, and the exception of a mistake."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def refused(*arguments: object) -> str:
    """Runs a command that is a mistake; gives the sentence that answers it."""
    done = invoked(*arguments)
    assert isinstance(done.exception, UserError), done.output
    return str(done.exception)


@pytest.fixture
def quick(tiny_folder: Path) -> tuple[object, ...]:
    """Flags for the tiny model and two steps."""
    return ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu", "--steps", 2)


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path) -> Path:
    """A run with a last and a best checkpoint, whose adapters differ."""
    folder = tmp_path / "run"
    modules = modules_of(whole_pipeline(tiny_folder))
    chosen = {name: module for name, module in modules.items() if "attn2.to_q" in name}
    fingerprint = Backbone.open(str(tiny_folder)).fingerprint
    for seed, place in enumerate((folder, folder / BEST)):
        place.mkdir()
        write_adapter(place / LORA_WEIGHTS, random_adapter(chosen, seed=seed), "peft", metadata={})
        Concept("lora", str(tiny_folder), fingerprint, {"[V]": "bcd"}, "dog", LORA_WEIGHTS).write(place)
    return folder


# Prompts -----------------------------------------------------------------------------------------------------


def test_prompts_are_words_or_files_as_arguments_or_by_their_option(tmp_path: Path, quick: Any) -> None:
    (tmp_path / "prompts.txt").write_text("# two of them\na cat\nnight\ta dog at night\n")
    out = tmp_path / "out"
    done = invoked(
        "sample", "a red dog", tmp_path / "prompts.txt", "--prompts", "a dog", *quick, "--out", out
    )
    assert done.exit_code == 0, done.output
    record = json.loads((out / "samples.json").read_text())
    assert [one["prompt"] for one in record["pictures"]] == ["a red dog", "a cat", "a dog at night", "a dog"]


def test_words_are_no_file_unless_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dog").mkdir()
    Path("cat").write_text("a cat in the snow\n")
    assert [prompt.text for prompt in load_prompts(["dog", "cat", "x" * 5000])] == [
        "dog",
        "a cat in the snow",
        "x" * 5000,
    ]
    with pytest.raises(UserError, match=r"nowhere\.txt does not exist"):
        load_prompts(["nowhere.txt"])
    with pytest.raises(UserError, match="prompt is empty"):
        load_prompts([" "])
    Path("two.txt").write_text("a\nb\n")
    with pytest.raises(UserError, match=r"two\.txt holds 2 prompts, and --source takes one"):
        one_prompt("two.txt", "--source")
    assert one_prompt("cat", "--source") == "a cat in the snow"


def test_nothing_to_draw_is_a_mistake(tmp_path: Path) -> None:
    assert "nothing to draw" in refused("sample", "--out", tmp_path / "out")


# Sizes -------------------------------------------------------------------------------------------------------


def test_a_sheet_tells_the_samples_of_a_prompt_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    captions: list[str] = []

    def draw(rows: Any, **how: Any) -> Image.Image:
        captions.extend(cell.caption for row in rows for cell in row)
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr("customize.sampling.draw_sheet", draw)
    for i, j in ((0, 0), (0, 1), (1, 0)):
        Image.new("RGB", (8, 8)).save(tmp_path / f"p{i:02d}-s{j:02d}.png")
    prompts = ["a dog", "a cat"]
    several, single = [(0, 0), (0, 1)], [(0, 0), (1, 0)]
    for keys in (several, single):
        requests = [Request(prompts[i], (i, j)) for i, j in keys]
        write_index(tmp_path, requests, prompts, {}, note="", columns=2)
    assert captions == ["a dog\nsample 0", "a dog\nsample 1", "a dog", "a cat"]


@pytest.mark.parametrize(
    ("flags", "size"),
    [
        (("--width", 96, "--height", 64), (96, 64)),
        (("--height", 96), (64, 96)),
        (("--resolution", 96), (96, 96)),
    ],
)
def test_images_are_drawn_in_the_asked_size(
    tmp_path: Path, quick: Any, flags: tuple[object, ...], size: tuple[int, int]
) -> None:
    out = tmp_path / "out"
    assert invoked("sample", "a dog", *quick, *flags, "--out", out).exit_code == 0
    with Image.open(out / "p00-s00.png") as image:
        assert image.size == size


@pytest.mark.parametrize(
    ("flags", "complaint"),
    [
        (("--width", 100), "multiples of 16 pixels, and the width is 100. Give 96 or 112"),
        (("--resolution", 96, "--width", 64), "width and height in one"),
        (("--height", 8), "the height is 8. Give 16 or 32"),
        (("--scale", 0.5), "--scale has no effect without --concept"),
        (("--checkpoint", "last"), "--checkpoint has no effect without --concept"),
    ],
)
def test_what_cannot_be_drawn_is_refused_before_anything_is_written(
    tmp_path: Path, quick: Any, flags: tuple[object, ...], complaint: str
) -> None:
    assert complaint in refused("sample", "a dog", *quick, *flags, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Where to ----------------------------------------------------------------------------------------------------


def test_nothing_that_was_drawn_is_overwritten(
    tmp_path: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert invoked("sample", "a dog", *quick, "--seed", 0).exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"samples", "samples-2"}
    before = Path("samples/p00-s00.png").read_bytes()
    assert before == Path("samples-2/p00-s00.png").read_bytes()
    assert "samples is not empty. Name another folder" in refused(
        "sample", "a cat", *quick, "--out", "samples"
    )
    assert Path("samples/p00-s00.png").read_bytes() == before
    with Image.open("samples/p00-s00.png") as image:
        texts: Any = image.info
    assert texts["prompt"] == "a dog" and texts["parameters"].startswith(
        "a dog\nSteps: 2, Sampler: DDIM, CFG scale: "
    )
    assert "Seed: 0, Size: 64x64, Model: " in texts["parameters"]
    assert json.loads(texts["limner"])["prompt_number"] == 0
    assert str(tmp_path) not in str(texts)


def test_images_that_were_drawn_before_a_stop_are_kept_and_the_same_command_draws_the_rest(
    tmp_path: Path, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("sample", "a dog", "a cat", *quick, "--count", 2, "--batch", 1, "--out")
    assert invoked(*words, tmp_path / "quiet").exit_code == 0
    out, written = tmp_path / "struck", save_png

    def stop(path: Path, *what: Any, **how: Any) -> None:
        if len(list(out.glob("p*.png"))) == 2:
            raise KeyboardInterrupt
        written(path, *what, **how)

    with monkeypatch.context() as struck:
        struck.setattr("customize.sampling.save_png", stop)
        assert invoked(*words, out).exit_code != 0
    before = {path: path.stat().st_mtime_ns for path in out.glob("p*.png")}
    assert len(before) == 2
    other = refused("sample", "a dog", "a red cat", *quick, "--count", 2, "--batch", 1, "--out", out)
    assert "what another command was writing" in other
    assert invoked(*words, out).exit_code == 0
    assert all(path.stat().st_mtime_ns == then for path, then in before.items())
    names = sorted(path.name for path in (tmp_path / "quiet").iterdir())
    assert sorted(path.name for path in out.iterdir()) == names
    for name in (name for name in names if name.endswith(".png")):
        assert (out / name).read_bytes() == (tmp_path / "quiet" / name).read_bytes()
    assert "is not empty" in refused(*words, out)


def test_a_concept_is_named_once(tmp_path: Path, run: Path, quick: Any) -> None:
    twice = ("--concept", run, "--concept", f"{run}/", "--checkpoint", "last")
    assert "is given twice" in refused("sample", "a [V] dog", *twice, *quick, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_measuring_again_keeps_the_first_table(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(run: Path, image_set: ImageSet, out: Path, **how: Any) -> dict[str, Any]:
        if fails:
            raise UserError("no")
        (out / "table.json").write_text(json.dumps({"seed": image_set.seed}))
        return {"text": "a table"}

    monkeypatch.setattr("customize.evaluation.measure.read_subject_settings", lambda run: ONE_SUBJECT)
    monkeypatch.setattr("customize.evaluation.dreambench.evaluate_run", measure)
    for fails, seed in ((False, 0), (True, 1), (False, 2)):
        assert invoked("evaluate", run, "--seed", seed).exit_code == (1 if fails else 0)
    tables = [json.loads((run / name / "table.json").read_text()) for name in ("dreambench", "dreambench-2")]
    assert tables == [{"seed": 0}, {"seed": 2}]
    assert "is not empty" in refused("evaluate", run, "--out", run / "dreambench")


def test_a_disk_that_is_full_leaves_no_table_without_its_sheet(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(run: Path, image_set: ImageSet, out: Path, **how: Any) -> dict[str, Any]:
        (out / "table.json").write_text("{}")
        if full:
            raise OSError(28, "No space left on device", str(out / "sheet.png"))
        return {"text": "a table"}

    monkeypatch.setattr("customize.evaluation.measure.read_subject_settings", lambda run: ONE_SUBJECT)
    monkeypatch.setattr("customize.evaluation.dreambench.evaluate_run", measure)
    full = True
    failed = invoked("evaluate", run, "--out", tmp_path / "out")
    assert isinstance(failed.exception, OSError) and failed.exception.filename == str(
        tmp_path / "out/sheet.png"
    )
    assert not (tmp_path / "out").exists()
    full = False
    assert invoked("evaluate", run, "--out", tmp_path / "out").exit_code == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["table.json"]


# Checkpoints -------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_is_drawn_and_said_and_the_last_one_if_asked(
    run: Path, tmp_path: Path, quick: Any
) -> None:
    def drawn(*flags: object) -> tuple[bytes, str]:
        out = tmp_path / "-".join(map(str, ["out", *flags]))
        done = invoked("sample", "a [V] dog", "--concept", run, *flags, *quick, "--scale", 3, "--out", out)
        assert done.exit_code == 0, done.output
        return open_rgb(out / "p00-s00.png").tobytes(), done.stderr

    usual, said = drawn()
    best, silent = drawn("--checkpoint", "best")
    last, _ = drawn("--checkpoint", "last")
    assert usual == best != last
    assert said.count("(--checkpoint last: the weights after the last step)") == 1
    assert "Using the best checkpoint" not in silent
    (run / BEST / "concept.json").unlink()
    alone, silent = drawn("--seed", 0)
    assert alone == last and "Using the best checkpoint" not in silent
    assert "kept no best checkpoint" in refused(
        "sample", "a [V] dog", "--concept", run, "--checkpoint", "best"
    )


def test_a_run_is_measured_by_the_checkpoint_that_draws(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def learned(folder: Path) -> Concept:
        raise UserError(f"of {folder}")

    for module in ("dreambench", "few_step"):
        monkeypatch.setattr(f"customize.evaluation.{module}.read_concept", learned)
    for module in ("measure", "dreambench", "few_step"):
        monkeypatch.setattr(
            f"customize.evaluation.{module}.read_subject_settings", lambda *asked: ONE_SUBJECT
        )
    for flags in ((), ("--on", "moji-turbo")):
        assert refused("evaluate", run, *flags) == f"of {run / BEST}"
        assert refused("evaluate", run, *flags, "--checkpoint", "last") == f"of {run}"


def test_what_is_exported_or_merged_of_a_run_is_said_where_its_best_is_another(
    run: Path, tmp_path: Path
) -> None:
    def said(*words: object) -> bool:
        done = invoked(*words)
        assert done.exit_code == 0, done.output
        return f"Images are drawn by its best checkpoint: name {run / BEST}" in done.stderr

    assert said("export", run, "--out", tmp_path / "last.safetensors")
    assert said("merge", run, "--out", tmp_path / "merged")
    assert not said("export", run / BEST, "--out", tmp_path / "best.safetensors")
    shutil.copy(run / LORA_WEIGHTS, run / BEST)
    assert not said("export", run, "--out", tmp_path / "same.safetensors")


# JSON --------------------------------------------------------------------------------------------------------


def test_stdout_is_json_and_nothing_else(
    run: Path, subject: Path, tmp_path: Path, tiny_folder: Path, quick: Any
) -> None:
    model = ("--model", tiny_folder, "--precision", "fp32", "--device", "cpu")
    checked = json.loads(invoked("check", "--images", subject, *model, "--json").stdout)
    assert (checked["images"], checked["captions"]) == (3, 0)
    assert checked["peak_bytes"] > 0 and isinstance(checked["warnings"], list)
    planned = json.loads(invoked("check", "--images", subject, *model, "--vram", 8, "--json").stdout)
    assert planned["plan"]
    known = json.loads(invoked("info", run, "--json").stdout)
    assert known["algorithms"] == ["lora"] and known["layers"]["unet"] > 0
    out = tmp_path / "out"
    done = invoked("sample", "a dog", *quick, "--out", out, "--json")
    sampled = json.loads(done.stdout)
    assert (sampled["folder"], sampled["sheet"]) == (str(out), str(out / "sheet.png"))
    assert [one["file"] for one in sampled["pictures"]] == ["p00-s00.png"]
    assert "1 image in" in done.stderr


def test_a_mistake_leaves_stdout_empty(tmp_path: Path) -> None:
    done = invoked("info", tmp_path / "nowhere", "--json")
    assert isinstance(done.exception, (UserError, OSError)) and done.stdout == ""


# The example -------------------------------------------------------------------------------------------------


def test_the_example_is_a_subject_with_what_else_can_be_tried_beside_it(tmp_path: Path) -> None:
    folder = tmp_path / "dog"
    for _ in range(2):  # a second time it is there already
        assert invoked("example", folder).exit_code == 0
    assert [picture.path.name for picture in list_images(folder)] == [f"dog-{k}.png" for k in range(1, 6)]
    assert not is_concept_source(folder)
    extras = folder / "example"
    assert open_rgb(extras / "scene.png").size == (128, 128)
    assert one_prompt(str(extras / "scene.txt"), "--source") == "a cat in a park"
    drawn, held_out = (
        {p.text for p in read_prompts(extras / name)} for name in ("prompts.txt", "heldout.txt")
    )
    assert len(drawn) == 24 and len(held_out) == 12 and drawn.isdisjoint(held_out)
    (folder / "mine.txt").touch()
    assert "not empty" in refused("example", folder)


def test_a_best_checkpoint_is_a_concept_like_any_other(run: Path) -> None:
    assert read_concept(run / BEST).tokens == {"[V]": "bcd"}
