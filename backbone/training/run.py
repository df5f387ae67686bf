"""A training run: the loop of `backbone.training.loop` with log, checkpoints, validation, previews and signals.

A method of training is an `Objective`: the trained parameters, the losses of a step, the files that are written.
`drive` takes it from its last checkpoint to its last step, with log, progress bar, TensorBoard, validation and early
stopping, previews, checkpoints, and a clean stop at SIGINT or SIGTERM. Several processes all take the same steps, and
rank 0 writes.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, Protocol, TypeVar, cast

from torch import Tensor
from torch.optim import Optimizer

from backbone.distributed import processes
from backbone.io.console import (
    UserError,
    format_count,
    notify,
    notify_once,
    quote,
    shorten,
)
from backbone.io.files import append_jsonl, json_text, read_metadata
from backbone.io.progress import ProgressBar, progress
from backbone.io.run_folder import CHECKPOINT, catch_interrupts, read_record, restore_record, trim_log
from backbone.models.compiled import CompiledBlocks
from backbone.models.model import Backbone
from backbone.training.checkpoint import load_checkpoint, save_checkpoint
from backbone.training.loop import Average, Monitor, NotFiniteError, Report, Step, Update, train
from backbone.training.loss_scale import LossScale, make_loss_scale
from backbone.training.optimizer import make_schedule

LOG = "log.jsonl"
MOST_REPEATS = 16  # of an image in one step; above it a message is shown
# Settings that may be given with --resume, so that their change needs no message
RESETTABLE = frozenset(
    {
        *("steps", "learning_rate", "device", "model", "images", "pairs", "prompts", "class_images"),
        *("subject", "scorer", "concepts", "begin_from", "validation_image", "clips", "motion"),
        *("run", "resume", "out", "vram", "as_json"),  # options of the call in the same dataclass
    }
)
# A model's own defaults by which a run draws, and which its settings do not hold
DRAWN_BY = ("sampler", "guidance_start", "guidance_stop", "early_scale", "early_steps")
SHOWN = ("accuracy", "reward")  # metrics shown beside the progress bar, if a step has them
Result = TypeVar("Result")


@dataclass(frozen=True)
class LoggedLoss:
    """The part of a log line that a report's loss curve needs."""

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

    model       the model, where there is one
    parameters  the trained parameters, by name
    optimizer   the optimiser over them
    average     their exponential moving average, or None
    figures     further metrics of the last step for the log: numbers, or tensors [] on the device
    pool        number of images that steps draw from; 0 where each step makes its own
    done        steps taken so far
    saved       the step of the last checkpoint, from which `resume` continues
    compiled    the denoiser's blocks, compiled inside a step, or None
    scales      options that scale the loss, besides the learning rate, for the message about a non-finite step
    sources     fingerprints of the model and the data, by name: a checkpoint resumes only with the same ones. Of a
                sequence the first is saved, and any value of it matches
    drawn_by    the names of the model's own defaults by which it draws
    loss_scale  the scale of its losses, if the model computes in fp16
    """

    model: Backbone
    settings: RunSettings
    parameters: dict[str, Tensor]
    optimizer: Optimizer
    average: Average | None = None
    figures: Mapping[str, Tensor | float]
    pool: int = 0
    done: int = 0
    saved: int = 0
    compiled: CompiledBlocks | None = None
    scales: tuple[str, ...] = ()
    sources: Mapping[str, str | Sequence[str]] = MappingProxyType({})
    drawn_by: tuple[str, ...] = DRAWN_BY
    loss_scale: LossScale | None = None

    @property
    @abstractmethod
    def images(self) -> int:
        """The number of images in a step, for the progress bar."""

    @abstractmethod
    def losses(self, step: int) -> Iterator[Tensor]:
        """The losses [] of a step's micro-batches; their gradients are averaged. A function of the step alone."""

    def explain(self, step: int) -> str:
        """The reason why a recent step was not finite, with a remedy; "" where only the loss is known."""
        return ""

    @abstractmethod
    def learning(self) -> AbstractContextManager[None]:
        """The context of all steps: the networks' modes and attention."""

    def close_loader(self) -> None:
        """End the data-loading processes, if there are any."""
        return

    def stepping(self) -> AbstractContextManager[None]:
        """The context of one step, which is left between steps."""
        return nullcontext() if self.compiled is None else self.compiled.active()

    @abstractmethod
    def write(self, run: Path, header: dict[str, str]) -> dict[str, Any]:
        """Write the learned weights; returns the fields of `Concept` that name the files."""

    def save(self, run: Path) -> None:
        """Write the checkpoint from which `resume` continues bit for bit. An override that skips it leaves `saved`."""
        self.saved = self.done
        if processes.is_main_process():
            save_checkpoint(
                run / CHECKPOINT,
                step=self.done,
                parameters=self.parameters,
                optimizer=self.optimizer,
                average=self.average,
                facts={
                    **self.sources,
                    "settings": _as_json(self.settings),
                    "defaults": self.describe_defaults(),
                    **({"loss_scale": self.loss_scale.value} if self.loss_scale else {}),
                },
            )

    def resume(self, run: Path) -> None:
        """Continue from the last checkpoint; from the start where there is none.

        Raises `UserError` where the model or the images have changed. A message names changed settings.
        """
        if (run / CHECKPOINT).exists():
            self.done, saved_facts = load_checkpoint(
                run / CHECKPOINT,
                parameters=self.parameters,
                optimizer=self.optimizer,
                average=self.average,
                facts=self.sources,
            )
            self.saved = self.done
            if isinstance(value := saved_facts.get("loss_scale"), (int, float)):
                self.loss_scale = make_loss_scale(self.model.dtype, value)
            if changes := describe_changed_settings(saved_facts.get("settings"), self.settings):
                notify(f"{run} was trained up to step {self.done} with other settings: {changes}")
            if changes := _list_changes(saved_facts.get("defaults"), self.describe_defaults()):
                notify(
                    f"The model's limner.json has changed since step {self.done} of {run}: {changes}. What is drawn "
                    "from now on is drawn by the new one."
                )

    def describe_defaults(self) -> dict[str, Any]:
        """The model's own defaults by which the run draws, None for those that it does not name."""
        model: Backbone | None = getattr(self, "model", None)
        return {} if model is None else {name: model.defaults.get(name) for name in self.drawn_by}


