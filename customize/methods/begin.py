"""Beginning with what an earlier run has learned, in place of new weights; going back to what the run itself had."""

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
from customize.methods.textual_inversion import Words
from customize.methods.weights import Weights

BEFORE = "before"  # the earlier run's adapter, while it is copied


@torch.no_grad()
def begin_from(model: Backbone, trained: Sequence[Any], concept: Concept) -> None:
    """Copy an earlier run's adapter and changed weights into the parameters that `trained` has set up on the model.

    An adapter of a higher rank begins with that of a lower one, and text encoders that the earlier run has not trained
    as they are.

    Raises `UserError` for an adapter of other layers, a higher rank, another scale or kind, and for text encoders that
    only the earlier run has trained.
    """
    if not model.has_fingerprint(concept.fingerprint):
        notify(f"{concept.folder} was trained on {concept.model} with other weights than are trained on now.")
    copy_learned(model, trained, concept)


@torch.no_grad()
def copy_learned(model: Backbone, trained: Sequence[Any], concept: Concept) -> None:
    """Put a concept's adapter, embeddings and changed weights in place of what `trained` holds; errors as above."""
    for part in trained:
        if isinstance(part, Weights):
            part.forget()
            add_weight_differences(model, concept)
        if isinstance(part, Words):
            part.load(concept.folder / concept.words)
    adapters = [part for part in trained if isinstance(part, Adapter)]
    if not adapters:
        return
    text = {slot.name: slot.model for slot in model.text_encoder.slots}
    load_lora(concept.weights_path, model.denoiser, BEFORE, text_encoders=text)
    networks = {"denoiser": model.denoiser, **(text if adapters[0].with_text else {})}
    try:
        for name, network in networks.items():
            if name == "denoiser" or lora_parameters(network, BEFORE):
                copy_adapter(name, network, concept)
            else:
                notify(f"{concept.folder} has no adapter on the {name}: a new one begins there.")
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
    if not all(_holds(name, value, renamed[name]) for name, value in own.items()):
        raise _does_not_fit(concept, f"its rank is {_rank(renamed)}; give --rank {_rank(renamed)} or more")
    for layer in network.modules():
        scaling: Mapping[str, float] = getattr(layer, "scaling", {})
        if isinstance(layer, BaseTunerLayer) and scaling.get(ADAPTER) != scaling.get(BEFORE):
            ranks: Mapping[str, int] = layer.r  # type: ignore[assignment]
            wanted = scaling[BEFORE] * ranks[ADAPTER]
            raise _does_not_fit(concept, f"its α is another; give --lora-alpha {wanted:g}")
    for name, value in own.items():
        copy_factor(value, renamed[name])


def copy_factor(own: Tensor, before: Tensor) -> None:
    """Copy a factor of a lower rank, or of the same, into one of the same layer.

    The further columns of B are zeros, as every new adapter's are, so the layer does what it did before.
    """
    own[tuple(map(slice, before.shape))] = before


def _holds(name: str, own: Tensor, before: Tensor) -> bool:
    """Whether an earlier factor fits into one of this name: in those of a LoRA also one of a lower rank."""
    if own.ndim != before.ndim or ".lora_" not in name:
        return own.shape == before.shape
    return all(large >= small for large, small in zip(own.shape, before.shape, strict=True))


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
