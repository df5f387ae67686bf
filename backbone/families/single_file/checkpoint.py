"""Single-file checkpoints (safetensors) in the layout of the original repositories, as model sites offer them.

Which files belong to a family, and their configs, is in the family's own `checkpoint.py`. Shared here: loading a
component through diffusers' converters, quantised weights, and messages about unknown files.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from backbone.cli.few_step import is_called_turbo
from backbone.families.components.empty import without_weights
from backbone.families.location import Location
from backbone.io.console import UserError, notify, notify_once
from backbone.io.files import Header, read_header, read_tensors
from backbone.io.weights import refuse_damaged, silence_warnings

CONFIG_FILES = (
    *("unet/config.json", "vae/config.json", "text_encoder/config.json", "scheduler/scheduler_config.json"),
    *("tokenizer/tokenizer.json", "tokenizer/tokenizer_config.json", "tokenizer/vocab.json"),
    *("text_encoder_2/config.json", "tokenizer_2/tokenizer.json", "tokenizer_2/tokenizer_config.json"),
    *("text_encoder_3/config.json", "tokenizer_3/tokenizer.json", "tokenizer_3/tokenizer_config.json"),
    *("transformer/config.json", "tokenizer_2/spiece.model", "tokenizer_3/spiece.model"),
    *("tokenizer/merges.txt", "tokenizer/chat_template.jinja", "model_index.json"),
    *("image_encoder/config.json", "feature_extractor/preprocessor_config.json"),
)
EMA = "model_ema.diffusion_model"  # CompVis; names below it have no dots
UNET, AUTOENCODER = "model.diffusion_model.", "first_stage_model."
VELOCITY, ZERO_SNR = "v_pred", "ztsnr"  # tensors by which a UNet's file says how it was trained
# Tensors by which a file says that its noise is no schedule of βs → its model
OTHER_NOISE = {"edm_mean": "Playground 2.5", "edm_vpred.sigma_max": "CosXL"}
VELOCITY_NAME = re.compile(r"(?<![a-z])v[-_ ]?pred", re.IGNORECASE)
SCHEDULER = "scheduler/scheduler_config.json"
# Scales of fp8 weights (of a tensor, or of its rows), in ComfyUI's files of 2024 and of 2025
SCALES = r"\.(scale_weight|weight_scale)$"
BESIDE_SCALES = r"(^|\.)(scale_weight|scale_input|scaled_fp8|weight_scale|input_scale|comfy_quant)$"
OTHER_QUANTIZATION = (  # of bitsandbytes, ModelOpt, DeepSeek's blocks, GPTQ, AWQ and Nunchaku
    r"\.(absmax|quant_map|nested_absmax|weight_scale_2|weight_scale_inv|qweight|qzeros|wscales)$|\.quant_state\."
)
TRAINING_LEFTOVERS = r"^\w+\.(loss|model_ema)\."  # tensors that training left beside an autoencoder
TAKE_FULL_VERSION = "Take the model's full version: one file with UNet, text encoder and autoencoder (VAE)."
NAME_DIFFUSERS_FOLDER = "It is not read from a single file: name the model's diffusers folder or hub id."
UNKNOWN_FILES = (
    (
        r"(\.|_)(lora_(up|down|A|B)|lora\.(up|down)|hada_w[12]|lokr_w[12])",
        "a LoRA or another adapter, which changes a model and is none",
        "Name the model that it was made for.",
    ),
    (r"^control(_model|net_cond_embedding)\.", "a ControlNet", "Name the model that it was made for."),
    (r"^(emb_params|string_to_param|clip_[lg])$", "an embedding", "Name the model that it was made for."),
    (r"motion_modules\.", "an AnimateDiff motion module", "Name the model that it was made for."),
    (r"^conditioner\.embedders\.", "a part of Stable Diffusion XL, or its refiner", NAME_DIFFUSERS_FOLDER),
    (r"joint_blocks\.", "a part of Stable Diffusion 3, or a derivative of it", NAME_DIFFUSERS_FOLDER),
    (
        r"double_blocks\.",
        "a part of FLUX.1, or a derivative of it (like Chroma)",
        "Name a whole FLUX.1, or another model.",
    ),
    (
        r"embed_tokens\.weight$",
        "a text encoder alone",
        "Name the transformer's file with --model, and this one with --text-encoder.",
    ),
    (
        r"^(down_blocks|up_blocks|transformer_blocks|(en|de)coder\.(down|up)_blocks|(text_model\.)?encoder\.layers)\.",
        "one part of a diffusers model",
        "Name the folder above, the one with model_index.json.",
    ),
    (
        r"^(model\.diffusion_model\.)?label_emb\.",
        "a Stable Diffusion whose UNet takes more conditions than a time and a prompt (like SDXL's or unCLIP's)",
        "Name another model.",
    ),
    (
        r"^(model\.diffusion_model\.)?input_blocks\.",
        "a Stable Diffusion checkpoint without its text encoder or its autoencoder",
        TAKE_FULL_VERSION,
    ),
    (r"^cond_stage_model\.", "a Stable Diffusion checkpoint without its UNet", TAKE_FULL_VERSION),
    (
        r"^((first_stage_model|vae)\.)?(en|de)coder\.(down|up)\.",
        "an autoencoder (VAE) alone",
        TAKE_FULL_VERSION,
    ),
)


def read_prediction(header: Header) -> Literal["epsilon", "v_prediction"] | None:
    """A UNet's prediction type, from ModelSpec metadata (kohya, ComfyUI) or a tensor; None if the file does not say.

    Raises `UserError` for another prediction type, and for noise that no schedule of βs gives.
    """
    for mark, model in OTHER_NOISE.items():
        if mark in header.shapes:
            raise UserError(
                f"{header.path} was trained on the levels of noise of EDM, as {model} was (it has {mark}), which are "
                "not supported. Name another model."
            )
    declared = header.metadata.get("modelspec.prediction_type", "")
    if declared.startswith("v") or VELOCITY in header.shapes:
        return "v_prediction"
    if declared and not declared.startswith("eps"):
        raise UserError(
            f"{header.path} says that it predicts {declared!r} (modelspec.prediction_type), and supported are epsilon "
            "and v. Name another model."
        )
    return "epsilon" if declared else None


def noise_settings(header: Header, prediction: str) -> list[str]:
    """Folders of published settings with the scheduler for a prediction type; none for ε, the family's own."""
    if prediction != "v_prediction":
        return []
    return ["velocity-zero"] if ZERO_SNR in header.shapes else ["velocity"]


