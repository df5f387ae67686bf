"""A step of Diffusion-DPO on every family is the paper's formula, written out with diffusers' networks and paths."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from align.objectives.dataset import Items
from align.objectives.preference import PreferenceTraining
from tests import tiny
from tests.align.objectives.test_preference import data, opened, settings

Native = Callable[[Any, Tensor, Tensor, dict[str, Tensor]], Tensor]
"""(denoiser, noisy, timestep, text) → prediction, as diffusers' pipelines call it."""


def sd(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    return cast(Tensor, net(noisy, t, encoder_hidden_states=text["hidden"]).sample)


def sdxl(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    side = 8.0 * noisy.shape[-1]
    added = {
        "text_embeds": text["pooled"],
        "time_ids": torch.tensor([[side, side, 0, 0, side, side]]).repeat(len(noisy), 1),
    }
    said = net(noisy, t, encoder_hidden_states=text["hidden"], added_cond_kwargs=added)
    return cast(Tensor, said.sample)


def sd3(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    said = net(
        hidden_states=noisy,
        timestep=t,
        encoder_hidden_states=text["hidden"],
        pooled_projections=text["pooled"],
    )
    return cast(Tensor, said.sample)


def flux(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    from diffusers import FluxPipeline

    count, channels, height, width = noisy.shape
    said = net(
        hidden_states=FluxPipeline._pack_latents(noisy, count, channels, height, width),
        timestep=t / 1000,
        guidance=torch.ones(count),
        encoder_hidden_states=text["hidden"],
        pooled_projections=text["pooled"],
        txt_ids=torch.zeros(text["hidden"].shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(
            count, height // 2, width // 2, noisy.device, noisy.dtype
        ),
    ).sample
    patches = said.view(count, height // 2, width // 2, channels, 2, 2)
    return cast(Tensor, patches.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape))


def pixart(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    said = net(
        noisy,
        encoder_hidden_states=text["hidden"],
        encoder_attention_mask=text["mask"],
        timestep=t,
        added_cond_kwargs={"resolution": None, "aspect_ratio": None},
    ).sample
    return cast(Tensor, said.chunk(2, dim=1)[0])


def z_image(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    rows = [hidden[mask.bool()] for hidden, mask in zip(text["hidden"], text["mask"], strict=True)]
    said = net([picture[:, None] for picture in noisy], (1000 - t) / 1000, rows).sample
    return -torch.stack(said)[:, :, 0]


def flux2(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    from diffusers import Flux2KleinPipeline as Klein

    said = net(
        hidden_states=Klein._pack_latents(noisy),
        timestep=t / 1000,
        encoder_hidden_states=text["hidden"],
        txt_ids=Klein._prepare_text_ids(text["hidden"]),
        img_ids=Klein._prepare_latent_ids(noisy),
    ).sample
    return cast(Tensor, said.transpose(1, 2).reshape(noisy.shape))


def qwen_image(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    from diffusers import QwenImagePipeline as Qwen

    longest, side = int(text["mask"].sum(1).max()), 8 * noisy.shape[-1]
    said = net(
        hidden_states=Qwen._pack_latents(noisy, *noisy.shape),
        timestep=t / 1000,
        encoder_hidden_states=text["hidden"][:, :longest],
        encoder_hidden_states_mask=text["mask"][:, :longest],
        img_shapes=[[(1, side // 16, side // 16)]] * len(noisy),
    ).sample
    return cast(Tensor, Qwen._unpack_latents(said, side, side, 8)[:, :, 0])


def krea2(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    from diffusers import Krea2Pipeline as Krea2
    from diffusers import QwenImagePipeline as Qwen

    side = noisy.shape[-1]
    said = net(
        hidden_states=Qwen._pack_latents(noisy, *noisy.shape),
        encoder_hidden_states=text["hidden"],
        timestep=t / 1000,
        position_ids=Krea2.prepare_position_ids(512, side // 2, side // 2, noisy.device),
        encoder_attention_mask=text["mask"].bool(),
    ).sample
    return cast(Tensor, Qwen._unpack_latents(said, 8 * side, 8 * side, 8)[:, :, 0])


def flux2_dev(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    from diffusers import Flux2Pipeline as Dev

    said = net(
        hidden_states=Dev._pack_latents(noisy),
        timestep=t / 1000,
        guidance=torch.ones(len(noisy)),
        encoder_hidden_states=text["hidden"],
        txt_ids=Dev._prepare_text_ids(text["hidden"]),
        img_ids=Dev._prepare_latent_ids(noisy),
    ).sample
    return cast(Tensor, said.transpose(1, 2).reshape(noisy.shape))


def chroma(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    from diffusers import ChromaPipeline as Pipeline

    count, channels, height, width = noisy.shape
    longest = int(text["mask"].sum(1).max())
    mask = torch.cat([text["mask"][:, :longest], torch.ones(count, height * width // 4)], dim=1).bool()
    said = net(
        hidden_states=Pipeline._pack_latents(noisy, count, channels, height, width),
        timestep=t / 1000,
        encoder_hidden_states=text["hidden"][:, :longest],
        txt_ids=torch.zeros(longest, 3),
        img_ids=Pipeline._prepare_latent_image_ids(count, height // 2, width // 2, noisy.device, noisy.dtype),
        attention_mask=mask,
    ).sample
    patches = said.view(count, height // 2, width // 2, channels, 2, 2)
    return cast(Tensor, patches.permute(0, 3, 1, 4, 2, 5).reshape(noisy.shape))


def qwen_image21(net: Any, noisy: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    if len(set(text["mask"].sum(1).tolist())) > 1:  # places in the image depend on the length of the text
        rows = [{name: value[n : n + 1] for name, value in text.items()} for n in range(len(noisy))]
        return torch.cat(
            [qwen_image21(net, noisy[n : n + 1], t[n : n + 1], row) for n, row in enumerate(rows)]
        )
    count, _, height, width = noisy.shape
    longest = int(text["mask"].sum(1).max())
    slots = torch.cat([torch.zeros(count, longest), torch.ones(count, height * width // 4)], dim=1).bool()
    said = net(
        hidden_states=noisy.flatten(2).transpose(1, 2),
        timestep=t / 1000,
        encoder_hidden_states=text["hidden"][:, :longest],
        encoder_hidden_states_mask=text["mask"][:, :longest].bool(),
        img_shapes=[[(1, height, width)]] * count,
        img_mask=slots,
    ).sample
    return cast(Tensor, said[:, -height * width :].transpose(1, 2).reshape(noisy.shape))


FAMILIES: dict[str, tuple[Callable[[Path], Path], Native]] = {
    "sd": (tiny.tiny_pipeline, sd),
    "sdxl": (tiny.tiny_stable_diffusion_xl, sdxl),
    "sd3": (tiny.tiny_stable_diffusion_3, sd3),
    "flux": (tiny.tiny_flux, flux),
    "pixart": (tiny.tiny_pixart, pixart),
    "z-image": (tiny.tiny_z_image, z_image),
    "flux2": (tiny.tiny_flux2_klein, flux2),
    "qwen-image": (tiny.tiny_qwen_image, qwen_image),
    "krea2": (tiny.tiny_krea2, krea2),
    "flux2-dev": (tiny.tiny_flux2_dev, flux2_dev),
    "chroma": (tiny.tiny_chroma, chroma),
    "qwen-image-2.1": (tiny.tiny_qwen_image21, qwen_image21),
}


def switch_adapters(denoiser: nn.Module, *, on: bool) -> None:
    """As peft does it, layer by layer."""
    for layer in denoiser.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.enable_adapters(on)


UNREAD = ("qwen-image", "qwen-image-2.1")  # in which nobody reads what the last block says of the words
LONG = ("flux2", "qwen-image", "krea2", "flux2-dev", "chroma", "qwen-image-2.1")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in FAMILIES]
)
def test_a_step_is_the_paper_s_formula_in_loss_and_gradient(
    tmp_path: Path, pairs_file: Path, name: str
) -> None:
    build, native = FAMILIES[name]
    folder = build(tmp_path / name)
    model, asked = opened(folder), settings(evaluation_draws=1, beta=300.0, prompt_dropout=0.0)
    run = PreferenceTraining(model, data(model, pairs_file, asked), asked)
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for value in run.parameters.values():
            value += 0.1 * torch.randn(value.shape, generator=random)
    (ours,) = run.losses(1)
    gradients = torch.autograd.grad(ours, list(run.parameters.values()), allow_unused=name in UNREAD)

    chosen = run.list_samples(1)
    items = [run.data.train[row] for row, _ in chosen]
    clean = torch.stack([run.data.latents[item.pictures[g]] for g in (0, 1) for item in items])
    ks = [k for _, k in chosen]
    noise = run.samples.noise(Items.of(items), ks, clean.shape[1:])
    index = run.samples.find_levels(Items.of(items), ks)
    said = [item.prompt for item in items]
    noise, index = noise.repeat(2, 1, 1, 1), index.repeat(2)
    text = run.data.conditions[said].repeat(2).text
    assert model.path.levels.time is not None
    time = model.path.levels.time[index]
    if model.path.prediction_type == "flow":
        sigma = (time / 1000)[:, None, None, None]
        noisy, target = (1 - sigma) * clean + sigma * noise, noise - clean
    else:
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
        noisy, target = scheduler.add_noise(clean, noise, time.long()), noise
    denoiser = cast(Any, model.denoiser)

    def errors() -> Tensor:
        return (native(denoiser, noisy, time, text) - target).square().mean(dim=(1, 2, 3))

    switch_adapters(denoiser, on=False)
    with torch.no_grad():
        reference_w, reference_l = errors().chunk(2)
    switch_adapters(denoiser, on=True)
    model_w, model_l = errors().chunk(2)
    inside = -0.5 * asked.beta * ((model_w - model_l) - (reference_w - reference_l))
    literal = -F.logsigmoid(inside).mean()
    theirs = torch.autograd.grad(literal, list(run.parameters.values()), allow_unused=name in UNREAD)

    assert float(inside.detach().abs().max()) > 1e-3, "the adapter changes something"
    assert float(ours) == pytest.approx(float(literal), rel=1e-4)
    assert [value is None for value in gradients] == [value is None for value in theirs]
    scale = max(float(value.abs().max()) for value in theirs if value is not None)
    assert scale > 0
    for first, second in zip(gradients, theirs, strict=True):
        assert first is None or float((first - second).abs().max()) < 1e-4 * scale
