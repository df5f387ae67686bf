"""Watching a training: figures every so often, the best checkpoint kept, a word on when to stop, and the report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL.Image import Image

from backbone.adapters.concept import BEST, Concept, spoken
from backbone.diffusion.noise import add_noise, generator, target
from backbone.distributed import processes
from backbone.distributed.processes import is_writer, takes_part
from backbone.io.console import say
from backbone.io.files import append_jsonl, read_jsonl, write_text
from backbone.io.report import command, curve, curves, heading, paragraph, picture, table, write_report
from backbone.media.pictures import Picture
from backbone.media.sheet import Cell, in_rows, save_png, sheet
from backbone.media.transforms import square
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from customize.evaluate.metrics import VALIDATION_PROMPTS, ConceptMetrics, EarlyStopping, Evaluator, Scorers
from customize.objectives.dreambooth import Training, weighting
from customize.settings import Settings, as_flags

EVALUATIONS = "evaluations.jsonl"
REPORT = "report.html"
STRIPS = "evaluations"
RULE = (
    "The best checkpoint has the highest rating: the harmonic mean of how far the likeness has come, from where it "
    "started to that of the subject's pictures among themselves, and of how much obedience to prompts is left."
)


class Watch:
    """Evaluates a run as it trains. Without a scorer, when asked not to, or where another process does it: nothing.

    With a model that is cut up over the processes all evaluate together, and the writer writes.
    """

    def __init__(self, run: Path, training: Training, concept: Concept, pictures: Sequence[Picture]) -> None:
        self.run, self.training, self.concept = run, training, concept
        settings, model = training.settings, training.model
        own = model.location.local("scorer")
        self.evaluator = None
        self.patience = EarlyStopping(settings.patience or settings.steps)
        scorers = Scorers.load(settings.scorer, own) if settings.evaluation_steps and takes_part() else None
        if scorers is not None:
            self.evaluator = Evaluator(model, scorers, concept, settings, pictures)
            self._remember()

    def due(self, step: int) -> bool:
        """Whether it is time to look."""
        settings = self.training.settings
        if self.evaluator is None:
            return False
        return step % settings.evaluation_steps == 0 or step == settings.steps

    def look(self) -> bool:
        """Measures the run as it is now, keeps it if it is the best so far; whether it is time to stop.

        What was measured before a run was stopped is not measured again.
        """
        step = self.training.done
        if self.evaluator is None or any(figures.step == step for figures in self.patience.history):
            return False
        with self.training.averaged():
            figures, drawn = self.evaluator.measure(step, fixed_loss(self.training))
        best = self.patience.update(figures)
        if is_writer():
            self._keep(figures, drawn, best=best and step > 0)
        return bool(self.training.settings.patience) and self.patience.should_stop

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
        say(f"The best of {len(history)} evaluations is step {best.step}, in {self.run / BEST}. {why}")
        names = ("subject_fidelity", "prompt_fidelity", "prior_preservation", "diversity", "loss", "rating")
        likeness = f"{self.evaluator.scorers.image_encoder.likeness} with the subject"
        titles = (likeness, "CLIP-T", "PRES (lower is better)", "DIV", "loss", "rating")
        drawn = [
            curve(title, {title: [(f.step, getattr(f, name)) for f in history]}, marked=best.step)
            for name, title in zip(names, titles, strict=True)
        ]
        log = read_jsonl(self.run / "log.jsonl")
        drawn.append(
            curve("training loss (mean of 20)", {"": smoothed([(x["step"], x["loss"]) for x in log])})
        )
        rows = [(f.step, *(float(getattr(f, name)) for name in names)) for f in history]
        strips = [
            picture(self.run / STRIPS / f"step-{f.step:06d}.png", f"step {f.step}, rating {f.rating:.2f}")
            for f in history
        ]
        write_report(
            self.run / REPORT,
            settings.called(),
            [
                paragraph(f"{why} {RULE}"),
                curves(drawn),
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
        if is_writer():
            write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self.patience.history = [ConceptMetrics(**line) for line in kept]
        self.evaluator.baseline = self.patience.history[0] if kept else None

    def _strip(self, figures: ConceptMetrics, drawn: Sequence[Image]) -> None:
        path = self.run / STRIPS / f"step-{figures.step:06d}.png"
        save_png(path, sheet([[Cell(image) for image in drawn]], cell=112))


def smoothed(points: Sequence[tuple[float, float]], *, window: int = 20) -> list[tuple[float, float]]:
    """The mean of each `window` points, at their last x."""
    groups = [points[first : first + window] for first in range(0, len(points), window)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups if group]


LOSS_DRAWS = 24


@torch.no_grad()
def fixed_loss(training: Training) -> float:
    """The subject's denoising loss over the same pictures, noise and levels each time, spread over all levels."""
    model, material, settings = training.model, training.material, training.settings
    levels, total = model.path.levels, 0.0
    time = levels.time
    assert time is not None
    for k in range(LOSS_DRAWS):
        random = generator(settings.seed, "fixed loss", k)
        number = k % len(material.posteriors)
        clean = material.posteriors[number].mean
        noise = torch.randn(clean.shape, generator=random).to(clean.device)
        index = torch.tensor([int((k + 0.5) / LOSS_DRAWS * len(levels))])
        level = levels[index]
        with model.autocast():
            text = training.text(torch.tensor([number]))
            prediction = model.family.network(model.denoiser, text)(
                add_noise(clean, noise, level), time[index].to(clean.device)
            )
        wanted = target(clean, noise, level, model.path.prediction_type)
        weight = weighting(level, model.path.prediction_type, settings)
        total += float((prediction.float() - wanted).square().mean() * weight)
    return total / LOSS_DRAWS


class Previews:
    """Draws the run's prompts with the adapter in training."""

    def __init__(self, model: Backbone, settings: Settings, concept: Concept) -> None:
        self.model, self.settings = model, settings
        names = [subject.called() for subject in settings.subjects()]
        self.prompts = [
            prompt.replace("{}", names[number % len(names)])
            for number, prompt in enumerate(settings.sheet_prompts)
        ]
        self.requests = [Request(spoken(prompt, [concept]), (i, 0)) for i, prompt in enumerate(self.prompts)]

    def save(self, path: Path, *, count: int, pictures: list[Picture] | None = None) -> list[str]:
        """Writes a sheet of the first `count` prompts, the subject's pictures above them; gives the prompts.

        Of several processes the writer does, and the others draw along where the model is cut up.
        """
        if not processes.takes_part():
            return []
        drawn: list[Image] = list(
            sample(
                self.model,
                self.requests[:count],
                steps=self.settings.sample_steps,
                guidance=self.settings.guidance,
                seed=self.settings.seed,
            )
        )
        own = [square(picture.open(), self.model.resolution) for picture in (pictures or [])[:8]]
        cells = [Cell(picture, prompt) for picture, prompt in zip(drawn, self.prompts, strict=False)]
        rows = ([list(own)] if own else []) + in_rows(cells, 4)
        titles = ["The subject", "What the model draws now"] if own else []
        settings = self.settings
        how = f"{settings.sample_steps} steps, guidance {settings.guidance:g}, seed {settings.seed}"
        note = f"{settings.model}, {how}"
        if processes.is_writer():
            save_png(path, sheet(rows, title=self.settings.called(), note=note, row_titles=titles))
        return self.prompts[:count]
