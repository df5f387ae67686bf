"""Motion adapters: a model of pictures that draws clips, without another network and without another loop.

A clip is one sample [C, F, H, W] of a batch. A network of pictures sees its frames as rows, and a motion adapter (Guo
et al. 2023, AnimateDiff, section 4.2) adds a layer after each of its blocks' layers, in which every position attends
over the frames. Here those layers are inserted into the existing UNet, under the names of diffusers' `UNetMotionModel`
(`down_blocks.0.motion_modules.1…`): its weights, its adapters and what controls its attention do not change, and
pictures skip these layers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import MotionAdapter
from torch import Tensor, nn

from backbone.conditions.control import Control
from backbone.families.components import loading
from backbone.families.location import Config, hub_file
from backbone.io.console import UserError
from backbone.io.files import PICKLE_SUFFIXES, read_json, read_tensors, write_json, write_tensors
from backbone.io.weights import (
    check_weights,
    find_variant,
    load_whole,
    read_weights_header,
)
from backbone.io.written import written_path

ORIGINAL = re.compile(r"(?:module\.|motion_modules\.)?(?=(?:down_blocks|mid_block|up_blocks)\.)")
RENAMED = {  # of an original AnimateDiff file
    ".temporal_transformer": "",
    ".norms.0": ".norm1",
    ".norms.1": ".norm2",
    ".ff_norm": ".norm3",
    ".attention_blocks.0": ".attn1",
    ".attention_blocks.1": ".attn2",
}
POSITIONS = "pos_encoder.pe"  # of an original file: sines, which the layers compute themselves


class Motion:
    """The layers of a motion adapter in a UNet, and the number of frames a clip has in the current call.

    adapter   the attached adapter, with its settings
    frames    0 for pictures, which skip the layers
    controls  those of the call, for hooks in the layers that read them (a camera's path)
    """

    def __init__(self, adapter: MotionAdapter) -> None:
        self.adapter = adapter
        self.frames = 0
        self.controls: tuple[Control, ...] = ()
        self.hooks: list[Any] = []

    @property
    def longest(self) -> int:
        """The number of frames for which its layers have positions."""
        return int(cast(Any, self.adapter).config.motion_max_seq_length)

    def insert_after(self, layer: nn.Module, over_time: nn.Module) -> None:
        """Pass the output of `layer`, [B·F, C, h, w], through `over_time`, which keeps its shape."""

        def move(module: nn.Module, inputs: Any, returned: Any) -> Any:
            if not self.frames:
                return None
            hidden = returned[0] if isinstance(returned, tuple) else getattr(returned, "sample", returned)
            entering = hidden
            if torch.is_grad_enabled() and hidden.device.type == "cpu":
                # After channels-last convolutions torch's group norm over a clip crashes there in the backward pass
                entering = hidden.contiguous()
            output = over_time(entering, num_frames=self.frames)
            if isinstance(returned, tuple):
                return (output, *returned[1:])
            return output if hidden is returned else type(returned)(sample=output)

        self.hooks.append(layer.register_forward_hook(move))


# Reading an adapter ------------------------------------------------------------------------------------------


def read_motion_adapter(source: str) -> MotionAdapter:
    """Read a motion adapter: a diffusers folder, a hub id, or an original AnimateDiff file (.safetensors).

    Raises `UserError` for anything else, for a damaged adapter, and for one that also reads a picture (PIA).
    """
    path = written_path(source)
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UserError(
            f"{path} is a pickle, which is never read. Take the motion adapter's .safetensors version."
        )
    if path.is_file() and (path.name != loading.WEIGHTS or not (path.parent / "config.json").is_file()):
        return _read_original(path)
    if path.is_file():  # the weights file in a folder that `save_pretrained` wrote
        path = path.parent
    if path.suffix.lower() == ".safetensors":
        raise UserError(f"There is no file {path}. Check the spelling, and the folder that it is named from.")
    if not path.is_dir() and (source.count("/") != 1 or path.parent.exists()):
        raise UserError(
            f"There is no motion adapter {source}. Name a folder that diffusers wrote, an original .safetensors file, "
            "or a hub id."
        )
    if not path.is_dir():
        path = _fetch(source)

    # Its config, then all of its weights
    config = Config(read_json(path / "config.json")) if (path / "config.json").is_file() else None
    if config is None or config.get("_class_name") != "MotionAdapter":
        description = f"a {config.get('_class_name')}" if config else "a folder without config.json"
        raise UserError(f"{source} is {description}, and a MotionAdapter is needed. Name a motion adapter.")
    config.path = path / "config.json"
    config.refuse_other_kinds(MotionAdapter)
    check_weights(path)
    adapter = load_whole(partial(_load_folder, path, config), source, "motion adapter")
    return _require_usable(adapter, source)


def _load_folder(folder: Path, config: Config) -> tuple[MotionAdapter, dict[str, Any]]:
    """The adapter of a folder that diffusers wrote, and the loading info, as `from_pretrained` returns them."""
    kind: Any = MotionAdapter
    if not (folder / loading.WEIGHTS).is_file():  # the weights are in shards, or in a variant
        loaded: tuple[MotionAdapter, dict[str, Any]] = kind.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
            variant=find_variant(folder),
        )
        return loaded
    # Read here, since torch.compile may have put a prefix in the names
    adapter = kind.from_config(config)
    tensors, expected = read_tensors(folder / loading.WEIGHTS)[0], adapter.state_dict()
    fitting = {
        name: value
        for name, value in tensors.items()
        if name in expected and value.shape == expected[name].shape
    }
    adapter.load_state_dict(fitting, strict=False)
    return adapter, {
        "missing_keys": expected.keys() - fitting.keys(),
        "unexpected_keys": tensors.keys() - expected.keys(),
    }


def _fetch(repository: str) -> Path:
    """The cached folder of a motion adapter on the hub."""
    config = hub_file(repository, "config.json")
    hub_file(repository, loading.WEIGHTS, config.parent.name)
    return config.parent


def _read_original(path: Path) -> MotionAdapter:
    """Read an original file, whose settings follow from its shapes."""
    header = read_weights_header(path)
    names = {name: rename_original(name) for name in header.shapes}
    factor = next((name for name in names if "lora" in name), None)
    if factor is not None:
        moves = any("motion_modules" in name for name in names.values())
        remedy = "Give it with --lora." if moves else "Make a run of it with customize import, for --concept."
        raise UserError(
            f"{path} is a LoRA{'' if moves else ' of pictures'} ({factor} …), not a motion adapter. {remedy}"
        )
    # It must have motion modules and nothing else
    layers = {new: header.shapes[old] for old, new in names.items() if ".motion_modules." in new}
    if not layers or len(layers) != len(names):
        foreign = next((old for old, new in names.items() if new not in layers), "nothing")
        raise UserError(
            f"{path} is no motion adapter: it holds {foreign}. Name AnimateDiff's file, or a folder."
        )
    # The widths and depths of the UNet's blocks, from the shapes
    widths = [
        shape[0]
        for block in range(len({name.split(".")[1] for name in layers if name.startswith("down_blocks.")}))
        if (shape := layers.get(f"down_blocks.{block}.motion_modules.0.proj_in.weight"))
    ]
    depths = [
        len({name.split(".")[3] for name in layers if name.startswith(f"down_blocks.{block}.")})
        for block in range(len(widths))
    ]
    positions = [shape[1] for name, shape in header.shapes.items() if name.endswith(POSITIONS)]
    if not widths or 0 in depths:
        raise UserError(f"{path} is damaged: it lacks whole motion modules. Download it again.")
    adapter = MotionAdapter(
        block_out_channels=tuple(widths),
        motion_layers_per_block=tuple(depths),
        motion_transformer_layers_per_block=_count_inner(layers),
        motion_max_seq_length=min(positions, default=32),
        use_motion_mid_block=any(name.startswith("mid_block.") for name in layers),
        motion_norm_num_groups=_choose_groups(widths),
    )
    # Without the positions: sines, which the layers compute themselves
    tensors, _ = read_tensors(path)
    state = {new: tensors[old] for old, new in names.items() if not old.endswith(POSITIONS)}
    expected = {name: tuple(value.shape) for name, value in adapter.state_dict().items()}
    if {name: tuple(value.shape) for name, value in state.items()} != expected:
        wrong = sorted(set(expected) ^ set(state)) or sorted(
            n for n in expected if tuple(state[n].shape) != expected[n]
        )
        raise UserError(
            f"{path} is no motion adapter that is known: {wrong[0]} is missing, or of another shape. Name the folder "
            "that diffusers wrote, or AnimateDiff's own file."
        )
    adapter.load_state_dict(state)
    return _require_usable(adapter, str(path))


def make_motion_adapter(unet: Mapping[str, Any], *, seed: int = 0, frames: int = 32) -> MotionAdapter:
    """A new adapter for a UNet with these settings and with positions for this many frames; it changes nothing yet.

    8.75 M parameters at moji's widths. The last matrices of its layers are zero, so that training begins at pictures.
    """
    widths = tuple(unet["block_out_channels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapter = MotionAdapter(
            block_out_channels=widths,
            motion_layers_per_block=unet["layers_per_block"],
            motion_num_attention_heads=tuple(max(1, width // 80) for width in widths),
            motion_norm_num_groups=unet["norm_num_groups"],
            motion_max_seq_length=frames,
            use_motion_mid_block=False,
        )
    for key, value in cast(nn.Module, adapter).named_parameters():
        if ".proj_out." in key:
            nn.init.zeros_(value)
    return adapter


def save_motion_adapter(folder: Path, adapter: MotionAdapter) -> None:
    """Write an adapter as `MotionAdapter.from_pretrained` reads it, its config last; without LoRAs in its layers."""
    module = cast(Any, adapter)
    state = {name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()}
    write_tensors(folder / loading.WEIGHTS, state, {"format": "pt"})
    write_json(folder / "config.json", json.loads(module.to_json_string()))


def rename_original(name: str) -> str:
    """The name of a tensor of an original AnimateDiff file in diffusers' layout."""
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return ORIGINAL.sub("", name, count=1)


def name_original(name: str) -> str:
    """The reverse of `rename_original`: the original AnimateDiff name of a tensor or layer of diffusers."""
    name = re.sub(r"(\.motion_modules\.\d+)\.", r"\1.temporal_transformer.", name, count=1)
    for theirs, ours in RENAMED.items():
        name = name.replace(ours, theirs) if ours else name
    return name


def _count_inner(layers: Mapping[str, Any]) -> int:
    """The number of transformer blocks in a motion module."""
    numbers = {
        match[1]
        for name in layers
        if (match := re.match(r"down_blocks\.0\.motion_modules\.0\.transformer_blocks\.(\d+)\.", name))
    }
    return max(1, len(numbers))


def _choose_groups(widths: list[int]) -> int:
    """32 groups, as is usual, or a smaller number that divides the widths."""
    return next(groups for groups in (32, 16, 8, 4, 2, 1) if all(width % groups == 0 for width in widths))


def _require_usable(adapter: Any, name: str) -> MotionAdapter:
    if adapter.config.conv_in_channels:
        raise UserError(
            f"{name} also reads a picture (PIA), which no command gives it. Name a plain motion adapter."
        )
    for key, value in adapter.named_parameters():
        if not bool(torch.isfinite(value).all()):
            raise UserError(f"{name} is damaged: {key} holds values that are no numbers. Download it again.")
    return cast(MotionAdapter, adapter.eval().requires_grad_(False))


# In the UNet -------------------------------------------------------------------------------------------------


def find_motion(denoiser: nn.Module) -> Motion | None:
    """The motion that is attached to a network, or None."""
    return cast("Motion | None", denoiser.__dict__.get("motion"))


def attach_motion(denoiser: nn.Module, adapter: MotionAdapter, name: str = "the motion adapter") -> Motion:
    """Insert a motion adapter's layers after those of a UNet; they act in calls within `rows_as_clips`.

    Raises `UserError`, with both numbers, where it was made for blocks of other widths or another number of layers, and
    for a network that is no UNet.
    """
    assert find_motion(denoiser) is None, "another adapter is attached"
    network, settings = cast(Any, denoiser), cast(Any, adapter).config
    if not hasattr(network, "down_blocks"):
        raise UserError(
            f"{name} belongs in a UNet, and this model is a transformer. Give a --model that has a UNet."
        )
    check_fit(network.config, settings, name)
    first = next(iter(denoiser.parameters()))
    nn.Module.to(adapter, first.device, first.dtype if first.dtype.is_floating_point else torch.float32)
    motion = Motion(adapter)
    pairs = [*zip(network.down_blocks, adapter.down_blocks, strict=True)]
    pairs += [*zip(network.up_blocks, adapter.up_blocks, strict=True)]
    if cast(Any, adapter).mid_block is not None:
        pairs.append((network.mid_block, cast(Any, adapter).mid_block))

    # A layer over time after each attention, or after each ResNet where a block has no attention
    for block, modules in pairs:
        block.motion_modules = modules.motion_modules
        layers = block.attentions if getattr(block, "has_cross_attention", False) else block.resnets
        for layer, over_time in zip(layers, modules.motion_modules, strict=True):
            motion.insert_after(layer, over_time)
    network.__dict__["motion"] = motion
    return motion


def check_fit(unet: Mapping[str, Any], adapter: Mapping[str, Any], name: str) -> None:
    """`UserError`, with both numbers, where an adapter's settings are not those of a UNet."""
    blocks = len(unet["block_out_channels"])
    facts = {
        "blocks of the widths": (list(adapter["block_out_channels"]), list(unet["block_out_channels"])),
        "layers a block": (
            _repeat_for_blocks(adapter["motion_layers_per_block"], len(adapter["block_out_channels"])),
            _repeat_for_blocks(unet["layers_per_block"], blocks),
        ),
    }
    for fact, (actual, expected) in facts.items():
        if actual != expected:
            raise UserError(
                f"{name} has {fact} {', '.join(map(str, actual))}, and the model's are "
                f"{', '.join(map(str, expected))}: it was made for another model. Give that one with --model, or "
                "another adapter."
            )


def _repeat_for_blocks(value: Any, blocks: int) -> list[int]:
    return [int(value)] * blocks if isinstance(value, int) else [int(number) for number in value]


def hash_motion(denoiser: nn.Module) -> str:
    """The hash of the attached motion adapter's weights, without those of LoRAs on it."""
    motion = find_motion(denoiser)
    assert motion is not None
    digest = hashlib.sha256()
    for name, value in sorted(cast(nn.Module, motion.adapter).named_parameters()):
        if "lora_" not in name:
            digest.update(f"{name.replace('.base_layer', '')} {tuple(value.shape)}".encode())
            digest.update(value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()


def detach_motion(denoiser: nn.Module) -> None:
    """Remove a motion adapter, which restores the network."""
    motion = find_motion(denoiser)
    assert motion is not None, "no adapter is attached"
    network = cast(Any, denoiser)
    for hook in motion.hooks:
        hook.remove()
    for block in (*network.down_blocks, network.mid_block, *network.up_blocks):
        if hasattr(block, "motion_modules"):
            del block.motion_modules
    del network.__dict__["motion"]


@contextmanager
def rows_as_clips(denoiser: nn.Module, frames: int, controls: tuple[Control, ...] = ()) -> Iterator[None]:
    """Inside the `with`, rows are clips of this many frames under these controls; 0: pictures."""
    motion = find_motion(denoiser)
    if motion is None:
        yield
        return
    saved = motion.frames, motion.controls
    motion.frames, motion.controls = frames, controls
    try:
        yield
    finally:
        motion.frames, motion.controls = saved


# Frames and rows ---------------------------------------------------------------------------------------------


def frames_as_rows(clips: Tensor) -> Tensor:
    """Clips [B, C, F, H, W] as rows [B·F, C, H, W], the frames of a clip one after another."""
    return clips.transpose(1, 2).flatten(0, 1)


def rows_as_frames(rows: Tensor, frames: int) -> Tensor:
    """Rows [B·F, C, H, W] as clips [B, C, F, H, W]."""
    clips: Tensor = rows.unflatten(0, (-1, frames)).transpose(1, 2)
    return clips
