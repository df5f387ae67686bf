"""Translate the layer names of every tool to diffusers' names, by looking them up among the layers of each network.

A file's names are looked up without their separators (`lora_unet_double_blocks_0_img_attn_qkv` and
`double_blocks.0.img_attn.qkv` are the same), so that nothing has to be guessed about underscores. The network that
explains all names of the denoiser is the file's; names that no network has are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from backbone.adapters.config import PEFT_PREFIX
from backbone.families.unet.original import from_original, to_original
from backbone.io.console import UserError, format_count, quote
from customize.formats.layers.known import (
    DENOISERS,
    LISTS,
    NETWORK_NAMES,
    UNETS,
    Network,
    generalize,
    is_known,
    list_known_layers,
    list_layer_names,
)
from customize.formats.layers.names import TEXT_MODEL_PREFIX
from customize.formats.layers.originals import Swap, original_layers
from customize.formats.layers.relatives import PUBLISHED, find_relatives, has_published_size, name_model

TRANSFORMERS = tuple(network for network in DENOISERS if network not in UNETS)
# What names of layers begin with → the component, and the networks that it may be; the longest prefix counts.
PREFIXES: dict[str, tuple[str, tuple[Network, ...]]] = {
    "lora_unet_": ("denoiser", DENOISERS),
    "lora_transformer_": ("denoiser", TRANSFORMERS),
    "lycoris_": ("denoiser", DENOISERS),
    "unet.": ("denoiser", DENOISERS),
    "transformer.": ("denoiser", TRANSFORMERS),
    "diffusion_model.": ("denoiser", DENOISERS),
    "model.diffusion_model.": ("denoiser", DENOISERS),
    "pipe.unet.": ("denoiser", DENOISERS),  # DiffSynth-Studio's, as are those below
    "pipe.dit.": ("denoiser", TRANSFORMERS),
    "dit.": ("denoiser", TRANSFORMERS),
    "lora_te_": ("text_encoder", ("clip",)),
    "lora_te1_": ("text_encoder", ("clip",)),
    "lora_te2_": ("text_encoder_2", ("clip",)),
    "text_encoder.": ("text_encoder", ("clip",)),
    "text_encoder_2.": ("text_encoder_2", ("clip",)),
    "clip_l.": ("text_encoder", ("clip",)),
    "clip_g.": ("text_encoder_2", ("clip",)),
    "text_encoders.clip_l.transformer.": ("text_encoder", ("clip",)),
    "text_encoders.clip_g.transformer.": ("text_encoder_2", ("clip",)),
}
_SVD = re.compile(r"time_stack|time_mix|temporal_res_block")  # its original names, and convolutions over time
# HunyuanVideo's names are FLUX.1's but for dots, and it has more blocks of text and image apart than FLUX.1's 19
_HUNYUAN = re.compile(
    r"double_blocks\.\d+\.(?:img|txt)_(?:attn_qkv|attn_proj|mod\.linear|mlp\.fc[12])"
    r"|double_blocks[._](?:19|[2-9]\d)[._]|individual_token_refiner"
)
_MOTION = re.compile(r"motion_modules[._]")
# Other parts of a model than its denoiser and CLIP → what they are
_PARTS = {
    "T5": re.compile(
        r"^(?:lora_te3_|t5|text_encoders\.t5|text_encoder_3\.)|SelfAttention|DenseReluDense|EncDecAttention"
    ),
    "the language model that reads prompts": re.compile(
        r"^(?:lora_te|text_encoder|te[._]|qwen|clip\.).*model[._]layers[._]\d+[._](?:self_attn|mlp)[._]"
    ),
    "the autoencoder (VAE)": re.compile(r"^(?:lora_vae_|vae\.|first_stage_model\.)"),
}
_FLAT_NUMBER = re.compile(rf"({LISTS})_(\d+)(?=_|$)")
SHOWN = 3  # names that an error lists


@dataclass(frozen=True)
class Target:
    """Where a stored layer belongs: diffusers' layers with their component, in order of the stored layer's rows.

    `kernels` of the layers: () of a linear one, (k, k), or None if models differ.
    """

    layers: tuple[str, ...]
    swap: Swap = "never"
    kernels: tuple[tuple[int, ...] | None, ...] = ()


@dataclass(frozen=True)
class _Entry:
    """A way to write a layer of a network: `parts` with # for the numbers; UNets' originals are counted otherwise."""

    parts: tuple[str, ...]
    swap: Swap = "never"
    counts_as_original: bool = False


