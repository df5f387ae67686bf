"""`align sample`: several images of each prompt to choose between, in a folder that can be continued."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from align.pairs.records import SAMPLES, Drawn
from align.pairs.samples import FORMAT, count_images, image_name, prompt_and_noise
from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import Concept, read_concept, resolve_placeholder_tokens, summarize_concepts
from backbone.distributed import processes
from backbone.io.console import UserError, progress
from backbone.io.files import content_hash, read_json, write_json
from backbone.io.prompts import Prompt
from backbone.io.run_folder import package_versions
from backbone.media.sheet import save_png
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from backbone.models.sample import (
    ALL_STEPS,
    Request,
    Sampler,
    Size,
    check_guidance_interval,
    count_skipped_steps,
    describe_guidance_interval,
    latent_size,
    sample,
    sample_latents,
)


@dataclass(frozen=True)
class SamplingSettings:
    """How images are sampled; None for the model's default.

    guidance_start, guidance_stop   guidance is applied between these shares of the steps, noisy to clean
    redraw      SDEdit strength: a prompt's samples from the second on are its first one, noised to this share of the
                steps and denoised again, so that they share one layout; 0 samples each from its own noise
    """

    steps: int | None = None
    guidance: float | None = None
    seed: int = 0
    sampler: Sampler = "ddim"
    negative: str = ""
    batch: int = 8
    guidance_start: float = 0.0
    guidance_stop: float = 1.0
    redraw: float = 0.0
    width: int | None = None
    height: int | None = None

    def __post_init__(self) -> None:
        check_guidance_interval(self.guided)
        if self.redraw and self.steps is not None:
            count_skipped_steps(self.redraw, self.steps)

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return self.width, self.height

    @property
    def guided(self) -> tuple[float, float]:
        """(start, stop): the share of the steps with guidance."""
        return self.guidance_start, self.guidance_stop

    def as_json(self) -> dict[str, Any]:
        """Settings that images depend on, without guidance interval, `redraw` and size where they are the defaults."""
        omitted = {"batch"}
        if self.guided == ALL_STEPS:
            omitted |= {"guidance_start", "guidance_stop"}
        if not self.redraw:
            omitted |= {"redraw"}
        omitted |= {side for side in ("width", "height") if getattr(self, side) is None}
        return {name: value for name, value in asdict(self).items() if name not in omitted}

    def describe_guidance(self) -> str:
        """Guidance scale, and its interval where it is not all steps, for people."""
        return f"{self.guidance:g}{describe_guidance_interval(self.guided)}"

    def resolve(self, model: Backbone) -> SamplingSettings:
        """Fill in the model's defaults; `UserError` for a size that it cannot sample."""
        latent_size(model, self.size)
        defaults = model.defaults
        steps = int(defaults["steps"]) if self.steps is None else self.steps
        guidance = float(defaults["guidance"]) if self.guidance is None else self.guidance
        return replace(self, steps=steps, guidance=guidance)


DEFAULT_SAMPLING = SamplingSettings()


def sample_pairs(
    prompts: Sequence[Prompt],
    out: Path,
    *,
    model: str | None,
    concepts: Sequence[Path] = (),
    scale: float = 1.0,
    per_prompt: int = 4,
    sampling: SamplingSettings = DEFAULT_SAMPLING,
    device: str = "auto",
    precision: str = "auto",
) -> int:
    """Sample the images that `out` still lacks; returns their number. Image (i, j) depends on the seed, i and j alone.

    scale   LoRA scale of the concepts

    Several processes share the work. Raises `UserError` when the folder was begun with other settings, whose images
    could not be told apart from these.
    """
    began = time.perf_counter()
    processes.init_process(device)
    loaded = [read_concept(folder) for folder in concepts]
    texts = [text for prompt in prompts for text in (prompt.text, *prompt.hard_negatives)]
    for text in [*texts, sampling.negative]:
        _expand_tokens(text, loaded)  # mistakes are answered before any weights load
    backbone = Backbone.open(
        model or (loaded[0].model if loaded else "moji"), device=device, precision=precision
    )
    sampling = sampling.resolve(backbone)
    record = _describe_folder(backbone, loaded, scale, prompts, per_prompt, sampling)
    with processes.main_process_first():
        _claim_folder(out, record)
    missing = [
        (i, j)
        for i in range(len(prompts))
        for j in range(count_images(prompts[i], per_prompt))
        if not (out / image_name(i, j)).exists()
    ]
    processes.barrier()  # now every process knows what is missing
    if missing:
        load_concepts(backbone, loaded, scale=scale)
        share = processes.split_items(missing, batch=sampling.batch)
        with progress(len(share), "drawing") as bar:
            images = sample_images(backbone, prompts, share, sampling, loaded, per_prompt=per_prompt)
            for (i, j), image in zip(share, images, strict=True):
                metadata = {
                    "prompt": prompt_and_noise(prompts[i], j, per_prompt)[0],
                    "seed": str(sampling.seed),
                    "sample": str(j),
                }
                save_png(out / image_name(i, j), image, text=metadata)
                bar.advance(images=1)
    processes.barrier()  # now all pictures are there
    if processes.is_main_process():
        seconds = read_json(out / SAMPLES, Drawn).seconds + time.perf_counter() - began
        write_json(out / SAMPLES, {**record, "seconds": round(seconds, 2), "versions": package_versions()})
    processes.end_process()
    return len(missing)


