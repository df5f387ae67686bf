"""Loading components of a diffusers folder or hub id: networks, autoencoders, text encoders; safetensors only."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.utils import logging as diffusers_logging
from torch import nn
from transformers.utils import logging as transformers_logging

from backbone.families.base import TextEncoderSlot
from backbone.families.components.empty import without_weights
from backbone.families.components.latents import has_frames
from backbone.families.location import Location
from backbone.io.console import UserError
from backbone.io.files import read_tensors
from backbone.io.records import parse_json
from backbone.io.weights import (
    LOADERS,
    find_variant,
    load_whole,
    read_weights_header,
    refuse_damaged,
    refuse_two_sets,
    silence_warnings,
)

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHUNK_ELEMENTS = 2**25  # 128 MiB in fp32


def load_pretrained(kind: Any, location: Location, part: str, **options: Any) -> Any:
    """Load one component of a diffusers folder or hub id, safetensors only; `UserError` if it is missing or damaged."""
    folder = location.folder
    if folder is not None and not (folder / part).is_dir():
        raise UserError(
            f"{folder} has no folder {part}/, so it is not a whole model. Save or download it again."
        )
    is_network = issubclass(kind, nn.Module)
    if is_network:
        location.refuse_foreign_weights(part)
        location.config(part)
        variant = None if folder is None else find_variant(folder / part)
        options |= {"use_safetensors": True, "output_loading_info": True, "variant": variant}
    elif folder is not None:
        if part.startswith("tokenizer") and not (folder / part / TOKENIZER_CONFIG).is_file():
            raise UserError(
                f"{folder / part} lacks {TOKENIZER_CONFIG}, which says how prompts are padded. Restore it, or "
                "download the model again."
            )
        for path in (folder / part).glob("[!.]*.json"):
            parse_json(path.read_bytes(), path)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    load = partial(
        kind.from_pretrained,
        location.source,
        subfolder=part,
        local_files_only=folder is not None,
        revision=location.revision,
        **options,
    )
    if is_network:
        return load_whole(load, location.name, part)
    with refuse_damaged(location.name, part), silence_warnings(*LOADERS):
        return load()


def load_network(
    kind: Any,
    location: Location,
    part: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.preserve_format,
) -> nn.Module:
    """Load a denoiser or autoencoder; `UserError` if the component is of another class."""
    config = location.config(part)
    class_name = config.get("_class_name", kind.__name__)
    # Old configs of any transformer say Transformer2DModel
    if class_name not in (kind.__name__, "Transformer2DModel"):
        raise UserError(
            f"The {part} of {location.name} is a {class_name}, and a {kind.__name__} is needed. "
            "Name a whole model of one family."
        )
    config.refuse_other_kinds(kind)
    if location.folder is not None:
        refuse_two_sets(location.folder / part)
    network = load_casting(kind, location, part, dtype, memory_format)
    if network is None:
        network = cast(nn.Module, load_pretrained(kind, location, part, torch_dtype=dtype))
        if memory_format is not torch.preserve_format:
            network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
    return network


def load_casting(
    kind: Any, location: Location, part: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> nn.Module | None:
    """Load a network in chunks, casting each to `dtype` as it is read; None where diffusers must load it.

    Read at once, the file would be in memory beside its copy. Networks with several files or older tensor names are
    left to diffusers. What a network keeps in fp32 stays in fp32. Raises `UserError` for a damaged file.
    """
    file = location.local(f"{part}/{WEIGHTS}")
    if file is None:
        return None
    in_fp32 = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    try:
        with refuse_damaged(location.name, part), without_weights():
            network = cast(nn.Module, kind.from_config(location.config(part)))
    except RuntimeError as error:  # nothing was read yet, and one layer is made at a time
        raise UserError(
            f"One layer of the {part} of {location.name} is larger than the memory. Restore its config.json, or take a "
            "larger machine."
        ) from error
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if read_weights_header(file).shapes != shapes:
        return None
    fill_casting(
        network, file, {name: name for name in shapes}, dtype, in_fp32=in_fp32, memory_format=memory_format
    )
    return network.eval()


def fill_casting(
    network: nn.Module,
    file: Path,
    stored: Mapping[str, str],
    dtype: torch.dtype,
    *,
    in_fp32: Collection[str] = (),
    memory_format: torch.memory_format = torch.preserve_format,
) -> None:
    """Read a file in chunks into a network on `meta`, casting each to `dtype`, modules of `in_fp32` to fp32.

    `stored` maps the network's names to the file's; the two tensors have as many elements.
    """
    shapes = {name: value.shape for name, value in network.state_dict().items() if name in stored}
    for names in _split_by_size(shapes):
        chunk, _ = read_tensors(file, names={stored[name] for name in names})
        tensors = {}
        for name in names:
            tensor = chunk[stored[name]].reshape(shapes[name])
            floating_dtype = torch.float32 if set(in_fp32) & set(name.split(".")) else dtype
            tensors[name] = tensor.to(
                floating_dtype if tensor.is_floating_point() else tensor.dtype,
                memory_format=memory_format if tensor.ndim == 4 else torch.preserve_format,
            )
        network.load_state_dict(tensors, strict=False, assign=True)
        del tensor, tensors, chunk  # frees what was read from the file


def _split_by_size(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Yield lists of tensor names that together have about CHUNK_ELEMENTS elements."""
    names: list[str] = []
    elements = 0
    for name, shape in shapes.items():
        elements += math.prod(shape)
        names.append(name)
        if elements >= CHUNK_ELEMENTS:
            yield names
            names, elements = [], 0
    yield names


