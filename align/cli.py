"""The command `align`: draw pictures, choose between them, train on the choices, compare."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, cast, get_args

import typer

from align.train import cli as train_cli
from backbone.io.console import UserError, run, say

app = typer.Typer(
    help="Tune a diffusion model to preferences: yours, or a scorer's.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"token_normalize_func": train_cli.hyphens},
)

Rule = Literal[
    "best-worst", "all", "own", "same-noise", "best-hard-negative"
]  # `align.collect.rank` has what they pair
RULES = get_args(Rule)
Sampler = Literal["ddim", "heun", "ancestral"]
Folder = Annotated[Path, typer.Argument(help="A folder of align sample.")]
Source = Annotated[str, typer.Argument(help=train_cli.SOURCE_HELP)]
Scorers = Annotated[
    list[str],
    typer.Option("--scorer", help="moji, a CLIP folder, like:PICTURES, or a file.py; repeatable."),
]
Steps = Annotated[
    int | None, typer.Option("--steps", "--num-inference-steps", min=1, show_default="by model")
]
Guidance = Annotated[
    float | None,
    typer.Option("--guidance", "--guidance-scale", min=0, help="1: none.", show_default="by model"),
]
GuidanceStart = Annotated[
    float,
    typer.Option("--guidance-start", min=0, max=1, help="The share of the steps before guidance begins."),
]
GuidanceStop = Annotated[
    float, typer.Option("--guidance-stop", min=0, max=1, help="The share of the steps after which it ends.")
]


def main() -> None:
    """The console script."""
    run(app)


@app.command()
def sample(
    prompts: Annotated[
        Path, typer.Option("--prompts", help="A prompt on each line, or JSON lines with prompt and category.")
    ],
    out: Annotated[Path, typer.Option(help="The folder to write, or to go on with.")],
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, help="Pictures of each prompt.")] = 4,
    model: train_cli.Model = None,
    concept: train_cli.Concepts = None,
    steps: Steps = None,
    guidance: Guidance = None,
    guidance_start: GuidanceStart = 0.0,
    guidance_stop: GuidanceStop = 1.0,
    redraw: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="After the first, a prompt's pictures are that one noised again and drawn anew in this share of the "
            "steps: one layout, other details. 0: each from its own noise.",
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Picture (i, j) depends on the seed, i and j only.")] = 0,
    negative: Annotated[
        str, typer.Option("--negative", "--negative-prompt", help="What to stay away from.")
    ] = "",
    sampler: Annotated[Sampler, typer.Option(help="How noise is walked down.")] = "ddim",
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 8,
    precision: train_cli.Precision = None,
    device: train_cli.Device = None,
) -> None:
    """Draw several pictures of each prompt, to choose between."""
    from align.pairs.prompts import read_prompts
    from backbone.adapters.concept import read_concept

    asked = read_prompts(prompts)
    for folder in concept or []:
        read_concept(folder)  # mistakes are answered before torch is imported
    from align.collect.sample import SamplingSettings, sample_pairs

    drawn = sample_pairs(
        asked,
        out,
        model=model,
        concepts=concept or [],
        per_prompt=per_prompt,
        sampling=SamplingSettings(
            steps, guidance, seed, sampler, negative, batch, guidance_start, guidance_stop, redraw
        ),
        device=device or "auto",
        precision=precision or "auto",
    )
    whole = len(asked) * per_prompt
    say(f"{whole} pictures of {len(asked)} prompts in {out} ({drawn} new). Next: align label {out}")


@app.command()
def label(
    folder: Folder,
    user: Annotated[
        str, typer.Option(help="Who chooses; align train --user then trains on one person.")
    ] = "",
    seed: Annotated[int, typer.Option(help="Of the order and the sides.")] = 0,
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one.")] = 0,
) -> None:
    """Choose between pictures on a page in your browser: blind, with the arrow keys."""
    from align.collect.label.server import serve
    from align.collect.label.session import Session, list_label_pairs, lock_folder
    from align.pairs.samples import read_samples

    prompts, pictures = read_samples(folder)
    with lock_folder(folder):
        session = Session(
            folder,
            list_label_pairs([prompt.text for prompt in prompts], pictures, seed=seed),
            seed=seed,
            user=user,
        )
        serve(session, port=port)
        agreement, repeats = session.agreement
        said = f" You agreed with yourself on {agreement} of {repeats} repeats." if repeats else ""
        say(
            f"{session.answered} of {len(session.pairs)} pairs have an answer.{said} Next: align train {folder}"
        )


@app.command()
def rank(
    folder: Folder,
    scorer: Scorers = ["moji"],  # noqa: B006 (typer copies it)
    weight: Annotated[
        list[float] | None,
        typer.Option("--weight", help="One for each scorer, in their order.", show_default="1 each"),
    ] = None,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="Keep only pairs on whose order all scorers agree.")
    ] = False,
    rules: Annotated[
        list[str],
        typer.Option(
            "--pairs",
            metavar="[" + "|".join(RULES) + "]",
            help="Of each prompt the best and the worst picture, all pairs, all without hard negatives (own), or near "
            "misses: each with the prompt's own picture from the same noise, or with its best ones. Repeatable.",
        ),
    ] = ["best-worst"],  # noqa: B006 (typer copies it)
    margin: Annotated[
        float,
        typer.Option(
            "--margin", min=0, help="The least difference; of several scorers, in their standard deviations."
        ),
    ] = 0.0,
) -> None:
    """Let scorers choose: pairs of each prompt's pictures, the better-scored one preferred."""
    from align.pairs.samples import read_samples

    for rule in rules:
        if rule not in RULES:
            raise UserError(f"There is no rule {rule} for --pairs. Choose one of {', '.join(RULES)}.")
    prompts, _ = read_samples(folder)  # mistakes are answered before torch is imported
    from align.collect.rank import rank_samples

    count = rank_samples(
        folder, scorer, weights=weight or (), rules=cast(list[Rule], rules), margin=margin, agree=pareto
    )
    say(f"{count} pairs of {len(prompts)} prompts by {', '.join(scorer)}. Next: align train {folder}")


