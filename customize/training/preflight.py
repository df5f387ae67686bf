"""Checks before a run: images that are poor training data, and the memory and time that the run will take.

They are warnings; only images that cannot be read are errors (`backbone.media.sources.pictures.check_images`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from backbone.io.console import UserError, format_count, notify
from backbone.media.duplicates import almost_equal, perceptual_hash
from backbone.media.sources.record import ImageRecord
from backbone.memory.planner import GIB, MemoryEstimator, Phase, format_phases
from customize.data.captions import (
    LONG,
    PIECES,
    TrainingPrompt,
    describe_foreign_syntax,
    describe_truncated,
)
from customize.training.memory import make_choice, make_workload

if TYPE_CHECKING:
    from backbone.models.model import Backbone
    from customize.settings import Settings

SHARP = 100.0  # variance of the Laplacian (8-bit grey levels) below which a picture is called blurred, by convention
SAID = 6  # most sentences on captions
SHARP_SIDE = 512  # pixels a side at which sharpness is judged
DIFFERENT_SHAPES = 1.5  # largest over smallest aspect ratio
SMALL_MODEL = 100_000_000  # parameters up to which a step is timed


@dataclass(frozen=True)
class ImageMeasurements:
    """Measurements of an image: its size, its 64-bit perceptual hash, its mirror image's hash, its sharpness."""

    name: str
    width: int
    height: int
    bits: NDArray[np.bool_]
    mirrored: NDArray[np.bool_]
    sharpness: float


def say_idle_bound(settings: Settings, model: Backbone, requested: Mapping[str, Any]) -> None:
    """Warn if the γ of `requested` clamps no weight, since no noise level has a higher signal-to-noise ratio."""
    if "snr_gamma" not in requested or settings.loss_weighting != "min-snr":
        return
    levels = model.path.levels
    highest = float(((levels.a / levels.b) ** 2).max())
    if settings.snr_gamma >= highest:
        notify(
            f"--snr-gamma {settings.snr_gamma:g} has no effect: the noise levels of {settings.model} have signal-to-"
            f"noise ratios of at most {highest:.4g}, so it bounds none. Give less, or leave it out."
        )


def refuse_idle_range(settings: Settings, model: Backbone) -> None:
    """`UserError` for a range of timesteps in which the model is trained at no noise level, or at all of them."""
    from customize.objectives.dreambooth import make_timestep_weights

    weights, levels = make_timestep_weights(model.path, settings), model.path.levels
    if weights is None or bool((weights != weights[0]).any()):
        return
    ends = f"{1000 * float(levels.b[0]):.3g} to {1000 * float(levels.b[-1]):.3g}"
    raise UserError(
        f"{model.location.name} is trained at timesteps from {ends}, and the range of --timestep-bias-strategy, from "
        f"{settings.timestep_bias_begin} to {settings.timestep_bias_end}, holds all or none of them. Give other "
        "--timestep-bias-begin and --timestep-bias-end."
    )


def measure_image(picture: ImageRecord) -> ImageMeasurements:
    """Open an image once and measure it."""
    image = picture.open()
    return ImageMeasurements(
        picture.path.name,
        *image.size,
        perceptual_hash(image),
        perceptual_hash(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)),
        measure_sharpness(image),
    )


def list_warnings(pictures: Sequence[ImageRecord], *, resolution: int) -> list[str]:
    """A warning for everything that may spoil a run at `resolution` pixels a side."""
    measurements = [measure_image(picture) for picture in pictures]
    sentences: list[str] = []
    for group in find_near_duplicates(measurements):
        sentences.append(
            f"{_list_names(group)} are almost the same picture: keep one, or the run learns its details."
        )
    small = [image for image in measurements if min(image.width, image.height) < resolution]
    for image in small:
        sentences.append(
            f"{image.name} is {image.width} × {image.height}, smaller than the {resolution} pixels that the model "
            "works at."
        )
    blurred = [image for image in measurements if image.sharpness < SHARP]
    for image in blurred:
        sentences.append(
            f"{image.name} looks blurred (variance of the Laplacian {image.sharpness:.0f}, sharp pictures have over "
            f"{SHARP:.0f})."
        )
    bare = [picture.path.name for picture in pictures if not picture.caption]
    if bare and len(bare) < len(pictures):
        sentences.append(
            f"{_list_names(bare)} {_conjugate_have(bare)} no caption, others have: the instance prompt serves instead."
        )
    shapes = [image.width / image.height for image in measurements]
    if shapes and max(shapes) > DIFFERENT_SHAPES * min(shapes):
        lost = max(1 - min(shape, 1 / shape) for shape in shapes)
        sentences.append(
            f"The shapes differ much (width over height {min(shapes):.2f} to {max(shapes):.2f}): the square cut from "
            f"the middle loses up to {lost:.0%} of a picture."
        )
    return sentences


def list_caption_warnings(pictures: Sequence[ImageRecord], model: Backbone) -> list[str]:
    """Warnings about syntax in captions that is read as plain text, and about each caption that will be truncated.

    Text encoders load only where a caption is long.
    """
    with_t5 = any("T5EncoderModel" in str(part) for part in model.location.index.values())
    prompts = [
        TrainingPrompt(picture.caption, picture.caption, picture.caption_source)
        for picture in pictures
        if picture.caption
    ]
    sentences = describe_foreign_syntax(prompts)
    long = [prompt for prompt in prompts if len(PIECES.findall(prompt.text)) > LONG * (4 if with_t5 else 1)]
    return sentences + (describe_truncated(long, "[V]", "[V]", model.text_encoder) if long else [])


