"""Write adapters in the formats of diffusers, peft, kohya and ComfyUI; every file is read back and compared."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbone.adapters.config import CONFIG_KEY
from backbone.families.unet.original import to_original
from backbone.io.console import UserError
from backbone.io.files import atomic_write, write_tensors
from backbone.io.run_folder import check_new_file, check_new_folder, fill_new_folder
from customize.formats.adapter import BASE_NAMES, FOR_COMFYUI, AdapterFile, BaseFamily, FileFormat
from customize.formats.factors import LayerUpdate
from customize.formats.layers.names import (
    COMPONENTS,
    add_text_model,
    flatten_name,
    is_text_encoder,
    split_component,
)
from customize.formats.layers.originals import OriginalLayer, find_original
from customize.formats.layers.split import swap_halves
from customize.formats.read import parse_adapter

TOLERANCE = 1e-5  # relative difference of ΔW that rounding in float32 may leave


def write_adapter(
    path: str | Path,
    adapter: AdapterFile,
    file_format: FileFormat,
    *,
    metadata: Mapping[str, str] | None = None,
    base: BaseFamily | None = None,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Write an adapter in a tool's format and verify it; returns the largest relative error of a layer's ΔW.

    metadata    entries to add to those that the format needs
    base        family of the base model, instead of the one that the layers show
    weights     base weights by layer name, needed for DoRA in ComfyUI's format
    dtype       of the factors; unchanged by default

    Raises `UserError` for what the format cannot hold, or when the file read back differs; then nothing is written.
    """
    path = Path(path)
    tensors, format_metadata = to_state_dict(adapter, file_format, base=base, weights=weights)
    if dtype is not None:
        tensors = {
            name: value if name.endswith(".alpha") else value.to(dtype) for name, value in tensors.items()
        }
    for name, value in tensors.items():
        if not bool(torch.isfinite(value.float()).all()):
            remedy = (
                "is not finite in that precision. Leave out --precision."
                if dtype is not None
                else "is larger than numbers can be. Lower its strength, or take another adapter."
            )
            raise UserError(f"Nothing was written: {name} {remedy}")
    entries = {**(metadata or {}), **format_metadata}
    if file_format in ("kohya", "comfyui"):
        entries["modelspec.hash_sha256"] = hash_weights(tensors)
    with atomic_write(path) as temporary:
        write_tensors(temporary, tensors, {"format": "pt", **entries})
        reread = parse_adapter(temporary)
        worst, worst_layer = compare_updates(adapter, reread)
        if worst < math.inf and file_format != "comfyui":  # ComfyUI's DoRA scales are normalised differently
            worst, worst_layer = max((worst, worst_layer), _compare_magnitudes(adapter, reread))
        limit = TOLERANCE if dtype is None else 8 * torch.finfo(dtype).eps
        if math.isnan(worst):
            raise UserError(
                f"Nothing was written: the change of {worst_layer} is larger than numbers can be. Take another adapter."
            )
        if not worst <= limit:
            raise UserError(
                f"Nothing was written: read back, ΔW of {worst_layer} differs by {worst:.1e} of its size. "
                "Leave out --precision, and report this if it stays."
            )
    return worst


def check_output(out: Path) -> None:
    """Raise `UserError` unless `out` can become a new adapter's file; called before any work is done."""
    if out.suffix != ".safetensors":
        raise UserError(f"{out} must end in .safetensors. Name the file to write so.")
    if out.is_dir():
        raise UserError(f"{out} is a folder. Name a file in it.")
    check_new_file(out)


def check_folder(out: Path, sources: Iterable[str | Path]) -> None:
    """Raise `UserError` unless `out` can become a new folder, outside of those that are read for it."""
    refuse_inside(out, sources)
    check_new_folder(out, out)


def refuse_inside(out: Path, sources: Iterable[str | Path]) -> None:
    """Raise `UserError` for an output inside a folder that is read to make it."""
    for source in map(Path, sources):
        if source.is_dir() and out.resolve().is_relative_to(source.resolve()):
            raise UserError(f"{out} lies in {source}, which is read for it. Name a place outside of it.")


@contextmanager
def fill_output(out: Path) -> Iterator[Path]:
    """A folder to write into, whose files are moved to `out`, new or empty, when all are complete.

    `out` is held meanwhile: of two commands that write it the second gets a `UserError`.
    """
    with fill_new_folder(out, out) as (_, unfinished):
        yield unfinished


