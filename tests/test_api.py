"""The packages from Python: what a notebook needs, with the commands' meaning."""

from __future__ import annotations

import copy
import inspect
import math
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from fractions import Fraction
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
from backbone.cli.options import list_fields
from backbone.cli.sampling import DrawingOptions
from backbone.cli.values.build import build
from backbone.cli.values.collect import values_from_flags, values_from_keywords
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
    sides: list[Any] = [None, "", tiny_folder.open, Image]
    for side in sides:
        with pytest.raises(UserError, match=r"base is .*which is no model and no run"):
            align.compare(side, run, prompts, tmp_path / "idle")
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
    with pytest.raises(
        UserError, match=r"scale has no effect without concept\. Add that, or leave out scale"
    ):
        customize.sample("a dog", scale=0.5)


# What Python is given in another type -------------------------------------------------------------------------


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no prompt": ({"prompts": None}, "A prompt is text, not NoneType"),
    "bytes": ({"prompts": b"a dog"}, "A prompt is text, not bytes"),
    "a number": ({"prompts": 5}, "A prompt is text, not int"),
    "lists of lists": ({"prompts": [["a dog"]]}, "A prompt is text, not list"),
    "no prompts": ({"prompts": []}, "There are no prompts"),
    "an empty folder": ({"out": ""}, "out is '', which names no folder"),
    "a folder's number": ({"out": 5}, "out is '5', which names no folder"),
    "no memory": ({"vram": math.nan}, "vram is nan"),
    "a decimal comma": ({"vram": "7,5"}, "vram is 7,5, which is not a number. Write it with a point: 7.5"),
    "a number with marks": (
        {"batch": "1.000"},
        "batch is 1.000, which is not a whole number. Write it without marks: 1000",
    ),
    "memory in words": ({"vram": "much"}, "vram is much, which is not a number"),
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
    "two ways": ({"class_images": "x", "prior": "off"}, "class_images has no effect"),
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
    asked = values_from_keywords(
        Settings, {"steps": "auto", "precision": "no", "class_images": "cats", "pairs": ""}
    )
    flags = {"steps": "auto", "precision": "no", "class_images": ["cats"]}
    wanted = values_from_flags(flags, list_fields(Settings))
    assert asked == {**wanted, "pairs": ""} and wanted["prior"] == "class-images"
    assert values_from_keywords(Settings, {"nonsense": 1, "seed": None}) == {"nonsense": 1}
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
    with pytest.raises(UserError, match="resolution is 64px, which is not a whole number"):
        backbone.open(str(tiny_folder), resolution="64px")  # type: ignore[arg-type]


# Whatever a notebook has set -----------------------------------------------------------------------------------


@contextmanager
def float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


SET: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no gradients": torch.no_grad,
    "inference mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "float64": float64,
    "another device": lambda: torch.device("meta"),
}


def pixels(images: list[Image.Image]) -> bytes:
    return b"".join(image.tobytes() for image in images)


def test_what_a_notebook_has_set_for_torch_changes_no_image_and_no_weight(
    trained: customize.Run, tiny_folder: Path, tmp_path: Path
) -> None:
    images = Path(trained.settings["images"])
    source, results = images / "0.png", list[tuple[bytes, ...]]()
    for number, given in enumerate([ExitStack, *SET.values()]):
        with given():
            drawn = customize.sample("a [V] dog", concept=trained, steps=2, **TINY)
            model = backbone.open(tiny_folder, **TINY)
            inversion = edit.invert(model, source, "a cat", steps=3, method="null-text", iterations=1)
            edited = edit.replace(inversion, "a dog").images
            out = tmp_path / str(number)
            customize.train(
                images,
                class_noun="dog",
                model=tiny_folder,
                out=out,
                steps=2,
                rank=2,
                evaluation_steps=0,
                **TINY,
            )
        weights = (out / "pytorch_lora_weights.safetensors").read_bytes()
        results.append((pixels(drawn), pixels(edited), weights))
    assert len(set(results)) == 1


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """What each call gives in a thread of its own, or the exception that ends it."""
    found: dict[int, Any] = {}

    def run(number: int) -> None:
        try:
            found[number] = calls[number]()
        except Exception as error:  # noqa: BLE001
            found[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[number] for number in range(len(calls))]


