"""Layer names of a UNet, and of its control networks, in the original code of Stable Diffusion.

`input_blocks`, `middle_block` and `output_blocks` there count what diffusers sorts into blocks: each block has its
layers and then one resampling layer. A name may be a layer's or a tensor's; what follows the layer is kept.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

LAYERS_PER_BLOCK = 2  # of every published Stable Diffusion
RESNET = {  # inside a residual block: original layer → diffusers'
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
OUTER = {  # outside the blocks
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
CONTROL = {  # a ControlNet's own
    "middle_block_out.0": "controlnet_mid_block",
    "input_hint_block.0": "controlnet_cond_embedding.conv_in",
    "input_hint_block.14": "controlnet_cond_embedding.conv_out",
    **{f"input_hint_block.{2 * n + 2}": f"controlnet_cond_embedding.blocks.{n}" for n in range(6)},
}
ORIGINAL_RESNET = {diffusers: original for original, diffusers in RESNET.items()}
_FIXED = OUTER | CONTROL
_ORIGINAL_FIXED = {diffusers: original for original, diffusers in _FIXED.items()}
_ORIGINAL = re.compile(r"(input_blocks|output_blocks|middle_block)\.(\d+)\.(?:(\d+)\.)?(.+)")
_DIFFUSERS = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_MIDDLE = re.compile(r"mid_block\.(resnets|attentions)\.(\d+)\.(.+)")


def from_original(name: str, layers: int = LAYERS_PER_BLOCK) -> str:
    """diffusers' name from the original code's, for `layers` per block; diffusers' names are returned unchanged."""
    if (fixed := rename_prefix(name, _FIXED)) != name:
        return fixed
    if zero := re.match(r"zero_convs\.(\d+)\.0\b", name):
        return f"controlnet_down_blocks.{zero[1]}{name[zero.end() :]}"
    match = _ORIGINAL.fullmatch(name)
    if match is None:
        return name
    side, number, index, rest = match[1], int(match[2]), match[3], match[4]
    if side == "middle_block":
        inner = rest if index is None else f"{index}.{rest}"
        if number == 1:
            return f"mid_block.attentions.0.{inner}"
        return f"mid_block.resnets.{number // 2}.{rename_prefix(inner, RESNET)}"
    # input_blocks.0 is conv_in; then each block counts its layers and one resampling layer.
    block, layer = divmod(number - 1 if side == "input_blocks" else number, layers + 1)
    way = "down" if side == "input_blocks" else "up"
    if rest.split(".")[0] in ("op", "conv"):
        return f"{way}_blocks.{block}.{way}samplers.0.{rename_prefix(rest, {'op': 'conv'})}"
    if index == "0":
        return f"{way}_blocks.{block}.resnets.{layer}.{rename_prefix(rest, RESNET)}"
    return f"{way}_blocks.{block}.attentions.{layer}.{rest}"


def to_original(name: str, layers: int = LAYERS_PER_BLOCK, plain: Collection[int] = ()) -> str:
    """The inverse of `from_original`; `plain` are the up blocks without attention.

    By default every upsampler follows a transformer, as in Stable Diffusion XL.
    """
    if (fixed := rename_prefix(name, _ORIGINAL_FIXED)) != name:
        return fixed
    if zero := re.match(r"controlnet_down_blocks\.(\d+)\b", name):
        return f"zero_convs.{zero[1]}.0{name[zero.end() :]}"
    if match := _MIDDLE.fullmatch(name):
        if match[1] == "attentions":
            return f"middle_block.1.{match[3]}"
        return f"middle_block.{2 * int(match[2])}.{rename_prefix(match[3], ORIGINAL_RESNET)}"

    # Each level has `layers` blocks and a resampler, numbered through; on the way down conv_in is 0
    match = _DIFFUSERS.fullmatch(name)
    if match is None:
        return name
    way, block, kind, layer, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    first = block * (layers + 1) + (way == "down")
    if kind == "downsamplers":
        return f"input_blocks.{first + layers}.0.{rename_prefix(rest, {'conv': 'op'})}"
    if kind == "upsamplers":
        return f"output_blocks.{first + layers}.{1 if block in plain else 2}.{rest}"
    side = "input_blocks" if way == "down" else "output_blocks"
    if kind == "attentions":
        return f"{side}.{first + layer}.1.{rest}"
    return f"{side}.{first + layer}.0.{rename_prefix(rest, ORIGINAL_RESNET)}"


def rename_prefix(name: str, table: Mapping[str, str]) -> str:
    """Replace the first parts of a name that are in the table; another name is returned unchanged."""
    parts = name.split(".")
    for count in range(1, min(len(parts), 3) + 1):
        if (new := table.get(".".join(parts[:count]))) is not None:
            return ".".join([new, *parts[count:]])
    return name
