"""The packages from Python: what a notebook needs, with the commands' meaning."""

from __future__ import annotations

import inspect
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image

import align
import backbone
import customize
import edit
from backbone import Backbone, UserError
from backbone.cli.options import build, fields_of, fit_given, values_from_flags
from backbone.cli.sampling import DrawingOptions
from customize.settings import Settings

TINY: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> customize.Run:

    folder = tmp_path_factory.mktemp("api") / "dog"
    folder.mkdir()
    for number in range(2):
        Image.new("RGB", (64, 64), (40 + 90 * number, 90, 60)).save(folder / f"{number}.png")
    out = folder.parent / "run"
    return customize.train(
        folder, class_noun="dog", model=tiny_folder, out=out, steps=2, rank=2, evaluation_steps=0, **TINY
    )


def test_a_model_opens_by_its_name_and_says_what_it_is() -> None:
    model = backbone.open("moji", device="cpu", precision="fp32")
    assert repr(model) == "<moji: StableDiffusion, 128 px, float32 on cpu>"


def test_a_training_gives_a_run_that_shows_its_sheet(trained: customize.Run) -> None:
    assert trained.settings["rank"] == 2 and len(trained.log) == 2
    assert trained.command.startswith("customize train")
    assert repr(trained).endswith("steps=2)") and len(repr(trained)) < 300
    assert trained._repr_png_() == (trained.path / "sheet.png").read_bytes()


def test_samples_of_a_concept_are_images_with_their_prompts(trained: customize.Run, tmp_path: Path) -> None:
    words = ["a [V] dog in the snow", "a cat"]
    images = customize.sample(words, concept=trained, steps=2, count=2, **TINY)
    assert images.prompts == [words[0], words[0], words[1], words[1]]
    assert {image.size for image in images} == {(64, 64)}
    assert (images._repr_png_() or b"").startswith(b"\x89PNG") and "4 images of 64 × 64" in repr(images)
    kept = customize.sample(words[1], concept=[trained], steps=2, out=tmp_path / "kept", **TINY)
    assert len(list((tmp_path / "kept").glob("p*.png"))) == len(kept) == 1


def test_errors_name_the_argument(trained: customize.Run, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"learning_rat\b.*learning_rate"):
        customize.train(tmp_path, learning_rat=1e-3)  # type: ignore[call-arg, unused-ignore]
    with pytest.raises(UserError, match="rank"):
        customize.train(tmp_path, rank=0)
    with pytest.raises(UserError, match=r"\[W\]"):
        customize.sample("a [W] dog", concept=trained, **TINY)


def test_preferences_are_sampled_ranked_learned_and_compared(tiny_folder: Path, tmp_path: Path) -> None:
    from align.collect.rank import rank_samples

    scorer = tmp_path / "bright.py"
    scorer.write_text(
        "def score(images, prompts):\n    return [sum(one.convert('L').tobytes()) / 1e6 for one in images]\n"
    )
    prompts = ["a red dog", "a cat in the snow", "the cat", "a dog"]
    samples = align.sample(prompts, tmp_path / "samples", count=2, model=tiny_folder, steps=2, **TINY)
    rank_samples(samples, [str(scorer)])
    run = align.train(samples, model=tiny_folder, out=tmp_path / "run", steps=2, rank=2, batch=2, **TINY)
    assert run.settings["loss"] == "dpo"
    assert run._repr_png_() == (run.path / "sheet.png").read_bytes()
    compared = align.compare(
        tiny_folder, run, prompts[:2], tmp_path / "compare", scorers=[str(scorer)], steps=2, **TINY
    )
    assert set(compared["wins"]) == {str(scorer)}
    moved = shutil.copytree(tiny_folder, tmp_path / "moved")
    elsewhere = align.compare(
        moved, run, prompts[:2], tmp_path / "elsewhere", model=moved, scorers=[str(scorer)], steps=2, **TINY
    )
    assert elsewhere["wins"] == compared["wins"]
    with pytest.raises(UserError, match="model has no effect"):
        align.compare(tiny_folder, moved, prompts[:2], tmp_path / "idle", model=moved)


