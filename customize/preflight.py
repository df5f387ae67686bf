"""What can be told before a run: pictures that will not teach well, and how much memory and time the run takes.

Warnings are said; only pictures that cannot be read are errors (`backbone.images.check`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbone.images import Picture

if TYPE_CHECKING:
    from torch import nn

    from backbone.model import Backbone
    from customize.settings import Settings

NEAR = 6  # of 64 bits: at most so many differ between near-duplicates
SHARP = 100.0  # variance of the Laplacian (8-bit grey levels) below which a picture is called blurred, by convention
SHARP_SIDE = 512  # pixels a side at which sharpness is judged
DIFFERENT_SHAPES = 1.5  # largest over smallest aspect ratio
SMALL_MODEL = 100_000_000  # parameters up to which a step is timed
GIB = 2**30


@dataclass(frozen=True)
class Look:
    """What one picture shows: its size, its 64-bit perceptual hash, that of its mirror image, its sharpness."""

    name: str
    width: int
    height: int
    bits: NDArray[np.bool_]
    mirrored: NDArray[np.bool_]
    sharpness: float


def look(picture: Picture) -> Look:
    """Opens a picture once and measures it."""
    image = picture.open()
    return Look(
        picture.path.name,
        *image.size,
        perceptual_hash(image),
        perceptual_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        sharpness(image),
    )


def warnings_about(pictures: Sequence[Picture], *, resolution: int) -> list[str]:
    """A sentence for everything that may spoil a run at `resolution` pixels a side."""
    looks = [look(picture) for picture in pictures]
    found: list[str] = []
    for group in near_duplicates(looks):
        found.append(
            f"{_listed(group)} are almost the same picture: keep one, or the run learns its details."
        )
    small = [one for one in looks if min(one.width, one.height) < resolution]
    for one in small:
        found.append(
            f"{one.name} is {one.width} × {one.height}, smaller than the {resolution} pixels that the model works at."
        )
    blurred = [one for one in looks if one.sharpness < SHARP]
    for one in blurred:
        found.append(
            f"{one.name} looks blurred (variance of the Laplacian {one.sharpness:.0f}, sharp pictures have over "
            f"{SHARP:.0f})."
        )
    bare = [picture.path.name for picture in pictures if not picture.caption]
    if bare and len(bare) < len(pictures):
        found.append(
            f"{_listed(bare)} {_have(bare)} no caption, others have: the instance prompt serves instead."
        )
    shapes = [one.width / one.height for one in looks]
    if shapes and max(shapes) > DIFFERENT_SHAPES * min(shapes):
        lost = max(1 - min(shape, 1 / shape) for shape in shapes)
        found.append(
            f"The shapes differ much (width over height {min(shapes):.2f} to {max(shapes):.2f}): the square cut from "
            f"the middle loses up to {lost:.0%} of a picture."
        )
    return found


def perceptual_hash(image: Image.Image) -> NDArray[np.bool_]:
    """64 bits: which of the 8 × 8 lowest frequencies (DCT-II of 32 × 32 grey pixels) lie over their median.

    Scale, compression and small changes of brightness leave it almost as it is (Zauner 2010, section 3.2).
    """
    grey = np.asarray(image.convert("L").resize((32, 32), Image.Resampling.LANCZOS), dtype=np.float64)
    position, frequency = np.meshgrid(np.arange(32), np.arange(1, 9))
    basis = np.cos(math.pi / 32 * (position + 0.5) * frequency)
    values = basis @ (grey - grey.mean()) @ basis.T
    return np.asarray(values > np.median(values)).ravel()


def sharpness(image: Image.Image) -> float:
    """The variance of the Laplacian of the grey picture (Pech-Pacheco et al. 2000), the longer side at most 512."""
    grey = image.convert("L")
    grey.thumbnail((SHARP_SIDE, SHARP_SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(grey, dtype=np.float64)
    if min(pixels.shape) < 3:
        return 0.0
    inner = pixels[1:-1, 1:-1]
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    return float((around - 4 * inner).var())


def near_duplicates(looks: Sequence[Look]) -> list[list[str]]:
    """Groups of pictures that are almost the same or mirror images, by name; each picture in one group at most."""
    group = list(range(len(looks)))
    for i, one in enumerate(looks):
        for j in range(i):
            other = looks[j]
            distance = min((one.bits != other.bits).sum(), (one.mirrored != other.bits).sum())
            if distance <= NEAR:
                old, new = group[i], group[j]
                group = [new if value == old else value for value in group]
    members: dict[int, list[str]] = {}
    for i, one in enumerate(looks):
        members.setdefault(group[i], []).append(one.name)
    return [names for names in members.values() if len(names) > 1]


@dataclass(frozen=True)
class Estimate:
    """What a run will need. Bytes are those of tensors; Python and its libraries take some hundred megabytes beside.

    `encoding` while pictures and prompts are encoded, `training` while the denoiser learns, of which `activations` are
    kept from forward to backward; `step_seconds` is None where no step was timed.
    """

    encoding: int
    training: int
    activations: int
    step_seconds: float | None
    steps: int

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(self.encoding, self.training)

    def sentences(self) -> list[str]:
        """What a person wants to know of it."""
        phase = "training" if self.training >= self.encoding else "encoding"
        said = [
            f"The default run keeps about {self.peak / GIB:.2g} GiB of tensors at its peak, while {phase} "
            f"(activations {self.activations / GIB:.2g} GiB); Python and its libraries take their own beside."
        ]
        if self.step_seconds is None:
            said.append("How long it takes is unknown: a step is timed here for small models only.")
        else:
            seconds = self.step_seconds * self.steps
            said.append(
                f"A step took {self.step_seconds:.2g} s here just now, so {self.steps} steps take about "
                f"{_duration(seconds)}, and encoding and previews some more."
            )
        return said


def estimate(model: Backbone, settings: Settings, pictures: int) -> Estimate:
    """The memory of a LoRA run from shapes alone (nothing is loaded), and a timed step if the model is small.

    Activations are what the backward pass of one step keeps, counted on a network without storage (torch's `meta`).
    """
    import torch

    rows = settings.batch + (settings.prior_batch if settings.prior_loss_weight else 0)
    element = torch.finfo(model.dtype).bits // 8
    bare = network_on(model, "meta", model.dtype)
    weights = sum(value.numel() for value in bare.parameters())
    trained = sum(value.numel() for value in adapted(bare, model, settings).values())
    activations = saved_bytes(bare, model, settings, rows)
    channels, height, width = model.latent_shape
    latents = 2 * 4 * channels * height * width * pictures
    training = weights * element + trained * 4 * 4 + activations + latents  # weight, gradient, two moments
    encoding = encoder_bytes(model, element)
    seconds = None
    if weights <= SMALL_MODEL:
        seconds = timed_step(model, settings, rows)
    return Estimate(encoding, training, activations, seconds, settings.steps)


def network_on(model: Backbone, device: str, dtype: Any) -> nn.Module:
    """The denoiser's UNet by its settings alone, its weights as they come: without storage on `meta`."""
    import torch
    from diffusers import UNet2DConditionModel
    from torch import nn

    with torch.device(device):
        network: nn.Module = UNet2DConditionModel.from_config(model.location.config("unet"))
    nn.Module.to(network, dtype=dtype)
    nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return network.requires_grad_(False).eval()


def adapted(network: nn.Module, model: Backbone, settings: Settings) -> dict[str, Any]:
    """The trainable tensors of the run's adapter, put on the network."""
    from backbone.adapters import add_lora

    layers = model.family.lora_targets[settings.lora_layers]
    return add_lora(network, "estimate", rank=settings.rank, alpha=settings.lora_alpha, targets=layers)


def saved_bytes(
    network: nn.Module, model: Backbone, settings: Settings, rows: int, *, device: str = "meta"
) -> int:
    """Bytes that one forward pass keeps for its backward pass, weights not counted, each storage once."""
    import torch

    own = {value.untyped_storage()._cdata for value in network.parameters()}
    seen: dict[int, int] = {}
    kept: list[Any] = []

    def remember(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes()
            kept.append(storage)  # so that its address is not given to another
        return tensor

    with (
        _in_one_precision(network),
        torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor),
    ):
        _forward(network, model, settings, rows, device=device)
    return sum(seen.values())


def timed_step(model: Backbone, settings: Settings, rows: int) -> float:
    """Seconds of one training step with weights as they come, on the run's device, after one to warm up."""
    import torch

    device = model.device.type
    network = network_on(model, device, model.dtype)
    trained = list(adapted(network, model, settings).values())
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with model.autocast():
            loss = _forward(network, model, settings, rows, device=device)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds


def encoder_bytes(model: Backbone, element: int) -> int:
    """Bytes of the autoencoder and the text encoder (which is kept in fp32), from their settings."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(model.autoencoder_config)
        text = CLIPTextModel(CLIPTextConfig.from_dict(model.location.config("text_encoder")))
    pixels = sum(value.numel() for value in autoencoder.parameters())
    words = sum(value.numel() for value in text.parameters())
    return int(pixels * element + words * 4)


def _forward(network: nn.Module, model: Backbone, settings: Settings, rows: int, *, device: str) -> Any:
    """The loss of one step on noise."""
    import torch

    from backbone.attention import quick_to_train

    dtype = next(value.dtype for value in network.parameters() if not value.requires_grad)
    channels, height, width = model.latent_shape
    noisy = torch.zeros(rows, channels, height, width, device=device).to(memory_format=torch.channels_last)
    words = torch.zeros(rows, 77, model.location.config("unet")["cross_attention_dim"], device=device)
    times = torch.zeros(rows, dtype=torch.int64, device=device)
    with _plain_attention(network) if model.device.type == "cpu" else quick_to_train(network):
        said = cast(Any, network)(noisy.to(dtype), times, words.to(dtype)).sample
    return (said.float() - noisy).square().mean()


@contextmanager
def _plain_attention(network: nn.Module) -> Iterator[None]:
    """The attention that training uses on a CPU, also for a network on the meta device."""
    from diffusers.models.attention_processor import AttnProcessor

    unet = cast(Any, network)
    before = dict(unet.attn_processors)
    unet.set_attn_processor(AttnProcessor())
    try:
        yield
    finally:
        unet.set_attn_processor(before)


@contextmanager
def _in_one_precision(network: nn.Module) -> Iterator[None]:
    """The meta device knows no autocast: inside, the adapter is in the base's precision, as autocast computes it."""
    dtype = next(value.dtype for value in network.parameters() if not value.requires_grad)
    before = {name: value.dtype for name, value in network.named_parameters() if value.requires_grad}
    for name, value in network.named_parameters():
        if name in before:
            value.data = value.data.to(dtype)
    try:
        yield
    finally:
        for name, value in network.named_parameters():
            if name in before:
                value.data = value.data.to(before[name])


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
