"""A run's `report.html`: curves with explanations, the subject beside samples. It is rewritten as the run trains."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL.Image import Image

from backbone.adapters.concept import BEST
from backbone.io.console import notify_once
from backbone.io.files import read_jsonl
from backbone.io.report import (
    command_block,
    heading,
    image_figure,
    image_row,
    line_plot,
    paragraph,
    plot_row,
    table,
    write_report,
)
from backbone.training.run import LOG, LoggedLoss
from customize.evaluation.edits import EditMetrics
from customize.evaluation.metrics import VALIDATION_PROMPTS, ConceptMetrics
from customize.evaluation.survival import Survival
from customize.settings import Settings, as_command
from customize.training.reporting.card import describe_training

REPORT = "report.html"
STRIPS = "evaluations"
PREVIEWS = "previews"
RENEW_SECONDS = 15
RULE = (
    "The best checkpoint is the latest one that none beats by more than the noise in its rating: the harmonic mean of "
    "how far subject fidelity has come, from where it started to that of the subject's pictures among themselves, and "
    "of how much prompt fidelity is left."
)


@dataclass
class RunReport:
    """The report of a run folder.

    subject   some of the subject's own images
    similarity  name of the image similarity: CLIP-I or DINO
    ceiling   mean similarity between the subject's own images
    history   the evaluations so far
    samples   the last images that the model sampled, with captions
    few_step_name, few_step_history, survival   of a few-step model that the run is shown on too
    """

    run: Path
    settings: Settings
    subject: Sequence[Image]
    similarity: str = "CLIP-I"
    ceiling: float | None = None
    history: Sequence[ConceptMetrics] = ()
    samples: Sequence[tuple[Image, str]] = field(default=())
    few_step_name: str = ""
    few_step_history: Sequence[ConceptMetrics] = ()
    survival: Survival | None = None

    def renew(self, step: int) -> None:
        """Write the page of a run in progress, which a browser reloads by itself."""
        notify_once(f"{self.run / REPORT} shows the progress and updates itself.")
        status = f"Step {step} of {self.settings.steps}. This page updates itself during the run."
        self._write([paragraph(status)], step, renew=RENEW_SECONDS)

    def finish(self, reason: str, best: int | None) -> None:
        """Write the page of a finished run; `best` is the step of its best checkpoint, if it kept one."""
        call = [
            "customize",
            "sample",
            f"a {self.settings.name_in_prompt()} in the snow",
            "--concept",
            str(self.run),
        ]
        weights = (
            []
            if best is None
            else [
                paragraph(
                    f"This draws with the weights in {BEST}/, those of step {best}; add --checkpoint last for those of "
                    f"the last step. {RULE}"
                )
            ]
        )
        step = max([figures.step for figures in self.history], default=self.settings.steps)
        survived = [] if self.survival is None else [paragraph(self.survival.sentence())]
        self._write(
            [paragraph(reason), command_block(shlex.join(call)), *weights, *survived], step, best=best
        )

    def _write(self, status: Sequence[str], step: int, *, best: int | None = None, renew: int = 0) -> None:
        settings = self.settings
        title = (
            f"{settings.name_in_prompt()}: {describe_training(settings)} on {settings.model}, "
            f"{settings.steps} steps"
        )
        parts = [
            *status,
            *self._show_pictures(step if best is None else best),
            *self._plot_metrics(best),
            *self._show_steps(step),
        ]
        write_report(
            self.run / REPORT,
            title,
            [*parts, heading("Again"), command_block(as_command(settings, self.run))],
            renew=renew,
        )

    def _show_pictures(self, step: int) -> list[str]:
        """The subject's images and the model's samples."""
        parts = [heading("The subject"), image_row((image, "") for image in self.subject)]
        if self.samples:
            parts += [heading(f"What the model draws at step {step}"), image_row(self.samples)]
        return parts

    def _plot_metrics(self, best: int | None) -> list[str]:
        """Plots of the evaluations' metrics and the training loss, with explanations, and as a table."""
        history, names = self.history, self._explain_metrics()
        plots = []
        for name, (title, note) in names.items():
            lines = {title: [(f.step, getattr(f, name)) for f in history]}
            if self.few_step_history and name != "loss":
                lines |= {
                    f"on {self.few_step_name}": [(f.step, getattr(f, name)) for f in self.few_step_history]
                }
            level = self.ceiling if name == "subject_fidelity" else None
            plots.append(line_plot(title, lines, marked=best, level=level, note=note))
        plots.append(plot_loss(self.run))
        parts = [heading("How it went"), plot_row(plots)] if any(plots) else []
        for section, figures in (
            ("Evaluations", history),
            (f"On {self.few_step_name}", self.few_step_history),
        ):
            rows = [(f.step, *(float(getattr(f, name)) for name in names)) for f in figures]
            titles = [title.split(":")[0] for title, _ in names.values()]
            parts += [heading(section), table(("step", *titles), rows)] if rows else []
        return parts

    def _explain_metrics(self) -> dict[str, tuple[str, str]]:
        """The metrics of an evaluation: name → title, explanation."""
        noun, name = self.settings.class_noun, self.settings.name_in_prompt()
        return {
            "subject_fidelity": (
                f"{self.similarity}: subject fidelity",
                f"How alike pictures of “{name}” and yours are; 1 is the same picture. It should rise towards the "
                "dashed line, the similarity of your images among themselves.",
            ),
            "prompt_fidelity": (
                "CLIP-T: prompt fidelity",
                f"How well the same pictures fit their prompts with “{noun}” in the token's place. The scorer knows "
                f"the class and not your subject, so this falls as the pictures come to show yours rather than any "
                f"{noun}; that alone is no fault.",
            ),
            "prompt_precision": (
                "Prompt precision",
                "How surely the scorer tells by a picture which of the evaluation's prompts it is of. The subject is "
                "the same in all of them and takes no part. Where this falls, prompts are no longer followed: take an "
                "earlier step.",
            ),
            "prior_preservation": (
                "PRES (lower is better): similarity of the class to the subject",
                f"How alike pictures of a plain “{noun}” are to yours. A rise means that every {noun} comes to look "
                "like the subject.",
            ),
            "diversity": (
                "DIV: diversity of the class",
                f"How much pictures of a plain “{noun}” differ from one another. Near 0 they are all the same.",
            ),
            "loss": (
                "Loss at fixed noise",
                "The denoising error of your pictures at the same noise each time. It falls as they are learned, and "
                "says little about new pictures.",
            ),
            "rating": (
                "Rating",
                "Subject fidelity gained and prompt precision kept, in one number; dashed: the best step.",
            ),
        }

    def _show_steps(self, step: int) -> list[str]:
        """The evaluations' pictures and the previews, step by step."""
        parts = []
        if self.history:
            prompts = ", ".join(p.format(self.settings.name_in_prompt()) for p in VALIDATION_PROMPTS)
            parts += [
                heading("The same noise along training"),
                paragraph(f"Above: {prompts}. Below: the class alone, without the token."),
            ]
            for f in self.history:
                path = self.run / STRIPS / f"step-{f.step:06d}.png"
                parts.append(image_figure(path, f"step {f.step}, rating {f.rating:.2f}"))
        previews = sorted((self.run / PREVIEWS).glob("step-*.png"))
        numbered = [(path, int(path.stem.removeprefix("step-"))) for path in previews]
        if reached := [(path, number) for path, number in numbered if number <= step]:
            parts += [
                heading("Previews"),
                *(image_figure(path, f"step {number}") for path, number in reached),
            ]
        return parts


