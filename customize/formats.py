"""Adapter files of diffusers, kohya's sd-scripts, LyCORIS and ComfyUI, read into one form and written from it.

    adapter = read_adapter("dog.safetensors")
    write_adapter("dog-kohya.safetensors", adapter, "kohya", header={...})

| form | keys | strength | DoRA | LoHa, LoKr |
|---|---|---|---|---|
| diffusers | `unet.….lora_A.weight`, peft's names | r and α in the header | `lora_magnitude_vector` [out] | refused |
| own | the same, and peft's `hada_…`, `lokr_…` | the same | the same | peft's names |
| kohya | `lora_unet_….lora_down.weight` | `.alpha` | `dora_scale` [out, 1] | LyCORIS' names |
| comfyui | the same | `.alpha` | `dora_scale`, rescaled | LyCORIS' names |

kohya names SDXL's blocks by the numbers of the original code, and joins queries, keys and values of SD3 and FLUX as
that code does; ComfyUI's form always has diffusers' names, `transformer.…` with its dots.
ComfyUI divides a row that DoRA rescales by ‖W‖ where Liu et al. 2024 divide by ‖W + ΔW‖, so its file needs the base.
Every file is read back before it gets its name, and each layer's ΔW compared.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from backbone.adapters import OTHER_WEIGHTS, WEIGHTS
from backbone.concept import FILE as CONCEPT
from backbone.concept import read_concept
from backbone.console import UserError
from backbone.files import read_tensors, replacing, write_tensors
from customize.factors import Kind, Layer, row_norms
from customize.layer_names import (
    COMPONENTS,
    TEXT_LEVEL,
    apart,
    dotted,
    flat,
    from_original,
    is_text,
    joined,
    split,
    to_original,
    with_text_level,
)

Form = Literal["diffusers", "own", "kohya", "comfyui"]
Base = Literal["sd1", "sd2", "sdxl", "sd3", "flux", "pixart", "other"]
HEADER = "lora_adapter_metadata"
BASES: dict[Base, str] = {
    "sd1": "Stable Diffusion 1.x",
    "sd2": "Stable Diffusion 2.x",
    "sdxl": "Stable Diffusion XL",
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX",
    "pixart": "PixArt",
    "other": "a model of another build",
}
SAME = 1e-5  # relative difference of ΔW that rounding in float32 may leave

# How a tensor's name ends, and which factor of a layer it is.
_ENDINGS = {
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
_NEEDED: dict[Kind, tuple[tuple[str, ...], ...]] = {
    "lora": (("down", "up"),),
    "loha": (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),),
    "lokr": tuple(
        left + right
        for left in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for right in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
}
_KOHYA = (
    ("lora_unet_", "unet"),
    ("lora_transformer_", "transformer"),
    ("lycoris_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
)
_UNET_TOPS = ("down_blocks.", "up_blocks.", "mid_block.", "conv_in", "conv_out", "time_embedding.")
_WIDTHS: dict[int, Base] = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


@dataclass(frozen=True)
class Adapter:
    """An adapter's layers by name (`unet.….to_q`) and what its file's header said."""

    layers: Mapping[str, Layer]
    header: Mapping[str, str] = field(default_factory=dict)
    form: str = "own"

    @property
    def kinds(self) -> list[str]:
        """`lora`, `loha`, `lokr`, with `dora` where a magnitude is learned too."""
        found = {layer.kind for layer in self.layers.values()}
        dora = any(layer.magnitude is not None for layer in self.layers.values())
        return sorted(found) + ["dora"] * dora

    @property
    def base(self) -> Base:
        """The family of the model that it fits, from the widths of its layers, else from the header."""
        return _base_by_shape(self.layers) or _base_by_header(self.header) or "other"


def read_adapter(path: str | Path) -> Adapter:
    """The adapter in a file or a run folder, whichever tool wrote it.

    Raises `UserError` where there is none, where its layers are not whole, or where it holds what is not read here.
    """
    path = adapter_file(path)
    tensors, header = read_tensors(path)
    if not tensors:
        raise UserError(f"{path} holds no tensors. Give the file of a LoRA.")
    parts, unknown = _grouped(tensors)
    if not any(key in group for group in parts.values() for kind in _NEEDED.values() for key in kind[0]):
        some = ", ".join(sorted(tensors)[:2])
        raise UserError(f"{path} holds no LoRA (but {some} …). Give a LoRA, LoHa or LoKr in safetensors.")
    if unknown:
        raise UserError(
            f"{path} holds {len(unknown)} tensors of a kind that is not read here, as {sorted(unknown)[0]}. "
            "Export it again as LoRA, LoHa or LoKr alone."
        )
    said = _Said(header, path)
    layers: dict[str, Layer] = {}
    for name, group in parts.items():
        layers |= _taken_apart(name, _layer(name, group, said, path), path)
    return Adapter(layers, header, _form(tensors))


def adapter_file(path: str | Path) -> Path:
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


def write_adapter(
    path: str | Path,
    adapter: Adapter,
    form: Form,
    *,
    header: Mapping[str, str] | None = None,
    base: Base | None = None,
    weights: Mapping[str, Tensor] | None = None,
    dtype: torch.dtype | None = None,
) -> float:
    """Writes an adapter in a tool's form, reads it back and gives the largest relative difference of a layer's ΔW.

    `header` is added to what the form needs; `base` overrides the family told from the layers; `weights` are the base
    model's by layer, needed for DoRA in ComfyUI's form; `dtype` is that of the factors, as they are by default.

    Raises `UserError` for what the form cannot hold, and when the file does not come back as it was; then nothing is
    written.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UserError(f"{path} must end in .safetensors. Name the file to write so.")
    tensors, own_header = state_dict(adapter, form, base=base, weights=weights)
    if dtype is not None:
        tensors = {
            name: value if name.endswith(".alpha") else value.to(dtype) for name, value in tensors.items()
        }
    said = {**(header or {}), **own_header}
    if form in ("kohya", "comfyui"):
        said["modelspec.hash_sha256"] = weights_hash(tensors)
    with replacing(path) as temporary:
        write_tensors(temporary, tensors, {"format": "pt", **said})
        back = read_adapter(temporary)
        worst, where = difference(adapter, back)
        if worst < math.inf and form != "comfyui":  # whose DoRA scales mean something else
            worst, where = max((worst, where), _magnitude_difference(adapter, back))
        limit = SAME if dtype is None else 8 * torch.finfo(dtype).eps
        if not worst <= limit:
            raise UserError(
                f"{path} was not written: read back, ΔW of {where} differs by {worst:.1e} of its size. "
                "Leave out --precision, and report this if it stays."
            )
    return worst