def describe_repeats(objective: Objective) -> str:
    """A message where a step repeats every image more than MOST_REPEATS times; else ""."""
    images, pool = objective.images, objective.pool
    if not pool or images <= MOST_REPEATS * pool:
        return ""
    return (
        f"A step learns from {images} images, and there are {format_count(pool, 'image')}: each is in it "
        f"{images // pool} times, with noise of its own. It takes as long as that; a smaller --batch is faster."
    )


def describe_changed_settings(saved: Any, settings: RunSettings) -> str:
    """The settings that differ from those in a checkpoint, except RESETTABLE ones, in a sentence; "" for none.

    `saved` may be edited by hand, and is None for a checkpoint of an older version.
    """
    current = {name: value for name, value in _as_json(settings).items() if name not in RESETTABLE}
    changes = _list_changes(saved, current)
    return f"{changes}. It goes on with the new ones." if changes else ""


def _list_changes(saved: Any, current: Mapping[str, Any]) -> str:
    """What of a checkpoint's values by name is another now, in words; `saved` may be no such values."""
    earlier = saved if isinstance(saved, dict) else {}
    return "; ".join(
        f"{name} was {shorten(str(value), 80)} and is {shorten(str(current[name]), 80)}"
        for name, value in earlier.items()
        if name in current and current[name] != value
    )


def _as_json(settings: RunSettings) -> dict[str, Any]:
    """Settings as they come back from JSON; {} for settings that are no dataclass."""
    values: dict[str, Any] = asdict(cast(Any, settings)) if is_dataclass(settings) else {}
    return cast(dict[str, Any], json.loads(json_text(values)))


