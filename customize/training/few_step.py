"""The few-step model of a run (`--preview-on`): it samples the run's previews and evaluations as well.

It is opened each time with the current weights, as `customize sample --on` does, and freed afterwards; meanwhile the
base model is moved to CPU memory, so that both are never on a GPU together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from PIL.Image import Image
from torch import nn

from backbone.adapters.apply import carry_over, load_concepts
from backbone.adapters.concept import Concept
from backbone.distributed import processes
from backbone.io.console import UserError
from backbone.io.files import append_jsonl
from backbone.io.run_folder import read_log, trim_log
from backbone.models.few_step.model import SamplingDefaults, get_sampling_defaults, open_few_step
from backbone.models.model import PARTS, Backbone
from customize.evaluation.metrics import ConceptMetrics, EarlyStopping, Evaluator
from customize.evaluation.survival import Fidelity, Survival
from customize.objectives.dreambooth import DreamBooth
from customize.settings import Settings

ON = Path("on")  # in a run folder
EVALUATIONS = ON / "evaluations.jsonl"


def open_few_step_model(model: Backbone, settings: Settings) -> Backbone | None:
    """The few-step model of a run, configs only; None if none is named.

    Raises `UserError` for one that does not belong to the run's model, and where the base cannot be offloaded for it.
    """
    if not settings.preview_on:
        return None
    processes.require_whole_model("--preview-on")
    if settings.quantize or settings.cpu_offload:
        raise UserError(
            "--preview-on draws with a second model in the base's place, and a base that is quantised or offloaded "
            "cannot make room for it. Leave --preview-on out, and use customize evaluate RUN --on afterwards."
        )
    return open_few_step(model, settings.preview_on)


def choose_sampling(model: Backbone, settings: Settings) -> SamplingDefaults:
    """How the few-step model samples: its own steps and guidance, unless the settings give others."""
    defaults = get_sampling_defaults(model)
    return replace(
        defaults,
        steps=settings.preview_on_steps or defaults.steps,
        guidance=defaults.guidance if settings.preview_on_guidance is None else settings.preview_on_guidance,
    )


class FewStepValidation:
    """The few-step model of a run in training: opens it with the current weights, and keeps its evaluations."""

    def __init__(self, run: Path, training: DreamBooth, concept: Concept, model: Backbone) -> None:
        self.run, self.training, self.concept, self.name = run, training, concept, model.location.name
        self.drawing = choose_sampling(model, training.settings)
        most = training.settings.patience or training.settings.steps
        self.early_stopping: EarlyStopping[ConceptMetrics] = EarlyStopping(most)
        self.evaluator: Evaluator | None = None

    @contextmanager
    def open(self) -> Iterator[Backbone]:
        """The few-step model with the current weights; the base model is back on its device afterwards."""
        base = self.training.model
        few_step = open_few_step(base, self.training.settings.preview_on)
        with TemporaryDirectory() as folder, offload_to_cpu(base.denoiser):
            files = self.training.write(Path(folder), {})
            learned = replace(self.concept, **files, folder=Path(folder))
            load_concepts(few_step, [carry_over(learned, base, few_step)])
            try:
                yield few_step
            finally:
                few_step.text_learned = False
                few_step.free(*PARTS)

    def measure(self, step: int, loss: float) -> tuple[bool, Sequence[Image]]:
        """Evaluate at most once per step; returns whether it is the best so far, and the images. `loss`: the run's."""
        assert self.evaluator is not None
        measured = [figures for figures in self.early_stopping.history if figures.step == step]
        if measured:
            return self.early_stopping.best is measured[0], ()
        with self.open() as few_step:
            self.evaluator.model = few_step
            figures, images = self.evaluator.measure(step, loss)
        best = self.early_stopping.update(figures)
        if processes.is_main_process():
            (self.run / ON).mkdir(exist_ok=True)
            append_jsonl(self.run / EVALUATIONS, asdict(figures))
        return best, images

    def restore(self) -> None:
        """Read the evaluations of an interrupted run, and drop those after its checkpoint."""
        assert self.evaluator is not None
        path, last_step = self.run / EVALUATIONS, self.training.done
        if processes.is_main_process():
            trim_log(path, last_step)
        self.early_stopping.history[:] = logged = read_log(path, ConceptMetrics, done=last_step)
        self.evaluator.baseline = logged[0] if logged else None

    def measure_survival(self, base: Sequence[ConceptMetrics]) -> Survival | None:
        """The fidelity at the best step and that on the base; None without evaluations."""
        history = self.early_stopping.history
        if len(history) < 2 or len(base) < 2:
            return None
        best = self.early_stopping.best
        base_figures = next((figures for figures in base if figures.step == best.step), base[-1])
        return Survival(
            self.name,
            self.drawing.steps,
            *(read_fidelity(record) for record in (base[0], base_figures, history[0], best)),
        )


def read_fidelity(figures: ConceptMetrics) -> Fidelity:
    """The two metrics of an evaluation from which `Survival` is computed."""
    return Fidelity(figures.subject_fidelity, figures.prompt_fidelity)


@contextmanager
def offload_to_cpu(network: nn.Module) -> Iterator[None]:
    """Inside the `with`, a network's weights are in CPU memory; on a CPU they stay where they are."""
    devices = {name: value.device for name, value in network.named_parameters() if value.device.type != "cpu"}
    _move(network, dict.fromkeys(devices, torch.device("cpu")))
    try:
        yield
    finally:
        _move(network, devices)


def _move(network: nn.Module, devices: dict[str, torch.device]) -> None:
    for name, value in network.named_parameters():
        if name in devices:
            value.data = value.data.to(devices[name])
