"""Drawing and editing with compiled blocks: the same latents, one compilation a shape, whatever the step or prompt.

The backend is `aot_eager`, which traces as inductor does and then runs the traced operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from PIL import Image
from torch import Tensor, nn

import edit
from backbone.models.compiled import CompiledBlocks
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample_latents
from edit.attention.control import AttentionControl, SelfAttention
from edit.attention.install import control_attention
from tests.backbone.models.test_compiled import Counting
from tests.edit.conftest import NEWER, Open


@contextmanager
def compiled(model: Backbone) -> Iterator[Counting]:
    """Inside, every prediction runs compiled blocks, as of a model that was opened with `compile`."""
    counting = Counting()
    model.compiles = True
    model._compiled = model.denoiser, CompiledBlocks([model.denoiser], backend=counting)
    try:
        yield counting
    finally:
        model.compiles, model._compiled = False, None


def draw(model: Backbone, *prompts: str, steps: int = 3) -> Tensor:
    requests = [Request(prompt, (number, 0)) for number, prompt in enumerate(prompts)]
    return torch.cat(list(sample_latents(model, requests, steps=steps, guidance=4.0, seed=0)))


def change(model: Backbone, source: str, *targets: str, steps: int = 5) -> Tensor:
    """The latents of a picture's edits, under control of every layer's attention.

    How many rows a step predicts follows from the number of steps, which stays the same.
    """
    settings = edit.ReplaceSettings(cross=0.6, self_attention=0.6, blend=("auto",))
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    inversion = edit.invert(model, Image.fromarray(pixels), source, steps=steps)
    return edit.replace(inversion, targets, settings).latents


def check(
    model: Backbone, act: Callable[..., Tensor], first: tuple[str, ...], other: tuple[str, ...]
) -> None:
    plain, plain_other = act(model, *first), act(model, *other)
    with compiled(model) as counting:
        torch.testing.assert_close(act(model, *first), plain, atol=1e-5, rtol=1e-5)
        graphs = counting.graphs
        assert graphs
        torch.testing.assert_close(act(model, *other), plain_other, atol=1e-5, rtol=1e-5)
        act(model, *first, steps=5)
        assert counting.graphs == graphs  # neither other prompts nor further steps compile anything
    torch.testing.assert_close(act(model, *first), plain, atol=0, rtol=0)
    assert counting.graphs == graphs  # and outside the blocks run as they are


@torch.no_grad()
def test_a_block_under_changing_control_is_the_same_and_compiles_once() -> None:
    torch.manual_seed(0)
    network = nn.ModuleList([BasicTransformerBlock(8, 1, 8, cross_attention_dim=4)])
    x, text = torch.randn(3, 16, 8), torch.randn(3, 5, 4)

    def steps() -> list[Tensor]:
        """Of an edit: the targets' attention the source's, then their own; and of a prediction without one."""
        found = []
        control = AttentionControl(targets=1)
        kinds: tuple[SelfAttention, ...] = ("layout", "contents", "own")
        with control_attention(network, control):
            for control.self_attention in kinds:
                found.append(network[0](x, encoder_hidden_states=text))
        return [*found, network[0](x, encoder_hidden_states=text)]

    plain, counting = steps(), Counting()
    assert not torch.equal(plain[0], plain[2])
    compiled = CompiledBlocks([network], backend=counting)
    graphs = []
    for _ in range(3):
        with compiled.active():
            torch.testing.assert_close(steps(), plain, atol=1e-5, rtol=1e-5)
        graphs.append(counting.graphs)
    assert 0 < graphs[0] == graphs[1] == graphs[2]  # other edits have other controls


@pytest.mark.slow
def test_samples_of_compiled_blocks_are_the_same_and_compile_once(tiny: Backbone) -> None:
    check(tiny, draw, ("a dog", "a red cat"), ("a bird in the snow", "a"))


@pytest.mark.slow
def test_edits_by_compiled_blocks_are_the_same_and_compile_once(tiny: Backbone) -> None:
    check(tiny, change, ("a cat in the snow", "a dog in the snow"), ("a bird on a hill", "a fish on a hill"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["xl", "sd3", "flux-dev", "pixart", *NEWER])
def test_every_family_draws_and_edits_with_compiled_blocks(family: Open, name: str) -> None:
    model = family(name)
    check(model, draw, ("a dog", "a red cat"), ("a bird in the snow", "a"))
    check(model, change, ("a cat in the snow", "a dog in the snow"), ("a bird on a hill", "a fish on a hill"))
