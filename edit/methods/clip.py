"""Editing a clip by its words with one inversion of all its frames.

    inversion = invert(model, encode_film(model, read_film("dog.webp")), "a dog in a park")
    result = edit_clip(inversion, ["a cat in a park"], ClipEdit())

A clip is one sample, so it is inverted and edited like a picture: the source's row is its trajectory, and a target uses
the source's attention while its windows last, in each frame as in prompt-to-prompt (Hertz et al. 2022), and over time,
which preserves the motion. Without a motion adapter a frame attends to the first frame and the previous one (Wu et al.
2023, Tune-A-Video). Outside the region where the prompts differ a frame stays the source's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from backbone.cli.conditions import RequestedControl, say_scales
from backbone.cli.keywords import takes
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate
from backbone.io.console import UserError
from backbone.media.clips import DEFAULT_FPS, Film
from backbone.media.transforms import to_image
from backbone.models.clips.frames import link_frames
from backbone.models.clips.motion import find_motion
from backbone.models.control import open_clip_conditions
from backbone.models.model import Backbone
from backbone.models.sample import (
    Frames,
    GivenLatents,
    Request,
    refuse_negative,
    sample_latents,
    say_same_negative,
)
from backbone.world.motions import find_moves
from edit.attention.alignment import Alignment, steps_inside
from edit.attention.control import AttentionControl
from edit.attention.install import control_attention
from edit.checks import check_not_negative, check_prompt, check_share, check_strength
from edit.inversion.inversion import Inversion, InversionSettings, invert
from edit.layout import NO_LAYOUT, Layout
from edit.masks import composite, compute_difference_maps
from edit.methods.prompt_to_prompt.plan import ControlPlan, plan_control
from edit.methods.prompt_to_prompt.regions import choose_compared_prompts
from edit.methods.prompt_to_prompt.replace import (
    align_prompts,
    blend_into_source,
    encode_source_and_targets,
    encode_unconditional,
    guide_source_and_targets,
    resolve_target_guidance,
    step_source_and_targets,
)
from edit.methods.prompt_to_prompt.settings import ReplaceSettings
from edit.pictures import EncodedImage, encode_film, show_film
from edit.sampling import SourceAndTargets, count_noised_steps, resolve_guidance


@dataclass(frozen=True)
class ClipEdit:
    """Settings of `edit_clip`; shares are of the steps, from the noisy end.

    cross, self_attention  until when the targets take the source's, in each frame; None: what works with the model
    temporal               the same for the attention of layers over time; None: as self-attention
    threshold              share of the greatest difference of predictions above which a position may change; 0: all may
    guidance               of the targets; None: the model's default
    negative               what the targets stay away from
    strength               the share of the steps that is sampled
    keep_frames            frames that stay the source's, by their numbers; the last one is −1
    """

    cross: float | None = None
    self_attention: float | None = None
    temporal: float | None = None
    threshold: float = 0.25
    guidance: float | None = None
    negative: str = ""
    strength: float = 1.0
    keep_frames: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("cross", "self_attention", "temporal", "threshold", "strength"):
            value = getattr(self, name)
            check_share(name, 0.0 if value is None else value)


@dataclass(frozen=True, eq=False, repr=False)
class ClipResult:
    """N edits of a clip.

    latents    [N, C, F, H, W]
    masks      [N, F, H, W], 1 where each frame was allowed to differ; None: everywhere
    first      the first frame [3, 8H, 8W] of every edit, where it was given
    inversion  the one that they began from, if there was one
    nfe        clips that the denoiser evaluated, the inversion's counted
    """

    model: Backbone
    prompts: tuple[str, ...]
    encoded: EncodedImage
    latents: Tensor
    nfe: int
    masks: Tensor | None = None
    alignments: tuple[Alignment, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    chunk: int = 0
    first: Tensor | None = None
    inversion: Inversion | None = None

    @cached_property
    def pixels(self) -> Tensor:
        """[N, F, 3, 8H, 8W] in −1…1; outside its place a frame is the source's own, pixel by pixel."""
        edits = [self.model.decode_clip(clip, self.chunk).cpu() for clip in self.latents]
        if self.first is not None:
            edits = [torch.cat([self.first[None].to(clip), clip[1:]]) for clip in edits]
        if self.masks is None:
            return torch.stack(edits)
        background = self.encoded.pixels.cpu()
        return torch.stack(
            [composite(clip, background, mask.cpu()) for clip, mask in zip(edits, self.masks, strict=True)]
        )

    @property
    def films(self) -> list[list[Image.Image]]:
        """The frames of each edit."""
        return [[to_image(frame) for frame in clip] for clip in self.pixels]


