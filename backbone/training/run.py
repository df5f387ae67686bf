"""One run of a training: the loop of `backbone.training.loop`, and everything that surrounds it.

A method of training is an `Objective`: what is trained, the losses of a step, what is kept. `drive` takes an objective
from its last checkpoint to its last step: log, progress bar, TensorBoard, validation and early stopping, previews,
checkpoints, and a polite end when a signal comes. In a run of several processes all take the same steps; the first
one, the writer, writes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor
from torch.optim import Optimizer

from backbone.distributed import processes
from backbone.io.console import ProgressBar, UserError, notify, progress
from backbone.io.files import append_jsonl, read_metadata
from backbone.io.run_folder import catch_interrupts, trim_log
from backbone.models.compiled import CompiledBlocks
from backbone.training.loop import (
    Average,
    Monitor,
    NotFiniteError,
    Report,
    Step,
    Update,
    load_checkpoint,
    save_checkpoint,
    train,
)
from backbone.training.optimizer import make_schedule

LOG = "log.jsonl"
CHECKPOINT = "checkpoint.safetensors"
SHOWN = ("accuracy", "reward")  # figures that stand beside the progress bar, where a step has them
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class LoggedLoss:
    """What the curve of a report needs of a line of the log."""

    step: int
    loss: float


class RunSettings(Protocol):
    """The settings that the loop itself reads."""

    @property
    def steps(self) -> int: ...
    @property
    def lr_scheduler(self) -> str: ...
    @property
    def lr_warmup_steps(self) -> int: ...
    @property
    def max_grad_norm(self) -> float: ...
    @property
    def checkpointing_steps(self) -> int: ...


class Objective(ABC):
    """A method of training.

    parameters  what is trained, by name
    optimizer   over these
    average     their moving average, where one is kept
    figures     what the last step showed beside its loss, for the log: numbers, or tensors [] on the device
    done        steps that were taken
    saved       the step of the last checkpoint, from which `resume` goes on
    compiled    the denoiser's blocks, compiled inside a step; None where they run as they are
    sources     fingerprints of what is learned from, by what it is: a checkpoint goes on with the same ones alone
    """

    settings: RunSettings
    parameters: dict[str, Tensor]
    optimizer: Optimizer
    average: Average | None = None
    figures: Mapping[str, Tensor | float]
    done: int = 0
    saved: int = 0
    compiled: CompiledBlocks | None = None
    scales: tuple[str, ...] = ()  # options that scale the loss, beside the learning rate
    sources: Mapping[str, str] = MappingProxyType({})

    @property
    @abstractmethod
    def images(self) -> int:
        """How many images a step learns from, for the progress bar."""

    @abstractmethod
    def losses(self, step: int) -> Iterator[Tensor]:
        """The scalar losses of a step's micro-batches; their gradients are averaged. A function of the step alone."""

    def explain(self, step: int) -> str:
        """What was not finite in a step of late, and what helps; "" where the objective knows no more than the loss."""
        return ""

    @abstractmethod
    def learning(self) -> AbstractContextManager[None]:
        """What holds while steps are taken: modes and attention of the networks."""

    def rest(self) -> None:
        """Ends the processes that work ahead of the steps, if there are any."""
        return

    def stepping(self) -> AbstractContextManager[None]:
        """What holds inside a step alone, and not in what the caller does between two."""
        return nullcontext() if self.compiled is None else self.compiled.active()

    @abstractmethod
    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        """Writes what was learned; gives the fields of `Concept` that name the files."""

    def save(self, run: Path) -> None:
        """Writes the checkpoint from which `resume` goes on bit for bit; where none is written, `saved` stays."""
        self.saved = self.done
        if processes.is_main_process():
            save_checkpoint(
                run / CHECKPOINT,
                step=self.done,
                parameters=self.parameters,
                optimizer=self.optimizer,
                average=self.average,
                facts=dict(self.sources),
            )

    def resume(self, run: Path) -> None:
        """Goes on where `save` was called last; from the start when it never was.

        Raises `UserError` where the model or the images are no longer what they were.
        """
        if (run / CHECKPOINT).exists():
            self.done, _ = load_checkpoint(
                run / CHECKPOINT,
                parameters=self.parameters,
                optimizer=self.optimizer,
                average=self.average,
                facts=self.sources,
            )
            self.saved = self.done


@dataclass(frozen=True)
class Every(Generic[Answer]):
    """Something that is called with the step's number every so many steps; 0: only at the start and the end."""

    steps: int
    call: Callable[[int], Answer]

    def due(self, step: int) -> bool:
        """Whether it is time, apart from the end."""
        return step == 0 or (self.steps > 0 and step % self.steps == 0)


