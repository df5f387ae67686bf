"""The four console scripts answer at once, say what they can do, and understand the same words."""

from __future__ import annotations

import ast
import logging
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer.main
from typer.testing import CliRunner

import align.cli
import customize.cli
import edit.cli
import limner.cli
from backbone import __version__
from backbone.cli import other_names
from backbone.cli.commands import program_words
from backbone.cli.help import refuse_typography
from backbone.cli.options import hyphenate
from backbone.io.console import UserError, refuse_address
from tests.commands import run_here

ROOT = Path(__file__).parents[1]
PROGRAMS = {"customize": customize.cli.app, "edit": edit.cli.app, "align": align.cli.app}
SCRIPTS = (*PROGRAMS, "limner")
HEAVY = ("torch", "diffusers", "transformers", "peft", "accelerate", "datasets", "numpy", "PIL")
ON_THE_INDEX = {
    "av",
    "bitsandbytes",
    "prodigyopt",
    "protobuf",
    "pyyaml",
    "sentencepiece",
    "tensorboard",
    "tomli",
    "torch",
}

MAIN = 'if __name__ == "__main__":'

scripts = pytest.mark.parametrize("script", SCRIPTS)


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env={**os.environ, **environment}
    )


def path_of(script: str) -> Path:
    """Where the installation put a console script."""
    folder = Path(sysconfig.get_path("scripts"))
    found = [path for path in (folder / script, folder / f"{script}.exe") if path.is_file()]
    assert found, f'{script} is not installed in {folder}. Run pip install -e ".[test]".'
    return found[0]


def commands() -> Iterator[tuple[str, Any]]:
    """`customize sample` and all others, with typer's command."""
    for program, app in PROGRAMS.items():
        for name, command in typer.main.get_group(app).commands.items():
            yield f"{program} {name}", command


COMMANDS = dict(commands())
every_command = pytest.mark.parametrize("name", COMMANDS)


