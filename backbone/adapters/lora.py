"""Low-rank adapters on peft: fp32 trainable tensors over a base of any precision, LoRA files as diffusers reads them.

Four types: LoRA (Hu et al. 2022), DoRA (Liu et al. 2024, separate magnitude and direction), LoHa and LoKr (Yeh et al.
2024, Hadamard and Kronecker products). One file holds the adapter of the denoiser and of the text encoders, if any.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoHaConfig,
    LoKrConfig,
    LoraConfig,
    get_peft_model_state_dict,
    inject_adapter_in_model,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from backbone.adapters.config import (
    ADAPTER_TYPES,
    CONFIG_KEY,
    TEXT_MODEL,
    AdapterConfig,
    AdapterType,
    check_tensors,
    read_adapter_configs,
)
from backbone.diffusion.noise import generator
from backbone.io.console import UserError, notify, notify_once
from backbone.io.files import read_header, read_tensors, write_tensors
from backbone.io.run_folder import LORA_WEIGHTS as LORA_WEIGHTS

PEFT_WEIGHTS = "adapter_model.safetensors"
LYCORIS_WEIGHTS = "adapter_weights.safetensors"  # LoHa and LoKr, which diffusers' loader refuses
DENOISER_PREFIXES = ("unet.", "transformer.")  # of the denoiser's layers in a file
PARAMETER_PREFIXES = ("lora_", "hada_", "lokr_")
HUGE = 4  # times the largest useful rank: above it a rank is a mistake
ADAPTABLE = (nn.Linear, nn.Conv2d, BaseTunerLayer)  # layers that take an adapter, or have one


@dataclass(frozen=True)
class AdapterKind:
    """The kind of an adapter, without its rank and α.

    rank_pattern  layers whose name contains a pattern (`attn2`, `attn2.to_k`, or a regular expression) have another
                  rank at the same α/rank; of several matches the longest counts
    """

    adapter_type: AdapterType = "lora"
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)


PLAIN = AdapterKind()


def add_lora(
    model: nn.Module,
    name: str,
    *,
    rank: int,
    alpha: float,
    targets: Sequence[str],
    seed: int = 0,
    kind: AdapterKind = PLAIN,
) -> dict[str, Tensor]:
    """Add an adapter to the target layers and return its trainable tensors by name, all fp32.

    A new adapter changes nothing until it is trained: one of its factors is zero. Equal seeds give equal tensors.

    Raises `UserError` if no layer of the model is a target, a pattern matches no layer, or a LoRA's rank is far above
    all layers.
    """
    ranks = match_ranks(model, targets, kind.rank_pattern)
    if kind.adapter_type in ("lora", "dora"):  # a LoKr of rank 100000 has whole factors
        _refuse_huge_rank(model, targets, max([rank, *ranks.values()]))
    config = _make_peft_config(kind, rank=rank, alpha=alpha, targets=list(targets), ranks=ranks)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.manual_seed(seed if -(2**63) <= seed < 2**64 else generator(seed).initial_seed())
        try:
            inject_adapter_in_model(config, cast(Any, model), adapter_name=name)
        except ValueError as error:
            raise UserError(
                f"No layer of this model can take the adapter ({', '.join(targets)}): {error}"
            ) from error
    _keep_modes(model)
    trainable = lora_parameters(model, name)
    for parameter in trainable.values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    return trainable


def _keep_modes(model: nn.Module) -> None:
    """Put adapters into the mode of the layers that they change: peft's new ones drop out, whatever that is."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.train(layer.get_base_layer().training)


def lora_parameters(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of one adapter, by name."""
    return {key: value for key, value in model.named_parameters() if _is_adapter_parameter(key, name)}


def say_useless_rank(parameters: Mapping[str, Tensor]) -> None:
    """Say where a LoRA's rank exceeds the largest rank of its layer, which wastes parameters."""
    downs = {key: value for key, value in parameters.items() if ".lora_A." in key}
    ups = {key: parameters[key.replace(".lora_A.", ".lora_B.")] for key in downs}
    sides = {key: min(len(ups[key]), down[0].numel()) for key, down in downs.items()}
    oversized = [key for key, side in sides.items() if len(downs[key]) > side]
    if oversized:
        notify(
            f"The rank is larger than {len(oversized)} of the {len(sides)} layers can use (at most "
            f"{max(sides[key] for key in oversized)} there): what is above it learns nothing more."
        )


def _refuse_huge_rank(model: nn.Module, targets: Sequence[str], rank: int) -> None:
    """`UserError` for a rank so far above all target layers that it is a mistake and would fill the memory."""
    layers = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, ADAPTABLE) and name.endswith(tuple(targets))
    ]
    widest = max(map(_find_largest_rank, layers), default=rank)
    if rank > HUGE * widest:
        raise UserError(
            f"The rank {rank} is far above what any layer can use ({widest}). Give a smaller one, 4 to 128 mostly."
        )


