"""`customize clip --image PICTURE`: clips of a model that reads a picture and no words (Stable Video Diffusion)."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from backbone.cli.values.repeat import as_command
from backbone.distributed import processes
from backbone.io.console import UserError, notify
from backbone.io.progress import progress
from backbone.io.run_folder import check_new_folder, hold_new_folder, package_versions
from backbone.media.clips import import_av, write_film
from backbone.media.sources.decode import open_named
from backbone.media.transforms import crop_and_resize, to_image, to_tensor, working_size
from backbone.memory.clips import ClipChoice, ClipEstimator, plan_clip
from backbone.models.clips.animate import Still, animate, condition_on_stills
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, find_latent_size, resolve_sampling
from customize.clips.draw import CLIPS, name_film, publish
from customize.clips.picture_lora import count_bytes, load_loras, read_loras
from customize.clips.settings import ClipOptions
from customize.clips.sparse import find_crop

FPS = 7.0  # of the published models' training clips
NOT_USED = {  # an option without effect on a model that reads no words → why
    "negative": "reads no words to stay away from",
    "concepts": "takes no concepts, whose words it cannot read",
    "motion": "moves by itself",
    "context_length": "draws all frames together",
    "condition": "reads no maps",
    "camera": "follows no path",
    "image_at": "begins with its picture",
    "sparsectrl": "reads its picture itself",
}


def draw_pictures(options: ClipOptions) -> Path:
    """Write `p00-s00.webp` and its frames (picture, sample) …, sheet, report and record; the folder.

    Clip (i, j) depends on the picture, the seed, i and j alone. Raises `UserError`, before weights load, for a model
    that needs words, settings that it makes nothing of, a picture that cannot be read, a folder that is taken.
    """
    if processes.world_size() > 1:
        raise UserError("customize clip draws in one process. Start it without a launcher.")
    if options.mp4:
        import_av("--mp4")

    # All checks, before weights load
    model = open_for_pictures(options)
    pictures = [open_named(path) for path in options.images]
    options = resolve_sampling(options, model)
    options = replace(options, frames=options.frames or model.latent_shape[1], fps=options.fps or FPS)
    if options.guidance is not None and options.min_guidance > max(1.0, options.guidance):
        raise UserError(
            f"Guidance grows over the frames, from --min-guidance {options.min_guidance:g} to --guidance "
            f"{options.guidance:g}. Give a first one that is not above the last."
        )
    width, height = choose_size(model, pictures[0].size, options)
    options = replace(options, width=width, height=height, resolution=None)
    description = describe(model, options)
    check_new_folder(options.out, CLIPS, description)
    if options.frames > model.latent_shape[1]:
        notify(
            f"{model.location.name} was trained on {model.latent_shape[1]} frames together: {options.frames} may hold "
            "together less."
        )
    loras = read_loras(model, options.lora)
    if options.vram is not None:
        model, options = plan_for(model, options, options.vram, lora_bytes=count_bytes(loras))

    # Drawn clip by clip into a new folder
    began = time.perf_counter()
    load_loras(model.denoiser, loras, scale=options.scale)
    with hold_new_folder(
        options.out, CLIPS, description
    ) as folder:  # a stopped clip is drawn again from its beginning
        keys = [(i, j) for i in range(len(pictures)) for j in range(options.count)]
        latents = draw_latents(model, crop_pictures(options, pictures), keys, options)
        names = [path.name for path in options.images]
        requests, films = [Request(names[i], (i, j)) for i, j in keys], []
        for request, clip in zip(requests, latents, strict=True):
            films.append(
                [to_image(frame) for frame in model.decode_clip(clip, options.decode_chunk_size).cpu()]
            )
            write_film(folder / name_film(request), films[-1], options.fps, mp4=options.mp4)
        seconds = round(time.perf_counter() - began, 2)
        record = {**describe(model, options), "seconds": seconds, "versions": package_versions()}
        publish(folder, requests, names, films, record, {})
    return folder


def open_for_pictures(options: ClipOptions) -> Backbone:
    """The model; `UserError` for a text-conditioned one, and for settings that have no effect here."""
    model = Backbone.open(
        options.model or "moji",
        device=options.device,
        precision=options.precision,
        task="image-to-video",
        compile=options.compile,
    )
    name = model.location.name
    if model.reads_words:
        raise UserError(
            f"{name} is told in words what to draw. Give words, --motion and --sparsectrl beside the picture, or a "
            "model that reads a picture alone: --model svd."
        )
    for field, reason in NOT_USED.items():
        if getattr(options, field):
            flag = {"concepts": "concept"}.get(field, field).replace("_", "-")
            raise UserError(f"{name} {reason}, so --{flag} would change nothing. Leave it out.")
    return model


def choose_size(model: Backbone, picture: tuple[int, int], options: ClipOptions) -> tuple[int, int]:
    """The clip's (width, height): the options', else the picture's aspect ratio with the training size's pixels."""
    unit = model.factor * 2 ** (len(model.location.config("unet")["block_out_channels"]) - 1)
    area = prod(model.latent_shape[-2:]) * model.factor**2
    fitted = working_size(picture, area=area, unit=unit)
    width, height = options.size
    if width is None and height is not None:
        width = max(unit, round(height * picture[0] / picture[1] / unit) * unit)
    if height is None and width is not None:
        height = max(unit, round(width * picture[1] / picture[0] / unit) * unit)
    size = (width or fitted[0], height or fitted[1])
    find_latent_size(model, size)
    return size


@dataclass(frozen=True)
class ScaledPicture:
    """A picture at its clip's size, and before it was scaled down."""

    small: Image.Image
    original: Image.Image


