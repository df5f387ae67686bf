"""What is encoded of a subject and of its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from backbone.models.model import Backbone
from backbone.models.placement import Placement
from customize.data import dataset
from customize.settings import Settings


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_class_images_are_drawn_by_the_model_s_own_sampler(
    sampler: str, tiny: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}
    keys: list[str] = []

    def drawn(model: Backbone, requests: Sequence[object], **how: Any) -> Iterator[Tensor]:
        asked.update(how)
        yield torch.zeros(len(requests), *model.latent_shape)

    def computed(kind: str, key: str, draw: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        keys.append(key)
        return draw()

    monkeypatch.setattr(dataset, "sample_latents", drawn)
    monkeypatch.setattr(dataset, "load_or_compute", computed)
    settings = Settings(images="x", token="[V]", class_noun="dog", guidance=3.0)
    for one in (sampler, "heun"):
        monkeypatch.setitem(tiny.__dict__, "defaults", {**tiny.defaults, "sampler": one})
        assert len(dataset.sample_class_latents(tiny, "a dog", settings, 2)) == 2
        assert (asked["sampler"], asked["steps"], asked["guidance"]) == (one, dataset.CLASS_STEPS, 3.0)
    monkeypatch.setattr(tiny, "placement", Placement(quantize="nf4"))  # whose base predicts otherwise
    dataset.sample_class_latents(tiny, "a dog", settings, 2)
    assert len(set(keys)) == 3  # remembered apart
