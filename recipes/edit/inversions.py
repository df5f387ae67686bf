"""Reconstruction error of every inversion method on one image, without guidance and with it.

    python -m recipes.edit.inversions          two minutes on two cores (null-text takes most of it); prints a table

`edit-friendly` and `reversible` should reconstruct to 1e-5 unguided; guidance makes `ddim` drift, `null-text` less, and
`negative-prompt` not at all. `direct` overwrites the source's latents in an edit; its own reconstruction is `ddim`'s.
"""

from __future__ import annotations

import time

from backbone.evaluation.image_metrics import psnr
from backbone.models.model import Backbone
from edit.inversion.inversion import METHODS, invert, reconstruct
from recipes.edit import picture_to_edit


def main(model: str = "moji", *, steps: int = 20) -> None:
    """All cells."""
    # %% A picture and the autoencoder's bound
    backbone = Backbone.open(model)
    source = "a cat in a park"
    image = picture_to_edit(backbone, source)

    # %% Invert by every method and sample from the result
    guidance = float(backbone.defaults["guidance"])
    print(f"{'method':16} {'NFE':>5} {'seconds':>8} {'error':>9} {'dB':>6} {'dB guided':>9}")
    for method in METHODS:
        began = time.perf_counter()
        inversion = invert(backbone, image, source, method=method, steps=steps, guidance=guidance)
        seconds = time.perf_counter() - began
        plain, led = (reconstruct(inversion, guidance=scale).float() for scale in (1.0, guidance))
        error = float((plain - inversion.clean).abs().max())
        decibels = [psnr(inversion.image, backbone.decode(latent[None])[0]) for latent in (plain, led)]
        print(
            f"{method:16} {inversion.nfe:5d} {seconds:8.1f} {error:9.1e} {decibels[0]:6.1f} {decibels[1]:9.1f}"
        )


if __name__ == "__main__":
    main()
