"""Read adapter files of diffusers, peft, kohya's sd-scripts, LyCORIS, OneTrainer and ComfyUI into an `AdapterFile`.

    adapter = read_adapter("dog.safetensors")
    write_adapter("dog-kohya.safetensors", adapter, "kohya", metadata={...})

| format | keys | α | DoRA | LoHa, LoKr |
|---|---|---|---|---|
| diffusers | `unet.….lora_A.weight`, peft's names | r and α in the metadata | `lora_magnitude_vector` [out] | refused |
| peft | the same, and peft's `hada_…`, `lokr_…` | the same | the same | peft's names |
| kohya | `lora_unet_….lora_down.weight` | `.alpha` | `dora_scale` [out, 1] or [1, in] | LyCORIS' names |
| comfyui | the same | `.alpha` | `dora_scale`, rescaled | LyCORIS' names |

kohya names SDXL's blocks by the numbers of the original code and fuses queries, keys and values of SD3 and FLUX as
that code does; ComfyUI's format always has diffusers' names, `transformer.…` with its dots. ComfyUI divides a row that
DoRA rescales by ‖W‖ where Liu et al. 2024 divide by ‖W + ΔW‖, so writing its file needs the base weights.
`write_adapter` reads every file back and compares ΔW layer by layer before the file gets its name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from backbone.adapters.concept import explain_no_run, is_run, list_adapter_files, name_last, read_concept
from backbone.adapters.config import (
    CONFIG_FILE,
    CONFIG_KEY,
    LARGEST_ALPHA,
    PEFT_PREFIX,
    AdapterConfig,
    check_tensors,
    read_adapter_configs,
    read_peft_config,
)
from backbone.adapters.lora import FACTORS, LORA_SUFFIXES, LORA_WEIGHTS, LYCORIS_WEIGHTS, PEFT_WEIGHTS
from backbone.io.console import UserError, format_count, notify, notify_once, quote
from backbone.io.files import read_tensors
from backbone.io.run_folder import CONCEPT_FILE as CONCEPT
from customize.formats.adapter import FOR_COMFYUI, AdapterFile
from customize.formats.factors import Algorithm, LayerUpdate
from customize.formats.layers.names import add_text_model, split_component
from customize.formats.layers.split import split_layer
from customize.formats.layers.translate import PREFIXES, names_other_part, translate

# Suffix of a tensor's key → which factor of the layer it holds.
_FACTOR_BY_SUFFIX = {
    **LORA_SUFFIXES,
    ".lora_mid.weight": "mid",
    **{
        f".{name}": name
        for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
    },
    **{f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b")},
    **{f".{name}": name for name in ("lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")},
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "dora_scale",
    ".alpha": "alpha",
    ".down.weight": "down",  # XLabs' processors
    ".up.weight": "up",
}
_WRAPPER = "module."  # DistributedDataParallel's
_ADAPTER_NAME = re.compile(
    r"\.(?:(lora_A|lora_B|lora_magnitude_vector)|((?:hada|lokr)_\w+))\.(?!(?:weight|bias)$)(?P<name>[^.]+)(\.weight)?$"
)
_BARE = re.compile(r"(?P<stem>.*)\.lora_(?P<factor>[ABab])")  # written by hand, or by MLX
_BESIDE_FACTORS = ("alpha", "magnitude", "dora_scale")
LEARNED_WORDS = "learned words"
LORA_BIASES = (".lora_B.bias", ".lora_up.bias")
# Ends of tensors of other methods → what they are, for the sentence that refuses them.
OTHER_METHODS = {
    (
        ".diff",
        ".diff_b",
    ): "whole differences of weights, of biases or of norms (LyCORIS' full, ComfyUI's trainer)",
    (".w_norm", ".b_norm"): "differences of norms (LyCORIS' train_norm)",
    (".oft_blocks", ".oft_diag", ".oft_R.weight", ".boft"): "rotations (OFT)",
    (".a1.weight", ".b1.weight", ".a2.weight", ".b2.weight"): "factors of GLoRA",
    (".on_input", ".ia3_l"): "scales of IA³",
    (".q_layer.weight", ".p_layer.weight", ".lambda_layer"): "factors of T-LoRA",
    LORA_BIASES: "biases beside a LoRA (peft's lora_bias)",
    (".set_weight", ".reshape_weight"): "whole weights",
    (".lora_mag", ".scalar"): "a magnitude or a scale of each layer that no known format has",
    (".lora_embedding_A", ".lora_embedding_B"): "a LoRA of a table of words",
    (
        "emb_params",
        "string_to_param.*",
        "clip_l",
        "clip_g",
        ">",
        ".clip_l_out",
        ".clip_g_out",
        ".t5",
        ".t5_out",
    ): LEARNED_WORDS,
}
# Files of other kinds that are handed over as LoRAs: what some of their names hold → what they are, and what to do
OTHER_FILES = {
    r"^lora_controlnet$|^input_hint_block\.|^controlnet_": (
        "a network that reads maps (Control-LoRA, ControlNet)",
        "Draw under a map with it: customize sample --controlnet FILE --condition KIND=MAP.",
    ),
    r"^lllite_": ("ControlNet-LLLite, which is not supported", "Take a T2I-Adapter or a ControlNet."),
    r"^(image_proj|ip_adapter)\.": (
        "an IP-Adapter, which is not supported",
        "Train a concept on the images instead.",
    ),
}
# The same of files without any factor
WHOLE_WEIGHTS = {
    r"^(model\.diffusion_model|first_stage_model|cond_stage_model|conditioner)\.": (
        "a whole model",
        "Draw with it: customize sample --model FILE. Or take out how it differs from its base: customize extract.",
    ),
    r"^(conv_in|down_blocks|double_blocks|joint_blocks|(single_)?transformer_blocks)\.(.*\.)?(weight|bias)$": (
        "a model's network",
        "Take out how it differs from its base, as a LoRA: customize extract.",
    ),
}
BAKED_IN_COMFYUI = {
    kind for ends, kind in OTHER_METHODS.items() if {".diff", ".w_norm", ".set_weight"} & set(ends)
}
PEFT_WHOLE = "weights that were trained as a whole (peft's modules_to_save, or its bias)"
# Methods of peft that are no LoRA, by what its tensors' names begin with; `lora_E` is AdaLoRA's
PEFT_METHODS = re.compile(
    r"\.(?P<method>lora(?=_E\b)|p?vera|fourierft|bone|miss|hra|c3a|shira|oft|boft|randlora|delora|waveft|gralora|glora"
    r"|road|psoft|hira|vblora|tinylora|unilora|lily|frod|adamss|deft|beft|osf|ln_tuning|trainable_tokens)_\w+"
    r"(\.default)?(\.weight)?$"
)
MERGED_IN_PEFT = (
    "Merge it into its model in peft (merge_and_unload), and take the difference: customize extract."
)
_WHOLE = re.compile(r"^(?!.*lora).*\.(weight|bias)$")
SHOWN = 3  # names of tensors that an error lists
_REQUIRED_FACTORS: dict[Algorithm, tuple[tuple[str, ...], ...]] = {
    "lora": (("down", "up"),),
    "loha": FACTORS["loha"],
    "lokr": FACTORS["lokr"],
}
# Factors → the kernels that may lie beside them
_KERNELS: dict[tuple[str, ...], tuple[str, ...]] = {
    ("down", "up"): ("mid",),
    FACTORS["loha"][0]: ("hada_t1", "hada_t2"),
    **{names: ("lokr_t2",) for names in FACTORS["lokr"] if "lokr_w2_a" in names},
}
# Factors that no kernel size can be in
_MATRICES = frozenset(name for names in FACTORS["loha"] + FACTORS["lokr"] for name in names) - {"lokr_w2"}


def read_adapter(path: str | Path, *, ignore: str = "") -> AdapterFile:
    """Read the adapter of a file, a run folder or peft's folder, whichever tool wrote it.

    Prints if it changes nothing. Tensors whose names begin with `ignore`, if given, are left to the caller. Raises
    `UserError` if there is no adapter, if a layer lacks factors or is of no supported model, for values that are
    not finite, for tensors that belong to no known format, and for a DoRA in ComfyUI's format, whose scales hold on its
    base alone.
    """
    adapter = read_any_adapter(path, ignore=ignore)
    if FOR_COMFYUI in adapter.metadata:
        raise UserError(
            f"{path} was written for ComfyUI, and its DoRA scales hold on its base alone. Make a run of it on that "
            f"model first: customize import {quote(path)} --model MODEL --out RUN"
        )
    return adapter


def read_any_adapter(path: str | Path, *, ignore: str = "") -> AdapterFile:
    """`read_adapter` of a DoRA in ComfyUI's format too; its metadata hold `FOR_COMFYUI` then."""
    path = find_adapter_file(path)
    adapter = parse_adapter(path, ignore=ignore)
    if not any(layer.magnitude is not None or layer.squared_norm() for layer in adapter.layers.values()):
        notify_once(f"{path} changes nothing: the factors of all its layers give zero. Was it trained?")
    _say_idle_magnitudes(path, adapter)
    return adapter


