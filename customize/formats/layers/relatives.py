"""Models that are not supported, but whose layers have the names of a supported one's: told apart by their sizes.

Sizes are those of diffusers' classes and of its conversion scripts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from customize.formats.layers.known import DENOISERS, Network, is_known

# Width of the tokens [B, T, width] of the published models of each kind, and the number of their blocks at most.
PUBLISHED: Mapping[str, tuple[tuple[int, ...], int]] = {
    "sd3": ((1536, 2432), 38),
    "flux": ((3072,), 38),
    "pixart": ((1152,), 28),
    "zimage": ((3840,), 30),
    "flux2": ((3072, 4096, 6144), 48),
    "qwen": ((3072,), 60),
    "krea2": ((6144,), 28),
    "chroma": ((3072,), 38),
    "qwen21": ((4096,), 32),
}
_ATTENTION = r"\.attn[12]\."
_WORDS = re.compile(r"\.attn2\.to_[kv]$")
_BLOCKS = r"(?:^|\.)(single_)?(?:transformer_blocks|layers)\.(\d+)\."
# Layers that read tokens, and those that write them
_READS = re.compile(
    _BLOCKS
    + r"(?:attn|attn1|attention)\.(?:to_q|to_k|to_v|add_[qkv]_proj)$|"
    + _BLOCKS
    + r"(?:ff\.net\.0\.proj|attn2\.to_q)$"
)
_WRITES = re.compile(_BLOCKS + r"(?:(?:attn|attn1|attn2|attention)\.to_out\.0|ff\.net\.2)$")


@dataclass(frozen=True)
class Relative:
    """A model whose layers have the names of `like`'s: `width` of its tokens, its number of blocks.

    `text` is the width of the words that its `attn2` reads (None: it has no `attn2`). `shared` finds the names that it
    has in common with `like`.
    """

    name: str
    like: Network
    width: int
    blocks: int
    text: int | None = None
    shared: str = ""


RELATIVES = (
    Relative("Sana", "pixart", 2240, 60, 2240, _ATTENTION),
    Relative("Sana 0.6B", "pixart", 1152, 28, 1152, _ATTENTION),
    Relative("LTX-Video", "pixart", 2048, 28, 2048),
    Relative("LTX-Video", "pixart", 4096, 48, 4096),
    Relative("CogVideoX 2B", "pixart", 1920, 30),
    Relative("CogVideoX 5B", "pixart", 3072, 42),
    Relative("CogView 3", "pixart", 2560, 30),
    Relative("CogView 4", "pixart", 4096, 28),
    Relative("Mochi 1", "pixart", 3072, 48),
    Relative("Cosmos", "pixart", 2048, 28, 1024),
    Relative("Cosmos", "pixart", 4096, 28, 1024),
    Relative("Cosmos", "pixart", 5120, 36, 1024),
    Relative("Allegro", "pixart", 2304, 32, 2304),
    Relative("Lumina 2", "zimage", 2304, 26),
    Relative("Ideogram 4", "zimage", 4608, 34),
    Relative("HunyuanVideo", "flux", 3072, 40),
    Relative("LongCat-Image", "flux", 3072, 20),
    Relative("Ovis-Image", "flux", 3072, 27),
)
# What names of layers that no supported model has tell of their model; the first match counts.
TELLTALES: Mapping[str, str] = {
    r"ff[._]conv_(?:inverted|depth|point)|mlp[._](?:inverted|depth|point)_conv": "Sana",
    r"audio_attn[12]|audio_to_video|video_to_audio": "LTX-2",
    r"attn1\.add_[qkv]_proj": "Mochi 1",
    r"(?:double|single)_stream_blocks[._]": "HiDream",
    r"(?:visual|text)_transformer_blocks[._]": "Kandinsky",
    r"joint_transformer_blocks[._]|double_layers[._]\d+[._](?:attn|mlp)": "AuraFlow",
    r"ref_image_refiner[._]": "OmniGen2",
    r"(?:\b|_)(?:layers|noise_refiner|context_refiner)[._]\d+[._]attn[._]to_": "Lumina 2 or OmniGen2",
    r"blocks[._]\d+[._](?:self|cross)_attn[._](?:[qkv]|output)_proj": "Cosmos, or Anima, which is made of it",
    r"blocks[._]\d+[._](?:(?:self|cross)_attn[._][qkvo]$|ffn[._])": "Wan, or a model made of it",
}
_FLUX_BLOCKS, _FLUX_SINGLE_BLOCKS = 19, 38
# Models of FLUX.1's blocks: how many of each kind they have, and the width of the words that they read
_SHORTER = {"LongCat-Image": (10, 20, 3584), "Ovis-Image": (6, 27, 2048)}
_GATED = re.compile(r"(?:proj_mlp|ff\.net\.0\.proj)$")  # eight times as wide as the tokens in Ovis-Image


def find_width(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Width of the tokens of a transformer, by its layers' shapes [out, in]; None if no layer tells it."""
    for name, shape in shapes.items():
        if _READS.search(name):
            return shape[1]
        if _WRITES.search(name):
            return shape[0]
    return None


