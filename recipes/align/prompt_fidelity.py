"""Pairs that the embedded scorer ranks make `moji` follow hard prompts better: the independent judge counts it.

    python -m recipes.align.prompt_fidelity            sampling and ranking, then each training; times in the table
    python -m recipes.align.prompt_fidelity --loss-type dpo --loss-type ipo --loss-type kto --loss-type mapo
        --loss-type sft --loss-type sdpo               the losses under one budget, on the same pairs

Hard prompts name two different things, a colour or an accessory. `moji` draws four pictures of each, its scorer ranks
them, and the best and the worst become a pair. It should show: the judge's all-right share on held-out prompts rises
by 8 points or more with an interval clear of zero, and diversity stays above 0.9 of the base's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backbone.console import run, say
from backbone.files import write_json, write_text
from benchmarks.judge import load_judge
from recipes.align.journey import (
    HELD_OUT_PROMPTS,
    TRAINING_PROMPTS,
    Found,
    compared,
    drawn_and_ranked,
    hard,
    scenes,
    table,
    trained,
)

SAFEGUARDED = {"sdpo": ("dpo", "--safeguard", "0.9")}  # Diffusion-SDPO is DPO with its safeguard


def main(
    pairs: Annotated[int, typer.Option(min=2, help="Prompts, so at most so many pairs.")] = 400,
    per_prompt: Annotated[int, typer.Option(min=2, help="Pictures of each.")] = 4,
    scorer: Annotated[str, typer.Option(help="What ranks them.")] = "moji",
    margin: Annotated[float, typer.Option(min=0, help="Pairs that differ by no more are left out.")] = 0.0,
    loss: Annotated[
        list[str] | None,
        typer.Option("--loss-type", help="Repeatable; sdpo is dpo with the safeguard.", show_default="dpo"),
    ] = None,
    held_out: Annotated[int, typer.Option(min=2, help="Prompts to judge by, two pictures of each.")] = 300,
    flags: Annotated[str, typer.Option(help="More flags for align train, in one string.")] = "",
    model: Annotated[str, typer.Option(help="moji, or a diffusers folder.")] = "moji",
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("build/recipes/prompt_fidelity"),
) -> None:
    """Draws, ranks, trains once for each loss, compares, and writes the table."""
    judge = load_judge()
    learn = scenes(TRAINING_PROMPTS, pairs, hard)
    test = scenes(HELD_OUT_PROMPTS, held_out, hard, without=learn)
    folder, seconds = drawn_and_ranked(
        out, learn, model=model, per_prompt=per_prompt, scorer=scorer, margin=margin
    )
    rows: list[tuple[str, Found, dict[str, object]]] = []
    base = None
    for name in loss or ["dpo"]:
        kind, *more = SAFEGUARDED.get(name, (name,))
        run_folder, training = trained(
            out, name, folder, "--model", model, "--loss-type", kind, *more, *flags.split()
        )
        found = compared(
            run_folder, test, judge, model=model, per_prompt=2, scorers=["moji"], out=out / "compare" / name,
            base_pictures=base,
        )  # fmt: skip
        base = base or out / "compare" / name / "base"
        rows.append((name, found, {**seconds, "training": training}))
        write_text(out / "table.md", table(rows))
        write_json(out / "table.json", {"rows": rows, "flags": flags, "pairs": pairs, "held_out": held_out})
    print(table(rows))
    say(f"{out}/table.md holds the table.")


if __name__ == "__main__":
    run(lambda: typer.run(main))
