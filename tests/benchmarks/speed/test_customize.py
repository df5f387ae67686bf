"""The comparison with diffusers' LoRA script is fair: one loss, one gradient; and the totals are added up rightly."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from backbone.models.model import Backbone
from benchmarks.speed.customize import (
    ALL_KINDS,
    KINDS,
    PICTURES,
    STEPS,
    BareStep,
    Bench,
    format_markdown,
    measure_parity,
    sum_totals,
)
from benchmarks.speed.shapes import Parts, make_random_images, write_section
from tests.tiny import tiny_pipeline

ONCE = ("evaluation", "decoding", "encoding", "text", "bank")


@pytest.fixture
def bench(tiny: Backbone) -> Bench:
    return Bench.of(Parts(tiny, tiny.autoencoder, tiny.encode_prompts), 2)


@pytest.fixture
def asked(tiny: Backbone, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, bool]]:
    """How many samples the denoiser is asked about, call by call, and whether for gradients."""
    found: list[tuple[int, bool]] = []
    forward = cast(Any, tiny.denoiser).forward

    def counted(sample: torch.Tensor, *arguments: Any, **more: Any) -> Any:
        found.append((len(sample), torch.is_grad_enabled()))
        return forward(sample, *arguments, **more)

    monkeypatch.setattr(tiny.denoiser, "forward", counted)
    return found


def test_both_sides_have_one_loss_of_predicted_v_too(tmp_path: Path) -> None:
    folder = tiny_pipeline(tmp_path / "v", prediction_type="v_prediction")
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    found = measure_parity(
        Bench.of(Parts(model, model.autoencoder, model.encode_prompts), 2).training, size=1e-2
    )
    assert found.here > 0.1 and found.loss < 1e-3 and found.gradient < 1e-3


def test_both_sides_have_one_loss_and_one_gradient(bench: Bench) -> None:
    before = weights(bench)
    found = measure_parity(bench.training, size=1e-2)
    assert found.here > 0.1 and found.loss < 1e-3 and found.gradient < 1e-3
    assert all(torch.equal(value, before[name]) for name, value in bench.training.parameters.items())
    assert bench.training.data is bench.with_prior


def test_every_kind_of_step_but_the_bare_ones_trains(bench: Bench) -> None:
    for kind in ALL_KINDS:
        before = weights(bench)
        bench.step(kind)
        moved = any(not torch.equal(value, before[name]) for name, value in bench.training.parameters.items())
        assert moved != kind.startswith("bare"), kind
        assert all(value.grad is None for value in bench.training.parameters.values()) or "here" in kind


def test_a_prior_doubles_the_rows_of_one_call_on_both_sides(
    bench: Bench, asked: list[tuple[int, bool]]
) -> None:
    for kind in ALL_KINDS:
        asked.clear()
        bench.step(kind)
        assert asked == [(4 if kind.endswith("prior") else 2, True)], kind


def test_only_the_script_encodes_pictures_and_prompts_in_a_step(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    pictures, prompts = cast(Any, bench.parts.autoencoder).encode, bench.parts.encode

    def encode(batch: torch.Tensor) -> Any:
        calls.append("pictures")
        return pictures(batch)

    def read(said: Any) -> Any:
        calls.append("prompts")
        return prompts(said)

    monkeypatch.setattr(bench.parts.autoencoder, "encode", encode)
    bench.script.parts = Parts(bench.parts.model, bench.parts.autoencoder, read)
    wanted = {"script": ["pictures", "prompts"], "script, text once": ["pictures"], "here": [], "bare": []}
    for kind in KINDS:
        calls.clear()
        bench.step(kind)
        assert calls == wanted[kind], kind


def test_a_bare_step_is_what_ours_asks_of_the_network(bench: Bench) -> None:
    """Every product and every convolution of our step is in it, and no other."""
    counted = []
    for kind in ("here", "bare"):
        with Multiplications() as mode:
            bench.step(kind)
        counted.append(mode.count)
    assert counted[0] == counted[1] > 100


def test_what_is_done_once_is_asked_without_gradients_and_without_the_adapter(
    bench: Bench, asked: list[tuple[int, bool]]
) -> None:
    acts = bench.acts()
    asked.clear()
    acts["evaluation"]()
    acts["bank"]()
    assert asked == [(8, False), (8, False)]
    for name in ("decoding", "encoding", "text"):
        acts[name]()
    assert len(asked) == 2
    assert BareStep(bench.training, bench.without_prior).noisy.shape[0] == 2


def test_totals_are_composed_of_counted_steps() -> None:
    seconds = dict.fromkeys((*ALL_KINDS, *ONCE), 1.0) | {"script, prior": 3.0, "decoding": 2.0}
    whole = sum_totals(seconds)
    assert whole["script: class pictures"] == 50 * (50 + 2)
    assert whole["script"] == 50 * (50 + 2) + STEPS * 3
    assert whole["here"] == PICTURES + 1 + 64 / 8 + STEPS


def test_the_table_says_what_was_measured_and_a_page_keeps_its_other_sections(tmp_path: Path) -> None:
    seconds = dict.fromkeys((*ALL_KINDS, *ONCE), 1.0) | {"script": 3.0}
    facts = {
        "command": "python -m benchmarks.speed.customize", "precision": "fp32", "batch": 1, "warm_steps": 1,
        "clock": "cpu", "machine": "none", "parity": {"here": 1.0, "loss": 0.0, "gradient": 0.0},
        "seconds": seconds, "totals": sum_totals(seconds),
    }  # fmt: skip
    text = format_markdown(facts)
    assert "| here | 1.000 | 3.00× | 1.000 | 1.00× |" in text and "composed" in text
    assert "other work" in text
    page = tmp_path / "page.md"
    page.write_text("# Speed\n\nBoth sides.\n", encoding="utf-8")
    write_section(page, "first", "one")
    write_section(page, "second", "two")
    write_section(page, "first", "three")
    assert page.read_text() == "# Speed\n\nBoth sides.\n\n## first\n\nthree\n\n## second\n\ntwo\n"


def test_pictures_are_read_and_cropped_to_the_model_s_size(bench: Bench) -> None:
    side = bench.parts.model.resolution
    (content,) = make_random_images(2 * side, 1)
    tensor = bench.script.prepare_picture(content, side)
    assert tensor.shape == (3, side, side) and tensor.min() >= -1 and tensor.max() <= 1
    assert tensor.std() > 0.1


class Multiplications(TorchDispatchMode):
    """How many products and convolutions ran."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        heavy = ("aten::convolution", "aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
        self.count += func.name().startswith(heavy)
        return func(*args, **(kwargs or {}))


def weights(bench: Bench) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in bench.training.parameters.items()}
