"""What is asked becomes subjects and settings: every door trains, evaluates and shows the same word."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import customize
from backbone.adapters.concept import Concept, read_concept
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.cli.options import list_fields
from backbone.cli.values.convert import convert_value
from backbone.io.console import UserError
from backbone.io.files import read_jsonl, read_tensors, write_json, write_tensors
from backbone.io.run_folder import CHECKPOINT
from backbone.media.sources.pictures import list_images
from backbone.media.sources.record import ImageRecord
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from backbone.training.settings import find_changed_settings, find_resumed, resume_settings
from customize.cli import app
from customize.data.changes import describe_changes, hash_images
from customize.data.folders import as_template
from customize.objectives.dreambooth import weigh_levels
from customize.settings import INSTANCE_PROMPT, Settings, Subject, TrainOptions, read_settings
from customize.training.preflight import say_idle_bound
from customize.training.run import check_sheet_prompt, make_prompts, refuse_unmeasured, resume_concept
from customize.training.start import as_saved, resolve_subjects, start
from customize.training.subjects import choose_words, guess_class, make_group


@pytest.fixture
def dog(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `dog` of two pictures below the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "dog" / f"{number}.png")
    return tmp_path / "dog"


SKS = "a photo of sks dog"


@pytest.mark.parametrize(
    ("asked", "token", "words", "template"),
    [
        ({"instance_prompt": SKS, "class_noun": "dog"}, "sks", "sks", "a photo of {token} {class}"),
        ({"instance_prompt": SKS}, "sks", "sks", "a photo of {token} {class}"),
        (
            {"instance_prompt": SKS, "class_prompt": "a photo of dog"},
            "sks",
            "sks",
            "a photo of {token} {class}",
        ),
        ({"instance_prompt": SKS, "method": "pivotal"}, "sks", "", "a photo of {token} {class}"),
        ({"instance_prompt": SKS, "token_words": "olis"}, "sks", "olis", "a photo of {token} {class}"),
        (
            {"instance_prompt": SKS, "token": "sks", "class_noun": "dog"},
            "sks",
            "",
            "a photo of {token} {class}",
        ),
        (
            {"instance_prompt": "a photo of [V] dog", "class_noun": "dog"},
            "[V]",
            "",
            "a photo of {token} {class}",
        ),
        ({"instance_prompt": "one {token} {class}", "class_noun": "dog"}, "[V]", "", "one {token} {class}"),
        ({"class_noun": "dog"}, "[V]", "", None),
    ],
)
def test_the_instance_prompt_s_word_is_the_token(
    dog: Path, asked: dict[str, Any], token: str, words: str, template: str | None
) -> None:
    (subject,), settings = resolve_subjects({"images": "dog", **asked})
    assert (subject.token, subject.token_words, subject.class_noun) == (token, words, "dog")
    assert settings.get("instance_prompt") == template
    assert subject.images == str(dog)


def test_prompts_of_a_run_are_on_one_line_and_may_stand_in_a_file(tmp_path: Path) -> None:
    (tmp_path / "class.txt").write_text("a photo of a dog\n")
    asked = {"instance_prompt": "a photo of\n{token} {class}", "class_prompt": str(tmp_path / "class.txt")}
    options = list_fields(Settings)
    said = {name: convert_value(options[name], value, name) for name, value in asked.items()}
    assert said == {"instance_prompt": "a photo of {token} {class}", "class_prompt": "a photo of a dog"}


def test_the_instance_prompt_s_word_is_the_token_of_every_layout(dog: Path) -> None:
    kohya = dog.rename(dog.with_name("10_sks dog"))
    (subject,), settings = resolve_subjects({"images": kohya, "instance_prompt": SKS})
    assert (subject.token, settings["instance_prompt"]) == ("sks", "a photo of {token} {class}")
    both, settings = resolve_subjects(
        {"images": kohya.parent, "instance_prompt": SKS, "subject": (f"{kohya}:[W]:cat",)}
    )
    filled = [one.fill(settings["instance_prompt"]) for one in both]
    assert filled == [SKS, "a photo of [W] cat"]
    flag = {"subject": (f"{kohya}:sks:dog",), "instance_prompt": SKS}
    assert resolve_subjects(flag)[1]["instance_prompt"] == "a photo of {token} {class}"
    entry = {"instance_data_dir": "10_sks dog", "instance_prompt": SKS, "class_prompt": "a photo of dog"}
    (dog.parent / "concepts_list.json").write_text(json.dumps([entry]))
    (subject,), settings = resolve_subjects({"images": dog.parent / "concepts_list.json"})
    assert (subject.token, subject.fill(settings["instance_prompt"])) == ("sks", SKS)
    assert subject.fill(settings["class_prompt"]) == "a photo of dog"


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"instance_prompt": "a photo of a fluffy dog"}, "does not show which word is the subject's"),
        ({"instance_prompt": SKS, "token": "[V]"}, r"lacks the token \[V\]"),
        ({"class_prompt": "a photo of [V] dog"}, r"class prompt .* holds the token \[V\]"),
        ({"prior_prompts": ("a dog", "a [V] dog")}, r"prior prompt “a \[V\] dog” holds the token \[V\]"),
        ({"prior_prompts": ("a [W] cat",), "subject": ("dog:[W]:cat",)}, r"holds the token \[W\]"),
        ({"instance_prompt": ""}, "The instance prompt is empty"),
        ({"class_noun": "dog", "token_words": "sks dog"}, "The words “sks dog” hold the class dog"),
        (
            {"class_noun": "dog", "subject": ("dog:[W]:cat:qrs cat",)},
            "The words “qrs cat” hold the class cat",
        ),
        ({"class_prompt": " "}, "The class prompt is empty"),
    ],
)
def test_prompts_that_would_train_another_word_are_refused(
    dog: Path, asked: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        resolve_subjects({"images": "dog", **asked})


def test_a_class_with_a_vowel_gets_its_article() -> None:
    assert Subject("", "[V]", "elephant").fill("a {class}") == "an elephant"
    assert [Subject("", "", noun).class_noun for noun in ("my dog", "The dog", "theory")] == [
        "dog",
        "dog",
        "theory",
    ]
    assert Subject("", "[V]", "dog").fill("An {class}, a {token} {class}") == "A dog, a [V] dog"
    assert Subject("", "[V]", "elephant").fill("A photo of a {token} {class}") == "A photo of a [V] elephant"


FEW: dict[str, Any] = {
    "steps": 2,
    "rank": 2,
    "prior": "off",
    "batch": 1,
    "sample_steps": 1,
    "sheet_prompts": ("a {}",),
    "device": "cpu",
    "precision": "fp32",
}


def test_diffusers_own_call_trains_shows_and_says_one_word(
    dog: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("tiny").symlink_to(tiny_folder)
    asked = {**FEW, "images": "dog", "model": "tiny", "instance_prompt": SKS, "max_grad_norm": 0.0}
    run = start({**asked, "lora_alpha": 2.0}, out=Path("runs/r1"))
    assert "2 pictures of “sks dog”; sks stands for “sks”" in capsys.readouterr().err
    concept, settings = read_concept(run), read_settings(run)
    assert concept.tokens == {"sks": "sks"} and settings.name_in_prompt() == "sks dog"
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    from customize.data.folders import read_images

    _, (group,) = make_prompts(settings, model, read_images(settings.subjects()))
    assert group.prompts == [SKS, SKS] and group.class_prompt == "a dog"
    # what a bound of 0 cuts is nothing: the weights are those of a huge one
    bound = start({**asked, "max_grad_norm": 1e9, "lora_alpha": 2.0}, out=Path("runs/bound"))
    one, other = (read_tensors(folder / LORA_WEIGHTS)[0] for folder in (run, bound))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert max(float(one[name].abs().max()) for name in one if "lora_B" in name) > 0
    # from another folder: paths are whole
    assert (settings.images, settings.model) == (str(dog), str(dog.parent / "tiny"))
    # more steps and another rate, at another place with another picture
    moved = dog.rename(dog.with_name("moved"))
    Image.new("RGB", (64, 64), "blue").save(moved / "1.png")
    resume_concept(run, {"steps": 4, "learning_rate": 1e-5, "images": str(moved)})
    said = capsys.readouterr().err
    assert "not those that the run began with (changed: 1.png)" in said and "from step 2 to 4" in said
    assert [line["step"] for line in read_jsonl(run / "log.jsonl")] == [1, 2, 3, 4]
    again = read_settings(run)
    assert (again.steps, again.learning_rate, again.images) == (4, 1e-5, str(moved))
    with pytest.raises(UserError, match="has taken 4 steps already"):
        resume_concept(run, {"steps": 4})
    with pytest.raises(
        UserError, match=r"all of its 4 steps, so --learning-rate has no effect\. Give --steps"
    ):
        resume_concept(run, {"learning_rate": 2e-5})
    assert read_settings(run).learning_rate == 1e-5


def test_the_run_is_called_after_what_was_said(dog: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import customize.training.run

    named: list[Any] = []
    monkeypatch.setattr(customize.training.run, "train_concept", lambda *_, out, **__: named.append(out))
    (dog.parent / "sets").mkdir()
    dog.rename(dog.parent / "sets" / "10_ohwx cat")
    for images in ("sets", "sets/10_ohwx cat"):
        start({"images": images})
    assert named == [Path("runs/sets"), Path("runs/10_ohwx cat")]


@pytest.mark.parametrize("seed", [99999999999999999999, -(2**70), -1, 2**63])
def test_a_seed_is_any_whole_number(tiny: Backbone, seed: int) -> None:
    from customize.methods.registry import make_trainable

    settings = Settings(images="", token="[V]", class_noun="dog", rank=2, lora_layers="attention", seed=seed)
    assert make_trainable(tiny, settings)


def test_a_captions_bracket_does_not_take_the_folder_and_a_prompt_s_stranger_is_refused_before(
    dog: Path, tiny_folder: Path
) -> None:
    asked = {**FEW, "images": "dog", "model": str(tiny_folder), "class_noun": "dog"}
    with pytest.raises(UserError, match=r"\[W\]"):
        start({**asked, "sheet_prompts": ("a [W] dog",)}, out=Path("runs/r1"))
    with pytest.raises(UserError, match=r"\[W\] in the prompt “a \[W\] dog”"):
        start({**asked, "prior": "base", "class_prompt": "a [W] {class}"}, out=Path("runs/r1"))
    assert not Path("runs").exists()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """runs/old, runs/r1 and runs/align, each of which has saved a step; the settings of runs/r1."""
    monkeypatch.chdir(tmp_path)
    settings = Settings(
        images=str(tmp_path / "dog"),
        token="sks",
        class_noun="dog",
        instance_prompt=as_template("a photo of sks dog", "sks", "dog"),
    )
    for number, (name, program) in enumerate(
        (("old", "customize train"), ("r1", "customize train"), ("taste", "align train"))
    ):
        write_json(Path("runs", name, "settings.json"), {"settings": settings, "command": f"{program} …"})
        write_tensors(Path("runs", name, "checkpoint.safetensors"), {}, {"step": f"{number + 2}"})
        os.utime(Path("runs", name, "checkpoint.safetensors"), (number, number))
    write_json(Path("runs", "began", "settings.json"), {"settings": settings, "command": "customize train …"})
    Path("dog").mkdir()
    return settings


@pytest.mark.parametrize(
    ("resume", "out", "usual", "found"),
    [
        ("runs/r1", None, None, "runs/r1"),
        ("latest", "runs/r1", "runs/dog", "runs/r1"),
        ("latest", None, "runs/old", "runs/old"),
        ("latest", None, None, "runs/r1"),  # the newest of this program
        ("runs/latest", None, None, "runs/r1"),
        ("runs/old/latest", None, None, "runs/old"),
        ("runs/r1/checkpoint-3", None, None, "runs/r1"),
        ("runs/r1/checkpoint.safetensors", None, None, "runs/r1"),
        ("checkpoint-2", "runs/old", None, "runs/old"),
        ("latest", "runs/began", "runs/dog", None),  # no step was saved: it begins
        ("latest", None, "runs/dog", None),
    ],
)
def test_the_latest_checkpoint_is_the_run_folder_s(
    saved: Settings, resume: str, out: str | None, usual: str | None, found: str | None
) -> None:
    said = TrainOptions(resume=Path(resume), out=None if out is None else Path(out))
    run = find_resumed(said, "customize train", None if usual is None else Path(usual))
    assert run == (None if found is None else Path(found))
    if run is not None and out is not None:
        assert find_changed_settings(saved, {}, said, run) == {}


@pytest.mark.parametrize(
    ("resume", "out", "complaint"),
    [
        ("runs/r1/checkpoint-500", None, "newest checkpoint alone, that of step 3.*--resume runs/r1"),
        ("latest", "runs/began", "runs/began holds none"),
        ("elsewhere/latest", None, "elsewhere holds none"),
    ],
)
def test_a_checkpoint_that_is_not_there_is_said(
    saved: Settings, resume: str, out: str | None, complaint: str
) -> None:
    said = TrainOptions(resume=Path(resume), out=None if out is None else Path(out))
    with pytest.raises(UserError, match=complaint):
        find_resumed(said, "customize train", None)


def test_what_a_run_learns_from_and_is_not_there_any_more_is_said_with_how_to_name_it(
    saved: Settings,
) -> None:
    resume_settings(saved, Path("runs/r1"), None)
    Path("dog").rename("dogs")
    with pytest.raises(UserError, match=r"dog, from which runs/r1 learns.*--resume runs/r1 --images PATH"):
        resume_settings(saved, Path("runs/r1"), None)
    resume_settings(saved, Path("runs/r1"), {"images": str(Path("dogs").absolute())})


def test_a_file_of_a_run_is_told_from_its_folder(saved: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"r1/settings.json is a file.*Name the folder it lies in: .*runs/r1\."
    ):
        read_settings(Path("runs/r1/settings.json"))
    monkeypatch.chdir("runs/r1")
    said = TrainOptions(resume=Path("checkpoint.safetensors"))
    assert find_resumed(said, "customize train", Path("runs/dog")) == Path()


def test_a_finished_run_whose_checkpoint_is_gone_is_not_begun_anew_over_its_weights(saved: Settings) -> None:
    run, said = Path("runs/old"), TrainOptions(resume=Path("runs/old"))
    (run / CHECKPOINT).unlink()
    assert find_resumed(said, "customize train", None) == run  # no step was saved: it begins
    (run / "concept.json").write_text("{}")
    with pytest.raises(UserError, match=r"runs/old is finished and its checkpoint.*--begin-from runs/old"):
        find_resumed(said, "customize train", None)


def test_beside_resume_only_what_may_change_is_said_otherwise(saved: Settings) -> None:
    said, run = TrainOptions(resume=Path("runs/r1")), Path("runs/r1")
    assert find_changed_settings(saved, {"steps": 6}, said, run, allowed=("steps",)) == {"steps": 6}
    again = {"images": "dog", "instance_prompt": "a photo of sks dog", "token": "sks", "steps": saved.steps}
    assert (
        find_changed_settings(saved, as_saved(again, saved), said, run) == {}
    )  # the whole command once more
    with pytest.raises(UserError, match=r"--rank has no effect.*anew: --steps"):
        find_changed_settings(saved, {"rank": 6}, said, run, allowed=("steps",))
    with pytest.raises(UserError, match="--vram has no effect"):
        find_changed_settings(saved, {}, TrainOptions(resume=run, vram=8.0), run)


def test_changed_images_are_told_from_moved_ones() -> None:
    assert describe_changes([{}], [[]]) == []
    assert describe_changes(None, [[]]) == []
    (line,) = describe_changes([{"1.png": "0"}], [[]])
    assert "(gone: 1.png)" in line


def test_changed_captions_and_masks_are_told_too(dog: Path) -> None:
    (dog / "0.txt").write_text("a dog")
    kept = [hash_images(list_images(dog))]
    assert describe_changes(kept, [list_images(dog)]) == []
    (dog / "0.txt").write_text("a cat")
    Image.new("L", (64, 64), "white").save(dog / "1.mask.png")
    (line,) = describe_changes(kept, [list_images(dog)])
    assert "(changed: 0.png, 1.png)" in line
    older = [{name: value[:16] for name, value in kept[0].items()}]  # which knew nothing of them
    assert describe_changes(older, [list_images(dog)]) == []


def test_spaces_and_an_article_are_no_part_of_what_is_said(dog: Path) -> None:
    ((subject,), _) = resolve_subjects({"images": "dog", "token": " [V] ", "class_noun": "A  small dog "})
    assert (subject.token, subject.class_noun) == ("[V]", "small dog")
    assert subject.fill("a {token} {class}") == "a [V] small dog"
    # marks of a sentence, quotes that a shell handed over
    for said in ("dog.", "'dog'", "“dog”,", "my dog:"):
        assert Subject("dog", "[V]", said).class_noun == "dog"
    with pytest.raises(UserError, match="The token is empty"):
        resolve_subjects({"images": "dog", "token": " ", "class_noun": "dog"})


@pytest.mark.parametrize("flag", ["--out", "--images", "--resume"])
@pytest.mark.parametrize("blank", ["", " "])
def test_an_empty_path_is_not_the_working_folder(
    flag: str, blank: str, subject: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(subject)
    given = {"--images": str(subject), "--token": "[V]", "--class": "dog", flag: blank}
    answer = CliRunner().invoke(app, ["train", *(word for pair in given.items() for word in pair)])
    assert isinstance(answer.exception, UserError), answer.output
    assert str(answer.exception).startswith(f"{flag} is empty") and not (subject / "settings.json").exists()
    answer = CliRunner().invoke(app, ["sample", "a dog", "--concept", blank])
    assert str(answer.exception).startswith("--concept is empty")


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"instance_prompt": "a {token} {class} in {place}"}, r"has \{place\}, and"),
        ({"instance_prompt": "{} {token}"}, r"has \{\}, and"),
        ({"class_prompt": "a {0}"}, r"class prompt “a \{0\}” has"),
        ({"prior_prompts": ("a {noun}",)}, r"prior prompt “a \{noun\}” has"),
        ({"class_noun": "[V]"}, "The class \\[V\\] holds the token"),
        (
            {"class_noun": "dog", "token": "dog"},
            "Give the subject another, as --token sks, beside --class dog",
        ),
        ({"class_noun": "dog {token}"}, "The class dog {token} has braces"),
        ({"class_noun": "sks dog", "token": "sks"}, "what kind of thing it is without it, as --class dog"),
    ],
)
def test_a_placeholder_that_nothing_fills_and_a_class_that_is_the_token_are_refused(
    said: dict[str, str], words: str, subject: Path
) -> None:
    with pytest.raises(UserError, match=words):
        resolve_subjects({"images": str(subject), "token": "[V]", "class_noun": "dog", **said})
    resolve_subjects(
        {"images": str(subject), "token": "[V]", "instance_prompt": "a {token} {class}, {red|blue}"}
    )


def test_a_caption_that_names_a_side_or_letters_is_said_where_images_are_mirrored(
    tiny: Backbone, subject: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concept = Concept("lora", "tiny", "f", {"[V]": "bcd"}, "dog")
    first, *rest = list_images(subject)
    for caption, found in (
        ("a dog, to the left,", "left"),
        ("a dog with a right-hand glove", "right-hand"),
        ("Text on a dog", "Text"),
        ("a bright dog, leftover", ""),
    ):
        for flip in (False, True):
            settings = Settings(images="", token="[V]", class_noun="dog", flip=flip)
            make_group(
                Subject("", "[V]", "dog", "bcd"),
                [replace(first, caption=caption), *rest],
                settings,
                concept,
                tiny,
            )
            said = " ".join(capsys.readouterr().err.split())
            assert ("--flip teaches it mirrored too" in said) == bool(found and flip)
            assert f"“{found}” stands in" in said or not (found and flip)


def test_an_instance_prompt_that_no_image_is_learned_under_is_said(
    tiny: Backbone, subject: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    concept = Concept("lora", "tiny", "f", {"[V]": "bcd"}, "dog")
    pictures = [replace(one, caption="a [V] dog in a park") for one in list_images(subject)]
    bare = [replace(pictures[0], caption=None), *pictures[1:]]
    for prompt, folder, said in (
        ("a photo of {token}", pictures, True),
        ("a photo of {token}", bare, False),
        (INSTANCE_PROMPT, pictures, False),
    ):
        settings = Settings(images="", token="[V]", class_noun="dog", instance_prompt=prompt)
        make_group(Subject("", "[V]", "dog", "bcd"), folder, settings, concept, tiny)
        found = " ".join(capsys.readouterr().err.split())
        assert ("no image is learned under the instance prompt “a photo of [V]”" in found) == said


def test_early_stopping_without_a_scorer_is_refused_and_evaluations_are_said(
    tiny: Backbone, subject: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"images": str(subject), "token": "[V]", "class_noun": "dog"}
    more: dict[str, Any]
    for more in ({"patience": 2}, {"patience": 3, "evaluation_steps": 50}):
        with pytest.raises(
            UserError, match="has no scorer of its own, so nothing is evaluated, and no evaluation"
        ):
            refuse_unmeasured(Settings(**{**asked, **more}), tiny, more)
    refuse_unmeasured(Settings(**asked, patience=2, scorer="x"), tiny, {"patience": 2})
    refuse_unmeasured(Settings(**asked), tiny, {})
    assert capsys.readouterr().err == ""
    refuse_unmeasured(Settings(**asked, evaluation_steps=2), tiny, {"evaluation_steps": 2})
    assert "--evaluation-steps has no effect without --scorer" in " ".join(capsys.readouterr().err.split())


def test_two_subjects_stand_for_words_of_their_own(tiny: Backbone, subject: Path) -> None:
    pictures = [list_images(subject)] * 2
    asked = Settings(images="", token="[V]", class_noun="dog")
    chosen, given = Subject("", "[V]", "dog"), Subject("", "[W]", "cat", "qrs")
    for both in ((chosen, given), (given, chosen)):  # the one that is chosen is another
        assert len({one.token_words for one in choose_words(tiny, both, pictures, asked)}) == 2
    with pytest.raises(UserError, match=r"\[V\] and \[W\] both stand for “qrs”"):
        choose_words(tiny, (replace(chosen, token_words="qrs"), given), pictures, asked)
    with pytest.raises(UserError, match="Sks and sks are one word in prompts"):
        choose_words(tiny, (Subject("", "Sks", "dog"), Subject("", "sks", "cat")), pictures, asked)
    assert choose_words(tiny, (Subject("", "[V]", "dog"), Subject("", "[v]", "cat")), pictures, asked)


def test_a_run_goes_on_under_the_words_of_the_run_that_it_begins_from(
    tiny: Backbone, subject: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "before").mkdir()
    Concept("lora", "tiny", "f", {"[V]": "bcd"}, "dog").write(tmp_path / "before")
    asked = Settings(images="", token="[V]", class_noun="dog", begin_from=str(tmp_path / "before"))

    def words(token: str, given: str = "") -> str:
        (one,) = choose_words(tiny, [Subject("", token, "dog", given)], [list_images(subject)], asked)
        return one.token_words

    assert words("[V]") == "bcd" and capsys.readouterr().err == ""
    assert words("[W]") != "bcd" and "has learned [V], which stands for “bcd”: [W]" in capsys.readouterr().err
    assert words("[V]", "qrs") == "qrs" and "[V] stands for other words here" in capsys.readouterr().err
    assert words("[W]", "bcd") == "bcd" and capsys.readouterr().err == ""  # it may be called otherwise


def test_one_pattern_has_one_rank() -> None:
    with pytest.raises(UserError, match="gives attn2 the ranks 4 and 8"):
        Settings(images="", token="[V]", class_noun="dog", rank_pattern=("attn2=4", "attn2=8"))


@pytest.mark.parametrize("alpha", [0.0, -4.0])
def test_an_adapter_s_alpha_is_above_zero(alpha: float) -> None:
    with pytest.raises(UserError, match="lora_alpha is"):
        Settings(images="", token="[V]", class_noun="dog", lora_alpha=alpha)


def test_from_python_the_token_comes_from_the_instance_prompt_too(dog: Path) -> None:
    with pytest.raises(UserError, match="does not show which word"):
        customize.train("dog", instance_prompt="a photo of a fluffy dog")


def test_a_prompt_of_the_sheet_that_shows_no_subject_is_said_and_one_that_nothing_fills_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    concept = Concept(kind="lora", model="moji", fingerprint="f", tokens={"sks": "bcd"}, class_noun="dog")
    for prompt in ("a {} in the snow", "a photo of sks dog in a bucket"):
        check_sheet_prompt(prompt, concept)
    assert capsys.readouterr().err == ""
    check_sheet_prompt("a dog between desks", concept)
    assert "“a dog between desks” has no {} and no sks" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"has \{place\}, and \{\} alone is filled in"):
        check_sheet_prompt("a {} in {place}", concept)


def test_a_folder_s_name_says_the_class_in_the_plural_too(
    tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, noun in (("my-dogs", "dog"), ("dog", "dog"), ("owls", "owl")):
        assert guess_class(tiny, [], f"sets/{name}", "[V]") == noun
    assert "says that it shows an owl" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("names", "captions", "said"),
    [
        (["dog-1.png", "dog-2.png"], ["", ""], "names"),
        (["1.png", "2.png"], ["a [V] dog in a car", "a car beside a [V] dog"], "captions"),
        (["cat.png", "cat2.png"], ["a [V] dog, asleep", "photo of a dog"], "captions"),
        (["1.png", "2.png"], ["a dog at sea", "the dog and a cat"], "captions"),
    ],
)
def test_captions_and_files_that_name_the_class_count_before_a_guess(
    tiny: Backbone, names: list[str], captions: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    images = [ImageRecord(Path(name), caption) for name, caption in zip(names, captions, strict=True)]
    assert guess_class(tiny, images, "pets", "[V]") == "dog"
    assert (
        f"The {said} of the images in pets say that it shows a dog (change it with --class)."
        in capsys.readouterr().err
    )


def test_names_that_do_not_agree_on_a_class_name_none(tiny: Backbone) -> None:
    images = [ImageRecord(Path(name)) for name in ("dog.png", "cat.png")]
    with pytest.raises(UserError, match="--class dog"):
        guess_class(tiny, images, "pets", "[V]")


def test_a_set_of_layers_that_is_not_is_refused_before_anything_is_made(
    dog: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Backbone, "denoiser", property(lambda _: pytest.fail("weights were loaded")))
    asked = {"images": str(dog), "model": str(tiny_folder), "lora_layers": "to_q", "device": "cpu"}
    with pytest.raises(UserError, match=r"no set of layers called to_q\. Choose one of attention, all"):
        start({**asked, "class_noun": "dog"}, out=dog.parent / "run")
    assert not (dog.parent / "run").exists()


def test_what_has_no_effect_whatever_else_is_asked_for_is_to_be_left_out(
    dog: Path, tiny_folder: Path
) -> None:
    asked = ("--images", dog, "--condition", "edges", "--lora-layers", "all", "--model", tiny_folder)
    answer = CliRunner().invoke(app, ["train-control", *map(str, asked)])
    assert "--lora-layers has no effect here. Leave it out." in str(answer.exception)


def test_a_bound_of_weights_above_every_level_s_ratio_is_said(
    tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    levels = tiny.path.levels
    highest = float(((levels.a / levels.b) ** 2).max())
    of_min_snr: dict[str, Any] = {
        "images": "",
        "token": "[V]",
        "class_noun": "dog",
        "loss_weighting": "min-snr",
    }
    for gamma, said in ((2 * highest, True), (0.5 * highest, False)):
        settings = Settings(**of_min_snr, snr_gamma=gamma)
        bounded = weigh_levels(levels, tiny.path.prediction_type, "min-snr", gamma)
        assert bool((bounded == weigh_levels(levels, tiny.path.prediction_type, "none")).all()) == said
        for asked in ({}, {"snr_gamma": gamma}):
            say_idle_bound(settings, tiny, asked)
            found = " ".join(capsys.readouterr().err.split())
            assert (f"--snr-gamma {gamma:g} has no effect" in found) == (said and bool(asked))


def test_rates_at_which_nothing_is_learned_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    asked: dict[str, Any] = {"images": "x", "token": "[V]", "class_noun": "dog"}
    Settings(**asked, train_text_encoder=False, text_encoder_lr=0.0)
    assert "learns nothing" not in capsys.readouterr().err
    Settings(**asked, train_text_encoder=True, text_encoder_lr=0.0)
    assert "The text encoder's learning rate is 0" in capsys.readouterr().err
    Settings(**asked, method="textual-inversion", words_learning_rate=0.0)
    assert "The learning rate of the token's embedding is 0" in capsys.readouterr().err


def test_prepared_data_are_not_read_as_images(tmp_path: Path) -> None:
    for name, record in (("prepared.json", {}), ("dataset_dict.json", {"splits": ["images-64x64"]})):
        write_json(tmp_path / name, record)
    with pytest.raises(UserError, match="holds prepared data, which only training reads"):
        list_images(str(tmp_path))


def test_a_scorer_that_changed_under_its_name_is_said_by_resume(
    dog: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(EMBEDDED / "scorer", scorer := tmp_path / "scorer")
    requested = {
        **FEW,
        "images": "dog",
        "model": str(tiny_folder),
        "instance_prompt": SKS,
        "scorer": str(scorer),
    }
    run = start(requested, out=Path("runs/r1"))
    resume_concept(run, {"steps": 3})
    assert "has changed since" not in capsys.readouterr().err
    settings = scorer / "preprocessor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "image_mean": [0.4, 0.4, 0.4]}))
    resume_concept(run, {"steps": 4})
    assert f"{scorer} has changed since the run began" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("weights", [None, b"xx"])
def test_a_scorer_that_is_missing_or_damaged_is_named_and_no_folder_is_left(
    dog: Path, tiny_folder: Path, tmp_path: Path, weights: bytes | None
) -> None:
    scorer = tmp_path / "scorer"
    if weights is not None:
        scorer.mkdir()
        (scorer / "config.json").write_text('{"model_type": "clip"}')
        (scorer / "model.safetensors").write_bytes(weights)
    requested = {
        **FEW,
        "images": "dog",
        "model": str(tiny_folder),
        "instance_prompt": SKS,
        "scorer": str(scorer),
    }
    message = (
        "not a whole safetensors file" if weights else "holds no scorer .* Name a folder of a CLIP model"
    )
    with pytest.raises(UserError, match=message):
        start(requested, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
