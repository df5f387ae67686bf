"""What families share: loading the parts of a diffusers folder or hub id, reading prompts, both kinds of noise path."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import CLIPTokenizer, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from backbone.diffusion.noise import Kind, Ladder, vp
from backbone.diffusion.schedules import (
    alphas_cumprod,
    flow_ladder,
    flow_levels,
    vp_ladder,
    zero_terminal_snr,
)
from backbone.families.base import NoisePath, TextEncoderSlot
from backbone.families.location import Location
from backbone.io.console import UserError, notify
from backbone.io.files import read_header, read_tensors

UNSUPPORTED_FLOW_SETTINGS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("invert_sigmas", "shift_terminal", "stochastic_sampling"),
)
WEIGHTS = "diffusion_pytorch_model.safetensors"
CHUNK_ELEMENTS = 2**25  # entries: 128 MiB in fp32
FLOW_QUANTILES = 1000  # of a continuous density: so many quantiles stand for it

# Loading ----------------------------------------------------------------------------------------------------


def load_pretrained(kind: Any, location: Location, part: str, **options: Any) -> Any:
    """One part of a diffusers folder or hub id, safetensors only; `UserError` where it is missing or damaged."""
    folder = location.folder
    if folder is not None and not (folder / part).is_dir():
        raise UserError(
            f"{folder} has no folder {part}/, so it is not a whole model. Save or download it again."
        )
    if issubclass(kind, nn.Module):
        options |= {"use_safetensors": True}
    transformers_logging.disable_progress_bar()
    try:
        return kind.from_pretrained(
            location.source, subfolder=part, local_files_only=folder is not None, **options
        )
    except OSError as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"The {part} of {location.name} could not be loaded ({first}). Check the model."
        ) from error


def load_network(
    kind: Any,
    location: Location,
    part: str,
    dtype: torch.dtype,
    memory_format: torch.memory_format = torch.preserve_format,
) -> nn.Module:
    """A denoiser or an autoencoder; `UserError` where the part is one of another class."""
    found = location.config(part).get("_class_name", kind.__name__)
    if found not in (
        kind.__name__,
        "Transformer2DModel",
    ):  # as the first transformers of diffusers were all called
        raise UserError(
            f"The {part} of {location.name} is a {found}, and a {kind.__name__} is needed. "
            "Name a whole model of one family."
        )
    network = load_casting(kind, location, part, dtype, memory_format)
    if network is None:
        network = cast(nn.Module, load_pretrained(kind, location, part, torch_dtype=dtype))
        if memory_format is not torch.preserve_format:
            network = network.to(memory_format=memory_format)  # type: ignore[call-overload]
    return network


def load_casting(
    kind: Any, location: Location, part: str, dtype: torch.dtype, memory_format: torch.memory_format
) -> nn.Module | None:
    """A network whose weights are cast as they are read, some at a time; None where that is not so simple.

    Read as a whole, the file would be in memory beside its copy. A part that keeps some weights in fp32, has several
    files or names its tensors in an older way is left to diffusers.
    """
    file = location.local(f"{part}/{WEIGHTS}")
    if file is None or getattr(kind, "_keep_in_fp32_modules", None):
        return None
    with init_empty_weights():
        network = cast(nn.Module, kind.from_config(location.config(part)))
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if read_header(file).shapes != shapes:
        return None
    for names in _split_by_size(shapes):
        tensors, _ = read_tensors(file, names=names)
        for name, tensor in tensors.items():
            tensors[name] = tensor.to(
                dtype if tensor.is_floating_point() else tensor.dtype,
                memory_format=memory_format if tensor.ndim == 4 else torch.preserve_format,
            )
        network.load_state_dict(tensors, strict=False, assign=True)
        del tensor, tensors  # and with them what was read of the file
    return network.eval()


def _split_by_size(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[list[str]]:
    """Names of tensors with PORTION entries together, or of one that has more."""
    names: list[str] = []
    entries = 0
    for name, shape in shapes.items():
        entries += math.prod(shape)
        names.append(name)
        if entries >= CHUNK_ELEMENTS:
            yield names
            names, entries = [], 0
    yield names


def load_autoencoder(kind: Any, location: Location, dtype: torch.dtype) -> nn.Module:
    """The autoencoder, in fp32 where its settings say that fp16 overflows."""
    return load_network(kind, location, "vae", autoencoder_dtype(location, dtype), torch.channels_last)


def autoencoder_dtype(location: Location, dtype: torch.dtype) -> torch.dtype:
    """The working precision, or fp32 where the autoencoder's settings say that fp16 overflows."""
    overflows = dtype is torch.float16 and location.config("vae").get("force_upcast", True)
    return torch.float32 if overflows else dtype


