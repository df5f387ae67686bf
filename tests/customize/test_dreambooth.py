"""DreamBooth: what its loss says, and that the class stays what it was."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from backbone.bank import bank_of, stratified_levels
from backbone.cache import cache_folder, encoded, encoded_prompts
from backbone.console import UserError
from backbone.images import read_folder
from backbone.loop import generator
from backbone.model import Backbone
from customize.dreambooth import Group, Material, Training, prepare
from customize.settings import Settings, as_flags


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


def material(model: Backbone, subject: Path, asked: Settings) -> Material:
    pictures = read_folder(subject)
    return prepare(model, [Group(pictures, ["a bcd dog"] * len(pictures), "a dog")], asked)


def test_the_prior_term_is_zero_for_an_untouched_adapter(tiny: Backbone, subject: Path) -> None:
    with_prior = settings(subject)
    ready = material(tiny, subject, with_prior)
    training = Training(tiny, ready, with_prior)
    with torch.no_grad():
        both = float(next(training.losses(1)))
        training.material = replace(ready, bank=None)
        subject_only = float(next(training.losses(1)))
    assert both == pytest.approx(subject_only, rel=1e-5)


def test_the_prior_term_grows_once_the_class_changes(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject)
    ready = material(tiny, subject, asked)
    training = Training(tiny, ready, asked)
    for parameter in training.parameters.values():
        parameter.data += 0.5 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with_prior = float(next(training.losses(1)))
        training.material = replace(ready, bank=None)
        alone = float(next(training.losses(1)))
    assert with_prior > alone * 1.01


def test_preservation_keeps_the_class_nearer_to_what_it_was(tiny_folder: Path, subject: Path) -> None:
    def change(weight: float) -> float:
        model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
        asked = settings(subject, prior_loss_weight=weight)
        ready = material(model, subject, asked)
        fresh = bank_of(model, ready.posteriors, encoded_prompts(model, ["a dog"]), draws=16, seed=99)
        for _ in Training(model, ready, asked).steps():
            pass
        text = {
            name: value.expand(16, *value.shape[1:])
            for name, value in encoded_prompts(model, ["a dog"]).items()
        }
        time = model.path.levels.time
        assert time is not None
        with torch.no_grad():
            said = model.family.network(model.denoiser, text)(fresh.noisy, time[fresh.level])
        return float((said - fresh.prediction).square().mean())

    assert change(1.0) < 0.7 * change(0.0)


def test_training_lowers_the_error_on_the_subject(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, prior_loss_weight=0.0, steps=120)
    training = Training(tiny, material(tiny, subject, asked), asked)
    with torch.no_grad():
        before = sum(float(next(training.losses(10_000 + k))) for k in range(8))
    for _ in training.steps():
        pass
    with torch.no_grad():
        after = sum(float(next(training.losses(10_000 + k))) for k in range(8))
    assert after < 0.97 * before


def test_only_the_adapter_changes(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, steps=3)
    training = Training(tiny, material(tiny, subject, asked), asked)
    before = {name: value.detach().clone() for name, value in tiny.denoiser.named_parameters()}
    for _ in training.steps():
        pass
    for name, value in tiny.denoiser.named_parameters():
        assert torch.equal(value, before[name]) == (name not in training.parameters)


def test_the_encoders_are_freed_before_training(tiny: Backbone, subject: Path) -> None:
    material(tiny, subject, settings(subject))
    assert "autoencoder" not in tiny.__dict__
    assert "text_encoder" not in tiny.__dict__


def test_latents_are_remembered_by_content_not_by_name(tiny: Backbone, subject: Path, tmp_path: Path) -> None:
    first = encoded(tiny, read_folder(subject))
    files = set((cache_folder() / "latents").rglob("*.safetensors"))
    (subject / "0.png").rename(subject / "9.png")  # now last in order
    again = encoded(tiny, read_folder(subject))
    assert set((cache_folder() / "latents").rglob("*.safetensors")) == files
    assert torch.equal(again[2].mean, first[0].mean)
    assert torch.equal(again[0].mean, first[1].mean)


def test_a_damaged_cache_is_computed_anew(tiny: Backbone, subject: Path) -> None:
    first = encoded(tiny, read_folder(subject))
    for path in (cache_folder() / "latents").rglob("*.safetensors"):
        path.unlink()  # `first` may still be mapped onto the old file
        path.write_bytes(b"broken")
    assert torch.equal(encoded(tiny, read_folder(subject))[0].mean, first[0].mean)


def test_one_level_falls_in_every_stratum() -> None:
    levels = stratified_levels(10, 1000, generator(1))
    assert sorted(int(level) // 100 for level in levels) == list(range(10))


def test_unknown_layers_are_a_clear_mistake(tiny: Backbone, subject: Path) -> None:
    asked = settings(subject, lora_layers="everything")
    with pytest.raises(UserError, match="attention, all"):
        Training(tiny, material(tiny, subject, asked), asked)


def test_the_repeating_command_names_what_was_chosen(subject: Path) -> None:
    command = as_flags(settings(subject, seed=7, rank=3), Path("runs/x"))
    assert "--rank 3" in command
    assert "--seed 7" in command
    assert "--token '[V]'" in command
    assert command.endswith("--out runs/x")
