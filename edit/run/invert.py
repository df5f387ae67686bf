"""`edit invert`, and the alignment that `--dry-run` prints."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from backbone.adapters.concept import say_uncalled
from backbone.evaluation.image_metrics import psnr
from edit.attention.alignment import restore_placeholders
from edit.inversion.inversion import Inversion, read_source_prompt, reconstruct
from edit.layout import RequestedLayout
from edit.methods.prompt_to_prompt.regions import (
    choose_compared_prompts,
    find_blended_words,
    refuse_ambiguous_auto,
)
from edit.methods.prompt_to_prompt.replace import align_prompts
from edit.methods.prompt_to_prompt.settings import AUTO
from edit.pictures import ImageLike
from edit.run.open import OPENING, START, Opening, Start, load_model, pick, replace_settings

SETTINGS = (
    "control", "guidance", "negative", "weights", "windows", "swaps", "blend", "keep", "mask", "cross",
    "self_attention", "threshold", "strength", "heatmaps",
)  # fmt: skip


def write_inversion(file: Path, image: ImageLike, prompt: str, options: Mapping[str, Any]) -> list[str]:
    """Invert an image into a file, and return the lines to print; defaults are those of `Start`."""
    loaded = load_model(Opening(**pick(options, OPENING)))
    layout = RequestedLayout.of(options).for_source
    start = Start(**{**pick(options, START), "image": image, "source": prompt, "requested": layout})
    inversion = start.open(loaded, guidance=options.get("guidance"))
    inversion.write(file)
    lines = [f"{inversion.nfe} evaluations of the denoiser (NFE)."]
    return [*lines, *describe_exactness(inversion)] if options.get("check") else lines


def describe_exactness(inversion: Inversion) -> list[str]:
    """How exactly the inversion reconstructs: the latent's error, and PSNR with the autoencoder's bound."""
    model = inversion.model
    bound = psnr(inversion.image, model.decode(inversion.clean[None])[0])
    lines = [f"The autoencoder alone gives the image back at {bound:.2f} dB."]
    default = float(model.defaults["guidance"]) if inversion.guidance is None else inversion.guidance
    for guidance in (1.0, default):
        latent = reconstruct(inversion, guidance=guidance).float()
        error = float((latent - inversion.clean).abs().max())
        decibels = psnr(inversion.image, model.decode(latent[None])[0])
        lines.append(
            f"Sampled again with guidance {guidance:g}: {decibels:.2f} dB, latent error at most {error:.2g}."
        )
    return lines


def print_alignment(options: Mapping[str, Any]) -> list[str]:
    """The alignment of each target's words, and where the image will change; the image is not opened."""
    loaded = load_model(Opening(**pick(options, (*OPENING, "inversion"))))
    settings = replace_settings(loaded, **pick(options, SETTINGS))
    source = options["source"]
    prompt = read_source_prompt(options["inversion"]) if source is None else loaded.resolve(source)
    targets = [loaded.resolve(target) for target in options["targets"]]
    say_uncalled([prompt, source or "", *options["targets"]], loaded.concepts)
    alignments = align_prompts(loaded.model, prompt, targets, settings)
    refuse_ambiguous_auto(options.get("blend") or (), alignments)
    lines = []
    for alignment in alignments:
        word_pairs = find_blended_words(alignment, settings.blend)
        words = ", ".join(
            dict.fromkeys(
                restore_placeholders(word.text, loaded.placeholders) for side in word_pairs for word in side
            )
        )
        places = [f"where these stand: {words}"] if words else []
        if AUTO in settings.blend and choose_compared_prompts(alignment, settings.weights):
            places.append("where the model predicts the two prompts differently")
        extent = f"It changes {' and '.join(places)}." if places else "It changes everywhere."
        lines.append(f"{alignment.describe(loaded.placeholders)}\n{extent}")
    return lines
