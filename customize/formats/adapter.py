"""An adapter as a value: its layers, its base model, its header."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from customize.formats.factors import Layer

Form = Literal["diffusers", "own", "kohya", "comfyui"]


Base = Literal["sd1", "sd2", "sdxl", "sd3", "flux", "pixart", "other"]


HEADER = "lora_adapter_metadata"


BASES: dict[Base, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "pixart": "PixArt",
    "other": "a model of another build",
}


_UNET_TOPS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.")


_WIDTHS: dict[int, Base] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class Adapter:
    """An adapter's layers by name (`unet.….to_q`) and what its file's header said."""

    layers: Mapping[str, Layer]
    header: Mapping[str, str] = field(default_factory=dict)
    form: str = "own"

    @property
    def kinds(self) -> list[str]:
        """`lora`, `loha`, `lokr`, with `dora` where a magnitude is learned too."""
        found = {layer.kind for layer in self.layers.values()}
        dora = any(layer.magnitude is not None for layer in self.layers.values())
        return sorted(found) + ["dora"] * dora

    @property
    def base(self) -> Base:
        """The family of the model that it fits, from the widths of its layers, else from the header."""
        return _base_by_shape(self.layers) or _base_by_header(self.header) or "other"


def _base_by_shape(layers: Mapping[str, Layer]) -> Base | None:
    names = list(layers)
    if any(name.startswith("text_encoder_2.") or "add_embedding" in name for name in names):
        return "sdxl"
    if any(name.startswith("transformer.single_transformer_blocks.") for name in names):
        return "flux"
    if any(name.startswith("transformer.") and ".attn1." in name for name in names):
        return "pixart"
    if any(name.startswith("transformer.") for name in names):
        return "sd3"
    for name, layer in layers.items():
        if name.startswith("unet.") and name.endswith((".attn2.to_k", ".attn2.to_v")):
            return _WIDTHS.get(layer.shape[1], "other")
    return None


def _base_by_header(header: Mapping[str, str]) -> Base | None:
    said = f"{header.get('ss_base_model_version', '')} {header.get('modelspec.architecture', '')}".lower()
    for mark, base in (
        *(("sdxl", "sdxl"), ("xl-v1", "sdxl"), ("sd_v1", "sd1"), ("diffusion-v1", "sd1")),
        *(
            ("sd_v2", "sd2"),
            ("diffusion-v2", "sd2"),
            ("sd3", "sd3"),
            ("diffusion-3", "sd3"),
            ("flux", "flux"),
        ),
    ):
        if mark in said:
            return cast(Base, base)
    return None
