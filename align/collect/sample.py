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

from align.pairs.records import SAMPLES
from align.pairs.samples import FORMAT, picture_name, shot, shots
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
class Drawing:
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
        """The share of the steps that follow the guidance."""
        return self.guidance_start, self.guidance_stop

    def facts(self) -> dict[str, Any]:
        """What the pictures depend on; what is as usual goes without saying."""
        silent = {"batch"}
        if self.guided == ALL_STEPS:
            silent |= {"guidance_start", "guidance_stop"}
        if not self.redraw:
            silent |= {"redraw"}
        silent |= {side for side in ("width", "height") if getattr(self, side) is None}
        return {name: value for name, value in asdict(self).items() if name not in silent}

    def said(self) -> str:
        """How strong the guidance is, and when, in words."""
        return f"{self.guidance:g}{describe_guidance_interval(self.guided)}"

    def settled(self, model: Backbone) -> Drawing:
        """With the model's defaults filled in; `UserError` for a size that it cannot draw."""
        latent_size(model, self.size)
        usual = model.defaults
        steps = int(usual["steps"]) if self.steps is None else self.steps
        guidance = float(usual["guidance"]) if self.guidance is None else self.guidance
        return replace(self, steps=steps, guidance=guidance)


USUAL = Drawing()


def sample_pairs(
    prompts: Sequence[Prompt],
    out: Path,
    *,
    model: str | None,
    concepts: Sequence[Path] = (),
    scale: float = 1.0,
    per_prompt: int = 4,
    drawing: Drawing = USUAL,
    device: str = "auto",
    precision: str = "auto",
) -> int:
    """Draws the pictures that `out` still lacks and gives their number; picture (i, j) depends on seed, i and j only.

    The concepts work `scale` times as strong.

    Raises `UserError` when the folder was begun with other settings: its pictures could not be told from these.
    """
    began = time.perf_counter()
    processes.init_process(device)
    learned = [read_concept(folder) for folder in concepts]
    said = [text for prompt in prompts for text in (prompt.text, *prompt.near)]
    for prompt in [*said, drawing.negative]:
        if learned:
            resolve_placeholder_tokens(prompt, learned)
    backbone = Backbone.open(
        model or (learned[0].model if learned else "moji"), device=device, precision=precision
    )
    drawing = drawing.settled(backbone)
    facts = _facts(backbone, learned, scale, prompts, per_prompt, drawing)
    with processes.main_process_first():
        _claim(out, facts)
    missing = [
        (i, j)
        for i in range(len(prompts))
        for j in range(shots(prompts[i], per_prompt))
        if not (out / picture_name(i, j)).exists()
    ]
    processes.barrier()  # now every process knows what is missing
    if missing:
        load_concepts(backbone, learned, scale=scale)
        own = processes.split_items(missing, batch=drawing.batch)
        with progress(len(own), "drawing") as bar:
            drawn = draw(backbone, prompts, own, drawing, learned, per_prompt=per_prompt)
            for (i, j), picture in zip(own, drawn, strict=True):
                text = {
                    "prompt": shot(prompts[i], j, per_prompt)[0],
                    "seed": str(drawing.seed),
                    "sample": str(j),
                }
                save_png(out / picture_name(i, j), picture, text=text)
                bar.advance(images=1)
    processes.barrier()  # now all pictures are there
    if processes.is_main_process():
        seconds = read_json(out / SAMPLES).get("seconds", 0.0) + time.perf_counter() - began
        write_json(out / SAMPLES, {**facts, "seconds": round(seconds, 2), "versions": package_versions()})
    processes.end_process()
    return len(missing)


def draw(
    model: Backbone,
    prompts: Sequence[Prompt],
    keys: Sequence[tuple[int, int]],
    drawing: Drawing,
    concepts: Sequence[Concept] = (),
    *,
    per_prompt: int = sys.maxsize,
) -> Iterator[Image.Image]:
    """The pictures (prompt number, sample number), in order; samples from `per_prompt` on are near misses."""
    negative = _said(drawing.negative, concepts)
    asked = [(i, *shot(prompts[i], j, per_prompt)) for i, j in keys]
    requests = [Request(_said(text, concepts), (i, noise), negative) for i, text, noise in asked]
    assert drawing.steps is not None and drawing.guidance is not None
    how: dict[str, Any] = {
        "steps": drawing.steps,
        "guidance": drawing.guidance,
        "seed": drawing.seed,
        "sampler": drawing.sampler,
        "batch": drawing.batch,
        "guided": drawing.guided,
        "size": drawing.size,
    }
    if not drawing.redraw:
        return sample(model, requests, **how)
    firsts = {i: Request(_said(prompts[i].text, concepts), (i, 0), negative) for i, _ in keys}
    return _redrawn(model, requests, firsts, drawing.redraw, how)


def _redrawn(
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


def _facts(
    model: Backbone,
    concepts: Sequence[Concept],
    scale: float,
    prompts: Sequence[Prompt],
    per_prompt: int,
    drawing: Drawing,
) -> dict[str, Any]:
    """What a folder's pictures depend on."""
    strength = {} if scale == 1 else {"scale": scale}
    return {
        "format": FORMAT,
        "model": model.location.name,
        "fingerprint": model.fingerprint,
        "concepts": [
            {**said, **strength, "weights": content_hash(concept.weights_path) if concept.weights else ""}
            for concept, said in zip(concepts, summarize_concepts(concepts), strict=True)
        ],
        "drawing": drawing.facts(),
        "per_prompt": per_prompt,
        "prompts": [_described(prompt) for prompt in prompts],
    }


def _described(prompt: Prompt) -> dict[str, Any]:
    near = {"near": list(prompt.near)} if prompt.near else {}
    return {"prompt": prompt.text, "category": prompt.category, **near}


def _claim(out: Path, facts: dict[str, Any]) -> None:
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


def _said(prompt: str, concepts: Sequence[Concept]) -> str:
    return resolve_placeholder_tokens(prompt, concepts) if concepts else prompt
