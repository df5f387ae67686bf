"""Reconstruction error of every inversion method on one image, without guidance and with it.

    python -m recipes.edit.inversions          two minutes on two cores (null-text takes most of it); prints a table

`edit-friendly` and `reversible` should reconstruct to 1e-5 unguided; guidance makes `ddim` drift, `null-text` less, and
`negative-prompt` not at all. `direct` overwrites the source's latents in an edit; its own reconstruction is `ddim`'s.
"""

from __future__ import annotations

import time

import backbone
import edit
from backbone.cli.commands import run_main
from recipes.edit import Model, Steps, sample_picture


def main(model: Model = "moji", *, steps: Steps = 20) -> None:
    """Inverts an image by every method and prints the errors of reconstruction."""
    from backbone.evaluation.image_metrics import psnr
    from edit.inversion.inversion import METHODS, reconstruct, select_settings

    # %% A picture and the autoencoder's bound
    opened = backbone.open(model)
    source = "a cat in a park"
    image = sample_picture(opened, source)

    # %% Invert by every method and sample from the result
    guidance = float(opened.defaults["guidance"])
    print(f"{'method':16} {'NFE':>5} {'seconds':>8} {'error':>9} {'dB':>6} {'dB guided':>9}")
    for method in METHODS:
        began = time.perf_counter()
        options = select_settings(method, steps=steps, guidance=guidance)
        inversion = edit.invert(opened, image, source, method=method, **options)
        seconds = time.perf_counter() - began
        plain, guided = (reconstruct(inversion, guidance=scale).float() for scale in (1.0, guidance))
        error = float((plain - inversion.clean).abs().max())
        decibels = [psnr(inversion.image, opened.decode(latent[None])[0]) for latent in (plain, guided)]
        print(
            f"{method:16} {inversion.nfe:5d} {seconds:8.1f} {error:9.1e} {decibels[0]:6.1f} {decibels[1]:9.1f}"
        )


if __name__ == "__main__":
    run_main(main)