def difference(first: Adapter, second: Adapter) -> tuple[float, str]:
    """The largest ‖ΔW₁ − ΔW₂‖ / ‖ΔW₁‖ over all layers, and that layer; infinite where one lacks a layer."""
    lacking = set(first.layers) ^ set(second.layers)
    if lacking:
        return math.inf, min(lacking)
    worst, where = 0.0, ""
    for name, layer in first.layers.items():
        ours, theirs = layer.matrix(), second.layers[name].matrix()
        if ours.shape != theirs.shape:
            return math.inf, name
        size = float(ours.norm()) or 1.0
        off = float((ours - theirs).norm()) / size
        if not off <= worst:  # a NaN counts
            worst, where = off, name
    return worst, where


def _magnitude_difference(first: Adapter, second: Adapter) -> tuple[float, str]:
    """The same of DoRA's magnitudes."""
    worst, where = 0.0, ""
    for name, layer in first.layers.items():
        ours, theirs = layer.magnitude, second.layers[name].magnitude
        if (ours is None) != (theirs is None):
            return math.inf, name
        if ours is not None and theirs is not None:
            off = float((ours.float() - theirs.float()).norm() / ours.float().norm().clamp_min(1e-30))
            worst, where = max((worst, where), (off, name))
    return worst, where


def state_dict(
    adapter: Adapter,
    form: Form,
    *,
    base: Base | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors of an adapter in a tool's form, and the header entries without which they are not understood."""
    if form in ("diffusers", "own"):
        if form == "diffusers" and {"loha", "lokr"} & set(adapter.kinds):
            raise UserError(
                f"diffusers does not load a {adapter.kinds[0]} for this model. Export --to kohya, make a LoRA of it "
                "with `customize resize`, or bake it into a pipeline with `customize merge --bake`."
            )
        return _peft_state(adapter)
    return _kohya_state(adapter, form, base or adapter.base, weights)


def weights_hash(tensors: Mapping[str, Tensor]) -> str:
    """ModelSpec's `hash_sha256`: of all that follows the header in a safetensors file with these tensors."""
    from safetensors.torch import save

    content = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})
    start = 8 + int.from_bytes(content[:8], "little")
    return f"0x{hashlib.sha256(content[start:]).hexdigest()}"