@cache
def help_of(name: str, columns: int | str = 80) -> str:
    """What `--help` of a command prints at this width."""
    program, command = name.split()
    result = CliRunner().invoke(PROGRAMS[program], [command, "--help"], env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("columns", ["0", "-3", "1", "wide", ""])
def test_help_is_shown_whatever_the_terminal_says_of_its_width(columns: str) -> None:
    shown = help_of("customize sample", columns)
    assert "--negative" in shown and max(map(len, shown.splitlines())) <= 100


def context_of(name: str) -> Any:
    """The context in which the command's words are read."""
    program, command = name.split()
    group = typer.main.get_group(PROGRAMS[program])
    parent = typer.Context(group, info_name=program, **group.context_settings)
    return typer.Context(COMMANDS[name], info_name=command, parent=parent)


# The scripts -------------------------------------------------------------------------------------------------


@scripts
def test_help_says_what_the_command_is_for(script: str) -> None:
    done = run(path_of(script), "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: {script}" in done.stdout


@scripts
def test_help_answers_in_less_than_two_fifths_of_a_second(script: str) -> None:
    def seconds(script: Path) -> float:
        """Processor time of a run, which a busy machine stretches far less than the time on the clock."""
        before = os.times()
        subprocess.run([str(script), "--help"], check=True, stdout=subprocess.DEVNULL, env=compiled)
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    compiled = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    seconds(path_of(script))  # compiles what no run has compiled yet
    assert statistics.median(seconds(path_of(script)) for _ in range(3)) < 0.4


@scripts
def test_help_imports_none_of_the_heavy_libraries(script: str) -> None:
    done = run(sys.executable, "-X", "importtime", path_of(script), "--help")
    imported = {line.rpartition("|")[2].strip().split(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert imported.isdisjoint((*HEAVY, "rich", "pydantic"))


@scripts
def test_a_program_is_also_a_module_and_says_its_version(script: str) -> None:
    done = run(sys.executable, "-m", script, "--version")
    assert (done.stdout, done.returncode) == (f"limner {__version__}\n", 0), done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@scripts
def test_a_program_that_is_stopped_while_it_starts_ends_as_at_any_other_time(script: str, name: str) -> None:
    code = (
        "import signal, sys, time\n"
        "class Slow:\n"
        "    def find_spec(self, module, *_):\n"
        f"        if module == '{script}.cli':\n"
        "            print('begun', flush=True)\n"
        "            time.sleep(60)\n"
        "sys.meta_path.insert(0, Slow())\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where the tests run in the background
        f"sys.argv = ['{script}', '--help']\n"
        f"from {script}.__main__ import main\n"
        "main()\n"
    )
    command = [sys.executable, "-c", code]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stdout is not None and started.stdout.readline() == "begun\n"
    started.send_signal(getattr(signal, name))
    _, said = started.communicate(timeout=30)
    assert (started.returncode, said) == (130, "Stopped.\n")


def test_what_is_installed_starts_where_a_signal_is_heard() -> None:
    declared = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'{script} = "{script}.__main__:main"' in declared for script in SCRIPTS)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ("customize", "sample", "a dog", "--count", "100000000"),
            "--count is 100000000 and must lie between 1 and 10000.",
        ),
        (
            ("align", "sample", "--prompts", "a dog", "--count", "100000000"),
            "--count is 100000000 and must lie",
        ),
        (
            ("customize", "evaluate", "run", "--count", "100000000"),
            "--count is 100000000 and must lie between 1 and 10000.",
        ),
        (
            ("customize", "sample", "a dog", "--steps", "10000000"),
            "--steps is 10000000 and must lie between 1 and 10000.",
        ),
        (
            ("customize", "sample", "a dog", "--model", "moji-flow", "--steps", "10000000"),
            "must lie between 1 and 10000.",
        ),
        (
            ("customize", "sample", "a dog", "--width", "100000"),
            "--width is 100000 and must lie between 1 and 16384.",
        ),
        (
            ("customize", "sample", "a dog", "--resolution", "16384"),
            "268 million pixels, and 34 million are drawn",
        ),
        (
            ("customize", "clip", "a dog", "--frames", "100000000"),
            "--frames is 100000000 and must lie between 2 and 1024.",
        ),
        (
            ("customize", "clip", "a dog", "--count", "100000000"),
            "--count is 100000000 and must lie between 1 and 10000.",
        ),
        (("edit", "sdedit", "a.png", "--prompt", "a", "--count", "100000000"), "between 1 and 256."),
        (
            ("edit", "interpolate", "a.png", "b.png", "--prompts", "a", "--count", "1000000"),
            "between 3 and 256.",
        ),
        (
            ("edit", "invert", "a.png", "--source", "a", "--steps", "10000000"),
            "must lie between 1 and 10000.",
        ),
    ],
)
def test_numbers_that_nobody_means_are_refused_before_memory_is_taken(
    words: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    done = run_here(*words, cwd=tmp_path, check=False)
    assert done.returncode == 2 and said in " ".join(done.stderr.split()), done.stderr
    assert "Traceback" not in done.stderr and not list(tmp_path.iterdir())


@scripts
def test_the_shell_completes_what_was_begun(script: str) -> None:
    begun = {"limner": "customize exa", "customize": "exa", "edit": "inv", "align": "samp"}[script]
    words = f"{script} {begun}"
    done = run(
        *(
            sys.executable,
            "-c",
            f"import sys; sys.argv = ['{script}']; from {script}.cli import main; main()",
        ),
        **{
            f"_{script.upper()}_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        },
    )
    expected = {"edit": {"invert", "invert-and-replace"}, "align": {"sample"}}.get(script, {"example"})
    assert set(done.stdout.split()) == expected, done.stderr


@scripts
def test_completion_can_be_installed(script: str) -> None:
    app = import_module(f"{script}.cli").app
    shown = CliRunner().invoke(app, ["--help"]).stdout
    assert "--install-completion" in shown and "--show-completion" in shown


@pytest.mark.parametrize("package", [*SCRIPTS, "backbone"])
def test_a_package_has_a_version_and_says_that_it_is_typed(package: str) -> None:
    module = import_module(package)
    assert module.__version__ == __version__
    assert (ROOT / package / "py.typed").is_file()
    with pytest.raises(AttributeError, match="no attribute"):
        getattr(module, "nothing_of_this_name")  # noqa: B009


def test_a_command_that_is_printed_can_be_copied_and_a_tilde_that_was_quoted_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(PROGRAMS["customize"], ["example", "~/my dög"])
    assert said.exit_code == 0 and (tmp_path / "my dög" / "dog-1.png").is_file() and not Path("~").exists()
    (line,) = [one for one in said.output.splitlines() if one.startswith("Next: ")]
    assert shlex.split(line)[1:5] == ["customize", "train", "--images", str(tmp_path / "my dög")]
    # without which a folder of that name leaves the class to the scorer, which takes this dog for a cat
    assert shlex.split(line)[-2:] == ["--class", "dog"]


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["sample", "a dog", "—count", "4"], "Type two hyphens: --count"),
        (["train", "–images", "dog"], "Type two hyphens: --images"),
        (["sample", "“a", "dog”"], "Type straight ones"),
        (["example", ""], "FOLDER is empty"),
        (["sample", "a caf\udce9"], "a caf\ufffd is no text in UTF-8"),
        (["example", "caf\udce9"], "caf\ufffd is no text in UTF-8"),
        (
            ["sample", "a dog", "--out", "https://e.com/x"],
            "https://e.com/x is an address, and nothing is read",
        ),
        (["train", "--images=s3://bucket/dog"], "s3://bucket/dog is an address"),
        (["sample", "a dog", "--condition", "sketch=file:///tmp/x.png"], "Name what it leads to: /tmp/x.png"),
        (["sample", "--model", "https://huggingface.co/a/b/tree/main"], "What the hub has is named a/b."),
    ],
)
def test_what_a_text_program_an_empty_variable_another_encoding_or_a_browser_put_there_is_no_word(
    words: list[str], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(PROGRAMS["customize"], words)
    assert isinstance(said.exception, UserError) and meant in str(said.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        (
            "align",
            ["train", "--pairs", "p"],
            "--pairs is no flag here; PAIRS is written without one. Write: ",
        ),
        ("align", ["export", "s", "--out", "o.jsonl"], "export SOURCE FILE"),
        ("customize", ["example", "--out", "dogs"], "example FOLDER"),
        ("customize", ["evaluate", "--run", "runs/dog"], "evaluate RUN"),
        ("edit", ["sdedit", "--images", "cat.png", "--prompt", "a dog"], "sdedit IMAGE"),
        ("edit", ["sdedit", "--init_image", "cat.png", "--prompt", "a dog"], "sdedit IMAGE"),
        # and what is none, or an option of another name
        ("edit", ["sdedit", "cat.png", "--output", "x"], "Write --out."),
        ("customize", ["sample", "a dog", "--output", "x.png"], "Write --out."),
        (
            "customize",
            ["sample", "a dog", "--image", "x.png"],
            "draws from words. To change an image: edit sdedit",
        ),
        (
            "customize",
            ["sketch", "--mask_image", "x.png"],
            "draws from words. To change an image: edit sdedit",
        ),
    ],
)
def test_a_flag_for_what_is_a_plain_word_here_is_told_so(program: str, words: list[str], meant: str) -> None:
    said = CliRunner().invoke(PROGRAMS[program], words)
    assert isinstance(said.exception, UserError) and meant in str(said.exception)
    unknown = CliRunner().invoke(PROGRAMS[program], [words[0], "--no-such"])
    assert unknown.exit_code == 2 and "No such option" in unknown.output
    elsewhere = CliRunner().invoke(PROGRAMS["customize"], ["check", "--images", "dogs", "--token", "[V]"])
    assert isinstance(elsewhere.exception, UserError)
    assert re.search(
        r"--token is a flag of .*train and .* not of .*check\. Leave it out", str(elsewhere.exception)
    )
    other = CliRunner().invoke(PROGRAMS["customize"], ["export", "run", "--to", "a1111", "--out", "x"])
    assert "Invalid value for '--to': 'a1111' is not one of" in " ".join(other.output.split())


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        (
            "customize",
            ["train", "--lr", "1e-4"],
            "train. Write --learning-rate.",
        ),
        ("customize", ["train", "--max_train_epochs", "9"], "Write --steps. It counts optimiser steps"),
        ("customize", ["sample", "a dog", "--lora", "f"], "Write --concept. It takes a run"),
        (
            "customize",
            ["sample", "a dog", "--size", "9"],
            "Write --resolution. It is a number of pixels, as in",
        ),
        (
            "customize",
            ["train", "--validation_epochs", "50"],
            "Write --validation-steps. It counts optimiser",
        ),
        ("customize", ["train", "--cache_latents"], "encoded once and kept, always: leave it out."),
        ("customize", ["train", "--enable_xformers_memory_efficient_attention"], "by itself: leave it out."),
        (
            "customize",
            ["train", "--network_module", "networks.lora"],
            "--method and --adapter choose what is trained: leave it out.",
        ),
        ("customize", ["sample", "a dog", "--clip-skip", "2"], "own files say: leave it out."),
        ("customize", ["sample", "a dog", "--network_weights", "f"], "Write --concept. It takes a run"),
        (
            "customize",
            ["sample", "a dog", "--network_module", "networks.lora"],
            "which kind of adapter it holds",
        ),
        ("customize", ["sample", "a dog", "--n_iter", "2"], "Write --count."),
        ("customize", ["sample", "a dog", "--W", "128"], "Write --width."),
        ("customize", ["train", "--adam_beta1", "0.9"], "(0.9, 0.999, 1e-8): leave it out."),
        ("customize", ["train", "--lr_num_cycles", "1"], "no cycles and powers: leave it out."),
        ("customize", ["train", "--checkpoints_total_limit", "1"], "keeps its newest checkpoint"),
        ("customize", ["train", "--logging_dir", "logs"], "into the run folder (log.jsonl): leave it out."),
        ("customize", ["train", "--hub_token", "hf_x"], "your own login (hf auth login, or HF_TOKEN): leave"),
        ("customize", ["train", "--use_ema"], "Write --ema-decay. As in --ema-decay 0.999."),
        ("customize", ["train", "--sample_prompts", "p"], "--validation-prompt. It takes one prompt"),
        (
            "align",
            ["train", "p", "--gradient_accumulation_steps", "4"],
            "Write --micro-batch. It is the pairs",
        ),
        ("align", ["train", "p", "--loss_type", "sigmoid"], "That is dpo here."),
        ("edit", ["sdedit", "a.png", "--denoising_strength", "0.5"], "Write --strength."),
        (
            "edit",
            ["instruct", "a.png", "--strength", "0.5"],
            "Write --scale. It is the strength of the concepts.",
        ),
        ("edit", ["flow-edit", "a.png", "--tar_prompt", "a dog"], "Write --target."),
        (
            "edit",
            ["invert-and-replace", "a.png", "--equalizer_params", "2"],
            "--reweight. As in --reweight silver",
        ),
        ("edit", ["sdedit", "a.png", "--num-images", "2"], "Write --count."),
        ("edit", ["sdedit", "a.png", "--target", "a dog"], "Write --prompt."),
        ("edit", ["flow-edit", "a.png", "--prompt", "a dog"], "Write --target."),
        ("customize", ["train", "--images", "d", "--load_in_4bit"], "Write --quantize. As in --quantize nf4"),
        ("align", ["train", "--dataset", "p"], "PAIRS is written without one"),
        ("customize", ["train", "--revision", "fp16"], "the main branch is read"),
        ("customize", ["train", "--local_rank", "0"], "accelerate launch tells every process"),
        ("customize", ["train", "--min_timestep", "9"], "Write --timestep-bias-begin."),
        ("align", ["train", "p", "--min_timestep", "9"], "Write --least-noise."),
        ("customize", ["train", "--multires_noise_discount", "0.3"], "but for --noise-offset: leave it out."),
        ("customize", ["train", "--loss_type", "huber"], "the squared error, always: leave it out."),
        ("edit", ["invert-and-replace", "a.png", "--skip", "36"], "Write --strength. It is the share"),
        ("edit", ["flow-edit", "a.png", "--n_max", "33"], "Write --strength. It is n_max / steps."),
        ("edit", ["flow-edit", "a.png", "--n_avg", "5"], "Write --draws."),
        ("customize", ["sample", "a dog", "--eta", "1"], "Write --sampler. --sampler ancestral"),
        ("edit", ["invert", "a.png", "--eta", "1"], "but in edit-friendly inversions: leave it out."),
    ],
)
def test_a_flag_of_other_programs_is_answered_with_its_name_here(
    program: str, words: list[str], meant: str
) -> None:
    said = CliRunner().invoke(PROGRAMS[program], words)
    assert isinstance(said.exception, UserError) and meant in str(said.exception)


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        (
            "customize",
            ["sample", "a dog", "--out", "--steps", "3"],
            "--out has no value: --steps follows it.",
        ),
        ("customize", ["train", "--images", "--token", "[V]"], "--images has no value: --token follows it."),
        ("align", ["train", "pairs", "--out"], "--out has no value behind it. Give one: The run folder."),
        ("customize", ["train", "--random_crop"], "Give one: Train on N random crops of each image too."),
    ],
)
def test_an_option_without_its_value_does_not_take_the_flag_behind_it_for_one(
    program: str, words: list[str], meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    said = CliRunner().invoke(PROGRAMS[program], words)
    assert isinstance(said.exception, UserError) and meant in str(said.exception)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        (
            "align",
            ["compare", "runs/x"],
            "TUNED is missing. Give it: What is compared with BASE: a run of align train, as in align compare moji",
        ),
        ("customize", ["export", "runs/x"], "--out is missing. Give it: The file or folder to write."),
        ("edit", ["interpolate", "a.png"], "SECOND is missing. Give it: The image to end with."),
    ],
)
def test_what_is_missing_is_named_as_in_help_with_what_it_is(
    program: str, words: list[str], meant: str
) -> None:
    said = CliRunner().invoke(PROGRAMS[program], words)
    assert said.exit_code == 2 and meant in said.output and "Usage: " in said.output


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (
            ["sample", "a dog", "--resolution", "512,768"],
            "Write one number for a square, or --width and --height.",
        ),
        (["train", "--images", "d", "--resolution=512,512"], "Write one number, the side of a square"),
        (["train", "--images", "d", "--resolution=1,024"], "Write it without marks: 1024."),
    ],
)
def test_a_width_and_a_height_are_not_taken_for_one_number_with_a_mark(words: list[str], meant: str) -> None:
    said = CliRunner().invoke(PROGRAMS["customize"], words)
    assert isinstance(said.exception, UserError) and meant in str(said.exception)


