"""Pairs ranked by the embedded scorer make `moji` follow hard prompts better, measured by the independent classifier.

    python -m recipes.align.prompt_fidelity            sampling and ranking, then each training; times in the table
    python -m recipes.align.prompt_fidelity --loss-type dpo --loss-type ipo --loss-type kto --loss-type mapo
        --loss-type sft --loss-type sdpo               the losses under one budget, on the same pairs
    python -m recipes.align.prompt_fidelity --prompts-of crowded --out build/recipes/crowded

A hard prompt names a coloured thing that wears something. `moji` samples four images of each and, from the noise of
three of them, hard negatives: without the colour, without the accessory, of another thing. The embedded scorer ranks
every image against its hard negative, and every two images of the prompt, and they become a pair where their scores
differ by more than the margin (`--pairs-of` chooses the rules). Prompts, rules, margin, settings and guidance were
chosen on training and development prompts (`benchmarks/results/align.md`). Both sides are drawn with the base's own
guidance, which suits the tuned model best. With another one for the tuned model (--guidance) the base is measured
twice: with its own, and with the tuned model's.
It should show: attribute accuracy on held-out prompts rises by 8 points or more with an interval clear of zero, and
diversity stays above 0.9 of the base's. --development evaluates on other prompts, on which settings are chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.options import Option
from backbone.io.console import notify, run_app
from backbone.io.files import write_json, write_text
from backbone.world.scene import Scene
from recipes.align.prompts import (
    COMPARISON,
    PROMPTS,
    TRAINING,
    TRAINING_PROMPTS,
    RecipeSettings,
    is_crowded,
    is_hard,
    select_scenes,
)

if TYPE_CHECKING:
    from benchmarks.judges.classifier import Classifier
    from recipes.align.experiment import Row

RANKING = "Ranking"
KINDS: dict[str, Callable[[Scene], bool]] = {"hard": is_hard, "crowded": is_crowded}
BETA = ("--beta", 2000)
WITHOUT = (*BETA, "--safeguard", "-1")
LOSSES = {
    "sdpo": ("dpo", "--beta", 10_000, "--safeguard", "0.5"),  # Diffusion-SDPO is DPO with its safeguard
    "mapo": ("mapo", *WITHOUT, "--beta", 500),  # as its authors have it
    "ipo": ("ipo", *WITHOUT, "--beta", 200),  # at 2000 it stands still
    "kto": ("kto", *BETA),  # knows no pairs
    "sft": ("sft",),  # knows no reference
}
BUDGET = (
    "--steps", 900, "--train-batch-size", 8, "--learning-rate", 1e-4, "--lr-scheduler", "cosine",
    "--evaluation-steps", 300,
)  # fmt: skip


app = script_app()


@dataclass(frozen=True, kw_only=True)
class FidelitySettings(RecipeSettings):
    """Settings of the recipe."""

    prompts_of: Annotated[str, Option("What is hard about the prompts.", PROMPTS, choices=tuple(KINDS))] = (
        "hard"
    )
    pairs: Annotated[int, Option("Prompts to draw.", PROMPTS, min=2)] = 232
    per_prompt: Annotated[int, Option("Pictures of each.", PROMPTS, min=2)] = 4
    scorer: Annotated[str, Option("What ranks them.", RANKING)] = "moji"
    rules: Annotated[
        tuple[str, ...], Option("How pairs are chosen, as align rank --rule.", RANKING, flag="pairs-of")
    ] = (
        "same-noise",
        "own",
    )
    margin: Annotated[float, Option("Pairs that differ by no more are left out.", RANKING, min=0)] = 0.06
    loss: Annotated[
        tuple[str, ...], Option("sdpo is dpo with the safeguard.", TRAINING, flag="loss-type")
    ] = ("sdpo",)
    guidance: Annotated[
        float | None,
        Option(
            "Guidance scale of the tuned model's pictures; the base model keeps its own.",
            COMPARISON,
            min=0,
            default_text="the base model's own",
        ),
    ] = None
    guidance_start: Annotated[
        float,
        Option(
            "Share of the steps before that guidance begins.",
            COMPARISON,
            min=0,
            max=1,
            needs={"guidance": ()},
            off=0.0,
        ),
    ] = 0.0
    only_rank: Annotated[bool, Option("Draw, rank, say how right the order is, and stop.", RANKING)] = False
    out: Path = Path("build/recipes/prompt_fidelity")

    @property
    def own_guidance(self) -> tuple[object, ...]:
        """Flags of align compare for guidance of the tuned model alone; none where it is the base model's own."""
        if self.guidance is None:
            return ()
        start = (
            ("--tuned-guidance-start", self.guidance_start, "--tuned-guidance-stop", 1)
            if self.guidance_start
            else ()
        )
        return ("--tuned-guidance", self.guidance, *start)

    @property
    def same_guidance(self) -> tuple[object, ...]:
        """Flags of align compare for the same guidance of both sides."""
        start = ("--guidance-start", self.guidance_start) if self.guidance_start else ()
        return ("--guidance", self.guidance, *start)

    @property
    def guidance_text(self) -> str:
        """The guidance in words."""
        start = f" from {self.guidance_start:.0%} of the steps on" if self.guidance_start else ""
        return f"at guidance {self.guidance:g}{start}"


