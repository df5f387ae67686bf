"""Layer names of the original code of transformers (of Black Forest Labs, Stability, PixArt, Tongyi …)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from backbone.families.flux import original as flux

Swap = Literal["never", "halves", "halves of two"]
_ATTN2 = ("attn2.to_q", "attn2.to_k", "attn2.to_v")
_TIME, _TEXT = "time_text_embed.timestep_embedder", "time_text_embed.text_embedder"
_ADALN = "adaln_single.emb"
# Original layer → diffusers' layers, in order of their rows; # is a block's number.
_XLABS: dict[str, tuple[str, ...]] = {  # layers that its processors add to
    "double_blocks.#.qkv_lora1": flux.LAYERS["double_blocks.#.img_attn.qkv"],
    "double_blocks.#.qkv_lora2": flux.LAYERS["double_blocks.#.txt_attn.qkv"],
    "double_blocks.#.proj_lora1": flux.LAYERS["double_blocks.#.img_attn.proj"],
    "double_blocks.#.proj_lora2": flux.LAYERS["double_blocks.#.txt_attn.proj"],
    "single_blocks.#.qkv": flux.LAYERS["single_blocks.#.linear1"][:3],
    "single_blocks.#.proj": flux.LAYERS["single_blocks.#.linear2"],
}
_SD3: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "context_embedder": ("context_embedder",),
    "t_embedder.mlp.0": (f"{_TIME}.linear_1",),
    "t_embedder.mlp.2": (f"{_TIME}.linear_2",),
    "y_embedder.mlp.0": (f"{_TEXT}.linear_1",),
    "y_embedder.mlp.2": (f"{_TEXT}.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    **{
        f"joint_blocks.#.{original}": tuple(f"transformer_blocks.#.{part}" for part in parts)
        for original, parts in {
            "x_block.attn.qkv": flux.QKV,
            "x_block.attn2.qkv": _ATTN2,
            "context_block.attn.qkv": flux.ADDED_QKV,
            "x_block.attn.proj": ("attn.to_out.0",),
            "x_block.attn2.proj": ("attn2.to_out.0",),
            "context_block.attn.proj": ("attn.to_add_out",),
            "x_block.mlp.fc1": ("ff.net.0.proj",),
            "x_block.mlp.fc2": ("ff.net.2",),
            "context_block.mlp.fc1": ("ff_context.net.0.proj",),
            "context_block.mlp.fc2": ("ff_context.net.2",),
            "x_block.adaLN_modulation.1": ("norm1.linear",),
            "context_block.adaLN_modulation.1": ("norm1_context.linear",),
        }.items()
    },
}
_PIXART: dict[str, tuple[str, ...]] = {
    "x_embedder.proj": ("pos_embed.proj",),
    "t_embedder.mlp.0": (f"{_ADALN}.timestep_embedder.linear_1",),
    "t_embedder.mlp.2": (f"{_ADALN}.timestep_embedder.linear_2",),
    "csize_embedder.mlp.0": (f"{_ADALN}.resolution_embedder.linear_1",),
    "csize_embedder.mlp.2": (f"{_ADALN}.resolution_embedder.linear_2",),
    "ar_embedder.mlp.0": (f"{_ADALN}.aspect_ratio_embedder.linear_1",),
    "ar_embedder.mlp.2": (f"{_ADALN}.aspect_ratio_embedder.linear_2",),
    "t_block.1": ("adaln_single.linear",),
    "y_embedder.y_proj.fc1": ("caption_projection.linear_1",),
    "y_embedder.y_proj.fc2": ("caption_projection.linear_2",),
    "final_layer.linear": ("proj_out",),
    **{
        f"blocks.#.{original}": tuple(f"transformer_blocks.#.{part}" for part in parts)
        for original, parts in {
            "attn.qkv": ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
            "attn.proj": ("attn1.to_out.0",),
            "cross_attn.q_linear": ("attn2.to_q",),
            "cross_attn.kv_linear": ("attn2.to_k", "attn2.to_v"),
            "cross_attn.proj": ("attn2.to_out.0",),
            "mlp.fc1": ("ff.net.0.proj",),
            "mlp.fc2": ("ff.net.2",),
        }.items()
    },
}
_FLUX2: dict[str, tuple[str, ...]] = {
    **{name: flux.LAYERS[name] for name in ("img_in", "txt_in")},
    **{
        f"{name}_in.{original}_layer": (f"time_guidance_embed.{embedder}_embedder.{part}",)
        for name, embedder in (("time", "timestep"), ("guidance", "guidance"))
        for original, part in (("in", "linear_1"), ("out", "linear_2"))
    },
    **{
        f"{name}.lin": (f"{name}.linear",)
        for name in (
            *("double_stream_modulation_img", "double_stream_modulation_txt"),
            "single_stream_modulation",
        )
    },
    **{name: flux.LAYERS[name] for name in ("final_layer.linear", "final_layer.adaLN_modulation.1")},
    **{
        f"double_blocks.#.{original}": tuple(f"transformer_blocks.#.{part}" for part in parts)
        for original, parts in {
            "img_attn.qkv": flux.QKV,
            "txt_attn.qkv": flux.ADDED_QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.linear_in",),
            "img_mlp.2": ("ff.linear_out",),
            "txt_mlp.0": ("ff_context.linear_in",),
            "txt_mlp.2": ("ff_context.linear_out",),
        }.items()
    },
    "single_blocks.#.linear1": ("single_transformer_blocks.#.attn.to_qkv_mlp_proj",),
    "single_blocks.#.linear2": ("single_transformer_blocks.#.attn.to_out",),
}
_ZIMAGE: dict[str, tuple[str, ...]] = {  # what has another name; the rest is called alike
    "x_embedder": ("all_x_embedder.2-1",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
    **{
        f"{blocks}.#.attention.{original}": tuple(f"{blocks}.#.attention.{part}" for part in parts)
        for blocks in ("layers", "noise_refiner", "context_refiner")
        for original, parts in {"qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}.items()
    },
}
_KREA2: dict[str, tuple[str, ...]] = {
    "first": ("img_in",),
    "tmlp.0": ("time_embed.linear_1",),
    "tmlp.2": ("time_embed.linear_2",),
    "tproj.1": ("time_mod_proj",),
    "txtmlp.1": ("txt_in.linear_1",),
    "txtmlp.3": ("txt_in.linear_2",),
    "txtfusion.projector": ("text_fusion.projector",),
    "last.linear": ("final_layer.linear",),
    **{
        f"{original}.#.{layer}": (f"{blocks}.#.{part}",)
        for original, blocks in {
            "blocks": "transformer_blocks",
            "txtfusion.layerwise_blocks": "text_fusion.layerwise_blocks",
            "txtfusion.refiner_blocks": "text_fusion.refiner_blocks",
        }.items()
        for layer, part in {
            **{f"attn.w{letter}": f"attn.to_{letter}" for letter in "qkv"},
            "attn.wo": "attn.to_out.0",
            "attn.gate": "attn.to_gate",
            **{f"mlp.{name}": f"ff.{name}" for name in ("gate", "up", "down")},
        }.items()
    },
}
_QWEN21: dict[str, tuple[str, ...]] = {  # ComfyUI's: what has another name; the rest is called alike
    "transformer_blocks.#.img_mlp.gate_up": (
        *("transformer_blocks.#.img_mlp.gate_layer", "transformer_blocks.#.img_mlp.proj"),
    ),
}
_ORIGINALS: dict[str, flux.Layers] = {
    "flux": flux.LAYERS,
    "sd3": _SD3,
    "pixart": _PIXART,
    "flux2": _FLUX2,
    "zimage": _ZIMAGE,
    "krea2": _KREA2,
    "chroma": flux.CHROMA,
    "qwen21": _QWEN21,
}


@dataclass(frozen=True)
class OriginalLayer:
    """A layer of the original code: its name, diffusers' layers in order of its rows (# is the block's number).

    `swap`: diffusers has (scale, shift) where the original has (shift, scale), "of two" only in a modulation of two.
    """

    name: str
    parts: tuple[str, ...]
    swap: Swap = "never"


def original_layers(network: str) -> Iterator[OriginalLayer]:
    """All names of layers that are not diffusers', for a kind of transformer; those of the original code first."""
    for name, parts in _ORIGINALS.get(network, {}).items():
        yield OriginalLayer(name, parts, _find_swap(name, network))
    for name, parts in _ORIGINALS.get(network, {}).items():
        for number, part in enumerate(parts if len(parts) > 1 else ()):  # OneTrainer: img_attn.qkv.0
            yield OriginalLayer(f"{name}.{number}", (part,))
    if network == "flux":
        for name, parts in _XLABS.items():
            yield OriginalLayer(name, parts)


def find_original(module: str, network: str) -> tuple[OriginalLayer, str, int] | None:
    """diffusers' module → (the original layer that holds it, its name there, position in it); None if none does.

    `transformer_blocks.3.attn.to_k` → (…, `double_blocks.3.img_attn.qkv`, 1) for "flux".
    """
    match = re.search(r"(?:blocks|layers|refiner)\.(\d+)\.", module)
    number = match[1] if match else ""
    general = module.replace(f".{number}.", ".#.", 1) if match else module
    for name, parts in _ORIGINALS.get(network, {}).items():
        if general in parts:
            return (
                OriginalLayer(name, parts, _find_swap(name, network)),
                name.replace("#", number),
                parts.index(general),
            )
    return None


def _find_swap(name: str, network: str) -> Swap:
    if name == "final_layer.adaLN_modulation.1":
        return "never" if network == "zimage" else "halves"  # a scale alone
    return "halves of two" if name.endswith("context_block.adaLN_modulation.1") else "never"
