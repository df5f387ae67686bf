"""Words learned for several text encoders: every way out of a run knows which rows are whose."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

from backbone.adapters.concept import Concept, read_concept
from backbone.adapters.embeddings import EMBEDDINGS_FILE, save_embeddings
from backbone.families.location import Location
from backbone.io.console import UserError
from backbone.io.files import read_tensors
from backbone.models.model import Backbone
from customize.formats.merging.bake import bake
from customize.formats.merging.merge import read_input
from customize.formats.merging.merged_run import rename_embeddings
from customize.formats.model_weights import ModelWeights
from customize.formats.words import export_beside
from customize.methods.lora import refuse_other_encoders
from customize.training.reporting.card import load_words_in_diffusers
from tests.tiny import tiny_pixart, tiny_stable_diffusion_xl

SIDES = {"text_encoder": 16, "text_encoder_2": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion_xl(tmp_path_factory.mktemp("words") / "xl")


@pytest.fixture
def rows() -> dict[str, Tensor]:
    return {
        side: torch.randn(1, width, generator=torch.Generator().manual_seed(width))
        for side, width in SIDES.items()
    }


@pytest.fixture
def run(tmp_path: Path, folder: Path, rows: dict[str, Tensor]) -> Path:
    """A run folder that holds words alone."""
    place = tmp_path / "run"
    place.mkdir()
    save_embeddings(place / EMBEDDINGS_FILE, {"[V]": rows}, metadata={})
    Concept("textual-inversion", str(folder), "", {"[V]": "[V]"}, "dog", words=EMBEDDINGS_FILE).write(place)
    return place


def assert_known(pipeline: Any, rows: dict[str, Tensor]) -> None:
    for side, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        (known,) = getattr(pipeline, tokenizer)("[V]", add_special_tokens=False)["input_ids"]
        table = getattr(pipeline, side).get_input_embeddings().weight
        torch.testing.assert_close(table[known].detach(), rows[side][0])


def test_the_lines_of_a_run_s_readme_give_each_encoder_its_rows(
    run: Path, folder: Path, rows: dict[str, Tensor]
) -> None:
    pipeline = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True)
    exec("\n".join(load_words_in_diffusers(run / EMBEDDINGS_FILE)), {"pipeline": pipeline})
    assert_known(pipeline, rows)


def test_one_encoder_s_words_are_loaded_as_one_file(tmp_path: Path, rows: dict[str, Tensor]) -> None:
    path = tmp_path / EMBEDDINGS_FILE
    save_embeddings(path, {"[V]": {"text_encoder": rows["text_encoder"]}}, metadata={})
    assert load_words_in_diffusers(path) == [f"pipeline.load_textual_inversion({str(path)!r})"]


def test_several_words_of_one_encoder_are_loaded_one_by_one(tmp_path: Path, rows: dict[str, Tensor]) -> None:
    path = tmp_path / EMBEDDINGS_FILE
    loaded: dict[str, Tensor] = {}
    words = {
        token: {"text_encoder": factor * rows["text_encoder"]} for factor, token in enumerate(("[V]", "[W]"))
    }
    save_embeddings(path, words, metadata={})
    pipeline = SimpleNamespace(load_textual_inversion=lambda value, token: loaded.update({token: value}))
    exec("\n".join(load_words_in_diffusers(path)), {"pipeline": pipeline})
    assert torch.equal(loaded["[W]"], rows["text_encoder"]) and not loaded["[V]"].any()
    concept = Concept("merged", "", "", {"[R]": "bcd", "[V]": "[V]", "[W]": "[W]"}, "", words=EMBEDDINGS_FILE)
    first, second = export_beside(
        replace(concept, folder=tmp_path), tmp_path / "dog.safetensors", "diffusers"
    )
    assert (first.name, second.name) == ("dog-V.safetensors", "dog-W.safetensors")
    assert torch.equal(read_tensors(second)[0]["[W]"], rows["text_encoder"])
    one = replace(concept, tokens={"[R]": "bcd", "[V]": "[V]"}, folder=tmp_path)
    assert export_beside(one, tmp_path / "cat.safetensors", "comfyui") == [path]


def test_both_encoders_words_are_baked(
    run: Path, folder: Path, rows: dict[str, Tensor], tmp_path: Path
) -> None:
    bake([read_input(run)], str(folder), tmp_path / "baked")
    assert_known(StableDiffusionXLPipeline.from_pretrained(tmp_path / "baked", local_files_only=True), rows)


def test_other_tools_get_a_file_with_their_names_for_the_encoders(
    run: Path, rows: dict[str, Tensor], tmp_path: Path
) -> None:
    (path,) = export_beside(read_concept(run), tmp_path / "dog.safetensors", "comfyui")
    found, _ = read_tensors(path)
    assert path.name == "dog-V.safetensors"
    torch.testing.assert_close(found["clip_l"], rows["text_encoder"])
    torch.testing.assert_close(found["clip_g"], rows["text_encoder_2"])
    assert export_beside(read_concept(run), tmp_path / "dog.safetensors", "diffusers") == [
        run / EMBEDDINGS_FILE
    ]


def test_a_merge_renames_the_token_and_not_the_encoder(run: Path, rows: dict[str, Tensor]) -> None:
    found = rename_embeddings([read_input(run)], [{"[V]": ("[V2]", "[V2]")}])
    assert set(found) == {"[V2]/text_encoder", "[V2]/text_encoder_2"}
    torch.testing.assert_close(found["[V2]/text_encoder_2"], rows["text_encoder_2"])


def test_a_model_that_is_no_folder_gives_all_its_text_encoders(folder: Path) -> None:
    local = ModelWeights(Location(str(folder), str(folder), {}))
    hub = ModelWeights(Location(str(folder), "somebody/model", {}))
    names = {name for name in local.shapes if name.startswith("text_encoder")}
    assert any(name.startswith("text_encoder_2.") for name in names)
    assert names <= set(hub.shapes)
    some = "text_encoder_2.encoder.layers.1.mlp.fc1.weight"
    torch.testing.assert_close(hub[some], local[some])


def test_an_encoder_that_is_no_clip_carries_no_adapter(tmp_path: Path) -> None:
    model = Backbone.open(str(tiny_pixart(tmp_path / "pixart")), device="cpu", precision="fp32")
    with pytest.raises(UserError, match=r"text_encoder of .* is a T5EncoderModel.*--train-text-encoder"):
        refuse_other_encoders(model)
