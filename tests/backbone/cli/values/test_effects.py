"""Settings without effect are refused, beside others and beside `--resume`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import align.settings
import customize.settings
from backbone.cli.options import list_fields
from backbone.cli.values.effects import refuse_idle
from backbone.io.console import UserError
from backbone.io.files import write_json
from tests.backbone.cli.train_commands import DOG, ONLINE, TRAINS


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
    known = list_fields(declared)
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
