"""SparseCtrl: a network that makes a clip follow pictures given for some of its frames (Guo et al. 2023).

    network = open_sparsectrl(model, "guoyww/animatediff-sparsectrl-rgb")
    control = network.of(pictures, places=[0, 15])        # [K, 3, H, W] in 0…1
    latents = sample_latents(model, requests, frames=Frames(16), controls=(control,), …)

It is a copy of the UNet's encoder with layers over time, which carry the picture of one frame to the others; its
output is added as a ControlNet's is. It reads the pictures as latents (its `rgb` variant, "simplified condition
embedding") or as pixels (`scribble`), and a mask of the given frames. It does not see the noisy latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import SparseControlNetModel
from torch import Tensor, nn

from backbone.conditions.control import Control, Residuals
from backbone.diffusion.transfer import send
from backbone.families.components.loading import WEIGHTS, load_network
from backbone.families.control import made_for_another_model
from backbone.families.location import Location, find_hub_file
from backbone.families.unet.control import EMBEDDING, MIDDLE, MUST_AGREE, SKIPS, cast_inputs
from backbone.io.console import UserError
from backbone.io.files import PICKLE_SUFFIXES, read_tensors
from backbone.io.progress import progress
from backbone.io.weights import read_weights_header
from backbone.io.written import written_path
from backbone.models.clips.motion import POSITIONS, find_motion, rename_original, rows_as_frames
from backbone.models.model import Backbone

COPIED = (  # settings that a SparseCtrl shares with its UNet
    *("in_channels", "flip_sin_to_cos", "freq_shift", "only_cross_attention", "block_out_channels"),
    *(
        "layers_per_block",
        "downsample_padding",
        "mid_block_scale_factor",
        "act_fn",
        "norm_num_groups",
        "norm_eps",
    ),
    *("cross_attention_dim", "transformer_layers_per_block", "attention_head_dim", "num_attention_heads"),
    *("use_linear_projection", "upcast_attention", "resnet_time_scale_shift"),
)
NO_FRAME = -1  # in place of a frame's number: no picture


class SparseControl:
    """A SparseCtrl in a UNet that has a motion adapter. Implements `ControlNetwork`.

    Its hints are the encoded pictures [B, K, c, h, w] and the numbers of their frames [B, K].
    """

    prompted_only = takes_guess = False

    def __init__(self, module: nn.Module, model: Backbone) -> None:
        self.module, self.model = module, model

    @property
    def reads_latents(self) -> bool:
        """Whether it reads pictures as latents; else as pixels."""
        return bool(cast(Any, self.module).config.use_simplified_condition_embedding)

    @property
    def longest(self) -> int:
        """The number of frames for which its layers have positions."""
        return int(cast(Any, self.module).config.motion_max_seq_length)

    def of(self, pictures: Tensor, places: Sequence[int], *, scale: float = 1.0) -> Control:
        """A control of one row by pictures [K, 3, H, W] in 0…1 at these frames."""
        (read,) = self.read(pictures)
        frames = torch.tensor([list(places)])
        return Control(self, (read[None], send(frames, read.device)), torch.tensor([scale]))

    def for_kind(self, kind: str) -> SparseControl:
        return self

    def read(self, maps: Tensor) -> tuple[Tensor, ...]:
        if self.reads_latents:
            return (self.model.encode(2 * maps - 1).mean,)
        return (send(maps, self.model.device),)

    def residuals(self, hints: Sequence[Tensor], inputs: Mapping[str, Any], *, guess: bool) -> Residuals:
        motion = find_motion(self.model.denoiser)
        assert motion is not None and motion.frames, "SparseCtrl is asked for clips alone"
        network, frames = cast(Any, self.module), motion.frames
        arguments = cast_inputs(inputs, network.dtype)
        time = arguments["timestep"]
        pictures, places = hints
        # All rows of a clip have the same hints
        clips, mask = scatter_frames(pictures[::frames], places[::frames], frames)
        skips, middle = network(
            sample=rows_as_frames(arguments["sample"][:, : network.config.in_channels], frames),
            timestep=time[::frames] if time.ndim else time,
            encoder_hidden_states=arguments["encoder_hidden_states"],
            controlnet_cond=clips.to(network.dtype),
            conditioning_mask=mask.to(network.dtype),
            return_dict=False,
        )
        return {SKIPS: list(skips), MIDDLE: [middle]}


def scatter_frames(pictures: Tensor, places: Tensor, frames: int) -> tuple[Tensor, Tensor]:
    """Pictures [B, K, c, h, w] at the frames `places` [B, K] of clips [B, c, F, h, w], zero elsewhere; and their mask.

    The mask [B, 1, F, h, w] is 1 where a frame is given. A place of −1 is skipped.
    """
    clips, count, *shape = pictures.shape
    scattered = pictures.new_zeros(clips, shape[0], frames, *shape[1:])
    mask = pictures.new_zeros(clips, 1, frames, *shape[1:])
    for k in range(count):
        rows = (places[:, k] != NO_FRAME).nonzero().flatten()
        scattered[rows, :, places[rows, k]] = pictures[rows, k]
        mask[rows, :, places[rows, k]] = 1
    return scattered, mask


# Opening -----------------------------------------------------------------------------------------------------


def open_sparsectrl(model: Backbone, name: str) -> SparseControl:
    """Open a SparseCtrl by its folder, hub id or original file (.safetensors), in the model's precision, frozen.

    Raises `UserError` for a network of another model, a pickle, and anything that is no SparseCtrl.
    """
    with progress(None, f"loading {name}", brief=True):
        module = _load(model, name)
    try:
        check_fit(module, model)
    except UserError as error:
        if not str(error).startswith("was "):
            raise
        raise UserError(f"{name} {error}. Name one that was made for {model.location.name}.") from error
    return SparseControl(module.eval().requires_grad_(False).to(model.device), model)


def _load(model: Backbone, name: str) -> nn.Module:
    path = written_path(name)
    if path.is_file() or path.suffix.lower() in (*PICKLE_SUFFIXES, ".safetensors"):
        return _read_original(model, path)  # it explains why pickles are refused
    if not path.is_dir() and (name.count("/") != 1 or path.parent.exists()):
        raise UserError(
            f"There is no SparseCtrl {name}. Name a folder that diffusers wrote, a .safetensors file, or a hub id."
        )
    if not path.is_dir():
        config = find_hub_file(name, "config.json")
        if config is None or find_hub_file(name, WEIGHTS, config.parent.name) is None:
            raise UserError(f"{name} has no config.json and {WEIGHTS} on the hub. Name another SparseCtrl.")
        path = config.parent
    location = Location(name, str(path.parent), {})
    class_name = location.config(path.name).get("_class_name", "")
    if class_name != SparseControlNetModel.__name__:
        raise UserError(
            f"{name} is a {class_name or 'network of unknown kind'}, and a SparseCtrl is needed. Name one with "
            "--sparsectrl."
        )
    return load_network(SparseControlNetModel, location, path.name, model.dtype)


def _read_original(model: Backbone, path: Path) -> nn.Module:
    """An original file (`v3_sd15_sparsectrl_rgb`, `…_scribble`): the encoder's settings are the UNet's."""
    header = read_weights_header(path)
    names = {name: _rename(name) for name in header.shapes}
    shapes = {names[name]: shape for name, shape in header.shapes.items()}
    simple_embedding = shapes.get(f"{EMBEDDING}.weight")
    first = simple_embedding or shapes.get(f"{EMBEDDING}.conv_in.weight")
    if first is None or not any(".motion_modules." in name for name in shapes):
        raise UserError(
            f"{path} is no SparseCtrl: it holds {', '.join(sorted(header.shapes)[:3])} … Name one."
        )

    # The shapes give the widths of the condition's embedding and the longest clip
    widths = [
        shapes[key][0]
        for layer in ("conv_in", *(f"blocks.{number}" for number in range(1, 20, 2)))
        if (key := f"{EMBEDDING}.{layer}.weight") in shapes
    ]
    positions = [shape[1] for name, shape in header.shapes.items() if name.endswith(POSITIONS)]
    module = build_sparsectrl(
        model.denoiser,
        conditioning_channels=first[1] - 1,
        use_simplified_condition_embedding=simple_embedding is not None,
        conditioning_embedding_out_channels=tuple(widths) or (16, 32, 96, 256),
        motion_max_seq_length=min(positions, default=32),
    )

    # Positions are built, not loaded; all other tensors must be present with the same shapes
    expected = {
        name: tuple(value.shape) for name, value in module.state_dict().items() if not name.endswith(".pe")
    }
    tensors, _ = read_tensors(path)
    state = {new: tensors[old] for old, new in names.items() if not old.endswith(POSITIONS)}
    wrong = next(
        (name for name in expected if name not in state or tuple(state[name].shape) != expected[name]), None
    )
    if wrong is not None:
        difference = (
            f"is {tuple(state[wrong].shape)} and not {expected[wrong]}" if wrong in state else "is missing"
        )
        raise UserError(
            f"{path} was made for another model: its {wrong} {difference}. Name one that was made for "
            f"{model.location.name}."
        )
    if foreign := set(state) - set(expected):
        raise UserError(f"{path} is no SparseCtrl of a known kind: it holds {min(foreign)}. Name another.")
    module.load_state_dict(state, strict=False)
    return nn.Module.to(module, model.dtype)


def _rename(name: str) -> str:
    """Diffusers' name of an original tensor."""
    name = name.removeprefix("controlnet.").removeprefix("module.")
    return rename_original(name) if ".motion_modules." in name else name


