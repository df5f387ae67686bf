"""CLIP text encoders in single files: OpenCLIP's names, transformers', and the tokenizer, which no file carries."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from backbone.families.base import TextEncoderSlot
from backbone.families.components import loading
from backbone.families.components.empty import without_weights
from backbone.families.location import Location, hub_file
from backbone.families.single_file.checkpoint import config_mismatch
from backbone.io.console import UserError
from backbone.io.weights import refuse_damaged

TOKENIZER = "openai/clip-vit-large-patch14"
OPENCLIP_KEY_PATTERNS = (
    (r"^token_embedding\.", "embeddings.token_embedding."),
    (r"^positional_embedding$", "embeddings.position_embedding.weight"),
    (r"^ln_final\.", "final_layer_norm."),
    (r"^transformer\.resblocks\.", "encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.mlp\.c_fc\.", ".mlp.fc1."),
    (r"\.mlp\.c_proj\.", ".mlp.fc2."),
    (r"\.attn\.", ".self_attn."),
)
UNUSED_KEYS = r"(^|\.)(position_ids|logit_scale|text_projection(\.weight)?|attn_mask)$"


def convert_openclip(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Rename OpenCLIP's tensors to transformers' keys, with all layers and the text projection."""
    converted = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(prefix)
        if name == "text_projection":
            converted["text_projection.weight"] = tensor.T.contiguous()
            continue
        for pattern, replacement in OPENCLIP_KEY_PATTERNS:
            name = re.sub(pattern, replacement, name)
        if "in_proj_" in name:  # query, key and value fused
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                converted[name.replace("in_proj_", f"{letter}_proj.")] = part
        else:
            converted[name] = tensor
    return converted


def build_clip(
    kind: Any, location: Location, number: str, tensors: dict[str, Tensor], *, pads_with: str
) -> TextEncoderSlot:
    """Build a CLIP text encoder in fp32 with its tokenizer; `tensors` have transformers' keys without `text_model.`."""
    part = f"text_encoder{number}"
    config = read_config(location, part)
    with refuse_damaged(location.name, part), without_weights():
        model = kind(config)
    level = "text_model." if hasattr(model, "text_model") else ""
    renamed = {
        (name if name.startswith("text_projection") else level + name): tensor.to(torch.float32)
        for name, tensor in tensors.items()
        if name == "text_projection.weight" or not re.search(UNUSED_KEYS, name)
    }
    try:
        model.load_state_dict(renamed, assign=True)
    except RuntimeError as error:
        raise config_mismatch(location, part) from error
    tokenizer = load_tokenizer(location, pads_with=pads_with, folder=f"tokenizer{number}")
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"The tokenizer{number} has {len(tokenizer)} tokens and {location.source} knows {config.vocab_size}. "
            f"Put the tokenizer{number}/ folder of this model beside the file."
        )
    loading.set_eos_token(model, tokenizer)
    return TextEncoderSlot(part, tokenizer, model)


def read_config(location: Location, part: str) -> Any:
    """The `CLIPTextConfig` of a text encoder; `UserError` where it is damaged."""
    from transformers import CLIPTextConfig  # slow to import, as every model of transformers

    with refuse_damaged(location.name, part):
        return CLIPTextConfig.from_dict(location.config(part))


def load_tokenizer(location: Location, *, pads_with: str, folder: str = "tokenizer") -> Any:
    """Load the tokenizer beside the file, or CLIP's own, which every published Stable Diffusion uses."""
    from transformers import CLIPTokenizer

    path = location.local(folder)
    if path is not None:
        with refuse_damaged(str(path.parent), path.name):
            return CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
    try:
        vocabulary = hub_file(TOKENIZER, "vocab.json")
        merges = hub_file(TOKENIZER, "merges.txt", vocabulary.parent.name)
    except UserError as error:
        raise UserError(
            f"{location.source} carries no tokenizer, as no checkpoint does, and {TOKENIZER} could not be fetched. "
            f"Put a tokenizer/ folder (of any Stable Diffusion) beside the file, or connect once."
        ) from error
    return CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), pad_token=pads_with, model_max_length=77)
