"""Image conditioning of Stable Video Diffusion: CLIP's embedding of it, antialiased to 224 pixels a side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPVisionModelWithProjection

from backbone.diffusion.transfer import send
from backbone.families.components import loading
from backbone.families.location import Location, find_hub_file
from backbone.families.stable_video import checkpoint
from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.records import read_as

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's own
SETTINGS = "feature_extractor/preprocessor_config.json"


@dataclass(frozen=True, eq=False)
class ClipImageEncoder:
    """CLIP's tower with its projection, and the mean and deviation [3] of the colours that it was trained on."""

    module: nn.Module
    mean: Tensor
    std: Tensor

    @classmethod
    def load(cls, location: Location, dtype: torch.dtype) -> ClipImageEncoder:
        """Load `image_encoder/` and `feature_extractor/`; `UserError` where one is damaged."""
        if location.file is not None:
            module = checkpoint.load_tower(location, dtype)
        else:
            module = loading.load_pretrained(
                CLIPVisionModelWithProjection, location, "image_encoder", dtype=dtype
            )
        path = location.local(SETTINGS) or (
            None
            if location.folder or location.file
            else find_hub_file(location.source, SETTINGS, location.revision)
        )
        settings = read_json(path) if path else {}
        colours = [
            torch.tensor(read_as(list[float], settings.get(name, list(usual)), path or SETTINGS, name))
            for name, usual in (("image_mean", MEAN), ("image_std", STD))
        ]
        if any(value.shape != (3,) for value in colours) or not bool((colours[1] > 0).all()):
            raise UserError(
                f"{path} is damaged: image_mean and image_std are not of three colours. Restore it."
            )
        return cls(module.eval().requires_grad_(False), *colours)

    def to(self, device: torch.device) -> ClipImageEncoder:
        """The same encoder on another device."""
        return ClipImageEncoder(self.module.to(device), self.mean, self.std)

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W] in −1…1, of any size, to embeddings [B, 1, D]."""
        network = cast(Any, self.module)
        side = int(network.config.image_size)
        small = (resize_smoothed(pictures.float(), (side, side)) + 1) / 2
        mean, std = (value[:, None, None].to(small) for value in (self.mean, self.std))
        first = next(self.module.parameters())
        inputs = send((small - mean) / std, first.device).to(first.dtype)
        return cast(Tensor, network(inputs).image_embeds[:, None].float())


def resize_smoothed(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize pictures [B, C, H, W] to `size` (H, W), bicubic with aligned corners, blurred before they become smaller.

    The blur is scikit-image's: a Gaussian of deviation (factor − 1)/2 on each axis, cut off at two deviations.
    """
    for axis, side in ((2, size[0]), (3, size[1])):
        # A normalised Gaussian with an odd number of taps along this axis
        deviation = max((pictures.shape[axis] / side - 1) / 2, 0.001)
        taps = int(max(4 * deviation, 3)) | 1
        positions = torch.arange(taps, dtype=pictures.dtype, device=pictures.device) - taps // 2
        kernel = (-(positions**2) / (2 * deviation**2)).exp()
        shape = [1, 1, 1, 1]
        shape[axis] = taps
        kernel = (kernel / kernel.sum()).reshape(shape).expand(pictures.shape[1], 1, *shape[2:])
        half = taps // 2
        around = (0, 0, half, half) if axis == 2 else (half, half, 0, 0)
        # Too few pixels cannot be mirrored
        mode = "reflect" if half < pictures.shape[axis] else "replicate"
        pictures = F.conv2d(F.pad(pictures, around, mode=mode), kernel, groups=pictures.shape[1])
    return F.interpolate(pictures, size=size, mode="bicubic", align_corners=True)