def _find_largest_rank(layer: Any) -> int:
    """The greatest rank of a layer's weight, as a matrix; by its widths, since a quantised weight is packed."""
    if isinstance(layer, BaseTunerLayer):
        layer = layer.get_base_layer()
    if isinstance(layer, nn.Conv2d):
        return min(layer.out_channels, layer.in_channels * math.prod(layer.kernel_size))
    return int(min(layer.out_features, layer.in_features))


def _is_adapter_parameter(key: str, name: str) -> bool:
    return any(mark in key for mark in PARAMETER_PREFIXES) and (
        f".{name}." in key or key.endswith(f".{name}")
    )


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the base model inside the `with`; afterwards adapters are active and trainable as before."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    disabled = [layer.disable_adapters for layer in layers]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, was_disabled in zip(layers, disabled, strict=True):
            layer._disable_adapters = was_disabled
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def use_adapters(model: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Activate exactly these adapters (none for no names) inside the `with`; afterwards the previous ones.

    `requires_grad` does not change, so an adapter in training may be inactive for a while.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    previous = [layer._active_adapter for layer in layers]
    for layer in layers:
        layer._active_adapter = [name for name in names if _has_adapter(layer, name)]
    try:
        yield
    finally:
        for layer, names_before in zip(layers, previous, strict=True):
            layer._active_adapter = names_before


def save_lora(
    path: Path,
    model: nn.Module,
    name: str,
    *,
    metadata: Mapping[str, str] | None = None,
    text_encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Write an adapter as diffusers' `load_lora_weights` reads it, rank and alpha in the file's metadata.

    `text_encoders` are those with the same adapter, by their names in the diffusers layout.
    """
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for prefix, module in {denoiser_prefix(model): model, **_prefix_encoders(text_encoders)}.items():
        if name not in getattr(module, "peft_config", {}):
            continue
        state = get_peft_model_state_dict(cast(Any, module), adapter_name=name)
        tensors |= {prefix + key: value for key, value in state.items()}
        settings |= {prefix + key: value for key, value in _make_peft_metadata(module, name).items()}
    header = {"format": "pt", CONFIG_KEY: json.dumps(settings), **(metadata or {})}
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

    The layers are exactly those of the file, with its factors unchanged, also for other divisions of LoKr.
    Raises `UserError` if the file is damaged, lacks layers that its header names, or was made for another model.
    """
    tensors, header = read_tensors(path)
    check_tensors(path, tensors)
    configs = read_adapter_configs(path, header)
    if not configs or "" in configs:
        raise UserError(
            f"{path} does not say its rank and alpha. Use a file that `customize train` or `customize import` wrote."
        )
    for component in configs:
        if not any(key.startswith(f"{component}.") for key in tensors):
            raise UserError(
                f"{path} lacks all tensors of the {component} that its header names. Copy it again."
            )
    load_factors(path, model, name, tensors, configs, scale=scale, text_encoders=text_encoders)


def load_factors(
    path: Path,
    model: nn.Module,
    name: str,
    tensors: Mapping[str, Tensor],
    configs: Mapping[str, AdapterConfig],
    *,
    scale: float = 1.0,
    text_encoders: Mapping[str, nn.Module] | None = None,
) -> None:
    """Load an adapter from its tensors, by their names in the file `path`, and its settings by component.

    A DoRA's magnitudes are not scaled, as in peft and diffusers, which a notice says.
    """
    if scale != 1 and any(config.adapter_type == "dora" for config in configs.values()):
        notify_once(
            f"{path} is a DoRA: a strength of {scale:g} scales its direction, and its magnitudes stay as they are, as "
            "in diffusers. Towards the base, as in ComfyUI, it goes in a whole model: customize merge --bake."
        )
    in_few_bits = any(getattr(model, f"is_loaded_in_{bits}bit", False) for bits in (4, 8))
    if in_few_bits and any(config.adapter_type in ("loha", "lokr") for config in configs.values()):
        raise UserError(
            f"{path} is a LoHa or LoKr, which reads the base's weights as they are. Leave out --quantize."
        )
    parts = {denoiser_prefix(model): model, **_prefix_encoders(text_encoders)}
    foreign = next((key for key in tensors if not key.startswith(tuple(parts))), None)
    if foreign is not None:
        raise _made_for_another_model(path, f"it holds {foreign}")
    for prefix, module in parts.items():
        layers = _group_factors(path, module, prefix, tensors)
        config = configs.get(prefix.removesuffix("."))
        if config is None:
            if layers:
                raise UserError(f"{path} does not say the rank and alpha of its {prefix}… Write it again.")
            continue
        _require_every_target(path, module, layers, config)
        if layers:
            _load_network(path, module, name, layers, config, scale)


def activate_adapters(model: nn.Module, names: Sequence[str]) -> None:
    """Activate exactly these adapters, frozen; their changes add up."""
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter([name for name in names if _has_adapter(layer, name)])
    for name in names:
        for parameter in lora_parameters(model, name).values():
            parameter.requires_grad_(False)


def active_adapters(model: nn.Module) -> list[str]:
    """The names of the active adapters of a model."""
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.active_adapters))


