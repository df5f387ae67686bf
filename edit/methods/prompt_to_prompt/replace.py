"""Prompt-to-prompt over an inversion: several target prompts at once, in one batch with the source.

    result = replace(inversion, ["a dog in a park", "a red cat in a park"], ReplaceSettings(blend=["cat"]))

A step predicts the source with its prompt (one row) and every target with and without its own (two rows each); the
targets' attention is made from the source's while their windows last (Hertz et al. 2022, algorithm 1). The source's row
is then overwritten by the stored trajectory (`edit.inversion.inversion`), so its unconditional prediction is never
needed, and once no window is open the row itself is left out: S steps with N targets take at most S·(1 + 2·N) NFE.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import Estimate
from backbone.diffusion.transfer import send
from backbone.families.base import AttentionLayout
from backbone.io.console import UserError, notify
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from backbone.models.sample import refuse_negative, say_same_negative
from edit.attention.alignment import Alignment, Span, align, require, tokenize_prompt
from edit.attention.control import AttentionControl, Maps
from edit.attention.install import control_attention
from edit.attention.separate import find_feature_layer
from edit.checks import check_prompts, check_strength, refuse_no_inversion
from edit.inversion.inversion import Inversion
from edit.layout import SOURCE, TARGET
from edit.methods.prompt_to_prompt.plan import ControlPlan, plan_control
from edit.methods.prompt_to_prompt.regions import Regions
from edit.methods.prompt_to_prompt.settings import AUTO, ReplaceSettings
from edit.methods.prompt_to_prompt.weigh import refuse_many_weights, weigh_context
from edit.result import Result
from edit.sampling import KeptEstimates, SourceAndTargets, resolve_guidance, select

UNREAD_SWAP = (
    "--swap has no effect here: no word takes the source's attention (--cross is 0), and none is named to --blend or "
    "to --keep. Raise --cross."
)


@torch.no_grad()
def replace(
    inversion: Inversion,
    targets: str | Sequence[str],
    settings: ReplaceSettings | None = None,
    *,
    alignments: Sequence[Alignment] | None = None,
    progress: Callable[[], Any] = lambda: None,
) -> Result:
    """Edit the image of an inversion towards one target prompt, or several at once, in the model's words.

    `alignments` are those of `align_prompts`, if they are known already; `progress` is called after every step.

    Raises `UserError` for prompts that share no words with the source's, words that no prompt has, a mask of another
    size, and what the model cannot do.
    """
    refuse_no_inversion(inversion)
    targets = check_prompts(targets, "target prompt")
    model, steps = inversion.model, inversion.steps
    settings = _resolve(model, settings)
    say_same_negative(targets, settings.negative)
    alignments = tuple(alignments or align_prompts(model, inversion.prompt, targets, settings))
    first = _find_first_step(inversion, settings)
    inversion.layout.say_idle(first, steps)
    # The regions in which targets may differ, as far as they are known before the first step
    regions = Regions(inversion, alignments, settings)
    nfe, masks = regions.compare_predictions(first), regions.masks(None)
    plan = plan_control(alignments, settings, steps, model.device, whole_scene=regions.find_whole())
    _say_unread_swap(settings, regions, plan)

    # Rows: the source, then the N targets
    text = encode_source_and_targets(inversion, targets, regions)
    empty = encode_unconditional(inversion, settings.negative, text)
    guidance = resolve_target_guidance(inversion, settings.guidance)
    predict = guide_source_and_targets(inversion, text, guidance)
    attention = model.family.attention(model.denoiser, text)
    control = _make_control(settings, regions, attention)

    # `read_from`: the first step whose maps count; `until`: the last one at which each target needs the source's row
    read_from = -1 if control.maps is None else _find_first_read(settings, first, steps)
    until = _find_last_steps_with_source(inversion, plan, read_from)
    noisy = inversion.states[first][None].repeat_interleave(1 + len(targets), 0)
    trajectory, kept_estimates = [noisy], KeptEstimates(first, steps, settings.frames)
    with ExitStack() as controlling:
        controlling.enter_context(control_attention(model.denoiser, control, attention))
        for step in range(first, steps):
            if not (with_source := step <= max(until)):
                controlling.close()  # from here on attention is unchanged
            plan.apply(control, step)
            level, unprompted = inversion.schedule[step], inversion.unconditional(step, empty)
            # One step of all rows; the source's is its trajectory, or sampled as the targets are
            estimate = predict(noisy, level, unprompted, with_source=with_source)
            noisy = step_source_and_targets(inversion, step, noisy, estimate)
            if control.maps is not None and with_source:
                needed = [step <= last for last in until]
                masks = _read_maps(control.maps, regions, masks, needed, is_due=step >= read_from)
            if masks is not None:
                noisy = blend_into_source(noisy, masks)
            trajectory.append(noisy)
            kept_estimates.add(step, estimate.clean[-len(targets) :])
            progress()
    return Result(
        model=model, prompts=targets, encoded=inversion.encoded, latents=noisy[1:].float(), nfe=nfe + predict.nfe,
        masks=masks, estimates=kept_estimates.stack(), layout=inversion.layout, inversions=(inversion,),
        facts={"inversion_method": inversion.method, "guidance": guidance, **inversion.layout.facts()},
        trajectory=torch.stack(trajectory), alignments=alignments, heatmaps=regions.heatmaps(),
    )  # fmt: skip


def _resolve(model: Backbone, settings: ReplaceSettings | None) -> ReplaceSettings:
    """These settings, or the defaults, resolved for a model; `UserError` for what it cannot do."""
    if settings is not None and not isinstance(settings, ReplaceSettings):
        raise UserError(f"settings is {type(settings).__name__}. Write edit.ReplaceSettings(keep=[…]).")
    resolved = (settings or ReplaceSettings()).resolve(model)
    check_supported(model, resolved)
    return resolved


def check_supported(model: Backbone, settings: ReplaceSettings) -> None:
    """`UserError` for features of a denoiser without them, and for a negative prompt that the model does not read."""
    if settings.features and find_feature_layer(model.denoiser) is None:
        raise UserError(
            f"plug-and-play takes the features of a UNet, and the denoiser of {model.location.name} is not one. "
            "Choose --control prompt-to-prompt or masactrl."
        )
    refuse_negative(model, settings.negative, resolve_guidance(model, settings.guidance))


def align_prompts(
    model: Backbone, source: str, targets: Sequence[str], settings: ReplaceSettings
) -> tuple[Alignment, ...]:
    """The alignment of the source prompt with each target; `settings` are resolved.

    Raises `UserError` without targets, for words that no prompt has, and for prompts that share none where it matters.
    """
    if not targets:
        raise UserError("There is no target prompt. Say what the image should show.")
    segments = model.text_encoder.segments
    source_prompt, *target_prompts = (tokenize_prompt(segments, prompt) for prompt in (source, *targets))
    for word in [*settings.weights, *settings.windows]:
        require(target_prompts, word)
    for target in target_prompts:
        refuse_many_weights(target, settings.steady_weights)
    for word in [*(word for word in settings.blend if word != AUTO), *settings.keep, *settings.heatmaps]:
        require([source_prompt, *target_prompts], word)
    for old, new in settings.swaps:
        require([source_prompt], old)
        require(target_prompts, new)
    if not settings.carries_words:  # no word correspondence is needed: one span is enough
        return tuple(
            Alignment(source_prompt, target, (Span("replaced", source_prompt.words, target.words),))
            for target in target_prompts
        )
    return tuple(
        align(source_prompt, target, swaps=[swap for swap in settings.swaps if target.find(swap[1])])
        for target in target_prompts
    )


# Helpers ----------------------------------------------------------------------------------------------------


def _say_unread_swap(settings: ReplaceSettings, regions: Regions, plan: ControlPlan) -> None:
    if settings.swaps and regions.columns is None and not any(plan.cross):
        notify(UNREAD_SWAP)


def _find_first_step(inversion: Inversion, settings: ReplaceSettings) -> int:
    """The first step of the edit; `UserError` for heat maps if no step is left."""
    first = inversion.start(check_strength(settings.strength, inversion.steps))
    if settings.heatmaps and first == inversion.steps:
        raise UserError(
            "Nothing is sampled at this strength, so no attention can be read. Leave --heatmap out."
        )
    return first


def _find_first_read(settings: ReplaceSettings, first: int, steps: int) -> int:
    """The first step at which masks are read from attention, for an edit that begins at step `first`."""
    return min(max(math.ceil(settings.blend_from * steps - 1e-9), first), steps - 1)


def _find_last_steps_with_source(inversion: Inversion, plan: ControlPlan, read: int) -> list[int]:
    """The last step at which each target needs the source's row: to take something from it, or to read maps at `read`.

    One for each target, so that an edit does not depend on the others in the batch.
    """
    last = plan.last_steps()
    return [max(step, read) for step in last] if inversion.overwrites else [inversion.steps - 1] * len(last)


def _make_control(
    settings: ReplaceSettings, regions: Regions, attention: AttentionLayout
) -> AttentionControl:
    """Attention control before the first step, for the layers that `attention` describes."""
    maps = None
    if regions.columns is not None:
        maps = Maps(
            send(regions.columns, regions.device), regions.size, max_queries=attention.max_map_queries
        )
    return AttentionControl(
        regions.count,
        self_tokens=attention.max_map_queries,
        layers=attention.detail_layers if settings.layers == "late" else ("",),
        reach=settings.reach,
        maps=maps,
    )


def encode_source_and_targets(
    inversion: Inversion, targets: Sequence[str], regions: Regions | None = None
) -> Conditions:
    """The encoded prompts [1 + N, ...], the source's first, with the layout's controls.

    With `regions`, weighted words are weighted in the context of the other words too, and maps that were computed from
    the source do not control the places of what is added or removed.
    """
    text = encode_prompts_cached(inversion.model, [inversion.prompt, *targets])
    if regions is not None and regions.settings.steady_weights:
        prompts = [alignment.target for alignment in regions.alignments]
        weighed = weigh_context(inversion.model, text[1:], prompts, regions.settings.steady_weights)
        text = Conditions.cat([text[:1], weighed])
    freed = regions.find_freed() if regions is not None and inversion.layout.conditions else None
    if freed is not None:
        return inversion.layout.attach_with_blank(text, inversion.schedule, freed)
    return inversion.layout.attach(text, inversion.schedule, [SOURCE, *[TARGET] * len(targets)])


def guide_source_and_targets(inversion: Inversion, text: Conditions, guidance: float) -> SourceAndTargets:
    """Predictions under these prompts [1 + N, ...], the source's first: targets guided, the source as inverted."""
    source_guidance = guidance if source_is_guided(inversion) else 1.0
    return SourceAndTargets(inversion.model, text, source_guidance=source_guidance, guidance=guidance)