def build_sparsectrl(unet: nn.Module, **settings: Any) -> nn.Module:
    """A new network with a UNet's settings, random with zero output layers: it changes nothing yet.

    `settings` are further settings of diffusers' `SparseControlNetModel`.
    """
    config = cast(Any, unet).config
    if not hasattr(unet, "down_blocks"):
        raise UserError(
            "SparseCtrl belongs in a UNet, and this model is a transformer. Give a --model that has a UNet."
        )
    kinds = tuple(
        "CrossAttnDownBlockMotion" if "CrossAttn" in kind else "DownBlockMotion"
        for kind in config.down_block_types
    )
    copied = {name: config[name] for name in COPIED if config.get(name) is not None}
    copied["in_channels"] = config.out_channels  # the UNet's own input may also hold an image
    defaults: dict[str, Any] = {"down_block_types": kinds, "conditioning_channels": config.out_channels}
    return cast(nn.Module, SparseControlNetModel(**defaults | copied | settings))


def check_fit(module: nn.Module, model: Backbone) -> None:
    """`UserError` for a network of another UNet, and for one that shrinks pictures by another factor."""
    unet, config = cast(Any, model.denoiser).config, cast(Any, module).config
    for name, words in MUST_AGREE.items():
        if config.get(name) != unet.get(name):
            raise made_for_another_model(words, config.get(name), unet.get(name))
    if config.in_channels != unet.out_channels:
        raise made_for_another_model("number of latent channels", config.in_channels, unet.out_channels)
    channels = config.conditioning_channels
    expected = unet.out_channels if config.use_simplified_condition_embedding else 3
    if channels != expected:
        raise made_for_another_model("number of condition channels", channels, expected)
    factor = 2 ** (len(config.conditioning_embedding_out_channels) - 1)
    if not config.use_simplified_condition_embedding and factor != model.factor:
        raise made_for_another_model("reduction of pictures", factor, model.factor)
