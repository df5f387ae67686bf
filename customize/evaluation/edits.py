"""How good edits by instruction are on held-out pairs: against the true edit, in the background, in structure.

A checkpoint's rating is how much nearer its edit is to the true one than the source was, in dB: an editor that returns
the source gains nothing, and one that redraws everything loses. Edits are measured as sampled, without restoring the
background, so that drift counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from backbone.cli.sampling import default_guidance_interval
from backbone.evaluation.clip import Scorer
from backbone.evaluation.image_metrics import background_metrics, mean_of_defined, psnr, structure_distance
from backbone.io.progress import progress
from backbone.media.transforms import to_image
from backbone.models.by_instruction import Guidances, draw_edit
from backbone.models.model import Backbone
from backbone.models.references import ReferenceImage
from customize.settings import Settings

CHANGED = 0.12  # on the scale −1…1: pixels that differ by more belong to the edit
MARGIN = 1 / 64  # of the longer side around them
SAMPLING_STEPS = 20  # more do not change the ranking of checkpoints


@dataclass(frozen=True)
class EditMetrics:
    """Means over the held-out pairs; None if a metric is undefined.

    rating              dB that the edit is nearer to the true one than the source is
    ratings             the same of each pair
    target_psnr_db      of the edit, against the true edit
    background_psnr_db  of the pixels that the true edit does not change, against the source
    structure_distance  to the true edit, by the model's scorer
    """

    step: int
    rating: float
    target_psnr_db: float
    background_psnr_db: float | None
    structure_distance: float | None
    ratings: tuple[float, ...] = ()


@dataclass(frozen=True, eq=False)
class HeldOutEdits:
    """Held-out pairs in pixels, [3, H, W] each in −1…1, and as the network reads them."""

    sources: Sequence[Tensor]
    targets: Sequence[Tensor]
    references: Sequence[Sequence[ReferenceImage]]
    instructions: Sequence[str]

    def take_first(self, count: int) -> HeldOutEdits:
        """The first pairs, at most this many."""
        return HeldOutEdits(
            self.sources[:count], self.targets[:count], self.references[:count], self.instructions[:count]
        )


def draw_held_out(
    model: Backbone, pairs: HeldOutEdits, settings: Settings, *, label: str, steps: int = 0
) -> list[Tensor]:
    """The model's edit of each held-out source [3, H, W], always from the same noise."""
    guidances = Guidances(
        settings.guidance, settings.image_guidance, guided=default_guidance_interval(model.defaults)
    )
    steps = steps or min(SAMPLING_STEPS, settings.sample_steps)
    edits: list[Tensor] = []
    with progress(len(pairs.sources), label, brief=True) as bar:
        for row, references in enumerate(pairs.references):  # one by one: their sizes may differ
            inputs = [reference.to(model.device) for reference in references]
            state = draw_edit(
                model, inputs, pairs.instructions[row], steps=steps, guidances=guidances, key=(settings.seed, row),
                after_step=lambda step, clean: bar.advance_images(1 / steps),
            )  # fmt: skip
            edits.append(model.decode(state)[0].cpu())
    model.free("autoencoder", "text_encoder")
    return edits


def measure_edits(
    step: int, pairs: HeldOutEdits, edits: Sequence[Tensor], scorer: Scorer | None
) -> EditMetrics:
    """The metrics of edits [3, H, W], one for each held-out pair."""
    rows: list[dict[str, float | None]] = []
    for source, target, edit in zip(pairs.sources, pairs.targets, edits, strict=True):
        target_psnr = psnr(edit, target)
        distance = None
        if scorer is not None:
            distance = structure_distance(scorer, to_image(edit), to_image(target))
        rows.append(
            {
                "rating": target_psnr - psnr(source, target),
                "target_psnr_db": target_psnr,
                "background_psnr_db": background_metrics(source, edit, find_changed_pixels(source, target))[
                    "background_psnr_db"
                ],
                "structure_distance": distance,
            }
        )
    means: dict[str, Any] = {
        field.name: mean_of_defined([row[field.name] for row in rows])
        for field in fields(EditMetrics)
        if field.name not in ("step", "ratings")
    }
    return EditMetrics(step=step, **means, ratings=tuple(row["rating"] or 0.0 for row in rows))


def find_changed_pixels(source: Tensor, target: Tensor) -> Tensor:
    """Where the true edit changes something [H, W], with a margin."""
    difference = (target - source).abs().amax(0)
    reach = max(1, round(MARGIN * max(difference.shape)))
    return F.max_pool2d((difference > CHANGED)[None, None].float(), 2 * reach + 1, 1, reach)[0, 0]
