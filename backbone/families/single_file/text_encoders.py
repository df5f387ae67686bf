"""Shared by Stable Diffusion 3's and FLUX.1's single-file checkpoints: text encoders, and whether the file is complete.

Stability AI's and ComfyUI's files hold the encoders under transformers' names below `text_encoders.clip_l.`,
`text_encoders.clip_g.` and `text_encoders.t5xxl.`. fp8 weights are read, with a scale beside them or without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from backbone.families.base import TextEncoderSlot
from backbone.families.components import loading
from backbone.families.components.empty import without_weights
from backbone.families.location import Location
from backbone.families.single_file.checkpoint import (
    AUTOENCODER,
    UNET,
    config_mismatch,
    load_single_file_part,
    refuse_quantized,
    unscale,
)
from backbone.families.single_file.clip import build_clip
from backbone.io.console import UserError
from backbone.io.files import Header, read_header, read_tensors
from backbone.io.weights import refuse_damaged

CLIP_L, CLIP_G, T5 = (f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl"))
ENCODER_LABELS = {CLIP_L: "text encoder CLIP-L", CLIP_G: "text encoder CLIP-G", T5: "text encoder T5"}
PROJECTION = "text_projection.weight"
SHARED, TIED = "shared.weight", "encoder.embed_tokens.weight"  # T5's table of tokens has two names


def transformer_prefix(header: Header, name: str) -> str | None:
    """The prefix of the transformer's tensors, found by one of its names; None if the file has no transformer."""
    return next((prefix for prefix in (UNET, "") if prefix + name in header.shapes), None)


