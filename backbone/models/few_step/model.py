"""Few-step models: distilled relatives of a base, which sample in 1 to 8 steps without guidance.

They share the base's architecture, so what is trained on the base works on them: `open_few_step` opens one beside its
base and refuses other pairs. A few-step model may also be a LoRA on the base (LCM-LoRA, Luo et al. 2023): a folder with
`few_step.json`, the adapter, and a scheduler of its own, which `locate` treats as a model and `Backbone` adds to the
base's weights as they load.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from backbone.cli.sampling import ALL_STEPS, Sampler, default_guidance_interval
from backbone.io.console import UserError
from backbone.models.defaults import say_few_step_name
from backbone.models.locate import FEW_STEP_MODELS
from backbone.models.model import Backbone


@dataclass(frozen=True)
class SamplingDefaults:
    """How a model samples: keyword arguments of `backbone.models.sample.sample`."""

    steps: int
    guidance: float
    sampler: Sampler
    guided: tuple[float, float] = ALL_STEPS


def get_sampling_defaults(
    model: Backbone, *, steps: int | None = None, guidance: float | None = None
) -> SamplingDefaults:
    """A model's default steps, guidance, guidance interval and sampler; `steps` and `guidance` replace its own."""
    defaults = model.defaults
    if guidance is None:
        say_few_step_name(model.location.source, defaults)
    return SamplingDefaults(
        int(defaults["steps"]) if steps is None else steps,
        float(defaults["guidance"]) if guidance is None else guidance,
        model.choose_sampler(),
        default_guidance_interval(defaults),
    )


def name_few_step(model: str) -> str:
    """The few-step model that goes with a base of this name; `UserError` where none is known."""
    few_step = FEW_STEP_MODELS.get(model)
    if few_step is None:
        raise UserError(
            f"No few-step model is known that goes with {model}. Name one with --on: a model, or the folder of a "
            "few-step adapter."
        )
    return few_step


def open_few_step(base: Backbone, name: str) -> Backbone:
    """The few-step model of this name on the base's device, in its precision and at its resolution.

    Loads no weights. Raises `UserError` for a model of another family or architecture, and for the base itself.
    """
    few_step = Backbone.open(
        name,
        device=str(base.device),
        precision={torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[base.dtype],
        placement=base.placement,
        resolution=base.requested_resolution,
        compile=base.compiles,
    )
    refuse_unlike(base, few_step)
    return few_step


def refuse_unlike(base: Backbone, few_step: Backbone) -> None:
    """`UserError` unless the few-step model is another model of the same architecture as the base."""
    base_name, other_name = base.location.name, few_step.location.name
    if few_step.fingerprint == base.fingerprint:
        raise UserError(
            f"{other_name} is the model itself that was trained on, not a few-step relative of it. Name that one, "
            "or leave it out."
        )
    if type(few_step.family) is not type(base.family):
        raise UserError(
            f"{other_name} is a {few_step.family.name} and {base_name} a {base.family.name}: what is trained on one "
            "does not fit the other. Name a few-step model of the same family."
        )
    base_shapes, other_shapes = map(_read_shapes, (base, few_step))
    for name, base_shape in base_shapes.items():
        shape = other_shapes.get(name)
        if shape != base_shape and "guidance_embedder" not in name:  # may be missing from one of them
            difference = "is missing there" if shape is None else f"is {shape} there and {base_shape} here"
            raise UserError(
                f"{other_name} is not built as {base_name} is ({name} {difference}): what is trained on one "
                "does not fit the other. Name a few-step model that was made from this base."
            )


def _read_shapes(model: Backbone) -> dict[str, tuple[int, ...]]:
    """The shapes of the denoiser's parameters by name, from its configs alone."""
    denoiser = model.family.spec(model.location, model.dtype).denoiser.instantiate()
    return {name: tuple(value.shape) for name, value in denoiser.named_parameters()}
