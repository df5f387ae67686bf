"""Motion LoRAs: adapters of motion layers alone, from a run of `customize train-motion` or from elsewhere.

Reads files of diffusers, of peft and of AnimateDiff's own trainer, which name layers and factors differently.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from backbone.adapters.apply import load_concepts
from backbone.adapters.concept import MOTION, Concept
from backbone.adapters.config import (
    CONFIG_FILE,
    PEFT_PREFIX,
    AdapterConfig,
    check_tensors,
    read_adapter_configs,
    read_peft_config,
)
from backbone.adapters.lora import (
    LORA_SUFFIXES,
    LORA_WEIGHTS,
    PEFT_WEIGHTS,
    activate_adapters,
    has_text_encoder_weights,
    load_factors,
    load_lora,
)
from backbone.io.console import UserError
from backbone.io.files import read_tensors
from backbone.models.clips.motion import (
    Motion,
    attach_motion,
    find_motion,
    read_motion_adapter,
    rename_original,
)
from backbone.models.model import Backbone

OURS = {"down": "lora_A", "up": "lora_B"}


OF_SVD = "temporal_transformer_blocks"  # in the names of a LoRA for Stable Video Diffusion


@dataclass(frozen=True)
class Moves:
    """A motion adapter and its LoRAs.

    adapter  a folder, a file or a hub id; "" for independent frames
    loras    motion LoRAs: files, or run folders of `customize train-motion`
    scale    strength of the LoRAs
    """

    adapter: str
    loras: tuple[Path, ...] = ()
    scale: float = 1.0


def set_in_motion(
    model: Backbone, moves: Moves, concepts: Sequence[Concept] = (), *, scale: float = 1.0
) -> Motion | None:
    """Load concepts and a motion adapter with its LoRAs into a model; all are active together.

    An adapter's folder may also hold a LoRA of the picture model (`pytorch_lora_weights.safetensors`) that learned the
    words of motion. Raises `UserError` for what does not fit the model, before loading weights where possible.
    """
    adapter = read_motion_adapter(moves.adapter) if moves.adapter else None
    words = Path(moves.adapter).expanduser() / LORA_WEIGHTS
    names = load_concepts(model, [concept for concept in concepts if concept.kind != MOTION], scale=scale)
    if adapter is not None and words.is_file():
        text = {slot.name: slot.model for slot in model.text_encoder.slots}
        with_text = has_text_encoder_weights(words)
        load_lora(words, model.denoiser, "motion_words", text_encoders=text if with_text else None)
        model.text_learned |= with_text
        names.append("motion_words")
    motion = None if adapter is None else attach_motion(model.denoiser, adapter, moves.adapter)
    runs = [concept.weights_path for concept in concepts if concept.kind == MOTION]
    names += load_motion_loras(model.denoiser, [*runs, *moves.loras], scale=moves.scale)
    if names:
        activate_adapters(model.denoiser, names)
        for slot in model.text_encoder.slots if model.text_learned else ():
            activate_adapters(slot.model, names)
    return motion


def load_motion_loras(denoiser: nn.Module, sources: Sequence[Path], *, scale: float = 1.0) -> list[str]:
    """Load motion LoRAs into a UNet with a motion adapter; returns their names.

    Raises `UserError` for a LoRA of pictures, and for one of another adapter.
    """
    if sources and find_motion(denoiser) is None:
        raise UserError(
            f"{sources[0]} is a motion LoRA, and there is no motion adapter. Name one with --motion."
        )
    names = []
    for number, source in enumerate(sources):
        path = source
        if source.is_dir():
            path = source / (PEFT_WEIGHTS if (source / PEFT_WEIGHTS).is_file() else LORA_WEIGHTS)
        tensors, config = read_motion_lora(path)
        name = f"motion_{number}"
        load_factors(path, denoiser, name, tensors, {"unet": config}, scale=scale)
        names.append(name)
    return names


def read_motion_lora(path: Path) -> tuple[dict[str, Tensor], AdapterConfig]:
    """The factors under diffusers' names (`unet.….lora_A.weight`) and their settings.

    Raises `UserError` for another kind of file, a pickle, and a LoRA that also changes other layers.
    """
    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise UserError(
            f"{path} is a pickle, which is never read. Take the motion LoRA's .safetensors version."
        )
    if not path.is_file():
        raise UserError(
            f"There is no motion LoRA {path}. Name a .safetensors file, or a run of train-motion."
        )
    tensors, header = read_tensors(path)
    check_tensors(path, tensors)
    factors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    if any(OF_SVD in name for name in tensors):
        raise UserError(
            f"{path} adapts Stable Video Diffusion and no motion adapter. Name a motion LoRA, or leave it out."
        )

    # AnimateDiff's own names → diffusers'; layers outside of motion modules are refused
    for name, value in tensors.items():
        plain = rename_original(name.removeprefix(PEFT_PREFIX).removeprefix("unet."))
        if plain.endswith(".alpha"):
            if value.numel() != 1 or float(value) == 0:
                raise UserError(f"{name} in {path} is no number other than 0. Export the file again.")
            alphas[plain.removesuffix(".alpha")] = float(value)
            continue
        key = _name_factor(plain)
        if key is None:
            raise UserError(f"{path} is no motion LoRA: it holds {name}. Name one, or use it with --motion.")
        if ".motion_modules." not in key:
            raise UserError(
                f"{path} is a LoRA of pictures: it changes {key.rpartition('.')[0]}. Make a run of it with customize "
                "import, and give that with --concept."
            )
        factors[f"unet.{key}.weight"] = value
    configs = read_adapter_configs(path, header)
    config = configs.get("unet", configs.get(""))
    if config is None and not alphas and (path.parent / CONFIG_FILE).is_file():
        config = read_peft_config(path.parent / CONFIG_FILE)
    return factors, config or _infer_config(path, factors, alphas)


def _name_factor(name: str) -> str | None:
    """`layer.lora_A` or `layer.lora_B` for a tensor's name; None for other tensors."""
    name = re.sub(r"\.lora_(A|B)\.\w+\.weight$", r".lora_\1.weight", name)  # without the adapter's name
    for suffix, factor in LORA_SUFFIXES.items():
        if name.endswith(suffix):
            layer = re.sub(r"\.processor\.(\w+)$", r".\1", name.removesuffix(suffix))
            layer = re.sub(r"\.to_out$", ".to_out.0", layer)
            return f"{layer}.{OURS[factor]}"
    return None


def _infer_config(path: Path, tensors: dict[str, Tensor], alphas: dict[str, float]) -> AdapterConfig:
    """Rank and α of a file without them in its header; without an α the update is not scaled."""
    layers = {
        key.removeprefix("unet.").removesuffix(".lora_A.weight"): value
        for key, value in tensors.items()
        if ".lora_A." in key
    }
    if not layers:
        raise UserError(f"{path} holds no factors of a LoRA. Download it again.")
    ranks = {layer: int(value.shape[0]) for layer, value in layers.items()}
    usual = Counter(ranks.values()).most_common(1)[0][0]
    return AdapterConfig(
        rank=usual,
        alpha=float(usual),
        rank_pattern={re.escape(layer): rank for layer, rank in ranks.items() if rank != usual},
        alpha_pattern={re.escape(layer): alphas.get(layer, float(rank)) for layer, rank in ranks.items()},
        target_modules=tuple(layers),
    )
