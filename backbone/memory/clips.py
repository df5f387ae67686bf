"""The memory of an image-to-video clip, and the cheapest savings with which it fits a device.

Its phases follow one another, and only the autoencoder stays: the picture is encoded, the latents of all clips are
sampled, frames are decoded.
Bytes are counted from the configs alone, as for a training run (`backbone.memory.planner`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import lru_cache

import torch

from backbone.io.console import UserError
from backbone.memory.count import forward_peak_bytes, tensor_bytes
from backbone.memory.planner import (
    CUDA_CONTEXT_BYTES,
    FRAGMENTATION,
    GIB,
    OFFLOAD_SHARES,
    Phase,
    autoencoder_peak_bytes,
    format_phases,
    usable_bytes,
)
from backbone.models.model import Backbone
from backbone.models.placement import Placement, find_offloadable_layers

CHUNKS = (16, 8, 4, 2, 1)  # frames decoded together


@dataclass(frozen=True)
class ClipChoice:
    """The settings of a clip that decide its memory; `chunk` frames are decoded together."""

    chunk: int
    placement: Placement = field(default_factory=Placement)

    def describe(self, other: ClipChoice) -> str:
        """The differences from another choice, in words."""
        changes = []
        if self.chunk != other.chunk:
            changes.append(f"{self.chunk} frames decoded together")
        if self.placement.one_by_one and not other.placement.one_by_one:
            changes.append("guidance in two calls")
        if self.placement.offload != other.placement.offload:
            changes.append(f"{self.placement.offload:.0%} of the network in the CPU's memory")
        return ", ".join(changes) or "nothing changed"


class ClipEstimator:
    """Counts the bytes of the phases of a clip of `frames` frames of latents `places` (H, W).

    `adapter_bytes` are those of LoRAs in the network.
    """

    def __init__(
        self,
        model: Backbone,
        *,
        frames: int,
        places: tuple[int, int],
        device: str = "cuda",
        adapter_bytes: int = 0,
    ) -> None:
        self.model, self.frames, self.places, self.adapter_bytes = model, frames, places, adapter_bytes
        self.device = "cpu" if device == "cpu" else "cuda"
        self.spec = model.family.spec(model.location, model.dtype)
        self.denoiser = self.spec.denoiser.instantiate()
        self.drawing_bytes = lru_cache(self._count_denoiser)
        self.encoding_bytes = lru_cache(self._count_encoding)
        self.decoding_bytes = lru_cache(self._count_decoding)

    def phases(self, choice: ClipChoice) -> dict[str, Phase]:
        """The phases, in order."""
        image_encoder = sum(
            tensor_bytes(part.instantiate().parameters()) for part in self.spec.text_encoders.values()
        )
        vae = tensor_bytes(self.spec.autoencoder.instantiate().parameters())
        offload = choice.placement.offload
        offloaded = [
            tensor_bytes(layer.parameters()) for layer in find_offloadable_layers(self.denoiser, offload)
        ]
        denoiser = (
            tensor_bytes(self.denoiser.parameters()) - sum(offloaded) * bool(offload) + self.adapter_bytes
        )
        unpacked = 2 * max(offloaded, default=0) * bool(offload)
        rows = 1 if choice.placement.one_by_one else 2
        return {
            "the picture": Phase(image_encoder + vae, self.encoding_bytes(1)),
            "drawing": Phase(denoiser + vae, self.drawing_bytes(rows) + unpacked),
            "decoding": Phase(vae, self.decoding_bytes(min(choice.chunk, self.frames))),
        }

    def _count_denoiser(self, rows: int) -> int:
        """Peak bytes of the denoiser with this many clips."""
        noisy = torch.zeros(rows, self.model.latent_shape[0], self.frames, *self.places, device="meta")
        conditions = replace(self.spec.blank_text(rows), references=(torch.zeros_like(noisy[:, :, 0]),))
        time, dtype = torch.zeros(rows, device="meta"), self.model.dtype
        return forward_peak_bytes(
            self.denoiser,
            lambda: self.model.family.network(self.denoiser, conditions)(noisy, time),
            device=self.device,
            autocast=None if dtype is torch.float32 else dtype,
        )

    def _count_encoding(self, rows: int) -> int:
        """Peak bytes of the autoencoder encoding this many images."""
        shape = (rows, 3, *(side * self.model.factor for side in self.places))
        return autoencoder_peak_bytes(self.spec.autoencoder, "encode", shape, device=self.device)

    def _count_decoding(self, rows: int) -> int:
        """Peak bytes of the autoencoder decoding the latents of this many frames."""
        shape = (rows, self.model.latent_shape[0], *self.places)
        return autoencoder_peak_bytes(self.spec.autoencoder, "decode", shape, device=self.device)


@dataclass(frozen=True)
class ClipPlan:
    """The choice for a device of `size` GiB, the changes it makes, and its phases."""

    choice: ClipChoice
    size: float
    changed: str
    phases: dict[str, Phase]

    def lines(self) -> list[str]:
        """The plan as a small table."""
        peak = max(phase.total_bytes for phase in self.phases.values())
        head = f"Memory of the device: {self.size:g} GiB; the clip needs {peak / GIB:.2f} ({self.changed})."
        return [head, *format_phases(self.phases)]


def plan_clip(estimator: ClipEstimator, size: float, start: ClipChoice) -> ClipPlan:
    """The cheapest choice, from `start` on, with which a clip fits a device of `size` GiB.

    Raises `UserError` with the nearest remedy where nothing fits.
    """
    usable = usable_bytes(size, estimator.device)
    choice = start
    for choice in list_choices(estimator, start):
        phases = estimator.phases(choice)
        if max(phase.total_bytes for phase in phases.values()) <= usable:
            return ClipPlan(choice, size, choice.describe(start), phases)
    peak = max(phase.total_bytes for phase in estimator.phases(choice).values())
    at_least = (peak + CUDA_CONTEXT_BYTES.get(estimator.device, 0.0)) / (1 - FRAGMENTATION) / GIB
    raise UserError(
        f"A clip of {estimator.frames} frames does not fit in {size:g} GiB: with every saving it needs "
        f"{at_least:.1f}. Ask for fewer --frames or a smaller --width and --height."
    )


def list_choices(estimator: ClipEstimator, start: ClipChoice) -> Iterator[ClipChoice]:
    """Choices from the fastest to the smallest; decoding fewer frames together costs least."""
    chunks = [start.chunk, *(chunk for chunk in CHUNKS if chunk < min(start.chunk, estimator.frames))]
    halved = replace(start.placement, one_by_one=True)
    for placement in (
        start.placement,
        halved,
        *(replace(halved, offload=share) for share in OFFLOAD_SHARES),
    ):
        for chunk in chunks:
            yield ClipChoice(chunk, placement)
