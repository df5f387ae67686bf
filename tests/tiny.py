"""A random pipeline folder of the Stable Diffusion family, small enough to build in every test run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

WORDS = ("a", "dog", "cat", "in", "the", "snow", "red")
RARE = ("bcd", "fgh", "jkl", "mnp", "qrs")


def tiny_pipeline(folder: Path, *, seed: int = 0, prediction_type: str = "epsilon") -> Path:
    """Writes a whole pipeline with random weights: 64 × 64 pictures, 8 × 8 latents of 4 channels."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="leading",
        prediction_type=prediction_type,
    )
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    defaults = {"steps": 3, "guidance": 2.0, "train_steps": 4, "learning_rate": 1e-3, "rank": 2, "batch": 2}
    (folder / "atelier.json").write_text(json.dumps(defaults))
    return folder


def tiny_tokenizer() -> CLIPTokenizer:
    """Letters, a few words and a few rare ones."""
    alphabet = [chr(code) for code in range(33, 127)] + ["Ġ"]
    merges: list[Any] = []
    tokens = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    for word in (*WORDS, *RARE):
        left = ""
        for number, letter in enumerate(word):
            right = letter + "</w>" if number == len(word) - 1 else letter
            if left:
                merges.append((left, right))
                tokens.append(left + right)
            left += right
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=list(dict.fromkeys(merges)), model_max_length=77)
