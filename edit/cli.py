"""The command `edit`: changing what an image shows by changing its words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from backbone.cli.command_line import settled_command
from backbone.cli.commands import command_group, program_words
from backbone.io.console import UserError, count_of, notify, quote, run_app
from backbone.io.examples import EXAMPLES, SCENE
from backbone.io.files import make_empty_folder, write_bytes
from backbone.io.prompts import one_prompt, prompts_of, read_lines, words_of
from backbone.io.run_folder import hold_new_folder, refuse_new_file
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
def invert(asked: InvertOptions) -> None:
    """Write an image's inversion into a file, from which any number of edits can begin."""
    if asked.frames:
        refuse_idle_of_clips(asked)
    image = None if asked.frames else load_image(asked.image)
    prompt = check_prompt(one_prompt(asked.prompt, "--source"), "source prompt")
    options = collect_options(asked, [prompt])
    file = asked.out or Path(f"{Path(asked.image).stem}.safetensors")
    if file.suffix != ".safetensors":
        raise UserError(f"--out {file} does not end in .safetensors. Name a file that does.")
    refuse_new_file(file)
    if image is None:
        from backbone.media.clips import read_film

        film = read_film(asked.image)
        from edit.run.clip import write_clip_inversion

        notify(write_clip_inversion(file, film, prompt, asked, options["concepts"]))
        notify(f'{file} is written. Next: edit clip --inversion {quote(file)} --target "…"')
        return
    from edit.run.invert import write_inversion

    for line in write_inversion(file, image, prompt, options):
        notify(line)
    notify(f'{file} is written. Next: edit invert-and-replace --inversion {quote(file)} --target "…"')


@settled_command(app, ReplaceOptions, panels=PANELS)
def invert_and_replace(asked: ReplaceOptions) -> None:
    """Replace, add, remove or reweight words of an image's prompt; the rest stays (prompt-to-prompt)."""
    targets = list_prompts(asked.targets, "target prompt")
    words = {
        "targets": targets,
        "swaps": [parse_swap(swap) for swap in asked.swaps],
        "weights": parse_weights(asked.weights),
        "windows": map_words([parse_window(one, "--window") for one in asked.windows], "--window"),
        "blend": parse_blend(asked.blend),
    }
    everywhere = words["blend"] == [] or (words["blend"] is None and asked.control != "prompt-to-prompt")
    if asked.threshold is not None and everywhere and not asked.keep:
        raise UserError(
            "--threshold has no effect where the image may change everywhere. Add --blend WORD, or leave it out."
        )
    options = collect_start(asked, [*targets, asked.negative], dry=asked.dry_run) | words
    del options["dry_run"]
    if asked.dry_run:
        from edit.run.invert import print_alignment

        for text in print_alignment(options):
            typer.echo(text)
        return
    run_edit("invert-and-replace", options)


@settled_command(app, SDEditOptions, panels=PANELS)
def sdedit(asked: SDEditOptions) -> None:
    """Noise an image, a stroke painting or a masked part, and denoise it towards a prompt."""
    image = load_image(asked.image)
    prompt = check_prompt(one_prompt(asked.prompt, "--prompt"), "prompt")
    options = collect_options(asked, [prompt, asked.negative])
    run_edit("sdedit", options | {"image": image, "prompt": prompt})


@settled_command(app, FlowEditOptions, panels=PANELS)
def flow_edit(asked: FlowEditOptions) -> None:
    """Move an image from one prompt to another without inverting it (FlowEdit, on every noise path)."""
    image = load_image(asked.image)
    source = check_prompt(one_prompt(asked.source, "--source"), "source prompt")
    targets = list_prompts(asked.targets, "target prompt")
    options = collect_options(asked, [source, *targets])
    run_edit("flow-edit", options | {"image": image, "source": source, "targets": targets})


@settled_command(app, InstructOptions, panels=PANELS)
def instruct(asked: InstructOptions) -> None:
    """Edit an image by an instruction, with a model that reads both; the background stays."""
    image = load_image(asked.image)
    instruction = check_prompt(one_prompt(asked.instruction, "--instruction"), "instruction")
    check_prompts(asked.then, "instruction") if asked.then else None
    then = [one.text for one in prompts_of(asked.then, read=read_lines)]  # “brighter” twice is brighter still
    options = collect_options(asked, [instruction, *then, asked.negative])
    options |= {"references": [load_image(one) for one in asked.references]}
    run_edit("instruct", options | {"image": image, "instruction": instruction, "then": then})


@settled_command(app, RemoveOptions, panels=PANELS)
def remove(asked: RemoveOptions) -> None:
    """Remove what a word names, or what a mask covers, and fill its place."""
    if not asked.word.strip() and asked.mask is None:
        raise UserError("Neither a word to remove nor a mask is given. Say --remove WORD, or --mask PNG.")
    prompt = None if asked.prompt is None else one_prompt(asked.prompt, "--prompt")
    options = collect_start(asked, [asked.word, prompt or "", asked.negative])
    run_edit("remove", options | {"prompt": prompt})