def has_part(location: Location, part: str) -> bool:
    """Whether the model's index names this part, for parts that a model may lack."""
    entry = location.index.get(part)
    return entry is not None and entry[0] is not None


def load_clip(kind: Any, location: Location, number: str = "") -> TextEncoderSlot:
    """A CLIP text encoder and its tokenizer, `text_encoder_2` and `tokenizer_2` for the number "_2"; fp32."""
    tokenizer = load_pretrained(CLIPTokenizer, location, f"tokenizer{number}")
    model = load_pretrained(kind, location, f"text_encoder{number}", dtype=torch.float32)
    set_eos_token(model, tokenizer)
    return TextEncoderSlot(f"text_encoder{number}", tokenizer, model)


def set_eos_token(model: Any, tokenizer: Any) -> None:
    """Tells a CLIP its tokenizer's end, where old settings say 2: transformers then takes the highest id for it."""
    inner = getattr(model, "text_model", model)
    if inner.eos_token_id == 2:
        inner.eos_token_id = tokenizer.eos_token_id


def load_t5(location: Location, number: str, dtype: torch.dtype) -> TextEncoderSlot:
    """A T5 text encoder and its tokenizer. Being large it is in the working precision."""
    try:
        tokenizer = load_pretrained(T5Tokenizer, location, f"tokenizer{number}")
    except (ValueError, ImportError) as error:
        raise UserError(
            f"The tokenizer{number} of {location.name} could not be read ({str(error).splitlines()[0]}). "
            "If it is a spiece.model alone, run: pip install sentencepiece protobuf"
        ) from error
    return TextEncoderSlot(
        f"text_encoder{number}",
        tokenizer,
        load_pretrained(T5EncoderModel, location, f"text_encoder{number}", dtype=dtype),
    )


# Attention --------------------------------------------------------------------------------------------------


def project_qkv(attn: Any, hidden: Tensor) -> list[Tensor]:
    """Queries, keys and values [B, heads, tokens, D] of the picture's tokens [B, tokens, C], or of a whole sequence."""
    return [
        _apply_norm(attn.norm_q, _split_heads(attn.to_q(hidden), attn.heads)),
        _apply_norm(attn.norm_k, _split_heads(attn.to_k(hidden), attn.heads)),
        _split_heads(attn.to_v(hidden), attn.heads),
    ]


def project_text_qkv(attn: Any, said: Tensor) -> list[Tensor]:
    """The same of the text's tokens, which have weights of their own."""
    return [
        _apply_norm(attn.norm_added_q, _split_heads(attn.add_q_proj(said), attn.heads)),
        _apply_norm(attn.norm_added_k, _split_heads(attn.add_k_proj(said), attn.heads)),
        _split_heads(attn.add_v_proj(said), attn.heads),
    ]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return cast(Tensor, x.unflatten(-1, (heads, -1)).transpose(1, 2))


def _apply_norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else cast(Tensor, norm(x))


