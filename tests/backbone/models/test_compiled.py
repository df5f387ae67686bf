"""Compiled blocks: the same gradients, one compilation a shape, and nothing of it outside of a step.

The backend is `aot_eager`, which traces forward and backward as inductor does and then runs the traced operations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

from backbone.adapters.lora import add_lora, lora_parameters
from backbone.models.compiled import CompiledBlocks, close_gaps
from backbone.models.model import Backbone
from backbone.training.run import Objective, take_steps
from customize.objectives.dreambooth import DreamBooth
from tests.customize.test_methods import begun
from tests.customize.test_methods import settings as concept_settings
from tests.tiny import tiny_flux, tiny_pixart, tiny_stable_diffusion_3


class Counting:
    """`aot_eager`, counting the graphs that it is given."""

    def __init__(self) -> None:
        torch._dynamo.reset()
        self.graphs, self.trace = 0, lookup_backend("aot_eager")

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence[Tensor], **how: Any) -> Any:
        self.graphs += 1
        return self.trace(graph, list(inputs), **how)


def gradients(training: Objective, step: int) -> dict[str, Tensor]:
    """The gradients of a step, of adapters that were moved off zero."""
    for number, value in enumerate(training.parameters.values()):
        random = torch.Generator().manual_seed(number)
        value.data += 0.1 * torch.randn(value.shape, generator=random)
        value.grad = None
    with training.learning(), training.stepping():
        for loss in training.losses(step):
            loss.backward()
    found = {name: value.grad for name, value in training.parameters.items() if value.grad is not None}
    return {name: value.clone() for name, value in found.items()}


def check(training: Objective, model: Backbone, *, steps: int) -> int:
    """Steps with compiled blocks have the gradients of plain ones; gives the number of graphs."""
    start = {name: value.detach().clone() for name, value in training.parameters.items()}
    plain = gradients(training, 1)
    for name, value in start.items():
        training.parameters[name].data.copy_(value)
    counting = Counting()
    training.compiled = CompiledBlocks([model.denoiser], backend=counting)
    assert training.compiled.blocks
    compiled = gradients(training, 1)
    assert plain.keys() == compiled.keys() and counting.graphs > 0
    for name, value in plain.items():
        torch.testing.assert_close(compiled[name], value, atol=1e-5, rtol=1e-5)
    taken = take_steps(training)
    next(taken)
    known = counting.graphs
    for _ in range(steps):
        next(taken)
    assert counting.graphs == known  # after the first shapes nothing is compiled
    with torch.no_grad():  # nor outside of a step
        shape = (5, *model.latent_shape)
        assert isinstance(training, DreamBooth) and training.data.conditions is not None
        conditions = training.data.conditions[[0]].repeat(5)
        model.predict(torch.zeros(shape), torch.zeros(5, dtype=torch.long), conditions)
    assert counting.graphs == known
    return known


def test_blocks_of_one_shape_share_a_graph_and_run_compiled_inside_alone() -> None:
    network = nn.ModuleList(BasicTransformerBlock(8, 1, 8, cross_attention_dim=4) for _ in range(3))
    add_lora(network, "a", rank=2, alpha=2.0, targets=["to_q", "to_v"])
    parameters = lora_parameters(network, "a")
    x, text = torch.randn(2, 6, 8), torch.randn(2, 3, 4)

    def step() -> dict[str, Tensor]:
        hidden = x
        for block in network:
            hidden = block(hidden, encoder_hidden_states=text)
        grads = torch.autograd.grad(hidden.square().sum(), list(parameters.values()))
        return dict(zip(parameters, grads, strict=True))

    plain, counting = step(), Counting()
    compiled = CompiledBlocks([network], backend=counting)
    for _ in range(2):
        with compiled.active():
            found = step()
        assert counting.graphs == 2  # the first block's input takes no gradient, those of the other two do
    for name, value in plain.items():
        torch.testing.assert_close(found[name], value, atol=1e-5, rtol=1e-5)
    x, text = torch.randn(5, 6, 8), torch.randn(5, 3, 4)
    step()
    assert counting.graphs == 2  # outside nothing is compiled


def test_blocks_run_as_they_did_before_inside_and_outside() -> None:
    network: Any = nn.ModuleList([BasicTransformerBlock(8, 1, 8)])
    outer, inner = CompiledBlocks([network], backend="eager"), CompiledBlocks([network], backend="eager")
    with outer.active():
        with inner.active():
            assert network[0]._compiled_call_impl is inner.calls[0]
        assert network[0]._compiled_call_impl is outer.calls[0]
    assert network[0]._compiled_call_impl is None


def test_inputs_that_are_parts_of_longer_tensors_compile_once() -> None:
    """Of one row too, whose stride says nothing but what it was cut from."""
    network: Any = nn.ModuleList([BasicTransformerBlock(8, 1, 8, cross_attention_dim=4)])
    counting = Counting()
    with CompiledBlocks([network], backend=counting).active():
        for rows in (1, 1, 2):
            for longer in (3, 5, 9):
                x, text = torch.randn(rows, 6, 8), torch.randn(rows, longer, 4)[:, :3]
                network[0](x, encoder_hidden_states=text)
    assert counting.graphs == 2
    whole = torch.randn(4, 2, 3).permute(1, 2, 0)  # as pixels lie behind their channels
    assert close_gaps(whole) is whole and torch.equal(close_gaps(whole[:, :2]), whole[:, :2])
    assert close_gaps(torch.zeros(1).expand(3, 2)).stride() == (0, 0)


@pytest.mark.slow
def test_compiled_steps_have_the_gradients_of_plain_ones_and_compile_once(
    tiny: Backbone, subject: Path
) -> None:
    """With prior preservation, whose batch is a part of every step."""
    training, _ = begun(tiny, subject, concept_settings(subject, steps=8))
    check(training, tiny, steps=3)


@pytest.mark.slow
@pytest.mark.parametrize("write", [tiny_flux, tiny_stable_diffusion_3, tiny_pixart])
def test_blocks_of_every_transformer_compile_once(
    tmp_path: Path, subject: Path, write: Callable[[Path], Path]
) -> None:
    model = Backbone.open(str(write(tmp_path / "model")), device="cpu", precision="fp32")
    training, _ = begun(model, subject, concept_settings(subject, steps=8))
    check(training, model, steps=2)


@pytest.mark.slow
def test_sizes_of_images_compile_once_each(tiny: Backbone, subject: Path) -> None:
    from PIL import Image

    Image.new("RGB", (160, 64), "red").save(subject / "wide.png")
    training, _ = begun(tiny, subject, concept_settings(subject, steps=30, aspect_buckets=True, prior="off"))
    counting = Counting()
    training.compiled = CompiledBlocks([tiny.denoiser], backend=counting)
    seen = []
    for _ in take_steps(training):
        seen.append(counting.graphs)
    assert seen[-1] == seen[14] and len(training.data.buckets) >= 2


def test_blocks_that_cannot_be_compiled_run_as_they_are_which_is_said_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    def find_no_compiler(graph: torch.fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
        raise FileNotFoundError("g++ is not here")

    torch._dynamo.reset()
    network: Any = nn.ModuleList(BasicTransformerBlock(8, 1, 8) for _ in range(2))
    x = torch.randn(2, 6, 8)
    plain = network[1](network[0](x))
    with CompiledBlocks([network], backend=find_no_compiler).active():
        assert torch.equal(network[1](network[0](x)), plain)
    said = capsys.readouterr().err
    assert said.count("The blocks are not compiled and run as they are") == 1 and "g++ is not here" in said