def sample_images(
    model: Backbone,
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    sampling: SamplingSettings,
    concepts: Sequence[Concept] = (),
    *,
    per_prompt: int = sys.maxsize,
) -> Iterator[Image.Image]:
    """Yield the images of `keys` (prompt index, sample index); samples from `per_prompt` on are hard negatives."""
    negative = _expand_tokens(sampling.negative, concepts)
    texts_and_noise = [(i, *prompt_and_noise(prompts[i], j, per_prompt)) for i, j in keys]
    requests = [
        Request(_expand_tokens(text, concepts), (i, noise), negative) for i, text, noise in texts_and_noise
    ]
    assert sampling.steps is not None and sampling.guidance is not None
    options: dict[str, Any] = {
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "seed": sampling.seed,
        "sampler": sampling.sampler,
        "batch": sampling.batch,
        "guided": sampling.guided,
        "size": sampling.size,
    }
    if not sampling.redraw:
        return sample(model, requests, **options)
    first_requests = {
        i: Request(_expand_tokens(prompts[i].text, concepts), (i, 0), negative) for i, _ in keys
    }
    return _sample_variations(model, requests, first_requests, sampling.redraw, options)


def _sample_variations(
    model: Backbone,
    requests: Sequence[Request],
    first_requests: Mapping[int, Request],
    strength: float,
    options: dict[str, Any],
) -> Iterator[Image.Image]:
    """Yield the requests' images, in order: sample 0 of a prompt from noise, the others as SDEdit of that one.

    first_requests   prompt index → the request of its sample 0, in the order of `requests`
    strength         share of the steps that is noised and denoised again
    options          keyword arguments of `sample_latents`
    """
    indices, size = list(first_requests), options["batch"]
    for begin in range(0, len(indices), size):
        batch_indices = set(indices[begin : begin + size])
        batch = [request for request in requests if request.key[0] in batch_indices]
        variations = [request for request in batch if request.key[1]]
        # Sample 0 is needed as the start of variations even where it is not asked for itself.
        starts = [first_requests[request.key[0]] for request in variations]
        from_noise = list(dict.fromkeys(starts + [request for request in batch if not request.key[1]]))
        latents = dict(
            zip(from_noise, torch.cat(list(sample_latents(model, from_noise, **options))), strict=True)
        )
        if variations:
            clean = torch.stack([latents[start] for start in starts])
            redrawn = torch.cat(
                list(sample_latents(model, variations, clean=clean, share=strength, **options))
            )
            latents |= dict(zip(variations, redrawn, strict=True))
        for first in range(0, len(batch), size):
            chunk = torch.stack([latents[request] for request in batch[first : first + size]])
            for image in model.decode(chunk).cpu():
                yield to_image(image)


def _describe_folder(
    model: Backbone,
    concepts: Sequence[Concept],
    scale: float,
    prompts: Sequence[Prompt],
    per_prompt: int,
    sampling: SamplingSettings,
) -> dict[str, Any]:
    """The record of a folder, for `samples.json`: everything that its images depend on."""
    strength = {} if scale == 1 else {"scale": scale}
    return {
        "format": FORMAT,
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": [
            {
                **description,
                **strength,
                "weights": content_hash(concept.weights_path) if concept.weights else "",
            }
            for concept, description in zip(concepts, summarize_concepts(concepts), strict=True)
        ],
        "sampling": sampling.as_json(),
        "per_prompt": per_prompt,
        "prompts": [_prompt_fields(prompt) for prompt in prompts],
    }


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    negatives = {"hard_negatives": list(prompt.hard_negatives)} if prompt.hard_negatives else {}
    return {"prompt": prompt.text, "category": prompt.category, **negatives}


def _claim_folder(out: Path, record: dict[str, Any]) -> None:
    """Begin a folder with its record; `UserError` where it was begun with another one."""
    path = out / SAMPLES
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and not a folder of `align sample`. Choose another --out.")
        write_json(path, record)
        return
    stored = read_json(path)
    for name, value in record.items():
        if stored.get(name) != value:
            raise UserError(
                f"{out} was begun with another {name.replace('_', ' ')}. Choose another --out, or repeat what "
                f"{path} says."
            )


def _expand_tokens(prompt: str, concepts: Sequence[Concept]) -> str:
    """Replace placeholder tokens by what the model reads; `UserError` for a token that no concept has."""
    return resolve_placeholder_tokens(prompt, concepts) if concepts else prompt
