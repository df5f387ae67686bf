"""Models of one file, or of three as ComfyUI lays them: the transformer, the autoencoder, the text encoder.

A transformer alone is recognised by its own tensors; the other components lie in the same file below a prefix, or in
files of their own, whose tensors say which they are. Configs are looked up as for Stable Diffusion 1
(`sd1/checkpoint.py`); a tokenizer lies beside the transformer's file or the text encoder's, since no file carries one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint, convert_wan_vae_to_diffusers
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions
from backbone.families.base import ImageInput, TextEncoderSlot
from backbone.families.components import loading
from backbone.families.components.empty import without_weights
from backbone.families.components.latents import (
    has_frames,
    is_batch_normed,
    latent_channels,
    patch_size,
    pixels_per_latent,
)
from backbone.families.location import PUBLISHED_CONFIGS, Location
from backbone.families.single_file import text_encoders
from backbone.families.single_file.checkpoint import (
    AUTOENCODER,
    UNET,
    config_mismatch,
    folders_beside,
    refuse_quantized,
)
from backbone.families.single_file.text_encoders import build_network, read_weights
from backbone.io.console import UserError
from backbone.io.files import Header, read_header
from backbone.io.weights import refuse_damaged

Convert = Callable[[dict[str, Tensor]], dict[str, Tensor]]
TRANSFORMER_PREFIXES = (UNET, "diffusion_model.", "")
AUTOENCODER_PREFIXES = (AUTOENCODER, "vae.", "")
AUTOENCODER_MARKS = ("decoder.conv_in.weight", "decoder.conv1.weight", "conv2.weight")
TEXT_MARK = re.compile(r"^(.*?)(?:model\.|language_model\.)*embed_tokens\.weight$")
T5_MARK = "encoder.block.0.layer.0.SelfAttention.q.weight"
# Tensors beside the language model's layers, and tokenizers that ComfyUI's files carry as bytes
NOT_TEXT = r"lm_head\.|visual\.|vision_|multi_modal_projector\.|(?:tekken|spiece)_model$|tokenizer_json$"
NORM = re.compile(r"(?:model\.|language_model\.)*norm\.weight")  # after a language model's last layer
TRANSFORMER, VAE, TEXT = "transformer", "vae", "text_encoder"
FLAT = "AutoencoderKLQwenImage21"  # has frames, but the kernels of pictures
NAMES = {VAE: "autoencoder", TEXT: "text encoder"}
SIDE = 1024  # pixels a side of the training images, where the configs do not say


@dataclass(frozen=True)
class SplitFiles:
    """A family's files.

    name       of the model, for messages
    marks      tuples of tensor names; the transformer has all names of one tuple
    encoder    the text encoder's name, for messages
    published  header of the transformer → folders of published configs, in order of precedence
    convert    the transformer's tensors, under the original names or diffusers', to diffusers'
    """

    name: str
    marks: tuple[tuple[str, ...], ...]
    encoder: str
    published: Callable[[Header], Sequence[str]]
    convert: Convert = dict

    def match(self, header: Header) -> tuple[Path, ...] | None:
        """The config folders of a file that holds the transformer; None for any other."""
        if self.prefix(header) is None:
            return None
        refuse_quantized(header)
        folders = (PUBLISHED_CONFIGS / name for name in self.published(header))
        return (*folders_beside(header), *folders)

    def prefix(self, header: Header) -> str | None:
        """The prefix of the transformer's tensors; None where there are none."""
        return next(
            (
                prefix
                for prefix in TRANSFORMER_PREFIXES
                for marks in self.marks
                if all(prefix + mark in header.shapes for mark in marks)
            ),
            None,
        )

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        """Find the files of the other components; `UserError` where one is missing, or a file is none of them."""
        parts: dict[str, Path] = {}
        for file in other_files:
            part = TEXT if text_prefix(file) is not None else VAE if vae_prefix(file) is not None else ""
            if not part or part in parts:
                role = "neither an autoencoder nor a text encoder" if not part else f"a second {part}"
                raise UserError(
                    f"{file.path} is {role} of a {self.name}. Leave it out, or name another file."
                )
            refuse_quantized(file)
            parts[part] = file.path
        prefixes = {VAE: vae_prefix(header, inside=True), TEXT: text_prefix(header)}
        options = {VAE: ("autoencoder (VAE)", "--vae FILE"), TEXT: (self.encoder, "--text-encoder FILE")}
        missing = [options[part] for part, prefix in prefixes.items() if prefix is None and part not in parts]
        if missing:
            raise UserError(
                f"{header.path} holds the transformer of a {self.name} without its "
                f"{' and '.join(label for label, _ in missing)}. Add {' and '.join(option for _, option in missing)}, "
                "or name the model's diffusers folder or hub id."
            )
        return parts


