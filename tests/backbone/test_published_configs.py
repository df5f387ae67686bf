"""The published configs that come along, against what diffusers and transformers say of the same models by default."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import pytest
from transformers import Mistral3Config, MistralConfig, Qwen3Config
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from backbone.families.location import PUBLISHED_CONFIGS, Config, Location
from backbone.families.registry import families
from backbone.io.console import UserError

OTHERWISE: dict[str, dict[str, Any]] = {  # what a published size has that diffusers' default, another size, has not
    "z-image": {"axes_lens": [1536, 512, 512]},
    "flux2-klein": {
        "guidance_embeds": False, "num_layers": 5, "num_single_layers": 20, "num_attention_heads": 24,
        "joint_attention_dim": 3 * 2560,
    },
    "flux2-klein-9b": {
        "guidance_embeds": False, "num_single_layers": 24, "num_attention_heads": 32, "joint_attention_dim": 3 * 4096,
    },
    "flux2-dev": {},
    "qwen-image": {},
    "qwen-image-edit-2511": {"zero_cond_t": True},
    "krea2": {},
    "chroma": {},
    "qwen-image-2.1": {},
}  # fmt: skip


def config(folder: str, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((PUBLISHED_CONFIGS / folder / part / "config.json").read_text())
    return found


def differences(said: dict[str, Any]) -> dict[str, Any]:
    """The values of a config that are not the defaults of its diffusers class."""
    kind = getattr(diffusers, said["_class_name"])
    usual = {key: one.default for key, one in inspect.signature(kind.__init__).parameters.items()}
    plain = {key: list(value) if isinstance(value, tuple) else value for key, value in usual.items()}
    return {
        key: value for key, value in said.items() if not key.startswith("_") and value != plain.get(key, "?")
    }


@pytest.mark.parametrize("folder", OTHERWISE)
def test_a_transformer_s_config_is_diffusers_default_but_for_its_size(folder: str) -> None:
    assert differences(config(folder, "transformer")) == OTHERWISE[folder]


@pytest.mark.parametrize("folder", ["flux2-klein", "qwen-image", "qwen-image-2.1"])
def test_an_autoencoder_s_config_is_diffusers_default(folder: str) -> None:
    assert differences(config(folder, "vae")) == {}


@pytest.mark.parametrize(
    ("folder", "kind", "theta", "width", "layers"),
    [
        ("z-image", Qwen3Config, 1e6, 2560, 36),
        ("flux2-klein", Qwen3Config, 1e6, 2560, 36),
        ("flux2-klein-9b", Qwen3Config, 1e6, 4096, 36),
        ("qwen-image", Qwen2_5_VLTextConfig, 1e6, 3584, 28),
        ("krea2", Qwen3VLTextConfig, 5e6, 2560, 36),
        ("qwen-image-2.1", Qwen3VLTextConfig, 5e6, 4096, 36),
        ("flux2-dev", MistralConfig, 1e9, 5120, 40),
    ],
)
def test_transformers_reads_the_rotation_and_size_that_a_text_encoder_was_trained_with(
    folder: str, kind: Any, theta: float, width: int, layers: int
) -> None:
    said = config(folder, "text_encoder")
    read = kind.from_dict(said.get("text_config", said))
    assert read.rope_parameters["rope_theta"] == theta
    assert (read.hidden_size, read.num_hidden_layers) == (width, layers)
    sections = said.get("text_config", {}).get("rope_scaling", {}).get("mrope_section")
    assert read.rope_parameters.get("mrope_section") == sections
    # a layer that is read lies inside, and its width is what the network takes of a token
    assert read.num_attention_heads % read.num_key_value_heads == 0


def test_the_text_encoder_of_flux2_dev_is_transformers_own_mistral_small() -> None:
    text: Any = Mistral3Config().text_config
    own = text.to_dict()
    said = config("flux2-dev", "text_encoder")["text_config"]
    assert {key: own[key] for key in said if key != "rope_theta"} == {
        key: value for key, value in said.items() if key != "rope_theta"
    }


@pytest.mark.parametrize(
    ("pipeline", "folders", "licence"),
    [
        ("StableDiffusionPipeline", ("stable-diffusion-1",), ""),
        ("StableDiffusionXLPipeline", ("stable-diffusion-xl",), ""),
        ("StableDiffusion3Pipeline", ("stable-diffusion-3.5-medium",), "large companies"),
        ("FluxPipeline", ("flux-dev",), "FLUX.1-dev's published weights .* non-commercial"),
        ("FluxPipeline", ("flux-schnell",), ""),
        ("Flux2KleinPipeline", ("flux2-klein",), ""),
        ("Flux2KleinPipeline", ("flux2-klein-9b", "flux2-klein"), "klein 9B's published .* non-commercial"),
        ("Flux2Pipeline", ("flux2-dev", "flux2-klein"), "FLUX.2 dev's published weights .* non-commercial"),
        ("ZImagePipeline", ("z-image",), ""),
        ("QwenImagePipeline", ("qwen-image",), ""),
        ("QwenImage21Pipeline", ("qwen-image-2.1",), "research"),
        ("Krea2Pipeline", ("krea2",), "large companies"),
        ("ChromaPipeline", ("chroma",), ""),
        ("StableVideoDiffusionPipeline", ("stable-video-diffusion",), "large companies"),
    ],
)
def test_a_licence_that_forbids_some_use_is_known(
    pipeline: str, folders: tuple[str, ...], licence: str
) -> None:
    places = tuple(PUBLISHED_CONFIGS / folder for folder in folders)
    location = Location(pipeline, "none.safetensors", {"_class_name": pipeline}, places)
    family = next(one for one in families() if pipeline in one.pipeline_classes)
    found = family.licence(location)
    assert bool(found) == bool(licence) and re.search(licence, found)


@pytest.mark.parametrize(
    ("pipeline", "index", "part", "beyond"),
    [
        ("ZImagePipeline", {}, "z-image", 0),
        ("Flux2KleinPipeline", {}, "flux2-klein", 0),
        ("Flux2Pipeline", {}, "flux2-dev", 0),
        ("QwenImagePipeline", {}, "qwen-image", 0),
        ("Krea2Pipeline", {}, "krea2", 1),  # whose guidance g means 1 + g
        ("ChromaPipeline", {}, "chroma", 0),
        ("QwenImage21Pipeline", {}, "qwen-image-2.1", 0),
    ],
)
def test_steps_and_guidance_are_diffusers_own_by_default(
    pipeline: str, index: dict[str, Any], part: str, beyond: float
) -> None:
    usual = {
        name: one.default
        for name, one in inspect.signature(getattr(diffusers, pipeline).__call__).parameters.items()
    }
    guidance: Any = usual.get("true_cfg_scale", usual.get("guidance_scale"))
    folders = (PUBLISHED_CONFIGS / part, PUBLISHED_CONFIGS / "flux2-klein") if part else ()
    location = Location(pipeline, str(Path("none.safetensors")), {"_class_name": pipeline}, folders)
    family = next(one for one in families() if pipeline in one.pipeline_classes)
    own = family.sampling_defaults(location)
    assert (own["steps"], own["guidance"]) == (usual["num_inference_steps"], guidance + beyond)


@pytest.mark.parametrize("axes", [None, [0, 16, 56, 56], [16, 56, 57], [16, 56, "56"], 128])
@pytest.mark.parametrize(("folder", "key"), [("flux-dev", "axes_dims_rope"), ("z-image", "axes_dims")])
def test_rotary_axes_fill_an_attention_head_or_are_a_sentence(folder: str, key: str, axes: Any) -> None:
    """Such a network is built, and its first call would end in a traceback."""
    said = config(folder, "transformer")
    kind = getattr(diffusers, said["_class_name"])
    whole, damaged = Config(said), Config({**said, key: axes})
    whole.refuse_other_kinds(kind)
    with pytest.raises(UserError, match=rf"is damaged: {key} is"):
        damaged.refuse_other_kinds(kind)
