"""Warnings about adapters or models that do not belong together although their layers fit; tools load them silently."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from backbone.diffusion.noise import PredictionType
from backbone.families.base import NoisePath
from backbone.families.location import Location
from backbone.families.registry import families
from backbone.io.console import UserError, format_count, notify
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
from customize.formats.layers.names import split_component

CLIP_LAYERS = 12  # of Stable Diffusion 1's text encoder
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
            f"{' or '.join(BASE_NAMES[family] for family in possible)}. Its layers fit, but it may not have the effect "
            "that it learned."
        )
    elif adapter.numbered and len(model.text_encoder.slots) == 1:
        notify(
            f"{file} numbers its text encoders (lora_te1_…), as LoRAs of Stable Diffusion XL, 3 and FLUX do, and "
            f"{model.location.name} has one. Its layers fit, but it may not have the effect that it learned."
        )
    elif possible and declared is None and adapter.base == "other" and (relatives := adapter.relatives):
        notify(
            f"{file} seems to be of {' or '.join(relatives)}, by its layers, and {model.location.name} is "
            f"{' or '.join(BASE_NAMES[family] for family in possible)}. Its layers fit, but it may not have the effect "
            "that it learned."
        )
    learned, predicted = _read_prediction(adapter.metadata), model.path.prediction_type
    # Headers of flows may say ε, which is their tool's default
    if learned is not None and predicted in ("epsilon", "v_prediction") and learned != predicted:
        notify(
            f"{file} says that it was made for a model that predicts {PREDICTED[learned]}, and {model.location.name} "
            f"predicts {PREDICTED[predicted]}. Its layers fit, but it may draw noise there. Give the --model it is for."
        )
    _say_skipped_layers(file, adapter, model)


def _say_skipped_layers(file: Path, adapter: AdapterFile, model: Backbone) -> None:
    """Warn of a LoRA of Stable Diffusion 1 that learned from prompts as an earlier layer of CLIP reads them."""
    said = adapter.metadata.get("ss_clip_skip", "")
    skipped = int(said) - 1 if re.fullmatch(r"[2-9]", said) else 0
    layers = model.location.config("text_encoder").get("num_hidden_layers") if skipped else None
    # XL's tools ignore the setting; a folder with so many layers less reads so already
    if len(model.text_encoder.slots) == 1 and isinstance(layers, int) and layers != CLIP_LAYERS - skipped:
        notify(
            f"{file} learned at clip skip {said}, and {model.location.name} reads prompts at its text encoder's last "
            f"layer. In a model folder, num_hidden_layers of text_encoder/config.json, lowered by {skipped}, reads as "
            "it did."
        )


def without_skipped_layers(file: Path, adapter: AdapterFile, model: Backbone) -> AdapterFile:
    """The adapter without layers of text encoders behind the last that the model's config keeps, which is printed.

    At clip skip 2 the last one is not reached, so a tool's file has it unchanged. `UserError` where it changes one.
    """
    skipped = []
    for name in adapter.layers:
        component, layer = split_component(name)
        number = re.search(r"\blayers\.(\d+)\.", layer)
        if component.startswith("text_encoder") and number:
            count = model.location.config(component).get("num_hidden_layers")
            if isinstance(count, int) and int(number[1]) >= count:
                skipped.append(name)
    if not skipped:
        return adapter
    if changed := [name for name in skipped if adapter.layers[name].squared_norm()]:
        raise UserError(
            f"{file} changes {changed[0]}, which {model.location.name} does not reach: its config.json says fewer "
            "layers (num_hidden_layers). Give the --model that it was trained on."
        )
    notify(
        f"{format_count(len(skipped), 'layer')} of {file}, as {skipped[0]}, are not reached in {model.location.name} "
        "and change nothing: they are left out."
    )
    kept = {name: layer for name, layer in adapter.layers.items() if name not in skipped}
    return replace(adapter, layers=kept)


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
