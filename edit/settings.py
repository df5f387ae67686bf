"""Options of the commands of `edit`, each declared once; options that several commands share are in base classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

from backbone.cli.conditions import CONTROL, ClipControlOptions, ControlOptions
from backbone.cli.flags import (
    CONCEPTS,
    DRAWING,
    MODEL,
    OUTPUT,
    SAMPLING,
    SCORING,
    ConceptOptions,
    PageOptions,
    negative_option,
    out_option,
)
from backbone.cli.options import Option
from backbone.cli.sampling import MOST_EDITS, MOST_STEPS, SAMPLER, GuidanceInterval, GuidanceOption, Sampler
from backbone.io.prompts import parse_prompt

# Sections of the help
WORDS = "Words"
WHERE = "Where it changes"
HOW = "How it changes"
INVERSION = "Inversion"
PANELS = (WORDS, WHERE, HOW, CONTROL, INVERSION, DRAWING, SAMPLING, CONCEPTS, SCORING)

Method = Literal["direct", "ddim", "null-text", "negative-prompt", "edit-friendly", "renoise", "reversible"]
ClipMethod = Literal[
    "direct", "ddim", "null-text", "negative-prompt", "edit-friendly", "renoise", "reversible", "flow-edit"
]
Way = Literal["prompt-to-prompt", "masactrl", "plug-and-play"]
RANDOM: Method = "edit-friendly"  # the inversion that depends on a seed
OF_NULL_TEXT = {"method": ("null-text",)}
FROM_FILE: dict[str, tuple[Any, ...]] = {"inversion": ()}
BY_METHOD: dict[str, tuple[Any, ...]] = {
    "source": (),
    "method": tuple(name for name in get_args(ClipMethod) if name != "flow-edit"),
}
INVERTED = (BY_METHOD, FROM_FILE)
OF_INVERSION: dict[str, tuple[Any, ...]] = {"source": ()}
WITHOUT_FILE = {"inversion": (None,)}  # for settings that an inversion's file fixes
SOURCE_HELP = "What the image shows, in words or in a file."
STRENGTH_HELP = "Share of the steps that are sampled again; below 1 the edit starts from a less noisy state."


@dataclass(frozen=True, kw_only=True)
class SamplerOptions(ConceptOptions):
    """Options of every command that samples: a model with concepts, the number of steps, the seed."""

    steps: Annotated[
        int,
        Option("Steps of the sampler.", SAMPLING, aliases=("num-inference-steps",), min=1, max=MOST_STEPS),
    ] = 50
    seed: Annotated[int, Option("Seed of everything random.", SAMPLING)] = 0


@dataclass(frozen=True, kw_only=True)
class StepOptions(ControlOptions, SamplerOptions):
    """Options of a command that samples under control maps."""


@dataclass(frozen=True, kw_only=True)
class GuidanceOptions(GuidanceOption):
    """Options of a command with classifier-free guidance against a prompt."""

    negative: Annotated[str, negative_option(WORDS)] = ""


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """Options of a command that writes a run folder."""

    out: Annotated[Path | None, out_option("The run folder to write.", "runs/edit-NAME-OF-IMAGE")] = None


@dataclass(frozen=True, kw_only=True)
class ReportOptions(RunFolder):
    """Options of a command whose result is measured against the image."""

    metrics: Annotated[bool, Option("Measure what stayed and what changed.", SCORING)] = True
    scorer: Annotated[
        str | None,
        Option(
            "Folder of a CLIP model for the metrics.",
            SCORING,
            metavar="FOLDER",
            default_text="the model's own",
            needs={"metrics": (True,)},
        ),
    ] = None
    film: Annotated[
        bool, Option("Also write trajectory.gif, an animation of the steps.", OUTPUT, flag="trajectory")
    ] = False


@dataclass(frozen=True, kw_only=True)
class MaskOption:
    """Options of a command that can be limited to a part of the image."""

    mask: Annotated[
        str | None,
        Option(
            "An image of the same size; white: may change.",
            WHERE,
            aliases=("mask-image",),
            metavar="IMAGE",
            default_text="everywhere",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class ImageArgument:
    """Options of a command that needs the image itself."""

    image: Annotated[str, Option("The image.", WORDS, argument=True, metavar="IMAGE")]


@dataclass(frozen=True, kw_only=True)
class SourceConditionOption(ControlOptions):
    """Options of a command in which the source has a prompt of its own."""

    source_condition: Annotated[
        tuple[str, ...],
        Option(
            "The source's own map beside a --condition of that kind, so that what differs moves; repeatable.",
            CONTROL,
            metavar="KIND=MAP",
            needs={"condition": ()},
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class StartOptions(SourceConditionOption, StepOptions, ReportOptions, MaskOption):
    """Options of a command that begins from an image with its prompt, or from an inversion's file."""

    NEEDS: ClassVar[Mapping[str, Any]] = {
        "steps": WITHOUT_FILE,
        "source_condition": {"condition": (), **WITHOUT_FILE},
    }

    image: Annotated[
        str | None,
        Option(
            "The image to edit; leave it out with --inversion.",
            WORDS,
            argument=True,
            metavar="IMAGE",
            default_text="none",
        ),
    ] = None
    source: Annotated[
        str | None,
        Option(
            SOURCE_HELP,
            WORDS,
            aliases=("source-prompt",),
            metavar="PROMPT",
            default_text="the inversion's",
        ),
    ] = None
    inversion: Annotated[
        str | None,
        Option("A file of edit invert.", INVERSION, metavar="FILE", default_text="made anew"),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PathOptions(StartOptions):
    """Options of a command that follows the inversion's path, where nothing is random."""

    NEEDS: ClassVar[Mapping[str, Any]] = {"seed": WITHOUT_FILE}


@dataclass(frozen=True, kw_only=True)
class TargetOptions:
    """Options of a command with several targets, done in one batch."""

    targets: Annotated[
        tuple[str, ...],
        Option(
            "Target prompt: what the edited image should show, in words or in a file; repeatable, one batch.",
            WORDS,
            flag="target",
            aliases=("target-prompt",),
            metavar="PROMPT",
        ),
    ]


@dataclass(frozen=True, kw_only=True)
class InversionOptions:
    """How an image is inverted."""

    NEEDS: ClassVar[Mapping[str, Any]] = {"iterations": OF_NULL_TEXT}

    method: Annotated[Method, Option("How the image is inverted.", INVERSION, choices=get_args(Method))] = (
        "direct"
    )
    iterations: Annotated[int, Option("Null-text: optimiser iterations at every step.", INVERSION, min=0)] = (
        10
    )


@dataclass(frozen=True, kw_only=True)
class InvertOptions(StepOptions, InversionOptions, ImageArgument):
    """Options of `edit invert`."""

    prompt: Annotated[
        str,
        Option(
            SOURCE_HELP,
            WORDS,
            flag="source",
            aliases=("source-prompt", "prompt", "prompts"),
            metavar="PROMPT",
        ),
    ]
    guidance: Annotated[
        float | None,
        Option(
            "Null-text: guidance scale that the image will be edited with.",
            INVERSION,
            aliases=("guidance-scale", "cfg-scale"),
            default_text="by model",
            min=0,
            needs=OF_NULL_TEXT,
        ),
    ] = None
    frames: Annotated[
        bool,
        Option(
            "The image is a clip, all frames of which are inverted at once: for edit clip.",
            INVERSION,
            flag="clip",
        ),
    ] = False
    motion: Annotated[
        str,
        Option(
            "The motion adapter that links a clip's frames.",
            INVERSION,
            aliases=("motion-adapter",),
            metavar="ADAPTER",
            default_text="none: frames look at the first and the one before",
            needs={"frames": (True,)},
        ),
    ] = ""
    check: Annotated[
        bool, Option("Reconstruct the image from the inversion and print the error.", INVERSION)
    ] = False
    out: Annotated[
        Path | None, out_option("The file to write.", "NAME-OF-IMAGE.safetensors", metavar="FILE")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReplaceOptions(PathOptions, InversionOptions, GuidanceOptions, TargetOptions):
    """Options of `edit invert-and-replace`; None stands for the default of the kind of control."""

    NEEDS: ClassVar[Mapping[str, Any]] = {
        "method": WITHOUT_FILE,
        "iterations": {**OF_NULL_TEXT, **WITHOUT_FILE},
    }

    source: str | None = None
    swaps: Annotated[
        tuple[str, ...],
        Option(
            "cat=tiger: align a source word with a target word.",
            WORDS,
            flag="swap",
            metavar="OLD=NEW",
            default_text="by aligning the prompts",
        ),
    ] = ()
    weights: Annotated[
        tuple[str, ...],
        Option(
            "silver=2: attention weight of a target word (reweighting).",
            WORDS,
            flag="reweight",
            metavar="WORD=X",
            default_text="1",
        ),
    ] = ()
    dry_run: Annotated[bool, Option("Print the alignment of the words, and stop.", WORDS)] = False
    blend: Annotated[
        tuple[str, ...],
        Option(
            "Change only the region of this word; auto: of the words that differ; none: change everything.",
            WHERE,
            metavar="WORD",
            default_text="by control",
        ),
    ] = ()
    keep: Annotated[
        tuple[str, ...], Option("Keep the region of this word unchanged.", WHERE, metavar="WORD")
    ] = ()
    mask: Annotated[
        str | None,
        Option(
            "An image of the same size; white: may change, where --blend lets it (none: in all of the white).",
            WHERE,
            aliases=("mask-image",),
            metavar="IMAGE",
            default_text="everywhere",
        ),
    ] = None
    threshold: Annotated[
        float | None,
        Option(
            "Threshold of the blend mask, as a share of its maximum.",
            WHERE,
            default_text="0.25",
            min=0,
            max=1,
        ),
    ] = None
    control: Annotated[
        Way,
        Option(
            "Attention control; masactrl: for a new pose or shape; plug-and-play: for a new style.",
            HOW,
            choices=get_args(Way),
        ),
    ] = "prompt-to-prompt"
    cross: Annotated[
        float | None,
        Option(
            "Share of the steps with the source's cross-attention.",
            HOW,
            aliases=("cross-replace-steps",),
            default_text="0.8",
            min=0,
            max=1,
        ),
    ] = None
    self_attention: Annotated[
        float | None,
        Option(
            "Share of the steps with the source's self-attention.",
            HOW,
            flag="self",
            aliases=("self-replace-steps",),
            default_text="0.4",
            min=0,
            max=1,
        ),
    ] = None
    windows: Annotated[
        tuple[str, ...],
        Option(
            "cat=0.2:0.8: window of the steps for the cross-attention of one word.",
            HOW,
            flag="window",
            metavar="WORD=A:B",
        ),
    ] = ()
    strength: Annotated[float, Option(STRENGTH_HELP, HOW, min=0, max=1)] = 1.0
    heatmaps: Annotated[
        tuple[str, ...],
        Option(
            "Also draw the cross-attention map of this word; repeatable.",
            OUTPUT,
            flag="heatmap",
            metavar="WORD",
        ),
    ] = ()


@dataclass(frozen=True, kw_only=True)
class CountOption:
    """Options of a command that draws several images of one prompt."""

    count: Annotated[
        int, Option("Images.", DRAWING, aliases=("num-images-per-prompt",), min=1, max=MOST_EDITS)
    ] = 1


@dataclass(frozen=True, kw_only=True)
class SDEditOptions(StepOptions, GuidanceOptions, ReportOptions, MaskOption, CountOption, ImageArgument):
    """Options of `edit sdedit`."""

    prompt: Annotated[
        str,
        Option(
            "Target prompt: what the edited image should show, in words or in a file.",
            WORDS,
            aliases=("prompts",),
            metavar="PROMPT",
        ),
    ]
    strength: Annotated[
        float,
        Option(
            "Noise: 0 leaves the image, 1 forgets it (as in diffusers, not as in mflux).",
            HOW,
            min=0,
            max=1,
        ),
    ] = 0.6


@dataclass(frozen=True, kw_only=True)
class FlowEditOptions(
    SourceConditionOption,
    StepOptions,
    GuidanceOption,
    ReportOptions,
    MaskOption,
    TargetOptions,
    ImageArgument,
):
    """Options of `edit flow-edit`."""

    source: Annotated[str, Option(SOURCE_HELP, WORDS, aliases=("source-prompt",), metavar="PROMPT")]
    strength: Annotated[
        float,
        Option(
            "Share of the noise levels that the edit goes through (n_max/T); 0 leaves the image.",
            HOW,
            min=0,
            max=1,
        ),
    ] = 0.66
    draws: Annotated[int, Option("Noise samples averaged at every step.", HOW, min=1)] = 1
    source_guidance: Annotated[float, Option("Guidance scale of the source prompt.", SAMPLING)] = 1.0


@dataclass(frozen=True, kw_only=True)
class InstructOptions(
    StepOptions, GuidanceInterval, GuidanceOptions, ReportOptions, MaskOption, ImageArgument
):
    """Options of `edit instruct`."""

    instruction: Annotated[
        str,
        Option(
            "What to do: “make it snow”.",
            WORDS,
            aliases=("prompt", "edit-instruction"),
            metavar="INSTRUCTION",
        ),
    ]
    then: Annotated[
        tuple[str, ...],
        Option("What to do after that, in words or in a file; repeatable.", WORDS, metavar="INSTRUCTION"),
    ] = ()
    references: Annotated[
        tuple[str, ...],
        Option(
            "A further image for the instruction, where the model reads several; repeatable.",
            WORDS,
            flag="reference",
            aliases=("ref-image",),
            metavar="IMAGE",
        ),
    ] = ()
    background: Annotated[
        str,
        Option(
            "What stands where nothing was to change: the image's own pixels, its autoencoder's copy (latents), or "
            "what the model draws (none). auto: pixels, and all that is drawn where nearly everything changes (of "
            "several instructions in any case).",
            WHERE,
            aliases=("keep",),
            choices=("auto", "pixels", "latents", "none"),
        ),
    ] = "auto"
    mask: Annotated[
        str | None,
        Option(
            "An image of the same size; white: may change.",
            WHERE,
            aliases=("mask-image",),
            metavar="IMAGE",
            default_text="where the edit differs",
            needs={"background": ("auto", "pixels", "latents")},
        ),
    ] = None
    image_guidance: Annotated[
        float,
        Option("Image guidance scale.", SAMPLING, aliases=("image-guidance-scale",), min=0),
    ] = 1.5
    sampler: Annotated[Sampler | None, SAMPLER] = None
    vram: Annotated[
        float | None,
        Option("Plan for a device with this many GiB of memory, and edit so that it fits.", MODEL, min=0.1),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RemoveOptions(StartOptions, GuidanceOptions, CountOption):
    """Options of `edit remove`."""

    word: Annotated[
        str,
        Option(
            "The noun of what to remove; its article, adjectives and what it wears go with it.",
            WORDS,
            flag="remove",
            metavar="WORD",
            default_text="the mask's",
        ),
    ] = ""
    prompt: Annotated[
        str | None,
        Option(
            "What to see instead, in words or in a file.",
            WORDS,
            aliases=("prompts",),
            metavar="PROMPT",
            default_text="the source without the word",
        ),
    ] = None
    mask: Annotated[
        str | None,
        Option(
            "An image of the same size; white: remove.",
            WHERE,
            aliases=("mask-image",),
            metavar="IMAGE",
            default_text="where the word stands",
        ),
    ] = None
    threshold: Annotated[
        float,
        Option(
            "Least likelihood of the thing for a pixel to be masked; lower masks more.",
            WHERE,
            needs={"mask": (None,)},
            min=0,
            max=1,
        ),
    ] = 0.5
    strength: Annotated[
        float,
        Option(
            "Noise in the masked region; 0: keep the smooth fill from the surroundings, 1: start from noise alone.",
            HOW,
            min=0,
            max=1,
        ),
    ] = 0.5
    guidance: Annotated[
        float,
        Option(
            "Classifier-free guidance; more than 1 draws what the prompt says into the place.",
            SAMPLING,
            aliases=("guidance-scale", "cfg-scale"),
            min=0,
        ),
    ] = 1.0


@dataclass(frozen=True, kw_only=True)
class ComposeOptions(PathOptions):
    """Options of `edit compose`."""

    toward: Annotated[
        tuple[str, ...],
        Option("“a watercolor=3”: a prompt and its weight; repeatable.", WORDS, metavar="PROMPT=X"),
    ] = ()
    away: Annotated[
        tuple[str, ...],
        Option(
            "“a photo=1”: a prompt to move away from, and its weight; repeatable.", WORDS, metavar="PROMPT=X"
        ),
    ] = ()
    strength: Annotated[float, Option(STRENGTH_HELP, HOW, min=0, max=1)] = 0.7


@dataclass(frozen=True, kw_only=True)
class InterpolateOptions(StepOptions, RunFolder):
    """Options of `edit interpolate`."""

    first: Annotated[str, Option("The image to begin with.", WORDS, argument=True, metavar="FIRST")]
    second: Annotated[str, Option("The image to end with.", WORDS, argument=True, metavar="SECOND")]
    prompts: Annotated[
        tuple[str, ...],
        Option(
            "What each shows, in words (give it twice) or in a file with two lines.",
            WORDS,
            aliases=("prompt",),
            metavar="PROMPT",
        ),
    ]
    count: Annotated[int, Option("Images, both ends included.", DRAWING, min=3, max=MOST_EDITS)] = 7


@dataclass(frozen=True, kw_only=True)
class KeepBackgroundOptions(RunFolder):
    """Options of `edit keep-background`."""

    source: Annotated[str, Option("The image before the edit.", WORDS, argument=True, metavar="SOURCE")]
    edited: Annotated[
        str,
        Option("The edited image, made by any program.", WORDS, argument=True, metavar="EDITED"),
    ]
    mask: Annotated[
        str | None,
        Option(
            "An image of the source's size; white: the edit's.",
            WHERE,
            aliases=("mask-image",),
            metavar="IMAGE",
            default_text="where the two differ",
        ),
    ] = None
    align: Annotated[
        bool, Option("Undo a shift, a change of scale and a small one of tone of the whole.", HOW)
    ] = True


@dataclass(frozen=True, kw_only=True)
class PaintOptions(SamplerOptions, InversionOptions, GuidanceOptions, PageOptions, ImageArgument):
    """Options of `edit paint`."""

    source: Annotated[
        str,
        Option(
            "What the image shows; the page begins with it.", WORDS, metavar="PROMPT", convert=parse_prompt
        ),
    ] = ""
    target: Annotated[
        str,
        Option(
            "What it should show; the page begins with it.", WORDS, metavar="PROMPT", convert=parse_prompt
        ),
    ] = ""
    out: Annotated[
        Path | None, out_option("The folder that keeps every edit, new or empty.", "edits, edits-2 …")
    ] = None


@dataclass(frozen=True, kw_only=True)
class ReplayOptions(RunFolder):
    """Options of `edit replay`."""

    record: Annotated[
        Path,
        Option("The run.json of an edit, or its folder.", WORDS, argument=True, metavar="RUN"),
    ]


@dataclass(frozen=True, kw_only=True)
class ClipOptions(ClipControlOptions, StepOptions, GuidanceOptions, TargetOptions, RunFolder):
    """Options of `edit clip`; None stands for the default of the model, or of the method that is used."""

    NEEDS: ClassVar[Mapping[str, Any]] = {"steps": WITHOUT_FILE}

    clip: Annotated[
        str | None,
        Option(
            "The clip: an animated WebP or GIF, a folder of frames, or a film where PyAV is installed; leave it out "
            "with --inversion.",
            WORDS,
            argument=True,
            metavar="CLIP",
            default_text="the inversion's",
        ),
    ] = None
    source: Annotated[
        str | None,
        Option(
            "What the clip shows; without it the clip is noised and denoised (SDEdit).",
            WORDS,
            aliases=("source-prompt",),
            metavar="PROMPT",
            default_text="none",
        ),
    ] = None
    targets: tuple[str, ...] = ()
    first: Annotated[
        str,
        Option(
            "An edited first frame, made by any program; the other frames follow it.",
            WORDS,
            aliases=("first-frame",),
            metavar="PICTURE",
            needs=INVERTED,
        ),
    ] = ""
    sparsectrl: Annotated[
        str,
        Option(
            "A SparseCtrl network that carries the first frame too: a folder, a .safetensors, or a hub id.",
            HOW,
            metavar="NETWORK",
            needs={"first": (), "motion": ()},
        ),
    ] = ""
    threshold: Annotated[
        float,
        Option(
            "Share of the greatest difference that lets a place change; 0: everywhere.",
            WHERE,
            min=0,
            max=1,
            needs=INVERTED,
        ),
    ] = 0.25
    keep_frames: Annotated[
        tuple[str, ...],
        Option(
            "Frames that stay the source's: first, last, or a number from 0; repeatable.",
            WHERE,
            metavar="FRAME",
            needs=INVERTED,
        ),
    ] = ()
    cross: Annotated[
        float | None,
        Option(
            "Share of the steps with the source's cross-attention.",
            HOW,
            default_text="0.8; 0 where the motion's words change",
            min=0,
            max=1,
            needs=INVERTED,
        ),
    ] = None
    self_attention: Annotated[
        float | None,
        Option(
            "Share of the steps with the source's self-attention.",
            HOW,
            flag="self",
            default_text="0.4; with --first 0.8; 0 where the motion's words change",
            min=0,
            max=1,
            needs=INVERTED,
        ),
    ] = None
    temporal: Annotated[
        float | None,
        Option(
            "Share of the steps with the source's temporal attention.",
            HOW,
            default_text="as --self",
            min=0,
            max=1,
            needs=tuple({**needs, "motion": ()} for needs in INVERTED),
        ),
    ] = None
    strength: Annotated[
        float | None,
        Option(
            STRENGTH_HELP,
            HOW,
            default_text="1, without --source or with --first 0.6, with flow-edit 0.66",
            min=0,
            max=1,
        ),
    ] = None
    motion: Annotated[
        str,
        Option(
            "A motion adapter: a folder, an original AnimateDiff .safetensors, or a hub id.",
            HOW,
            aliases=("motion-adapter",),
            metavar="ADAPTER",
            default_text="none: frames look at the first and the one before",
        ),
    ] = ""
    method: Annotated[
        ClipMethod,
        Option(
            "How all frames are inverted.",
            INVERSION,
            choices=get_args(ClipMethod),
            needs={**OF_INVERSION, **WITHOUT_FILE},
        ),
    ] = "direct"
    iterations: Annotated[
        int,
        Option(
            "Null-text: optimiser iterations at every step.",
            INVERSION,
            min=0,
            needs={**OF_NULL_TEXT, **WITHOUT_FILE},
        ),
    ] = 10
    inversion: Annotated[
        str | None,
        Option(
            "The inversion of a clip: inversion.safetensors of an edit, or a file of edit invert.",
            INVERSION,
            metavar="FILE",
            default_text="made anew",
        ),
    ] = None
    draws: Annotated[
        int, Option("Noise samples averaged at every step.", HOW, min=1, needs={"method": ("flow-edit",)})
    ] = 1
    shared_noise: Annotated[
        float | None,
        Option(
            "Share of the noise that all frames have in common.",
            HOW,
            default_text="1, with --motion 0",
            min=0,
            max=1,
            needs={"method": ("flow-edit",)},
        ),
    ] = None
    source_guidance: Annotated[
        float,
        Option("Guidance scale of the source prompt.", SAMPLING, min=0, needs={"method": ("flow-edit",)}),
    ] = 1.0
    decode_chunk_size: Annotated[
        int, Option("Frames decoded together; 0: as many as fit.", SAMPLING, min=0)
    ] = 0


def draws_noise(options: SamplerOptions) -> bool:
    """Whether anything is random with these options, so that a seed has an effect."""
    if isinstance(options, ClipOptions):
        noised = options.source is None or options.method in (RANDOM, "flow-edit")
        return noised and options.inversion is None
    if isinstance(options, RemoveOptions):
        return options.strength > 0  # else the surroundings alone fill the place
    if isinstance(options, (InvertOptions, ReplaceOptions, PaintOptions)):
        return options.method == RANDOM
    return not isinstance(options, (ComposeOptions, InterpolateOptions))
