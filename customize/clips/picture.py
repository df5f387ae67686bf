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
from backbone.io.run_folder import hold_new_folder, package_versions, refuse_new_folder
from backbone.media.clips import import_av, write_film
from backbone.media.sources.decode import open_named
from backbone.media.transforms import crop_and_resize, to_image, to_tensor, working_size
from backbone.memory.clips import ClipChoice, ClipEstimator, plan_clip
from backbone.models.clips.animate import Still, animate, condition_on_stills
from backbone.models.model import Backbone
from backbone.models.sample import Frames, Request, latent_size, resolve_sampling
from customize.clips.draw import CLIPS, film_name, publish
from customize.clips.picture_lora import count_bytes, load_loras, read_loras
from customize.clips.settings import ClipOptions
from customize.clips.sparse import find_crop

FPS = 7.0  # at which the published models were trained
NOT_USED = {  # what a model without words makes nothing of, and what that is
    "negative": "reads no words to stay away from",
    "concepts": "takes no concepts, whose words it cannot read",
    "motion": "moves by itself",
    "context_length": "draws all frames together",
    "condition": "reads no maps",
    "camera": "follows no path",
    "image_at": "begins with its picture",
    "sparsectrl": "reads its picture itself",
}


def draw_pictures(asked: ClipOptions) -> Path:
    """Write `p00-s00.webp` and its frames (picture, sample) …, sheet, report and record; the folder.

    Clip (i, j) depends on the picture, the seed, i and j alone. Raises `UserError`, before weights load, for a model
    that needs words, settings that it makes nothing of, a picture that cannot be read, a folder that is taken.
    """
    if processes.world_size() > 1:
        raise UserError("customize clip draws in one process. Start it without a launcher.")
    if asked.mp4:
        import_av("--mp4")

    # Everything that can be refused, before weights load
    model = open_for_pictures(asked)
    pictures = [open_named(path) for path in asked.images]
    asked = resolve_sampling(asked, model)
    asked = replace(asked, frames=asked.frames or model.latent_shape[1], fps=asked.fps or FPS)
    if asked.guidance is not None and asked.min_guidance > max(1.0, asked.guidance):
        raise UserError(
            f"Guidance grows over the frames, from --min-guidance {asked.min_guidance:g} to --guidance "
            f"{asked.guidance:g}. Give a first one that is not above the last."
        )
    width, height = choose_size(model, pictures[0].size, asked)
    asked = replace(asked, width=width, height=height, resolution=None)
    what = describe(model, asked)
    refuse_new_folder(asked.out, CLIPS, what)
    if asked.frames > model.latent_shape[1]:
        notify(
            f"{model.location.name} was trained on {model.latent_shape[1]} frames together: {asked.frames} may hold "
            "together less."
        )
    loras = read_loras(model, asked.lora)
    if asked.vram is not None:
        model, asked = plan_for(model, asked, asked.vram, beside=count_bytes(loras))

    # Drawn clip by clip into a new folder
    began = time.perf_counter()
    load_loras(model.denoiser, loras, scale=asked.scale)
    with hold_new_folder(asked.out, CLIPS, what) as folder:  # of a clip that was stopped all is drawn anew
        keys = [(i, j) for i in range(len(pictures)) for j in range(asked.count)]
        latents = draw_latents(model, show_pictures(asked, pictures), keys, asked)
        names = [path.name for path in asked.images]
        requests, films = [Request(names[i], (i, j)) for i, j in keys], []
        for request, clip in zip(requests, latents, strict=True):
            films.append(
                [to_image(frame) for frame in model.decode_clip(clip, asked.decode_chunk_size).cpu()]
            )
            write_film(folder / film_name(request), films[-1], asked.fps, mp4=asked.mp4)
        seconds = round(time.perf_counter() - began, 2)
        record = {**describe(model, asked), "seconds": seconds, "versions": package_versions()}
        publish(folder, requests, names, films, record, {})
    return folder


def open_for_pictures(asked: ClipOptions) -> Backbone:
    """The model; `UserError` for one that is told in words what to draw, and for settings that do nothing here."""
    model = Backbone.open(
        asked.model or "moji",
        device=asked.device,
        precision=asked.precision,
        task="image-to-video",
        compile=asked.compile,
    )
    name = model.location.name
    if model.reads_words:
        raise UserError(
            f"{name} is told in words what to draw. Give words, --motion and --sparsectrl beside the picture, or a "
            "model that reads a picture alone: --model svd."
        )
    for field, why in NOT_USED.items():
        if getattr(asked, field):
            flag = {"concepts": "concept"}.get(field, field).replace("_", "-")
            raise UserError(f"{name} {why}, so --{flag} would change nothing. Leave it out.")
    return model


