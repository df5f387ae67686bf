"""Layer names: components, CLIP's level, and kohya's underscores.

The canonical name is component and diffusers' module name, without CLIP's level `text_model`:
`unet.down_blocks.0.attentions.0.proj_in`, `text_encoder.encoder.layers.3.mlp.fc1`.
"""

from __future__ import annotations

COMPONENTS = ("unet", "text_encoder_2", "text_encoder", "transformer")
TEXT_MODEL_PREFIX = "text_model."


def split_component(layer: str) -> tuple[str, str]:
    """`unet.conv_in` → (`unet`, `conv_in`)."""
    component, _, module = layer.partition(".")
    assert component in COMPONENTS, layer
    return component, module


def is_text_encoder(component: str) -> bool:
    """Whether a component is a CLIP text encoder."""
    return component.startswith("text_encoder")


def add_text_model(component: str, module: str) -> str:
    """Module name with CLIP's level `text_model`, which older transformers and other tools have."""
    return (
        TEXT_MODEL_PREFIX + module if is_text_encoder(component) and module != "text_projection" else module
    )


def flatten_name(module: str) -> str:
    """`down_blocks.0.proj_in` → `down_blocks_0_proj_in`."""
    return module.replace(".", "_")
