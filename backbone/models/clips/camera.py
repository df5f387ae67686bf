"""A camera's path as the condition of clips (He et al. 2024, CameraCtrl): an encoder of rays, read over time.

    camera = open_camera(model, "moji-camera.safetensors")       # beside an attached motion adapter
    rays = embed_rays(read_camera("pan-left", 16, (128, 128)), (128, 128))
    controls = (Control.of(camera, rays).as_clip(),)

The encoder makes features of a clip's rays at every level of the UNet, and in each motion module's first attention over
time they are added to what queries, keys and values are made of: h + s·W(h + c), W beginning at zero (section 3.3).
Conditions carry it as any control: rows at scale 0 are the base's, bit for bit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from backbone.conditions.control import Residuals
from backbone.io.console import UserError, notify
from backbone.io.files import PICKLE_SUFFIXES, read_tensors, write_tensors
from backbone.io.records import parse_json, read_as
from backbone.media.control.camera import Reach
from backbone.models.clips.motion import find_motion
from backbone.models.model import Backbone

CAMERA_WEIGHTS = "camera.safetensors"  # in a motion adapter's folder: the camera that goes with it
HEADER = "limner_camera"
RAYS = 6  # numbers of a ray


@dataclass(frozen=True)
class CameraSettings:
    """The settings in a camera file's header.

    widths    channels of the UNet's levels
    layers    the motion modules that read it, and the width of each
    factor    pixels of a latent's side
    blocks    of the encoder at each level
    longest   number of frames that it has positions for
    reach     how far the camera moved in the paths of its training
    base      fingerprint of the model that it was trained on, and its name
    motion    the motion adapter that it was trained with
    """

    widths: tuple[int, ...]
    layers: dict[str, int]
    factor: int = 8
    blocks: int = 1
    longest: int = 32
    reach: Reach | None = None
    base: str = ""
    model: str = ""
    motion: str = ""


# The network -------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Two convolutions beside the identity, as in a T2I-Adapter."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.bring = nn.Conv2d(inside, width, 1) if inside != width else nn.Identity()
        self.first, self.second = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        """[N, inside, h, w] to [N, width, h, w]."""
        x = self.bring(x)
        return cast(Tensor, x + self.second(F.relu(self.first(x))))


class CameraEncoder(nn.Module):
    """Encodes the rays of clips to features at the latents' size and at every halving of it."""

    def __init__(self, settings: CameraSettings) -> None:
        super().__init__()
        widths = settings.widths
        self.factor = settings.factor
        self.bring = nn.Conv2d(RAYS * settings.factor**2, widths[0], 3, padding=1)
        self.space, self.time = nn.ModuleList(), nn.ModuleList()
        for level, width in enumerate(widths):
            previous = widths[max(0, level - 1)]
            input_widths = [previous, *[width] * (settings.blocks - 1)]
            heads = max(1, width // 80)
            self.space.append(nn.ModuleList(Residual(input_width, width) for input_width in input_widths))
            self.time.append(
                nn.ModuleList(
                    BasicTransformerBlock(
                        width,
                        heads,
                        width // heads,
                        positional_embeddings="sinusoidal",
                        num_positional_embeddings=settings.longest,
                    )
                    for _ in input_widths
                )
            )

    def forward(self, rays: Tensor) -> tuple[Tensor, ...]:
        """[B, F, 6, H, W] to one [B, F, C, h, w] a level."""
        frames, features = rays.shape[1], []
        x = self.bring(F.pixel_unshuffle(rays.flatten(0, 1), self.factor))
        for level, (space, time) in enumerate(zip(self.space, self.time, strict=True)):
            if level:
                x = F.avg_pool2d(x, 2, ceil_mode=True)
            for spatial, temporal in zip(cast(nn.ModuleList, space), cast(nn.ModuleList, time), strict=True):
                x = _attend_over_time(temporal, spatial(x), frames)
            features.append(x.unflatten(0, (-1, frames)))
        return tuple(features)


def _attend_over_time(layer: nn.Module, x: Tensor, frames: int) -> Tensor:
    """Apply a layer over the frames at every position: rows [B·F, C, h, w] to the same shape."""
    height, width = x.shape[-2:]
    places = as_places(x.unflatten(0, (-1, frames)))
    output: Tensor = layer(places).unflatten(0, (-1, height, width)).permute(0, 3, 4, 1, 2).flatten(0, 1)
    return output


def as_places(clips: Tensor) -> Tensor:
    """Clips [B, F, C, h, w] as layers over time read them: the frames at every position [B·h·w, F, C]."""
    return clips.permute(0, 3, 4, 1, 2).flatten(0, 2)


class CameraAdapter(nn.Module):
    """The trained and saved part: the encoder, and for each motion module a layer that begins at zero."""

    def __init__(self, settings: CameraSettings) -> None:
        super().__init__()
        self.settings = settings
        self.encoder = CameraEncoder(settings)
        self.merges = nn.ModuleList(nn.Linear(width, width) for width in settings.layers.values())
        for value in self.merges.parameters():
            nn.init.zeros_(value)


class Camera:
    """A camera adapter in a UNet. Implements `ControlNetwork`; its hints are features of a clip's rays."""

    prompted_only = takes_guess = False

    def __init__(self, module: CameraAdapter) -> None:
        self.module: nn.Module = module

    @property
    def settings(self) -> CameraSettings:
        """The settings in its file."""
        return cast(CameraAdapter, self.module).settings

    def for_kind(self, kind: str) -> Camera:
        return self

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        """The rays of a clip [F, 6, H, W] to features, one [F, C, h, w] a level."""
        if len(maps) > self.settings.longest:
            raise UserError(
                f"The camera has positions for {self.settings.longest} frames, and the clip has {len(maps)}. Ask for "
                "fewer --frames."
            )
        return tuple(value[0] for value in self.encode(maps[None]))

    def encode(self, rays: Tensor) -> tuple[Tensor, ...]:
        """The rays of clips [B, F, 6, H, W] to features, one [B, F, C, h, w] a level. Differentiable."""
        module = cast(CameraAdapter, self.module)
        weight = module.encoder.bring.weight
        return cast("tuple[Tensor, ...]", module.encoder(rays.to(weight.device, weight.dtype)))

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        """No arguments for the denoiser: hooks in the motion modules add the camera."""
        return {}


# In the UNet -------------------------------------------------------------------------------------------------


def find_motion_layers(denoiser: nn.Module) -> dict[str, tuple[int, int]]:
    """The first attention over time of every motion module: its width and its level, by its name.

    Raises `UserError` where there is no motion adapter.
    """
    if find_motion(denoiser) is None:
        raise UserError("A camera's path is followed by a motion adapter. Name one with --motion.")
    network, layers = cast(Any, denoiser), {}
    last = len(network.down_blocks) - 1
    blocks = [(f"down_blocks.{i}", block, i) for i, block in enumerate(network.down_blocks)]
    blocks += [("mid_block", network.mid_block, last)]
    blocks += [(f"up_blocks.{i}", block, last - i) for i, block in enumerate(network.up_blocks)]
    for name, block, level in blocks:
        for number, module in enumerate(getattr(block, "motion_modules", ())):
            layer = module.transformer_blocks[0].attn1
            layers[f"{name}.motion_modules.{number}"] = (layer.to_q.in_features, level)
    return layers


def make_camera(model: Backbone, *, blocks: int = 1, seed: int = 0) -> Camera:
    """A camera adapter to train for a model with a motion adapter, fp32; it changes nothing yet."""
    layers, motion = find_motion_layers(model.denoiser), find_motion(model.denoiser)
    assert motion is not None
    settings = CameraSettings(
        widths=tuple(cast(Any, model.denoiser).config.block_out_channels),
        layers={name: width for name, (width, _) in layers.items()},
        factor=model.factor,
        blocks=blocks,
        longest=motion.longest,
        base=model.fingerprint,
        model=model.location.name,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = CameraAdapter(settings)
    return attach_camera(model, module.to(model.device), "the camera")


def attach_camera(model: Backbone, module: CameraAdapter, name: str) -> Camera:
    """Condition a model's motion modules on a camera; removing the motion adapter removes it too.

    Raises `UserError`, with the numbers, for a camera of another model, and where there is no motion adapter.
    """
    layers, settings = find_motion_layers(model.denoiser), module.settings
    for fact, actual, expected in (
        ("levels of the widths", settings.widths, tuple(cast(Any, model.denoiser).config.block_out_channels)),
        ("motion modules", (len(settings.layers),), (len(layers),)),
        ("pixels to a latent's side", (settings.factor,), (model.factor,)),
    ):
        if actual != expected:
            raise UserError(
                f"{name} has {fact} {', '.join(map(str, actual))}, and {model.location.name} with its motion adapter "
                f"has {', '.join(map(str, expected))}: it was made for another model."
            )
    if {key: width for key, (width, _) in layers.items()} != settings.layers:
        raise UserError(
            f"{name} belongs to other motion modules than the model's. Name its own with --motion."
        )
    camera, motion = Camera(module), find_motion(model.denoiser)
    assert motion is not None
    for merge, (key, (_, level)) in zip(module.merges, layers.items(), strict=True):
        layer = model.denoiser.get_submodule(f"{key}.transformer_blocks.0.attn1")
        hook = partial(_add_camera, camera, model, merge, level)
        motion.hooks.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
    return camera


def _add_camera(
    camera: Camera, model: Backbone, merge: nn.Module, level: int, layer: nn.Module, args: Any, kwargs: Any
) -> Any:
    """A hook before attention over time: h + s·W(h + c), in the rows of this camera's controls."""
    motion = find_motion(model.denoiser)
    if motion is None:
        return None
    (hidden, *others) = args
    for control in motion.controls:
        if control.network is camera:
            feature = as_places(control.hints[level])
            scale = control.scale.to(hidden.device, hidden.dtype).repeat_interleave(
                len(hidden) // len(control)
            )
            hidden = hidden + scale[:, None, None] * merge(hidden + feature.to(hidden.dtype))
    return (hidden, *others), kwargs


# Files -------------------------------------------------------------------------------------------------------


def save_camera(path: Path, module: CameraAdapter, settings: CameraSettings, dtype: torch.dtype) -> None:
    """Write a camera adapter: one .safetensors, whose header has the settings."""
    tensors = {
        name: value.detach().to("cpu", dtype).contiguous() for name, value in module.state_dict().items()
    }
    write_tensors(path, tensors, {HEADER: json.dumps(asdict(settings))})


def open_camera(model: Backbone, path: Path) -> Camera:
    """Open a camera adapter's file for a model with a motion adapter, in the model's precision, frozen.

    Raises `UserError` for another kind of file, a damaged one, and one that was made for another model.
    """
    module = read_camera_adapter(path)
    settings, dtype = module.settings, next(model.denoiser.parameters()).dtype
    camera = attach_camera(model, module, str(path))
    module.to(model.device, dtype).eval().requires_grad_(False)
    if settings.base and not model.has_fingerprint(settings.base):
        notify(
            f"{path} was trained on {settings.model or 'another model'} with other weights than {model.location.name} "
            "has: clips may follow it less closely."
        )
    return camera


def read_camera_adapter(path: Path) -> CameraAdapter:
    """Read a camera adapter from its file, in fp32; `UserError` for another kind of file, and for a damaged one."""
    if not path.is_file() and path.suffix.lower() not in PICKLE_SUFFIXES:
        raise UserError(f"There is no camera adapter {path}. Name the .safetensors that was trained.")
    tensors, header = read_tensors(path)
    if HEADER not in header:
        raise UserError(
            f"{path} is no camera adapter: its header does not say so. Name one with --camera-adapter."
        )
    source = f"{path}'s header"
    settings = read_as(CameraSettings, parse_json(header[HEADER], source), source)
    sides = (settings.factor, settings.blocks, settings.longest, *settings.widths, *settings.layers.values())
    if not settings.widths or not settings.layers or min(sides) < 1 or max(sides) > 16_384:
        raise UserError(f"{path} is damaged: its header describes no network. Download it again.")
    with torch.device("meta"):  # the header may ask for any size
        expected = {name: tuple(value.shape) for name, value in CameraAdapter(settings).state_dict().items()}
    if {name: tuple(value.shape) for name, value in tensors.items()} != expected:
        wrong = sorted(set(expected) ^ set(tensors)) or sorted(
            n for n in expected if tuple(tensors[n].shape) != expected[n]
        )
        raise UserError(
            f"{path} is damaged: {wrong[0]} is missing, foreign, or of another shape. Download it again."
        )
    broken = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise UserError(
            f"{path} is damaged: {broken[0]} holds values that are no numbers. Download it again."
        )
    module = CameraAdapter(settings)
    module.load_state_dict(tensors)
    return module
