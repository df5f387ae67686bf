"""The supported model families."""

from __future__ import annotations

from collections.abc import Iterator

from backbone.families.base import Family


def families() -> Iterator[Family]:
    """Every supported family; a new one is a folder beside these and two lines here.

    Each is imported when the iteration reaches it, so a search that stops early does not load the others' networks.
    """
    from backbone.families.sd1.family import StableDiffusion

    yield StableDiffusion()

    from backbone.families.sdxl.family import StableDiffusionXL

    yield StableDiffusionXL()

    from backbone.families.sd3.family import StableDiffusion3

    yield StableDiffusion3()

    from backbone.families.flux.family import Flux

    yield Flux()

    from backbone.families.pixart.family import PixArt

    yield PixArt()

    from backbone.families.zimage.family import ZImage

    yield ZImage()

    from backbone.families.flux2.family import Flux2

    yield Flux2()

    from backbone.families.qwen.family import QwenImage

    yield QwenImage()

    from backbone.families.qwen.edit import QwenImageEdit, QwenImageEditPlus

    yield QwenImageEdit()
    yield QwenImageEditPlus()

    from backbone.families.krea2.family import Krea2

    yield Krea2()

    from backbone.families.chroma.family import Chroma

    yield Chroma()

    from backbone.families.qwen.image21 import QwenImage21

    yield QwenImage21()

    from backbone.families.stable_video.family import StableVideo

    yield StableVideo()