@app.command()
def check(
    source: Source,
    user: train_cli.User = None,
    limit: train_cli.Limit = None,
    split: train_cli.Split = "train",
    model: Annotated[
        str | None,
        typer.Option("--model", help="Also whether this model drew them.", show_default="not asked"),
    ] = None,
) -> None:
    """Open every picture of a source of pairs and list all that is wrong, a line each."""
    from align.pairs.read import read_preferences
    from align.pairs.records import check_preferences, describe_records, refuse_another_model, split_held_out

    found = check_preferences(read_preferences(source, user=user, limit=limit, split=split))
    if model is not None:
        from backbone.models.model import Backbone

        refuse_another_model(found, model, Backbone.open(model).fingerprint)
    learn, out = split_held_out(found.records, share=0.1, seed=0)
    say(f"{found.source} holds {describe_records(found.records)}; {found.skipped} more have no label.")
    say(
        f"With --held-out 0.1 it would train on {describe_records(learn)} and hold out {describe_records(out)}."
    )


@app.command()
def export(
    source: Source,
    out: Annotated[
        Path, typer.Argument(help="FILE.parquet (Pick-a-Pic's columns) or FILE.jsonl (pictures beside it).")
    ],
    user: train_cli.User = None,
    limit: train_cli.Limit = None,
    split: train_cli.Split = "train",
    skip_bad: train_cli.SkipBad = False,
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
    if out.exists() and out.resolve() == Path(source).expanduser().resolve():
        raise UserError(f"{out} is the source itself. Choose another name.")
    found = check_preferences(
        read_preferences(source, user=user, limit=limit, split=split), skip_bad=skip_bad
    )
    write(found, out)
    say(f"{describe_records(found.records)} in {out}.")


@app.command()
def evaluate(
    run_folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run folder of align train.")],
    source: Annotated[
        str | None, typer.Argument(help=train_cli.SOURCE_HELP, show_default="the run's own held-out pairs")
    ] = None,
    draws: Annotated[int, typer.Option(min=1, help="Noise draws of each pair.")] = 8,
    skip_bad: train_cli.SkipBad = False,
) -> None:
    """Measure how often a run tells preferred pictures apart, at fixed draws, with a bootstrap interval."""
    from align.settings import read_settings

    settings = read_settings(run_folder)  # mistakes are answered before torch is imported
    from align.train.evaluate import evaluate_taste

    typer.echo(evaluate_taste(run_folder, settings, source=source, draws=draws, skip_bad=skip_bad))


@app.command()
def compare(
    base: Annotated[str, typer.Argument(help="moji, another model, or a run folder.")],
    tuned: Annotated[str, typer.Argument(help="A run folder of align train, or another model.")],
    prompts: Annotated[
        Path, typer.Option("--prompts", help="A prompt on each line, or JSON lines with prompt and category.")
    ],
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, help="Pictures of each prompt.")] = 2,
    scorer: Scorers = ["moji"],  # noqa: B006 (typer copies it)
    scale: Annotated[
        list[float] | None,
        typer.Option(
            "--scale", help="Also the tuned side at this strength; repeatable.", show_default="none"
        ),
    ] = None,
    tie: Annotated[
        float, typer.Option("--tie", min=0, help="Scores that differ by no more than this are even.")
    ] = 0.0,
    blind: Annotated[
        bool, typer.Option("--blind", help="Then choose yourself, on the page of align label.")
    ] = False,
    user: Annotated[str, typer.Option(help="Who chooses, with --blind.")] = "",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: a free one, with --blind.")] = 0,
    steps: Steps = None,
    guidance: Guidance = None,
    tuned_guidance: Annotated[
        float | None,
        typer.Option("--tuned-guidance", min=0, help="Of the tuned side.", show_default="--guidance"),
    ] = None,
    tuned_scale: Annotated[
        float, typer.Option("--tuned-scale", min=0, help="How strongly the tuned side's training works.")
    ] = 1.0,
    guidance_start: GuidanceStart = 0.0,
    guidance_stop: GuidanceStop = 1.0,
    tuned_guidance_start: Annotated[
        float | None,
        typer.Option(
            "--tuned-guidance-start", min=0, max=1, help="Of the tuned side.", show_default="--guidance-start"
        ),
    ] = None,
    tuned_guidance_stop: Annotated[
        float | None,
        typer.Option(
            "--tuned-guidance-stop", min=0, max=1, help="Of the tuned side.", show_default="--guidance-stop"
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Both sides begin with the same noise.")] = 0,
    negative: Annotated[
        str, typer.Option("--negative", "--negative-prompt", help="What to stay away from.")
    ] = "",
    sampler: Annotated[Sampler, typer.Option(help="How noise is walked down.")] = "ddim",
    batch: Annotated[int, typer.Option(min=1, help="Pictures drawn together.")] = 8,
    out: Annotated[Path, typer.Option(help="The folder to write, or to go on with.")] = Path("compare"),
    precision: train_cli.Precision = None,
    device: train_cli.Device = None,
) -> None:
    """Draw the same prompts from the same noise with two models, and count wins, with intervals."""
    from align.pairs.prompts import read_prompts

    asked = read_prompts(prompts)  # mistakes are answered before torch is imported
    from align.collect.sample import SamplingSettings
    from align.compare.compare import compare_models
    from align.compare.report import format_summary
    from align.compare.sides import Side

    start = guidance_start if tuned_guidance_start is None else tuned_guidance_start
    stop = guidance_stop if tuned_guidance_stop is None else tuned_guidance_stop
    result = compare_models(
        Side.from_name(base),
        replace(Side.from_name(tuned), scale=tuned_scale, guidance=tuned_guidance, guided=(start, stop)),
        asked,
        out,
        per_prompt=per_prompt,
        sampling=SamplingSettings(
            steps, guidance, seed, sampler, negative, batch, guidance_start, guidance_stop
        ),
        scorers=scorer,
        scales=scale or (),
        tie=tie,
        device=device or "auto",
        precision=precision or "auto",
    )
    typer.echo(format_summary(result))
    say(f"{out}/report.html shows pictures side by side.")
    if blind:
        from align.collect.label.server import serve
        from align.collect.label.session import LabelPair, Session, lock_folder
        from align.compare.blind import format_blind_result, iterate_blind_pairs, write_blind_result

        with lock_folder(out):
            pairs = [LabelPair(*names) for names in iterate_blind_pairs(asked, per_prompt, tuned_scale)]
            serve(Session(out, pairs, seed=seed, user=user), port=port)
        typer.echo(format_blind_result(write_blind_result(out)))


app.command(name="train")(train_cli.train)

if __name__ == "__main__":
    main()
