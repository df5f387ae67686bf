"""Read LoRA, LoHa, LoKr and DoRA files of diffusers, kohya's sd-scripts, LyCORIS and ComfyUI into an `AdapterFile`.

    adapter = read_adapter("dog.safetensors")
    write_adapter("dog-kohya.safetensors", adapter, "kohya", metadata={...})

| format | keys | α | DoRA | LoHa, LoKr |
|---|---|---|---|---|
| diffusers | `unet.….lora_A.weight`, peft's names | r and α in the metadata | `lora_magnitude_vector` [out] | refused |
| peft | the same, and peft's `hada_…`, `lokr_…` | the same | the same | peft's names |
| kohya | `lora_unet_….lora_down.weight` | `.alpha` | `dora_scale` [out, 1] | LyCORIS' names |
| comfyui | the same | `.alpha` | `dora_scale`, rescaled | LyCORIS' names |

kohya names SDXL's blocks by the numbers of the original code and fuses queries, keys and values of SD3 and FLUX as
that code does; ComfyUI's format always has diffusers' names, `transformer.…` with its dots. ComfyUI divides a row that
DoRA rescales by ‖W‖ where Liu et al. 2024 divide by ‖W + ΔW‖, so writing its file needs the base weights.
`write_adapter` reads every file back and compares ΔW layer by layer before the file gets its name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.adapters.concept import CONCEPT_FILE as CONCEPT
from backbone.adapters.concept import read_concept
from backbone.adapters.lora import LORA_WEIGHTS, LYCORIS_WEIGHTS
from backbone.io.console import UserError
from backbone.io.files import read_tensors
from customize.formats.adapter import CONFIG_KEY, AdapterFile
from customize.formats.factors import Algorithm, LayerUpdate
from customize.formats.layer_names import (
    COMPONENTS,
    TEXT_MODEL_PREFIX,
    add_text_model,
    from_original,
    is_text_encoder,
    split_component,
    split_fused,
    unflatten_name,
)

UNET_PREFIXES = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.")
# Suffix of a tensor's key → which factor of the layer it holds.
_FACTOR_BY_SUFFIX = {
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    **{
        f".{name}": name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    },
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{f".{name}": name for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
}
_REQUIRED_FACTORS: dict[Algorithm, tuple[tuple[str, ...], ...]] = {
    "lora": (("down", "up"),),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "lokr": tuple(
        left + right
        for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
}
_KOHYA_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
)


def read_adapter(path: str | Path) -> AdapterFile:
    """Read the adapter of a file or a run folder, whichever tool wrote it.

    Raises `UserError` where there is none, where a layer lacks factors, or for tensors that belong to no known format.
    """
    path = find_adapter_file(path)
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no tensors. Give the file of a LoRA.")
    groups, unknown = _group_by_layer(tensors)
    known_factors = {factor for factor_sets in _REQUIRED_FACTORS.values() for factor in factor_sets[0]}
    if not any(known_factors & set(group) for group in groups.values()):
        examples = ", ".join(sorted(tensors)[:2])
        raise UserError(f"{path} holds no LoRA (but {examples} …). Give a LoRA, LoHa or LoKr in safetensors.")
    if unknown:
        raise UserError(
            f"{path} holds {len(unknown)} tensors of a kind that is not read here, as {sorted(unknown)[0]}. "
            "Export it again as LoRA, LoHa or LoKr alone."
        )
    config = _PeftConfig(metadata, path)
    layers: dict[str, LayerUpdate] = {}
    for name, group in groups.items():
        layers |= _split_fused_layer(name, _build_layer(name, group, config, path), path)
    return AdapterFile(layers, metadata, _describe_format(tensors))


def find_adapter_file(path: str | Path) -> Path:
    """Path of a run folder's adapter weights, or the file itself; `UserError` where a folder holds no adapter."""
    path = Path(path)
    if not path.is_dir():
        return path
    if (path / CONCEPT).is_file():
        concept = read_concept(path)
        if concept.weights:
            return concept.weights_path
        raise UserError(
            f"{path} holds no adapter: it was trained with --method {concept.kind}. Put it into a whole model with "
            "`customize merge --bake`."
        )
    for name in (LORA_WEIGHTS, LYCORIS_WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path} holds no adapter ({LORA_WEIGHTS} is missing). Name a run folder or a .safetensors file."
    )


