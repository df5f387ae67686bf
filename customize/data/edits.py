"""Edit pairs as training data: latents before and after each edit, and its instruction as the network reads it.

The image after the edit is noised and learned; the image before is a reference. Both are cropped alike, so that their
pixels correspond.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from backbone.io.console import UserError, notify
from backbone.io.prompts import describe_mirrored
from backbone.media.crops import ReadCrop, read_crop
from backbone.media.sources.record import ImageRecord
from backbone.models.encode import Encoded, Posteriors, TextInput, View, encode_texts
from backbone.models.model import Backbone
from backbone.models.references import refuse_too_many
from customize.data.dataset import (
    SubjectGroup,
    TrainingData,
    encode_group,
    make_buckets,
    make_views,
    trains_text,
)
from customize.data.edit_pairs import EditPair
from customize.settings import Settings


@dataclass(frozen=True)
class EditData(TrainingData):
    """The encoded pairs; `posteriors` are of the images after the edit, `prompts` the instructions.

    references  posteriors of each pair's reference images: the image before the edit, then further ones
    scale       factor by which reference latents are multiplied for the network …
    shift       … and the term that is then added

    The `conditions` of the pairs are followed by that of the empty instruction; where the text encoder `sees` the
    images, by one for each pair.
    """

    references: tuple[Posteriors, ...] = ()
    scale: float = 1.0
    shift: float = 0.0
    sees: bool = False

    def without_instruction(self, rows: Tensor) -> Tensor:
        """The rows of `conditions` [B] for these pairs with the instruction dropped."""
        return len(self.prompts) + (rows if self.sees else torch.zeros_like(rows))

    def reference_latents(self, rows: Tensor) -> tuple[Tensor, ...]:
        """The reference latents of pairs of one size, each [B, C, h, w], as the network reads them."""
        return tuple(reference.gather(rows).mean * self.scale + self.shift for reference in self.references)


def count_references(model: Backbone, pairs: Sequence[EditPair]) -> int:
    """How many reference images each pair has besides the one before the edit.

    Raises `UserError` for more than the model reads, or for a number that differs between pairs.
    """
    counts = {len(pair.references) for pair in pairs}
    refuse_too_many(model, 1 + max(counts))
    if len(counts) > 1:
        odd = next(pair for pair in pairs if len(pair.references) != max(counts))
        raise UserError(
            f"{odd.name} has {len(odd.references)} further references and other pairs {max(counts)}. Give each as many."
        )
    return max(counts)


def prepare_pairs(
    model: Backbone, pairs: Sequence[EditPair], settings: Settings, *, read: ReadCrop = read_crop
) -> EditData:
    """Encode images and instructions and free the encoders. `read` decodes an image and crops it.

    Raises `UserError` for a pair whose images have different shapes.
    """
    reference_count = count_references(model, pairs)
    if settings.flip and (
        warning := describe_mirrored((pair.instruction, f"an instruction ({pair.name})") for pair in pairs)
    ):
        notify(warning)
    flips = (False, True) if settings.flip else (False,)
    columns = [[pair.target for pair in pairs], [pair.source for pair in pairs]]
    columns += [[pair.references[k] for pair in pairs] for k in range(reference_count)]
    targets, *references = (encode_images(model, column, settings, flips, read) for column in columns)
    for reference in references[:1]:
        for number, (before, after) in enumerate(zip(reference.shapes, targets.shapes, strict=True)):
            if before != after:
                pair = pairs[number % len(pairs)]
                raise UserError(f"{pair.name} and {pair.source.path} have other shapes. Crop them alike.")
    instructions = [pair.instruction for pair in pairs] * len(flips)
    conditions = None  # where the text encoder is trained, instructions are encoded at every step
    if not trains_text(settings):
        inputs = make_text_inputs(model, pairs, flips, list(zip(columns[1:], references, strict=True)))
        conditions = encode_texts(model, inputs, read=read)
    scale, shift = find_reference_scale(model)
    model.free("autoencoder", "text_encoder")
    return EditData(
        posteriors=targets,
        prompts=instructions,
        names=[str(pair.target.path) for pair in pairs] * len(flips),
        frequency=torch.ones(len(instructions)),
        masks=None,
        buckets=make_buckets(targets),
        class_prompts=[""],
        class_latents=None,
        class_rows=None,
        conditions=conditions,
        references=tuple(references),
        scale=scale,
        shift=shift,
        sees=model.text_sees_images,
    )


def make_text_inputs(
    model: Backbone,
    pairs: Sequence[EditPair],
    flips: Sequence[bool],
    references: Sequence[tuple[Sequence[ImageRecord], Posteriors]],
) -> list[str | TextInput]:
    """The prompts of pairs and their mirrored copies, with the images that the encoder sees; then without words.

    `references` are the reference images, with their latents, whose sizes set those of the images seen.
    """
    if not model.text_sees_images:
        return [*(pair.instruction for _ in flips for pair in pairs), ""]
    inputs = []
    for row in range(len(flips) * len(pairs)):
        views = []
        for images, latents in references:
            height, width = latents.shapes[row][-2:]
            views.append(View(images[row % len(pairs)], (width * model.factor, height * model.factor)))
        inputs.append(TextInput(pairs[row % len(pairs)].instruction, tuple(views), flips[row // len(pairs)]))
    return [*inputs, *(prompt._replace(prompt="") for prompt in inputs)]


def encode_images(
    model: Backbone, images: Sequence[ImageRecord], settings: Settings, flips: Sequence[bool], read: ReadCrop
) -> Posteriors:
    """The posteriors of images, followed by the mirrored ones if `flips` has them."""
    group = SubjectGroup(images, [""] * len(images), "", settings.pairs)
    parts: list[Encoded] = []
    places: list[tuple[int, int]] = []
    views = make_views(group, settings, model.resolution)
    for image_parts, positions in encode_group(model, group, views, flips, settings, read).values():
        places += [(len(parts) + part, row) for part, row in positions]
        parts += image_parts
    return Posteriors(parts, places, model.device)


def find_reference_scale(model: Backbone) -> tuple[float, float]:
    """(scale, shift) that turn latents into the network's reference latents."""
    at_zero, at_one = (
        model.as_reference(torch.tensor([0.0, 1.0])).tolist() if model.reads_as_channels else (0.0, 1.0)
    )
    return at_one - at_zero, at_zero
