"""A run's sample images: some prompts, sampled by the model before and after training."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

from PIL.Image import Image

from align.settings import Settings
from backbone.adapters.concept import Concept, expand_tokens
from backbone.distributed import processes
from backbone.io.progress import progress
from backbone.io.report import heading, image_row, paragraph
from backbone.io.run_folder import BEFORE_AND_AFTER
from backbone.media.sheet import Cell, draw_sheet, save_png
from backbone.media.sources.decode import open_rgb
from backbone.models.few_step.model import get_sampling_defaults
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample

COUNT = 4  # prompts
SHEET = "sheet.png"
BEFORE, AFTER = "before", "after"


def draw_before(
    run: Path,
    model: Backbone,
    settings: Settings,
    prompts: Iterable[str],
    concepts: Sequence[Concept],
    *,
    steps_done: int,
) -> Pictures:
    """The run's pictures; those before training are sampled if `steps_done` is 0."""
    pictures = Pictures(run, model, settings, prompts, concepts)
    if not steps_done:
        pictures.draw(BEFORE)
    return pictures


class Pictures:
    """The first prompts of a run, drawn from the same noise before and after it, in a folder of the run."""

    def __init__(
        self,
        run: Path,
        model: Backbone,
        settings: Settings,
        prompts: Iterable[str],
        concepts: Sequence[Concept],
    ) -> None:
        self.run, self.model, self.settings = run, model, settings
        self.prompts = list(dict.fromkeys(prompts))[:COUNT]
        self.requests = [
            Request(expand_tokens(prompt, concepts, runs=None), (i, 0))
            for i, prompt in enumerate(self.prompts)
        ]

    def draw(self, stage: str) -> None:
        """Sample the prompts with the current model, on rank 0, or on all processes if it is sharded."""
        if not processes.is_participant():
            return
        settings = self.settings
        drawing = get_sampling_defaults(
            self.model,
            steps=settings.sample_steps or None,
            guidance=settings.guidance if settings.guidance >= 0 else None,
        )
        with progress(len(self.requests), f"drawing {stage} training", brief=True) as bar:
            images = sample(
                self.model,
                self.requests,
                **asdict(drawing),
                seed=settings.seed,
                advance=bar.advance_images,
            )
            for number, image in enumerate(images):
                if processes.is_main_process():
                    save_png(self._path(stage, number), image, text={"prompt": self.prompts[number]})

    def write_sheet(self) -> None:
        """Write `sheet.png`: above before, below after."""
        settings = self.settings
        rows = [[Cell(image, prompt) for image, prompt in self._read(stage)] for stage in (BEFORE, AFTER)]
        titles = [f"{self.run.name}: {describe(settings)}", f"Before, and after {settings.steps} steps"]
        page = [row for row in rows if row]
        if page:
            save_png(self.run / SHEET, draw_sheet(page, title=titles[0], note=titles[1]))

    def parts(self) -> list[str]:
        """The sampled pictures as parts of a report."""
        before, after = self._read(BEFORE), self._read(AFTER)
        parts = []
        if before:
            parts += [heading("What the model draws before training"), image_row(before)]
        if after:
            parts += [
                heading("What it draws after training"),
                paragraph("From the same noise, at the same prompts."),
                image_row(after),
            ]
        return parts

    def _read(self, stage: str) -> list[tuple[Image, str]]:
        paths = [(self._path(stage, number), prompt) for number, prompt in enumerate(self.prompts)]
        return [(open_rgb(path), prompt) for path, prompt in paths if path.exists()]

    def _path(self, stage: str, number: int) -> Path:
        return self.run / BEFORE_AND_AFTER / f"{stage}-{number}.png"


def describe(settings: Settings) -> str:
    """The title of a run: its loss, the model, the scorer, the steps."""
    scored = f", scored by {settings.online}" if settings.online else ""
    return f"{TITLES.get(settings.loss, settings.loss.upper())} on {settings.model}{scored}, {settings.steps} steps"


TITLES = {
    "dpo": "Diffusion-DPO",
    "hinge": "hinge loss",
    "mapo": "MaPO",
    "draft": "DRaFT",
    "sft": "supervised fine-tuning",
}
