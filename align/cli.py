"""The command `align`: draw images, choose between them, train on the choices, compare."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args

import typer

from align.settings import SOURCE_HELP, ComparisonSettings, PairSampling
from align.training import cli as train_cli
from backbone.cli import flags
from backbone.cli.command_line import settled_command
from backbone.cli.commands import command_group, print_json
from backbone.cli.flags import (
    CONCEPTS,
    DRAWING,
    OUTPUT,
    RUNS_MODEL,
    SAMPLING,
    SCORING,
    JsonOptions,
    option,
)
from backbone.cli.options import Option
from backbone.io.console import UserError, format_count, is_main_rank, notify, quote, run_app
from backbone.io.files import read_json, refuse_existing
from backbone.io.prompts import Prompt, load_prompts, unique_prompts
from backbone.io.run_folder import refuse_unwritable

app = command_group("Tune a diffusion model to preferences: yours, or a scorer's.")

LABELLING = "Labelling"  # a section of the help
PAIRS = "Pairs"
# Explained in `align.collect.rank`
Rule = Literal["best-worst", "all", "own", "same-noise", "best-hard-negative"]
RULES = get_args(Rule)
Folder = Annotated[Path, typer.Argument(metavar="FOLDER", help="A folder of align sample.")]
Source = Annotated[str, typer.Argument(metavar="SOURCE", help=SOURCE_HELP)]
Scorers = Annotated[
    list[str],
    option(
        "--scorer",
        help="moji, a CLIP folder, like:IMAGES, or a file.py; repeatable.",
        panel=flags.SCORING,
    ),
]
User = Annotated[
    str | None,
    option("--user", help="Only this person's choices.", panel=flags.DATA, show_default="everybody's"),
]
Limit = Annotated[
    int | None,
    option(
        "--limit",
        "--max-train-samples",
        min=1,
        help="Read only this many rows, the first ones; a dataset is then streamed.",
        panel=flags.DATA,
        show_default="all",
    ),
]
Split = Annotated[
    str | None,
    option(
        "--split",
        "--dataset-split-name",
        help="Split of a dataset on the hub.",
        panel=flags.DATA,
        show_default="train",
    ),
]
SkipBad = Annotated[
    bool, option("--skip-bad", help="Leave bad records out instead of stopping.", panel=flags.DATA)
]
Labeller = Annotated[
    str,
    option("--user", help="Who chooses; align train --user then trains on one person.", panel=LABELLING),
]
Browser = Annotated[
    bool,
    option(
        "--browser/--no-browser",
        help="Open the page, where there is a screen.",
        panel=LABELLING,
        show_default="on",
    ),
]
Port = Annotated[
    int,
    option("--port", min=0, max=65535, help="Port of the labelling page; 0: any free one.", panel=LABELLING),
]


def main() -> None:
    """The console script."""
    run_app(app)


@dataclass(frozen=True, kw_only=True)
class PromptOptions(JsonOptions):
    """Options for prompts and the output folder."""

    prompts: Annotated[
        tuple[str, ...],
        Option(
            "Words, or a file with a prompt on each line (.jsonl: with prompt and category); repeatable.",
            DRAWING,
            aliases=("prompt", "from-file"),
            metavar="PROMPTS",
        ),
    ]
    out: Annotated[
        Path,
        Option("The folder to write, or to resume.", OUTPUT, aliases=("output-dir",), metavar="FOLDER"),
    ]


@dataclass(frozen=True, kw_only=True)
class SampleOptions(PairSampling, PromptOptions):
    """Options of `align sample`."""


@settled_command(app, SampleOptions, panels=(DRAWING, CONCEPTS, SAMPLING))
def sample(options: SampleOptions) -> None:
    """Draw several images of each prompt, to choose between."""
    from backbone.adapters.concept import checkpoint, read_concept

    prompts, out = unique_prompts(load_prompts(options.prompts)), options.out
    # User errors are raised before torch is imported
    concepts = [read_concept(checkpoint(run, options.checkpoint)) for run in options.concepts]
    from align.collect.sample import sample_pairs
    from align.pairs.records import SAMPLES

    new_images = sample_pairs(prompts, out, options, concepts=concepts)
    image_count = len(prompts) * options.count
    images, prompt_count = format_count(image_count, "image"), format_count(len(prompts), "prompt")
    notify(f"{images} of {prompt_count} in {out} ({new_images} new).{describe_next(prompts, options)}")
    if options.as_json and is_main_rank():
        print_json({"folder": out, "images": image_count, "new": new_images, **read_json(out / SAMPLES)})


def describe_next(prompts: list[Prompt], options: SampleOptions) -> str:
    """The next command after sampling, if there is anything to choose between."""
    if options.count == 1 and not any(prompt.hard_negatives for prompt in prompts):
        return " With one image of a prompt there is nothing to choose between: draw more with --count."
    return f" Next: align label {quote(options.out)}"


@app.command()
def label(
    folder: Folder,
    user: Labeller = "",
    port: Port = 0,
    browser: Browser = True,
    seed: Annotated[
        int, option("--seed", help="Seed of the order of the pairs and of their sides.", panel=LABELLING)
    ] = 0,
) -> None:
    """Choose between images on a page in your browser: blind, with the arrow keys."""
    from align.collect.label.server import serve
    from align.collect.label.session import Session, leave_out_unreadable, list_label_pairs, lock_folder
    from align.pairs.samples import read_samples

    prompts, pictures = read_samples(folder)
    with lock_folder(folder):
        readable = leave_out_unreadable(folder, pictures)
        pairs = list_label_pairs([prompt.text for prompt in prompts], readable, seed=seed)
        session = Session(folder, pairs, seed=seed, user=user)
        serve(session, port=port, browser=browser)
        agreement, repeats = session.agreement
        agreement_text = f" You agreed with yourself on {agreement} of {repeats} repeats." if repeats else ""
        next_step = f" Next: align train {quote(folder)}" if session.answered else ""
        notify(f"{session.answered} of {len(session.pairs)} pairs have an answer.{agreement_text}{next_step}")


@app.command()
def rank(
    folder: Folder,
    scorer: Scorers = ["moji"],  # noqa: B006 (typer copies it)
    weight: Annotated[
        list[float] | None,
        option(
            "--weight",
            help="One for each scorer, in their order.",
            panel=flags.SCORING,
            show_default="1 each",
        ),
    ] = None,
    pareto: Annotated[
        bool,
        option("--pareto", help="Keep only pairs on whose order all scorers agree.", panel=PAIRS),
    ] = False,
    rules: Annotated[
        list[str],
        option(
            "--rule",
            "--pairs",
            metavar="RULE",
            help="best-worst: of each prompt the best and the worst image; all: all pairs; own: all without hard "
            "negatives; same-noise: each hard negative with the prompt's own image from the same noise; "
            "best-hard-negative: with its best ones. Repeatable.",
            panel=PAIRS,
        ),
    ] = ["best-worst"],  # noqa: B006 (typer copies it)
    margin: Annotated[
        float,
        option(
            "--margin",
            min=0,
            help="The least difference; of several scorers, in their standard deviations.",
            panel=PAIRS,
        ),
    ] = 0.0,
) -> None:
    """Let scorers choose: pairs of each prompt's images, the better-scored one preferred."""
    from align.pairs.samples import read_samples

    for rule in rules:
        if rule not in RULES:
            raise UserError(f"There is no rule {rule} for pairs. Choose one of {', '.join(RULES)}.")
    for flag, value in (("--weight", weight), ("--pareto", pareto)):
        if value and len(scorer) == 1:
            raise UserError(f"{flag} has no effect with one scorer. Leave it out, or add another --scorer.")
    prompts, _ = read_samples(folder)  # mistakes are answered before torch is imported
    from align.collect.rank import rank_samples

    count = rank_samples(
        folder, scorer, weights=weight or (), rules=cast(list[Rule], rules), margin=margin, agree=pareto
    )
    pairs, prompt_count = format_count(count, "pair"), format_count(len(prompts), "prompt")
    notify(f"{pairs} of {prompt_count} by {', '.join(scorer)}. Next: align train {quote(folder)}")