def denoiser_prefix(model: nn.Module) -> str:
    """The prefix of the denoiser's keys in a diffusers LoRA file: `unet.` or `transformer.`."""
    return DENOISER_PREFIXES[0] if hasattr(model, "down_blocks") else DENOISER_PREFIXES[1]


def has_text_encoder_weights(path: Path) -> bool:
    """Whether an adapter file also adapts text encoders."""
    return any(not key.startswith(DENOISER_PREFIXES) for key in read_header(path).shapes)


def match_ranks(model: nn.Module, targets: Sequence[str], rank_pattern: Mapping[str, int]) -> dict[str, int]:
    """Layer → rank, for the targets whose name contains a pattern; the longest pattern counts.

    Raises `UserError` for a pattern that gives no layer its rank, or is no regular expression.
    """
    if not rank_pattern:
        return {}
    layers = AdapterConfig(1, 1.0, target_modules=tuple(targets)).find_targets(_list_adaptable_layers(model))
    pattern_of: dict[str, str] = {}
    for pattern in sorted(rank_pattern, key=len):
        # A number at an end must match fully: blocks.1 is not in blocks.10.
        boundaries = (
            r"(?<!\d)" if pattern[:1].isdigit() else "",
            r"(?!\d)" if pattern[-1:].isdigit() else "",
        )
        try:
            expression = re.compile(f"{boundaries[0]}(?:{pattern}){boundaries[1]}")
        except re.error as error:
            raise UserError(f"The rank pattern {pattern} cannot be read ({error}). Write attn2=8.") from error
        pattern_of |= {name: pattern for name in layers if expression.search(name)}
    for pattern in rank_pattern:
        if pattern not in pattern_of.values():
            raise UserError(
                f"The rank pattern {pattern} decides the rank of no layer of the denoiser that takes the adapter (they "
                f"are called like {', '.join(sorted(layers)[:2])}). Correct it, or leave it out."
            )
    return {name: rank_pattern[pattern] for name, pattern in pattern_of.items()}


