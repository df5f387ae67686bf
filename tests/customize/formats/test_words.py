"""Other tools' files of learned words: what diffusers draws with them is drawn, and what is exported they read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor
from typer.testing import CliRunner

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import read_concept, resolve_placeholder_tokens
from backbone.adapters.embeddings import EMBEDDINGS_FILE, save_embeddings
from backbone.io.console import UserError
from backbone.models.model import Backbone
from customize.cli import app
from customize.formats.adapter import FileFormat
from customize.formats.convert import export_adapter, import_adapter
from customize.formats.words import inspect_words, read_word_file
from tests.parity import by_both
from tests.tiny import tiny_pixart, tiny_stable_diffusion_xl

TOOLS: tuple[FileFormat, ...] = ("kohya", "comfyui", "diffusers")
SIDES = {"clip_l": ("text_encoder", "tokenizer"), "clip_g": ("text_encoder_2", "tokenizer_2")}


@pytest.fixture(scope="module")
def xl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_stable_diffusion_xl(tmp_path_factory.mktemp("words") / "xl")


def rows(count: int, width: int = 16, *, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed + width))


def write(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    save_file(dict(tensors), path, metadata)
    return path


def draw_both(pipeline: Any, run: Path, prompt: str) -> tuple[Tensor, Tensor]:
    """What diffusers' pipeline, which knows the word, draws of a prompt, and what the run does."""
    concept = read_concept(run)
    model = Backbone.open(concept.model, device="cpu", precision="fp32")
    load_concepts(model, [concept])
    return by_both(pipeline, model, resolve_placeholder_tokens(prompt, [concept]))


@pytest.mark.parametrize(
    ("key", "count", "token", "prompt"),
    [
        ("emb_params", 3, "easynegative", "a dog, easynegative"),  # A1111, OneTrainer
        ("<cat-toy>", 1, None, "a <cat-toy> on the beach"),  # diffusers
        ("clip_l", 2, None, "a [V] on the beach"),  # ComfyUI
    ],
)
def test_a_word_of_another_tool_draws_what_it_draws_in_diffusers(
    key: str, count: int, token: str | None, prompt: str, tiny_folder: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "style.safetensors", {key: rows(count)})
    said = import_adapter(file, tmp_path / "run", model=str(tiny_folder), token=token)
    name = token or ("[V]" if key == "clip_l" else key)
    assert f"for {name}" in said and list(read_concept(tmp_path / "run").tokens) == [name]
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipeline.load_textual_inversion(load_file(file)[key], token=name.lower())
    concept = read_concept(tmp_path / "run")
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    load_concepts(model, [concept])
    written = resolve_placeholder_tokens(prompt, [concept])
    theirs = pipeline.text_encoder(pipeline.tokenizer(
        pipeline.maybe_convert_prompt(prompt.lower(), pipeline.tokenizer), padding="max_length", return_tensors="pt",
    ).input_ids)[0]  # fmt: skip
    torch.testing.assert_close(model.encode_prompts([written]).text["hidden"], theirs)


def test_a_file_for_both_clips_draws_what_it_draws_in_diffusers(xl_folder: Path, tmp_path: Path) -> None:
    words = {"clip_l": rows(2), "clip_g": rows(2, 24)}
    file = write(tmp_path / "xl.safetensors", words)
    import_adapter(file, tmp_path / "run", model=str(xl_folder))
    pipeline = StableDiffusionXLPipeline.from_pretrained(xl_folder, local_files_only=True)
    for key, (encoder, tokenizer) in SIDES.items():
        pipeline.load_textual_inversion(
            words[key], token="[V]", text_encoder=getattr(pipeline, encoder), tokenizer=getattr(pipeline, tokenizer)
        )  # fmt: skip
    theirs, ours = draw_both(pipeline, tmp_path / "run", "a [V] on the beach")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_a_word_comes_back_for_every_tool_as_it_was(
    tiny_folder: Path, xl_folder: Path, tmp_path: Path
) -> None:
    single, double = {"emb_params": rows(2)}, {"clip_l": rows(2), "clip_g": rows(2, 24)}
    for number, (folder, words) in enumerate(((tiny_folder, single), (xl_folder, double))):
        run = tmp_path / f"run-{number}"
        import_adapter(write(tmp_path / f"{number}.safetensors", words), run, model=str(folder))
        for tool in TOOLS:
            out = tmp_path / f"{tool}-{number}.safetensors"
            export_adapter(run, out, tool)
            expected = {"[V]": single["emb_params"]} if (tool, number) == ("diffusers", 0) else words
            found = load_file(out)
            assert set(found) == set(expected)
            for key, value in expected.items():
                assert torch.equal(found[key], value)
            import_adapter(out, tmp_path / f"again-{tool}-{number}", model=str(folder))
            again = load_file(tmp_path / f"again-{tool}-{number}" / EMBEDDINGS_FILE)
            assert again.keys() == load_file(run / EMBEDDINGS_FILE).keys()


