"""At every door: what is given has an effect or is refused, and what is not there is named as it is."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import align.cli
import align.settings
import customize.cli
import customize.control_settings
import customize.settings
import customize.training.control.commands
import edit.settings
from backbone.adapters.concept import Concept
from backbone.cli.help import refuse_repeats
from backbone.cli.options import Field, list_fields
from backbone.cli.values.effects import refuse_idle, require_packages
from backbone.io.console import UserError, format_error
from backbone.io.files import write_json
from backbone.training.settings import read_run_settings
from tests.test_doors import COMMANDS, PROGRAMS, context_of

# Given twice -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_an_option_that_takes_one_value_is_not_given_twice(name: str) -> None:
    context = context_of(name)
    for parameter in COMMANDS[name].get_params(context):
        if parameter.param_type_name != "option":
            continue
        words = [parameter.opts[0]] if parameter.is_flag else [parameter.opts[0], "1"]
        _, _, order = COMMANDS[name].make_parser(context).parse_args(words + words)
        if parameter.multiple:
            refuse_repeats(order, {})
        else:
            with pytest.raises(UserError, match=rf"{parameter.opts[0]} is given 2 times"):
                refuse_repeats(order, {})


@pytest.mark.parametrize(
    "words",
    [
        ("customize", "sample", "a dog", "--scale", "0.5", "--scale", "0.7"),
        ("customize", "sample", "a dog", "--seed", "0", "--lora_scale", "1", "--scale", "1"),
        ("edit", "replay", "run.json", "--out", "a", "--output_dir", "b"),
        ("align", "rank", "pairs", "--margin", "0", "--margin", "1"),
    ],
)
def test_the_doors_answer_so(words: tuple[str, ...]) -> None:
    assert "given 2 times and counts once" in refused(*words)


def test_images_given_twice_are_answered_with_how_several_subjects_are_named() -> None:
    message = refused("customize", "train", "--images", "a", "--images", "b", "--token", "[V]")
    assert "--images is given 2 times and counts once. Put one subject's images into one folder" in message
    assert "name other subjects with --subject" in message


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("align", "sample", "a dog"),
            'reads nothing without a flag, and “a dog” has none.*--prompts "a dog"',
        ),
        (("align", "sample", "a", "dog", "--out", "x"), '--prompts "a dog"'),
        (("customize", "train", "photos"), "For the images, write --images photos"),
        (
            ("edit", "instruct", "make it snow", "cat.png"),
            '“cat.png” is too much.*--instruction "make it snow"',
        ),
        (("edit", "sdedit", "cat.png", "a dog"), 'takes IMAGE without a flag.*--prompt "a dog"'),
        (
            ("customize", "info", "a.safetensors", "b.safetensors"),
            "“b.safetensors” is too much. Leave it out",
        ),
        (
            ("customize", "train", "--images", "photos/1.png", "photos/2.png", "photos/3.png"),
            "For several images name their folder: --images photos",
        ),
        (
            ("customize", "train", "--images", "dog", "--flip", "true"),
            "A switch stands alone, without a value",
        ),
        (("edit", "remove", "photos/1.png", "cat"), 'For a word to remove, write --remove "cat"'),
        (
            ("customize", "train", "--images", "dog", "--token", "my", "dog"),
            "several words in quotation marks",
        ),
        (("align", "label", "a dog"), 'reads as a prompt.*align sample --prompts "a dog" --out FOLDER'),
        (("align", "train", "a dog"), 'reads as a prompt.*align sample --prompts "a dog" --out FOLDER'),
        (("align", "evaluate", "a dog"), "A run folder is wanted, and “a dog” reads as a prompt"),
        (("customize", "evaluate", "runs/my dog"), "There is no run folder runs/my dog"),
    ],
)
def test_words_without_a_flag_are_told_theirs(
    words: tuple[str, ...], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    for number in range(1, 4):
        (tmp_path / "photos" / f"{number}.png").touch()
    assert re.search(said, refused(*words)), refused(*words)


# Given in vain -----------------------------------------------------------------------------------------------

DECLARED = {
    f"{each.__module__}.{each.__name__}": each
    for module in (
        *(customize.cli, customize.settings, customize.control_settings, customize.training.control.commands),
        *(align.cli, align.settings, edit.settings),
    )
    for each in vars(module).values()
    if isinstance(each, type)
    and dataclasses.is_dataclass(each)
    and any(one.option.needs for one in list_fields(each).values())
}


def other_value(one: Field, values: tuple[Any, ...]) -> Any:
    """A value of a field that is none of these, or none at all."""
    if not values:
        return () if one.many else False if one.kind is bool else None if one.default is None else one.kind()
    if one.option.choices:
        return next(word for word in one.option.choices if word not in values)
    if isinstance(values[0], bool):
        return not values[0]
    return one.kind(values[0] + 1) if isinstance(values[0], (int, float)) else one.kind("x")


def idle_ways(declared: type) -> Iterator[tuple[Field, dict[str, Any]]]:
    """Each option that needs others, with settings in which these are not as they have to be."""
    known = list_fields(declared)
    for one in known.values():
        needs = one.option.needs
        if not needs:
            continue
        ways = needs if isinstance(needs, tuple) else (needs,)
        for number in range(max(map(len, ways))):
            broken = [list(way.items())[min(number, len(way) - 1)] for way in ways]
            yield one, {name: other_value(known[name], values) for name, values in broken}


def given_values(one: Field) -> list[Any]:
    """What somebody might give: the default, nought, and something else."""
    option = one.option
    if one.kind is bool:
        return [True]
    if one.kind not in (int, float):
        words = [*option.choices] or ["x"]
        return [(one.kind(word),) if one.many else one.kind(word) for word in words if word != option.off]
    numbers = [0, 1, option.min, option.max, one.default]
    fits = [
        n
        for n in numbers
        if isinstance(n, (int, float)) and n >= (option.min or 0) and n <= (option.max or n)
    ]
    return [n for n in fits if option.off is None or n != option.off]


@pytest.mark.parametrize("name", DECLARED)
def test_whatever_value_is_given_in_vain_is_refused(name: str) -> None:
    declared = DECLARED[name]
    known = list_fields(declared)
    usual: dict[str, Any] = {one.name: one.default for one in known.values()}
    tried = 0
    for one, broken in idle_ways(declared):
        settings = type("Settings", (declared,), {"__post_init__": lambda self: None})
        for value in given_values(one):
            made = settings(**{**usual, **broken, one.name: value})
            with pytest.raises(UserError, match=rf"{one.flag} has no effect"):
                refuse_idle(made, {one.name: value})
            tried += 1
    assert tried


@pytest.mark.parametrize("name", DECLARED)
def test_what_switches_a_thing_off_says_so(name: str) -> None:
    for one in list_fields(DECLARED[name]).values():
        if one.option.off is not None:
            assert (
                one.option.off == one.default
                or f"{one.option.off}:" in one.option.help
                or one.option.off in one.option.choices
            )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("customize", "sample", "a dog", "--scale", "0"), "--scale has no effect without --concept"),
        (
            ("customize", "evaluate", "run", "--images", "x", "--seed", "0"),
            "--seed has no effect with --images",
        ),
        (
            ("edit", "invert-and-replace", "--inversion", "x.safetensors", "--target", "a", "--seed", "0"),
            "--seed has no effect with --inversion",
        ),
        (
            ("edit", "remove", "x.png", "--mask", "m.png", "--threshold", "0.3"),
            "--threshold has no effect with --mask",
        ),
        (
            ("edit", "invert-and-replace", "x.png", "--target", "a", "--blend", "none", "--threshold", "0"),
            "--threshold has no effect where",
        ),
        (
            ("align", "compare", "a", "b", "--prompts", "x", "--port", "0"),
            "--port has no effect without --blind",
        ),
        (("align", "rank", "pairs", "--pareto"), "--pareto has no effect with one scorer"),
        (("align", "rank", "pairs", "--weight", "2"), "--weight has no effect with one scorer"),
        (("align", "check", ".", "--split", "train"), "--split has no effect"),
        (
            ("customize", "sample", "a dog", "--guidance", "1", "--guidance-stop", "0.5"),
            "At guidance 1 there is none",
        ),
        (
            ("customize", "sample", "a dog", "--steps", "4", "--guidance-stop", "0.1"),
            "None of 4 steps lies between 0 and 0.1 of them",
        ),
        (
            ("customize", "sample", "a dog", "--steps", "4", "--guidance-start", "0.9"),
            "None of 4 steps lies between 0.9 and 1 of them",
        ),
        (
            ("customize", "sample", "a dog", "--early-scale", "0.5"),
            "--early-scale has no effect without --concept",
        ),
        (
            ("customize", "sample", "a dog", "--guidance", "1", "--negative", "red"),
            "At guidance 1 the negative prompt",
        ),
    ],
    ids=str,
)
def test_nothing_is_given_in_vain(words: tuple[str, ...], complaint: str) -> None:
    assert complaint in refused(*words)


# Packages ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ("customize", "train", "--images", "{dog}", "--report_to", "tensorboard"),
        ("customize", "train", "--images", "{dog}", "--optimizer", "prodigy"),
        ("customize", "train", "--images", "{dog}", "--use_8bit_adam"),
        ("customize", "train", "--images", "{dog}", "--quantize", "nf4"),
        ("align", "train", "pairs", "--quantize", "8bit"),
    ],
)
def test_a_missing_package_is_told_before_anything_is_done(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("backbone.cli.values.effects.find_spec", lambda name: None)
    assert "is not installed. Run: pip install" in refused(*(word.format(dog=tmp_path) for word in words))
    assert not list(tmp_path.iterdir())


def test_only_what_is_used_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("backbone.cli.values.effects.find_spec", lambda name: None)
    require_packages(customize.settings.Settings(images="x", token="[V]", class_noun="dog"))


# Folders -----------------------------------------------------------------------------------------------------

NOWHERE = [
    ("customize", "sample", "a dog", "--concept", "runs/nope"),
    ("customize", "sample", "a dog", "--concept", "runs/nope", "--checkpoint", "best"),
    ("customize", "sample", "a dog", "--model", "runs/nope"),
    ("customize", "evaluate", "runs/nope"),
    ("customize", "train", "--resume", "runs/nope"),
    ("customize", "train", "--images", "runs/nope"),
    ("customize", "check", "--images", "runs/nope"),
    ("customize", "export", "runs/nope", "--out", "x.safetensors"),
    ("customize", "import", "runs/nope", "--out", "runs/x"),
    ("customize", "info", "runs/nope"),
    ("customize", "merge", "runs/nope", "--out", "x.safetensors"),
    ("customize", "resize", "runs/nope", "--out", "x.safetensors", "--rank", "2"),
    ("customize", "extract", "runs/nope", "moji", "--out", "x.safetensors", "--rank", "2"),
    ("edit", "sdedit", "runs/nope", "--prompt", "a dog"),
    ("edit", "sdedit", "{scene}", "--prompt", "a dog", "--concept", "runs/nope"),
    ("edit", "sdedit", "{scene}", "--prompt", "a dog", "--model", "runs/nope"),
    ("edit", "paint", "{scene}", "--no-browser", "--concept", "runs/nope"),
    ("edit", "replay", "runs/nope"),
    ("align", "sample", "--prompts", "a dog", "--out", "x", "--concept", "runs/nope"),
    ("align", "sample", "--prompts", "a dog", "--out", "x", "--model", "runs/nope"),
    ("align", "label", "runs/nope"),
    ("customize", "sketch", "--no-browser", "--concept", "runs/nope"),
    ("align", "rank", "runs/nope"),
    ("align", "check", "runs/nope"),
    ("align", "train", "runs/nope"),
    ("align", "train", "--resume", "runs/nope"),
    ("align", "evaluate", "runs/nope"),
    ("align", "compare", "moji", "runs/nope", "--prompts", "a dog", "--scale", "0.7"),
    ("align", "compare", "runs/nope", "moji", "--prompts", "a dog"),
]


def refused(*words: object) -> str:
    """What a command answers to a mistake; only a `UserError` is an answer."""
    program, *rest = map(str, words)
    done = CliRunner().invoke(PROGRAMS[program], rest)
    assert isinstance(done.exception, (UserError, FileNotFoundError)), (done.exception, done.output)
    return format_error(done.exception) or ""


@pytest.mark.parametrize("words", NOWHERE, ids=" ".join)
def test_what_is_not_there_is_said_not_to_be_there(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    scene = Path(edit.settings.__file__).parents[1] / "backbone/examples/scene.png"
    answer = refused(*(word.format(scene=scene) for word in words))
    assert "runs/nope" in answer
    assert any(said in answer for said in ("There is no", "does not exist")), answer
    assert not any(said in answer for said in ("strength", "missing", "another version", "damaged")), answer
    assert not list((tmp_path / "runs").iterdir())


@pytest.mark.parametrize("words", NOWHERE, ids=" ".join)
def test_a_link_that_leads_nowhere_is_said_to_at_every_door(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    scene = Path(edit.settings.__file__).parents[1] / "backbone/examples/scene.png"
    for target, said in (("away", "is a link to away, which is not there"), ("nope", "that leads to itself")):
        (tmp_path / "runs/nope").symlink_to(target)
        answer = refused(*(word.format(scene=scene) for word in words))
        assert f"runs/nope {'is a link ' * (target == 'nope')}{said}" in answer
        (tmp_path / "runs/nope").unlink()


def test_a_run_of_edits_is_measured_and_moved_as_no_subject_is(tmp_path: Path) -> None:
    settings = customize.settings.Settings(images="", token="", class_noun="", pairs="pairs")
    write_json(tmp_path / "settings.json", {"settings": settings, "command": "customize train --pairs pairs"})
    Concept("edits", "moji", "", {}, "", weights="w.safetensors").write(tmp_path)
    for words in (("evaluate", tmp_path), ("transfer", tmp_path, "--to", "moji-turbo")):
        assert "learned what instructions do to images, and no subject" in refused("customize", *words)
    assert not (tmp_path / "dreambench").exists()


def test_a_run_and_a_model_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, half, model, file = (tmp_path / name for name in ("run", "half", "a model", "one lora.safetensors"))
    for folder in (run, half, model):
        folder.mkdir()
    file.write_bytes(b"")
    Concept("lora", "moji", "", {"[V]": "bcd"}, "dog").write(run)
    write_json(run / "settings.json", {"settings": {}, "command": "customize train --images dog"})
    write_json(half / "settings.json", {"settings": {}, "command": "customize train --images dog"})
    write_json(model / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    draw = ("customize", "sample", "a dog")
    assert "is a whole model, not a run. Give it with --model '" in refused(*draw, "--concept", model)
    assert "is a run, not a whole model. Give it with --concept" in refused(*draw, "--model", run)
    assert "is not finished" in refused(*draw, "--concept", half)
    for door in (("export", half, "--out", "x.safetensors"), ("info", half), ("merge", half, "--out", "m")):
        assert f"is not finished (concept.json is missing). Go on with it: --resume {half}" in refused(
            "customize", *door
        )
    write_json(half / "condition.json", {})  # of a control network, which is finished
    control = (
        "half is a control network, under whose maps is drawn, and no concept. Give it with --condition KIND"
    )
    for line in ((*draw[1:], "--concept", half), ("info", half), ("merge", half, "--out", "m")):
        assert control in refused("customize", *line)
    (half / "condition.json").unlink()
    (half / "log.jsonl").write_text('{"step": 1}\n')
    assert f"{half} holds no pairs" in refused("align", "check", half)
    assert f"is a file, not a run folder. Make one of it: customize import '{file}' --out" in refused(
        *draw, "--concept", file
    )
    for words in (("evaluate", run), ("train", "--resume", run)):
        assert "is a run of `customize train`, not of `align train`" in refused("align", *words)
    # What is no LoRA is not to be imported
    for name in ("dog.png", "notes.txt"):
        (tmp_path / name).touch()
        assert "is a file, not a run folder. Name the folder that a training wrote." in refused(
            *draw, "--concept", tmp_path / name
        )
    (weights := run / "pytorch_lora_weights.safetensors").touch()
    assert f"is a file, not a run folder. Name the one that it lies in: {run}" in refused(
        *draw, "--concept", weights
    )
    edit_folder = tmp_path / "edited"
    edit_folder.mkdir()
    write_json(edit_folder / "run.json", {"command": "edit sdedit a.png"})
    (edit_folder / "inversion.safetensors").touch()
    assert "holds what was drawn, by its run.json, and no concept" in refused(*draw, "--concept", edit_folder)
    for side in (half, tmp_path / "runs", file):
        assert str(side) in refused("align", "compare", "moji", side, "--prompts", "a dog")
    with pytest.raises(UserError, match="is a run of `customize train`, not of `align train`"):
        read_run_settings(align.settings.Settings, run, "align train")


def test_a_run_named_without_its_folder_or_misspelt_is_suggested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs/dog").mkdir(parents=True)
    write_json(
        tmp_path / "runs/dog/settings.json", {"settings": {}, "command": "customize train --images dog"}
    )
    for name in ("dog", "dgo", "runs/dogg", "./runs/dogs"):
        for words in (("sample", "a dog", "--concept", name), ("evaluate", name)):
            assert refused("customize", *words).endswith(
                f"There is no run folder {Path(name)}. Did you mean runs/dog?"
            )
    assert "Check the spelling" in refused("customize", "evaluate", "quite/another")
