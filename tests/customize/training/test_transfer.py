"""`customize transfer`, `--preview-on` and `--on`: an adapter of a base on its few-step model, and what survives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import read_concept
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.diffusion.noise import generator
from backbone.io.console import UserError
from backbone.io.files import read_json, read_jsonl, read_tensors, write_json
from backbone.models.few_step.model import get_sampling_defaults, open_few_step
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample_latents
from backbone.training.run import take_steps
from customize.cli import app
from customize.evaluation.metrics import ConceptMetrics, EarlyStopping
from customize.evaluation.survival import Fidelity, Survival
from customize.objectives.transfer import Transfer
from customize.settings import read_settings
from customize.training.transfer.run import prepare_fit, transfer_run
from customize.training.transfer.settings import TransferOptions
from tests.syncs import count_waits
from tests.tiny import tiny_moji, tiny_pipeline, tiny_z_image

TRAIN = ("train", "--token", "[V]", "--class", "dog", "--precision", "fp32", "--device", "cpu")


def few_step_of(base: Path, folder: Path, part: str = "unet") -> Path:
    """A copy of a tiny model whose denoiser is moved a little, drawn with in two steps without guidance."""
    shutil.copytree(base, folder, symlinks=True)
    network: Any = Backbone.open(str(base), device="cpu", precision="fp32").denoiser
    with torch.no_grad():
        for number, value in enumerate(network.parameters()):
            value.add_(0.05 * torch.randn(value.shape, generator=generator("few", number)))
    network.save_pretrained(folder / part)
    usual = json.loads((folder / "limner.json").read_text())
    (folder / "limner.json").write_text(json.dumps(usual | {"steps": 2, "guidance": 1.0}))
    return folder


def call(*words: str) -> str:
    """`customize` with these words; its `UserError` is raised."""
    done = CliRunner().invoke(app, list(words))
    if done.exception is not None:
        raise done.exception
    return done.output


@pytest.fixture(scope="module")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dog/`, `few/` and `run`, trained on the tiny base for three quick steps."""
    from PIL import Image

    place = tmp_path_factory.mktemp("transfer")
    (place / "dog").mkdir()
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (64, 64), colour).save(place / "dog" / f"{number}.png")
    few_step_of(tiny_folder, place / "few")
    more = ("--steps", "3", "--learning-rate", "2e-2", "--lr-warmup-steps", "0", "--evaluation-steps", "0")
    images, out = str(place / "dog"), str(place / "run")
    call(*TRAIN, "--images", images, "--model", str(tiny_folder), *more, "--out", out)
    return place


def asked(trained: Path, **more: Any) -> TransferOptions:
    usual = {"steps": 4, "answers": 3, "checkpointing_steps": 2, "learning_rate": 5e-3, "lr_warmup_steps": 0}
    return TransferOptions(run=trained / "run", to=str(trained / "few"), **(usual | more))


@pytest.fixture(scope="module")
def make_fit(trained: Path) -> Callable[..., Transfer]:
    """Makes a fit ready to begin."""

    def make(**more: Any) -> Transfer:
        settings, concept = read_settings(trained / "run"), read_concept(trained / "run")
        base = Backbone.open(settings.model, device="cpu", precision="fp32")
        few = open_few_step(base, str(trained / "few"))
        moved = replace(concept, fingerprint=few.fingerprint)
        return prepare_fit(asked(trained, **more), settings, base, concept, few, moved)

    return make


def test_a_step_is_the_error_of_x0_on_both_sets_of_answers_at_every_level(
    make_fit: Callable[..., Transfer],
) -> None:
    fit = make_fit(prior_loss_weight=0.5)
    found = [float(loss.detach()) for loss in fit.losses(1)]
    assert len(found) == len(fit.schedule) - 1 == 2
    for k, loss in enumerate(found):
        random, level = generator(0, 1, k), fit.schedule[k]
        own = torch.randint(3, (2,), generator=random)
        others = torch.randint(3, (2,), generator=random)
        a, b = float(level.a), float(level.b)
        noise, clean = fit.subject.noise[own], fit.subject.clean[own]
        noisy = noise * (a**2 + b**2) ** 0.5 if k == 0 else a * clean + b * noise
        expected = 0.0
        for states, wanted, rows, weight in (
            (noisy, clean, own, 1.0),
            (fit.prior.states[others, k], fit.prior.clean[others, k], 3 + others, 0.5),
        ):
            estimate = fit.model.predictor(fit.texts[rows])(states, level)
            expected += weight * float((estimate.clean - wanted).square().mean().detach())
        assert loss == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_no_step_of_a_fit_waits_for_the_device(make_fit: Callable[..., Transfer]) -> None:
    fit = make_fit(steps=8)
    assert count_waits(fit, fit.model, fit.empty.tensors()) == []