def say_of_captions(pictures: Sequence[ImageRecord], model: Backbone) -> None:
    """Print which syntax in captions or instructions is read as plain text, and which of them are truncated."""
    sentences = list_caption_warnings(pictures, model)
    for sentence in sentences[:SAID]:
        notify(sentence)
    if sentences[SAID:]:
        notify(f"The same holds for {format_count(len(sentences) - SAID, 'other caption')}.")


def measure_sharpness(image: Image.Image) -> float:
    """The variance of the Laplacian of the grey picture (Pech-Pacheco et al. 2000), the longer side at most 512."""
    grey = image.convert("L")
    grey.thumbnail((SHARP_SIDE, SHARP_SIDE), Image.Resampling.LANCZOS)
    pixels = np.asarray(grey, dtype=np.float64)
    if min(pixels.shape) < 3:
        return 0.0
    inner = pixels[1:-1, 1:-1]
    around = pixels[:-2, 1:-1] + pixels[2:, 1:-1] + pixels[1:-1, :-2] + pixels[1:-1, 2:]
    return float((around - 4 * inner).var())


def find_near_duplicates(measurements: Sequence[ImageMeasurements]) -> list[list[str]]:
    """Groups of pictures that are almost the same or mirror images, by name; each picture in one group at most."""
    group = list(range(len(measurements)))
    for i, first in enumerate(measurements):
        for j in range(i):
            second = measurements[j]
            if almost_equal(first.bits, second.bits) or almost_equal(first.mirrored, second.bits):
                old, new = group[i], group[j]
                group = [new if value == old else value for value in group]
    members: dict[int, list[str]] = {}
    for i, first in enumerate(measurements):
        members.setdefault(group[i], []).append(first.name)
    return [names for names in members.values() if len(names) > 1]


@dataclass(frozen=True)
class RunEstimate:
    """What a run will need. Bytes are those of tensors; Python and its libraries take a few hundred megabytes more.

    `phases` follow each other; `activations` are kept from forward to backward; `step_seconds` is None if no step
    was timed.
    """

    phases: Mapping[str, Phase]
    activations: int
    step_seconds: float | None
    steps: int

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs the most."""
        return max(phase.total_bytes for phase in self.phases.values())

    def sentences(self) -> list[str]:
        """The estimate in sentences."""
        largest = max(self.phases, key=lambda name: self.phases[name].total_bytes)
        sentences = [
            f"The default run keeps about {self.peak / GIB:.2g} GiB of tensors at its peak, while {largest} "
            f"(activations {self.activations / GIB:.2g} GiB); Python and its libraries take their own beside.",
            *format_phases(self.phases),
        ]
        if self.step_seconds is None:
            sentences.append("How long it takes is unknown: a step is timed here for small models only.")
        else:
            seconds = self.step_seconds * self.steps
            sentences.append(
                f"A step took {self.step_seconds:.2g} s here just now, so {self.steps} steps take about "
                f"{_format_duration(seconds)}, and encoding and previews some more."
            )
        return sentences


def estimate(model: Backbone, settings: Settings) -> RunEstimate:
    """The memory of a run from settings alone (nothing is loaded), and a timed step if the model is small."""
    account = MemoryEstimator(model, make_workload(model, settings), device=model.device.type)
    choice = make_choice(model, settings)
    step = account.step_bytes(choice.precision, choice.checkpointing)
    small = account.model_sizes(choice.precision).denoiser <= SMALL_MODEL * choice.dtype.itemsize
    seconds = time_step(model, settings) if small else None
    return RunEstimate(account.phases(choice), step.saved, seconds, settings.steps)


def time_step(model: Backbone, settings: Settings) -> float:
    """Seconds of one training step with arbitrary weights, on the run's device, after one warm-up step."""
    import torch

    from backbone.diffusion.losses import squared_error
    from backbone.training.fast import fast_steps
    from backbone.training.optimizer import make_adamw

    device, work = model.device.type, make_workload(model, settings)
    outline = model.family.spec(model.location, model.dtype)
    network = outline.denoiser.instantiate(device)
    trained = list(work.add_trainable(network))
    conditions = outline.blank_text(work.batch_size, device)
    if not trained:  # the embeddings are trained
        trained = [value.requires_grad_(True) for value in conditions.tensors() if value.is_floating_point()]
    noisy = torch.zeros(work.batch_size, *model.latent_shape, device=device)
    optimizer = make_adamw([{"params": trained, "lr": 1e-4}], weight_decay=0.01)
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        with fast_steps(network):
            cleanest = torch.zeros(work.batch_size, dtype=torch.long)
            prediction = model.predict(noisy, cleanest, conditions, denoiser=network)
        squared_error(prediction, noisy).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    return seconds


def _list_names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:5])
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _conjugate_have(names: Sequence[str]) -> str:
    return "has" if len(names) == 1 else "have"


def _format_duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} minutes"