def _group_by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Layer name → factor → tensor, and the keys that belong to no layer."""
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        suffix = next((suffix for suffix in _FACTOR_BY_SUFFIX if key.endswith(suffix)), None)
        name = _canonical_layer_name(key.removesuffix(suffix)) if suffix else None
        if suffix is None or name is None:
            unknown.append(key)
        else:
            groups.setdefault(name, {})[_FACTOR_BY_SUFFIX[suffix]] = value
    return groups, unknown


def _canonical_layer_name(stem: str) -> str | None:
    """Name of a layer as used here (component, then diffusers' module name), from any tool's; None if none fits."""
    for prefix, component in _KOHYA_PREFIXES:
        if stem.startswith(prefix):
            return _qualify_module(component, unflatten_name(stem.removeprefix(prefix)))
    stem = stem.removeprefix("base_model.model.").replace(".processor.", ".")
    for component in COMPONENTS:
        if stem.startswith(component + "."):
            return _qualify_module(component, stem.removeprefix(component + "."))
    if stem.startswith("diffusion_model."):
        return _qualify_module("unet", stem.removeprefix("diffusion_model."))
    return _qualify_module("unet", stem) if stem.startswith(UNET_PREFIXES) else None


def _split_fused_layer(name: str, layer: LayerUpdate, path: Path) -> dict[str, LayerUpdate]:
    """Split a fused layer of SD3 or FLUX (`qkv`) into diffusers' layers; any other layer is returned under its name.

    Parts that are not updated are dropped, and of the others the rank dimensions that do not contribute.
    """
    component, module = split_component(name)
    targets = split_fused(module)
    if component != "transformer" or not targets:
        return {name: layer}
    if len(targets) == 1:
        return {f"transformer.{targets[0]}": layer}
    if layer.algorithm != "lora":
        raise UserError(
            f"{path} fuses layers into {name} as a {layer.algorithm}, which cannot be split. Use a LoRA."
        )
    # Queries, keys and values are as high as the layer is wide; a fourth part (FLUX's MLP) takes the remaining rows.
    rows, width = layer.shape
    heights = [width] * 3 + [rows - 3 * width] * (len(targets) - 3)
    if sum(heights) != rows or min(heights) <= 0:
        raise UserError(
            f"{name} in {path} is {rows} × {width}, which no published model has. Check the file."
        )
    layers: dict[str, LayerUpdate] = {}
    bounds = torch.tensor([0, *heights]).cumsum(0).tolist()
    for target, start, end in zip(targets, bounds, bounds[1:], strict=False):
        up = layer.factors["up"][start:end]
        used = (up != 0).any(dim=0)
        if not bool(used.any()):
            continue
        factors = {"down": layer.factors["down"][used], "up": up[:, used]}
        rank = int(used.sum())
        magnitude = None if layer.magnitude is None else layer.magnitude.flatten()[start:end]
        layers[f"transformer.{target}"] = LayerUpdate("lora", factors, rank, layer.scale * rank, magnitude)
    return layers


def _qualify_module(component: str, module: str) -> str:
    """`component.module` with diffusers' module name, whichever of the known conventions `module` follows."""
    if component == "unet" and split_fused(module):
        return f"transformer.{module}"
    if component == "unet":
        module = from_original(module)
    if is_text_encoder(component):  # what diffusers once wrote: self_attn.to_q_lora.down.weight
        module = module.removeprefix(TEXT_MODEL_PREFIX)
        module = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", module)
    elif module.endswith(".to_out"):
        module += ".0"
    return f"{component}.{module}"


class _PeftConfig:
    """peft's configuration in the metadata: r and α per layer, for formats whose tensors do not carry them."""

    def __init__(self, metadata: Mapping[str, str], path: Path) -> None:
        try:
            self.settings: dict[str, Any] = json.loads(metadata.get(CONFIG_KEY, "{}"))
        except json.JSONDecodeError as error:
            raise UserError(f"The metadata of {path} is damaged ({error}). Export the file again.") from error

    def rank(self, layer: str) -> int | None:
        value = self._value(layer, "rank_pattern", ("r",))
        return None if value is None else int(value)

    def alpha(self, layer: str, rank: int) -> float | None:
        """α such that ΔW is scaled by α/rank; rsLoRA's α/√rank is converted."""
        value = self._value(layer, "alpha_pattern", ("lora_alpha", "alpha"))
        if value is None:
            return None
        use_rslora = self.settings.get(f"{split_component(layer)[0]}.use_rslora", False)
        return float(value) * (rank**0.5 if use_rslora else 1.0)

    def _value(self, layer: str, pattern: str, keys: Iterable[str]) -> Any:
        """A layer's entry in `pattern` (peft matches suffixes and regular expressions), else the first default."""
        component, module = split_component(layer)
        for name in (module, add_text_model(component, module)):
            for expression, value in (self.settings.get(f"{component}.{pattern}") or {}).items():
                if re.fullmatch(rf"(.*\.)?({expression})", name):
                    return value
        return next(
            (value for key in keys if (value := self.settings.get(f"{component}.{key}")) is not None), None
        )


def _build_layer(name: str, group: dict[str, Tensor], config: _PeftConfig, path: Path) -> LayerUpdate:
    """One layer from its tensors by factor. Raises `UserError` for missing factors or ranks that disagree."""
    factors = {factor: value for factor, value in group.items() if factor not in ("alpha", "magnitude")}
    algorithm = _detect_algorithm(factors)
    if algorithm is None:
        present = ", ".join(sorted(group))
        raise UserError(
            f"The layer {name} in {path} is not whole (it has {present}). Download or export it again."
        )
    if (
        "mid" in factors
    ):  # LoCon's kernel between two 1 × 1 convolutions: multiplied into `down` it is the same
        kernel, down = factors.pop("mid"), factors["down"].flatten(1)
        factors["down"] = torch.einsum("rskl,sn->rnkl", kernel.float(), down.float())
    rank = _infer_rank(algorithm, factors)
    if rank is None:  # an unfactorised LoKr: only the metadata knows r, and LyCORIS then takes α for it
        rank = config.rank(name) or 1
        alpha = config.alpha(name, rank)
        return LayerUpdate(
            algorithm, factors, rank, float(rank) if alpha is None else alpha, _read_magnitude(group)
        )
    if algorithm == "lora" and factors["up"].shape[1] != rank:
        raise UserError(
            f"The factors of {name} in {path} have ranks {rank} and {factors['up'].shape[1]}. Export the file again."
        )
    alpha = float(group["alpha"]) if "alpha" in group else config.alpha(name, rank)
    layer = LayerUpdate(
        algorithm, factors, rank, float(rank) if alpha is None else alpha, _read_magnitude(group)
    )
    if layer.magnitude is not None and len(layer.magnitude) != layer.shape[0]:
        raise UserError(
            f"The DoRA scales of {name} in {path} run over the layer's inputs, as old LyCORIS wrote them, and are not "
            "read here. Bake the file with the tool that wrote it."
        )
    return layer


def _detect_algorithm(factors: Mapping[str, Tensor]) -> Algorithm | None:
    """Which algorithm these factors are of; None where they are incomplete or mixed."""
    required = set(factors) - {"mid", "hada_t1", "hada_t2", "lokr_t2"}  # without the optional ones
    for algorithm, factor_sets in _REQUIRED_FACTORS.items():
        if any(required == set(names) for names in factor_sets):
            return algorithm
    return None


def _infer_rank(algorithm: Algorithm, factors: Mapping[str, Tensor]) -> int | None:
    """r from the factors' shapes; None for a LoKr stored unfactorised."""
    key = {"lora": "down", "loha": "hada_w1_b"}.get(algorithm)
    if key is None:
        key = next((name for name in ("lokr_w1_b", "lokr_w2_b") if name in factors), None)
    return None if key is None else factors[key].shape[0]


def _read_magnitude(group: Mapping[str, Tensor]) -> Tensor | None:
    return group["magnitude"].flatten() if "magnitude" in group else None


def _describe_format(tensors: Mapping[str, Tensor]) -> str:
    """Which tool's naming the keys follow, for people."""
    names = list(tensors)
    is_lycoris = any(".hada_" in name or ".lokr_" in name for name in names)
    if any(name.startswith(tuple(prefix for prefix, _ in _KOHYA_PREFIXES)) for name in names):
        blocks = "original" if any("put_blocks_" in name for name in names) else "diffusers'"
        return f"{'LyCORIS' if is_lycoris else 'kohya'} ({blocks} block names)"
    if any("lora_A" in name for name in names):
        return "diffusers (peft)"
    if any(name.startswith("transformer.") and ".lora_down." in name for name in names):
        return "ComfyUI (diffusers' names)"
    return "peft" if is_lycoris else "diffusers (before peft)"