def smooth_points(points: Sequence[tuple[float, float]], *, window: int = 20) -> list[tuple[float, float]]:
    """The mean of every `window` points, at their last x."""
    groups = [points[first : first + window] for first in range(0, len(points), window)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups if group]


@dataclass
class EditReport:
    """The report of a run that learns edits.

    sources  images of some pairs before the edit
    history  the evaluations so far
    samples  the model's last edits of held-out images, with the instructions
    """

    run: Path
    settings: Settings
    sources: Sequence[Image]
    history: Sequence[EditMetrics] = ()
    samples: Sequence[tuple[Image, str]] = field(default=())

    def renew(self, step: int) -> None:
        """Write the page of a run in progress, which a browser reloads by itself."""
        notify_once(f"{self.run / REPORT} shows the progress and updates itself.")
        status = f"Step {step} of {self.settings.steps}. This page updates itself during the run."
        self._write([paragraph(status)], renew=RENEW_SECONDS)

    def finish(self, reason: str, best: int | None) -> None:
        """Write the page of a finished run; `best` is the step of its best checkpoint, if it kept one."""
        call = ["edit", "instruct", "photo.png", "--instruction", "…", "--concept", str(self.run)]
        parts = (
            []
            if best is None
            else [
                paragraph(
                    f"This edits with the weights in {BEST}/, those of step {best}, the latest that none beats "
                    "by more than noise in how near its edits of held-out images are to the true ones; add "
                    "--checkpoint last for those of the last step."
                )
            ]
        )
        self._write([paragraph(reason), command_block(shlex.join(call)), *parts], best=best)

    def _write(self, status: Sequence[str], *, best: int | None = None, renew: int = 0) -> None:
        settings, history = self.settings, self.history
        parts = [*status, heading("Before"), image_row((image, "") for image in self.sources)]
        if self.samples:
            parts += [heading("What the model makes of held-out images"), image_row(self.samples)]
        plots = [
            line_plot(title, {title: points}, marked=best, note=note)
            for name, (title, note) in EDIT_FIGURES.items()
            if (points := [(f.step, v) for f in history if (v := getattr(f, name)) is not None])
        ]
        parts += [heading("How it went"), plot_row([*plots, plot_loss(self.run)])]
        if history:
            rows = [
                (f.step, *("–" if (v := getattr(f, name)) is None else v for name in EDIT_FIGURES))
                for f in history
            ]
            titles = [title.split(":")[0] for title, _ in EDIT_FIGURES.values()]
            parts += [heading("Evaluations"), table(("step", *titles), rows)]
        title = (
            f"Edits by instruction: {describe_training(settings)} on {settings.model}, {settings.steps} steps"
        )
        again = [heading("Again"), command_block(as_command(settings, self.run))]
        write_report(self.run / REPORT, title, [*parts, *again], renew=renew)


EDIT_FIGURES = {
    "rating": (
        "Nearer to the true edit, dB",
        "How much nearer the model's edits of held-out images are to the true ones than the images themselves; 0: as "
        "if nothing had been edited.",
    ),
    "target_psnr_db": ("PSNR to the true edit, dB", "The same distance by itself."),
    "background_psnr_db": (
        "Background PSNR, dB",
        "Where the true edit changes nothing, against the image before. `edit instruct` makes it exact in the end.",
    ),
    "structure_distance": (
        "Structure distance to the true edit (lower is better)",
        "How differently the scorer's patches resemble one another in the edit and in the true one.",
    ),
}


def plot_loss(run: Path) -> str:
    """The training loss of a run's log."""
    log = read_jsonl(run / LOG, LoggedLoss) if (run / LOG).exists() else []
    width = max(1, min(20, len(log) // 10))
    losses = smooth_points([(line.step, line.loss) for line in log], window=width)
    note = "Its ups and downs are mostly chance: every step draws noise levels of its own."
    return line_plot(f"Training loss, mean of {width}", {"": losses}, note=note)