@pytest.mark.parametrize(
    ("program", "words", "meant"),
    [
        ("customize", "generate", "Did you mean 'sample'?"),
        ("customize", "dreambooth", "Did you mean 'train'?"),
        ("edit", "inpaint", "Did you mean 'sdedit'?"),
        ("edit", "make it red", "Name a command first"),
    ],
)
def test_a_command_of_other_programs_is_answered_with_its_name_here(
    program: str, words: str, meant: str
) -> None:
    said = CliRunner().invoke(PROGRAMS[program], [words])
    assert said.exit_code == 2 and meant in said.output
    every = CliRunner().invoke(limner.cli.app, ["generate"])
    assert re.search(r"customize sample or \w+ align sample", every.output)


def test_what_other_names_are_answered_with_is_there() -> None:
    groups: list[Any] = [typer.main.get_command(app) for app in PROGRAMS.values()]
    every = [command for group in groups for command in group.commands.values()]
    commands = {name for group in groups for name in group.commands}
    options = {option.lstrip("-") for one in every for param in one.params for option in param.opts}
    assert {name for names, _ in other_names.FLAGS.values() for name in names} <= options
    assert {name for names in other_names.COMMANDS.values() for name in names} <= commands


def test_a_file_that_is_called_as_flags_are_is_told_how_to_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-dog").mkdir()
    for word in ("-dog", "-dog:0.5"):
        said = CliRunner().invoke(PROGRAMS["customize"], ["merge", word, "--out", "m"])
        assert f"write ./{word}" in str(said.exception)
    usage = CliRunner().invoke(PROGRAMS["customize"], ["merge", "-d"]).output
    assert "merge [OPTIONS] ADAPTERS..." in usage