@settled_command(app, FidelitySettings)
def main(settings: FidelitySettings) -> None:
    """Draws, ranks, trains once for each loss, compares, and writes the table."""
    from benchmarks.judges.classifier import load_classifier
    from recipes.align.experiment import format_table, measure_ranking, sample_and_rank

    classifier, out = load_classifier(), settings.out
    accepts = KINDS[settings.prompts_of]
    learn = select_scenes(TRAINING_PROMPTS, settings.pairs, accepts)
    seeds, subfolder = settings.evaluation
    test = select_scenes(seeds, settings.held_out, accepts, excluded=learn)
    folder, seconds = sample_and_rank(
        out,
        learn,
        model=settings.model,
        per_prompt=settings.per_prompt,
        scorer=settings.scorer,
        rules=list(settings.rules),
        margin=settings.margin,
    )
    order = measure_ranking(folder, learn, classifier)
    notify(str(order))
    write_json(out / "order.json", order)
    if settings.only_rank:
        return
    rows: list[Row] = []
    for loss in settings.loss:
        rows += train_and_compare(settings, loss, folder, test, out / subfolder, classifier, seconds)
        write_text(out / "table.md", f"{format_table(rows)}\n\n{order}\n")
        facts = {"flags": settings.flags, "pairs": settings.pairs, "held_out": settings.held_out}
        write_json(out / "table.json", {"rows": rows, **facts})
    print(format_table(rows))
    notify(f"{out}/table.md holds the table.")


def train_and_compare(
    settings: FidelitySettings,
    loss: str,
    pairs: Path,
    test: Sequence[Scene],
    folder: Path,
    classifier: Classifier,
    seconds: Mapping[str, float],
) -> list[Row]:
    """Rows of a loss: against the base at its own guidance, and at the tuned model's where that is another.

    The base's images of the first loss serve the others too.
    """
    from recipes.align.experiment import ComparisonSettings, compare_with_base, find_base_images, train

    kind, *loss_flags = LOSSES.get(loss, (loss, *WITHOUT))
    label = f"{loss}-{settings.name}" if settings.name else loss
    base, base_alike = find_base_images(folder), find_base_images(folder.with_name(f"{folder.name}-alike"))
    run_folder, training = train(
        settings.out, label, pairs, "--model", settings.model, "--loss-type", kind, *BUDGET, *loss_flags,
        *settings.flags.split(),
    )  # fmt: skip
    times: dict[str, object] = {**seconds, "training": training}
    comparison_settings = ComparisonSettings(
        model=settings.model, scorers=["moji"], guidance=settings.own_guidance
    )
    with_own_guidance = compare_with_base(
        run_folder, test, classifier, comparison_settings, out=folder / label, base_images=base
    )
    rows: list[Row] = [(label, with_own_guidance, times)]
    if settings.guidance is None:
        return rows
    with_same_guidance = compare_with_base(
        run_folder,
        test,
        classifier,
        replace(comparison_settings, guidance=settings.same_guidance),
        out=folder.with_name(f"{folder.name}-alike") / label,
        base_images=base_alike,
        tuned_images=folder / label / "tuned",
    )
    return [*rows, (f"{label}, both {settings.guidance_text}", with_same_guidance, times)]


if __name__ == "__main__":
    run_app(app)
