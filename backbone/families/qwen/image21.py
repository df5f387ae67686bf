"""Qwen-Image 2.1: one sequence of text and image tokens, read causally, Qwen3-VL, latents of 64 channels.

The text tokens stand first and see only what is before them; modulated as at time 0, they do not depend on
the noise level. A token of the image is one latent of 16 × 16 pixels. The prompt is read in a template of its own, and
the language model's last layer before its norm is what the network is given. Pictures have a fourth channel, how opaque
they are. The published weights are sampled without guidance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from diffusers import AutoencoderKLQwenImage21, QwenImage21Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_qwen_image21_transformer_checkpoint_to_diffusers,
)
from diffusers.models.transformers import transformer_qwenimage21
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

from backbone.conditions.conditions import Conditions, Text
from backbone.families.base import (
    AttentionLayout,
    ModelSpec,
    Network,
    NoisePath,
    TextEncoderSlot,
    diffusers_spec,
)
from backbone.families.components import language_models, loading, noise_paths
from backbone.families.components.language_models import LanguageModelEncoder, Reading
from backbone.families.location import Location
from backbone.families.single_file import split_files
from backbone.families.single_file.split_files import SplitFileFamily, SplitFiles
from backbone.io.console import notify_once

TOKENS = 1024
SLOT = 4  # latents that stand in one place of the language model's sequence
SYSTEM = "<|im_start|>system\nComprehend and analyze the provided prompt.<|im_end|>\n"
FRAME = (f"{SYSTEM}<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n")
MARKS = ("txt_in.text_norm.weight", "modulation.1.weight", "img_in.weight")


def convert_to_diffusers(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The transformer's tensors by diffusers' names: ComfyUI joins each gate and what it multiplies."""
    return dict(convert_qwen_image21_transformer_checkpoint_to_diffusers(dict(tensors)))


FILES = SplitFiles(
    "Qwen-Image 2.1",
    marks=(MARKS,),
    encoder="text encoder (Qwen3-VL-8B)",
    published=lambda header: ("qwen-image-2.1",),
    convert=convert_to_diffusers,
)

choose_rows = transformer_qwenimage21._select_modulation_rows


def choose_rows_anywhere(params: Tensor, image: Tensor | None) -> Tensor:
    """The same with a mask that may lie on another device, as it does while memory is counted on `meta`."""
    return cast(Tensor, choose_rows(params, None if image is None else image.to(params.device)))


transformer_qwenimage21._select_modulation_rows = choose_rows_anywhere