def vae_prefix(header: Header, *, inside: bool = False) -> str | None:
    """The prefix of an autoencoder's tensors, or None; `inside` a file that holds more."""
    prefixes = AUTOENCODER_PREFIXES[:2] if inside else AUTOENCODER_PREFIXES
    return next((p for p in prefixes for mark in AUTOENCODER_MARKS if p + mark in header.shapes), None)


def text_prefix(header: Header) -> str | None:
    """The prefix of a language model's or T5's tensors before transformers' names, or None."""
    t5 = next((name for name in header.shapes if name.endswith(T5_MARK)), None)
    if t5 is not None:
        return t5.removesuffix(T5_MARK)
    matches = (TEXT_MARK.match(name) for name in header.shapes)
    return next((match[1] for match in matches if match), None)


class SplitFileFamily:
    """Part of `Family`: its files, and its transformer and autoencoder from them or from a diffusers folder.

    files             how its files are recognised and read
    transformer_kind  diffusers' class of the denoiser
    vae_kind          diffusers' class of the autoencoder
    convert_vae       the autoencoder's tensors from the original names, where those are not Stable Diffusion's
    """

    files: ClassVar[SplitFiles]
    transformer_kind: ClassVar[Any]
    vae_kind: ClassVar[Any]
    convert_vae: ClassVar[Convert | None] = None
    reads_images: ClassVar[Mapping[str, ImageInput]] = {}

    def match_checkpoint(self, header: Header) -> tuple[Path, ...] | None:
        return self.files.match(header)

    def find_parts(self, header: Header, other_files: Sequence[Header]) -> dict[str, Path]:
        return self.files.find_parts(header, other_files)

    def licence(self, location: Location) -> str:
        return ""

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            return load_transformer(self.transformer_kind, self.files, location, dtype)
        return loading.load_network(self.transformer_kind, location, TRANSFORMER, dtype)

    def autoencoder(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.file is not None:
            return load_autoencoder(self.vae_kind, location, dtype, type(self).convert_vae)
        return loading.load_autoencoder(self.vae_kind, location, dtype)

    def latent_shape(self, location: Location) -> tuple[int, ...]:
        config = location.config(VAE)
        side = int(config.get("sample_size", SIDE)) // pixels_per_latent(config)
        return latent_channels(config), side, side

    def longest_side(self, location: Location) -> int | None:
        return None

    def embed_guidance(
        self, denoiser: nn.Module, conditions: Conditions, guidance: float
    ) -> Conditions | None:
        return None


# Reading ----------------------------------------------------------------------------------------------------


def load_transformer(kind: Any, files: SplitFiles, location: Location, dtype: torch.dtype) -> nn.Module:
    """Load the transformer from a file with the original names or diffusers'; `UserError` where it does not fit."""
    prefix = files.prefix(read_header(location.find_file(TRANSFORMER)))
    assert prefix is not None
    tensors = read_weights(location, prefix, dtype, part=TRANSFORMER)
    if not prefix:  # the other components have prefixes of their own
        other_prefixes = ("text_encoders.", *AUTOENCODER_PREFIXES[:2])
        tensors = {name: value for name, value in tensors.items() if not name.startswith(other_prefixes)}
    try:
        converted = files.convert(tensors)
    except (KeyError, IndexError, ValueError, RuntimeError) as error:
        raise config_mismatch(location, TRANSFORMER) from error
    return build_network(kind, location, TRANSFORMER, converted)


def refuse_other_parts(location: Location) -> None:
    """`UserError` where a component's file is another model's by its header, before anything is loaded.

    Compares the width and the number of layers of a text encoder, and an autoencoder's latents.
    """
    if TEXT in location.parts:
        header = read_header(location.parts[TEXT])
        config = location.config(TEXT)
        inner = config.get("text_config", config)
        width, layers = (
            ("hidden_size", "num_hidden_layers") if "hidden_size" in inner else ("d_model", "num_layers")
        )
        expected, actual = (inner.get(width), inner.get(layers)), read_text_size(header)
        cut = actual[0] == expected[0] and is_cut(header)
        if None not in expected and actual != expected and not cut:
            raise part_mismatch(location, TEXT)
    if VAE in location.parts and not is_like(read_header(location.parts[VAE]), location.config(VAE)):
        raise part_mismatch(location, VAE)


def is_like(header: Header, config: Mapping[str, Any]) -> bool:
    """Whether an autoencoder's file has the latents, frames and batch norm of a config."""
    kernel = next((s for n, s in header.shapes.items() if n.endswith(AUTOENCODER_MARKS[:2])), ())
    channels = latent_channels(config) // patch_size(config) ** 2
    normed = any(name.endswith("bn.running_mean") for name in header.shapes)
    if normed != is_batch_normed(config):
        return False
    over_time = has_frames(config) and config.get("_class_name") != FLAT
    return len(kernel) < 4 or (kernel[1] == channels and (len(kernel) == 5) == over_time)


def is_cut(header: Header) -> bool:
    """Whether a language model's file has no final norm: it ends at the last layer read, as ComfyUI's of FLUX.2."""
    prefix = text_prefix(header) or ""
    names = {name.removeprefix(prefix) for name in header.shapes if name.startswith(prefix)}
    return T5_MARK not in names and not any(map(NORM.fullmatch, names))


def read_text_size(header: Header) -> tuple[int, int]:
    """Read the width and the number of layers of the language model or T5 in a file."""
    prefix = text_prefix(header) or ""
    shapes = {n.removeprefix(prefix): s for n, s in header.shapes.items() if not re.search(NOT_TEXT, n)}
    marks = (T5_MARK, "embed_tokens.weight")
    width = next(shape[1] for name, shape in shapes.items() if name.endswith(marks))
    layers = {match[1] for name in shapes if (match := re.search(r"(?:^|\.)(?:layers|block)\.(\d+)\.", name))}
    return width, len(layers)


def part_mismatch(location: Location, part: str) -> UserError:
    """The `UserError` for a component's file that does not fit the component's config."""
    config = location.local(f"{part}/config.json")
    return UserError(
        f"The {NAMES[part]} in {location.find_file(part)} is not built as {config} says: it is that of another model, "
        f"or of another size. Give the one that {location.find_file(TRANSFORMER)} was published with, or put its "
        f"{part}/config.json beside that file."
    )


def load_autoencoder(
    kind: Any, location: Location, dtype: torch.dtype, convert: Convert | None = None
) -> nn.Module:
    """Load the autoencoder from a file with the original names or diffusers', in fp32 where fp16 overflows."""
    prefix = vae_prefix(read_header(location.find_file(VAE)), inside=VAE not in location.parts)
    assert prefix is not None
    tensors = read_weights(location, prefix, loading.autoencoder_dtype(location, dtype), part=VAE)
    if any(re.match(r"decoder\.up\.\d", name) for name in tensors):
        config = location.config(VAE)
        with refuse_damaged(str(location.find_file(VAE)), VAE):
            tensors = convert_ldm_vae_checkpoint(dict(tensors), config) | convert_extra_layers(tensors)
    elif convert is not None:
        tensors = convert(tensors)
    return build_network(kind, location, VAE, tensors)


def convert_extra_layers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the layers that only FLUX.2's autoencoder has: convolutions around the latent, and its batch norm."""
    renames = {"encoder.quant_conv.": "quant_conv.", "decoder.post_quant_conv.": "post_quant_conv."}
    extra = {name: value for name, value in tensors.items() if name.startswith("bn.")}
    for old, new in renames.items():
        extra |= {name.replace(old, new): value for name, value in tensors.items() if name.startswith(old)}
    return extra


def convert_video_autoencoder(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of Qwen-Image's autoencoder, which has the architecture of Wan's, to diffusers' names."""
    if "conv2.weight" not in tensors:
        return tensors
    return dict(convert_wan_vae_to_diffusers(dict(tensors)))


def load_language_model(
    kind: Any, tokenizer_kind: Any, location: Location, dtype: torch.dtype
) -> TextEncoderSlot:
    """Load a language model without its head from a file, with the tokenizer that lies beside it.

    Raises `UserError` where the tokenizer is missing, or the tensors do not fit the config.
    """
    tokenizer = load_tokenizer(tokenizer_kind, location)
    return TextEncoderSlot(TEXT, tokenizer, load_text_model(kind, location, dtype))


def name_inner(name: str) -> str:
    """A tensor's name in the language model alone."""
    return re.sub(r"^(model\.|language_model\.)+", "", name)


def load_text_model(
    kind: Any, location: Location, dtype: torch.dtype, *, part_name: Callable[[str], str] = name_inner
) -> Any:
    """Load a language model or vision-language model from a file; `UserError` for tensors that do not fit the config.

    `part_name` gives a tensor's name in the model of class `kind`; tensors that it does not have are left out. A file
    that ends at the last layer read has no norm there, as that layer has none in the whole model.
    """
    header = read_header(location.find_file(TEXT))
    prefix = text_prefix(header)
    assert prefix is not None
    with refuse_damaged(location.name, TEXT):
        settings = location.config(TEXT)
        has_vision = "text_config" in kind.config_class.sub_configs
        config = kind.config_class.from_dict(
            settings if has_vision else settings.get("text_config", settings)
        )
        cut = not has_vision and is_cut(header)
        if cut:
            config.num_hidden_layers = min(config.num_hidden_layers, read_text_size(header)[1])
        with without_weights():
            expected = {name: value.shape for name, value in kind(config).state_dict().items()}
    tensors = {
        part_name(name): value for name, value in read_weights(location, prefix, dtype, part=TEXT).items()
    }
    unused = NOT_TEXT if not has_vision else r"lm_head\."
    tensors = {name: value for name, value in tensors.items() if not re.match(unused, name)}
    if cut:
        tensors["norm.weight"] = torch.ones(expected["norm.weight"], dtype=dtype)
    if {name: value.shape for name, value in tensors.items()} != expected:
        raise part_mismatch(location, TEXT)
    with refuse_damaged(location.name, TEXT):
        model = kind.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    if cut:
        model.norm = nn.Identity()
    return model


def load_t5(location: Location, number: str, dtype: torch.dtype) -> TextEncoderSlot:
    """Load T5 from a file, with the tokenizer that lies beside the transformer's; `UserError` as for others."""
    prefix = text_prefix(read_header(location.find_file(TEXT)))
    assert prefix is not None
    return text_encoders.load_t5_below(prefix, location, number, dtype)


def load_tokenizer(kind: Any, location: Location) -> Any:
    """The tokenizer that lies beside the model's files; `UserError` if there is none."""
    folder = location.local("tokenizer")
    if folder is None:
        raise UserError(
            f"{location.find_file(TEXT)} carries no tokenizer, as no such file does. Put the tokenizer/ folder of this "
            f"model (with its tokenizer.json) beside {location.find_file(TRANSFORMER)}."
        )
    with refuse_damaged(str(folder), "tokenizer"):
        return kind.from_pretrained(str(folder), local_files_only=True)