@dataclass(frozen=True)
class Every(Generic[Result]):
    """A function that is called with the step's number every `steps` steps; 0: only at the start and the end."""

    steps: int
    call: Callable[[int], Result]

    def due(self, step: int) -> bool:
        """Whether it is called at this step, apart from the last one."""
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
    """Train from step `objective.done` to the last, or to `until`; returns whether validation stopped it early.

    `validate` returns the reason to stop, or an empty string; it is also called before the first step and after the
    last. In a resumed run it must find the earlier evaluations itself. `preview` draws samples of the current model.
    `command` resumes a run, as `customize train`; `label` is shown beside the progress bar.

    Raises `KeyboardInterrupt`, with the step and the command to resume by, after a signal.
    """
    settings, writes = objective.settings, processes.is_main_process()
    last = settings.steps if until is None else until
    record = read_record(run)
    if writes:
        trim_log(run / LOG, objective.done)
    with (
        catch_interrupts() as stop,
        log_to_tensorboard(run, enabled=tensorboard, done=objective.done) as log_report,
        progress(last, label, done=objective.done) as bar,
    ):
        done = objective.done
        if validate and done < last and validate.due(done) and _should_stop(validate, done, bar):
            return True
        unlogged: list[Step] = []
        for step in explain_failure(take_steps(objective, until=last), run):
            number, finished = step.step, step.step == last
            # Steps whose metrics are already read are logged at once.
            unlogged = _log([*unlogged, step], run if writes else None, log_report, wait=False)
            # All processes stop at the same step; several check for a signal only where they synchronise anyway.
            can_stop = processes.world_size() == 1 or step.is_read
            interrupted = can_stop and processes.any_process(bool(stop)) and not finished
            saves = interrupted or finished or number % settings.checkpointing_steps == 0
            due = saves or any(
                schedule is not None and schedule.due(number) for schedule in (validate, preview)
            )
            # The others before a save or an evaluation: this synchronises, and raises at a non-finite loss.
            unlogged = _log(unlogged, run if writes else None, log_report, wait=due)
            bar.advance(images=objective.images, **_read_shown(step))
            early = False
            if validate and (finished or validate.due(number)) and not interrupted:
                early = _should_stop(validate, number, bar, announce=not finished)
            if saves or early:
                _save(objective, run, record)
            if interrupted:
                raise KeyboardInterrupt(
                    f"{_describe_stop(objective)} Continue with: {command} --resume {quote(run)}"
                )
            if early:
                return not finished
            if preview and preview.due(number) and not finished:
                with bar.pause():
                    preview.call(number)
    return False


def _save(objective: Objective, run: Path, record: bytes | None) -> None:
    """Write the checkpoint into the run's folder, and restore `record` there if it is missing."""
    if processes.is_main_process():
        restore_record(run, record)
    objective.save(run)


def _log(
    steps: Sequence[Step], run: Path | None, log_report: Callable[[Report], None], *, wait: bool
) -> list[Step]:
    """Log steps, to the run's folder if there is one, and return the steps that remain.

    Without `wait` all remain if the metrics of one are not read yet.
    """
    if not wait and not all(step.is_read for step in steps):
        return list(steps)
    for step in steps:
        if run is not None:
            append_jsonl(run / LOG, asdict(step.report) | step.figures)
        log_report(step.report)
    return []


def _read_shown(step: Step) -> dict[str, float]:
    """The metrics beside the progress bar; {} where reading them would wait for the device."""
    if not step.is_read:
        return {}
    figures = {name: step.figures[name] for name in SHOWN if name in step.figures}
    return {"loss": step.loss, "learning_rate": step.learning_rate, **figures}