def compare_updates(first: AdapterFile, second: AdapterFile) -> tuple[float, str]:
    """Largest ‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖ over all layers and the layer's name; infinite if a layer or shape differs.

    A layer that is not changed may be left out.
    """
    either = {**first.layers, **second.layers}
    shared = set(first.layers) & set(second.layers)
    unshared = [name for name in either if name not in shared and either[name].squared_norm() > 0]
    if unshared:
        return math.inf, min(unshared)
    worst, worst_layer = 0.0, ""
    for name in sorted(shared):
        layer = first.layers[name]
        expected, actual = layer.delta_weight(), second.layers[name].delta_weight()
        if expected.shape != actual.shape:
            return math.inf, name
        error = float((expected - actual).norm()) / (float(expected.norm()) or 1.0)
        if not error <= worst:  # NaN counts as worse
            worst, worst_layer = error, name
    return worst, worst_layer


def _compare_magnitudes(first: AdapterFile, second: AdapterFile) -> tuple[float, str]:
    """Largest relative difference of DoRA's magnitudes, and that layer."""
    worst, worst_layer = 0.0, ""
    for name in sorted(set(first.layers) & set(second.layers)):
        expected, actual = first.layers[name].magnitude, second.layers[name].magnitude
        if (expected is None) != (actual is None):
            return math.inf, name
        if expected is not None and actual is not None and expected.shape != actual.shape:
            return math.inf, name
        if expected is not None and actual is not None:
            error = float(
                (expected.float() - actual.float()).norm() / expected.float().norm().clamp_min(1e-30)
            )
            worst, worst_layer = max((worst, worst_layer), (error, name))
    return worst, worst_layer