@takes(InversionSettings)
def invert_film(
    model: Backbone,
    film: Film,
    prompt: str,
    *,
    identity: str | None = None,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[], Any] = lambda: None,
    **settings: Any,
) -> Inversion:
    """One inversion of all frames of a clip that shows what the prompt says (in the model's words).

    `settings` and `identity` are as in `invert`; `layout` holds maps of the frames, under which it is inverted and
    edited.
    Raises `UserError` as `invert`, and for more frames than the motion adapter has positions for.
    """
    motion = find_motion(model.denoiser)
    if motion is not None and len(film.frames) > motion.longest:
        raise UserError(
            f"{film.name} has {len(film.frames)} frames and the motion adapter positions for {motion.longest}. Cut the "
            "clip, or leave --motion out."
        )
    with link_frames(model, len(film.frames)):
        encoded = encode_film(model, film)
        return invert(model, encoded, prompt, identity=identity, layout=layout, progress=progress, **settings)


def make_film(inversion: Inversion) -> Film:
    """The clip of an inversion, as the model sees it."""
    facts = inversion.facts
    frames = tuple(to_image(frame) for frame in inversion.image)
    return Film(
        frames,
        float(facts.get("fps", DEFAULT_FPS)),
        str(facts.get("name", "")),
        str(facts.get("content", "")),
    )


def open_clip_layout(model: Backbone, film: Film, controls: Sequence[RequestedControl]) -> Layout:
    """The conditions of an edit of a clip: computed maps hold for the source too, given ones for targets alone.

    Raises `UserError` as `open_clip_conditions`.
    """
    frames = show_film(model, film)
    say_scales(controls)
    conditions = open_clip_conditions(
        model, controls, frames[0].size, len(frames), film=frames, drawn_on=film.size
    )
    return Layout(conditions, tuple((control.map.path == "", True) for control in controls))


@torch.no_grad()
def edit_clip(
    inversion: Inversion,
    targets: Sequence[str],
    settings: ClipEdit,
    *,
    progress: Callable[[], Any] = lambda: None,
) -> ClipResult:
    """Edit a clip's inversion towards target prompts (in the model's words).

    If a target's words of motion differ, the source's attention is not used unless it is set, and the region is what
    differs in any frame. `progress` is called after every step of each batch. Raises `UserError` as `replace`.
    """
    has_other_motion = find_other_motions(inversion, targets)
    free_settings = _clear_attention(settings)  # for targets with another motion
    if len(set(has_other_motion)) < 2:
        return _edit_batch(
            inversion, targets, free_settings if any(has_other_motion) else settings, progress=progress
        )
    groups = [[n for n, value in enumerate(has_other_motion) if value == moves] for moves in (False, True)]
    parts = [
        _edit_batch(inversion, [targets[n] for n in group], group_settings, progress=progress)
        for group, group_settings in zip(groups, (settings, free_settings), strict=True)
    ]
    return _join_results(inversion, parts, [n for group in groups for n in group])


def find_other_motions(inversion: Inversion, targets: Sequence[str]) -> list[bool]:
    """Which of the targets have another motion than the source: these are edited in a separate batch."""
    return [find_moves(target) != find_moves(inversion.prompt) for target in targets]


def _edit_batch(
    inversion: Inversion, targets: Sequence[str], settings: ClipEdit, *, progress: Callable[[], Any]
) -> ClipResult:
    """`edit_clip` for targets that all have the source's motion, or all another one."""
    model, count = inversion.model, len(targets)
    guidance = check_not_negative("guidance", resolve_target_guidance(inversion, settings.guidance))
    refuse_negative(model, settings.negative, guidance)
    say_same_negative(targets, settings.negative)
    text = encode_source_and_targets(inversion, targets)
    sampler = make_clip_sampler(inversion, targets, settings, guidance, text)

    # The first step, and the region in which each frame may differ from the source's
    first = inversion.start(check_strength(settings.strength, inversion.steps))
    inversion.layout.say_idle(first, inversion.steps)
    with link_frames(model, inversion.states.shape[-3]):
        masks, nfe = find_places(inversion, sampler.alignments, settings, first)
    masks = keep_frames(masks, settings.keep_frames, (count, *inversion.states.shape[2:]))

    def advance(step: int, noisy: Tensor, estimate: Estimate) -> Tensor:
        noisy = step_source_and_targets(inversion, step, noisy, estimate)
        return noisy if masks is None else blend_into_source(noisy, masks)

    start = inversion.states[first][None].repeat_interleave(1 + count, 0)
    noisy = sampler.sample(start, first, advance, progress)
    return ClipResult(
        model=model,
        prompts=tuple(targets),
        encoded=inversion.encoded,
        latents=noisy[1:].float(),
        nfe=inversion.nfe + nfe + sampler.predict.nfe,
        masks=masks,
        alignments=sampler.alignments,
        facts={
            "inversion_method": inversion.method,
            "guidance": guidance,
            "temporal": sampler.temporal,
            **inversion.layout.facts(),
        },
    )


