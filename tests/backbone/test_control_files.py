"""Control networks of other layouts and families against diffusers: union nets, single files, SD3, FLUX.1."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    ControlNetUnionModel,
    FluxControlNetModel,
    FluxControlNetPipeline,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionXLControlNetUnionPipeline,
    T2IAdapter,
)
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor

from backbone.cli.conditions import RequestedControl, RequestedMap
from backbone.conditions.control import Control
from backbone.families.flux.family import pack_latents, unpack_latents
from backbone.families.unet.original import CONTROL, OUTER, RESNET, from_original
from backbone.io.console import UserError
from backbone.io.files import write_tensors
from backbone.models.control import gather_controls, open_conditions, open_control
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, sample_latents
from tests import tiny
from tests.backbone.media.control.test_maps import ring
from tests.backbone.test_control import GUIDANCE, NEGATIVE, PROMPT, STEPS, maps, shaken

few_or_all = pytest.mark.parametrize("steps", [4, pytest.param(STEPS, marks=pytest.mark.slow)])


def opened(folder: Path) -> Backbone:
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def drawn(model: Backbone, controls: Sequence[Control], **said: Any) -> Tensor:
    asked = [Request(PROMPT, (0, 0), said.pop("negative", NEGATIVE))]
    how = {"guidance": GUIDANCE, "seed": 3} | said
    return next(sample_latents(model, asked, controls=controls, **how))


def by_diffusers(pipeline: Any, model: Backbone, steps: int, **said: Any) -> Tensor:
    how: dict[str, Any] = {
        "num_inference_steps": steps,
        "prompt": PROMPT,
        "latents": draw_initial_noise(model, 3, 0, 0)[None],
        "guidance_scale": GUIDANCE,
        "height": 64,
        "width": 64,
        "output_type": "latent",
    }
    pipeline.set_progress_bar_config(disable=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.as_tensor(pipeline(**how | said).images)


@pytest.fixture
def latents_at_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    """Diffusers samples a map's latents without a generator; ours are the mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)


# Union nets of SDXL -----------------------------------------------------------------------------------------


def union_net(model: Backbone, folder: Path) -> Any:
    """A random union ControlNet of six kinds for a UNet of SDXL, also saved in a folder."""
    torch.manual_seed(0)
    config = dict(model.denoiser.config)  # type: ignore[arg-type]
    unet = {
        name: value for name, value in config.items() if name in ControlNetUnionModel.__init__.__annotations__
    }
    module: Any = ControlNetUnionModel(
        **unet
        | {
            "conditioning_embedding_out_channels": (4, 8, 8, 16),
            "num_control_type": 6,
            "num_trans_channel": 16,
            "num_trans_head": 2,
            "num_proj_channel": 16,
        }
    )
    shaken(module, 0).save_pretrained(folder)
    return module


@few_or_all
def test_a_union_net_reads_two_kinds_in_one_call_as_diffusers_has_it(steps: int, tmp_path: Path) -> None:
    model = opened(tiny.tiny_stable_diffusion_xl(tmp_path / "model"))
    module = union_net(model, tmp_path / "union")
    both = list(maps(2).split(1))
    network = open_control(model, str(tmp_path / "union")).network
    controls = [
        Control.of(network.for_kind(kind), one, scale=scale)
        for kind, one, scale in zip(("pose", "edges"), both, (0.7, 1.1), strict=True)
    ]
    one_call = controls[0].network.join_controls(controls)  # type: ignore[attr-defined]
    assert one_call.network is controls[1].network.join_controls(controls).network  # type: ignore[attr-defined]
    pipeline = StableDiffusionXLControlNetUnionPipeline.from_pretrained(
        model.location.source, controlnet=module
    )
    said = {"control_image": both, "control_mode": [0, 3], "controlnet_conditioning_scale": [0.7, 1.1]}
    theirs = by_diffusers(pipeline, model, steps, negative_prompt=NEGATIVE, **said)
    torch.testing.assert_close(drawn(model, [one_call], steps=steps), theirs, rtol=0, atol=1e-4)
    one = by_diffusers(
        pipeline,
        model,
        steps,
        negative_prompt=NEGATIVE,
        control_image=both[:1],
        control_mode=[0],
        controlnet_conditioning_scale=0.7,
    )
    torch.testing.assert_close(drawn(model, controls[:1], steps=steps), one, rtol=0, atol=1e-4)
    with pytest.raises(UserError, match="of 6 kinds reads no tile"):
        network.for_kind("tile")
    # asked for by conditions, what acts at the same steps is one call
    ring().save(tmp_path / "map.png")
    asked = [
        RequestedControl(RequestedMap(kind, str(tmp_path / "map.png")), str(tmp_path / "union"))
        for kind in ("pose", "edges")
    ]
    found = open_conditions(model, asked, (64, 64))
    assert len(gather_controls(found)) == 1 and len(gather_controls(found)[0].hints) == 2
    apart = open_conditions(model, [asked[0], replace(asked[1], stop=0.5)], (64, 64))
    assert len(gather_controls(apart)) == 2


