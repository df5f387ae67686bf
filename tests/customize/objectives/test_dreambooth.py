"""DreamBooth: what its loss says, and that the class stays what it was."""

from __future__ import annotations

import errno
import multiprocessing
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from backbone.diffusion.losses import squared_error
from backbone.diffusion.noise import generator, vp
from backbone.diffusion.schedules import alphas_cumprod, logit_normal_levels
from backbone.families.base import NoisePath
from backbone.io.console import UserError
from backbone.media.sources.pictures import list_images
from backbone.media.sources.record import ImageRecord
from backbone.media.transforms import crop_square, to_tensor
from backbone.models.cache import encode_prompts_cached, find_cache_folder
from backbone.models.encode import View, encode_views
from backbone.models.model import Backbone, Posterior
from backbone.training.base_predictions import base_predictions, draw_stratified_levels
from backbone.training.run import take_steps
from customize.data.dataset import Bucket, SubjectGroup, TrainingData, make_training_data
from customize.objectives.dreambooth import DreamBooth, make_timestep_weights
from customize.settings import Settings, as_command
from customize.training.preflight import refuse_idle_range


def settings(subject: Path, **changes: object) -> Settings:
    base = Settings(
        images=str(subject),
        token="[V]",
        class_noun="dog",
        steps=30,
        batch=4,
        rank=4,
        learning_rate=5e-3,
        lora_layers="attention",
        precision="fp32",
        device="cpu",
        prior_draws=8,
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def dataset(model: Backbone, subject: Path, asked: Settings) -> TrainingData:
    pictures = list_images(subject)
    return make_training_data(model, [SubjectGroup(pictures, ["a bcd dog"] * len(pictures), "a dog")], asked)


def vp_path(count: int) -> NoisePath:
    """The noise path of a schedule of this many βs."""
    levels = vp(alphas_cumprod(train_steps=count), torch.arange(count))
    return NoisePath("epsilon", levels, lambda steps, size: levels)


def latents(model: Backbone, pictures: Sequence[ImageRecord]) -> Tensor:
    """The posteriors' means of images [N, C, H, W]."""
    size = (model.resolution, model.resolution)
    return encode_views(model, [View(picture, size) for picture in pictures])[False].column("mean")[:]


def test_the_prior_term_is_zero_for_an_untouched_adapter(tiny: Backbone, subject: Path) -> None:
    with_prior = settings(subject)
    ready = dataset(tiny, subject, with_prior)
    training = DreamBooth(tiny, ready, with_prior)
    with torch.no_grad():
        both = float(next(training.losses(1)))
        training.data = replace(ready, buckets=[Bucket(ready.buckets[0].rows)])
        subject_only = float(next(training.losses(1)))
    assert both == pytest.approx(subject_only, rel=1e-5)


def test_the_prior_term_grows_once_the_class_changes(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject)
    ready = dataset(tiny, subject, asked)
    training = DreamBooth(tiny, ready, asked)
    for parameter in training.parameters.values():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with_prior = float(next(training.losses(1)))
        training.data = replace(ready, buckets=[Bucket(ready.buckets[0].rows)])
        alone = float(next(training.losses(1)))
    assert with_prior > alone * 1.01


def test_the_dropout_acts_on_the_text_encoder_s_adapter_too(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, train_text_encoder=True, lora_dropout=0.5, prior="off")
    training = DreamBooth(tiny, dataset(tiny, subject, asked), asked)
    text = [value for name, value in training.parameters.items() if name.startswith("text_encoder.")]
    for parameter in text:  # an untouched adapter gives nothing that could be dropped
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    rows = torch.tensor([0])
    with torch.no_grad():
        whole = training.encode_conditions(rows).text["hidden"]
        dropped = []
        for step, micro in ((1, 0), (1, 0), (1, 1), (2, 0)):
            with training.dropout(step, micro):
                dropped.append(training.encode_conditions(rows).text["hidden"])
        assert torch.equal(whole, training.encode_conditions(rows).text["hidden"])
    assert torch.equal(dropped[0], dropped[1]) and not torch.equal(dropped[0], whole)
    assert not torch.equal(dropped[0], dropped[2]) and not torch.equal(dropped[0], dropped[3])


def test_every_micro_batch_of_a_step_has_a_dropout_of_its_own(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, lora_dropout=0.5, prior="off", gradient_accumulation_steps=2)
    training = DreamBooth(tiny, dataset(tiny, subject, asked), asked)
    masks = []
    for micro in (0, 1, 0):
        with training.dropout(3, micro):
            masks.append(torch.rand(8))
    assert torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], masks[1])
    assert len(list(training.losses(1))) == 2


