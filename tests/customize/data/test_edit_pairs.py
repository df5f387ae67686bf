"""Pairs before and after an edit are found however they are laid out, and looked at before anybody trains on them."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from backbone.io.console import UserError
from backbone.media.transforms import to_image
from customize.cli import app
from customize.data.control_pairs import read_control_pairs
from customize.data.edit_pairs import check_edit_pairs, plain_name, read_edit_pairs, select_usable_pairs
from tests.backbone.media.test_registration import moved, picture

Lay = Callable[[Path], None]
TOLD = ["make it snow", "paint it red"]


def write(path: Path, seed: int, *, edited: bool = False) -> None:
    """An image, or what an edit made of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = picture(seed)
    if edited:
        image[:, 20:50, 30:70] = 0.9
    to_image(image).save(path)


def two_folders(before: str, after: str) -> Lay:
    def lay(folder: Path) -> None:
        for number, told in enumerate(TOLD):
            write(folder / before / f"{number}.png", number)
            write(folder / after / f"{number}.png", number, edited=True)
            (folder / after / f"{number}.txt").write_text(told)

    return lay


def a_list(name: str, before: str, after: str, words: str) -> Lay:
    def lay(folder: Path) -> None:
        lines = []
        for number, told in enumerate(TOLD):
            write(folder / "a" / f"{number}.png", number)
            write(folder / "b" / f"{number}.png", number, edited=True)
            lines.append(json.dumps({before: f"a/{number}.png", after: f"b/{number}.png", words: told}))
        (folder / name).write_text("\n".join(lines) + "\n\n")

    return lay