def source_is_guided(inversion: Inversion) -> bool:
    """Whether guidance changes the source's row: not where it is overwritten, or its own prompt is the negative one."""
    return not inversion.overwrites and inversion.method != "negative-prompt"


def resolve_target_guidance(inversion: Inversion, requested: float | None) -> float:
    """The targets' guidance: the requested one, else the inversion's, else the model's default.

    Raises `UserError` if a null-text inversion was made for another one.
    """
    made_for = inversion.guidance
    if made_for is not None and requested is not None and requested != made_for:
        raise UserError(
            f"This null-text inversion was made for guidance {made_for:g}, not {requested:g}. "
            f"Leave --guidance out, or invert again with it."
        )
    default = float(inversion.model.defaults["guidance"]) if made_for is None else made_for
    return default if requested is None else requested


def encode_unconditional(inversion: Inversion, negative: str, text: Conditions) -> Conditions:
    """The encoded prompt [1, ...] of unconditional rows: the negative one, or with negative-prompt the source's."""
    refuse_idle_negative(inversion.method, negative)
    if inversion.method == "negative-prompt":
        return text[:1]
    return encode_prompts_cached(inversion.model, [negative])


def refuse_idle_negative(method: str, negative: str) -> None:
    """`UserError` for a negative prompt beside an inversion that replaces it."""
    replacements = {"null-text": "what it has optimised", "negative-prompt": "the source prompt"}
    if negative and method in replacements:
        raise UserError(
            f"An inversion by {method} puts {replacements[method]} in the place of a negative prompt, so nothing stays "
            f"away from “{negative}”. Leave --negative out, or take another --method."
        )


