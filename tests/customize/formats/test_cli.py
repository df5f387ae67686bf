"""The commands about adapter files, from the shell's side."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from backbone.adapters.concept import Concept, read_concept
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.io.console import UserError
from backbone.io.files import write_tensors
from backbone.models.model import Backbone
from customize.cli import app
from customize.formats.adapter import AdapterFile
from customize.formats.convert import import_adapter
from customize.formats.factors import LayerUpdate
from customize.formats.read import read_adapter
from customize.formats.write import compare_updates, write_adapter
from customize.training.record import make_weights_metadata
from tests.customize.adapters import modules_of, random_adapter, random_layer, whole_pipeline

PARTS = ("unet.down_blocks.0.", "unet.mid_block.", "text_encoder.encoder.layers.0.")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> Path:
    """A run whose adapter changes layers of every kind, and no more than that."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    folder.mkdir()
    modules = modules_of(whole_pipeline(tiny_folder))
    chosen = {
        name: module
        for name, module in modules.items()
        if name.startswith(PARTS) and ("attn" in name or "conv1" in name)
    }
    write_adapter(
        folder / LORA_WEIGHTS, random_adapter(chosen), "peft", metadata={"base_model": str(tiny_folder)}
    )
    fingerprint = Backbone.open(str(tiny_folder)).fingerprint
    Concept("lora", str(tiny_folder), fingerprint, {"[V]": "bcd"}, "dog", LORA_WEIGHTS).write(folder)
    return folder


@pytest.fixture
def run(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "run"))


def customize(*arguments: object) -> str:
    """Runs a command in this process; gives what it printed."""
    done = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.output