LAYOUTS = {
    "our own": a_list("metadata.jsonl", "source", "target", "instruction"),
    "original ControlNet": a_list("prompt.json", "source", "target", "prompt"),
    "InstructPix2Pix": a_list("metadata.jsonl", "original_image", "edited_image", "edit_prompt"),
    "DiffSynth": a_list("metadata.jsonl", "edit_image", "image", "prompt"),
    "musubi": a_list("dataset.jsonl", "control_path", "image_path", "caption"),
    "diffusers": a_list("metadata.jsonl", "conditioning_image", "file_name", "text"),
    "another editor's": a_list("metadata.jsonl", "source_img", "target_img", "instruction"),
    "folders": two_folders("source", "target"),
    "in the plural": two_folders("conditioning_images", "outputs"),
    "kohya's clones": two_folders("input1", "target"),
    "ai-toolkit": two_folders("control", "images"),
    "words": two_folders("Before", "After"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pairs_are_found_in_every_layout(layout: str, tmp_path: Path) -> None:
    LAYOUTS[layout](tmp_path)
    pairs = read_edit_pairs(tmp_path)
    assert [pair.instruction for pair in pairs] == TOLD
    for number, pair in enumerate(pairs):
        assert pair.source.path.stem == pair.target.path.stem == str(number)
        assert pair.source.path.parent != pair.target.path.parent
        assert pair.target.open().getpixel((50, 35)) == (242, 242, 242)  # the edit is in the target


def test_references_come_from_columns_and_folders(tmp_path: Path) -> None:
    for name in ("s", "t", "r1", "r2"):
        write(tmp_path / f"{name}.png", 0, edited=name == "t")
    line = {"source": "s.png", "target": "t.png", "instruction": "x", "references": ["r1.png", "r2.png"]}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (pair,) = read_edit_pairs(tmp_path)
    assert [one.path.name for one in pair.references] == ["r1.png", "r2.png"]
    line = {"control_path": ["s.png", "r1.png"], "image": "t.png", "caption": "x"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (pair,) = read_edit_pairs(tmp_path)
    assert pair.source.path.name == "s.png" and [one.path.name for one in pair.references] == ["r1.png"]


def test_numbered_columns_count_in_their_order_whatever_that_of_the_line(tmp_path: Path) -> None:
    numbers = (10, 1, 0, 2)
    for name in ("t.png", *(f"{number}.png" for number in numbers)):
        write(tmp_path / name, 0)
    line = {"image_path": "t.png", "caption": "x"} | {
        f"control_path_{number}": f"{number}.png" for number in numbers
    }
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    (pair,) = read_edit_pairs(tmp_path)
    assert pair.source.path.name == "0.png"
    assert [one.path.name for one in pair.references] == ["1.png", "2.png", "10.png"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line | {"reference": "t.png"}))
    (pair,) = read_edit_pairs(tmp_path)
    assert [one.path.name for one in pair.references] == ["t.png", "1.png", "2.png", "10.png"]


def test_a_list_s_names_are_found_however_they_are_spelled(tmp_path: Path) -> None:
    for name in ("e\u0301.png", "B.PNG"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    row = {"source": "\u00e9.png", "target": "b.png", "instruction": "make it snow"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(row))
    (pair,) = read_edit_pairs(tmp_path)
    assert (pair.source.path.name, pair.target.path.name) == ("e\u0301.png", "B.PNG")


@pytest.mark.parametrize("name", ["metadata.json", "dataset.json", "prompt.json"])
def test_a_list_of_pairs_may_be_one_json_list(tmp_path: Path, name: str) -> None:
    rows = [
        {"source": f"{side}-0.png", "target": f"{side}-1.png", "prompt": f"make it {side}"} for side in "ab"
    ]
    for row in rows:
        for file in (row["source"], row["target"]):
            Image.new("RGB", (8, 8), "red").save(tmp_path / file)
    (tmp_path / name).write_text(json.dumps(rows, indent=1))
    found = read_edit_pairs(tmp_path)
    assert [(pair.source.path.name, pair.instruction) for pair in found] == [
        ("a-0.png", "make it a"),
        ("b-0.png", "make it b"),
    ]
    maps = read_control_pairs(str(tmp_path), "sketch") if name != "dataset.json" else []
    assert [(pair.image.path.name, pair.caption) for pair in maps] == [
        ("a-1.png", "make it a"),
        ("b-1.png", "make it b"),
    ][: len(maps)]


def test_the_words_of_a_list_may_lie_beside_its_images(tmp_path: Path) -> None:
    LAYOUTS["our own"](tmp_path)
    lines = (tmp_path / "metadata.jsonl").read_text().splitlines()
    bare = [
        json.dumps({k: v for k, v in json.loads(line).items() if k != "instruction"})
        for line in lines
        if line
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(bare))
    for number, told in enumerate(TOLD):
        (tmp_path / "b" / f"{number}.txt").write_text(told)
    assert [pair.instruction for pair in read_edit_pairs(tmp_path)] == TOLD
    shutil.copy(tmp_path / "metadata.jsonl", tmp_path / "train.jsonl")
    with pytest.raises(UserError, match=r"both metadata\.jsonl and train\.jsonl"):
        read_edit_pairs(tmp_path)


def test_pairs_of_subfolders_are_paired_by_their_whole_name(tmp_path: Path) -> None:
    for number, told in enumerate(TOLD):
        write(tmp_path / "source" / "ab"[number] / "e\u0301.png", number)
        write(tmp_path / "target" / "ab"[number] / "\u00e9.png", number, edited=True)
        (tmp_path / "target" / "ab"[number] / "\u00e9.txt").write_text(told)
    pairs = read_edit_pairs(tmp_path)
    assert [pair.instruction for pair in pairs] == TOLD
    assert [pair.source.path.parent.name for pair in pairs] == ["a", "b"]
    write(tmp_path / "target" / "b" / "\u00e9.jpg", 0)
    with pytest.raises(UserError, match="have one name"):
        read_edit_pairs(tmp_path)


def test_masks_beside_pairs_are_said_to_have_no_effect(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_folders("source", "target")(tmp_path)
    write(tmp_path / "target" / "0.mask.png", 0)
    (tmp_path / "notes.jsonl").write_text("{}")
    assert len(read_edit_pairs(tmp_path)) == 2
    said = capsys.readouterr().err
    assert "1 mask not used" in said and f"Not used in {tmp_path}: notes.jsonl." in said


def test_a_run_of_edit_is_pairs_as_it_lies(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "edit-cat"
    write(run / "source.png", 0)
    write(run / "edit_0.png", 0, edited=True)
    edits = [{"file": "edit_0.png", "prompt": "a dog"}]
    (run / "run.json").write_text(
        json.dumps({"command": "invert-and-replace", "settings": {"source": "a cat"}, "edits": edits})
    )
    (pair,) = read_edit_pairs(run)
    assert pair.instruction == "turn a cat into a dog"
    write(run / "edit_1.png", 1, edited=True)
    edits.append({"file": "edit_1.png", "prompt": "make it snow"})
    (run / "run.json").write_text(json.dumps({"command": "instruct", "settings": {}, "edits": edits}))
    found = read_edit_pairs(tmp_path / "runs")
    assert [(one.source.path.name, one.instruction) for one in found] == [
        ("source.png", "a dog"),
        ("edit_0.png", "make it snow"),
    ]


def test_columns_of_files_are_called_as_datasets_calls_them_and_others_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    LAYOUTS["our own"](tmp_path)
    listed = tmp_path / "metadata.jsonl"
    wanted = read_edit_pairs(tmp_path)
    for old, new in (("source", "original_image_file_name"), ("target", "edited_image_file_name")):
        listed.write_text(listed.read_text().replace(f'"{old}"', f'"{new}"'))
    assert read_edit_pairs(tmp_path) == wanted
    listed.write_text(listed.read_text().replace('"instruction"', '"words"'))
    assert {pair.instruction for pair in read_edit_pairs(tmp_path)} == {""}
    assert "It has words: call one of them instruction" in capsys.readouterr().err
    listed.write_text(listed.read_text().replace('"original_image', '"old'))
    with pytest.raises(UserError, match=r"no source image \(its keys are old_file_name, edited"):
        read_edit_pairs(tmp_path)


def test_a_name_is_read_without_case_separators_numbers_and_plural() -> None:
    assert plain_name("Conditioning_Images") == plain_name("conditioning_image_2")
    assert plain_name("Control_Path_2") == plain_name("controlPath") == "controlpath"
    assert plain_name("control_image_file_name") == "controlimage" and plain_name("file_name") == "filename"


def changed(tmp_path: Path, change: Callable[[Path], object]) -> tuple[list[str], list[str]]:
    """What is found in pairs that were good before the change."""
    two_folders("source", "target")(tmp_path)
    change(tmp_path)
    return check_edit_pairs(read_edit_pairs(tmp_path))


def test_good_pairs_are_good(tmp_path: Path) -> None:
    assert changed(tmp_path, lambda folder: None) == ([], [])


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: Image.open(f / "target/0.png").resize((60, 80)).save(f / "target/0.png"), "other shapes"),
        (lambda f: (f / "target/0.png").write_bytes((f / "source/0.png").read_bytes()), "shows no edit"),
        (lambda f: (f / "target/0.png").write_bytes(b"\x89PNG"), "0.png"),
    ],
)
def test_what_cannot_be_used_is_named(
    change: Callable[[Path], object], complaint: str, tmp_path: Path
) -> None:
    wrong, _ = changed(tmp_path, change)
    assert len(wrong) == 1 and complaint in wrong[0] and "0.png" in wrong[0]


def shift(folder: Path, by: float = 3.0) -> None:
    drifted = picture(0)
    drifted[:, 20:50, 30:70] = 0.9
    to_image(moved(drifted, (by, 0.0, 1.0))).save(folder / "target/0.png")


def test_a_third_of_a_small_picture_s_pixel_is_no_drift_and_one_pixel_is(tmp_path: Path) -> None:
    assert changed(tmp_path / "softer", lambda folder: shift(folder, 0.3)) == ([], [])
    wrong, drifted = changed(tmp_path / "drifted", lambda folder: shift(folder, 1.0))
    assert any("px to the right" in sentence for sentence in (*wrong, *drifted))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (shift, "+3.0 px to the right"),
        (lambda f: (f / "target/0.txt").unlink(), "1 of 2 pairs say nothing"),
        (lambda f: (f / "target/0.txt").write_text(TOLD[1]), "All pairs have the instruction"),
        (
            lambda f: [(f / f"target/{k}.txt").write_text(f"a photo of a dog {k}") for k in (0, 1)],
            "describes an image",
        ),
        (
            lambda f: [(f / f"target/{k}.txt").rename(f / f"source/{k}.txt") for k in (0, 1)],
            "Swap the two folders",
        ),
    ],
)
def test_what_training_refuses_has_to_be_mended(
    change: Callable[[Path], object], complaint: str, tmp_path: Path
) -> None:
    wrong, doubtful = changed(tmp_path, change)
    assert any(complaint in sentence for sentence in wrong) and not doubtful
    with pytest.raises(UserError) as refused:
        select_usable_pairs(read_edit_pairs(tmp_path))
    assert complaint in str(refused.value)


