"""What a recipe prints while it trains: a JSON line every fifty steps."""

from __future__ import annotations

import json
import time

from backbone.training.loop import Step


class Logbook:
    """Smooths the loss, measures the pace and the minutes since it was opened."""

    EVERY = 50

    def __init__(self, *, batch: int) -> None:
        self.batch = batch
        self.began = time.time()
        self.loss: float | None = None
        self.unread: list[Step] = []

    @property
    def minutes(self) -> float:
        """Since the logbook was opened."""
        return (time.time() - self.began) / 60

    def note(self, step: Step, *, aloud: bool = True) -> None:
        """Takes a step; looks at it, and prints a line, when it is time and `aloud`."""
        self.unread.append(step)
        if step.step % self.EVERY:
            return
        for entry in self.unread:
            self.loss = entry.loss if self.loss is None else 0.98 * self.loss + 0.02 * entry.loss
        self.unread = []
        if not aloud or self.loss is None:
            return
        report = step.report
        facts = {
            "step": report.step,
            "loss": round(self.loss, 4),
            "norm": round(report.gradient_norm, 3),
            "rate": round(report.learning_rate, 6),
            "pictures_per_second": round(self.batch / report.seconds, 1),
            "minutes": round(self.minutes, 1),
        }
        print(json.dumps(facts), flush=True)
