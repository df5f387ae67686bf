"""Pairs ranked by the embedded scorer make `moji` follow hard prompts better, measured by the independent classifier.

    python -m recipes.align.prompt_fidelity            sampling and ranking, then each training; times in the table
    python -m recipes.align.prompt_fidelity --loss-type dpo --loss-type ipo --loss-type kto --loss-type mapo
        --loss-type sft --loss-type sdpo               the losses under one budget, on the same pairs
    python -m recipes.align.prompt_fidelity --prompts-of crowded --out build/recipes/crowded

A hard prompt names a coloured thing that wears something. `moji` samples four images of each and, from the noise of
three of them, hard negatives: without the colour, without the accessory, of another thing. The embedded scorer ranks
every image against its hard negative, and every two images of the prompt, and they become a pair where their scores
differ by more than the margin (`--pairs-of` chooses the rules). Prompts, rules, margin, settings and guidance were
chosen on training and development prompts (`benchmarks/results/align.md`). Hard negatives teach what guidance does, so
the tuned model is sampled with less of it: none in the first fifth of the steps, where it costs diversity. The base is
measured twice: with its own guidance in all steps, which is best for it, and with the tuned model's.
It should show: attribute accuracy on held-out prompts rises by 8 points or more with an interval clear of zero, and
diversity stays above 0.9 of the base's. --development evaluates on other prompts, on which settings are chosen.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from backbone.io.console import notify, run_app
from backbone.io.files import write_json, write_text
from backbone.world.scene import Scene
from benchmarks.classifier import load_classifier
from recipes.align.experiment import (
    TRAINING_PROMPTS,
    Comparison,
    Development,
    Flags,
    Model,
    Out,
    compare_with_base,
    evaluation_split,
    find_base_images,
    format_table,
    is_crowded,
    is_hard,
    measure_ranking,
    sample_and_rank,
    select_scenes,
    train,
)

Kind = Literal["hard", "crowded"]
KINDS: dict[Kind, Callable[[Scene], bool]] = {"hard": is_hard, "crowded": is_crowded}
BETA = ("--beta", 2000)
WITHOUT = (*BETA, "--safeguard", "-1")
LOSSES = {
    "sdpo": ("dpo", *BETA, "--safeguard", "0.5"),  # Diffusion-SDPO is DPO with its safeguard
    "mapo": ("mapo", *WITHOUT, "--beta", 500),  # as its authors have it
    "ipo": ("ipo", *WITHOUT, "--beta", 200),  # at 2000 it stands still
    "kto": ("kto", *BETA),  # knows no pairs
    "sft": ("sft",),  # knows no reference
}
BUDGET = (
    "--steps", 900, "--train-batch-size", 8, "--learning-rate", 1e-4, "--lr-scheduler", "cosine",
    "--evaluation-steps", 300,
)  # fmt: skip


def main(
    prompts_of: Annotated[Kind, typer.Option(help="What is hard about the prompts.")] = "hard",
    pairs: Annotated[int, typer.Option(min=2, help="Prompts to draw.")] = 232,
    per_prompt: Annotated[int, typer.Option(min=2, help="Pictures of each.")] = 4,
    scorer: Annotated[str, typer.Option(help="What ranks them.")] = "moji",
    rules: Annotated[
        list[str] | None,
        typer.Option("--pairs-of", help="As align rank --pairs; repeatable.", show_default="same-noise, own"),
    ] = None,
    margin: Annotated[float, typer.Option(min=0, help="Pairs that differ by no more are left out.")] = 0.06,
    loss: Annotated[
        list[str] | None,
        typer.Option("--loss-type", help="Repeatable; sdpo is dpo with the safeguard.", show_default="sdpo"),
    ] = None,
    held_out: Annotated[int, typer.Option(min=2, help="Held-out prompts, two images of each.")] = 300,
    guidance: Annotated[
        float, typer.Option(min=0, help="Of the tuned model's pictures; the base's own stays as it is.")
    ] = 4.0,
    guidance_start: Annotated[
        float,
        typer.Option("--guidance-start", min=0, max=1, help="Of the same: the share of the steps before it."),
    ] = 0.2,
    flags: Flags = "",
    name: Annotated[str, typer.Option(help="Of runs with other flags, on the same pairs.")] = "",
    only_rank: Annotated[
        bool, typer.Option("--only-rank", help="Draw, rank, say how right the order is, and stop.")
    ] = False,
    development: Development = False,
    model: Model = "moji",
    out: Out = Path("build/recipes/prompt_fidelity"),
) -> None:
    """Draws, ranks, trains once for each loss, compares, and writes the table."""
    classifier = load_classifier()
    wanted = KINDS[prompts_of]
    learn = select_scenes(TRAINING_PROMPTS, pairs, wanted)
    seeds, where = evaluation_split(development)
    test = select_scenes(seeds, held_out, wanted, without=learn)
    folder, seconds = sample_and_rank(
        out,
        learn,
        model=model,
        per_prompt=per_prompt,
        scorer=scorer,
        rules=rules or ["same-noise", "own"],
        margin=margin,
    )
    order = measure_ranking(folder, learn, classifier)
    notify(str(order))
    write_json(out / "order.json", order)
    if only_rank:
        return
    rows: list[tuple[str, Comparison, dict[str, object]]] = []
    tuned_flags: tuple[object, ...] = ("--tuned-guidance", guidance)
    both_flags: tuple[object, ...] = ("--guidance", guidance)
    setting = f"at guidance {guidance:g}"
    if guidance_start:
        tuned_flags += ("--tuned-guidance-start", guidance_start)
        both_flags += ("--guidance-start", guidance_start)
        setting += f" from {guidance_start:.0%} of the steps on"
    base, alike = find_base_images(out / where), find_base_images(out / f"{where}-alike")
    for which in loss or ["sdpo"]:
        kind, *more = LOSSES.get(which, (which, *WITHOUT))
        label = f"{which}-{name}" if name else which
        run_folder, training = train(
            out, label, folder, "--model", model, "--loss-type", kind, *BUDGET, *more, *flags.split()
        )
        times: dict[str, object] = {**seconds, "training": training}
        against = partial(
            compare_with_base, run_folder, test, classifier, model=model, per_prompt=2, scorers=["moji"]
        )
        place = out / where / label
        comparison = against(out=place, base_images=base, guidance=tuned_flags)
        base = base or place / "base"
        rows.append((label, comparison, times))
        tuned, place = place / "tuned", out / f"{where}-alike" / label
        comparison = against(out=place, base_images=alike, tuned_images=tuned, guidance=both_flags)
        alike = alike or place / "base"
        rows.append((f"{label}, both {setting}", comparison, times))
        write_text(out / "table.md", f"{format_table(rows)}\n\n{order}\n")
        write_json(out / "table.json", {"rows": rows, "flags": flags, "pairs": pairs, "held_out": held_out})
    print(format_table(rows))
    notify(f"{out}/table.md holds the table.")


if __name__ == "__main__":
    run_app(lambda: typer.run(main))