def again(folder: Path) -> None:
    """Pair 0 once more, smaller and compressed, and what was asked for in other letters."""
    for side in ("source", "target"):
        image = Image.open(folder / side / "0.png").convert("RGB")
        buffer = io.BytesIO()
        image.resize((image.width * 3 // 4, image.height * 3 // 4)).save(buffer, "JPEG", quality=80)
        (folder / side / "1.png").write_bytes(buffer.getvalue())
    asked = [(folder / f"target/{k}.txt").read_text() for k in (0, 1)]
    (folder / "target/1.txt").write_text(asked[0].capitalize())


def test_the_same_image_edited_in_two_ways_is_two_pairs(tmp_path: Path) -> None:
    def change(folder: Path) -> None:
        again(folder)
        (folder / "target/1.txt").write_text("put it in a box")

    wrong, doubtful = changed(tmp_path, change)
    assert not wrong and not doubtful


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda f: to_image(-picture(8)).save(f / "target/0.png"), "perhaps they are no pair"),
        (
            lambda f: Image.open(f / "target/0.png").resize((192, 160)).save(f / "target/0.png"),
            "scaled down",
        ),
        (again, "are almost the same pair"),
    ],
)
def test_what_may_be_a_mistake_is_said(
    change: Callable[[Path], object], complaint: str, tmp_path: Path
) -> None:
    wrong, doubtful = changed(tmp_path, change)
    assert not wrong and any(complaint in sentence for sentence in doubtful), doubtful