@settled_command(app, ComposeOptions, panels=PANELS)
def compose(asked: ComposeOptions) -> None:
    """Compose an image's prompt with others: towards some (a style, say) and away from others."""
    weighted = [parse_weight(prompt, "--toward") for prompt in asked.toward]
    away = [parse_weight(prompt, "--away") for prompt in asked.away]
    weighted += [(prompt, -weight) for prompt, weight in away]
    weighted = [(words_of(prompt), weight) for prompt, weight in weighted]
    refuse_composed_twice(weighted)
    say_far_weights("Composing with", weighted)
    if not weighted:
        raise UserError('There is no prompt to compose with. Give --toward "a watercolor=3", or --away.')
    options = collect_start(asked, [prompt for prompt, _ in weighted])
    del options["away"]
    run_edit("compose", options | {"toward": weighted})


@settled_command(app, InterpolateOptions, panels=PANELS)
def interpolate(asked: InterpolateOptions) -> None:
    """Interpolate between two images, into images and a film."""
    both = list_prompts(asked.prompts, "prompt")
    if len(both) != 2:
        raise UserError(
            f"Two images need two prompts, not {count_of(len(both), 'prompt')}. Give --prompts twice."
        )
    first, second = (load_image(path) for path in (asked.first, asked.second))
    options = collect_options(asked, both)
    del options["prompts"]
    options |= {"first": first, "second": second, "first_prompt": both[0], "second_prompt": both[1]}
    run_edit("interpolate", options)


@settled_command(app, KeepBackgroundOptions, panels=PANELS)
def keep_background(asked: KeepBackgroundOptions) -> None:
    """Put an image's background back into an edit of it that any program made, and measure its drift."""
    source, edited = load_image(asked.source), load_image(asked.edited)
    from edit.pictures import read_mask
    from edit.run.keep_background import write_kept_background

    mask = None if asked.mask is None else read_mask(asked.mask)
    folder, lines = write_kept_background(
        source, edited, mask=mask, align=asked.align, out=asked.out, said=shlex.join(program_words("edit"))
    )
    for line in lines:
        notify(line)
    notify(f"{folder}/kept.png is the edit on its old background; {folder}/sheet.png shows both.")


@settled_command(app, ClipOptions, panels=PANELS)
def clip(asked: ClipOptions) -> None:
    """Edit a clip by its prompt, all frames in one inversion; its motion and its background stay."""
    source = None if asked.source is None else one_prompt(asked.source, "--source")
    said = asked.targets or ((asked.source,) if asked.first and asked.source else ())
    targets = list_prompts(said, "target prompt")
    if asked.first and len(targets) > 1:
        raise UserError("The first frame shows one edit. Give one --target, or none.")
    first = load_image(asked.first) if asked.first else None
    if (asked.clip is None) == (asked.inversion is None):
        raise UserError(
            "There is nothing to edit. Give a clip, or an inversion with --inversion FILE."
            if asked.clip is None
            else "A clip and an --inversion are both given. Give one of them."
        )
    if asked.inversion is not None:
        refuse_no_file(asked.inversion, "edit clip, or edit invert --clip")
    if source is not None:
        check_prompt(source, "source prompt")
    elif len(targets) > 1 and asked.inversion is None:
        raise UserError("Without --source one clip is drawn anew. Give one --target, or say what it shows.")
    options = collect_options(asked, [source or "", *targets, asked.negative])
    from backbone.media.clips import read_film

    film = None if asked.clip is None else read_film(asked.clip)
    from edit.run.clip import perform_clip

    folder = perform_clip(film, source, targets, asked, concepts=options["concepts"], first=first)
    notify(f"{folder}/report.html plays it; {folder}/sheet.png shows its frames.")


@settled_command(app, PaintOptions, panels=PANELS)
def paint(asked: PaintOptions) -> None:
    """Paint a mask on a page in your browser, say what to draw there, and see the edit."""
    image = load_image(asked.image)
    options = collect_options(asked, [asked.source, asked.target, asked.negative])
    from backbone.io.local_server import check_port

    check_port(asked.port)
    from edit.paint.board import FOLDER, PaintBoard
    from edit.paint.server import serve

    with hold_new_folder(asked.out, FOLDER) as folder:
        board = PaintBoard.open(asked, image, options, folder)
        serve(board, port=asked.port, browser=asked.browser)
    kept = count_of(len(board.edits), "edit")
    notify(f"{kept} in {folder}." if board.edits else "Nothing was edited, so no folder is kept.")


