"""Editing by an instruction, "make it snow", with a model that reads the image and the prompt.

    result = instruct(Backbone.open("timbrooks/instruct-pix2pix", task="edit"), "photo.png", ["make it snow"])

The model redraws the whole image, so the background drifts. In the end it is replaced by the source's
(`edit.methods.keep_background`), so that a sequence of instructions does not degrade it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from backbone.cli.keywords import takes
from backbone.cli.sampling import (
    SAMPLER,
    GuidanceInterval,
    Sampler,
    check_guidance_interval,
    refuse_unguided,
)
from backbone.cli.values.build import build
from backbone.io.console import UserError, notify, notify_once, suggest_value
from backbone.io.prompts import is_caption
from backbone.media.transforms import to_image
from backbone.models.by_instruction import (
    IMAGE_GUIDANCE,
    Guidances,
    count_evaluations,
    draw_edit,
    refuse_image_guidance,
)
from backbone.models.cache import encode_prompts_cached
from backbone.models.model import Backbone
from backbone.models.references import ReferenceImage, refuse_too_many
from backbone.models.sample import refuse_negative
from edit.checks import check_not_negative, check_prompts, refuse_unopened
from edit.layout import NO_LAYOUT, Layout
from edit.masks import load_pixel_mask
from edit.methods.keep_background import KeptBackground, NoBackgroundError, keep_background
from edit.pictures import EncodedImage, ImageLike, encode_image
from edit.result import Result
from edit.sampling import KeptEstimates, make_noise_schedule, resolve_guidance

Keep = Literal["auto", "pixels", "latents", "none"]
USUAL_IMAGE_GUIDANCE, MOST_IMAGE_GUIDANCE = 2.5, 10  # largest usual value, and largest accepted one


@dataclass(frozen=True, kw_only=True, eq=False)
class InstructSettings(GuidanceInterval):
    """Settings of `instruct`. The share of the steps with guidance is by default the model's own.

    references      further images, for a model that reads several
    keep            what becomes of the background: the image's own pixels, its autoencoder's copy, or what is drawn;
                    `auto`: its own pixels, and what is drawn where nearly everything has changed
    guidance        how closely the instruction is followed; None: the model's default
    image_guidance  how closely the image is (eq. 3 of Brooks et al. 2023)
    sampler         the model's own if None
    negative        what to stay away from
    mask            white = may change; None: each edit's place is found by itself
    frames          estimates of the last edit kept along the way
    """

    references: Sequence[ImageLike] = ()
    keep: Keep = "auto"
    steps: int = 50
    guidance: float | None = None
    image_guidance: float = IMAGE_GUIDANCE
    sampler: Annotated[Sampler | None, SAMPLER] = None
    negative: str = ""
    mask: ImageLike | None = None
    seed: int = 0
    frames: int = 0


@takes(InstructSettings)
@torch.no_grad()
def instruct(
    model: Backbone,
    image: ImageLike,
    instructions: str | Sequence[str],
    *,
    layout: Layout = NO_LAYOUT,
    progress: Callable[[], Any] = lambda: None,
    **settings: Any,
) -> Result:
    """N edits of an image, one for each instruction, each applied to the previous result.

    `settings` are the fields of `InstructSettings`, by name; `layout` and `progress` are as in `sdedit`.

    Each is registered to the image that it edits, not to the first one, and a map that is found in an image is found in
    that one. If one of several edits changes nearly
    everything, all of it is kept, which is printed, and later edits keep its background.

    Raises `UserError` for an empty instruction, a model that reads no image, and where the only edit leaves no
    background to keep.
    """
    options = build(InstructSettings, settings)
    refuse_unopened(model)
    instructions = check_prompts(instructions, "instruction")
    guidances = resolve_guidances(model, options)
    refuse_unread(model, 1 + len(options.references), guidances)
    say_captions(instructions)
    encoded = encode_image(model, image)
    references = [as_reference(model, encode_image(model, reference)) for reference in options.references]
    changed = load_pixel_mask(options.mask, encoded)
    sampler = model.choose_sampler(options.sampler)
    schedule = make_noise_schedule(model, options.steps, encoded.latent)
    kept_frames = KeptEstimates(0, options.steps, options.frames)

    # Each edit starts from the previous result, whose background it keeps
    current, latents, finished, backgrounds, nfe = encoded, [], [], [], 0
    for number, instruction in enumerate(instructions):
        inputs = [as_reference(model, current), *references]
        under = layout if number == 0 else layout.in_image(to_image(current.pixels))
        final = number == len(instructions) - 1
        state = draw_edit(
            model, inputs, instruction, steps=options.steps, guidances=guidances, key=(options.seed, number),
            sampler=sampler, controls=under.of_targets(),
            after_step=after_each_step(progress, kept_frames if final else None),
        )  # fmt: skip
        text = encode_prompts_cached(model, [instruction], inputs)
        nfe += count_evaluations(model, text, guidances, sampler, schedule)
        edited = model.decode(state)[0].cpu()
        if options.keep != "none":
            background = restore_background(
                model, edited, current, options, changed, instructions=instructions, number=number
            )
            edited = background.image
            backgrounds.append(background)
        latents.append(state[0])
        finished.append(edited)
        current = EncodedImage(edited, model.encode(edited[None]).mean, encoded.facts)
    sampling: dict[str, Any] = {"sampler": sampler, "guidance": guidances.text}
    sampling |= dict(zip(("guidance_start", "guidance_stop"), guidances.guided, strict=True))
    sampling |= {"image_guidance": guidances.image} if model.reads_as_channels else {}
    facts = {**sampling, "drift": [kept.figures for kept in backgrounds], **layout.facts()}
    return Result(
        model=model, prompts=instructions, encoded=encoded, latents=torch.stack(latents), nfe=nfe,
        finished=torch.stack(finished), masks=_accumulate_regions(backgrounds) if backgrounds else None,
        estimates=kept_frames.stack(), facts=facts, layout=layout,
    )  # fmt: skip


def resolve_guidances(model: Backbone, settings: InstructSettings) -> Guidances:
    """The guidance scales, by default the model's. `UserError` for scales below 0, and for a share of no steps."""
    image_guidance = check_not_negative("image guidance", settings.image_guidance)
    if image_guidance > MOST_IMAGE_GUIDANCE:
        suggestion = suggest_value(image_guidance, USUAL_IMAGE_GUIDANCE)
        notify(
            f"At image guidance {image_guidance:g} images burn out: 1 to {USUAL_IMAGE_GUIDANCE} is usual.{suggestion}"
        )
    guided = settings.resolve_guided(model.defaults)
    check_guidance_interval(guided)
    if (settings.guidance_start, settings.guidance_stop) != (None, None):
        refuse_unguided(guided, settings.steps)
    return Guidances(resolve_guidance(model, settings.guidance), image_guidance, settings.negative, guided)


