"""Shared by families: loading components of a diffusers folder or hub id, joint attention, tokenising, noise paths."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from backbone.diffusion.noise import PredictionType, Schedule, vp
from backbone.diffusion.schedules import (
    DISTILLED,
    Spacing,
    alphas_cumprod,
    flow_schedule,
    logit_normal_levels,
    vp_schedule,
    zero_terminal_snr,
)
from backbone.diffusion.transfer import send
from backbone.families.base import NoisePath, TextEncoderSlot
from backbone.families.components.empty import without_weights
from backbone.families.components.latents import has_frames
from backbone.families.location import Location
from backbone.io.console import UserError, notify_once
from backbone.io.files import read_header, read_tensors
from backbone.io.records import parse_json
from backbone.io.weights import refuse_damaged, refuse_missing

UNSUPPORTED_FLOW_SETTINGS = (
    *("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas"),
    *("invert_sigmas", "stochastic_sampling"),
)
VP_SETTINGS: Mapping[str, tuple[str, ...]] = {  # of a β scheduler, diffusers' default first
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "prediction_type": ("epsilon", "sample", "v_prediction"),
}
WEIGHTS = "diffusion_pytorch_model.safetensors"
CHUNK_ELEMENTS = 2**25  # 128 MiB in fp32
FLOW_QUANTILES = 1000  # quantiles that stand for a flow's continuous density of levels

# Loading ----------------------------------------------------------------------------------------------------


def load_pretrained(kind: Any, location: Location, part: str, **options: Any) -> Any:
    """Load one component of a diffusers folder or hub id, safetensors only; `UserError` if it is missing or damaged."""
    folder = location.folder
    if folder is not None and not (folder / part).is_dir():
        raise UserError(
            f"{folder} has no folder {part}/, so it is not a whole model. Save or download it again."
        )
    network = issubclass(kind, nn.Module)
    if network:
        location.refuse_foreign_weights(part)
        location.config(part)
        options |= {"use_safetensors": True, "output_loading_info": True}
    elif folder is not None:
        for path in (folder / part).glob("*.json"):
            parse_json(path.read_bytes(), path)
    transformers_logging.disable_progress_bar()
    with refuse_damaged(location.name, part):
        loaded = kind.from_pretrained(
            location.source,
            subfolder=part,
            local_files_only=folder is not None,
            revision=location.revision,
            **options,
        )
    return refuse_missing(loaded[0], loaded[1], location.name, part) if network else loaded


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
    # The latter in old configs of any transformer
    if class_name not in (kind.__name__, "Transformer2DModel"):
        raise UserError(
            f"The {part} of {location.name} is a {class_name}, and a {kind.__name__} is needed. "
            "Name a whole model of one family."
        )
    config.refuse_other_kinds(kind)
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

    Read whole, the file would be in memory beside its copy. Networks that have several files or older tensor names are
    left to diffusers. What a network keeps in fp32 stays there.
    """
    file = location.local(f"{part}/{WEIGHTS}")
    if file is None:
        return None
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    try:
        with refuse_damaged(location.name, part), without_weights():
            network = cast(nn.Module, kind.from_config(location.config(part)))
    except RuntimeError as error:  # nothing was read yet, and one layer is made at a time
        raise UserError(
            f"One layer of the {part} of {location.name} is larger than the memory. Restore its config.json, or take a "
            "larger machine."
        ) from error
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    if read_header(file).shapes != shapes:
        return None
    fill_casting(
        network, file, {name: name for name in shapes}, dtype, kept=kept, memory_format=memory_format
    )
    return network.eval()


