"""Validation during preference training, and early stopping when the winners get worse."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from align.objectives.preference import PreferenceTraining
from align.objectives.reference import CachedReference
from align.settings import COMPARES, EVALUATIONS, WITH_BETA, Settings
from align.training.reporting.logs import LoggedEvaluation, read_evaluations
from align.training.reporting.pictures import Pictures
from align.training.reporting.report import write_running_report
from backbone.distributed import processes
from backbone.io.console import notify
from backbone.io.files import append_jsonl
from backbone.io.run_folder import trim_log


class Validation:
    """Evaluates a run at a step, keeps the figures, and warns when the winners' error rises.

    Preference losses only ask that the winner's error falls behind the loser's, so both may rise together: images
    fall apart while accuracy still climbs.
    """

    def __init__(
        self, run: Path, training: PreferenceTraining, settings: Settings, pictures: Pictures
    ) -> None:
        self.run, self.pictures = run, pictures
        self.path, self.training, self.settings = run / EVALUATIONS, training, settings
        if processes.is_main_process():
            trim_log(self.path, training.done)
        processes.barrier()  # now every process reads the saved figures
        self.evaluations = read_evaluations(run) if processes.is_participant() else []
        self.complaint = self._describe_rise(self.evaluations[-1]) if self.evaluations else ""

    def __call__(self, step: int) -> str:
        """Evaluate and write a line, at most once per step; returns the reason to stop, if the settings allow it.

        Of several processes rank 0 evaluates, with the cached errors of all; or all together, if the base is sharded.
        """
        self._evaluate(step)
        return self.complaint if self.settings.on_winner_rise == "stop" else ""

    def _evaluate(self, step: int) -> None:
        if isinstance(self.training.reference, CachedReference):
            self.training.reference.merge()
        if not processes.is_participant():
            return
        if any(line.step == step for line in self.evaluations):
            return  # evaluated before the run was stopped
        figures_by_set, gap = self.training.evaluate(), self.training.measure_noise_gap()
        if not processes.is_main_process():
            return
        line: dict[str, Any] = {"step": step, "noise_gap": gap}
        line |= {name: figures.as_json() for name, figures in figures_by_set.items()}
        append_jsonl(self.path, line)
        self.evaluations = read_evaluations(self.run)
        write_running_report(self.run, self.settings, self.pictures, step)
        previous, self.complaint = self.complaint, self._describe_rise(self.evaluations[-1])
        if self.complaint and not previous and self.settings.on_winner_rise == "warn":
            notify(f"Step {step}: {self.complaint}")

    def _describe_rise(self, line: LoggedEvaluation) -> str:
        figures = line.held_out or line.training
        rise = figures.winner_change if figures else None
        if rise is None or rise <= self.settings.winner_tolerance:
            return ""
        return (
            f"the preferred pictures' error has risen by {rise:.1%}, so the model is being spoiled although it may "
            f"still tell pictures apart. {_suggest_remedies(self.settings.loss)}"
        )


def _suggest_remedies(loss: str) -> str:
    """The loss's settings that limit the winners' error."""
    beta = ", or raise --beta" if loss in WITH_BETA else ""
    if loss in COMPARES:
        return "Lower --learning-rate, raise --beta, or add --safeguard 0.9 or --sft-weight 0.5."
    return f"Lower --learning-rate{beta}."
