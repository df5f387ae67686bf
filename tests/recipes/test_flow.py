"""The flow recipe trains the very network that diffusers' pipeline samples, at a third of the work."""

from __future__ import annotations

import zlib
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from torch import nn

from backbone.diffusion.samplers import ddim
from backbone.families.sd3.family import T5_TOKENS, use_repeated_zero_token
from backbone.models.locate import EMBEDDED
from backbone.models.model import Backbone
from backbone.world.scene import sample_scene
from recipes.moji.flow import (
    TOKENS,
    append_absent,
    build_second_encoder,
    build_transformer,
    join_encodings,
    list_inner_matrices,
    list_trained_parameters,
    load_first_encoder,
    load_tokenizer,
    write_pipeline,
)
from recipes.moji.training.run import FINE_GRID, GRID, on_grid, round_to_grid


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The exported pipeline with random weights."""
    torch.manual_seed(0)
    network = build_transformer()
    for parameter in network.parameters():  # what begins at zero would hide mistakes
        torch.nn.init.normal_(parameter, std=0.05)
    out = tmp_path_factory.mktemp("flow") / "pipeline"
    write_pipeline(network, build_second_encoder(load_tokenizer(EMBEDDED)), out, vae=EMBEDDED / "vae")
    return out


def opened(folder: Path) -> StableDiffusion3Pipeline:
    """As diffusers opens a Stable Diffusion 3 without T5."""
    return StableDiffusion3Pipeline.from_pretrained(
        folder, text_encoder_3=None, tokenizer_3=None, local_files_only=True
    )


def test_one_token_counted_often_is_as_good_as_the_pipeline_s_many() -> None:
    torch.manual_seed(0)
    network = build_transformer().eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    noisy, hidden, pooled = torch.randn(2, 24, 16, 16), torch.randn(2, 7, 384), torch.randn(2, 384)

    def velocity(tokens: int) -> torch.Tensor:
        with torch.no_grad():
            said = network(noisy, append_absent(hidden, tokens), pooled, torch.tensor([3.0, 700.0])).sample
        assert isinstance(said, torch.Tensor)
        return said

    many, few = velocity(T5_TOKENS), velocity(1)
    use_repeated_zero_token(network)
    counted = velocity(1)
    assert (counted - many).abs().max() < 1e-4 * many.abs().max()
    assert (few - many).abs().max() > 1e-2 * many.abs().max()  # so the count matters


def test_no_caption_of_the_world_is_cut() -> None:
    tokenizer = load_tokenizer(EMBEDDED)
    captions = [sample_scene(seed).caption() for seed in range(3000)]
    assert max(len(ids) for ids in tokenizer(captions)["input_ids"]) < TOKENS


def test_diffusers_and_our_backbone_load_the_folder_and_draw_the_same(folder: Path) -> None:
    pipeline = opened(folder)
    pipeline.set_progress_bar_config(disable=True)
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    noise = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    theirs = pipeline(
        "a dog in the snow", latents=noise, num_inference_steps=3, guidance_scale=4.0, output_type="latent",
        height=128, width=128,
    ).images  # fmt: skip
    text, empty = model.encode_prompts(["a dog in the snow"]), model.encode_prompts([""])
    ours = ddim(noise, model.guided_predictor(text, empty, 4.0), model.schedule(3))
    assert torch.allclose(ours, theirs, atol=1e-3 * float(theirs.abs().max()))


def test_training_reads_the_text_as_the_pipeline_does(folder: Path) -> None:
    model = Backbone.open(str(folder), device="cpu", precision="fp32")
    text = model.encode_prompts(["two red cats on the beach"])
    tokenizer = load_tokenizer(EMBEDDED)
    tokens = tokenizer("two red cats on the beach", padding="max_length", return_tensors="pt")["input_ids"]
    pipeline = opened(folder)
    hidden, pooled = join_encodings(pipeline.text_encoder, pipeline.text_encoder_2, tokens, trained_rows=1)
    assert torch.allclose(append_absent(hidden, 1), text.text["hidden"], atol=1e-5)
    assert torch.allclose(pooled, text.text["pooled"], atol=1e-5)


def test_the_first_encoder_is_moji_s() -> None:
    tokens = load_tokenizer(EMBEDDED)("a dog in the snow", padding="max_length", return_tensors="pt")[
        "input_ids"
    ]
    ours = load_first_encoder()(tokens).last_hidden_state
    theirs = Backbone.open("moji", device="cpu", precision="fp32").encode_prompts(["a dog in the snow"])
    longest = next(value for value in theirs.tensors() if value.ndim == 3)
    assert (
        ours - longest[:, :TOKENS]
    ).square().mean() < 1e-3 * longest.square().mean()  # rounded to the grid


def test_every_trained_weight_is_stepped_once() -> None:
    network, second = build_transformer(), build_second_encoder(load_tokenizer(EMBEDDED))
    names = {id(value): name for name, value in list_trained_parameters(network, second).items()}
    inner = [names[id(value)] for value in list_inner_matrices(network)]
    assert len(inner) == len(set(inner))
    assert not any("norm" in name or "text_encoder" in name for name in inner)
    assert sum(value.numel() for value in network.parameters()) < 13e6


def test_exported_weights_lie_near_those_that_were_trained_and_pack_smaller() -> None:
    weights = (
        torch.randn(64, 1024, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 0, 64)[:, None]
    )
    vector, few = weights[:, 0].clone(), weights[:, :1000]
    found = round_to_grid({"w": weights, "v": vector, "few": few})
    assert torch.equal(found["v"], vector)
    for name, given, grid, room in (("w", weights, GRID, 0.6), ("few", few, FINE_GRID, 0.9)):
        error = (found[name] - given).square().mean(1) / given.square().mean(1)
        assert (
            error.max() < 1.2 * 2 * (1 / grid) ** 2 / 12
        )  # of a step that may be √2 of it, in 1,000 samples
        assert torch.equal(found[name].half().float(), found[name])
        packed, before = (len(zlib.compress(some.half().numpy().tobytes())) for some in (found[name], given))
        assert packed < room * before


def test_a_training_on_the_grid_has_its_gradients_there_and_keeps_its_exact_weights() -> None:
    layer = nn.Linear(16, 8)
    before = layer.weight.detach().clone()
    with on_grid(dict(layer.named_parameters())):
        assert torch.equal(layer.weight, round_to_grid({"w": before})["w"])
        layer(torch.ones(3, 16)).square().sum().backward()
    assert torch.equal(layer.weight, before)
    there = nn.Linear(16, 8)
    there.load_state_dict({"weight": round_to_grid({"w": before})["w"], "bias": layer.bias.detach()})
    there(torch.ones(3, 16)).square().sum().backward()
    assert layer.weight.grad is not None and there.weight.grad is not None
    assert torch.equal(layer.weight.grad, there.weight.grad)


def test_a_fused_optimiser_on_the_grid_steps_the_weights_that_the_gradients_belong_to() -> None:
    """It goes by memory: a gradient in another layout than its weights is applied to others, in silence."""
    stepped = []
    for fused in (True, False):
        torch.manual_seed(0)
        layer = nn.Conv2d(4, 8, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=fused)
        for number in range(2):
            given = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(number))
            with on_grid(dict(layer.named_parameters())):
                (layer(given) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        stepped.append(layer.weight.detach())
    assert torch.allclose(stepped[0], stepped[1], atol=1e-5)