def test_threads_draw_train_and_edit_what_one_alone_does(
    trained: customize.Run, tiny_folder: Path, tiny: Backbone, tmp_path: Path
) -> None:
    images = Path(trained.settings["images"])
    alone = pixels(customize.sample("a cat", model=tiny_folder, steps=2, **TINY))
    assert (
        in_threads([lambda: pixels(customize.sample("a cat", model=tiny_folder, steps=2, **TINY))] * 3)
        == [alone] * 3
    )
    small: dict[str, Any] = {"steps": 2, "rank": 2, "evaluation_steps": 0, "model": tiny_folder, **TINY}
    out = tmp_path / "run"
    run = in_threads([lambda: customize.train(images, class_noun="dog", out=out, **small)])[0]
    assert (run.path / "pytorch_lora_weights.safetensors").read_bytes() == (
        trained.path / "pytorch_lora_weights.safetensors"
    ).read_bytes()
    inversion = edit.invert(tiny, images / "0.png", "a cat", steps=4)
    calls: list[Callable[[], Any]] = [
        lambda: pixels(edit.replace(inversion, "a dog").images),
        lambda: pixels(edit.sdedit(tiny, images / "1.png", "a dog", steps=4).images),
    ]
    one_by_one = [call() for call in calls]
    assert in_threads(calls * 4) == one_by_one * 4


def test_a_run_is_found_from_another_folder_and_says_so_where_it_is_gone(
    trained: customize.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.path.parent)
    run = customize.Run(Path("run"))
    assert str(run) == "run" and run == customize.Run(trained.path) == copy.deepcopy(run)
    monkeypatch.chdir(tmp_path)
    assert run.settings == trained.settings and os.fspath(run) == str(trained.path)
    with pytest.raises(
        UserError, match=r"Continue it with customize train --resume .*, or choose another out"
    ):
        customize.train(run.settings["images"], class_noun="dog", out=run.path)
    gone = customize.Run(tmp_path / "gone")
    assert repr(gone) == "Run('gone', which is no run folder)" and gone._repr_png_() is None
    (tmp_path / "lost").mkdir()
    monkeypatch.chdir(tmp_path / "lost")
    (tmp_path / "lost").rmdir()
    assert str(run) == str(trained.path)
    with pytest.raises(UserError, match="The working folder is not there any more"):
        customize.sample("a dog")


def test_a_model_is_loaded_from_another_folder_than_it_was_opened_in(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_folder.parent)
    model = backbone.open(tiny_folder.name, **TINY)
    monkeypatch.chdir(tmp_path)
    assert edit.sdedit(model, Image.new("RGB", (64, 64)), "a dog", steps=2).images
    assert model.location.name == tiny_folder.name


def test_images_that_are_taken_away_added_or_moved_keep_their_own_prompts() -> None:
    from backbone.media.gallery import Images

    colours = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    images = Images(colours, ["red", "green", "blue"])
    images.reverse()
    assert images.sheet().tobytes() == Images(colours[::-1], ["blue", "green", "red"]).sheet().tobytes()
    del images[0]
    images.append(colours[0].copy())
    changed = Images([colours[1], colours[0], colours[0].copy()], ["green", "red", ""]).sheet()
    assert images.sheet().tobytes() == changed.tobytes()
    assert copy.deepcopy(images).sheet().tobytes() == changed.tobytes()
    for columns in (0, -1, 2.5):
        with pytest.raises(UserError, match="columns is"):
            images.sheet(columns)  # type: ignore[arg-type]


