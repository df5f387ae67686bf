"""Scorers: unit vectors, figures that know their own pictures, guesses that forget the place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

from backbone.evaluation.clip import (
    Scorer,
    VisionEncoder,
    classify_subject,
    clip_i,
    diversity,
    embed_classes,
    load_image_encoder,
    load_scorer,
    prior_drift,
    prompt_precision,
    rank_classes,
    text_scores,
)
from backbone.io.console import UserError, printed_once
from backbone.io.files import read_json, write_json
from tests.tiny import tiny_eye, tiny_tokenizer

Images = list[Image.Image]


@pytest.fixture(scope="module")
def scorer() -> Scorer:
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        image_size=32,
        patch_size=8,
    )
    config = CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=16)
    return Scorer(CLIPModel(config).eval(), tokenizer, crop_size=32)


@pytest.fixture
def images() -> Images:
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 255, (40, 48, 3), dtype=np.uint8)) for _ in range(5)]


def unit(*rows: tuple[float, ...]) -> torch.Tensor:
    return F.normalize(torch.tensor(rows), dim=-1)


def test_pictures_and_texts_become_unit_vectors(scorer: Scorer, images: Images) -> None:
    for vectors in (scorer.embed_images(images), scorer.embed_texts(["a dog", "a red cat in the snow"])):
        torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(len(vectors)))
        assert vectors.shape[1] == 16


def test_a_picture_is_embedded_the_same_wherever_it_stands(scorer: Scorer, images: Images) -> None:
    order = [3, 0, 4, 1, 2]
    shuffled = scorer.embed_images([images[index] for index in order], batch=2)
    torch.testing.assert_close(shuffled, scorer.embed_images(images)[order], rtol=1e-4, atol=1e-5)


def test_a_text_is_embedded_the_same_beside_a_longer_one(scorer: Scorer) -> None:
    alone = scorer.embed_texts(["a dog"])
    beside = scorer.embed_texts(["a dog", "a red dog in the snow and the cat in the snow"])
    torch.testing.assert_close(beside[:1], alone, rtol=1e-4, atol=1e-5)


def test_two_captions_have_different_pooled_outputs(scorer: Scorer) -> None:
    first, second = scorer.embed_texts(["a dog in the snow", "a cat in the snow"])
    assert (first - second).norm() > 1e-3


def test_a_text_longer_than_the_positions_is_cut_off(scorer: Scorer) -> None:
    assert scorer.embed_texts(["a dog " * 100]).shape == (1, 16)


def test_nothing_embeds_to_no_rows(scorer: Scorer) -> None:
    assert scorer.embed_images([]).shape == scorer.embed_texts([]).shape == (0, 16)


def test_a_picture_is_scaled_to_its_shortest_side_and_cut_at_the_centre(scorer: Scorer) -> None:
    wide = Image.new("RGB", (96, 32), (255, 255, 255))
    wide.paste((0, 0, 0), (32, 0, 64, 32))
    assert scorer.preprocess([wide]).unique().tolist() == [-1.0]
    assert scorer.preprocess([Image.new("L", (320, 200), 255)]).unique().tolist() == [1.0]


def test_identical_pictures_have_clip_i_one(scorer: Scorer, images: Images) -> None:
    same = scorer.embed_images([images[0]] * 3)
    assert clip_i(same, same) == pytest.approx(1, abs=1e-5)
    assert prior_drift(same, same) == pytest.approx(1, abs=1e-5)
    assert diversity(same) == pytest.approx(0, abs=1e-5)


def test_figures_of_known_vectors() -> None:
    east, north, west = unit((1.0, 0.0)), unit((0.0, 1.0)), unit((-1.0, 0.0))
    assert clip_i(torch.cat([east, north]), east) == pytest.approx(0.5)
    assert diversity(torch.cat([east, north])) == pytest.approx(1)
    assert diversity(torch.cat([east, west])) == pytest.approx(2)
    assert text_scores(torch.cat([east, north]), torch.cat([east, west])).mean() == pytest.approx(0.5)
    assert text_scores(torch.cat([east, north]), torch.cat([west, north])).tolist() == [-1, 1]


def test_a_subject_that_is_no_average_one_lowers_clip_t_and_not_prompt_precision() -> None:
    """Texts name a class and one of four places; images show the class there, or a subject of their own there."""
    axes = torch.eye(6)
    places, of_class, own = axes[:4], axes[4], axes[5]
    texts, average, subject = (F.normalize(places + 2 * what, dim=-1) for what in (of_class, of_class, own))
    copied = F.normalize(places[:1] + 2 * own, dim=-1).expand(
        4, -1
    )  # the first place, whatever was asked for
    assert text_scores(average, texts).mean() == pytest.approx(1)
    assert text_scores(subject, texts).mean() == pytest.approx(0.2)
    told = [prompt_precision(images, texts, logit_scale=40) for images in (average, subject, copied)]
    assert torch.allclose(told[0], told[1]) and told[0].min() > 0.99
    assert told[2][0] > 0.99 and told[2][1:].max() < 0.01


def test_diversity_does_not_depend_on_the_order(scorer: Scorer, images: Images) -> None:
    vectors = scorer.embed_images(images)
    assert diversity(vectors) == pytest.approx(diversity(vectors.flip(0)), abs=1e-5)


def test_diversity_needs_two_pictures() -> None:
    with pytest.raises(UserError, match="there is 1"):
        diversity(unit((1.0, 0.0)))


def test_a_guess_is_a_distribution_over_the_candidates_best_first(scorer: Scorer, images: Images) -> None:
    guess = classify_subject(scorer, images, ("dog", "cat", "snow"))
    assert {noun for noun, _ in guess} == {"dog", "cat", "snow"}
    shares = [share for _, share in guess]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert shares == sorted(shares, reverse=True)


def test_a_guess_does_not_depend_on_the_order_of_pictures_or_candidates(
    scorer: Scorer, images: Images
) -> None:
    there = dict(classify_subject(scorer, images, ("dog", "cat")))
    back = dict(classify_subject(scorer, images[::-1], ("cat", "dog")))
    assert there == pytest.approx(back, abs=1e-4)


def test_what_a_picture_shares_with_every_candidate_cancels(scorer: Scorer) -> None:
    candidates = ("dog", "cat", "snow")
    vectors = embed_classes(scorer, candidates)
    # a direction in which all candidates lie equally far, as a place does
    place = torch.linalg.lstsq(vectors, torch.ones(3, 1)).solution[:, 0]
    image = F.normalize(torch.arange(16.0), dim=0)[None]
    before, after = (dict(rank_classes(scorer, seen, candidates, vectors)) for seen in (image, image + place))
    assert before == pytest.approx(after, abs=1e-4)


def test_a_picture_of_a_class_is_guessed_to_be_of_it(scorer: Scorer) -> None:
    candidates = ("dog", "cat", "snow")
    vectors = embed_classes(scorer, candidates)
    for noun, vector in zip(candidates, vectors, strict=True):
        assert rank_classes(scorer, vector[None], candidates, vectors)[0][0] == noun


def test_a_guess_without_pictures_says_so(scorer: Scorer) -> None:
    with pytest.raises(UserError, match="Give both"):
        classify_subject(scorer, [], ("dog",))


def saved(scorer: Scorer, folder: Path) -> Path:
    scorer.model.save_pretrained(folder)
    scorer.tokenizer.save_pretrained(folder)
    settings = {"crop_size": {"height": 32, "width": 32}, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    write_json(folder / "preprocessor_config.json", settings)
    return folder


def test_saving_then_loading_gives_the_same_vectors(scorer: Scorer, images: Images, tmp_path: Path) -> None:
    loaded = load_scorer(saved(scorer, tmp_path))
    torch.testing.assert_close(loaded.embed_images(images), scorer.embed_images(images))
    torch.testing.assert_close(loaded.embed_texts(["a dog"]), scorer.embed_texts(["a dog"]))


def test_a_loaded_scorer_has_no_gradients(scorer: Scorer, tmp_path: Path) -> None:
    assert not any(value.requires_grad for value in load_scorer(saved(scorer, tmp_path)).model.parameters())


def test_without_a_preprocessor_pictures_are_normalised_as_clip_s_are(scorer: Scorer, tmp_path: Path) -> None:
    (saved(scorer, tmp_path) / "preprocessor_config.json").unlink()
    assert load_scorer(tmp_path).mean == pytest.approx((0.48145, 0.45783, 0.40821), abs=1e-4)


def test_a_folder_that_is_no_scorer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no scorer"):
        load_scorer(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(UserError, match="'bert'"):
        load_scorer(tmp_path)


def test_layers_that_a_scorer_s_config_leaves_out_are_said_in_a_line_and_not_in_a_table(
    scorer: Scorer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    printed_once.clear()
    config = saved(scorer, tmp_path) / "config.json"
    settings = read_json(config)
    settings["text_config"]["num_hidden_layers"] = 1
    write_json(config, settings)
    assert len(load_scorer(tmp_path).model.text_model.encoder.layers) == 1
    message = " ".join(capfd.readouterr().err.split())
    assert "The scorer of" in message and "that its config.json has no use for" in message
    assert "UNEXPECTED" not in message


def test_pickled_weights_are_never_read(scorer: Scorer, tmp_path: Path) -> None:
    (saved(scorer, tmp_path) / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match="no safetensors"):
        load_scorer(tmp_path)


# Eyes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_an_eye_sees_a_picture_as_its_model_s_class_token_does(
    kind: str, images: Images, tmp_path: Path
) -> None:
    eye = load_image_encoder(tiny_eye(tmp_path, kind))
    assert isinstance(eye, VisionEncoder) and eye.similarity_name == "DINO"
    vectors = eye.embed_images(images, batch=2)
    assert vectors.shape == (5, 32) and torch.allclose(vectors.norm(dim=-1), torch.ones(5))
    colour = (255, 0, 51)
    flat = [(value / 255 - mean) / std for value, mean, std in zip(colour, eye.mean, eye.std, strict=True)]
    with torch.no_grad():
        said = eye.model(torch.tensor(flat)[None, :, None, None].expand(1, 3, 32, 32)).last_hidden_state[:, 0]
    seen = eye.embed_images([Image.new("RGB", (50, 32), colour)])
    torch.testing.assert_close(seen, F.normalize(said, dim=-1))
    assert clip_i(vectors[:1], vectors[:1]) == pytest.approx(1, abs=1e-5)
    assert eye.embed_images([]).shape == (0, 32)
    assert not any(value.requires_grad for value in eye.model.parameters())


def test_an_eye_scales_further_than_it_cuts(tmp_path: Path) -> None:
    """Shortest side 40, the middle 32 of it: a frame of four pixels is not seen."""
    eye = load_image_encoder(tiny_eye(tmp_path, "dinov2"))
    inner = np.random.default_rng(1).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    framed = inner.copy()
    framed[:4] = framed[-4:] = 0
    framed[:, :4] = framed[:, -4:] = 0
    vectors = eye.embed_images([Image.fromarray(inner), Image.fromarray(framed)])
    assert torch.equal(vectors[0], vectors[1])


def test_a_clip_folder_is_an_eye_that_reads(scorer: Scorer, tmp_path: Path) -> None:
    found = load_image_encoder(saved(scorer, tmp_path))
    assert isinstance(found, Scorer) and found.similarity_name == "CLIP-I"


def test_what_is_neither_is_refused_as_an_eye(tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {"model_type": "bert"})
    with pytest.raises(UserError, match="neither CLIP nor DINO"):
        load_image_encoder(tmp_path)
    write_json(tmp_path / "config.json", {"model_type": "dinov2"})
    with pytest.raises(UserError, match="no safetensors"):
        load_image_encoder(tmp_path)
