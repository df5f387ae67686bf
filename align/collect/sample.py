"""Pictures to choose between: several of each prompt, in a folder that can be finished later and labelled or ranked."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from align.pairs.prompts import Prompt
from align.pairs.records import SAMPLES
from align.pairs.samples import FORMAT, count_images, image_name, prompt_and_noise
from backbone.adapters.apply import put_on
from backbone.adapters.concept import Concept, described, read_concept, spoken
from backbone.distributed import processes
from backbone.io.console import UserError, progress
from backbone.io.files import content_hash, read_json, write_json
from backbone.io.run_folder import versions
from backbone.media.sheet import save_png
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from backbone.models.sample import (
    ALL_STEPS,
    Request,
    Sampler,
    refuse_no_share,
    sample,
    sample_latents,
    share_said,
    steps_before,
)


@dataclass(frozen=True)
class SamplingSettings:
    """How pictures are drawn; None where the model's own default serves.

    `guidance_start` and `guidance_stop` are the share of the steps, noisy to clean, that follow the guidance. With
    `redraw` a prompt's samples from the second on are its first one, noised again and drawn anew in this share of the
    steps: they have one layout, so that what differs is what there is to choose.
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

    def __post_init__(self) -> None:
        refuse_no_share(self.guided)
        if self.redraw and self.steps is not None:
            steps_before(self.redraw, self.steps)

    @property
    def guided(self) -> tuple[float, float]:
        """The share of the steps that follow the guidance."""
        return self.guidance_start, self.guidance_stop

    def as_json(self) -> dict[str, Any]:
        """What the pictures depend on; guidance in all steps goes without saying, and so does noise of their own."""
        silent = {"batch"}
        if self.guided == ALL_STEPS:
            silent |= {"guidance_start", "guidance_stop"}
        if not self.redraw:
            silent |= {"redraw"}
        return {name: value for name, value in asdict(self).items() if name not in silent}

    def describe_guidance(self) -> str:
        """How strong the guidance is, and when, in words."""
        return f"{self.guidance:g}{share_said(self.guided)}"

    def resolve(self, model: Backbone) -> SamplingSettings:
        """With the model's defaults filled in."""
        usual = model.defaults
        steps = int(usual["steps"]) if self.steps is None else self.steps
        guidance = float(usual["guidance"]) if self.guidance is None else self.guidance
        return replace(self, steps=steps, guidance=guidance)


DEFAULT_SAMPLING = SamplingSettings()


def sample_pairs(
    prompts: Sequence[Prompt],
    out: Path,
    *,
    model: str | None,
    concepts: Sequence[Path] = (),
    per_prompt: int = 4,
    sampling: SamplingSettings = DEFAULT_SAMPLING,
    device: str = "auto",
    precision: str = "auto",
) -> int:
    """Draws the pictures that `out` still lacks and gives their number; picture (i, j) depends on seed, i and j only.

    Raises `UserError` when the folder was begun with other settings: its pictures could not be told from these.
    """
    began = time.perf_counter()
    processes.join(device)
    learned = [read_concept(folder) for folder in concepts]
    said = [text for prompt in prompts for text in (prompt.text, *prompt.hard_negatives)]
    for prompt in [*said, sampling.negative]:
        if learned:
            spoken(prompt, learned)
    backbone = Backbone.open(
        model or (learned[0].model if learned else "moji"), device=device, precision=precision
    )
    sampling = sampling.resolve(backbone)
    facts = _describe_folder(backbone, learned, prompts, per_prompt, sampling)
    with processes.writer_first():
        _claim_folder(out, facts)
    missing = [
        (i, j)
        for i in range(len(prompts))
        for j in range(count_images(prompts[i], per_prompt))
        if not (out / image_name(i, j)).exists()
    ]
    processes.barrier()  # now every process knows what is missing
    if missing:
        put_on(backbone, learned)
        own = processes.spread(missing, batch=sampling.batch)
        with progress(len(own), "drawing") as bar:
            drawn = sample_images(backbone, prompts, own, sampling, learned, per_prompt=per_prompt)
            for (i, j), picture in zip(own, drawn, strict=True):
                text = {
                    "prompt": prompt_and_noise(prompts[i], j, per_prompt)[0],
                    "seed": str(sampling.seed),
                    "sample": str(j),
                }
                save_png(out / image_name(i, j), picture, text=text)
                bar.advance(images=1)
    processes.barrier()  # now all pictures are there
    if processes.is_writer():
        seconds = read_json(out / SAMPLES).get("seconds", 0.0) + time.perf_counter() - began
        write_json(out / SAMPLES, {**facts, "seconds": round(seconds, 2), "versions": versions()})
    processes.leave()
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
    """The pictures (prompt number, sample number), in order; samples from `per_prompt` on are hard negatives."""
    negative = _expand_tokens(sampling.negative, concepts)
    asked = [(i, *prompt_and_noise(prompts[i], j, per_prompt)) for i, j in keys]
    requests = [Request(_expand_tokens(text, concepts), (i, noise), negative) for i, text, noise in asked]
    assert sampling.steps is not None and sampling.guidance is not None
    how: dict[str, Any] = {
        "steps": sampling.steps,
        "guidance": sampling.guidance,
        "seed": sampling.seed,
        "sampler": sampling.sampler,
        "batch": sampling.batch,
        "guided": sampling.guided,
    }
    if not sampling.redraw:
        return sample(model, requests, **how)
    firsts = {i: Request(_expand_tokens(prompts[i].text, concepts), (i, 0), negative) for i, _ in keys}
    return _sample_variations(model, requests, firsts, sampling.redraw, how)