@pytest.mark.slow
def test_preservation_keeps_the_class_nearer_to_what_it_was(tiny_folder: Path, subject: Path) -> None:
    def change(weight: float) -> float:
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        asked = settings(subject, prior_loss_weight=weight)
        ready = dataset(model, subject, asked)
        fresh = base_predictions(
            model, ready.posteriors, encode_prompts_cached(model, ["a dog"]), count=16, seed=99
        )
        for _ in take_steps(DreamBooth(model, ready, asked)):
            pass
        class_prompt = encode_prompts_cached(model, ["a dog"]).repeat(16)
        with torch.no_grad():
            prediction = model.predict(fresh.noisy, fresh.level, class_prompt)
        return float(squared_error(prediction, fresh.prediction).mean())

    assert change(1.0) < 0.7 * change(0.0)


@pytest.mark.slow
def test_training_lowers_the_error_on_the_subject(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, prior_loss_weight=0.0, steps=120)
    training = DreamBooth(tiny, dataset(tiny, subject, asked), asked)
    with torch.no_grad():
        before = sum(float(next(training.losses(10_000 + k))) for k in range(8))
    for _ in take_steps(training):
        pass
    with torch.no_grad():
        after = sum(float(next(training.losses(10_000 + k))) for k in range(8))
    assert after < 0.97 * before


def test_only_the_adapter_changes(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, steps=3)
    training = DreamBooth(tiny, dataset(tiny, subject, asked), asked)
    before = {name: value.detach().clone() for name, value in tiny.denoiser.named_parameters()}
    for _ in take_steps(training):
        pass
    for name, value in tiny.denoiser.named_parameters():
        assert torch.equal(value, before[name]) == (name not in training.parameters)


def test_a_loss_that_is_not_finite_names_its_picture_and_step(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject)
    ready = dataset(tiny, subject, asked)
    broken = ready.posteriors[1]
    posteriors = [*ready.posteriors]
    posteriors[1] = Posterior(broken.mean * float("nan"), broken.std)
    training = DreamBooth(tiny, replace(ready, posteriors=posteriors), asked)
    with pytest.raises(UserError, match=re.escape(f"not finite at {list_images(subject)[1].path}.")) as said:
        for _ in take_steps(training):
            pass
    assert f"at step {training.done + 1}:" in str(said.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"flip": True, "noise_offset": 0.1},
        pytest.param({"batch": 3, "prior": "off"}, marks=pytest.mark.slow),
    ],
)
def test_posteriors_on_disk_train_as_those_in_memory_do_however_many_make_batches_ahead(
    tiny_folder: Path, subject: Path, changes: dict[str, object]
) -> None:
    def trained(in_memory: bool, workers: int) -> dict[str, Tensor]:
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        asked = settings(subject, steps=2, workers=workers, **changes)
        ready = dataset(model, subject, asked)
        if in_memory:
            ready = replace(ready, posteriors=list(ready.posteriors))
        training = DreamBooth(model, ready, asked)
        before = set(multiprocessing.active_children())
        for _ in take_steps(training):
            pass
        assert set(multiprocessing.active_children()) <= before, "no worker process is left"
        return {name: value.detach() for name, value in training.parameters.items()}

    whole = trained(in_memory=True, workers=0)
    for workers in (0, 2):
        assert all(torch.equal(value, whole[name]) for name, value in trained(False, workers).items())


