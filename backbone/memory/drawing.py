"""What drawing images and clips asks of memory, and the cheapest savings with which it fits a device (`--vram`).

Everything stays loaded meanwhile: text encoders, denoiser, motion adapter, control networks, autoencoder. On top come,
one after the other, the encoding of references, a guided call of the denoiser, the decoding. Bytes are counted from the
configs alone, as for a training run; a LoRA's, which are few beside these, are not.
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
from backbone.models.clips.motion import attach_motion, clip_of
from backbone.models.clips.windows import attention_in_windows
from backbone.models.control import outline_control, require_controlled_family
from backbone.models.model import Backbone, decode_batch_size

PART = "control"  # of the planned denoiser: control networks are counted with it


@dataclass(frozen=True)
class DrawingWorkload:
    """What is drawn.

    batch       this many images or clips together
    places      the latents' size (H, W)
    guidance    its scale; 1 is none
    references  images beside each prompt
    conditions  the kind of each map and the name of the network that reads it
    frames      of a clip that go through the network together; 0: images
    motion      the adapter that links them
    window      (frames, stride) of attention over time, where that alone goes by windows
    whole       concepts change the network's weights, which therefore stay as they are: not quantised, nor offloaded
    """

    batch: int
    places: tuple[int, int]
    guidance: float
    references: int = 0
    conditions: Sequence[tuple[str, str]] = ()
    frames: int = 0
    motion: MotionAdapter | None = None
    window: tuple[int, int] | None = None
    whole: bool = False


class DrawingEstimator(MemoryEstimator):
    """Counts the bytes of drawing images."""

    def __init__(self, model: Backbone, drawn: DrawingWorkload, *, device: str = "cuda") -> None:
        work = Workload(
            self._attach,
            drawn.batch,
            supports_compressed_base=not drawn.whole,
            queries_base=False,
            references=drawn.references,
        )
        super().__init__(model, work, device=device)
        self.drawn = drawn
        self.latent_shape = (*model.latent_shape[:-2], *drawn.places)
        self.outlines = {name: outline_control(model, name) for _, name in drawn.conditions}

    def phases(self, choice: MemorySettings) -> dict[str, Phase]:
        """The phases, in order."""
        precision, placement = choice.precision, choice.placement
        sizes = self.model_sizes(precision)
        text_encoders = 0 if placement.text_on_cpu else sizes.text_encoders
        files = choice.dtype.itemsize * sum(one.numbers for one in self.outlines.values())
        resident = self.denoiser_bytes(choice) + sizes.beside + files + sizes.autoencoder + text_encoders
        pictures = (1 if placement.one_by_one else self.drawn.batch) * max(1, self.drawn.frames)
        rows = pictures * self.count_calls(precision)
        found = {}
        if self.drawn.references:
            encoding = self.autoencoder_bytes(precision, "encode", placement.tiling, 1)
            found["references"] = Phase(resident, encoding)
        drawing = self.forward_bytes(precision, rows) + self.unpacked_layer_bytes(choice)
        together = min(pictures, decode_batch_size(self.drawn.places, self.model.factor))
        decoding = self.autoencoder_bytes(precision, "decode", placement.tiling, together)
        return found | {"drawing": Phase(resident, drawing), "decoding": Phase(resident, decoding)}

    def count_calls(self, precision: str) -> int:
        """The rows of a call for each image: with the prompt, with none, and with neither prompt nor reference."""
        if self.model.reads_as_channels:
            return 3
        if self.drawn.guidance == 1:
            return 1
        blank = self.model.family.spec(self.model.location, torch.float32).blank_text(1)
        network = self.meta_denoiser(precision)
        distilled = self.model.family.embed_guidance(network, blank, self.drawn.guidance) is not None
        return 1 if distilled else 2

    def make_call(
        self, network: nn.Module, precision: str, rows: int
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        forward, inputs = super().make_call(network, precision, rows)

        def call() -> Tensor:
            window = self.drawn.window
            by_windows = nullcontext() if window is None else attention_in_windows(network, *window)
            with clip_of(network, self.drawn.frames), by_windows:
                return forward()

        return call, inputs

    def _attach(self, denoiser: nn.Module) -> tuple[Tensor, ...]:
        """Put the motion adapter and the control networks into a denoiser on `meta`; nothing learns."""
        if self.drawn.motion is not None:
            with torch.device("meta"):
                adapter: Any = MotionAdapter.from_config(self.drawn.motion.config)
            attach_motion(denoiser, adapter.requires_grad_(False))
        dtype = next(denoiser.parameters()).dtype
        for number, one in enumerate(self.outlines.values()):
            if one.spec is not None:
                denoiser.add_module(f"{PART}_{number}", nn.Module.to(one.spec.instantiate(), dtype))
        return ()

    def controls(self, network: nn.Module, rows: int) -> tuple[Control, ...]:
        if not self.outlines:
            return ()
        family, factor = require_controlled_family(self.model), self.model.factor
        sides = [places * factor for places in self.drawn.places]

        def encode(maps: Tensor, *, shifted: bool) -> Tensor:
            return maps.new_zeros(len(maps), *self.latent_shape)

        controls = []
        for kind, name in self.drawn.conditions:
            if self.outlines[name].spec is None:
                continue
            part = network.get_submodule(f"{PART}_{list(self.outlines).index(name)}")
            control = family.control_network(part, network, encode).for_kind(kind)
            controls.append(Control.of(control, torch.zeros(rows, 3, *sides, device="meta")))
        return tuple(controls)

    def remedies(self) -> list[str]:
        return [
            *(["leave a --reference out"] if self.drawn.references else []),
            *(["leave a --condition out"] if self.drawn.conditions else []),
            *(["ask for fewer --frames at once"] if self.drawn.frames else []),
            "draw smaller images",
        ]


def fit_drawing(model: Backbone, drawn: DrawingWorkload, size: float) -> Backbone:
    """The (unloaded) model as it draws on its device of `size` GiB, by a plan that is printed.

    Raises `UserError` where nothing fits.
    """
    start = MemorySettings(precision_name(model), placement=model.placement)
    placed, _ = fit(DrawingEstimator(model, drawn, device=model.device.type), size, start)
    return placed