@pytest.mark.parametrize("prompt", ["a dog – at night", "“hello” on a sign", "‘tis the season", "the cats’"])
def test_dashes_and_quotation_marks_may_stand_in_a_prompt(prompt: str) -> None:
    refuse_typography([prompt, "−3", "-"])
    refuse_address(f"{prompt} https://e.com/x")


# limner ------------------------------------------------------------------------------------------------------


@every_command
def test_limner_has_every_command_of_the_three_programs(name: str) -> None:
    program, command = name.split()
    through = CliRunner().invoke(limner.cli.app, [program, command, "--help"], env={"COLUMNS": "80"})
    assert through.exit_code == 0, through.output
    _, found, usual = (text.split("\n\n", 1)[1] for text in ("\n\n", through.stdout, help_of(name)))
    assert found == usual


def test_limner_says_of_a_program_what_the_program_says_of_itself() -> None:
    shown = " ".join(CliRunner().invoke(limner.cli.app, ["--help"]).stdout.split())
    for app in PROGRAMS.values():
        assert str(app.info.help) in shown


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("train", "limner customize train or limner align train"),
        ("label", "limner align label"),
        ("custmize", "customize"),
        ("lable", "limner align label"),
    ],
)
def test_a_command_without_its_program_is_answered_with_it(typed: str, meant: str) -> None:
    said = CliRunner().invoke(
        limner.cli.app, [typed, "--images", "dog"], prog_name="limner", env={"COLUMNS": "99"}
    )
    assert said.exit_code == 2 and f"Did you mean {meant}?" in said.output


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("help", "--help"),
        ("help edit sdedit", "edit sdedit --help"),
        ("edit help", "edit --help"),
        ("version", "--version"),
    ],
)
def test_help_and_version_are_words_too(typed: str, meant: str) -> None:
    said, flagged = (CliRunner().invoke(limner.cli.app, words.split()) for words in (typed, meant))
    assert said.exit_code == flagged.exit_code == 0
    assert said.stdout == flagged.stdout != ""


