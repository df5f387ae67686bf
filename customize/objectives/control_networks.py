"""Control networks to train: new ones by their kind, or one to go on from."""

from __future__ import annotations

from typing import Any

from backbone.conditions.control import ControlNetwork
from backbone.io.console import UserError
from backbone.models.control import new_control, open_control
from backbone.models.model import Backbone
from customize.control_settings import ADAPTER, CONTROLNET, ControlSettings

HINT_WIDTHS = (
    16,
    32,
    64,
    96,
)  # of a ControlNet's layers before the copy, where the autoencoder's factor is 8


def make_network(model: Backbone, settings: ControlSettings) -> ControlNetwork:
    """The network of a run, fp32, its trainable parameters with gradients.

    Raises `UserError` for a model whose control networks are not trained here, and for one to begin from that is of
    another kind.
    """
    import torch

    if settings.begin_from:
        network, record, _ = open_control(model, settings.begin_from)
        wanted = "T2IAdapter" if settings.kind == ADAPTER else "ControlNetModel"
        if type(network.module).__name__ != wanted:
            raise UserError(
                f"{settings.begin_from} is a {type(network.module).__name__}, and --kind {settings.kind} trains a "
                f"{wanted}. Name another one, or another --kind."
            )
        if record.kinds and settings.condition not in record.kinds:
            raise UserError(
                f"{settings.begin_from} reads {', '.join(record.kinds)} and not {settings.condition}. Begin a new one."
            )
        network.module.float().requires_grad_(True).train()
        return network
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if settings.kind == ADAPTER:
            return new_control(model, ADAPTER, **adapter_config(settings))
        network = new_control(model, CONTROLNET, conditioning_embedding_out_channels=hint_widths(model))
    return network


def adapter_config(settings: ControlSettings) -> dict[str, Any]:
    """Of a T2I-Adapter: the full one is what the model's family says."""
    return {"adapter_type": "light_adapter"} if settings.adapter_size == "light" else {}


def hint_widths(model: Backbone) -> tuple[int, ...]:
    """Widths of the layers that bring a map to the latents' size: each but the first halves it."""
    halvings = model.factor.bit_length() - 1
    return (*HINT_WIDTHS[:1], *HINT_WIDTHS[1 : 1 + halvings])[: halvings + 1]
