"""The DreamBench protocol (Ruiz et al. 2023): 25 prompts, four pictures each, compared with the subject and the words.

Prompts come from `prompts_and_classes.txt`, in the format of google/dreambooth, or are our own for the embedded model's
world; pictures are drawn from a run, or were drawn by anybody into a folder of `pNN-sNN.png`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image

from backbone.adapters.apply import put_on
from backbone.adapters.concept import Concept, read_concept, spoken
from backbone.evaluation.clip import prior_drift
from backbone.evaluation.statistics import interval
from backbone.io.console import UserError, progress
from backbone.io.files import write_json, write_text
from backbone.media.decode import open_rgb
from backbone.media.pictures import read_folder
from backbone.media.sheet import Cell, save_png, sheet
from backbone.media.transforms import square
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.world.words import vocabulary
from customize.evaluate.metrics import Scorers, measure_dreambench
from customize.settings import Settings, read_settings

PROMPT_LIST = re.compile(r"prompt_list\s*=\s*\[(.*?)\]", re.DOTALL)
PROMPT_ENTRY = re.compile(r"""^\s*(['"])(?P<text>.*?)\1\s*\.format""", re.MULTILINE)


@dataclass(frozen=True)
class DreamBenchPrompts:
    """Prompts with `{}` for the subject, for things and for living beings, and the classes of named subjects."""

    things: tuple[str, ...]
    living: tuple[str, ...]
    classes: dict[str, str]


def read_prompts(path: Path) -> DreamBenchPrompts:
    """Reads google/dreambooth's file. Raises `UserError` when it is of another format."""
    if not path.is_file():
        raise UserError(f"There is no file {path}. Name a prompts_and_classes.txt.")
    text = path.read_text(encoding="utf-8", errors="replace")
    lists = [
        tuple(entry["text"].replace("{0} {1}", "{}").strip() for entry in PROMPT_ENTRY.finditer(block))
        for block in PROMPT_LIST.findall(text)
    ]
    if len(lists) != 2 or not all(lists) or any("{}" not in prompt for block in lists for prompt in block):
        raise UserError(f"{path} holds no two lists of prompts like google/dreambooth's. Name that file.")
    head = text.split("Prompts", 1)[0]
    pairs = [line.split(",") for line in head.splitlines() if line.count(",") == 1]
    classes = {name.strip(): noun.strip() for name, noun in pairs if name.strip() != "subject_name"}
    return DreamBenchPrompts(lists[0], lists[1], classes)


def moji_prompts() -> tuple[str, ...]:
    """25 prompts that the embedded model can understand: its places, colours, accessories and styles."""
    words = vocabulary()
    places = [f"a {{}} {place}" for place in words.places]
    looks = [f"a {colour} {{}} {words.places[k]}" for k, colour in enumerate(list(words.colours)[:4])]
    worn = [f"a {{}} wearing {worn} {words.places[k + 4]}" for k, worn in enumerate(words.accessories)]
    styles = [f"{style} a {{}} {words.places[k + 2]}" for k, style in enumerate(words.styles)]
    return tuple([*places, *looks, *worn, *styles][:25])


def evaluate_run(
    run: Path, *, prompts: Sequence[str], per_prompt: int, scorer: Path | None, seed: int, out: Path
) -> dict[str, Any]:
    """Draws a run's pictures, compares them, and writes `table.md`, `table.json` and `sheet.png`."""
    settings, concept = read_settings(run), read_concept(run)
    model = Backbone.open(settings.model, device=settings.device, precision=settings.precision)
    judge = load_scorers(scorer, model)
    requests = [
        Request(spoken(prompt.format(settings.called()), [concept]), (i, j))
        for i, prompt in enumerate(prompts)
        for j in range(per_prompt)
    ]
    class_prompt = settings.subjects()[0].filled(settings.class_prompt)
    plain = [Request(class_prompt, (len(prompts), j)) for j in range(4 * per_prompt)]
    base = sample_images(model, plain, settings, seed, "drawing the base's class")
    put_on(model, [concept])
    pictures = sample_images(model, requests, settings, seed, "drawing the subject")
    after = sample_images(model, plain, settings, seed, "drawing the class")
    found = score_images(judge, settings, concept, pictures, prompts, per_prompt)
    subject = embed_subject(judge, settings)
    for name, images in (("PRES", after), ("PRES of the base", base)):
        vectors = judge.image_encoder.embed_images(images)
        found[name] = interval([prior_drift(vector[None], subject) for vector in vectors])
    return write_results(out, f"{settings.called()} ({run})", found, pictures, prompts, per_prompt, settings)


def evaluate_images(
    folder: Path, run: Path, *, prompts: Sequence[str], per_prompt: int, scorer: Path | None, out: Path
) -> dict[str, Any]:
    """Compares pictures that lie in a folder, `pNN-sNN.png` for prompt and sample, with a run's subject.

    Raises `UserError` when one is missing.
    """
    settings, concept = read_settings(run), read_concept(run)
    judge = load_scorers(scorer, Backbone.open(settings.model, device="cpu"))
    names = [f"p{i:02d}-s{j:02d}.png" for i in range(len(prompts)) for j in range(per_prompt)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {missing[0]} and {len(missing) - 1} more of {len(names)} pictures. "
            "Draw all of them, or give other --prompts or --per-prompt."
        )
    pictures = [open_rgb(folder / name) for name in names]
    found = score_images(judge, settings, concept, pictures, prompts, per_prompt)
    return write_results(
        out, f"{settings.called()} ({folder})", found, pictures, prompts, per_prompt, settings
    )


def score_images(
    judge: Scorers,
    settings: Settings,
    concept: Concept,
    pictures: Sequence[Image],
    prompts: Sequence[str],
    per_prompt: int,
) -> dict[str, Any]:
    """CLIP-I (or DINO), CLIP-T and DIV, with what the subject's own pictures get among themselves."""
    texts = [prompt.format(settings.class_noun) for prompt in prompts]
    subject = embed_subject(judge, settings)
    found = measure_dreambench(judge, subject, pictures, texts, per_prompt=per_prompt)
    others = [
        float((subject[k : k + 1] @ subject.T).sum() - 1) / (len(subject) - 1) for k in range(len(subject))
    ]
    if len(subject) > 1:
        found[f"{judge.image_encoder.likeness} of real pictures"] = interval(others)
    return found


def write_results(
    out: Path,
    title: str,
    found: dict[str, Any],
    pictures: Sequence[Image],
    prompts: Sequence[str],
    per_prompt: int,
    settings: Settings,
) -> dict[str, Any]:
    """Writes the results into a folder."""
    lines = [f"# {title}", "", f"{len(prompts)} prompts, {per_prompt} pictures each", ""]
    lines += ["| figure | mean | 95 % |", "|---|---|---|"]
    lines += [f"| {name} | {mean:.3f} | {low:.3f}–{high:.3f} |" for name, (mean, low, high) in found.items()]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", "\n".join([*lines, ""]))
    figures = {name: {"mean": m, "low": low, "high": high} for name, (m, low, high) in found.items()}
    write_json(out / "table.json", {"figures": figures, "prompts": list(prompts), "per_prompt": per_prompt})
    cells = [
        Cell(picture, prompts[k // per_prompt].format(settings.called()))
        for k, picture in enumerate(pictures)
    ]
    rows = [cells[first : first + 10] for first in range(0, len(cells), 10)]
    save_png(out / "sheet.png", sheet(rows, title=title, cell=112))
    return {"text": "\n".join(lines), **found}


def embed_subject(judge: Scorers, settings: Settings) -> Any:
    """The eye's vectors of the subject's own pictures [R, D]."""
    return judge.image_encoder.embed_images(
        [square(picture.open(), 512) for picture in read_folder(settings.images)]
    )


def sample_images(
    model: Backbone, requests: Sequence[Request], settings: Settings, seed: int, what: str
) -> list[Image]:
    """The pictures of requests, with the run's own sampler settings."""
    found = []
    with progress(len(requests), what) as bar:
        for picture in sample(
            model, requests, steps=settings.sample_steps, guidance=settings.guidance, seed=seed
        ):
            found.append(picture)
            bar.advance(images=1)
    return found


def load_scorers(named: Path | None, model: Backbone) -> Scorers:
    """The scorer that was named, or the model's own; `UserError` where there is none."""
    found = Scorers.load(named, model.location.local("scorer"))
    if found is None:
        raise UserError(
            f"{model.location.name} has no scorer of its own. Name a folder of CLIP or DINO with --scorer."
        )
    return found
