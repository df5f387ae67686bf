"""Layer names: components, kohya's underscores, and the block numbers of Stable Diffusion's original UNet code.

The canonical name is component and diffusers' module name, without CLIP's level `text_model`:
`unet.down_blocks.0.attentions.0.proj_in`, `text_encoder.encoder.layers.3.mlp.fc1`.
"""

from __future__ import annotations

import re

COMPONENTS = ("unet", "text_encoder_2", "text_encoder", "transformer")
TEXT_MODEL_PREFIX = "text_model."
LAYERS_PER_BLOCK = 2  # of every published Stable Diffusion

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
