"""A denoiser carried over to the latents of another autoencoder: what it knows of the world stays.

Its trunk is kept. The first convolution is the least-squares fit that gives for new latents what the old one gave for
the old latents of the same pictures; the last one is the least-squares map from the trunk's features, of noisy new
latents, to the network's target. Both are solved, not trained, in about a minute. If the latents are the
old ones nothing is solved, and the network is the old one. A transformer of Stable Diffusion 3's kind is carried over
alike: its ends are the embedding of patches and the projection back to them.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, SD3Transformer2DModel, UNet2DConditionModel
from torch import Tensor, nn

from backbone.diffusion.noise import PredictionType, add_noise, flow, generator, target, vp
from recipes.moji.autoencoder import SCALING_FACTOR, precision
from recipes.moji.training.linear_start import RIDGE, fit_convolution

NOISE = 0.3  # variance of the noise that the first convolution must bear, in units of a latent's
BATCH = 16
SAME = 0.01  # mean squared difference of latents of unit deviation below which they are an autoencoder's own
ENDS = "conv_in.", "conv_out."
TRANSFORMER_ENDS = "pos_embed.proj.", "proj_out."


@torch.no_grad()
def carry_over(
    unet: UNet2DConditionModel,
    source: Path,
    pictures: Tensor,
    latents: Tensor,
    text: Tensor,
    *,
    alpha_bar: Tensor,
    density: Tensor,
    kind: PredictionType,
) -> None:
    """Gives a fresh network the weights of the pipeline folder `source`.

    `latents` [B, C, h, w] of unit deviation and `text` [B, L, D] belong to `pictures` [B, 3, H, W].
    """
    old = UNet2DConditionModel.from_pretrained(source / "unet", local_files_only=True).float()
    source_latents = encode_with_source(source, pictures)
    if take_over(unet, old, source_latents, latents, ends=ENDS):
        return
    activations = F.conv2d(source_latents, old.conv_in.weight, old.conv_in.bias, padding=1)
    weight, bias = fit_convolution(latents, activations, ridge=NOISE)
    unet.conv_in.weight.copy_(weight)
    unet.conv_in.bias.copy_(bias)

    features: list[Tensor] = []
    hook = unet.conv_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))
    targets = []
    for number, (clean, states) in enumerate(zip(latents.split(BATCH), text.split(BATCH), strict=True)):
        random = generator("carried", number)
        index = torch.multinomial(density, len(clean), replacement=True, generator=random)
        noise = torch.randn(clean.shape, generator=random)
        level = vp(alpha_bar[index])
        with precision(clean.device):
            unet(add_noise(clean, noise, level), index, states)
        targets.append(target(clean, noise, level, kind))
    hook.remove()
    weight, bias = fit_convolution(torch.cat(features), torch.cat(targets))
    unet.conv_out.weight.copy_(weight)
    unet.conv_out.bias.copy_(bias)


@torch.no_grad()
def carry_over_transformer(
    network: SD3Transformer2DModel,
    source: Path,
    pictures: Tensor,
    latents: Tensor,
    hidden: Tensor,
    pooled: Tensor,
) -> None:
    """Gives a fresh flow transformer the weights of the pipeline folder `source`.

    `latents` [B, C, h, w] of unit deviation, the encoded texts `hidden` [B, L, D] and `pooled` [B, D] belong to
    `pictures` [B, 3, H, W].
    """
    old = SD3Transformer2DModel.from_pretrained(source / "transformer", local_files_only=True).float()
    source_latents = encode_with_source(source, pictures)
    if take_over(network, old, source_latents, latents, ends=TRANSFORMER_ENDS):
        return
    embedding = network.pos_embed.proj
    activations = old.pos_embed.proj(source_latents).movedim(1, -1)
    weight, bias = fit_linear_map(
        F.unfold(latents, 2, stride=2).mT.flatten(0, 1), activations.flatten(0, 2), ridge=NOISE
    )
    embedding.weight.copy_(weight.view_as(embedding.weight))
    embedding.bias.copy_(bias)

    features: list[Tensor] = []
    hook = network.proj_out.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0].float()))
    targets = []
    for number, (clean, states, summary) in enumerate(
        zip(latents.split(BATCH), hidden.split(BATCH), pooled.split(BATCH), strict=True)
    ):
        random = generator("carried", number)
        level = flow(torch.randn(len(clean), generator=random).sigmoid())
        noise = torch.randn(clean.shape, generator=random)
        with precision(clean.device):
            network(add_noise(clean, noise, level), states, summary, 1000 * level.b)
        # A patch's values: channels, then pixels; the network has pixels, then channels
        patches = F.unfold(target(clean, noise, level, "flow"), 2, stride=2).mT
        targets.append(patches.unflatten(-1, (-1, 4)).mT.flatten(-2))
    hook.remove()
    weight, bias = fit_linear_map(torch.cat(features).flatten(0, 1), torch.cat(targets).flatten(0, 1))
    network.proj_out.weight.copy_(weight)
    network.proj_out.bias.copy_(bias)


def take_over(
    network: nn.Module, old: nn.Module, source_latents: Tensor, latents: Tensor, *, ends: tuple[str, ...]
) -> bool:
    """Gives a network the old one's weights: all of them if the latents are its own (True), else all but its ends."""
    same = source_latents.shape == latents.shape and float((source_latents - latents).square().mean()) < SAME
    weights = {name: value for name, value in old.state_dict().items() if same or not name.startswith(ends)}
    network.load_state_dict(weights, strict=same)
    return same


def fit_linear_map(inputs: Tensor, targets: Tensor, *, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The least-squares linear map from inputs [N, k] to targets [N, m]: weight [m, k] and bias [m].

    It is fitted under white noise on the inputs, whose variance is `ridge` of theirs.
    """
    input_mean, target_mean = inputs.mean(0), targets.mean(0)
    rows = (inputs - input_mean).double()
    gram = rows.T @ rows
    gram += ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    weight = torch.linalg.solve(gram, rows.T @ (targets - target_mean).double()).T.float()
    return weight, target_mean - weight @ input_mean


def encode_with_source(source: Path, pictures: Tensor) -> Tensor:
    """Latents of pictures by the pipeline's own autoencoder, in units of their deviation."""
    vae = AutoencoderKL.from_pretrained(source / "vae", local_files_only=True).float().eval()
    with precision(pictures.device):
        parts = [vae.encode(batch).latent_dist.mean.float() for batch in pictures.split(BATCH)]
    return torch.cat(parts) * SCALING_FACTOR
