"""`moji` is drawn by ancestral steps, wherever nothing else is asked for, and as diffusers draws it with `eta=1`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from typer.testing import CliRunner

from backbone.diffusion.noise import generator
from backbone.models.few_step.model import usual_drawing
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample_latents
from customize.cli import app
from recipes.moji.denoiser import DEFAULTS
from tests.parity import by_both


def test_its_folder_says_so_and_its_recipe_writes_it() -> None:
    assert usual_drawing(Backbone.open("moji", device="cpu")).sampler == "ancestral"
    assert json.loads((EMBEDDED / "limner.json").read_text()) == DEFAULTS


def test_customize_sample_takes_it_and_ddim_where_that_is_asked_for(tmp_path: Path) -> None:
    drawn = {}
    for asked in ("", "ancestral", "ddim"):
        out = tmp_path / f"by{asked}"
        words = ["sample", "a dog in the snow", "--steps", "3", "--device", "cpu", "--out", str(out)]
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
    (ours,) = sample_latents(model, [Request(prompt, (0, 0))], steps=4, guidance=4.0, seed=3)
    assert torch.allclose(ours, theirs, atol=2e-3) and not torch.allclose(by_ddim, theirs, atol=0.1)
