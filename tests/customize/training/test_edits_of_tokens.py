"""Edits are learned by models that read images as tokens, and diffusers' pipelines follow what was learned."""

from __future__ import annotations

from pathlib import Path

import pytest

import edit.cli
from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import read_concept
from backbone.io.files import read_json, read_jsonl
from backbone.models.model import Backbone
from backbone.models.references import encode_references
from backbone.models.sample import Request, draw_initial_noise, sample_latents
from tests.backbone.models.test_references import READERS, shown
from tests.customize.training.test_edits import HERE, invoked, lay

SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["kontext", *(pytest.param(name, marks=SLOW) for name in READERS if name != "kontext")]
)
def test_an_adapter_learned_from_pairs_edits_in_diffusers_as_here(name: str, tmp_path: Path) -> None:
    write, said, most, _ = READERS[name]
    folder, pairs, run = write(tmp_path / name), lay(tmp_path / "pairs"), tmp_path / "run"
    invoked(
        *("train", "--pairs", pairs, "--model", folder, "--steps", 3, "--learning-rate", 0.01, *HERE),
        *("--lr-warmup-steps", 0, "--evaluate-every", 3, "--held-out", 1, "--guidance", 2, "--out", run),
        *("--sample-steps", 2),
    )
    assert [line["step"] for line in read_jsonl(run / "evaluations.jsonl")] == [0, 3]
    images = [shown(seed) for seed in range(min(2, most))]
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    theirs = said(folder, draw_initial_noise(model, 0, 0, 0)[None], images, 2, run)
    untrained = said(folder, draw_initial_noise(model, 0, 0, 0)[None], images, 2)
    load_concepts(model, [read_concept(run)])
    (latents,) = sample_latents(
        model, [Request("a red dog", (0, 0))], steps=2, guidance=3.0, seed=0,
        references=encode_references(model, images),
    )  # fmt: skip
    assert float(((model.decode(latents) + 1) / 2 - theirs).abs().max()) < 1e-5
    assert float((untrained - theirs).abs().max()) > 1e-4
    images[0].save(tmp_path / "a.png")
    words = ("instruct", tmp_path / "a.png", "--instruction", "make it snow", "--concept", run, "--steps", 1)
    invoked(
        *words,
        "--no-metrics",
        "--background",
        "none",
        *HERE,
        "--out",
        tmp_path / "edit",
        program=edit.cli.app,
    )
    assert read_json(tmp_path / "edit" / "run.json")["settings"]["concepts"]
