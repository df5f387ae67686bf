"""What surrounds the loop of every training run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.training.loop import Report


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
