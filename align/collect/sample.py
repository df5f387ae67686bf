"""`align sample`: several images of each prompt to choose between, in a folder that can be continued."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from align.pairs.records import SAMPLES, SamplesRecord
from align.pairs.samples import FORMAT, count_images, image_name, prompt_and_noise
from align.settings import PairSampling
from backbone.adapters.apply import check_concept_fits, load_concepts, say_idle_early_scale
from backbone.adapters.concept import (
    PLACEHOLDER,
    Concept,
    expand_tokens,
    own_words,
    summarize_concepts,
    trained_resolution,
)
from backbone.cli.sampling import SamplingSettings
from backbone.distributed import processes
from backbone.io.console import UserError, notify
from backbone.io.files import read_json, write_json
from backbone.io.progress import progress
from backbone.io.prompts import Prompt
from backbone.io.run_folder import package_versions, refuse_among_others
from backbone.media.parameters import describe_concepts, describe_drawing
from backbone.media.sheet import save_png
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from backbone.models.sample import (
    GivenLatents,
    Request,
    count_skipped_steps,
    refuse_negative,
    resolve_sampling,
    sample,
    sample_latents,
)


def sample_pairs(
    prompts: Sequence[Prompt], out: Path, settings: PairSampling, *, concepts: Sequence[Concept] = ()
) -> int:
    """Sample the images that `out` still lacks; returns their number. Image (i, j) depends on the seed, i and j alone.

    `concepts` are those that `settings` names, already read. Several processes share the work. Raises `UserError` when
    the folder was begun with other settings, whose images could not be told apart from these.
    """
    began = time.perf_counter()
    processes.init_process(settings.device)
    texts = [text for prompt in prompts for text in (prompt.text, *prompt.hard_negatives)]
    for text in [*texts, settings.negative]:
        expand_tokens(text, concepts)  # user errors are raised before any weights load
    brackets = [] if concepts else [word for text in texts for word in PLACEHOLDER.findall(text)]
    if brackets and (plain := [word for word in brackets if word not in own_words(settings.model or "")]):
        notify(f"“{plain[0]}” in a prompt is read as plain text: no --concept is given.")
    name = settings.model or (concepts[0].model if concepts else "moji")
    backbone = Backbone.open(
        name, device=settings.device, precision=settings.precision, compile=settings.compile
    )
    say_idle_early_scale(concepts, settings.early_scale)
    settings = resolve_sampling(settings, backbone, resolution=trained_resolution(concepts))
    if settings.redraw and settings.steps is not None:
        count_skipped_steps(settings.redraw, settings.steps)
    for concept in concepts:
        check_concept_fits(concept, backbone)
    with processes.hold_folder(out):
        missing = _draw_missing(backbone, prompts, out, settings, concepts, name=name, began=began)
    processes.end_process()
    return missing


def _draw_missing(
    backbone: Backbone,
    prompts: Sequence[Prompt],
    out: Path,
    settings: PairSampling,
    concepts: Sequence[Concept],
    *,
    name: str,
    began: float,
) -> int:
    """Claim the folder, sample the missing images, finish its record; returns the number of images sampled."""
    record = _describe_folder(backbone, concepts, prompts, settings)
    with processes.main_process_first():
        _claim_folder(out, record, backbone)
    missing = [
        (i, j)
        for i in range(len(prompts))
        for j in range(count_images(prompts[i], settings.count))
        if not (out / image_name(i, j)).exists()
    ]
    processes.barrier()  # now every process knows which images are missing
    if missing:
        load_concepts(backbone, concepts, scale=settings.scale)
        share = processes.split_items(missing, batch=settings.batch)
        facts = {
            "model": name,
            **settings.facts(),
            **describe_concepts([concept.folder for concept in concepts], settings.scale),
        }
        with progress(len(share), "drawing") as bar:
            images = sample_images(
                backbone,
                prompts,
                share,
                settings,
                concepts,
                per_prompt=settings.count,
                advance=bar.advance_images,
            )
            for (i, j), image in zip(share, images, strict=True):
                prompt, noise = prompt_and_noise(prompts[i], j, settings.count)
                image_facts = {
                    "redraw": (settings.redraw or None) if noise else None,
                    "prompt_number": i,
                    "sample": j,
                }
                text = describe_drawing(prompt, image.size, {**facts, **image_facts})
                save_png(out / image_name(i, j), image, text=text)
    processes.barrier()  # now all pictures are there
    if processes.is_main_process():
        seconds = read_json(out / SAMPLES, SamplesRecord).seconds + time.perf_counter() - began
        write_json(out / SAMPLES, {**record, "seconds": round(seconds, 2), "versions": package_versions()})
    return len(missing)


def sample_images(
    model: Backbone,
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    sampling: SamplingSettings,
    concepts: Sequence[Concept] = (),
    *,
    per_prompt: int = sys.maxsize,
    advance: Callable[[float], Any] | None = None,
) -> Iterator[Image.Image]:
    """Yield the images of `keys` (prompt index, sample index); samples from `per_prompt` on are hard negatives.

    `advance` is called after each step with its work, in images.
    """
    negative = expand_tokens(sampling.negative, concepts)
    refuse_negative(model, negative, sampling.guidance)
    texts_and_noise = [(i, *prompt_and_noise(prompts[i], j, per_prompt)) for i, j in keys]
    requests = [
        Request(expand_tokens(text, concepts), (i, noise), negative) for i, text, noise in texts_and_noise
    ]
    options = sampling.for_sampler()
    if not isinstance(sampling, PairSampling) or not sampling.redraw:
        return sample(model, requests, **options, advance=advance)
    first_requests = {i: Request(expand_tokens(prompts[i].text, concepts), (i, 0), negative) for i, _ in keys}
    return _sample_variations(model, requests, first_requests, sampling.redraw, options, advance)


def _sample_variations(
    model: Backbone,
    requests: Sequence[Request],
    first_requests: Mapping[int, Request],
    strength: float,
    options: dict[str, Any],
    advance: Callable[[float], Any] | None = None,
) -> Iterator[Image.Image]:
    """Yield the requests' images, in order: sample 0 of a prompt from noise, the others as SDEdit of that one.

    first_requests   prompt index → the request of its sample 0, in the order of `requests`
    strength         share of the steps that is noised and denoised again
    options          keyword arguments of `sample_latents`
    advance          as for `sample`; a sample 0 that is not requested itself does not count
    """
    indices, size = list(first_requests), options["batch"]
    for begin in range(0, len(indices), size):
        batch_indices = set(indices[begin : begin + size])
        batch = [request for request in requests if request.key[0] in batch_indices]
        variations = [request for request in batch if request.key[1]]
        # Sample 0 is needed as the start of variations even if it is not requested itself.
        starts = [first_requests[request.key[0]] for request in variations]
        from_noise = list(dict.fromkeys(starts + [request for request in batch if not request.key[1]]))
        share = (len(batch) - len(variations)) / len(from_noise)
        begin_with = partial(_advance_by, advance, share) if advance and share else None

        # Sample 0 of each prompt from noise, then the others from its latent
        drawn = torch.cat(list(sample_latents(model, from_noise, **options, advance=begin_with)))
        latents = dict(zip(from_noise, drawn, strict=True))
        if variations:
            clean = torch.stack([latents[start] for start in starts])
            redrawn = torch.cat(
                list(
                    sample_latents(
                        model, variations, given=GivenLatents(clean, strength), **options, advance=advance
                    )
                )
            )
            latents |= dict(zip(variations, redrawn, strict=True))
        for first in range(0, len(batch), size):
            chunk = torch.stack([latents[request] for request in batch[first : first + size]])
            for image in model.decode(chunk).cpu():
                yield to_image(image)


def _advance_by(advance: Callable[[float], Any], share: float, images: float) -> None:
    advance(share * images)


def _describe_folder(
    model: Backbone, concepts: Sequence[Concept], prompts: Sequence[Prompt], settings: PairSampling
) -> dict[str, Any]:
    """The record of a folder, for `samples.json`: everything that its images depend on."""
    strength = {} if settings.scale == 1 else {"scale": settings.scale}
    return {
        "format": FORMAT,
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": [
            {
                **description,
                **strength,
                "weights": concept.hash_files(),
            }
            for concept, description in zip(concepts, summarize_concepts(concepts), strict=True)
        ],
        "sampling": settings.facts(),
        "per_prompt": settings.count,
        "prompts": [_describe_prompt(prompt) for prompt in prompts],
    }


def _describe_prompt(prompt: Prompt) -> dict[str, Any]:
    negatives = {"hard_negatives": list(prompt.hard_negatives)} if prompt.hard_negatives else {}
    return {"prompt": prompt.text, "category": prompt.category, **negatives}


def _claim_folder(out: Path, record: dict[str, Any], model: Backbone) -> None:
    """Begin a folder with its record; `UserError` where it was begun with another one."""
    path = out / SAMPLES
    if not path.exists():
        refuse_among_others(out)
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and not a folder of `align sample`. Choose another --out.")
        write_json(path, record)
        return
    stored = read_json(path)
    stored = {**stored, "fingerprint": model.renew_fingerprint(stored.get("fingerprint"))}
    for name, value in record.items():
        stored_value: Any = stored.get(name)
        if stored_value != value:
            are_dicts = isinstance(stored_value, dict) and isinstance(value, dict)
            keys = [key for key in value if stored_value.get(key) != value[key]] if are_dicts else [name]
            names = ", ".join({"per_prompt": "count"}.get(key, key).replace("_", " ") for key in keys)
            raise UserError(
                f"{out} was begun with another {names or name}. Choose another --out, or repeat what {path} says."
            )
