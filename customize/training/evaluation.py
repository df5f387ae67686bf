"""Validation during training: metrics, the best checkpoint, early stopping, previews, and the report."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL.Image import Image

from backbone.adapters.concept import BEST, Concept, resolve_placeholder_tokens
from backbone.diffusion.losses import denoising_score_matching
from backbone.diffusion.noise import add_noise, generator
from backbone.distributed import processes
from backbone.distributed.processes import is_main_process, is_participant
from backbone.io.console import notify, progress
from backbone.io.files import append_jsonl, read_jsonl, write_text
from backbone.io.report import (
    command,
    heading,
    image_figure,
    line_plot,
    paragraph,
    plot_row,
    table,
    write_report,
)
from backbone.media.sheet import Cell, draw_sheet, save_png, split_rows
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from customize.evaluation.metrics import VALIDATION_PROMPTS, ConceptMetrics, EarlyStopping, Evaluator, Scorers
from customize.objectives.dreambooth import DreamBooth, level_weight
from customize.settings import Settings, as_flags

EVALUATIONS = "evaluations.jsonl"
REPORT = "report.html"
STRIPS = "evaluations"
RULE = (
    "The best checkpoint has the highest rating: the harmonic mean of how far the likeness has come, from where it "
    "started to that of the subject's pictures among themselves, and of how much obedience to prompts is left."
)


class Validation:
    """Evaluates a run as it trains, and keeps the best weights. Without a scorer, or when asked not to, nothing.

    `read_subject` gives the subject's own images, cropped; it is only called where there is something to evaluate.
    Of several processes the writer evaluates; with a sharded model all do together, and the writer writes.
    """

    def __init__(
        self, run: Path, training: DreamBooth, concept: Concept, read_subject: Callable[[], Sequence[Image]]
    ) -> None:
        self.run, self.training, self.concept = run, training, concept
        settings, model = training.settings, training.model
        own = model.location.local("scorer")
        self.evaluator = None
        self.patience = EarlyStopping(settings.patience or settings.steps)
        scorers = (
            Scorers.load(settings.scorer, own) if settings.evaluation_steps and is_participant() else None
        )
        if scorers is not None:
            self.evaluator = Evaluator(model, scorers, concept, settings, read_subject())
            self._remember()

    def __call__(self, step: int) -> str:
        """Placement the run as it is now, once for each step; the reason to stop, when patience has run out."""
        if self.evaluator is None:
            return ""
        settings = self.training.settings
        if not any(figures.step == step for figures in self.patience.history):
            with self.training.averaged():
                figures, drawn = self.evaluator.measure(step, fixed_loss(self.training))
            best = self.patience.update(figures)
            if is_main_process():
                self._keep(figures, drawn, best=best and step > 0)
        if settings.patience and self.patience.should_stop:
            return f"{settings.patience} evaluations without a better rating."
        return ""

    def _keep(self, figures: ConceptMetrics, drawn: Sequence[Image], *, best: bool) -> None:
        """Writes the figures and the pictures, and the weights if they are the best so far."""
        append_jsonl(self.run / EVALUATIONS, asdict(figures))
        self._strip(figures, drawn)
        if best:
            folder = self.run / BEST
            folder.mkdir(exist_ok=True)
            files = self.training.write(folder, {"limner_step": str(figures.step)})
            replace(self.concept, **files).write(folder)

    def report(self, settings: Settings) -> None:
        """Writes `report.html`, and says which step was best."""
        history = self.patience.history
        if self.evaluator is None or not history:
            return
        best, last = self.patience.best, history[-1]
        stopped = last.step < settings.steps
        why = (
            f"Stopped at step {last.step}: {settings.patience} evaluations without a better rating "
            f"than step {best.step}."
            if stopped
            else f"All {settings.steps} steps were taken."
        )
        notify(f"The best of {len(history)} evaluations is step {best.step}, in {self.run / BEST}. {why}")
        names = ("subject_fidelity", "prompt_fidelity", "prior_preservation", "diversity", "loss", "rating")
        likeness = f"{self.evaluator.scorers.image_encoder.similarity_name} with the subject"
        titles = (likeness, "CLIP-T", "PRES (lower is better)", "DIV", "loss", "rating")
        drawn = [
            line_plot(title, {title: [(f.step, getattr(f, name)) for f in history]}, marked=best.step)
            for name, title in zip(names, titles, strict=True)
        ]
        log = read_jsonl(self.run / "log.jsonl")
        drawn.append(
            line_plot("training loss (mean of 20)", {"": smoothed([(x["step"], x["loss"]) for x in log])})
        )
        rows = [(f.step, *(float(getattr(f, name)) for name in names)) for f in history]
        strips = [
            image_figure(
                self.run / STRIPS / f"step-{f.step:06d}.png", f"step {f.step}, rating {f.rating:.2f}"
            )
            for f in history
        ]
        write_report(
            self.run / REPORT,
            settings.called(),
            [
                paragraph(f"{why} {RULE}"),
                plot_row(drawn),
                heading("Evaluations"),
                table(("step", *titles), rows),
                heading("The same noise along training"),
                paragraph(
                    "First "
                    + ", ".join(p.format(settings.called()) for p in VALIDATION_PROMPTS)
                    + "; then the class alone."
                ),
                *strips,
                heading("Again"),
                command(as_flags(settings, self.run)),
            ],
        )

    def _remember(self) -> None:
        """Takes up what an interrupted run has measured, and forgets what lies behind its checkpoint."""
        path = self.run / EVALUATIONS
        if not path.exists() or self.evaluator is None:
            return
        kept = [line for line in read_jsonl(path) if line["step"] <= self.training.done]
        if is_main_process():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.patience.history = [ConceptMetrics(**line) for line in kept]
        self.evaluator.baseline = self.patience.history[0] if kept else None

    def _strip(self, figures: ConceptMetrics, drawn: Sequence[Image]) -> None:
        path = self.run / STRIPS / f"step-{figures.step:06d}.png"
        save_png(path, draw_sheet([[Cell(image) for image in drawn]], cell=112))


def smoothed(points: Sequence[tuple[float, float]], *, window: int = 20) -> list[tuple[float, float]]:
    """The mean of each `window` points, at their last x."""
    groups = [points[first : first + window] for first in range(0, len(points), window)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups if group]


NOISE_SAMPLES = 24


@torch.no_grad()
def fixed_loss(training: DreamBooth) -> float:
    """The subject's denoising loss over the same images, noise and levels each time, spread over all levels."""
    model, data, path = training.model, training.data, training.model.path
    total = 0.0
    for k in range(NOISE_SAMPLES):
        random = generator(training.settings.seed, "fixed loss", k)
        row = torch.tensor([k % len(data.posteriors)])
        clean = data.posteriors[int(row)].mean
        noise = torch.randn(clean.shape, generator=random).to(clean.device)
        index = torch.tensor([int((k + 0.5) / NOISE_SAMPLES * len(path.levels))])
        level = path.levels[index]
        with model.autocast():
            conditions = training.conditions(row)
        prediction = model.predict(add_noise(clean, noise, level), index, conditions)
        weight = level_weight(level, path.prediction_type, training.settings)
        total += float(
            denoising_score_matching(
                prediction,
                clean,
                noise=noise,
                level=level,
                prediction_type=path.prediction_type,
                weight=weight,
            )
        )
    return total / NOISE_SAMPLES


