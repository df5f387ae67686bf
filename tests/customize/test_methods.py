"""Every method: what it trains, that nothing else moves, and that its concept draws the same from its files."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import Concept, resolve_placeholder_tokens
from backbone.adapters.embeddings import EMBEDDINGS_FILE as WORDS
from backbone.adapters.embeddings import add_tokens, embed_tokens, name_vector_tokens
from backbone.diffusion.losses import debiased
from backbone.diffusion.noise import generator, vp
from backbone.io.console import UserError
from backbone.io.files import read_json, read_tensors
from backbone.media.crops import read_crop
from backbone.media.sources.pictures import list_images
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import CROPS, CropPosition
from backbone.models.model import Backbone
from backbone.training.run import take_steps
from customize.data.changes import describe_changes
from customize.data.dataset import (
    LEAST_SIDE,
    SubjectGroup,
    encode_class_images,
    list_class_prompts,
    make_training_data,
    sample_class_latents,
    share_draws,
)
from customize.data.folders import list_class_images
from customize.methods.weights import CROSS_ATTENTION, Weights
from customize.objectives.dreambooth import DreamBooth
from customize.settings import FILE, METHODS, OWN_WORDS, Settings
from customize.training.run import begin_record
from tests.tiny import tiny_stable_diffusion_3

ALL = [
    ("lora", "lora"),
    ("lora", "dora"),
    ("lora", "loha"),
    ("lora", "lokr"),
    ("full", "lora"),
    ("textual-inversion", "lora"),
    ("pivotal", "lora"),
    ("custom-diffusion", "lora"),
]


def settings(subject: Path, **changes: object) -> Settings:
    base = Settings(
        images=str(subject),
        token="[V]",
        class_noun="dog",
        token_words="bcd",
        steps=4,
        batch=2,
        rank=2,
        learning_rate=1e-2,
        lora_layers="attention",
        precision="fp32",
        device="cpu",
        prior_draws=4,
        lr_warmup_steps=0,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def begun(model: Backbone, subject: Path, asked: Settings) -> tuple[DreamBooth, Concept]:
    """A training that has not taken a step yet, and the concept that it will become."""
    own = asked.method in OWN_WORDS
    words = " ".join(name_vector_tokens("[V]", asked.num_vectors)) if own else asked.token_words
    concept = Concept(asked.method, "tiny", model.fingerprint, {"[V]": words}, "dog")
    pictures = list_images(subject)
    prompts = [resolve_placeholder_tokens("a [V] dog", [concept]) for _ in pictures]
    return DreamBooth(
        model, make_training_data(model, [SubjectGroup(pictures, prompts, "a dog")], asked), asked
    ), concept


def fresh(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def said(model: Backbone, prompt: str) -> torch.Tensor:
    """What the model predicts at one fixed place for a prompt."""
    noisy = torch.randn((1, *model.latent_shape), generator=generator("place"))
    text = model.encode_prompts([prompt])
    with torch.no_grad():
        return model.family.network(model.denoiser, text)(noisy, torch.tensor([500]))


@pytest.mark.parametrize(("method", "adapter"), ALL)
def test_a_concept_says_from_its_files_what_its_training_said(
    tiny_folder: Path, subject: Path, tmp_path: Path, method: str, adapter: str
) -> None:
    model = fresh(tiny_folder)
    training, concept = begun(model, subject, settings(subject, method=method, adapter=adapter))
    before = said(model, resolve_placeholder_tokens("a [V] dog in the snow", [concept]))
    reports = list(take_steps(training))
    assert [report.step for report in reports] == [1, 2, 3, 4]
    prompt = resolve_placeholder_tokens("a [V] dog in the snow", [concept])
    trained = said(model, prompt)
    assert not torch.allclose(before, trained, atol=1e-6)
    learned = replace(concept, **training.write(tmp_path, {}), folder=tmp_path)
    other = fresh(tiny_folder)
    load_concepts(other, [learned])
    torch.testing.assert_close(said(other, prompt), trained, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "adapter"),  # which layers an adapter is put on is one code for all kinds
    [pytest.param(*one, marks=[pytest.mark.slow] * (one[1] != "lora")) for one in ALL],
)
def test_only_what_the_method_names_moves(
    tiny_folder: Path, subject: Path, method: str, adapter: str
) -> None:
    model = fresh(tiny_folder)
    training, _ = begun(model, subject, settings(subject, method=method, adapter=adapter))
    mine = {id(value) for value in training.parameters.values()}
    everything = [*model.denoiser.named_parameters(), *model.text_encoder.slots[0].model.named_parameters()]
    before = {name: value.detach().clone() for name, value in everything}
    for _ in take_steps(training):
        pass
    for name, value in everything:
        if id(value) not in mine:
            assert torch.equal(value, before[name]), name
    assert any(not torch.equal(value, before[name]) for name, value in everything if id(value) in mine)


def test_a_new_word_begins_as_the_class_and_old_words_stay_bit_for_bit(tiny: Backbone) -> None:
    old = tiny.encode_prompts(["a dog in the snow"]).text["hidden"]
    rows = embed_tokens(tiny.text_encoder, "dog", count=2)
    add_tokens(tiny.text_encoder, rows, tokens=name_vector_tokens("[V]", 2))
    assert torch.equal(tiny.encode_prompts(["a dog in the snow"]).text["hidden"], old)
    assert torch.equal(tiny.encode_prompts(["a [V] in the snow"]).text["hidden"], old)
    assert not torch.equal(tiny.encode_prompts(["a [V] [V]_1 in the snow"]).text["hidden"], old)


def test_a_new_word_of_fewer_vectors_than_its_beginning_has_tokens_is_told(
    tiny: Backbone, capsys: pytest.CaptureFixture[str]
) -> None:
    embed_tokens(tiny.text_encoder, "red dog", count=2)
    assert not capsys.readouterr().err
    both = embed_tokens(tiny.text_encoder, "red dog", count=1)
    assert torch.equal(both["text_encoder"], embed_tokens(tiny.text_encoder, "red", count=1)["text_encoder"])
    said = " ".join(capsys.readouterr().err.split())
    assert "“red dog” has 2 tokens here, and a new word begins with 1 vector: with the first" in said


def test_a_word_that_the_model_has_is_refused(tiny: Backbone) -> None:
    rows = embed_tokens(tiny.text_encoder, "dog", count=1)
    add_tokens(tiny.text_encoder, rows, tokens=["[V]"])
    with pytest.raises(UserError, match="already"):
        add_tokens(tiny.text_encoder, rows, tokens=["[V]"])


def test_learned_words_are_read_by_diffusers(tiny_folder: Path, subject: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    model = fresh(tiny_folder)
    asked = settings(subject, method="textual-inversion", num_vectors=2, words_learning_rate=0.1)
    training, concept = begun(model, subject, asked)
    for _ in take_steps(training):
        pass
    training.write(tmp_path, {})
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_folder, local_files_only=True)
    pipeline.load_textual_inversion(str(tmp_path / WORDS))
    prompt = "a [V] dog in the snow"
    written_out = resolve_placeholder_tokens(prompt, [concept])
    theirs, _ = pipeline.encode_prompt(written_out, "cpu", 1, False)
    ours = model.encode_prompts([written_out]).text["hidden"]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_pivotal_tuning_learns_the_word_first_and_then_the_network(tiny: Backbone, subject: Path) -> None:
    training, _ = begun(tiny, subject, settings(subject, method="pivotal", words_share=0.5, weight_decay=0.0))
    word = training.parameters["words.[V].text_encoder"]
    factor = next(value for name, value in training.parameters.items() if "lora_B" in name)
    words, factors = [], []
    for _ in take_steps(training):
        words.append(word.detach().clone())
        factors.append(float(factor.detach().abs().sum()))
    assert factors[0] == factors[1] == 0 < factors[2] < factors[3]
    assert not torch.equal(words[0], words[1])
    assert torch.equal(words[1], words[3])


@pytest.mark.parametrize("method", [*METHODS])
def test_every_method_goes_on_bit_for_bit(
    tiny_folder: Path, subject: Path, tmp_path: Path, method: str
) -> None:
    asked = settings(subject, method=method, ema_decay=0.5, train_text_encoder=method == "lora")
    whole, _ = begun(fresh(tiny_folder), subject, asked)
    for _ in take_steps(whole):
        pass
    first, _ = begun(fresh(tiny_folder), subject, asked)
    for report in take_steps(first):
        if report.step == 2:
            first.save(tmp_path)
            break
    second, _ = begun(fresh(tiny_folder), subject, asked)
    second.resume(tmp_path)
    assert [report.step for report in take_steps(second)] == [3, 4]
    for name, value in whole.parameters.items():
        assert torch.equal(value, second.parameters[name]), name


def test_class_pictures_are_drawn_once_and_their_latents_kept(
    tiny: Backbone, subject: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(subject, prior="class-images", num_class_images=3)
    first, _ = begun(tiny, subject, asked)
    assert first.data.class_latents is not None
    assert first.data.class_latents.shape == (3, *tiny.latent_shape)
    monkeypatch.setattr("customize.data.dataset.sample_latents", None)  # a second drawing would fail
    again = make_training_data(tiny, [SubjectGroup(list_images(subject), ["a bcd dog"] * 3, "a dog")], asked)
    assert again.class_latents is not None
    assert torch.equal(again.class_latents, first.data.class_latents)
    assert torch.isfinite(next(first.losses(1)))


@pytest.mark.parametrize(("count", "kept"), [(0, 3), (2, 2), (3, 3), (4, 4)])
def test_class_pictures_are_all_of_their_folder_or_as_many_as_are_asked_for(
    tiny: Backbone, subject: Path, count: int, kept: int
) -> None:
    asked = settings(subject, prior="class-images", class_images=(str(subject),), num_class_images=count)
    assert encode_class_images(tiny, "a dog", asked, 0).shape == (kept, *tiny.latent_shape)


def test_class_images_that_are_others_than_a_run_began_with_are_said(
    tiny: Backbone, subject: Path, tmp_path: Path
) -> None:
    asked = settings(subject, prior="class-images", class_images=(str(subject),))
    begin_record(run := tmp_path / "run", asked, tiny, [])
    kept = read_json(run / FILE)["class_images"]
    assert describe_changes(kept, list_class_images(asked), noun="class images") == []
    sorted(subject.glob("*.png"))[0].unlink()
    (line,) = describe_changes(kept, list_class_images(asked), noun="class images")
    assert line.startswith("The class images, their captions") and "(gone: " in line


def test_class_pictures_are_drawn_by_the_model_s_own_sampler(
    tiny: Backbone, subject: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = settings(subject, prior="class-images", num_class_images=2)
    by_ddim = sample_class_latents(tiny, "a dog", asked, 2)
    monkeypatch.setitem(tiny.defaults, "sampler", "ancestral")
    assert not torch.equal(sample_class_latents(tiny, "a dog", asked, 2), by_ddim)


def test_without_a_prior_the_loss_is_the_subjects_alone(tiny: Backbone, subject: Path) -> None:
    off, _ = begun(tiny, subject, settings(subject, prior="off"))
    assert not off.data.has_prior


def test_what_a_mask_hides_is_not_learned(tiny: Backbone, subject: Path) -> None:
    half = Image.new("L", (64, 64), 0)
    half.paste(255, (0, 0, 32, 64))
    for path in sorted(subject.glob("*.png")):
        half.save(path.with_name(f"{path.stem}.mask.png"))
    pictures = list_images(subject)
    assert all(picture.mask is not None for picture in pictures)
    asked = settings(subject, prior="off")
    material = make_training_data(
        tiny, [SubjectGroup(pictures, ["a bcd dog"] * len(pictures), "a dog")], asked
    )
    assert material.masks is not None
    training = DreamBooth(tiny, material, asked)
    weight = training.draw_subject_batch(material.buckets[0], generator(1)).weight
    assert float(weight[..., 5:].abs().max()) == 0
    assert float(weight[..., :3].min()) > 1.5
    assert float(weight.mean()) == pytest.approx(1.0, abs=1e-5)


def test_gradient_accumulation_is_the_mean_over_micro_batches(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, prior="off", gradient_accumulation_steps=3)
    training, _ = begun(tiny, subject, asked)
    losses = [float(loss.detach()) for loss in training.losses(1)]
    assert len(losses) == 3
    assert len(set(losses)) == 3
    report = next(iter(take_steps(training)))
    assert report.loss == pytest.approx(sum(losses) / 3, rel=1e-4)


def test_the_debiased_weight_is_one_over_the_root_of_snr() -> None:
    level = vp(torch.tensor([0.5, 0.9]))
    assert torch.allclose(debiased(level), torch.tensor([1.0, (0.1 / 0.9) ** 0.5]))
    v = debiased(level, "v_prediction")  # an error of v is a times one of ε
    assert torch.allclose(v, debiased(level) * level.a**2)


def test_every_subject_is_drawn_as_often_with_its_own_prompts(tiny: Backbone, subject: Path) -> None:
    pictures = list_images(subject)
    asked = settings(subject, batch=64, prior_batch=32)
    groups = [
        SubjectGroup(pictures, ["a bcd dog"] * len(pictures), "a dog"),
        SubjectGroup(pictures[:1], ["a fgh cat"], "a cat"),
    ]
    training = DreamBooth(tiny, make_training_data(tiny, groups, asked), asked)
    rows = training.draw_subject_batch(training.data.buckets[0], generator(0)).rows
    assert 20 <= int((rows == len(pictures)).sum()) <= 44
    prior = training.draw_prior_batch(training.data.buckets[0], generator(0)).rows
    assert set(prior.tolist()) == {len(pictures) + 1, len(pictures) + 2}
    text = training.encode_conditions(torch.tensor([len(pictures), len(pictures) + 2])).text["hidden"]
    torch.testing.assert_close(text, tiny.encode_prompts(["a fgh cat", "a cat"]).text["hidden"])
    base = training.data.buckets[0].base
    assert base is not None
    assert len(base) == 2 * asked.prior_draws


def test_the_base_is_kept_under_further_prompts_of_each_subject_s_class(
    tiny: Backbone, subject: Path
) -> None:
    pictures = list_images(subject)
    asked = settings(subject, batch=64, prior_batch=32, prior_draws=12)
    further = ("a dog wearing a hat", "a dog in a park", "a dog at night")
    groups = [
        SubjectGroup(pictures, ["a bcd dog"] * len(pictures), "a dog", prior_prompts=further),
        SubjectGroup(pictures[:1], ["a fgh cat"], "a cat", prior_prompts=("a cat in a park",)),
    ]
    training = DreamBooth(tiny, make_training_data(tiny, groups, asked), asked)
    prompts = ["a dog", "a cat", *further, "a cat in a park"]
    assert training.data.class_prompts == prompts
    bucket = training.data.buckets[0]
    assert bucket.base is not None and bucket.classes is not None
    assert Counter(prompts[k] for k in bucket.classes.tolist()) == {
        "a dog": 6, "a cat": 6, **dict.fromkeys(further, 2), "a cat in a park": 6,
    }  # fmt: skip
    row = bucket.classes.tolist().index(3)
    with torch.no_grad():
        wanted = tiny.predict(
            bucket.base.noisy[[row]], bucket.base.level[[row]], tiny.encode_prompts(["a dog in a park"])
        )
    torch.testing.assert_close(bucket.base.prediction[[row]], wanted, rtol=1e-4, atol=1e-5)
    rows = training.draw_prior_batch(bucket, generator(0)).rows
    text = training.encode_conditions(rows).text["hidden"]
    for row, words in zip(rows.tolist(), text, strict=True):
        own = tiny.encode_prompts([prompts[row - len(training.data.prompts)]]).text["hidden"]
        torch.testing.assert_close(words[None], own)


@pytest.mark.parametrize(("count", "prompts"), [(128, 6), (64, 1), (3, 9), (7, 2)])
def test_the_class_prompt_has_half_of_the_draws_and_every_other_one_some(count: int, prompts: int) -> None:
    shares = share_draws(count, prompts)
    assert len(shares) == prompts and min(shares) >= 1
    assert sum(shares) == max(count, prompts)
    assert prompts > count or shares[0] >= count / 2
    assert max(shares[1:], default=0) - min(shares[1:], default=0) <= 1


def test_images_of_the_class_are_drawn_of_the_class_prompt_alone(tiny: Backbone, subject: Path) -> None:
    group = SubjectGroup(list_images(subject), ["a bcd dog"] * 5, "a dog", prior_prompts=("a dog in a park",))
    asked = settings(subject, prior="class-images")
    assert list_class_prompts([group], asked) == (["a dog"], [0])


def test_pictures_keep_their_shapes_in_buckets(tiny: Backbone, subject: Path) -> None:
    for path in subject.glob("*.png"):
        path.unlink()
    for name, size in {"wide": (200, 100), "tall": (100, 190), "square": (90, 90), "other": (50, 50)}.items():
        picture = Image.new("RGB", size, "red")
        picture.paste("blue", (0, 0, size[0] // 2, size[1]))
        picture.save(subject / f"{name}.png")
    Image.new("L", (200, 100), 255).save(subject / "wide.mask.png")
    pictures = list_images(subject)
    asked = settings(subject, aspect_buckets=True, batch=3, steps=12)
    prompts = [f"a bcd dog {picture.path.stem}" for picture in pictures]
    training = DreamBooth(
        tiny, make_training_data(tiny, [SubjectGroup(pictures, prompts, "a dog")], asked), asked
    )
    material = training.data
    shapes = {
        Path(name).stem: posterior.mean.shape[-2:]
        for name, posterior in zip(material.names, material.posteriors, strict=True)
    }
    assert shapes["square"] == shapes["other"]
    assert shapes["wide"][1] > shapes["wide"][0] == min(shapes["wide"])
    assert shapes["tall"][0] > shapes["tall"][1]
    assert len(training.data.buckets) == 3
    for bucket in training.data.buckets:
        batch = training.draw_subject_batch(bucket, generator(0))
        assert {batch.noisy.shape[-2:]} == {
            training.data.posteriors[int(row)].mean.shape[-2:] for row in batch.rows
        }
        prior = training.draw_prior_batch(bucket, generator(0))
        assert prior.noisy.shape[-2:] == batch.noisy.shape[-2:]
    squares = [len(training.draw_bucket(generator(k)).rows) == 2 for k in range(200)]
    assert 80 <= sum(squares) <= 120  # two pictures of four
    assert all(torch.isfinite(torch.tensor(report.loss)) for report in take_steps(training))


@pytest.mark.parametrize("buckets", [False, True], ids=["square", "in buckets"])
def test_random_crops_are_parts_of_their_images_with_their_prompts_and_masks(
    tiny: Backbone, subject: Path, buckets: bool
) -> None:
    for path in subject.glob("*.png"):
        path.unlink()
    for name, size in {"square": (90, 90), "wide": (200, 100)}.items():
        picture = Image.new("RGB", size, "green" if buckets else "red")  # none that was encoded before
        picture.paste("blue", (size[0] // 2, 0, *size))
        picture.save(subject / f"{name}.png")
    Image.new("L", (90, 90), 255).save(subject / "square.mask.png")
    pictures = list_images(subject)
    asked = settings(subject, aspect_buckets=buckets, random_crop=3, flip=True)
    group = SubjectGroup(pictures, ["a square", "a wide one"], "a dog")
    seen: list[tuple[str, tuple[float, ...]]] = []

    def read(
        picture: ImageRecord, size: tuple[int, int], crop: CropPosition = CROPS["center"]
    ) -> Image.Image:
        seen.append((picture.path.stem, tuple(crop)))
        return read_crop(picture, size, crop)

    data = make_training_data(tiny, [group], asked, read=read)
    names = [Path(name).stem for name in data.names]
    assert names == ["square", "wide"] * 4 * 2  # each image, its three crops, and all mirrored
    assert data.prompts == ["a square", "a wide one"] * 8
    assert [name for name, _ in seen] == ["square"] * 4 + ["wide"] * 4  # each decoded in one go
    assert len({crop for _, crop in seen}) > 4 and all(LEAST_SIDE <= crop[2] <= 1 for _, crop in seen)
    assert data.masks is not None and len(data.masks) == len(data.posteriors) == 16
    whole, cut = data.posteriors[0].mean, data.posteriors[2].mean
    assert whole.shape == cut.shape and not torch.equal(whole, cut)
    again = make_training_data(tiny, [group], asked)
    assert torch.equal(again.posteriors[2].mean, cut)  # the seed's, and the image's
    other = make_training_data(tiny, [group], replace(asked, seed=1))
    assert not torch.equal(other.posteriors[2].mean, cut)
    plain = make_training_data(tiny, [group], replace(asked, random_crop=0))
    assert torch.equal(plain.posteriors[0].mean, whole) and len(plain.posteriors) == 4


def test_class_pictures_are_square_and_say_so(tiny: Backbone, subject: Path) -> None:
    Image.new("RGB", (200, 100)).save(subject / "wide.png")
    asked = settings(subject, aspect_buckets=True, prior="class-images")
    with pytest.raises(UserError, match="Class pictures are square"):
        begun(tiny, subject, asked)
    for path in subject.glob("?.png"):  # all of them of one shape
        path.unlink()
    with pytest.raises(UserError, match="Class pictures are square"):
        begun(tiny, subject, asked)


def test_a_layer_pattern_gets_its_own_rank(tiny: Backbone, subject: Path) -> None:
    training, _ = begun(tiny, subject, settings(subject, rank_pattern=("attn2.to_k=3",)))
    ranks = {
        "attn2.to_k" in name: value.shape[0]
        for name, value in training.parameters.items()
        if "lora_A" in name
    }
    assert ranks == {True: 3, False: 2}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "magic"}, "textual-inversion"),
        ({"loss_weighting": "magic"}, "min-snr"),
        ({"optimizer": "magic"}, "prodigy"),
        ({"rank_pattern": ("attn2",)}, "PATTERN=RANK"),
        ({"rank_pattern": ("attn3=8",)}, "attn3 decides the rank of no layer"),
        ({"adapter": "magic"}, "lokr"),
    ],
)
def test_an_unknown_choice_names_those_there_are(
    tiny: Backbone, subject: Path, changes: dict[str, object], named: str
) -> None:
    with pytest.raises(UserError, match=named):
        next(begun(tiny, subject, settings(subject, **changes))[0].losses(1))


def test_custom_diffusion_keeps_keys_and_values_alone(tiny: Backbone, subject: Path, tmp_path: Path) -> None:
    training, _ = begun(tiny, subject, settings(subject, method="custom-diffusion"))
    for _ in take_steps(training):
        pass
    files = training.write(tmp_path, {})
    names = set(read_tensors(tmp_path / files["changed"])[0])
    assert names
    assert all("attn2.to_k" in name or "attn2.to_v" in name for name in names)


def test_custom_diffusion_is_refused_where_attn2_attends_to_the_image(tmp_path: Path) -> None:
    model = Backbone.open(str(tiny_stable_diffusion_3(tmp_path)), device="cpu", precision="fp32")
    assert any("attn2.to_k" in name for name, _ in model.denoiser.named_parameters())
    with pytest.raises(UserError, match="jointly, and --method custom-diffusion trains cross-attention"):
        Weights(model, settings(tmp_path, method="custom-diffusion"), pattern=CROSS_ATTENTION)