def drive(
    objective: Objective,
    run: Path,
    *,
    command: str,
    until: int | None = None,
    label: str = "training",
    validate: Every[str] | None = None,
    preview: Every[Any] | None = None,
    tensorboard: bool = False,
) -> bool:
    """Trains from the steps that are done to the last, or `until` a step; whether validation stopped it early.

    `validate` gives the reason to stop, or nothing; it is also called before the first step and after the last. It
    must know by itself what an interrupted run has measured. `preview` draws what the model makes now. `command` is
    what goes on with a run, as `customize train`.

    Raises `KeyboardInterrupt`, with how to go on and from which step, when a signal has come.
    """
    settings, writes = objective.settings, processes.is_main_process()
    last = settings.steps if until is None else until
    if writes:
        trim_log(run / LOG, objective.done)
    with (
        catch_interrupts() as stop,
        log_to_tensorboard(run, wanted=tensorboard, done=objective.done) as note,
        progress(last, label, done=objective.done) as bar,
    ):
        done = objective.done
        if validate and done < last and validate.due(done) and _stops(validate, done, bar):
            return True
        unlogged: list[Step] = []
        for taken in explain_failure(take_steps(objective, until=last), run):
            step, finished = taken.step, taken.step == last
            # What is read already is logged at once.
            unlogged = _log([*unlogged, taken], run if writes else None, note, wait=False)
            # All processes take the same way: one asks itself at every step, several where they meet anyway.
            together = processes.world_size() == 1 or taken.is_read
            halted = together and processes.any_process(bool(stop)) and not finished
            saves = halted or finished or step % settings.checkpointing_steps == 0
            due = saves or any(one is not None and one.due(step) for one in (validate, preview))
            # The rest is logged where it is needed: that waits for the device, and stops at what was not finite.
            unlogged = _log(unlogged, run if writes else None, note, wait=due)
            bar.advance(images=objective.images, **_shown(taken))
            # How good the model is by now; not when somebody waits for the end.
            early = False
            if validate and (finished or validate.due(step)) and not halted:
                early = _stops(validate, step, bar, aloud=not finished)
            # What is kept, from which `resume` goes on.
            if saves or early:
                objective.save(run)
            if halted:
                raise KeyboardInterrupt(f"{_stopped(objective)} Continue with: {command} --resume {run}")
            if early:
                return not finished
            if preview and preview.due(step) and not finished:
                with bar.pause():
                    preview.call(step)
    return False


def _log(
    steps: Sequence[Step], run: Path | None, note: Callable[[Report], None], *, wait: bool
) -> list[Step]:
    """Logs steps, in the run's folder if there is one, and gives those that are left.

    Without `wait` that is all of them where one is not read yet.
    """
    if not wait and not all(one.is_read for one in steps):
        return list(steps)
    for one in steps:
        if run is not None:
            append_jsonl(run / LOG, asdict(one.report) | one.figures)
        note(one.report)
    return []


def _shown(step: Step) -> dict[str, float]:
    """What stands beside the progress bar: nothing where looking would wait for the device."""
    if not step.is_read:
        return {}
    figures = {name: step.figures[name] for name in SHOWN if name in step.figures}
    return {"loss": step.loss, "learning_rate": step.learning_rate, **figures}


def explain_failure(steps: Iterator[Step], run: Path) -> Iterator[Step]:
    """The same steps; a `NotFiniteError` says what there is to go on with."""
    try:
        yield from steps
    except NotFiniteError as error:
        kept = run / CHECKPOINT
        saved = (
            f"{kept} holds the finite weights of step {read_metadata(kept)['step']}." if kept.exists() else ""
        )
        raise UserError(
            f"{error} {saved or 'No step was saved yet, so the folder can be used again.'}"
        ) from error


def take_steps(objective: Objective, *, until: int | None = None, read_every: int = 0) -> Iterator[Step]:
    """The bare loop: trains from the steps that are done to the last, or `until` a step."""
    settings = objective.settings
    last = settings.steps if until is None else until
    if objective.done == 0 and settings.lr_warmup_steps > settings.steps:
        share = settings.steps / settings.lr_warmup_steps
        notify(
            f"The warm-up takes {settings.lr_warmup_steps} steps and the run {settings.steps}: the learning rate "
            f"reaches {share:.2g} of what it is set to."
        )
    with objective.learning():
        taken = train(
            objective.losses,
            objective.parameters,
            optimizer=objective.optimizer,
            lr_schedule=make_schedule(
                settings.lr_scheduler, steps=settings.steps, warmup=settings.lr_warmup_steps
            ),
            steps=last,
            done=objective.done,
            update=Update(settings.max_grad_norm, processes.gradient_averaging(), objective.average),
            monitor=Monitor(
                lambda: objective.figures,
                objective.explain,
                ("--learning-rate", *objective.scales),
                read_every,
            ),
        )
        try:
            while True:
                with objective.stepping():
                    step = next(taken, None)
                if step is None:
                    return
                objective.done = step.step
                yield step
        finally:
            objective.rest()  # left to the garbage collection, it waits for each of them until a timeout


def _stopped(objective: Objective) -> str:
    """Where a run was stopped, and how much of it is kept."""
    done, saved, steps = objective.done, objective.saved, objective.settings.steps
    if saved == done:
        return f"Stopped and saved at step {done} of {steps}."
    kept = f"step {saved} is what was saved last" if saved else "nothing is saved before a round's end"
    return f"Stopped at step {done} of {steps}; {kept}, so it goes on from there."


def _stops(validate: Every[str], step: int, bar: ProgressBar, *, aloud: bool = True) -> bool:
    """Validates; whether any process has a reason to stop here, which is said."""
    with bar.pause():
        reason = validate.call(step)
        stops = processes.any_process(bool(reason))
        if reason and aloud:
            notify(f"Stopped at step {step}: {reason}")
    return stops


@contextmanager
def log_to_tensorboard(run: Path, *, wanted: bool, done: int) -> Iterator[Callable[[Report], None]]:
    """Gives a function that logs a report to TensorBoard's files under `tensorboard/`, or nowhere if not `wanted`.

    What TensorBoard has of steps after `done`, from before the run was stopped, is struck out.
    """
    if not wanted or not processes.is_main_process():
        yield lambda report: None
        return
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UserError("--report-to tensorboard needs its package. Run: pip install tensorboard") from error
    with SummaryWriter(str(run / "tensorboard"), purge_step=done + 1, flush_secs=10) as writer:

        def note(report: Report) -> None:
            for name in ("loss", "gradient_norm", "learning_rate"):
                writer.add_scalar(name, getattr(report, name), report.step)

        yield note
