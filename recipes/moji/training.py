"""What the trainings of `moji`'s parts share: one file that a longer run goes on from, and the loop around it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor
from torch.optim import Optimizer

from backbone.distributed.processes import any_process, gradient_averaging
from backbone.training.loop import Average, LRSchedule, load_checkpoint, save_checkpoint, train
from recipes.moji.logbook import Logbook


class Training:
    """Weights with their optimiser and average, gone on with from the last checkpoint where there is one.

    `kept` are the weights that are trained, and statistics that are averaged and stored with them;
    `batch` is how many images a step sees, for the pace.
    """

    def __init__(
        self,
        checkpoint: Path,
        kept: Mapping[str, Tensor],
        optimizer: Optimizer,
        *,
        decay: float,
        batch: int,
    ) -> None:
        self.checkpoint, self.kept, self.optimizer = checkpoint, kept, optimizer
        self.batch = batch
        self.average = Average(kept, decay=decay)
        self.facts: dict[str, str] = {}
        self.done = 0
        if checkpoint.exists():
            self.done, _ = load_checkpoint(
                checkpoint, parameters=kept, optimizer=optimizer, average=self.average
            )

    def run(
        self,
        losses: Callable[[int], Iterator[Tensor]],
        lr_schedule: LRSchedule,
        *,
        steps: int,
        minutes: float,
        every: int,
        clip: float = 1.0,
        aloud: bool = True,
        on_save: Callable[[int], object] = lambda step: None,
    ) -> None:
        """Steps until the end, or until the minutes are over.

        Where `aloud`, it reports, and every so many steps and at last it saves and calls `on_save` with the step.
        """
        logbook = Logbook(batch=self.batch)
        for report in train(
            losses,
            self.kept,
            optimizer=self.optimizer,
            lr_schedule=lr_schedule,
            steps=steps,
            done=self.done,
            clip=clip,
            average=self.average,
            reduce=gradient_averaging(),
        ):
            logbook.note(report, aloud=aloud)
            last = report.step == steps or any_process(logbook.minutes > minutes)
            if (report.step % every == 0 or last) and aloud:
                self.save(report.step)
                on_save(report.step)
            if last:
                break

    def save(self, step: int) -> None:
        """Writes the checkpoint."""
        save_checkpoint(
            self.checkpoint,
            step=step,
            parameters=self.kept,
            optimizer=self.optimizer,
            average=self.average,
            facts=self.facts,
        )
