"""The command `edit`: changing what an image shows by changing its words."""

from __future__ import annotations

import functools
import inspect
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import typer

from backbone.io import flags
from backbone.io.commands import command_group, typed
from backbone.io.console import UserError, notify, run_app
from backbone.io.flags import option
from backbone.io.prompts import one_prompt, prompts_of
from edit import checks

if TYPE_CHECKING:
    from edit.pictures import SourceImage

app = command_group("Change what the words say of an image, and nothing else.")

# Sections of the help
WORDS = "Words"
WHERE = "Where it changes"
HOW = "How it changes"
INVERSION = "Inversion"

Method = Literal["direct", "ddim", "null-text", "negative-prompt", "edit-friendly", "renoise", "reversible"]
Way = Literal["prompt-to-prompt", "masactrl", "plug-and-play"]
Image = Annotated[str, typer.Argument(metavar="IMAGE", help="The image.")]
MaybeImage = Annotated[
    str | None, typer.Argument(metavar="IMAGE", help="The image; not with --inversion.", show_default="none")
]
Source = Annotated[
    str,
    option("--source", "--source-prompt", help="What the image shows, in words or in a file.", panel=WORDS),
]
MaybeSource = Annotated[
    str | None,
    option(
        "--source",
        "--source-prompt",
        help="What the image shows, in words or in a file.",
        panel=WORDS,
        show_default="the inversion's",
    ),
]
Targets = Annotated[
    list[str],
    option(
        "--target",
        "--target-prompt",
        help="What it should show, in words or in a file; repeatable, done in one batch.",
        panel=WORDS,
    ),
]
Prompt = Annotated[
    str, option("--prompt", "--prompts", help="What it should show, in words or in a file.", panel=WORDS)
]
InversionFile = Annotated[
    str | None,
    option(
        "--inversion",
        metavar="FILE",
        help="A file of edit invert.",
        panel=INVERSION,
        show_default="made anew",
    ),
]
InversionMethod = Annotated[Method, option("--method", help="How the image is inverted.", panel=INVERSION)]
Iterations = Annotated[
    int, option("--iterations", min=0, help="Of null-text, at every step.", panel=INVERSION)
]
Steps = Annotated[
    int, option("--steps", "--num-inference-steps", min=1, help="Steps of the sampler.", panel=flags.SAMPLING)
]
Mask = Annotated[
    str | None,
    option(
        "--mask",
        "--mask-image",
        metavar="IMAGE",
        help="An image of the same size; white: may change.",
        panel=WHERE,
        show_default="everywhere",
    ),
]
Count = Annotated[
    int, option("--count", "--num-images-per-prompt", min=1, help="Images.", panel=flags.DRAWING)
]
Film = Annotated[
    bool, option("--trajectory", help="Also a film of the way, trajectory.gif.", panel=flags.OUTPUT)
]
Metrics = Annotated[
    bool,
    option("--metrics/--no-metrics", help="Measure what stayed and what changed.", panel=flags.SCORING),
]
ScorerFolder = Annotated[
    str | None,
    option(
        "--scorer",
        metavar="FOLDER",
        help="A CLIP folder that measures.",
        panel=flags.SCORING,
        show_default="the model's own",
    ),
]
Out = Annotated[
    Path | None,
    option(
        "--out",
        "--output-dir",
        help="The run folder to write.",
        panel=flags.OUTPUT,
        show_default="runs/edit-NAME-OF-IMAGE",
    ),
]

# Options that many commands have: name → type and default
OPENING = {
    "concepts": (flags.Concepts, None),
    "scale": (flags.Scale, 1.0),
    "checkpoint": (flags.WhichCheckpoint, None),
    "model": (flags.ConceptsModel, None),
    "precision": (flags.Precision, None),
    "device": (flags.Device, None),
}
SAMPLED = {"steps": (Steps, 50), "seed": (flags.Seed, 0)}
GUIDED = {"guidance": (flags.Guidance, None), "negative": (flags.Negative, "")}
JUDGED = {
    "metrics": (Metrics, True),
    "scorer": (ScorerFolder, None),
    "film": (Film, False),
    "out": (Out, None),
}

Function = TypeVar("Function", bound=Callable[..., None])