def test_the_second_file_of_diffusers_script_is_the_second_encoder_s(xl_folder: Path, tmp_path: Path) -> None:
    written = tmp_path / "written"
    written.mkdir()
    write(written / "learned_embeds.safetensors", {"<toy>": rows(1)})
    with pytest.raises(UserError, match=r"width 16, and .* reads width 16 \(clip_l\) and 24 \(clip_g\)"):
        import_adapter(written, tmp_path / "run", model=str(xl_folder))
    write(written / "learned_embeds_2.safetensors", {"<toy>": rows(1, 24)})
    import_adapter(written, tmp_path / "run", model=str(xl_folder))
    assert set(load_file(tmp_path / "run" / EMBEDDINGS_FILE)) == {
        "<toy>/text_encoder",
        "<toy>/text_encoder_2",
    }


@pytest.mark.parametrize(
    ("key", "width", "said"),
    [
        (
            "clip_g",
            24,
            r"vectors for clip_g alone, and .* reads a word with clip_l too\. Learn the word for both\.$",
        ),
        ("clip_l", 16, r"vectors for clip_l alone, and .* reads a word with clip_g too"),
        ("clip_g", 16, r"width 16 \(clip_g\), and .* reads width 16 \(clip_l\) and 24 \(clip_g\)"),
    ],
)
def test_a_word_of_one_of_two_encoders_is_refused_by_the_one_that_lacks_and_stays_that_encoder_s(
    key: str, width: int, said: str, xl_folder: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "word.safetensors", {key: rows(1, width)})
    with pytest.raises(UserError, match=said):
        import_adapter(file, tmp_path / "run", model=str(xl_folder))
    assert not (tmp_path / "run").exists()
    export_adapter(file, tmp_path / "out.safetensors", "comfyui")
    assert set(load_file(tmp_path / "out.safetensors")) == {"clip_g" if key == "clip_g" else "emb_params"}


@pytest.mark.parametrize(
    ("tensors", "options", "said"),
    [
        ({"clip_l": rows(1), "clip_g": rows(1, 24)}, {}, r"width 16 \(clip_l\) and 24 \(clip_g\), and .* width 16 "),
        ({"emb_params": rows(1, 24)}, {}, "width 24 .*reads width 16 "),
        ({"emb_params": rows(1, 1024)}, {}, "as Stable Diffusion 2.x reads them"),
        ({"clip_l": rows(1), "t5xxl": rows(1, 32)}, {}, "holds t5xxl beside what CLIP reads"),
        ({"clip_l": rows(1), "clip_g": rows(2, 24)}, {}, r"another number of vectors.*clip_l 1, clip_g 2"),
        ({"[V]": rows(1), "[W]": rows(1)}, {}, r"2 learned words \(\[V\], \[W\]\)"),
        ({"emb_params": rows(1)}, {"token_words": "sks"}, "--token-words has no effect"),
        ({"emb_params": rows(1)}, {"token": "dog"}, "ordinary word"),
        ({"emb_params": rows(1) / 0}, {}, "not finite"),
        ({"clip_l": torch.tensor(1.0)}, {}, r"clip_l of the shape \[\], which is no learned word"),
        ({"emb_params": rows(1)}, {"model": None}, "does not say which model"),
        ({"emb_params": rows(1)}, {"model": ""}, "does not say which model"),
        ({"emb_params": rows(1)}, {"token": " "}, "The token is empty"),
    ],
)  # fmt: skip
def test_a_word_that_is_none_of_the_model_s_is_refused_and_nothing_is_written(
    tensors: dict[str, Tensor], options: dict[str, Any], said: str, tiny_folder: Path, tmp_path: Path
) -> None:
    file = write(tmp_path / "word.safetensors", tensors)
    with pytest.raises(UserError, match=said):
        import_adapter(file, tmp_path / "run", **{"model": str(tiny_folder), **options})
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["a.safetensors", "a.SAFETENSORS", "a.pt"])
def test_a_run_of_a_learned_word_is_no_file(name: str, tiny_folder: Path, tmp_path: Path) -> None:
    file = write(tmp_path / "word.safetensors", {"emb_params": rows(1)})
    with pytest.raises(UserError, match=r"Name a folder with --out, .* --out .*/a\.safetensors"):
        import_adapter(file, tmp_path / name, model=str(tiny_folder))
    assert [path.name for path in tmp_path.iterdir()] == ["word.safetensors"]


