"""Folders of other trainers: kohya's names, and lists of concepts."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from PIL import Image

from backbone.io.console import UserError
from backbone.media.sources.pictures import list_images
from customize.data.folders import (
    ConceptFolder,
    _reads_like_caption,
    as_template,
    describe_layout,
    find_token_and_class,
    guess_token_and_class,
    is_concept_source,
    read_class_images,
    read_concepts,
    read_images,
    read_subjects,
)
from customize.settings import Subject
from customize.training.start import resolve_subjects


def pictures_in(folder: Path) -> Path:
    folder.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "1.png")
    return folder


def test_kohyas_folders_say_repeats_token_and_class(tmp_path: Path) -> None:
    dog = pictures_in(tmp_path / "10_sks dog")
    cat = pictures_in(tmp_path / "3_qrs tabby cat")
    pictures_in(tmp_path / "leftovers")
    (tmp_path / "5_empty one").mkdir()
    assert read_concepts(tmp_path) == [
        ConceptFolder(dog, 10, "sks", "dog"),
        ConceptFolder(cat, 3, "qrs", "tabby cat"),
    ]


@pytest.mark.parametrize(("subject", "class_folder"), [("sks dog", "dog"), ("ohwx old man", "old man")])
def test_a_folder_of_class_images_beside_the_subject_s_is_none(
    subject: str, class_folder: str, tmp_path: Path
) -> None:
    dog, other = pictures_in(tmp_path / f"10_{subject}"), pictures_in(tmp_path / f"1_{class_folder}")
    with pytest.raises(UserError, match="as a folder of class images is") as refused:
        read_subjects(tmp_path)
    assert f"--images '{dog}' --class-images {shlex.quote(str(other))}" in str(refused.value)


def test_a_mark_behind_the_token_and_what_nobody_sees_are_no_part_of_it(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "10_sks, dog")
    assert read_concepts(folder) == [ConceptFolder(folder, 10, "sks", "dog")]
    assert Subject("dog", "\u200bsks\ufeff", "dog").token == "sks"


def test_one_numbered_folder_is_a_concept_itself(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "7_sks_dog")
    assert read_concepts(folder) == [ConceptFolder(folder, 7, "sks", "dog")]


def test_a_name_of_one_word_has_no_class(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "7_sks")
    assert read_concepts(folder) == [ConceptFolder(folder, 7, "sks", "")]


def test_a_plain_folder_is_not_taken_for_one_of_these(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "dog")
    assert not is_concept_source(folder)
    assert is_concept_source(pictures_in(tmp_path / "x" / "2_sks dog").parent)
    with pytest.raises(UserError, match="10_sks dog"):
        read_concepts(folder)
    for name in ("10__", "10_ "):  # which say no word
        assert not is_concept_source(pictures_in(tmp_path / "y" / name).parent)


def test_a_list_of_concepts_is_read(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "data" / "dog")
    entry = {
        "instance_prompt": "photo of zwx dog",
        "class_prompt": "photo of a dog",
        "instance_data_dir": "data/dog",
        "class_data_dir": "data/class",
    }
    (tmp_path / "concepts_list.json").write_text(json.dumps([entry]))
    expected = ConceptFolder(
        folder, 1, "zwx", "dog", "photo of {token} {class}", "photo of a {class}", tmp_path / "data" / "class"
    )
    assert read_concepts(tmp_path / "concepts_list.json") == [expected]
    assert read_concepts(tmp_path) == [expected]


@pytest.mark.parametrize(
    ("instance", "general", "token", "noun"),
    [
        ("a photo of sks dog", "a photo of dog", "sks", "dog"),
        ("a photo of a sks toy robot, on a table", "a photo of a toy robot", "sks", "toy robot"),
        ("ohwx man portrait", "man", "ohwx", "man"),
        ("photo of zwx", "photo of a dog", "zwx", ""),
        ("portrait of zwx dog in a park", "portrait of a dog in a park", "zwx", "dog"),
        ("a zwx painting", "a painting", "zwx", "painting"),
        ("a dog", "a dog", "", ""),
        ("a sks dog", "", "", ""),
    ],
)
def test_token_and_class_are_told_from_two_prompts(
    instance: str, general: str, token: str, noun: str
) -> None:
    assert find_token_and_class(instance, general) == (token, noun)


@pytest.mark.parametrize(
    ("prompt", "noun", "token", "found", "template"),
    [
        ("a photo of sks dog", "dog", "sks", "dog", "a photo of {token} {class}"),
        ("a photo of sks dog", "", "sks", "dog", "a photo of {token} {class}"),
        ("a sks toy robot, on a table", "", "sks", "toy robot", "a {token} {class}, on a table"),
        ("a 4k photo of ohwx man in a city", "", "ohwx", "man", "a 4k photo of {token} {class} in a city"),
        ("photo of TOK, a dog", "dog", "TOK", "dog", "photo of {token}, a {class}"),
        ("a photo of <cat-toy> in a bucket", "", "<cat-toy>", "", "a photo of {token} in a bucket"),
        ("a desk and sks dog", "dog", "sks", "dog", "a desk and {token} {class}"),
        ("a photo of Rex dog", "dog", "Rex", "dog", "a photo of {token} {class}"),
        ("a photo of a dog", "dog", "", "dog", "a photo of a dog"),
        ("a photo of a fluffy dog", "", "", "", "a photo of a fluffy dog"),
    ],
)
def test_an_instance_prompt_alone_shows_its_token_or_leaves_it_open(
    prompt: str, noun: str, token: str, found: str, template: str
) -> None:
    assert guess_token_and_class(prompt, noun) == (token, found)
    assert as_template(prompt, token, found) == template


def test_a_folder_s_repeats_may_be_a_fraction(tmp_path: Path) -> None:
    dog, cat = pictures_in(tmp_path / "1.5_sks dog"), pictures_in(tmp_path / "0.25_mnp cat")
    assert [(one.folder, one.token_words, one.class_noun) for one in read_concepts(tmp_path)] == [
        (cat, "mnp", "cat"),
        (dog, "sks", "dog"),
    ]
    pictures_in(tmp_path / "0.0_xyz fox")
    with pytest.raises(UserError, match="0 times"):
        read_concepts(tmp_path)


def test_a_plain_folder_may_have_a_number_in_its_name_and_what_is_said_wins_over_it(tmp_path: Path) -> None:
    front, dog = pictures_in(tmp_path / "01_front"), pictures_in(tmp_path / "10_sks dog")
    assert not is_concept_source(front, token="[V]", class_noun="dog")
    assert not is_concept_source(front, token="[V]") and not is_concept_source(front, class_noun="dog")
    assert not is_concept_source(dog, token="[V]", class_noun="cat")
    assert is_concept_source(dog, token="[V]") and is_concept_source(dog, class_noun="cat")
    assert read_subjects(dog, token="[V]")[0] == [Subject(str(dog), "[V]", "dog")]
    assert read_subjects(dog, class_noun="cat")[0] == [Subject(str(dog), "sks", "cat", "sks")]
    with pytest.raises(UserError, match="2 subjects and says what they are called, so --token has no effect"):
        read_subjects(tmp_path, token="[V]")


def test_what_lies_beside_numbered_folders_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures_in(tmp_path / "10_sks dog")
    pictures_in(tmp_path / "leftovers")
    Image.new("RGB", (8, 8)).save(tmp_path / "loose.png")
    read_subjects(tmp_path)
    said = f"Not used in {tmp_path}: 1 image beside the numbered folders, leftovers/.\n"
    assert capsys.readouterr().err == said


def test_what_else_an_entry_of_a_list_says_is_said_to_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    entry = {
        "instance_data_dir": str(pictures_in(tmp_path / "dog")),
        "instance_prompt": "a zwx dog",
        "max_steps": 9,
    }
    path = tmp_path / "concepts_list.json"
    path.write_text(
        json.dumps([entry | {"class_prompt": "a dog", "class_data_dir": "", "class_token": None}])
    )
    assert read_subjects(path)[0][0].class_noun == "dog"
    assert f"Entry 1 of {path} says max_steps, which has no effect." in capsys.readouterr().err


def test_a_list_s_class_prompt_is_used(tmp_path: Path) -> None:
    for name in ("dog", "cat"):
        pictures_in(tmp_path / name)
    entries = [
        {
            "instance_prompt": f"photo of {token} {name}",
            "class_prompt": f"photo of a {name}",
            "instance_data_dir": name,
        }
        for token, name in (("zwx", "dog"), ("sks", "cat"))
    ]
    (tmp_path / "concepts_list.json").write_text(json.dumps(entries))
    _, asked = read_subjects(tmp_path)
    assert asked == {"instance_prompt": "photo of {token} {class}", "class_prompt": "photo of a {class}"}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("{}", "not a list"),
        ("[1]", "Entry 1"),
        ('[{"instance_prompt": "x"}]', "instance_data_dir"),
        ('[{"instance_prompt": "x", "instance_data_dir": "nowhere"}]', "nowhere"),
        ('[{"instance_prompt": 3, "instance_data_dir": "."}]', "not text"),
    ],
)
def test_a_bad_list_is_answered_by_a_sentence(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "concepts_list.json").write_text(content)
    with pytest.raises(UserError, match=complaint):
        read_concepts(tmp_path / "concepts_list.json")


def test_a_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_concepts(tmp_path / "nowhere")


def test_numbered_folders_become_subjects_of_one_run(tmp_path: Path) -> None:
    dog, cat = pictures_in(tmp_path / "10_sks dog"), pictures_in(tmp_path / "5_ohwx grey cat")
    subjects, prompts = read_subjects(tmp_path)
    assert subjects == [Subject(str(dog), "sks", "dog", "sks"), Subject(str(cat), "ohwx", "grey cat", "ohwx")]
    assert prompts == {}


def test_a_list_s_class_prompt_and_class_images_are_used_or_a_line_says_that_they_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures_in(tmp_path / "dog")
    entry = {
        "instance_prompt": "photo of zwx dog",
        "class_prompt": "photo of a dog",
        "instance_data_dir": "dog",
        "class_data_dir": "class",
    }
    source = tmp_path / "concepts_list.json"
    source.write_text(json.dumps([entry]))
    _, asked = resolve_subjects({"images": str(source), "prior": "class-images"})
    assert asked["class_prompt"] == "photo of a {class}" and asked["class_images"] == (
        str(tmp_path / "class"),
    )
    assert "is not used" not in capsys.readouterr().err
    _, asked = resolve_subjects({"images": str(source)})
    assert asked["class_prompt"] == "photo of a {class}" and "class_images" not in asked
    assert "class_data_dir" in capsys.readouterr().err
    _, asked = resolve_subjects({"images": str(source), "prior": "off"})
    assert "class_prompt" not in asked
    assert re.search("class_prompt .* is not used", capsys.readouterr().err)
    cat = {**entry, "instance_prompt": "photo of ohwx cat", "class_prompt": "some photo of a cat"}
    source.write_text(json.dumps([entry, cat]))
    subjects, asked = resolve_subjects({"images": str(source)})
    assert [one.class_noun for one in subjects] == ["dog", "cat"] and "class_prompt" not in asked
    assert "class prompts" in capsys.readouterr().err


def test_a_subject_without_a_class_is_refused(tmp_path: Path) -> None:
    folder = pictures_in(tmp_path / "10_sks")
    with pytest.raises(UserError, match=re.escape(f"{folder} does not say its token and its class")):
        read_subjects(tmp_path)


def test_a_list_of_concepts_may_have_any_name_and_other_json_is_told_to_be_none(tmp_path: Path) -> None:
    (tmp_path / "dog").mkdir()
    entry = {
        "instance_data_dir": "dog",
        "instance_prompt": "photo of zwx dog",
        "class_prompt": "photo of dog",
    }
    source = tmp_path / "my concepts.json"
    source.write_text(json.dumps([entry]))
    assert is_concept_source(source) and read_concepts(source)[0].token_words == "zwx"
    for other in ([{"path": "dog", "name": ""}], {"a": 1}, []):  # OneTrainer's
        source.write_text(json.dumps(other))
        with pytest.raises(UserError, match=r"is not a list of concepts.*or give the folder"):
            read_subjects(source)


def test_two_folders_of_one_token_are_told_to_be_one_subject(tmp_path: Path) -> None:
    for name in ("10_sks dog", "5_sks dog"):
        pictures_in(tmp_path / name)
    with pytest.raises(UserError, match=r"have one token, sks\. If they show one subject, put"):
        read_subjects(tmp_path)


def test_images_that_two_subjects_share_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dogs = pictures_in(tmp_path / "dogs")
    (tmp_path / "cats").mkdir()
    copied = sorted(dogs.glob("*.png"))[0]
    (tmp_path / "cats" / "cat.png").write_bytes(copied.read_bytes())
    named = [Subject(str(dogs), "[V]", "dog"), Subject(str(tmp_path / "cats"), "[W]", "cat")]
    read_images(named)
    assert f"1 image of [V] is of [W] too (first: {tmp_path}/cats/cat.png)" in capsys.readouterr().err
    read_images(named[:1])
    assert not capsys.readouterr().err


def test_one_image_that_is_named_itself_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = sorted(pictures_in(tmp_path / "dog").parent.glob("dog/*.png"))[0]
    for named in (picture, f"{picture.parent}/../dog/{picture.name}"):
        ((image,),) = read_images([Subject(str(named), "[V]", "dog")])
        assert image.path.name == picture.name and "learned as one subject" not in capsys.readouterr().err


def test_folders_that_are_joined_to_one_subject_and_names_that_are_captions_are_said(tmp_path: Path) -> None:
    dogs = pictures_in(tmp_path / "all" / "dog").parent
    assert describe_layout(str(dogs), list_images(dogs)) == []
    pictures_in(dogs / "cat")
    (said,) = describe_layout(str(dogs), list_images(dogs))
    assert "The images of 2 folders" in said and "(cat/, dog/) are learned as one subject" in said
    listed = dogs / "metadata.jsonl"  # who lists them means them
    listed.write_text("".join(json.dumps({"file_name": f"{one}/1.png"}) + "\n" for one in ("cat", "dog")))
    assert describe_layout(str(dogs), list_images(dogs)) == []

    called = tmp_path / "called"
    called.mkdir()
    picture = sorted((dogs / "dog").glob("*.png"))[0].read_bytes()
    names = ("a [V] dog in the snow", "photo_of_a_dog_1_")
    for name in names:
        (called / f"{name}.png").write_bytes(picture)
    (said,) = describe_layout(str(called), list_images(called))
    assert "Images are called as captions are (“a [V] dog in the snow”), and names are not read" in said
    (called / f"{names[0]}.txt").write_text("a dog")
    assert describe_layout(str(called), list_images(called)) == []
    for name in ("IMG_2031", "WhatsApp Image 2024-01-02 at 10.22.31", "Photo on 12-1-20 at 3.04 PM", "dog-1"):
        assert not _reads_like_caption(name, "[V]")


def test_rows_of_several_classes_that_are_joined_to_one_subject_are_said(tmp_path: Path) -> None:
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    stored = {"bytes": (pictures_in(tmp_path / "x") / "1.png").read_bytes(), "path": None}
    kinds = Features({"image": ImageFeature(), "label": ClassLabel(names=["dog", "cat"])})
    for name, labels in (("one", [0, 0]), ("two", [0, 1])):
        table = tmp_path / f"{name}.parquet"
        Dataset.from_dict({"image": [stored] * 2, "label": labels}, features=kinds).to_parquet(table)
        said = describe_layout(str(table), list_images(table))
        assert bool(said) is (name == "two")
    assert "of 2 classes in their column label (dog, cat), and are learned as one subject" in said[0]


def test_class_images_are_none_of_the_subject_s_and_what_is_not_used_of_them_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own, dogs = pictures_in(tmp_path / "own"), pictures_in(tmp_path / "1_dog")
    pictures = [list_images(own)]
    (dogs / "1.txt").write_text("a brown dog")
    (dogs / "notes.md").write_text("")
    read_class_images([str(dogs)], pictures)
    said = capsys.readouterr().err
    assert "1 caption not used (first: " in said and "notes.md" in said
    with pytest.raises(UserError, match="is an image of the subject and a class image too"):
        read_class_images([str(own / ".." / "own")], pictures)


def test_an_image_that_lies_there_twice_is_said_to_count_twice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, colour in {"a": "red", "b": "blue"}.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
    subject = Subject(str(tmp_path), "[V]", "dog")
    read_images([subject])
    assert "same image" not in capsys.readouterr().err
    shutil.copy(tmp_path / "a.png", tmp_path / "c.png")
    assert len(read_images([subject])[0]) == 3
    message = " ".join(capsys.readouterr().err.split())
    assert (
        f"{tmp_path}/a.png and {tmp_path}/c.png are the same image: it counts 2 times. Keep one." in message
    )
