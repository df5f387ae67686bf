"""A run that begins with what an earlier one has learned, in place of new weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from PIL import Image

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import Concept, read_concept
from backbone.adapters.lora import LORA_WEIGHTS
from backbone.io.console import UserError
from backbone.io.files import read_tensors
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from customize.evaluation import metrics
from customize.evaluation.metrics import EarlyStopping
from customize.methods.begin import copy_learned
from customize.methods.registry import make_trainable
from customize.methods.weights import CHANGED
from customize.settings import resolve_settings
from customize.training import evaluation
from customize.training.start import start
from tests.customize.training.test_edits import lay

NOTHING = 1e-12  # a learning rate by which nothing moves


@pytest.fixture
def learn(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A run of one step on two images, by settings."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dog").mkdir()
    for number, colour in enumerate(("red", "green")):
        Image.new("RGB", (64, 64), colour).save(tmp_path / "dog" / f"{number}.png")

    def run(name: str, **asked: Any) -> Path:
        of = (
            {} if "pairs" in asked else {"images": "dog", "token": "[V]", "class_noun": "dog", "prior": "off"}
        )
        usual = {
            **of, "model": str(tiny_folder), "steps": 1, "batch": 2, "rank": 2, "lora_alpha": 2.0,
            "lr_warmup_steps": 0, "evaluation_steps": 0, "sample_steps": 1, "sheet_prompts": ("a dog",),
            "device": "cpu", "precision": "fp32", "learning_rate": 1e-2,
        }  # fmt: skip
        left_out = ["sheet_prompts"] if "pairs" in asked else []
        left_out += ["rank", "lora_alpha"] if asked.get("method") == "full" else []
        usual = {name: value for name, value in usual.items() if name not in left_out}
        return start(usual | asked, out=Path("runs") / name)

    return run


def predictions(model_folder: Path, run: Path | None) -> list[float]:
    """What a model with a run's adapter predicts of the same noise."""
    model = Backbone.open(str(model_folder), device="cpu", precision="fp32")
    if run is not None:
        load_concepts(model, [read_concept(run)])
    noisy = torch.randn((1, *model.latent_shape), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return model.predict(noisy, torch.tensor([20]), model.encode_prompts(["a dog"])).flatten().tolist()


def same(one: Path, other: Path) -> bool:
    first, second = read_tensors(one)[0], read_tensors(other)[0]
    return first.keys() == second.keys() and all(
        torch.allclose(first[name].float(), second[name].float(), atol=1e-6) for name in first
    )


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"train_text_encoder": True, "text_encoder_lr": 1e-2},
        {"adapter": "dora", "ema_decay": 0.9},
    ],
    ids=["lora", "text encoders", "dora"],
)
def test_a_run_begins_with_the_adapter_of_another(learn: Callable[..., Path], more: dict[str, Any]) -> None:
    learn("first", **more)
    still = {
        **more,
        "learning_rate": NOTHING,
        **({"text_encoder_lr": NOTHING} if "text_encoder_lr" in more else {}),
    }
    new, on = learn("new", **still), learn("on", begin_from="runs/first", **still)
    assert same(on / LORA_WEIGHTS, Path("runs/first") / LORA_WEIGHTS)
    assert not same(on / LORA_WEIGHTS, new / LORA_WEIGHTS)


def test_an_adapter_of_a_higher_rank_begins_by_doing_what_the_lower_one_did(
    learn: Callable[..., Path], tiny_folder: Path
) -> None:
    first = learn("first")
    on = learn("on", rank=5, lora_alpha=5.0, learning_rate=NOTHING, begin_from=str(first))
    before, after, plain = (predictions(tiny_folder, run) for run in (first, on, None))
    assert after == pytest.approx(before, abs=1e-5) and after != pytest.approx(plain, abs=1e-5)
    assert any(5 in value.shape for value in read_tensors(on / LORA_WEIGHTS)[0].values())


