"""A sketch pad: a model that samples under the user's lines whenever they change, and a folder of all drawings.

Drawing number 3 is `d003-sketch.png`, the lines as the network reads them, and `d003-s00.png` …, each with its settings
as metadata. `drawings.json` lists all of them with the `customize sample` command that repeats them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from backbone.adapters.apply import load_concepts, say_idle_early_scale
from backbone.adapters.concept import (
    Concept,
    resolve_placeholder_tokens,
    summarize_concepts,
    trained_resolution,
)
from backbone.cli.conditions import RequestedControl, RequestedMap
from backbone.cli.values.repeat import as_command
from backbone.io.console import UserError
from backbone.io.files import keep_whole, refuse_gone, write_json
from backbone.io.local_server import NewestOnly
from backbone.io.run_folder import package_versions
from backbone.media.control.maps import resize_map
from backbone.media.parameters import describe_concepts, describe_drawing
from backbone.media.sheet import save_png
from backbone.models.control import (
    Condition,
    OpenedControl,
    condition_on,
    gather_controls,
    get_condition_defaults,
    name_networks,
    open_control,
)
from backbone.models.model import Backbone
from backbone.models.sample import Request, find_latent_size, refuse_negative, resolve_sampling, sample
from customize.sample_settings import SampleOptions
from customize.sampling import open_model
from customize.sketch.settings import SketchOptions

RECORD, FOLDER, KIND = "drawings.json", Path("drawings"), "sketch"
MOST_IMAGES = 8  # per drawing
SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class SketchRequest:
    """A request of the page: what to sample under the lines.

    scale  of the control network; 0 ignores the lines

    Raises `UserError` without a prompt, and for a seed, a scale or a number of images out of bounds.
    """

    prompt: str
    negative: str = ""
    seed: int = 0
    scale: float = 1.0
    count: int = 1

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise UserError("Say in words what it is.")
        if not 0 <= self.scale <= 2:
            raise UserError(f"The lines' strength is 0 to 2, not {self.scale:g}.")
        if not 1 <= self.count <= MOST_IMAGES:
            raise UserError(f"1 to {MOST_IMAGES} images are drawn at once, not {self.count}.")
        if not -SEEDS <= self.seed < SEEDS:
            raise UserError(f"The seed {self.seed} has more than 64 bits. Choose a smaller one.")


@dataclass(frozen=True)
class SavedDrawing:
    """A saved drawing: its number, its request, its files, and its seconds."""

    number: int
    wish: SketchRequest
    sketch: str
    files: tuple[str, ...]
    seconds: float


class SketchPad:
    """A model with its network for sketches, and the drawings made with it."""

    def __init__(
        self,
        options: SketchOptions,
        model: Backbone,
        name: str,
        network: OpenedControl,
        concepts: Sequence[Concept],
        folder: Path,
    ) -> None:
        rows, columns = find_latent_size(model, options.size)
        self.size = columns * model.factor, rows * model.factor
        self.options, self.model, self.name, self.network = options, model, name, network
        self.concepts, self.folder = concepts, folder
        self.drawings: list[SavedDrawing] = []
        self.turns = NewestOnly()

    @classmethod
    def open(cls, options: SketchOptions, concepts: Sequence[Concept], folder: Path) -> SketchPad:
        """Load the model, its network for sketches and the concepts; `UserError` if one of them does not fit."""
        model, concepts, name = open_model(options, concepts, options.few_step)
        say_idle_early_scale(concepts, options.early_scale)
        options = resolve_sampling(options, model, resolution=trained_resolution(concepts))
        ((_, location),) = name_networks(
            model, [RequestedControl(RequestedMap(KIND, ""), options.controlnet)]
        )
        network = open_control(model, location)
        load_concepts(model, concepts, scale=options.scale)
        return cls(options, model, name, network, concepts, folder)

    def draw(self, lines: Image.Image, request: SketchRequest) -> SavedDrawing:
        """The images of a request under black lines on white; they and the record are written before it returns.

        Raises `Overtaken` when another call has come meanwhile, and `UserError` for a page without lines, a token that
        no concept has, a negative prompt that the model does not read, and a folder that is gone.
        """
        prompt, negative = (
            resolve_placeholder_tokens(text, self.concepts, model=self.options.model)
            for text in (request.prompt, request.negative)
        )
        refuse_negative(self.model, request.negative, self.options.guidance)
        refuse_gone(self.folder, "the drawing")
        condition = self._condition(lines, request.scale)
        requests = [Request(prompt, (0, j), negative) for j in range(request.count)]
        settings = {
            **self.options.for_sampler(),
            "seed": request.seed,
            "controls": gather_controls([condition]),
        }
        with self.turns.turn() as advance:
            began = time.perf_counter()
            images = list(
                sample(self.model, requests, advance=lambda work: advance(work / request.count), **settings)
            )
            return self._keep(request, condition, images, time.perf_counter() - began)

    def _condition(self, lines: Image.Image, scale: float) -> Condition:
        requested = RequestedControl(RequestedMap(KIND, "The page"), scale=scale)
        white_on_black = resize_map(ImageOps.invert(lines.convert("RGB")), KIND, self.size)
        return condition_on(self.model, requested, white_on_black, self.size, self.network)

    def _keep(
        self, request: SketchRequest, condition: Condition, images: Sequence[Image.Image], seconds: float
    ) -> SavedDrawing:
        number = len(self.drawings)
        stem = f"d{number:03d}"
        sketch, files = f"{stem}-{KIND}.png", tuple(f"{stem}-s{j:02d}.png" for j in range(len(images)))
        options = replace(self.options, seed=request.seed, negative=request.negative)
        facts = {
            "model": self.name,
            **options.facts(),
            **describe_concepts([concept.folder for concept in self.concepts], options.scale),
            "conditions": [{**condition.brief(), "map": sketch}],
        }
        drawing = SavedDrawing(number, request, sketch, files, round(seconds, 2))
        record = {
            "model": self.name,
            "network": self.network.name,
            "concepts": summarize_concepts(self.concepts),
            **{key: value for key, value in self.options.facts().items() if key not in ("seed", "negative")},
            "versions": package_versions(),
            "drawings": [
                {**asdict(saved), "command": self.command(saved)} for saved in (*self.drawings, drawing)
            ],
        }
        refuse_gone(self.folder, "the drawing")
        with keep_whole([self.folder / name for name in (sketch, *files)]):
            save_png(self.folder / sketch, condition.map)
            for j, (file, image) in enumerate(zip(files, images, strict=True)):
                text = describe_drawing(request.prompt, image.size, {**facts, "sample": j})
                save_png(self.folder / file, image, text=text)
            write_json(self.folder / RECORD, record)
        self.drawings.append(drawing)
        return drawing

    def command(self, drawing: SavedDrawing) -> str:
        """The `customize sample` command that repeats the images."""
        request = drawing.wish
        shared = {field.name for field in fields(SampleOptions)} & {
            field.name for field in fields(self.options)
        }
        values = {name: getattr(self.options, name) for name in shared} | asdict(request)
        values |= {
            "words": (values.pop("prompt"),),
            "condition": (f"{KIND}={self.folder / drawing.sketch}",),
            "controlnet": (self.options.controlnet,) if self.options.controlnet else (),
            "condition_scale": (request.scale,),
            "scale": self.options.scale,
            "out": None,
        }
        return as_command("customize sample", SampleOptions(**values))


def describe_pad(pad: SketchPad) -> dict[str, Any]:
    """A pad's state for the page: size, settings, and all drawings in order."""
    options = pad.options
    return {
        "model": pad.name,
        "concepts": [concept.folder.name for concept in pad.concepts],
        "width": pad.size[0],
        "height": pad.size[1],
        "steps": options.steps,
        "prompt": options.words,
        "negative": options.negative,
        "seed": options.seed,
        "scale": get_condition_defaults(pad.model, pad.network.record, KIND)["scale"],
        "count": options.count,
        "most": MOST_IMAGES,
        "drawings": [describe_saved_drawing(drawing) for drawing in pad.drawings],
    }


def describe_saved_drawing(drawing: SavedDrawing) -> dict[str, Any]:
    """A drawing's state for the page."""
    return {
        "number": drawing.number,
        **asdict(drawing.wish),
        "images": len(drawing.files),
        "seconds": drawing.seconds,
    }