def test_the_subject_s_answers_are_the_base_run_s_images_of_the_same_noise(
    make_fit: Callable[..., Transfer], trained: Path
) -> None:
    fit = make_fit()
    settings, concept = read_settings(trained / "run"), read_concept(trained / "run")
    base = Backbone.open(settings.model, device="cpu", precision="fp32")
    load_concepts(base, [concept])
    (drawn,) = sample_latents(
        base, fit.subject.requests, steps=settings.sample_steps, guidance=settings.guidance, seed=0
    )
    assert (drawn - fit.subject.clean).abs().max() < 1e-5
    assert fit.prior.requests[0].prompt == "a photo of a dog in the snow"


def test_the_few_step_model_s_own_trajectory_ends_in_its_own_image(
    make_fit: Callable[..., Transfer], trained: Path
) -> None:
    fit = make_fit()
    few = Backbone.open(str(trained / "few"), device="cpu", precision="fp32")
    (drawn,) = sample_latents(few, fit.prior.requests, steps=2, guidance=1.0, seed=0)
    assert (drawn - fit.prior.clean[:, -1]).abs().max() < 0.05 * drawn.abs().max()


def test_a_fit_comes_nearer_to_the_subject_and_an_adapter_of_zeros_is_at_the_class(
    make_fit: Callable[..., Transfer],
) -> None:
    fit = make_fit(steps=12, prior_loss_weight=0.0)
    first, *_, last = [step.figures for step in take_steps(fit)]
    assert last["subject_error"] < first["subject_error"]
    untouched = make_fit()
    with torch.no_grad():
        for value in untouched.parameters.values():
            nn.init.zeros_(value)
    _, prior = untouched.errors(untouched.schedule[0], untouched.draw(0, generator(0)))
    assert float(prior.detach()) < 1e-8


def test_a_transfer_is_an_ordinary_run_of_the_few_step_model_and_goes_on_bit_for_bit(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = transfer_run(asked(trained, out=tmp_path / "whole"))
    one = asked(trained, out=tmp_path / "parts")

    def stop(self: Transfer, run: Path, header: dict[str, str]) -> dict[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Transfer, "write", stop)
        patch.setattr("customize.training.transfer.run.drive", lambda fit, run, **_: half(fit, run))
        with pytest.raises(KeyboardInterrupt):
            transfer_run(one)
    with pytest.raises(UserError, match="no transfer that this command began"):
        transfer_run(replace(one, out=None, resume=tmp_path / "parts", batch=1))
    parts = transfer_run(replace(one, out=None, resume=tmp_path / "parts"))
    left, right = (read_tensors(run / LORA_WEIGHTS)[0] for run in (whole, parts))
    assert left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)
    before = read_tensors(trained / "run" / LORA_WEIGHTS)[0]
    assert any(not torch.equal(left[key], before[key]) for key in left)
    settings, concept = read_settings(whole), read_concept(whole)
    few = Backbone.open(settings.model, device="cpu", precision="fp32")
    assert (settings.sample_steps, settings.guidance) == (2, 1.0)
    assert len(load_concepts(few, [concept])) == 1
    with pytest.raises(UserError, match="run of `customize transfer`"):
        call("train", "--resume", str(whole))
    with pytest.raises(UserError, match="already holds a run"):
        transfer_run(asked(trained, out=whole))


def half(fit: Transfer, run: Path) -> None:
    """Two of the steps, saved."""
    for _ in take_steps(fit, until=2):
        pass
    fit.save(run)


def test_a_run_is_drawn_on_the_few_step_model_as_its_adapter_there_says(
    trained: Path, tmp_path: Path
) -> None:
    sample = ("sample", "a [V] dog", "--concept", str(trained / "run"), "--precision", "fp32")
    call(*sample, "--on", str(trained / "few"), "--out", str(tmp_path / "o"))
    record = read_json(tmp_path / "o" / "samples.json")
    assert (record["steps"], record["guidance"]) == (2, 1.0)
    with pytest.raises(UserError, match="the model itself"):
        call(*sample, "--on", read_settings(trained / "run").model, "--out", str(tmp_path / "p"))
    with pytest.raises(UserError, match="Give one of them"):
        call(*sample, "--on", str(trained / "few"), "--fast")
    assert not (tmp_path / "p").exists()


def test_survival_is_the_share_of_the_gain_and_of_the_obedience() -> None:
    figures = (Fidelity(0.5, 0.3), Fidelity(0.8, 0.25), Fidelity(0.4, 0.28), Fidelity(0.55, 0.2))
    survived = Survival("few", 4, *figures)
    assert survived.subject == pytest.approx(0.5)
    assert survived.prompt == pytest.approx(0.8)
    assert "50% of the subject fidelity gained and 80%" in survived.sentence()
    unlearned = replace(survived, base=Fidelity(0.505, None))
    assert unlearned.subject is None and unlearned.prompt is None