def _sample_variations(
    model: Backbone,
    requests: Sequence[Request],
    firsts: Mapping[int, Request],
    share: float,
    how: dict[str, Any],
) -> Iterator[Image.Image]:
    """Pictures of the requests, in order: those of noise 0 as ever, the others their prompt's first one drawn anew."""
    numbers, size = list(firsts), how["batch"]
    for begin in range(0, len(numbers), size):
        here = set(numbers[begin : begin + size])
        some = [request for request in requests if request.key[0] in here]
        anew = [request for request in some if request.key[1]]
        whole = list(
            dict.fromkeys([firsts[request.key[0]] for request in anew] + [r for r in some if not r.key[1]])
        )
        drawn = dict(zip(whole, torch.cat(list(sample_latents(model, whole, **how))), strict=True))
        if anew:
            clean = torch.stack([drawn[firsts[request.key[0]]] for request in anew])
            latents = torch.cat(list(sample_latents(model, anew, clean=clean, share=share, **how)))
            drawn |= dict(zip(anew, latents, strict=True))
        for first in range(0, len(some), size):
            part = torch.stack([drawn[request] for request in some[first : first + size]])
            for picture in model.decode(part).cpu():
                yield to_image(picture)


def _describe_folder(
    model: Backbone,
    concepts: Sequence[Concept],
    prompts: Sequence[Prompt],
    per_prompt: int,
    sampling: SamplingSettings,
) -> dict[str, Any]:
    """What a folder's pictures depend on."""
    return {
        "format": FORMAT,
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": [
            said | {"weights": content_hash(concept.weights_path) if concept.weights else ""}
            for concept, said in zip(concepts, described(concepts), strict=True)
        ],
        "sampling": sampling.as_json(),
        "per_prompt": per_prompt,
        "prompts": [_prompt_fields(prompt) for prompt in prompts],
    }


def _prompt_fields(prompt: Prompt) -> dict[str, Any]:
    near = {"hard_negatives": list(prompt.hard_negatives)} if prompt.hard_negatives else {}
    return {"prompt": prompt.text, "category": prompt.category, **near}


def _claim_folder(out: Path, facts: dict[str, Any]) -> None:
    """Begins a folder, or makes sure that it was begun with the same facts."""
    path = out / SAMPLES
    if not path.exists():
        if out.exists() and any(out.iterdir()):
            raise UserError(f"{out} is not empty and not a folder of `align sample`. Choose another --out.")
        write_json(path, facts)
        return
    said = read_json(path)
    for name, value in facts.items():
        if not isinstance(said, dict) or said.get(name) != value:
            raise UserError(
                f"{out} was begun with another {name.replace('_', ' ')}. Choose another --out, or repeat what "
                f"{path} says."
            )


def _expand_tokens(prompt: str, concepts: Sequence[Concept]) -> str:
    return spoken(prompt, concepts) if concepts else prompt