def crop_pictures(options: ClipOptions, pictures: Sequence[Image.Image]) -> list[ScaledPicture]:
    """Pictures at the size of the clips; prints which were cropped."""
    assert options.width is not None and options.height is not None
    size, scaled_pictures = (options.width, options.height), []
    for path, picture in zip(options.images, pictures, strict=True):
        box = find_crop(path.name, picture.size, size)
        scaled_pictures.append(
            ScaledPicture(
                crop_and_resize(picture, size),
                picture.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3]))),
            )
        )
    return scaled_pictures


def draw_latents(
    model: Backbone,
    scaled_pictures: Sequence[ScaledPicture],
    keys: Sequence[tuple[int, int]],
    options: ClipOptions,
) -> list[Tensor]:
    """Latents [C, F, H, W] of every clip, in order; the denoiser is freed, since only decoding is left."""
    assert options.steps is not None and options.guidance is not None and options.sampler is not None
    stills = [
        Still(
            to_tensor(picture.small), options.fps, options.motion_bucket_id, options.noise_aug_strength,
            to_tensor(picture.original),
        )
        for picture in scaled_pictures
    ]  # fmt: skip
    conditions = condition_on_stills(model, stills, keys, options.seed)
    frames = Frames(options.frames, shared=options.shared_noise or 0.0)
    with progress(len(keys) * options.frames, "drawing frames") as bar:
        batches = animate(
            model,
            conditions,
            keys,
            steps=options.steps,
            guidance=options.guidance,
            min_guidance=options.min_guidance,
            seed=options.seed,
            frames=frames,
            sampler=options.sampler,
            guided=options.guided,
            batch=1 if model.placement.one_by_one else options.batch,
            advance=lambda clips: bar.advance_images(clips * options.frames),
        )
        latents = torch.cat(list(batches))
    model.free("denoiser")
    return list(latents)


def plan_for(
    model: Backbone, options: ClipOptions, size: float, *, lora_bytes: int = 0
) -> tuple[Backbone, ClipOptions]:
    """The model and the settings that the planner chose for a device of `size` GiB; the plan is printed.

    `lora_bytes` are the bytes of its LoRAs.
    """
    assert options.width is not None and options.height is not None
    places = (options.height // model.factor, options.width // model.factor)
    estimator = ClipEstimator(
        model, frames=options.frames, places=places, device=model.device.type, adapter_bytes=lora_bytes
    )
    plan = plan_clip(estimator, size, ClipChoice(options.decode_chunk_size or options.frames))
    for line in plan.lines():
        notify(line)
    placed = Backbone(
        model.location, model.family, device=model.device, dtype=model.dtype, placement=plan.choice.placement
    )
    return placed, replace(options, decode_chunk_size=plan.choice.chunk)


def describe(model: Backbone, options: ClipOptions) -> dict[str, Any]:
    """The clips' settings for the record, with the command that repeats them."""
    repeated = replace(options, out=None, as_json=False)
    return {
        "command": as_command("customize clip", repeated),
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": [],
        "motion": "",
        "images": [str(path) for path in options.images],
        "frames": options.frames,
        "fps": options.fps,
        "motion_bucket_id": options.motion_bucket_id,
        "noise_aug_strength": options.noise_aug_strength,
        "min_guidance": options.min_guidance,
        **({"lora": [str(path) for path in options.lora], "scale": options.scale} if options.lora else {}),
        **options.facts(),
        "guided": list(options.guided),
    }
