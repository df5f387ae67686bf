"""Validation during training: metrics, the best checkpoint, early stopping, previews."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

import torch
from PIL.Image import Image

from backbone.adapters.concept import BEST, Concept, resolve_placeholder_tokens
from backbone.diffusion.losses import denoising_score_matching
from backbone.diffusion.noise import add_noise, generator
from backbone.distributed import processes
from backbone.distributed.processes import is_main_process, is_participant
from backbone.io.console import format_count, notify
from backbone.io.files import append_jsonl
from backbone.io.progress import progress
from backbone.io.run_folder import read_log, trim_log
from backbone.media.sheet import Cell, draw_sheet, save_png, split_rows
from backbone.models.few_step.model import get_sampling_defaults
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from customize.evaluation.metrics import (
    VALIDATION_PROMPTS,
    ConceptMetrics,
    EarlyStopping,
    Evaluator,
    Scorers,
    mean_similarity,
)
from customize.evaluation.survival import Survival
from customize.objectives.dreambooth import DreamBooth, weigh_levels
from customize.settings import Settings, describe_first_subject
from customize.training.few_step import ON, FewStepValidation
from customize.training.reporting.card import describe_training
from customize.training.reporting.report import STRIPS, RunReport

EVALUATIONS = "evaluations.jsonl"


class Validation:
    """Evaluates a run as it trains, and keeps the best weights. Does nothing without a scorer or with evaluation off.

    `read_subject` returns the subject's own images, cropped; it is only called if anything is evaluated.
    Of several processes rank 0 evaluates; with a sharded model all take part, and rank 0 writes.
    """

    def __init__(
        self,
        report: RunReport,
        training: DreamBooth,
        concept: Concept,
        read_subject: Callable[[], Sequence[Image]],
        few_step: FewStepValidation | None = None,
    ) -> None:
        self.run, self.report, self.training, self.concept = report.run, report, training, concept
        settings, model = training.settings, training.model
        local_scorer = model.location.local("scorer")
        self.evaluator = None
        self.few_step = few_step
        self.early_stopping: EarlyStopping[ConceptMetrics] = EarlyStopping(
            settings.patience or settings.steps
        )
        self.report.history = self.early_stopping.history
        if few_step is not None:
            self.report.few_step_name, self.report.few_step_history = (
                few_step.name,
                few_step.early_stopping.history,
            )
        if not settings.evaluation_steps or not is_participant():
            return
        with progress(None, "loading the scorer", brief=True):
            scorers = Scorers.load(settings.scorer, local_scorer)
            if scorers is None:
                return
            images = read_subject()
            self.evaluator = Evaluator(model, scorers, concept, settings, images)
            if is_main_process() and (others := describe_first_subject(settings)):
                notify(f"{others} So the first one decides which weights are kept in {BEST}/.")
            if few_step is not None:
                few_step.evaluator = Evaluator(model, scorers, concept, settings, images, few_step.drawing)
        self._restore()
        self.report.similarity = scorers.image_encoder.similarity_name
        self.report.ceiling = mean_similarity(self.evaluator.subject)

    def __call__(self, step: int) -> str:
        """Evaluate the run at this step, at most once; returns the reason to stop when patience has run out."""
        if self.evaluator is None:
            return ""
        settings = self.training.settings
        if not any(metrics.step == step for metrics in self.early_stopping.history):
            with self.training.averaged():
                metrics, images = self.evaluator.measure(step, measure_fixed_loss(self.training))
                few_step_images: Sequence[Image] = ()
                if self.few_step is not None:
                    best, few_step_images = self.few_step.measure(step, metrics.loss)
            is_best = self.early_stopping.update(metrics)
            if is_main_process():
                if few_step_images:
                    self._save_strip(metrics, few_step_images, folder=ON)
                self._save(metrics, images, best=(is_best if self.few_step is None else best) and step > 0)
        if settings.patience and self.selection.should_stop:
            return f"{settings.patience} evaluations without a better rating."
        return ""

    @property
    def selection(self) -> EarlyStopping[ConceptMetrics]:
        """The evaluations that choose the best step and stop the run: the few-step model's if there is one."""
        return self.early_stopping if self.few_step is None else self.few_step.early_stopping

    @property
    def earlier_best(self) -> int | None:
        """As `EarlyStopping.find_earlier_best`, of the evaluations that choose."""
        return (
            None if self.evaluator is None else self.selection.find_earlier_best(self.run, self.training.done)
        )

    def measure_survival(self) -> Survival | None:
        """The fidelity on the base and on the few-step model at the best step; None without a few-step model."""
        return None if self.few_step is None else self.few_step.measure_survival(self.early_stopping.history)

    def _save(self, metrics: ConceptMetrics, images: Sequence[Image], *, best: bool) -> None:
        """Write the metrics and the images, and the weights if they are the best so far."""
        append_jsonl(self.run / EVALUATIONS, asdict(metrics))
        self._save_strip(metrics, images)
        prompts = [prompt.format(self.training.settings.name_in_prompt()) for prompt in VALIDATION_PROMPTS]
        self.report.samples = list(zip(images, prompts, strict=False))  # behind them the class alone
        self.report.renew(metrics.step)
        if best:
            folder = self.run / BEST
            folder.mkdir(exist_ok=True)
            files = self.training.write(folder, {"limner_step": str(metrics.step)})
            replace(self.concept, **files).write(folder)

    def report_end(self) -> None:
        """Finish the report, and say which step was best."""
        history, settings = self.early_stopping.history, self.training.settings
        if self.evaluator is None or not history:
            self.report.finish(f"All {settings.steps} steps were taken.", None)
            return
        best, last = self.selection.best, history[-1]
        if survival := self.measure_survival():
            notify(survival.sentence())
            self.report.survival = survival
        stopped = last.step < settings.steps
        reason = (
            f"Stopped at step {last.step}: {settings.patience} evaluations without a better rating "
            f"than step {self.selection.highest.step}."
            if stopped
            else f"All {settings.steps} steps were taken."
        )
        notify(
            f"The best of {format_count(len(history), 'evaluation')} is step {best.step}, in {self.run / BEST}. "
            f"{reason}"
        )
        self.report.finish(reason, best.step)

    def _restore(self) -> None:
        """Read the evaluations of an interrupted run, and drop those after its checkpoint."""
        assert self.evaluator is not None
        path, last_step = self.run / EVALUATIONS, self.training.done
        if is_main_process():
            trim_log(path, last_step)
        self.early_stopping.history[:] = logged = read_log(path, ConceptMetrics, done=last_step)
        self.evaluator.baseline = logged[0] if logged else None
        if self.few_step is not None:
            self.few_step.restore()

    def _save_strip(self, metrics: ConceptMetrics, images: Sequence[Image], folder: Path = Path()) -> None:
        path = self.run / folder / STRIPS / f"step-{metrics.step:06d}.png"
        save_png(path, draw_sheet(split_rows(images, len(VALIDATION_PROMPTS)), cell=128))


