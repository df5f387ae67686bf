"""Warnings about adapters or models that do not belong together although their layers fit; tools load them silently."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from backbone.diffusion.noise import PredictionType
from backbone.families.base import NoisePath
from backbone.families.location import Location
from backbone.families.registry import families
from backbone.io.console import UserError, notify
from backbone.models.model import Backbone
from customize.formats.adapter import (
    BASE_NAMES,
    FAMILY_BY_CONTEXT_WIDTH,
    PIPELINES,
    UNET_PIPELINES,
    AdapterFile,
    BaseFamily,
    family_from_metadata,
)

PREDICTED = {"epsilon": "ε", "sample": "x0", "v_prediction": "v", "flow": "u", "score": "a score"}


def say_other_origin(file: Path, adapter: AdapterFile, model: Backbone) -> None:
    """Warn if an adapter's header names another family than the model's, or its names another number of encoders.

    Layers of several families are called alike and equally wide: the text encoder of Stable Diffusion 1.x and XL,
    FLUX.1's blocks and Chroma's. The same holds for an adapter of a model that predicts something else.
    """
    declared, possible = family_from_metadata(adapter.metadata), _list_possible_families(model)
    if declared is not None and possible and declared not in possible:
        notify(
            f"{file} says that it was made for {BASE_NAMES[declared]}, and {model.location.name} is "
            f"{' or '.join(BASE_NAMES[family] for family in possible)}. Its layers fit, but it may not do there what "
            "it learned."
        )
    elif adapter.numbered and len(model.text_encoder.slots) == 1:
        notify(
            f"{file} numbers its text encoders (lora_te1_…), as LoRAs of Stable Diffusion XL, 3 and FLUX do, and "
            f"{model.location.name} has one. Its layers fit, but it may not do there what it learned."
        )
    elif possible and declared is None and adapter.base == "other" and (relatives := adapter.relatives):
        notify(
            f"{file} seems to be of {' or '.join(relatives)}, by its layers, and {model.location.name} is "
            f"{' or '.join(BASE_NAMES[family] for family in possible)}. Its layers fit, but it may not do there what "
            "it learned."
        )
    learned, predicted = _read_prediction(adapter.metadata), model.path.prediction_type
    # Headers of flows may say ε, which is their tool's default
    if learned is not None and predicted in ("epsilon", "v_prediction") and learned != predicted:
        notify(
            f"{file} says that it was made for a model that predicts {PREDICTED[learned]}, and {model.location.name} "
            f"predicts {PREDICTED[predicted]}. Its layers fit, but it may draw noise there. Give the --model it is for."
        )


def say_other_noise(tuned: Location, base: Location) -> None:
    """Warn if two models of equal layers differ in prediction type, or only one was trained at zero terminal SNR.

    Their difference teaches the base's network the other kind, so that sampling with its own scheduler gives noise.
    """
    paths = _find_noise_path(tuned), _find_noise_path(base)
    if paths[0] is None or paths[1] is None:
        return
    first, second = (path.prediction_type for path in paths if path is not None)
    has_zero_snr = [float(path.levels.a[-1]) == 0 for path in paths if path is not None]
    if first != second:
        notify(
            f"{tuned.name} predicts {PREDICTED[first]} and {base.name} predicts {PREDICTED[second]}: on {base.name} as "
            f"it is, the LoRA draws noise. Draw with it under the scheduler of {tuned.name}, or give its own base."
        )
    elif has_zero_snr[0] != has_zero_snr[1]:
        notify(
            f"Of {tuned.name} and {base.name}, {(tuned if has_zero_snr[0] else base).name} alone learned from noise "
            f"without signal (rescale_betas_zero_snr). Draw with the LoRA under the scheduler of {tuned.name}."
        )


def _find_noise_path(location: Location) -> NoisePath | None:
    """A model's noise path; None if its family is unknown, or its scheduler does not say."""
    pipeline = str(location.index.get("_class_name", ""))
    family = next((candidate for candidate in families() if pipeline in candidate.pipeline_classes), None)
    try:
        return family.path(location) if family is not None else None
    except UserError:
        return None


def _read_prediction(metadata: Mapping[str, str]) -> PredictionType | None:
    """The prediction type in an adapter's header; None if it is missing or unknown."""
    declared = metadata.get("modelspec.prediction_type", "").lower()
    if declared.startswith("v") or metadata.get("ss_v_parameterization", "").lower() == "true":
        return "v_prediction"
    return "epsilon" if declared.startswith("eps") else None


def _list_possible_families(model: Backbone) -> tuple[BaseFamily, ...]:
    """The possible families of a model, by its pipeline; () if it is unknown."""
    pipeline = str(model.location.index.get("_class_name", ""))
    if pipeline in PIPELINES:
        return (PIPELINES[pipeline],)
    width = model.location.config("unet").get("cross_attention_dim") if pipeline in UNET_PIPELINES else None
    known = FAMILY_BY_CONTEXT_WIDTH.get(width) if isinstance(width, int) else None
    return (known,) if known else UNET_PIPELINES.get(pipeline, ())
