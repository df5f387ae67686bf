"""Adapter files of diffusers, kohya's sd-scripts, LyCORIS and ComfyUI, read into one format and written from it.

    adapter = read_adapter("dog.safetensors")
    write_adapter("dog-kohya.safetensors", adapter, "kohya", metadata={...})

| format | keys | strength | DoRA | LoHa, LoKr |
|---|---|---|---|---|
| diffusers | `unet.….lora_A.weight`, peft's names | r and α in the metadata | `lora_magnitude_vector` [out] | refused |
| own | the same, and peft's `hada_…`, `lokr_…` | the same | the same | peft's names |
| kohya | `lora_unet_….lora_down.weight` | `.alpha` | `dora_scale` [out, 1] | LyCORIS' names |
| comfyui | the same | `.alpha` | `dora_scale`, rescaled | LyCORIS' names |

kohya names SDXL's blocks by the numbers of the original code, and joins queries, keys and values of SD3 and FLUX as
that code does; ComfyUI's format always has diffusers' names, `transformer.…` with its dots.
ComfyUI divides a row that DoRA rescales by ‖W‖ where Liu et al. 2024 divide by ‖W + ΔW‖, so its file needs the base.
Every file is read back before it gets its name, and each layer's ΔW compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.adapters.concept import FILE as CONCEPT
from backbone.adapters.concept import read_concept
from backbone.adapters.lora import OTHER_WEIGHTS, WEIGHTS
from backbone.io.console import UserError
from backbone.io.files import read_tensors
from customize.formats.adapter import CONFIG_KEY, UNET_PREFIXES, AdapterFile
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

# How a tensor's name ends, and which factor of a layer it is.
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
    """The adapter in a file or a run folder, whichever tool wrote it.

    Raises `UserError` where there is none, where its layers are not whole, or where it holds what is not read here.
    """
    path = find_adapter_file(path)
    tensors, metadata = read_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no tensors. Give the file of a LoRA.")
    parts, unknown = _group_by_layer(tensors)
    if not any(
        key in group for group in parts.values() for kind in _REQUIRED_FACTORS.values() for key in kind[0]
    ):
        some = ", ".join(sorted(tensors)[:2])
        raise UserError(f"{path} holds no LoRA (but {some} …). Give a LoRA, LoHa or LoKr in safetensors.")
    if unknown:
        raise UserError(
            f"{path} holds {len(unknown)} tensors of a kind that is not read here, as {sorted(unknown)[0]}. "
            "Export it again as LoRA, LoHa or LoKr alone."
        )
    said = _PeftConfig(metadata, path)
    layers: dict[str, LayerUpdate] = {}
    for name, group in parts.items():
        layers |= _split_fused_layer(name, _build_layer(name, group, said, path), path)
    return AdapterFile(layers, metadata, _describe_format(tensors))


def find_adapter_file(path: str | Path) -> Path:
    """The weights of a run folder, or the file itself; `UserError` where a folder holds no adapter."""
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
    for name in (WEIGHTS, OTHER_WEIGHTS):
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path} holds no adapter ({WEIGHTS} is missing). Name a run folder or a .safetensors file."
    )


# Writing.


# Reading.


def _group_by_layer(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Layer → factor → tensor, and the names that belong to no layer."""
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        ending = next((ending for ending in _FACTOR_BY_SUFFIX if key.endswith(ending)), None)
        name = _canonical_layer_name(key.removesuffix(ending)) if ending else None
        if ending is None or name is None:
            unknown.append(key)
        else:
            parts.setdefault(name, {})[_FACTOR_BY_SUFFIX[ending]] = value
    return parts, unknown


def _canonical_layer_name(stem: str) -> str | None:
    """Our name of a layer, from any tool's; None for a name that no tool gives."""
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
    """A layer under the name here; one that the original code joins, as the layers that it is of.

    What changes nothing is left out, and of each part the columns that do.
    """
    component, module = split_component(name)
    ours = split_fused(module)
    if component != "transformer" or not ours:
        return {name: layer}
    if len(ours) == 1:
        return {f"transformer.{ours[0]}": layer}
    if layer.algorithm != "lora":
        raise UserError(
            f"{path} joins layers into {name} as a {layer.algorithm}, which cannot be taken apart. Use a LoRA."
        )
    rows, width = layer.shape
    heights = [width] * 3 + [rows - 3 * width] * (len(ours) - 3)
    if sum(heights) != rows or min(heights) <= 0:
        raise UserError(
            f"{name} in {path} is {rows} × {width}, which no published model has. Check the file."
        )
    found: dict[str, LayerUpdate] = {}
    bounds = torch.tensor([0, *heights]).cumsum(0).tolist()
    for part, start, end in zip(ours, bounds, bounds[1:], strict=False):
        up = layer.factors["up"][start:end]
        used = (up != 0).any(dim=0)
        if not bool(used.any()):
            continue
        factors = {"down": layer.factors["down"][used], "up": up[:, used]}
        rank = int(used.sum())
        magnitude = None if layer.magnitude is None else layer.magnitude.flatten()[start:end]
        found[f"transformer.{part}"] = LayerUpdate("lora", factors, rank, layer.scale * rank, magnitude)
    return found