def command(name: str, *blocks: Mapping[str, tuple[Any, Any]]) -> Callable[[Function], Function]:
    """Makes a function a command that has the options of these blocks beside its own; it gets them as `**shared`.

    Of `OPENING` it gets folders in which there is a concept, the one of the chosen checkpoint.
    """

    def register(function: Function) -> Function:
        own = inspect.signature(function, eval_str=True).parameters.values()
        more = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for block in blocks
            for option, (kind, default) in block.items()
        ]
        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        every = [context, *(one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD), *more]

        @functools.wraps(function)
        def called(*, ctx: typer.Context, **asked: Any) -> None:
            refuse_useless(ctx, asked)
            asked["concepts"] = chosen(asked["concepts"], asked.pop("checkpoint"))
            function(**asked)

        cast(Any, called).__signature__ = inspect.Signature(
            [one.replace(kind=inspect.Parameter.KEYWORD_ONLY) for one in every]
        )
        called.__annotations__ = {one.name: one.annotation for one in every}
        app.command(name)(called)
        return function

    return register


def main() -> None:
    """The console script."""
    run_app(app)


@command("invert", SAMPLED, OPENING)
def invert(
    image: Image,
    prompt: Annotated[
        str,
        option(
            "--source",
            "--source-prompt",
            "--prompt",
            "--prompts",
            help="What the image shows, in words or in a file.",
            panel=WORDS,
        ),
    ],
    method: InversionMethod = "direct",
    iterations: Iterations = 10,
    guidance: Annotated[
        float | None,
        option(
            "--guidance",
            "--guidance-scale",
            "--cfg-scale",
            min=0,
            help="Of null-text: what the image will be edited with.",
            panel=INVERSION,
            show_default="by model",
        ),
    ] = None,
    check: Annotated[
        bool, option("--check", help="Walk it down again and say how exact it is.", panel=INVERSION)
    ] = False,
    out: Annotated[
        Path | None,
        option(
            "--out",
            "--output-dir",
            help="The file to write.",
            panel=flags.OUTPUT,
            show_default="NAME-OF-IMAGE.safetensors",
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Write an image's inversion into a file, from which any number of edits can begin."""
    opened = readable(image)
    prompt = checks.prompt(one_prompt(prompt, "--source"), "source prompt")
    tokens_owned(shared["concepts"], [prompt])
    file = out or Path(f"{Path(image).stem}.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"--out {file} does not end in .safetensors. Name a file that does.")
    if file.exists():
        raise UserError(f"{file} is there already. Remove it, or choose another --out.")
    from edit.run.invert import write_inversion

    asked: dict[str, Any] = {"method": method, "check": check, "iterations": iterations, "guidance": guidance}
    for line in write_inversion(file, opened, prompt, **asked, **shared):
        notify(line)
    notify(f'{file} is written. Next: edit invert-and-replace --inversion {file} --target "…"')


@command("invert-and-replace", SAMPLED, GUIDED, OPENING, JUDGED)
def invert_and_replace(
    targets: Targets,
    image: MaybeImage = None,
    source: MaybeSource = None,
    swaps: Annotated[
        list[str] | None,
        option(
            "--swap",
            metavar="OLD=NEW",
            help="cat=tiger: words that take each other's place.",
            panel=WORDS,
            show_default="found",
        ),
    ] = None,
    weights: Annotated[
        list[str] | None,
        option(
            "--reweight",
            metavar="WORD=X",
            help="silver=2: how strongly a target's word counts.",
            panel=WORDS,
            show_default="1",
        ),
    ] = None,
    dry_run: Annotated[
        bool, option("--dry-run", help="Print what becomes of the words, and end.", panel=WORDS)
    ] = False,
    blend: Annotated[
        list[str] | None,
        option(
            "--blend",
            metavar="WORD",
            help="Change only where this word stands; auto: the words that differ; none: everywhere.",
            panel=WHERE,
            show_default="by control",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        option(
            "--keep",
            metavar="WORD",
            help="Never change where this word stands.",
            panel=WHERE,
            show_default="none",
        ),
    ] = None,
    mask: Mask = None,
    threshold: Annotated[
        float | None,
        option(
            "--threshold",
            help="Share of the greatest difference that lets a place change.",
            panel=WHERE,
            show_default="0.25",
        ),
    ] = None,
    control: Annotated[
        Way,
        option(
            "--control",
            help="What holds the image: masactrl for what bends, plug-and-play for a new look.",
            panel=HOW,
        ),
    ] = "prompt-to-prompt",
    cross: Annotated[
        float | None,
        option(
            "--cross",
            "--cross-replace-steps",
            help="Share of the steps with the source's cross-attention.",
            panel=HOW,
            show_default="0.8",
        ),
    ] = None,
    self_attention: Annotated[
        float | None,
        option(
            "--self",
            "--self-replace-steps",
            help="Share of the steps with its self-attention.",
            panel=HOW,
            show_default="0.4",
        ),
    ] = None,
    windows: Annotated[
        list[str] | None,
        option(
            "--window",
            metavar="WORD=A:B",
            help="cat=0.2:0.8: cross-attention's window of one word.",
            panel=HOW,
            show_default="none",
        ),
    ] = None,
    strength: Annotated[
        float, option("--strength", help="Share of the way that is walked again.", panel=HOW)
    ] = 1.0,
    inversion: InversionFile = None,
    method: InversionMethod = "direct",
    iterations: Iterations = 10,
    heatmaps: Annotated[
        list[str] | None,
        option(
            "--heatmap",
            metavar="WORD",
            help="Also where this word looks; repeatable.",
            panel=flags.OUTPUT,
            show_default="none",
        ),
    ] = None,
    **shared: Any,
) -> None:
    """Replace, add, remove or reweight words of an image's prompt; the rest stays (prompt-to-prompt)."""
    targets = in_words(targets, "target prompt")
    for name, value in (("--cross", cross), ("--self", self_attention), ("--threshold", threshold)):
        checks.share(name, 0.0 if value is None else value)
    checks.share("--strength", strength)
    wishes: dict[str, Any] = {
        "targets": targets,
        "image": image,
        "source": source,
        "inversion": inversion,
        "method": method,
        "iterations": iterations,
        "control": control,
        "swaps": [checks.swap(asked) for asked in swaps or []],
        "weights": dict(checks.valued(asked, "--reweight") for asked in weights or []),
        "windows": dict(checks.window(asked, "--window") for asked in windows or []),
        "blend": checks.blend(blend),
        "keep": keep or [],
        "mask": mask,
        "cross": cross,
        "self_attention": self_attention,
        "threshold": threshold,
        "strength": strength,
        "heatmaps": heatmaps or [],
        **shared,
    }
    begins(wishes, [*targets, shared["negative"]], dry=dry_run)
    if dry_run:
        from edit.run.invert import print_alignment

        for text in print_alignment(wishes):
            typer.echo(text)
        return
    finish("invert-and-replace", wishes)


@command("sdedit", SAMPLED, GUIDED, OPENING, JUDGED)
def sdedit(
    image: Image,
    prompt: Prompt,
    strength: Annotated[
        float,
        option(
            "--strength",
            help="Noise: 0 leaves the image, 1 forgets it (as in diffusers, not as in mflux).",
            panel=HOW,
        ),
    ] = 0.6,
    mask: Mask = None,
    count: Count = 1,
    **shared: Any,
) -> None:
    """Noise an image, a stroke painting or a masked part, and denoise it towards a prompt."""
    opened = readable(image)
    prompt = checks.prompt(one_prompt(prompt, "--prompt"), "prompt")
    checks.share("--strength", strength)
    tokens_owned(shared["concepts"], [prompt, shared["negative"]])
    wishes = {"image": opened, "prompt": prompt, "strength": strength, "mask": mask, "count": count, **shared}
    finish("sdedit", wishes)


@command("flow-edit", SAMPLED, OPENING, JUDGED)
def flow_edit(
    image: Image,
    source: Source,
    targets: Targets,
    strength: Annotated[
        float, option("--strength", help="Share of the noise levels that are visited.", panel=HOW)
    ] = 0.66,
    draws: Annotated[int, option("--draws", min=1, help="Noises averaged at every step.", panel=HOW)] = 1,
    mask: Mask = None,
    guidance: flags.Guidance = None,
    source_guidance: Annotated[
        float, option("--source-guidance", help="Guidance of the source's prompt.", panel=flags.SAMPLING)
    ] = 1.0,
    **shared: Any,
) -> None:
    """Move an image from one prompt to another without inverting it (FlowEdit, on every noise path)."""
    opened = readable(image)
    source = checks.prompt(one_prompt(source, "--source"), "source prompt")
    targets = in_words(targets, "target prompt")
    checks.share("--strength", strength)
    tokens_owned(shared["concepts"], [source, *targets])
    wishes = {
        "image": opened, "source": source, "targets": targets, "strength": strength, "mask": mask, "draws": draws,
        "guidance": guidance, "source_guidance": source_guidance, **shared,
    }  # fmt: skip
    finish("flow-edit", wishes)


@command("remove", SAMPLED, GUIDED, OPENING, JUDGED)
def remove(
    image: MaybeImage = None,
    word: Annotated[
        str,
        option(
            "--remove",
            metavar="WORD",
            help="The word of what to remove.",
            panel=WORDS,
            show_default="the mask's",
        ),
    ] = "",
    source: MaybeSource = None,
    prompt: Annotated[
        str | None,
        option(
            "--prompt",
            "--prompts",
            help="What to see instead, in words or in a file.",
            panel=WORDS,
            show_default="the source without the word",
        ),
    ] = None,
    mask: Annotated[
        str | None,
        option(
            "--mask",
            "--mask-image",
            metavar="IMAGE",
            help="An image of the same size; white: remove.",
            panel=WHERE,
            show_default="where the word stands",
        ),
    ] = None,
    threshold: Annotated[
        float,
        option("--threshold", help="Share of the greatest difference that makes a place.", panel=WHERE),
    ] = 0.25,
    strength: Annotated[float, option("--strength", help="How anew the place is drawn.", panel=HOW)] = 1.0,
    inversion: InversionFile = None,
    count: Count = 1,
    **shared: Any,
) -> None:
    """Remove what a word names, or what a mask covers, and fill its place."""
    if not word.strip() and mask is None:
        raise UserError("Neither a word to remove nor a mask is given. Say --remove WORD, or --mask PNG.")
    checks.share("--strength", strength)
    checks.share("--threshold", threshold)
    prompt = None if prompt is None else one_prompt(prompt, "--prompt")
    wishes = {
        "word": word, "image": image, "source": source, "inversion": inversion, "prompt": prompt, "mask": mask,
        "strength": strength, "threshold": threshold, "count": count, **shared,
    }  # fmt: skip
    begins(wishes, [word, prompt or "", shared["negative"]])
    finish("remove", wishes)


@command("compose", SAMPLED, OPENING, JUDGED)
def compose(
    image: MaybeImage = None,
    source: MaybeSource = None,
    toward: Annotated[
        list[str] | None,
        option(
            "--toward",
            metavar="PROMPT=X",
            help="“a watercolor=3”: a prompt and its weight; repeatable.",
            panel=WORDS,
            show_default="none",
        ),
    ] = None,
    away: Annotated[
        list[str] | None,
        option(
            "--away", metavar="PROMPT=X", help="The same, away from it.", panel=WORDS, show_default="none"
        ),
    ] = None,
    mask: Mask = None,
    strength: Annotated[
        float, option("--strength", help="Share of the way that is walked again.", panel=HOW)
    ] = 0.7,
    inversion: InversionFile = None,
    **shared: Any,
) -> None:
    """Compose an image's prompt with others: towards some (a style, say) and away from others."""
    led = [checks.valued(asked, "--toward") for asked in toward or []]
    led += [(prompt, -weight) for prompt, weight in (checks.valued(asked, "--away") for asked in away or [])]
    if not led:
        raise UserError("There is no prompt to compose with. Give --toward “a watercolor=3”, or --away.")
    checks.share("--strength", strength)
    wishes = {
        "toward": led, "image": image, "source": source, "inversion": inversion, "strength": strength, "mask": mask,
        **shared,
    }  # fmt: skip
    begins(wishes, [prompt for prompt, _ in led])
    finish("compose", wishes)


@command("interpolate", SAMPLED, OPENING)
def interpolate(
    first: Annotated[str, typer.Argument(metavar="FIRST", help="The image to begin with.")],
    second: Annotated[str, typer.Argument(metavar="SECOND", help="The image to end with.")],
    prompts: Annotated[
        list[str],
        option(
            "--prompts",
            "--prompt",
            help="What each shows, in words (give it twice) or in a file with two lines.",
            panel=WORDS,
        ),
    ],
    count: Annotated[
        int, option("--count", min=3, help="Images, both ends included.", panel=flags.DRAWING)
    ] = 7,
    out: Out = None,
    **shared: Any,
) -> None:
    """Draw the images between two images, and a film of them."""
    both = in_words(prompts, "prompt")
    if len(both) != 2:
        raise UserError(f"{len(both)} prompts are given for two images. Give --prompts twice.")
    ends = [readable(path) for path in (first, second)]
    tokens_owned(shared["concepts"], both)
    wishes = {
        "first": ends[0], "second": ends[1], "first_prompt": both[0], "second_prompt": both[1], "count": count,
        "out": out, **shared,
    }  # fmt: skip
    finish("interpolate", wishes)


@app.command("replay")
def replay(
    record: Annotated[Path, typer.Argument(metavar="RUN", help="The run.json of an edit, or its folder.")],
    out: Out = None,
) -> None:
    """Repeat an edit exactly."""
    if not record.exists():
        raise UserError(f"{record} does not exist. Name the run.json of an edit, or its folder.")
    from edit.run.run import replay as again

    notify(f"{again(record, out=out)}/sheet.png shows it again.")


# What is checked before torch is imported -------------------------------------------------------------------


def begins(wishes: dict[str, Any], prompts: list[str], *, dry: bool = False) -> None:
    """`UserError` unless there is a readable image with a prompt, or an inversion."""
    image, source, inversion, mask = (wishes[name] for name in ("image", "source", "inversion", "mask"))
    if source is not None:
        source = wishes["source"] = one_prompt(source, "--source")
    if inversion is not None:
        if image is not None:
            raise UserError("An image and an --inversion are both given. Give one of them.")
        if not Path(inversion).is_file():
            raise UserError(f"{inversion} does not exist. Make it with edit invert.")
    else:
        if image is None and not dry:
            raise UserError("There is nothing to edit. Give an image, or an inversion with --inversion FILE.")
        if source is None:
            raise UserError("What the image shows is not said. Give --source “a cat in a park”.")
        checks.prompt(source, "source prompt")
        if image is not None:
            wishes["image"] = readable(image)
    if mask is not None:
        wishes["mask"] = readable(mask)
    tokens_owned(wishes["concepts"], [source or "", *prompts])


def in_words(given: list[str], what: str) -> list[str]:
    """The prompts of words and files; `UserError` for an empty one."""
    checks.prompts(given, what)
    return [prompt.text for prompt in prompts_of(given)]


def readable(image: str) -> SourceImage:
    """The image, read once for all; `UserError` if it cannot be."""
    from edit.pictures import read_image

    return read_image(image)


def refuse_useless(ctx: typer.Context, asked: Mapping[str, Any]) -> None:
    """`UserError` for an option that was typed and of which nothing would come."""
    if not asked["concepts"]:
        flags.refuse_given(ctx, "scale", "checkpoint", because="without --concept")
    if asked.get("inversion") is not None:
        random = ctx.command.name == "remove"  # what fills the place has noise of its own
        for name in ("method", "iterations", "steps", *(() if random else ("seed",))):
            if name in asked:
                flags.refuse_given(ctx, name, because="on an --inversion that is made already")
    elif "iterations" in asked and asked["method"] != "null-text":
        names = ("iterations", "guidance") if ctx.command.name == "invert" else ("iterations",)
        flags.refuse_given(ctx, *names, because=f"with --method {asked['method']}, only with null-text")
    if not asked.get("metrics", True):
        flags.refuse_given(ctx, "scorer", because="with --no-metrics")


def chosen(concepts: list[Path] | None, checkpoint: flags.Checkpoint | None) -> list[str]:
    """The folders of the runs' chosen checkpoints; `UserError` for a run without a concept."""
    from backbone.adapters.concept import checkpoint as folder_of
    from backbone.adapters.concept import read_concept

    folders = [folder_of(run, checkpoint) for run in concepts or []]
    for folder in folders:
        read_concept(folder)
    return [str(folder) for folder in folders]


def tokens_owned(concepts: list[str], prompts: list[str]) -> None:
    """`UserError` for a token in the prompts that no concept owns."""
    from backbone.adapters.concept import read_concept, resolve_placeholder_tokens

    learned = [read_concept(folder) for folder in concepts]
    for prompt in prompts:
        resolve_placeholder_tokens(prompt, learned)


def finish(name: str, wishes: dict[str, Any]) -> None:
    """Runs the command and says where its sheet is."""
    from edit.run.run import perform

    out = wishes.pop("out")
    folder = perform(name, wishes, out=out, said=shlex.join(typed("edit")))
    notify(f"{folder}/sheet.png shows it; {folder}/report.html measures it.")


if __name__ == "__main__":
    main()