def _say_idle_magnitudes(file: Path, adapter: AdapterFile) -> None:
    """Warn about DoRA magnitudes that are zero or negative, which no training produces."""
    stored = {name: layer.magnitude for name, layer in adapter.layers.items() if layer.magnitude is not None}
    zero = [name for name, value in stored.items() if not value.any()]
    below = [name for name, value in stored.items() if (value.float() < 0).any()]
    for names, state in ((zero, "zero, so their weights become zero"), (below, "below zero in part")):
        if names:
            notify_once(
                f"The DoRA scales in {file} are {state}, in {format_count(len(names), 'layer')}, as {names[0]}. Was it "
                "exported whole?"
            )


def parse_adapter(path: Path, *, ignore: str = "") -> AdapterFile:
    """The adapter of a file, as `read_adapter` reads it."""
    tensors, metadata = read_tensors(path)
    tensors = {name: value for name, value in tensors.items() if not (ignore and name.startswith(ignore))}
    check_tensors(path, _drop_idle_alphas(tensors))
    tensors = _turn_bare_factors(tensors, path)
    groups = _drop_idle_parts(_group_by_stem(tensors, path), path)
    shapes = {stem: _find_stored_shape(group) for stem, group in groups.items()}
    translation = translate(groups, path, shapes)
    configs = _read_configs(path, metadata, groups)
    layers: dict[str, LayerUpdate] = {}
    for stem, group in groups.items():
        target = translation.targets[stem]
        stored = _build_layer(stem, target.layers[0], group, configs, path)
        for name, layer in split_layer(target, stored, path).items():
            if name in layers and not _are_equal(layers[name], layer):
                raise UserError(f"{path} changes {name} twice, under two names. Export it again.")
            layers.setdefault(name, layer)
    numbered = all(stem.startswith("lora_te1_") for stem in groups)
    return AdapterFile(
        layers, metadata, _describe_format(tensors), translation.network, numbered, translation.networks
    )