# Writing.


def _peft_state(adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component in COMPONENTS:
        layers = {
            split(name)[1]: layer for name, layer in adapter.layers.items() if split(name)[0] == component
        }
        for module, layer in layers.items():
            stem = f"{component}.{with_text_level(component, module)}"
            for factor, value in layer.factors.items():
                name = {"down": "lora_A.weight", "up": "lora_B.weight"}.get(factor, factor)
                tensors[f"{stem}.{name}"] = value
            if layer.magnitude is not None:
                is_conv = layer.factors["up"].ndim == 4 if layer.kind == "lora" else False
                shape = (1, -1, 1, 1) if is_conv else (-1,)
                tensors[f"{stem}.lora_magnitude_vector"] = layer.magnitude.reshape(shape)
        if layers:
            settings |= {f"{component}.{key}": value for key, value in _peft_settings(layers).items()}
    return tensors, {HEADER: json.dumps(settings)}


def _peft_settings(layers: Mapping[str, Layer]) -> dict[str, Any]:
    """What peft's configuration says of these modules: the usual rank and α, and who differs."""
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    kinds = {layer.kind for layer in layers.values()}
    if len(kinds) > 1:
        raise UserError(
            "Layers of several kinds in one adapter have no form in peft. Make a LoRA of them with `customize resize`."
        )
    kind = kinds.pop()
    said: dict[str, Any] = {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {name: layer.alpha for name, layer in layers.items() if layer.alpha != alpha},
        "lora_dropout": 0.0,
        "target_modules": sorted(layers),
        "bias": "none",
        "use_dora": any(layer.magnitude is not None for layer in layers.values()),
        "init_lora_weights": True,
    }
    return said if kind == "lora" else {**said, "kind": kind}


def _kohya_state(
    adapter: Adapter, form: Form, base: Base, weights: Mapping[str, Tensor] | None
) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    original, several = form == "kohya" and base == "sdxl", base in ("sdxl", "sd3", "flux")
    layers = adapter.layers if form == "comfyui" else _put_together(adapter.layers, base)
    for name, layer in layers.items():
        dots = form == "comfyui" and name.startswith("transformer.")
        stem = name if dots else kohya_name(name, original=original, two_encoders=several)
        if layer.kind == "lokr" and "lokr_w1" in layer.factors and "lokr_w2" in layer.factors:
            layer = replace(layer.with_alpha(float(layer.rank)), rank=1, alpha=1.0)  # LyCORIS ignores α there
        for factor, value in layer.factors.items():
            ending = {"down": "lora_down.weight", "up": "lora_up.weight"}.get(factor, factor)
            tensors[f"{stem}.{ending}"] = value
        tensors[f"{stem}.alpha"] = torch.tensor(layer.alpha)
        if layer.magnitude is not None:
            scale = layer.magnitude.float().flatten()
            if form == "comfyui":
                if weights is None or name not in weights:
                    raise UserError(
                        f"DoRA in ComfyUI's form depends on the base weights, and those of {name} are not at hand. "
                        "Give the --model that it was trained on."
                    )
                weight = weights[name]
                scale = (
                    scale
                    * row_norms(weight)
                    / row_norms(weight.float() + layer.matrix().reshape(weight.shape))
                )
            trailing = layer.factors["up"].ndim - 1 if layer.kind == "lora" else 1
            tensors[f"{stem}.dora_scale"] = scale.reshape(-1, *[1] * trailing)
    return tensors, {}


def _put_together(layers: Mapping[str, Layer], base: Base) -> dict[str, Layer]:
    """The layers as the original code of SD3 and FLUX joins them: factors side by side, the rank their sum."""
    found: dict[str, Layer] = {}
    groups: dict[str, dict[int, Layer]] = {}
    for name, layer in layers.items():
        component, module = split(name)
        if component != "transformer":
            found[name] = layer
            continue
        place = joined(module, base)
        if place is None:
            raise UserError(
                f"kohya's form has no name for {name} of {BASES[base]}. Export --to diffusers or comfyui."
            )
        groups.setdefault(place[0], {})[place[1]] = layer
    for original, group in groups.items():
        of = len(apart(original))
        found[f"transformer.{original}"] = group[0] if of == 1 else _side_by_side(original, group, of)
    return found


def _side_by_side(name: str, group: Mapping[int, Layer], of: int) -> Layer:
    """One LoRA over the outputs of `of` layers, of which those in `group` change: block by block."""
    some = next(iter(group.values()))
    whole = len(group) == of
    if any(layer.kind != "lora" or (layer.magnitude is not None and not whole) for layer in group.values()):
        raise UserError(
            f"kohya's form joins layers into {name}, and of the kinds only a LoRA, or a DoRA of all of them, can be "
            "joined. Export --to diffusers or comfyui."
        )
    width = some.shape[1]
    rows = [group[place].shape[0] if place in group else width for place in range(of)]
    if of == 4 and 3 not in group:  # FLUX's feed-forward layer, four times as wide
        rows[3] = 4 * width
    rank = sum(layer.rank for layer in group.values())
    up = some.factors["up"].new_zeros(sum(rows), rank)
    first = 0
    for place in sorted(group):
        layer = group[place]
        above = sum(rows[:place])
        block = layer.factors["up"] * (layer.scale / some.scale)
        up[above : above + rows[place], first : first + layer.rank] = block
        first += layer.rank
    down = torch.cat([group[place].factors["down"] for place in sorted(group)])
    magnitudes = [group[place].magnitude for place in sorted(group)]
    own = [value for value in magnitudes if value is not None]
    if own and len(own) < of:
        raise UserError(f"Some of the layers that {name} joins are DoRA and some not. Export --to diffusers.")
    magnitude = torch.cat([value.flatten() for value in own]) if own else None
    return Layer("lora", {"down": down, "up": up}, rank, some.scale * rank, magnitude)


def kohya_name(layer: str, *, original: bool, two_encoders: bool) -> str:
    """`lora_unet_…`, `lora_te_…`, or `lora_te1_…` and `lora_te2_…` where a model has two text encoders."""
    component, module = split(layer)
    if component == "transformer":
        return "lora_unet_" + flat(module)
    if component == "unet":
        return "lora_unet_" + flat(to_original(module) if original else module)
    number = "2" if component == "text_encoder_2" else "1" if two_encoders else ""
    return f"lora_te{number}_" + flat(with_text_level(component, module))


# Reading.


def _grouped(tensors: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Layer → factor → tensor, and the names that belong to no layer."""
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, value in tensors.items():
        ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
        name = _layer_name(key.removesuffix(ending)) if ending else None
        if ending is None or name is None:
            unknown.append(key)
        else:
            parts.setdefault(name, {})[_ENDINGS[ending]] = value
    return parts, unknown


def _layer_name(stem: str) -> str | None:
    """Our name of a layer, from any tool's; None for a name that no tool gives."""
    for prefix, component in _KOHYA:
        if stem.startswith(prefix):
            return _named(component, dotted(stem.removeprefix(prefix)))
    stem = stem.removeprefix("base_model.model.").replace(".processor.", ".")
    for component in COMPONENTS:
        if stem.startswith(component + "."):
            return _named(component, stem.removeprefix(component + "."))
    if stem.startswith("diffusion_model."):
        return _named("unet", stem.removeprefix("diffusion_model."))
    return _named("unet", stem) if stem.startswith(_UNET_TOPS) else None


def _taken_apart(name: str, layer: Layer, path: Path) -> dict[str, Layer]:
    """A layer under the name here; one that the original code joins, as the layers that it is of.

    What changes nothing is left out, and of each part the columns that do.
    """
    component, module = split(name)
    ours = apart(module)
    if component != "transformer" or not ours:
        return {name: layer}
    if len(ours) == 1:
        return {f"transformer.{ours[0]}": layer}
    if layer.kind != "lora":
        raise UserError(
            f"{path} joins layers into {name} as a {layer.kind}, which cannot be taken apart. Use a LoRA."
        )
    rows, width = layer.shape
    heights = [width] * 3 + [rows - 3 * width] * (len(ours) - 3)
    if sum(heights) != rows or min(heights) <= 0:
        raise UserError(
            f"{name} in {path} is {rows} × {width}, which no published model has. Check the file."
        )
    found: dict[str, Layer] = {}
    bounds = torch.tensor([0, *heights]).cumsum(0).tolist()
    for part, start, end in zip(ours, bounds, bounds[1:], strict=False):
        up = layer.factors["up"][start:end]
        used = (up != 0).any(dim=0)
        if not bool(used.any()):
            continue
        factors = {"down": layer.factors["down"][used], "up": up[:, used]}
        rank = int(used.sum())
        magnitude = None if layer.magnitude is None else layer.magnitude.flatten()[start:end]
        found[f"transformer.{part}"] = Layer("lora", factors, rank, layer.scale * rank, magnitude)
    return found


def _named(component: str, module: str) -> str:
    if component == "unet" and apart(module):
        return f"transformer.{module}"
    if component == "unet":
        module = from_original(module)
    if is_text(component):  # what diffusers once wrote: self_attn.to_q_lora.down.weight
        module = module.removeprefix(TEXT_LEVEL)
        module = re.sub(r"\.self_attn\.to_(q|k|v|out)$", r".self_attn.\1_proj", module)
    elif module.endswith(".to_out"):
        module += ".0"
    return f"{component}.{module}"


class _Said:
    """What the header says of ranks and strengths, for forms whose tensors do not."""

    def __init__(self, header: Mapping[str, str], path: Path) -> None:
        try:
            self.settings: dict[str, Any] = json.loads(header.get(HEADER, "{}"))
        except json.JSONDecodeError as error:
            raise UserError(f"The header of {path} is damaged ({error}). Export the file again.") from error

    def rank(self, layer: str) -> int | None:
        found = self._value(layer, "rank_pattern", ("r",))
        return None if found is None else int(found)

    def alpha(self, layer: str, rank: int) -> float | None:
        """α such that α/rank is the strength."""
        found = self._value(layer, "alpha_pattern", ("lora_alpha", "alpha"))
        if found is None:
            return None
        rooted = self.settings.get(f"{split(layer)[0]}.use_rslora", False)
        return float(found) * (rank**0.5 if rooted else 1.0)

    def _value(self, layer: str, pattern: str, keys: Iterable[str]) -> Any:
        component, module = split(layer)
        for name in (module, with_text_level(component, module)):
            for expression, value in (self.settings.get(f"{component}.{pattern}") or {}).items():
                if re.fullmatch(rf"(.*\.)?({expression})", name):
                    return value
        return next(
            (value for key in keys if (value := self.settings.get(f"{component}.{key}")) is not None), None
        )


def _layer(name: str, group: dict[str, Tensor], said: _Said, path: Path) -> Layer:
    factors = {factor: value for factor, value in group.items() if factor not in ("alpha", "magnitude")}
    kind = _kind(factors)
    if kind is None:
        have = ", ".join(sorted(group))
        raise UserError(
            f"The layer {name} in {path} is not whole (it has {have}). Download or export it again."
        )
    if "mid" in factors:  # LoCon's small kernel between two 1 × 1 convolutions: one kernel does the same
        kernel, down = factors.pop("mid"), factors["down"].flatten(1)
        factors["down"] = torch.einsum("rskl,sn->rnkl", kernel.float(), down.float())
    rank = _rank(kind, factors)
    if rank is None:  # a whole LoKr: only the header knows the rank, and LyCORIS then counts α as the rank
        rank = said.rank(name) or 1
        alpha = said.alpha(name, rank)
        return Layer(kind, factors, rank, float(rank) if alpha is None else alpha, _magnitude(group))
    if kind == "lora" and factors["up"].shape[1] != rank:
        raise UserError(
            f"The factors of {name} in {path} have ranks {rank} and {factors['up'].shape[1]}. Export the file again."
        )
    alpha = float(group["alpha"]) if "alpha" in group else said.alpha(name, rank)
    layer = Layer(kind, factors, rank, float(rank) if alpha is None else alpha, _magnitude(group))
    if layer.magnitude is not None and len(layer.magnitude) != layer.shape[0]:
        raise UserError(
            f"The DoRA scales of {name} in {path} run over the layer's inputs, as old LyCORIS wrote them, and are not "
            "read here. Bake the file with the tool that wrote it."
        )
    return layer


def _kind(factors: Mapping[str, Tensor]) -> Kind | None:
    own = set(factors) - {"mid", "hada_t1", "hada_t2", "lokr_t2"}
    for kind, possible in _NEEDED.items():
        if any(own == set(names) for names in possible):
            return kind
    return None


def _rank(kind: Kind, factors: Mapping[str, Tensor]) -> int | None:
    key = {"lora": "down", "loha": "hada_w1_b"}.get(kind)
    if key is None:
        key = next((name for name in ("lokr_w1_b", "lokr_w2_b") if name in factors), None)
    return None if key is None else factors[key].shape[0]


def _magnitude(group: Mapping[str, Tensor]) -> Tensor | None:
    return group["magnitude"].flatten() if "magnitude" in group else None


def _form(tensors: Mapping[str, Tensor]) -> str:
    """Whose way of naming this is, in a word or two."""
    names = list(tensors)
    lycoris = any(".hada_" in name or ".lokr_" in name for name in names)
    if any(name.startswith(tuple(prefix for prefix, _ in _KOHYA)) for name in names):
        blocks = "original" if any("put_blocks_" in name for name in names) else "diffusers'"
        return f"{'LyCORIS' if lycoris else 'kohya'} ({blocks} block names)"
    if any("lora_A" in name for name in names):
        return "diffusers (peft)"
    if any(name.startswith("transformer.") and ".lora_down." in name for name in names):
        return "ComfyUI (diffusers' names)"
    return "peft" if lycoris else "diffusers (before peft)"


def _base_by_shape(layers: Mapping[str, Layer]) -> Base | None:
    names = list(layers)
    if any(name.startswith("text_encoder_2.") or "add_embedding" in name for name in names):
        return "sdxl"
    if any(name.startswith("transformer.single_transformer_blocks.") for name in names):
        return "flux"
    if any(name.startswith("transformer.") and ".attn1." in name for name in names):
        return "pixart"
    if any(name.startswith("transformer.") for name in names):
        return "sd3"
    for name, layer in layers.items():
        if name.startswith("unet.") and name.endswith((".attn2.to_k", ".attn2.to_v")):
            return _WIDTHS.get(layer.shape[1], "other")
    return None


def _base_by_header(header: Mapping[str, str]) -> Base | None:
    said = f"{header.get('ss_base_model_version', '')} {header.get('modelspec.architecture', '')}".lower()
    for mark, base in (
        *(("sdxl", "sdxl"), ("xl-v1", "sdxl"), ("sd_v1", "sd1"), ("diffusion-v1", "sd1")),
        *(
            ("sd_v2", "sd2"),
            ("diffusion-v2", "sd2"),
            ("sd3", "sd3"),
            ("diffusion-3", "sd3"),
            ("flux", "flux"),
        ),
    ):
        if mark in said:
            return cast(Base, base)
    return None
