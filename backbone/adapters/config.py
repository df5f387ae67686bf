"""Rank, α and layers of an adapter, from its file's metadata or peft's `adapter_config.json`.

The type and bounds of every value are checked here, so that the error for a foreign or damaged file names the key.
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
TEXT_MODEL = "text_model."  # a level of names in CLIP, in some versions of transformers
CONFIG_KEY = "lora_adapter_metadata"  # diffusers' metadata entry: peft's configuration by component, as JSON
PEFT_PREFIX = "base_model.model."  # in peft's own files, before, after or without the component
CONFIG_FILE = "adapter_config.json"  # peft's, beside `adapter_model.safetensors`
LARGEST_ALPHA = 1e30
LARGEST_RANK = 1 << 20  # far above the width of any layer
# Variants of peft whose factors are not an update B·A of their layer → descriptions
OTHER_VARIANTS = {
    "alora_invocation_tokens": "aLoRA, which works after some words alone",
    "arrow_config": "Arrow, which chooses between adapters",
    "kasa_config": "KaSA, which also changes the base's weights",
    "layer_replication": "an adapter of repeated layers",
    "monteclora_config": "MonteCLoRA, which draws its factors",
    "use_bdlora": "BD-LoRA, whose factors are of blocks",
    "use_qalora": "QA-LoRA, whose inputs are pooled",
}
# Initialisations of peft that also change the base: the factors alone are no update of the published weights.
CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class AdapterConfig:
    """peft's settings of one network's adapter; patterns match the ends of module names.

    `target_modules` are names or ends of names, or a regular expression; None where the file has none.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    adapter_type: AdapterType = "lora"
    use_rslora: bool = False

    def layer_rank(self, *names: str) -> int:
        """The rank of a layer with these names."""
        return int(_match(self.rank_pattern, names, self.rank))

    def layer_alpha(self, *names: str, rank: int) -> float:
        """α of a layer such that its update is scaled by α/rank; rsLoRA's α/√rank is converted."""
        alpha = float(_match(self.alpha_pattern, names, self.alpha))
        return alpha * math.sqrt(rank) if self.use_rslora else alpha

    def find_targets(self, layers: Iterable[str]) -> set[str]:
        """The target layers of a network, without CLIP's level `text_model`.

        A target that is a full name means that layer only: FLUX's last `proj_out` does not match those of its blocks.
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
    """Component (`unet`, `text_encoder_2`) → its settings in a file's metadata; {} where the metadata has none.

    A network's own `save_lora_adapter` leaves out the component, which is then "".
    Raises `UserError`, with file and key, for a value of another type or out of bounds.
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
    """The settings in peft's `adapter_config.json`; raises `UserError` with the file and the wrong key."""
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise UserError(f"{path} is damaged (it holds no settings). Download or export the adapter again.")
    return _parse_peft_settings(path, settings)


def _parse_peft_settings(path: Path, settings: Mapping[str, Any]) -> AdapterConfig:
    """peft's settings of one network, from either file."""
    if settings.get("fan_in_fan_out"):
        raise UserError(f"{path} has fan_in_fan_out, which no layer of an image model has. Check the file.")
    kind = settings.get("peft_type")
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise UserError(f"{path} has the type {kind}. Only LoRA, DoRA, LoHa and LoKr are read here.")
    return parse_adapter_config(path, {**settings, "kind": kind.lower()})


def parse_adapter_config(path: Path, settings: Mapping[str, Any], *, prefix: str = "") -> AdapterConfig:
    """Check peft's settings as read from JSON; `prefix` is the component in the key of an error.

    Raises `UserError` for damaged settings, and for variants that change more than the layers' low-rank factors.
    """

    def damaged(key: str, problem: str) -> UserError:
        return _damaged(path, prefix + key, problem)

    def value(key: str, is_right: Any, problem: str, default: Any) -> Any:
        entry = settings.get(key)
        if entry is None and (default is not None or key not in settings):
            return default
        if not is_right(entry):
            raise damaged(key, problem)
        return entry

    # The settings of plain LoRA, DoRA, LoHa and LoKr
    rank = value("r", _is_rank, _RANK, None)
    if rank is None:
        raise damaged("r", "is missing")
    alpha = value("lora_alpha" if "lora_alpha" in settings else "alpha", _is_alpha, _ALPHA, None)
    targets = value("target_modules", _is_targets, "is no list of layer names", ())
    ranks = value("rank_pattern", _make_pattern_check(_is_rank), f"holds a layer whose rank {_RANK}", {})
    alphas = value("alpha_pattern", _make_pattern_check(_is_alpha), f"holds a layer whose α {_ALPHA}", {})
    flags = {key: value(key, lambda v: isinstance(v, bool), "is not true or false", False) for key in _FLAGS}
    kind = value("kind", lambda v: v in ADAPTER_TYPES, f"is none of {', '.join(ADAPTER_TYPES)}", "lora")
    value("lora_dropout", _is_number, "is no number", 0.0)

    # Variants that change more than W + α/r·B·A are refused; missing biases cause a notice
    if variant := next(
        (description for key, description in OTHER_VARIANTS.items() if settings.get(key)), None
    ):
        raise UserError(
            f"{path} says that it is {variant}. Only plain LoRA, DoRA, LoHa and LoKr are read here."
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
        alpha=float(DEFAULT_ALPHA if alpha is None else alpha),
        rank_pattern={plain_name(layer): number for layer, number in ranks.items()},
        alpha_pattern={plain_name(layer): number for layer, number in alphas.items()},
        target_modules=plain_name(targets)
        if isinstance(targets, str)
        else tuple(map(plain_name, targets)) or None,
        adapter_type="dora" if kind == "lora" and flags["use_dora"] else kind,
        use_rslora=flags["use_rslora"],
    )


def check_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise `UserError` for a file without tensors, and for empty, non-finite, complex, boolean or integer tensors.

    Integer tensors are quantised with a scale that is elsewhere; a single integer may be an α.
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


DEFAULT_ALPHA = 8.0  # peft's, at any rank
_FLAGS = ("use_dora", "use_rslora")
_BIASES = ("none", "lora_only", "all")  # trained biases are in the file, where they are refused
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


def _make_pattern_check(is_right: Any) -> Any:
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


def _damaged(path: Path, key: str, problem: str) -> UserError:
    return UserError(
        f"The header of {path} is damaged ({key} {problem}). Download, export or train the adapter again."
    )
