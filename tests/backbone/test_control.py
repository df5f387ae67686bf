"""Control networks against diffusers' own pipelines on random weights: several nets, steps, strengths, guess mode."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    ControlNetModel,
    DiffusionPipeline,
    MultiAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPipeline,
    StableDiffusionXLAdapterPipeline,
    StableDiffusionXLControlNetPipeline,
    T2IAdapter,
)
from torch import Tensor

from backbone.adapters.lora import LORA_WEIGHTS, add_lora
from backbone.conditions.control import Control
from backbone.families.unet.row_lora import RowLora, make_row_lora, read_row_lora
from backbone.io.console import UserError
from backbone.io.files import read_tensors, write_tensors
from backbone.models.cache import encode_prompts_cached
from backbone.models.control import make_control_network, open_control
from backbone.models.model import Backbone
from backbone.models.sample import Request, draw_initial_noise, sample_latents
from customize.objectives.control_networks import save_network
from tests import tiny

STEPS, GUIDANCE, PROMPT, NEGATIVE = 20, 4.0, "a dog in the snow", "a red cat"


def shaken(module: Any, seed: int) -> Any:
    """The same with its zero convolutions random, so that it changes something."""
    random = torch.Generator().manual_seed(seed)
    for value in module.parameters():
        if not value.any():
            value.data = 0.3 * torch.randn(value.shape, generator=random)
    return module.eval()


def controlnet(unet: Any, folder: Path, seed: int, **config: Any) -> Path:
    torch.manual_seed(seed)
    module = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    module.register_to_config(**config)
    shaken(module, seed).save_pretrained(folder)
    return folder


def adapter(folder: Path, seed: int, **config: Any) -> Path:
    torch.manual_seed(seed)
    T2IAdapter(**{"channels": [16, 32], "num_res_blocks": 1} | config).save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Nets:
    """A random model of a family, its control networks, diffusers' pipelines for both kinds and its plain one."""

    model: Backbone
    controlnets: tuple[str, ...]
    adapters: tuple[str, ...]
    with_controlnet: Any
    with_adapter: Any
    plain: Any


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def nets(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Nets:
    place = tmp_path_factory.mktemp(request.param)
    xl = request.param == "sdxl"
    write = tiny.tiny_stable_diffusion_xl if xl else tiny.tiny_pipeline
    model = Backbone.open(str(write(place / "model")), device="cpu", precision="fp32")
    kind = (
        {"adapter_type": "full_adapter_xl", "downscale_factor": 16, "channels": [16, 32, 32, 32]}
        if xl
        else {}
    )
    return Nets(
        model,
        tuple(str(controlnet(model.denoiser, place / f"controlnet{n}", n)) for n in range(2)),
        tuple(str(adapter(place / f"adapter{n}", n, **kind)) for n in range(2)),
        StableDiffusionXLControlNetPipeline if xl else StableDiffusionControlNetPipeline,
        StableDiffusionXLAdapterPipeline if xl else StableDiffusionAdapterPipeline,
        DiffusionPipeline.from_pretrained(model.location.source),
    )


few_or_all = pytest.mark.parametrize("steps", [5, pytest.param(STEPS, marks=pytest.mark.slow)])


def drawn(model: Backbone, controls: Sequence[Control], *, steps: int = STEPS) -> Tensor:
    asked = [Request(PROMPT, (0, 0), NEGATIVE)]
    return next(sample_latents(model, asked, steps=steps, guidance=GUIDANCE, seed=3, controls=controls))


def maps(count: int) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(9))


