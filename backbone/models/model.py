"""`Backbone`: a latent diffusion model of any family.

    model = Backbone.open("moji")
    text = model.encode_prompts(["a dog in the snow"])
    latents = ddim(noise, model.predictor(text), model.schedule(25))
    pictures = model.decode(latents)

Parts load when first used and can be freed again, so a training run never holds the encoders and the denoiser together.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any, Literal, NamedTuple, cast

import torch
from PIL.Image import Image
from torch import Tensor, nn

from backbone.cli.sampling import Sampler, default_sampler
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate, Level, Predict, Schedule, estimate
from backbone.diffusion.transfer import send
from backbone.distributed import processes
from backbone.distributed.device import resolve_device, resolve_dtype
from backbone.families.base import (
    NO_IMAGES,
    Family,
    ImageEncoder,
    ImageInput,
    ImageToVideoFamily,
    NoisePath,
    SeeingTextEncoder,
    TextEncoder,
)
from backbone.families.components.latents import LatentSpace, latent_channels, latent_space, pixels_per_latent
from backbone.families.components.loading import refuse_not_finite
from backbone.families.components.noise_paths import read_sampling, say_nearest_sampler
from backbone.families.location import Location
from backbone.families.registry import families
from backbone.families.unet.family import UNetFamily, widen_input
from backbone.families.unet.row_lora import find_row_lora
from backbone.io.console import UserError, notify_once, quote, suggest_value
from backbone.io.progress import progress
from backbone.models.clips.motion import frames_as_rows, rows_as_clips, rows_as_frames
from backbone.models.compiled import CompiledBlocks
from backbone.models.defaults import FILE, read_defaults
from backbone.models.few_step.adapter import fuse_lora, read_few_step
from backbone.models.fingerprint import Fingerprints, make_fingerprints
from backbone.models.locate import ADAPTER, OWN, locate
from backbone.models.placement import Placement, enable_tiling, place_denoiser

PARTS = ("denoiser", "autoencoder", "text_encoder", "image_encoder")
PHOTOGRAPH = 4  # times the side of the embedded models' images: larger ones count as photographs
DECODED_AT_ONCE = 512 * 512  # pixels
EXPORTS = {  # the beginnings of pipelines' names → what they were exported for
    "Onnx": "ONNX Runtime", "ORT": "ONNX Runtime", "OV": "OpenVINO", "Flax": "Flax",
}  # fmt: skip
LEAST_TILE = 256  # pixels a side; in smaller tiles an autoencoder of photographs is inaccurate
USUAL_GUIDANCE, MOST_GUIDANCE = 12, 30  # the largest usual scale, and the one above which images burn


def decode_batch_size(places: Sequence[int], factor: int) -> int:
    """The number of latents of this size (…, H, W) decoded in one call; a latent is `factor` pixels a side."""
    return max(1, DECODED_AT_ONCE // (math.prod(places) * factor**2))


# What a model is opened for. `edit` reads an image beside the prompt. `learn-to-edit` gives a UNet that reads none
# input channels for the image's latents, whose weights begin at zero. `image-to-video` needs no prompt.
Task = Literal["text-to-image", "edit", "learn-to-edit", "image-to-video"]


def say_odd_guidance(guidance: float) -> None:
    """Warn of a guidance scale below 1, which weakens the prompt (0 ignores it), or so high that images burn."""
    if guidance > MOST_GUIDANCE:
        intended = suggest_value(guidance, USUAL_GUIDANCE)
        notify_once(f"At guidance {guidance:g} images burn out: 2 to {USUAL_GUIDANCE} is usual.{intended}")
    if guidance < 1:
        effect = (
            f"counts for {guidance:g} of what it does without guidance"
            if guidance
            else "has no effect at all"
        )
        notify_once(
            f"At guidance {guidance:g} the prompt {effect}. Without guidance is --guidance 1 here, where other "
            "programs take 0 for it too."
        )


class Posterior(NamedTuple):
    """The encoder's posterior: mean and standard deviation [B, …] of latents of about unit variance."""

    mean: Tensor
    std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Sample latents [B, C, H, W]."""
        noise = torch.randn(self.mean.shape, generator=generator, dtype=torch.float32)
        noise = send(noise, self.mean.device)
        return self.mean + self.std * noise


class Backbone:
    """A latent diffusion model: its location and family, and the device and precision it works in."""

    def __init__(
        self,
        location: Location,
        family: Family,
        *,
        device: torch.device,
        dtype: torch.dtype,
        placement: Placement | None = None,
        resolution: int = 0,
        widened: bool = False,
        compile: bool = False,
    ) -> None:
        self.location = location
        self.family = family
        self.device = device
        self.dtype = dtype
        self.placement = placement or Placement()
        self.requested_resolution = resolution
        self.widened = widened  # a text-to-image UNet with input channels for an image's latents
        self.compiles = compile  # every prediction runs the denoiser's blocks compiled
        self._compiled: tuple[nn.Module, CompiledBlocks] | None = None
        self.text_learned = False  # new words or adapters: cached prompts no longer hold
        self.subject_adapters: set[str] = set()  # the denoiser's adapters that carry a subject

    def find_lora_layers(self, name: str) -> tuple[str, ...]:
        """The layers of a set that `--lora-layers` can name, as peft's `target_modules`; `UserError` for another."""
        layers = self.family.lora_targets.get(name)
        if layers is None:
            targets = ", ".join(self.family.lora_targets)
            raise UserError(f"There is no set of layers called {name}. Choose one of {targets}.")
        return layers

    def __repr__(self) -> str:
        family, side = type(self.family).__name__, self.resolution
        dtype = str(self.dtype).removeprefix("torch.")
        return f"<{self.location.name}: {family}, {side} px, {dtype} on {self.device}>"

    @classmethod
    def open(
        cls,
        model: str | os.PathLike[str] = "moji",
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        placement: Placement | None = None,
        resolution: int = 0,
        task: Task = "text-to-image",
        compile: bool = False,
    ) -> Backbone:
        """Find a model: a name (`moji`, `sd15` …), a diffusers folder, a checkpoint file, or a hub id.

        Loads no weights yet.

        `precision` is fp32, bf16, fp16 or auto: bf16 where the processor has it, else fp16 on a GPU and fp32 on a CPU.
        `placement` saves memory. The model works at `resolution` pixels a side, 0: at its own. With `compile` every
        prediction runs the denoiser's repeated blocks compiled. `task` is what the model must be able to do (`Task`).

        Raises `UserError` when there is no such model, when its family is not supported, when it is made for another
        task, or when it cannot work at that resolution.
        """
        if not isinstance(model, (str, os.PathLike)) or not isinstance(resolution, int):
            wrong = model if isinstance(resolution, int) else resolution
            raise UserError(
                f"{type(wrong).__name__} is no model's name or folder, and no number of pixels. Open one as "
                'backbone.open("moji", resolution=128).'
            )
        location, widen = locate(os.fspath(model)), task == "learn-to-edit"
        pipeline = location.index.get("_class_name", "")
        for family in families():
            if pipeline in family.pipeline_classes:
                resolved = resolve_device(str(device))
                dtype = resolve_dtype(precision, resolved)
                opened = cls(
                    location, family, device=resolved, dtype=dtype, placement=placement, resolution=resolution,
                    widened=widen and isinstance(family, UNetFamily) and pipeline not in family.reads_images,
                    compile=compile,
                )  # fmt: skip
                opened.refuse_other_task(task)
                opened.refuse_resolution()
                if location.parts:
                    from backbone.families.single_file.split_files import refuse_other_parts

                    refuse_other_parts(location)
                return opened
        for prefix, runtime in EXPORTS.items():
            if pipeline and pipeline.startswith(prefix):
                raise UserError(
                    f"{location.name} is a {pipeline}, exported for {runtime}, which is not read. Use the diffusers "
                    "model that it was exported from."
                )
        served = ", ".join(family.name for family in families())
        raise UserError(
            f"{location.name} is a {pipeline or 'model of unknown kind'}; this version works with {served}."
        )

    @cached_property
    def denoiser(self) -> nn.Module:
        """The network that predicts, in the working precision, its weights frozen."""
        if self.location.name not in OWN and (licence := self.family.licence(self.location)):
            notify_once(licence)
        with _lock_loading(self.location.name):
            loaded = self.family.denoiser(self.location, self.dtype).eval().requires_grad_(False)
            refuse_not_finite(loaded, "denoiser", self.location.name)
            if self.location.few_step is not None:
                fuse_lora(self.location.few_step / ADAPTER, loaded)
            return place_denoiser(self.widen(loaded), self.placement, self.device)

    @property
    def compiles_usually(self) -> bool:
        """Whether training compiles the blocks by default: on a GPU that holds the whole denoiser."""
        return self.device.type == "cuda" and self.holds_whole_denoiser

    @property
    def holds_whole_denoiser(self) -> bool:
        """Whether the device holds all of the denoiser's weights, not quantised, offloaded or sharded."""
        return not (self.placement.quantize or self.placement.offload or processes.is_sharded())

    def compiled_blocks(self, denoiser: nn.Module) -> AbstractContextManager[None]:
        """A context in which this network's blocks run compiled if the model was opened so; each is compiled once."""
        if not self.compiles:
            return nullcontext()
        if self._compiled is None or self._compiled[0] is not denoiser:
            self._compiled = denoiser, CompiledBlocks([denoiser])
        return self._compiled[1].active()

    def widen(self, denoiser: nn.Module) -> nn.Module:
        """The denoiser, with the input channels for an image that `learn-to-edit` gives this model."""
        return widen_input(denoiser, latent_channels(self.autoencoder_config)) if self.widened else denoiser

    @cached_property
    def autoencoder(self) -> nn.Module:
        """The VAE: images to latents and back."""
        with _lock_loading("the autoencoder"):
            loaded = self.family.autoencoder(self.location, self.dtype).eval().requires_grad_(False)
            refuse_not_finite(loaded, "autoencoder", self.location.name)
        if self.dtype is torch.float16 and next(loaded.parameters()).dtype is torch.float32:
            notify_once(f"The autoencoder of {self.location.name} works in fp32: in fp16 it overflows.")
        if self.placement.tiling:
            enable_tiling(loaded, side := self.resolution // 2)
            if side < LEAST_TILE:
                notify_once(
                    f"In tiles of {side} pixels the autoencoder of {self.location.name} sees little of an image: what "
                    "it encodes and decodes is off by several percent."
                )
        return loaded.to(self.device)

    @cached_property
    def text_encoder(self) -> TextEncoder:
        """Prompts to named tensors. Small encoders always work in fp32: they run once per prompt."""
        device = torch.device("cpu") if self.placement.text_on_cpu else self.device
        with _lock_loading("the text encoder"):
            loaded = self.family.text_encoder(self.location, self.dtype)
            for slot in loaded.all_slots:
                refuse_not_finite(slot.model, slot.name, self.location.name)
            return loaded.to(device)

    @cached_property
    def image_encoder(self) -> ImageEncoder:
        """The image encoder of an image-to-video model."""
        assert isinstance(self.family, ImageToVideoFamily)
        with _lock_loading("the image encoder"):
            return self.family.image_encoder(self.location, self.dtype).to(self.device)

    @cached_property
    def path(self) -> NoisePath:
        """The noise path that the model was trained on."""
        return self.family.path(self.location)

    @cached_property
    def defaults(self) -> dict[str, Any]:
        """Recommended settings: the `limner.json` beside the model over those of its family."""
        general = {
            "steps": 30,
            "guidance": 7.5,
            "train_steps": 500,
            "learning_rate": 1e-4,
            "rank": 8,
            "batch": 1,
        }
        family = self.family.sampling_defaults(self.location) | read_sampling(self.location)
        return general | family | self._named_defaults

    @cached_property
    def _named_defaults(self) -> dict[str, Any]:
        """Settings of the `limner.json` beside the model, and of a few-step model's own file."""
        file = self.location.local(FILE)
        defaults = read_defaults(file) if file else {}
        few_step = {} if self.location.few_step is None else read_few_step(self.location.few_step)
        if few_step:
            few_step.pop("base")
            defaults.pop("early_scale", None)  # measured for the base alone
        return defaults | few_step

    def choose_sampler(
        self,
        requested: Sampler | None = None,
        choose: Callable[[Mapping[str, Any]], Sampler] = default_sampler,
    ) -> Sampler:
        """The requested sampler, or `choose` of the model's defaults, reported by `say_own_sampler`."""
        if requested is not None:
            return requested
        sampler = choose(self.defaults)
        self.say_own_sampler(sampler)
        return sampler

    def say_own_sampler(self, sampler: Sampler) -> None:
        """Say that the model's scheduler takes other steps than `sampler`, chosen because none was requested."""
        if "sampler" not in self._named_defaults:
            say_nearest_sampler(self.location, sampler)

    @property
    def fingerprint(self) -> str:
        """The hash of the model's weights and settings (`compute_fingerprint`)."""
        return self.fingerprints[0]

    def has_fingerprint(self, recorded: str) -> bool:
        """Whether a record's fingerprint is this model's, also one of an earlier version."""
        return recorded in self.fingerprints

    @cached_property
    def fingerprints(self) -> Fingerprints:
        """This model's fingerprint, and those in records of earlier versions."""
        return make_fingerprints(self.location)

    def renew_fingerprint(self, recorded: Any) -> Any:
        """This model's current fingerprint for any recorded one of it; another model's unchanged."""
        return self.fingerprint if recorded in self.fingerprints else recorded

    def free(self, *parts: str) -> None:
        """Unload parts; they load again when used. Text encoders with learned embeddings or adapters stay."""
        for part in parts:
            assert part in PARTS
            if part != "text_encoder" or not self.text_learned:
                self.__dict__.pop(part, None)
        if "denoiser" in parts:
            self._compiled = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @cached_property
    def factor(self) -> int:
        """Pixels a side for one latent: the VAE's scale factor."""
        return pixels_per_latent(self.autoencoder_config)

    @cached_property
    def autoencoder_config(self) -> dict[str, Any]:
        """The autoencoder's config, read without its weights."""
        return self.location.config("vae")

    @cached_property
    def latent_shape(self) -> tuple[int, ...]:
        """The shape of a latent at the resolution the model works at, its own or the requested one.

        (C, H, W) of an image.
        """
        *channels, height, width = self.family.latent_shape(self.location)
        if self.requested_resolution:
            height = width = self.requested_resolution // self.factor
        return *channels, height, width

    @property
    def resolution(self) -> int:
        """Pixels a side of the images that the model works on."""
        return self.latent_shape[-2] * self.factor

    @property
    def own_resolution(self) -> int:
        """Pixels a side of the pictures that the model was trained on."""
        return self.family.latent_shape(self.location)[-2] * self.factor

    def describe_misfit(self, sizes: Sequence[tuple[int, int]]) -> str:
        """A warning where images of these sizes (width, height) are photographs and the model is a toy; else ""."""
        photographs = [size for size in sizes if min(size) >= PHOTOGRAPH * self.own_resolution]
        if self.location.name not in OWN or 2 * len(photographs) < max(len(sizes), 1):
            return ""
        width, height = photographs[0]
        return (
            f"{width} × {height} pixels are a photograph's, and {self.location.name} knows only a toy world of "
            f"{self.own_resolution} pixels a side. For photographs add: --model sd15 (or --model sdxl, on a GPU)."
        )

    @property
    def most_references(self) -> int:
        """The most images that the denoiser reads beside the prompt."""
        return 1 if self.widened else self._images.max_images

    @property
    def text_sees_images(self) -> bool:
        """Whether the text encoder also reads the images beside a prompt."""
        return self._images.text_sees

    @property
    def _images(self) -> ImageInput:
        return self.family.reads_images.get(self.location.index.get("_class_name", ""), NO_IMAGES)

    @property
    def edits_by_instruction(self) -> bool:
        """Whether the denoiser reads an image beside the prompt."""
        return self.most_references > 0

    @property
    def reads_as_channels(self) -> bool:
        """Whether the denoiser reads that image as further channels of the noisy latents, so that it is required."""
        return self.edits_by_instruction and isinstance(self.family, UNetFamily)

    @property
    def reads_words(self) -> bool:
        """Whether prompts condition it; otherwise it makes a clip of a picture."""
        return not isinstance(self.family, ImageToVideoFamily)

    def refuse_other_task(self, task: Task = "text-to-image") -> None:
        """`UserError` for a denoiser of another task, such as inpainting, upscaling or image to video."""
        name, edits = self.location.name, task in ("edit", "learn-to-edit")
        if not self.reads_words:
            if task != "image-to-video":
                raise UserError(
                    f"{name} makes a clip of a picture and reads no words, so it cannot be used here. Use it with "
                    f"customize clip --image PICTURE --model {quote(name)}, or name another model."
                )
            return
        if self.reads_as_channels and not edits:
            raise UserError(
                f"{name} edits an image by an instruction and draws nothing without one. Use it with edit instruct."
            )
        if edits and not self.edits_by_instruction:
            raise UserError(
                f"{name} reads no image beside the prompt, so it follows no instruction. Name a model that does "
                "(--model timbrooks/instruct-pix2pix), or a run of customize train --pairs (--concept RUN), or "
                "describe both images with edit invert-and-replace."
            )
        self._refuse_other_channels()

    def _refuse_other_channels(self) -> None:
        """`UserError` for a denoiser that reads other channels than noisy latents and those of an image to edit."""
        name = self.location.name
        part = "transformer" if "transformer" in self.location.index else "unet"
        if part not in self.location.index:
            return  # a checkpoint file, checked when it was recognised
        reads = self.location.config(part).get("in_channels")
        latents = latent_channels(self.autoencoder_config)
        widths = (2 * latents,) if self.reads_as_channels and not self.widened else (latents, 4 * latents)
        if reads is None or int(reads) in widths:
            return  # FLUX reads 2 × 2 latents as one
        description = "an inpainting model" if int(reads) == 2 * latents + 1 else "a model for another task"
        raise UserError(
            f"The {part} of {name} reads {reads} channels and its latents have {latents}: it is {description}. "
            "Name the text-to-image model that it was made from."
        )

    def refuse_resolution(self) -> None:
        """`UserError` for a resolution at which the model cannot work."""
        if not self.requested_resolution:
            return
        side, step = self.requested_resolution, min(64, self.own_resolution // 4)
        if side % step:
            near = max(step, round(side / step) * step)
            raise UserError(
                f"{self.location.name} halves its latents several times, so --resolution {side} has to be a "
                f"multiple of {step}. The nearest is {near}."
            )
        if "transformer" not in self.location.index:
            return
        config = self.location.config("transformer")
        places = config.get("pos_embed_max_size")  # learned positions a side
        if places and side > places * int(config["patch_size"]) * self.factor:
            most = places * int(config["patch_size"]) * self.factor
            raise UserError(
                f"{self.location.name} has positions for {most} pixels a side, and --resolution {side} needs more. "
                f"Ask for {most} or less."
            )

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Posterior:
        """Images [B, 3, 8H, 8W] in −1…1 to the posterior of their latents [B, C, H, W], of about unit variance."""
        dtype = next(self.autoencoder.parameters()).dtype
        pictures = send(pictures, self.device).to(dtype).contiguous(memory_format=torch.channels_last)
        return Posterior(*self.latent_space.encode(self.autoencoder, pictures))

    def encode_reference(self, pictures: Tensor) -> Tensor:
        """Images [B, 3, 8H, 8W] in −1…1 to reference latents [B, C, H, W], read beside the noisy ones."""
        return self.as_reference(self.encode(pictures).mean)

    def as_reference(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] of an image as the denoiser reads them beside noisy ones; as channels, unscaled."""
        space = self.latent_space
        return latents / space.scale + space.shift if self.reads_as_channels else latents

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] to images [B, 3, 8H, 8W], float32 in −1…1, at most DECODED_AT_ONCE pixels at a time."""
        # All frames of a sample together
        portions = latents.split(decode_batch_size(latents[0, 0].shape, self.factor))
        return torch.cat([self.decode_with_gradients(portion) for portion in portions])

    def encode_clip(self, clip: Tensor) -> Tensor:
        """A clip [F, 3, 8H, 8W] in −1…1 to the means of its frames' latents [C, F, H, W], a few frames at a time."""
        portions = clip.split(max(1, DECODED_AT_ONCE // clip[0, 0].numel()))
        return torch.cat([self.encode(portion).mean for portion in portions]).transpose(0, 1)

    def decode_clip(self, latents: Tensor, chunk: int = 0) -> Tensor:
        """Latents [C, F, H, W] of a clip to frames [F, 3, 8H, 8W], at most `chunk` of them at a time.

        0: as many as fit, or all where the decoder works over time.
        """
        rows = latents.transpose(0, 1)
        if self.latent_space.over_time:
            with torch.no_grad():
                portions = rows.split(chunk or len(rows))
                return torch.cat([self.decode_with_gradients(portion) for portion in portions])
        return torch.cat([self.decode(portion) for portion in rows.split(chunk or len(rows))])

    def decode_with_gradients(self, latents: Tensor) -> Tensor:
        """Latents [B, C, H, W] to images [B, 3, 8H, 8W] in −1…1, all at once, with gradients through the decoder."""
        dtype = next(self.autoencoder.parameters()).dtype
        decoded = self.latent_space.decode(self.autoencoder, send(latents, self.device), dtype)
        return decoded.float().clamp(-1, 1)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str], images: Sequence[Image] = ()) -> Conditions:
        """Encode prompts to the network's conditioning, one row for each.

        `images` go with every prompt to a text encoder that reads images.
        """
        if images:
            return Conditions(cast(SeeingTextEncoder, self.text_encoder)(prompts, images)).to(self.device)
        return Conditions(self.text_encoder(prompts)).to(self.device)

    def predict(
        self, noisy: Tensor, index: Tensor, conditions: Conditions, *, denoiser: nn.Module | None = None
    ) -> Tensor:
        """The network's raw prediction [B, …] in float32, in its own parameterisation (`path.prediction_type`).

        noisy       [B, …] at the levels `index` [B] of the model's own noise path, `path.levels`
        conditions  one row a sample
        denoiser    another network of the same kind, in place of the model's own
        """
        time = self.path.levels.time
        assert time is not None
        network = self.denoiser if denoiser is None else denoiser
        return self._predict_at(noisy, time[index], conditions, network)

    def predictor(self, conditions: Conditions) -> Predict:
        """Bind the conditions, one row a sample: (noisy, level) → Estimate, for samplers."""

        def predict(noisy: Tensor, level: Level) -> Estimate:
            assert level.time is not None
            prediction = self._predict_at(noisy, level.time, conditions, self.denoiser)
            return estimate(prediction, noisy, level, self.path.prediction_type)

        return predict

    def _predict_at(self, noisy: Tensor, time: Tensor, conditions: Conditions, denoiser: nn.Module) -> Tensor:
        """Call a denoiser, in training and sampling, at times [] or [B], in the working precision.

        A network of pictures reads the frames of clips [B, C, F, H, W] as rows, each with its clip's conditions.
        """
        conditions = conditions.at(time)
        time = send(time, noisy.device)
        frames = noisy.shape[2] if noisy.ndim > len(self.latent_shape) + 1 else 0
        controls = conditions.controls
        if frames:
            noisy, time = frames_as_rows(noisy), time.repeat_interleave(frames) if time.ndim else time
            conditions = conditions.for_frames(frames)
        network = self.family.network(denoiser, conditions)
        # Compiled blocks would miss hooks that are added and removed
        blocks = nullcontext() if any(map(find_row_lora, controls)) else self.compiled_blocks(denoiser)
        with self.autocast(), rows_as_clips(denoiser, frames, controls), blocks:
            prediction = network(noisy, time).float()
        return rows_as_frames(prediction, frames) if frames else prediction

    def guided_predictor(self, conditions: Conditions, empty: Conditions, guidance: float) -> Predict:
        """Bind the conditions with guidance.

        Classifier-free guidance in one call of twice the batch (Ho & Salimans 2022); a guidance-distilled network is
        conditioned on the scale and called once, without `empty`. Where `empty` has no controls, it gets those of
        `conditions`.
        """
        distilled = self.family.embed_guidance(self.denoiser, conditions, guidance)
        if distilled is not None or guidance == 1:
            return self.predictor(conditions if distilled is None else distilled)
        say_odd_guidance(guidance)
        if not empty.controls:
            unprompted = (control.unprompted() for control in conditions.controls)
            empty = replace(empty, controls=tuple(unprompted))
        predict_both = self.predictor(Conditions.cat([conditions, empty]))

        def predict(noisy: Tensor, level: Level) -> Estimate:
            estimates = predict_both(torch.cat([noisy, noisy]), level)
            (clean, clean_empty), (noise, noise_empty) = (part.chunk(2) for part in estimates)
            conditional, unconditional = Estimate(clean, noise), Estimate(clean_empty, noise_empty)
            return self.path.guide(conditional, unconditional, guidance, level)

        return predict

    def schedule(self, steps: int, *, size: tuple[int, int] | None = None) -> Schedule:
        """The noise schedule [S + 1] of a sampler with S steps, noisy to clean, as the model's own scheduler spaces it.

        Some schedulers depend on the latents' size (H, W), the model's own if left out. The schedule is in CPU memory,
        so that decisions by level do not wait for the device. Raises `UserError` for more steps than the model was
        trained with.
        """
        height, width = size or self.latent_shape[-2:]
        try:
            return self.path.schedule(steps, (height, width))
        except ValueError as error:
            raise UserError(
                f"{self.location.name} cannot take {steps} steps: {error} Give others."
            ) from error

    def autocast(self) -> AbstractContextManager[Any]:
        """Autocast to half precision, for fp32 parameters on a half-precision base; no effect in fp32."""
        if self.dtype is torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    @property
    def latent_space(self) -> LatentSpace:
        """The mapping between the autoencoder's latents and the network's."""
        return latent_space(self.autoencoder)


@contextmanager
def _lock_loading(part: str) -> Iterator[None]:
    """Lock the loading of a component: libraries patch torch's classes for all threads while they load."""
    with _LOADING, progress(None, f"loading {part}", brief=True):
        yield


_LOADING = threading.RLock()
open = Backbone.open  # as `backbone.open("moji")`
