"""What many tests share: a random tiny pipeline, a cache of their own, the pictures of a subject."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from PIL import Image

from backbone.io.console import GC_THRESHOLD

if TYPE_CHECKING:
    from backbone.models.model import Backbone
    from tests.browser import Browser

# As the commands have it. Nothing here imports torch: xdist's first process loads this file and runs no test.
gc.set_threshold(GC_THRESHOLD, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """As `tests.check` has it: several threads round a batch of one and of eight differently."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _no_wait_for_the_disk() -> None:
    """No power fails in a test: fifteen thousand files need not reach the disk before the next line runs."""
    pytest.MonkeyPatch().setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """No test reads or writes the user's cache."""
    from backbone.models.cache import VARIABLE

    patch = pytest.MonkeyPatch()
    patch.setenv(VARIABLE, str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random pipeline folder of the Stable Diffusion family."""
    from tests.tiny import tiny_pipeline

    return tiny_pipeline(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def kept(tiny_folder: Path) -> Iterator[Backbone]:
    """The random pipeline, opened in fp32 on the CPU once for all tests, each of which leaves it as it is."""
    import torch

    from backbone.models.model import Backbone

    model = Backbone.open(str(tiny_folder), device="cpu", precision="fp32")
    before = {name: value.clone() for name, value in model.denoiser.state_dict().items()}
    yield model
    after = model.denoiser.state_dict()
    assert list(after) == list(before) and all(torch.equal(after[name], before[name]) for name in before)


@pytest.fixture
def tiny(tiny_folder: Path) -> Backbone:
    """The same opened anew, for a test that trains or changes it."""
    from backbone.models.model import Backbone

    return Backbone.open(str(tiny_folder), device="cpu", precision="fp32")


@pytest.fixture
def subject(tmp_path: Path) -> Path:
    """A folder of three small pictures."""
    folder = tmp_path / "subject"
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(3):
        pixels = random.integers(0, 255, (70, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A real Chromium."""
    from tests.browser import started

    with started(tmp_path_factory.mktemp("profile")) as found:
        yield found


def pytest_collection_finish() -> None:
    """What was imported stays: collections of garbage need not go through it again and again."""
    gc.freeze()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out what draws new scenes where the emoji font is missing: installed users need no font."""
    from backbone.io.console import UserError
    from backbone.world.rendering.render import find_font

    try:
        find_font()
    except UserError:
        without = [item for item in items if item.get_closest_marker("font") is None]
        config.hook.pytest_deselected(items=[item for item in items if item not in without])
        items[:] = without