def test_a_pickled_embedding_is_refused_by_every_door(tmp_path: Path, tiny_folder: Path) -> None:
    file = tmp_path / "style.pt"
    file.write_bytes(b"PK\x03\x04" + b"string_to_param" * 9)  # which nobody opens
    for arguments in (
        ("import", file, "--out", tmp_path / "run", "--model", tiny_folder),
        ("export", file, "--to", "comfyui", "--out", tmp_path / "o.safetensors"),
        ("info", file),
    ):
        done = CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert (
            isinstance(done.exception, UserError | SystemExit) and ".pt" in f"{done.output}{done.exception}"
        )
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("name", ["style.sft", "STYLE.SAFETENSORS", "style"])
def test_a_word_s_file_may_be_called_otherwise(name: str, tmp_path: Path) -> None:
    facts = inspect_words(write(tmp_path / name, {"emb_params": rows(2)}))
    assert (
        facts is not None
        and next(iter(facts["words"].values()))["encoders"]["its only encoder"]["vectors"] == 2
    )


def test_info_says_what_an_embedding_is(tmp_path: Path) -> None:
    file = write(tmp_path / "style.safetensors", {"clip_l": rows(2, 768), "clip_g": rows(2, 1280)})
    said = CliRunner().invoke(app, ["info", str(file)]).output
    assert "style, of Stable Diffusion XL" in said and "2 of 1280 numbers" in said and "clip_g" in said


def test_a_run_of_a_word_of_t5_is_imported_and_exported(tmp_path: Path) -> None:
    folder = tiny_pixart(tmp_path / "pixart")
    width = Backbone.open(str(folder)).text_encoder.slots[0].model.get_input_embeddings().weight.shape[1]
    file = write(tmp_path / "w.safetensors", {"<toy>": rows(1, width)})
    import_adapter(file, tmp_path / "run", model=str(folder))
    export_adapter(tmp_path / "run", tmp_path / "o.safetensors", "diffusers")
    assert torch.equal(load_file(tmp_path / "o.safetensors")["<toy>"], rows(1, width))


