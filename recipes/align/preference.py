"""A stated preference, warm colours, learned from pairs: measurable without any model (mean red minus mean blue).

    python -m recipes.align.preference                                     one run on 500 pairs
    python -m recipes.align.preference --pairs 50 --pairs 100 --pairs 200 --pairs 500       how many are enough: a curve

The warmest of each prompt's four images is preferred to its coldest. It should show: from the same noise, the tuned
model's image is the warmer one on at least 80 % of held-out prompts, while attribute accuracy drops by at most 2 points
at the 95 % bound (n is at least 1,000 images a side).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.io.console import UserError, notify, run_app
from backbone.io.examples import EXAMPLES
from backbone.io.files import write_json, write_text
from recipes.align.prompts import (
    PROMPTS,
    TRAINING,
    TRAINING_PROMPTS,
    RecipeSettings,
    is_unstyled,
    select_scenes,
)

if TYPE_CHECKING:
    from recipes.align.experiment import Comparison

WARM = EXAMPLES / "warm.py"

app = script_app()


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings(RecipeSettings):
    """Settings of the recipe."""

    pairs: Annotated[
        tuple[int, ...], Option("How many pairs to learn from; repeatable.", TRAINING, min=2)
    ] = (500,)
    prompts: Annotated[int, Option("How many to draw; the pairs are of the first.", PROMPTS, min=2)] = 500
    per_prompt: Annotated[int, Option("Pictures of each prompt.", PROMPTS, min=2)] = 4
    loss: Annotated[str, Option("Loss, as for align train.", TRAINING, flag="loss-type")] = "dpo"
    held_out: int = 500
    out: Path = Path("build/recipes/preference")


@settled_command(app, PreferenceSettings)
def main(settings: PreferenceSettings) -> None:
    """Draws, ranks by warmth, trains on each number of pairs, compares, and writes the table."""
    from benchmarks.judges.classifier import load_classifier
    from recipes.align.experiment import (
        ComparisonSettings,
        compare_with_base,
        find_base_images,
        format_table,
        sample_and_rank,
        train,
    )

    classifier, out = load_classifier(), settings.out
    if max(settings.pairs) > settings.prompts:
        raise UserError(
            f"{settings.prompts} prompts do not make {max(settings.pairs)} pairs. Raise --prompts."
        )
    learn = select_scenes(TRAINING_PROMPTS, settings.prompts, is_unstyled)
    seeds, subfolder = settings.evaluation
    test = select_scenes(seeds, settings.held_out, is_unstyled, excluded=learn)
    folder, seconds = sample_and_rank(
        out, learn, model=settings.model, per_prompt=settings.per_prompt, scorer=WARM
    )
    comparison_settings = ComparisonSettings(model=settings.model, scorers=[str(WARM), "moji"])
    rows: list[tuple[str, Comparison, dict[str, object]]] = []
    for count in settings.pairs:
        run_folder, training = train(
            out, "-".join(filter(None, (settings.loss, str(count), settings.name))), folder,
            "--model", settings.model, "--limit", count, "--held-out", 0.1, "--loss-type", settings.loss,
            *settings.flags.split(),
        )  # fmt: skip
        comparison = compare_with_base(
            run_folder,
            test,
            classifier,
            comparison_settings,
            out=out / subfolder / run_folder.name,
            base_images=find_base_images(out / subfolder),
        )
        share = count / settings.prompts  # of the drawing and the ranking, which all sizes have in common
        times = {name: share * value for name, value in seconds.items()}
        rows.append((f"{count} pairs", comparison, {**times, "training": training}))
        write_text(out / "table.md", format_table(rows))
        facts = {"flags": settings.flags, "loss": settings.loss, "held_out": settings.held_out}
        write_json(out / "table.json", {"rows": rows, **facts})
    print(format_table(rows))
    notify(f"{out}/table.md holds the table.")


if __name__ == "__main__":
    run_app(app)