def explain_failure(steps: Iterator[Step], run: Path) -> Iterator[Step]:
    """Yield the same steps; add the checkpoint to resume from to the message of a `NotFiniteError`."""
    try:
        yield from steps
    except NotFiniteError as error:
        checkpoint = run / CHECKPOINT
        saved = (
            f"{checkpoint} holds the finite weights of step {read_metadata(checkpoint)['step']}."
            if checkpoint.exists()
            else ""
        )
        raise UserError(
            f"{error} {saved or 'No step was saved yet, so the folder can be used again.'}"
        ) from error


def take_steps(objective: Objective, *, until: int | None = None, read_every: int = 0) -> Iterator[Step]:
    """The bare loop: train from step `objective.done` to the last, or to `until`; yields each step."""
    settings = objective.settings
    last = settings.steps if until is None else until

    # Settings that are odd together, and the loss scale of a model in fp16
    if objective.done == 0 and settings.lr_warmup_steps > settings.steps:
        share = settings.steps / settings.lr_warmup_steps
        notify(
            f"The warm-up takes {settings.lr_warmup_steps} steps and the run {settings.steps}: the learning rate "
            f"reaches {share:.2g} of what it is set to."
        )
    if objective.done < last and (repeats := describe_repeats(objective)):
        notify_once(repeats)
    model: Backbone | None = getattr(objective, "model", None)
    if objective.loss_scale is None and model is not None:
        objective.loss_scale = make_loss_scale(model.dtype)

    # The loop
    with objective.learning():
        training = train(
            objective.losses,
            objective.parameters,
            optimizer=objective.optimizer,
            lr_schedule=make_schedule(
                settings.lr_scheduler, steps=settings.steps, warmup=settings.lr_warmup_steps
            ),
            steps=last,
            done=objective.done,
            update=Update(
                settings.max_grad_norm,
                processes.gradient_averaging(),
                objective.average,
                objective.loss_scale,
            ),
            monitor=Monitor(
                lambda: objective.figures,
                objective.explain,
                ("--learning-rate", *objective.scales),
                read_every,
            ),
        )
        try:
            # Compiled blocks are active during a step, not while the caller works between steps
            while True:
                with objective.stepping():
                    step = next(training, None)
                if step is None:
                    return
                objective.done = step.step
                yield step
        finally:
            objective.close_loader()  # else garbage collection waits for each data-loading process until a timeout


def _describe_stop(objective: Objective) -> str:
    """The step at which a run was stopped, and that of its last checkpoint."""
    done, saved, steps = objective.done, objective.saved, objective.settings.steps
    if saved == done:
        return f"Stopped and saved at step {done} of {steps}."
    last_save = f"step {saved} is what was saved last" if saved else "nothing is saved before a round's end"
    return f"Stopped at step {done} of {steps}; {last_save}, so it goes on from there."


def _should_stop(validate: Every[str], step: int, bar: ProgressBar, *, announce: bool = True) -> bool:
    """Validate; returns whether any process has a reason to stop, and prints it."""
    with bar.pause():
        reason = validate.call(step)
        stops = processes.any_process(bool(reason))
        if reason and announce:
            notify(f"Stopped at step {step}: {reason}")
    return stops


@contextmanager
def log_to_tensorboard(run: Path, *, enabled: bool, done: int) -> Iterator[Callable[[Report], None]]:
    """Yield a function that logs a report to TensorBoard's files under `tensorboard/`, or nowhere if not `enabled`.

    Entries for steps after `done`, from before the run was stopped, are purged. Raises `UserError` where TensorBoard is
    not installed.
    """
    if not enabled or not processes.is_main_process():
        yield lambda report: None
        return
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise UserError("--report-to tensorboard needs its package. Run: pip install tensorboard") from error
    with SummaryWriter(str(run / "tensorboard"), purge_step=done + 1, flush_secs=10) as writer:

        def log_report(report: Report) -> None:
            for name in ("loss", "gradient_norm", "learning_rate"):
                writer.add_scalar(name, getattr(report, name), report.step)

        yield log_report