def has_published_size(network: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether layers of these shapes may be of a published model of this kind: by their width, and how many blocks."""
    width, (widths, blocks) = find_width(shapes), PUBLISHED[network]
    return (
        (width is None or width in widths)
        and _find_last_block(shapes) < blocks
        and not (network == "flux" and _name_flux_lookalike(shapes))
    )


def find_relatives(network: str, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Names of the unsupported models that may have these layers, whose names are a supported network's."""
    return list(dict.fromkeys(_find_fitting_models(network, shapes)))


def find_relatives_of_layer(name: str, width: int) -> list[str]:
    """Names of the models that are not supported and may have a layer of this name that reads tokens of this width."""
    networks = [network for network in DENOISERS if is_known(network, name)]
    shapes = {name: (width, width)}
    return list(
        dict.fromkeys(model for network in networks for model in _find_fitting_models(network, shapes))
    )


def name_model(names: Iterable[str]) -> str | None:
    """The model that is not supported and has layers of these names, diffusers' or its own; None if unsure."""
    names = list(names)
    for pattern, model in TELLTALES.items():
        if any(re.search(pattern, name) for name in names):
            return model
    return None


def _find_fitting_models(network: str, shapes: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    width, last = find_width(shapes), _find_last_block(shapes)
    text = {shape[1] for name, shape in shapes.items() if _WORDS.search(name)}
    has_second = any(".attn2." in name for name in shapes)
    for relative in RELATIVES:
        if relative.like != network or relative.width != width or last >= relative.blocks:
            continue
        if (
            network == "flux"
            and relative.name != _name_flux_lookalike(shapes)
            and not _is_half_of(relative.name, shapes)
        ):
            continue
        if (has_second and relative.text is None) or not text <= {relative.text}:
            continue
        if all(re.search(relative.shared, name) for name in shapes):
            yield relative.name


def _name_flux_lookalike(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The other model of FLUX.1's names and width that has these layers, by their number and sizes; "" for FLUX.1.

    HunyuanVideo has 20 and 40 blocks. Of a model with fewer than FLUX.1's, the last of both kinds are there.
    """
    pairs, single = _list_flux_blocks(shapes)
    if max(pairs, default=0) >= _FLUX_BLOCKS or max(single, default=0) >= _FLUX_SINGLE_BLOCKS:
        return "HunyuanVideo"
    width = find_width(shapes)
    if any(_GATED.search(name) and width and shape[0] == 8 * width for name, shape in shapes.items()):
        return "Ovis-Image"
    for name, (blocks, single_blocks, text) in _SHORTER.items():
        if shapes.get("context_embedder", (0, 0))[1] == text:
            return name
        if pairs and single and (max(pairs), max(single)) == (blocks - 1, single_blocks - 1):
            return name
    return ""


def _is_half_of(name: str, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether these layers, which may be FLUX.1's, are in just as many blocks of one kind as such a model has."""
    blocks, single_blocks, _ = _SHORTER.get(name, (0, 0, 0))
    pairs, single = _list_flux_blocks(shapes)
    if not blocks or _name_flux_lookalike(shapes):
        return False
    return (not single and pairs == {*range(blocks)}) or (not pairs and single == {*range(single_blocks)})


def _list_flux_blocks(shapes: Mapping[str, tuple[int, ...]]) -> tuple[set[int], set[int]]:
    """The numbers of the double-stream and of the single-stream blocks that these layers are in."""
    found = [match for match in map(re.compile(_BLOCKS).search, shapes) if match]
    pairs = {int(match[2]) for match in found if not match[1]}
    return pairs, {int(match[2]) for match in found if match[1]}


def _find_last_block(shapes: Mapping[str, tuple[int, ...]]) -> int:
    return max((int(match[2]) for match in map(re.compile(_BLOCKS).search, shapes) if match), default=0)