def say_name_promises_velocity(header: Header) -> None:
    """Say that a UNet's file without a prediction type is read as predicting ε, where its name says v."""
    if VELOCITY_NAME.search(header.path.stem) and not has_settings_beside(header, SCHEDULER):
        notify(
            f"{header.path} does not say what it predicts, and is read as predicting ε, though its name says v. If it "
            f"draws noise, put its {SCHEDULER} beside it."
        )


def say_name_leaves_distillation_open(header: Header, pattern: str, word: str) -> None:
    """Say that a file is read as not distilled, where its name does not tell.

    `pattern` matches in lower-case names that tell either way; `word` in a name would say that it was distilled.
    """
    has_settings = any(has_settings_beside(header, name) for name in (SCHEDULER, "model_index.json"))
    if (
        not has_settings
        and not is_called_turbo(header.path.stem)
        and not re.search(pattern, header.path.stem.lower())
    ):
        notify_once(
            f"{header.path} does not say by its name whether it was distilled to few steps, and is read as one that "
            f"was not. If it was, put “{word}” into its name."
        )


def has_settings_beside(header: Header, name: str) -> bool:
    """Whether settings of this name exist in a file's own folders."""
    return any((folder / name).exists() for folder in folders_beside(header))


def folders_beside(header: Header) -> tuple[Path, Path]:
    """The folders of a file's own settings: the one of its name, and the one that it lies in."""
    return header.path.with_suffix(""), header.path.parent


def refuse_quantized(header: Header) -> None:
    """`UserError` for weights in a format that is not read: all but fp8, with or without scales beside it."""
    for name, shape in header.shapes.items():
        weight = re.sub(SCALES, ".weight", name)
        if weight != name:
            rows = header.shapes.get(weight, ())[:1]
            is_read = header.dtypes.get(weight, "").startswith("F8_E") and math.prod(shape) in (1, *rows)
        else:
            is_read = not re.search(OTHER_QUANTIZATION, name)
        if not is_read:
            raise UserError(_describe_quantized(header, name))


def _describe_quantized(header: Header, name: str) -> str:
    return (
        f"{header.path} is quantised in a format that is not supported (it has {name}). Take its version in fp16, bf16 "
        "or fp8."
    )


