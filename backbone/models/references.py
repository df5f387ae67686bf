"""Reference images beside a prompt: their latents for the denoiser, and their pixels for the text encoder.

A denoiser reads an image's latents, as further channels or tokens. Where the text encoder is a vision-language model
that was trained to look (Qwen-Image-Edit), the prompt is encoded together with the images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from PIL.Image import Image
from torch import Tensor

from backbone.diffusion.transfer import send
from backbone.io.console import UserError, format_count
from backbone.media.transforms import crop_and_resize, to_tensor, working_size
from backbone.models.model import Backbone


@dataclass(frozen=True, eq=False)
class ReferenceImage:
    """An image beside a prompt.

    latents  [1, C, h, w] as the denoiser reads them
    picture  RGB, of the size that was encoded
    """

    latents: Tensor
    picture: Image

    def to(self, device: torch.device) -> ReferenceImage:
        """A copy on another device."""
        return replace(self, latents=send(self.latents, device))


def refuse_too_many(model: Backbone, images: int) -> None:
    """`UserError` for more images beside a prompt than the model reads."""
    most, name = model.most_references, model.location.name
    if images and not most:
        raise UserError(
            f"{name} reads no image beside the prompt. Leave the references out, or name a model that does."
        )
    if images > most:
        raise UserError(
            f"{name} reads {format_count(most, 'image')} beside the prompt, and {images} are given. Leave out "
            f"{images - most} of them."
        )


def encode_references(model: Backbone, images: Sequence[Image]) -> list[ReferenceImage]:
    """Encode images to stand beside a prompt, each in its own aspect ratio at about the model's number of pixels.

    Raises `UserError` for more images than the model reads.
    """
    refuse_too_many(model, len(images))
    encoded = []
    for image in images:
        size = working_size(image.size, area=model.resolution**2, unit=2 * model.factor)
        picture = crop_and_resize(image, size)
        encoded.append(ReferenceImage(model.encode_reference(to_tensor(picture)[None]), picture))
    return encoded


def list_latents(references: Sequence[ReferenceImage]) -> tuple[Tensor, ...]:
    """The latents that the denoiser reads, [1, C, h, w] each."""
    return tuple(reference.latents for reference in references)
