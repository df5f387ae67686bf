"""The command that repeats a run, and its record, give the same settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import align.cli
import align.settings
import customize.cli
import customize.control_settings
import customize.settings
from backbone.cli.options import list_fields
from backbone.cli.values.repeat import as_command
from backbone.io.console import UserError
from backbone.io.files import write_json
from backbone.models.model import Backbone
from tests.backbone.cli.train_commands import DOG, ONLINE, TWO, USUAL, parse_train

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
ALIGN: list[dict[str, Any]] = [
    {"pairs": "my pairs"},
    {"pairs": "p", "loss": "ipo", "full": True, "concepts": ("a", "b"), "limit": 5, "skip_bad": True},
    {"pairs": "p", "loss": "kto", "micro_batch": 2, "random_crop": 3, "user": "me", "held_out": 0.0},
    {"pairs": "p", "loss": "dspo", "dspo_pull": 0.5, "safeguard": -1.0, "flip": True},
    {**ONLINE, "rounds": 2, "per_prompt": 3, "sample_steps": 4, "guidance": 1.0},
    {**ONLINE, "loss": "draft", "reward_steps": 2, "checkpointing_steps": 7, "vae_tiling": True},
    {**ONLINE, "loss": "ddpo", "clip_range": 0.1, "rounds": 1},
]


@pytest.mark.parametrize("asked", CUSTOMIZE, ids=str)
def test_the_repeating_command_of_customize_gives_the_same_settings(
    asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = {} if asked.get("method") == "pivotal" else {"token_words": "fgh"}
    named = {**DOG, "token_words": "", **words}
    wanted = customize.settings.resolve_settings({**named, **asked}, USUAL)
    line = customize.settings.as_command(wanted, Path("runs/x"))
    heard = parse_train(customize.cli.app, line, monkeypatch, customize.training.start)
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

    heard = parse_train(align.cli.app, line, monkeypatch, start)
    assert align.settings.resolve_settings(heard, USUAL) == wanted
    assert align.settings.resolve_settings(heard, {}) == wanted  # whatever is usual by then


@pytest.mark.parametrize(
    ("program", "declared", "asked"),
    [
        (customize.settings, customize.settings.Settings, {**DOG, "steps": 600}),
        (
            customize.control_settings,
            customize.control_settings.ControlSettings,
            {"images": "my dog", "condition": "sketch"},
        ),
        (align.settings, align.settings.Settings, {"pairs": "p"}),
        (align.settings, align.settings.Settings, {**ONLINE, "loss": "draft"}),
    ],
)
def test_a_value_that_is_the_default_of_other_models_alone_is_in_the_repeating_command(
    program: Any, declared: type, asked: dict[str, Any]
) -> None:
    found = program.resolve_settings(asked, Backbone.open("moji").defaults)
    line = program.as_command(found, Path("runs/x")).split()
    for name, field in list_fields(declared).items():
        is_by_model = name not in asked and field.flag in line and getattr(found, name) != field.default
        is_number = isinstance(field.default, (int, float))
        if is_by_model and is_number and (field.option.min is None or field.default >= field.option.min):
            said = program.as_command(replace(found, **{name: field.default}), Path("runs/x"))
            assert field.flag in said.split(), name


def test_the_record_of_a_run_is_a_file_of_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from align.training import start

    path = tmp_path / "settings.json"
    for asked in ALIGN:
        wanted = align.settings.resolve_settings(asked, USUAL)
        write_json(path, {"settings": wanted, "command": "align train", "versions": {}})
        heard = parse_train(align.cli.app, f"align train --config {path}", monkeypatch, start)
        assert align.settings.resolve_settings(heard, {}) == wanted


def test_settings_may_be_changed_and_are_checked_again() -> None:
    wanted = customize.settings.resolve_settings(DOG, {})
    with pytest.raises(UserError, match="steps is 0"):
        replace(wanted, steps=0)
    assert as_command("x", replace(wanted, steps=3)).startswith("x --images 'my dog'")