def test_export_import_and_back_is_the_same_adapter(run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    for file_format in ("diffusers", "kohya", "comfyui"):
        file = tmp_path / f"{file_format}.safetensors"
        assert "Read back, every layer changes the model" in customize(
            "export", run, "--to", file_format, "--out", file
        )
        customize("import", file, "--out", tmp_path / f"from-{file_format}", "--model", tiny_folder)
        again = tmp_path / f"from-{file_format}"
        assert compare_updates(read_adapter(run), read_adapter(again))[0] == 0
        concept = read_concept(again)
        assert concept.tokens == {"[V]": "bcd"}
        assert concept.fingerprint == read_concept(run).fingerprint


def test_a_run_that_is_imported_keeps_its_model_its_words_and_its_class(run: Path, tmp_path: Path) -> None:
    said = customize("import", run, "--out", tmp_path / "again")
    concept, before = read_concept(tmp_path / "again"), read_concept(run)
    assert (concept.model, concept.tokens, concept.class_noun) == (before.model, before.tokens, "dog")
    assert "a [V] dog in the snow" in said


@pytest.mark.parametrize("tokens", [{"sks": "sks"}, {"<dog>": "b c"}, {"sks": "bcd", "[W]": "fgh"}])
def test_an_import_has_the_token_that_the_run_says(tokens: dict[str, str], run: Path, tmp_path: Path) -> None:
    replace(read_concept(run), tokens=tokens).write(run)
    customize("export", run, "--to", "kohya", "--out", tmp_path / "k.safetensors")
    customize("merge", run, "--out", tmp_path / "m.safetensors")
    own = tmp_path / "own.safetensors"
    write_adapter(own, read_adapter(run), "peft", metadata=make_weights_metadata(read_concept(run)))
    for number, source in enumerate((run, tmp_path / "k.safetensors", tmp_path / "m.safetensors", own)):
        said = customize("import", source, "--out", tmp_path / f"{number}")
        assert read_concept(tmp_path / f"{number}").tokens == tokens
        assert f"a {next(iter(tokens))} " in said
        out = tmp_path / f"named-{number}"
        if len(tokens) == 1:
            customize("import", source, "--out", out, "--token", "[Z]")
            assert read_concept(out).tokens == {"[Z]": next(iter(tokens.values()))}
        else:
            with pytest.raises(UserError, match=r"has 2 tokens of their own names \(sks, \[W\]\)"):
                customize("import", source, "--out", out, "--token", "[Z]")
            assert not out.exists()
            customize("import", source, "--out", out, "--token", "[Z]", "--token-words", "b")
            assert read_concept(out).tokens == {"[Z]": "b"}


@pytest.mark.parametrize("tokens", [{"[V]": "[V] [V]_1"}, {"sks": "sks"}])
def test_an_adapter_whose_words_were_learned_beside_it_is_not_imported_without_them(
    tokens: dict[str, str], run: Path, tmp_path: Path
) -> None:
    """The model would read the token as plain text, of which it has learned nothing."""
    rows = torch.ones(len(next(iter(tokens.values())).split()), 16)
    write_tensors(run / "learned_embeds.safetensors", {next(iter(tokens)): rows})
    concept = replace(read_concept(run), kind="pivotal", words="learned_embeds.safetensors", tokens=tokens)
    concept.write(run)
    file, own, out = tmp_path / "k.safetensors", tmp_path / "own.safetensors", tmp_path / "out"
    customize("export", run, "--to", "kohya", "--out", file)
    write_adapter(own, read_adapter(run), "peft", metadata=make_weights_metadata(concept))
    for source in (run, file, own):
        with pytest.raises(UserError, match=r"was trained with learned words \(.*--token-words"):
            customize("import", source, "--out", out)
        assert not out.exists()
    customize("import", file, "--out", out, "--token-words", "bcd")


def test_info_names_the_base_that_an_adapter_of_no_known_family_records(tmp_path: Path) -> None:
    layer = LayerUpdate("lora", {"down": torch.ones(2, 5), "up": torch.ones(5, 2)}, 2, 2.0)
    for metadata, said in (({"base_model": "moji"}, "moji"), ({}, "a model that is not known here")):
        adapter = AdapterFile({"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": layer})
        write_adapter(tmp_path / "a.safetensors", adapter, "peft", metadata=metadata)
        assert f"\nbase       {said}\n" in customize("info", tmp_path / "a.safetensors")


def test_info_says_what_an_adapter_is(run: Path, tmp_path: Path) -> None:
    customize("export", run, "--to", "kohya", "--out", tmp_path / "a.safetensors")
    said = customize("info", tmp_path / "a.safetensors")
    for words in (
        "kohya (diffusers' block names)",
        "algorithm  lora",
        "alpha      3",
        "unet",
        "ss_network_dim",
        "‖ΔW‖",
    ):
        assert words in said


def test_merge_resize_and_extract_write_what_they_say(run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    customize("merge", f"{run}:0.5", run, "--out", tmp_path / "twice")
    once, twice = read_adapter(run), read_adapter(tmp_path / "twice")
    name = next(iter(once.layers))
    torch.testing.assert_close(twice.layers[name].delta_weight(), 1.5 * once.layers[name].delta_weight())
    assert "rank" in customize("resize", tmp_path / "twice", "--rank", 4, "--out", tmp_path / "r.safetensors")
    torch.testing.assert_close(
        read_adapter(tmp_path / "r.safetensors").layers[name].delta_weight(),
        twice.layers[name].delta_weight(),
        atol=1e-5,
        rtol=1e-3,
    )
    customize("merge", run, "--bake", "--out", tmp_path / "baked")
    out = tmp_path / "e.safetensors"
    said = customize("extract", tmp_path / "baked", tiny_folder, "--rank", 4, "--out", out)
    assert "100.00%" in said
    assert compare_updates(once, read_adapter(out))[0] < 1e-3


def test_nothing_is_extracted_of_a_run_before_it_is_a_whole_model(
    run: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    with pytest.raises(UserError, match=r"is a run, not a whole model\. Make one of it .* --bake"):
        customize("extract", run, tiny_folder, "--rank", 2, "--out", tmp_path / "x.safetensors")


def test_an_import_that_does_not_fit_its_model_is_refused(tmp_path: Path, tiny_folder: Path) -> None:
    wide = AdapterFile({"unet.conv_in": random_layer(nn.Conv2d(4, 320, 3), 2, 1.0, torch.Generator())})
    write_adapter(tmp_path / "wide.safetensors", wide, "kohya")
    with pytest.raises(UserError, match="another model"):
        import_adapter(
            tmp_path / "wide.safetensors", tmp_path / "run", model=str(tiny_folder), token_words="bcd"
        )
    assert not (tmp_path / "run").exists()


def test_an_import_without_a_trigger_word_asks_for_it(run: Path, tmp_path: Path, tiny_folder: Path) -> None:
    write_adapter(tmp_path / "bare.safetensors", read_adapter(run), "kohya")
    with pytest.raises(UserError, match="--token-words"):
        import_adapter(tmp_path / "bare.safetensors", tmp_path / "again", model=str(tiny_folder))


@pytest.mark.parametrize(
    ("words", "phrase"),
    [
        pytest.param(words, phrase, marks=[pytest.mark.slow] * bool(words and phrase))
        for words in (None, "", " \n")
        for phrase in ("", "  ", "\t\n")
    ],
)
def test_blanks_are_no_trigger_words(
    words: str | None, phrase: str, run: Path, tmp_path: Path, tiny_folder: Path
) -> None:
    bare = tmp_path / "bare.safetensors"
    write_adapter(bare, read_adapter(run), "kohya", metadata={"modelspec.trigger_phrase": phrase})
    with pytest.raises(UserError, match="does not say its trigger words"):
        import_adapter(bare, tmp_path / "again", model=str(tiny_folder), token_words=words)
    kohya = tmp_path / "kohya.safetensors"
    write_adapter(
        kohya, read_adapter(run), "kohya", metadata={"ss_dataset_dirs": '{"10_ohwx dog": {"img_count": 5}}'}
    )
    with pytest.raises(
        UserError, match=r"trigger words .its images lay in “10_ohwx dog”, where the words may"
    ):
        import_adapter(kohya, tmp_path / "again", model=str(tiny_folder), token_words=words)
    with pytest.raises(UserError, match=r"'b\\x1b\[31m' hold control characters"):
        import_adapter(bare, tmp_path / "again", model=str(tiny_folder), token_words="b\x1b[31m")
    with pytest.raises(UserError, match="The token is empty"):
        import_adapter(bare, tmp_path / "again", model=str(tiny_folder), token=phrase, token_words="b")
    assert not (tmp_path / "again").exists()
    import_adapter(bare, tmp_path / "again", model=str(tiny_folder), token=" [V] ", token_words=" b\n c ")
    assert read_concept(tmp_path / "again").tokens == {"[V]": "b c"}


@pytest.mark.parametrize("flag", ["--model", "--token", "--token-words", "--class"])
def test_an_import_into_a_file_refuses_what_has_no_effect_there(flag: str, run: Path, tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"
    with pytest.raises(UserError, match=f"is a file, on which {flag} has no effect"):
        customize("import", run, "--out", out, flag, "moji")
    assert not out.exists()


@pytest.mark.parametrize("name", ["a.pt", "a.ckpt", "a.SAFETENSORS"])
def test_no_folder_is_made_that_is_called_as_a_file_of_weights(name: str, run: Path, tmp_path: Path) -> None:
    for command in ("import", "export"):
        with pytest.raises(UserError, match=rf"{name} must end in \.safetensors"):
            customize(command, run, "--out", tmp_path / name)
        assert not (tmp_path / name).exists()


def test_a_file_that_is_cut_off_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(UserError, match=r"broken\.safetensors is not a whole safetensors file"):
        customize("export", broken, "--to", "kohya", "--out", tmp_path / "o.safetensors")
    assert {path.name for path in tmp_path.iterdir()} == {"broken.safetensors"}
