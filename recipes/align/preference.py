"""A stated preference, warm colours, learned from pairs: measurable without any model (mean red minus mean blue).

    python -m recipes.align.preference                                     one run on 500 pairs
    python -m recipes.align.preference --pairs 50 --pairs 100 --pairs 200 --pairs 500       how many are enough: a curve

The warmest of each prompt's four images is preferred to its coldest. It should show: from the same noise, the tuned
model's image is the warmer one on at least 80 % of held-out prompts, while attribute accuracy drops by at most 2 points
at the 95 % bound (n is at least 1,000 images a side).
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from backbone.io.console import UserError, notify, run_app
from backbone.io.files import write_json, write_text
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
    is_unstyled,
    sample_and_rank,
    select_scenes,
    train,
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
    held_out: Annotated[int, typer.Option(min=2, help="Held-out prompts, two images of each.")] = 500,
    flags: Flags = "",
    name: Annotated[str, typer.Option(help="Of runs with other flags, on the same pairs.")] = "",
    development: Development = False,
    model: Model = "moji",
    out: Out = Path("build/recipes/preference"),
) -> None:
    """Draws, ranks by warmth, trains on each number of pairs, compares, and writes the table."""
    classifier, sizes = load_classifier(), pairs or [500]
    if max(sizes) > prompts:
        raise UserError(f"{prompts} prompts do not make {max(sizes)} pairs. Raise --prompts.")
    learn = select_scenes(TRAINING_PROMPTS, prompts, is_unstyled)
    seeds, where = evaluation_split(development)
    test = select_scenes(seeds, held_out, is_unstyled, without=learn)
    folder, seconds = sample_and_rank(out, learn, model=model, per_prompt=per_prompt, scorer=WARM)
    rows: list[tuple[str, Comparison, dict[str, object]]] = []
    base = find_base_images(out / where)
    for count in sizes:
        limit = ("--limit", count, "--held-out", 0.1, "--loss-type", loss)
        run_folder, training = train(
            out,
            "-".join(filter(None, (loss, str(count), name))),
            folder,
            "--model",
            model,
            *limit,
            *flags.split(),
        )
        place = out / where / run_folder.name
        comparison = compare_with_base(
            run_folder, test, classifier, model=model, per_prompt=2, scorers=[str(WARM), "moji"], out=place,
            base_images=base,
        )  # fmt: skip
        base = base or place / "base"
        share = count / prompts  # of the drawing and the ranking, which all sizes have in common
        took = {name: share * value for name, value in seconds.items()}
        rows.append((f"{count} pairs", comparison, {**took, "training": training}))
        write_text(out / "table.md", format_table(rows))
        write_json(out / "table.json", {"rows": rows, "flags": flags, "loss": loss, "held_out": held_out})
    print(format_table(rows))
    notify(f"{out}/table.md holds the table.")


if __name__ == "__main__":
    run_app(lambda: typer.run(main))
