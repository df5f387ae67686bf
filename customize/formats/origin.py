"""What is odd about an adapter although its layers fit a model: said, since tools put it on without a word."""

from __future__ import annotations

from pathlib import Path

from backbone.io.console import notify
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


def say_other_origin(file: Path, adapter: AdapterFile, model: Backbone) -> None:
    """Say so where an adapter's header names another family than a model's, or its names another number of encoders.

    Layers of several families are called alike and equally wide: the text encoder of Stable Diffusion 1.x and XL,
    FLUX.1's blocks and Chroma's.
    """
    said, own = family_from_metadata(adapter.metadata), _possible_families(model)
    if said is not None and own and said not in own:
        notify(
            f"{file} says that it was made for {BASE_NAMES[said]}, and {model.location.name} is "
            f"{' or '.join(BASE_NAMES[one] for one in own)}. Its layers fit, but it may not do there what it learned."
        )
    elif adapter.numbered and len(model.text_encoder.slots) == 1:
        notify(
            f"{file} numbers its text encoders (lora_te1_…), as LoRAs of Stable Diffusion XL, 3 and FLUX do, and "
            f"{model.location.name} has one. Its layers fit, but it may not do there what it learned."
        )


def _possible_families(model: Backbone) -> tuple[BaseFamily, ...]:
    """The families that a model may be of, by its pipeline; () where that is not known."""
    pipeline = str(model.location.index.get("_class_name", ""))
    if pipeline in PIPELINES:
        return (PIPELINES[pipeline],)
    width = model.location.config("unet").get("cross_attention_dim") if pipeline in UNET_PIPELINES else None
    known = FAMILY_BY_CONTEXT_WIDTH.get(width) if isinstance(width, int) else None
    return (known,) if known else UNET_PIPELINES.get(pipeline, ())
