"""What an adapter's file says of itself: rank, α and layers, in the metadata or in peft's `adapter_config.json`.

Every value is checked for its type and bounds here, so that a foreign or damaged file is refused by its name and key.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from backbone.io.console import UserError, notify_once
from backbone.io.files import plain_name, read_json

AdapterType = Literal["lora", "dora", "loha", "lokr"]
ADAPTER_TYPES: tuple[AdapterType, ...] = get_args(AdapterType)
TEXT_MODEL = "text_model."  # a level of CLIP that some versions of transformers have
CONFIG_KEY = "lora_adapter_metadata"  # diffusers' metadata entry: peft's configuration by component, as JSON
PEFT_PREFIX = "base_model.model."  # of peft's own files, before or after the component, or without one
CONFIG_FILE = "adapter_config.json"  # peft's, beside `adapter_model.safetensors`
LARGEST_ALPHA = 1e30
LARGEST_RANK = 1 << 20  # far more than the widest layer holds
# Variants of peft whose factors are no update B·A of their layer → what they are
OTHER_VARIANTS = {
    "alora_invocation_tokens": "aLoRA, which works after some words alone",
    "arrow_config": "Arrow, which chooses between adapters",
    "kasa_config": "KaSA, which also changes the base's weights",
    "layer_replication": "an adapter of repeated layers",
    "monteclora_config": "MonteCLoRA, which draws its factors",
    "use_bdlora": "BD-LoRA, whose factors are of blocks",
    "use_qalora": "QA-LoRA, whose inputs are pooled",
}
# Initialisations of peft that also change the base's weights: the factors alone are no update of the published ones.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """The settings of one network's adapter, as peft has them; patterns match the ends of module names.

    `target_modules` are names or ends of names, or a regular expression; None where the file does not say them.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    adapter_type: AdapterType = "lora"
    use_rslora: bool = False

    def layer_rank(self, *names: str) -> int:
        """The rank of a layer, by its names."""
        return int(_match(self.rank_pattern, names, self.rank))

    def layer_alpha(self, *names: str, rank: int) -> float:
        """α of a layer such that its update is scaled by α/rank; rsLoRA's α/√rank is converted."""
        alpha = float(_match(self.alpha_pattern, names, self.alpha))
        return alpha * math.sqrt(rank) if self.use_rslora else alpha

    def find_targets(self, layers: Iterable[str]) -> set[str]:
        """Those of a network's layers that are targets, without CLIP's level `text_model`.

        A target that is a whole name means this layer only: FLUX's last `proj_out` is no end of its blocks'.
        """
        names = {name.removeprefix(TEXT_MODEL) for name in layers}
        if isinstance(self.target_modules, str):
            expression = re.compile(self.target_modules)
            return {
                name
                for name in names
                if expression.fullmatch(name) or expression.fullmatch(TEXT_MODEL + name)
            }
        targets = {target.removeprefix(TEXT_MODEL) for target in self.target_modules or ()}
        ends = tuple(f".{target}" for target in targets - names)
        return {name for name in names if name in targets or f".{name}".endswith(ends)}


def read_adapter_configs(path: Path, metadata: Mapping[str, str]) -> dict[str, AdapterConfig]:
    """Component (`unet`, `text_encoder_2`) → its settings in a file's metadata; {} where the metadata says nothing.

    A network's own `save_lora_adapter` says them without its name: "" is that component.
    Raises `UserError` that names the file and the key for what is not of its type or bounds.
    """
    if CONFIG_KEY not in metadata:
        return {}
    try:
        settings = json.loads(metadata[CONFIG_KEY])
    except (ValueError, RecursionError) as error:
        raise _damaged(path, CONFIG_KEY, "is no JSON") from error
    if not isinstance(settings, dict) or not settings:
        raise _damaged(path, CONFIG_KEY, "holds no settings")
    if "peft_type" in settings:
        return {"": _parse_peft_settings(path, settings)}
    by_component: dict[str, dict[str, Any]] = {}
    for key, value in settings.items():
        component, _, name = key.partition(".")
        by_component.setdefault(component, {})[name] = value
    configs = {
        component: parse_adapter_config(path, values, prefix=f"{component}.")
        for component, values in by_component.items()
    }
    for component, config in configs.items():
        if config.target_modules is None:
            raise _damaged(path, f"{component}.target_modules", "is missing")
    return configs


def read_peft_config(path: Path) -> AdapterConfig:
    """The settings in peft's `adapter_config.json`; `UserError` names the file and the key that is wrong."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged (it holds no settings). Download or export the adapter again.")
    return _parse_peft_settings(path, settings)


def _parse_peft_settings(path: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    """peft's settings of one network, whichever file says them."""
    if settings.get("fan_in_fan_out"):
        raise UserError(f"{path} has fan_in_fan_out, which no layer of an image model has. Check the file.")
    kind = settings.get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise UserError(f"{path} has the type {kind}. Only LoRA, DoRA, LoHa and LoKr are read here.")
    return parse_adapter_config(path, {**settings, "kind": kind.lower()})