def fill_casting(
    network: nn.Module,
    file: Path,
    stored: Mapping[str, str],
    dtype: torch.dtype,
    *,
    kept: Collection[str] = (),
    memory_format: torch.memory_format = torch.preserve_format,
) -> None:
    """Read a file in chunks into a network on `meta`, casting each to `dtype`; what is `kept` stays in fp32.

    `stored` are the network's names and those in the file, of tensors of as many numbers.
    """
    shapes = {name: value.shape for name, value in network.state_dict().items() if name in stored}
    for names in _split_by_size(shapes):
        found, _ = read_tensors(file, names={stored[name] for name in names})
        tensors = {}
        for name in names:
            tensor = found[stored[name]].reshape(shapes[name])
            lower = torch.float32 if set(kept) & set(name.split(".")) else dtype
            tensors[name] = tensor.to(
                lower if tensor.is_floating_point() else tensor.dtype,
                memory_format=memory_format if tensor.ndim == 4 else torch.preserve_format,
            )
        network.load_state_dict(tensors, strict=False, assign=True)
        del tensor, tensors, found  # frees what was read of the file


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
    """Give a CLIP its tokenizer's end token where an old config has 2: transformers would pool at the highest id."""
    inner = getattr(model, "text_model", model)
    if inner.eos_token_id == 2:
        inner.eos_token_id = tokenizer.eos_token_id


def load_t5(location: Location, number: str, dtype: torch.dtype) -> TextEncoderSlot:
    """Load a T5 text encoder in `dtype` with its tokenizer."""
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


# Attention --------------------------------------------------------------------------------------------------


def project_qkv(attn: Any, hidden: Tensor) -> list[Tensor]:
    """Query, key and value [B, heads, tokens, D] of image tokens [B, tokens, C], or of a whole sequence."""
    return [
        _apply_norm(attn.norm_q, _split_heads(attn.to_q(hidden), attn.heads)),
        _apply_norm(attn.norm_k, _split_heads(attn.to_k(hidden), attn.heads)),
        _split_heads(attn.to_v(hidden), attn.heads),
    ]


def project_text_qkv(attn: Any, hidden: Tensor) -> list[Tensor]:
    """Query, key and value of text tokens [B, tokens, C], by the layer's separate text projections."""
    return [
        _apply_norm(attn.norm_added_q, _split_heads(attn.add_q_proj(hidden), attn.heads)),
        _apply_norm(attn.norm_added_k, _split_heads(attn.add_k_proj(hidden), attn.heads)),
        _split_heads(attn.add_v_proj(hidden), attn.heads),
    ]


def _split_heads(x: Tensor, heads: int) -> Tensor:
    return cast(Tensor, x.unflatten(-1, (heads, -1)).transpose(1, 2))


def _apply_norm(norm: nn.Module | None, x: Tensor) -> Tensor:
    return x if norm is None else cast(Tensor, norm(x))


