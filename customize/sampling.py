"""`customize sample`: prompts and concepts to a folder of pictures."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from PIL.Image import Image

from backbone.concept import Concept, described, spoken
from backbone.console import progress
from backbone.files import write_json
from backbone.learned import put_on
from backbone.model import Backbone
from backbone.runs import versions
from backbone.sample import Request, Sampler, sample
from backbone.sheet import Cell, in_rows, save_png, sheet


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
    scale: float = 1.0,
    out: Path = Path("samples"),
    precision: str = "auto",
    device: str = "auto",
) -> Path:
    """Writes `p00-s00.png` … (prompt number, sample number), `samples.json` and `sheet.png`; gives the sheet's path.

    Raises `UserError` for a token that no concept owns, or a concept of another model, before any weights load.
    """
    name = model or (concepts[0].model if concepts else "moji")
    said = [spoken(prompt, concepts) for prompt in prompts]
    avoided = spoken(negative, concepts)
    backbone = Backbone.open(name, device=device, precision=precision)
    put_on(backbone, concepts, scale=scale)
    steps = steps or int(backbone.defaults["steps"])
    guidance = float(backbone.defaults["guidance"]) if guidance is None else guidance
    requests = [Request(prompt, (i, j), avoided) for i, prompt in enumerate(said) for j in range(count)]
    began = time.perf_counter()
    pictures: list[Image] = []
    records = []
    with progress(len(requests), "drawing") as bar:
        for request, picture in zip(
            requests,
            sample(backbone, requests, steps=steps, guidance=guidance, seed=seed, sampler=sampler),
            strict=True,
        ):
            i, j = request.key
            file = f"p{i:02d}-s{j:02d}.png"
            save_png(out / file, picture, text={"prompt": prompts[i], "seed": str(seed), "sample": str(j)})
            records.append({"file": file, "prompt": prompts[i], "model_reads": request.prompt, "sample": j})
            pictures.append(picture)
            bar.advance(images=1)
    write_json(
        out / "samples.json",
        {
            "model": name,
            "concepts": described(concepts),
            "steps": steps,
            "guidance": guidance,
            "sampler": sampler,
            "seed": seed,
            "negative": negative,
            "scale": scale,
            "seconds": round(time.perf_counter() - began, 2),
            "versions": versions(),
            "pictures": records,
        },
    )
    cells = [
        Cell(picture, prompts[request.key[0]]) for request, picture in zip(requests, pictures, strict=True)
    ]
    note = f"{name}, {steps} steps, guidance {guidance:g}, seed {seed}"
    save_png(out / "sheet.png", sheet(in_rows(cells, count if count > 1 else 4), note=note))
    return out / "sheet.png"
