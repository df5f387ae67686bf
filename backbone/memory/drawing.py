"""The memory of sampling images and clips, and the cheapest savings with which it fits a device (`--vram`).

Everything stays loaded: text encoders, denoiser, motion adapter, control networks, autoencoder. References are encoded,
the denoiser is called with guidance, and latents are decoded, one after another. Bytes are counted from the configs
alone, as for a training run, without the few of LoRAs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import MotionAdapter
from torch import Tensor, nn

from backbone.conditions.control import Control
from backbone.memory.planner import (
    MemoryEstimator,
    MemorySettings,
    Phase,
    Workload,
    fit,
    precision_name,
)
from backbone.models.clips.motion import attach_motion, rows_as_clips
from backbone.models.clips.windows import attention_in_windows
from backbone.models.control import make_outline_control, require_controlled_family
from backbone.models.model import Backbone, decode_batch_size

PART = "control"  # submodules of the planned denoiser: its control networks


@dataclass(frozen=True)
class DrawingWorkload:
    """The images or clips to sample.

    batch       images or clips sampled together
    places      the latents' size (H, W)
    guidance    scale; 1 is none
    references  number of images beside each prompt
    conditions  the kind of each map and the name of the network that reads it
    frames      of a clip in one call of the network; 0: images
    motion      the adapter that links the frames
    window      (frames, stride) of attention over time, if only that goes by windows
    whole_base  concepts change the network's weights, which are therefore neither quantised nor offloaded
    """

    batch: int
    places: tuple[int, int]
    guidance: float
    references: int = 0
    conditions: Sequence[tuple[str, str]] = ()
    frames: int = 0
    motion: MotionAdapter | None = None
    window: tuple[int, int] | None = None
    whole_base: bool = False


class DrawingEstimator(MemoryEstimator):
    """Counts the bytes of sampling."""

    def __init__(self, model: Backbone, workload: DrawingWorkload, *, device: str = "cuda") -> None:
        work = Workload(
            self._attach,
            workload.batch,
            supports_compressed_base=not workload.whole_base,
            queries_base=False,
            references=workload.references,
        )
        super().__init__(model, work, device=device)
        self.drawing_workload = workload
        self.latent_shape = (*model.latent_shape[:-2], *workload.places)
        self.outlines = {name: make_outline_control(model, name) for _, name in workload.conditions}

    def phases(self, choice: MemorySettings) -> dict[str, Phase]:
        """The phases, in order."""
        precision, placement = choice.precision, choice.placement
        sizes = self.model_sizes(precision)
        text_encoders = 0 if placement.text_on_cpu else sizes.text_encoders
        files = choice.dtype.itemsize * sum(outline.numbers for outline in self.outlines.values())
        resident = (
            self.denoiser_bytes(choice) + sizes.frozen_additions + files + sizes.autoencoder + text_encoders
        )
        batch = 1 if placement.one_by_one else self.drawing_workload.batch
        pictures = batch * max(1, self.drawing_workload.frames)
        rows = pictures * self.count_calls(precision)
        phases = {}
        if self.drawing_workload.references:
            encoding = self.autoencoder_bytes(precision, "encode", placement.tiling, 1)
            phases["references"] = Phase(resident, encoding)
        drawing = self.forward_bytes(precision, rows) + self.unpacked_layer_bytes(choice)
        decode_batch = min(pictures, decode_batch_size(self.drawing_workload.places, self.model.factor))
        decoding = self.autoencoder_bytes(precision, "decode", placement.tiling, decode_batch)
        return phases | {"drawing": Phase(resident, drawing), "decoding": Phase(resident, decoding)}

    def count_calls(self, precision: str) -> int:
        """The number of rows of each image in a call: with the prompt, without it, without prompt and reference."""
        if self.model.reads_as_channels:
            return 3
        if self.drawing_workload.guidance == 1:
            return 1
        blank = self.model.family.spec(self.model.location, torch.float32).blank_text(1)
        network = self.meta_denoiser(precision)
        distilled = (
            self.model.family.embed_guidance(network, blank, self.drawing_workload.guidance) is not None
        )
        return 1 if distilled else 2

    def make_call(
        self, network: nn.Module, precision: str, rows: int
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        forward, inputs = super().make_call(network, precision, rows)

        def call() -> Tensor:
            window = self.drawing_workload.window
            by_windows = nullcontext() if window is None else attention_in_windows(network, *window)
            with rows_as_clips(network, self.drawing_workload.frames), by_windows:
                return forward()

        return call, inputs

    def _attach(self, denoiser: nn.Module) -> tuple[Tensor, ...]:
        """Add the motion adapter and the control networks to a denoiser on `meta`; none is trained."""
        if self.drawing_workload.motion is not None:
            with torch.device("meta"):
                adapter: Any = MotionAdapter.from_config(self.drawing_workload.motion.config)
            attach_motion(denoiser, adapter.requires_grad_(False))
        dtype = next(denoiser.parameters()).dtype
        for number, outline in enumerate(self.outlines.values()):
            if outline.spec is not None:
                denoiser.add_module(f"{PART}_{number}", nn.Module.to(outline.spec.instantiate(), dtype))
        return ()

    def controls(self, network: nn.Module, rows: int) -> tuple[Control, ...]:
        if not self.outlines:
            return ()
        family, factor = require_controlled_family(self.model), self.model.factor
        sides = [places * factor for places in self.drawing_workload.places]

        def encode(maps: Tensor, *, shifted: bool) -> Tensor:
            return maps.new_zeros(len(maps), *self.latent_shape)

        controls = []
        for kind, name in self.drawing_workload.conditions:
            if self.outlines[name].spec is None:
                continue
            part = network.get_submodule(f"{PART}_{list(self.outlines).index(name)}")
            control = family.control_network(part, network, encode).for_kind(kind)
            controls.append(Control.of(control, torch.zeros(rows, 3, *sides, device="meta")))
        return tuple(controls)

    def remedies(self) -> list[str]:
        return [
            *(["leave a --reference out"] if self.drawing_workload.references else []),
            *(["leave a --condition out"] if self.drawing_workload.conditions else []),
            *(["ask for fewer --frames at once"] if self.drawing_workload.frames else []),
            "draw smaller images",
        ]


def fit_drawing(model: Backbone, workload: DrawingWorkload, size: float) -> Backbone:
    """The (unloaded) model placed for sampling on its device of `size` GiB; prints the plan.

    Raises `UserError` where nothing fits.
    """
    start = MemorySettings(precision_name(model), placement=model.placement)
    placed, _ = fit(DrawingEstimator(model, workload, device=model.device.type), size, start)
    return placed