def by_diffusers(
    nets: Nets, kind: str, modules: Sequence[Any], steps: int, lora: Path | None = None, **said: Any
) -> Tensor:
    """So many guided steps of diffusers' own pipeline from the same noise."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if kind == "controlnet":
            loaded: Any = {"controlnet": list(modules) if len(modules) > 1 else modules[0]}
            pipeline = nets.with_controlnet.from_pipe(nets.plain, **loaded)
        elif lora is None:
            loaded = {"adapter": MultiAdapter(list(modules)) if len(modules) > 1 else modules[0]}
            pipeline = nets.with_adapter.from_pipe(nets.plain, **loaded)
        else:
            pipeline = nets.with_adapter.from_pretrained(nets.model.location.source, adapter=modules[0])
            pipeline.unet.load_lora_adapter(lora, prefix="unet", weight_name=LORA_WEIGHTS)
        pipeline.set_progress_bar_config(disable=True)
        found = pipeline(
            prompt=PROMPT,
            negative_prompt=NEGATIVE,
            latents=draw_initial_noise(nets.model, 3, 0, 0)[None],
            num_inference_steps=steps,
            guidance_scale=GUIDANCE,
            height=64,
            width=64,
            output_type="latent",
            **said,
        )
    return torch.as_tensor(found.images)


CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "scale": (1, {"scale": [0.7]}, {"controlnet_conditioning_scale": 0.7}),
    "share": (
        1,
        {"start": [0.2], "stop": [0.8]},
        {"control_guidance_start": 0.2, "control_guidance_end": 0.8},
    ),
    "guess": (
        1,
        {"guess": [True], "scale": [0.9]},
        {"guess_mode": True, "controlnet_conditioning_scale": 0.9},
    ),
    "two": (
        2,
        {"scale": [0.5, 1.2], "start": [0.0, 0.3], "stop": [0.55, 1.0]},
        {
            "controlnet_conditioning_scale": [0.5, 1.2],
            "control_guidance_start": [0.0, 0.3],
            "control_guidance_end": [0.55, 1.0],
        },
    ),
}


def controls_of(
    model: Backbone, names: Sequence[str], count: int, how: dict[str, list[Any]]
) -> tuple[list[Control], list[Tensor]]:
    hints = list(maps(count).split(1))
    rows = [{name: values[n] for name, values in how.items()} for n in range(count)]
    nets = [open_control(model, name).network for name in names[:count]]
    return [Control.of(net, hint, **row) for net, hint, row in zip(nets, hints, rows, strict=True)], hints


@few_or_all
@pytest.mark.parametrize(
    "case",  # two networks have a scale and a share too
    [pytest.param(case, marks=[pytest.mark.slow] * (case in ("scale", "share"))) for case in CASES],
)
def test_guided_steps_under_controlnets_are_diffusers_own(nets: Nets, case: str, steps: int) -> None:
    count, how, said = CASES[case]
    controls, hints = controls_of(nets.model, nets.controlnets, count, how)
    modules = [control.network.module for control in controls]
    theirs = by_diffusers(nets, "controlnet", modules, steps, image=hints if count > 1 else hints[0], **said)
    ours = drawn(nets.model, controls, steps=steps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float((ours - drawn(nets.model, [], steps=steps)).abs().max()) > 0.01


@few_or_all
@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_guided_steps_under_t2i_adapters_are_diffusers_own(nets: Nets, count: int, steps: int) -> None:
    how: dict[str, list[Any]] = {"scale": [0.7, 1.1], "stop": [0.6] * 2}
    controls, hints = controls_of(nets.model, nets.adapters, count, how)
    modules = [control.network.module for control in controls]
    said: dict[str, Any] = {"adapter_conditioning_scale": how["scale"] if count > 1 else 0.7}
    if "XL" in nets.with_adapter.__name__:  # the other pipeline has no share of the steps
        said["adapter_conditioning_factor"] = 0.6
    else:
        controls = [replace(control, stop=1.0) for control in controls]
    theirs = by_diffusers(nets, "adapter", modules, steps, image=hints if count > 1 else hints[0], **said)
    ours = drawn(nets.model, controls, steps=steps)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert float((ours - drawn(nets.model, [], steps=steps)).abs().max()) > 0.01


def test_on_prompted_rows_alone_guidance_amplifies_control(nets: Nets) -> None:
    """The unconditional prediction is the base's bit for bit, and the guided one goes from there to the controlled."""
    text, empty = (encode_prompts_cached(nets.model, [one]) for one in (PROMPT, ""))
    noisy = torch.randn(1, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))
    level = nets.model.path.levels[500]
    for name in (nets.controlnets[0], nets.adapters[0]):
        control = Control.of(open_control(nets.model, name).network, maps(1), prompted=True)
        told = replace(text, controls=(control,))
        off = replace(empty, controls=(control.unprompted(),))
        guided = nets.model.guided_predictor(told, empty, 3.0)(noisy, level)
        some, none = (nets.model.predictor(one)(noisy, level) for one in (told, empty))
        torch.testing.assert_close(guided.noise, none.noise + 3 * (some.noise - none.noise))
        assert torch.equal(nets.model.predictor(off)(noisy, level).noise, none.noise)
        both = replace(told, controls=(replace(control, prompted=False),))
        assert not torch.allclose(
            nets.model.guided_predictor(both, empty, 3.0)(noisy, level).noise, guided.noise
        )


