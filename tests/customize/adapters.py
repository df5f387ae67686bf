"""Adapters with random factors for the layers of a tiny pipeline, and pipelines to put them on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from customize.formats.adapter import AdapterFile
from customize.formats.factors import LayerUpdate
from customize.formats.layers.names import TEXT_MODEL_PREFIX, is_text_encoder
from tests.tiny import tiny_tokenizer

Choose = Callable[[str, nn.Module], bool]


def whole_pipeline(folder: Path) -> StableDiffusionPipeline:
    """The tiny pipeline, loaded by diffusers in fp32."""
    return StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)


def tiny_xl() -> StableDiffusionXLPipeline:
    """A random pipeline with SDXL's structure: two layers a block, two text encoders, added conditions."""
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        projection_dim=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=40,
    )
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(config),
        text_encoder_2=CLIPTextModelWithProjection(config),
        tokenizer=tokenizer,
        tokenizer_2=tiny_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(),
    )


def modules_of(pipeline: Any) -> dict[str, nn.Module]:
    """Every linear layer and convolution of the denoiser and the text encoders, by our names."""
    found: dict[str, nn.Module] = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        part = getattr(pipeline, component, None)
        for name, module in part.named_modules() if part is not None else ():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                own = name.removeprefix(TEXT_MODEL_PREFIX) if is_text_encoder(component) else name
                found[f"{component}.{own}"] = module
    return found


def random_adapter(
    modules: Mapping[str, nn.Module], *, seed: int = 0, dora: bool = False, alphas: tuple[float, ...] = (3.0,)
) -> AdapterFile:
    """A LoRA on these modules with random factors, ranks 1 to 4, and α drawn from `alphas`."""
    random = torch.Generator().manual_seed(seed)
    layers: dict[str, LayerUpdate] = {}
    for name, module in modules.items():
        rank = int(torch.randint(1, 5, (), generator=random))
        alpha = alphas[int(torch.randint(len(alphas), (), generator=random))]
        layers[name] = random_layer(module, rank, alpha, random, dora=dora)
    return AdapterFile(layers)


def random_layer(
    module: nn.Module, rank: int, alpha: float, random: torch.Generator, *, dora: bool = False
) -> LayerUpdate:
    """A LoRA layer with random factors that fits a module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    spatial = (1, 1) if weight.ndim == 4 else ()
    factors = {
        "down": 0.1 * torch.randn(rank, *weight.shape[1:], generator=random),
        "up": 0.1 * torch.randn(weight.shape[0], rank, *spatial, generator=random),
    }
    magnitude = 0.5 + torch.rand(weight.shape[0], generator=random) if dora else None
    return LayerUpdate("lora", factors, rank, alpha, magnitude)


@torch.no_grad()
def put_into(pipeline: Any, adapter: AdapterFile, strength: float = 1.0) -> None:
    """Replaces the weights of a pipeline by changed ones: the definition that every reader must agree with."""
    modules = modules_of(pipeline)
    for name, layer in adapter.layers.items():
        weight = modules[name].weight
        assert isinstance(weight, Tensor)
        weight.copy_(layer.merge_into(weight, strength))


@torch.no_grad()
def outputs(pipeline: Any) -> Tensor:
    """What the text encoders and the denoiser say of fixed inputs, flat."""
    random = torch.Generator().manual_seed(5)
    ids = torch.randint(5, 60, (1, 77), generator=random)
    said = [pipeline.text_encoder(ids).last_hidden_state.flatten()]
    noisy = torch.randn(1, 4, 8, 8, generator=random)
    words = torch.randn(1, 77, pipeline.unet.config.cross_attention_dim, generator=random)
    added = None
    if getattr(pipeline, "text_encoder_2", None) is not None:
        said.append(pipeline.text_encoder_2(ids).last_hidden_state.flatten())
        added = {"text_embeds": torch.randn(1, 16, generator=random), "time_ids": torch.ones(1, 6)}
    time = torch.tensor([500])
    said.append(pipeline.unet(noisy, time, words, added_cond_kwargs=added).sample.flatten())
    return torch.cat(said)