@dataclass(frozen=True)
class Translation:
    """Each stored layer name → its layers here, and the networks that have them all under the names of the file."""

    targets: Mapping[str, Target]
    networks: tuple[Network, ...]

    @property
    def network(self) -> Network | None:
        """The only network that has them all; None if several have."""
        return self.networks[0] if len(self.networks) == 1 else None


# Of layers that two networks have under one name: rows per column.
RATIOS: dict[Network, dict[str, float]] = {
    "flux": {
        "single_blocks_#_linear1": 7,
        "single_blocks_#_linear2": 1 / 5,
        "double_blocks_#_img_mlp_0": 4,
        "double_blocks_#_txt_mlp_0": 4,
    },
    "flux2": {
        "single_blocks_#_linear1": 9,
        "single_blocks_#_linear2": 1 / 4,
        "double_blocks_#_img_mlp_0": 6,
        "double_blocks_#_txt_mlp_0": 6,
    },
}


def translate(
    stems: Iterable[str], path: Path, shapes: Mapping[str, tuple[int, int]] | None = None
) -> Translation:
    """Translate the layer names of a file. Raises `UserError` that shows the names which no network has.

    `shapes` [rows, columns] of stored layers decide between networks that have all of the names.
    """
    stems = list(stems)
    if foreign := [stem for stem in stems if _HUNYUAN.search(stem)]:
        raise UserError(
            f"{path} adapts HunyuanVideo ({foreign[0]} …), which is not supported. Give a LoRA of a model of images."
        )

    # Text encoders' layers have one reading; the denoiser's may be of several networks
    targets, denoiser, unknown = _translate_text_encoders(stems)
    sized = {stem: shape for stem, shape in (shapes or {}).items() if stem in denoiser}

    # Each network with the names it has and the shapes it cannot have: most names win, then fewest misfits
    explained = {
        network: {
            stem: target
            for stem, (module, networks) in denoiser.items()
            if network in networks and (target := find(network, module)) is not None
        }
        for network in DENOISERS
    }
    misfits = {
        network: sum(_has_other_ratio(network, denoiser[stem][0], shape) for stem, shape in sized.items())
        for network in DENOISERS
    }
    network = max(DENOISERS, key=lambda network: (len(explained[network]), -misfits[network]))
    component = "unet" if network in UNETS else "transformer"
    for stem, target in explained[network].items():
        targets[stem] = replace(target, layers=tuple(f"{component}.{layer}" for layer in target.layers))
    unknown += [stem for stem in denoiser if stem not in explained[network]]

    # Names that the best network lacks
    if unknown:
        known_shapes = {
            target.layers[0]: sized[stem]
            for stem, target in explained[network].items()
            if stem in sized and len(target.layers) == 1
        }
        raise _explain_unknown_names(path, unknown, network if explained[network] else None, known_shapes)

    # Networks that explain the whole file equally well
    possible = [
        network
        for network in DENOISERS
        if denoiser and len(explained[network]) == len(denoiser) and misfits[network] == min(misfits.values())
    ]
    if "flux" in possible and "chroma" in possible:
        # Whose names are FLUX.1's: a file's metadata may say it is that
        possible.remove("chroma")
    return Translation(targets, tuple(possible))


def _translate_text_encoders(
    stems: Sequence[str],
) -> tuple[dict[str, Target], dict[str, tuple[str, tuple[Network, ...]]], list[str]]:
    """Translate the layer names of text encoders: (their layers, the denoiser's names, names of neither).

    A name of the denoiser comes without its prefix, and with the networks that the prefix allows.
    """
    targets: dict[str, Target] = {}
    denoiser: dict[str, tuple[str, tuple[Network, ...]]] = {}
    unknown: list[str] = []
    for stem in stems:
        component, networks, module = split_prefix(stem)
        target = find("clip", module) if "clip" in networks else None
        if target is not None:
            layers = tuple(f"{component or 'text_encoder'}.{layer}" for layer in target.layers)
            targets[stem] = replace(target, layers=layers)
        elif component in ("", "denoiser"):
            denoiser[stem] = module, networks
        else:
            unknown.append(stem)
    return targets, denoiser, unknown


def _has_other_ratio(network: Network, module: str, shape: tuple[int, int]) -> bool:
    """Whether a layer of this name has other rows per column in a network."""
    ratio = RATIOS.get(network, {}).get(_FLAT_NUMBER.sub(r"\1_#", module.replace(".", "_")))
    return ratio is not None and shape[0] != round(ratio * shape[1])


