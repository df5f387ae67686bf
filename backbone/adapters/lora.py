"""Low-rank adapters on peft: fp32 trainable tensors over a base of any precision, LoRA files as diffusers reads them.

Four types: LoRA (Hu et al. 2022), DoRA (Liu et al. 2024, magnitude and direction apart), LoHa and LoKr (Yeh et al.
2024, Hadamard and Kronecker products). One file holds the adapter of the denoiser and of the text encoders, if any.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backbone.diffusion.noise import generator
from backbone.io.console import UserError, notify_once
from backbone.io.files import read_tensors, write_tensors

AdapterType = Literal["lora", "dora", "loha", "lokr"]

LORA_WEIGHTS = "pytorch_lora_weights.safetensors"
LYCORIS_WEIGHTS = "adapter_weights.safetensors"  # LoHa and LoKr, which diffusers' loader refuses
DENOISER_PREFIXES = ("unet.", "transformer.")  # a file's names of the denoiser's layers begin so
PARAMETER_PREFIXES = ("lora_", "hada_", "lokr_")
ADAPTER_TYPES: tuple[AdapterType, ...] = get_args(AdapterType)


def add_lora(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float = 0.0,
    seed: int = 0,
    adapter_type: AdapterType = "lora",
    rank_pattern: Mapping[str, int] | None = None,
) -> dict[str, Tensor]:
    """Add an adapter to the target layers and return its trainable tensors by name, all fp32.

    `rank_pattern` gives layers that match a pattern another rank at the same α/rank, as in peft. A new adapter changes
    nothing until it is trained: one of its factors is zero. Equal seeds give equal tensors.

    Raises `UserError` if no layer of the model is a target.
    """
    config = _peft_config(
        adapter_type,
        rank=rank,
        alpha=alpha,
        targets=targets,
        dropout=dropout,
        rank_pattern=rank_pattern or {},
    )
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed if -(2**63) <= seed < 2**64 else generator(seed).initial_seed())
        try:
            inject_adapter_in_model(config, cast(Any, model), adapter_name=name)
        except ValueError as error:
            raise UserError(
                f"No layer of this model can take the adapter ({', '.join(targets)}): {error}"
            ) from error
    trainable = lora_parameters(model, name)
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trainable


def say_idle_rank(parameters: Mapping[str, Tensor], rank: int) -> None:
    """Says that a LoRA's rank is more than any of its layers is wide: a part of it can learn nothing."""
    inputs = {key: value[0].numel() for key, value in parameters.items() if "lora_A" in key}
    outputs = {
        key.replace("lora_B", "lora_A"): len(value) for key, value in parameters.items() if "lora_B" in key
    }
    widths = [min(width, outputs[key]) for key, width in inputs.items() if key in outputs]
    if widths and rank > max(widths):
        notify_once(
            f"Rank {rank} is more than any layer can use (the widest {max(widths)}), so a part of it is idle."
        )


def lora_parameters(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by name."""
    return {key: value for key, value in model.named_parameters() if _is_adapter_parameter(key, name)}


def _is_adapter_parameter(key: str, name: str) -> bool:
    return any(mark in key for mark in PARAMETER_PREFIXES) and (
        f".{name}." in key or key.endswith(f".{name}")
    )


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the `with`; afterwards adapters are active and trainable exactly as before."""
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


@contextmanager
def use_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Activate exactly these adapters (none for no names) inside the `with`; afterwards those from before.

    `requires_grad` does not change, so an adapter in training may be left out for a while.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    before = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name for name in names if _has_adapter(layer, name)]
    try:
        yield
    finally:
        for layer, active in zip(layers, before, strict=True):
            layer._active_adapter = active


