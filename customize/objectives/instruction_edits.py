"""InstructPix2Pix: learn from pairs what an instruction does to an image (Brooks, Holynski & Efros 2023).

The loss is that of any diffusion model, on the image after the edit, with the image before as a reference and the
instruction as the prompt. The instruction, the image, and both are left out of some of the samples, so that
sampling can be guided by each of them (section 3.2.1). Which parameters are trained is a separate choice, as in
DreamBooth.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions, drop_references
from backbone.models.model import Backbone
from customize.data.edits import EditData
from customize.objectives.dreambooth import Batch, DreamBooth
from customize.settings import Settings


class InstructionEdits(DreamBooth):
    """The loss of edits, on whatever parameters the method trains."""

    data: EditData

    def __init__(self, model: Backbone, data: EditData, settings: Settings) -> None:
        super().__init__(model, data, settings)

    def draw(self, random: torch.Generator) -> Batch:
        """A batch of noised edits; every process draws the same one and keeps its own samples of it."""
        all_samples = self.draw_subject_batch(self.draw_bucket(random), random)
        no_text, no_image = draw_dropout(len(all_samples.rows), self.settings.conditioning_dropout, random)
        mine = self.share.rows
        batch, no_text, no_image = all_samples.part(mine), no_text[mine], no_image[mine]

        # Conditions of each sample: the instruction or none, the image or zeros
        rows = torch.where(no_text, self.data.without_instruction(batch.rows), batch.rows)
        references = self.data.reference_latents(batch.rows)
        if self.model.reads_as_channels:  # read as tokens, the image is never dropped by guidance
            references = drop_references(references, no_image)
        encoded = self.data.conditions
        if encoded is None:  # the text encoder is trained: the loss calls it for these rows
            return replace(batch, rows=rows, conditions=Conditions({}, references=references))
        return replace(batch, conditions=replace(encoded[rows], references=references))


def draw_dropout(count: int, share: float, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw (whether the instruction is dropped [B], whether the image is): `share` of each alone, and of both."""
    # u in [0, s): the instruction; [s, 2s): both; [2s, 3s): the image
    u = torch.rand(count, generator=random)
    return u < 2 * share, (u >= share) & (u < 3 * share)
