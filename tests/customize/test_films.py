"""Clips with their captions, as trainers of films lay them out: folders, lists, and lists of several captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.media.clips import encode_webp
from customize.cli import app
from customize.clips.films import list_films
from customize.clips.train import refuse_stills

COLOURS = {"one": "red", "two": "blue"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two animated files, and a folder of frames."""
    home = tmp_path / "films"
    (home / "three").mkdir(parents=True)
    for name, colour in COLOURS.items():
        frames = [Image.new("RGB", (16, 16), colour), Image.new("RGB", (16, 16), "white")]
        (home / f"{name}.webp").write_bytes(encode_webp(frames, 8.0))
    for number, colour in enumerate(("green", "white")):
        Image.new("RGB", (16, 16), colour).save(home / "three" / f"{number}.png")
    return home


def said(source: Path) -> dict[str, str]:
    return {Path(one.film.name).name: one.caption for one in list_films(str(source))}


def write_lines(path: Path, *lines: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_list_of_films_says_which_are_learned_in_its_order(folder: Path) -> None:
    listed = write_lines(
        folder / "train.jsonl",
        {"video_path": "two.webp", "caption": "a blue  square, [M]"},
        {"video_path": str(folder / "three"), "caption": "a green square"},  # musubi's are whole paths
    )
    assert list(said(listed).items()) == [("two.webp", "a blue square, [M]"), ("three", "a green square")]
    (film, _) = list_films(str(listed))
    assert film.film.size == (16, 16) and len(film.film.frames) == 2
    table = folder / "train.csv"
    table.write_text("video,prompt\none.webp,a red square\n")
    assert said(table) == {"one.webp": "a red square"}


def test_a_folder_s_own_list_captions_its_films_by_either_name(folder: Path) -> None:
    write_lines(folder / "metadata.jsonl", {"video_path": "one.webp", "caption": "a red square"})
    (folder / "two.txt").write_text("a blue square")
    assert said(folder) == {"one.webp": "a red square", "three": "", "two.webp": "a blue square"}


def test_of_several_captions_the_first_is_learned_and_that_is_said(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    captions = {
        "one.webp": ["a red square", "a square that is red"],
        "two.webp": "a blue square",
        "three": [],
    }
    (folder / "captions.json").write_text(json.dumps(captions))
    assert said(folder) == {"one.webp": "a red square", "three": "", "two.webp": "a blue square"}
    out = capsys.readouterr()
    assert "several captions for 1 clip" in out.out + out.err


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("train.jsonl", '{"video_path": "four.webp", "caption": "a dog"}', "four.webp, and there is none"),
        ("train.jsonl", '{"video_path": "/elsewhere/one.webp"}', "outside the folder"),
        ("train.jsonl", '{"video_path": "../films/../one.webp"}', "outside the folder"),
        ("train.jsonl", '{"caption": "a dog"}', "Line 1 of .* names no image"),
        ("train.jsonl", '{"video_path": "one.webp", "caption": 3}', "not text"),
        ("train.jsonl", '{"video_path": "one.webp"}\n{"video_path": "one.webp"}', "second time"),
        ("train.jsonl", "", "names no clips"),
        ("train.toml", "[[datasets]]", "train.toml is a file.*jsonl"),
        ("captions.json", '{"four.webp": "a dog"}', "no such clip"),
        ("metadata.csv", "video,text\nfour.webp,a dog\n", "four.webp, and there is no such clip"),
        ("train.csv", "clip,text\none.webp,a dog\n", r"names no image \(its keys are clip, text\)"),
        ("captions.json", '{"one.webp": 3}', "captions.json"),
        ("captions.json", '["one.webp"]', "captions.json"),
    ],
)
def test_lists_that_cannot_be_read_are_a_sentence(folder: Path, name: str, text: str, complaint: str) -> None:
    (folder / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        list_films(str(folder if name in ("captions.json", "metadata.csv") else folder / name))


def test_the_command_refuses_a_list_and_leaves_nothing(folder: Path) -> None:
    listed = write_lines(folder / "train.jsonl", {"video_path": "gone.webp", "caption": "a dog"})
    out = folder.parent / "run"
    words = ["train-motion", "--clips", str(listed), "--motion", "nowhere", "--out", str(out)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, UserError) and "gone.webp" in str(done.exception)
    assert not out.exists()


def test_a_clip_that_is_there_as_a_file_and_as_its_frames_is_learned_once(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "three").rename(folder / "one")  # as `customize clip` writes them
    (folder / "two.mask.webp").write_bytes((folder / "two.webp").read_bytes())
    for name in ("two.txt", "four.txt", "two.flv"):
        (folder / name).write_text("a blue square")
    assert said(folder) == {"one.webp": "", "two.webp": "a blue square"}
    told = capsys.readouterr().err
    assert f"frames in {folder}/one/ are those of a file" in told
    assert f"Not used in {folder}: four.txt, two.flv, two.mask.webp." in told
    (folder / "two.gif").write_bytes(b"")
    with pytest.raises(UserError, match=r"two\.gif and two\.webp are one clip"):
        list_films(str(folder))


@pytest.mark.parametrize("name", ["one.webp", "four.mp4"])
def test_a_folder_of_clips_inside_of_one_of_clips_is_no_folder_of_frames(folder: Path, name: str) -> None:
    (folder / "more").mkdir()
    (folder / "more" / name).write_bytes((folder / "one.webp").read_bytes())
    with pytest.raises(UserError, match=rf"more holds clips \({name}"):
        list_films(str(folder))


def test_every_clip_that_cannot_be_read_is_named(folder: Path) -> None:
    (folder / "four.webp").write_bytes(b"RIFF")
    (folder / "three" / "1.png").unlink()
    with pytest.raises(UserError, match=r"four\.webp cannot be read.*\n.*three has one frame"):
        list_films(str(folder))


def test_a_clip_in_which_nothing_moves_teaches_no_motion(folder: Path) -> None:
    refuse_stills(list_films(str(folder)))
    for number in range(2):
        Image.new("RGB", (16, 16), "green").save(folder / "three" / f"{number}.png")
    with pytest.raises(UserError, match=r"frames of .*three are equal"):
        refuse_stills(list_films(str(folder)))
