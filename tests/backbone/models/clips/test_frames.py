"""Frames of a clip are linked by a picture model's own attention, and let go again."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import generator
from backbone.models.cache import encode_prompts_cached
from backbone.models.clips.frames import first_and_previous, link_frames
from backbone.models.model import Backbone


def predicted(model: Backbone, rows: Tensor) -> Tensor:
    """What the model predicts of rows under one prompt at one level."""
    text = encode_prompts_cached(model, ["a dog"])
    index = torch.full((len(rows),), 500)
    return model.predict(rows, index, Conditions.cat([text] * len(rows)))


def test_tokens_are_those_of_the_first_frame_and_of_the_one_before() -> None:
    tokens = torch.arange(6.0).view(6, 1, 1)  # two clips of three frames
    pairs = first_and_previous(tokens, 3).squeeze(-1).tolist()
    assert pairs == [[0, 0], [0, 0], [0, 1], [3, 3], [3, 3], [3, 4]]


@torch.no_grad()
def test_equal_frames_are_predicted_as_the_picture_alone(tiny: Backbone) -> None:
    picture = torch.randn((1, *tiny.latent_shape), generator=generator(0))
    alone = predicted(tiny, picture)
    with link_frames(tiny, 3):
        linked = predicted(tiny, picture.repeat(3, 1, 1, 1))
    torch.testing.assert_close(linked, alone.expand_as(linked), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_frame_depends_on_the_first_and_the_one_before_and_on_no_later_one(tiny: Backbone) -> None:
    clip = torch.randn((4, *tiny.latent_shape), generator=generator(0))
    plain = predicted(tiny, clip)
    with link_frames(tiny, 4):
        before = predicted(tiny, clip)
        clip[2] += 1
        after = predicted(tiny, clip)
    changed = (after - before).flatten(1).abs().amax(1) > 1e-6
    assert changed.tolist() == [False, False, True, True]
    assert not torch.allclose(before[1], plain[1])


@torch.no_grad()
def test_attention_is_as_before_after_an_error(tiny: Backbone) -> None:
    clip = torch.randn((2, *tiny.latent_shape), generator=generator(0))
    plain = predicted(tiny, clip)
    with pytest.raises(KeyboardInterrupt), link_frames(tiny, 2):
        raise KeyboardInterrupt
    assert torch.equal(predicted(tiny, clip), plain)
