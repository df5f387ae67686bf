"""Models of published shapes whose random weights are made on the device: no file, no download, no copy.

    model = build("flux", folder, device="cuda", precision="bf16").model

A folder of configs is all that is written. Random weights cost the same time as trained ones. Prompts are encoded by
random encoders of the right size too, on random tokens; the network then gets random text of the right shape, the same
for the same prompt. `tiny` makes every network as small as its architecture allows, for a test on a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import generator
from backbone.families.base import ModelSpec, TextSegment
from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.files import read_json, write_json
from backbone.models.model import Backbone
from backbone.models.placement import Placement, enable_tiling, place_denoiser
from benchmarks.speed.shapes import Parts, find_shape

SMALL_VAE = {
    "block_out_channels": [8, 16], "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2, "layers_per_block": 1, "norm_num_groups": 4, "sample_size": 32,
}  # fmt: skip
SMALL_CLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def write_configs(shape: str, folder: Path, *, tiny: bool = False) -> Path:
    """The configs of a shape, sd15, sdxl or flux, as a diffusers folder without weights."""
    parts, pipeline = (
        _make_flux_configs(tiny=tiny) if shape == "flux" else _make_unet_configs(shape, tiny=tiny)
    )
    for part, config in parts.items():
        name = "scheduler_config" if part == "scheduler" else "config"
        write_json(folder / part / f"{name}.json", config)
    index: dict[str, Any] = {"_class_name": pipeline}
    for part in parts:
        index[part] = ["transformers" if part.startswith("text") else "diffusers", ""]
    write_json(folder / "model_index.json", index)
    return folder


def _make_unet_configs(shape: str, *, tiny: bool) -> tuple[dict[str, Any], str]:
    published = find_shape(shape)
    unet, vae, texts = published.unet, published.autoencoder, list(published.text)
    if tiny:
        xl = shape == "sdxl"
        unet = {
            **unet, "sample_size": 16, "block_out_channels": [8, 16], "norm_num_groups": 4, "layers_per_block": 1,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"], "attention_head_dim": [1, 2],
            "cross_attention_dim": 32 if xl else 16, "transformer_layers_per_block": 1,
        }  # fmt: skip
        unet |= (
            {"projection_class_embeddings_input_dim": 6 * 8 + 16, "addition_time_embed_dim": 8} if xl else {}
        )
        vae = {**vae, **SMALL_VAE}
        texts = [{**text, **SMALL_CLIP, "projection_dim": 16} for text in texts]
    names = ("text_encoder", "text_encoder_2")
    scheduler = read_json(PUBLISHED_CONFIGS / "stable-diffusion-1" / "scheduler" / "scheduler_config.json")
    return {
        "unet": unet,
        "vae": vae,
        "scheduler": scheduler,
        **dict(zip(names, texts, strict=False)),
    }, published.pipeline


def _make_flux_configs(*, tiny: bool) -> tuple[dict[str, Any], str]:
    def config(folder: str, part: str) -> dict[str, Any]:
        name = "scheduler_config" if part == "scheduler" else "config"
        return dict(read_json(PUBLISHED_CONFIGS / folder / part / f"{name}.json"))

    transformer, vae = config("flux-dev", "transformer"), config("flux", "vae")
    clip, t5 = config("stable-diffusion-1", "text_encoder"), config("flux", "text_encoder_2")
    if tiny:
        transformer |= {
            "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 16, "pooled_projection_dim": 16, "axes_dims_rope": [4, 6, 6],
        }  # fmt: skip
        vae |= SMALL_VAE
        clip |= SMALL_CLIP
        t5 |= {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    parts = {
        "transformer": transformer, "vae": vae, "scheduler": config("flux-dev", "scheduler"),
        "text_encoder": clip, "text_encoder_2": t5,
    }  # fmt: skip
    return parts, "FluxPipeline"


def build(
    folder: Path,
    *,
    device: str,
    precision: str,
    resolution: int = 0,
    placement: Placement | None = None,
    encoders: bool = True,
) -> Parts:
    """A model of a folder of configs, all its weights made on the device; without `encoders`, the denoiser alone."""
    model = Backbone.open(
        str(folder), device=device, precision=precision, resolution=resolution, placement=placement
    )
    spec = model.family.spec(model.location, model.dtype)
    torch.manual_seed(0)
    with default_dtype(model.dtype):
        denoiser = spec.denoiser.instantiate(str(model.device))
    model.__dict__["denoiser"] = place_denoiser(denoiser, model.placement, model.device)
    autoencoder: nn.Module = nn.Identity()
    if encoders:
        autoencoder = spec.autoencoder.instantiate(str(model.device))
        if model.placement.tiling:
            enable_tiling(autoencoder, model.resolution // 2)
        model.__dict__["autoencoder"] = autoencoder
    text = RandomText(model, spec, encoders=encoders)
    model.__dict__["text_encoder"] = text
    return Parts(model, autoencoder, text.encode)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Inside the `with`, new weights are made in this precision at once."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(previous)


@lru_cache(maxsize=1)
def load_tokenizer() -> Any:
    """`moji`'s, which is at hand everywhere."""
    return Backbone.open("moji", device="cpu").text_encoder.tokenizer


class RandomText:
    """A `TextEncoder`: the work of the model's encoders, and random text. Its tokenizer is `moji`'s."""

    def __init__(self, model: Backbone, spec: ModelSpec, *, encoders: bool) -> None:
        self.device, self.shapes = model.device, spec.text_shapes
        self.tokenizer = load_tokenizer()
        self.slots: tuple[Any, ...] = ()
        self.segments = (TextSegment(self.tokenizer, spec.text_shapes["hidden"][0]),)
        self.networks = []
        for encoder in spec.text_encoders.values() if encoders else ():
            with default_dtype(model.dtype):
                network = encoder.instantiate(str(model.device))
            nn.Module.to(network, model.dtype)  # as scripts cast them
            self.networks.append(network)

    def to(self, device: torch.device) -> RandomText:
        return self

    def __call__(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Random text of the right shape, the same for the same prompt."""
        rows = [
            {
                name: torch.randn(shape, generator=generator("text", prompt, name))
                for name, shape in self.shapes.items()
            }
            for prompt in prompts
        ]
        return {name: torch.stack([row[name] for row in rows]).to(self.device) for name in self.shapes}

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Conditions:
        """The same after the encoders' work on as many random tokens."""
        for network in self.networks:
            config: Any = network.config
            length = getattr(config, "max_position_embeddings", None) or self.segments[0].tokens
            network(torch.randint(2, 100, (len(prompts), length), device=self.device))
        return Conditions(self(prompts))