def to_state_dict(
    adapter: AdapterFile,
    file_format: FileFormat,
    *,
    base: BaseFamily | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of an adapter under a tool's keys, and the metadata entries that are needed to read them.

    Raises `UserError` for an adapter that the format cannot hold.
    """
    if file_format in ("diffusers", "peft"):
        if file_format == "diffusers" and {"loha", "lokr"} & set(adapter.algorithms):
            raise UserError(
                f"diffusers does not load a {adapter.algorithms[0]} for this model. Export --to kohya, make a LoRA "
                "of it with `customize resize`, or bake it into a pipeline with `customize merge --bake`."
            )
        return _to_peft(adapter)
    if (base or adapter.base) == "svd":
        raise UserError(
            f"{file_format}'s format has no names for layers over time, which {BASE_NAMES['svd']} has. Export --to "
            "diffusers."
        )
    return _to_kohya(adapter, file_format, base or adapter.base, weights)


def hash_weights(tensors: Mapping[str, Tensor]) -> str:
    """ModelSpec's `hash_sha256`: the SHA-256 of the tensor data of a safetensors file, without its header."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    start = 8 + int.from_bytes(content[:8], "little")
    return f"0x{hashlib.sha256(content[start:]).hexdigest()}"


def _to_peft(adapter: AdapterFile) -> tuple[dict[str, Tensor], dict[str, str]]:
    """peft's keys with diffusers' component prefixes, and peft's configuration as one metadata entry."""
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component in COMPONENTS:
        layers = {
            split_component(name)[1]: layer
            for name, layer in adapter.layers.items()
            if split_component(name)[0] == component
        }
        for module, layer in layers.items():
            stem = f"{component}.{add_text_model(component, module)}"
            for factor, value in layer.factors.items():
                name = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(factor, factor)
                tensors[f"{stem}.{name}"] = value
            # peft has magnitudes over outputs alone, and of a LoRA alone
            if layer.magnitude is not None and (layer.magnitude.ndim == 2 or layer.algorithm != "lora"):
                kind = (
                    f"a DoRA of a {layer.algorithm}"
                    if layer.algorithm != "lora"
                    else "DoRA scales over inputs"
                )
                raise UserError(
                    f"peft and diffusers have no format for {kind}, as {component}.{module} has them. Export --to "
                    "kohya, or put the file into a whole model with `customize merge --bake`."
                )
            if layer.magnitude is not None:
                is_conv = layer.factors["up"].ndim == 4
                shape = (1, -1, 1, 1) if is_conv else (-1,)
                tensors[f"{stem}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
        if layers:
            start = "" if is_text_encoder(component) else "^"  # ^: peft matches the ends of names
            config = _build_peft_config(layers, start)
            settings |= {f"{component}.{key}": value for key, value in config.items()}
    return tensors, {CONFIG_KEY: json.dumps(settings)}


def _build_peft_config(layers: Mapping[str, LayerUpdate], start: str) -> dict[str, Any]:
    """peft's configuration of these modules: the most common r and α, and the layers with others as patterns.

    `start` comes before the names in patterns.
    """
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    algorithms = {layer.algorithm for layer in layers.values()}
    if len(algorithms) > 1:
        raise UserError(
            "peft has no format for layers of several algorithms in one adapter. Make a LoRA "
            "of them with `customize resize`."
        )

    # One algorithm, and magnitudes of all layers or of none: peft says both once for all layers
    plain = [name for name, layer in layers.items() if layer.magnitude is None]
    if 0 < len(plain) < len(layers):
        raise UserError(
            f"peft and diffusers have no format for DoRA scales of some layers alone ({len(plain)} of {len(layers)} "
            f"have none, as {plain[0]}). Export --to kohya, or put the file into a whole model with "
            "`customize merge --bake`."
        )
    algorithm = algorithms.pop()
    config: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {start + name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {
            start + name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha
        },
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "bias": "none",
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "init_lora_weights": True,
    }
    return config if algorithm == "lora" else {**config, "kind": algorithm}


def _to_kohya(
    adapter: AdapterFile, file_format: FileFormat, base: BaseFamily, weights: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """kohya's keys, or ComfyUI's, which has dots and unfused layers for transformers."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}

    # kohya's trainer has SDXL's original names, and fuses the layers that the original code fuses
    original, two_encoders = file_format == "kohya" and base == "sdxl", base in ("sdxl", "sd3", "flux")
    layers = adapter.layers if file_format == "comfyui" else _fuse_layers(adapter.layers, base)
    for name, layer in layers.items():
        keeps_dots = file_format == "comfyui" and name.startswith("transformer.")
        stem = name if keeps_dots else to_kohya_name(name, original=original, two_encoders=two_encoders)
        if keeps_dots and base == "krea2":  # which ComfyUI knows by the original names alone
            stem = f"diffusion_model.{_find_original_name(name, base)}"
        if layer.algorithm == "lokr" and "lokr_w1" in layer.factors and "lokr_w2" in layer.factors:
            # LyCORIS ignores α for an unfactorised LoKr, so the scale goes into the factors.
            layer = replace(layer.with_alpha(float(layer.rank)), rank=1, alpha=1.0)
        for factor, value in layer.factors.items():
            suffix = {"down": "lora_down.weight", "up": "lora_up.weight"}.get(factor, factor)
            tensors[f"{stem}.{suffix}"] = value
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            scale, over_inputs = layer.magnitude.float(), layer.magnitude.ndim == 2
            # Over inputs ComfyUI divides by ‖W + ΔW‖, as it should
            if file_format == "comfyui" and not over_inputs:
                if weights is None or name not in weights:
                    raise UserError(
                        f"DoRA in ComfyUI's format depends on the base weights, and those of {name} are not at hand. "
                        "Give the --model that it was trained on."
                    )
                scale = scale / layer.measure_growth(weights[name])
                metadata[FOR_COMFYUI] = "comfyui"
            trailing = layer.factors["up"].ndim - 1 if layer.algorithm == "lora" else 1
            shape = (1, -1, *[1] * (trailing - 1)) if over_inputs else (-1, *[1] * trailing)
            tensors[f"{stem}.dora_scale"] = scale.reshape(shape)
    return tensors, metadata


def _fuse_layers(layers: Mapping[str, LayerUpdate], base: BaseFamily) -> dict[str, LayerUpdate]:
    """Fuse the layers that the original code of SD3 and FLUX fuses (queries, keys and values into `qkv`)."""
    fused: dict[str, LayerUpdate] = {}
    originals: dict[str, OriginalLayer] = {}
    groups: dict[str, dict[int, LayerUpdate]] = {}
    for name, layer in layers.items():
        component, module = split_component(name)
        if component != "transformer":
            fused[name] = layer
            continue
        if base in ("zimage", "qwen", "qwen21"):  # kohya's trainer knows these by diffusers' names
            fused[name] = layer
            continue
        found = find_original(module, base) if base in ("sd3", "flux", "flux2", "krea2", "chroma") else None
        if found is None:
            raise UserError(
                f"kohya's format has no name for {name} of {BASE_NAMES[base]}. Export --to diffusers or comfyui, or "
                "name the --base."
            )
        original, original_name, position = found
        originals[original_name] = original
        is_linear = original_name != "x_embedder.proj"
        groups.setdefault(original_name, {})[position] = layer.reshape(layer.shape) if is_linear else layer
    for name, group in groups.items():
        # The parts in the original's order; some fused layers have their halves swapped
        original = originals[name]
        count = len(original.parts)
        layer = group[0] if count == 1 else _fuse_loras(name, group, count)
        if original.swap == "halves" or (original.swap != "never" and layer.shape[0] == 2 * layer.shape[1]):
            layer = swap_halves(layer, _refuse_swap(name))
        fused[f"transformer.{name}"] = layer
    return fused


def _find_original_name(layer: str, base: BaseFamily) -> str:
    """The original code's name of a layer that it does not join with others."""
    original = find_original(split_component(layer)[1], base)
    if original is None:
        raise UserError(f"{BASE_NAMES[base]} has no layer {layer}. Name the --base that the adapter is for.")
    return original[1]


def _refuse_swap(name: str) -> Callable[[str], UserError]:
    return lambda why: UserError(
        f"kohya's format orders the rows of {name} otherwise, which is not possible here: {why}. Export --to comfyui."
    )


def _fuse_loras(name: str, group: Mapping[int, LayerUpdate], count: int) -> LayerUpdate:
    """One LoRA for a fused layer of `count` parts; those in `group` (position → LoRA) are updated.

    `up` is block diagonal [Σ rows, Σ r] and `down` is stacked [Σ r, in], so the ranks add up.
    """
    reference = next(iter(group.values()))
    is_complete = len(group) == count
    if any(
        layer.algorithm != "lora"
        or (layer.magnitude is not None and layer.magnitude.ndim == 2)
        or (layer.magnitude is not None and not is_complete)
        for layer in group.values()
    ):
        raise UserError(
            f"kohya's format fuses layers into {name}, which only a LoRA, or a DoRA of all of them, allows. "
            "Export --to diffusers or comfyui."
        )

    # Rows of every part, updated or not
    width = reference.shape[1]
    rows = [group[index].shape[0] if index in group else width for index in range(count)]
    if count == 4 and 3 not in group:  # FLUX's feed-forward layer, four times as wide
        rows[3] = 4 * width
    rank = sum(layer.rank for layer in group.values())
    dtypes = {value.dtype for layer in group.values() for value in layer.factors.values()}
    # Of several precisions, or in fp8, which torch does not multiply: in full precision
    dtype = dtypes.pop() if len(dtypes) == 1 and min(dtypes, key=str).itemsize > 1 else torch.float32

    # up = blockdiag(up_i·scale_i/scale), down = [down_1; …; down_n], so that scale·up·down stacks every ΔW_i
    up = torch.zeros(sum(rows), rank, dtype=dtype)
    column = 0
    for index in sorted(group):
        layer = group[index]
        row = sum(rows[:index])
        # The result has one scale, so each block takes the ratio of its own to it.
        block = layer.factors["up"].to(dtype) * (layer.scale / reference.scale)
        up[row : row + rows[index], column : column + layer.rank] = block
        column += layer.rank
    down = torch.cat([group[index].factors["down"].to(dtype) for index in sorted(group)])

    # A DoRA's magnitudes, one for each row
    magnitudes = [layer.magnitude for _, layer in sorted(group.items()) if layer.magnitude is not None]
    if magnitudes and len(magnitudes) < count:
        raise UserError(f"Some of the layers that {name} fuses are DoRA and some not. Export --to diffusers.")
    magnitude = torch.cat([value.flatten() for value in magnitudes]) if magnitudes else None
    return LayerUpdate("lora", {"down": down, "up": up}, rank, reference.scale * rank, magnitude)


def to_kohya_name(layer: str, *, original: bool, two_encoders: bool) -> str:
    """`lora_unet_…`, `lora_te_…`, or `lora_te1_…` and `lora_te2_…` if the model has two text encoders."""
    component, module = split_component(layer)
    if component == "transformer":
        return "lora_unet_" + flatten_name(module)
    if component == "unet":
        return "lora_unet_" + flatten_name(to_original(module) if original else module)
    number = "2" if component == "text_encoder_2" else "1" if two_encoders else ""
    return f"lora_te{number}_" + flatten_name(add_text_model(component, module))
