"""Adapters on peft: fp32 trainables over a base of any precision, one context that switches them off and restores."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backbone.console import UserError
from backbone.files import read_tensors, write_tensors

WEIGHTS = "pytorch_lora_weights.safetensors"
DENOISER_PREFIX = "unet."


def add_lora(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Puts a LoRA (Hu et al. 2022) on the target layers and gives its trainable tensors by name, all fp32.

    The new adapter changes nothing until it is trained: its second factor is zero. Equal seeds give equal tensors.
    """
    config = LoraConfig(
        r=rank, lora_alpha=cast(int, alpha), target_modules=list(targets), lora_dropout=dropout
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, cast(Any, model), adapter_name=name)
    trainable = lora_parameters(model, name)
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trainable


def lora_parameters(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter."""
    mark = f".{name}."
    return {key: value for key, value in model.named_parameters() if "lora_" in key and mark in key}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The base model inside the `with`; afterwards every adapter is on again, trainable exactly where it was before."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    was_off = [layer.disable_adapters for layer in layers]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, off in zip(layers, was_off, strict=True):
            layer._disable_adapters = off
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def save_lora(path: Path, model: nn.Module, name: str, *, metadata: dict[str, str] | None = None) -> None:
    """Writes an adapter as diffusers' `load_lora_weights` reads it, rank and alpha in the file's header."""
    state = get_peft_model_state_dict(cast(Any, model), adapter_name=name)
    tensors = {DENOISER_PREFIX + key: value for key, value in state.items()}
    write_tensors(
        path,
        tensors,
        {"format": "pt", "lora_adapter_metadata": _config_json(model, name), **(metadata or {})},
    )


def load_lora(path: Path, model: nn.Module, name: str, *, scale: float = 1.0) -> None:
    """Puts a saved adapter on the model, `scale` times as strong.

    Raises `UserError` when the file was made for another model.
    """
    tensors, header = read_tensors(path)
    if "lora_adapter_metadata" not in header:
        raise UserError(f"{path} does not say its rank and alpha. Use a file that `customize train` wrote.")
    settings = {
        key.removeprefix(DENOISER_PREFIX): value
        for key, value in json.loads(header["lora_adapter_metadata"]).items()
        if key.startswith(DENOISER_PREFIX)
    }
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"] * scale,
        target_modules=settings["target_modules"],
        lora_dropout=settings["lora_dropout"],
    )
    state = {key.removeprefix(DENOISER_PREFIX): value for key, value in tensors.items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    with warnings.catch_warnings():  # a second adapter is what we want here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(config, cast(Any, model), adapter_name=name)
    own = {
        key: tuple(value.shape)
        for key, value in get_peft_model_state_dict(cast(Any, model), adapter_name=name).items()
    }
    if shapes != own:
        raise UserError(
            f"{path} was made for another model than this one. Give the --model that it was trained on."
        )
    set_peft_model_state_dict(cast(Any, model), state, adapter_name=name)
    for parameter in lora_parameters(model, name).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)


def activate(model: nn.Module, names: Sequence[str]) -> None:
    """Makes exactly these adapters work, added together."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(list(names))
    for name in names:
        for parameter in lora_parameters(model, name).values():
            parameter.requires_grad_(False)


def _config_json(model: nn.Module, name: str) -> str:
    config = cast(Any, model).peft_config[name]
    settings = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": sorted(config.target_modules),
        "bias": "none",
        "use_dora": False,
        "init_lora_weights": True,
    }
    return json.dumps({DENOISER_PREFIX + key: value for key, value in settings.items()})
