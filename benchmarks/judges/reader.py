"""The reader of the benchmarks: a small U-Net that predicts label and depth of every pixel of a sampled picture.

It is trained by `recipes.moji.reader` on scenes whose labels and depths are known, as the autoencoder decodes them with
a little noise, and lies in `build/moji/control/reader` until it is good enough to be kept. `reader.json` beside the
weights holds its accuracies on held-out scenes, which bound what it says.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from backbone.io.files import read_tensors
from backbone.world.rendering.record import load_labels
from benchmarks.judges.classifier import prepare_images

FOLDER = Path("build/moji/control/reader")
WEIGHTS = "reader.safetensors"
WIDTHS = (24, 48, 80, 112)


class Reading(NamedTuple):
    """Of B pictures: the numbers of the labels [B, 128, 128], and the depths in 0…1 [B, 128, 128]."""

    labels: Tensor
    depth: Tensor


class Reader(nn.Module):
    """A U-Net (Ronneberger et al. 2015) of half a million parameters: pictures to logits of labels, and a depth."""

    def __init__(self, labels: int = 0) -> None:
        super().__init__()
        self.labels = labels or len(load_labels())
        sides = [(3, WIDTHS[0]), *itertools.pairwise(WIDTHS)]
        self.down = nn.ModuleList(
            [
                _make_layers(in_channels, width, stride=1 if not n else 2)
                for n, (in_channels, width) in enumerate(sides)
            ]
        )
        back = itertools.pairwise(WIDTHS[::-1])
        self.up = nn.ModuleList([_make_layers(in_channels + width, width) for in_channels, width in back])
        self.head = nn.Conv2d(WIDTHS[0], self.labels + 1, 1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, H, W] in −1…1 to logits [B, labels, H, W] and depths [B, H, W]."""
        skips = [pictures]
        for layer in self.down:
            skips.append(layer(skips[-1]))
        x = skips.pop()
        for layer in self.up:
            skip = skips.pop()
            x = layer(torch.cat([F.interpolate(x, size=skip.shape[2:]), skip], 1))
        out = self.head(x)
        return out[:, :-1], out[:, -1].sigmoid()

    @torch.no_grad()
    def read(self, images: Sequence[Image.Image], *, batch: int = 32) -> Reading:
        """Labels and depths of images; those of another size are scaled to 128 × 128."""
        labels, depths = [], []
        for first in range(0, len(images), batch):
            logits, depth = self(prepare_images(images[first : first + batch]))
            labels.append(logits.argmax(1))
            depths.append(depth)
        return Reading(torch.cat(labels), torch.cat(depths))


def load_reader(folder: Path = FOLDER) -> Reader | None:
    """The trained reader; None if there is none."""
    if not (folder / WEIGHTS).is_file():
        return None
    reader = Reader()
    reader.load_state_dict({name: value.float() for name, value in read_tensors(folder / WEIGHTS)[0].items()})
    return reader.eval().requires_grad_(False)


def _make_layers(in_channels: int, width: int, *, stride: int = 1) -> nn.Module:
    """Two 3 × 3 convolutions; the first may halve the size."""
    parts: list[nn.Module] = []
    for number in range(2):
        channels = in_channels if number == 0 else width
        parts += [
            nn.Conv2d(channels, width, 3, stride=stride if number == 0 else 1, padding=1, bias=False),
            nn.GroupNorm(8, width),
            nn.SiLU(),
        ]
    return nn.Sequential(*parts)