@settled_command(app, ReplayOptions)
def replay(asked: ReplayOptions) -> None:
    """Repeat an edit exactly."""
    record = asked.record / "run.json" if asked.record.is_dir() else asked.record
    if not record.is_file() or record.suffix != ".json":
        wrong = "is no run.json" if record.is_file() else "does not exist"
        raise UserError(f"{record} {wrong}. Name the run.json of an edit, or its folder.")
    from edit.run.run import replay as again

    notify(f"{again(asked.record, out=asked.out)}/sheet.png shows it again.")


# What is checked before torch is imported -------------------------------------------------------------------


def refuse_idle_of_clips(asked: InvertOptions) -> None:
    """`UserError` for what an inversion of all frames of a clip makes nothing of."""
    if asked.check:
        raise UserError("--check is for images, and --clip inverts a clip. Leave out one of the two.")


def refuse_no_file(inversion: str, made_by: str) -> None:
    """`UserError` for an inversion that is no file; of an edit's folder, its own is named."""
    path = Path(inversion)
    if path.is_dir():
        own = path / "inversion.safetensors"
        if own.is_file():
            raise UserError(f"{inversion} is a folder. Name the file: {quote(own)}.")
        raise UserError(
            f"{inversion} is a folder in which there is no {own.name}. Name an inversion's file, made with {made_by}."
        )
    if not path.is_file():
        raise UserError(f"{inversion} does not exist. Make it with {made_by}.")


def collect_start(asked: StartOptions, prompts: Sequence[str], *, dry: bool = False) -> dict[str, Any]:
    """The command's options by name, as `collect_options`, with the source's prompt and the image read.

    `prompts` are those beside the source's. Raises `UserError` unless there is an image with a prompt, or an inversion;
    a `dry` run needs no image.
    """
    source = None if asked.source is None else one_prompt(asked.source, "--source")
    if asked.inversion is not None:
        if asked.image is not None:
            raise UserError("An image and an --inversion are both given. Give one of them.")
        refuse_no_file(asked.inversion, "edit invert")
    elif asked.image is None and not dry:
        raise UserError("There is nothing to edit. Give an image, or an inversion with --inversion FILE.")
    elif source is None:
        raise UserError('What the image shows is not said. Give --source "a cat in a park".')
    else:
        check_prompt(source, "source prompt")
    read = {} if asked.image is None else {"image": load_image(asked.image)}
    return collect_options(asked, [source or "", *prompts]) | {"source": source, **read}


def list_prompts(given: Sequence[str], what: str) -> list[str]:
    """The prompts in words and files, and a word on those given twice; `UserError` for an empty one."""
    check_prompts(given, what)
    found = [prompt.text for prompt in prompts_of(given)]
    for text in {text: None for text in found if found.count(text) > 1 and what == "target prompt"}:
        notify(
            f"“{text}” is given {count_of(found.count(text), 'time')}: what it becomes is the same each time."
        )
    return found


def load_image(image: str) -> SourceImage:
    """Read an image, once for all that need it; `UserError` where it cannot be decoded."""
    from edit.pictures import read_image

    return read_image(image)


def collect_options(asked: SamplerOptions, prompts: Sequence[str]) -> dict[str, Any]:
    """The command's options by name, with checkpoint folders for the runs in `concepts`, and with the mask read.

    Raises `UserError` for a mask that lets nothing change, a run without a concept, and a token in the prompts that no
    concept owns.
    """
    from backbone.adapters.concept import checkpoint, read_concept, resolve_placeholder_tokens

    folders = [checkpoint(run, asked.checkpoint) for run in asked.concepts]
    learned = [read_concept(folder) for folder in folders]
    for prompt in prompts:
        resolve_placeholder_tokens(prompt, learned, model=asked.model)
    if asked.seed and not draws_noise(asked):
        notify(f"--seed {asked.seed} changes nothing: nothing is random here.{_random_method(asked)}")
    if isinstance(asked, StepOptions):
        _ = asked.controls  # mistakes are answered before torch is imported
    options = {one.name: getattr(asked, one.name) for one in fields(asked) if one.name != "checkpoint"}
    if options.get("mask") is not None:
        from edit.pictures import read_mask

        options["mask"] = read_mask(options["mask"])
    return options | {"concepts": [str(folder) for folder in folders]}


def _random_method(asked: SamplerOptions) -> str:
    """A sentence on the inversion that would be random, to follow another; "" where none is made."""
    anew = getattr(asked, "inversion", None) is None
    return f" An inversion by --method {RANDOM} is." if hasattr(asked, "method") and anew else ""


def run_edit(name: str, options: dict[str, Any]) -> None:
    """Run the command and say where its sheet is."""
    from edit.run.commands import COMMANDS
    from edit.run.run import perform

    out = options.pop("out")
    folder = perform(name, options, out=out, said=shlex.join(program_words("edit")))
    measures = COMMANDS[name].compared and options.get("metrics", True)
    notify(f"{folder}/sheet.png shows it; {folder}/report.html {'measures it' if measures else 'says how'}.")


if __name__ == "__main__":
    main()
