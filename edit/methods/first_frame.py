"""A clip edited by its first frame: whatever changed that one picture, the frames behind it follow.

    inversion = invert_film(model, film, "a dog in a park")
    first = read_first_frame(inversion, read_image("edited.png"))
    result = carry_first_frame(inversion, first, "a cat in a park", ClipEdit())

At every step the first frame is the edited picture under the source's own noise, and the others follow it by attention
(Ku et al. 2024, AnyV2V, which holds the first frame as its model's condition): with the source's queries and keys a
place finds where it was in the source's first frame, and takes the edited values from there. Between frames this goes
through the first frame and the one before (Tune-A-Video), or through a motion adapter's layers, and a SparseCtrl where
one is given. What the inversion lacks at a step is added to the edit too, so an unchanged first frame changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control as MapControl
from backbone.io.console import UserError
from backbone.media.control_maps import is_same_shape
from backbone.media.transforms import crop_and_resize, to_tensor
from backbone.models.cache import encode_prompts_cached
from backbone.models.motion import motion_of
from backbone.models.sample import refuse_negative
from edit import checks
from edit.attention.control import Control
from edit.attention.install import control_attention
from edit.inversion.inversion import Inversion
from edit.methods.clip import ClipEdit, ClipResult, refuse_joint_attention
from edit.methods.prompt_to_prompt.plan import plan_control
from edit.methods.prompt_to_prompt.replace import align_prompts
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.pictures import SourceImage
from edit.sampling import SourceAndTargets, guidance_of

SELF = 0.8  # share of the steps in which places are found where the source's are
ALIKE = 1 / 255  # mean difference, in −1…1 half of it, below which a picture is the first frame itself


@dataclass(frozen=True, eq=False)
class FirstFrame:
    """The edited first frame: pixels [3, 8H, 8W] in −1…1, and its latent [C, H, W]."""

    pixels: Tensor
    latent: Tensor


def read_first_frame(inversion: Inversion, picture: SourceImage) -> FirstFrame:
    """An edited first frame at the clip's size; `UserError` for another shape, and for the first frame as it is."""
    height, width = inversion.image.shape[-2:]
    name = picture.name or "The first frame"
    if not is_same_shape(picture.image.size, (width, height)):
        raise UserError(
            f"{name} has {picture.image.width} × {picture.image.height} pixels and the clip's frames {width} × "
            f"{height}: another shape. Edit the clip's own first frame (0000.png)."
        )
    pixels = to_tensor(crop_and_resize(picture.image, (width, height)))
    if float((pixels - inversion.image[0].cpu()).abs().mean()) < ALIKE:
        raise UserError(f"{name} is the clip's first frame as it is, so nothing would change. Edit it first.")
    return FirstFrame(pixels, inversion.model.encode(pixels[None]).mean[0])


def hold_first_frame(inversion: Inversion, first: FirstFrame) -> Tensor:
    """The edited first frame under the source's noise at every level [S + 1, C, H, W]."""
    change = first.latent.to(inversion.states) - inversion.states[-1][:, 0]
    signal = inversion.schedule.a.to(change)  # some schedules end just above a clean latent, others at it
    scale = (signal / signal[-1])[:, None, None, None]
    held: Tensor = inversion.states[:, :, 0] + scale * change
    return held


@torch.no_grad()
def carry_first_frame(
    inversion: Inversion,
    first: FirstFrame,
    target: str,
    settings: ClipEdit,
    *,
    controls: tuple[MapControl, ...] = (),
    progress: Callable[[], Any] = lambda: None,
) -> ClipResult:
    """Edit a clip's inversion by its edited first frame, which it begins with, towards a prompt (in the model's words).

    Where the prompt is the source's own there is no guidance unless it is asked for. `controls`, of one row, hold for
    the edit alone. `progress` is called after every step.
    """
    model, steps = inversion.model, inversion.steps
    refuse_joint_attention(model)
    alone = target == inversion.prompt and settings.guidance is None
    guidance = 1.0 if alone else guidance_of(model, settings.guidance)
    refuse_negative(model, settings.negative, guidance)
    share = SELF if settings.self_attention is None else settings.self_attention
    asked = ReplaceSettings(cross=settings.cross, self_attention=share, guidance=guidance).resolve(model)
    alignments = align_prompts(model, inversion.prompt, (target,), asked)
    plan = plan_control(alignments, asked, steps, model.device)
    temporal = share if settings.temporal is None else settings.temporal
    text = encode_both(inversion, target, controls)
    empty = encode_prompts_cached(model, [settings.negative])
    own = 1.0 if inversion.overwrites else guidance
    predict = SourceAndTargets(model, text, source_guidance=own, guidance=guidance)
    guided = (predict.guidance != 1) + (predict.source_guidance != 1)
    linked = motion_of(model.denoiser) is None
    control = Control(1, clips=2 + guided, across_frames=linked, reach=asked.reach)
    held = hold_first_frame(inversion, first)
    start = inversion.start(checks.strength(settings.strength, steps))
    now = inversion.states[start][None].repeat_interleave(2, 0)
    now[1, :, 0] = held[start]
    with control_attention(model.denoiser, control):
        for step in range(start, steps):
            plan.apply(control, step)
            control.temporal = step < round(temporal * steps)
            estimate = predict(now, inversion.schedule[step], empty)
            there = inversion.step_targets(step, now, estimate)
            if inversion.overwrites:
                there = there + (inversion.states[step + 1].to(there) - there[:1])
            now = there.clone()
            now[1, :, 0] = held[step + 1]
            progress()
    facts = {"inversion_method": inversion.method, "guidance": guidance, "self": share, "temporal": temporal}
    return ClipResult(
        model=model,
        prompts=(target,),
        encoded=inversion.encoded,
        latents=now[1:].float(),
        nfe=inversion.nfe + predict.nfe,
        alignments=tuple(alignments),
        facts=facts,
        first=first.pixels,
    )


def encode_both(inversion: Inversion, target: str, controls: tuple[MapControl, ...]) -> Conditions:
    """The source's prompt and the target's, the latter under these controls of one row."""
    text = encode_prompts_cached(inversion.model, [inversion.prompt, target])
    more = tuple(behind_the_source(one.during(inversion.schedule)) for one in controls)
    return replace(text, controls=more)


def behind_the_source(control: MapControl) -> MapControl:
    """A control of one row for a source that is not controlled and an edit that is."""
    rows = control.rows(torch.tensor([0, 0]))
    return replace(rows, scale=rows.scale * torch.tensor([0.0, 1.0]))
