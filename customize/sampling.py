"""`customize sample`: sample images of prompts, with concepts applied, into a folder."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import Concept, resolve_placeholder_tokens, summarize_concepts
from backbone.distributed import processes
from backbone.io.console import progress
from backbone.io.files import write_json
from backbone.io.run_folder import package_versions
from backbone.media.sheet import Cell, draw_sheet, save_png, split_rows
from backbone.models.model import Backbone
from backbone.models.sample import (
    ALL_STEPS,
    MODELS_OWN,
    Request,
    Sampler,
    Size,
    check_guidance_interval,
    describe_guidance_interval,
    latent_size,
    sample,
)

RECORD = "samples.json"


def sample_to_folder(
    prompts: Sequence[str],
    *,
    concepts: Sequence[Concept] = (),
    model: str | None = None,
    count: int = 1,
    steps: int | None = None,
    guidance: float | None = None,
    seed: int = 0,
    negative: str = "",
    sampler: Sampler = "ddim",
    guided: tuple[float, float] = ALL_STEPS,
    scale: float = 1.0,
    size: Size = MODELS_OWN,
    batch: int = 8,
    out: Path = Path("samples"),
    precision: str = "auto",
    device: str = "auto",
) -> Path:
    """Write `p00-s00.png` … (prompt number, sample number), `samples.json` and `sheet.png`; returns the sheet's path.

    size    (width, height) in pixels
    batch   images sampled together

    Image (i, j) depends on the seed, i and j alone, and several processes share the work. Raises `UserError`, before
    any weights load, for a token that no concept has, a concept of another model, or a size that the model cannot
    sample.
    """
    check_guidance_interval(guided)
    name = model or (concepts[0].model if concepts else "moji")
    processes.init_process(device)
    expanded = [resolve_placeholder_tokens(prompt, concepts) for prompt in prompts]
    expanded_negative = resolve_placeholder_tokens(negative, concepts)
    backbone = Backbone.open(name, device=device, precision=precision)
    latent_size(backbone, size)
    load_concepts(backbone, concepts, scale=scale)
    steps = steps or int(backbone.defaults["steps"])
    guidance = float(backbone.defaults["guidance"]) if guidance is None else guidance
    requests = [
        Request(prompt, (i, j), expanded_negative) for i, prompt in enumerate(expanded) for j in range(count)
    ]
    began = time.perf_counter()
    options = {
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "sampler": sampler,
        "batch": batch,
        "guided": guided,
        "size": size,
    }
    _write_images(backbone, requests, prompts, out, options)
    processes.barrier()  # now all pictures are there
    if processes.is_main_process():
        record = {
            "model": name,
            "concepts": summarize_concepts(concepts),
            "steps": steps,
            "guidance": guidance,
            "guided": list(guided),
            "sampler": sampler,
            "seed": seed,
            "negative": negative,
            "scale": scale,
            **({} if size == MODELS_OWN else {"width": size[0], "height": size[1]}),
            "seconds": round(time.perf_counter() - began, 2),
            "versions": package_versions(),
        }
        note = (
            f"{name}, {steps} steps, guidance {guidance:g}{describe_guidance_interval(guided)}, seed {seed}"
        )
        write_index(out, requests, prompts, record, note=note, columns=count if count > 1 else 4)
    processes.end_process()
    return out / "sheet.png"


def _write_images(
    model: Backbone,
    requests: Sequence[Request],
    prompts: Sequence[str],
    out: Path,
    options: Mapping[str, Any],
) -> None:
    """Sample this process's share of the requests and write the images, with prompt and seed in their metadata.

    `options` are keyword arguments of `sample`.
    """
    share = processes.split_items(requests, batch=options["batch"])
    with progress(len(share), "drawing") as bar:
        images = sample(model, share, **options)
        for request, image in zip(share, images, strict=True):
            i, j = request.key
            text = {"prompt": prompts[i], "seed": str(options["seed"]), "sample": str(j)}
            save_png(out / image_name(request), image, text=text)
            bar.advance(images=1)


def write_index(
    out: Path,
    requests: Sequence[Request],
    prompts: Sequence[str],
    record: Mapping[str, Any],
    *,
    note: str,
    columns: int,
) -> None:
    """Write `samples.json` (the `record` and a list of the images) and a `sheet.png` of the images in the folder."""
    entries = [
        {
            "file": image_name(request),
            "prompt": prompts[request.key[0]],
            "model_reads": request.prompt,
            "sample": request.key[1],
        }
        for request in requests
    ]
    write_json(out / RECORD, {**record, "pictures": entries})
    cells = []
    for request in requests:
        with Image.open(out / image_name(request)) as image:
            cells.append(Cell(image.convert("RGB"), prompts[request.key[0]]))
    save_png(out / "sheet.png", draw_sheet(split_rows(cells, columns), note=note))


def image_name(request: Request) -> str:
    """File name of a request's image: `p00-s00.png`."""
    i, j = request.key
    return f"p{i:02d}-s{j:02d}.png"
