"""The command `edit`: changing what an image shows by changing its words."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backbone.cli.command_line import settled_command
from backbone.cli.commands import command_group, program_words
from backbone.io.console import UserError, format_count, notify, quote, run_app
from backbone.io.examples import EXAMPLES, SCENE
from backbone.io.files import make_empty_folder, write_bytes
from backbone.io.prompts import load_prompts, one_prompt, parse_prompt, read_lines
from backbone.io.run_folder import check_new_file, hold_new_folder
from edit.checks import (
    check_prompt,
    check_prompts,
    map_words,
    parse_blend,
    parse_swap,
    parse_weight,
    parse_weights,
    parse_window,
    refuse_composed_twice,
    say_far_weights,
)
from edit.settings import (
    PANELS,
    RANDOM,
    ClipOptions,
    ComposeOptions,
    FlowEditOptions,
    InstructOptions,
    InterpolateOptions,
    InvertOptions,
    KeepBackgroundOptions,
    PaintOptions,
    RemoveOptions,
    ReplaceOptions,
    ReplayOptions,
    SamplerOptions,
    SDEditOptions,
    StartOptions,
    StepOptions,
    draws_noise,
)

if TYPE_CHECKING:
    from edit.pictures import SourceImage

app = command_group("Change what the words say of an image, and nothing else.")


def main() -> None:
    """The console script."""
    run_app(app)


@app.command()
def example(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="The folder to write; new or empty, or one that holds it."),
    ],
) -> None:
    """Write an image of a cat in a park, and what it shows, to try the other commands with."""
    if not folder.is_dir() or {path.name for path in folder.iterdir()} - set(SCENE):
        make_empty_folder(folder)
    for name in SCENE:
        write_bytes(folder / name, (EXAMPLES / name).read_bytes())
    image, prompt = (quote(folder / name) for name in SCENE)
    notify(f'Next: edit invert-and-replace {image} --source {prompt} --target "a dog in a park"')


@settled_command(app, InvertOptions, panels=PANELS)
def invert(args: InvertOptions) -> None:
    """Write an image's inversion into a file, from which any number of edits can begin."""
    if args.frames:
        refuse_idle_of_clips(args)
    image = None if args.frames else load_image(args.image)
    prompt = check_prompt(one_prompt(args.prompt, "--source"), "source prompt")
    options = collect_options(args, [prompt])
    file = args.out or Path(f"{Path(args.image).stem}.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"--out {file} does not end in .safetensors. Name a file that does.")
    check_new_file(file)
    if image is None:
        from backbone.media.clips import read_film

        film = read_film(args.image)
        from edit.run.clip import write_clip_inversion

        notify(write_clip_inversion(file, film, prompt, args, options["concepts"]))
        notify(f'{file} is written. Next: edit clip --inversion {quote(file)} --target "…"')
        return
    from edit.run.invert import write_inversion

    for line in write_inversion(file, image, prompt, options):
        notify(line)
    notify(f'{file} is written. Next: edit invert-and-replace --inversion {quote(file)} --target "…"')


@settled_command(app, ReplaceOptions, panels=PANELS)
def invert_and_replace(args: ReplaceOptions) -> None:
    """Replace, add, remove or reweight words of an image's prompt; the rest stays (prompt-to-prompt)."""
    targets = list_prompts(args.targets, "target prompt")
    words = {
        "targets": targets,
        "swaps": [parse_swap(swap) for swap in args.swaps],
        "weights": parse_weights(args.weights),
        "windows": map_words([parse_window(window, "--window") for window in args.windows], "--window"),
        "blend": parse_blend(args.blend),
    }
    changes_everywhere = words["blend"] == [] or (
        words["blend"] is None and args.control != "prompt-to-prompt"
    )
    if args.threshold is not None and changes_everywhere and not args.keep:
        raise UserError(
            "--threshold has no effect where the image may change everywhere. Add --blend WORD, or leave it out."
        )
    options = collect_start(args, [*targets, args.negative], dry=args.dry_run) | words
    del options["dry_run"]
    if args.dry_run:
        from edit.run.invert import print_alignment

        for text in print_alignment(options):
            typer.echo(text)
        return
    run_edit("invert-and-replace", options)


@settled_command(app, SDEditOptions, panels=PANELS)
def sdedit(args: SDEditOptions) -> None:
    """Noise an image, a stroke painting or a masked part, and denoise it towards a prompt."""
    image = load_image(args.image)
    prompt = check_prompt(one_prompt(args.prompt, "--prompt"), "prompt")
    options = collect_options(args, [prompt, args.negative])
    run_edit("sdedit", options | {"image": image, "prompt": prompt})


@settled_command(app, FlowEditOptions, panels=PANELS)
def flow_edit(args: FlowEditOptions) -> None:
    """Move an image from one prompt to another without inverting it (FlowEdit, on every noise path)."""
    image = load_image(args.image)
    source = check_prompt(one_prompt(args.source, "--source"), "source prompt")
    targets = list_prompts(args.targets, "target prompt")
    options = collect_options(args, [source, *targets])
    run_edit("flow-edit", options | {"image": image, "source": source, "targets": targets})


@settled_command(app, InstructOptions, panels=PANELS)
def instruct(args: InstructOptions) -> None:
    """Edit an image by an instruction, with a model that reads both; the background stays."""
    image = load_image(args.image)
    instruction = check_prompt(one_prompt(args.instruction, "--instruction"), "instruction")
    if args.then:
        check_prompts(args.then, "instruction")
    # Repeats are kept: “brighter” twice is brighter still
    later_instructions = [prompt.text for prompt in load_prompts(args.then, read=read_lines)]
    options = collect_options(args, [instruction, *later_instructions, args.negative])
    options |= {"references": [load_image(reference) for reference in args.references]}
    run_edit("instruct", options | {"image": image, "instruction": instruction, "then": later_instructions})


@settled_command(app, RemoveOptions, panels=PANELS)
def remove(args: RemoveOptions) -> None:
    """Remove what a word names, or what a mask covers, and fill its place."""
    if not args.word.strip() and args.mask is None:
        raise UserError("Neither a word to remove nor a mask is given. Give --remove WORD or --mask IMAGE.")
    prompt = None if args.prompt is None else one_prompt(args.prompt, "--prompt")
    options = collect_start(args, [args.word, prompt or "", args.negative])
    run_edit("remove", options | {"prompt": prompt})


@settled_command(app, ComposeOptions, panels=PANELS)
def compose(args: ComposeOptions) -> None:
    """Compose an image's prompt with others: towards some (a style, say) and away from others."""
    toward = [parse_weight(text, "--toward") for text in args.toward]
    away = [parse_weight(text, "--away") for text in args.away]
    weighted = [(parse_prompt(text), weight) for text, weight in toward]
    weighted += [(parse_prompt(text), -weight) for text, weight in away]
    refuse_composed_twice(weighted)
    say_far_weights("Composing with", weighted)
    if not weighted:
        raise UserError('There is no prompt to compose with. Give --toward "a watercolor=3", or --away.')
    options = collect_start(args, [prompt for prompt, _ in weighted])
    del options["away"]
    run_edit("compose", options | {"toward": weighted})


@settled_command(app, InterpolateOptions, panels=PANELS)
def interpolate(args: InterpolateOptions) -> None:
    """Interpolate between two images, into images and a film."""
    prompts = list_prompts(args.prompts, "prompt")
    if len(prompts) != 2:
        raise UserError(
            f"Two images need two prompts, not {format_count(len(prompts), 'prompt')}. Give --prompts twice."
        )
    first, second = (load_image(path) for path in (args.first, args.second))
    options = collect_options(args, prompts)
    del options["prompts"]
    options |= {"first": first, "second": second, "first_prompt": prompts[0], "second_prompt": prompts[1]}
    run_edit("interpolate", options)


@settled_command(app, KeepBackgroundOptions, panels=PANELS)
def keep_background(args: KeepBackgroundOptions) -> None:
    """Put an image's background back into an edit of it that any program made, and measure its drift."""
    source, edited = load_image(args.source), load_image(args.edited)
    from edit.pictures import read_mask
    from edit.run.keep_background import write_kept_background

    mask = None if args.mask is None else read_mask(args.mask)
    folder, lines = write_kept_background(
        source, edited, mask=mask, align=args.align, out=args.out, typed=shlex.join(program_words("edit"))
    )
    for line in lines:
        notify(line)
    notify(f"{folder}/kept.png is the edit on its old background; {folder}/sheet.png shows both.")


@settled_command(app, ClipOptions, panels=PANELS)
def clip(args: ClipOptions) -> None:
    """Edit a clip by its prompt, all frames in one inversion; its motion and its background stay."""
    source = None if args.source is None else one_prompt(args.source, "--source")
    prompts = args.targets or ((args.source,) if args.first and args.source else ())
    targets = list_prompts(prompts, "target prompt")
    if args.first and len(targets) > 1:
        raise UserError("The first frame shows one edit. Give one --target, or none.")
    first = load_image(args.first) if args.first else None
    if (args.clip is None) == (args.inversion is None):
        raise UserError(
            "There is nothing to edit. Give a clip, or an inversion with --inversion FILE."
            if args.clip is None
            else "A clip and an --inversion are both given. Give one of them."
        )
    if args.inversion is not None:
        refuse_missing_inversion(args.inversion, "edit clip, or edit invert --clip")
    if source is not None:
        check_prompt(source, "source prompt")
    elif len(targets) > 1 and args.inversion is None:
        raise UserError("Without --source one clip is drawn anew. Give one --target, or say what it shows.")
    options = collect_options(args, [source or "", *targets, args.negative])
    from backbone.media.clips import read_film

    film = None if args.clip is None else read_film(args.clip)
    from edit.run.clip import perform_clip

    folder = perform_clip(film, source, targets, args, concepts=options["concepts"], first=first)
    notify(f"{folder}/report.html plays it; {folder}/sheet.png shows its frames.")


@settled_command(app, PaintOptions, panels=PANELS)
def paint(args: PaintOptions) -> None:
    """Paint a mask on a page in your browser, say what to draw there, and see the edit."""
    image = load_image(args.image)
    options = collect_options(args, [args.source, args.target, args.negative])
    from backbone.io.local_server import check_port

    check_port(args.port)
    from edit.paint.board import FOLDER, PaintBoard
    from edit.paint.server import serve

    with hold_new_folder(args.out, FOLDER) as folder:
        board = PaintBoard.open(args, image, options, folder)
        serve(board, port=args.port, browser=args.browser)
    edits = format_count(len(board.edits), "edit")
    notify(f"{edits} in {folder}." if board.edits else "Nothing was edited, so no folder is kept.")


@settled_command(app, ReplayOptions)
def replay(args: ReplayOptions) -> None:
    """Repeat an edit exactly."""
    record = args.record / "run.json" if args.record.is_dir() else args.record
    if not record.is_file() or record.suffix != ".json":
        complaint = "is no run.json" if record.is_file() else "does not exist"
        raise UserError(f"{record} {complaint}. Name the run.json of an edit, or its folder.")
    from edit.run.run import replay as replay_edit

    notify(f"{replay_edit(args.record, out=args.out)}/sheet.png shows it again.")


# Checks before torch is imported ----------------------------------------------------------------------------


def refuse_idle_of_clips(args: InvertOptions) -> None:
    """Raise `UserError` for options without effect on the inversion of a clip."""
    if args.check:
        raise UserError("--check is for images, and --clip inverts a clip. Leave out one of the two.")


def refuse_missing_inversion(inversion: str, made_by: str) -> None:
    """Raise `UserError` for an inversion that is not a file, naming the one in an edit's folder."""
    path = Path(inversion)
    if path.is_dir():
        inversion_file = path / "inversion.safetensors"
        if inversion_file.is_file():
            raise UserError(f"{inversion} is a folder. Name the file: {quote(inversion_file)}.")
        raise UserError(
            f"{inversion} is a folder in which there is no {inversion_file.name}. Name an inversion's file, made with "
            f"{made_by}."
        )
    if not path.is_file():
        raise UserError(f"{inversion} does not exist. Make it with {made_by}.")


def collect_start(args: StartOptions, prompts: Sequence[str], *, dry: bool = False) -> dict[str, Any]:
    """The options of `collect_options`, with the source's prompt and image.

    `prompts` are all except the source's. Raises `UserError` unless there is an image with a prompt, or an inversion;
    a `dry` run needs no image.
    """
    source = None if args.source is None else one_prompt(args.source, "--source")
    if args.inversion is not None:
        if args.image is not None:
            raise UserError("An image and an --inversion are both given. Give one of them.")
        refuse_missing_inversion(args.inversion, "edit invert")
    elif args.image is None and not dry:
        raise UserError("There is nothing to edit. Give an image, or an inversion with --inversion FILE.")
    elif source is None:
        raise UserError(
            'The source prompt is missing. Give --source with what the image shows: "a cat in a park".'
        )
    else:
        check_prompt(source, "source prompt")
    image_option = {} if args.image is None else {"image": load_image(args.image)}
    return collect_options(args, [source or "", *prompts]) | {"source": source, **image_option}


def list_prompts(prompts: Sequence[str], kind: str) -> list[str]:
    """The prompts, read from words and files; prints those given twice. `UserError` for an empty one."""
    check_prompts(prompts, kind)
    texts = [prompt.text for prompt in load_prompts(prompts)]
    for text, count in Counter(texts).items():
        if count > 1 and kind == "target prompt":
            notify(f"“{text}” is given {format_count(count, 'time')}: what it becomes is the same each time.")
    return texts


def load_image(image: str) -> SourceImage:
    """Read an image once; `UserError` if it cannot be decoded."""
    from edit.pictures import read_image

    return read_image(image)


def collect_options(args: SamplerOptions, prompts: Sequence[str]) -> dict[str, Any]:
    """The command's options by name; runs in `concepts` become checkpoint folders, and the mask is read.

    Raises `UserError` for a mask that lets nothing change, a run without a concept, and a token in the prompts that
    belongs to no concept.
    """
    from backbone.adapters.concept import checkpoint, read_concept, resolve_placeholder_tokens

    folders = [checkpoint(run, args.checkpoint) for run in args.concepts]
    concepts = [read_concept(folder) for folder in folders]
    for prompt in prompts:
        resolve_placeholder_tokens(prompt, concepts, model=args.model)
    if args.seed and not draws_noise(args):
        notify(f"--seed {args.seed} changes nothing: nothing is random here.{_name_random_method(args)}")
    if isinstance(args, StepOptions):
        _ = args.controls  # user errors are raised before torch is imported
    options = {field.name: getattr(args, field.name) for field in fields(args) if field.name != "checkpoint"}
    if options.get("mask") is not None:
        from edit.pictures import read_mask

        options["mask"] = read_mask(options["mask"])
    return options | {"concepts": [str(folder) for folder in folders]}


def _name_random_method(args: SamplerOptions) -> str:
    """A sentence, to follow another, that names the random inversion; "" for a command that inverts nothing."""
    inverts = getattr(args, "inversion", None) is None
    return f" An inversion by --method {RANDOM} is." if hasattr(args, "method") and inverts else ""


def run_edit(name: str, options: dict[str, Any]) -> None:
    """Run the command and print where its sheet is."""
    from edit.run.commands import COMMANDS
    from edit.run.run import perform

    out = options.pop("out")
    folder = perform(name, options, out=out, typed=shlex.join(program_words("edit")))
    measures = COMMANDS[name].compared and options.get("metrics", True)
    notify(
        f"{folder}/sheet.png shows it; {folder}/report.html {'measures it' if measures else 'has the details'}."
    )


if __name__ == "__main__":
    main()