def later_half_prefixes(blocks: nn.ModuleList, name: str) -> tuple[str, ...]:
    """How the names of the layers in the later half of equal blocks begin."""
    return tuple(f"{name}.{number}." for number in range(len(blocks) // 2, len(blocks)))


# Prompts ----------------------------------------------------------------------------------------------------


class MultiTextEncoder:
    """The text side of a family with several encoders: see `TextEncoder`. Those in `silent` learn nothing."""

    def __init__(self, slots: Sequence[TextEncoderSlot], frozen: Sequence[TextEncoderSlot] = ()) -> None:
        self.slots = tuple(slots)
        self.all_slots = (*slots, *frozen)
        self.tokenizer = self.slots[0].tokenizer
        for side in self.all_slots:
            side.model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Any:
        for side in self.all_slots:
            side.model.to(device)
        return self


def tokenize(side: TextEncoderSlot, prompts: Sequence[str], length: int | None = None) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], cut or padded to the length that the encoder reads."""
    encoded = side.tokenizer(
        list(prompts),
        padding="max_length",
        truncation=True,
        max_length=length or side.tokenizer.model_max_length,
        return_tensors="pt",
    )
    device = side.model.device
    return {name: encoded[name].to(device) for name in ("input_ids", "attention_mask")}


def warn_truncation(side: TextEncoderSlot, prompts: Sequence[str], length: int | None = None) -> None:
    """Says of every prompt that is too long for an encoder what will not be seen, once."""
    length = length or side.tokenizer.model_max_length
    for prompt in prompts:
        tokens = side.tokenizer(prompt, verbose=False)["input_ids"]
        if len(tokens) > length:
            lost = side.tokenizer.decode(tokens[length - 1 : -1])
            _notify_once(
                f"The prompt has {len(tokens)} tokens and this model reads {length}: it will not see “{lost}”."
            )


@cache
def _notify_once(text: str) -> None:
    notify(text)


# Noise paths ------------------------------------------------------------------------------------------------


def vp_path(location: Location) -> NoisePath:
    """The path of a model that was trained on a schedule of βs, from the settings of its scheduler.

    Schedulers that walk in σ (Euler's, DPM-Solver …) end at σ = 0 whatever `set_alpha_to_one` says.
    """
    from diffusers import DDIMScheduler

    said = location.config("scheduler")
    name = said.get("_class_name", "")
    if "FlowMatch" in name or name.startswith("EDM"):
        raise UserError(
            f"The scheduler of {location.name} is a {name}, which is not of its family. Restore scheduler/."
        )
    config = dict(DDIMScheduler.from_config(said).config)
    train_steps = int(config["num_train_timesteps"])
    alpha_bar = alphas_cumprod(config["beta_schedule"], config["beta_start"], config["beta_end"], train_steps)
    if config["rescale_betas_zero_snr"]:
        alpha_bar = zero_terminal_snr(alpha_bar)
    by_alpha = name in ("", "DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
    final = "one" if config["set_alpha_to_one"] or not by_alpha else "first"

    def ladder(steps: int, size: tuple[int, int]) -> Ladder:
        return vp_ladder(
            alpha_bar,
            steps,
            spacing=config["timestep_spacing"],
            steps_offset=config["steps_offset"],
            final=final,  # type: ignore[arg-type]
        )

    kind = cast(Kind, config["prediction_type"])
    return NoisePath(kind, vp(alpha_bar, torch.arange(train_steps)), ladder)


def flow_path(
    location: Location,
    *,
    size: tuple[int, int],
    patch: int = 2,
    lowest: Callable[[int], float] | None = None,
) -> NoisePath:
    """The path of a rectified flow, from the settings of its FlowMatchEulerDiscreteScheduler.

    `size` (H, W) is that of the model's own latents and `patch` × `patch` of them are a token: where the settings ask
    for dynamic shifting, the shift follows from the number of tokens. `lowest(S)` is the last rung above 0 before
    shifting, the scheduler's own if left out.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    said = location.config("scheduler")
    name = said.get("_class_name", "")
    config = dict(FlowMatchEulerDiscreteScheduler.from_config(said).config) if "FlowMatch" in name else {}
    strange = [setting for setting in UNSUPPORTED_FLOW_SETTINGS if config.get(setting)]
    if not config or strange or config["time_shift_type"] != "exponential":
        what = ", ".join(strange) or config.get("time_shift_type") or name or "of unknown kind"
        raise UserError(
            f"The scheduler of {location.name} ({what}) is not the FlowMatchEulerDiscreteScheduler that this family "
            "was published with. Restore scheduler/."
        )
    train_steps = int(config["num_train_timesteps"])

    def dynamic(size: tuple[int, int]) -> float | None:
        """log of the shift for latents of this size; None where the shift is the same for all."""
        if not config["use_dynamic_shifting"]:
            return None
        tokens = (size[0] // patch) * (size[1] // patch)
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (many - few)
        return float(config["base_shift"] + slope * (tokens - few))

    def ladder(steps: int, size: tuple[int, int]) -> Ladder:
        return flow_ladder(
            steps,
            config["shift"],
            mu=dynamic(size),
            lowest=lowest(steps) if lowest else None,
            train_steps=train_steps,
        )

    mu = dynamic(size)
    shift = float(config["shift"]) if mu is None else math.exp(mu)
    return NoisePath("flow", flow_levels(FLOW_QUANTILES, shift, train_steps=train_steps), ladder)
