"""A stated taste, warm colours, learned from pairs: it can be measured without any model (mean red minus mean blue).

    python -m recipes.align.taste                                     one run on 500 pairs
    python -m recipes.align.taste --pairs 50 --pairs 100 --pairs 200 --pairs 500       how many are enough: a curve

Each prompt's warmer picture of four is preferred to its coldest. It should show: the tuned model's picture is the
warmer one, from the same noise, on at least 80 % of held-out prompts, while the judge's all-right share is not lower by
more than 2 points at the 95 % bound (n is at least 1,000 pictures a side).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backbone.io.console import UserError, notify, run_app
from backbone.io.files import write_json, write_text
from benchmarks.judge import load_judge
from recipes.align.journey import (
    TRAINING_PROMPTS,
    Development,
    Flags,
    Found,
    Model,
    Out,
    base_of,
    compared,
    drawn_and_ranked,
    judged_by,
    plain,
    scenes,
    table,
    trained,
)

WARM = Path(__file__).with_name("warm.py")


def main(
    pairs: Annotated[
        list[int] | None,
        typer.Option(min=2, help="How many pairs to learn from; repeatable.", show_default="500"),
    ] = None,
    prompts: Annotated[int, typer.Option(min=2, help="How many to draw; the pairs are of the first.")] = 500,
    per_prompt: Annotated[int, typer.Option(min=2, help="Pictures of each prompt.")] = 4,
    loss: Annotated[str, typer.Option("--loss-type")] = "dpo",
    held_out: Annotated[int, typer.Option(min=2, help="Prompts to judge by, two pictures of each.")] = 500,
    flags: Flags = "",
    name: Annotated[str, typer.Option(help="Of runs with other flags, on the same pairs.")] = "",
    development: Development = False,
    model: Model = "moji",
    out: Out = Path("build/recipes/taste"),
) -> None:
    """Draws, ranks by warmth, trains on each number of pairs, compares, and writes the table."""
    judge, sizes = load_judge(), pairs or [500]
    if max(sizes) > prompts:
        raise UserError(f"{prompts} prompts do not make {max(sizes)} pairs. Raise --prompts.")
    learn = scenes(TRAINING_PROMPTS, prompts, plain)
    seeds, where = judged_by(development)
    test = scenes(seeds, held_out, plain, without=learn)
    folder, seconds = drawn_and_ranked(out, learn, model=model, per_prompt=per_prompt, scorer=WARM)
    rows: list[tuple[str, Found, dict[str, object]]] = []
    base = base_of(out / where)
    for count in sizes:
        limit = ("--limit", count, "--held-out", 0.1, "--loss-type", loss)
        run_folder, training = trained(
            out,
            "-".join(filter(None, (loss, str(count), name))),
            folder,
            "--model",
            model,
            *limit,
            *flags.split(),
        )
        place = out / where / run_folder.name
        found = compared(
            run_folder, test, judge, model=model, per_prompt=2, scorers=[str(WARM), "moji"], out=place,
            base_pictures=base,
        )  # fmt: skip
        base = base or place / "base"
        share = count / prompts  # of the drawing and the ranking, which all sizes have in common
        took = {name: share * value for name, value in seconds.items()}
        rows.append((f"{count} pairs", found, {**took, "training": training}))
        write_text(out / "table.md", table(rows))
        write_json(out / "table.json", {"rows": rows, "flags": flags, "loss": loss, "held_out": held_out})
    print(table(rows))
    notify(f"{out}/table.md holds the table.")


if __name__ == "__main__":
    run_app(lambda: typer.run(main))