@app.command()
def check(
    source: Source,
    user: User = None,
    limit: Limit = None,
    split: Split = None,
    model: Annotated[
        str | None,
        option(
            "--model",
            "--pretrained-model-name-or-path",
            metavar="MODEL",
            help="Also check whether this model drew the images.",
            panel=flags.MODEL,
            show_default="not asked",
        ),
    ] = None,
    as_json: flags.Json = False,
) -> None:
    """Open every image of a source of pairs and list all that is wrong, a line each."""
    from align.pairs.read import read_preferences
    from align.pairs.records import (
        check_preferences,
        describe_doubts,
        describe_records,
        describe_shared_images,
        refuse_another_model,
        select_records,
        split_held_out,
    )

    preferences = check_preferences(read_preferences(source, user=user, limit=limit, split=split))
    if model is not None:
        from backbone.models.model import Backbone

        refuse_another_model(preferences, Backbone.open(model))
    by_pairs = bool(preferences.pairs)
    records = select_records(preferences, by_pairs=by_pairs, ties=False)
    train, held_out = split_held_out(records, share=0.1, seed=0)
    notify(f"{preferences.source} holds {describe_records(preferences.records)}.")
    left_out = preferences.describe_left_out(by_pairs=by_pairs, ties=False)
    shared_images = describe_shared_images(train, held_out)
    for sentence in filter(None, (*describe_doubts(preferences.records), left_out, shared_images)):
        notify(sentence)
    notify(
        f"With --held-out 0.1{'' if by_pairs else ' and --loss kto'} it would train on {describe_records(train)} and "
        f"hold out {describe_records(held_out)}."
    )
    if as_json:
        print_json(
            {
                "source": preferences.source,
                "records": len(preferences.records),
                "pairs": len(preferences.pairs),
                "without_label": preferences.skipped,
                "train": len(train),
                "held_out": len(held_out),
            }
        )


