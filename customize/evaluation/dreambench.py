"""The DreamBench protocol (Ruiz et al. 2023): 25 prompts, four images each, scored for subject and prompt fidelity.

Prompts come from google/dreambooth's `prompts_and_classes.txt`, or suit the embedded model's world; images are sampled
from a run, or read from a folder of `pNN-sNN.png`, whatever made them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from backbone.adapters.apply import check_concept_fits, load_concepts
from backbone.adapters.concept import checkpoint as find_checkpoint
from backbone.adapters.concept import read_concept, resolve_placeholder_tokens
from backbone.evaluation.clip import prior_drift
from backbone.evaluation.statistics import bootstrap_mean
from backbone.io.console import UserError, format_count, notify
from backbone.io.files import read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.io.prompts import load_prompts
from backbone.io.run_folder import is_prepared
from backbone.media.sheet import Cell, draw_sheet, number_samples, save_png, split_rows
from backbone.media.sources.decode import open_rgb
from backbone.media.sources.pictures import list_images
from backbone.media.transforms import crop_square
from backbone.models.model import Backbone
from backbone.models.references import ReferenceImage, encode_references, refuse_too_many
from backbone.models.sample import Request, sample
from backbone.world.words import load_vocabulary
from customize.data.changes import describe_changes
from customize.data.prepared import read_stored_images
from customize.evaluation.metrics import Scorers, score_prompts
from customize.sampling import image_name
from customize.settings import FILE, Settings, read_subject_settings

TABLE = "table.json"
REFERENCES = 5  # most reference images of a subject, if the model reads as many
PROMPT_LIST = re.compile(r"prompt_list\s*=\s*\[(.*?)\]", re.DOTALL)
PROMPT_ENTRY = re.compile(r"""^\s*(['"])(?P<text>.*?)\1\s*\.format""", re.MULTILINE)


@dataclass(frozen=True)
class DreamBenchPrompts:
    """DreamBench's prompts, `{}` for the subject: for objects and for live subjects; and subject name → class."""

    things: tuple[str, ...]
    living: tuple[str, ...]
    classes: dict[str, str]


def read_dreambench_prompts(path: Path) -> DreamBenchPrompts:
    """Read google/dreambooth's prompts_and_classes.txt. Raises `UserError` for a file of another format."""
    if not path.is_file():
        raise UserError(f"There is no file {path}. Name a prompts_and_classes.txt.")
    text = path.read_text(encoding="utf-8", errors="replace")
    lists = [
        tuple(entry["text"].replace("{0} {1}", "{}").strip() for entry in PROMPT_ENTRY.finditer(block))
        for block in PROMPT_LIST.findall(text)
    ]
    if len(lists) != 2 or not all(lists) or any("{}" not in prompt for block in lists for prompt in block):
        raise UserError(
            f"{path} does not hold the two lists of prompts of google/dreambooth's prompts_and_classes.txt. "
            "Name that file."
        )
    head = text.split("Prompts", 1)[0]
    pairs = [line.split(",") for line in head.splitlines() if line.count(",") == 1]
    classes = {name.strip(): noun.strip() for name, noun in pairs if name.strip() != "subject_name"}
    return DreamBenchPrompts(lists[0], lists[1], classes)


def is_prompt_lists(source: str) -> bool:
    """Whether this names a file in google/dreambooth's format, rather than words or a file of prompts."""
    return os.path.isfile(source) and "prompt_list" in Path(source).read_text(
        encoding="utf-8", errors="replace"
    )


def read_templates(sources: Sequence[str], *, living: bool = False) -> tuple[str, ...]:
    """Prompts with `{}` for the subject: words, files with one on each line, or google/dreambooth's two lists.

    Of the two lists the one for objects is used, or the one for `living` subjects. Raises `UserError` for a prompt
    without {}, and for one with an unknown placeholder.
    """
    templates: list[str] = []
    for words in sources:
        if is_prompt_lists(words):
            lists = read_dreambench_prompts(Path(words))
            templates += lists.living if living else lists.things
        else:
            templates += [prompt.text for prompt in load_prompts([words])]
    for prompt in templates:
        if "{}" not in prompt:
            raise UserError(
                f"The prompt “{prompt}” has no {{}} where the subject stands. Write “a {{}} in the snow”."
            )
        if odd := re.findall(r"\{\w+\}", prompt):
            raise UserError(f"The prompt “{prompt}” has {odd[0]}, and {{}} alone is filled in. Leave it out.")
    return tuple(templates)


def make_moji_prompts() -> tuple[str, ...]:
    """25 prompts within the vocabulary of `moji`: its places, colours, accessories and styles."""
    words = load_vocabulary()
    places = [f"a {{}} {place}" for place in words.places]
    coloured = [f"a {colour} {{}} {words.places[k]}" for k, colour in enumerate(list(words.colours)[:4])]
    dressed = [f"a {{}} wearing {worn} {words.places[k + 4]}" for k, worn in enumerate(words.accessories)]
    styles = [f"{style} a {{}} {words.places[k + 2]}" for k, style in enumerate(words.styles)]
    return tuple([*places, *coloured, *dressed, *styles][:25])


@dataclass(frozen=True)
class ImageSet:
    """The images that a run is measured by: `per_prompt` of each prompt, which has `{}` for the subject.

    seed  of the images' noise, where they are sampled
    """

    prompts: Sequence[str]
    per_prompt: int
    seed: int = 0

    def fill(self, subject: str) -> list[str]:
        """The prompts with these words for the subject."""
        return [prompt.replace("{}", subject) for prompt in self.prompts]

    def list_requests(self, texts: Sequence[str]) -> list[Request]:
        """The requests of all images, in their order; `texts` are the prompts as the model reads them."""
        return [Request(text, (i, j)) for i, text in enumerate(texts) for j in range(self.per_prompt)]

    def draw_sheet(self, images: Sequence[Image], subject: str, title: str) -> Image:
        """A sheet of all images, each above its prompt."""
        captions = [text for text in self.fill(subject) for _ in range(self.per_prompt)]
        cells = [
            Cell(image, caption) for image, caption in zip(images, number_samples(captions), strict=True)
        ]
        return draw_sheet(split_rows(cells, 10), title=title, cell=112)


def evaluate_run(
    run: Path,
    image_set: ImageSet,
    out: Path,
    *,
    scorer: Path | None,
    against_references: bool = False,
    model: str | None = None,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Sample a run's images, measure them, and write `table.md`, `table.json` and `sheet.png` to the folder `out`.

    Returns the metrics by name, and the table under `text`. `scorer` is the folder of a CLIP or DINO, None for the
    model's own. With `against_references` the base draws the same prompts from the subject's own images, without
    training; they are on `references.png`, and the table has the differences, prompt by prompt. `model` is the one that
    the run was trained from, if that has moved; `checkpoint` is as in `find_checkpoint`. Raises `UserError` for a model
    that reads no references, and without a scorer.
    """
    settings, chosen = read_subject_settings(run, model), find_checkpoint(run, checkpoint)
    concept = read_concept(chosen)
    say_changed_images(run, settings)
    base = Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        resolution=settings.resolution,
    )
    check_concept_fits(concept, base)
    if against_references:
        refuse_too_many(base, 1)
    scorers, seed = load_scorers(scorer, base), image_set.seed
    texts = image_set.fill(settings.name_in_prompt())
    subject_requests = image_set.list_requests(
        [resolve_placeholder_tokens(text, [concept]) for text in texts]
    )
    class_prompt = settings.subjects()[0].fill(settings.class_prompt)
    class_requests = [
        Request(class_prompt, (len(image_set.prompts), j)) for j in range(4 * image_set.per_prompt)
    ]
    subject = embed_subject(scorers, settings)

    # The class before and after training, from the same noise: PRES of the base is what the run's compares with.
    base_class_images = sample_images(base, class_requests, settings, seed, "drawing the base's class")
    untrained: dict[str, list[float]] = {}
    if against_references:
        sampled = draw_from_references(base, settings, image_set)
        untrained = score_images(scorers, subject, sampled, settings, image_set)
        out.mkdir(parents=True, exist_ok=True)
        save_png(
            out / "references.png", draw_sheet(split_rows(sampled, 10), title="From references", cell=112)
        )

    # The subject and its class after training
    load_concepts(base, [concept])
    images = sample_images(base, subject_requests, settings, seed, "drawing the subject")
    class_images = sample_images(base, class_requests, settings, seed, "drawing the class")
    trained = score_images(scorers, subject, images, settings, image_set)
    metrics = summarize(scorers, subject, trained)
    for name, sampled in (("PRES", class_images), ("PRES of the base", base_class_images)):
        vectors = scorers.image_encoder.embed_images(sampled)
        metrics[name] = bootstrap_mean([prior_drift(vector[None], subject) for vector in vectors])
    metrics |= compare_with_references(trained, untrained)
    title = f"{settings.name_in_prompt()} ({chosen})"
    return write_results(out, title, metrics, images, settings, image_set)


def draw_from_references(model: Backbone, settings: Settings, image_set: ImageSet) -> list[Image]:
    """The class prompts, sampled by the base with at most REFERENCES of the subject's images as references."""
    own = read_stored_images(settings.images)[: min(REFERENCES, model.most_references)]
    references = encode_references(model, [image.open() for image in own])
    requests = image_set.list_requests(image_set.fill(settings.class_noun))
    return sample_images(model, requests, settings, image_set.seed, "drawing from references", references)


def evaluate_images(
    folder: Path,
    run: Path,
    image_set: ImageSet,
    out: Path,
    *,
    scorer: Path | None,
    model: str | None = None,
) -> dict[str, Any]:
    """Measure the images of a folder, `pNN-sNN.png` for prompt and sample, against a run's subject.

    Writes and returns what `evaluate_run` does, without PRES. `scorer` and `model` are as there. Raises `UserError`
    when an image is missing.
    """
    settings = read_subject_settings(run, model)
    read_concept(run)  # refuses a run that is not finished
    say_changed_images(run, settings)
    scorers = load_scorers(scorer, Backbone.open(settings.model, device="cpu"))
    names = [image_name(request) for request in image_set.list_requests(image_set.prompts)]
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(
            f"{folder} lacks {missing[0]}{more} of {format_count(len(names), 'picture')}. "
            "Draw all of them, or give other --prompts or --count."
        )
    further = sorted({path.name for path in folder.glob("p*-s*.png")} - set(names))
    if further:
        notify(
            f"Not measured: {format_count(len(further), 'picture')} in {folder} that --prompts and --count do not "
            f"ask for (first: {further[0]})."
        )
    images = [open_rgb(folder / name) for name in names]
    subject = embed_subject(scorers, settings)
    metrics = summarize(scorers, subject, score_images(scorers, subject, images, settings, image_set))
    title = f"{settings.name_in_prompt()} ({folder})"
    return write_results(out, title, metrics, images, settings, image_set)


def score_images(
    scorers: Scorers, subject: Tensor, images: Sequence[Image], settings: Settings, image_set: ImageSet
) -> dict[str, list[float]]:
    """CLIP-I (or DINO), CLIP-T and DIV by name, the value of each prompt; `subject` [R, D] as in `score_prompts`."""
    texts = image_set.fill(settings.class_noun)
    return score_prompts(scorers, subject, images, texts, per_prompt=image_set.per_prompt)


def compare_with_references(
    trained: Mapping[str, Sequence[float]], untrained: Mapping[str, Sequence[float]]
) -> dict[str, Any]:
    """The metrics of images sampled from references, and the run's minus these, prompt by prompt."""
    figures: dict[str, Any] = {
        f"{name}, from references": bootstrap_mean(values) for name, values in untrained.items()
    }
    for name, values in untrained.items():
        differences = [mine - theirs for mine, theirs in zip(trained[name], values, strict=True)]
        figures[f"{name}, the run minus references"] = bootstrap_mean(differences)
    return figures


def summarize(scorers: Scorers, subject: Tensor, values: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """The means over prompts, and the similarity among the subject's own images [R, D]."""
    metrics: dict[str, Any] = {name: bootstrap_mean(each) for name, each in values.items()}
    count = len(subject)
    if count > 1:
        # Mean cosine of each image with the others; its cosine with itself, 1, is subtracted.
        cosines = [float((vector @ subject.T).sum() - 1) / (count - 1) for vector in subject]
        metrics[f"{scorers.image_encoder.similarity_name} of real pictures"] = bootstrap_mean(cosines)
    return metrics


def write_results(
    out: Path,
    title: str,
    metrics: dict[str, Any],
    images: Sequence[Image],
    settings: Settings,
    image_set: ImageSet,
) -> dict[str, Any]:
    """Write the table and the sheet into a folder; returns the metrics and, under `text`, the table."""
    prompts, per_prompt = list(image_set.prompts), image_set.per_prompt
    lines = [f"# {title}", "", f"{len(prompts)} prompts, {per_prompt} pictures each", ""]
    lines += ["| metric | mean | 95 % |", "|---|---|---|"]
    lines += [
        f"| {name} | {mean:.3f} | {low:.3f}–{high:.3f} |" for name, (mean, low, high) in metrics.items()
    ]
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "table.md", "\n".join([*lines, ""]))
    values = {name: {"mean": mean, "low": low, "high": high} for name, (mean, low, high) in metrics.items()}
    write_json(out / TABLE, {"metrics": values, "prompts": prompts, "per_prompt": per_prompt})
    save_png(out / "sheet.png", image_set.draw_sheet(images, settings.name_in_prompt(), title))
    return {"text": "\n".join(lines), **metrics}


def say_changed_images(run: Path, settings: Settings) -> None:
    """Print if the subject's images are not those that the run learned from, since it is measured against them."""
    if is_prepared(settings.images):
        return
    images = list_images(
        settings.images,
        caption_column=settings.caption_column or None,
        image_column=settings.image_column or None,
    )
    recorded = read_json(run / FILE).get("images")
    for sentence in describe_changes(recorded, [images], outcome="The run is measured against those of now."):
        notify(sentence)


def embed_subject(scorers: Scorers, settings: Settings) -> Tensor:
    """The image encoder's vectors of the subject's own images [R, D]."""
    images = [crop_square(image.open(), 512) for image in read_stored_images(settings.images)]
    return scorers.image_encoder.embed_images(images)


def sample_images(
    model: Backbone,
    requests: Sequence[Request],
    settings: Settings,
    seed: int,
    label: str,
    references: Sequence[ReferenceImage] = (),
) -> list[Image]:
    """Sample requests with the run's steps and guidance; `label` is the progress bar's label."""
    with progress(len(requests), label) as bar:
        return list(
            sample(
                model,
                requests,
                steps=settings.sample_steps,
                guidance=settings.guidance,
                seed=seed,
                references=references,
                advance=bar.advance_images,
            )
        )


def load_scorers(folder: Path | None, model: Backbone) -> Scorers:
    """Load the scorer that the user chose, or the model's own; `UserError` if there is none."""
    scorers = Scorers.load(folder, model.location.local("scorer"))
    if scorers is None:
        raise UserError(
            f"{model.location.name} has no scorer of its own. Name a folder of CLIP or DINO with --scorer."
        )
    return scorers