def test_the_encoders_are_freed_before_training(tiny: Backbone, subject: Path) -> None:
    dataset(tiny, subject, settings(subject))
    assert "autoencoder" not in tiny.__dict__
    assert "text_encoder" not in tiny.__dict__


def test_latents_are_remembered_by_content_not_by_name(tiny: Backbone, subject: Path, tmp_path: Path) -> None:
    first = latents(tiny, list_images(subject))
    files = set((find_cache_folder() / "images").rglob("*.arrow"))
    (subject / "0.png").rename(subject / "9.png")  # now last in order
    again = latents(tiny, list_images(subject))
    assert set((find_cache_folder() / "images").rglob("*.arrow")) == files
    assert torch.equal(again[2], first[0])
    assert torch.equal(again[0], first[1])


@pytest.mark.parametrize("seed", range(3))
def test_no_shuffling_of_a_folder_ever_pairs_a_wrong_caption_or_picture(
    tiny: Backbone, tmp_path: Path, seed: int
) -> None:
    """Pictures change, come, go and swap names at random; each must keep its own caption and its own latents."""
    random = Random(seed)
    folder = tmp_path / "pictures"
    folder.mkdir()

    def paint(name: str) -> None:
        shade = tuple(random.randrange(256) for _ in range(3))
        image = Image.new("RGB", (64, 64), shade)
        # What is one colour all over, a norm divides by nearly nothing
        image.paste("white", (32, 32, 64, 64))
        image.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a bcd dog in {shade}")

    for name in "abc":
        paint(name)
    for _ in range(6):
        names = sorted(path.stem for path in folder.glob("*.png"))
        match random.choice(["change", "add", "swap", "remove"]):
            case "change":
                paint(random.choice(names))
            case "add":
                paint(f"n{random.randrange(1000)}")
            case "swap":
                one, other = random.sample(names, 2)
                for ending in ("png", "txt"):
                    (folder / f"{one}.{ending}").rename(folder / f"kept.{ending}")
                    (folder / f"{other}.{ending}").rename(folder / f"{one}.{ending}")
                    (folder / f"kept.{ending}").rename(folder / f"{other}.{ending}")
            case "remove" if len(names) > 2:
                gone = random.choice(names)
                (folder / f"{gone}.png").unlink()
                (folder / f"{gone}.txt").unlink()
        found = list_images(folder)
        for picture, mean in zip(found, latents(tiny, found), strict=True):
            shade = picture.open().getpixel((0, 0))
            assert picture.caption == f"a bcd dog in {shade}"
            with torch.no_grad():
                fresh = tiny.encode(to_tensor(crop_square(picture.open(), tiny.resolution))[None])
            assert torch.allclose(mean, fresh.mean[0], atol=1e-5)


def test_a_damaged_cache_is_computed_anew(tiny: Backbone, subject: Path) -> None:
    first = latents(tiny, list_images(subject))
    for path in (find_cache_folder() / "images").rglob("*.arrow"):
        path.write_bytes(b"broken")
    assert torch.equal(latents(tiny, list_images(subject)), first)


