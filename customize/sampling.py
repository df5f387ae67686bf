"""`customize sample`: sample images of prompts, with concepts applied, into a folder."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image

from backbone.adapters.apply import carry_over, load_concepts, say_idle_early_scale
from backbone.adapters.concept import (
    Concept,
    needs_whole_base,
    resolve_placeholder_tokens,
    resolve_prompts,
    summarize_concepts,
    trained_resolution,
)
from backbone.cli.conditions import RequestedControl, say_idle_rows, say_scales
from backbone.cli.sampling import OWN_FEW_STEP, DrawingOptions
from backbone.distributed import processes
from backbone.io.files import content_hash, write_json
from backbone.io.progress import progress
from backbone.io.run_folder import check_new_folder, hold_new_folder, package_versions, refuse_finished
from backbone.media.parameters import describe_concepts, describe_drawing
from backbone.media.sheet import Cell, draw_sheet, save_png, split_rows
from backbone.media.sources.decode import open_named
from backbone.memory.drawing import DrawingWorkload, fit_drawing
from backbone.models.control import (
    Condition,
    describe_conditions,
    gather_controls,
    name_networks,
    open_conditions,
)
from backbone.models.few_step.model import name_few_step, open_few_step
from backbone.models.model import Backbone
from backbone.models.references import encode_references, refuse_too_many
from backbone.models.sample import Request, find_latent_size, refuse_negative, resolve_sampling, sample

RECORD = "samples.json"
SAMPLES = Path("samples")


@dataclass(frozen=True)
class ExtraInputs:
    """A model's inputs besides the prompt: files of reference images, and conditions on the layout."""

    references: tuple[str, ...] = ()
    controls: tuple[RequestedControl, ...] = ()


NO_EXTRAS = ExtraInputs()


def sample_to_folder(
    prompts: Sequence[str],
    options: DrawingOptions,
    out: Path | None,
    *,
    concepts: Sequence[Concept] = (),
    extras: ExtraInputs = NO_EXTRAS,
    on: str = "",
    vram: float | None = None,
) -> Path:
    """Sample images of prompts into a folder; returns the path of its sheet.

    The folder holds `p00-s00.png` … (prompt number, sample number), `samples.json` and `sheet.png`.

    `out` is new or empty, or the folder of the same command, interrupted: existing images are not sampled again. None
    stands for `samples/`, or `samples-2/` … if that exists. `concepts` are those that `options` names, already read.
    Without a size, images are as large as the concepts' training images. `on` is a few-step model, made from the one
    that the concepts were trained on, which samples in its place; OWN_FEW_STEP is the known one of that model. `vram`
    is the device's memory in GiB. The maps of conditions on the layout are written as `condition-0-sketch.png` … and
    shown with the images. Image (i, j) depends only on the seed, i and j, and several processes share the work.

    Raises `UserError`, before any weights load, for a token that no concept has, a concept of another model, a size
    that the model cannot sample, more references than it reads, a bad map, or a folder with other contents.
    """
    processes.init_process(options.device)

    # All checks, before weights load
    expanded = resolve_prompts(prompts, concepts, model=options.model)
    negative = resolve_placeholder_tokens(options.negative, concepts, model=options.model)
    inputs = resolve_inputs(options, concepts, extras, on)
    refuse_finished(out)
    if vram is not None:
        inputs = inputs.fit_to(vram, images=len(prompts) * options.count)
    model, options, concepts = inputs.model, inputs.options, inputs.concepts
    say_idle_rows(extras.controls, float(options.guidance or 0))
    say_scales(extras.controls)
    conditions = open_conditions(model, extras.controls, inputs.size)
    record = inputs.describe(conditions)
    description = {**record, "prompts": expanded, "contents": inputs.hash_contents(conditions)}
    check_new_folder(out, SAMPLES, description)

    # The model with its concepts, and which images the folder lacks
    load_concepts(model, concepts, scale=options.scale)
    refuse_negative(model, options.negative, options.guidance)
    requests = [
        Request(prompt, (i, j), negative) for i, prompt in enumerate(expanded) for j in range(options.count)
    ]
    began = time.perf_counter()
    missing = [request for request in requests if out is None or not (out / image_name(request)).exists()]
    with _hold_folder(out, description) as folder:
        _write_images(inputs, prompts, missing, conditions, folder)
        processes.barrier()  # now all images are written
        if processes.is_main_process():
            seconds = round(time.perf_counter() - began, 2)
            write_index(
                folder,
                requests,
                prompts,
                {**record, "seconds": seconds, "versions": package_versions()},
                note=inputs.format_note(),
                columns=options.count if options.count > 1 else 4,
                maps=_write_maps(folder, conditions),
            )
    processes.end_process()
    return folder / "sheet.png"