NOISE_SAMPLES = 24


@torch.no_grad()
def measure_fixed_loss(training: DreamBooth) -> float:
    """The subject's denoising loss on fixed images, noise and levels, spread over the whole schedule."""
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
            conditions = training.encode_conditions(row)
        prediction = model.predict(add_noise(clean, noise, level), index, conditions)
        settings = training.settings
        weight = weigh_levels(level, path.prediction_type, settings.loss_weighting, settings.snr_gamma)
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
    """Samples the run's prompts with the adapter in training; `drawn` are the last images with their prompts."""

    def __init__(self, model: Backbone, settings: Settings, concept: Concept) -> None:
        self.model, self.settings = model, settings
        self.drawn: list[tuple[Image, str]] = []
        names = [subject.name_in_prompt() for subject in settings.subjects()]
        self.prompts = [
            prompt.replace("{}", names[number % len(names)])
            for number, prompt in enumerate(settings.sheet_prompts)
        ]
        self.requests = [
            Request(resolve_placeholder_tokens(prompt, [concept], runs=None), (i, 0))
            for i, prompt in enumerate(self.prompts)
        ]

    def save(
        self,
        path: Path,
        *,
        count: int,
        subject: Sequence[Image] = (),
        few_step: FewStepValidation | None = None,
        step: int | None = None,
    ) -> list[str]:
        """Write a sheet of the first `count` prompts, the subject's own images above them; return the prompts.

        `step` is the weights' step, unless they are the last. The run's model samples, or `few_step` with
        its own defaults.
        Of several processes rank 0 draws; the others take part where the model is sharded.
        """
        if not processes.is_participant():
            return []
        requests = self.requests[:count]
        steps, guidance = self.settings.sample_steps, self.settings.guidance
        drawing = (
            few_step.drawing
            if few_step
            else get_sampling_defaults(self.model, steps=steps, guidance=guidance)
        )
        with (
            few_step.open() if few_step else nullcontext(self.model) as model,
            progress(
                len(requests), "drawing the sheet" if subject else "drawing a preview", brief=True
            ) as bar,
        ):
            images: list[Image] = list(
                sample(
                    model,
                    requests,
                    **asdict(drawing),
                    seed=self.settings.seed,
                    advance=bar.advance_images,
                )
            )

        # The sheet: the subject's own images, then the drawn ones under their prompts
        samples = list(zip(images, self.prompts, strict=False))
        self.drawn = self.drawn if few_step else samples
        cells = [Cell(picture, prompt) for picture, prompt in samples]
        rows = ([list(subject)] if subject else []) + split_rows(cells, 4)
        titles = ["The subject", "What the model draws now"] if subject else []
        settings = self.settings
        sampling = f"{drawing.steps} steps, guidance {drawing.guidance:g}, seed {settings.seed}"
        progress_text = (
            format_count(settings.steps, "step")
            if step is None
            else f"the best, step {step} of {settings.steps}"
        )
        trained = f"{describe_training(settings)}, {progress_text}" if subject else path.stem
        note = f"{trained}; {few_step.name if few_step else settings.model}, {sampling}"
        if processes.is_main_process():
            save_png(
                path, draw_sheet(rows, title=self.settings.name_in_prompt(), note=note, row_titles=titles)
            )
        return self.prompts[:count]
