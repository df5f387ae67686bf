"""A whole run in this process, with evaluations, at a resolution of its own, whose images go away while it trains."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from backbone.adapters.concept import Concept, trained_resolution
from backbone.cli.sampling import DrawingOptions
from backbone.io.console import UserError
from backbone.io.files import append_jsonl, read_json, read_jsonl, write_json
from backbone.media.sources import record
from backbone.media.sources.decode import open_as
from backbone.media.sources.pictures import list_images
from backbone.media.sources.record import ImageRecord
from backbone.models.locate import EMBEDDED
from customize.cli import app
from customize.data.changes import hash_images
from customize.evaluation.dreambench import say_changed_images
from customize.evaluation.measure import MeasureSettings, measure
from customize.settings import Settings, describe_first_subject, read_settings, resolve_settings
from customize.training.reporting.report import RunReport
from customize.training.run import resolve_run_settings
from tests.customize.evaluation.test_metrics import FILE
from tests.tiny import tiny_eye, tiny_flux2_klein

SCORER = str(EMBEDDED / "scorer")
HERE = ("--precision", "fp32", "--device", "cpu")


def invoked(*arguments: object) -> Any:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done


@dataclass(frozen=True)
class Trained:
    """A finished run, what it said, and how often each image was decoded."""

    run: Path
    said: str
    decodes: Counter[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Trained:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "subject").mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(random.integers(0, 255, (70, 80, 3), dtype=np.uint8)).save(
            folder / "subject" / f"{number}.png"
        )
    decodes: Counter[str] = Counter()

    def count(path: Path, *how: Any, **more: Any) -> Image.Image:
        decodes[path.name] += 1
        return open_as(path, *how, **more)

    def log(path: Path, line: Mapping[str, Any]) -> None:
        append_jsonl(path, line)
        if (folder / "subject").exists():
            (folder / "subject").rename(folder / "away")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record, "open_as", count)
        patch.setattr("backbone.training.run.append_jsonl", log)
        patch.setattr("customize.evaluation.metrics.SAMPLING_STEPS", 2)  # and few noise samples: quicker
        patch.setattr("customize.training.evaluation.NOISE_SAMPLES", 2)
        done = invoked(
            *("train", "--images", folder / "subject", "--model", tiny_folder, "--class", "dog", *HERE),
            *("--scorer", SCORER, "--evaluate-every", 2, "--steps", 4, "--flip", "--resolution", 32),
            *("--out", folder / "run"),
        )
    (folder / "away").rename(folder / "subject")
    return Trained(folder / "run", done.output, decodes)


def test_an_image_is_decoded_when_it_is_checked_and_once_more(trained: Trained) -> None:
    assert trained.decodes == {"0.png": 2, "1.png": 2, "2.png": 2}


def test_images_that_go_away_while_training_are_still_on_the_sheet(trained: Trained) -> None:
    own = np.asarray(Image.open(trained.run / "sheet.png"))
    assert own.std() > 10 and "customize train" in (trained.run / "README.md").read_text()
    assert read_json(trained.run / "settings.json")["timings"]["all"] > 0


def test_evaluations_keep_the_best_checkpoint_and_make_a_report(trained: Trained) -> None:
    assert "best of 3 evaluations" in trained.said
    assert [line["step"] for line in read_jsonl(trained.run / "evaluations.jsonl")] == [0, 2, 4]
    assert (trained.run / "best" / "concept.json").exists()
    page = (trained.run / "report.html").read_text()
    assert page.count("<svg") == 8 and "All 4 steps were taken" in page


def test_the_report_names_the_method_shows_the_subject_and_explains_its_curves(trained: Trained) -> None:
    page = (trained.run / "report.html").read_text()
    title = page[page.index("<h1>") : page.index("</h1>")]
    assert "[V] dog: lora of rank 2 on" in title and title.endswith("4 steps")
    subject = page[page.index("The subject<") : page.index("What the model draws at step 4")]
    drawn = page[page.index("What the model draws at step 4") : page.index("How it went")]
    assert subject.count('<img class="small" width="256" height="256"') == 3  # of 32 pixels
    assert drawn.count("<img") == len(read_json(trained.run / "settings.json")["settings"]["sheet_prompts"])
    for words in (
        "CLIP-I: subject fidelity",
        "CLIP-T: prompt fidelity",
        "Prompt precision",
        "PRES (lower is better): similarity",
        "DIV: diversity",
    ):
        assert words in page
    assert "The scorer knows the class and not your subject" in page  # why CLIP-T falls
    assert f"--concept {trained.run}</pre>" in page and "This draws with the weights in best/" in page
    assert "refresh" not in page and "updates itself" in trained.said


def test_a_run_that_goes_on_has_a_page_that_renews_itself(trained: Trained, tmp_path: Path) -> None:
    settings = read_settings(trained.run)
    append_jsonl(tmp_path / "log.jsonl", {"step": 1, "loss": 0.5})
    report = RunReport(tmp_path, settings, [Image.new("RGB", (32, 32))])
    report.renew(1)
    page = (tmp_path / "report.html").read_text()
    assert 'http-equiv="refresh"' in page and "Step 1 of 4." in page and "Training loss" in page
    report.finish("All 4 steps were taken.", None)
    page = (tmp_path / "report.html").read_text()
    assert "refresh" not in page and "customize sample" in page and "best/" not in page


@pytest.mark.parametrize(("steps", "every"), [(50, 100), (250, 125), (400, 200), (5000, 500)])
def test_a_run_that_is_long_enough_has_previews_by_itself(steps: int, every: int) -> None:
    assert (
        resolve_settings({"images": "", "token": "", "class_noun": "", "steps": steps}, {}).validation_steps
        == every
    )


def test_a_run_is_measured_from_outside_in_words_and_as_json(trained: Trained, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(FILE)
    asked = ("evaluate", trained.run, "--prompts", tmp_path / "prompts.txt")
    found = json.loads(invoked(*asked, "--count", 2, "--scorer", SCORER, "--json").stdout)
    assert {"PRES", "PRES of the base", "CLIP-I", "CLIP-I of real pictures", "DIV"} <= set(found["metrics"])
    assert found["per_prompt"] == 2 and found["folder"] == str(trained.run / "dreambench")
    assert "CLIP-I of real pictures" in (trained.run / "dreambench" / "table.md").read_text()
    dino = tiny_eye(tmp_path / "dino", "dinov2")
    said = invoked(*asked, "--count", 1, "--scorer", dino).output
    assert "DINO of real pictures" in said and "CLIP" not in said


def test_a_run_that_is_measured_against_other_images_than_it_learned_from_says_so(
    subject: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = Path(shutil.copytree(subject, tmp_path / "dog"))
    settings = Settings(images=str(images), token="[V]", class_noun="dog")
    write_json(tmp_path / "settings.json", {"images": [hash_images(list_images(images))]})
    say_changed_images(tmp_path, settings)
    assert capsys.readouterr().err == ""
    Image.new("RGB", (64, 64)).save(images / "other.png")
    say_changed_images(tmp_path, settings)
    err = " ".join(capsys.readouterr().err.split())
    assert "(new: other.png). The run is measured against those of now." in err


def test_of_several_subjects_the_first_alone_is_measured_which_is_said(
    subject: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    alone = Settings(images=str(subject), token="[V]", class_noun="dog")
    both = replace(alone, subject=(f"{subject}:[W]:cat",))
    assert describe_first_subject(alone) == ""
    write_json(tmp_path / "settings.json", {"settings": asdict(both), "command": "customize train"})
    with pytest.raises(UserError, match=r"concept\.json"):  # it is not finished
        measure(MeasureSettings(run=tmp_path))
    err = " ".join(capsys.readouterr().err.split())
    assert "Evaluations measure the first subject alone, [V] dog, and not [W] cat." in err


def test_images_come_in_the_size_that_the_concept_was_trained_at(trained: Trained, tmp_path: Path) -> None:
    asked = ("sample", "a [V] dog", "--concept", trained.run, "--steps", 2, *HERE)
    invoked(*asked, "--out", tmp_path / "own")
    assert Image.open(tmp_path / "own" / "p00-s00.png").size == (32, 32)
    invoked(*asked, "--resolution", 64, "--out", tmp_path / "large")
    assert Image.open(tmp_path / "large" / "p00-s00.png").size == (64, 64)


def test_a_side_that_is_not_asked_for_is_that_of_the_concept_s_images() -> None:
    assert DrawingOptions(width=64).at_resolution(32).size == (64, 32)
    assert DrawingOptions(height=64).at_resolution(32).size == (32, 64)
    assert DrawingOptions(width=64).at_resolution(0).size == (64, None)
    assert DrawingOptions(resolution=64).at_resolution(32).size == (64, 64)


def test_concepts_of_different_sizes_are_drawn_in_the_model_s_own(capsys: pytest.CaptureFixture[str]) -> None:
    small, own = (Concept("lora", "moji", "", {}, "", resolution=side) for side in (512, 0))
    assert (trained_resolution([small]), trained_resolution([])) == (512, 0)
    assert trained_resolution([small, own]) == 0
    assert "different resolutions" in capsys.readouterr().err


def test_a_model_that_reads_no_reference_is_not_measured_against_them(
    trained: Trained, tmp_path: Path
) -> None:
    words = [
        "evaluate",
        str(trained.run),
        "--against-references",
        "--scorer",
        SCORER,
        "--out",
        str(tmp_path / "t"),
    ]
    done = CliRunner().invoke(app, words)
    assert "reads no image beside the prompt" in str(done.exception) and not (tmp_path / "t").exists()


@pytest.mark.slow
def test_a_run_is_measured_against_references_without_training(subject: Path, tmp_path: Path) -> None:
    folder = tiny_flux2_klein(tmp_path / "klein")
    invoked(
        *("train", "--images", subject, "--model", folder, "--class", "dog", *HERE, "--evaluate-every", 0),
        *("--steps", 1, "--out", tmp_path / "run"),
    )
    asked = ("evaluate", tmp_path / "run", "--prompts", "a {} in the snow", "--count", 1, "--scorer", SCORER)
    found = json.loads(invoked(*asked, "--against-references", "--json", "--out", tmp_path / "t").stdout)
    figures = {name: one["mean"] for name, one in found["metrics"].items()}
    for name in ("CLIP-I", "CLIP-T"):
        apart = figures[name] - figures[f"{name}, from references"]
        assert figures[f"{name}, the run minus references"] == pytest.approx(apart, abs=1e-6)
    assert (tmp_path / "t" / "references.png").is_file()


@pytest.mark.parametrize("captions", [("a [V] dog on the beach", None), ("a [V] dog on the beach", " ")])
def test_a_model_s_prior_prompts_are_kept_where_every_image_has_a_caption(
    captions: tuple[str, str | None], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = {"images": "x", "token": "[V]", "class_noun": "dog"}
    usual = {"prior_prompts": ["a {class} wearing a hat"]}
    told, untold = (ImageRecord(Path("a.png"), caption) for caption in captions)
    assert resolve_run_settings(asked, usual, [[told], [told, told]]).further_prompts == (
        "a {class} wearing a hat",
    )
    assert capsys.readouterr().err == ""
    assert resolve_run_settings(asked, usual, [[told], [told, untold]]).prior_prompts == ()
    assert "Not every image has a caption" in capsys.readouterr().err


def test_prior_prompts_that_were_asked_for_need_no_captions(capsys: pytest.CaptureFixture[str]) -> None:
    asked = {"images": "x", "token": "[V]", "class_noun": "dog"}
    usual, untold = {"prior_prompts": ["a {class} wearing a hat"]}, [[ImageRecord(Path("a.png"))]]
    own = resolve_run_settings({**asked, "prior_prompts": ("a {class} in a park",)}, usual, untold)
    assert own.further_prompts == ("a {class} in a park",)
    assert resolve_run_settings({**asked, "prior": "off"}, usual, untold).further_prompts == ()
    assert capsys.readouterr().err == ""
