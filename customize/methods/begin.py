"""Beginning with what an earlier run has learned, in place of new weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backbone.adapters.apply import add_weight_differences
from backbone.adapters.concept import Concept
from backbone.adapters.lora import load_lora, lora_parameters
from backbone.io.console import UserError, notify
from backbone.models.model import Backbone
from customize.methods.lora import ADAPTER, Adapter
from customize.methods.weights import Weights

BEFORE = "before"  # the earlier run's adapter, while it is copied


@torch.no_grad()
def begin_from(model: Backbone, trained: Sequence[Any], concept: Concept) -> None:
    """Copy an earlier run's adapter and changed weights into the parameters that `trained` has set up on the model.

    Raises `UserError` for an adapter of other layers, another rank, α or kind, and for text encoders that only one of
    the two runs trains.
    """
    if concept.fingerprint != model.fingerprint:
        notify(f"{concept.folder} was trained on {concept.model} with other weights than are trained on now.")
    if any(isinstance(part, Weights) for part in trained):
        add_weight_differences(model, concept)
    adapters = [part for part in trained if isinstance(part, Adapter)]
    if not adapters:
        return
    text = {side.name: side.model for side in model.text_encoder.slots}
    load_lora(concept.weights_path, model.denoiser, BEFORE, text_encoders=text)
    networks = {"denoiser": model.denoiser, **(text if adapters[0].with_text else {})}
    try:
        for name, network in networks.items():
            copy_adapter(name, network, concept)
        if not adapters[0].with_text and any(lora_parameters(network, BEFORE) for network in text.values()):
            raise _does_not_fit(
                concept, "it has an adapter on the text encoders too; add --train-text-encoder"
            )
    finally:
        for network in (model.denoiser, *text.values()):
            drop_adapter(network, BEFORE)


def copy_adapter(what: str, network: nn.Module, concept: Concept) -> None:
    """Copy the earlier run's adapter of a network into the one that is trained; `UserError` where they are unlike."""
    own, before = lora_parameters(network, ADAPTER), lora_parameters(network, BEFORE)
    renamed = {name.replace(f".{BEFORE}", f".{ADAPTER}"): value for name, value in before.items()}
    if own.keys() != renamed.keys():
        raise _does_not_fit(
            concept, f"its adapter has other layers of the {what}, or is of another --adapter"
        )
    unlike = next((name for name, value in own.items() if value.shape != renamed[name].shape), None)
    if unlike is not None:
        raise _does_not_fit(concept, f"its rank is {_rank(renamed)}; give --rank {_rank(renamed)}")
    for layer in network.modules():
        scaling: Mapping[str, float] = getattr(layer, "scaling", {})
        if isinstance(layer, BaseTunerLayer) and scaling.get(ADAPTER) != scaling.get(BEFORE):
            raise _does_not_fit(concept, "its α is another; give the --lora-alpha that it was trained with")
    for name, value in own.items():
        value.copy_(renamed[name])


def drop_adapter(network: nn.Module, name: str) -> None:
    """Take an adapter off a network again, so that the trained one works alone."""
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([ADAPTER])
            layer.delete_adapter(name)
    getattr(network, "peft_config", {}).pop(name, None)


def _rank(parameters: Mapping[str, Tensor]) -> int:
    return max((len(value) for name, value in parameters.items() if ".lora_A." in name), default=0)


def _does_not_fit(concept: Concept, why: str) -> UserError:
    return UserError(f"Training cannot begin from {concept.folder}: {why}.")