def choose_size(model: Backbone, picture: tuple[int, int], asked: ClipOptions) -> tuple[int, int]:
    """The clip's (width, height): as asked for, else in the picture's shape with as many pixels as was trained on."""
    unit = model.factor * 2 ** (len(model.location.config("unet")["block_out_channels"]) - 1)
    area = prod(model.latent_shape[-2:]) * model.factor**2
    own = working_size(picture, area=area, unit=unit)
    width, height = asked.size
    if width is None and height is not None:
        width = max(unit, round(height * picture[0] / picture[1] / unit) * unit)
    if height is None and width is not None:
        height = max(unit, round(width * picture[1] / picture[0] / unit) * unit)
    size = (width or own[0], height or own[1])
    latent_size(model, size)
    return size


@dataclass(frozen=True)
class FirstPicture:
    """A picture as its clip begins with it, and before it was made so small."""

    small: Image.Image
    whole: Image.Image


def show_pictures(asked: ClipOptions, pictures: Sequence[Image.Image]) -> list[FirstPicture]:
    """Pictures at the size of the clips; that one was cropped for it is said."""
    assert asked.width is not None and asked.height is not None
    size, shown = (asked.width, asked.height), []
    for path, picture in zip(asked.images, pictures, strict=True):
        box = find_crop(path.name, picture.size, size)
        shown.append(
            FirstPicture(
                crop_and_resize(picture, size),
                picture.crop((round(box[0]), round(box[1]), round(box[2]), round(box[3]))),
            )
        )
    return shown


def draw_latents(
    model: Backbone, shown: Sequence[FirstPicture], keys: Sequence[tuple[int, int]], asked: ClipOptions
) -> list[Tensor]:
    """Latents [C, F, H, W] of every clip, in order; the denoiser is freed, since only decoding is left."""
    assert asked.steps is not None and asked.guidance is not None and asked.sampler is not None
    stills = [
        Still(
            to_tensor(one.small), asked.fps, asked.motion_bucket_id, asked.noise_aug_strength,
            to_tensor(one.whole),
        )
        for one in shown
    ]  # fmt: skip
    conditions = condition_on_stills(model, stills, keys, asked.seed)
    frames = Frames(asked.frames, shared=asked.shared_noise or 0.0)
    with progress(len(keys) * asked.frames, "drawing frames") as bar:
        drawn = animate(
            model,
            conditions,
            keys,
            steps=asked.steps,
            guidance=asked.guidance,
            min_guidance=asked.min_guidance,
            seed=asked.seed,
            frames=frames,
            sampler=asked.sampler,
            guided=asked.guided,
            batch=1 if model.placement.one_by_one else asked.batch,
            advance=lambda clips: bar.advance_images(clips * asked.frames),
        )
        latents = torch.cat(list(drawn))
    model.free("denoiser")
    return list(latents)


def plan_for(
    model: Backbone, asked: ClipOptions, size: float, *, beside: int = 0
) -> tuple[Backbone, ClipOptions]:
    """The model and the settings for a device of `size` GiB, as the plan, which is said, has them.

    `beside` are the bytes of its LoRAs.
    """
    assert asked.width is not None and asked.height is not None
    places = (asked.height // model.factor, asked.width // model.factor)
    estimator = ClipEstimator(
        model, frames=asked.frames, places=places, device=model.device.type, beside=beside
    )
    plan = plan_clip(estimator, size, ClipChoice(asked.decode_chunk_size or asked.frames))
    for line in plan.lines():
        notify(line)
    placed = Backbone(
        model.location, model.family, device=model.device, dtype=model.dtype, placement=plan.choice.placement
    )
    return placed, replace(asked, decode_chunk_size=plan.choice.chunk)


def describe(model: Backbone, asked: ClipOptions) -> dict[str, Any]:
    """What clips were asked for, the command that repeats it among it."""
    kept = replace(asked, out=None, as_json=False)
    return {
        "command": as_command("customize clip", kept),
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": [],
        "motion": "",
        "images": [str(path) for path in asked.images],
        "frames": asked.frames,
        "fps": asked.fps,
        "motion_bucket_id": asked.motion_bucket_id,
        "noise_aug_strength": asked.noise_aug_strength,
        "min_guidance": asked.min_guidance,
        **({"lora": [str(path) for path in asked.lora], "scale": asked.scale} if asked.lora else {}),
        **asked.facts(),
        "guided": list(asked.guided),
    }
