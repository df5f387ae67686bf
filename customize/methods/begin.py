"""Load what an earlier run has learned as a run's initial weights (`--begin-from`), or the run's own best weights."""

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
from customize.methods.textual_inversion import TokenEmbeddings
from customize.methods.weights import Weights

BEFORE = "before"  # the earlier run's adapter, while it is copied


@torch.no_grad()
def begin_from(model: Backbone, trained: Sequence[Any], concept: Concept) -> None:
    """Copy an earlier run's adapter and changed weights into the parameters that `trained` has set up on the model.

    An adapter may start from one of a lower rank. Text encoders that the earlier run did not train start unchanged.

    Raises `UserError` for an adapter of other layers, a higher rank, another scale or kind, and for text encoders that
    only the earlier run has trained.
    """
    if not model.has_fingerprint(concept.fingerprint):
        notify(f"{concept.folder} was trained on {concept.model} with other weights than are trained on now.")
    copy_learned(model, trained, concept)


@torch.no_grad()
def copy_learned(model: Backbone, trained: Sequence[Any], concept: Concept) -> None:
    """Copy a concept's adapter, embeddings and changed weights into the parameters of `trained`; errors as above."""
    for part in trained:
        if isinstance(part, Weights):
            part.forget()
            add_weight_differences(model, concept)
        if isinstance(part, TokenEmbeddings):
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
            raise _explain_misfit(
                concept, "it has an adapter on the text encoders too; add --train-text-encoder"
            )
    finally:
        for network in (model.denoiser, *text.values()):
            drop_adapter(network, BEFORE)


def copy_adapter(network_name: str, network: nn.Module, concept: Concept) -> None:
    """Copy the earlier run's adapter of a network into the trained one; `UserError` if they do not match."""
    parameters, earlier = lora_parameters(network, ADAPTER), lora_parameters(network, BEFORE)
    renamed = {name.replace(f".{BEFORE}", f".{ADAPTER}"): value for name, value in earlier.items()}
    if parameters.keys() != renamed.keys():
        raise _explain_misfit(
            concept, f"its adapter has other layers of the {network_name}, or is of another --adapter"
        )
    if not all(_fits(name, value, renamed[name]) for name, value in parameters.items()):
        raise _explain_misfit(
            concept, f"its rank is {_find_rank(renamed)}; give --rank {_find_rank(renamed)} or more"
        )
    for layer in network.modules():
        scaling: Mapping[str, float] = getattr(layer, "scaling", {})
        if isinstance(layer, BaseTunerLayer) and scaling.get(ADAPTER) != scaling.get(BEFORE):
            ranks: Mapping[str, int] = layer.r  # type: ignore[assignment]
            alpha = scaling[BEFORE] * ranks[ADAPTER]
            raise _explain_misfit(concept, f"its α is another; give --lora-alpha {alpha:g}")
    for name, value in parameters.items():
        copy_factor(value, renamed[name])


def copy_factor(parameter: Tensor, source: Tensor) -> None:
    """Copy a factor of the same or a lower rank into that of the same layer.

    The other columns of B are zeros, as in every new adapter, so the layer's output does not change.
    """
    parameter[tuple(map(slice, source.shape))] = source


def _fits(name: str, parameter: Tensor, source: Tensor) -> bool:
    """Whether a factor fits into `parameter`: of equal shape, or a LoRA's factor of a lower rank."""
    if parameter.ndim != source.ndim or ".lora_" not in name:
        return parameter.shape == source.shape
    return all(large >= small for large, small in zip(parameter.shape, source.shape, strict=True))


def drop_adapter(network: nn.Module, name: str) -> None:
    """Remove an adapter from a network; the trained one stays active."""
    for layer in network.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([ADAPTER])
            layer.delete_adapter(name)
    getattr(network, "peft_config", {}).pop(name, None)


def _find_rank(parameters: Mapping[str, Tensor]) -> int:
    return max((len(value) for name, value in parameters.items() if ".lora_A." in name), default=0)


def _explain_misfit(concept: Concept, reason: str) -> UserError:
    return UserError(f"Training cannot begin from {concept.folder}: {reason}.")
