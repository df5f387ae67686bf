"""What README.md and docs/ print is run, page by page: shell blocks and Python blocks, with the files that they name.

Each page has an empty folder of its own and runs its blocks in order, so that a block finds what an earlier one wrote.
Only this differs from what is printed: `moji` is replaced by a model with a small random denoiser and autoencoder, the
published models of docs/families/ by random ones of their kind, the numbers in `LARGEST` are lowered, validations take
as few steps and samples, lists of prompts end after a few, and what `ADDED` says is added. A block that cannot run here
is marked `<!-- not run: why -->`, and its commands are parsed instead.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer.main
from PIL import Image

from backbone.cli.commands import script_app
from backbone.models import locate
from customize.evaluation import metrics
from customize.training import evaluation
from tests import tiny

ROOT = Path(__file__).parents[1]
PAGES = {
    path.relative_to(ROOT).as_posix(): path for path in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
}
PROGRAMS = ("customize", "edit", "align", "limner")
PROMPTS = 6  # lines that are left of the example's lists of prompts

# A number printed behind one of these flags, or after `steps=` and the like in Python, is lowered to this.
LARGEST = {
    "--steps": 2,
    "--num-inference-steps": 2,
    "--count": 2,
    "--iterations": 2,
    "--evaluation-steps": 2,
    "--rank": 4,
    "--batch": 2,
    "--frames": 2,
}
# What a command is given beside what is printed, unless it is printed or the command does not have it.
ADDED = {
    "customize train": ("--evaluation-steps", "0"),  # validation takes longer than two steps of training
    "customize train-control": ("--validation-steps", "0", "--sample-steps", "2", "--evaluation-steps", "2"),
    "customize evaluate": ("--count", "1"),
    "customize sample": ("--steps", "2"),
    "customize transfer": ("--steps", "2", "--answers", "1"),
    "customize clip": ("--steps", "2"),
    "align sample": ("--steps", "2"),
    "align train": ("--steps", "2", "--evaluation-draws", "1"),
    "align compare": ("--steps", "2", "--count", "1"),
    "edit keep-background": ("--mask", "left.png"),  # what random weights drew agrees with the source nowhere
    "edit": ("--steps", "2"),
}
FAMILIES = "docs/families/"
LONG = (  # each takes long; README has their main commands
    *("docs/customize.md", "docs/align.md", "docs/index.md"),
    *(page for page in PAGES if page.startswith(FAMILIES)),
)
# What the README's two commands do beside: .ci/run and the test of the wheel install, and this is one of the checks.
ELSEWHERE = (["python3", "-m", "venv"], ["pip", "install"], ["python", "-m", "tests.check"])

BLOCK = re.compile(
    r"^(?:<!-- (?P<marker>[^\n]*) -->\n+)?```(?P<language>sh|python)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: str
    line: int
    language: str
    text: str
    marker: str | None

    @property
    def runs(self) -> bool:
        return not (self.marker or "").startswith("not run: ")


def blocks_of(page: str) -> list[Block]:
    """The shell and Python blocks of a page, in order."""
    text = PAGES[page].read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["text"], found["marker"])
        for found in BLOCK.finditer(text)
    ]


def calls_of(block: Block) -> list[list[str]]:
    """The commands of a shell block as words; a program's folder is left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    calls = [shlex.split(call, comments=True) for line in lines for call in line.split("&&")]
    return [[Path(words[0]).name or words[0], *words[1:]] for words in calls if words]


def own_call(words: list[str]) -> list[str] | None:
    """The call of one of our programs in these words, also when `accelerate launch` starts it."""
    if words[0] in PROGRAMS:
        return words
    if words[:2] == ["accelerate", "launch"] and "-m" in words:
        module, *rest = words[words.index("-m") + 1 :]
        return [module.removesuffix(".cli"), *rest]
    return None


@cache
def group_of(program: str) -> Any:
    """The click group of one of our programs."""
    return typer.main.get_group(importlib.import_module(f"{program}.cli").app)


def command_of(words: list[str]) -> tuple[Any, str, list[str]]:
    """The click command that a call means, its full name, and its arguments."""
    program, *rest = words
    command = group_of(program)
    names = [program]
    while hasattr(command, "commands") and rest and not rest[0].startswith("-"):
        names.append(rest.pop(0))
        context = command.make_context(names[-2], [], resilient_parsing=True)
        found = command.get_command(context, names[-1])
        assert found is not None, f"There is no command {' '.join(names)}."
        command = found
    return command, " ".join(names), rest