def save_lora(
    path: Path,
    model: nn.Module,
    name: str,
    *,
    metadata: Mapping[str, str] | None = None,
    text_encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write an adapter as diffusers' `load_lora_weights` reads it, rank and alpha in the file's metadata.

    `text_encoders` are those that carry the same adapter, by their names in the diffusers layout.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for prefix, module in {denoiser_prefix(model): model, **_prefix_encoders(text_encoders)}.items():
        if name not in getattr(module, "peft_config", {}):
            continue
        state = get_peft_model_state_dict(cast(Any, module), adapter_name=name)
        tensors |= {prefix + key: value for key, value in state.items()}
        settings |= {prefix + key: value for key, value in _peft_metadata(module, name).items()}
    header = {"format": "pt", "lora_adapter_metadata": json.dumps(settings), **(metadata or {})}
    write_tensors(path, tensors, header)


def load_lora(
    path: Path,
    model: nn.Module,
    name: str,
    *,
    scale: float = 1.0,
    text_encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Load a saved adapter into the model, its α multiplied by `scale`.

    Raises `UserError` if the file was made for another model.
    """
    tensors, header = read_tensors(path)
    if "lora_adapter_metadata" not in header:
        raise UserError(f"{path} does not say its rank and alpha. Use a file that `customize train` wrote.")
    metadata = json.loads(header["lora_adapter_metadata"])
    parts = {denoiser_prefix(model): model, **_prefix_encoders(text_encoders)}
    if any(not key.startswith(tuple(parts)) for key in tensors):
        raise UserError(
            f"{path} was made for another model than this one. Give the --model that it was trained on."
        )
    for prefix, module in parts.items():
        state = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
        if state:
            settings = {key.removeprefix(prefix): v for key, v in metadata.items() if key.startswith(prefix)}
            _load_into(path, module, name, state, settings, scale)


def activate_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Activate exactly these adapters, frozen; their changes add up."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name for name in names if _has_adapter(layer, name)])
    for name in names:
        for parameter in lora_parameters(model, name).values():
            parameter.requires_grad_(False)


def denoiser_prefix(model: nn.Module) -> str:
    """The prefix of the denoiser's keys in a diffusers LoRA file: `unet.` or `transformer.`."""
    return DENOISER_PREFIXES[0] if hasattr(model, "down_blocks") else DENOISER_PREFIXES[1]


def has_text_encoder_weights(path: Path) -> bool:
    """Whether an adapter file also adapts text encoders."""
    return any(not key.startswith(DENOISER_PREFIXES) for key in read_tensors(path)[0])


def _has_adapter(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, kind) for kind in layer.adapter_layer_names if hasattr(layer, kind))


def _prefix_encoders(text: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    return {f"{side}.": module for side, module in (text or {}).items()}


def _load_into(
    path: Path, model: nn.Module, name: str, state: dict[str, Tensor], settings: dict[str, Any], scale: float
) -> None:
    """Load the part of an adapter that belongs to one network."""
    config = _peft_config(
        _adapter_type(settings),
        rank=settings["r"],
        alpha=settings.get("lora_alpha", settings.get("alpha", settings["r"])) * scale,
        targets=settings["target_modules"],
        dropout=settings.get("lora_dropout", 0.0),
        rank_pattern=settings.get("rank_pattern") or {},
    )
    if "alpha_pattern" in settings:  # other tools let rank and alpha differ on their own
        config.alpha_pattern = {layer: alpha * scale for layer, alpha in settings["alpha_pattern"].items()}
    state = {_match_text_model_level(model, key): value for key, value in state.items()}
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    with warnings.catch_warnings():  # a second adapter is what we want here
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        try:
            inject_adapter_in_model(config, cast(Any, model), adapter_name=name)
        except ValueError as error:
            raise UserError(
                f"{path} was made for another model than this one. Give the --model that it was trained on."
            ) from error
    expected = get_peft_model_state_dict(cast(Any, model), adapter_name=name)
    if shapes != {key: tuple(value.shape) for key, value in expected.items()}:
        raise UserError(
            f"{path} was made for another model than this one. Give the --model that it was trained on."
        )
    set_peft_model_state_dict(cast(Any, model), state, adapter_name=name)
    for parameter in lora_parameters(model, name).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)


def _match_text_model_level(model: nn.Module, key: str) -> str:
    """Add or remove CLIP's level `text_model.` in a key, as the installed transformers names it."""
    plain = key.removeprefix("text_model.")
    return f"text_model.{plain}" if hasattr(model, "text_model") and "text_projection" not in key else plain


def _peft_config(
    adapter_type: AdapterType,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    dropout: float,
    rank_pattern: Mapping[str, int],
) -> Any:
    """peft's config of an adapter; layers of another rank keep the ratio of alpha to rank."""
    shared: dict[str, Any] = {
        "r": rank,
        "target_modules": list(targets),
        "rank_pattern": dict(rank_pattern),
        "alpha_pattern": {layer: alpha * layer_rank / rank for layer, layer_rank in rank_pattern.items()},
    }
    match adapter_type:
        case "lora" | "dora":
            return LoraConfig(
                **shared, lora_alpha=cast(int, alpha), lora_dropout=dropout, use_dora=adapter_type == "dora"
            )
        case "loha":
            return LoHaConfig(**shared, alpha=cast(int, alpha), module_dropout=dropout)
        case "lokr":
            return LoKrConfig(**shared, alpha=cast(int, alpha), module_dropout=dropout)
    raise UserError(f"There is no adapter called {adapter_type}. Choose one of {', '.join(ADAPTER_TYPES)}.")


def _adapter_type(settings: Mapping[str, Any]) -> AdapterType:
    """The type of a saved adapter."""
    return cast(AdapterType, settings.get("kind", "dora" if settings.get("use_dora") else "lora"))


def _peft_metadata(model: nn.Module, name: str) -> dict[str, Any]:
    """The adapter's settings for the file's metadata, as diffusers reads them for LoRA."""
    config = cast(Any, model).peft_config[name]
    settings: dict[str, Any] = {
        "r": config.r,
        "lora_alpha": getattr(config, "lora_alpha", getattr(config, "alpha", None)),
        "lora_dropout": getattr(config, "lora_dropout", 0.0),
        "target_modules": sorted(config.target_modules),
        "bias": "none",
        "use_dora": bool(getattr(config, "use_dora", False)),
        "init_lora_weights": True,
    }
    if config.rank_pattern:
        settings |= {"rank_pattern": config.rank_pattern, "alpha_pattern": config.alpha_pattern}
    if not isinstance(config, LoraConfig):
        settings["kind"] = "loha" if isinstance(config, LoHaConfig) else "lokr"
    return settings