def test_what_was_typed_is_the_program_s_own_line_through_either_door(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for words in (["limner", "edit", "sdedit", "a.png"], ["edit", "sdedit", "a.png"]):
        monkeypatch.setattr(sys, "argv", words)
        assert program_words("edit") == ["edit", "sdedit", "a.png"]


# The help of every command -----------------------------------------------------------------------------------


@every_command
def test_texts_fit_into_forty_columns(name: str) -> None:
    """Names are never broken, so that some stand out."""
    lines = help_of(name, 40).splitlines()
    long = [line for line in lines if len(line) > 40 and not line.startswith(("Usage", "  -", "  KIND"))]
    assert long == []


@every_command
def test_no_name_is_cut_off_at_eighty_columns(name: str) -> None:
    lines = help_of(name).splitlines()
    assert max(map(len, lines)) <= 80
    shown = [line.split()[0].split("/")[0] for line in lines if line.startswith("  --")]
    assert shown == [
        one for one in shown if one in {flag for p in COMMANDS[name].params for flag in p.opts} | {"--help"}
    ]
    for param in COMMANDS[name].params:
        if param.param_type_name == "option" and not param.hidden:
            assert shown.count(next(flag for flag in param.opts if flag.startswith("--"))) == 1


@pytest.mark.parametrize("name", [name for name in COMMANDS if not name.endswith("train")])
def test_every_option_has_a_text_and_a_panel(name: str) -> None:
    bare = [
        param.name
        for param in COMMANDS[name].params
        if not param.help or (param.param_type_name == "option" and not param.rich_help_panel)
    ]
    assert bare == []


def test_the_scripts_have_the_programs_help_and_every_option_a_text() -> None:
    found = []
    for path in sorted(one for folder in ("recipes", "benchmarks") for one in (ROOT / folder).rglob("*.py")):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            name = ast.unparse(call.func) if isinstance(call, ast.Call) else ""
            if name in ("typer.run", "typer.Typer"):  # backbone.cli.commands.run_main, script_app
                found.append(f"{path.relative_to(ROOT)}: {name}")
            elif name in ("typer.Option", "typer.Argument"):
                assert isinstance(call, ast.Call)
                if "help" not in {one.arg for one in call.keywords}:
                    found.append(f"{path.relative_to(ROOT)}:{call.lineno}: no help")
    assert found == []


def scripts_below(*folders: str) -> list[str]:
    """The modules of these folders that are run: `recipes.moji.flow`, `benchmarks.edit`."""
    paths = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    run = [path.relative_to(ROOT).with_suffix("").parts for path in paths if MAIN in path.read_text("utf-8")]
    return [".".join(parts[:-1] if parts[-1] == "__main__" else parts) for parts in run]


def test_every_script_is_run_by_the_programs_command_line() -> None:
    other = []
    for path in (path for folder in ("recipes", "benchmarks") for path in (ROOT / folder).rglob("*.py")):
        _, begun, last = path.read_text(encoding="utf-8").partition(MAIN)
        if begun and not re.search(r"^ +run_(main|app)\(\w+\)$", last, re.MULTILINE):
            other.append(str(path))
    assert other == []


def test_the_scripts_that_users_run_answer_help_and_a_misspelt_flag_without_torch() -> None:
    quick = scripts_below("recipes/edit", "recipes/align")
    quick += ["benchmarks.memory", "benchmarks.speed.large", "benchmarks.speed.scale"]
    quick += ["recipes.moji.data.tokenizer"]
    assert len(quick) >= 11
    # None of them can be imported then
    answer_help(quick, 'sys.modules.update(dict.fromkeys(("torch", "diffusers", "transformers")))')


@pytest.mark.slow
def test_every_script_answers_help_and_a_misspelt_flag() -> None:
    answer_help(scripts_below("recipes", "benchmarks"))


def answer_help(scripts: list[str], before: str = "") -> None:
    """Asserts that each ends with status 0 where it is asked for help, and with 2 for a flag that it does not have."""
    code = f"""
import runpy, sys
{before}
for script in {scripts}:
    for word, status in (("--help", 0), ("--hlep", 2)):
        sys.argv = [script, word]
        try:
            runpy.run_module(script, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            assert end.code == status, (script, word, end.code)
        else:
            raise AssertionError(script)
"""
    done = run(sys.executable, "-c", code, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize("package", ["backbone", "recipes", "benchmarks"])
def test_nobody_is_told_that_torchvision_is_missing(package: str) -> None:
    """diffusers' pipelines ask for an image processor that transformers has with torchvision and without."""
    done = run(sys.executable, "-c", f"import {package}; from diffusers import StableDiffusionPipeline")
    assert done.returncode == 0 and "torchvision" not in done.stderr


def test_what_else_transformers_says_is_heard() -> None:
    logger = logging.getLogger("transformers.utils.import_utils")
    said = ("`CLIPImageProcessor` requires torchvision (not installed); falling back to …", "another thing")
    records = [logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None) for text in said]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


@every_command
def test_hyphens_and_underscores_are_read_alike(name: str) -> None:
    command, ctx = COMMANDS[name], context_of(name)
    for param in command.params:
        if param.param_type_name != "option":
            continue
        for flag in (*param.opts, *param.secondary_opts):
            for spelling in (flag, "--" + flag[2:].replace("-", "_")):
                words = [spelling] if param.is_flag else [spelling, "1"]
                read, rest, _ = command.make_parser(ctx).parse_args(list(words))
                assert param.name in read and rest == [], spelling


@every_command
def test_help_shows_hyphens(name: str) -> None:
    if not name.endswith("train"):
        assert all(
            flag == hyphenate(flag)
            for param in COMMANDS[name].params
            for flag in param.opts[:1]
            if flag[:1] == "-"
        )
        assert re.findall(r"^  --\w*_", help_of(name), flags=re.MULTILINE) == []


# One vocabulary ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "spelling", "parameter"),
    [
        ("customize sample", "--num_images_per_prompt", "count"),
        ("customize sample", "--num_inference_steps", "steps"),
        ("customize sample", "--guidance_scale", "guidance"),
        ("customize sample", "--negative_prompt", "negative"),
        ("customize sample", "--pretrained_model_name_or_path", "model"),
        ("customize sample", "--mixed_precision", "precision"),
        ("customize sample", "--output_dir", "out"),
        ("customize sample", "--sample_batch_size", "batch"),
        ("customize sample", "--lora_scale", "scale"),
        ("customize sample", "--validation_prompt", "prompts"),
        ("customize sample", "--from_file", "prompts"),
        ("customize check", "--instance_data_dir", "images"),
        ("customize check", "--train_data_dir", "images"),
        ("customize export", "--save_precision", "precision"),
        ("customize resize", "--new_rank", "rank"),
        ("edit sdedit", "--mask_image", "mask"),
        ("edit sdedit", "--num_images_per_prompt", "count"),
        ("edit invert-and-replace", "--source_prompt", "source"),
        ("edit invert-and-replace", "--target_prompt", "targets"),
        ("align sample", "--num_images_per_prompt", "count"),
        ("align compare", "--num_inference_steps", "steps"),
    ],
)
def test_other_tools_spellings_are_understood_and_not_shown(name: str, spelling: str, parameter: str) -> None:
    command, ctx = COMMANDS[name], context_of(name)
    read, _, _ = command.make_parser(ctx).parse_args([spelling, "1"])
    assert parameter in read
    assert spelling not in help_of(name) and hyphenate(spelling) not in help_of(name)