def lowered(words: list[str]) -> list[str]:
    """The call with the numbers of `LARGEST` instead of larger ones, and with what `ADDED` says."""
    command, name, _ = command_of(words)
    known = {option for parameter in command.params for option in parameter.opts}
    changed = list(words)
    for place, (flag, value) in enumerate(pairwise(words), start=1):
        # Which takes three images at least
        if flag in LARGEST and value.isdigit() and name != "edit interpolate":
            changed[place] = str(min(int(value), LARGEST[flag]))
    more = iter(ADDED.get(name, ADDED.get(words[0], ())))
    settled = {"--online", "--inversion"} & set(words)  # whose steps the small model says, or the file
    for flag, value in zip(more, more, strict=True):
        if flag in known and flag not in words and not settled:
            changed += [flag, value]
    return changed


CALLS = [
    words
    for page in PAGES
    for block in blocks_of(page)
    if block.language == "sh"
    for words in calls_of(block)
]
# What sentences name: `python -m …`, which may go over the end of a line; … stands for what is left open
INLINE = [
    list(words)
    for words in dict.fromkeys(
        tuple(shlex.split(code.replace("\n", " ")))
        for path in PAGES.values()
        for code in re.findall(r"`(python3? -m [^`]+)`", BLOCK.sub("", path.read_text(encoding="utf-8")))
    )
    if not words[2].endswith("…")
]
ABOUT_BENCHMARKS = (
    "docs/moji.md",
    "docs/scale.md",
    "docs/reproducing.md",
    "docs/control.md",
    "docs/clips.md",
)
OTHERS = ("python3", "pip", ".", "python", "pre-commit")  # what a block that does not run may also call


@pytest.fixture(scope="session")
def small_moji(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.tiny_moji(tmp_path_factory.mktemp("models") / "moji", side=64)


# What makes a random model of the kind that a name of docs/families/ stands for
RANDOM: dict[str, Callable[[Path], Path]] = {
    "sd15": tiny.tiny_pipeline,
    "sdxl": tiny.tiny_stable_diffusion_xl,
    "sd3": tiny.tiny_stable_diffusion_3,
    "flux": tiny.tiny_flux,
    "pixart": tiny.tiny_pixart,
    "z-image": tiny.tiny_z_image,
    "z-image-turbo": partial(tiny.tiny_z_image, shift=3.0),
    "flux2-klein": tiny.tiny_flux2_klein,
    "qwen-image": tiny.tiny_qwen_image,
    "qwen-image-edit": tiny.tiny_qwen_edit,
    "qwen-image-2.1": tiny.tiny_qwen_image21,
    "krea2": tiny.tiny_krea2,
    "krea2-turbo": partial(tiny.tiny_krea2, turbo=True),
    "chroma": tiny.tiny_chroma,
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_moji: Path) -> Path:
    """A folder with a mask in which `moji` is the small model, and a validation takes few steps and samples."""
    monkeypatch.setitem(locate.OWN, "moji", small_moji)
    monkeypatch.setattr(metrics, "SAMPLING_STEPS", LARGEST["--steps"])
    monkeypatch.setattr(evaluation, "NOISE_SAMPLES", LARGEST["--count"])
    monkeypatch.chdir(tmp_path)
    left = Image.new("L", (128, 128))
    left.paste(255, (0, 0, 64, 128))
    left.save("left.png")
    return tmp_path


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] if page in LONG else [])
        for page in PAGES
        if any(block.runs for block in blocks_of(page))
    ],
)
def test_the_blocks_of_a_page_run_in_order(page: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = [block for block in blocks_of(page) if block.runs]
    if page.startswith(FAMILIES):
        said = {word for block in blocks for words in calls_of(block) for word in words}
        for model in said & set(RANDOM):
            monkeypatch.setitem(locate.OWN, model, RANDOM[model](here / "models" / model))
    for block in blocks:
        try:
            if block.language == "python":
                exec(compile(with_fewer_steps(block.text), f"{page}:{block.line}", "exec"), names)
            else:
                for words in calls_of(block):
                    call(words, monkeypatch)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"{page}, line {block.line}: {error}") from error
    CHECKS.get(page, bool)(names)


def check_the_tutorial(names: dict[str, Any]) -> None:
    """The samplers find the circle of radius 2, and inversion leads back."""
    for way in ("by_ode", "by_sde", "by_langevin"):
        assert abs(float(names[way].norm(dim=1).mean()) - 2) < 0.1, way
    there_and_back = names["ddim"](names["noise"], names["predict"], names["fine"])
    assert float((there_and_back - names["points"]).norm(dim=1).mean()) < 0.1


def check_the_lowest_floor(names: dict[str, Any]) -> None:
    """What the comment says: a standard deviation close to 1."""
    assert abs(float(names["clean"].std()) - 1) < 0.05