class QwenImage21(SplitFileFamily):
    """Implements `Family`."""

    name: ClassVar[str] = "Qwen-Image 2.1"
    hub_ids: ClassVar[dict[str, str]] = {"qwen-image-2.1": "Qwen/Qwen-Image-2.1"}
    pipeline_classes: ClassVar[tuple[str, ...]] = ("QwenImage21Pipeline",)
    files: ClassVar[SplitFiles] = FILES
    transformer_kind: ClassVar[Any] = QwenImage21Transformer2DModel
    vae_kind: ClassVar[Any] = AutoencoderKLQwenImage21
    lora_targets: ClassVar[dict[str, tuple[str, ...]]] = {
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "all": (
            *("to_q", "to_k", "to_v", "to_out.0"),
            *("img_mlp.proj", "img_mlp.gate_layer", "img_mlp.out"),
        ),
    }

    def denoiser(self, location: Location, dtype: torch.dtype) -> nn.Module:
        if location.index.get("sample_sigmas"):
            notify_once(
                f"{location.name} names sample_sigmas of its own, which are not used: the levels are those of --steps."
            )
        return super().denoiser(location, dtype)

    def licence(self, location: Location) -> str:
        return "Qwen-Image 2.1's published weights are under a licence for research, not for commercial use."

    def text_encoder(self, location: Location, dtype: torch.dtype) -> BeforeTheNorm:
        from transformers import Qwen3VLForConditionalGeneration, Qwen3VLTextModel  # slow to import

        if location.file is not None:
            slot = split_files.load_language_model(Qwen3VLTextModel, Qwen2Tokenizer, location, dtype)
        else:
            kind = Qwen3VLForConditionalGeneration
            slot = language_models.load_language_model(
                kind, Qwen2Tokenizer, location, dtype, tokenizer="processor"
            )
        width = int(location.config("transformer")["context_in_dim"])
        return BeforeTheNorm(slot, name=location.name, width=width)

    def spec(self, location: Location, dtype: torch.dtype) -> ModelSpec:
        from transformers import Qwen3VLTextModel

        width = int(location.config("transformer")["context_in_dim"])
        vae_dtype = loading.autoencoder_dtype(location, dtype)
        return ModelSpec(
            diffusers_spec(QwenImage21Transformer2DModel, location, "transformer", dtype),
            diffusers_spec(AutoencoderKLQwenImage21, location, "vae", vae_dtype),
            {"text_encoder": language_models.text_spec(Qwen3VLTextModel, location, dtype)},
            {"hidden": (TOKENS, width), "mask": (TOKENS,)},
        )

    def sampling_defaults(self, location: Location) -> dict[str, Any]:
        return {"steps": 40, "guidance": 1.0}

    def path(self, location: Location) -> NoisePath:
        height, width = self.latent_shape(location)[-2:]
        return noise_paths.flow_path(location, size=(height, width), patch=1, lowest=lambda steps: 1 / steps)

    def network(self, denoiser: nn.Module, conditions: Conditions) -> Network:
        network = cast(Any, denoiser)

        def predict(noisy: Tensor, time: Tensor) -> Tensor:
            hidden, mask = language_models.cut_padding(conditions.text)
            time = time.expand(len(noisy))
            if mask is None:
                return call(network, noisy, time, hidden)
            # where the image's places begin depends on the length of the text: rows of one length go together
            lengths = mask.sum(1)
            found = torch.empty_like(noisy)
            for length in lengths.unique().tolist():
                rows = (lengths == length).nonzero()[:, 0]
                answer = call(network, noisy[rows], time[rows], hidden[rows, :length])
                found = found.index_copy(0, rows, answer.to(found.dtype))
            return found

        return predict

    def attention(self, denoiser: nn.Module, conditions: Conditions) -> AttentionLayout:
        # Which `edit` cannot reach: words see no image here, and only words before them
        return AttentionLayout()


def call(network: Any, noisy: Tensor, time: Tensor, hidden: Tensor) -> Tensor:
    """The network's velocity [B, C, H, W] at times [B] with text [B, T, D] without padding."""
    count, _, height, width = noisy.shape
    dtype = cast(torch.dtype, network.dtype)
    slots = torch.zeros(count, hidden.shape[1] + height * width // SLOT, dtype=torch.bool)
    slots[:, hidden.shape[1] :] = True
    output = network(
        hidden_states=noisy.flatten(2).transpose(1, 2).to(dtype),
        timestep=time / 1000,
        encoder_hidden_states=hidden.to(dtype),
        img_shapes=[[(1, height, width)]] * count,
        img_mask=slots if noisy.is_meta else slots.to(noisy.device),
    )
    image = output.sample[:, -height * width :]
    return cast(Tensor, image.transpose(1, 2).unflatten(2, (height, width)))


class BeforeTheNorm(LanguageModelEncoder):
    """The last layer of Qwen3-VL before its norm; no prompt is read as a space."""

    def __init__(self, slot: TextEncoderSlot, *, name: str, width: int) -> None:
        dropped = len(slot.tokenizer(SYSTEM, add_special_tokens=False)["input_ids"])
        reading = Reading(layers=(-1,), tokens=TOKENS, dropped=dropped)
        super().__init__(
            slot, reading, write=lambda prompt: (prompt or " ").join(FRAME), name=name, width=width
        )

    def __call__(self, prompts: Sequence[str]) -> Text:
        """hidden [B, 1024, D], mask [B, 1024]; warns of truncated prompts."""
        norm: Any = self.slots[0].model.norm
        handle = norm.register_forward_hook(lambda module, inputs, output: inputs[0])
        try:
            return super().__call__(prompts)
        finally:
            handle.remove()
