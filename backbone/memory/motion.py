"""What learning a motion from clips asks of memory, and the cheapest savings with which it fits a device (`--vram`).

Clips are encoded, those of the class are drawn, then the layers over time learn, with a LoRA in the layers over space
beside them. Bytes are counted from the configs alone, as for a training run (`backbone.memory.planner`).
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
from backbone.models.clips.motion import attach_motion, clip_of
from backbone.models.model import Backbone, decode_batch_size


@dataclass(frozen=True)
class LearnedMotion:
    """What is learned.

    frames   of a step's clip
    adapter  the settings of the motion adapter
    learns   denoiser with the adapter → the tensors that learn, put there if they are new
    prior    whether clips of the class are drawn before
    """

    frames: int
    adapter: Mapping[str, Any]
    learns: Callable[[nn.Module], Iterable[Tensor]]
    prior: bool


class MotionEstimator(MemoryEstimator):
    """Counts the bytes of learning a motion."""

    def __init__(self, model: Backbone, learned: LearnedMotion, *, device: str = "cuda") -> None:
        work = Workload(self._attach, learned.frames, queries_base=learned.prior)
        super().__init__(model, work, device=device)
        self.learned = learned

    def phases(self, choice: MemorySettings) -> dict[str, Phase]:
        """The phases, in order."""
        precision, placement, frames = choice.precision, choice.placement, self.learned.frames
        sizes = self.model_sizes(precision)
        text_encoders = 0 if placement.text_on_cpu else sizes.text_encoders
        denoiser = self.denoiser_bytes(choice) + sizes.beside

        # A clip's frames are encoded in batches of as many as are decoded together
        together = min(frames, decode_batch_size(self.latent_shape[-2:], self.model.factor))
        encoding = self.autoencoder_bytes(precision, "encode", placement.tiling, together)
        phases = {"encoding": Phase(denoiser + sizes.autoencoder + text_encoders, encoding)}
        unpacked = self.unpacked_layer_bytes(choice)
        if self.learned.prior:
            beside = denoiser + sizes.autoencoder + text_encoders
            drawing = self.forward_bytes(precision, 2 * frames)  # classifier-free guidance
            phases["clips of the class"] = Phase(beside, drawing + unpacked)

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
            with clip_of(network, self.learned.frames):
                return forward()

        return call, inputs

    def _count_step(self, precision: str, checkpointing: bool) -> StepBytes:
        with clip_of(self.meta_trainable(precision)[0], self.learned.frames):  # in the backward pass too
            return super()._count_step(precision, checkpointing)

    def _attach(self, denoiser: nn.Module) -> Iterable[Tensor]:
        """Put the motion adapter and what learns into a denoiser on `meta`."""
        with torch.device("meta"):
            adapter: Any = MotionAdapter.from_config(dict(self.learned.adapter))
        attach_motion(denoiser, adapter.requires_grad_(False))
        return self.learned.learns(denoiser)

    def remedies(self) -> list[str]:
        return ["ask for fewer --frames"]