# Files ------------------------------------------------------------------------------------------------------


def original_names(unet: Any) -> dict[str, str]:
    """Diffusers' name of every weight of a ControlNet of this UNet, and the original one, found by asking for all."""
    config, found = unet.config, {}
    blocks = 1 + len(config.block_out_channels) * (config.layers_per_block + 1)
    layers = [*OUTER, *CONTROL, *(f"middle_block.{n}.{part}" for n in (0, 2) for part in RESNET)]
    layers += [f"zero_convs.{n}.0" for n in range(blocks)]
    inner = ["norm", "proj_in", "proj_out"] + [
        f"transformer_blocks.{n}.{part}"
        for n in range(2)
        for part in (
            *("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2"),
            *(f"attn{k}.{name}" for k in (1, 2) for name in ("to_q", "to_k", "to_v", "to_out.0")),
        )
    ]
    for n in range(1, blocks):
        layers += [f"input_blocks.{n}.0.{part}" for part in (*RESNET, "op")]
        layers += [f"input_blocks.{n}.1.{part}" for part in inner]
    layers += [f"middle_block.1.{part}" for part in inner]
    for layer in layers:
        for kind in ("weight", "bias"):
            found[from_original(f"{layer}.{kind}", config.layers_per_block)] = f"{layer}.{kind}"
    return found


@pytest.mark.parametrize("write", [tiny.tiny_pipeline, tiny.tiny_stable_diffusion_xl], ids=["sd", "sdxl"])
def test_original_names_diffusers_names_and_a_control_lora_are_the_same_net(
    write: Any, tmp_path: Path
) -> None:
    model = opened(write(tmp_path / "model"))
    unet: Any = model.denoiser
    torch.manual_seed(1)
    module: Any = shaken(
        ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16)), 1
    )
    own, names = dict(module.state_dict()), original_names(unet)
    assert set(own) <= set(names)
    changes = {}
    for name in [one for one in own if "to_q" in one or "conv1.weight" in one]:
        shape = own[name].shape
        up, down = 0.1 * torch.randn(shape[0], 2), torch.randn(2, own[name][0].numel())
        own[name] = unet.state_dict()[name] + (up @ down).reshape(shape)
        changes[name] = (up, down)
    module.load_state_dict(own)
    original = {names[name]: value.contiguous() for name, value in own.items()}
    for name, value in convert_controlnet_checkpoint(
        dict(original), dict(module.config)
    ).items():  # theirs, as a check
        assert torch.equal(value, own[name]), name
    write_tensors(
        tmp_path / "net.safetensors", {f"control_model.{name}": value for name, value in original.items()}
    )
    write_tensors(
        tmp_path / "diffusers.safetensors", {name: value.contiguous() for name, value in own.items()}
    )
    base = unet.state_dict()  # what the UNet has already the small file leaves out
    lora = {
        names[name]: value
        for name, value in own.items()
        if name not in changes and not (name in base and torch.equal(value, base[name]))
    }
    assert len(lora) + len(changes) < len(original)
    for name, (up, down) in changes.items():
        layer = names[name].removesuffix(".weight")
        lora |= {f"{layer}.up": up, f"{layer}.down": down}
    write_tensors(tmp_path / "lora.safetensors", {**lora, "lora_controlnet": torch.zeros(1)})
    compiled = {f"_orig_mod.{name.replace('blocks.0.', 'blocks.0._orig_mod.')}": own[name] for name in own}
    write_tensors(tmp_path / "compiled.safetensors", compiled)
    module.save_pretrained(tmp_path / "folder")
    write_tensors(tmp_path / "folder" / "diffusion_pytorch_model.safetensors", compiled)
    for file in (
        "net.safetensors",
        "diffusers.safetensors",
        "lora.safetensors",
        "compiled.safetensors",
        "folder",
    ):
        found: Any = open_control(model, str(tmp_path / file)).network.module
        for name, value in found.state_dict().items():
            torch.testing.assert_close(value, own[name], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match=r"was made for another model: its .* is"):
        open_control(opened(tiny.tiny_moji(tmp_path / "other")), str(tmp_path / "net.safetensors"))