@dataclass(frozen=True, eq=False)
class ClipSampler:
    """Samples a clip's source and N targets in one batch, under prompt-to-prompt's attention control.

    predict     guided predictions of the source and the targets
    empty       the encoded prompt [1, ...] of the unconditional rows
    alignments  of the source's prompt with each target's
    control     the attention control, and `plan` what it is at each step
    temporal    the share of the steps with the source's attention over time
    """

    inversion: Inversion
    predict: SourceAndTargets
    empty: Conditions
    alignments: tuple[Alignment, ...]
    control: AttentionControl
    plan: ControlPlan
    temporal: float

    def sample(
        self,
        noisy: Tensor,
        first: int,
        advance: Callable[[int, Tensor, Estimate], Tensor],
        progress: Callable[[], Any],
    ) -> Tensor:
        """The states [1 + N, C, F, H, W] after the last step, from those before step `first`.

        `advance` takes a step: its number, the states and the estimate → the next states. `progress` is called after
        each.
        """
        inversion, steps = self.inversion, self.inversion.steps
        over_time = steps_inside(steps, (0.0, self.temporal)).bool().tolist()
        with control_attention(inversion.model.denoiser, self.control):
            for step in range(first, steps):
                self.plan.apply(self.control, step)
                self.control.temporal = over_time[step]
                empty = inversion.unconditional(step, self.empty)
                noisy = advance(step, noisy, self.predict(noisy, inversion.schedule[step], empty))
                progress()
        return noisy


def make_clip_sampler(
    inversion: Inversion, targets: Sequence[str], settings: ClipEdit, guidance: float, text: Conditions
) -> ClipSampler:
    """The sampler of a clip's source and targets; `text` [1 + N, ...] are their encoded prompts, the source's first.

    Raises `UserError` as `align_prompts`, and for a negative prompt that the inversion replaces.
    """
    model = inversion.model
    replace_settings = ReplaceSettings(
        cross=settings.cross, self_attention=settings.self_attention, guidance=guidance
    ).resolve(model)
    alignments = align_prompts(model, inversion.prompt, targets, replace_settings)
    temporal = replace_settings.self_attention if settings.temporal is None else settings.temporal
    assert temporal is not None, "settings are resolved"
    predict = guide_source_and_targets(inversion, text, guidance)
    # Where no motion adapter links the frames, they attend to one another in the image model's own layers
    control = AttentionControl(
        len(targets),
        clips=predict.count_rows(len(targets)),
        across_frames=find_motion(model.denoiser) is None,
        reach=replace_settings.reach,
    )
    return ClipSampler(
        inversion,
        predict,
        encode_unconditional(inversion, settings.negative, text),
        alignments,
        control,
        plan_control(alignments, replace_settings, inversion.steps, model.device),
        temporal,
    )


def _join_results(inversion: Inversion, parts: Sequence[ClipResult], numbers: Sequence[int]) -> ClipResult:
    """Results joined into one; `numbers` are their edits' positions among all, concatenated."""
    order = [numbers.index(n) for n in range(len(numbers))]
    masks: Tensor | None = None
    if any(part.masks is not None for part in parts):
        everywhere = torch.ones(inversion.states.shape[2:], device=inversion.states.device)
        part_masks = [
            everywhere.expand(len(part.latents), -1, -1, -1) if part.masks is None else part.masks
            for part in parts
        ]
        masks = torch.cat([mask.to(everywhere) for mask in part_masks])[order]
    prompts = [prompt for part in parts for prompt in part.prompts]
    alignments = [alignment for part in parts for alignment in part.alignments]
    return replace(
        parts[0],
        prompts=tuple(prompts[n] for n in order),
        latents=torch.cat([part.latents for part in parts])[order],
        nfe=sum(part.nfe for part in parts) - (len(parts) - 1) * inversion.nfe,
        masks=masks,
        alignments=tuple(alignments[n] for n in order),
    )


