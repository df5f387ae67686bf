"""Metrics of a result: its cost, its exactness, and each edit compared with the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from backbone.evaluation import image_metrics
from backbone.evaluation.clip import Scorer, load_scorer
from backbone.io.console import notify, quote_text
from backbone.io.run_folder import peak_memory
from backbone.media.transforms import mask_to_tensor, to_tensor
from backbone.models.model import Backbone
from edit.masks import mask_to_image
from edit.result import Result

Figures = dict[str, float | None]


def measure_run(result: Result) -> dict[str, Any]:
    """NFE, and the PSNR of the reconstruction with the autoencoder's bound."""
    figures = {"autoencoder_psnr_db": image_metrics.psnr(result.encoded.pixels, result.autoencoded)}
    if result.trajectory is not None:
        figures = {
            "reconstruction_psnr_db": image_metrics.psnr(result.encoded.pixels, result.decoded[0]),
            **figures,
        }
    if not result.inversions:
        return {"nfe": result.nfe, **figures}
    inverting = sum(inversion.nfe for inversion in result.inversions)
    steps = result.inversions[0].steps
    return {"nfe": result.nfe + inverting, "nfe_of_inversion": inverting, "steps": steps, **figures}


def measure_edits(result: Result, scorer: Scorer | None) -> list[Figures]:
    """The metrics of every edit."""
    source = result.source
    masks = [None] * len(result.latents) if result.masks is None else list(result.masks)
    return [
        image_metrics.measure_edit(
            to_tensor(source),
            edit.cpu(),
            changed=None if mask is None else mask_to_tensor(mask_to_image(mask, source.size))[0],
            scorer=scorer,
            target=prompt,
        )
        for edit, mask, prompt in zip(result.decoded[1:], masks, result.prompts, strict=True)
    ]


def say_without_change(result: Result) -> None:
    """Print which edits were allowed to differ nowhere."""
    for mask, prompt in zip([] if result.masks is None else result.masks, result.prompts, strict=False):
        if not mask.any():
            notify(
                f"Nothing was changed for {quote_text(prompt)}: the words, --threshold, --keep and --mask together "
                "leave no place to change. Lower --threshold, draw or name more, or use --blend none."
            )


def find_scorer(model: Backbone, folder: str | None = None) -> Scorer | None:
    """The scorer of a folder, or the model's own; None where there is neither."""
    path = Path(folder) if folder else model.location.local("scorer")
    return None if path is None else load_scorer(path)


def reset_peak_memory() -> None:
    """Start measuring peak memory."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_mb() -> float | None:
    """This process's peak memory in MB: the GPU's if there is one."""
    if torch.cuda.is_available():
        return round(torch.cuda.max_memory_allocated() / 1e6, 1)
    peak = peak_memory()
    return None if peak is None else round(peak / 1e6, 1)