@pytest.mark.parametrize(
    ("flag", "names"),
    [
        ("--count", ("customize sample", "customize evaluate", "edit sdedit", "edit remove", "align sample",
                     "align compare", "edit interpolate")),
        ("--prompts", ("customize sample", "customize evaluate", "edit sdedit", "edit invert", "edit remove",
                       "edit interpolate", "align sample", "align compare")),
        ("--concept", ("customize sample", "align sample", *(f"edit {name}" for name in (
            "invert", "invert-and-replace", "sdedit", "flow-edit", "remove", "compose", "interpolate")))),
        ("--scale", ("customize sample", "align sample", "align compare", "edit sdedit", "edit interpolate")),
        ("--resolution", ("customize sample", "align sample", "align compare")),
        ("--batch", ("customize sample", "align sample", "align compare")),
        ("--json", ("customize check", "customize info", "customize evaluate", "customize sample", "align check",
                    "align evaluate", "align sample", "align compare")),
    ],
)  # fmt: skip
def test_one_thing_has_one_name(flag: str, names: tuple[str, ...]) -> None:
    for name in names:
        assert any(flag in param.opts for param in COMMANDS[name].params), name


def test_no_message_names_a_package_that_is_not_on_the_index() -> None:
    named = set()
    for package in (*PROGRAMS, "limner", "backbone"):
        for path in (ROOT / package).rglob("*.py"):
            for words in re.findall(r"pip install ([\w \[\]'-]+)", path.read_text(encoding="utf-8")):
                named |= {word for word in words.split() if not word.startswith("-")}
    assert named and {name for name in named if not name.startswith("limner")} <= ON_THE_INDEX