@app.command()
def export(
    source: Source,
    out: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="FILE.parquet (Pick-a-Pic's columns) or FILE.jsonl (images beside it)."
        ),
    ],
    user: User = None,
    limit: Limit = None,
    split: Split = None,
    skip_bad: SkipBad = False,
) -> None:
    """Write pairs from any source for other tools; a source is never changed."""
    from align.pairs.export import write_jsonl, write_parquet
    from align.pairs.read import read_preferences
    from align.pairs.records import check_preferences, describe_records

    write = {".parquet": write_parquet, ".jsonl": write_jsonl}.get(out.suffix.lower())
    if write is None:
        raise UserError(
            f"{out} would be a {out.suffix or 'file without an ending'}. Name a .parquet or a .jsonl file."
        )
    refuse_existing(out)
    refuse_unwritable(out.parent)
    preferences = check_preferences(
        read_preferences(source, user=user, limit=limit, split=split), skip_bad=skip_bad
    )
    write(preferences, out)
    notify(f"{describe_records(preferences.records)} in {out}.")


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of align train.")],
    source: Annotated[
        str | None,
        typer.Argument(metavar="SOURCE", help=SOURCE_HELP, show_default="the run's own held-out pairs"),
    ] = None,
    draws: Annotated[
        int, option("--draws", min=1, help="Noise samples of each pair.", panel=flags.SCORING)
    ] = 8,
    model: flags.RunsModel = None,
    skip_bad: SkipBad = False,
    as_json: flags.Json = False,
) -> None:
    """Measure how often a run tells preferred images apart, at fixed draws, with a bootstrap interval."""
    from align.settings import read_settings

    settings = read_settings(run_folder)  # mistakes are answered before torch is imported
    settings = settings if model is None else replace(settings, model=model)
    from align.settings import EVALUATION
    from align.training.evaluate import evaluate_run

    summary = evaluate_run(run_folder, settings, source=source, draws=draws, skip_bad=skip_bad)
    if as_json:
        print_json(read_json(run_folder / EVALUATION))
    else:
        typer.echo(summary)


