"""Sampling settings: the options of every command and function that draws images. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, TypeAlias, get_args

from backbone.cli.flags import (
    CONCEPTS,
    DRAWING,
    MODEL,
    SAMPLING,
    WITH_CONCEPTS,
    ConceptOptions,
    negative_option,
)
from backbone.cli.options import Option
from backbone.cli.values.build import check_values
from backbone.io.console import UserError, format_count, notify

if TYPE_CHECKING:
    from typing import Self

Sampler = Literal["ddim", "heun", "dpmpp-2m", "unipc", "ancestral", "consistency"]
ALL_STEPS = (0.0, 1.0)
Size: TypeAlias = tuple[int | None, int | None]
"""(width, height) in pixels; None for the model's own."""
MODELS_OWN: Size = (None, None)
# The names in webui, ComfyUI, kohya's scripts and diffusers. Case, spaces and punctuation do not matter.
# Euler's step of the ODE over σ is DDIM's, and DDPM's is the ancestral one.
SAMPLERS_ELSEWHERE: Mapping[Sampler, tuple[str, ...]] = {
    "ddim": (
        *("DDIM", "Euler", "k_euler"),
        *("DDIMScheduler", "EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"),
    ),
    "heun": ("Heun", "k_heun", "HeunDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
    "dpmpp-2m": ("DPM++ 2M", "k_dpmpp_2m", "dpmsolver++", "DPMSolverMultistepScheduler"),
    "unipc": ("UniPC", "uni_pc", "uni_pc_bh2", "UniPCMultistepScheduler"),
    "ancestral": (
        *("Euler a", "k_euler_a", "euler_ancestral", "k_euler_ancestral", "DDPM"),
        *("EulerAncestralDiscreteScheduler", "DDPMScheduler"),
    ),
    "consistency": ("LCM", "LCMScheduler", "FlowMatchLCMScheduler"),
}
SPACINGS_ELSEWHERE = ("karras", "exponential", "polyexponential", "sgm_uniform", "beta", "simple", "normal")
DEFAULT_SIZE_TEXT = "as the concept's images, else the model's own"
# Limits that catch a typing mistake before memory is allocated
MOST_IMAGES = 10_000  # of a prompt
MOST_STEPS = 10_000
MOST_EDITS = 256  # of an image with one prompt; all are in memory at the end
LONGEST_SIDE = 16_384  # pixels
MOST_PIXELS = 2**25


def _keep_letters(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("+", "p"))


_BY_LETTERS = {
    _keep_letters(name): sampler
    for sampler, names in SAMPLERS_ELSEWHERE.items()
    for name in (sampler, *names)
}


def name_sampler(name: str) -> str:
    """Our name of a sampler, from another tool's name for it; an unknown name is returned unchanged.

    Raises `UserError` for a name that includes a spacing of the steps, as "DPM++ 2M Karras": the model has its own.
    """
    letters = _keep_letters(name)
    if letters in _BY_LETTERS:
        return _BY_LETTERS[letters]
    for spacing in map(_keep_letters, SPACINGS_ELSEWHERE):
        sampler = _BY_LETTERS.get(letters.removesuffix(spacing)) if letters.endswith(spacing) else None
        if sampler is not None:
            raise UserError(
                f"The sampler {name} asks for another spacing of the steps, and here they are as the model's scheduler "
                f"spaces them. Write {sampler} to have its steps."
            )
    return name


SAMPLER = Option(
    "Sampler: the method of the steps from noise to image.",
    SAMPLING,
    choices=get_args(Sampler),
    convert=name_sampler,
    default_text="ddim, or by model",
)


@dataclass(frozen=True, kw_only=True)
class CountOption:
    """How many images."""

    count: Annotated[
        int,
        Option(
            "Images of each prompt.",
            DRAWING,
            aliases=("num-images-per-prompt", "num-validation-images", "images-per-prompt"),
            min=1,
            max=MOST_IMAGES,
        ),
    ] = 1


@dataclass(frozen=True, kw_only=True)
class GuidanceOption:
    """How strongly an image follows its prompt."""

    guidance: Annotated[
        float | None,
        Option(
            "Scale of classifier-free guidance; 1: no guidance.",
            SAMPLING,
            aliases=("guidance-scale", "cfg-scale"),
            default_text="by model",
            min=0,
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class GuidanceInterval:
    """The guidance interval, as shares of the steps from noisy to clean; None for the model's default."""

    guidance_start: Annotated[
        float | None,
        Option(
            "Share of the steps before guidance begins.",
            SAMPLING,
            default_text="0, or by model",
            min=0,
            max=1,
        ),
    ] = None
    guidance_stop: Annotated[
        float | None,
        Option(
            "Share of the steps after which guidance ends.",
            SAMPLING,
            default_text="1, or by model",
            min=0,
            max=1,
        ),
    ] = None

    @property
    def guided(self) -> tuple[float, float]:
        """(start, stop): the guidance interval, as shares of the steps; a missing end is that of all steps."""
        start, stop = ALL_STEPS
        return (
            start if self.guidance_start is None else self.guidance_start,
            stop if self.guidance_stop is None else self.guidance_stop,
        )

    def resolve_guided(self, defaults: Mapping[str, Any]) -> tuple[float, float]:
        """The guidance interval for a model with these `defaults`, which count only if neither end is set."""
        if (self.guidance_start, self.guidance_stop) == (None, None):
            return default_guidance_interval(defaults)
        return self.guided


@dataclass(frozen=True, kw_only=True)
class SamplingSettings(GuidanceInterval, GuidanceOption):
    """How images are sampled; None for the model's default.

    Raises `UserError`, naming the argument, for a value that does not fit.
    """

    negative: Annotated[str, negative_option(DRAWING)] = ""
    width: Annotated[
        int | None,
        Option("Width in pixels.", DRAWING, default_text=DEFAULT_SIZE_TEXT, min=1, max=LONGEST_SIDE),
    ] = None
    height: Annotated[
        int | None,
        Option("Height in pixels.", DRAWING, default_text=DEFAULT_SIZE_TEXT, min=1, max=LONGEST_SIDE),
    ] = None
    resolution: Annotated[
        int | None,
        Option(
            "Width and height in one.",
            DRAWING,
            default_text=DEFAULT_SIZE_TEXT,
            min=1,
            max=LONGEST_SIDE,
            several="Write one number for a square, or --width and --height.",
        ),
    ] = None
    steps: Annotated[
        int | None,
        Option(
            "Steps of the sampler.",
            SAMPLING,
            aliases=("num-inference-steps", "sample-steps"),
            default_text="by model",
            min=1,
            max=MOST_STEPS,
        ),
    ] = None
    sampler: Annotated[Sampler | None, SAMPLER] = None
    seed: Annotated[int, Option("Image j of prompt i depends on the seed, i and j only.", SAMPLING)] = 0
    batch: Annotated[
        int,
        Option(
            "Images drawn together; what is drawn does not depend on it.",
            SAMPLING,
            aliases=("sample-batch-size", "batch-size"),
            min=1,
        ),
    ] = 8

    def __post_init__(self) -> None:
        check_values(self)
        check_guidance_interval(self.guided)
        if self.resolution is not None and (self.width, self.height) != MODELS_OWN:
            raise UserError(
                "--resolution is width and height in one. Give it alone, or --width and --height instead."
            )

    @property
    def size(self) -> Size:
        """(width, height) in pixels."""
        return (self.width, self.height) if self.resolution is None else (self.resolution, self.resolution)

    def at_resolution(self, resolution: int) -> Self:
        """These settings with this width and height if none is set; 0 is the model's own."""
        if not resolution or self.resolution is not None:
            return self
        if self.size == MODELS_OWN:
            return replace(self, resolution=resolution)
        return replace(self, width=self.width or resolution, height=self.height or resolution)

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """These settings with a model's defaults in place of None: steps, guidance, guidance interval, sampler.

        Raises `UserError` for a guidance interval without guidance, and for one that holds no step.
        """
        steps = int(defaults["steps"]) if self.steps is None else self.steps
        guidance = float(defaults["guidance"]) if self.guidance is None else self.guidance
        if guidance == 1 and self.guided != ALL_STEPS:
            raise UserError(
                "At guidance 1 there is none to begin or to end. Raise --guidance, or leave out --guidance-start and "
                "--guidance-stop."
            )
        if guidance != 1:
            refuse_unguided(self.guided, steps)
        completed = replace(
            self, steps=steps, guidance=guidance, sampler=self.sampler or default_sampler(defaults)
        )
        start, stop = guided = self.resolve_guided(defaults)
        if guidance == 1 or guided == self.guided:
            return completed
        return replace(completed, guidance_start=start, guidance_stop=stop)

    def for_sampler(self) -> dict[str, Any]:
        """The keyword arguments of `backbone.models.sample.sample`; steps and guidance are set by now."""
        assert self.steps is not None and self.guidance is not None
        return {
            "steps": self.steps,
            "guidance": self.guidance,
            "seed": self.seed,
            "sampler": self.sampler,
            "batch": self.batch,
            "guided": self.guided,
            "size": self.size,
        }

    def facts(self) -> dict[str, Any]:
        """The settings that images depend on, without guidance interval and size if they are the defaults."""
        width, height = self.size
        facts = {name: getattr(self, name) for name in ("steps", "guidance", "seed", "sampler", "negative")}
        if self.guided != ALL_STEPS:
            facts |= dict(zip(("guidance_start", "guidance_stop"), self.guided, strict=True))
        sides = {"width": width, "height": height}
        return facts | {side: pixels for side, pixels in sides.items() if pixels is not None}

    def describe_guidance(self) -> str:
        """The guidance scale in words, with its interval if it is not all steps."""
        return f"{self.guidance:g}{describe_guidance_interval(self.guided)}"


class EarlyScale(NamedTuple):
    """How strongly subjects act in the first steps, which decide the layout and what a subject wears.

    scale  multiplies the adapters' strength; 1: the same as in all other steps
    share  of the steps, from the noisy end, with this scale
    """

    scale: float = 1.0
    share: float = 0.25


@dataclass(frozen=True, kw_only=True)
class DrawingOptions(SamplingSettings, ConceptOptions, CountOption):
    """How many images are sampled of each prompt, with which model and concepts, and how."""

    early_scale: Annotated[
        float | None,
        Option(
            "Strength of the concepts in the first steps, times --scale; less: more of what else the prompt says.",
            CONCEPTS,
            default_text="1, or by model",
            min=0,
            needs=WITH_CONCEPTS,
        ),
    ] = None
    early_steps: Annotated[
        float | None,
        Option(
            "Share of the steps that --early-scale is for.",
            CONCEPTS,
            default_text="0.25, or by model",
            min=0,
            max=1,
            needs=WITH_CONCEPTS,
        ),
    ] = None

    @property
    def early(self) -> EarlyScale:
        """The strength in the first steps."""
        return self.resolve_early({})

    def resolve_early(self, defaults: Mapping[str, Any]) -> EarlyScale:
        """The strength in the first steps for a model with these `defaults`."""
        default = default_early_scale(defaults)
        return EarlyScale(
            default.scale if self.early_scale is None else self.early_scale,
            default.share if self.early_steps is None else self.early_steps,
        )

    def with_defaults(self, defaults: Mapping[str, Any]) -> Self:
        """The sampling settings with a model's defaults, and its strength of concepts in the first steps.

        Raises `UserError` for --early-steps without another strength there. Prints a line if it covers no step.
        """
        completed = super().with_defaults(defaults)
        scale, share = self.resolve_early(defaults)
        if self.early_steps is not None and scale == 1:
            raise UserError(
                "Concepts act in the first steps as in all others (--early-scale 1), so --early-steps has no effect. "
                "Lower --early-scale, or leave out --early-steps."
            )
        assert completed.steps is not None
        if self.early_scale not in (None, 1) and not round(share * completed.steps):
            notify(
                f"{share:g} of {format_count(completed.steps, 'step')} is less than one, so --early-scale has no "
                "effect. Take more steps, or a larger share by --early-steps."
            )
        return replace(completed, early_scale=scale, early_steps=share)

    def for_sampler(self) -> dict[str, Any]:
        """The keyword arguments of the sampling settings, and the strength of concepts in the first steps."""
        return {**super().for_sampler(), "early": self.early}

    def facts(self) -> dict[str, Any]:
        """The settings that images depend on, with the strength of concepts in the first steps if it differs."""
        if not self.concepts or self.early.scale == 1:
            return super().facts()
        return super().facts() | {"early_scale": self.early.scale, "early_steps": self.early.share}


OWN_FEW_STEP = "own"  # the few-step model that goes with the model


@dataclass(frozen=True, kw_only=True)
class FewStepOptions:
    """Which few-step model draws in place of the model itself."""

    fast: Annotated[bool, Option("Draw with the few-step model that goes with the model.", SAMPLING)] = False
    on: Annotated[
        str,
        Option(
            "Draw with this few-step model, made from the one that the concepts were trained on.",
            MODEL,
            metavar="MODEL",
            default_text="the model itself",
        ),
    ] = ""

    @property
    def few_step(self) -> str:
        """The few-step model's name, OWN_FEW_STEP, or "" for none. Raises `UserError` for both options."""
        if self.fast and self.on:
            raise UserError(
                "--fast takes the few-step model that goes with the model, --on names one. Give one of them."
            )
        return OWN_FEW_STEP if self.fast else self.on


def default_sampler(defaults: Mapping[str, Any]) -> Sampler:
    """The default sampler of a model with these `defaults`."""
    sampler: Sampler = defaults.get("sampler", "ddim")
    return sampler


def default_guidance_interval(defaults: Mapping[str, Any]) -> tuple[float, float]:
    """(start, stop): the default guidance interval of a model with these `defaults`, as shares of the steps."""
    start, stop = ALL_STEPS
    return float(defaults.get("guidance_start", start)), float(defaults.get("guidance_stop", stop))


def default_early_scale(defaults: Mapping[str, Any]) -> EarlyScale:
    """The default strength of subjects in the first steps, of a model with these `defaults`."""
    scale, share = EarlyScale()
    return EarlyScale(float(defaults.get("early_scale", scale)), float(defaults.get("early_steps", share)))


def default_sampler_of_clips(defaults: Mapping[str, Any]) -> Sampler:
    """The default sampler for clips: ddim in place of ancestral, whose fresh noise flickers over the frames."""
    sampler = default_sampler(defaults)
    return "ddim" if sampler == "ancestral" else sampler


def describe_guidance_interval(interval: tuple[float, float]) -> str:
    """The guidance interval in words, to follow the guidance scale; empty for all steps."""
    start, stop = interval
    return "" if interval == ALL_STEPS else f" from {start:.0%} to {stop:.0%} of the steps"


def check_guidance_interval(interval: tuple[float, float]) -> None:
    """Raise `UserError` unless 0 <= start < stop <= 1."""
    start, stop = interval
    if not 0 <= start < stop <= 1:
        raise UserError(
            f"Guidance from {start:g} to {stop:g} of the steps is no share of them. Let it begin at 0 or later, and "
            "end behind that, at 1 or earlier."
        )


def refuse_unguided(interval: tuple[float, float], steps: int) -> None:
    """Raise `UserError` if none of this many steps lies in the guidance interval."""
    start, stop = interval
    if round(start * steps) >= round(stop * steps):
        raise UserError(
            f"None of {steps} steps lies between {start:g} and {stop:g} of them, so nothing would be guided. Take more "
            "steps, or set --guidance-start and --guidance-stop further apart."
        )
