"""An adapter read from a file: the weight update of each layer, the base model it fits, the file's metadata."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, cast

from customize.formats.factors import LayerUpdate
from customize.formats.layers.known import DENOISERS, UNETS, Network, is_known
from customize.formats.layers.relatives import PUBLISHED, find_relatives, find_width, has_published_size

FileFormat = Literal["diffusers", "peft", "kohya", "comfyui"]
BaseFamily = Literal[
    "sd1",
    "sd2",
    "sdxl",
    "sd3",
    "flux",
    "pixart",
    "zimage",
    "flux2",
    "qwen",
    "krea2",
    "chroma",
    "qwen21",
    "svd",
    "other",
]
BASE_NAMES: dict[BaseFamily, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "pixart": "PixArt",
    "zimage": "Z-Image",
    "flux2": "FLUX.2",
    "qwen": "Qwen-Image",
    "krea2": "Krea 2",
    "chroma": "Chroma",
    "qwen21": "Qwen-Image 2.1",
    "svd": "Stable Video Diffusion",
    "other": "a model that is not known here",
}
# Width of the text states [B, T, width] that a UNet's cross-attention takes.
FAMILY_BY_CONTEXT_WIDTH: dict[int, BaseFamily] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}

# Width of the image tokens → the models that have blocks of the same names, each with how many it has at most: FLUX.2's
# (klein 4B; klein 9B; dev) count where all of theirs are there, of the others the first that has room for the last.
_TRANSFORMERS_BY_WIDTH: dict[int, dict[BaseFamily, int]] = {
    1536: {"sd3": 24},
    2432: {"sd3": 38},
    3072: {"flux2": 5, "flux": 19, "qwen": 60},
    4096: {"flux2": 8, "qwen21": 32},
    6144: {"flux2": 8, "krea2": 28},
}
_BLOCK = re.compile(r"(?:^| )transformer_blocks\.(\d+)\.")
# In metadata: the DoRA scales are ComfyUI's, rescaled for one base model
FOR_COMFYUI = "limner_dora_scales"
# What kohya's and ModelSpec's version strings contain, as an expression; the first match counts.
_FAMILY_BY_VERSION: tuple[tuple[str, BaseFamily], ...] = (
    ("sdxl", "sdxl"),
    ("xl-v1", "sdxl"),
    ("sd_v1", "sd1"),
    ("diffusion-v1", "sd1"),
    ("sd_v2", "sd2"),
    ("diffusion-v2", "sd2"),
    ("sd3", "sd3"),
    ("diffusion-3", "sd3"),
    ("z-image", "zimage"),
    ("z_image", "zimage"),
    ("zimage", "zimage"),
    (r"qwen[-_]image[-_]2(?!\d)", "qwen21"),  # and no Qwen-Image-2512
    ("qwen", "qwen"),
    (r"flux\S*krea", "flux"),  # FLUX.1 Krea
    ("krea", "krea2"),
    ("chroma", "chroma"),
    ("pixart", "pixart"),
    (r"flux[-._]?2", "flux2"),
    ("flux", "flux"),
)
PIPELINES: dict[str, BaseFamily] = {
    "StableDiffusion3Pipeline": "sd3",
    "FluxPipeline": "flux",
    "PixArtSigmaPipeline": "pixart",
    "ZImagePipeline": "zimage",
    "Flux2KleinPipeline": "flux2",
    "Flux2Pipeline": "flux2",
    "FluxKontextPipeline": "flux",
    "QwenImagePipeline": "qwen",
    "QwenImageEditPipeline": "qwen",
    "QwenImageEditPlusPipeline": "qwen",
    "Krea2Pipeline": "krea2",
    "ChromaPipeline": "chroma",
    "QwenImage21Pipeline": "qwen21",
    "StableVideoDiffusionPipeline": "svd",
}
# Pipelines of UNets → the families that they may be of
UNET_PIPELINES: dict[str, tuple[BaseFamily, ...]] = {
    "StableDiffusionPipeline": ("sd1", "sd2"),
    "StableDiffusionXLPipeline": ("sdxl",),
}


@dataclass(frozen=True)
class AdapterFile:
    """Layer name (`unet.….to_q`) → weight update, the file's metadata, and a description of its format.

    `network` is the denoiser's kind if the file's names are of one only (`flux` for `double_blocks`). `numbered` says
    that it names the first of several text encoders and no denoiser (kohya's `lora_te1_`). `networks` are all that have
    these names; () if that is not known.
    """

    layers: Mapping[str, LayerUpdate]
    metadata: Mapping[str, str] = field(default_factory=dict)
    file_format: str = "peft"
    network: Network | None = None
    numbered: bool = False
    networks: tuple[Network, ...] = ()

    @property
    def algorithms(self) -> list[str]:
        """Which of `lora`, `loha`, `lokr` the layers use, sorted; `dora` last where a magnitude is learned."""
        algorithms = {layer.algorithm for layer in self.layers.values()}
        has_dora = any(layer.magnitude is not None for layer in self.layers.values())
        return sorted(algorithms) + ["dora"] * has_dora

    @property
    def base(self) -> BaseFamily:
        """Family of the base model: from layer names and sizes, else from the metadata, else `other`."""
        family, shapes = self._named_family, self._transformer_shapes
        if self._is_sized_as(family) or not find_relatives(family, shapes):
            return family
        return "other"

    @property
    def base_name(self) -> str:
        """The base model in words: all models with such layers, or that it is unknown."""
        family, shapes = self._named_family, self._transformer_shapes
        models = [BASE_NAMES[family]] if self._is_sized_as(family) else []
        if family_from_metadata(self.metadata) != family:
            models += find_relatives(family, shapes)
            if models == [BASE_NAMES["flux"]] and all(is_known("chroma", name) for name in shapes):
                models.append(BASE_NAMES["chroma"])
        if models:
            return " or ".join(models)
        return f"unknown (its layers are called as {BASE_NAMES[family]}'s, but have another size)"

    @property
    def relatives(self) -> list[str]:
        """Unsupported models that may have these layers."""
        return find_relatives(self._named_family, self._transformer_shapes)

    @property
    def _named_family(self) -> BaseFamily:
        declared = family_from_metadata(self.metadata)
        if self.network not in (None, "unet", "clip"):
            family = cast(BaseFamily, self.network)
        else:
            family = _infer_family(self.layers, self.metadata, self.networks) or declared or "other"
        return (
            "chroma" if (family, declared) == ("flux", "chroma") else family
        )  # Chroma's layers are a subset of FLUX.1's

    @property
    def _transformer_shapes(self) -> dict[str, tuple[int, ...]]:
        start = "transformer."
        return {
            name.removeprefix(start): layer.shape
            for name, layer in self.layers.items()
            if name.startswith(start)
        }

    def _is_sized_as(self, family: BaseFamily) -> bool:
        if family not in PUBLISHED or family_from_metadata(self.metadata) == family:
            return True
        return has_published_size(family, self._transformer_shapes)


def in_genitive(name: str) -> str:
    """“kohya's”, “diffusers'”."""
    return f"{name}'" if name.endswith("s") else f"{name}'s"


def _infer_family(
    layers: Mapping[str, LayerUpdate], metadata: Mapping[str, str], networks: tuple[Network, ...]
) -> BaseFamily | None:
    names = list(layers)
    if any("add_embedding" in name for name in names):
        return "sdxl"
    shapes = {
        name.removeprefix("transformer."): layer.shape
        for name, layer in layers.items()
        if name.startswith("transformer.")
    }
    if shapes:
        possible = [
            network
            for network in networks or DENOISERS
            if network not in UNETS and all(is_known(network, name) for name in shapes)
        ]
        if "flux" in possible and "chroma" in possible:
            possible.remove("chroma")
        if len(possible) == 1:
            return cast(BaseFamily, possible[0])
        # FLUX.1's, klein's and Qwen-Image's blocks are equally wide
        declared = family_from_metadata(metadata)
        return declared if declared in possible else _infer_family_by_width(shapes, possible)
    for name, layer in layers.items():
        if name.startswith("unet.") and name.endswith((".attn2.to_k", ".attn2.to_v")):
            family = FAMILY_BY_CONTEXT_WIDTH.get(layer.shape[1])
            if family is not None:
                return family
            return "sdxl" if any(name.startswith("text_encoder_2.") for name in names) else "other"
    return "sdxl" if any(name.startswith("text_encoder_2.") for name in names) else None


def _infer_family_by_width(
    shapes: Mapping[str, tuple[int, ...]], possible: Collection[Network]
) -> BaseFamily | None:
    """The model with blocks [out, in] common to several, by their width and number; None if that is ambiguous."""
    counts_by_family = _TRANSFORMERS_BY_WIDTH.get(find_width(shapes) or 0, {})
    models = {name: most for name, most in counts_by_family.items() if name in possible}
    blocks = 1 + max((int(number) for number in _BLOCK.findall(" ".join(shapes))), default=0)
    if len(models) > 1 and models.get("flux2") not in (None, blocks):
        del models["flux2"]
    return next((name for name, most in models.items() if blocks <= most), None)


def family_from_metadata(metadata: Mapping[str, str]) -> BaseFamily | None:
    """The base model's family according to a file's metadata; None if it names no known one."""
    text = f"{metadata.get('ss_base_model_version', '')} {metadata.get('modelspec.architecture', '')}".lower()
    return next((family for version, family in _FAMILY_BY_VERSION if re.search(version, text)), None)