@pytest.mark.parametrize(
    ("lay", "complaint"),
    [
        (lambda f: (f / "photos").mkdir(), "no two folders"),
        (lambda f: [two_folders("source", "target")(f), (f / "target/0.png").unlink()], "first: 0"),
        (lambda f: (f / "metadata.jsonl").write_text('{"source": "a.png"}'), "names no target"),
        (
            lambda f: (f / "metadata.jsonl").write_text('{"source": "a.png", "target": "b.png"}'),
            "no such file",
        ),
        (
            lambda f: (f / "metadata.jsonl").write_text('{"source": "../a.png", "target": "b.png"}'),
            "../a.png",
        ),
        (lambda f: (f / "metadata.jsonl").write_text("[1]"), "not a JSON object"),
        (
            lambda f: (f / "metadata.jsonl").write_text(
                '{"source": "a.png", "target": "b.png", "reference": 5}'
            ),
            "references is 5, and a list is wanted",
        ),
        (lambda f: (f / "metadata.jsonl").write_text("{"), "Line 1"),
    ],
)
def test_folders_that_hold_no_pairs_are_refused(
    lay: Callable[[Path], object], complaint: str, tmp_path: Path
) -> None:
    lay(tmp_path)
    with pytest.raises(UserError) as caught:
        read_edit_pairs(tmp_path)
    assert complaint in str(caught.value)


def test_the_command_checks_pairs(tmp_path: Path) -> None:
    two_folders("source", "target")(tmp_path)
    said = CliRunner().invoke(app, ["check", "--pairs", str(tmp_path), "--json"])
    assert said.exit_code == 0 and json.loads(said.stdout) == {"pairs": 2, "warnings": []}
    for words in (["check"], ["check", "--pairs", str(tmp_path), "--images", str(tmp_path)]):
        assert "Name what to look at" in str(CliRunner().invoke(app, words).exception)