def test_an_adapter_with_its_original_names_is_read(tmp_path: Path) -> None:
    model = opened(tiny.tiny_pipeline(tmp_path / "model"))
    torch.manual_seed(0)
    module = T2IAdapter(channels=[16, 32], num_res_blocks=2)
    tensors = {}
    for name, value in module.state_dict().items():
        parts = name.removeprefix("adapter.").split(".")
        if parts[0] == "body" and parts[2] == "resnets":
            parts = ["body", str(2 * int(parts[1]) + int(parts[3])), *parts[4:]]
        elif parts[0] == "body":
            parts[1] = str(2 * int(parts[1]))
        tensors[".".join(parts)] = value
    write_tensors(tmp_path / "adapter.safetensors", tensors)
    network = open_control(model, str(tmp_path / "adapter.safetensors")).network
    for ours, theirs in zip(network.read(maps(1)), module(maps(1)), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    write_tensors(tmp_path / "lora.safetensors", {"unet.lora_A.weight": torch.zeros(2)})
    with pytest.raises(UserError, match="is no control network"):
        open_control(model, str(tmp_path / "lora.safetensors"))


# Transformers -----------------------------------------------------------------------------------------------


@few_or_all
@pytest.mark.parametrize("t5", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["t5", "zero-token"])
@pytest.mark.parametrize(
    "zeros", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["instantx", "pooled-text"]
)
def test_guided_steps_of_sd3_under_two_controlnets_are_diffusers_own(
    steps: int, t5: bool, zeros: bool, tmp_path: Path, latents_at_their_mean: None
) -> None:
    model = opened(tiny.tiny_stable_diffusion_3(tmp_path / "model", t5=t5))
    config = dict(model.denoiser.config)  # type: ignore[arg-type]
    names = set(SD3ControlNetModel.__init__.__annotations__)
    modules = []
    for number in range(2):
        torch.manual_seed(number)
        known = {name: value for name, value in config.items() if name in names}
        module: Any = SD3ControlNetModel(
            **known | {"num_layers": 1, "force_zeros_for_pooled_projection": zeros}
        )
        shaken(module, number).save_pretrained(tmp_path / f"net{number}")
        modules.append(SD3ControlNetModel.from_pretrained(tmp_path / f"net{number}"))
    images = list(maps(2).split(1))
    controls = [
        Control.of(open_control(model, str(tmp_path / f"net{n}")).network, images[n], scale=scale, stop=stop)
        for n, scale, stop in ((0, 0.7, 1.0), (1, 1.0, 0.6))
    ]
    parts = ("text_encoder_3", "tokenizer_3", "feature_extractor", "image_encoder")
    absent = dict.fromkeys(part for part in parts if not (Path(model.location.source) / part).is_dir())
    pipeline = StableDiffusion3ControlNetPipeline.from_pretrained(
        model.location.source, controlnet=modules, **absent
    )
    theirs = by_diffusers(
        pipeline,
        model,
        steps,
        negative_prompt=NEGATIVE,
        control_image=[2 * image - 1 for image in images],
        controlnet_conditioning_scale=[0.7, 1.0],
        control_guidance_end=[1.0, 0.6],
    )
    ours = drawn(model, controls, steps=steps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float((ours - drawn(model, [], steps=steps)).abs().max()) > 0.01
    off = [replace(control, scale=torch.zeros(1)) for control in controls]
    assert torch.equal(drawn(model, off, steps=2), drawn(model, [], steps=2))


@few_or_all
@pytest.mark.parametrize("kind", ["latents", "union", pytest.param("xlabs", marks=pytest.mark.slow)])
def test_steps_of_flux_under_a_controlnet_are_diffusers_own(
    steps: int, kind: str, tmp_path: Path, latents_at_their_mean: None
) -> None:
    model = opened(tiny.tiny_flux(tmp_path / "model"))
    config = dict(model.denoiser.config)  # type: ignore[arg-type]
    known = {
        name: value for name, value in config.items() if name in FluxControlNetModel.__init__.__annotations__
    }
    more: dict[str, Any] = {
        "latents": {},
        "union": {"num_mode": 7},
        "xlabs": {"conditioning_embedding_channels": 4},
    }
    torch.manual_seed(0)
    if kind == "xlabs":
        known |= {"patch_size": 2}
    module: Any = FluxControlNetModel(**known | {"num_layers": 1, "num_single_layers": 1} | more[kind])
    shaken(module, 0).save_pretrained(tmp_path / "net")
    network = open_control(model, str(tmp_path / "net")).network.for_kind("depth")
    control = Control.of(network, maps(1), scale=0.8, start=0.1)
    pipeline = FluxControlNetPipeline.from_pretrained(
        model.location.source, controlnet=FluxControlNetModel.from_pretrained(tmp_path / "net")
    )
    theirs = by_diffusers(
        pipeline,
        model,
        steps,
        latents=pack_latents(draw_initial_noise(model, 3, 0, 0)[None]),
        control_image=2 * maps(1) - 1,
        controlnet_conditioning_scale=0.8,
        control_guidance_start=0.1,
        **({"control_mode": 2} if kind == "union" else {}),
    )
    ours = drawn(model, [control], negative="", steps=steps)
    torch.testing.assert_close(ours, unpack_latents(theirs, *ours.shape[-2:]), rtol=0, atol=1e-4)
    assert float((ours - drawn(model, [], negative="", steps=steps)).abs().max()) > 0.01


def test_a_net_of_another_family_is_refused(tmp_path: Path) -> None:
    model = opened(tiny.tiny_flux(tmp_path / "model"))
    T2IAdapter(channels=[16, 32], num_res_blocks=1).save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"is a T2IAdapter, and .* is controlled by FluxControlNetModel"):
        open_control(model, str(tmp_path / "adapter"))
    write_tensors(tmp_path / "net.safetensors", {"a": torch.zeros(1)})
    with pytest.raises(UserError, match="is one file"):
        open_control(model, str(tmp_path / "net.safetensors"))
