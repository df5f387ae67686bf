"""A model's `limner.json`: every key is a setting of its kind and range, or one sentence with the file and the key."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from align.settings import resolve_settings as resolve_align
from backbone.cli.options import list_fields
from backbone.cli.sampling import SamplingSettings
from backbone.io.console import UserError
from backbone.models.defaults import FILE, LEARNED, NETWORKS, EditDefaults, read_defaults, say_few_step_name
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from backbone.models.sample import resolve_sampling
from customize import control_settings
from customize.settings import METHOD_RATES, Settings
from edit.methods.prompt_to_prompt.settings import BY_MODEL


def said(folder: Path, record: Any) -> Path:
    """A `limner.json` with this record."""
    (folder / FILE).write_text(json.dumps(record))
    return folder / FILE


def test_what_a_file_says_is_taken_and_nothing_else(tmp_path: Path) -> None:
    record = {
        "steps": 4,
        "sampler": "dpmpp_2m",
        "sheet_prompts": ["a {}"],
        "learning_rates": {"pairs": 1e-3},
        "condition": {"stop": 0.5, "scales": {"sketch": 1.25}},
        "control": {"learning_rates": {"controlnet": 1e-4}, "rank": 4},
        "edit": {"cross": 0},
        "align": {"beta": 500},
    }
    read = read_defaults(said(tmp_path, record))
    assert read == {**record, "sampler": "dpmpp-2m", "sheet_prompts": ("a {}",)}
    assert read_defaults(said(tmp_path, {})) == {}


def test_of_a_model_that_is_called_as_a_few_step_one_and_drawn_in_many_it_is_said(
    tmp_path: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    many, few = {"steps": 30, "guidance": 7.5}, {"steps": 4, "guidance": 1.0}
    for name, usual, said_so in (
        ("dreamshaperXL_lightningDPMSDE.safetensors", many, True),
        ("stabilityai/sdxl-turbo", many, True),
        ("some_lcm_v1.safetensors", few, False),
        ("z_image_de_turbo.safetensors", many, False),
        ("helcmann.safetensors", many, False),
        ("ZIT_v2.safetensors", many, True),
        ("sdxl_4step_unet.safetensors", many, True),
        ("my-dog-500-steps.safetensors", many, False),
        ("flashlight-v2.safetensors", many, False),
    ):
        say_few_step_name(str(tmp_path / name), usual)
        assert ("which burn the images of such a model" in capsys.readouterr().err) == said_so, name
    folder = shutil.copytree(tiny_folder, tmp_path / "portraits-turbo")
    (folder / FILE).unlink(missing_ok=True)
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    resolve_sampling(SamplingSettings(guidance=1.0), model)
    assert "distilled" not in capsys.readouterr().err
    resolve_sampling(SamplingSettings(), model)
    assert "is called as one that was distilled to few steps" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["moji", "moji-flow"])
def test_the_embedded_models_say_what_can_be_read(name: str) -> None:
    read = read_defaults(EMBEDDED.parent / name / FILE)
    of_pairs = resolve_align({"pairs": "p"}, read)
    assert read["steps"] and (of_pairs.beta, of_pairs.lr_scheduler) == (10_000, "cosine")


@pytest.mark.parametrize(
    ("record", "complaint"),
    [
        ([], "an object is wanted"),
        ({"stepz": 5}, "sets stepz, which is no setting of a model. Did you mean steps?"),
        ({"steps": -5}, "steps in FILE is -5; it is at least 1"),
        ({"steps": 1.5}, "steps in FILE is 1.5, which is not a whole number"),
        ({"steps": None}, "steps in FILE is None, which is not a whole number"),
        ({"sampler": None}, "sampler in FILE is None, which is no text"),
        ({"sampler": "euler z"}, "sampler in FILE is euler z, which is none of ddim, heun"),
        ({"guidance": -1}, "guidance in FILE is -1"),
        ({"guidance_stop": 7}, "guidance_stop in FILE is 7 and must lie between 0 and 1"),
        ({"guidance_start": 0.5, "guidance_stop": 0.5}, "FILE has guidance from 0.5 to 0.5 of the steps"),
        ({"sheet_prompts": []}, "sheet_prompts in FILE is empty"),
        ({"sheet_prompts": [5, {}]}, "sheet_prompts in FILE is not a list of texts"),
        ({"learning_rates": {"lorra": 1e-3}}, "learning_rates of lorra, and there are those of lora, full"),
        ({"learning_rates": 5}, "learning_rates is 5, and an object is wanted"),
        ({"condition": {"strength": 0.5}}, "sets condition.strength, which is no setting"),
        ({"condition": {"scales": {"skech": 2}}}, "condition.scales of skech, and there are those of sketch, lines"),
        ({"condition": {"scales": {"sketch": -1}}}, "condition.scales.sketch in FILE is -1"),
        ({"condition": {"stop": 7}}, "condition.stop in FILE is 7 and must lie between 0 and 1"),
        ({"edit": 5}, "edit is 5, and an object is wanted"),
        ({"edit": {"cross": "x"}}, "edit.cross in FILE is x, which is not a number"),
        ({"edit": {"blend": 1}}, "sets edit.blend, which is no setting"),
        ({"control": {"steps": 0}}, "control.steps in FILE is 0; it is at least 1"),
        ({"align": 5}, "align is 5, and an object is wanted"),
    ],
)  # fmt: skip
def test_what_is_no_setting_or_out_of_range_is_one_sentence_with_the_file(
    tmp_path: Path, record: Any, complaint: str
) -> None:
    file = said(tmp_path, record)
    with pytest.raises(UserError, match=re.escape(complaint.replace("FILE", str(file)))):
        read_defaults(file)


@pytest.mark.parametrize(
    ("section", "complaint"),
    [
        ({"betta": 5}, "limner.json sets align.betta, .* Did you mean beta"),
        ({"beta": "x"}, "align.beta in .*limner"),
    ],
)
def test_what_a_model_says_of_align_is_looked_at_there(section: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        resolve_align({"pairs": "p"}, {"align": section})


def test_it_knows_the_methods_and_networks_that_there_are() -> None:
    assert set(LEARNED) == {*list_fields(Settings)["method"].option.choices, *METHOD_RATES, "pairs"}
    assert NETWORKS == control_settings.NETWORKS
    assert set(list_fields(EditDefaults)) == set(BY_MODEL)


def test_the_page_s_example_can_be_read(tmp_path: Path) -> None:
    page = (EMBEDDED.parents[1] / "docs" / "photographs.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    read = read_defaults(said(tmp_path, json.loads(example)))
    assert read["sampler"] == "dpmpp-2m" and resolve_align({"pairs": "p"}, read).beta == 2000
