"""An adapter as a value: its layers, its base model, its metadata."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from customize.formats.factors import LayerUpdate

FileFormat = Literal["diffusers", "peft", "kohya", "comfyui"]


BaseFamily = Literal["sd1", "sd2", "sdxl", "sd3", "flux", "pixart", "other"]


CONFIG_KEY = "lora_adapter_metadata"


BASE_NAMES: dict[BaseFamily, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "pixart": "PixArt",
    "other": "a model of another build",
}


UNET_PREFIXES = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.")


_FAMILY_BY_CONTEXT_WIDTH: dict[int, BaseFamily] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class AdapterFile:
    """An adapter's layers by name (`unet.….to_q`) and what its file's metadata said."""

    layers: Mapping[str, LayerUpdate]
    metadata: Mapping[str, str] = field(default_factory=dict)
    file_format: str = "peft"

    @property
    def algorithms(self) -> list[str]:
        """`lora`, `loha`, `lokr`, with `dora` where a magnitude is learned too."""
        found = {layer.algorithm for layer in self.layers.values()}
        dora = any(layer.magnitude is not None for layer in self.layers.values())
        return sorted(found) + ["dora"] * dora

    @property
    def base(self) -> BaseFamily:
        """The family of the model that it fits, from the widths of its layers, else from the metadata."""
        return _family_from_layers(self.layers) or _family_from_metadata(self.metadata) or "other"


def _family_from_layers(layers: Mapping[str, LayerUpdate]) -> BaseFamily | None:
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
            return _FAMILY_BY_CONTEXT_WIDTH.get(layer.shape[1], "other")
    return None


def _family_from_metadata(metadata: Mapping[str, str]) -> BaseFamily | None:
    said = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
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
            return cast(BaseFamily, base)
    return None
