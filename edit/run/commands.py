"""The commands: functions of a model and JSON-able options to a `Result`, with prompts as they were typed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from PIL import Image

from backbone.cli.conditions import say_idle_rows
from backbone.io.console import UserError, notify, quote_text
from backbone.io.progress import progress
from edit.attention.alignment import steps_inside
from edit.checks import check_count, check_prompt, check_prompts, check_share
from edit.inversion.inversion import Inversion
from edit.layout import NOTHING_REQUESTED, RequestedLayout
from edit.methods.compose import compose
from edit.methods.flow_edit import flow_edit
from edit.methods.instruct import Keep, instruct
from edit.methods.interpolate import interpolate
from edit.methods.prompt_to_prompt.regions import refuse_ambiguous_auto
from edit.methods.prompt_to_prompt.replace import align_prompts, check_supported, refuse_idle_negative
from edit.methods.prompt_to_prompt.replace import replace as replace_words
from edit.methods.remove import GUIDANCE, NO_SURROUNDINGS, STRENGTH, leave_out, remove
from edit.methods.sdedit import sdedit
from edit.phrases import remove_thing
from edit.pictures import ImageLike, read_image, refuse_other_shape
from edit.result import Result
from edit.run.open import FRAMES, START, ModelWithConcepts, Start, pick, replace_settings
from edit.run.report import describe_drift
from edit.sampling import resolve_guidance, split_count


@dataclass(frozen=True)
class EditCommand:
    """A command of `edit`.

    run             (model, options …) → result; with `from_start` (model, start, other options …)
    compared        whether its edits are measured against the source image
    frames          the frames of its film
    by_instruction  whether its model reads an image beside the prompt
    """

    run: Callable[..., Result]
    from_start: bool = False
    compared: bool = True
    frames: Callable[[Result], Sequence[Image.Image]] = Result.frames
    by_instruction: bool = False

    def __call__(self, loaded: ModelWithConcepts, options: Mapping[str, Any]) -> Result:
        """Run it; `TypeError` or `UnknownSettingError` for options that it does not know."""
        if not self.from_start:
            return self.run(loaded, **options)
        remaining = {name: value for name, value in options.items() if name not in START}
        return self.run(loaded, Start(**pick(options, START)), **remaining)


def run_replace(
    loaded: ModelWithConcepts, start: Start, *, targets: Sequence[str], **settings: Any
) -> Result:
    """`edit invert-and-replace`; `settings` are those of `replace_settings`."""
    targets = check_prompts(targets, "target prompt")
    resolved = [loaded.resolve(target) for target in targets]
    replace_options = replace_settings(loaded, **settings)
    check_supported(loaded.model, replace_options)
    guidance = resolve_guidance(loaded.model, replace_options.guidance)
    say_idle_rows(start.requested.all, guidance if start.inversion is None else 0)
    start.check_mask(loaded, replace_options.mask)
    # A mistake in the words is found before an inversion is made
    inversion = None if start.inversion is None else start.open(loaded)
    if inversion is None:
        prompt = loaded.resolve(check_prompt(start.source or "", "source prompt"))
    else:
        prompt = inversion.prompt
    alignments = align_prompts(loaded.model, prompt, resolved, replace_options)
    refuse_idle_negative(start.method if inversion is None else inversion.method, replace_options.negative)
    refuse_ambiguous_auto(settings.get("blend") or (), alignments)
    if inversion is None:
        inversion = start.open(loaded, guidance=replace_options.guidance)
    for target, alignment in zip(targets, alignments, strict=True):
        description = alignment.describe(loaded.placeholders)
        notify(f"→ {target}\n{description}" if len(targets) > 1 else description)
    first = inversion.start(replace_options.strength)
    say_unread_shares(settings, first, inversion.steps)
    with progress(inversion.steps - first, "editing") as bar:
        result = replace_words(
            inversion, resolved, replace_options, alignments=alignments, progress=bar.advance
        )
    control = settings.get("control", "prompt-to-prompt")
    title = f"{start.source or inversion.prompt}: {control} on {_describe_inversion(inversion)}"
    return replace(result, prompts=targets, title=title, placeholders=loaded.placeholders)


def say_unread_shares(options: Mapping[str, Any], first: int, steps: int) -> None:
    """Say which of the given shares hold none of the sampled steps, those from `first` of `steps` on."""
    layout = options.get("control") != "masactrl"  # its share is the last steps
    ends = {
        "--cross": options.get("cross"),
        "--self": options.get("self_attention") if layout else None,
        "--temporal": options.get("temporal"),
    }
    shares = {f"{name} {end:g}": (0.0, float(end)) for name, end in ends.items() if end}
    for word, (start, end) in (options.get("windows") or {}).items():
        if end > start:
            shares[f"--window {word}={start:g}:{end:g}"] = (float(start), float(end))
    for name, window in shares.items():
        if not steps_inside(steps, window)[first:].any():
            sampled = f"the last {steps - first} of {steps} steps" if first else f"the {steps} steps"
            notify(f"{name} has no effect: none of {sampled}, which are sampled, lies in that share.")


def run_sdedit(
    loaded: ModelWithConcepts,
    *,
    image: ImageLike,
    prompt: str,
    strength: float = 0.6,
    steps: int = 50,
    count: int = 1,
    requested: RequestedLayout = NOTHING_REQUESTED,
    **settings: Any,
) -> Result:
    """`edit sdedit`."""
    say_idle_rows(requested.all, resolve_guidance(loaded.model, settings.get("guidance")))
    rounds = len(split_count(loaded.model, check_count(count)))
    drawn = loaded.model.path.count_noised_steps(steps, check_share("strength", strength))
    with progress(rounds * drawn, "sampling") as bar:
        result = sdedit(
            loaded.model, image, loaded.resolve(prompt), strength=strength, steps=steps, count=count,
            progress=bar.advance, layout=loaded.layout(image, requested), **_method_settings(loaded, **settings),
        )  # fmt: skip
    title = f"SDEdit: {prompt}, strength {strength:g} of {steps} steps"
    return replace(result, prompts=(prompt,) * len(result.prompts), title=title)


def run_flow_edit(
    loaded: ModelWithConcepts,
    *,
    image: ImageLike,
    source: str,
    targets: Sequence[str],
    strength: float = 0.66,
    steps: int = 50,
    requested: RequestedLayout = NOTHING_REQUESTED,
    **settings: Any,
) -> Result:
    """`edit flow-edit`."""
    for target in targets if requested == NOTHING_REQUESTED else ():
        if " ".join(target.lower().split()) == " ".join(source.lower().split()):
            alike = settings.get("guidance") == settings.get("source_guidance", 1.0)
            explanation = (
                "and its guidance is the source's, so nothing changes."
                if alike
                else "so what changes is by guidance."
            )
            notify(f"“{target}” says what the source says, {explanation}")
    guidance = resolve_guidance(loaded.model, settings.get("guidance"))
    say_idle_rows(requested.all, guidance, settings.get("source_guidance", 1.0))
    taken = loaded.model.path.count_noised_steps(steps, check_share("strength", strength))
    with progress(taken, "editing") as bar:
        result = flow_edit(
            loaded.model, image, loaded.resolve(source), [loaded.resolve(target) for target in targets],
            strength=strength, steps=steps, progress=bar.advance, layout=loaded.layout(image, requested),
            **_method_settings(loaded, **settings),
        )  # fmt: skip
    return replace(
        result, prompts=tuple(targets), title=f"FlowEdit: {source}, strength {strength:g} of {steps} steps"
    )


def run_instruct(
    loaded: ModelWithConcepts,
    *,
    image: ImageLike,
    instruction: str,
    then: Sequence[str] = (),
    background: str = "auto",
    steps: int = 50,
    requested: RequestedLayout = NOTHING_REQUESTED,
    **settings: Any,
) -> Result:
    """`edit instruct`."""
    instructions = [instruction, *then]
    if not loaded.model.reads_as_channels:  # such a model is guided by the image too
        say_idle_rows(requested.all, resolve_guidance(loaded.model, settings.get("guidance")))
    with progress(steps * len(instructions), "editing") as bar:
        result = instruct(
            loaded.model, image, [loaded.resolve(text) for text in instructions], keep=cast(Keep, background),
            steps=steps, progress=bar.advance, layout=loaded.layout(image, requested),
            **_method_settings(loaded, **settings),
        )  # fmt: skip
    for text, drift in zip(instructions, result.facts["drift"], strict=False):
        if drift["drift_px"] is None:
            notify(f"{text}: all of the image is as it was drawn.")
            continue
        notify(
            f"{text}: {describe_drift(drift)}. The edit stands in {drift['changed_share']:.0%} of the image."
        )
    return replace(
        result, prompts=tuple(instructions), title=f"by instruction: {', then '.join(instructions)}"
    )


def run_remove(
    loaded: ModelWithConcepts,
    start: Start,
    *,
    word: str = "",
    prompt: str | None = None,
    mask: ImageLike | None = None,
    strength: float = STRENGTH,
    count: int = 1,
    **settings: Any,
) -> Result:
    """`edit remove`."""
    if not word.strip() and mask is None:
        raise UserError("Neither a word to remove nor a mask is given. Give --remove WORD or --mask IMAGE.")

    # Mistakes are found before an inversion is made
    say_idle_rows(start.requested.all, settings.get("guidance", GUIDANCE))
    fitted = start.check_mask(loaded, mask)
    if fitted is not None and fitted.getextrema()[0] == 255:
        raise UserError(NO_SURROUNDINGS)
    if start.inversion is None and word.strip() and start.source:
        leave_out(loaded.model, loaded.resolve(start.source), loaded.resolve(word))
    if prompt and word.strip() and remove_thing(prompt, word) != prompt:
        notify(
            f"--prompt {quote_text(prompt)} still names “{word}”, so it may be drawn again. Leave it out there, or "
            "leave --prompt out."
        )

    # The prompt without the thing
    inversion = start.open(loaded)
    source = start.source or inversion.prompt
    if prompt is not None:
        remaining = prompt
    elif word.strip():
        remaining = remove_thing(source, word)
        notify(f"Without {word}: “{remaining}”" if remaining else "Nothing is left of the prompt.")
    else:
        remaining = ""
        notify(
            "No words say what the mask covers, so nothing is prompted there. Use --prompt to say what to draw."
        )

    rounds = len(split_count(loaded.model, check_count(count)))
    steps = inversion.steps - inversion.start(check_share("strength", strength))
    with progress(rounds * steps, "removing") as bar:
        result = remove(
            inversion, loaded.resolve(word), prompt=None if prompt is None else loaded.resolve(prompt), mask=mask,
            strength=strength, count=count, seed=start.seed, progress=bar.advance,
            **_method_settings(loaded, **settings),
        )  # fmt: skip
    title = f"without {word or 'what the mask covers'}: {source}, {_describe_inversion(inversion)}"
    return replace(result, prompts=(remaining,) * len(result.prompts), title=title)


def run_compose(
    loaded: ModelWithConcepts,
    start: Start,
    *,
    toward: Sequence[Sequence[Any]],
    strength: float = 0.7,
    **settings: Any,
) -> Result:
    """`edit compose`."""
    weighted = [(str(prompt), float(weight)) for prompt, weight in toward]
    resolved = [(loaded.resolve(prompt), weight) for prompt, weight in weighted]
    inversion = start.open(loaded)
    with progress(inversion.steps - inversion.start(check_share("strength", strength)), "composing") as bar:
        result = compose(
            inversion,
            resolved,
            strength=strength,
            progress=bar.advance,
            **_method_settings(loaded, **settings),
        )
    for prompt, weight in weighted:
        if not weight:
            notify(f"“{prompt}” has the weight 0, so it changes nothing.")
    caption = ", ".join(f"{prompt} × {weight:g}" for prompt, weight in weighted)
    return replace(result, prompts=(caption,), title=f"composed: {caption}, {_describe_inversion(inversion)}")


def run_interpolate(
    loaded: ModelWithConcepts,
    *,
    first: ImageLike,
    second: ImageLike,
    first_prompt: str,
    second_prompt: str,
    count: int = 7,
    **starting: Any,
) -> Result:
    """`edit interpolate`."""
    say_idle_rows(starting.get("requested", NOTHING_REQUESTED).all, 1.0)
    both = read_image(first), read_image(second)
    refuse_other_shape(loaded.model, *both)
    if both[0].content == both[1].content and first_prompt == second_prompt:
        notify("Both ends are the same image with the same prompt, so all between them are that image too.")
    ends = [
        Start(image, prompt, **starting).open(loaded)
        for image, prompt in ((first, first_prompt), (second, second_prompt))
    ]
    rounds = len(split_count(loaded.model, check_count(count) - 2))
    with progress(rounds * ends[0].steps, "interpolating") as bar:
        result = interpolate(ends[0], ends[1], count=count, progress=bar.advance)
    prompts = (first_prompt, *result.prompts[1:-1], second_prompt)
    title = f"from {first_prompt} to {second_prompt}, {_describe_inversion(ends[0])}"
    return replace(result, prompts=prompts, title=title)


def _describe_inversion(inversion: Inversion) -> str:
    """The method and the steps of an inversion, for a title."""
    return f"{inversion.method} inversion, {inversion.steps} steps"


def loop_images(result: Result) -> list[Image.Image]:
    """The images forward and back, as a film that loops."""
    images = result.images
    return [*images, *images[-2:0:-1]]


COMMANDS: Mapping[str, EditCommand] = {
    "invert-and-replace": EditCommand(run_replace, from_start=True),
    "sdedit": EditCommand(run_sdedit),
    "flow-edit": EditCommand(run_flow_edit),
    "instruct": EditCommand(run_instruct, by_instruction=True),
    "remove": EditCommand(run_remove, from_start=True),
    "compose": EditCommand(run_compose, from_start=True),
    "interpolate": EditCommand(run_interpolate, compared=False, frames=loop_images),
}


def _method_settings(
    loaded: ModelWithConcepts, *, film: bool = False, negative: str | None = None, **settings: Any
) -> dict[str, Any]:
    """A method's own settings from a command's."""
    if negative is not None:
        settings["negative"] = loaded.resolve(negative)
    return {**settings, "frames": FRAMES if film else 0}