def resolve_inputs(
    options: DrawingOptions, concepts: Sequence[Concept], extras: ExtraInputs, on: str
) -> Inputs:
    """The inputs with all defaults filled in, from configs alone; `on` is as in `sample_to_folder`.

    Raises `UserError` for a size that the model cannot sample, and for more references than it reads.
    """
    model, concepts, name = open_model(options, concepts, on)
    say_idle_early_scale(concepts, options.early_scale)
    options = resolve_sampling(options, model, resolution=trained_resolution(concepts))
    refuse_too_many(model, len(extras.references))
    return Inputs(model, name, options, concepts, extras)


@dataclass(frozen=True, eq=False)
class Inputs:
    """Everything that images are sampled from, except the prompts.

    model     the one that samples, without its concepts
    name      the model's name
    options   with the model's defaults in place of None
    concepts  carried over to the model, if they were trained on another one
    """

    model: Backbone
    name: str
    options: DrawingOptions
    concepts: Sequence[Concept]
    extras: ExtraInputs

    @property
    def size(self) -> tuple[int, int]:
        """The images' size (W, H) in pixels."""
        rows, columns = find_latent_size(self.model, self.options.size)
        return columns * self.model.factor, rows * self.model.factor

    def fit_to(self, vram: float, *, images: int) -> Inputs:
        """The same inputs with the model placed so that sampling fits on a device of `vram` GiB.

        Raises `UserError` if it cannot.
        """
        assert self.options.guidance is not None
        workload = DrawingWorkload(
            min(self.options.batch, images),
            find_latent_size(self.model, self.options.size),
            self.options.guidance,
            references=len(self.extras.references),
            conditions=name_networks(self.model, self.extras.controls),
            whole_base=any(map(needs_whole_base, self.concepts)),
        )
        return replace(self, model=fit_drawing(self.model, workload, vram))

    def describe(self, conditions: Sequence[Condition]) -> dict[str, Any]:
        """The settings that the images depend on, for `samples.json`."""
        references = list(self.extras.references)
        return {
            "model": self.name,
            "concepts": summarize_concepts(self.concepts),
            **self.options.facts(),
            "guided": list(self.options.guided),
            "scale": self.options.scale,
            **describe_conditions(conditions),
            **({"references": references} if references else {}),
        }

    def hash_contents(self, conditions: Sequence[Condition]) -> list[str]:
        """The hashes of all inputs: weights, maps, reference images."""
        files = [path for concept in self.concepts for path in concept.files]
        maps = [content_hash(condition.map.tobytes()) for condition in conditions]
        references = map(Path, self.extras.references)
        return [self.model.fingerprint, *map(content_hash, [*files, *references]), *maps]

    def describe_image(self, conditions: Sequence[Condition]) -> dict[str, Any]:
        """The metadata that each image is written with."""
        return {
            "model": self.name,
            **self.options.facts(),
            **describe_concepts([concept.folder for concept in self.concepts], self.options.scale),
            **({"conditions": [condition.brief() for condition in conditions]} if conditions else {}),
        }

    def format_note(self) -> str:
        """A line for the sheet: the model, its concepts, and the sampling settings."""
        drawn_by = " with ".join([self.name, *(str(concept.folder) for concept in self.concepts)])
        options = self.options
        return (
            f"{drawn_by}, {options.steps} steps, guidance {options.describe_guidance()}, seed {options.seed}"
        )


