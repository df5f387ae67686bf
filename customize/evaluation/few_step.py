"""`customize evaluate RUN --on TURBO`: the prompts of DreamBench drawn by the base and by its few-step model.

Each samples them without and with the concept, from the same noise: four sets of images, from which
`customize.evaluation.survival` computes two figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from PIL.Image import Image

from backbone.adapters.apply import carry_over, check_concept_fits, load_concepts
from backbone.adapters.concept import Concept, read_concept, resolve_placeholder_tokens
from backbone.adapters.concept import checkpoint as find_checkpoint
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json, write_text
from backbone.io.progress import progress
from backbone.io.run_folder import CONCEPT_FILE
from backbone.media.sheet import save_png
from backbone.models.few_step.model import SamplingDefaults, get_sampling_defaults, open_few_step
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from customize.evaluation.dreambench import TABLE, ImageSet, embed_subject, load_scorers, say_changed_images
from customize.evaluation.metrics import Scorers, measure_dreambench
from customize.evaluation.survival import Fidelity, Survival
from customize.settings import FILE, Settings, read_subject_settings


def open_sides(
    run: Path, on: str, model: str | None = None, checkpoint: str | None = None
) -> tuple[Backbone, Concept, Backbone, Concept]:
    """The base with the run's concept, and the few-step model with its concept; no weights are loaded.

    `on` is a few-step model, which then carries the run's own concept, or a run of `customize transfer`. `model` is the
    one that the run was trained from, if that has moved; `checkpoint` as in `find_checkpoint`. Raises
    `UserError` if the two do not go together.
    """
    settings = read_subject_settings(run, model)
    concept = read_concept(find_checkpoint(run, checkpoint))
    base = Backbone.open(
        settings.model, device=settings.device, precision=settings.precision, resolution=settings.resolution
    )
    check_concept_fits(concept, base)
    if not (Path(on) / CONCEPT_FILE).is_file():
        few_step = open_few_step(base, on)
        return base, concept, few_step, carry_over(concept, base, few_step)
    transferred = read_concept(on)
    if transferred.tokens != concept.tokens:
        raise UserError(
            f"{on} has the tokens {', '.join(transferred.tokens)} and {run} has {', '.join(concept.tokens)}: it is "
            "not a transfer of this run. Name the folder that customize transfer wrote, or a few-step model."
        )
    few_step = open_few_step(base, transferred.model)
    check_concept_fits(transferred, few_step)
    return base, concept, few_step, transferred


def measure_survival(
    run: Path,
    on: str,
    image_set: ImageSet,
    out: Path,
    *,
    scorer: Path | None,
    model: str | None = None,
    checkpoint: str | None = None,
) -> dict[str, Any]:
    """Sample and measure both models without and with the concept; write `table.md`, `table.json`, `sheet.png`.

    `on` is the few-step model, or the concept that was transferred to it; the other arguments are as in `evaluate_run`.
    The figures are in the run's `settings.json` too, under `survival`. Returns the record, and the table under `text`.
    """
    settings = read_subject_settings(run)
    base, concept, few_step, transferred = open_sides(run, on, model, checkpoint)
    say_changed_images(run, settings)

    # Each model without the concept, on prompts without its words, then with it
    scorers = load_scorers(scorer, base)
    texts = image_set.fill(settings.name_in_prompt())
    requests = image_set.list_requests([resolve_placeholder_tokens(text, [concept]) for text in texts])
    plain = [replace(request, prompt=_without_words(request.prompt, concept)) for request in requests]
    fidelities: list[Fidelity] = []
    images: list[Image] = []
    drawings = (
        get_sampling_defaults(base, steps=settings.sample_steps, guidance=settings.guidance),
        get_sampling_defaults(few_step),
    )
    for side, side_concept, drawing in zip((base, few_step), (concept, transferred), drawings, strict=True):
        for learned in (False, True):
            if learned:
                load_concepts(side, [side_concept])
            label = f"{side.location.name}{'' if learned else ' without it'}"
            side_requests = requests if learned else plain
            images = draw(side, side_requests, drawing, image_set.seed, label)
            fidelities.append(average_fidelities(scorers, settings, images, image_set))
        side.free("denoiser", "autoencoder")

    # Table, record and sheet
    name = str(on)
    survived = Survival(name, drawings[1].steps, *fidelities)
    text = "\n".join([survived.sentence(), "", *survived.table(), ""])
    write_text(out / "table.md", text)
    record = {
        "survival": survived.record(),
        "prompts": list(image_set.prompts),
        "per_prompt": image_set.per_prompt,
    }
    write_json(out / TABLE, record)
    sheet = image_set.draw_sheet(images, settings.name_in_prompt(), f"{run} on {name}")
    save_png(out / "sheet.png", sheet)
    write_json(run / FILE, {**read_json(run / FILE), "survival": survived.record()})
    return {**record, "text": text}


def draw(
    model: Backbone, requests: Sequence[Request], drawing: SamplingDefaults, seed: int, label: str
) -> list[Image]:
    """Images of requests; `label` is the progress bar's label."""
    with progress(len(requests), f"drawing with {label}") as bar:
        return list(sample(model, requests, **asdict(drawing), seed=seed, advance=bar.advance_images))


def average_fidelities(
    scorers: Scorers, settings: Settings, images: Sequence[Image], image_set: ImageSet
) -> Fidelity:
    """The mean subject and prompt fidelity of images."""
    texts, subject = image_set.fill(settings.class_noun), embed_subject(scorers, settings)
    metrics = measure_dreambench(scorers, subject, images, texts, per_prompt=image_set.per_prompt)
    prompt = metrics.get("CLIP-T")
    return Fidelity(metrics[scorers.image_encoder.similarity_name][0], None if prompt is None else prompt[0])


def _without_words(prompt: str, concept: Concept) -> str:
    """The prompt for a model without the concept's words: if they are new embeddings, they are removed."""
    if not concept.words:
        return prompt
    for words in concept.tokens.values():
        prompt = prompt.replace(words, "")
    return " ".join(prompt.split())
