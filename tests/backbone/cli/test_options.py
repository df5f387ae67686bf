"""Options of dataclasses, and the page of other trainers' spellings, docs/spellings.md, which this module writes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import typer
import typer.main

import align.cli
import align.settings
import customize.cli
import customize.settings
import edit.cli
from backbone.cli.options import list_fields
from backbone.cli.sampling import SAMPLERS_ELSEWHERE
from backbone.training.settings import RunOptions
from customize.control_settings import ControlSettings
from tests.backbone.cli.small_command import Parent, Settings
from tests.backbone.cli.train_commands import DOG, USUAL, parse_train

ROOT = Path(__file__).parents[3]
PAGE = ROOT / "docs" / "spellings.md"
PROGRAMS = {"customize": customize.cli.app, "edit": edit.cli.app, "align": align.cli.app}


def test_a_subclass_that_changes_a_default_keeps_what_was_said() -> None:
    assert list_fields(Settings)["steps"].default == 20
    assert list_fields(Settings)["steps"].option == list_fields(Parent)["steps"].option


def test_importing_the_options_imports_neither_torch_nor_numpy_nor_rich() -> None:
    script = (
        "import sys, backbone.cli.options, backbone.training.settings\n"
        "assert not {'torch', 'numpy', 'rich', 'yaml'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


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
    heard = parse_train(customize.cli.app, f"customize train {flags}", monkeypatch, customize.training.start)
    assert customize.settings.resolve_settings({**DOG, "token_words": "", **heard}, USUAL)


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
            "model's own. diffusers' `from_config` replaces the spacing too (DPM-Solver++ and UniPC leave out the",
            "cleanest of S + 1 steps unless it is `trailing`), so images of these two match diffusers' if the model's",
            "folder names that scheduler.",
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
        for one in list_fields(each).values():
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
        flags_of = {option.name: option.opts[0] for option in one.params}
        for option in one.params:
            flags = [flag for flag in option.opts if flag.startswith("--")]
            if option.hidden and not flags[0].startswith("--no-"):  # a switch, which means a value of another
                flag = flags_of[option.name.partition("_as_")[0]]
                others = f"`--{flags[0][2:].replace('-', '_')}` (as `{option.help}`)"
                rows.setdefault((flag, others), []).append(name)
            elif len(flags) > 1 and not option.hidden:
                others = ", ".join("`--" + flag[2:].replace("-", "_") + "`" for flag in flags[1:])
                rows.setdefault((flags[0], others), []).append(name)
    lines = [
        f"| `{flag}` | {others} | {', '.join(names)} |" for (flag, others), names in sorted(rows.items())
    ]
    return "\n".join(["| option | is understood too | of |", "| --- | --- | --- |", *lines]) + "\n"


def test_the_page_of_spellings_is_what_the_code_understands() -> None:
    assert PAGE.read_text(encoding="utf-8") == page()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
