"""Settings said once: the command line, files, contradictions, the repeating command. And what `train` understands."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import pytest
import typer
import typer.main
from typer.testing import CliRunner

import align.cli
import align.settings
import customize.cli
import customize.settings
import customize.training.start
import edit.cli
from backbone.cli.command_line import command, settled_command
from backbone.cli.options import Option, fields_of
from backbone.cli.sampling import SAMPLERS_ELSEWHERE, SamplingSettings, name_sampler
from backbone.cli.values.build import build
from backbone.cli.values.convert import convert_value
from backbone.cli.values.effects import refuse_idle
from backbone.cli.values.repeat import as_command
from backbone.io.console import UserError
from backbone.io.files import write_json
from backbone.media.parameters import SAMPLERS
from backbone.training.settings import PANELS, RunOptions
from customize.control_settings import ControlSettings
from edit.settings import PaintOptions

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "spellings.md"
TRAINS = {"customize": customize.cli.app, "align": align.cli.app}


@dataclass(frozen=True, kw_only=True)
class Parent:
    """A little of everything."""

    images: Annotated[
        str, Option("Where they are.", "Data", aliases=("instance-data-dir",), metavar="FOLDER")
    ]
    steps: Annotated[
        int, Option("How many.", "Training", min=1, words={"auto": {"patience": 3}}, by_model=True)
    ] = 10
    rate: Annotated[float, Option("How fast.", "Training", flag="learning-rate", max=1)] = 0.1
    patience: Annotated[int, Option("How long.", "Training", min=0)] = 0


@dataclass(frozen=True, kw_only=True)
class Settings(Parent):
    """With another default, for which nothing is said again."""

    steps: int = 20
    source: Annotated[str, Option("What from.", "Data", argument=True, metavar="SOURCE")] = ""
    prior: Annotated[
        str, Option("Which.", "Loss", choices=("base", "drawn", "off"), switches={"with-prior": "drawn"})
    ] = "base"
    count: Annotated[int, Option("Of drawn.", "Loss", needs={"prior": ("drawn",)})] = 4
    gamma: Annotated[float, Option("γ.", "Loss", implies={"prior": "drawn"})] = 0.0
    flip: Annotated[bool, Option("Mirrored.", "Data", by_model=True)] = False
    fast: Annotated[bool, Option("Quick.", "Data")] = False
    layer: Annotated[tuple[str, ...], Option("Repeatable.", "Data")] = ()


class Asked(list[dict[str, Any]]):
    """What the command was asked, call after call."""

    def __call__(self, *words: str) -> dict[str, Any]:
        app = typer.Typer()

        @app.callback()
        def group() -> None:
            """Several commands."""

        @command(app, Settings)
        def train(asked: dict[str, Any]) -> None:
            """Train."""
            self.append(asked)

        done = CliRunner().invoke(app, ["train", *words])
        if done.exception is not None:
            raise done.exception
        return self[-1]


ask = Asked()


def test_only_what_was_said_is_asked() -> None:
    assert ask() == {}
    said = ask("from", "--steps", "5", "--learning-rate", "0.5", "--layer", "a", "--layer", "b", "--no-flip")
    expected = {"source": "from", "steps": 5, "rate": 0.5, "layer": ("a", "b"), "flip": False}
    assert said == expected


def test_hyphens_underscores_and_other_spellings_are_the_same() -> None:
    for flag in ("--images", "--instance-data-dir", "--instance_data_dir"):
        assert ask(flag, "x") == {"images": "x"}
    assert ask("--learning_rate", "1") == ask("--learning-rate", "1")


def test_a_plain_yes_can_be_taken_back() -> None:
    assert ask("--fast") == {"fast": True}
    assert ask("--no-fast") == {"fast": False}
    with pytest.raises(UserError, match="--fast and --no-fast"):
        ask("--fast", "--no-fast")


def test_words_and_switches_stand_for_other_settings() -> None:
    assert ask("--steps", "auto") == {"patience": 3}
    assert ask("--with-prior") == {"prior": "drawn"}
    assert ask("--gamma", "5") == {"gamma": 5.0, "prior": "drawn"}
    assert ask("--gamma", "5", "--prior", "base")["prior"] == "base"
    with pytest.raises(UserError, match="different things"):
        ask("--with-prior", "--prior", "base")


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("--steps", "many"), "--steps is many, which is not a whole number or auto"),
        (("--steps", "2.5"), "--steps is 2.5"),
        (("--steps", "0"), "at least 1"),
        (("--learning-rate", "2"), "at most 1"),
        (("--learning-rate", "nan"), "not a number"),
        (("--prior", "bas"), "Did you mean base"),
    ],
    ids=str,
)
def test_a_value_that_does_not_fit_is_answered_with_its_flag(words: tuple[str, ...], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        ask(*words)


def test_a_seed_that_means_any_elsewhere_is_said_to_be_one(capsys: pytest.CaptureFixture[str]) -> None:
    seed = fields_of(SamplingSettings)["seed"]
    assert convert_value(seed, "-1", "--seed") == -1
    assert "--seed is -1, which is a seed like any other here" in capsys.readouterr().err
    assert convert_value(seed, "-2", "--seed") == -2 and capsys.readouterr().err == ""


def test_choices_may_be_written_in_any_case() -> None:
    assert ask("--prior", "Drawn") == {"prior": "drawn"}


# Files ------------------------------------------------------------------------------------------------------


FILES = {
    "a.yaml": "steps: 5\nlearning-rate: 1e-3\nlayer: [a, b]\nflip: true\n",
    "a.toml": 'steps = 5\nlearning_rate = 1e-3\nlayer = ["a", "b"]\nflip = true\n',
    "a.json": '{"steps": 5, "rate": 0.001, "layer": ["a", "b"], "flip": true}',
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_flags_say_and_flags_win(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text(FILES[name])
    expected = {"steps": 5, "rate": 0.001, "layer": ("a", "b"), "flip": True}
    assert ask("--config", str(tmp_path / name)) == expected
    assert ask("--config", str(tmp_path / name), "--steps", "7", "--no-flip") == {
        **expected,
        "steps": 7,
        "flip": False,
    }


def test_a_number_with_a_zero_before_it_is_no_octal_one(tmp_path: Path) -> None:
    file = tmp_path / "k.yaml"
    for text, steps in (("010", 10), ("+7", 7), ("0x10", 16), ("1_000", 1000)):
        file.write_text(f"steps: {text}\n")
        assert ask("--config", str(file))["steps"] == steps


def test_the_sections_of_a_trainer_s_toml_say_nothing_and_their_keys_count(tmp_path: Path) -> None:
    file = tmp_path / "k.toml"
    file.write_text("flip = true\n[training_arguments]\nsteps = 5\n[model_arguments]\nlearning_rate = 1e-3\n")
    assert ask("--config", str(file)) == {"steps": 5, "rate": 0.001, "flip": True}
    file.write_text("[a]\nsteps = 5\n[b]\nsteps = 6\n")
    with pytest.raises(UserError, match=r"k\.toml says steps in two sections"):
        ask("--config", str(file))


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
        ask("--config", str(tmp_path / name))


@pytest.mark.parametrize("ending", ["json", "yaml", "toml"])
def test_a_file_in_utf_16_is_read_and_in_another_encoding_said_to_be_in_one(
    tmp_path: Path, ending: str
) -> None:
    text = {"json": '{"steps": 5}', "yaml": "steps: 5", "toml": "steps = 5"}[ending]
    (tmp_path / f"a.{ending}").write_bytes(text.encode("utf-16"))
    assert ask("--config", str(tmp_path / f"a.{ending}"))["steps"] == 5
    (tmp_path / f"a.{ending}").write_bytes(f"{text}\n# é".encode("latin-1"))
    with pytest.raises(UserError, match=rf"a\.{ending} is not UTF-8 text\. Save it as UTF-8"):
        ask("--config", str(tmp_path / f"a.{ending}"))


def test_a_home_is_found_where_no_shell_looks_for_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert_value(fields_of(RunOptions)["out"], "~/runs/dog", "--out") == tmp_path / "runs" / "dog"


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        ask("--config", str(tmp_path / "gone.yaml"))


def test_a_run_s_own_record_serves_again_without_what_the_flags_make_idle(tmp_path: Path) -> None:
    record = {"settings": {"images": "x", "prior": "drawn", "count": 9}, "command": "train", "versions": {}}
    path = tmp_path / "settings.json"
    path.write_text(json.dumps(record))
    assert ask("--config", str(path)) == record["settings"]
    assert ask("--config", str(path), "--prior", "off") == {"images": "x", "prior": "off"}


# The dataclass ------------------------------------------------------------------------------------------------


def test_a_subclass_that_changes_a_default_keeps_what_was_said() -> None:
    assert fields_of(Settings)["steps"].default == 20
    assert fields_of(Settings)["steps"].option == fields_of(Parent)["steps"].option


def test_a_mistake_in_python_names_the_argument() -> None:
    with pytest.raises(UserError, match=r"no setting step\. Did you mean steps"):
        build(Settings, {"images": "x", "step": 3})
    with pytest.raises(UserError, match=r"no setting instance_data_dir\. It is images here"):
        build(Settings, {"instance_data_dir": "x"})
    with pytest.raises(
        UserError, match=r"no setting epochs\. That is steps here\. It counts optimiser steps"
    ):
        build(Settings, {"images": "x", "epochs": 3})
    with pytest.raises(UserError, match="images is missing"):
        build(Settings, {})
    with pytest.raises(UserError, match="lr_scheduler is cosin"):
        customize.settings.Settings(images="x", token="[V]", class_noun="dog", lr_scheduler="cosin")
    for name, value, meant in (
        *(("prior", "false", "off"), ("precision", "float16", "fp16")),
        *(("quantize", "4bit", "nf4"), ("quantize", "int8", "8bit")),
    ):
        said: dict[str, Any] = {"images": "x", "token": "[V]", "class_noun": "dog", name: value}
        with pytest.raises(UserError, match=f"{name} is {value}, which is none of .* That is {meant} here"):
            customize.settings.Settings(**said)
    for kind in ("dora", "LoKr"):
        with pytest.raises(
            UserError, match=f"{kind}, which is a kind of adapter .* Write --adapter {kind.lower()}"
        ):
            customize.settings.Settings(images="x", token="[V]", class_noun="dog", method=kind)
    with pytest.raises(UserError, match="quantize is off, which is the default"):
        customize.settings.Settings(images="x", token="[V]", class_noun="dog", quantize="off")
    with pytest.raises(UserError, match=r"snr_gamma is 0; it is at least 0\.01"):
        customize.settings.Settings(
            images="x", token="[V]", class_noun="dog", loss_weighting="min-snr", snr_gamma=0
        )
    with pytest.raises(UserError, match="rank is 0"):
        align.settings.Settings(rank=0)


def test_one_prompt_may_stand_in_a_file_whatever_it_is_of(tmp_path: Path) -> None:
    one, several = tmp_path / "one.txt", tmp_path / "several.txt"
    one.write_text("\ufeffblurred, dark\n", encoding="utf-8")
    several.write_text("blurred\ndark\n")
    assert SamplingSettings(negative=str(one)).negative == "blurred, dark"
    assert build(PaintOptions, {"image": "x", "target": str(one)}).target == "blurred, dark"
    assert convert_value(fields_of(ControlSettings)["validation_prompt"], (str(one),), "x") == (
        "blurred, dark",
    )
    for name, said in ((str(several), "holds 2 prompts"), ("nope.txt", "nope.txt does not exist")):
        with pytest.raises(UserError, match=said):
            SamplingSettings(negative=name)


def test_importing_the_options_imports_neither_torch_nor_numpy_nor_rich() -> None:
    script = (
        "import sys, backbone.cli.options, backbone.training.settings\n"
        "assert not {'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


# The repeating command ------------------------------------------------------------------------------------------

DOG = {"images": "my dog", "token": "[V]", "class_noun": "dog", "token_words": "fgh"}
TWO = {"subject": ("cat:[W]:cat:bcd",)}
CUSTOMIZE: list[dict[str, Any]] = [
    {},
    {"steps": 9, "seed": 7, "rank": 3, "flip": True, "gradient_checkpointing": True},
    {**TWO, "prior": "class-images", "class_images": ("a", "b c"), "num_class_images": 5, "class_batch": 2},
    {
        "method": "pivotal",
        "num_vectors": 3,
        "words_share": 0.25,
        "adapter": "dora",
        "rank_pattern": ("attn2=8",),
    },
    {"method": "full", "prior": "off", "learning_rate": 1e-6, "precision": "fp32", "device": "cpu"},
    {"loss_weighting": "min-snr", "snr_gamma": 3.0, "patience": 2, "sheet_prompts": ("a {} 'there'", "-x")},
    {
        "optimizer": "prodigy",
        "train_text_encoder": True,
        "ema_decay": 0.9,
        "push_to_hub": True,
        "resolution": 96,
    },
    {
        "class_prompt": 'a "{class}", $5',
        "mask": "auto",
        "cpu_offload": 0.5,
        "caption_column": "words",
        "evaluation_steps": 0,
    },
]
ONLINE = {"online": "moji", "prompts": "p.txt"}
ALIGN: list[dict[str, Any]] = [
    {"pairs": "my pairs"},
    {"pairs": "p", "loss": "ipo", "full": True, "concepts": ("a", "b"), "limit": 5, "skip_bad": True},
    {"pairs": "p", "loss": "kto", "micro_batch": 2, "random_crop": 3, "user": "me", "held_out": 0.0},
    {"pairs": "p", "loss": "dspo", "dspo_pull": 0.5, "safeguard": -1.0, "flip": True},
    {**ONLINE, "rounds": 2, "per_prompt": 3, "sample_steps": 4, "guidance": 1.0},
    {**ONLINE, "loss": "draft", "reward_steps": 2, "checkpointing_steps": 7, "vae_tiling": True},
    {**ONLINE, "loss": "ddpo", "clip_range": 0.1, "rounds": 1},
]
USUAL = {
    "rank": 8,
    "steps": 25,
    "guidance": 4.0,
    "align": {"learning_rate": 2e-4, "beta": 500.0, "safeguard": 0.6},
    "sheet_prompts": ["a {}"],
}


def said_by(app: typer.Typer, line: str, monkeypatch: pytest.MonkeyPatch, module: Any) -> dict[str, Any]:
    """What the `train` of an app is asked by a command line, without doing it: `module` is where it starts."""
    import shlex

    heard: list[dict[str, Any]] = []

    def remember(asked: dict[str, Any], usual: dict[str, Any]) -> None:
        heard.append(asked)
        raise UserError("heard")

    with monkeypatch.context() as patch:
        patch.setattr(module, "resolve_settings", remember)
        done = CliRunner().invoke(app, shlex.split(line)[1:])
    assert isinstance(done.exception, UserError) and heard, done.output + str(done.exception)
    return heard[-1]


@pytest.mark.parametrize("asked", CUSTOMIZE, ids=str)
def test_the_repeating_command_of_customize_gives_the_same_settings(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {} if asked.get("method") == "pivotal" else {"token_words": "fgh"}
    named = {**DOG, "token_words": "", **words}
    wanted = customize.settings.resolve_settings({**named, **asked}, USUAL)
    line = customize.settings.as_command(wanted, Path("runs/x"))
    heard = said_by(customize.cli.app, line, monkeypatch, customize.training.start)
    subjects = {"images": wanted.images, "token": wanted.token, "class_noun": "dog", **words}
    assert customize.settings.resolve_settings({**heard, **subjects}, USUAL) == wanted
    for part in ("--images 'my dog'", "--token '[V]'", "--class dog", "--out runs/x"):
        assert part in line


@pytest.mark.parametrize("asked", ALIGN, ids=str)
def test_the_repeating_command_of_align_gives_the_same_settings(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = align.settings.resolve_settings(asked, USUAL)
    line = align.settings.as_command(wanted, Path("runs/x"))
    from align.training import start

    heard = said_by(align.cli.app, line, monkeypatch, start)
    assert align.settings.resolve_settings(heard, USUAL) == wanted
    assert align.settings.resolve_settings(heard, {}) == wanted  # whatever is usual by then


def test_the_record_of_a_run_is_a_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.training import start

    path = tmp_path / "settings.json"
    for asked in ALIGN:
        wanted = align.settings.resolve_settings(asked, USUAL)
        write_json(path, {"settings": wanted, "command": "align train", "versions": {}})
        heard = said_by(align.cli.app, f"align train --config {path}", monkeypatch, start)
        assert align.settings.resolve_settings(heard, {}) == wanted


# What has no effect -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"num_class_images": 4}, "--num-class-images has no effect without --prior class-images"),
        ({"method": "full", "rank": 4}, "--rank has no effect without --method lora or pivotal"),
        *(
            ({"method": method, **base}, f"{flag} has no effect without --method lora or pivotal or textual")
            for method in ("full", "custom-diffusion")
            for base, flag in (({"quantize": "nf4"}, "--quantize"), ({"cpu_offload": 0.5}, "--cpu-offload"))
        ),
        ({"adapter": "lokr", "quantize": "8bit"}, "--quantize has no effect without --adapter lora or dora"),
        ({"method": "textual-inversion", "prior": "base"}, "--prior has no effect without --method"),
        ({"text_encoder_lr": 1e-3}, "--text-encoder-lr has no effect without --train-text-encoder"),
        ({"hub_model_id": "a/b"}, "without --push-to-hub"),
        ({"snr_gamma": 5.0, "loss_weighting": "none"}, "without --loss-weighting min-snr"),
        ({"prior": "off", "class_prompt": "a cat"}, "--class-prompt has no effect without --prior"),
        (
            {"prior": "class-images", "class_batch": 2, "one_by_one": True},
            "--class-batch has no effect with --one",
        ),
        ({"patience": 3, "evaluation_steps": 0}, "--patience has no effect without --evaluation-steps"),
        ({"method": "pivotal", "token_words": "abc"}, "--token-words has no effect without --method"),
    ],
    ids=str,
)
def test_customize_refuses_what_has_no_effect(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        refuse_idle(customize.settings.resolve_settings({**DOG, "token_words": "", **asked}, {}), asked)


@pytest.mark.parametrize(
    ("asked", "complaint"),
    [
        ({"pairs": "p", "rounds": 3}, "--rounds has no effect without --online"),
        ({"pairs": "p", "full": True, "rank": 3}, "--rank has no effect with --full"),
        ({"pairs": "p", "full": True, "quantize": "nf4"}, "--quantize has no effect with --full"),
        ({"pairs": "p", "full": True, "cpu_offload": 0.5}, "--cpu-offload has no effect with --full"),
        ({"pairs": "p", "mapo_weight": 0.3}, "--mapo-weight has no effect without --loss mapo"),
        ({"pairs": "p", "loss": "sft", "beta": 3.0}, "--beta has no effect without --loss"),
        ({**ONLINE, "limit": 4}, "--limit has no effect with --online"),
        ({**ONLINE, "checkpointing_steps": 4}, "--checkpointing-steps has no effect with --online"),
        ({**ONLINE, "loss": "draft", "draws": 4}, "--draws has no effect without --loss"),
    ],
    ids=str,
)
def test_align_refuses_what_has_no_effect(asked: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=re.escape(complaint)):
        refuse_idle(align.settings.resolve_settings(asked, {}), asked)


def test_switching_a_thing_off_has_the_effect_that_was_asked_for() -> None:
    asked = {"method": "textual-inversion", "prior": "off", "lora_dropout": 0.0, "one_by_one": False}
    found = customize.settings.resolve_settings({**DOG, "token_words": "", **asked}, {})
    refuse_idle(found, asked)
    assert found.prior == "off"


@pytest.mark.parametrize("declared", [customize.settings.Settings, align.settings.Settings])
def test_what_a_setting_needs_are_settings_and_values_that_there_are(declared: type) -> None:
    known = fields_of(declared)
    for one in known.values():
        needs = one.option.needs
        ways = needs if isinstance(needs, tuple) else (needs,)
        others = [*(pair for way in ways for pair in way.items())]
        others += [(name, (value,)) for name, value in one.option.implies.items()]
        for name, values in others:
            allowed = known[name].option.choices
            assert not allowed or set(values) <= {*allowed, known[name].default}, one.name


@pytest.mark.parametrize("command_line", [("customize", "--seed"), ("align", "--steps")])
def test_nothing_is_said_otherwise_beside_resume(command_line: tuple[str, str], tmp_path: Path) -> None:
    program, flag = command_line
    own = {
        "customize": customize.settings.Settings(images="x", token="[V]", class_noun="dog"),
        "align": align.settings.Settings(pairs="p"),
    }[program]
    write_json(tmp_path / "settings.json", {"settings": own, "command": f"{program} train …"})
    done = CliRunner().invoke(TRAINS[program], ["train", "--resume", str(tmp_path), flag, "3"])
    assert isinstance(done.exception, UserError)
    assert f"{flag} has no effect" in str(done.exception)


# Help and other spellings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", TRAINS)
def test_every_option_is_whole_at_80_columns_with_a_text_and_a_panel(program: str) -> None:
    shown = CliRunner().invoke(TRAINS[program], ["train", "--help"], env={"COLUMNS": "80"}).output
    lines = shown.splitlines()
    assert max(map(len, lines)) <= 80
    declared = {"customize": customize.settings.Settings, "align": align.settings.Settings}[program]
    for one in [*fields_of(declared).values(), *fields_of(RunOptions).values()]:
        assert one.option.help and one.option.panel in PANELS, one.name
        name = one.option.metavar if one.option.argument else one.flag
        if not one.option.hidden:
            assert any(re.match(rf"  {re.escape(name)}($|[ /])", line) for line in lines), name
    headings = [line.split()[1] for line in lines if line.startswith("── ")]
    assert [name for name in headings if name in PANELS] == [name for name in PANELS if name in headings]


@pytest.mark.parametrize(
    "flags",
    [
        "--output_dir o --instance_data_dir i --class_data_dir c --with_prior_preservation --center_crop",
        "--train_data_dir i --reg_data_dir c --network_dim 4 --network_alpha 4 --network_dropout 0.1",
        "--instance_data_dir i --caption_column text --resolution 128 --mixed_precision no --random_flip",
        "--instance_data_dir i --min_snr_gamma 5 --optimizer_type AdamW8bit --train_batch_size 2",
        "--instance_data_dir i --prior class-images --num_class_images 3 --sample_batch_size 4 --use_dora",
        "--pretrained_model_name_or_path moji --instance_data_dir i --max_train_steps 3 --unet_lr 1e-4",
    ],
)
def test_the_spellings_of_diffusers_and_kohya_are_understood(
    flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    heard = said_by(customize.cli.app, f"customize train {flags}", monkeypatch, customize.training.start)
    assert customize.settings.resolve_settings({**DOG, "token_words": "", **heard}, USUAL)


PROGRAMS = {"customize": customize.cli.app, "edit": edit.cli.app, "align": align.cli.app}


def page() -> str:
    """The page that says which spellings are understood."""
    return "\n".join(
        [
            "# Other trainers' spellings",
            "",
            "Flags may be written with hyphens or underscores. Beside its own name an option of `train` is understood",
            "by the names below, which diffusers' scripts and kohya's sd-scripts use; a file given with `--config` may",
            "use them too, a .toml in sections whose names say nothing. This page is written by",
            "`python -m tests.backbone.cli.test_options`.",
            "",
            spellings("customize train", customize.settings.Settings, customize.settings.TrainOptions),
            spellings("customize train-control", ControlSettings, RunOptions),
            spellings("align train", align.settings.Settings, RunOptions),
            "The other commands have these; a setting that is on is switched off by `no-` before its name.",
            "",
            other_spellings(
                {
                    f"{program} {name}": one
                    for program, app in PROGRAMS.items()
                    for name, one in typer.main.get_group(app).commands.items()
                    if f"{program} {name}"
                    not in ("customize train", "customize train-control", "align train")
                }
            ),
            "A sampler may be called as webui, ComfyUI, kohya's scripts or diffusers' classes call it, in any case,",
            "with spaces, hyphens or underscores. A spacing of the steps in such a name (Karras) is refused: it is the",
            "model's own.",
            "",
            "| `--sampler` | is understood too |",
            "| --- | --- |",
            *(
                f"| `{ours}` | {', '.join(f'`{name}`' for name in names)} |"
                for ours, names in SAMPLERS_ELSEWHERE.items()
            ),
            "",
        ]
    )


def spellings(program: str, *declared: type) -> str:
    """The table of other trainers' spellings that a command understands, for the page."""
    lines = [f"| `{program}` | is understood too |", "| --- | --- |"]
    for each in declared:
        for one in fields_of(each).values():
            shown = one.option.metavar if one.option.argument else one.flag
            names = ["--" + name.replace("-", "_") for name in one.option.aliases]
            meant = [f"`--{name.replace('-', '_')}` ({value})" for name, value in one.option.switches.items()]
            if one.option.hidden:
                meant.append(f"({one.option.help})")
            if names or meant:
                lines.append(f"| `{shown}` | {', '.join([*(f'`{name}`' for name in names), *meant])} |")
    return "\n".join(lines) + "\n"