def open_model(
    options: DrawingOptions, concepts: Sequence[Concept], on: str
) -> tuple[Backbone, Sequence[Concept], str]:
    """(the sampling model, the concepts, carried over if they are of another model, the model's name)."""
    name = options.model or (concepts[0].model if concepts else "moji")
    backbone = Backbone.open(
        name, device=options.device, precision=options.precision, compile=options.compile
    )
    if not on:
        return backbone, concepts, name
    few_step = open_few_step(backbone, name_few_step(name) if on == OWN_FEW_STEP else on)
    return few_step, [carry_over(concept, backbone, few_step) for concept in concepts], few_step.location.name


@contextmanager
def _hold_folder(out: Path | None, description: Mapping[str, Any]) -> Iterator[Path]:
    """The new folder, made and held by the main process; the others learn its number."""
    processes.barrier()  # now every process has checked that it is free, and which images it lacks
    with ExitStack() as stack:
        folder = SAMPLES
        if processes.is_main_process():
            folder = stack.enter_context(hold_new_folder(out, SAMPLES, description))
        if out is None:
            number = int(folder.name.removeprefix(SAMPLES.name).lstrip("-") or 1)
            number = int(processes.reduce_sum([number if processes.is_main_process() else 0])[0])
            out = SAMPLES if number == 1 else SAMPLES.with_name(f"{SAMPLES.name}-{number}")
        yield out


def _write_images(
    inputs: Inputs,
    prompts: Sequence[str],
    requests: Sequence[Request],
    conditions: Sequence[Condition],
    out: Path,
) -> None:
    """Sample this process's share of the requests and write the images, with their settings as metadata.

    `prompts` are as they were typed.
    """
    model, options = inputs.model, inputs.options
    references = encode_references(model, [open_named(path) for path in inputs.extras.references])
    facts = inputs.describe_image(conditions)
    share = processes.split_items(requests, batch=options.batch)
    with progress(len(share), "drawing") as bar:
        images = sample(
            model,
            share,
            **options.for_sampler(),
            references=references,
            controls=gather_controls(conditions),
            advance=bar.advance_images,
        )
        for request, image in zip(share, images, strict=True):
            i, j = request.key
            text = describe_drawing(prompts[i], image.size, {**facts, "prompt_number": i, "sample": j})
            save_png(out / image_name(request), image, text=text)


def _write_maps(out: Path, conditions: Sequence[Condition]) -> list[Cell]:
    """Write the maps as the networks read them; returns their cells for the sheet."""
    cells = []
    for number, condition in enumerate(conditions):
        kind = condition.facts["kind"]
        save_png(out / f"condition-{number}-{kind}.png", condition.map)
        cells.append(Cell(condition.map, f"{kind}\nscale {condition.facts['scale']:g}"))
    return cells


def write_index(
    out: Path,
    requests: Sequence[Request],
    prompts: Sequence[str],
    record: Mapping[str, Any],
    *,
    note: str,
    columns: int,
    maps: Sequence[Cell] = (),
) -> None:
    """Write `samples.json` (the `record` and a list of the images) and a `sheet.png` of the images in the folder.

    `maps` come first in every row of the sheet.
    """
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
    several = any(request.key[1] for request in requests)
    cells = []
    for request in requests:
        i, j = request.key
        caption = f"{prompts[i]}\nsample {j}" if several else prompts[i]  # j, as in the file's name
        with Image.open(out / image_name(request)) as image:
            cells.append(Cell(image.convert("RGB"), caption))
    rows = [[*maps, *row] for row in split_rows(cells, columns)]
    save_png(out / "sheet.png", draw_sheet(rows, note=note))


def image_name(request: Request) -> str:
    """File name of a request's image: `p00-s00.png`."""
    i, j = request.key
    return f"p{i:02d}-s{j:02d}.png"
