"""The command `edit`: changing what a picture shows by changing its words."""

from __future__ import annotations

import functools
import inspect
import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, cast

import typer

from backbone.io.console import UserError, notify, run_app
from edit import checks

app = typer.Typer(
    help="Change what the words say of a picture, and nothing else.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Method = Literal["direct", "ddim", "null-text", "negative-prompt", "edit-friendly", "renoise", "reversible"]
Way = Literal["prompt-to-prompt", "masactrl", "plug-and-play"]
MODEL_HELP = "moji, sd15, a diffusers folder, a checkpoint file (.safetensors), or a hub id."
Model = Annotated[
    str | None,
    typer.Option("--model", "--pretrained_model_name_or_path", help=MODEL_HELP, show_default="moji"),
]
Concepts = Annotated[
    list[str] | None,
    typer.Option("--concept", help="A run folder of customize train; repeatable.", show_default="none"),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--mixed_precision", help="auto, fp32, bf16 or fp16.", show_default="auto"),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", show_default="auto")]
Picture = Annotated[str, typer.Argument(help="The picture.")]
MaybePicture = Annotated[
    str | None, typer.Argument(help="The picture; not with --inversion.", show_default="none")
]
Source = Annotated[
    str | None,
    typer.Option(
        "--source", "--source_prompt", help="What the picture shows.", show_default="the inversion's"
    ),
]
InversionFile = Annotated[
    str | None, typer.Option("--inversion", help="A file of edit invert.", show_default="made anew")
]
Steps = Annotated[int, typer.Option("--steps", "--num_inference_steps", min=1)]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", "--guidance_scale", help="1: none.", show_default="by model"),
]
Negative = Annotated[str, typer.Option("--negative", "--negative_prompt", help="What to stay away from.")]
Mask = Annotated[
    str | None,
    typer.Option("--mask", help="A picture of the same size; white: may change.", show_default="everywhere"),
]
Seed = Annotated[int, typer.Option(help="Everything random follows from it.")]
Count = Annotated[int, typer.Option("--count", "--num_images_per_prompt", min=1, help="Pictures.")]
Film = Annotated[bool, typer.Option("--trajectory", help="Also a film of the way, trajectory.gif.")]
Metrics = Annotated[
    bool, typer.Option("--metrics/--no-metrics", help="Measure what stayed and what changed.")
]
ScorerFolder = Annotated[
    str | None, typer.Option("--scorer", help="A CLIP folder that measures.", show_default="the model's own")
]
Out = Annotated[
    Path | None, typer.Option(help="The run folder to write.", show_default="runs/edit-NAME-OF-PICTURE")
]

# Options that many commands have: name → type and default
OPENING = {
    "model": (Model, None),
    "concepts": (Concepts, None),
    "precision": (Precision, None),
    "device": (Device, None),
}
WALKED = {"steps": (Steps, 50), "seed": (Seed, 0)}
GUIDED = {"guidance": (Guidance, None), "negative": (Negative, "")}
JUDGED = {
    "film": (Film, False),
    "metrics": (Metrics, True),
    "scorer": (ScorerFolder, None),
    "out": (Out, None),
}

Function = TypeVar("Function", bound=Callable[..., None])