def split_prefix(stem: str) -> tuple[str, tuple[Network, ...], str]:
    """A stored name → (component or "", the networks that it may be of, its name without prefixes)."""
    stem = stem.removeprefix(PEFT_PREFIX)
    prefix = max((prefix for prefix in PREFIXES if stem.startswith(prefix)), key=len, default="")
    component, networks = PREFIXES.get(prefix, ("", (*DENOISERS, "clip")))
    if prefix == "lycoris_":
        networks = (*DENOISERS, "clip")
        component = ""
    module = stem.removeprefix(prefix).removeprefix(PEFT_PREFIX)
    # Some FLUX.2 exports have lost the beginning of the name
    module = re.sub(r"^sformer_blocks\.", "transformer_blocks.", module)
    return component, networks, module


def names_other_part(stem: str) -> bool:
    """Whether a stored name is of another part of a model than its denoiser and CLIP."""
    return any(pattern.search(stem) for pattern in _PARTS.values())


def find(network: Network, module: str) -> Target | None:
    """The layers of a network that a name means, in whichever way it is written; None if it has none such."""
    flat = module.replace(".processor.", ".").replace(".", "_")
    numbers = [match[2] for match in _FLAT_NUMBER.finditer(flat)]
    entry = _list_entries(network).get(_FLAT_NUMBER.sub(r"\1_#", flat))
    if entry is None:
        return None
    layers = []
    for part in entry.parts:
        pieces = part.split("#")
        filled = "".join(piece + number for piece, number in zip(pieces, [*numbers, ""], strict=True))
        layer = from_original(filled) if entry.counts_as_original else filled
        if not is_known(network, layer):
            return None
        layers.append(layer)
    kernels = tuple(list_known_layers(network)[generalize(layer)] for layer in layers)
    return Target(tuple(layers), entry.swap, kernels)


@cache
def _list_entries(network: Network) -> dict[str, _Entry]:
    """Every way to write a layer of a network, flat and with # for blocks' numbers."""
    entries: dict[str, _Entry] = {}

    def add(name: str, entry: _Entry) -> None:
        key = _FLAT_NUMBER.sub(r"\1_#", name.replace(".", "_"))
        known = entries.setdefault(key, entry)
        assert known == entry, key

    for name in list_layer_names(network):
        general = generalize(name)
        entry = _Entry((general,))
        add(general, entry)
        if name.endswith(".to_out.0"):
            add(general.removesuffix(".0"), entry)  # as diffusers before peft had it
        if network == "clip":
            add(TEXT_MODEL_PREFIX + general, entry)
            old = re.sub(r"self_attn\.(q|k|v|out)_proj$", r"self_attn.to_\1", general)
            add(old, entry)
            add(TEXT_MODEL_PREFIX + old, entry)
        if network == "unet" and (original := to_original(name)) != name:
            original = generalize(original)
            add(original, _Entry((original,), counts_as_original=True))
    if network == "unet":  # where the block below has no attention
        add("output_blocks.#.1.conv", _Entry(("output_blocks.#.1.conv",), counts_as_original=True))
    for layer in original_layers(network):
        add(layer.name, _Entry(layer.parts, layer.swap))
    return entries


def _explain_unknown_names(
    path: Path, unknown: list[str], network: Network | None, shapes: Mapping[str, tuple[int, ...]]
) -> UserError:
    """The error for names that no network has; `shapes` are those of the layers that `network` explains."""
    examples = ", ".join(sorted(unknown)[:SHOWN]) + (" …" if len(unknown) > SHOWN else "")
    for part, pattern in _PARTS.items():
        if all(pattern.search(stem) for stem in unknown):
            layers = format_count(len(unknown), "layer")
            return UserError(
                f"{path} adapts {part} in {layers} ({examples}), which is not read here. Export it again without "
                f"{part}."
            )
    if all(_SVD.search(stem) for stem in unknown):
        return UserError(
            f"{path} adapts Stable Video Diffusion in {format_count(len(unknown), 'layer')} not read here "
            f"({examples}). Export it again in diffusers' names, of linear layers alone."
        )
    if all(_MOTION.search(stem) for stem in unknown):
        return UserError(
            f"{path} is a motion LoRA, of an AnimateDiff adapter ({examples}). Draw clips with it: customize clip "
            f"--motion ADAPTER --lora {quote(path)}"
        )
    if model := name_model(unknown) or " or ".join(find_relatives(network, shapes) if network else ()):
        return UserError(
            f"{path} adapts {model} ({examples}), which is not supported. Give a LoRA of a supported model."
        )
    ours = network is not None and (network not in PUBLISHED or has_published_size(network, shapes))
    note = f", though its others are of {NETWORK_NAMES[network]}" if network and ours else ""
    return UserError(
        f"{path} adapts {format_count(len(unknown), 'layer')} that no supported model has ({examples}){note}. "
        "Export it again from the tool that wrote it, in diffusers' or kohya's names."
    )