def step_source_and_targets(inversion: Inversion, step: int, noisy: Tensor, estimate: Estimate) -> Tensor:
    """The next states [1 + N, ...]: the source's from the trajectory, or sampled as the targets are."""
    if not inversion.overwrites:
        return inversion.step_targets(step, noisy, estimate)
    targets = noisy[1:]
    stepped = inversion.step_targets(step, targets, select(estimate, slice(-len(targets), None)))
    return torch.cat([inversion.states[step + 1][None].to(stepped), stepped])


def _read_maps(
    maps: Maps, regions: Regions, masks: Tensor | None, needed: Sequence[bool], *, is_due: bool
) -> Tensor | None:
    """The masks after a step; those of the targets `needed` are read again, once they are due.

    Maps are means over the steps so far, so a word's place becomes clearer step by step.
    """
    regions.read_heat(maps, needed)
    maps.settle()
    if not is_due or not regions.has_words.any():
        return masks
    new_masks = regions.masks(maps)
    if new_masks is None or masks is None or all(needed):
        return new_masks
    return torch.stack([new_masks[n] if is_needed else masks[n] for n, is_needed in enumerate(needed)])


def blend_into_source(noisy: Tensor, masks: Tensor) -> Tensor:
    """Local blend (Hertz et al. 2022, section 3.2): outside its mask a target is the source.

    States [1 + N, C, H, W] and masks [N, H, W], or those of clips, [1 + N, C, F, H, W] and [N, F, H, W].
    """
    inside = masks.to(noisy).reshape(len(masks), *[1] * (noisy.ndim - masks.ndim), *masks.shape[1:])
    return torch.cat([noisy[:1], noisy[:1] + inside * (noisy[1:] - noisy[:1])])
