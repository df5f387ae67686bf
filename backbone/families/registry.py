"""The supported model families."""

from __future__ import annotations

from backbone.families.base import Family


def families() -> list[Family]:
    """Every supported family; a new one is a folder beside these and a line here."""
    from backbone.families.chroma.family import Chroma
    from backbone.families.flux.family import Flux
    from backbone.families.flux2.family import Flux2
    from backbone.families.krea2.family import Krea2
    from backbone.families.pixart.family import PixArt
    from backbone.families.qwen.edit import QwenImageEdit, QwenImageEditPlus
    from backbone.families.qwen.family import QwenImage
    from backbone.families.qwen.image21 import QwenImage21
    from backbone.families.sd1.family import StableDiffusion
    from backbone.families.sd3.family import StableDiffusion3
    from backbone.families.sdxl.family import StableDiffusionXL
    from backbone.families.stable_video.family import StableVideo
    from backbone.families.zimage.family import ZImage

    return [
        StableDiffusion(),
        StableDiffusionXL(),
        StableDiffusion3(),
        Flux(),
        PixArt(),
        ZImage(),
        Flux2(),
        QwenImage(),
        QwenImageEdit(),
        QwenImageEditPlus(),
        Krea2(),
        Chroma(),
        QwenImage21(),
        StableVideo(),
    ]