def read_transformer(location: Location, name: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """The transformer's tensors, found by one of its names, without their prefix, of a file of all components."""
    prefix = transformer_prefix(read_header(location.source), name)
    assert prefix is not None
    other_prefixes = ("text_encoders.", AUTOENCODER, "vae.", "model_sampling.")
    tensors = read_weights(location, prefix, dtype)
    return (
        tensors
        if prefix
        else {name: tensor for name, tensor in tensors.items() if not name.startswith(other_prefixes)}
    )


def autoencoder_prefix(header: Header) -> str | None:
    """The prefix of the autoencoder's tensors; None if the file has none."""
    prefixes = (AUTOENCODER, "vae.")
    return next((prefix for prefix in prefixes if f"{prefix}decoder.conv_in.weight" in header.shapes), None)


def has_tensors(header: Header, prefix: str) -> bool:
    """Whether the file has tensors below a prefix."""
    return any(name.startswith(prefix) for name in header.shapes)


def require_complete(
    header: Header, label: str, *, encoders: Sequence[str], in_channels: int, patch: int, remedy: str
) -> None:
    """Raise `UserError` for a file that lacks a component, is for another task, or has an unsupported quantisation.

    label        what the file holds, for messages
    in_channels  of the transformer: the latents' channels times the `patch` latents in a token
    """
    missing = [ENCODER_LABELS[prefix] for prefix in encoders if not has_tensors(header, prefix)]
    autoencoder = autoencoder_prefix(header)
    if autoencoder is None:
        missing.append("autoencoder (VAE)")
    if missing:
        listed = " and ".join([*[", ".join(missing[:-1])] * (len(missing) > 1), missing[-1]])
        raise UserError(f"{header.path} holds {label} without its {listed}. {remedy}")
    latents = header.shapes[f"{autoencoder}decoder.conv_in.weight"][1] * patch
    if in_channels != latents:
        raise UserError(
            f"{header.path} seems to be a model for another task (its transformer takes {in_channels} channels and a "
            f"latent has {latents}{', as under a map' if in_channels == 2 * latents else ', as for inpainting'}). Name "
            "the model that it was made from."
        )
    refuse_quantized(header)


# Reading ----------------------------------------------------------------------------------------------------


def read_weights(location: Location, prefix: str, dtype: torch.dtype, *, part: str = "") -> dict[str, Tensor]:
    """Read the tensors below `prefix`, without it, as `dtype`; fp8 weights are multiplied by the scale beside them.

    `part` is the component, where it may lie in a file of its own.
    """
    tensors = unscale(read_tensors(location.find_file(part), prefix=prefix)[0])
    return {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in tensors.items()}


def build_network(kind: Any, location: Location, part: str, tensors: dict[str, Tensor]) -> nn.Module:
    """Build a diffusers network from its config with these tensors; `UserError` where they do not fit."""
    with refuse_damaged(location.name, part), without_weights():
        model: nn.Module = kind.from_config(location.config(part))
    in_fp32 = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    tensors = {
        name: tensor.float() if in_fp32 & set(name.split(".")) else tensor for name, tensor in tensors.items()
    }
    try:
        model.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        raise config_mismatch(location, part) from error
    return model


def load_autoencoder(location: Location, dtype: torch.dtype) -> nn.Module:
    """Load the autoencoder, in fp32 where its config says that fp16 overflows."""
    prefix = autoencoder_prefix(read_header(location.source))
    assert prefix is not None
    dtype = loading.autoencoder_dtype(location, dtype)
    model = load_single_file_part(AutoencoderKL, location, "vae", prefix=prefix, dtype=dtype)
    return model.to(memory_format=torch.channels_last)  # type: ignore[no-any-return]


def load_clip(
    kind: Any, location: Location, number: str, tensors: dict[str, Tensor], *, pads_with: str
) -> TextEncoderSlot:
    """Load a CLIP text encoder in fp32 with its tokenizer; `tensors` as `read_weights` returns them."""
    renamed = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    return build_clip(kind, location, number, renamed, pads_with=pads_with)


def load_t5(location: Location, number: str, dtype: torch.dtype) -> TextEncoderSlot:
    """Load T5 in `dtype` from a file of all components, with the tokenizer that lies beside it."""
    return load_t5_below(T5, location, number, dtype)


def load_t5_below(prefix: str, location: Location, number: str, dtype: torch.dtype) -> TextEncoderSlot:
    """Load T5 in `dtype` from the tensors below `prefix`, with the tokenizer that lies beside the file.

    Raises `UserError` where the tokenizer is missing, or the tensors do not fit the encoder's config.
    """
    part = f"text_encoder{number}"
    with refuse_damaged(location.name, part):
        config = T5Config.from_dict(location.config(part))
    tokenizer = load_t5_tokenizer(location, number, config.vocab_size)
    tensors = read_weights(location, prefix, dtype, part=part)
    if prefix == "":  # a file of its own may hold more
        tensors = {
            name: value
            for name, value in tensors.items()
            if name in (SHARED, TIED) or name.startswith("encoder.")
        }
    table = tensors.get(SHARED, tensors.get(TIED, torch.empty(0)))
    tensors = {SHARED: table, TIED: table} | tensors
    with refuse_damaged(location.name, part), without_weights():
        expected = T5EncoderModel(config).state_dict()
    if {name: value.shape for name, value in tensors.items()} != {
        name: value.shape for name, value in expected.items()
    }:
        raise config_mismatch(location, part)
    transformers_logging.disable_progress_bar()
    model = T5EncoderModel.from_pretrained(None, config=config, state_dict=tensors, dtype=dtype)
    return TextEncoderSlot(part, tokenizer, model)


def load_t5_tokenizer(location: Location, number: str, vocab_size: int) -> Any:
    """Load T5's tokenizer from beside the file; `UserError` if there is none or it exceeds `vocab_size` tokens."""
    name = f"tokenizer{number}"
    folder = location.local(name)
    if folder is None:
        raise UserError(
            f"{location.source} carries no tokenizer for its T5, as no checkpoint does. "
            f"Put the {name}/ folder of this model (with its tokenizer.json) beside the file."
        )
    try:
        with refuse_damaged(str(location.source), name):
            tokenizer = T5Tokenizer.from_pretrained(str(folder), local_files_only=True)
    except UserError as error:
        raise UserError(
            f"{folder} is not a whole T5 tokenizer. {error} "
            "If it is a spiece.model alone, run: pip install sentencepiece protobuf"
        ) from error
    if len(tokenizer) > vocab_size:
        raise UserError(
            f"The {name} has {len(tokenizer)} tokens and {location.source} knows {vocab_size}. "
            f"Put the {name}/ folder of this model beside the file."
        )
    return tokenizer
