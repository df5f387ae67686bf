"""The same latents from diffusers' pipeline and from ours."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from backbone.cli.sampling import ALL_STEPS
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, sample_latents


def by_both(
    pipeline: Any,
    model: Backbone,
    prompt: str,
    *,
    steps: int = 4,
    guidance: float = 3.0,
    seed: int = 0,
    **more: Any,
) -> tuple[Tensor, Tensor]:
    """Latents [1, C, H, W] that the pipeline draws, called with `more` too, and ours by ddim, from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt,
        latents=draw_initial_noise(model, seed, 0, 0)[None],
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
        **more,
    ).images
    how: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": seed, "sampler": "ddim"}
    how["guided"] = ALL_STEPS  # as diffusers' pipelines are
    ours = next(sample_latents(model, [Request(prompt, (0, 0))], **how))
    return theirs, ours