def _clear_attention(settings: ClipEdit) -> ClipEdit:
    """The settings without the source's attention, except where it is set."""
    shares = {name: getattr(settings, name) for name in ("cross", "self_attention", "temporal")}
    cleared: dict[str, Any] = {name: 0.0 for name, value in shares.items() if value is None}
    return replace(settings, **cleared)


@torch.no_grad()
def find_places(
    inversion: Inversion, alignments: Sequence[Alignment], settings: ClipEdit, first: int
) -> tuple[Tensor | None, int]:
    """Where each target's frames may differ [N, F, H, W], 0 or 1, closed over time, and the NFE; None: everywhere.

    A region is extended to the frame before and the one after; where words of motion differ, to all frames.
    """
    pairs = [choose_compared_prompts(alignment, {}) for alignment in alignments]
    if not settings.threshold or first == inversion.steps or not any(pairs):
        return None, 0
    maps, nfe = compute_difference_maps(
        inversion, [pair for compared in pairs for pair in compared], first=first
    )
    remaining_maps, masks = iter(maps), []
    for compared in pairs:
        if not compared:
            masks.append(torch.ones_like(maps[0]))
            continue
        [(source, target)] = compared  # no word is weighted
        region = (next(remaining_maps) > settings.threshold).float()
        masks.append(close_over_time(region, everywhere=find_moves(source) != find_moves(target)))
    return torch.stack(masks), nfe


def keep_frames(masks: Tensor | None, frame_numbers: Sequence[int], shape: tuple[int, ...]) -> Tensor | None:
    """Masks [N, F, H, W] with these frames set to 0; None is everywhere.

    Raises `UserError` for a frame that the clip does not have, and if no other frame is left.
    """
    if not frame_numbers:
        return masks
    count, frames, height, width = shape
    for number in frame_numbers:
        if not -frames <= number < frames:
            raise UserError(
                f"--keep-frames {number}: a clip of {frames} frames has none of that number. The first is 0, the last "
                f"{frames - 1}."
            )
    if len({number % frames for number in frame_numbers}) == frames:
        raise UserError("--keep-frames names every frame, so nothing would change. Leave some out.")
    new_masks = torch.ones(count, frames, height, width) if masks is None else masks.clone()
    new_masks[:, list(frame_numbers)] = 0
    return new_masks


def close_over_time(region: Tensor, *, everywhere: bool = False) -> Tensor:
    """A region [F, H, W] extended to the neighbouring frames, or to all of them."""
    if everywhere:
        return region.amax(0, keepdim=True).expand_as(region)
    return F.max_pool3d(region[None, None], (3, 1, 1), stride=1, padding=(1, 0, 0))[0, 0]


@dataclass(frozen=True)
class ClipRedraw:
    """Settings of `redraw_film`, which samples a clip from its own noised frames.

    strength  the share of the steps that are taken, those nearest to the clip
    steps     of the whole schedule
    guidance  None: the model's default
    """

    strength: float = 0.6
    steps: int = 50
    guidance: float | None = None
    negative: str = ""
    seed: int = 0


def redraw_film(
    model: Backbone,
    film: Film,
    prompt: str,
    settings: ClipRedraw,
    *,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[float], Any] | None = None,
) -> ClipResult:
    """A clip noised and sampled towards a prompt (SDEdit, Meng et al. 2022, algorithm 1), all frames together.

    Frames have independent noise, as in diffusers' video-to-video pipeline. `progress` is called after each step with
    its share of the work. Raises `UserError` as `sdedit`.
    """
    check_prompt(prompt, "prompt")
    guidance = resolve_guidance(model, settings.guidance)
    refuse_negative(model, settings.negative, guidance)
    if settings.strength == 0:
        raise UserError("At a strength of 0 the clip would stay as it is. Give one above 0, at most 1.")
    taken = count_noised_steps(model, settings.steps, settings.strength)
    encoded = encode_film(model, film)
    with link_frames(model, len(film.frames)):
        (latents,) = sample_latents(
            model,
            [Request(prompt, (0, 0), settings.negative)],
            steps=settings.steps,
            guidance=guidance,
            sampler="ddim",
            seed=settings.seed,
            given=GivenLatents(encoded.latent, taken / settings.steps),
            size=(encoded.pixels.shape[-1], encoded.pixels.shape[-2]),
            frames=Frames(len(film.frames)),
            controls=layout.of_targets(),
            advance=progress,
        )
    nfe = taken * (1 + (guidance != 1))
    return ClipResult(
        model, (prompt,), encoded, latents.float(), nfe, facts={"guidance": guidance, **layout.facts()}
    )