def command(name: str, *blocks: Mapping[str, tuple[Any, Any]]) -> Callable[[Function], Function]:
    """Makes a function a command that has the options of these blocks beside its own; it gets them as `**shared`."""

    def register(function: Function) -> Function:
        own = inspect.signature(function, eval_str=True).parameters.values()
        more = [
            inspect.Parameter(option, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for block in blocks
            for option, (kind, default) in block.items()
        ]
        every = [*(one for one in own if one.kind is not inspect.Parameter.VAR_KEYWORD), *more]

        @functools.wraps(function)
        def called(**asked: Any) -> None:
            function(**asked)

        cast(Any, called).__signature__ = inspect.Signature(every)
        called.__annotations__ = {one.name: one.annotation for one in every}
        app.command(name)(called)
        return function

    return register


def main() -> None:
    """The console script."""
    run_app(app)


@command("invert", WALKED, OPENING)
def invert(
    image: Picture,
    prompt: Annotated[str, typer.Option("--prompt", "--source", help="What the picture shows.")],
    method: Annotated[Method, typer.Option(help="How it is inverted.")] = "direct",
    out: Annotated[
        Path | None, typer.Option(help="The file to write.", show_default="NAME-OF-PICTURE.safetensors")
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Walk it down again and say how exact it is.")
    ] = False,
    iterations: Annotated[int, typer.Option(min=0, help="Of null-text, at every step.")] = 10,
    guidance: Guidance = None,
    **shared: Any,
) -> None:
    """Write a picture's inversion into a file, from which any number of edits can begin."""
    readable(image)
    checks.prompt(prompt, "prompt")
    shared["concepts"] = concepts_readable(shared["concepts"], [prompt])
    file = out or Path(f"{Path(image).stem}.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"--out {file} does not end in .safetensors. Name a file that does.")
    if file.exists():
        raise UserError(f"{file} is there already. Remove it, or choose another --out.")
    from edit.run.invert import write_inversion

    asked: dict[str, Any] = {"method": method, "check": check, "iterations": iterations, "guidance": guidance}
    for line in write_inversion(file, image, prompt, **asked, **shared):
        notify(line)
    notify(f'{file} is written. Next: edit invert-and-replace --inversion {file} --target "…"')


@command("invert-and-replace", WALKED, GUIDED, OPENING, JUDGED)
def invert_and_replace(
    targets: Annotated[
        list[str],
        typer.Option(
            "--target", "--target_prompt", help="What it should show; repeatable, done in one batch."
        ),
    ],
    image: MaybePicture = None,
    source: Source = None,
    inversion: InversionFile = None,
    method: Annotated[Method, typer.Option(help="How the picture is inverted.")] = "direct",
    control: Annotated[
        Way,
        typer.Option(help="What holds the picture: masactrl for what bends, plug-and-play for a new look."),
    ] = "prompt-to-prompt",
    swaps: Annotated[
        list[str] | None,
        typer.Option("--swap", help="cat=tiger: words that take each other's place.", show_default="found"),
    ] = None,
    weights: Annotated[
        list[str] | None,
        typer.Option("--reweight", help="silver=2: how strongly a target's word counts.", show_default="1"),
    ] = None,
    blend: Annotated[
        list[str] | None,
        typer.Option(
            "--blend",
            help="Change only where this word stands; auto: the words that differ; none: everywhere.",
        ),
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option("--keep", help="Never change where this word stands.", show_default="none"),
    ] = None,
    mask: Mask = None,
    cross: Annotated[
        float | None,
        typer.Option(
            "--cross", help="Share of the steps with the source's cross-attention.", show_default="0.8"
        ),
    ] = None,
    self_attention: Annotated[
        float | None,
        typer.Option("--self", help="Share of the steps with its self-attention.", show_default="0.4"),
    ] = None,
    windows: Annotated[
        list[str] | None,
        typer.Option(
            "--window", help="cat=0.2:0.8: cross-attention's window of one word.", show_default="none"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(help="Share of the greatest difference that lets a place change.", show_default="0.25"),
    ] = None,
    strength: Annotated[float, typer.Option(help="Share of the way that is walked again.")] = 1.0,
    heatmaps: Annotated[
        list[str] | None,
        typer.Option("--heatmap", help="Also where this word looks; repeatable.", show_default="none"),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what becomes of the words, and end.")
    ] = False,
    iterations: Annotated[int, typer.Option(min=0, help="Of null-text, at every step.")] = 10,
    **shared: Any,
) -> None:
    """Replace, add, remove or reweight words of a picture's prompt; the rest stays (prompt-to-prompt)."""
    checks.prompts(targets, "target prompt")
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
        "blend": None if not blend else [word for word in blend if word != "none"],
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


@command("sdedit", WALKED, GUIDED, OPENING, JUDGED)
def sdedit(
    image: Picture,
    prompt: Annotated[str, typer.Option("--prompt", help="What it should show.")],
    strength: Annotated[
        float,
        typer.Option(help="Noise: 0 leaves the picture, 1 forgets it (as in diffusers, not as in mflux)."),
    ] = 0.6,
    mask: Mask = None,
    count: Count = 1,
    **shared: Any,
) -> None:
    """Noise a picture, a stroke painting or a masked part, and denoise it towards a prompt."""
    readable(image)
    checks.prompt(prompt, "prompt")
    checks.share("--strength", strength)
    shared["concepts"] = concepts_readable(shared["concepts"], [prompt, shared["negative"]])
    wishes = {"image": image, "prompt": prompt, "strength": strength, "mask": mask, "count": count, **shared}
    finish("sdedit", wishes)


@command("flow-edit", WALKED, OPENING, JUDGED)
def flow_edit(
    image: Picture,
    source: Annotated[str, typer.Option("--source", "--source_prompt", help="What the picture shows.")],
    targets: Annotated[list[str], typer.Option("--target", "--target_prompt", help="What it should show.")],
    strength: Annotated[float, typer.Option(help="Share of the noise levels that are visited.")] = 0.66,
    source_guidance: Annotated[float, typer.Option(help="Guidance of the source's prompt.")] = 1.0,
    draws: Annotated[int, typer.Option(min=1, help="Noises averaged at every step.")] = 1,
    mask: Mask = None,
    guidance: Guidance = None,
    **shared: Any,
) -> None:
    """Move a picture from one prompt to another without inverting it (FlowEdit, on every noise path)."""
    readable(image)
    checks.prompt(source, "source prompt")
    checks.prompts(targets, "target prompt")
    checks.share("--strength", strength)
    shared["concepts"] = concepts_readable(shared["concepts"], [source, *targets])
    wishes = {
        "image": image, "source": source, "targets": targets, "strength": strength, "mask": mask, "draws": draws,
        "guidance": guidance, "source_guidance": source_guidance, **shared,
    }  # fmt: skip
    finish("flow-edit", wishes)


@command("remove", WALKED, GUIDED, OPENING, JUDGED)
def remove(
    image: MaybePicture = None,
    word: Annotated[
        str, typer.Option("--remove", help="The word of what to remove.", show_default="the mask's")
    ] = "",
    source: Source = None,
    inversion: InversionFile = None,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="What to see instead.", show_default="the source without the word"),
    ] = None,
    mask: Annotated[
        str | None, typer.Option("--mask", help="White: remove.", show_default="where the word stands")
    ] = None,
    strength: Annotated[float, typer.Option(help="How anew the place is drawn.")] = 1.0,
    threshold: Annotated[
        float, typer.Option(help="Share of the greatest difference that makes a place.")
    ] = 0.25,
    count: Count = 1,
    **shared: Any,
) -> None:
    """Remove what a word names, or what a mask covers, and fill its place."""
    if not word.strip() and mask is None:
        raise UserError("Neither a word to remove nor a mask is given. Say --remove WORD, or --mask PNG.")
    checks.share("--strength", strength)
    checks.share("--threshold", threshold)
    wishes = {
        "word": word, "image": image, "source": source, "inversion": inversion, "prompt": prompt, "mask": mask,
        "strength": strength, "threshold": threshold, "count": count, **shared,
    }  # fmt: skip
    begins(wishes, [word, prompt or "", shared["negative"]])
    finish("remove", wishes)


@command("lead", WALKED, OPENING, JUDGED)
def lead(
    image: MaybePicture = None,
    source: Source = None,
    inversion: InversionFile = None,
    toward: Annotated[
        list[str] | None,
        typer.Option(
            "--toward", help="“a watercolor=3”: a prompt and its weight; repeatable.", show_default="none"
        ),
    ] = None,
    away: Annotated[
        list[str] | None, typer.Option("--away", help="The same, away from it.", show_default="none")
    ] = None,
    strength: Annotated[float, typer.Option(help="Share of the way that is walked again.")] = 0.7,
    mask: Mask = None,
    **shared: Any,
) -> None:
    """Lead a picture towards prompts (a style, say) and away from others."""
    led = [checks.valued(asked, "--toward") for asked in toward or []]
    led += [(prompt, -weight) for prompt, weight in (checks.valued(asked, "--away") for asked in away or [])]
    if not led:
        raise UserError("There is no prompt to lead to. Give --toward “a watercolor=3”, or --away.")
    checks.share("--strength", strength)
    wishes = {
        "toward": led, "image": image, "source": source, "inversion": inversion, "strength": strength, "mask": mask,
        **shared,
    }  # fmt: skip
    begins(wishes, [prompt for prompt, _ in led])
    finish("lead", wishes)


@command("between", WALKED, OPENING)
def between(
    first: Annotated[str, typer.Argument(help="The picture to begin with.")],
    second: Annotated[str, typer.Argument(help="The picture to end with.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="What each shows: give two.")],
    count: Annotated[int, typer.Option(min=3, help="Pictures, both ends included.")] = 7,
    out: Out = None,
    **shared: Any,
) -> None:
    """Draw the pictures between two pictures, and a film of them."""
    if len(prompt) != 2:
        raise UserError(f"{len(prompt)} prompts are given for two pictures. Give --prompt twice.")
    for path in (first, second):
        readable(path)
    checks.prompts(prompt, "prompt")
    shared["concepts"] = concepts_readable(shared["concepts"], prompt)
    wishes = {
        "first": first, "second": second, "first_prompt": prompt[0], "second_prompt": prompt[1], "count": count,
        "out": out, **shared,
    }  # fmt: skip
    finish("between", wishes)


@app.command("replay")
def replay(
    record: Annotated[Path, typer.Argument(help="The run.json of an edit, or its folder.")],
    out: Out = None,
) -> None:
    """Repeat an edit exactly."""
    if not record.exists():
        raise UserError(f"{record} does not exist. Name the run.json of an edit, or its folder.")
    from edit.run.run import replay as again

    notify(f"{again(record, out=out)}/sheet.png shows it again.")


# What is checked before torch is imported -------------------------------------------------------------------


def begins(wishes: dict[str, Any], prompts: list[str], *, dry: bool = False) -> None:
    """`UserError` unless there is a readable picture with a prompt, or an inversion."""
    image, source, inversion, mask = (wishes[name] for name in ("image", "source", "inversion", "mask"))
    if inversion is not None:
        if image is not None:
            raise UserError("A picture and an --inversion are both given. Give one of them.")
        if not Path(inversion).is_file():
            raise UserError(f"{inversion} does not exist. Make it with edit invert.")
    else:
        if image is None and not dry:
            raise UserError(
                "There is nothing to edit. Give a picture, or an inversion with --inversion FILE."
            )
        if source is None:
            raise UserError("What the picture shows is not said. Give --source “a cat in a park”.")
        checks.prompt(source, "source prompt")
        if image is not None:
            readable(image)
    if mask is not None:
        readable(mask)
    wishes["concepts"] = concepts_readable(wishes["concepts"], [source or "", *prompts])


def readable(image: str) -> None:
    """`UserError` for a picture that cannot be read."""
    from backbone.media.decode import open_rgb

    open_rgb(image, at_least=64)


def concepts_readable(concepts: list[str] | None, prompts: list[str]) -> list[str]:
    """The folders; `UserError` for one without a concept, or a token that no concept owns."""
    from backbone.adapters.concept import read_concept, resolve_placeholder_tokens

    learned = [read_concept(folder) for folder in concepts or []]
    for prompt in prompts:
        resolve_placeholder_tokens(prompt, learned)
    return concepts or []


def finish(name: str, wishes: dict[str, Any]) -> None:
    """Runs the command and says where its sheet is."""
    from edit.run.run import perform

    out = wishes.pop("out")
    folder = perform(name, wishes, out=out, said=shlex.join(["edit", *sys.argv[1:]]))
    notify(f"{folder}/sheet.png shows it; {folder}/report.html measures it.")


if __name__ == "__main__":
    main()