def test_at_scale_0_a_picture_is_the_base_s_bit_for_bit(nets: Nets) -> None:
    """Alone, and for one of two rows in a batch: the other row's control does not reach it."""
    controls, _ = controls_of(nets.model, (nets.controlnets[0], nets.adapters[0]), 2, {"scale": [0.0, 0.0]})
    assert torch.equal(drawn(nets.model, controls, steps=3), drawn(nets.model, [], steps=3))
    (control,), _ = controls_of(nets.model, nets.controlnets, 1, {})
    text = encode_prompts_cached(nets.model, [PROMPT, PROMPT])
    half = Control.of(control.network, maps(2), scale=torch.tensor([0.0, 1.0]))
    noisy = torch.randn(2, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([500, 500])
    plain = nets.model.predict(noisy, index, text)
    under = nets.model.predict(noisy, index, replace(text, controls=(half,)))
    assert torch.equal(plain[0], under[0]) and not torch.allclose(plain[1], under[1], atol=1e-3)


@pytest.fixture(scope="module")
def with_lora(nets: Nets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A T2I-Adapter with a LoRA of the denoiser beside it."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    shutil.copytree(nets.adapters[0], folder)
    torch.manual_seed(5)
    shaken(make_row_lora(nets.model.denoiser, 3), 5).write(folder)
    return folder


@few_or_all
def test_guided_steps_under_an_adapter_and_its_lora_are_diffusers_own_with_both(
    nets: Nets, with_lora: Path, steps: int
) -> None:
    (control,), hints = controls_of(nets.model, (str(with_lora),), 1, {})
    network = T2IAdapter.from_pretrained(with_lora)
    theirs = by_diffusers(nets, "adapter", [network], steps, lora=with_lora, image=hints[0])
    torch.testing.assert_close(drawn(nets.model, [control], steps=steps), theirs, rtol=0, atol=1e-4)
    (plain,), _ = controls_of(nets.model, nets.adapters, 1, {})
    changed = drawn(nets.model, [control], steps=steps) - drawn(nets.model, [plain], steps=steps)
    assert float(changed.abs().max()) > 0.01


def test_the_lora_of_an_adapter_changes_the_rows_that_a_map_controls_at_its_scale(
    nets: Nets, with_lora: Path
) -> None:
    network = open_control(nets.model, str(with_lora)).network
    text = encode_prompts_cached(nets.model, [PROMPT, PROMPT, PROMPT])
    noisy = torch.randn(1, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))

    def predicted(scales: list[float], *, features: bool = True) -> Tensor:
        control = Control.of(network, maps(1).repeat(3, 1, 1, 1), scale=torch.tensor(scales))
        if not features:
            control = replace(control, hints=tuple(torch.zeros_like(hint) for hint in control.hints))
        told = replace(text, controls=(control,))
        return nets.model.predict(noisy.repeat(3, 1, 1, 1), torch.tensor([500] * 3), told)

    base = nets.model.predict(noisy.repeat(3, 1, 1, 1), torch.tensor([500] * 3), text)
    some = predicted([1.0, 0.0, 0.5])
    assert torch.equal(some[1], base[1])
    torch.testing.assert_close(some[0], predicted([1.0, 1.0, 1.0])[0], rtol=0, atol=1e-5)
    half, whole = (predicted([0.0, scale, 0.0], features=False)[1] - base[1] for scale in (1e-3, 2e-3))
    torch.testing.assert_close(2 * half, whole, rtol=0.02, atol=1e-5)  # its scale is the LoRA's own
    assert half.abs().max() > 1e-5
    assert not any(module._forward_hooks for module in nets.model.denoiser.modules())  # nothing stays behind


def test_a_concept_on_the_same_layers_is_drawn_under_an_adapter_with_a_lora(
    nets: Nets, with_lora: Path
) -> None:
    text = encode_prompts_cached(nets.model, [PROMPT])
    noisy = torch.randn(1, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([500])
    denoiser = nets.model.family.denoiser(nets.model.location, torch.float32).eval()
    network = open_control(nets.model, str(with_lora)).network
    under = replace(text, controls=(Control.of(network, maps(1)),))
    apart = nets.model.predict(noisy, index, under, denoiser=denoiser)
    learned = add_lora(denoiser, "concept", rank=2, alpha=2, targets=("conv1", "conv2"))
    same = nets.model.predict(noisy, index, under, denoiser=denoiser)
    torch.testing.assert_close(same, apart, rtol=0, atol=1e-5)  # a new one changes nothing
    for value in learned.values():
        torch.nn.init.normal_(value, std=0.3)
    assert not torch.allclose(nets.model.predict(noisy, index, under, denoiser=denoiser), apart, atol=1e-3)


def test_a_lora_of_linear_layers_from_elsewhere_changes_a_call_as_it_does_in_diffusers(
    nets: Nets, tmp_path: Path
) -> None:
    denoiser = nets.model.denoiser
    names = [name for name, _ in denoiser.named_modules() if name.endswith(("attn2.to_q", "attn2.to_k"))]
    lora = RowLora(denoiser, dict.fromkeys(names, 2))
    shaken(lora, 3)
    lora.write(tmp_path)
    read = read_row_lora(tmp_path / LORA_WEIGHTS, denoiser)
    text = encode_prompts_cached(nets.model, [PROMPT, PROMPT])
    noisy = torch.randn(2, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([500, 500])
    base = nets.model.predict(noisy, index, text)
    with read.acting(denoiser, torch.tensor([1]), torch.ones(1), 2):
        under = nets.model.predict(noisy, index, text)
    theirs: Any = nets.model.family.denoiser(nets.model.location, torch.float32).eval()
    theirs.load_lora_adapter(tmp_path, prefix="unet", weight_name=LORA_WEIGHTS)
    whole = nets.model.predict(noisy, index, text, denoiser=theirs)
    assert torch.equal(under[0], base[0]) and not torch.allclose(under[1], base[1], atol=1e-3)
    torch.testing.assert_close(under[1], whole[1], rtol=0, atol=1e-5)


def test_a_lora_of_another_denoiser_beside_an_adapter_is_refused(
    nets: Nets, with_lora: Path, tmp_path: Path
) -> None:
    tensors, header = read_tensors(with_lora / LORA_WEIGHTS)
    name = next(key for key in tensors if key.endswith("conv1.lora_A.weight"))
    wrong: dict[str, tuple[dict[str, Tensor], str]] = {
        "other": ({f"unet.elsewhere.{key}": value for key, value in tensors.items()}, "another model"),
        "wide": ({**tensors, name: tensors[name].repeat(1, 2, 1, 1)}, "another model"),
        "half": ({key: value for key, value in tensors.items() if key != name}, "lora_A and a lora_B"),
    }
    for kind, (factors, sentence) in wrong.items():
        shutil.copytree(with_lora, tmp_path / kind)
        write_tensors(tmp_path / kind / LORA_WEIGHTS, factors, header)
        with pytest.raises(UserError, match=sentence):
            open_control(nets.model, str(tmp_path / kind))


@pytest.mark.parametrize("inner", ["controlnet_cond_embedding", "adapter"])
def test_what_reads_the_map_alone_runs_once_for_a_picture(nets: Nets, inner: str) -> None:
    name = nets.adapters[0] if inner == "adapter" else nets.controlnets[0]
    network = open_control(nets.model, name).network
    asked: list[int] = []
    handle = network.module.get_submodule(inner).register_forward_hook(lambda *call: asked.append(1))
    control = Control.of(network, maps(1))
    drawn(nets.model, [control], steps=3)
    handle.remove()
    assert len(asked) == 1
    same_layout = [hint.is_contiguous(memory_format=torch.channels_last) for hint in control.hints]
    assert all(same_layout) or inner != "adapter"  # so that adding them is no copy


def test_a_net_that_reads_colours_from_blue_to_red_answers_as_in_diffusers(
    nets: Nets, tmp_path: Path
) -> None:
    order = {"controlnet_conditioning_channel_order": "bgr"}
    network = open_control(
        nets.model, str(controlnet(nets.model.denoiser, tmp_path / "bgr", 5, **order))
    ).network
    text, seen = encode_prompts_cached(nets.model, [PROMPT]), []
    noisy = torch.randn(1, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))
    handle = nets.model.denoiser.register_forward_pre_hook(
        lambda module, call, named: seen.append(named), with_kwargs=True
    )
    conditions = replace(text, controls=(Control.of(network, maps(1)),))
    nets.model.predict(noisy, torch.tensor([500]), conditions)
    handle.remove()
    (given,) = seen
    ours = [*given.pop("down_block_additional_residuals"), given.pop("mid_block_additional_residual")]
    with torch.no_grad():
        module: Any = network.module
        skips, middle = module(**given | {"return_dict": False, "controlnet_cond": maps(1)})
    torch.testing.assert_close(ours, [*skips, middle], rtol=0, atol=1e-6)


def test_rows_joined_with_uncontrolled_ones_keep_their_own_control(nets: Nets) -> None:
    (control,), _ = controls_of(nets.model, nets.adapters, 1, {"scale": [0.8]})
    text = encode_prompts_cached(nets.model, [PROMPT])
    under = replace(text, controls=(control,))
    both = type(text).cat([text, under])
    assert both.controls[0].scale.tolist() == pytest.approx([0.0, 0.8])
    assert both[:1].at(torch.tensor(5.0)).controls == ()
    noisy = torch.randn(1, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([500])
    joined = nets.model.predict(noisy.repeat(2, 1, 1, 1), index.repeat(2), both)
    apart = [nets.model.predict(noisy, index, one) for one in (text, under)]
    torch.testing.assert_close(joined, torch.cat(apart), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("t2i-adapter", {"num_res_blocks": 1}),
        ("t2i-adapter", {"num_res_blocks": 1, "lora_rank": 2}),
        ("controlnet", {"conditioning_embedding_out_channels": (4, 8, 8, 16)}),
    ],
)
def test_a_new_network_is_trained_through_the_one_prediction_and_opens_again(
    nets: Nets, kind: str, config: dict[str, Any], tmp_path: Path
) -> None:
    net = make_control_network(nets.model, kind, **config)
    text = encode_prompts_cached(nets.model, [PROMPT, NEGATIVE])
    conditions = replace(text, controls=(Control.of(net, maps(2)),))
    noisy = torch.randn(2, *nets.model.latent_shape, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([300, 700])
    before = nets.model.predict(noisy, index, conditions)
    if kind == "controlnet":  # zero convolutions: a new one changes nothing
        assert torch.equal(before, nets.model.predict(noisy, index, text))
    before.square().mean().backward()
    learning = [value for value in net.module.parameters() if value.grad is not None and value.grad.any()]
    assert learning and all(value.grad is None for value in nets.model.denoiser.parameters())
    torch.optim.SGD(net.module.parameters(), lr=0.5).step()
    after = nets.model.predict(noisy, index, replace(text, controls=(Control.of(net, maps(2)),)))
    assert not torch.allclose(before, after, atol=1e-4)
    module: Any = net.module
    if hasattr(module, "lora"):
        save_network(module, "t2i-adapter-lora", tmp_path)
        (tmp_path / "t2i_adapter").rename(tmp_path / "saved")
    else:
        module.save_pretrained(tmp_path / "saved")
    again = open_control(nets.model, str(tmp_path / "saved")).network
    found = nets.model.predict(noisy, index, replace(text, controls=(Control.of(again, maps(2)),)))
    torch.testing.assert_close(found, after.detach(), rtol=0, atol=1e-5)


def test_a_network_of_another_model_is_refused_by_what_differs(nets: Nets, tmp_path: Path) -> None:
    other = controlnet(tiny.tiny_unet(cross_attention_dim=24), tmp_path / "other", 0)
    with pytest.raises(UserError, match=r"other was made for another model: its width of the text is 24"):
        open_control(nets.model, str(other))
    wide = adapter(tmp_path / "wide", 0, channels=[16, 48])
    with pytest.raises(
        UserError, match=r"wide was made for another model: its width of the blocks is 16, 48"
    ):
        open_control(nets.model, str(wide))
    large = {"adapter_type": "full_adapter_xl", "downscale_factor": 16, "channels": [16, 32, 32, 32]}
    swapped = adapter(
        tmp_path / "swapped", 0, **({} if nets.with_adapter is StableDiffusionXLAdapterPipeline else large)
    )
    with pytest.raises(
        UserError, match=r"swapped was made for another model: its adapter_type is full_adapter"
    ):
        open_control(nets.model, str(swapped))
    half = ControlNetModel.from_unet(nets.model.denoiser, conditioning_embedding_out_channels=(4, 8))
    half.save_pretrained(tmp_path / "half")
    with pytest.raises(UserError, match=r"half was made for another model: it makes a map 2 times smaller"):
        open_control(nets.model, str(tmp_path / "half"))
    nowhere = nets.model.location.folder
    assert nowhere is not None
    with pytest.raises(UserError, match=r"UNet2DConditionModel, and .* is controlled by ControlNetModel or"):
        open_control(nets.model, str(nowhere / "unet"))
    with pytest.raises(UserError, match="pickle"):
        open_control(nets.model, "body_pose_model.pth")
    with pytest.raises(UserError, match="no control network"):
        open_control(nets.model, str(tmp_path))


def test_a_share_without_a_step_is_refused(nets: Nets) -> None:
    (control,), _ = controls_of(nets.model, nets.adapters, 1, {"start": [0.5], "stop": [0.52]})
    with pytest.raises(UserError, match="None of 20 steps"):
        drawn(nets.model, [control])
