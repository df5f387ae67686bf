"""An image that is edited again and again on a page, and a folder that keeps every edit.

Edit number 3 is `e003.png` with its settings in it, and `e003-mask.png`, white where it was allowed to change: what was
painted, or what was found where nothing was. `edits.json` lists all of them with the `edit invert-and-replace` that
makes the same image again. An inversion is made once for what the image shows.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from backbone.cli.values.repeat import as_command
from backbone.io.files import keep_whole, refuse_gone, write_json
from backbone.io.local_server import NewestOnly
from backbone.io.run_folder import package_versions
from backbone.media.parameters import describe_concepts, describe_drawing
from backbone.media.sheet import save_png
from backbone.models.sample import refuse_negative
from edit.checks import check_prompt
from edit.inversion.inversion import Inversion, check_method, count_rounds, invert, settings_for
from edit.methods.prompt_to_prompt.replace import refuse_idle_negative
from edit.methods.prompt_to_prompt.replace import replace as replace_words
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.pictures import SourceImage, show_image
from edit.result import Result
from edit.run.open import OPENING, ModelWithConcepts, Opening, load_model, pick, replace_settings
from edit.run.report import mask_images
from edit.settings import PaintOptions, ReplaceOptions

RECORD, FOLDER = "edits.json", Path("edits")
MOST_INVERSIONS = 4  # that are held for images with other words


@dataclass(frozen=True, kw_only=True)
class Wish:
    """What the image shows, and what it should show."""

    source: str
    target: str
    negative: str = ""


@dataclass(frozen=True)
class Kept:
    """An edit that is kept: its number, what was wished, whether its place was painted, and how long it took."""

    number: int
    wish: Wish
    painted: bool
    file: str
    mask: str
    guidance: float
    seconds: float


class PaintBoard:
    """An image, a model, and the edits of it so far."""

    def __init__(
        self, asked: PaintOptions, image: SourceImage, loaded: ModelWithConcepts, folder: Path
    ) -> None:
        self.asked, self.image, self.loaded, self.folder = asked, image, loaded, folder
        self.shown = show_image(loaded.model, image)
        self.edits: list[Kept] = []
        self.turns = NewestOnly()
        self._inversions: dict[str, Inversion] = {}

    @classmethod
    def open(
        cls, asked: PaintOptions, image: SourceImage, options: Mapping[str, Any], folder: Path
    ) -> PaintBoard:
        """Load the model and the concepts; `UserError` where they do not fit, and for what no edit could take."""
        loaded = load_model(Opening(**pick(options, OPENING)))
        check_method(loaded.model, asked.method, asked.steps)
        loaded.model.schedule(asked.steps)
        refuse_negative(loaded.model, asked.negative, asked.guidance)
        refuse_idle_negative(asked.method, asked.negative)
        return cls(asked, image, loaded, folder)

    def edit(self, painted: Image.Image, wish: Wish) -> Kept:
        """The image as wished, changed where `painted` is bright, or where the words say if it is black all over.

        What it writes is written before it returns. Raises `Overtaken` when another call has come meanwhile, and
        `UserError` for prompts that share no words, a token that no concept has, and a folder that is gone.
        """
        source = self.loaded.resolve(check_prompt(wish.source, "source prompt"))
        target = self.loaded.resolve(check_prompt(wish.target, "target prompt"))
        refuse_idle_negative(self.asked.method, wish.negative)
        refuse_gone(self.folder, "the edit")
        mask = make_mask(painted, self.shown.size)
        settings = replace_settings(
            self.loaded,
            guidance=self.asked.guidance,
            negative=wish.negative,
            mask=mask,
            blend=None if mask is None else (),
        )
        with self.turns.turn() as advance:
            began = time.perf_counter()
            known = source in self._inversions
            rounds = 0 if known else count_rounds(self.asked.method, self.asked.steps) or 2 * self.asked.steps
            step = partial(advance, 1 / (rounds + self.asked.steps))
            inversion = self._inversions.get(source) or self._invert(source, settings, step)
            result = replace_words(inversion, target, settings, progress=step)
            return self._keep(wish, result, mask is not None, time.perf_counter() - began)

    def _invert(self, source: str, settings: ReplaceSettings, step: Any) -> Inversion:
        asked, loaded = self.asked, self.loaded
        inversion = invert(
            loaded.model, self.image, source, method=asked.method, steps=asked.steps, identity=loaded.identity,
            progress=step, **settings_for(
                asked.method, seed=asked.seed, iterations=asked.iterations, guidance=settings.guidance
            ),
        )  # fmt: skip
        while len(self._inversions) >= MOST_INVERSIONS:
            self._inversions.pop(next(iter(self._inversions)))
        self._inversions[source] = inversion
        return inversion

    def _keep(self, wish: Wish, result: Result, painted: bool, seconds: float) -> Kept:
        number, (image,) = len(self.edits), result.images
        guidance = float(result.facts["guidance"])
        kept = Kept(
            number,
            wish,
            painted,
            f"e{number:03d}.png",
            f"e{number:03d}-mask.png",
            guidance,
            round(seconds, 2),
        )
        facts = {
            "edit": "paint",
            "model": self.loaded.model.location.name,
            **self._settings(kept),
            "source": wish.source,
            "negative": wish.negative,
            **describe_concepts([one.folder for one in self.loaded.concepts], self.loaded.scale),
        }
        places = mask_images(result) or [Image.new("L", image.size, 255)]
        record = {
            "image": dict(result.encoded.facts),
            **self.loaded.facts(),
            "versions": package_versions(),
            "edits": [{**asdict(one), "command": self.command(one)} for one in (*self.edits, kept)],
        }
        refuse_gone(self.folder, "the edit")
        with keep_whole([self.folder / kept.mask, self.folder / kept.file]):
            save_png(self.folder / kept.mask, places[0])
            save_png(self.folder / kept.file, image, text=describe_drawing(wish.target, image.size, facts))
            write_json(self.folder / RECORD, record)
        self.edits.append(kept)
        return kept

    def _settings(self, kept: Kept) -> dict[str, Any]:
        asked = self.asked
        own = {"iterations": asked.iterations} if asked.method == "null-text" else {}
        return {
            "steps": asked.steps,
            "seed": asked.seed,
            "guidance": kept.guidance,
            "method": asked.method,
            **own,
        }

    def command(self, kept: Kept) -> str:
        """The `edit invert-and-replace` that makes the same image again."""
        wish = kept.wish
        shared = {one.name for one in fields(ReplaceOptions)} & {one.name for one in fields(self.asked)}
        said = {name: getattr(self.asked, name) for name in shared} | {
            "source": wish.source,
            "targets": (wish.target,),
            "negative": wish.negative,
            "guidance": kept.guidance,
            "mask": str(self.folder / kept.mask) if kept.painted else None,
            "blend": ("none",) if kept.painted else (),
            "out": None,
        }
        return as_command("edit invert-and-replace", ReplaceOptions(**said))


def make_mask(painted: Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """White where at least half of a pixel is painted [L, of `size`]; None where nothing is."""
    brightest = max(painted.convert("RGB").split(), key=lambda channel: channel.getextrema()[1])
    white = brightest.resize(size, Image.Resampling.BOX).point([0] * 128 + [255] * 128)
    return white if white.getbbox() else None


def describe_board(board: PaintBoard) -> dict[str, Any]:
    """What the page shows of a board: the image's size, what is in the fields, and all edits, the last one last."""
    asked = board.asked
    width, height = board.shown.size
    return {
        "image": Path(asked.image).name,
        "model": board.loaded.model.location.name,
        "concepts": [concept.folder.name for concept in board.loaded.concepts],
        "width": width,
        "height": height,
        "steps": asked.steps,
        "source": asked.source,
        "target": asked.target or asked.source,
        "negative": asked.negative,
        "edits": [describe_kept(kept) for kept in board.edits],
    }


def describe_kept(kept: Kept) -> dict[str, Any]:
    """What the page shows of an edit."""
    return {"number": kept.number, **asdict(kept.wish), "painted": kept.painted, "seconds": kept.seconds}
