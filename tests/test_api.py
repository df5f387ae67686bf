"""The packages from Python: what a notebook needs, with the commands' meaning."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

import align
import backbone
import customize
import edit
from backbone import UserError

TINY: dict[str, Any] = {"device": "cpu", "precision": "fp32"}


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> customize.Run:
    from PIL import Image

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
