"""`moji` is drawn by ancestral steps, guided in the noisier ones, wherever nothing else is asked for.

Guided in all of them it is what diffusers draws with `eta=1`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from backbone.cli.sampling import ALL_STEPS, default_guidance_interval
from backbone.diffusion.noise import generator
from backbone.io.files import read_json
from backbone.models.few_step.model import get_sampling_defaults
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample_latents
from customize.cli import app
from recipes.moji.denoiser import DEFAULTS
from tests.parity import by_both
from tests.tiny import tiny_moji


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model that says of itself what `moji` says."""
    return tiny_moji(tmp_path_factory.mktemp("models") / "moji", side=64)


def test_its_folder_says_so_and_its_recipe_writes_it() -> None:
    assert get_sampling_defaults(Backbone.open("moji", device="cpu")).sampler == "ancestral"
    assert json.loads((EMBEDDED / "limner.json").read_text()) == DEFAULTS


def test_customize_sample_takes_it_and_ddim_where_that_is_asked_for(small: Path, tmp_path: Path) -> None:
    drawn = {}
    for asked in ("", "ancestral", "ddim"):
        out = tmp_path / f"by{asked}"
        words = ["sample", "a dog in the snow", "--model", str(small), "--steps", "3", "--device", "cpu"]
        words += ["--out", str(out)]
        said = CliRunner().invoke(app, [*words, *(["--sampler", asked] if asked else [])])
        assert said.exit_code == 0, said.output or repr(said.exception)
        (image,) = (path for path in out.glob("*.png") if "sheet" not in path.name)
        drawn[asked] = image.read_bytes()
    assert drawn[""] == drawn["ancestral"] != drawn["ddim"]


def test_diffusers_draws_the_same_latents_with_eta_1_and_the_same_noise() -> None:
    model = Backbone.open("moji", device="cpu", precision="fp32")
    pipeline = StableDiffusionPipeline.from_pretrained(EMBEDDED, local_files_only=True).to(torch.float32)
    fresh = generator(3, 0, 0, "steps")
    prompt = "a dog in the snow"
    theirs, by_ddim = by_both(
        pipeline, model, prompt, steps=4, guidance=4.0, seed=3, eta=1.0, generator=fresh
    )
    asked = [Request(prompt, (0, 0))]
    (ours,) = sample_latents(model, asked, steps=4, guidance=4.0, seed=3, guided=ALL_STEPS)
    assert torch.allclose(ours, theirs, atol=2e-3) and not torch.allclose(by_ddim, theirs, atol=0.1)


def test_guidance_ends_where_moji_s_own_ends_unless_another_share_is_asked_for(
    small: Path, tmp_path: Path
) -> None:
    start, stop = default_guidance_interval(DEFAULTS)
    drawn, facts = {}, {}
    for asked in ((), ("--guidance-stop", str(stop)), ("--guidance-stop", "1"), ("--guidance", "1")):
        out = tmp_path / "-".join(("by", *asked))
        words = ["sample", "a dog in the snow", "--model", str(small), "--steps", "5", "--device", "cpu"]
        words += ["--out", str(out)]
        said = CliRunner().invoke(app, [*words, *asked])
        assert said.exit_code == 0, said.output or repr(said.exception)
        drawn[asked] = (out / "p00-s00.png").read_bytes()
        facts[asked] = read_json(out / "samples.json")["guided"]
    usual, own, always, never = drawn
    assert (start, stop) == (0.0, 0.6) and facts[usual] == facts[own] == [start, stop]
    assert facts[always] == facts[never] == list(ALL_STEPS)
    assert drawn[usual] == drawn[own] and len(set(drawn.values())) == 3
