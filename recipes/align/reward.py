"""The gradient of the embedded scorer makes `moji` follow hard prompts, without pairs; measured by the classifier.

    python -m recipes.align.reward                     training and comparison; times in the table

Prompts, scorer, classifier and goal are those of `recipes.align.prompt_fidelity`: 8 points more images all right, at
0.9 of the base's diversity. There a loss learns from how the scorer ranks images; here DRaFT (Clark et al. 2024)
follows the gradient of the score itself, through the decoder and the last steps of the sampler. A model that is trained
on a scorer exploits it, so the scorer's win rate proves nothing here, and a second row measures whether other prompts
have suffered. The steps, and the tuned model's scale and guidance, were chosen on development prompts
(`benchmarks/results/align.md`); --development evaluates on these.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.io.console import notify, run_app
from backbone.io.files import write_json, write_text
from recipes.align.prompts import (
    COMPARISON,
    PROMPTS,
    STEPS,
    TRAINING,
    TRAINING_PROMPTS,
    RecipeSettings,
    is_hard,
    is_unstyled,
    select_scenes,
    write_prompts,
)

if TYPE_CHECKING:
    from recipes.align.experiment import Comparison

BUDGET = (
    "--train-batch-size", 8, "--lr-scheduler", "cosine", "--reward-steps", 5, "--sample-steps", STEPS[1],
)  # fmt: skip
KINDS = {"hard prompts": is_hard, "any prompts": is_unstyled}

app = script_app()


@dataclass(frozen=True, kw_only=True)
class RewardSettings(RecipeSettings):
    """Settings of the recipe."""

    prompts: Annotated[int, Option("Prompts to learn from.", PROMPTS, min=2)] = 600
    scorer: Annotated[
        str, Option("The reward to maximise; it must be a differentiable network.", TRAINING)
    ] = "moji"
    steps: Annotated[int, Option("Optimiser steps, of eight pictures each.", TRAINING, min=1)] = 85
    learning_rate: Annotated[float, Option("Peak learning rate.", TRAINING, min=0)] = 8e-4
    name: str = "draft"
    scale: Annotated[float, Option("LoRA scale of the tuned model.", COMPARISON, min=0)] = 0.7
    guidance: Annotated[
        float,
        Option(
            "Guidance scale of the tuned model's pictures; the base model keeps its own.", COMPARISON, min=0
        ),
    ] = 2.5
    bound: Annotated[
        bool, Option("Also print the reward of rendered pictures; needs the emoji font.", COMPARISON)
    ] = False
    out: Path = Path("build/recipes/reward")


@settled_command(app, RewardSettings)
def main(settings: RewardSettings) -> None:
    """Trains, compares on hard prompts and on any, and writes the table."""
    from benchmarks.judges.classifier import load_classifier
    from recipes.align.experiment import (
        ComparisonSettings,
        compare_with_base,
        find_base_images,
        format_table,
        measure_upper_bound,
        train,
    )

    classifier, out, name = load_classifier(), settings.out, settings.name
    learn = select_scenes(TRAINING_PROMPTS, settings.prompts, is_hard)
    run_folder, training = train(
        out, name, "--online", settings.scorer, "--loss-type", "draft",
        "--prompts", write_prompts(out / "prompts.jsonl", learn), "--model", settings.model,
        "--steps", settings.steps, "--learning-rate", settings.learning_rate, *BUDGET, *settings.flags.split(),
    )  # fmt: skip
    seeds, subfolder = settings.evaluation
    comparison_settings = ComparisonSettings(
        model=settings.model,
        scorers=["moji"],
        guidance=("--tuned-guidance", settings.guidance),
        scale=settings.scale,
    )
    bounds: list[str] = []
    rows: list[tuple[str, Comparison, dict[str, object]]] = []
    for kind, accepts in KINDS.items():
        test = select_scenes(seeds, settings.held_out, accepts, excluded=learn)
        pictures = out / f"{subfolder}-{kind.split()[0]}"
        base = find_base_images(pictures)
        comparison = compare_with_base(
            run_folder, test, classifier, comparison_settings, out=pictures / name, base_images=base
        )
        rows.append((f"{name}, {kind}", comparison, {"training": training}))
        if settings.bound:
            bounds.append(f"{kind}: {measure_upper_bound(test, classifier, settings.model, pictures / name)}")
        write_text(out / "table.md", "\n\n".join([format_table(rows), *bounds]) + "\n")
        facts = {"flags": settings.flags, "prompts": settings.prompts, "held_out": settings.held_out}
        write_json(out / "table.json", {"rows": rows, **facts})
    print("\n\n".join([format_table(rows), *bounds]))
    notify(f"{out}/table.md holds the table.")


if __name__ == "__main__":
    run_app(app)
