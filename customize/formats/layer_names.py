"""Translate layer names between diffusers, kohya (underscores) and the original code (block numbers, fused layers).

The canonical name is component and diffusers' module name, without CLIP's level `text_model`:
`unet.down_blocks.0.attentions.0.proj_in`, `text_encoder.encoder.layers.3.mlp.fc1`.
"""

from __future__ import annotations

import re

COMPONENTS = ("unet", "text_encoder_2", "text_encoder", "transformer")
TEXT_MODEL_PREFIX = "text_model."
LAYERS_PER_BLOCK = 2  # of every published Stable Diffusion

# Module names that hold an underscore themselves; every other underscore of a flat name was a dot.
_COMPOUNDS = (
    *("double_blocks", "single_blocks", "joint_blocks", "x_block", "context_block", "img_attn", "txt_attn"),
    *("img_mlp", "txt_mlp", "img_mod", "txt_mod", "norm1_context"),
    *("down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks"),
    *("time_embedding", "add_embedding", "class_embedding", "time_emb_proj", "linear_1", "linear_2"),
    *("conv_in", "conv_out", "conv_shortcut", "proj_in", "proj_out", "proj_mlp", "encoder_hid_proj"),
    *("to_q", "to_k", "to_v", "to_out", "to_add_out", "add_q_proj", "add_k_proj", "add_v_proj", "ff_context"),
    *("input_blocks", "middle_block", "output_blocks", "in_layers", "out_layers", "emb_layers"),
    *("skip_connection", "time_embed", "label_emb"),
    *("text_model", "text_projection", "self_attn", "q_proj", "k_proj", "v_proj", "out_proj"),
    *("token_embedding", "position_embedding", "final_layer_norm"),
)
_PIECES = re.compile(
    "|".join(f"{name}(?=_|$)" for name in sorted(_COMPOUNDS, key=len, reverse=True)) + "|[^_]+"
)
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_OUTER = {
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
}
_QKV, _ADDED = (
    ("attn.to_q", "attn.to_k", "attn.to_v"),
    ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
)
# Fused layers of the original transformer code: block → its layer → diffusers' layers, in order of their rows.
_FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    "double_blocks": {
        "img_attn.qkv": _QKV,
        "txt_attn.qkv": _ADDED,
        "img_attn.proj": ("attn.to_out.0",),
        "txt_attn.proj": ("attn.to_add_out",),
        "img_mlp.0": ("ff.net.0.proj",),
        "img_mlp.2": ("ff.net.2",),
        "txt_mlp.0": ("ff_context.net.0.proj",),
        "txt_mlp.2": ("ff_context.net.2",),
        "img_mod.lin": ("norm1.linear",),
        "txt_mod.lin": ("norm1_context.linear",),
    },
    "single_blocks": {
        "linear1": (*_QKV, "proj_mlp"),
        "linear2": ("proj_out",),
        "modulation.lin": ("norm.linear",),
    },
    "joint_blocks": {
        "x_block.attn.qkv": _QKV,
        "x_block.attn2.qkv": tuple(name.replace("attn.", "attn2.") for name in _QKV),
        "context_block.attn.qkv": _ADDED,
        "x_block.attn.proj": ("attn.to_out.0",),
        "x_block.attn2.proj": ("attn2.to_out.0",),
        "context_block.attn.proj": ("attn.to_add_out",),
        "x_block.mlp.fc1": ("ff.net.0.proj",),
        "x_block.mlp.fc2": ("ff.net.2",),
        "context_block.mlp.fc1": ("ff_context.net.0.proj",),
        "context_block.mlp.fc2": ("ff_context.net.2",),
    },
}
_BLOCKS = {"double_blocks": "transformer_blocks", "single_blocks": "single_transformer_blocks"} | {
    "joint_blocks": "transformer_blocks"
}
_ORIGINAL_BLOCKS = {"flux": ("double_blocks", "single_blocks"), "sd3": ("joint_blocks",)}
_ORIGINAL = re.compile(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.(?:(\d+)\.)?(.+)")
_DIFFUSERS = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def split_component(layer: str) -> tuple[str, str]:
    """`unet.conv_in` → (`unet`, `conv_in`)."""
    component, _, module = layer.partition(".")
    assert component in COMPONENTS, layer
    return component, module


def is_text_encoder(component: str) -> bool:
    """Whether a component is a CLIP text encoder."""
    return component.startswith("text_encoder")


def add_text_model(component: str, module: str) -> str:
    """Module name with CLIP's level `text_model`, which older transformers and other tools have."""
    return (
        TEXT_MODEL_PREFIX + module if is_text_encoder(component) and module != "text_projection" else module
    )


def flatten_name(module: str) -> str:
    """`down_blocks.0.proj_in` → `down_blocks_0_proj_in`."""
    return module.replace(".", "_")


def unflatten_name(name: str) -> str:
    """The inverse of `flat` for the modules of UNets, CLIP and diffusers' transformers."""
    return ".".join(_PIECES.findall(name))


def from_original(module: str) -> str:
    """diffusers' name of a UNet module from the original code's; diffusers' names are returned unchanged.

    For Stable Diffusion's UNets, which have two layers per block.
    """
    if module in _OUTER:
        return _OUTER[module]
    match = _ORIGINAL.fullmatch(module)
    if match is None:
        return module
    side, number, place, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        kind, index = ("attentions", 0) if number == 1 else ("resnets", number // 2)
        inner = rest if place is None else f"{place}.{rest}"
        return f"mid_block.{kind}.{index}.{_RESNET.get(inner, inner)}"
    # input_blocks.0 is conv_in; then each block counts its layers and one resampling layer.
    per_block = LAYERS_PER_BLOCK + 1
    block, layer = divmod(number - 1, per_block) if side == "input_blocks" else divmod(number, per_block)
    way = "down" if side == "input_blocks" else "up"
    if rest in ("op", "conv"):
        return f"{way}_blocks.{block}.{way}samplers.0.conv"
    kind = "resnets" if place == "0" else "attentions"
    return f"{way}_blocks.{block}.{kind}.{layer}.{_RESNET.get(rest, rest)}"


def to_original(module: str) -> str:
    """The inverse of `from_original` for Stable Diffusion XL, whose upsamplers follow a transformer."""
    outer = {diffusers: original for original, diffusers in _OUTER.items()}
    if module in outer:
        return outer[module]
    resnet = {diffusers: original for original, diffusers in _RESNET.items()}
    if match := _MIDDLE.fullmatch(module):
        number = 1 if match[1] == "attentions" else 2 * int(match[2])
        return f"middle_block.{number}.{resnet.get(match[3], match[3])}"
    match = _DIFFUSERS.fullmatch(module)
    if match is None:
        return module
    way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    per_block = LAYERS_PER_BLOCK + 1
    first = 1 + block * per_block if way == "down" else block * per_block
    if kind == "downsamplers":
        return f"input_blocks.{first + LAYERS_PER_BLOCK}.0.op"
    if kind == "upsamplers":
        return f"output_blocks.{first + LAYERS_PER_BLOCK}.2.conv"
    side = "input_blocks" if way == "down" else "output_blocks"
    place = 0 if kind == "resnets" else 1
    return f"{side}.{first + layer}.{place}.{resnet.get(rest, rest)}"


def find_fused(module: str, base: str) -> tuple[str, int] | None:
    """diffusers' module → (the original code's fused layer, position in it); None where no fused layer holds it.

    `base` is "flux" or "sd3": `transformer_blocks.3.attn.to_k` → (`double_blocks.3.img_attn.qkv`, 1).
    """
    for original in _ORIGINAL_BLOCKS.get(base, ()):
        match = re.fullmatch(rf"{_BLOCKS[original]}\.(\d+)\.(.+)", module)
        if match is None:
            continue
        for fused, parts in _FUSED[original].items():
            if match[2] in parts:
                return f"{original}.{match[1]}.{fused}", parts.index(match[2])
    return None


def split_fused(module: str) -> tuple[str, ...]:
    """diffusers' modules that a fused layer of the original code holds, in order; () for any other name."""
    match = re.fullmatch(r"(double_blocks|single_blocks|joint_blocks)\.(\d+)\.(.+)", module)
    if match is None:
        return ()
    parts = _FUSED[match[1]].get(match[3], ())
    return tuple(f"{_BLOCKS[match[1]]}.{match[2]}.{part}" for part in parts)
