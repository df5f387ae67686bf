"""Editing a clip by its first frame: the change of that picture is propagated to all frames.

    inversion = invert_film(model, film, "a dog in a park")
    first = read_first_frame(inversion, read_image("edited.png"))
    result = propagate_first_frame(inversion, first, "a cat in a park", ClipEdit())

The change is carried to the other frames in three ways. The latents' change is copied to patches that are similar to
those of the source's first frame, and the edit starts from there at an intermediate noise level (similar to TokenFlow's
features; Geyer et al. 2024). From there on the first frame is the edited picture under the source's own noise (similar
to AnyV2V's fixed condition; Ku et al. 2024), and the others see it: by attention to it and to the previous frame
(Tune-A-Video), by a motion adapter's layers, or by a SparseCtrl. The source's offset from its trajectory is added to
the edit too, so that an unchanged first frame changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control as MapControl
from backbone.diffusion.noise import Estimate
from backbone.io.console import UserError
from backbone.media.shapes import is_same_shape
from backbone.media.transforms import crop_and_resize, to_tensor
from backbone.models.clips.frames import link_frames, refuse_transformer
from backbone.models.sample import refuse_negative
from edit.attention.alignment import Alignment
from edit.checks import check_not_negative, check_strength
from edit.inversion.inversion import Inversion
from edit.methods.clip import ClipEdit, ClipResult, find_places, make_clip_sampler
from edit.methods.prompt_to_prompt.replace import (
    blend_into_source,
    encode_source_and_targets,
    resolve_target_guidance,
)
from edit.pictures import SourceImage

SELF = 0.8  # share of the steps with the source's self-attention
STRENGTH = 0.6  # share of the steps that are sampled again: the carried change has to be in the first of them
SHARPNESS = 40.0  # of the similarity of patches
REACH = 5.0  # latents that a patch moves per frame at most
ALIKE = 1 / 255  # mean difference on the scale −1…1 below which a picture is the first frame itself


@dataclass(frozen=True, eq=False)
class FirstFrame:
    """The edited first frame: pixels [3, 8H, 8W] in −1…1, and its latent [C, H, W]."""

    pixels: Tensor
    latent: Tensor


def read_first_frame(inversion: Inversion, picture: SourceImage) -> FirstFrame:
    """An edited first frame at the size at which the clip is edited, in its shape there or in the clip's own.

    `UserError` for another shape, and for a first frame that is not edited.
    """
    height, width = inversion.image.shape[-2:]
    original = inversion.facts.get("size") or (width, height)
    name = picture.name or "The first frame"
    if not any(is_same_shape(picture.image.size, size) for size in ((width, height), tuple(original))):
        raise UserError(
            f"{name} has {picture.image.width} × {picture.image.height} pixels and the clip's frames {width} × "
            f"{height}: another shape. Edit the clip's own first frame (0000.png)."
        )
    pixels = to_tensor(crop_and_resize(picture.image, (width, height)))
    if float((pixels - inversion.image[0].cpu()).abs().mean()) < ALIKE:
        raise UserError(f"{name} is the clip's first frame as it is, so nothing would change. Edit it first.")
    return FirstFrame(pixels, inversion.model.encode(pixels[None]).mean[0])


def noise_first_frame(inversion: Inversion, first: FirstFrame) -> Tensor:
    """The edited first frame under the source's noise at every level [S + 1, C, H, W]."""
    change = first.latent.to(inversion.states) - inversion.states[-1][:, 0]
    states: Tensor = inversion.states[:, :, 0] + scale_signal(inversion)[:, None, None, None] * change
    return states


def scale_signal(inversion: Inversion) -> Tensor:
    """The signal's share at each level [S + 1], scaled to 1 at the last, since some schedules end above 0 noise."""
    signal = inversion.schedule.a.to(inversion.states)
    return signal / signal[-1]


def propagate_change(clip: Tensor, change: Tensor) -> Tensor:
    """The change [C, H, W] of a clip's first frame, carried to similar patches of every frame [C, F, H, W].

    Each patch of 3 × 3 latents of the clip [C, F, H, W] is matched to the first frame near its position, since things
    move a few latents from frame to frame.
    """
    frames, size = clip.transpose(0, 1), clip.shape[-2:]
    patches = F.unfold(F.pad(frames, (1, 1, 1, 1), mode="replicate"), 3)  # [F, 9 C, H W]

    # Unit vectors, so that products are cosines
    patches = F.normalize(patches - patches.mean((0, 2), keepdim=True), dim=1)
    rows, columns = torch.meshgrid(*(torch.arange(side) for side in size), indexing="ij")
    positions = torch.stack([rows.flatten(), columns.flatten()], 1).to(clip)
    distances, changes = torch.cdist(positions, positions), [change]
    for number in range(1, len(frames)):  # one by one: each needs a matrix of (H·W)² numbers
        # softmax over the first frame's positions of s·cos − ½·(distance/(f·REACH))², and their change
        similarity = SHARPNESS * patches[number].T @ patches[0]
        weights = (similarity - 0.5 * (distances / (number * REACH)) ** 2).softmax(-1)
        changes.append((weights @ change.flatten(1).T).T.unflatten(1, size))
    return torch.stack(changes, 1)


