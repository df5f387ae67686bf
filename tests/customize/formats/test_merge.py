"""Adapters added up, cut, extracted and baked: checked against the weights that they stand for."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import Concept, read_concept
from backbone.adapters.embeddings import add_tokens
from backbone.adapters.lora import LORA_WEIGHTS, load_lora
from backbone.io.console import UserError
from backbone.io.files import list_files, open_tensors, read_json, read_tensors, write_json, write_tensors
from backbone.models.model import Backbone
from customize.formats import model_weights
from customize.formats.adapter import AdapterFile
from customize.formats.factors import LayerUpdate, fit_lora, sum_loras, truncate_lora
from customize.formats.merging.bake import add_tokens as bake_tokens
from customize.formats.merging.bake import bake
from customize.formats.merging.merge import (
    MergeInput,
    extract_lora,
    merge_exact,
    merge_to_rank,
    parse_strength,
    read_input,
    read_inputs,
    resize_adapter,
    sum_weight_deltas,
)
from customize.formats.merging.merged_run import check_destination, resolve_tokens, save_merged
from customize.formats.read import read_adapter
from customize.formats.write import compare_updates, fill_output, refuse_inside, write_adapter
from tests.customize.adapters import (
    modules_of,
    outputs,
    put_into,
    random_adapter,
    random_layer,
    whole_pipeline,
)
from tests.tiny import tiny_pipeline, tiny_pixart, tiny_z_image

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def some(tiny_folder: Path) -> dict[str, nn.Module]:
    return modules_of(whole_pipeline(tiny_folder))


@pytest.fixture
def run(tmp_path: Path, tiny_folder: Path, some: dict[str, nn.Module]) -> Make:
    """Writes a run folder with a random adapter on the UNet."""

    def make(name: str, *, seed: int = 0, token: str = "[V]", words: str = "bcd", mark: str = "") -> Path:
        folder = tmp_path / name
        folder.mkdir()
        chosen = {key: module for key, module in some.items() if key.startswith("unet.") and mark in key}
        write_adapter(folder / LORA_WEIGHTS, random_adapter(chosen, seed=seed, alphas=(2.0, 3.0)), "peft")
        fingerprint = Backbone.open(str(tiny_folder)).fingerprint
        Concept("lora", str(tiny_folder), fingerprint, {token: words}, "dog", LORA_WEIGHTS).write(folder)
        return folder

    return make


def test_a_linear_merge_is_the_weighted_sum(run: Make) -> None:
    parts = read_inputs([f"{run('a', seed=1)}:0.8", f"{run('b', seed=2, mark='attn')}:-0.5"])
    whole = merge_exact(parts)
    for name, layer in whole.layers.items():
        expected = sum(
            part.strength * part.adapter.layers[name].delta_weight()
            for part in parts
            if name in part.adapter.layers
        )
        torch.testing.assert_close(layer.delta_weight(), expected, atol=1e-6, rtol=1e-5)
    assert len({layer.alpha for layer in whole.layers.values()}) == 1


def test_a_merge_at_full_rank_loses_nothing_and_at_a_lower_one_what_it_says(run: Make) -> None:
    parts = read_inputs([str(run("a", seed=1)), str(run("b", seed=2))])
    exact = merge_exact(parts)
    same, loss = merge_to_rank(parts, 8)
    assert loss.energy_kept == pytest.approx(1, abs=1e-6)
    assert compare_updates(exact, same)[0] < 1e-3
    low, loss = merge_to_rank(parts, 2)
    lost = sum(
        float((exact.layers[n].delta_weight() - low.layers[n].delta_weight()).square().sum())
        for n in exact.layers
    )
    total = sum(float(exact.layers[n].delta_weight().square().sum()) for n in exact.layers)
    assert loss.error == pytest.approx((lost / total) ** 0.5, rel=1e-4)
    assert all(layer.rank <= 2 for layer in low.layers.values())


def test_no_matrix_of_the_rank_is_nearer_than_a_cut(some: dict[str, nn.Module]) -> None:
    random = torch.Generator().manual_seed(0)
    layer = random_layer(nn.Conv2d(6, 9, 3), 5, 2.0, random)
    found = truncate_lora(layer, rank=2)
    values = torch.linalg.svdvals(layer.delta_weight().double())
    assert found.kept == pytest.approx(float(values[:2].square().sum()), rel=1e-5)
    assert found.total == pytest.approx(layer.squared_norm(), rel=1e-5)
    assert found.layer.factors["down"].shape == (2, 6, 3, 3)
    assert found.layer.factors["up"].shape == (9, 2, 1, 1)
    whole = fit_lora(layer.delta_weight().reshape(9, 6, 3, 3), rank=2)
    torch.testing.assert_close(whole.layer.delta_weight(), found.layer.delta_weight(), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("shape", [(7, 30), (30, 7), (5, 4, 3, 3), (40, 2, 3, 3)])
def test_a_fit_of_full_rank_is_the_change_itself(shape: tuple[int, ...]) -> None:
    change = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = fit_lora(change, rank=99)
    torch.testing.assert_close(found.layer.delta_weight(), change.flatten(1), atol=1e-5, rtol=1e-4)
    assert found.kept == pytest.approx(found.total)


def test_singular_values_by_hand() -> None:
    found = fit_lora(torch.diag(torch.tensor([3.0, 4.0, 0.0])), energy=0.6)
    assert found.layer.rank == 1
    assert found.kept == pytest.approx(16)
    assert found.total == pytest.approx(25)
    torch.testing.assert_close(found.layer.delta_weight(), torch.diag(torch.tensor([0.0, 4.0, 0.0])))


def test_an_untrained_layer_is_cut_to_rank_one() -> None:
    layer = LayerUpdate("lora", {"down": torch.randn(4, 6), "up": torch.zeros(5, 4)}, 4, 4.0)
    found = truncate_lora(layer, energy=0.9)
    assert found.layer.rank == 1
    assert not found.layer.delta_weight().any()


def test_the_norm_needs_no_product(some: dict[str, nn.Module]) -> None:
    for layer in random_adapter(some).layers.values():
        assert layer.squared_norm() == pytest.approx(float(layer.delta_weight().square().sum()), rel=1e-4)


def test_resizing_by_energy_keeps_that_share_in_every_layer(some: dict[str, nn.Module]) -> None:
    adapter = random_adapter(some)
    small, loss = resize_adapter(adapter, energy=0.8)
    assert loss.energy_kept >= 0.8
    for name, layer in small.layers.items():
        assert layer.squared_norm() >= 0.8 * adapter.layers[name].squared_norm() * (1 - 1e-6)
    assert loss.lowest < loss.highest


def test_a_sum_of_one_is_itself() -> None:
    layer = random_layer(nn.Linear(5, 4), 3, 2.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(sum_loras([layer], [1.0]).delta_weight(), layer.delta_weight())


# Baking and extracting.


def test_a_baked_pipeline_draws_as_the_adapters_do(run: Make, tiny_folder: Path, tmp_path: Path) -> None:
    parts = read_inputs([f"{run('a', seed=1)}:0.7", f"{run('b', seed=2)}:0.4"])
    bake(parts, str(tiny_folder), tmp_path / "baked")
    defined = whole_pipeline(tiny_folder)
    put_into(defined, merge_exact(parts))
    assert (outputs(whole_pipeline(tmp_path / "baked")) - outputs(defined)).abs().max() < 1e-5
    assert not list(tmp_path.glob(".*"))


def test_dora_is_baked_by_its_definition(
    tiny_folder: Path, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    adapter = random_adapter(some, dora=True)
    bake([MergeInput(Path("a"), 1.0, adapter)], str(tiny_folder), tmp_path / "baked")
    defined = whole_pipeline(tiny_folder)
    put_into(defined, adapter)
    assert (outputs(whole_pipeline(tmp_path / "baked")) - outputs(defined)).abs().max() < 1e-5


def test_half_precision_weights_stay_half(
    tiny_folder: Path, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    half = tmp_path / "half"
    pipeline = whole_pipeline(tiny_folder)
    pipeline.to(torch.float16)
    pipeline.save_pretrained(half)
    bake([MergeInput(Path("a"), 1.0, random_adapter(some))], str(half), tmp_path / "baked")
    tensors, _ = read_tensors(next((tmp_path / "baked" / "unet").glob("*.safetensors")))
    assert {value.dtype for value in tensors.values()} == {torch.float16}


def test_whole_weights_are_baked_and_merged_as_differences(
    run: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    full = run("full")
    moved = {"conv_in.weight": torch.full((16, 4, 3, 3), 0.25), "conv_in.bias": torch.full((16,), 0.5)}
    write_tensors(full / "moved.safetensors", moved)
    replace(read_concept(full), kind="full", weights="", changed="moved.safetensors").write(full)
    part = read_input(full, 0.5)
    assert part.adapter.layers == {}
    bake([part], str(tiny_folder), tmp_path / "baked")
    before, after = (
        read_tensors(next((folder / "unet").glob("*.safetensors")))[0]
        for folder in (tiny_folder, tmp_path / "baked")
    )
    torch.testing.assert_close(after["conv_in.weight"], before["conv_in.weight"] + 0.125)
    torch.testing.assert_close(after["conv_in.bias"], before["conv_in.bias"] + 0.25)
    lora, loss = merge_to_rank([part], 1)
    assert set(lora.layers) == {"unet.conv_in"}
    assert loss.outside == pytest.approx(16 * 0.25**2)
    assert loss.energy_kept < 1
    save_merged(tmp_path / "both", merge_exact([part]), [part], weight_deltas=sum_weight_deltas([part]))
    assert read_concept(tmp_path / "both").changed


def test_learned_words_are_baked_into_the_tokenizer(run: Make, tiny_folder: Path, tmp_path: Path) -> None:
    folder = run("words")
    rows = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    write_tensors(folder / "learned_embeds.safetensors", {"[V]": rows})
    concept = replace(read_concept(folder), words="learned_embeds.safetensors", tokens={"[V]": "[V] [V]_1"})
    concept.write(folder)
    bake([read_input(folder)], str(tiny_folder), tmp_path / "baked")
    baked = whole_pipeline(tmp_path / "baked")
    ids = baked.tokenizer("a [V] [V]_1", add_special_tokens=False)["input_ids"]
    table = baked.text_encoder.get_input_embeddings().weight
    torch.testing.assert_close(table[ids[-2:]].detach(), rows)
    old = whole_pipeline(tiny_folder)
    torch.testing.assert_close(table[: len(table) - 2], old.text_encoder.get_input_embeddings().weight)
    assert read_json(tmp_path / "baked" / "text_encoder" / "config.json")["vocab_size"] == len(table)


def test_extracting_what_was_baked_gives_the_adapter_back(
    tiny_folder: Path, some: dict[str, nn.Module], tmp_path: Path
) -> None:
    adapter = random_adapter(some)
    bake([MergeInput(Path("a"), 1.0, adapter)], str(tiny_folder), tmp_path / "baked")
    found, loss = extract_lora(str(tmp_path / "baked"), str(tiny_folder), rank=4)
    assert loss.energy_kept == pytest.approx(1, abs=1e-5)
    assert compare_updates(adapter, found)[0] < 1e-3
    shapes = {name: layer.factors["down"].shape[1:] for name, layer in adapter.layers.items()}
    assert {name: layer.factors["down"].shape[1:] for name, layer in found.layers.items()} == shapes


def test_extraction_says_how_much_it_explains(tiny_folder: Path, tmp_path: Path) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    _, low = extract_lora(str(other), str(tiny_folder), rank=1)
    found, high = extract_lora(str(other), str(tiny_folder), rank=8)
    assert 0 < low.energy_kept < high.energy_kept < 1
    assert high.outside > 0 and re.search(r"% of it is in biases, norms and embeddings", str(high))
    write_adapter(tmp_path / "e.safetensors", found, "diffusers")


def test_extraction_reads_each_header_once(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def note(path: Path) -> Callable[[str], torch.Tensor]:
        opened.append(path.parent.name)
        return open_tensors(path)

    monkeypatch.setattr(model_weights, "open_tensors", note)
    extract_lora(str(tiny_pipeline(tmp_path / "other", seed=1)), str(tiny_folder), rank=1)
    assert sorted(opened) == ["text_encoder"] * 2 + ["unet"] * 2


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.slow)])
def test_what_half_precision_has_rounded_is_not_extracted(
    dtype: torch.dtype, tiny_folder: Path, tmp_path: Path
) -> None:
    def rounded(name: str, layers: tuple[str, ...]) -> tuple[str, str]:
        folder = tmp_path / name
        shutil.copytree(tiny_folder, folder)
        file = folder / "unet" / "diffusion_pytorch_model.safetensors"
        tensors, metadata = read_tensors(file)
        for layer in layers:
            tensors[layer] = tensors[layer] + 0.1 * torch.outer(torch.arange(32.0), torch.ones(32))
        file.unlink()
        write_tensors(file, {key: value.to(dtype) for key, value in tensors.items()}, metadata)
        return str(folder), str(tiny_folder)

    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    for models in (rounded("tuned", (f"{layer}.weight",)), rounded("again", (f"{layer}.weight",))[::-1]):
        found, loss = extract_lora(*models, rank=1)
        assert list(found.layers) == [f"unet.{layer}"] and loss.energy_kept > 0.999 and loss.outside == 0
        assert "no LoRA holds" not in str(loss)
    with pytest.raises(UserError, match="differs"):
        extract_lora(*rounded("same", ()), rank=1)


def test_the_same_model_twice_has_nothing_to_extract(tiny_folder: Path) -> None:
    with pytest.raises(UserError, match="differs"):
        extract_lora(str(tiny_folder), str(tiny_folder), rank=2)


def test_a_text_encoder_that_no_lora_is_read_of_is_left_out_of_what_is_extracted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_pixart(tmp_path / "base")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    for part, ends in (
        ("text_encoder", (".q.weight", "shared.weight")),
        ("transformer", ("0.attn1.to_q.weight",)),
    ):
        (file,) = (tuned / part).glob("*.safetensors")
        tensors, metadata = read_tensors(file)
        changed = {name: value + 0.1 for name, value in tensors.items() if name.endswith(ends)}
        write_tensors(file, tensors | changed, metadata)
    found, loss = extract_lora(str(tuned), str(base), rank=1)
    assert list(found.layers) == ["transformer.transformer_blocks.0.attn1.to_q"] and loss.energy_kept > 0.99
    assert (
        "text_encoder differs in 2 layers, which are left out: of text encoders, only LoRAs of CLIP are read."
        in " ".join(capsys.readouterr().err.split())
    )
    assert write_adapter(tmp_path / "a.safetensors", found, "peft") < 1e-6


def test_models_that_predict_different_things_are_told_when_their_difference_is_extracted(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny_pipeline(tmp_path / "other", seed=1)
    record = other / "scheduler" / "scheduler_config.json"
    before = read_json(record)

    def told(**changes: object) -> str:
        write_json(record, before | changes)
        extract_lora(str(other), str(tiny_folder), rank=1)
        return capsys.readouterr().err

    assert "predict" not in told()
    said = told(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert f"{other} predicts v and {tiny_folder} predicts ε: on {tiny_folder} as it is" in " ".join(
        said.split()
    )


# Runs.


def test_a_merged_run_keeps_both_concepts_and_is_loaded_by_ours(
    run: Make, tmp_path: Path, tiny_folder: Path
) -> None:
    parts = read_inputs([str(run("a", seed=1)), str(run("b", seed=2, token="[W]", words="fgh"))])
    tokens = save_merged(tmp_path / "ab", merge_exact(parts), parts)
    assert tokens == {"[V]": "bcd", "[W]": "fgh"}
    concept = read_concept(tmp_path / "ab")
    assert concept.tokens == tokens
    loaded, defined = whole_pipeline(tiny_folder), whole_pipeline(tiny_folder)
    load_lora(concept.weights_path, loaded.unet, "a")
    put_into(defined, merge_exact(parts))
    assert (outputs(loaded) - outputs(defined)).abs().max() < 1e-5


def test_a_token_that_is_taken_gets_a_number(capsys: pytest.CaptureFixture[str]) -> None:
    def concept(words: str) -> Concept:
        return Concept("lora", "moji", "x", {"[V]": words}, "dog")

    first, second = resolve_tokens([concept("bcd"), concept("fgh")])
    assert (first, second) == ({"[V]": ("[V]", "bcd")}, {"[V]": ("[V2]", "fgh")})
    assert "[V2]" in capsys.readouterr().err
    _, learned = resolve_tokens([concept("[V] [V]_1"), concept("[V] [V]_1")])
    assert learned == {"[V]": ("[V2]", "[V2] [V2]_1")}


# Mistakes.


def test_runs_of_different_models_are_not_merged(run: Make) -> None:
    first, second = run("a"), run("b")
    replace(read_concept(second), fingerprint="other").write(second)
    with pytest.raises(UserError, match="different weights"):
        read_inputs([str(first), str(second)])


def test_a_run_from_before_every_tensor_counted_is_merged_with_one_of_today(
    run: Make, tiny: Backbone
) -> None:
    name, (now, before) = str(tiny.location.folder), tiny.fingerprints
    first, second = run("a"), run("b", seed=1)
    for folder, fingerprint in ((first, before), (second, now)):
        replace(read_concept(folder), fingerprint=fingerprint, model=name).write(folder)
    assert len(read_inputs([str(first), str(second)])) == 2


def test_an_adapter_that_is_merged_with_itself_is_told(run: Make, capsys: pytest.CaptureFixture[str]) -> None:
    first, copy, other = run("a"), run("b"), run("c", seed=1)
    read_inputs([str(first), f"{first / '..' / 'a'}:0.5"])
    assert "a is given twice: its strengths add up to 1.5" in capsys.readouterr().err
    read_inputs([str(first), str(other)])
    assert not capsys.readouterr().err
    read_inputs([str(first), str(copy)])
    assert "hold the same weights: their strengths add up" in capsys.readouterr().err
    adapter = read_adapter(first)
    layers = {name: replace(layer, alpha=2 * layer.alpha) for name, layer in adapter.layers.items()}
    write_adapter(first.parent / "stronger.safetensors", AdapterFile(layers), "peft")
    read_inputs([str(first), str(first.parent / "stronger.safetensors")])
    assert not capsys.readouterr().err


def test_adapters_of_other_widths_are_not_merged(run: Make, tmp_path: Path) -> None:
    first = run("a", mark="conv_in")
    wide = AdapterFile({"unet.conv_in": random_layer(nn.Conv2d(4, 20, 3), 2, 1.0, torch.Generator())})
    write_adapter(tmp_path / "wide.safetensors", wide, "kohya")
    with pytest.raises(UserError, match="16 × 36 in one and 20 × 36"):
        read_inputs([str(first), str(tmp_path / "wide.safetensors")])


def test_an_adapter_of_another_model_is_not_baked(run: Make, tmp_path: Path, tiny_folder: Path) -> None:
    strange = AdapterFile({"unet.nowhere": random_layer(nn.Linear(4, 4), 2, 1.0, torch.Generator())})
    with pytest.raises(UserError, match=r"unet\.nowhere"):
        bake([MergeInput(Path("s"), 1.0, strange)], str(tiny_folder), tmp_path / "baked")
    assert not (tmp_path / "baked").exists()


def test_a_change_that_the_model_s_numbers_do_not_hold_is_not_baked(
    run: Make, tmp_path: Path, tiny_folder: Path
) -> None:
    model = Path(shutil.copytree(tiny_folder, tmp_path / "half"))
    for path in (model / "unet").glob("*.safetensors"):
        tensors, metadata = read_tensors(path)
        write_tensors(path, {name: value.half() for name, value in tensors.items()}, metadata)
    out = tmp_path / "baked"
    with pytest.raises(UserError, match=r"larger than numbers of float16 can be.*bake into a model in fp32"):
        bake(read_inputs([f"{run('a')}:1e9"]), str(model), out)
    assert not out.exists()
    bake(read_inputs([f"{run('b')}:1e9"]), str(tiny_folder), out)


def test_scales_that_are_not_one_for_each_input_of_a_kernel_are_refused_before_anything_is_baked(
    tmp_path: Path, tiny_folder: Path
) -> None:
    """Nine inputs of one place, or one of nine places: the factors alone do not say."""
    layer = random_layer(nn.Conv2d(4, 16, 3), 2, 1.0, torch.Generator())
    matrices = {name: value.flatten(1) for name, value in layer.factors.items()}
    for inputs in (4, 9, 12):
        scaled = replace(layer, factors=matrices, magnitude=torch.ones(1, inputs))
        part = MergeInput(Path("s"), 1.0, AdapterFile({"unet.conv_in": scaled}))
        if inputs == 4:
            assert bake([part], str(tiny_folder), tmp_path / "right") == 1
            continue
        with pytest.raises(
            UserError, match=rf"unet\.conv_in in s are \[1, {inputs}\] for a layer of 4 inputs"
        ):
            bake([part], str(tiny_folder), tmp_path / "baked")
        assert not (tmp_path / "baked").exists()


def test_strengths_that_add_nothing_or_too_much_are_told(
    run: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = run("a"), run("b", token="[W]")
    with pytest.raises(UserError, match="All strengths are 0"):
        read_inputs([f"{first}:0", f"{second}:0"])
    read_inputs([f"{first}:0", str(second)])
    read_inputs([f"{first}:0.5", f"{first}:-0.5"])
    said = capsys.readouterr().err
    assert f"{first} has the strength 0, so it adds nothing." in said
    assert "its strengths add up to 0, so it adds nothing." in said
    read_inputs([f"{first}:80", str(second)])
    said = " ".join(capsys.readouterr().err.split())
    assert (
        f"At 80 times the strength that they were learned at, the weights of {first} tear images apart"
        in said
    )
    assert "0.8" in said
    parts = read_inputs([f"{first}:1e39", str(second)])
    with pytest.raises(UserError, match=r"larger than numbers can be\. Lower its strength"):
        save_merged(tmp_path / "m.safetensors", merge_exact(parts), parts)
    layer = LayerUpdate("lora", {"down": torch.full((1, 4), 1e30), "up": torch.full((4, 1), 1e30)}, 1, 1.0)
    with pytest.raises(UserError, match=r"the change of unet\.conv_in is larger than numbers can be"):
        write_adapter(tmp_path / "m.safetensors", AdapterFile({"unet.conv_in": layer}), "peft")
    assert not (tmp_path / "m.safetensors").exists()


def test_a_merge_is_not_written_into_what_it_is_made_of(run: Make, tmp_path: Path, tiny_folder: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(tiny_folder, model)
    parts = read_inputs([str(run("a")), str(run("b", token="[W]"))])
    before = list_files(tmp_path)
    for out, inside in ((model / "new", model), (model / "unet" / "x", model), (parts[1].source / "x", "b")):
        with pytest.raises(UserError, match=f"lies in .*{inside}, which is read for it"):
            bake(parts, str(model), out)
    with pytest.raises(UserError, match=r"lies in .*a, which is read for it"):
        check_destination(parts[0].source / "x", parts)  # which the command asks before it merges
    with pytest.raises(UserError, match=r"lies in .*model, which is read for it"):
        refuse_inside(model / "unet" / "x.safetensors", (str(tiny_folder), str(model)))
    assert list_files(tmp_path) == before


def test_of_two_merges_into_one_folder_one_wins_whole(run: Make, tmp_path: Path) -> None:
    parts, out = read_inputs([str(run("a")), str(run("b", token="[W]"))]), tmp_path / "out"
    with fill_output(out) as unfinished:
        (unfinished / "concept.json").write_text("first")
        with pytest.raises(UserError, match=r"Name another folder|Another process is writing"):
            save_merged(out, merge_exact(parts), parts)
    assert [path.name for path in list_files(out)] == ["concept.json"]
    assert (out / "concept.json").read_text() == "first"


def test_a_model_whose_parts_are_linked_is_baked_whole(run: Make, tmp_path: Path, tiny_folder: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for part in tiny_folder.iterdir():
        (linked / part.name).symlink_to(part.resolve())
    parts = read_inputs([str(run("a"))])
    bake(parts, str(linked), tmp_path / "one")
    bake(parts, str(tiny_folder), tmp_path / "two")
    first, second = list_files(tmp_path / "one"), list_files(tmp_path / "two")
    assert [file.read_bytes() for file in first] == [file.read_bytes() for file in second]


def test_a_strength_is_what_follows_the_last_colon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert parse_strength("runs/a:0.8") == (Path("runs/a"), 0.8)
    assert parse_strength("runs/a") == (Path("runs/a"), 1.0)
    assert parse_strength("c:/runs/a") == (Path("c:/runs/a"), 1.0)
    with pytest.raises(UserError, match=r"runs/dog:0\.8"):
        parse_strength("runs/a:nan")
    for text, meant in (("0.5", "runs/dog:0.5"), ("runs/a=.5", "runs/a:.5"), ("runs/a@-1", "runs/a:-1")):
        with pytest.raises(UserError, match=re.escape(f"A strength stands behind a colon: {meant}.")):
            parse_strength(text)
    for text, meant in (("a:0,8", "a:0.8"), ("runs/a:80%", "runs/a:0.8"), ("a:1.5x", "a:1.5")):
        with pytest.raises(UserError, match=re.escape(f"Write it with a point: {meant}.")):
            parse_strength(text)
    assert parse_strength("c:/a,5") == (Path("c:/a,5"), 1.0)
    monkeypatch.chdir(tmp_path)
    Path("a=5").mkdir()
    assert parse_strength("a=5") == (Path("a=5"), 1.0)  # a run may be called so
    Path("dog:2").mkdir()
    assert parse_strength("dog:2") == (Path("dog:2"), 1.0)
    assert parse_strength("dog:2:0.5") == (Path("dog:2"), 0.5)
    Path("dog").mkdir()
    assert parse_strength("dog:2") == (Path("dog"), 2.0)


def test_a_run_is_read_as_what_it_holds(run: Make) -> None:
    folder = run("a")
    assert compare_updates(read_input(folder).adapter, read_adapter(folder))[0] == 0


def test_learned_words_of_two_runs_live_on_in_their_merge(
    run: Make, tiny_folder: Path, tmp_path: Path
) -> None:
    folders = [run("a", seed=1), run("b", seed=2), run("c", seed=3, token="[W]", words="fgh")]
    rows = [torch.randn(2, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    for folder, values in zip(folders, rows, strict=False):
        write_tensors(folder / "learned_embeds.safetensors", {"[V]": values})
        concept = read_concept(folder)
        replace(concept, words="learned_embeds.safetensors", tokens={"[V]": "[V] [V]_1"}).write(folder)
    parts = read_inputs([str(folder) for folder in folders])
    tokens = save_merged(tmp_path / "abc", merge_exact(parts), parts)
    assert tokens == {"[V]": "[V] [V]_1", "[V2]": "[V2] [V2]_1", "[W]": "fgh"}
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    load_concepts(model, [read_concept(tmp_path / "abc")])
    ids = model.text_encoder.tokenizer("[V2] [V2]_1", add_special_tokens=False)["input_ids"]
    learned = model.text_encoder.slots[0].model.get_input_embeddings()(torch.tensor([ids]))[0]
    torch.testing.assert_close(learned, rows[1])


@pytest.mark.parametrize("write", [tiny_pixart, tiny_z_image], ids=["pixart", "z-image"])
def test_learned_words_are_baked_into_every_kind_of_text_encoder(
    write: Callable[[Path], Path], tmp_path: Path
) -> None:
    """T5's and Qwen's tables have rows behind the vocabulary, and a Qwen's word has the space before it."""
    folder = write(tmp_path / "model")
    learned, baked = (Backbone.open(str(folder), device="cpu", precision="fp32") for _ in range(2))
    encoder = learned.text_encoder
    rows = torch.randn(2, encoder.slots[0].model.get_input_embeddings().weight.shape[1])
    before = encoder(["a cat"])["hidden"]
    add_tokens(encoder, {"text_encoder": rows}, tokens=["[V]", "[V]_1"])
    bake_tokens(folder, "text_encoder", {"[V]": rows})
    for prompt in ("a [V] [V]_1 cat in the snow", "[V], a cat"):
        theirs, ours = learned.encode_prompts([prompt]), baked.encode_prompts([prompt])
        torch.testing.assert_close(ours.text["hidden"], theirs.text["hidden"], rtol=0, atol=1e-6)
    assert torch.equal(baked.encode_prompts(["a cat"]).text["hidden"], before)