def unscale(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Undo the quantisation to fp8: tensors times the scales beside them, in fp32; others as stored."""
    weights = {}
    for name, tensor in tensors.items():
        if re.search(BESIDE_SCALES, name):
            continue
        stem = name.removesuffix("weight") if name.endswith(".weight") else ""
        scale = tensors.get(f"{stem}scale_weight", tensors.get(f"{stem}weight_scale")) if stem else None
        if scale is not None:
            factor = scale.float().reshape(-1, *[1] * (tensor.ndim - 1))
            tensor = tensor.float() * factor
        weights[name] = tensor
    return weights


def load_single_file_part(
    kind: Any, location: Location, part: str, *, prefix: str, dtype: torch.dtype
) -> Any:
    """Load a component that diffusers converts (`unet`, `vae`) from the tensors whose names begin with `prefix`.

    Where a file also holds an EMA (`model_ema`), the plain weights are loaded, as diffusers does, and a line says so.
    Raises `UserError` if the tensors do not fit the component's config.
    """
    settings = location.local(f"{part}/config.json")
    assert settings is not None
    tensors = unscale(read_tensors(location.source, prefix=prefix)[0])
    if prefix == UNET and _has_ema(read_header(location.source)):
        notify_once(
            f"{location.source} also holds the mean of the weights over their training (EMA). The plain weights are "
            "read, as diffusers does."
        )
    tensors = {name: tensor for name, tensor in tensors.items() if not re.match(TRAINING_LEFTOVERS, name)}
    with refuse_damaged(location.name, part), without_weights():
        expected = kind.from_config(location.config(part)).state_dict()
    if count_shapes(tensors.values()) != count_shapes(expected.values()):
        raise config_mismatch(location, part)
    with silence_warnings("diffusers.models.modeling_utils"):  # which warns that no module is kept in fp32
        return kind.from_single_file(
            tensors,
            config=str(settings.parents[1]),
            subfolder=part,
            torch_dtype=dtype,
            local_files_only=True,
        )


def config_mismatch(location: Location, part: str) -> UserError:
    """The `UserError` for a file whose component does not fit its config."""
    return UserError(
        f"The {part} in {location.find_file(part)} is not built as {location.local(f'{part}/config.json')} says. "
        f"Put the {part}/config.json of this model beside the file."
    )


def count_shapes(tensors: Iterable[torch.Tensor]) -> Counter[tuple[int, ...]]:
    """Count how often each shape occurs; a 1 × 1 convolution counts as a matrix."""
    return Counter(tuple(tensor.shape[: 2 if set(tensor.shape[2:]) == {1} else None]) for tensor in tensors)


def unet_and_latent_channels(header: Header) -> tuple[int | None, int | None]:
    """The input channels of the UNet and the latent channels of the autoencoder; None for a missing component."""
    kernels = (UNET + "input_blocks.0.0.weight", AUTOENCODER + "decoder.conv_in.weight")
    takes, latents = (header.shapes.get(name, ()) for name in kernels)
    return (takes[1] if len(takes) == 4 else None), (latents[1] if len(latents) == 4 else None)


def _has_ema(header: Header) -> bool:
    """Whether a checkpoint holds an EMA of the UNet's weights."""
    return any(name.startswith(EMA) for name in header.shapes)


def describe_unknown_file(header: Header) -> str:
    """Say what a file of no known family seems to be, and the remedy."""
    takes, latents = unet_and_latent_channels(header)
    if takes is not None and latents is not None and takes != latents:
        if takes == 2 * latents:
            return (
                f"{header.path} reads an image's latents beside the noisy ones (its UNet takes {takes} channels), as "
                "InstructPix2Pix does, which is not read from a single file. Name its diffusers folder or hub id, as "
                "timbrooks/instruct-pix2pix."
            )
        reason = f"its UNet takes {takes} channels and a latent has {latents}"
        inpaints = ", as for inpainting" if takes == 2 * latents + 1 else ""
        return (
            f"{header.path} seems to be a model for another task ({reason}{inpaints}). Name the model that it was made "
            "from."
        )
    if not any(name.startswith(UNET) for name in header.shapes) and _has_ema(header):
        return (
            f"{header.path} holds the UNet as the mean over its training (EMA) alone, under names without their dots. "
            "Take the file with the plain weights, or the model's diffusers folder."
        )
    if quantized := next((name for name in header.shapes if re.search(OTHER_QUANTIZATION, name)), ""):
        return _describe_quantized(header, quantized)
    for pattern, kind, remedy in UNKNOWN_FILES:
        if any(re.search(pattern, name) for name in header.shapes):
            return f"{header.path} seems to be {kind}. {remedy}"
    first_names = ", ".join(sorted(header.shapes)[:3]) or "nothing"
    return f"{header.path} is no checkpoint of a known layout (it holds {first_names}). Name another model."