def find_changed(change: Tensor, threshold: float) -> Tensor:
    """Where a carried change [C, F, H, W] exceeds this share of its maximum, plus one latent around [1, F, H, W].

    The first frame is given, so all of it counts.
    """
    size = change.square().mean(0).sqrt()
    region = F.max_pool2d((size > threshold * size.max()).float(), 3, stride=1, padding=1)
    region[0] = 1
    return region[None]


@torch.no_grad()
def propagate_first_frame(
    inversion: Inversion,
    first: FirstFrame,
    target: str,
    settings: ClipEdit,
    *,
    controls: tuple[MapControl, ...] = (),
    progress: Callable[[], Any] = lambda: None,
) -> ClipResult:
    """Edit a clip's inversion by its edited first frame, which it begins with, towards a prompt (in the model's words).

    With the source's own prompt there is no guidance unless it is set. `controls`, of one row, are for the edit.
    """
    model, steps = inversion.model, inversion.steps
    refuse_transformer(model)
    is_same_prompt = target == inversion.prompt and settings.guidance is None
    guidance = (
        1.0
        if is_same_prompt
        else check_not_negative("guidance", resolve_target_guidance(inversion, settings.guidance))
    )
    refuse_negative(model, settings.negative, guidance)

    # Rows: the source and the target
    share = SELF if settings.self_attention is None else settings.self_attention
    settings = replace(settings, self_attention=share)
    text = encode_both(inversion, target, controls)
    sampler = make_clip_sampler(inversion, [target], settings, guidance, text)

    # The first frame's states at every level, and the carried change from which the others start
    first_states = noise_first_frame(inversion, first)
    start = inversion.start(check_strength(settings.strength, steps))
    inversion.layout.say_idle(start, steps)
    change = propagate_change(inversion.states[-1], first_states[-1] - inversion.states[-1][:, 0])
    masks, nfe = find_editable_region(inversion, sampler.alignments, settings, change, start)
    noisy = inversion.states[start][None].repeat_interleave(2, 0)
    noisy[1] += scale_signal(inversion)[start] * change

    def advance(step: int, noisy: Tensor, estimate: Estimate) -> Tensor:
        noisy = step_and_correct(inversion, step, noisy, estimate)
        if masks is not None:
            noisy = blend_into_source(noisy, masks)
        noisy[1, :, 0] = first_states[step + 1]
        return noisy

    noisy = sampler.sample(noisy, start, advance, progress)
    facts = {
        "inversion_method": inversion.method,
        "guidance": guidance,
        "self": share,
        "temporal": sampler.temporal,
    }
    return ClipResult(
        model=model,
        prompts=(target,),
        encoded=inversion.encoded,
        latents=noisy[1:].float(),
        nfe=inversion.nfe + nfe + sampler.predict.nfe,
        masks=masks,
        alignments=sampler.alignments,
        facts={**facts, **inversion.layout.facts()},
        first=first.pixels,
    )


def step_and_correct(inversion: Inversion, step: int, noisy: Tensor, estimate: Estimate) -> Tensor:
    """The states [2, C, F, H, W] after a step; the source's offset from its trajectory is added to both."""
    stepped = inversion.step_targets(step, noisy, estimate)
    if inversion.overwrites:
        stepped = stepped + (inversion.states[step + 1].to(stepped) - stepped[:1])
    return stepped


def find_editable_region(
    inversion: Inversion, alignments: Sequence[Alignment], settings: ClipEdit, change: Tensor, start: int
) -> tuple[Tensor | None, int]:
    """Where frames may differ [1, F, H, W], None for everywhere, and the NFE.

    It is where the change was carried, or where the predictions under the two prompts differ.
    """
    if not settings.threshold:
        return None, 0
    region = find_changed(change, settings.threshold)
    if alignments[0].target.text == inversion.prompt or start == inversion.steps:
        return region, 0
    with link_frames(inversion.model, inversion.states.shape[-3]):
        word_region, nfe = find_places(inversion, alignments, settings, start)
    return (None if word_region is None else torch.maximum(region, word_region.to(region))), nfe


def encode_both(inversion: Inversion, target: str, controls: tuple[MapControl, ...]) -> Conditions:
    """The source's prompt and the target's under their maps, the latter under these controls of one row too."""
    text = encode_source_and_targets(inversion, [target])
    added = tuple(prepend_source(control.during(inversion.schedule)) for control in controls)
    return replace(text, controls=(*text.controls, *added))


def prepend_source(control: MapControl) -> MapControl:
    """A control of one row extended to two: an uncontrolled source, then the controlled edit."""
    rows = control.rows(torch.tensor([0, 0]))
    return replace(rows, scale=rows.scale * torch.tensor([0.0, 1.0]))
