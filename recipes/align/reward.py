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

from pathlib import Path
from typing import Annotated

import typer

from backbone.io.console import notify, run_app
from backbone.io.files import write_json, write_text
from benchmarks.classifier import load_classifier
from recipes.align.experiment import (
    STEPS,
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
    is_hard,
    is_unstyled,
    measure_upper_bound,
    select_scenes,
    train,
    write_prompts,
)

BUDGET = (
    "--train-batch-size", 8, "--lr-scheduler", "cosine", "--reward-steps", 5, "--sample-steps", STEPS[1],
)  # fmt: skip
KINDS = {"hard prompts": is_hard, "any prompts": is_unstyled}


def main(
    prompts: Annotated[int, typer.Option(min=2, help="Prompts to learn from.")] = 600,
    scorer: Annotated[str, typer.Option(help="What is climbed; it must be a network.")] = "moji",
    steps: Annotated[int, typer.Option(min=1, help="Of eight pictures each.")] = 85,
    learning_rate: Annotated[float, typer.Option(min=0)] = 8e-4,
    held_out: Annotated[
        int, typer.Option(min=2, help="Held-out prompts of each kind, two images of each.")
    ] = 300,
    scale: Annotated[float, typer.Option(min=0, help="How strongly the tuned model's training works.")] = 0.7,
    guidance: Annotated[
        float, typer.Option(min=0, help="Of the tuned model's pictures; the base's own stays as it is.")
    ] = 2.5,
    flags: Flags = "",
    name: Annotated[str, typer.Option(help="Of runs with other flags.")] = "draft",
    development: Development = False,
    bound: Annotated[
        bool, typer.Option("--bound", help="Also say what true pictures come to; needs the emoji font.")
    ] = False,
    model: Model = "moji",
    out: Out = Path("build/recipes/reward"),
) -> None:
    """Trains, compares on hard prompts and on any, and writes the table."""
    classifier = load_classifier()
    learn = select_scenes(TRAINING_PROMPTS, prompts, is_hard)
    prompt_file = write_prompts(out / "prompts.jsonl", learn)
    run_folder, training = train(
        out, name, "--online", scorer, "--loss-type", "draft", "--prompts", prompt_file, "--model", model,
        "--steps", steps, "--learning-rate", learning_rate, *BUDGET, *flags.split(),
    )  # fmt: skip
    seeds, where = evaluation_split(development)
    bounds: list[str] = []
    rows: list[tuple[str, Comparison, dict[str, object]]] = []
    for kind, wanted in KINDS.items():
        test = select_scenes(seeds, held_out, wanted, without=learn)
        pictures = out / f"{where}-{kind.split()[0]}"
        comparison = compare_with_base(
            run_folder, test, classifier, model=model, per_prompt=2, scorers=["moji"], out=pictures / name,
            guidance=("--tuned-guidance", guidance), scale=scale, base_images=find_base_images(pictures),
        )  # fmt: skip
        rows.append((f"{name}, {kind}", comparison, {"training": training}))
        if bound:
            bounds.append(f"{kind}: {measure_upper_bound(test, classifier, model, pictures / name)}")
        write_text(out / "table.md", "\n\n".join([format_table(rows), *bounds]) + "\n")
        write_json(
            out / "table.json", {"rows": rows, "flags": flags, "prompts": prompts, "held_out": held_out}
        )
    print("\n\n".join([format_table(rows), *bounds]))
    notify(f"{out}/table.md holds the table.")


if __name__ == "__main__":
    run_app(lambda: typer.run(main))
