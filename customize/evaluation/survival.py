"""How much of a concept learned on a base survives on its few-step model.

Subject and prompt fidelity are measured four times from the same noise and prompts: for the base and the few-step
model, each without and with the adapter. For the subject the gains are compared, since the two models start at
different values; prompt fidelity is compared directly.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from backbone.io.console import format_count

LEAST_GAIN = 0.01  # least gain of subject fidelity on the base for which survival is defined


@dataclass(frozen=True)
class Fidelity:
    """Mean cosines of images with the subject's (CLIP-I or DINO), and with their prompts (CLIP-T)."""

    subject: float
    prompt: float | None


@dataclass(frozen=True)
class Survival:
    """The fidelity of a base and its few-step model, each without and with the concept.

    `model` is the few-step model's name, `steps` how many it takes.
    """

    model: str
    steps: int
    base_before: Fidelity
    base: Fidelity
    few_before: Fidelity
    few: Fidelity

    @property
    def subject(self) -> float | None:
        """The gain of subject fidelity on the few-step model over that on the base; None if the base gained none."""
        gained = self.base.subject - self.base_before.subject
        return (self.few.subject - self.few_before.subject) / gained if gained > LEAST_GAIN else None

    @property
    def prompt(self) -> float | None:
        """The prompt fidelity on the few-step model over that on the base; None without a scorer that reads text."""
        if self.few.prompt is None or not self.base.prompt:
            return None
        return self.few.prompt / self.base.prompt

    def record(self) -> dict[str, Any]:
        """For a JSON record: the two figures, and what they come from."""
        return {"subject": self.subject, "prompt": self.prompt, **asdict(self)}

    def sentence(self) -> str:
        """The figures in words."""
        subject = (
            "nothing was learned that could survive"
            if self.subject is None
            else f"{self.subject:.0%} of the subject fidelity gained"
        )
        prompt = "" if self.prompt is None else f" and {self.prompt:.0%} of the prompt fidelity"
        return f"On {self.model}, in {format_count(self.steps, 'step')}: {subject}{prompt} survives."

    def table(self) -> list[str]:
        """Markdown rows."""
        rows = [
            ("the base without it", self.base_before),
            ("the base", self.base),
            (f"{self.model} without it", self.few_before),
            (f"{self.model}, {format_count(self.steps, 'step')}", self.few),
        ]
        lines = ["| drawn by | subject | prompt |", "|---|---|---|"]
        lines += [
            f"| {name} | {fidelity.subject:.3f} | {'–' if fidelity.prompt is None else f'{fidelity.prompt:.3f}'} |"
            for name, fidelity in rows
        ]
        return lines