@dataclass(frozen=True, kw_only=True)
class CompareOptions(ComparisonSettings, PromptOptions):
    """Options of `align compare`."""

    base: Annotated[
        str, Option("moji, another model, or a run folder.", DRAWING, argument=True, metavar="BASE")
    ]
    tuned: Annotated[
        str,
        Option(
            "What is compared with BASE: a run of align train, as in align compare moji runs/taste, or another model.",
            DRAWING,
            argument=True,
            metavar="TUNED",
        ),
    ]
    model: Annotated[str | None, RUNS_MODEL] = None
    out: Annotated[
        Path,
        Option("The folder to write, or to resume.", OUTPUT, aliases=("output-dir",), metavar="FOLDER"),
    ] = Path("compare")
    tuned_guidance: Annotated[
        float | None, Option("Guidance scale of the tuned model.", SAMPLING, default_text="--guidance", min=0)
    ] = None
    tuned_guidance_start: Annotated[
        float | None,
        Option(
            "Share of the steps before the tuned model's guidance begins.",
            SAMPLING,
            default_text="--guidance-start",
            min=0,
            max=1,
        ),
    ] = None
    tuned_guidance_stop: Annotated[
        float | None,
        Option(
            "Share of the steps after which the tuned model's guidance ends.",
            SAMPLING,
            default_text="--guidance-stop",
            min=0,
            max=1,
        ),
    ] = None
    blind: Annotated[bool, Option("Then choose yourself, on the page of align label.", LABELLING)] = False
    user: Annotated[str, Option("Who chooses, with --blind.", LABELLING, needs={"blind": (True,)})] = ""
    port: Annotated[
        int,
        Option(
            "Port of the labelling page; 0: any free one.",
            LABELLING,
            needs={"blind": (True,)},
            min=0,
            max=65535,
        ),
    ] = 0
    browser: Annotated[
        bool, Option("Open the page, where there is a screen.", LABELLING, needs={"blind": (True,)})
    ] = True


@settled_command(app, CompareOptions, panels=(DRAWING, SAMPLING, SCORING, LABELLING))
def compare(options: CompareOptions) -> None:
    """Draw the same prompts from the same noise with two models, and count wins, with intervals."""
    prompts, out = unique_prompts(load_prompts(options.prompts)), options.out
    if options.blind:  # the page's requirements are checked before anything is sampled
        from backbone.io.local_server import check_port

        check_port(options.port)
    from align.comparison.compare import RESULT, compare_models
    from align.comparison.report import format_summary
    from align.comparison.sides import make_sides

    base, tuned = make_sides(options.base, options.tuned, options.model)
    tuned = replace(
        tuned,
        guidance=options.tuned_guidance,
        guided=(options.tuned_guidance_start, options.tuned_guidance_stop),
    )
    result = compare_models(base, tuned, prompts, out, options)
    table = read_json(out / RESULT)
    if not options.as_json:
        typer.echo(format_summary(result))
    notify(f"{out}/report.html shows images side by side.")
    if options.blind:
        table["blind"] = _choose_blind(prompts, options)
    if options.as_json:
        print_json(table)


def _choose_blind(prompts: list[Prompt], options: CompareOptions) -> dict[str, Any]:
    """Serve the page on which a person compares the images, and return the choices."""
    from align.collect.label.server import serve
    from align.collect.label.session import LabelPair, Session, lock_folder
    from align.comparison.blind import format_blind_result, iterate_blind_pairs, write_blind_result

    with lock_folder(options.out):
        pairs = [LabelPair(*names) for names in iterate_blind_pairs(prompts, options.count, options.scale[0])]
        session = Session(options.out, pairs, seed=options.seed, user=options.user)
        serve(session, port=options.port, browser=options.browser)
    choices = write_blind_result(options.out)
    if not options.as_json:
        typer.echo(format_blind_result(choices))
    return choices


train_cli.register(app)

if __name__ == "__main__":
    main()
