"""A denoiser that is carried over to other latents says of them what it said of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor

from backbone.diffusion.noise import add_noise, flow, target, vp
from recipes.moji.training.carried import carry_over, carry_over_transformer, encode_with_source

ALPHA_BAR = torch.linspace(0.99, 0.01, 20)
DENSITY = torch.ones(20)


def network(channels: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), layers_per_block=1, cross_attention_dim=6,
        attention_head_dim=1, norm_num_groups=4,
    ).eval()  # fmt: skip


def transformer(channels: int) -> SD3Transformer2DModel:
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=channels, out_channels=channels, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16, joint_attention_dim=6,
        pooled_projection_dim=6, pos_embed_max_size=8,
    ).eval()  # fmt: skip


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of two pipelines' folders that matter, with random weights and three latent channels."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("pipeline")
    transformer(3).save_pretrained(folder / "transformer")
    network(3).save_pretrained(folder / "unet")
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 8), layers_per_block=1, latent_channels=3, norm_num_groups=2,
    ).save_pretrained(folder / "vae")  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    soft = torch.randn(48, 3, 4, 4, generator=torch.Generator().manual_seed(1))
    return F.interpolate(soft, size=16, mode="bicubic")


@pytest.fixture(scope="module")
def latents(source: Path, pictures: Tensor) -> Tensor:
    """The same three numbers and two more, all mixed, with deviation 1."""
    with torch.no_grad():
        old = encode_with_source(source, pictures)
    more = F.avg_pool2d(pictures[:, :2], 2)
    mixing = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)))[0]
    both = torch.cat([old, more], 1)
    both = both / both.std((0, 2, 3), keepdim=True)
    return torch.einsum("ij,bjhw->bihw", mixing, both)


@pytest.fixture(scope="module")
def carried(source: Path, pictures: Tensor, latents: Tensor) -> UNet2DConditionModel:
    torch.manual_seed(3)
    unet = network(5)
    carry_over(
        unet, source, pictures, latents, torch.zeros(48, 2, 6),
        alpha_bar=ALPHA_BAR, density=DENSITY, kind="v_prediction",
    )  # fmt: skip
    return unet


def test_the_trunk_is_kept(carried: UNet2DConditionModel, source: Path) -> None:
    old = UNet2DConditionModel.from_pretrained(source / "unet", local_files_only=True).state_dict()
    new = carried.state_dict()
    assert all(
        torch.equal(new[name], old[name]) for name in new if not name.startswith(("conv_in.", "conv_out."))
    )


def test_new_latents_look_to_the_trunk_like_the_old_ones(
    carried: UNet2DConditionModel, source: Path, pictures: Tensor, latents: Tensor
) -> None:
    old = UNet2DConditionModel.from_pretrained(source / "unet", local_files_only=True)
    with torch.no_grad():
        wanted, found = old.conv_in(encode_with_source(source, pictures)), carried.conv_in(latents)
    assert (found - wanted).square().mean() < 0.3 * wanted.var((0, 2, 3)).mean()


def test_it_begins_better_than_by_saying_nothing(carried: UNet2DConditionModel, latents: Tensor) -> None:
    random = torch.Generator().manual_seed(4)
    level = vp(ALPHA_BAR[torch.randint(20, (48,), generator=random)])
    noise = torch.randn(latents.shape, generator=random)
    index = torch.zeros(48, dtype=torch.long)
    with torch.no_grad():
        said = carried(add_noise(latents, noise, level), index, torch.zeros(48, 2, 6)).sample
    wanted = target(latents, noise, level, "v_prediction")
    assert (said - wanted).square().mean() < 0.9 * wanted.square().mean()


def test_on_its_own_latents_a_network_is_what_it_was(source: Path, pictures: Tensor) -> None:
    with torch.no_grad():
        own = encode_with_source(source, pictures)
    unet, text = network(3), torch.zeros(len(own), 1, 6)
    carry_over(
        unet,
        source,
        pictures,
        own.half().float(),
        text,
        alpha_bar=ALPHA_BAR,
        density=DENSITY,
        kind="v_prediction",
    )
    old = UNet2DConditionModel.from_pretrained(source / "unet").state_dict()
    assert all(torch.equal(value, old[name]) for name, value in unet.state_dict().items())


def test_a_transformer_is_carried_over_by_its_patches(
    source: Path, pictures: Tensor, latents: Tensor
) -> None:
    torch.manual_seed(5)
    new = transformer(5)
    carry_over_transformer(new, source, pictures, latents, torch.zeros(48, 2, 6), torch.zeros(48, 6))
    old = SD3Transformer2DModel.from_pretrained(source / "transformer", local_files_only=True)
    ends = "pos_embed.proj.", "proj_out."
    kept = [name for name in old.state_dict() if not name.startswith(ends)]
    assert all(torch.equal(new.state_dict()[name], old.state_dict()[name]) for name in kept)

    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(6))
    level = flow(torch.linspace(0.1, 0.9, 48))
    with torch.no_grad():
        seen, shown = old.pos_embed.proj(encode_with_source(source, pictures)), new.pos_embed.proj(latents)
        said = new(
            add_noise(latents, noise, level), torch.zeros(48, 2, 6), torch.zeros(48, 6), 1000 * level.b
        ).sample
    assert (shown - seen).square().mean() < 0.3 * seen.var((0, 2, 3)).mean()
    wanted = target(latents, noise, level, "flow")
    assert (
        said - wanted
    ).square().mean() < 0.7 * wanted.square().mean()  # 1.7 times it if the patches are in another order


def test_on_its_own_latents_a_transformer_is_what_it_was(source: Path, pictures: Tensor) -> None:
    with torch.no_grad():
        own = encode_with_source(source, pictures)
    new = transformer(3)
    carry_over_transformer(new, source, pictures, own, torch.zeros(48, 2, 6), torch.zeros(48, 6))
    old = SD3Transformer2DModel.from_pretrained(source / "transformer", local_files_only=True).state_dict()
    assert all(torch.equal(value, old[name]) for name, value in new.state_dict().items())