def test_a_full_cache_disk_is_done_without(
    tiny: Backbone, subject: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr("backbone.io.files._flush", full)
    monkeypatch.setenv("LIMNER_CACHE", str(subject.parent / "full"))
    assert len(latents(tiny, list_images(subject))) == 3
    assert not list((subject.parent / "full").rglob("*.*"))


def test_one_level_falls_in_every_stratum() -> None:
    levels = draw_stratified_levels(10, 1000, generator(1))
    assert sorted(int(level) // 100 for level in levels) == list(range(10))


def test_unknown_layers_are_a_clear_mistake(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, lora_layers="everything")
    with pytest.raises(UserError, match="attention, all"):
        DreamBooth(tiny, dataset(tiny, subject, asked), asked)


def test_the_repeating_command_names_what_was_chosen(subject: Path) -> None:
    command = as_command(settings(subject, seed=7, rank=3), Path("runs/x"))
    assert "--rank 3" in command
    assert "--seed 7" in command
    assert "--token '[V]'" in command
    assert command.endswith("--out runs/x")


def test_levels_of_a_bias_are_drawn_so_many_times_as_often(subject: Path) -> None:
    asked = settings(
        subject,
        timestep_bias_strategy="later",
        timestep_bias_portion=0.25,
        timestep_bias_multiplier=3.0,
    )
    path = vp_path(1000)
    weights = make_timestep_weights(path, asked)
    levels = draw_stratified_levels(1200, 1000, generator(1), weights)
    assert (
        sorted(levels.tolist())[599] < 750 <= sorted(levels.tolist())[600]
    )  # half of them in the last quarter
    earlier = make_timestep_weights(path, replace(asked, timestep_bias_strategy="earlier"))
    assert int((draw_stratified_levels(1200, 1000, generator(1), earlier) < 250).sum()) == 600
    assert make_timestep_weights(path, settings(subject)) is None
    middle = replace(asked, timestep_bias_strategy="range", timestep_bias_begin=200, timestep_bias_end=600)
    for count, (first, end) in ((1000, (200, 600)), (50, (10, 30))):
        weights = make_timestep_weights(vp_path(count), middle)
        assert weights is not None
        assert (weights[first:end] == 3).all() and weights.sum() == count + 2 * (end - first)


def test_a_range_of_a_flow_s_timesteps_is_one_of_its_times_and_not_of_its_quantiles(subject: Path) -> None:
    levels = logit_normal_levels(1000, shift=3.0)
    path = NoisePath("flow", levels, lambda steps, size: levels)
    early = settings(
        subject, timestep_bias_strategy="range", timestep_bias_end=250, timestep_bias_multiplier=4.0
    )
    weights = make_timestep_weights(path, early)
    assert weights is not None and levels.time is not None
    assert torch.equal(weights == 4, levels.time < 250)


def test_a_range_of_timesteps_at_which_a_model_is_never_trained_is_refused(subject: Path) -> None:
    levels = logit_normal_levels(1000, shift=3.0)
    path = NoisePath("flow", levels, lambda steps, size: levels)
    model: Any = SimpleNamespace(path=path, location=SimpleNamespace(name="flow"))
    asked = settings(subject, timestep_bias_strategy="range", timestep_bias_end=90)
    with pytest.raises(UserError, match=r"is trained at timesteps from 100 to 988, and the range .* 0 to 90"):
        refuse_idle_range(asked, model)
    refuse_idle_range(replace(asked, timestep_bias_end=150), model)
    refuse_idle_range(settings(subject), model)


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ({"timestep_bias_strategy": "later", "timestep_bias_multiplier": 1.0}, "draws all timesteps alike"),
        ({"timestep_bias_strategy": "range"}, "from 0 to 1000, holds all of the timesteps"),
        (
            {"timestep_bias_strategy": "range", "timestep_bias_begin": 300, "timestep_bias_end": 300},
            "holds none of the timesteps 0 to 1000. Give --timestep-bias-begin",
        ),
    ],
)
def test_a_bias_that_changes_nothing_is_refused(subject: Path, said: dict[str, Any], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        settings(subject, **said)


def test_levels_that_all_weigh_alike_are_those_without_weights() -> None:
    plain = draw_stratified_levels(64, 1000, generator(2))
    assert torch.equal(plain, draw_stratified_levels(64, 1000, generator(2), torch.full((1000,), 7.0)))


def test_levels_without_weight_are_never_drawn() -> None:
    weights = torch.zeros(1000)
    weights[400:403] = 1
    drawn = draw_stratified_levels(30, 1000, generator(3), weights)
    assert dict(Counter(drawn.tolist())) == {400: 10, 401: 10, 402: 10}