def later_half_prefixes(blocks: nn.ModuleList, name: str) -> tuple[str, ...]:
    """Name prefixes of the later half of a list of equal blocks."""
    return tuple(f"{name}.{number}." for number in range(len(blocks) // 2, len(blocks)))


# Prompts ----------------------------------------------------------------------------------------------------


class MultiTextEncoder:
    """Several text encoders as one `TextEncoder`; those in `frozen` neither learn tokens nor carry adapters."""

    def __init__(self, slots: Sequence[TextEncoderSlot], frozen: Sequence[TextEncoderSlot] = ()) -> None:
        self.slots = tuple(slots)
        self.all_slots = (*slots, *frozen)
        self.tokenizer = self.slots[0].tokenizer
        for slot in self.all_slots:
            fit_tokenizer(slot)
            slot.model.eval().requires_grad_(False)

    def to(self, device: torch.device) -> Any:
        for slot in self.all_slots:
            slot.model.to(device)
        return self


def fit_tokenizer(slot: TextEncoderSlot) -> None:
    """Let a tokenizer give no more tokens than its encoder has positions: a config may say more, or nothing.

    Raises `UserError` for a length that holds no word, and for special tokens that the encoder has no embedding of.
    """
    length, where = slot.tokenizer.model_max_length, f"The tokenizer of {slot.name}"
    remedy = "Restore its tokenizer_config.json, or download the model again."
    if not isinstance(length, int) or length < 3:
        raise UserError(f"{where} says model_max_length {length}, which holds no prompt. {remedy}")
    embeddings = slot.model.get_input_embeddings().weight.shape[0]
    for number, token in zip(slot.tokenizer.all_special_ids, slot.tokenizer.all_special_tokens, strict=True):
        if number >= embeddings:
            raise UserError(
                f"{where} has the token {token}, and the encoder has no embedding of it. {remedy}"
            )
    slot.tokenizer.model_max_length = min(
        length, getattr(slot.model.config, "max_position_embeddings", length)
    )


def tokenize(
    slot: TextEncoderSlot,
    prompts: Sequence[str],
    length: int | None = None,
    *,
    padding: Literal["max_length", "longest"] = "max_length",
    special: bool = True,
) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` [B, T], truncated to `length` (the tokenizer's own if None) and padded.

    Padded to `length`, or to the longest of the prompts. The tokenizer's `special` tokens stand around each, unless a
    template says them.
    """
    refuse_half_characters(prompts)
    encoded = slot.tokenizer(
        list(prompts),
        padding=padding,
        truncation=True,
        max_length=length or slot.tokenizer.model_max_length,
        add_special_tokens=special,
        return_tensors="pt",
    )
    device = slot.model.device
    return {name: send(encoded[name], device) for name in ("input_ids", "attention_mask")}


def refuse_half_characters(prompts: Sequence[str]) -> None:
    """`UserError` for words that are no text in UTF-8, as a terminal of another encoding sends them."""
    for prompt in prompts:
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"The prompt {prompt[:60]!r} is no text in UTF-8. Write it anew.") from error


def warn_truncation(slot: TextEncoderSlot, prompts: Sequence[str], length: int | None = None) -> None:
    """Warn of each prompt that is longer than the encoder reads, once per prompt, quoting what is dropped."""
    refuse_half_characters(prompts)
    length = length or slot.tokenizer.model_max_length
    for prompt in prompts:
        tokens = slot.tokenizer(prompt, verbose=False)["input_ids"]
        if len(tokens) > length:
            dropped = slot.tokenizer.decode(tokens[length - 1 : -1])
            notify_once(
                f"The prompt has {len(tokens)} tokens and this model reads {length}: it will not see “{dropped}”."
            )


# Noise paths ------------------------------------------------------------------------------------------------


def vp_path(location: Location) -> NoisePath:
    """The noise path of a model trained on a β schedule, from its scheduler's config.

    Schedulers that sample in σ (Euler, DPM-Solver …) end at σ = 0 whatever `set_alpha_to_one` says.
    """
    from diffusers import DDIMScheduler

    scheduler = location.config("scheduler")
    name = scheduler.get("_class_name", "")
    if "FlowMatch" in name or name.startswith("EDM"):
        raise UserError(
            f"The scheduler of {location.name} is a {name}, which is not of its family. Restore scheduler/."
        )
    for setting, known in VP_SETTINGS.items():
        if scheduler.get(setting, known[0]) not in known:
            raise UserError(
                f"The scheduler of {location.name} has {setting} {scheduler[setting]!r}, and understood are "
                f"{', '.join(known)}. Restore scheduler/."
            )
    with refuse_damaged(location.name, "scheduler"):
        config = dict(DDIMScheduler.from_config(scheduler).config)
    alpha_bar = _read_alphas_cumprod(location.name, config)
    by_alpha = name in ("", "DDIMScheduler", "PNDMScheduler", "DDPMScheduler")
    final: Literal["one", "first"] = "one" if config["set_alpha_to_one"] or not by_alpha else "first"

    def schedule(steps: int, size: tuple[int, int]) -> Schedule:
        # Of a leading spacing a single step is the cleanest, which samples nothing: it begins at the end instead
        spacing: Spacing = "trailing" if steps == 1 else config["timestep_spacing"]
        if name == "LCMScheduler":
            spacing = "distilled"
            if steps > DISTILLED:
                raise UserError(f"{location.name} is drawn with in 1 to {DISTILLED} steps, not {steps}.")
        offset = int(config["steps_offset"])
        return vp_schedule(alpha_bar, steps, spacing=spacing, steps_offset=offset, final=final)

    kind = cast(PredictionType, config["prediction_type"])
    return NoisePath(kind, vp(alpha_bar, torch.arange(len(alpha_bar))), schedule)


def _read_alphas_cumprod(name: str, config: Mapping[str, Any]) -> Tensor:
    """ᾱ [train steps] of a β scheduler's config, from its own `trained_betas` where it has them.

    Raises `UserError` for betas of another number, and for a last level without signal at which ε is predicted.
    """
    train_steps, betas = int(config["num_train_timesteps"]), config["trained_betas"]
    if betas is None:
        alpha_bar = alphas_cumprod(
            config["beta_schedule"], config["beta_start"], config["beta_end"], train_steps
        )
    else:
        alpha_bar = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float32), 0)
        if len(alpha_bar) != train_steps:
            raise UserError(
                f"The scheduler of {name} has {len(alpha_bar)} trained_betas for {train_steps} num_train_timesteps. "
                "Restore scheduler/."
            )
    if config["rescale_betas_zero_snr"]:
        alpha_bar = zero_terminal_snr(alpha_bar)
    if config["prediction_type"] == "epsilon" and not alpha_bar[-1] > 0:
        raise UserError(
            f"The scheduler of {name} ends in noise alone (rescale_betas_zero_snr), where a prediction of ε says "
            "nothing of the image. In scheduler/ set prediction_type to v_prediction if the model was trained so, else "
            "rescale_betas_zero_snr to false."
        )
    return alpha_bar


def flow_path(
    location: Location,
    *,
    size: tuple[int, int],
    patch: int = 2,
    lowest: Callable[[int], float] | None = None,
    shift: Callable[..., float] | None = None,
) -> NoisePath:
    """The noise path of a rectified flow, from its FlowMatchEulerDiscreteScheduler's config.

    `size` (H, W) is that of the model's own latents, of which `patch` × `patch` make a token: dynamic shifting depends
    on the number of tokens. `lowest(S)` is the last level above 0 before shifting; None takes the scheduler's own.
    `shift(tokens, S)` is the log of the dynamic shift, and of training's without S; None takes the scheduler's line.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = location.config("scheduler")
    name = scheduler.get("_class_name", "")
    with refuse_damaged(location.name, "scheduler"):
        config = (
            dict(FlowMatchEulerDiscreteScheduler.from_config(scheduler).config) if "FlowMatch" in name else {}
        )
    strange = [setting for setting in UNSUPPORTED_FLOW_SETTINGS if config.get(setting)]
    if not config or strange or config["time_shift_type"] != "exponential":
        what = ", ".join(strange) or config.get("time_shift_type") or name or "of unknown kind"
        raise UserError(
            f"The scheduler of {location.name} ({what}) is not the FlowMatchEulerDiscreteScheduler that this family "
            "was published with. Restore scheduler/."
        )
    train_steps = int(config["num_train_timesteps"])

    def dynamic(size: tuple[int, int], *steps: int) -> float | None:
        """log of the shift for latents of this size, linear in the number of tokens; None without dynamic shifting."""
        if not config["use_dynamic_shifting"]:
            return None
        tokens = (size[0] // patch) * (size[1] // patch)
        if shift is not None:
            return shift(tokens, *steps)
        few, many = config["base_image_seq_len"], config["max_image_seq_len"]
        slope = (config["max_shift"] - config["base_shift"]) / (many - few)
        return float(config["base_shift"] + slope * (tokens - few))

    def schedule(steps: int, size: tuple[int, int]) -> Schedule:
        return flow_schedule(
            steps,
            config["shift"],
            mu=dynamic(size, steps),
            lowest=lowest(steps) if lowest else None,
            terminal=config["shift_terminal"] or None,
            train_steps=train_steps,
        )

    mu = dynamic(size)
    usual = float(config["shift"]) if mu is None else math.exp(mu)
    return NoisePath("flow", logit_normal_levels(FLOW_QUANTILES, usual, train_steps=train_steps), schedule)
