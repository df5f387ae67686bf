"""An image that is edited repeatedly on a page, and a folder that keeps every edit.

Edit number 3 is `e003.png` with its settings as metadata, and `e003-mask.png`, white where it was allowed to change:
the painted region, or the one that was found. `edits.json` lists all of them with the `edit invert-and-replace` command
that repeats each. Every source prompt is inverted once.
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
from edit.inversion.inversion import Inversion, check_method, count_rounds, invert, select_settings
from edit.methods.prompt_to_prompt.replace import refuse_idle_negative
from edit.methods.prompt_to_prompt.replace import replace as replace_words
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.pictures import SourceImage, show_image
from edit.result import Result
from edit.run.open import OPENING, ModelWithConcepts, Opening, load_model, pick, replace_settings
from edit.run.report import render_masks
from edit.sampling import resolve_guidance
from edit.settings import PaintOptions, ReplaceOptions

RECORD, FOLDER = "edits.json", Path("edits")
MOST_INVERSIONS = 4  # kept in memory, one per source prompt


@dataclass(frozen=True, kw_only=True)
class EditRequest:
    """A request of the page: the source and target prompts."""

    source: str
    target: str
    negative: str = ""


@dataclass(frozen=True)
class SavedEdit:
    """A saved edit: its number, its request, whether its region was painted, and its seconds."""

    number: int
    wish: EditRequest
    painted: bool
    file: str
    mask: str
    guidance: float
    seconds: float


class PaintBoard:
    """An image, a model, and the edits of it so far."""

    def __init__(
        self, args: PaintOptions, image: SourceImage, loaded: ModelWithConcepts, folder: Path
    ) -> None:
        self.args, self.image, self.loaded, self.folder = args, image, loaded, folder
        self.shown = show_image(loaded.model, image)
        self.edits: list[SavedEdit] = []
        self.turns = NewestOnly()
        self._inversions: dict[str, Inversion] = {}

    @classmethod
    def open(
        cls, args: PaintOptions, image: SourceImage, options: Mapping[str, Any], folder: Path
    ) -> PaintBoard:
        """Load the model and the concepts; `UserError` where they do not fit, and for options that no edit takes."""
        loaded = load_model(Opening(**pick(options, OPENING)))
        check_method(loaded.model, args.method, args.steps)
        loaded.model.schedule(args.steps)
        refuse_negative(loaded.model, args.negative, resolve_guidance(loaded.model, args.guidance))
        refuse_idle_negative(args.method, args.negative)
        return cls(args, image, loaded, folder)

    def edit(self, painted: Image.Image, wish: EditRequest) -> SavedEdit:
        """Edit the image as wished where `painted` is bright, or where the words say if it is black all over.

        All files are written before it returns. Raises `Overtaken` when another call has come meanwhile, and
        `UserError` for prompts that share no words, a token that no concept has, and a folder that is gone.
        """
        source = self.loaded.resolve(check_prompt(wish.source, "source prompt"))
        target = self.loaded.resolve(check_prompt(wish.target, "target prompt"))
        refuse_idle_negative(self.args.method, wish.negative)
        refuse_gone(self.folder, "the edit")
        mask = make_mask(painted, self.shown.size)
        settings = replace_settings(
            self.loaded,
            guidance=self.args.guidance,
            negative=wish.negative,
            mask=mask,
            blend=None if mask is None else (),
        )
        with self.turns.turn() as advance:
            began = time.perf_counter()
            is_inverted = source in self._inversions
            rounds = (
                0 if is_inverted else count_rounds(self.args.method, self.args.steps) or 2 * self.args.steps
            )
            step = partial(advance, 1 / (rounds + self.args.steps))
            inversion = self._inversions.get(source) or self._invert(source, settings, step)
            result = replace_words(inversion, target, settings, progress=step)
            return self._keep(wish, result, mask is not None, time.perf_counter() - began)

    def _invert(self, source: str, settings: ReplaceSettings, step: Any) -> Inversion:
        args, loaded = self.args, self.loaded
        inversion = invert(
            loaded.model, self.image, source, method=args.method, steps=args.steps, identity=loaded.identity,
            progress=step, **select_settings(
                args.method, seed=args.seed, iterations=args.iterations, guidance=settings.guidance
            ),
        )  # fmt: skip
        while len(self._inversions) >= MOST_INVERSIONS:
            self._inversions.pop(next(iter(self._inversions)))
        self._inversions[source] = inversion
        return inversion

    def _keep(self, wish: EditRequest, result: Result, painted: bool, seconds: float) -> SavedEdit:
        number, (image,) = len(self.edits), result.images
        guidance = float(result.facts["guidance"])
        edit = SavedEdit(
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
            **self._collect_settings(edit),
            "source": wish.source,
            "negative": wish.negative,
            **describe_concepts([concept.folder for concept in self.loaded.concepts], self.loaded.scale),
        }
        masks = render_masks(result) or [Image.new("L", image.size, 255)]
        record = {
            "image": dict(result.encoded.facts),
            **self.loaded.facts(),
            "versions": package_versions(),
            "edits": [{**asdict(saved), "command": self.command(saved)} for saved in (*self.edits, edit)],
        }
        refuse_gone(self.folder, "the edit")
        with keep_whole([self.folder / edit.mask, self.folder / edit.file]):
            save_png(self.folder / edit.mask, masks[0])
            save_png(self.folder / edit.file, image, text=describe_drawing(wish.target, image.size, facts))
            write_json(self.folder / RECORD, record)
        self.edits.append(edit)
        return edit

    def _collect_settings(self, edit: SavedEdit) -> dict[str, Any]:
        args = self.args
        null_text = {"iterations": args.iterations} if args.method == "null-text" else {}
        return {
            "steps": args.steps,
            "seed": args.seed,
            "guidance": edit.guidance,
            "method": args.method,
            **null_text,
        }

    def command(self, edit: SavedEdit) -> str:
        """The `edit invert-and-replace` command that repeats the image."""
        wish = edit.wish
        shared = {field.name for field in fields(ReplaceOptions)} & {
            field.name for field in fields(self.args)
        }
        values = {name: getattr(self.args, name) for name in shared} | {
            "source": wish.source,
            "targets": (wish.target,),
            "negative": wish.negative,
            "guidance": edit.guidance,
            "mask": str(self.folder / edit.mask) if edit.painted else None,
            "blend": ("none",) if edit.painted else (),
            "out": None,
        }
        return as_command("edit invert-and-replace", ReplaceOptions(**values))


def make_mask(painted: Image.Image, size: tuple[int, int]) -> Image.Image | None:
    """White where at least half of a pixel is painted [L, of `size`]; None where nothing is."""
    brightest = max(painted.convert("RGB").split(), key=lambda channel: channel.getextrema()[1])
    white = brightest.resize(size, Image.Resampling.BOX).point([0] * 128 + [255] * 128)
    return white if white.getbbox() else None


def describe_board(board: PaintBoard) -> dict[str, Any]:
    """A board's state for the page: the image's size, the fields' contents, and all edits in order."""
    args = board.args
    width, height = board.shown.size
    return {
        "image": Path(args.image).name,
        "model": board.loaded.model.location.name,
        "concepts": [concept.folder.name for concept in board.loaded.concepts],
        "width": width,
        "height": height,
        "steps": args.steps,
        "source": args.source,
        "target": args.target or args.source,
        "negative": args.negative,
        "edits": [describe_kept(kept) for kept in board.edits],
    }


def describe_kept(edit: SavedEdit) -> dict[str, Any]:
    """An edit's state for the page."""
    return {"number": edit.number, **asdict(edit.wish), "painted": edit.painted, "seconds": edit.seconds}