def say_captions(instructions: Sequence[str]) -> None:
    """Print which instructions look like captions: such a model may change little."""
    for caption in filter(is_caption, instructions):
        notify_once(
            f"“{caption}” seems to describe an image and not to say what to do. If little changes, write an "
            "instruction: “make it snow”."
        )


def as_reference(model: Backbone, image: EncodedImage) -> ReferenceImage:
    """An encoded image as a reference image."""
    return ReferenceImage(model.as_reference(image.latent), to_image(image.pixels))


def _accumulate_regions(backgrounds: Sequence[KeptBackground]) -> Tensor:
    """Where each edit or an earlier one may differ from the source [N, 8H, 8W]."""
    return torch.stack([(background.place > 0).float() for background in backgrounds]).cummax(0).values


def refuse_unread(model: Backbone, images: int, guidances: Guidances) -> None:
    """`UserError` for unsupported inputs: an image, this many of them, image guidance, a negative prompt."""
    if not model.edits_by_instruction:
        model.refuse_other_task("edit")
    refuse_too_many(model, images)
    refuse_negative(model, guidances.negative, guidances.text)
    if guidances.image != IMAGE_GUIDANCE:
        refuse_image_guidance(model)


def after_each_step(
    progress: Callable[[], Any], frames: KeptEstimates | None
) -> Callable[[int, Tensor], None]:
    """A callback for each step: calls `progress`, and keeps the estimate if there are `frames`."""

    def after_step(step: int, clean: Tensor) -> None:
        if frames is not None:
            frames.add(step, clean)
        progress()

    return after_step


def restore_background(
    model: Backbone,
    edited: Tensor,
    previous: EncodedImage,
    settings: InstructSettings,
    changed: Tensor | None,
    *,
    instructions: Sequence[str],
    number: int,
) -> KeptBackground:
    """The edit [3, 8H, 8W] on the previous image's background, as `settings.keep` says.

    After the first edit the background is already the autoencoder's copy, which does not degrade any further. Raises
    `UserError` if a background is to be kept, there is none, and this is the only edit.
    """
    copied = settings.keep == "latents" and number == 0
    background = model.decode(previous.latent)[0].cpu() if copied else None
    changed_region, quoted = None if changed is None else changed.cpu(), f"“{instructions[number]}”"
    try:
        return keep_background(edited, previous.pixels.cpu(), changed=changed_region, background=background)
    except NoBackgroundError as error:
        if settings.keep != "auto" and len(instructions) == 1:
            raise UserError(
                f"{quoted}: {error} To take all that the model draws, say --background none."
            ) from error
        notify(f"{quoted} changes nearly everything, so all of it is taken as it is drawn.")
        return KeptBackground.without_background(edited)
