"""The model of a training, opened twice: its configs for the default settings, then in the run's placement."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from backbone.distributed.device import resolve_device
from backbone.io.console import notify_once
from backbone.models.locate import is_path, make_model_absolute
from backbone.models.model import Backbone, Task
from backbone.models.placement import get_placement
from backbone.training.hardware import use_tensor_cores


def open_configs(
    requested: Mapping[str, Any], *, task: Task = "text-to-image", compilable: bool = True
) -> tuple[Backbone, dict[str, Any]]:
    """Open the requested model, reading only its configs; returns it with the completed settings.

    Without a setting `compile` the device decides (`Backbone.compiles_usually`). A path becomes absolute, so that the
    run finds the model from any folder. `task` is what the model is trained for, and `compilable` whether the training
    allows compiled blocks.
    """
    model = Backbone.open(
        requested.get("model", "moji"),
        device=requested.get("device", "auto"),
        precision=requested.get("precision", "auto"),
        resolution=requested.get("resolution", 0),
        task=task,
    )
    if "lora_layers" in requested:
        model.find_lora_layers(requested["lora_layers"])  # refuses an unknown set before anything is done
    compilable = compilable and not (requested.get("quantize") or requested.get("cpu_offload"))
    requested = {"compile": model.compiles_usually and compilable, **requested}
    if is_path(model.location.name):
        return model, {**requested, "model": make_model_absolute(model.location.name)}
    return model, dict(requested)


def open_model(settings: Any, *, resolution: int = 0, task: Task = "text-to-image") -> Backbone:
    """The model of a run, placed by its settings (`model`, `device`, `precision`, …)."""
    use_tensor_cores(resolve_device(settings.device))
    model = Backbone.open(
        settings.model,
        device=settings.device,
        precision=settings.precision,
        placement=get_placement(settings),
        resolution=resolution,
        task=task,
    )
    idle = ["--cpu-offload"] * bool(settings.cpu_offload) + ["--text-on-cpu"] * bool(settings.text_on_cpu)
    if idle and model.device.type == "cpu":
        verb = "has" if len(idle) == 1 else "have"
        notify_once(f"{' and '.join(idle)} {verb} no effect on a CPU, in whose memory the whole model lies.")
    if settings.sample_steps:
        model.schedule(settings.sample_steps)  # refuses too many before anything is done
    return model