def parse_adapter_config(path: Path, settings: Mapping[str, Any], *, prefix: str = "") -> AdapterConfig:
    """peft's settings as read from JSON, each checked; `prefix` is the component's in the error's key."""

    def wrong(key: str, why: str) -> UserError:
        return _damaged(path, prefix + key, why)

    def value(key: str, is_right: Any, why: str, default: Any) -> Any:
        found = settings.get(key)
        if found is None and (default is not None or key not in settings):
            return default
        if not is_right(found):
            raise wrong(key, why)
        return found

    rank = value("r", _is_rank, _RANK, None)
    if rank is None:
        raise wrong("r", "is missing")
    alpha = value("lora_alpha" if "lora_alpha" in settings else "alpha", _is_alpha, _ALPHA, None)
    targets = value("target_modules", _is_targets, "is no list of layer names", ())
    ranks = value("rank_pattern", _pattern_of(_is_rank), f"holds a layer whose rank {_RANK}", {})
    alphas = value("alpha_pattern", _pattern_of(_is_alpha), f"holds a layer whose α {_ALPHA}", {})
    flags = {key: value(key, lambda v: isinstance(v, bool), "is not true or false", False) for key in _FLAGS}
    kind = value("kind", lambda v: v in ADAPTER_TYPES, f"is none of {', '.join(ADAPTER_TYPES)}", "lora")
    value("lora_dropout", _is_number, "is no number", 0.0)

    # Variants that change more than W + α/r·B·A are refused, or said where only biases are missing
    if other := next((what for key, what in OTHER_VARIANTS.items() if settings.get(key)), None):
        raise UserError(
            f"{path} says that it is {other}. Only plain LoRA, DoRA, LoHa and LoKr are read here."
        )
    saved = value("modules_to_save", _is_names, "is no list of layer names", ())
    if saved:
        raise UserError(
            f"{path} says that layers were trained as a whole beside the adapter (modules_to_save: "
            f"{', '.join(saved[:3])}), which no adapter holds here. Merge it into its model in peft "
            "(merge_and_unload), and take the difference: customize extract."
        )
    if value("bias", lambda v: v in _BIASES, f"is none of {', '.join(_BIASES)}", "none") == "all":
        notify_once(
            f"{path} says that the biases of its whole model were trained too (bias: all). No adapter holds them here: "
            "what they changed is missing."
        )
    start = settings.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGE_THE_BASE):
        raise UserError(
            f"{path} was started by {start}, which changes the base's own weights too. Convert it to a plain LoRA in "
            "peft (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    return AdapterConfig(
        rank=rank,
        alpha=float(UNSAID_ALPHA if alpha is None else alpha),
        rank_pattern={plain_name(layer): one for layer, one in ranks.items()},
        alpha_pattern={plain_name(layer): one for layer, one in alphas.items()},
        target_modules=plain_name(targets)
        if isinstance(targets, str)
        else tuple(map(plain_name, targets)) or None,
        adapter_type="dora" if kind == "lora" and flags["use_dora"] else kind,
        use_rslora=flags["use_rslora"],
    )


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for a file without tensors, with values that are not finite, none at all, or whole numbers.

    Several whole numbers are a quantised tensor, whose scale is elsewhere (a single one may be an α).
    """
    if not tensors:
        raise UserError(f"{path} holds no tensors. Download or write it again.")
    for name, value in tensors.items():
        if value.numel() == 0:
            raise UserError(f"{path} is damaged: {name} is empty. Train or download it again.")
        dtype = str(value.dtype).removeprefix("torch.")
        if value.is_complex() or value.dtype == torch.bool:
            raise UserError(
                f"{path} is damaged: {name} is {dtype}, as no weight is. Train or download it again."
            )
        if value.numel() > 1 and not value.is_floating_point():
            raise UserError(
                f"{path} is quantised: {name} holds whole numbers ({dtype}). Take the file in bf16, fp16 or fp32."
            )
        if not bool(torch.isfinite(value.float()).all()):
            raise UserError(
                f"{path} is damaged: {name} holds values that are not finite numbers. Train or download it again."
            )


UNSAID_ALPHA = 8.0  # peft's default, whatever the rank
_FLAGS = ("use_dora", "use_rslora")
_BIASES = ("none", "lora_only", "all")  # those that were trained lie in the file, where they are refused
_RANK = f"is no whole number from 1 to {LARGEST_RANK}"
_ALPHA = "is no finite number other than 0"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < LARGEST_ALPHA


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= LARGEST_RANK


def _is_alpha(value: Any) -> bool:
    return _is_number(value) and value != 0


def _is_targets(value: Any) -> bool:
    names = [value] if isinstance(value, str) else value
    return (
        isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and (not isinstance(value, str) or _is_expression(value))
    )


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _pattern_of(is_right: Any) -> Any:
    def is_pattern(value: Any) -> bool:
        return isinstance(value, dict) and all(
            _is_expression(key) and is_right(number) for key, number in value.items()
        )

    return is_pattern


def _is_expression(text: str) -> bool:
    try:
        re.compile(text)
    except (re.error, RecursionError, OverflowError):
        return False
    return True


def _match(pattern: Mapping[str, float], names: tuple[str, ...], default: float) -> float:
    """The first entry whose expression matches the end of a name, as in peft; else the default."""
    for expression, value in pattern.items():
        if any(re.fullmatch(rf"(.*\.)?({expression})", name) for name in names):
            return value
    return default


def _damaged(path: Path, key: str, why: str) -> UserError:
    return UserError(
        f"The header of {path} is damaged ({key} {why}). Download, export or train the adapter again."
    )
