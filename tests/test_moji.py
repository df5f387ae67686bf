"""The embedded model: an ordinary diffusers folder that diffusers' own pipeline loads, and that knows its world."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image

from backbone.adapters.concept import choose_rare_word
from backbone.diffusion.noise import add_noise
from backbone.io.files import read_json
from backbone.media.transforms import to_tensor
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.world.scene import sample_scene
from backbone.world.words import Thing, load_vocabulary, pluralize
from tests.parity import by_both

FIXTURES = sorted((Path(__file__).parent / "fixtures" / "scenes").glob("*.png"))


@pytest.fixture(scope="module")
def moji() -> Backbone:
    return Backbone.open("moji", device="cpu", precision="fp32")


@pytest.fixture(scope="module")
def scenes() -> torch.Tensor:
    """Rendered scenes of seeds that nothing was trained on [16, 3, 128, 128]."""
    assert len(FIXTURES) == 16
    return torch.stack([to_tensor(Image.open(path)) for path in FIXTURES])


@pytest.fixture(scope="module")
def latents(moji: Backbone, scenes: torch.Tensor) -> torch.Tensor:
    """The same as latents."""
    return moji.encode(scenes).mean


def test_diffusers_own_pipeline_loads_it_and_draws_the_same_picture(moji: Backbone) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED, local_files_only=True)
    theirs, ours = by_both(pipeline, moji, "a dog in the snow")
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_latents_have_unit_variance_in_every_channel(moji: Backbone, latents: torch.Tensor) -> None:
    assert float(latents.std()) == pytest.approx(1, abs=0.1)
    assert moji.autoencoder_config["scaling_factor"] == 0.18215
    assert float(latents.std((0, 2, 3)).min()) > 0.6


def test_pictures_survive_the_autoencoder(
    moji: Backbone, scenes: torch.Tensor, latents: torch.Tensor
) -> None:
    decoded = moji.decode(latents)
    decibels = 10 * torch.log10(4 / (decoded - scenes).square().mean((1, 2, 3)))
    assert float(decibels.mean()) > 30


def test_the_network_predicts_noise_far_better_than_nothing(moji: Backbone, latents: torch.Tensor) -> None:
    captions = [Image.open(path).info["caption"] for path in FIXTURES]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    level = moji.path.levels[torch.full((len(latents),), 400)]
    with torch.no_grad():
        said = moji.predictor(moji.encode_prompts(captions))(add_noise(latents, noise, level), level)
    assert float((said.noise - noise).square().mean()) < 0.35 * float(noise.square().mean())


def test_every_word_of_the_world_is_one_token(moji: Backbone) -> None:
    words = load_vocabulary()
    for word in (*words.nouns, *map(pluralize, words.nouns), *words.colours):
        assert len(moji.text_encoder.tokenizer(word)["input_ids"]) == 3, word


def test_any_prompt_tokenises_without_unknown_tokens(moji: Backbone) -> None:
    tokenizer = moji.text_encoder.tokenizer
    text = "Ein schöner Hund — 犬 🐕 with 3 hats & \t weird\nspacing!"
    assert tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True).replace(
        " ", ""
    ) == "".join(text.lower().split())


def test_pooled_outputs_of_two_captions_differ(moji: Backbone) -> None:
    encoder = moji.text_encoder
    ids = encoder.tokenizer(["a dog", "a cat"], padding="max_length", return_tensors="pt")["input_ids"]
    pooled = encoder.slots[0].model(ids).pooler_output
    assert float((pooled[0] - pooled[1]).abs().max()) > 1e-3


def test_rare_words_are_single_tokens_that_no_caption_uses(moji: Backbone) -> None:
    tokenizer = moji.text_encoder.tokenizer
    for key in range(20):
        word = choose_rare_word(tokenizer.get_vocab(), str(key))
        assert len(tokenizer(word)["input_ids"]) == 3
        assert word not in {*load_vocabulary().nouns, *load_vocabulary().colours}


def test_its_files_are_small_and_safe() -> None:
    files = [path for path in EMBEDDED.rglob("*") if path.is_file()]
    control = [path for path in files if path.is_relative_to(EMBEDDED / "control")]
    assert sum(path.stat().st_size for path in control) < 12e6
    assert sum(path.stat().st_size for path in {*files} - {*control}) < 80e6
    assert max(path.stat().st_size for path in files) < 60e6
    assert {path.suffix for path in files} <= {".json", ".txt", ".safetensors", ".md", ".png"}


def test_its_control_network_was_trained_on_these_weights(moji: Backbone) -> None:
    (record,) = (EMBEDDED / "control").glob("*/condition.json")
    assert moji.has_fingerprint(
        read_json(record)["base"]
    )  # else each use of it says that it may be followed less closely


def test_the_scheduler_writes_out_what_matters() -> None:
    settings = json.loads((EMBEDDED / "scheduler" / "scheduler_config.json").read_text())
    expected = {
        "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000,
        "timestep_spacing": "leading", "steps_offset": 1, "clip_sample": False, "set_alpha_to_one": False,
        "prediction_type": "v_prediction",
    }  # fmt: skip
    assert {key: settings[key] for key in expected} == expected


def test_the_first_picture_is_a_picture(moji: Backbone) -> None:
    picture = next(sample(moji, [Request("a dog in the snow", (0, 0))], steps=8, guidance=3.0, seed=0))
    assert picture.size == (128, 128)
    assert np.asarray(picture).std() > 15


def test_the_scorer_names_the_thing_of_most_plain_scenes() -> None:
    from backbone.evaluation.clip import classify_subject, load_scorer

    scorer = load_scorer(EMBEDDED / "scorer")
    right = []
    for path in FIXTURES:
        scene = sample_scene(int(path.stem))
        if scene.things == (Thing(scene.things[0].noun),) and not scene.style:
            ranked = classify_subject(scorer, [Image.open(path)], tuple(load_vocabulary().nouns))
            right.append(ranked[0][0] == scene.things[0].noun)
    assert len(right) >= 4
    assert sum(right) / len(right) >= 0.7