def test_text_encoders_that_were_not_trained_before_begin_as_they_are(
    learn: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    first = learn("first")
    capsys.readouterr()
    on = learn(
        "on", train_text_encoder=True, text_encoder_lr=1e-2, learning_rate=NOTHING, begin_from=str(first)
    )
    assert "no adapter on the text_encoder" in capsys.readouterr().err
    before, after = read_tensors(first / LORA_WEIGHTS)[0], read_tensors(on / LORA_WEIGHTS)[0]
    assert all(torch.allclose(after[name], value, atol=1e-6) for name, value in before.items())
    assert any(
        value.abs().max() > 1e-5 for name, value in after.items() if "lora_B" in name and name not in before
    )


def test_whole_weights_are_begun_with(learn: Callable[..., Path]) -> None:
    first = learn("first", method="full", learning_rate=2e-2)
    on = learn("on", method="full", learning_rate=NOTHING, begin_from=str(first))
    change, again = (read_tensors(run / CHANGED)[0] for run in (first, on))
    assert all(torch.allclose(change[name].float(), again[name].float(), atol=2e-5) for name in change)
    assert max(value.abs().max() for value in again.values()) > 1e-4


def test_an_editor_goes_on_with_its_input_channels_too(learn: Callable[..., Path], tmp_path: Path) -> None:
    pairs = str(lay(tmp_path / "pairs"))
    first = learn("first", pairs=pairs, held_out=1)
    on = learn("on", pairs=pairs, held_out=1, learning_rate=NOTHING, begin_from=str(first))
    assert same(on / LORA_WEIGHTS, first / LORA_WEIGHTS) and same(on / CHANGED, first / CHANGED)


def test_what_does_not_fit_is_refused_with_the_flag_that_would(learn: Callable[..., Path]) -> None:
    first = learn("first")
    for more, said in (
        ({"rank": 1, "lora_alpha": 1.0}, "--rank 2 or more"),
        ({"lora_alpha": 4.0}, "--lora-alpha 2"),
        ({"rank": 4, "lora_alpha": 8.0}, "--lora-alpha 4"),
        ({"adapter": "dora"}, "--adapter"),
        ({"lora_layers": "all"}, "other layers"),
        ({"method": "full"}, "was trained by lora"),
        ({"begin_from": str(first / LORA_WEIGHTS)}, "customize import"),
        ({"begin_from": "runs/nope"}, "runs/nope"),
    ):
        with pytest.raises(UserError, match=said):
            learn("on", **{"begin_from": str(first), **more})  # the folder is not taken by a failed try


@pytest.mark.parametrize("method", ["lora", "full", "textual-inversion", "pivotal", "custom-diffusion"])
def test_what_was_written_is_put_back_in_place(method: str, tiny_folder: Path, tmp_path: Path) -> None:
    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    settings = resolve_settings(
        {"images": "", "token": "[V]", "class_noun": "dog", "method": method, "model": str(tiny_folder)}, {}
    )
    parts = make_trainable(model, settings)
    noise = torch.Generator().manual_seed(0)

    def shake() -> None:
        with torch.no_grad():
            for part in parts:
                for value in part.parameters.values():
                    value.add_(0.1 * torch.randn(value.shape, generator=noise))

    def write(folder: Path) -> Concept:
        folder.mkdir()
        files = {field: name for part in parts for field, name in part.save(folder, {}).items()}
        concept = Concept(
            kind=method,
            model=str(tiny_folder),
            fingerprint=model.fingerprint,
            tokens={"[V]": "[V]"},
            class_noun="dog",
            resolution=model.resolution,
            **cast(dict[str, Any], files),
        )
        concept.write(folder)
        return read_concept(folder)

    shake()
    first = write(tmp_path / "first")
    shake()
    write(tmp_path / "other")
    copy_learned(model, parts, first)
    write(tmp_path / "again")
    written = sorted(path.name for path in (tmp_path / "first").glob("*.safetensors"))
    assert written
    for name in written:
        assert same(tmp_path / "again" / name, tmp_path / "first" / name)
        assert not same(tmp_path / "other" / name, tmp_path / "first" / name)


def test_the_sheet_is_drawn_by_the_best_step_as_sampling_is(
    learn: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = {"learning_rate": 1.0, "lr_scheduler": "constant", "resolution": 32}

    def pictures(run: Path) -> torch.Tensor:
        """The lower end of the sheet, which is what was drawn: above is a note that tells the runs apart."""
        sheet = Image.open(run / "sheet.png")
        return torch.tensor(list(sheet.crop((0, sheet.height - 300, 300, sheet.height)).tobytes())).float()

    short, long = learn("short", **asked), learn("long", steps=3, **asked)
    first = property(lambda patience: patience.history[min(1, len(patience.history) - 1)])
    monkeypatch.setattr(EarlyStopping, "best", first)
    monkeypatch.setattr(metrics, "SAMPLING_STEPS", 1)  # what evaluations find is no matter
    monkeypatch.setattr(evaluation, "NOISE_SAMPLES", 1)
    kept = learn("kept", steps=3, evaluation_steps=1, scorer=str(EMBEDDED / "scorer"), **asked)
    last, best = ((pictures(kept) - pictures(run)).abs().mean() for run in (long, short))
    assert best < 0.1 * last
    assert "What the model draws at step 1" in (kept / "report.html").read_text()