def _drop_idle_parts(groups: Mapping[str, dict[str, Tensor]], path: Path) -> Mapping[str, dict[str, Tensor]]:
    """The layers without those of unsupported parts (T5), if all of these change nothing; this is printed."""
    other_parts = [stem for stem in groups if names_other_part(stem)]
    if (
        not other_parts
        or len(other_parts) == len(groups)
        or any(_may_change(groups[stem]) for stem in other_parts)
    ):
        return groups
    notify_once(
        f"{path} holds {format_count(len(other_parts), 'layer')} of other parts than are read here, as "
        f"{other_parts[0]}, which change nothing: they are left out."
    )
    return {stem: group for stem, group in groups.items() if stem not in set(other_parts)}


def _may_change(group: Mapping[str, Tensor]) -> bool:
    """Whether a stored layer may change anything: none of its factors is zero, or it has magnitudes."""
    beside = {"magnitude", "dora_scale"} & set(group)
    return bool(beside) or all(
        bool(value.any()) for factor, value in group.items() if factor not in _BESIDE_FACTORS
    )


def _are_equal(first_update: LayerUpdate, second_update: LayerUpdate) -> bool:
    """Whether two updates of a layer are equal: a file may contain it under the names of two tools."""
    if (
        first_update.shape != second_update.shape
        or first_update.magnitude is not None
        or second_update.magnitude is not None
    ):
        return False
    first, second = first_update.delta_weight(), second_update.delta_weight()
    return float((first - second).norm()) <= 1e-3 * float(first.norm())