class Previews:
    """Draws the run's prompts with the adapter in training."""

    def __init__(self, model: Backbone, settings: Settings, concept: Concept) -> None:
        self.model, self.settings = model, settings
        names = [subject.called() for subject in settings.subjects()]
        self.prompts = [
            prompt.replace("{}", names[number % len(names)])
            for number, prompt in enumerate(settings.sheet_prompts)
        ]
        self.requests = [
            Request(resolve_placeholder_tokens(prompt, [concept], runs=None), (i, 0))
            for i, prompt in enumerate(self.prompts)
        ]

    def save(self, path: Path, *, count: int, subject: Sequence[Image] = ()) -> list[str]:
        """Writes a sheet of the first `count` prompts, the subject's own images above them; gives the prompts.

        Of several processes the writer does, and the others draw along where the model is sharded.
        """
        if not processes.is_participant():
            return []
        requests = self.requests[:count]
        with progress(
            len(requests), "drawing the sheet" if subject else "drawing a preview", brief=True
        ) as bar:
            drawn: list[Image] = list(
                sample(
                    self.model,
                    requests,
                    steps=self.settings.sample_steps,
                    guidance=self.settings.guidance,
                    seed=self.settings.seed,
                    advance=bar.advance_images,
                )
            )
        cells = [Cell(picture, prompt) for picture, prompt in zip(drawn, self.prompts, strict=False)]
        rows = ([list(subject)] if subject else []) + split_rows(cells, 4)
        titles = ["The subject", "What the model draws now"] if subject else []
        settings = self.settings
        how = f"{settings.sample_steps} steps, guidance {settings.guidance:g}, seed {settings.seed}"
        note = f"{settings.model}, {how}"
        if processes.is_main_process():
            save_png(path, draw_sheet(rows, title=self.settings.called(), note=note, row_titles=titles))
        return self.prompts[:count]
