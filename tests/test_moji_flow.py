"""The second embedded model: a Stable Diffusion 3 folder without T5 that knows the same world as a rectified flow."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from backbone.io.files import read_json, read_tensors
from backbone.models.locate import EMBEDDED, OWN
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.world.scene import BENCHMARK_SEEDS, is_fair, sample_scene
from backbone.world.words import load_vocabulary
from tests.parity import by_both

FOLDER = OWN["moji-flow"]


@pytest.fixture(scope="module")
def flow() -> Backbone:
    return Backbone.open("moji-flow", device="cpu", precision="fp32")


def test_diffusers_own_pipeline_loads_it_and_draws_the_same_picture(flow: Backbone) -> None:
    pipeline = StableDiffusion3Pipeline.from_pretrained(
        FOLDER, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )
    theirs, ours = by_both(pipeline, flow, "a dog in the snow", max_sequence_length=256)
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_it_draws_what_it_is_asked_for(flow: Backbone) -> None:
    """Single plain things: the judge, which is not in the wheel, would say the same on many more."""
    from backbone.evaluation.clip import load_scorer

    scorer = load_scorer(EMBEDDED / "scorer")
    wanted = [
        scene
        for scene in map(sample_scene, range(BENCHMARK_SEEDS.start, BENCHMARK_SEEDS.start + 60))
        if is_fair(scene) and scene.style is None and len(scene.things) == 1 and not scene.things[0].small
    ][:6]
    pictures = sample(
        flow,
        [Request(scene.caption(), (0, n)) for n, scene in enumerate(wanted)],
        steps=12,
        guidance=4.0,
        seed=0,
    )
    nouns = sorted(load_vocabulary().nouns)
    said = scorer.embed_texts([f"a {noun}" for noun in nouns])
    order = (scorer.embed_images(list(pictures)) @ said.T).argsort(1, descending=True)
    seen = [
        scene.things[0].noun in {nouns[i] for i in row[:5]} for scene, row in zip(wanted, order, strict=True)
    ]
    assert sum(seen) >= 4


def test_its_files_are_small_and_safe() -> None:
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 50e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md", ".png"}


def test_it_says_what_it_learned_in() -> None:
    settings = read_json(FOLDER / "scheduler" / "scheduler_config.json")
    assert (settings["num_train_timesteps"], settings["shift"]) == (1000, 1.0)
    assert read_json(FOLDER / "model_index.json")["_class_name"] == "StableDiffusion3Pipeline"


def test_its_latents_and_its_first_words_are_those_of_moji() -> None:
    name = "vae/diffusion_pytorch_model.safetensors"
    assert (FOLDER / name).read_bytes() == (EMBEDDED / name).read_bytes()
    files = (read_tensors(one / "text_encoder" / "model.safetensors")[0] for one in (FOLDER, EMBEDDED))
    its, own = ({key.removeprefix("text_model."): value for key, value in file.items()} for file in files)
    shared = its.keys() & own.keys()
    off = sum((its[key].float() - own[key].float()).square().sum() for key in shared)
    assert len(shared) > 60 and off < 1e-3 * sum(own[key].float().square().sum() for key in shared)  # rounded


def test_no_licence_of_others_weights_is_told_of_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert Backbone.open("moji-flow", device="cpu").denoiser is not None
    assert "licence" not in capsys.readouterr().err
