"""The layers of the supported networks, from the networks themselves: built on the meta device with one block of each.

A name stands for all blocks of its kind: `transformer_blocks.7.attn.to_q` is known as `transformer_blocks.#.attn.to_q`.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, Literal, cast

from torch import nn

from backbone.families.components.empty import without_initialisation
from backbone.families.location import PUBLISHED_CONFIGS
from customize.formats.layers.names import TEXT_MODEL_PREFIX

Network = Literal[
    "unet", "sd3", "flux", "pixart", "zimage", "flux2", "qwen", "krea2", "chroma", "qwen21", "svd", "clip"
]
DENOISERS: tuple[Network, ...] = (
    *("unet", "sd3", "flux", "pixart", "zimage", "flux2", "qwen", "krea2", "chroma", "qwen21", "svd"),
)
UNETS: tuple[Network, ...] = ("unet", "svd")  # the rest are transformers
NETWORK_NAMES: dict[Network, str] = {
    "unet": "Stable Diffusion's UNets",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "pixart": "PixArt-Σ",
    "zimage": "Z-Image",
    "flux2": "FLUX.2",
    "qwen": "Qwen-Image",
    "krea2": "Krea 2",
    "chroma": "Chroma",
    "qwen21": "Qwen-Image 2.1",
    "svd": "Stable Video Diffusion",
    "clip": "CLIP",
}
LISTS = "blocks|resnets|attentions|downsamplers|upsamplers|layers|refiner"  # ends of the names of lists
_NUMBER = re.compile(rf"(?:^|(?<=\.))(\w*(?:{LISTS}))\.\d+(?=\.|$)")


def generalize(module: str) -> str:
    """`transformer_blocks.7.attn.to_q` → `transformer_blocks.#.attn.to_q`: every block's number becomes #."""
    return _NUMBER.sub(r"\1.#", module)


def is_known(network: Network, module: str) -> bool:
    """Whether a network of this kind has a layer of this name, in some block."""
    return generalize(module) in list_known_layers(network)


@cache
def list_known_layers(network: Network) -> Mapping[str, tuple[int, ...] | None]:
    """Generalised name of each linear layer and convolution of a kind of network → its kernel: () or (k, k).

    None if the networks differ: `proj_in` is a 1 × 1 convolution in some UNets and a linear layer in others.
    """
    kernels: dict[str, set[tuple[int, ...]]] = {}
    for name, module in _list_layers(network):
        kernels.setdefault(generalize(name), set()).add(tuple(module.weight.shape[2:]))
    return {name: sizes.pop() if len(sizes) == 1 else None for name, sizes in kernels.items()}


def list_layer_names(network: Network) -> list[str]:
    """The names of all linear layers and convolutions of networks of this kind, with the blocks that were built."""
    return sorted({name for name, _ in _list_layers(network)})


@cache
def _list_layers(network: Network) -> list[tuple[str, Any]]:
    import torch

    with torch.device("meta"), without_initialisation():
        models = _build(network)
    return [
        (name.removeprefix(TEXT_MODEL_PREFIX) if network == "clip" else name, module)
        for model in models
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, nn.Conv2d))
    ]


# The class of a network in diffusers, the published config that it starts from, and the numbers of its blocks.
ONE_BLOCK: Mapping[Network, tuple[str, str | None, dict[str, Any]]] = {
    "sd3": (
        *("SD3Transformer2DModel", "stable-diffusion-3.5-medium"),
        {"num_layers": 2, "dual_attention_layers": (0,)},
    ),
    "flux": ("FluxTransformer2DModel", "flux-dev", {"num_layers": 1, "num_single_layers": 1}),
    "pixart": (
        *("PixArtTransformer2DModel", None),
        {"num_layers": 1, "sample_size": 128, "caption_channels": 8, "use_additional_conditions": True},
    ),
    "zimage": ("ZImageTransformer2DModel", None, {"n_layers": 1, "n_refiner_layers": 1}),
    "qwen": ("QwenImageTransformer2DModel", None, {"num_layers": 1}),
    "chroma": (
        *("ChromaTransformer2DModel", None),
        {"num_layers": 1, "num_single_layers": 1, "approximator_layers": 1},
    ),
    "qwen21": ("QwenImage21Transformer2DModel", None, {"num_layers": 1}),
    "svd": ("UNetSpatioTemporalConditionModel", None, {"layers_per_block": 1}),
    "krea2": (
        *("Krea2Transformer2DModel", None),
        {"num_layers": 1, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
    ),
    # dev, which alone has an embedding of guidance
    "flux2": ("Flux2Transformer2DModel", None, {"num_layers": 1, "num_single_layers": 1}),
}
UNET_OPTIONS = {  # layers that a UNet of another task or a distilled one has
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 8,
    "time_cond_proj_dim": 8,
    "encoder_hid_dim": 8,
}


def _build(network: Network) -> list[nn.Module]:
    """Networks of the published shapes with one block of each kind; UNets with all that these may have."""
    if network == "unet":
        return [
            _build_unet("stable-diffusion-1", {}),
            _build_unet("stable-diffusion-1", UNET_OPTIONS),
            _build_unet("stable-diffusion-xl", {}),
        ]
    if network == "clip":
        from transformers import CLIPTextConfig, CLIPTextModelWithProjection

        return [CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=1))]
    import diffusers

    name, published, blocks = ONE_BLOCK[network]
    config = {} if published is None else _read_config(published, "transformer")
    # By diffusers of itself
    warnings.filterwarnings("ignore", message=".*FluxPosEmbed.*", category=FutureWarning)
    return [getattr(diffusers, name).from_config(config | blocks)]


def _build_unet(folder: str, options: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    config = _read_config(folder, "unet") | {"transformer_layers_per_block": 1} | options
    return cast(nn.Module, UNet2DConditionModel.from_config(config))


def _read_config(folder: str, part: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(
        (PUBLISHED_CONFIGS / folder / part / "config.json").read_text(encoding="utf-8")
    )
    return config
