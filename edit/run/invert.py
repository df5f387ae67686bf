"""`edit invert`, and the alignment that `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbone.evaluation import image_metrics as measure
from backbone.io.files import read_metadata
from edit.inversion.inversion import Inversion, prompt_of, replayed
from edit.methods.prompt_to_prompt.edit import align_all
from edit.methods.prompt_to_prompt.regions import blended_words, told_apart
from edit.methods.prompt_to_prompt.settings import AUTO
from edit.run.open import inverted, open_model, settings_of

BEGIN = ("model", "concepts", "scale", "precision", "device", "inversion")
SETTINGS = (
    "control", "guidance", "negative", "weights", "windows", "swaps", "blend", "keep", "mask", "cross",
    "self_attention", "threshold", "strength", "heatmaps",
)  # fmt: skip


def write_inversion(
    file: Path,
    image: str,
    prompt: str,
    *,
    method: str,
    check: bool,
    iterations: int,
    steps: int,
    guidance: float | None,
    seed: int,
    **opening: Any,
) -> list[str]:
    """Inverts a picture into a file, and gives what there is to say about it."""
    opened = open_model(**opening)
    found = inverted(
        opened, image, prompt, method=method, steps=steps, guidance=guidance, seed=seed, iterations=iterations
    )
    found.write(file)
    said = [f"{found.evaluations} evaluations of the denoiser."]
    return [*said, *exactness(found)] if check else said


def exactness(inversion: Inversion) -> list[str]:
    """How well the inversion leads back: the latent's error, and decibels beside the autoencoder's bound."""
    model = inversion.model
    bound = measure.psnr(inversion.picture, model.decode(inversion.clean[None])[0])
    lines = [f"The autoencoder alone gives the picture back at {bound:.2f} dB."]
    usual = float(model.defaults["guidance"]) if inversion.guidance is None else inversion.guidance
    for guidance in (1.0, usual):
        latent = replayed(inversion, guidance=guidance).float()
        error = float((latent - inversion.clean).abs().max())
        found = measure.psnr(inversion.picture, model.decode(latent[None])[0])
        lines.append(
            f"Walked down with guidance {guidance:g}: {found:.2f} dB, latent error at most {error:.2g}."
        )
    return lines


def print_alignment(wishes: Mapping[str, Any]) -> list[str]:
    """What becomes of the words of each target, and where the picture will change; the picture is not opened."""
    opened = open_model(**{name: wishes[name] for name in BEGIN})
    settings = settings_of(opened, **{name: wishes[name] for name in SETTINGS})
    source = wishes["source"]
    said = prompt_of(read_metadata(wishes["inversion"])) if source is None else opened.said(source)
    targets = [opened.said(target) for target in wishes["targets"]]
    lines = []
    for alignment in align_all(opened.model.text_encoder, said, targets, settings):
        places = blended_words(alignment, settings.blend)
        words = ", ".join(dict.fromkeys(word.text for side in places for word in side))
        found = [f"where these stand: {words}"] if words else []
        if AUTO in settings.blend and told_apart(alignment, settings.weights) is not None:
            found.append("where the model sees the two prompts differently")
        where = f"It changes {' and '.join(found)}." if found else "It changes everywhere."
        lines.append(f"{alignment}\n{where}")
    return lines
