"""A sketch pad: a model that draws under one's lines, as often as they change, and a folder that keeps every drawing.

Drawing number 3 is `d003-sketch.png`, the lines as the network reads them, and `d003-s00.png` …, each with its settings
in it. `drawings.json` lists all of them with the `customize sample` that draws the same images again.
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
from backbone.cli.conditions import AskedControl, AskedMap
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
from backbone.models.sample import Request, latent_size, refuse_negative, resolve_sampling, sample
from customize.sample_settings import SampleOptions
from customize.sampling import open_model
from customize.sketch.settings import SketchOptions

RECORD, FOLDER, KIND = "drawings.json", Path("drawings"), "sketch"
MOST_IMAGES = 8  # of one drawing
SEEDS = 2**63


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What is to be drawn under the lines.

    scale  of the control network: 0 is without the lines

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
class Drawn:
    """A drawing that is kept: its number, what was wished, its files, and how long it took."""

    number: int
    wish: Wish
    sketch: str
    files: tuple[str, ...]
    seconds: float


class SketchPad:
    """A model with its network for sketches, and what has been drawn with it."""

    def __init__(
        self,
        asked: SketchOptions,
        model: Backbone,
        name: str,
        network: OpenedControl,
        concepts: Sequence[Concept],
        folder: Path,
    ) -> None:
        rows, columns = latent_size(model, asked.size)
        self.size = columns * model.factor, rows * model.factor
        self.asked, self.model, self.name, self.network = asked, model, name, network
        self.concepts, self.folder = concepts, folder
        self.drawings: list[Drawn] = []
        self.turns = NewestOnly()

    @classmethod
    def open(cls, asked: SketchOptions, concepts: Sequence[Concept], folder: Path) -> SketchPad:
        """Load the model, its network for sketches and the concepts; `UserError` where one of them does not fit."""
        model, concepts, name = open_model(asked, concepts, asked.few_step)
        say_idle_early_scale(concepts, asked.early_scale)
        asked = resolve_sampling(asked, model, resolution=trained_resolution(concepts))
        ((_, where),) = name_networks(model, [AskedControl(AskedMap(KIND, ""), asked.controlnet)])
        network = open_control(model, where)
        load_concepts(model, concepts, scale=asked.scale)
        return cls(asked, model, name, network, concepts, folder)

    def draw(self, lines: Image.Image, wish: Wish) -> Drawn:
        """The images of a wish under black lines on white; they and the record are written before it returns.

        Raises `Overtaken` when another call has come meanwhile, and `UserError` for a page without lines, a token that
        no concept has, a negative prompt that the model does not read, and a folder that is gone.
        """
        prompt, negative = (
            resolve_placeholder_tokens(text, self.concepts, model=self.asked.model)
            for text in (wish.prompt, wish.negative)
        )
        refuse_negative(self.model, wish.negative, self.asked.guidance)
        refuse_gone(self.folder, "the drawing")
        condition = self._condition(lines, wish.scale)
        requests = [Request(prompt, (0, j), negative) for j in range(wish.count)]
        how = {**self.asked.for_sampler(), "seed": wish.seed, "controls": gather_controls([condition])}
        with self.turns.turn() as advance:
            began = time.perf_counter()
            images = list(
                sample(self.model, requests, advance=lambda work: advance(work / wish.count), **how)
            )
            return self._keep(wish, condition, images, time.perf_counter() - began)

    def _condition(self, lines: Image.Image, scale: float) -> Condition:
        asked = AskedControl(AskedMap(KIND, "The page"), scale=scale)
        white_on_black = resize_map(ImageOps.invert(lines.convert("RGB")), KIND, self.size)
        return condition_on(self.model, asked, white_on_black, self.size, self.network)

    def _keep(self, wish: Wish, condition: Condition, images: Sequence[Image.Image], seconds: float) -> Drawn:
        number = len(self.drawings)
        stem = f"d{number:03d}"
        sketch, files = f"{stem}-{KIND}.png", tuple(f"{stem}-s{j:02d}.png" for j in range(len(images)))
        asked = replace(self.asked, seed=wish.seed, negative=wish.negative)
        facts = {
            "model": self.name,
            **asked.facts(),
            **describe_concepts([concept.folder for concept in self.concepts], asked.scale),
            "conditions": [{**condition.brief(), "map": sketch}],
        }
        drawn = Drawn(number, wish, sketch, files, round(seconds, 2))
        record = {
            "model": self.name,
            "network": self.network.name,
            "concepts": summarize_concepts(self.concepts),
            **{key: value for key, value in self.asked.facts().items() if key not in ("seed", "negative")},
            "versions": package_versions(),
            "drawings": [{**asdict(one), "command": self.command(one)} for one in (*self.drawings, drawn)],
        }
        refuse_gone(self.folder, "the drawing")
        with keep_whole([self.folder / name for name in (sketch, *files)]):
            save_png(self.folder / sketch, condition.map)
            for j, (file, image) in enumerate(zip(files, images, strict=True)):
                text = describe_drawing(wish.prompt, image.size, {**facts, "sample": j})
                save_png(self.folder / file, image, text=text)
            write_json(self.folder / RECORD, record)
        self.drawings.append(drawn)
        return drawn

    def command(self, drawn: Drawn) -> str:
        """The `customize sample` that draws the same images again."""
        wish = drawn.wish
        shared = {one.name for one in fields(SampleOptions)} & {one.name for one in fields(self.asked)}
        said = {name: getattr(self.asked, name) for name in shared} | asdict(wish)
        said |= {
            "words": (said.pop("prompt"),),
            "condition": (f"{KIND}={self.folder / drawn.sketch}",),
            "controlnet": (self.asked.controlnet,) if self.asked.controlnet else (),
            "condition_scale": (wish.scale,),
            "scale": self.asked.scale,
            "out": None,
        }
        return as_command("customize sample", SampleOptions(**said))


def describe_pad(pad: SketchPad) -> dict[str, Any]:
    """What the page shows of a pad: size, settings, and all drawings, the last one last."""
    asked = pad.asked
    return {
        "model": pad.name,
        "concepts": [concept.folder.name for concept in pad.concepts],
        "width": pad.size[0],
        "height": pad.size[1],
        "steps": asked.steps,
        "prompt": asked.words,
        "negative": asked.negative,
        "seed": asked.seed,
        "scale": get_condition_defaults(pad.model, pad.network.record, KIND)["scale"],
        "count": asked.count,
        "most": MOST_IMAGES,
        "drawings": [describe_drawn(drawn) for drawn in pad.drawings],
    }


def describe_drawn(drawn: Drawn) -> dict[str, Any]:
    """What the page shows of a drawing."""
    return {
        "number": drawn.number,
        **asdict(drawn.wish),
        "images": len(drawn.files),
        "seconds": drawn.seconds,
    }
