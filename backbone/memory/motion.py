"""The memory of learning a motion from clips, and the cheapest savings with which it fits a device (`--vram`).

Clips are encoded, those of the class are sampled, then the layers over time are trained, with a LoRA in the layers
over space. Bytes are counted from the configs alone, as for a training run (`backbone.memory.planner`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import MotionAdapter
from torch import Tensor, nn

from backbone.memory.count import StepBytes
from backbone.memory.planner import (
    OPTIMIZER_STATE_BYTES,
    MemoryEstimator,
    MemorySettings,
    Phase,
    Workload,
)
from backbone.models.clips.motion import attach_motion, rows_as_clips
from backbone.models.model import Backbone, decode_batch_size


@dataclass(frozen=True)
class MotionWorkload:
    """The motion to learn.

    frames         in the clip of a step
    adapter        the settings of the motion adapter
    add_trainable  denoiser with the adapter → its trained tensors, added if they are new
    prior          whether clips of the class are sampled first
    """

    frames: int
    adapter: Mapping[str, Any]
    add_trainable: Callable[[nn.Module], Iterable[Tensor]]
    prior: bool


class MotionEstimator(MemoryEstimator):
    """Counts the bytes of learning a motion."""

    def __init__(self, model: Backbone, workload: MotionWorkload, *, device: str = "cuda") -> None:
        work = Workload(self._attach, workload.frames, queries_base=workload.prior)
        super().__init__(model, work, device=device)
        self.motion_workload = workload

    def phases(self, choice: MemorySettings) -> dict[str, Phase]:
        """The phases, in order."""
        precision, placement, frames = choice.precision, choice.placement, self.motion_workload.frames
        sizes = self.model_sizes(precision)
        text_encoders = 0 if placement.text_on_cpu else sizes.text_encoders
        denoiser = self.denoiser_bytes(choice) + sizes.frozen_additions

        # A clip's frames are encoded in batches of the decoding batch size
        batch = min(frames, decode_batch_size(self.latent_shape[-2:], self.model.factor))
        encoding = self.autoencoder_bytes(precision, "encode", placement.tiling, batch)
        phases = {"encoding": Phase(denoiser + sizes.autoencoder + text_encoders, encoding)}
        unpacked = self.unpacked_layer_bytes(choice)
        if self.motion_workload.prior:
            resident = denoiser + sizes.autoencoder + text_encoders
            drawing = self.forward_bytes(precision, 2 * frames)  # classifier-free guidance
            phases["clips of the class"] = Phase(resident, drawing + unpacked)

        # Trained tensors and their optimiser state are fp32; gradients and the optimiser's temporaries are as large
        trained = 4 * sizes.trained_parameters
        state = round(sizes.trained_parameters * OPTIMIZER_STATE_BYTES[choice.optimizer])
        step = max(self.step_bytes(precision, choice.checkpointing).peak, 2 * trained)
        phases["training"] = Phase(denoiser + trained + state, step + unpacked)
        return phases

    def make_call(
        self, network: nn.Module, precision: str, rows: int
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        forward, inputs = super().make_call(network, precision, rows)

        def call() -> Tensor:
            with rows_as_clips(network, self.motion_workload.frames):
                return forward()

        return call, inputs

    def _count_step(self, precision: str, checkpointing: bool) -> StepBytes:
        with rows_as_clips(
            self.meta_trainable(precision)[0], self.motion_workload.frames
        ):  # in the backward pass too
            return super()._count_step(precision, checkpointing)

    def _attach(self, denoiser: nn.Module) -> Iterable[Tensor]:
        """Add the motion adapter and the trained tensors to a denoiser on `meta`."""
        with torch.device("meta"):
            adapter: Any = MotionAdapter.from_config(dict(self.motion_workload.adapter))
        attach_motion(denoiser, adapter.requires_grad_(False))
        return self.motion_workload.add_trainable(denoiser)

    def remedies(self) -> list[str]:
        return ["ask for fewer --frames"]