class Placed:
    """A path of another kind, as a run or an entry of a folder is one."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __fspath__(self) -> str:
        return str(self.path)


def test_numbers_of_numpy_and_torch_are_numbers_and_no_part_of_one_is_dropped() -> None:
    for whole in (np.int64(2), np.float32(2), torch.tensor(2), Fraction(2)):
        assert build(DrawingOptions, {"count": whole}).count == 2
    for part in (np.float32(2.5), torch.tensor(2.5), Fraction(5, 2), np.bool_(True), torch.tensor(True)):
        with pytest.raises(UserError, match=r"count is .*, which is not a whole number"):
            build(DrawingOptions, {"count": part})
    assert build(DrawingOptions, {"compile": np.bool_(True)}).compile is True


def test_paths_devices_and_several_values_come_in_the_types_that_python_has_for_them(tmp_path: Path) -> None:
    given = {
        "model": Placed(tmp_path), "device": torch.device("cpu"), "sheet_prompts": (one for one in ["a", "b"]),
        "rank_pattern": {"attn2": 4},
    }  # fmt: skip
    wanted = {
        "model": str(tmp_path), "device": "cpu", "sheet_prompts": ("a", "b"), "rank_pattern": ("attn2=4",),
    }  # fmt: skip
    assert values_from_keywords(Settings, given) == wanted
    with pytest.raises(UserError, match=r"model is <.*which is no text. Give a name or a path"):
        values_from_keywords(Settings, {"model": object()})
    with pytest.raises(UserError, match=r"images is a list, and what is in it is <PIL.*no text"):
        values_from_keywords(Settings, {"images": [Image.new("RGB", (8, 8))]})


def test_a_concept_and_references_come_one_by_one_or_several(
    trained: customize.Run, tiny_folder: Path
) -> None:
    for concept in ({trained}, iter([trained]), Placed(trained.path), np.array([str(trained.path)])):
        assert len(customize.sample("a [V] dog", concept=concept, references=None, steps=2, **TINY)) == 1  # type: ignore[arg-type]
    with pytest.raises(UserError, match="concept is empty"):
        customize.sample("a dog", concept="")
    with pytest.raises(UserError, match="A reference is the path of an image, not Image"):
        customize.sample("a dog", references=[Image.new("RGB", (8, 8))], model=tiny_folder, **TINY)  # type: ignore[list-item]
    for text in ("a \ud800 dog", "a \udcff dog"):
        with pytest.raises(UserError, match="is no text in UTF-8"):
            customize.sample(text)


def test_a_run_is_measured_by_every_setting_of_the_command(trained: customize.Run) -> None:
    shown = inspect.signature(customize.evaluate).parameters
    assert {"prompts", "scorer", "images", "on", "living", "count"} <= set(shown) and "as_json" not in shown
    wrong: dict[str, tuple[Any, str]] = {
        "count": ("x", "count is x, which is not a whole number"),
        "living": (True, "living has no effect without prompts"),
        "prompts": ("a dog", "has no {} where the subject stands"),
        "nonsense": (1, "There is no setting nonsense"),
    }
    for name, (value, said) in wrong.items():
        with pytest.raises(UserError, match=said):
            customize.evaluate(trained, **{name: value})
    with pytest.raises(UserError, match="run is None, which is no run folder"):
        customize.evaluate(None)  # type: ignore[arg-type]


REPLACED: dict[str, tuple[dict[str, Any], str]] = {
    "a share in words": ({"cross": "much"}, "cross is much, which is not a number"),
    "another layer": ({"layers": "early"}, "layers is early, which is none of all, late"),
    "a weight in words": ({"weights": {"dog": "2"}}, "weight of “dog” is '2', which is no number"),
    "weights in a list": ({"weights": [("dog", 2)]}, "weights is .*a dictionary by words is taken"),
    "half a window": ({"windows": {"dog": 0.5}}, "The window of “dog” is 0.5"),
    "a swap in words": ({"swaps": "cat=dog"}, "swaps is 'cat=dog', and pairs of words are taken"),
    "words in numbers": ({"keep": [3]}, "keep is .*and words are taken"),
    "frames in words": ({"frames": "x"}, "frames is x, which is not a whole number"),
}


@pytest.mark.parametrize("name", REPLACED)
def test_what_a_replacement_is_given_in_another_type_is_a_sentence(name: str) -> None:
    given, said = REPLACED[name]
    with pytest.raises(UserError, match=said):
        edit.ReplaceSettings(**given)


def test_a_replacement_s_settings_are_understood_as_every_setting_is() -> None:
    words = (one for one in ["dog"])
    given: dict[str, Any] = {
        "keep": "cat",
        "blend": words,
        "cross": "0.5",
        "strength": None,
        "negative": None,
    }
    made = edit.ReplaceSettings(**given, swaps=cast(Any, {"cat": "dog"}))
    assert (made.keep, made.blend, made.cross, made.strength) == (("cat",), ("dog",), 0.5, 1.0)
    assert made.negative == "" and made.swaps == (("cat", "dog"),)


def test_what_is_no_inversion_and_no_model_is_said_to_be_none(tiny: Backbone, tmp_path: Path) -> None:
    wrong: list[Any] = [None, "cat.safetensors", tiny]
    for given in wrong:
        with pytest.raises(UserError, match=r"is no inversion. Make one"):
            edit.replace(given, "a dog")
        with pytest.raises(UserError, match=r"is no inversion. Make one"):
            edit.remove(given, "dog")
        with pytest.raises(UserError, match=r"is no inversion. Make one"):
            edit.interpolate(given, given)
    with pytest.raises(UserError, match="NoneType is no open model"):
        edit.sdedit(cast(Any, None), "cat.png", "a dog")
    with pytest.raises(UserError, match="Backbone is no path of an inversion"):
        edit.read_inversion(cast(Any, tiny), tiny)


def test_an_open_file_that_is_cut_off_and_a_turned_mask_are_read_as_files_are(
    tiny: Backbone, tmp_path: Path
) -> None:
    from edit.pictures import read_mask

    random = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(random).save(tmp_path / "whole.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "whole.png").read_bytes()[:3000])
    with (
        Image.open(tmp_path / "cut.png") as image,
        pytest.raises(UserError, match=r"cannot be used .*truncated"),
    ):
        edit.sdedit(tiny, image, "a dog", steps=2)
    mask, turned = Image.new("L", (8, 4)), Image.Exif()
    mask.paste(255, (0, 0, 2, 4))
    turned[0x0112] = 6
    mask.save(tmp_path / "mask.png", exif=turned)
    with Image.open(tmp_path / "mask.png") as image:
        assert read_mask(image).image.tobytes() == read_mask(tmp_path / "mask.png").image.tobytes()