def _qualify_module(component: str, module: str) -> str:
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
    """What the metadata says of ranks and strengths, for forms whose tensors do not."""

    def __init__(self, metadata: Mapping[str, str], path: Path) -> None:
        try:
            self.settings: dict[str, Any] = json.loads(metadata.get(CONFIG_KEY, "{}"))
        except json.JSONDecodeError as error:
            raise UserError(f"The metadata of {path} is damaged ({error}). Export the file again.") from error

    def rank(self, layer: str) -> int | None:
        found = self._value(layer, "rank_pattern", ("r",))
        return None if found is None else int(found)

    def alpha(self, layer: str, rank: int) -> float | None:
        """α such that α/rank is the strength."""
        found = self._value(layer, "alpha_pattern", ("lora_alpha", "alpha"))
        if found is None:
            return None
        rooted = self.settings.get(f"{split_component(layer)[0]}.use_rslora", False)
        return float(found) * (rank**0.5 if rooted else 1.0)

    def _value(self, layer: str, pattern: str, keys: Iterable[str]) -> Any:
        component, module = split_component(layer)
        for name in (module, add_text_model(component, module)):
            for expression, value in (self.settings.get(f"{component}.{pattern}") or {}).items():
                if re.fullmatch(rf"(.*\.)?({expression})", name):
                    return value
        return next(
            (value for key in keys if (value := self.settings.get(f"{component}.{key}")) is not None), None
        )


def _build_layer(name: str, group: dict[str, Tensor], said: _PeftConfig, path: Path) -> LayerUpdate:
    factors = {factor: value for factor, value in group.items() if factor not in ("alpha", "magnitude")}
    kind = _detect_algorithm(factors)
    if kind is None:
        have = ", ".join(sorted(group))
        raise UserError(
            f"The layer {name} in {path} is not whole (it has {have}). Download or export it again."
        )
    if "mid" in factors:  # LoCon's small kernel between two 1 × 1 convolutions: one kernel does the same
        kernel, down = factors.pop("mid"), factors["down"].flatten(1)
        factors["down"] = torch.einsum("rskl,sn->rnkl", kernel.float(), down.float())
    rank = _infer_rank(kind, factors)
    if rank is None:  # a whole LoKr: only the metadata knows the rank, and LyCORIS then counts α as the rank
        rank = said.rank(name) or 1
        alpha = said.alpha(name, rank)
        return LayerUpdate(
            kind, factors, rank, float(rank) if alpha is None else alpha, _read_magnitude(group)
        )
    if kind == "lora" and factors["up"].shape[1] != rank:
        raise UserError(
            f"The factors of {name} in {path} have ranks {rank} and {factors['up'].shape[1]}. Export the file again."
        )
    alpha = float(group["alpha"]) if "alpha" in group else said.alpha(name, rank)
    layer = LayerUpdate(kind, factors, rank, float(rank) if alpha is None else alpha, _read_magnitude(group))
    if layer.magnitude is not None and len(layer.magnitude) != layer.shape[0]:
        raise UserError(
            f"The DoRA scales of {name} in {path} run over the layer's inputs, as old LyCORIS wrote them, and are not "
            "read here. Bake the file with the tool that wrote it."
        )
    return layer


def _detect_algorithm(factors: Mapping[str, Tensor]) -> Algorithm | None:
    own = set(factors) - {"mid", "hada_t1", "hada_t2", "lokr_t2"}
    for kind, possible in _REQUIRED_FACTORS.items():
        if any(own == set(names) for names in possible):
            return kind
    return None


def _infer_rank(kind: Algorithm, factors: Mapping[str, Tensor]) -> int | None:
    key = {"lora": "down", "loha": "hada_w1_b"}.get(kind)
    if key is None:
        key = next((name for name in ("lokr_w1_b", "lokr_w2_b") if name in factors), None)
    return None if key is None else factors[key].shape[0]


def _read_magnitude(group: Mapping[str, Tensor]) -> Tensor | None:
    return group["magnitude"].flatten() if "magnitude" in group else None


def _describe_format(tensors: Mapping[str, Tensor]) -> str:
    """Whose way of naming this is, in a word or two."""
    names = list(tensors)
    lycoris = any(".hada_" in name or ".lokr_" in name for name in names)
    if any(name.startswith(tuple(prefix for prefix, _ in _KOHYA_PREFIXES)) for name in names):
        blocks = "original" if any("put_blocks_" in name for name in names) else "diffusers'"
        return f"{'LyCORIS' if lycoris else 'kohya'} ({blocks} block names)"
    if any("lora_A" in name for name in names):
        return "diffusers (peft)"
    if any(name.startswith("transformer.") and ".lora_down." in name for name in names):
        return "ComfyUI (diffusers' names)"
    return "peft" if lycoris else "diffusers (before peft)"