@pytest.mark.parametrize("package", [backbone, customize, align])
def test_what_a_package_exports_is_there_and_has_a_docstring(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name).__doc__, name
    with pytest.raises(AttributeError, match="nothing"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018


@pytest.mark.parametrize(
    ("function", "shown", "hidden"),
    [
        (customize.train, {"steps", "method", "pairs"}, {"settings"}),
        (customize.sample, {"guidance", "condition"}, {"concepts", "settings"}),
        (align.sample, {"redraw", "count"}, {"concepts", "settings"}),
        (align.compare, {"tie", "scorers"}, {"settings"}),
        (edit.sdedit, {"strength", "mask"}, {"settings"}),
        (edit.invert, {"method", "iterations"}, {"settings"}),
    ],
)
def test_a_notebook_is_shown_every_setting_with_its_default(
    function: Callable[..., Any], shown: set[str], hidden: set[str]
) -> None:
    parameters = inspect.signature(function).parameters
    assert shown <= set(parameters) and not hidden & set(parameters)
    assert all(parameters[name].default is not inspect.Parameter.empty for name in shown)


def test_a_keyword_that_there_is_not_is_answered_with_the_nearest_one() -> None:
    with pytest.raises(UserError, match=r"strenght\b.*strength"):
        edit.sdedit(cast(Any, "a model"), "cat.png", "a dog", strenght=0.5)
    with pytest.raises(UserError, match=r"guidence\b.*guidance"):
        customize.sample("a dog", guidence=3.0)
    with pytest.raises(UserError, match=r"concepts\. Give .* concept"):
        align.sample("a dog", "out", concepts=["runs/dog"])
    with pytest.raises(UserError, match="--scale has no effect without --concept"):
        customize.sample("a dog", scale=0.5)


# What Python is given in another type -------------------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompts": None}, "A prompt is text, and NoneType is none"),
    "bytes": ({"prompts": b"a dog"}, "A prompt is text, and bytes is none"),
    "a number": ({"prompts": 5}, "A prompt is text, and int is none"),
    "lists of lists": ({"prompts": [["a dog"]]}, "A prompt is text, and list is none"),
    "no prompts": ({"prompts": []}, "There are no prompts"),
    "an empty folder": ({"out": ""}, "out is '', which names no folder"),
    "a folder's number": ({"out": 5}, "out is '5', which names no folder"),
    "no memory": ({"vram": math.nan}, "vram is nan"),
    "memory in words": ({"vram": "8"}, "vram is '8'"),
    "a concept's number": ({"concept": 5}, "concept is int, which is no run folder"),
    "a seed in words": ({"seed": "cpu"}, "seed is cpu, which is not a whole number"),
    "half a seed": ({"seed": 1.5}, "seed is 1.5, which is not a whole number"),
    "a generator": ({"seed": object()}, "which is not a whole number"),
    "a count in words": ({"count": "two"}, "count is two, which is not a whole number"),
    "several negatives": ({"negative": ["a", "b"]}, "negative is a list .*, and one is taken"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_sample_is_given_in_another_type_is_a_sentence_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, said = WRONG[name]
    with pytest.raises(UserError, match=said):
        customize.sample(**{"prompts": "a dog", **given})
    assert not list(tmp_path.iterdir())


WRONGLY_TRAINED: dict[str, tuple[dict[str, Any], str]] = {
    "folders": (
        {"images": ["a", "b"]},
        r"images is a list .*and one is taken\. Put one subject's images into one",
    ),
    "a folder in a list": ({"images": ["a"]}, "images is a list .*Write it without brackets"),
    "a number of images": ({"images": 5}, "images is 5, which is no text"),
    "tokens": ({"token": ["[V]", "[W]"]}, "token is a list .*and one is taken"),
    "a token's number": ({"token": 5}, "token is 5, which is no text"),
    "a class in a list": ({"class_noun": ["dog"]}, "class_noun is a list"),
    "models": ({"model": ["moji", "moji-flow"]}, "model is a list .*and one is taken"),
    "a run's number": ({"begin_from": 5}, "begin_from is 5, which is no text"),
    "pairs": ({"images": None, "pairs": ["a", "b"]}, "pairs is a list .*and one is taken"),
    "steps in words": ({"steps": "many"}, "steps is many, which is not a whole number or auto"),
    "an empty folder": ({"images": " "}, "images is empty"),
    "two ways": ({"class_images": "x", "prior": "off"}, "--class-images has no effect"),
}


@pytest.mark.parametrize("name", WRONGLY_TRAINED)
def test_what_train_is_given_in_another_type_is_a_sentence_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given, said = WRONGLY_TRAINED[name]
    with pytest.raises(UserError, match=said):
        customize.train(**{"images": "dog", "class_noun": "dog", **given})
    for wrong in (
        {"pairs": ["a", "b"]},
        {"online": 3, "prompts": "p.txt"},
        {"online": "moji", "prompts": ["a"]},
    ):
        with pytest.raises(UserError, match=r"is a list|which is no text"):
            align.train(**wrong)
    assert not list(tmp_path.iterdir())


def test_words_and_implied_settings_mean_the_same_as_on_the_command_line() -> None:
    asked = fit_given(Settings, {"steps": "auto", "precision": "no", "class_images": "cats", "pairs": ""})
    flags = {"steps": "auto", "precision": "no", "class_images": ["cats"]}
    wanted = values_from_flags(flags, fields_of(Settings))
    assert asked == {**wanted, "pairs": ""} and wanted["prior"] == "class-images"
    assert fit_given(Settings, {"nonsense": 1, "seed": None}) == {"nonsense": 1}
    assert build(DrawingOptions, {"precision": "no"}).precision == "fp32"


def test_none_is_as_good_as_left_out_and_numbers_may_be_text() -> None:
    made = build(DrawingOptions, {"seed": None, "width": None, "count": "2", "guidance": 3})
    assert (made.seed, made.width, made.count, made.guidance) == (0, None, 2, 3.0)


def test_a_folder_that_is_no_run_is_not_made_by_measuring_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="nope"):
        customize.evaluate("nope")
    assert not list(tmp_path.iterdir())


def test_what_edit_is_given_in_another_type_is_a_sentence(tiny: Backbone) -> None:
    array = np.zeros((64, 64, 3), np.uint8)
    image = Image.fromarray(array)
    others: list[Any] = [array, torch.zeros(3, 64, 64), None, 5, [image]]
    for given in others:
        with pytest.raises(UserError, match=r"An image is a PIL image or a path, and \w+ is neither"):
            edit.sdedit(tiny, given, "a dog", steps=2)
    for mask in (array, torch.zeros(64, 64), 5, True):
        with pytest.raises(UserError, match="An image is a PIL image or a path"):
            edit.sdedit(tiny, image, "a dog", steps=2, mask=mask)
    with pytest.raises(
        UserError, match=r"nope\.png does not exist\. Check the spelling; `edit example cat/`"
    ):
        edit.sdedit(tiny, "nope.png", "a dog", steps=2)
    with pytest.raises(UserError, match="has no pixels"):
        edit.sdedit(tiny, Image.new("RGB", (0, 8)), "a dog", steps=2)
    for prompt in (None, 3, ["a dog"]):
        with pytest.raises(UserError, match="The prompt is text"):
            edit.sdedit(tiny, image, prompt, steps=2)  # type: ignore[arg-type]
    settings: dict[str, Any] = {
        "seed": "cpu", "strength": "half", "steps": 2.5, "guidance": math.inf, "count": True,
    }  # fmt: skip
    for name, value in settings.items():
        with pytest.raises(UserError, match="which is not a"):
            edit.sdedit(tiny, image, "a dog", **{name: value})


def test_a_model_is_opened_by_its_name_or_path(tiny_folder: Path) -> None:
    for model in (tiny_folder, str(tiny_folder)):
        assert backbone.open(model, device=torch.device("cpu")).location.name == str(tiny_folder)
    names: list[Any] = [None, 5, object()]
    for wrong in names:
        with pytest.raises(UserError, match="is no model's name or folder"):
            backbone.open(wrong)
    with pytest.raises(UserError, match="no number of pixels"):
        backbone.open(str(tiny_folder), resolution="64")  # type: ignore[arg-type]