def other_spellings(commands: Mapping[str, Any]) -> str:
    """The same of many commands, typer's by name: an option, its other names, and the commands that have it so."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, one in commands.items():
        for option in one.params:
            flags = [flag for flag in option.opts if flag.startswith("--")]
            if option.hidden and not flags[0].startswith("--no-"):
                rows.setdefault((flags[0], f"({option.help})"), []).append(name)
            elif len(flags) > 1 and not option.hidden:
                others = ", ".join("`--" + flag[2:].replace("-", "_") + "`" for flag in flags[1:])
                rows.setdefault((flags[0], others), []).append(name)
    lines = [
        f"| `{flag}` | {others} | {', '.join(names)} |" for (flag, others), names in sorted(rows.items())
    ]
    return "\n".join(["| option | is understood too | of |", "| --- | --- | --- |", *lines]) + "\n"


def test_the_page_of_spellings_is_what_the_code_understands() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        *(("Euler a", "ancestral"), ("euler_ancestral", "ancestral"), ("k_euler_a", "ancestral")),
        *(("DPM++ 2M", "dpmpp-2m"), ("dpmpp_2m", "dpmpp-2m"), ("DPMSolverMultistepScheduler", "dpmpp-2m")),
        *(
            ("Euler", "ddim"),
            ("DDIM", "ddim"),
            ("DPMPP-2M", "dpmpp-2m"),
            ("Heun", "heun"),
            ("lcm", "consistency"),
            ("uni_pc_bh2", "unipc"),
        ),
    ],
)
def test_samplers_are_understood_as_other_tools_call_them(said: str, meant: str) -> None:
    assert SamplingSettings(sampler=said).sampler == meant  # type: ignore[arg-type]
    assert convert_value(fields_of(SamplingSettings)["sampler"], said, "--sampler") == meant


def test_what_our_pictures_say_of_their_sampler_is_understood() -> None:
    assert {name_sampler(said) for said in SAMPLERS.values()} == set(SAMPLERS)
    assert [name_sampler(said) for said in SAMPLERS.values()] == list(SAMPLERS)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("PLMS", "sampler is PLMS, which is none of ddim, heun, dpmpp-2m, unipc, ancestral, consistency"),
        ("DPM++ 2M SDE", "which is none of ddim"),
        ("DPM++ SDE Karras", "which is none of ddim"),
        ("DPM++ 2M Karras", "asks for another spacing of the steps.* Write dpmpp-2m"),
        ("dpmpp_2m_sgm_uniform", "Write dpmpp-2m"),
    ],
)
def test_samplers_that_are_not_here_are_refused_with_those_that_are(said: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        SamplingSettings(sampler=said)  # type: ignore[arg-type]


def test_help_of_train_answers_in_less_than_two_fifths_of_a_second(tmp_path: Path) -> None:
    # As installed: bytecode is written once, by the first run, whatever this machine's environment forbids.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    environment["PYTHONPYCACHEPREFIX"] = str(tmp_path)

    def seconds(program: str) -> float:
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", f"{program}.cli", "train", "--help"],
            cwd=ROOT,
            env=environment,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    for program in TRAINS:
        seconds(program)
        assert any(seconds(program) < 0.4 for _ in range(5))


def test_settings_may_be_changed_and_are_checked_again() -> None:
    wanted = customize.settings.resolve_settings(DOG, {})
    with pytest.raises(UserError, match="steps is 0"):
        replace(wanted, steps=0)
    assert as_command("x", replace(wanted, steps=3)).startswith("x --images 'my dog'")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")


# Commands that get their settings made -----------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """What two commands share."""

    seed: Annotated[int, Option("Of the noise.", "Sampling")] = 0
    scale: Annotated[tuple[float, ...], Option("Repeatable.", "Sampling", min=0)] = (1.0,)


@dataclass(frozen=True, kw_only=True)
class Edited(Drawn):
    """What one of them has too."""

    NEEDS: ClassVar[dict[str, Any]] = {"seed": {"file": (None,)}}

    image: Annotated[str, Option("Which.", "Data", argument=True, metavar="IMAGE")]
    target: Annotated[tuple[str, ...], Option("What.", "Data")]
    file: Annotated[str | None, Option("Instead.", "Data")] = None
    kept: Annotated[bool, Option("Kept.", "Data")] = True


def edited(*words: str) -> Edited:
    """What the command gets for these words."""
    app, got = typer.Typer(), list[Edited]()

    @app.callback()
    def group() -> None:
        """Several commands."""

    @settled_command(app, Edited)
    def edit(asked: Edited) -> None:
        """Edit."""
        got.append(asked)

    done = CliRunner().invoke(app, ["edit", *words])
    if done.exception is not None:
        raise done.exception
    return got[0]


def test_a_settled_command_gets_its_settings_made(tmp_path: Path) -> None:
    assert edited("a.png", "--target", "x", "--target", "y", "--scale", "1", "--scale", "0.5") == Edited(
        image="a.png", target=("x", "y"), scale=(1.0, 0.5)
    )
    (tmp_path / "look.yaml").write_text("target: [x]\nscale: 2\nkept: false\n")
    assert edited("a.png", "--config", str(tmp_path / "look.yaml")) == Edited(
        image="a.png", target=("x",), scale=(2.0,), kept=False
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("a.png",), "--target is missing"),
        (("a.png", "--target", "x", "--scale", "-1"), "at least 0"),
        (("a.png", "--target", "x", "--scale", "much"), "not a number"),
        (("a.png", "--target", "x", "--file", "f", "--seed", "3"), "--seed has no effect with --file"),
    ],
)
def test_a_settled_command_refuses_what_is_missing_does_not_fit_or_has_no_effect(
    words: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(UserError, match=complaint):
        edited(*words)


def test_a_settled_command_demands_its_plain_words(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        edited("--target", "x")
    look = tmp_path / "look.yaml"
    look.write_text("image: a.png\ntarget: [x]\n")
    assert edited("--config", str(look)).image == edited("a.png", f"--config={look}").image == "a.png"
    look.write_text("target: [x]\n")
    with pytest.raises(UserError, match="IMAGE is missing"):
        edited("--config", str(look))