def _drop_idle_alphas(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without the α of a LoKr without low-rank factors: it has no effect, and may be infinite in fp16."""
    idle = {
        f"{stem}.alpha"
        for name in tensors
        if (stem := name.removesuffix(".lokr_w1")) != name and f"{stem}.lokr_w2" in tensors
    }
    return {name: value for name, value in tensors.items() if name not in idle}


def _turn_bare_factors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The tensors, with factors of bare names (`layer.lora_A`) lying as peft's: A [rank, in], B [out, rank].

    MLX has them the other way around, A [in, rank] and B [rank, out]: their shapes tell, and a line says so. Raises
    `UserError` if they do not, and for a factor that is there twice.
    """
    bare = {key: match for key in tensors if (match := _BARE.fullmatch(key))}
    pairs: dict[str, dict[str, Tensor]] = {}
    for key, match in bare.items():
        pair, name = pairs.setdefault(match["stem"], {}), match["factor"].upper()
        if name in pair:
            raise UserError(f"{path} holds {match['stem']} twice ({key}). Export it again.")
        pair[name] = tensors[key]
    if _are_transposed([(pair["A"], pair["B"]) for pair in pairs.values() if len(pair) > 1], path):
        notify_once(f"The factors in {path} lie the other way around, as MLX has them; they are read so.")
        pairs = {stem: {name: value.mT for name, value in pair.items()} for stem, pair in pairs.items()}
    kept = {key: value for key, value in tensors.items() if key not in bare}
    return kept | {
        f"{stem}.lora_{name}": value.contiguous()
        for stem, pair in pairs.items()
        for name, value in pair.items()
    }


def _are_transposed(pairs: Sequence[tuple[Tensor, Tensor]], path: Path) -> bool:
    """Whether factors (A, B) are [in, rank] and [rank, out]; `UserError` if their shapes fit either way."""
    certain, likely, square = set[bool](), set[bool](), False
    for down, up in pairs:
        if down.ndim != 2 or up.ndim != 2:
            continue
        fits, fits_transposed = down.shape[0] == up.shape[1], down.shape[1] == up.shape[0]
        if fits != fits_transposed:
            certain.add(fits_transposed)
        elif fits and down.shape[0] != down.shape[1]:  # a rank is below a width
            likely.add(down.shape[0] > down.shape[1])
        else:
            square = square or fits
    evidence = certain or likely
    if len(evidence) != 1 and (likely or square):
        raise UserError(
            f"The factors in {path} fit their layers either way around, and their names (lora_A without .weight) do "
            "not say which is meant. Save them under peft's names, lora_A.weight [rank, in]."
        )
    return evidence == {True}


def find_adapter_file(path: str | Path) -> Path:
    """Path of a run folder's adapter weights, or the file itself; `UserError` if a folder holds no adapter."""
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
    for name in (LORA_WEIGHTS, LYCORIS_WEIGHTS, PEFT_WEIGHTS):
        if (path / name).is_file():
            return path / name

    # No adapter: say what the folder is instead
    if is_run(path):
        raise UserError(explain_no_run(path))
    inner = sorted({file.parent for file in path.glob(f"*/{PEFT_WEIGHTS}")})
    if inner:
        folders = " and ".join(map(str, inner[:SHOWN]))
        raise UserError(
            f"{path} holds no adapter, but {format_count(len(inner), 'folder')} with one: {folders}. Import each, and "
            "draw with both beside one another (--concept, twice), or name the one."
            if len(inner) > 1
            else f"{path} holds no adapter, but a folder with one. Name it: {folders}"
        )
    if files := list_adapter_files(path):
        raise UserError(
            f"{path} holds no {LORA_WEIGHTS} or {PEFT_WEIGHTS}, but {name_last(files, path)}. Name the file that is "
            "meant."
        )
    if (path / "model_index.json").is_file():
        raise UserError(
            f"{path} is a whole model, and no adapter. A model is named with --model, where one is needed."
        )
    raise UserError(
        f"{path} holds no adapter ({LORA_WEIGHTS} or {PEFT_WEIGHTS} is missing). "
        "Name a run folder, peft's folder or a .safetensors file."
    )


def _group_by_stem(tensors: Mapping[str, Tensor], path: Path) -> dict[str, dict[str, Tensor]]:
    """Stored layer name → factor → tensor; `UserError` for tensors of another kind."""
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []

    # Every key ends in a factor's suffix, or is not known
    for key, plain in _strip_names(tensors, path).items():
        suffix = next((suffix for suffix in _FACTOR_BY_SUFFIX if plain.endswith(suffix)), None)
        if suffix is None:
            unknown.append(key)
            continue
        group, factor = groups.setdefault(plain.removesuffix(suffix), {}), _FACTOR_BY_SUFFIX[suffix]
        if factor in group:
            raise UserError(f"{path} holds {plain.removesuffix(suffix)} twice ({key}). Export it again.")
        if factor not in _BESIDE_FACTORS and tensors[key].ndim < 2:
            raise UserError(
                f"{key} in {path} is of the shape {list(tensors[key].shape)}, and a factor is a matrix or a kernel. "
                "Export the file again."
            )
        group[factor] = tensors[key]

    # Some files hold whole differences (`.diff`) beside their factors
    if groups or any(key.endswith(".diff") and tensors[key].any() for key in unknown):
        unknown = _take_differences(groups, unknown, tensors, path)
    if not unknown:
        return groups

    # Nothing of this may be dropped: say what kind of file it is, or what it holds beside its factors
    for pattern, (kind, remedy) in (OTHER_FILES | ({} if groups else WHOLE_WEIGHTS)).items():
        if any(re.search(pattern, key) for key in unknown):
            raise UserError(f"{path} is {kind}, and no LoRA. {remedy}")
    examples = ", ".join(sorted(unknown)[:SHOWN]) + (" …" if len(unknown) > SHOWN else "")
    kinds = [kind for ends, kind in OTHER_METHODS.items() if any(key.endswith(ends) for key in unknown)]
    trained_whole = not kinds and all(_WHOLE.search(key) for key in unknown)
    peft = None if kinds else next(filter(None, map(PEFT_METHODS.search, unknown)), None)
    kind = " and ".join(kinds) or (PEFT_WHOLE if trained_whole else "tensors of no kind that is known here")
    if peft is not None:
        method = "adalora" if peft["method"] == "lora" else peft["method"]
        kind = f"those of another method of peft ({method})"
    has_factors = any(set(group) - set(_BESIDE_FACTORS) for group in groups.values())
    remedy = MERGED_IN_PEFT if trained_whole or peft is not None else _find_remedy(kinds, has_factors)
    if has_factors:
        raise UserError(
            f"{path} holds, beside its factors, {format_count(len(unknown), 'tensor')} not read here: {kind} "
            f"({examples}). {remedy}"
        )
    raise UserError(f"{path} holds no LoRA, LoHa or LoKr, but {kind} ({examples}). {remedy}")


def _find_remedy(kinds: Sequence[str], with_adapter: bool) -> str:
    """The remedy for tensors of other methods, `with_adapter` in addition to a LoRA's factors."""
    if kinds == [LEARNED_WORDS]:
        return f"Make a run of {'both' if with_adapter else 'it'}: customize import."
    if not with_adapter:
        return "Give an adapter of one of these three kinds."
    if set(kinds) & BAKED_IN_COMFYUI:
        return (
            "No LoRA has them. Bake the file into its model in ComfyUI (load it, Save Checkpoint), and draw with "
            "that; its matrices alone are a LoRA then: customize extract."
        )
    if OTHER_METHODS[LORA_BIASES] in kinds:
        return (
            "Merge it into its model in peft or diffusers (merge_and_unload, fuse_lora), and draw with that."
        )
    return "Export it again as LoRA, LoHa or LoKr alone."


def _take_differences(
    groups: dict[str, dict[str, Tensor]], unknown: Sequence[str], tensors: Mapping[str, Tensor], path: Path
) -> list[str]:
    """Add layers whose whole ΔW a file holds, as factors; returns the keys that remain.

    So ComfyUI's trainer and distilled LoRAs have it beside others' factors, and LyCORIS' full of all layers.
    Differences of biases and norms that are zero change nothing, and so do a LoRA's own biases.
    """
    remaining, idle = [], 0
    for key in unknown:
        stem = key.removeprefix(_WRAPPER).removesuffix(".diff")
        change = tensors[key]
        if key.endswith((".diff", ".diff_b", *LORA_BIASES)) and not change.any():
            idle += 1
        elif key.endswith(".diff") and change.ndim in (2, 4) and set(groups.get(stem, ())) <= {"alpha"}:
            groups[stem] = _factor_exactly(change)
        else:
            remaining.append(key)
    if idle:
        notify_once(
            f"{path} holds {format_count(idle, 'difference')} of weights that are zero; they change nothing."
        )
    return remaining


def _factor_exactly(change: Tensor) -> dict[str, Tensor]:
    """A ΔW [out, in] or [out, in, k, k] as a LoRA's factors, one of them the identity, with α = rank."""
    rows, columns = change.shape[0], change.shape[1]
    spatial = change.shape[2:]
    if rows <= columns or spatial:
        down, up = change, torch.eye(rows, dtype=change.dtype).reshape(rows, rows, *[1] * len(spatial))
    else:
        down, up = torch.eye(columns, dtype=change.dtype), change
    return {"down": down, "up": up, "alpha": torch.tensor(float(len(down)))}


def _strip_names(keys: Iterable[str], path: Path) -> dict[str, str]:
    """Key → the same without what a distributed training and peft (an adapter's name) put into it.

    Raises `UserError` for a file of several adapters.
    """
    plain = {key: key.removeprefix(_WRAPPER) for key in keys}
    matches = {key: match for key, name in plain.items() if (match := _ADAPTER_NAME.search(name))}
    adapters = sorted({match["name"] for match in matches.values()})
    if len(adapters) > 1:
        raise UserError(
            f"{path} holds {len(adapters)} adapters ({', '.join(adapters)}). Save each in a file of its own."
        )
    return plain | {
        key: f"{match.string[: match.start()]}.{f'{match[1]}.weight' if match[1] else match[2]}"
        for key, match in matches.items()
    }


def _read_configs(
    path: Path, metadata: Mapping[str, str], groups: Mapping[str, Mapping[str, Tensor]]
) -> dict[str, AdapterConfig]:
    """Component → settings, from the metadata or peft's file beside; "" is the component of peft's bare names.

    Says so where neither they nor the tensors tell α: the strength is an assumption then.
    """
    if CONFIG_KEY in metadata:
        return read_adapter_configs(path, metadata)
    config_file = path.parent / CONFIG_FILE
    bare = [stem for stem in groups if stem.startswith(PEFT_PREFIX) or not stem.startswith(tuple(PREFIXES))]
    without_alpha = [stem for stem, group in groups.items() if "alpha" not in group]
    if config_file.is_file() and (
        path.name == PEFT_WEIGHTS or without_alpha
    ):  # peft's own file, even if renamed
        config = read_peft_config(config_file)
        if path.name != PEFT_WEIGHTS:
            notify(
                f"{path} does not say its α: the settings beside it are taken for its own ({config_file}: rank "
                f"{config.rank}, α {config.alpha:g}). If they are another file's, move them."
            )
        return {"": config}
    if without_alpha and (declared_alpha := metadata.get("ss_network_alpha")) not in (
        None,
        metadata.get("ss_network_dim"),
    ):
        notify(
            f"{path} holds no α for {format_count(len(without_alpha), 'layer')}, though its metadata says "
            f"ss_network_alpha {declared_alpha} (ss_network_dim {metadata.get('ss_network_dim')}): α = rank is assumed "
            "as in other tools, a strength of 1."
        )
    elif set(bare) & set(without_alpha):
        notify(
            f"{path} does not say its α, and no {CONFIG_FILE} lies beside it: α = rank is assumed, a strength of 1."
        )
    return {}


def _build_layer(
    stem: str, name: str, group: dict[str, Tensor], configs: Mapping[str, AdapterConfig], path: Path
) -> LayerUpdate:
    """One stored layer from its tensors by factor; `name` is (the first part of) its name here.

    Raises `UserError` for missing factors, for ranks that disagree and for an α that is 0 or not finite.
    """
    factors = {factor: value for factor, value in group.items() if factor not in _BESIDE_FACTORS}
    algorithm = _detect_algorithm(factors)
    if algorithm is None:
        present = ", ".join(sorted(group))
        raise UserError(
            f"The layer {stem} in {path} is not whole (it has {present}). Download or export it again."
        )
    factors = _shape_factors(factors, stem, path)

    # The rank: of the tensors, which a config must agree with
    component, module = split_component(name)
    config = configs.get(component, configs.get(""))
    if configs and config is None:
        raise UserError(
            f"The header of {path} does not say the rank and alpha of its {component}. Export it again."
        )
    names = (module, add_text_model(component, module), stem.removeprefix(PEFT_PREFIX))
    declared = config.layer_rank(*names) if config else None
    stored = _infer_rank(algorithm, factors)
    if stored is not None and declared not in (None, stored):
        raise UserError(
            f"{path} says rank {declared} for {stem}, whose tensors have {stored}. Export the file again."
        )
    if others := _list_ranks(algorithm, factors) - {stored}:
        raise UserError(
            f"The factors of {stem} in {path} have ranks {stored} and {min(others)}. Export the file again."
        )
    if config and config.adapter_type == "dora" and not {"magnitude", "dora_scale"} & set(group):
        raise UserError(f"{path} says DoRA, and {stem} has no magnitudes. Export it again.")

    # The scale is α/rank; without α the file was trained at α = rank
    rank = stored or declared or 1
    alpha = config.layer_alpha(*names, rank=rank) if config else float(rank)
    if "alpha" in group and stored is not None:  # LyCORIS ignores α for an unfactorised LoKr
        alpha = _read_alpha(group["alpha"], stem, path)
    layer = LayerUpdate(algorithm, factors, rank, alpha)
    _check_shapes(layer, stem, path)
    return replace(layer, magnitude=_read_magnitude(group, layer, stem, path))


def _shape_factors(factors: dict[str, Tensor], stem: str, path: Path) -> dict[str, Tensor]:
    """A layer's factors, those that are matrices as such, and LoCon's kernel in the middle multiplied into `down`.

    Raises `UserError` for a kernel where a matrix belongs, or a kernel that does not fit.
    """
    shaped = {
        name: value.flatten(1) if name in _MATRICES and value[0][0].numel() == 1 else value
        for name, value in factors.items()
    }
    if wrong := next((name for name in shaped if name in _MATRICES and shaped[name].ndim != 2), None):
        raise UserError(
            f"{stem}.{wrong} in {path} is of the shape {list(factors[wrong].shape)}, and this factor is a matrix. "
            "Export the file again."
        )
    if "mid" in shaped:  # between two 1 × 1 convolutions
        kernel, down = shaped.pop("mid"), shaped["down"].flatten(1)
        if kernel.ndim != 4 or kernel.shape[1] != len(down):
            raise _explain_misfit(factors, stem, path)
        shaped["down"] = torch.einsum("rskl,sn->rnkl", kernel.float(), down.float())
    return shaped


def _explain_misfit(factors: Mapping[str, Tensor], stem: str, path: Path) -> UserError:
    shapes = ", ".join(f"{name} {' × '.join(map(str, value.shape))}" for name, value in factors.items())
    return UserError(
        f"The factors of {stem} in {path} do not fit one another ({shapes}). Export the file again."
    )


def _find_stored_shape(group: Mapping[str, Tensor]) -> tuple[int, int]:
    """Rows and columns of a stored layer, as far as its factors say: a Kronecker product has those of both sides."""

    def side(*names: str) -> tuple[int, int]:
        factors = [group[name] for name in names if name in group]
        return (len(factors[0]), factors[-1][0].numel()) if factors and factors[0].ndim > 1 else (1, 1)

    if "down" in group and "up" in group:
        return side("up", "down")
    if "hada_w1_a" in group:
        return side("hada_w1_a", "hada_w1_b")
    left, right = (side(f"lokr_w{n}", f"lokr_w{n}_a", f"lokr_w{n}_b") for n in (1, 2))
    return left[0] * right[0], left[1] * right[1]


def _read_alpha(stored: Tensor, stem: str, path: Path) -> float:
    """α of a layer: a number in whatever shape and dtype; `UserError` for 0, which tools read in different ways."""
    if stored.numel() != 1 or float(stored) == 0:
        alpha = float(stored) if stored.numel() == 1 else f"{stored.numel()} numbers"
        raise UserError(
            f"α of {stem} in {path} is {alpha}: for some tools that is no change, for others α = rank. "
            "Export the file again with an α of its own."
        )
    if abs(float(stored)) >= LARGEST_ALPHA:
        raise UserError(
            f"α of {stem} in {path} is {float(stored):g}, which is no strength. Export the file again."
        )
    return float(stored)


def _check_shapes(layer: LayerUpdate, stem: str, path: Path) -> None:
    """Raise `UserError` for factors that cannot be multiplied, or only if one of them were repeated."""
    try:
        shape = layer.on_meta().delta_weight().shape
    except (RuntimeError, IndexError) as error:
        raise _explain_misfit(layer.factors, stem, path) from error
    if tuple(shape) != layer.shape:
        raise _explain_misfit(layer.factors, stem, path)


def _detect_algorithm(factors: Mapping[str, Tensor]) -> Algorithm | None:
    """Which algorithm these factors are of; None if they are incomplete or mixed."""
    for algorithm, factor_sets in _REQUIRED_FACTORS.items():
        for names in factor_sets:
            if set(factors) in (set(names), {*names, *_KERNELS.get(names, ())}):
                return algorithm
    return None


def _infer_rank(algorithm: Algorithm, factors: Mapping[str, Tensor]) -> int | None:
    """r from the factors' shapes; None for a LoKr stored unfactorised."""
    names = {"lora": ("down",), "loha": ("hada_w1_b",), "lokr": ("lokr_w1_b", "lokr_w2_b")}[algorithm]
    return next((factors[name].shape[0] for name in names if name in factors), None)


def _list_ranks(algorithm: Algorithm, factors: Mapping[str, Tensor]) -> set[int]:
    """The ranks of all pairs of factors, which are one in whole files: α is divided by it."""
    names = {"lora": (), "loha": ("hada_w1_b", "hada_w2_b"), "lokr": ("lokr_w1_b", "lokr_w2_b")}[algorithm]
    ranks = {factors[name].shape[0] for name in names if name in factors}
    return ranks | ({factors["up"].shape[1]} if algorithm == "lora" else set())


def _read_magnitude(group: Mapping[str, Tensor], layer: LayerUpdate, stem: str, path: Path) -> Tensor | None:
    """DoRA's magnitude: [out] over the outputs, or [1, in] over the inputs; the stored shape tells which.

    peft stores [out], or [1, out, 1, 1] for a convolution; LyCORIS and OneTrainer [out, 1, …] or [1, in, …].
    """
    rows, columns = layer.shape
    if "magnitude" in group and "dora_scale" in group:
        raise UserError(f"{path} holds the DoRA scales of {stem} twice, under two names. Export it again.")
    if "magnitude" in group:
        value = group["magnitude"].flatten()
        if len(value) == rows:
            return value
    elif "dora_scale" in group:
        value = group["dora_scale"]
        if value.ndim > 1 and value.shape[0] == 1 and value.numel() == value.shape[1] > 1:
            if columns % value.numel() == 0:
                return value.reshape(1, -1)
        elif value.ndim and value.numel() == rows == len(value) and (value.ndim > 1 or rows != columns):
            return value.flatten()
    else:
        return None
    shape = list(group.get("magnitude", group.get("dora_scale", torch.empty(0))).shape)
    raise UserError(
        f"The DoRA scales of {stem} in {path} are {shape} for a layer of {rows} × {columns}, which is neither one for "
        "each output ([out, 1]) nor for each input ([1, in]). Export the file again."
    )


def _describe_format(tensors: Mapping[str, Tensor]) -> str:
    """Which tool's naming the keys follow, for people."""
    names = list(tensors)
    is_lycoris = any(".hada_" in name or ".lokr_" in name for name in names)
    if any(name.startswith(("lora_unet_", "lora_transformer_", "lora_te", "lycoris_")) for name in names):
        blocks = "original" if any("put_blocks_" in name for name in names) else "diffusers'"
        return f"{'LyCORIS' if is_lycoris else 'kohya'} ({blocks} block names)"
    if any("lora_A" in name for name in names):
        return "diffusers (peft)"
    if any(name.startswith("transformer.") and ".lora_down." in name for name in names):
        return "ComfyUI (diffusers' names)"
    return "peft" if is_lycoris else "diffusers (before peft)"