def test_what_cannot_be_transferred_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "run", tmp_path / "words")
    concept = read_concept(trained / "run")
    replace(concept, weights="", words="learned_embeds.safetensors").write(tmp_path / "words")
    with pytest.raises(UserError, match="words alone"):
        call("transfer", str(tmp_path / "words"), "--to", str(trained / "few"))
    with pytest.raises(UserError, match="the model itself"):
        transfer_run(replace(asked(trained), to=read_settings(trained / "run").model))
    with pytest.raises(UserError, match="--quantize"):
        call(*TRAIN, "--images", str(trained / "dog"), "--preview-on", "x", "--quantize", "nf4")


def test_a_run_whose_base_lies_elsewhere_now_is_moved_and_measured_with_its_new_name(
    trained: Path, tmp_path: Path
) -> None:
    run, base = tmp_path / "run", tmp_path / "new-base"
    record = read_json(Path(shutil.copytree(trained / "run", run)) / "settings.json")
    shutil.copytree(record["settings"]["model"], base, symlinks=True)
    record["settings"]["model"] = str(tmp_path / "gone")
    write_json(run / "settings.json", record)
    few = ("--to", str(trained / "few"), "--steps", "1", "--answers", "1", "--out", str(tmp_path / "moved"))
    with pytest.raises(UserError, match=r"There is no|does not exist"):
        call("transfer", str(run), *few)
    call("transfer", str(run), *few, "--model", str(base))
    assert read_json(tmp_path / "moved" / "settings.json")["transfer"]["model"] == str(base)
    one = ("evaluate", str(run), "--prompts", "a {} at night", "--count", "1", "--model")
    another = tiny_pipeline(tmp_path / "another", seed=3)
    for more in ((), ("--on", str(trained / "few"))):
        with pytest.raises(UserError, match="with other weights than"):
            call(*one, str(another), *more)
        with pytest.raises(UserError, match=r"scorer|CLIP"):  # the tiny model has none of its own
            call(*one, str(base), *more)
    assert not list(run.glob("dreambench*")) and not list(run.glob("survival*"))


@pytest.mark.slow
def test_a_run_is_evaluated_on_the_few_step_model_and_keeps_what_is_best_there(
    trained: Path, tmp_path: Path
) -> None:
    base = tiny_moji(tmp_path / "base")
    few = few_step_of(base, tmp_path / "few")
    more = ("--steps", "2", "--evaluation-steps", "1", "--validation-steps", "1", "--preview-on", str(few))
    run = tmp_path / "run"
    call(*TRAIN, "--images", str(trained / "dog"), "--model", str(base), *more, "--out", str(run))
    there = read_jsonl(run / "on" / "evaluations.jsonl")
    assert [line["step"] for line in there] == [0, 1, 2]
    assert [line["step"] for line in read_jsonl(run / "evaluations.jsonl")] == [0, 1, 2]
    kept: EarlyStopping[ConceptMetrics] = EarlyStopping(2)
    kept.history += read_jsonl(run / "on" / "evaluations.jsonl", ConceptMetrics)
    assert read_tensors(run / "best" / LORA_WEIGHTS)[1]["limner_step"] == str(kept.best.step)
    assert {path.name for path in (run / "on").iterdir()} == {
        "evaluations", "evaluations.jsonl", "previews", "sheet.png",
    }  # fmt: skip
    assert read_json(run / "settings.json")["survival"]["steps"] == 2
    assert f"on {few}" in (run / "report.html").read_text()
    call("evaluate", str(run), "--on", str(few), "--prompts", "a {} at night", "--count", "1")
    assert read_json(run / "survival" / "table.json")["survival"]["model"] == str(few)


@pytest.mark.slow
def test_a_transformer_s_run_is_transferred(trained: Path, tmp_path: Path) -> None:
    base = tiny_z_image(tmp_path / "z-image")
    few = few_step_of(base, tmp_path / "z-image-turbo", "transformer")
    more = ("--steps", "2", "--evaluation-steps", "0", "--out", str(tmp_path / "run"))
    call(*TRAIN, "--images", str(trained / "dog"), "--model", str(base), *more)
    call("transfer", str(tmp_path / "run"), "--to", str(few), "--steps", "2", "--answers", "2")
    moved = read_concept(tmp_path / "run-on-z-image-turbo")
    opened = Backbone.open(moved.model, device="cpu", precision="fp32")
    assert get_sampling_defaults(opened).steps == 2
    load_concepts(opened, [moved])
    assert list(sample_latents(opened, [Request("a dog", (0, 0))], steps=2, guidance=1.0, seed=0))