CHECKS = {"docs/score-to-sampler.md": check_the_tutorial, "docs/how-it-works.md": check_the_lowest_floor}


@pytest.mark.parametrize("words", CALLS, ids=" ".join)
def test_every_call_is_understood_as_it_is_printed(words: list[str]) -> None:
    own = own_call(words)
    if own is not None:
        command, name, arguments = command_of(own)
        command.make_context(name, list(arguments)).close()
    elif words[:2] == ["python", "-m"]:
        require_understood(words)
    else:
        assert words[0] in OTHERS


@pytest.mark.parametrize("words", INLINE, ids=" ".join)
def test_every_module_that_a_sentence_names_exists_and_takes_its_options(words: list[str]) -> None:
    require_understood(words)


def require_understood(words: list[str]) -> None:
    """Asserts that the module of `python -m` exists and that its command has these options; nothing is run."""
    module, *arguments = words[2:]
    if module.split(".")[0] not in ("recipes", "benchmarks", "tests"):
        return
    assert importlib.util.find_spec(module), module
    command = script_of(module)
    if command is None:
        assert arguments == []
        return
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        name = arguments.pop(0)
        assert name in command.commands, f"{module} has no command {name}: {', '.join(command.commands)}"
        command = command.commands[name]
    context = typer.Context(command, info_name=module, **command.context_settings)
    command.make_parser(context).parse_args(arguments)


def script_of(module: str) -> Any:
    """The click command that `python -m` runs: of what a module's last lines hand to `run_main` or `run_app`.

    None for one of tests/ that takes no words.
    """
    loaded = importlib.import_module(module)
    if hasattr(loaded, "__path__"):
        loaded = importlib.import_module(f"{module}.__main__")
    assert loaded.__file__
    source = Path(loaded.__file__).read_text(encoding="utf-8")
    _, begun, last = source.partition('if __name__ == "__main__":')
    assert begun, f"{module} does nothing when it is run"
    run = re.search(r"run_(main|app)\((\w+)\)", last)
    if run is None:
        return None
    app = getattr(loaded, run[2])
    if run[1] == "main":
        app, main = script_app(), app
        app.command()(main)
    return typer.main.get_command(app)


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_that_a_page_names_exists(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    # Recipes and other programs have their own
    text = re.sub(r"`(python3?\s+-m|pip\s|apt-get)[^`]*`", "", text)
    text = re.sub(r"^(python3? -m|pip |accelerate launch .*? -m).*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"accelerate launch .*? -m ", "", text)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    named = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]+", text)}
    known = known_flags() | {"--help", "--version", "--install-completion", "--strict"}
    if page in ABOUT_BENCHMARKS:
        known |= flags_of_benchmarks()
    assert named <= known, named - known


@cache
def flags_of_benchmarks() -> set[str]:
    """What the commands in benchmarks/ and recipes/ take, by their annotated parameters."""
    sources = [
        path.read_text(encoding="utf-8")
        for name in ("benchmarks", "recipes")
        for path in (ROOT / name).rglob("*.py")
    ]
    return {
        f"--{name.replace('_', '-')}"
        for text in sources
        for name in re.findall(r"^    (\w+): Annotated", text, re.MULTILINE)
    }


@cache
def known_flags() -> set[str]:
    """Every spelling of every option of our commands, with hyphens."""
    groups = [group_of(name) for name in ("customize", "edit", "align")]
    parameters = [
        parameter for group in groups for command in group.commands.values() for parameter in command.params
    ]
    flags = {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}
    return {flag.replace("_", "-") for flag in flags}


def call(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs one of our commands in this process; it must end with status 0."""
    if any(words[: len(other)] == other for other in ELSEWHERE):
        return
    assert words[0] in PROGRAMS, f"{words[0]} is not ours: mark the block as not run."
    words = lowered(words)
    monkeypatch.setattr(sys, "argv", words)
    status = group_of(words[0]).main(args=words[1:], prog_name=words[0], standalone_mode=False)
    assert not status, f"{shlex.join(words)} ended with status {status}."
    if words[:2] == ["customize", "example"]:
        for name in ("prompts.txt", "heldout.txt"):
            path = Path(words[2], "example", name)
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
            path.write_text("".join(lines[:PROMPTS]), encoding="utf-8")


def with_fewer_steps(code: str) -> str:
    """Python with the numbers of `LARGEST` after `steps=` and the like."""
    largest = {flag.removeprefix("--").replace("-", "_"): number for flag, number in LARGEST.items()}
    return re.sub(
        rf"\b({'|'.join(largest)})=(\d+)\b",
        lambda found: f"{found[1]}={min(int(found[2]), largest[found[1]])}",
        code,
    )
