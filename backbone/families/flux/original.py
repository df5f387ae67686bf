"""Layer names of FLUX.1's transformer in Black Forest Labs' code, with diffusers'; Chroma's are made of these."""

from __future__ import annotations

import re
from collections.abc import Mapping

Layers = Mapping[str, tuple[str, ...]]
"""Original layer → diffusers' layers, in order of their rows; # is a block's number."""
QKV = ("attn.to_q", "attn.to_k", "attn.to_v")
ADDED_QKV = ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")
_TIME, _TEXT = "time_text_embed.timestep_embedder", "time_text_embed.text_embedder"
_GUIDANCE = "time_text_embed.guidance_embedder"
LAYERS: Layers = {
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": (f"{_TIME}.linear_1",),
    "time_in.out_layer": (f"{_TIME}.linear_2",),
    "vector_in.in_layer": (f"{_TEXT}.linear_1",),
    "vector_in.out_layer": (f"{_TEXT}.linear_2",),
    "guidance_in.in_layer": (f"{_GUIDANCE}.linear_1",),
    "guidance_in.out_layer": (f"{_GUIDANCE}.linear_2",),
    "final_layer.linear": ("proj_out",),
    "final_layer.adaLN_modulation.1": ("norm_out.linear",),
    **{
        f"double_blocks.#.{original}": tuple(f"transformer_blocks.#.{part}" for part in parts)
        for original, parts in {
            "img_attn.qkv": QKV,
            "txt_attn.qkv": ADDED_QKV,
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
        }.items()
    },
    **{
        f"single_blocks.#.{original}": tuple(f"single_transformer_blocks.#.{part}" for part in parts)
        for original, parts in {
            "linear1": (*QKV, "proj_mlp"),
            "linear2": ("proj_out",),
            "modulation.lin": ("norm.linear",),
        }.items()
    },
}
# Chroma's, whose modulation one small network computes.
CHROMA: Layers = {
    **{
        name: parts
        for name, parts in LAYERS.items()
        if not re.search(r"_mod\.|modulation|time_in|vector_in|guidance_in", name)
    },
    **{
        f"distilled_guidance_layer.layers.#.{original}_layer": (f"distilled_guidance_layer.layers.#.{part}",)
        for original, part in (("in", "linear_1"), ("out", "linear_2"))
    },
}
NORMS: Mapping[str, str] = {  # of queries and keys, whose `scale` is diffusers' `weight`
    f"{original}.norm.{name}_norm": f"{blocks}.#.attn.norm_{added}{name[0]}"
    for original, blocks, added in (
        ("double_blocks.#.img_attn", "transformer_blocks", ""),
        ("double_blocks.#.txt_attn", "transformer_blocks", "added_"),
        ("single_blocks.#", "single_transformer_blocks", ""),
    )
    for name in ("query", "key")
}


def from_original(name: str, layers: Layers = LAYERS) -> tuple[str, ...]:
    """diffusers' names of an original tensor's parts, in order of its rows; another name is returned as it is.

    `double_blocks.3.txt_attn.qkv.bias` → (`transformer_blocks.3.attn.add_q_proj.bias`, …).
    """
    layer, _, kind = name.rpartition(".")
    block = re.match(r"(.*?(?:blocks|layers))\.(\d+)\.(.+)", layer)
    general, number = (f"{block[1]}.#.{block[3]}", block[2]) if block else (layer, "")
    if general in NORMS and kind == "scale":
        return (f"{NORMS[general]}.weight".replace("#", number),)
    parts = layers.get(general)
    return (name,) if parts is None else tuple(f"{part}.{kind}".replace("#", number) for part in parts)
