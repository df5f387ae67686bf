"""An autoencoder that begins as a linear transform codec: the principal components of 8 × 8 patches, and back.

From random weights an `AutoencoderKL` of this size spends its first hour on finding out where in a cell of 8 × 8 pixels
an edge lies. A linear transform knows that at once, and the layers of the class can express it, so `begin` writes it
into them. Why each part is exact, or nearly:

- **Residual blocks.** Their second convolution is zero, so a block is its shortcut, and the whole trunk is linear.
- **Down, three times.** The 2 × 2 patches of a picture are four of its pixels, 4 × 4 patches four of those of 2 × 2,
  and so on: whatever is linear in a patch is linear in the complete components of its four quarters. A convolution of
  stride 2 reads exactly them with the first 2 × 2 of its taps; the border that the class pads below and to the right
  meets only the others. Components up to 4 × 4 (3, 12 and 48) fit into the widths 16, 48 and 96 complete, so nothing
  is lost before the last step keeps the first `KEPT` of the 192 components of 8 × 8.
- **Norm and activation before the encoder's last convolution.** silu(u) − silu(−u) = u, so each component stands
  twice, as u and −u, and the last convolution subtracts. The pairs' mean is zero. Two constants ±`LOUD` in each group
  make its deviation nearly the same for every picture, and the norm's own scale undoes it.
- **Up, three times.** Nearest-neighbour upsampling and one 3 × 3 convolution cannot place detail exactly (a constant
  field stays constant), so these are the least-squares convolutions to the components of the next finer patches,
  fitted one after the other on pictures. The decoder's first convolution gives them the latents and their neighbours.
- **Before the decoder's last convolution** the pairs and constants stand again, one group for each colour.

Outputs that the transform does not need keep a third of their default weights, for training to use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor, nn

KEPT = 64  # components of 8 × 8 patches that reach the encoder's last level
LOUD, LOUD_PIXELS = 12.0, 4.0  # against components of deviation 1, and pixels in −1…1
LOG_VARIANCE = -6.0  # posteriors begin with a deviation of 5 % of the latents'
SPARE = 0.3  # of the default weights that the transform does not need
NEIGHBOURS = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
RIDGE = 1e-3
ROWS = 60_000  # at least this many places enter a least-squares fit


@dataclass(frozen=True)
class Components:
    """Principal components of colour patches, the most important first: mean [D], directions [D, D], deviations [D]."""

    side: int
    mean: Tensor
    directions: Tensor
    deviations: Tensor

    def project(self, pictures: Tensor, count: int) -> Tensor:
        """The first components of every patch, with deviation 1: [B, 3, H, W] → [B, count, H/side, W/side]."""
        rows = split_patches(pictures, self.side) - self.mean.float()
        projected = rows @ self.directions[:count].T.float() / self.deviations[:count].float()
        return projected.permute(0, 3, 1, 2).contiguous()

    def reconstruct(self, projected: Tensor) -> Tensor:
        """Pictures from their first components; the other components are at their means."""
        count, side = projected.shape[1], self.side
        rows = (
            projected.permute(0, 2, 3, 1) * self.deviations[:count].float() @ self.directions[:count].float()
        )
        cells = (rows + self.mean.float()).unflatten(-1, (3, side, side))
        pictures: Tensor = cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        return pictures


def split_patches(pictures: Tensor, side: int) -> Tensor:
    """[B, 3, H, W] → [B, H/side, W/side, 3 · side²]."""
    cells: Tensor = pictures.unflatten(3, (-1, side)).unflatten(2, (-1, side))
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(3)


def fit_components(pictures: Tensor, side: int) -> Components:
    """The principal components of the patches of pictures [B, 3, H, W]."""
    rows = split_patches(pictures, side).flatten(0, 2).double()
    mean = rows.mean(0)
    centred = rows - mean
    variances, directions = torch.linalg.eigh(centred.T @ centred / len(rows))
    return Components(side, mean, directions.flip(1).T.contiguous(), variances.flip(0).clamp(min=1e-9).sqrt())


def combine_quarters(fine: Components, coarse: Components, count: int) -> tuple[Tensor, Tensor]:
    """The map from four quarters' components to a coarse patch's first ones: weights [count, D, 2, 2], bias [count]."""
    directions = coarse.directions[:count] / coarse.deviations[:count, None]
    quarters = directions.unflatten(1, (3, 2, fine.side, 2, fine.side)).permute(0, 2, 4, 1, 3, 5).flatten(3)
    to_pixels = fine.directions.T * fine.deviations  # a patch is this times its components, plus its mean
    weight = (quarters @ to_pixels).permute(0, 3, 1, 2)
    bias = (quarters @ fine.mean).sum((1, 2)) - directions @ coarse.mean
    return weight.float(), bias.float()


def fit_convolution(inputs: Tensor, targets: Tensor, *, ridge: float = RIDGE) -> tuple[Tensor, Tensor]:
    """The least-squares 3 × 3 convolution from inputs [B, c, H, W] to targets [B, k, H, W]: weight and bias.

    It is fitted under white noise on the inputs, whose variance is `ridge` of theirs.
    """
    side, channels = inputs.shape[2], inputs.shape[1]
    places = max(64, min(side * side, ROWS // len(inputs)))
    random = torch.Generator().manual_seed(0)
    size = 9 * channels + 1
    gram, mixed = torch.zeros(size, size), torch.zeros(size, targets.shape[1])
    for picture, target in zip(inputs, targets, strict=True):
        picks = torch.randperm(side * side, generator=random)[:places]
        rows = F.unfold(picture[None], 3, padding=1)[0].T[picks]
        rows = torch.cat([rows, torch.ones(len(rows), 1)], 1)
        gram += rows.T @ rows
        mixed += rows.T @ target.flatten(1).T[picks]
    noise = ridge * gram.diagonal()[:-1].mean() * torch.ones(size)
    noise[-1] = 0
    gram += noise.diag()
    solved = torch.linalg.solve(gram.double(), mixed.double()).float()
    return solved[:-1].T.reshape(-1, channels, 3, 3), solved[-1]


@torch.no_grad()
def begin_linear(model: AutoencoderKL, pictures: Tensor) -> None:
    """Makes a fresh model the transform codec of pictures [B, 3, H, W] in −1…1 (some hundreds; 1,200 are plenty).

    Its latents' means are then the first principal components of 8 × 8 patches, with mean 0 and deviation 1.
    """
    for module in (*model.encoder.modules(), *model.decoder.modules()):
        if type(module).__name__ == "ResnetBlock2D":
            zero_weights(module.conv2)
        elif type(module).__name__ == "Attention":
            zero_weights(module.to_out[0])
    for module in (model.quant_conv, model.post_quant_conv):
        zero_weights(module)
        module.weight[:, :, 0, 0] = torch.eye(len(module.weight))
    levels = [fit_components(pictures, side) for side in (1, 2, 4, 8)]
    begin_encoder(model, levels)
    begin_decoder(model, levels, pictures)


def begin_encoder(model: AutoencoderKL, levels: list[Components]) -> None:
    """Writes the components of patches, level by level, into the first outputs of every convolution on the way."""
    encoder, widths = model.encoder, list(model.config.block_out_channels)
    counts = [3, 12, 48, min(KEPT, widths[2])]
    assert counts[1] <= widths[0] and counts[2] <= widths[1] and model.config.latent_channels <= counts[3]
    colours = levels[0]
    weight = (colours.directions / colours.deviations[:, None]).float()
    write_transform(encoder.conv_in, place_in_centre(weight), -weight @ colours.mean.float())
    for level, block in enumerate(encoder.down_blocks[:3]):
        weight, bias = combine_quarters(levels[level], levels[level + 1], counts[level + 1])
        write_transform(block.downsamplers[0].conv, F.pad(weight, (0, 1, 0, 1)), bias)
        if level < 2:
            write_transform(
                encoder.down_blocks[level + 1].resnets[0].conv_shortcut, make_identity(counts[level + 1])
            )

    groups, channels = model.config.norm_num_groups, model.config.latent_channels
    size, pairs = widths[3] // groups, -(-channels // groups)  # of a group; of the group that has most
    assert 2 + 2 * pairs <= size, "too many latent channels for these groups"
    shortcut = encoder.down_blocks[3].resnets[0].conv_shortcut
    norm, last = encoder.conv_norm_out, encoder.conv_out
    shortcut.weight *= SPARE
    zero_weights(last)
    nn.init.zeros_(shortcut.bias)
    nn.init.zeros_(norm.bias)
    nn.init.constant_(norm.weight, ((2 * LOUD**2 + 2 * pairs) / size) ** 0.5)
    for group in range(groups):
        constants = slice(group * size, group * size + 2)
        shortcut.weight[constants] = 0
        shortcut.bias[constants] = torch.tensor([LOUD, -LOUD])
        norm.weight[constants] = 1  # nothing reads them yet, and they need not be loud
    for channel in range(channels):
        plus = (channel % groups) * size + 2 + 2 * (channel // groups)
        shortcut.weight[plus : plus + 2] = 0
        shortcut.weight[plus, channel], shortcut.weight[plus + 1, channel] = 1, -1
        last.weight[channel, plus, 1, 1], last.weight[channel, plus + 1, 1, 1] = 1, -1
    last.bias[channels:] = LOG_VARIANCE


def begin_decoder(model: AutoencoderKL, levels: list[Components], pictures: Tensor) -> None:
    """Writes the least-squares way back into the decoder, each step fitted to what the one before it gives."""
    decoder, widths = model.decoder, list(model.config.block_out_channels)
    channels = model.config.latent_channels
    neighbours = NEIGHBOURS[: widths[3] // channels]
    weight = torch.zeros(len(neighbours), channels, channels, 3, 3)
    for number, (down, right) in enumerate(neighbours):
        weight[number, :, :, 1 + down, 1 + right] = torch.eye(channels)
    write_transform(decoder.conv_in, weight.flatten(0, 1))
    hidden = F.conv2d(levels[3].project(pictures, channels), weight.flatten(0, 1), padding=1)
    counts = (min(48, widths[2]), min(12, widths[1]), 3)
    for number, (block, finer, count) in enumerate(
        zip(decoder.up_blocks[:3], reversed(levels[:3]), counts, strict=True)
    ):
        upsampled = F.interpolate(hidden, scale_factor=2, mode="nearest")
        targets = finer.project(pictures, count) if number < 2 else pictures
        weight, bias = fit_convolution(upsampled, targets)
        if number < 2:
            hidden = F.conv2d(upsampled, weight, bias, padding=1)
            write_transform(decoder.up_blocks[number + 1].resnets[0].conv_shortcut, make_identity(count))
        else:
            # Red, green, blue, and minus each
            weight, bias = (torch.cat([weight, -weight]), torch.cat([bias, -bias]))
        write_transform(block.upsamplers[0].conv, weight, bias)

    size = widths[0] // model.config.norm_num_groups
    assert model.config.norm_num_groups >= 3 and size >= 4, "a colour needs a group of four"
    shortcut = decoder.up_blocks[3].resnets[0].conv_shortcut
    norm, last = decoder.conv_norm_out, decoder.conv_out
    shortcut.weight *= SPARE
    last.weight *= 0.1
    for vector in (shortcut.bias, norm.bias, last.bias):
        nn.init.zeros_(vector)
    nn.init.constant_(norm.weight, (2 * (LOUD_PIXELS**2 + float(pictures.var())) / size) ** 0.5)
    for colour in range(3):
        plus = colour * size
        shortcut.weight[plus : plus + 4] = 0
        shortcut.weight[plus, colour], shortcut.weight[plus + 1, 3 + colour] = 1, 1
        shortcut.bias[plus + 2 : plus + 4] = torch.tensor([LOUD_PIXELS, -LOUD_PIXELS])
        norm.weight[plus + 2 : plus + 4] = 1
        last.weight[:, plus : plus + 2] = 0
        last.weight[colour, plus, 1, 1], last.weight[colour, plus + 1, 1, 1] = 1, -1


def write_transform(convolution: nn.Conv2d, weight: Tensor, bias: Tensor | None = None) -> None:
    """Puts a transform into the first inputs and outputs; its outputs read nothing else, the spare ones little."""
    outputs, inputs = weight.shape[:2]
    assert convolution.bias is not None
    convolution.weight *= SPARE
    convolution.bias *= SPARE
    convolution.weight[:outputs] = 0
    convolution.weight[:outputs, :inputs] = weight
    convolution.bias[:outputs] = 0 if bias is None else bias


def zero_weights(layer: nn.Conv2d | nn.Linear) -> None:
    """Makes a layer return zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


def place_in_centre(matrix: Tensor) -> Tensor:
    """A matrix as the 3 × 3 convolution that looks at the middle pixel alone."""
    return F.pad(matrix[:, :, None, None], (1, 1, 1, 1))


def make_identity(size: int) -> Tensor:
    """The identity as a 1 × 1 convolution."""
    return torch.eye(size)[:, :, None, None]