def load_autoencoder(kind: Any, location: Location, dtype: torch.dtype) -> nn.Module:
    """Load the autoencoder, in fp32 where its config says that fp16 overflows."""
    layout = torch.preserve_format if has_frames(location.config("vae")) else torch.channels_last
    return load_network(kind, location, "vae", autoencoder_dtype(location, dtype), layout)


def autoencoder_dtype(location: Location, dtype: torch.dtype) -> torch.dtype:
    """`dtype`, or fp32 where the autoencoder's config says that fp16 overflows (`force_upcast`)."""
    overflows = dtype is torch.float16 and location.config("vae").get("force_upcast", True)
    return torch.float32 if overflows else dtype


def refuse_not_finite(network: nn.Module, part: str, name: str) -> None:
    """`UserError` for a weight that is infinite or NaN.

    Most of them lead to images of NaN, but attention on a CPU turns some into zeros and draws an image.
    """
    for key, weight in network.named_parameters():
        # The minimum and the maximum take a twentieth of the time of `isfinite` on every value
        if weight.is_meta or not weight.numel() or not weight.dtype.is_floating_point or weight.itemsize < 2:
            continue
        if all(bool(end.isfinite()) for end in torch.aminmax(weight.detach())):
            continue
        half = weight.dtype is torch.float16
        raise UserError(
            f"The {part} of {name} holds values that are not finite numbers ({key}). "
            + ("In fp16 the largest is 65504: give --precision bf16 or fp32, or d" if half else "D")
            + "ownload the model again."
        )


def has_part(location: Location, part: str) -> bool:
    """Whether model_index.json lists an optional component."""
    entry = location.index.get(part)
    return entry is not None and entry[0] is not None


def load_clip(kind: Any, location: Location, number: str = "") -> TextEncoderSlot:
    """Load a CLIP text encoder in fp32 with its tokenizer; number "_2" means `text_encoder_2` and `tokenizer_2`."""
    from transformers import CLIPTokenizer  # slow to import, as every model of transformers

    tokenizer = load_pretrained(CLIPTokenizer, location, f"tokenizer{number}")
    model = load_pretrained(kind, location, f"text_encoder{number}", dtype=torch.float32)
    set_eos_token(model, tokenizer)
    return TextEncoderSlot(f"text_encoder{number}", tokenizer, model)


def set_eos_token(model: Any, tokenizer: Any) -> None:
    """Give a CLIP its tokenizer's end token where its config has none, or an old one 2.

    Of 2 transformers would pool at the highest id.
    """
    inner = getattr(model, "text_model", model)
    if inner.eos_token_id == 2 or not isinstance(inner.eos_token_id, int):
        inner.eos_token_id = tokenizer.eos_token_id


def load_t5(location: Location, number: str, dtype: torch.dtype) -> TextEncoderSlot:
    """Load a T5 text encoder in `dtype` with its tokenizer; `UserError` as `load_pretrained`."""
    from transformers import T5EncoderModel, T5Tokenizer

    try:
        tokenizer = load_pretrained(T5Tokenizer, location, f"tokenizer{number}")
    except UserError as error:
        raise UserError(
            f"{error} If it is a spiece.model alone, run: pip install sentencepiece protobuf"
        ) from error
    return TextEncoderSlot(
        f"text_encoder{number}",
        tokenizer,
        load_pretrained(T5EncoderModel, location, f"text_encoder{number}", dtype=dtype),
    )
