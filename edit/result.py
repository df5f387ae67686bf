"""The result of every editing method."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from backbone.cli.door import restore_torch_defaults
from backbone.media.sheet import Cell, draw_sheet
from backbone.media.transforms import to_image
from backbone.models.model import Backbone
from edit.attention.alignment import Alignment
from edit.inversion.inversion import Inversion
from edit.layout import NO_LAYOUT, Layout
from edit.masks import composite
from edit.pictures import EncodedImage, join_side_by_side


@dataclass(frozen=True, eq=False, repr=False)
class Result:
    """N edits of an image. A notebook shows them next to it.

    prompts      what each edit should show
    encoded      the image and its latent
    latents      the edits' [N, C, H, W]
    nfe          number of function evaluations: samples that the denoiser evaluated, inversions not counted
    finished     [N, 3, 8H, 8W], the edits' pixels where a method goes on after decoding; None: the decoder's
    masks        [N, H, W], or in pixels [N, 8H, 8W]: 1 where each edit was allowed to differ in the end; None if
                 everywhere
    estimates    [F, N, C, H, W], estimates x̂0 of the edits along the way; None if not kept
    facts        further values for the record
    inversions   the inversions that the edits began from
    title        the edit in a command's words
    layout       control maps under which it was done
    placeholders words that the model reads → what a person writes for them, as a concept's token

    Of `edit.replace` alone:

    trajectory   [S' + 1, 1 + N, C, H, W], the source's and the targets' states from where the edit began
    alignments   of the source's prompt with each target
    heatmaps     word → [1 + N, h, w], its share of each position's attention in the source and the targets
    """

    model: Backbone
    prompts: tuple[str, ...]
    encoded: EncodedImage
    latents: Tensor
    nfe: int
    finished: Tensor | None = None
    masks: Tensor | None = None
    estimates: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    inversions: tuple[Inversion, ...] = ()
    title: str = ""
    layout: Layout = NO_LAYOUT
    placeholders: Mapping[str, str] = field(default_factory=dict)
    trajectory: Tensor | None = None
    alignments: tuple[Alignment, ...] = ()
    heatmaps: Mapping[str, Tensor] = field(default_factory=dict)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The edits, in the order of the prompts."""
        return [to_image(image) for image in self.decoded[1:]]

    @property
    def source(self) -> Image.Image:
        """The image that was edited, as the autoencoder was shown it."""
        return to_image(self.encoded.pixels)

    @property
    def reconstruction(self) -> Image.Image:
        """The image as an edit that changes nothing gives it."""
        return to_image(self.decoded[0])

    @property
    def clean(self) -> Tensor:
        """The image's latent [C, H, W]."""
        return self.encoded.latent[0]

    @property
    def source_latent(self) -> Tensor:
        """The latent of an edit that changes nothing [C, H, W]: `clean`, or where the source's row arrived."""
        return self.clean if self.trajectory is None else self.trajectory[-1, 0].float()

    @cached_property
    def decoded(self) -> Tensor:
        """The reconstruction and the edits [1 + N, 3, 8H, 8W] in −1…1, the edits where they were allowed to differ."""
        with restore_torch_defaults():
            if self.finished is not None:
                return torch.cat([self.model.decode(self.source_latent[None]).cpu(), self.finished])
            source, *edits = self.model.decode(torch.cat([self.source_latent[None], self.latents]))
            return torch.cat([source[None], composite(torch.stack(edits), source, self.masks)])

    @cached_property
    def autoencoded(self) -> Tensor:
        """The image encoded and decoded by the autoencoder [3, 8H, 8W]: the bound of every reconstruction."""
        if torch.equal(self.source_latent, self.clean):
            return self.decoded[0]
        with restore_torch_defaults():
            return self.model.decode(self.clean[None])[0]

    def frames(self) -> list[Image.Image]:
        """The film: the estimates of the edits along the way, side by side."""
        rows = [] if self.estimates is None else list(self.estimates)
        with restore_torch_defaults():
            return [join_side_by_side([to_image(image) for image in self.model.decode(row)]) for row in rows]

    def __repr__(self) -> str:
        width, height = self.source.size
        prompts = ", ".join(map(repr, self.prompts))
        return f"Result({prompts}; {width} × {height}, NFE {self.nfe})"

    def _repr_png_(self) -> bytes:
        cells = [Cell(image, prompt) for image, prompt in zip(self.images, self.prompts, strict=True)]
        buffer = io.BytesIO()
        draw_sheet([[Cell(self.source, "source"), *cells]], title=self.title).save(buffer, "PNG")
        return buffer.getvalue()
