"""A random pipeline of every family, each written and opened once: a test that changes one opens its own."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest

from backbone.models.model import Backbone

Open = Callable[[str], Backbone]
TRANSFORMERS = ("sd3", "flux-dev", "pixart")
FAMILIES = ("xl", "sd3", "sd3-without-t5", "flux-dev", "flux-schnell", "pixart")
# Most of what is asked of these takes long
NEWER = ("z-image", "flux2-klein", "qwen-image", "krea2", "chroma", "qwen-image-2.1")
SLOWLY = [pytest.param(name, marks=pytest.mark.slow) for name in (*NEWER, "flux2-dev")]


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A family's folder by its name in `FAMILIES`."""
    from tests import tiny

    writers: dict[str, Callable[[Path], Path]] = {
        "xl": tiny.tiny_stable_diffusion_xl,
        "sd3": tiny.tiny_stable_diffusion_3,
        "sd3-without-t5": partial(tiny.tiny_stable_diffusion_3, t5=False),
        "flux-dev": tiny.tiny_flux,
        "flux-schnell": partial(tiny.tiny_flux, guidance=False),
        "pixart": tiny.tiny_pixart,
        "z-image": tiny.tiny_z_image,
        "qwen-image": tiny.tiny_qwen_image,
        "krea2": tiny.tiny_krea2,
        "chroma": tiny.tiny_chroma,
        "qwen-image-2.1": tiny.tiny_qwen_image21,
        "flux2-dev": tiny.tiny_flux2_dev,
        "flux2-klein": tiny.tiny_flux2_klein,
        "flux2-klein-distilled": partial(tiny.tiny_flux2_klein, distilled=True),
    }
    place = tmp_path_factory.mktemp("families")

    def written(name: str) -> Path:
        folder = place / name
        return folder if folder.exists() else writers[name](folder)

    return written


@pytest.fixture(scope="session")
def family(family_folder: Callable[[str], Path]) -> Open:
    """A family's pipeline, opened in fp32 on the CPU; a test leaves it as it is."""
    return cache(lambda name: Backbone.open(str(family_folder(name)), device="cpu", precision="fp32"))
