"""Values from flags and files: words, switches, implied settings, runs' records, unknown keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from backbone.io.console import UserError
from tests.backbone.cli.small_command import parse


def test_words_and_switches_stand_for_other_settings() -> None:
    assert parse("--steps", "auto") == {"patience": 3}
    assert parse("--with-prior") == {"prior": "drawn"}
    assert parse("--gamma", "5") == {"gamma": 5.0, "prior": "drawn"}
    assert parse("--gamma", "5", "--prior", "base")["prior"] == "base"
    with pytest.raises(UserError, match="different things"):
        parse("--with-prior", "--prior", "base")


FILES = {
    "a.yaml": "steps: 5\nlearning-rate: 1e-3\nlayer: [a, b]\nflip: true\n",
    "a.toml": 'steps = 5\nlearning_rate = 1e-3\nlayer = ["a", "b"]\nflip = true\n',
    "a.json": '{"steps": 5, "rate": 0.001, "layer": ["a", "b"], "flip": true}',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_flags_say_and_flags_win(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    expected = {"steps": 5, "rate": 0.001, "layer": ("a", "b"), "flip": True}
    assert parse("--config", str(tmp_path / name)) == expected
    assert parse("--config", str(tmp_path / name), "--steps", "7", "--no-flip") == {
        **expected,
        "steps": 7,
        "flip": False,
    }


def test_the_sections_of_a_trainer_s_toml_say_nothing_and_their_keys_count(tmp_path: Path) -> None:
    file = tmp_path / "k.toml"
    file.write_text("flip = true\n[training_arguments]\nsteps = 5\n[model_arguments]\nlearning_rate = 1e-3\n")
    assert parse("--config", str(file)) == {"steps": 5, "rate": 0.001, "flip": True}
    file.write_text("[a]\nsteps = 5\n[b]\nsteps = 6\n")
    with pytest.raises(UserError, match=r"k\.toml says steps in two sections"):
        parse("--config", str(file))
    file.write_text("[steps]\nflip = true\n")  # a section that is called as an option is
    assert parse("--config", str(file)) == {"flip": True}


# Lists of the same list, which written out would fill the memory.
LAUGHS = "[&a0 [x], " + ", ".join(f"&a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30)) + "]"


@pytest.mark.parametrize(
    ("name", "text", "complaint"),
    [
        ("a.yaml", "stepz: 5", "a.yaml has an unknown key stepz. Did you mean steps"),
        (
            "a.yaml",
            "v2: false\nsteps: 5\nxformers: true",
            r"2 unknown keys \(v2, xformers\), which would have no",
        ),
        ("a.yaml", "lr: 5", r"a.yaml has an unknown key lr\. That is learning_rate here\."),
        (
            "a.yaml",
            "max_steps: 5\nxformers: true",
            r"would have no effect\. max_steps is steps here\. Leave the others out\.",
        ),
        ("a.json", "[1]", "does not hold settings"),
        ("a.toml", "[general]\n[[datasets]]\nresolution = 512\n", "a.toml is a list of images of kohya"),
        ("a.yaml", "job: extension\nconfig: {name: dog}", "a.yaml is a job of ai-toolkit"),
        ("a.yaml", "steps: many", "steps in .*a.yaml is many"),
        ("a.yaml", "images: 5", "images in .*a.yaml is 5, which is no text"),
        ("a.yaml", "images: [a/, b/]", r"images in .*a.yaml is a list \(.*\), and one is taken\. Give one\."),
        ("a.yaml", "images: [a/]", "images in .*a.yaml is a list .*Write it without brackets"),
        ("a.yaml", "flip: 1", "flip in .*a.yaml is 1. Write true or false"),
        ("a.yaml", "layer: [1]", "layer in .*a.yaml is not a list of texts"),
        (
            "a.yaml",
            "rate: 0.5\nlearning_rate: 0.25",
            "rate and learning_rate in .*a.yaml say different things",
        ),
        ("a.yaml", "steps: [", "a.yaml is not YAML"),
        ("a.yaml", "steps: 1:30", "steps in .*a.yaml is 1:30, which is not a whole number"),
        ("a.yaml", "images: https://e.com/dogs", "https://e.com/dogs is an address"),
        ("a.yaml", 'images: "\\ud800"', "a.yaml is not YAML .*is no text"),
        ("a.yaml", f"steps: {LAUGHS}", "steps in .*a.yaml is .*not a whole number"),
        ("a.yaml", 'images: ""', "images in .*a.yaml is empty"),
        ("a.yaml", "steps:", "steps in .*a.yaml is empty. Give a value, or leave it out"),
        ("a.yaml", "- steps", "does not hold settings"),
        ("a.toml", "steps = ", "a.toml is not TOML"),
        ("a.toml", 'images = "C:\\Users\\dog"', r"a.toml is not TOML .*Write \\ in paths twice, or as /"),
        ("a.toml", 'images = "C:\\dog"', r"a.toml is not TOML .*Write \\ in paths twice, or as /"),
        ("a.yaml", 'images: "C:\\Users\\dog"', r"a.yaml is not YAML .*Write \\ in paths twice, or as /"),
        ("a.json", '{"images": "C:\\dog"}', r"a.json is not JSON .*Write \\ in paths twice, or as /"),
        ("a.json", "{", "a.json is not JSON"),
        (
            "a.json",
            '{"steps": 5, "flip": true, "steps": 6}',
            "a.json is not JSON .the key steps stands there twice",
        ),
        ("a.yaml", "steps: 5\nflip: true\nsteps: 6", "a.yaml is not YAML .the key steps stands there twice"),
        ("a.yaml", "images:\n  a: 1\n  a: 2", "a.yaml is not YAML .the key a stands there twice"),
        ("a.toml", "steps = 5\nsteps = 6", "a.toml is not TOML"),
        ("a.txt", "steps: 5", "no .yaml, .toml or .json"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_answered_with_its_name_and_key(
    tmp_path: Path, name: str, text: str, complaint: str
) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=complaint):
        parse("--config", str(tmp_path / name))


def test_a_run_s_own_record_serves_again_without_what_the_flags_make_idle(tmp_path: Path) -> None:
    record = {"settings": {"images": "x", "prior": "drawn", "count": 9}, "command": "train", "versions": {}}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(record))
    assert parse("--config", str(path)) == record["settings"]
    assert parse("--config", str(path), "--prior", "off") == {"images": "x", "prior": "off"}
