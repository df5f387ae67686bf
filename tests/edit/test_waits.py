"""Sampling and editing on a GPU: one wait for a picture at most, when it is fetched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import edit
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from tests.edit.conftest import Open
from tests.syncs import HostSyncs

SOURCE, TARGETS = "a cat in the snow", ("a dog in the snow", "a red cat in the snow")


@pytest.fixture
def tiny(kept: Backbone) -> Backbone:
    """Nothing here changes it."""
    return kept


def waits_of(model: Backbone, act: Callable[[], Any]) -> list[str]:
    """What waits when it is done again: the first time encodes prompts and keeps them on disk."""
    act()
    extra = getattr(model.text_encoder, "t5", None)
    waits = HostSyncs()
    with waits:
        waits.own(model.denoiser, model.autoencoder, [slot.model for slot in model.text_encoder.slots])
        waits.own([] if extra is None else extra.model)
        act()
    return waits.found


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp-2m", "unipc", "ancestral"])
def test_sampling_waits_once_for_its_pictures(tiny: Backbone, sampler: Any) -> None:
    requests = [Request("a dog", (0, number)) for number in range(2)]

    def draw() -> None:
        assert len(list(sample(tiny, requests, steps=3, guidance=4.0, seed=0, sampler=sampler))) == 2

    found = waits_of(tiny, draw)
    assert len(found) == 1 and found[0].startswith(".cpu()")


@pytest.fixture
def picture() -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_an_edit_waits_once_for_each_of_its_pictures(tiny: Backbone, picture: Image.Image) -> None:
    settings = edit.ReplaceSettings(cross=0.5, self_attention=0.5, blend=("auto",))

    def act() -> None:
        inversion = edit.invert(tiny, picture, SOURCE, steps=3)
        assert len(edit.replace(inversion, TARGETS, settings).images) == 2

    found = waits_of(tiny, act)
    assert len(found) <= 2 and all(line.startswith(".cpu()") for line in found)


def test_other_edits_wait_once_for_each_of_their_pictures(tiny: Backbone, picture: Image.Image) -> None:
    mask = Image.fromarray(np.pad(np.full((32, 32), 255, np.uint8), 16))

    def act() -> None:
        inversion = edit.invert(tiny, picture, SOURCE, steps=3)
        edit.sdedit(tiny, picture, TARGETS[0], steps=3, mask=mask).images[0].load()
        edit.flow_edit(tiny, picture, SOURCE, TARGETS[:1], steps=3).images[0].load()
        edit.compose(inversion, [(TARGETS[0], 1.0)]).images[0].load()
        edit.remove(inversion, mask=mask, strength=1.0).images[0].load()

    found = waits_of(tiny, act)
    assert len(found) <= 5, found  # a removal also reads its mask


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xl", "sd3", "flux-dev", "pixart"])
def test_every_family_samples_and_edits_with_one_wait_for_a_picture(
    family: Open, picture: Image.Image, name: str, tmp_path: Path
) -> None:
    model = family(name)
    settings = edit.ReplaceSettings(cross=0.5, self_attention=0.5, blend=("auto",))

    def act() -> None:
        list(sample(model, [Request("a dog", (0, 0))], steps=3, guidance=4.0, seed=0))
        inversion = edit.invert(model, picture, SOURCE, steps=3)
        edit.replace(inversion, TARGETS, settings).images[0].load()

    found = waits_of(model, act)
    assert len(found) <= 3 and all(line.startswith(".cpu()") for line in found), found
