"""`customize sample`: prompts and concepts to a folder of pictures."""

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


def draw(
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
    """Writes `p00-s00.png` … (prompt number, sample number), `samples.json` and `sheet.png`; gives the sheet's path.

    `size` is (width, height) in pixels, and `batch` pictures are drawn together.

    Raises `UserError` for a token that no concept owns, a concept of another model, or a size that the model cannot
    draw, before any weights load.
    """
    check_guidance_interval(guided)
    name = model or (concepts[0].model if concepts else "moji")
    processes.init_process(device)
    said = [resolve_placeholder_tokens(prompt, concepts) for prompt in prompts]
    avoided = resolve_placeholder_tokens(negative, concepts)
    backbone = Backbone.open(name, device=device, precision=precision)
    latent_size(backbone, size)
    load_concepts(backbone, concepts, scale=scale)
    steps = steps or int(backbone.defaults["steps"])
    guidance = float(backbone.defaults["guidance"]) if guidance is None else guidance
    requests = [Request(prompt, (i, j), avoided) for i, prompt in enumerate(said) for j in range(count)]
    began = time.perf_counter()
    own = processes.split_items(requests, batch=batch)
    with progress(len(own), "drawing") as bar:
        drawn = sample(
            backbone,
            own,
            steps=steps,
            guidance=guidance,
            seed=seed,
            sampler=sampler,
            batch=batch,
            guided=guided,
            size=size,
        )
        for request, picture in zip(own, drawn, strict=True):
            i, j = request.key
            text = {"prompt": prompts[i], "seed": str(seed), "sample": str(j)}
            save_png(out / name_of(request), picture, text=text)
            bar.advance(images=1)
    processes.barrier()  # now all pictures are there
    if processes.is_main_process():
        facts = {
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
        describe(out, requests, prompts, facts, note=note, columns=count if count > 1 else 4)
    processes.end_process()
    return out / "sheet.png"


def describe(
    out: Path,
    requests: Sequence[Request],
    prompts: Sequence[str],
    facts: Mapping[str, Any],
    *,
    note: str,
    columns: int,
) -> None:
    """Writes `samples.json` and, from the pictures in the folder, `sheet.png`."""
    records = [
        {
            "file": name_of(request),
            "prompt": prompts[request.key[0]],
            "model_reads": request.prompt,
            "sample": request.key[1],
        }
        for request in requests
    ]
    write_json(out / RECORD, {**facts, "pictures": records})
    cells = []
    for request in requests:
        with Image.open(out / name_of(request)) as picture:
            cells.append(Cell(picture.convert("RGB"), prompts[request.key[0]]))
    save_png(out / "sheet.png", draw_sheet(split_rows(cells, columns), note=note))


def name_of(request: Request) -> str:
    """The file of a picture: `p00-s00.png`."""
    i, j = request.key
    return f"p{i:02d}-s{j:02d}.png"