def test_a_run_whose_file_lacks_its_word_is_said_to(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_adapter(write(tmp_path / "w.safetensors", {"emb_params": rows(1)}), run, model=str(tiny_folder))
    save_embeddings(run / EMBEDDINGS_FILE, {"[X]": {"text_encoder": rows(1)}}, metadata={})
    with pytest.raises(UserError, match=r"holds no vectors for \[V\]"):
        export_adapter(run, tmp_path / "o.safetensors", "kohya")


def test_each_of_several_words_gets_a_file_as_tools_read_them(tiny_folder: Path, tmp_path: Path) -> None:
    import_adapter(
        write(tmp_path / "w.safetensors", {"emb_params": rows(1)}), tmp_path / "run", model=str(tiny_folder)
    )
    run = tmp_path / "run"
    both = {name: {"text_encoder": rows(1, seed=seed)} for seed, name in enumerate(("[V]", "<V>"))}
    save_embeddings(run / EMBEDDINGS_FILE, both, metadata={})
    record = (run / "concept.json").read_text().replace('"[V]": "[V]"', '"[V]": "[V]", "<V>": "<V>"')
    (run / "concept.json").write_text(record)
    export_adapter(run, tmp_path / "two.safetensors", "comfyui")
    first, second = (load_file(tmp_path / f"two-V{number}.safetensors") for number in ("", "-2"))
    assert torch.equal(first["emb_params"], rows(1)) and torch.equal(second["emb_params"], rows(1, seed=1))
    with pytest.raises(UserError, match=r"two-V\.safetensors exists already"):
        export_adapter(run, tmp_path / "two.safetensors", "comfyui")


# Words inside of an adapter's file -------------------------------------------------------------------------


def lora_of(folder: Path, prefix: str) -> dict[str, Tensor]:
    """kohya's factors of one layer of a tiny UNet."""
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    name = next(name for name, _ in model.denoiser.named_modules() if name.endswith("attn2.to_q"))
    stem = f"{prefix}{name.replace('.', '_')}"
    layer: Any = model.denoiser.get_submodule(name)
    height, width = layer.weight.shape
    return {f"{stem}.lora_down.weight": rows(2, width), f"{stem}.lora_up.weight": rows(height, 2)}


def test_words_that_a_lora_s_file_bundles_are_learned_words_of_its_run(
    tiny_folder: Path, tmp_path: Path
) -> None:
    words = {"bundle_emb.<Cat>.string_to_param.*": rows(2), "bundle_emb.ohwx.emb_params": rows(1, seed=1)}
    file = write(tmp_path / "both.safetensors", {**lora_of(tiny_folder, "lora_unet_"), **words})
    import_adapter(file, tmp_path / "run", model=str(tiny_folder))
    concept = read_concept(tmp_path / "run")
    assert concept.tokens == {"<Cat>": "<Cat> <Cat>_1", "ohwx": "ohwx"}
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipeline.load_lora_weights(
        {name: value for name, value in load_file(file).items() if "bundle" not in name}
    )
    for token, vectors in zip(("<Cat>", "ohwx"), words.values(), strict=True):
        pipeline.load_textual_inversion(vectors, token=token)
    theirs, ours = draw_both(pipeline, tmp_path / "run", "a <Cat> beside ohwx")
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_bundled_words_of_both_clips_come_with_the_lora_s_own_trigger(
    xl_folder: Path, tmp_path: Path
) -> None:
    words = {"bundle_emb.style.clip_l": rows(2), "bundle_emb.style.clip_g": rows(2, 24)}
    file = write(tmp_path / "both.safetensors", {**lora_of(xl_folder, "lora_unet_"), **words})
    import_adapter(file, tmp_path / "run", model=str(xl_folder), token="[V]", token_words="bcd")
    assert read_concept(tmp_path / "run").tokens == {"[V]": "bcd", "style": "style style_1"}
    import_adapter(file, tmp_path / "renamed", model=str(xl_folder), token="<s>")
    assert read_concept(tmp_path / "renamed").tokens == {"<s>": "<s> <s>_1"}
    kept = load_file(tmp_path / "run" / EMBEDDINGS_FILE)
    assert torch.equal(kept["style/text_encoder_2"], words["bundle_emb.style.clip_g"])
    with pytest.raises(UserError, match="learned word style of its own"):
        import_adapter(file, tmp_path / "x", model=str(xl_folder), token="style", token_words="bcd")


def test_bundled_words_that_are_not_read_are_refused_and_nothing_is_written(
    tiny_folder: Path, tmp_path: Path
) -> None:
    lora = lora_of(tiny_folder, "lora_unet_")
    for key, vectors, said in (
        ("bundle_emb.cat-toy.clip_l_out", rows(1), "only words that CLIP reads"),
        ("bundle_emb.cat-toy.t5", rows(1, 8), "only words that CLIP reads"),
        ("bundle_emb.cat-toy.clip_l", rows(1, 8), "reads width"),
    ):
        file = write(tmp_path / "a.safetensors", {**lora, key: vectors})
        with pytest.raises(UserError, match=said):
            import_adapter(file, tmp_path / "run", model=str(tiny_folder))
    file = write(tmp_path / "a.safetensors", {**lora, "bundle_emb.cat-toy.clip_l": rows(1)})
    with pytest.raises(UserError, match="Name a folder"):
        import_adapter(file, tmp_path / "b.safetensors", model=str(tiny_folder))
    with pytest.raises(UserError, match="Make a run of both: customize import"):
        export_adapter(file, tmp_path / "b.safetensors", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors"]


def test_bundled_words_without_an_adapter_are_a_run_of_words(tiny_folder: Path, tmp_path: Path) -> None:
    alone = {"bundle_emb.ohwx.string_to_param.*": rows(2)}
    said = import_adapter(write(tmp_path / "a.safetensors", alone), tmp_path / "run", model=str(tiny_folder))
    assert "2 learned vectors for ohwx" in said
    concept = read_concept(tmp_path / "run")
    assert (concept.kind, concept.tokens) == ("textual-inversion", {"ohwx": "ohwx ohwx_1"})
    both = write(tmp_path / "b.safetensors", {**alone, "bundle_emb.<s>.emb_params": rows(1)})
    with pytest.raises(UserError, match=r"words alone \(<s>, ohwx\), and a run is made of one"):
        import_adapter(both, tmp_path / "c", model=str(tiny_folder))


@pytest.mark.parametrize("prefix", ["", "bundle_emb.ohwx."])
def test_vectors_that_are_there_twice_or_of_unlike_counts_are_no_word(
    prefix: str, tiny_folder: Path, xl_folder: Path, tmp_path: Path
) -> None:
    twice = {f"{prefix}string_to_param.*": rows(2), f"{prefix}emb_params": rows(2, seed=1)}
    unlike = {f"{prefix}clip_l": rows(2), f"{prefix}clip_g": rows(3, 24)}
    for folder, vectors, said in (
        (tiny_folder, twice, "twice"),
        (xl_folder, unlike, r"for each encoder \(clip_l 2, clip_g 3\)"),
    ):
        file = write(
            tmp_path / "a.safetensors", {**lora_of(folder, "lora_unet_"), **vectors} if prefix else vectors
        )
        with pytest.raises(UserError, match=said):
            import_adapter(file, tmp_path / "run", model=str(folder), token="<s>")
    assert not (tmp_path / "run").exists()


def test_a_bundled_word_that_is_an_ordinary_one_is_named_with_its_file(
    tiny_folder: Path, tmp_path: Path
) -> None:
    words = {"bundle_emb.dog.emb_params": rows(1)}
    file = write(tmp_path / "a.safetensors", {**lora_of(tiny_folder, "lora_unet_"), **words})
    with pytest.raises(
        UserError, match=r"a\.safetensors holds a word that is called dog.*Give it with --token"
    ):
        import_adapter(file, tmp_path / "run", model=str(tiny_folder))
    import_adapter(file, tmp_path / "run", model=str(tiny_folder), token="[dog]")
    assert read_concept(tmp_path / "run").tokens == {"[dog]": "[dog]"}


def test_vectors_of_one_word_under_numbered_names_are_one_word_in_their_order(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vectors = rows(11)
    names = ["<a>", *(f"<a>_{number}" for number in range(1, 11))]  # as diffusers calls them in its tokenizer
    file = tmp_path / "a.safetensors"
    write(file, dict(zip(names, vectors, strict=True)))
    assert torch.equal(read_word_file(file).vectors[""], vectors)
    import_adapter(file, tmp_path / "run", model=str(tiny_folder))
    assert read_concept(tmp_path / "run").tokens == {"<a>": " ".join(names)}
    assert "zeros" not in capsys.readouterr().err
    write(file, {"<a>": torch.zeros(1, 16)})
    import_adapter(file, tmp_path / "nothing", model=str(tiny_folder))
    assert "holds vectors of zeros alone" in capsys.readouterr().err
    write(file, {"<a>": vectors[0], "<a>_2": vectors[2]})
    with pytest.raises(UserError, match="holds 2 learned words"):
        read_word_file(file)
