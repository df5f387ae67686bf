"""`moji-turbo`, the few-step adapter that is carried along: small, of this `moji`, diffusers' own, and four steps."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from typer.testing import CliRunner

from backbone.adapters.lora import LORA_WEIGHTS
from backbone.cli.sampling import EarlyScale, default_early_scale
from backbone.evaluation.clip import load_scorer
from backbone.io.files import read_json, read_tensors
from backbone.models.few_step.adapter import read_few_step
from backbone.models.few_step.model import name_few_step, open_few_step
from backbone.models.locate import EMBEDDED, OWN
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.world.scene import BENCHMARK_SEEDS, is_fair, sample_scene
from backbone.world.words import load_vocabulary
from customize.cli import app
from tests.parity import by_both

FOLDER = OWN["moji-turbo"]


def test_it_is_small_and_goes_with_moji() -> None:
    assert name_few_step("moji") == "moji-turbo"
    assert read_few_step(FOLDER) == {"base": "moji", "steps": 4, "guidance": 1.0, "sampler": "ddim"}
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) < 10_000_000
    assert {value.dtype for value in read_tensors(FOLDER / LORA_WEIGHTS)[0].values()} == {torch.float16}


def test_diffusers_draws_the_same_latents_with_its_lora_and_its_scheduler() -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED, local_files_only=True).to(torch.float32)
    pipeline.load_lora_weights(FOLDER, weight_name=LORA_WEIGHTS)
    pipeline.scheduler = DDIMScheduler.from_pretrained(FOLDER / "scheduler")
    few = open_few_step(Backbone.open("moji", device="cpu", precision="fp32"), "moji-turbo")
    assert default_early_scale(few.defaults) == EarlyScale()  # moji's is for its own 25 steps
    theirs, ours = by_both(pipeline, few, "a dog in the snow", steps=4, guidance=1.0)
    assert torch.allclose(ours, theirs, atol=2e-3)


def test_fast_draws_in_four_steps_without_guidance(tmp_path: Path) -> None:
    words = ["sample", "a dog in the snow", "--fast", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    record = read_json(tmp_path / "out" / "samples.json")
    assert (record["model"], record["steps"], record["guidance"]) == ("moji-turbo", 4, 1.0)


def test_it_draws_what_it_is_asked_for() -> None:
    """Single plain things: the judge, which is not in the wheel, would say the same on many more."""
    few = open_few_step(Backbone.open("moji", device="cpu", precision="fp32"), "moji-turbo")
    scorer = load_scorer(EMBEDDED / "scorer")
    wanted = [
        scene
        for scene in map(sample_scene, range(BENCHMARK_SEEDS.start, BENCHMARK_SEEDS.start + 60))
        if is_fair(scene) and scene.style is None and len(scene.things) == 1 and not scene.things[0].small
    ][:6]
    requests = [Request(scene.caption(), (0, number)) for number, scene in enumerate(wanted)]
    images = list(sample(few, requests, steps=4, guidance=1.0, seed=0))
    nouns = sorted(load_vocabulary().nouns)
    said = scorer.embed_texts([f"a {noun}" for noun in nouns])
    order = (scorer.embed_images(images) @ said.T).argsort(1, descending=True)
    seen = [
        scene.things[0].noun in {nouns[i] for i in row[:5]} for scene, row in zip(wanted, order, strict=True)
    ]
    assert sum(seen) >= 4