def _list_adaptable_layers(model: nn.Module) -> frozenset[str]:
    """Names of the layers that can take an adapter, without layers inside adapters."""
    outer = [f"{name}." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    return frozenset(
        name
        for name, module in model.named_modules()
        if isinstance(module, ADAPTABLE) and not name.startswith(tuple(outer))
    )


def _has_adapter(layer: Any, name: str) -> bool:
    return any(name in getattr(layer, kind) for kind in layer.adapter_layer_names if hasattr(layer, kind))


def _prefix_encoders(text: Mapping[str, nn.Module] | None) -> dict[str, nn.Module]:
    return {f"{side}.": module for side, module in (text or {}).items()}


def _made_for_another_model(path: Path, difference: str) -> UserError:
    return UserError(
        f"{path} was made for another model than this one ({difference}). Give the --model that it was trained on."
    )


def _group_factors(
    path: Path, model: nn.Module, prefix: str, tensors: Mapping[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Layer → factor (`lora_A`, `lokr_w1_a`, …) → tensor, of one network's part of a file."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        if not key.startswith(prefix):
            continue
        layer, _, factor = key.removeprefix(prefix).removesuffix(".weight").rpartition(".")
        if not factor.startswith(PARAMETER_PREFIXES):
            raise UserError(f"{path} holds {key}, which is no factor of an adapter. Import it again.")
        layers.setdefault(_match_text_model_level(model, layer), {})[factor] = value
    return layers


def _require_every_target(
    path: Path, model: nn.Module, layers: Mapping[str, object], config: AdapterConfig
) -> None:
    """Raise `UserError` where the model lacks a layer of the file, or the file lacks a target of its header."""
    names = _list_adaptable_layers(model)
    foreign = next((layer for layer in layers if layer not in names), None)
    if foreign is not None:
        raise _made_for_another_model(path, f"it changes {foreign}, which this one does not have")
    missing = sorted(config.find_targets(names) - {layer.removeprefix(TEXT_MODEL) for layer in layers})
    if missing:
        raise UserError(
            f"{path} lacks the tensors of {len(missing)} layers that its header names, as {missing[0]}. "
            "It is cut short, or was made for another model: copy it again, or give the --model it was trained on."
        )


@torch.no_grad()
def _load_network(
    path: Path,
    model: nn.Module,
    name: str,
    layers: dict[str, dict[str, Tensor]],
    config: AdapterConfig,
    scale: float,
) -> None:
    """Load one network's part of an adapter: peft's layers with the file's factors."""
    # The most common rank, and the others by name; magnitudes in the file make it a DoRA
    ranks = {layer: _check_factors(path, layer, factors, config) for layer, factors in layers.items()}
    common_rank = Counter(ranks.values()).most_common(1)[0][0]
    adapter_type = config.adapter_type
    if any("lora_magnitude_vector" in factors for factors in layers.values()):
        adapter_type = "dora"
    peft_config = _make_peft_config(
        AdapterKind(adapter_type),
        rank=common_rank,
        alpha=float(common_rank),
        targets="|".join(re.escape(layer) for layer in layers),
        ranks={layer: rank for layer, rank in ranks.items() if rank != common_rank},
    )

    # peft scales by α/rank, so the scale goes into α
    peft_config.alpha_pattern = {
        f"^{layer}": config.layer_alpha(*_list_names(layer), rank=rank) * scale
        for layer, rank in ranks.items()
    }
    with warnings.catch_warnings():  # a second adapter is intended
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        inject_adapter_in_model(peft_config, cast(Any, model), adapter_name=name)
    _keep_modes(model)
    cast(Any, model).peft_config[name].target_modules = set(layers)

    # The file's factors in place of the initial ones, in fp32 and frozen
    modules = dict(model.named_modules())
    for layer, factors in layers.items():
        module: Any = modules[layer]
        if adapter_type in ("loha", "lokr"):
            _replace_factors(path, layer, module, name, factors)
        else:
            _fill_factors(path, layer, module, name, factors)
    for parameter in lora_parameters(model, name).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(False)


def _list_names(layer: str) -> tuple[str, ...]:
    """A layer's names in a header, without and with CLIP's level `text_model`."""
    plain = layer.removeprefix(TEXT_MODEL)
    return plain, TEXT_MODEL + plain


FACTORS: dict[AdapterType, tuple[tuple[str, ...], ...]] = {  # a layer has all of one row
    "lora": (("lora_A", "lora_B"),),
    "dora": (("lora_A", "lora_B"),),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "lokr": tuple(
        left + right
        for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
}
LORA_SUFFIXES = {  # the end of a tensor's key, in every tool → its factor
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",  # of diffusers' processors before peft
    "_lora.up.weight": "up",
    ".lora_A": "down",  # written by hand
    ".lora_B": "up",
}
_OPTIONAL = {"lora_magnitude_vector", "hada_t1", "hada_t2", "lokr_t2"}


def _check_factors(path: Path, layer: str, factors: Mapping[str, Tensor], config: AdapterConfig) -> int:
    """The rank of a layer; `UserError` where factors are missing, or have another rank than in the header."""
    if not any(set(factors) - _OPTIONAL == set(names) for names in FACTORS[config.adapter_type]):
        raise UserError(
            f"The layer {layer} in {path} is not whole (it has {', '.join(sorted(factors))}). Copy the file again."
        )
    rank = config.layer_rank(*_list_names(layer))
    inner = ("lora_A", "hada_w1_b", "lokr_w1_b", "lokr_w2_b")
    stored = next((factors[factor].shape[0] for factor in inner if factor in factors), rank)
    if stored != rank:
        raise UserError(
            f"The header of {path} is damaged (it says rank {rank} for {layer}, whose tensors have {stored}). "
            "Download, export or train the adapter again."
        )
    return rank


def _fill_factors(path: Path, layer: str, module: Any, name: str, factors: Mapping[str, Tensor]) -> None:
    """Fill a LoRA layer; a matrix also fits a 1 × 1 convolution and the reverse. Without a magnitude it is no DoRA."""
    for factor, value in factors.items():
        if factor == "lora_magnitude_vector":
            parameter = (
                module.lora_magnitude_vector[name].weight if name in module.lora_magnitude_vector else None
            )
            fits = parameter is not None and parameter.numel() == value.numel()
        else:
            parameter = getattr(module, factor)[name].weight
            fits = parameter.flatten(1).shape == value.flatten(1).shape
        if parameter is None or not fits:
            raise _made_for_another_model(path, f"{layer} has another shape there")
        parameter.data = value.float().reshape(parameter.shape).to(parameter.device)
    if "lora_magnitude_vector" not in factors and name in module.lora_magnitude_vector:
        del module.lora_magnitude_vector[name], module.lora_variant[name]
        module.use_dora[name] = False


def _replace_factors(path: Path, layer: str, module: Any, name: str, factors: Mapping[str, Tensor]) -> None:
    """Give a LoHa or LoKr layer the file's factors in place of peft's, for any division of its weight."""
    weight = module.get_base_layer().weight
    for factor in module.adapter_layer_names:
        if name in getattr(module, factor):
            del getattr(module, factor)[name]
    for factor, value in factors.items():
        parameter = nn.Parameter(value.float().to(weight.device), requires_grad=False)
        getattr(module, factor)[name] = parameter
    try:
        fits = module.get_delta_weight(name).shape == weight.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise _made_for_another_model(path, f"{layer} has another shape there")


def _match_text_model_level(model: nn.Module, key: str) -> str:
    """Add or remove CLIP's level `text_model.` in a key, as in the installed transformers."""
    plain = key.removeprefix(TEXT_MODEL)
    return TEXT_MODEL + plain if hasattr(model, "text_model") and "text_projection" not in key else plain


def _make_peft_config(
    kind: AdapterKind, *, rank: int, alpha: float, targets: Sequence[str], ranks: Mapping[str, int]
) -> Any:
    """peft's config of an adapter; layers with another rank, in `ranks`, keep the ratio of alpha to rank.

    `targets` is a list of names or their ends, or a regular expression.
    """
    shared: dict[str, Any] = {
        "r": rank,
        "target_modules": targets,
        # ^: peft matches the ends of names
        "rank_pattern": {f"^{layer}": layer_rank for layer, layer_rank in ranks.items()},
        "alpha_pattern": {f"^{layer}": alpha * layer_rank / rank for layer, layer_rank in ranks.items()},
    }
    name = kind.adapter_type
    match name:
        case "lora" | "dora":
            return LoraConfig(
                **shared, lora_alpha=cast(int, alpha), lora_dropout=kind.dropout, use_dora=name == "dora"
            )
        case "loha":
            return LoHaConfig(**shared, alpha=cast(int, alpha), module_dropout=kind.dropout)
        case "lokr":
            return LoKrConfig(**shared, alpha=cast(int, alpha), module_dropout=kind.dropout)
    raise UserError(f"There is no adapter called {name}. Choose one of {', '.join(ADAPTER_TYPES)}.")


def _make_peft_metadata(model: nn.Module, name: str) -> dict[str, Any]:
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
