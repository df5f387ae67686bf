"""`customize evaluate`: measuring a run, from settings to table. torch is imported only when it is needed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args

from backbone.cli.flags import DATA, DRAWING, RUNS_MODEL, SAMPLING, SCORING, Checkpoint, out_option
from backbone.cli.options import Option
from backbone.cli.sampling import CountOption
from backbone.io.console import UserError, notify
from backbone.io.files import read_json
from backbone.io.run_folder import fill_new_folder
from customize.settings import describe_first_subject, read_subject_settings

DREAMBENCH, SURVIVAL = "dreambench", "survival"  # in a run folder


@dataclass(frozen=True, kw_only=True)
class MeasureSettings(CountOption):
    """Options of `customize evaluate`."""

    run: Annotated[Path, Option("A run folder of customize train.", DATA, argument=True, metavar="RUN")]
    images: Annotated[
        Path | None,
        Option("Compare these pNN-sNN.png instead of drawing.", DRAWING, metavar="FOLDER"),
    ] = None
    prompts: Annotated[
        tuple[str, ...],
        Option(
            "Words with {} for the subject, a file with such a prompt on each line, or google/dreambooth's "
            "prompts_and_classes.txt; repeatable.",
            DRAWING,
            aliases=("prompt",),
            metavar="PROMPTS",
            default_text="25 of moji's world",
        ),
    ] = ()
    on: Annotated[
        str,
        Option(
            "Also measure the concept on this few-step model, or on a run of customize transfer.",
            DRAWING,
            metavar="MODEL",
            default_text="the run's model alone",
            needs={"images": (None,)},
        ),
    ] = ""
    model: Annotated[str | None, RUNS_MODEL] = None
    checkpoint: Annotated[
        Checkpoint | None,
        Option(
            "Which weights of a run that kept its best checkpoint: those, or the last.",
            DRAWING,
            choices=get_args(Checkpoint),
            default_text="best",
            needs={"images": (None,)},
        ),
    ] = None
    living: Annotated[
        bool,
        Option(
            "Use the list for living subjects of prompts_and_classes.txt instead of that for objects.",
            DRAWING,
            switches={"thing": False},
            needs={"prompts": ()},
        ),
    ] = False
    count: int = 4
    seed: Annotated[
        int,
        Option("Image j of prompt i depends on the seed, i and j only.", SAMPLING, needs={"images": (None,)}),
    ] = 0
    scorer: Annotated[
        Path | None,
        Option("A folder of CLIP or DINO.", SCORING, metavar="FOLDER", default_text="the model's own"),
    ] = None
    against_references: Annotated[
        bool,
        Option(
            "Also measure the untrained base model with the subject's images as references.",
            DRAWING,
            needs={"images": (None,)},
        ),
    ] = False
    out: Annotated[
        Path | None,
        out_option("The folder to write the table to, new or empty.", "RUN/dreambench, dreambench-2 …"),
    ] = None


def measure(settings: MeasureSettings) -> tuple[Path, dict[str, Any], str]:
    """Measure a run; returns the folder with its table and its sheet, the table's contents, and the table as text.

    Raises `UserError` for a folder that is no run, and for settings that cannot be measured, where possible before
    torch is imported.
    """
    run = settings.run
    if others := describe_first_subject(read_subject_settings(run)):
        notify(others)
    from customize.evaluation.dreambench import TABLE, ImageSet, evaluate_images, evaluate_run

    image_set = ImageSet(_resolve_templates(settings), settings.count, settings.seed)
    with fill_new_folder(settings.out, run / (SURVIVAL if settings.on else DREAMBENCH)) as (
        folder,
        unfinished,
    ):
        if settings.on:
            from customize.evaluation.few_step import measure_survival

            metrics = measure_survival(
                run,
                settings.on,
                image_set,
                unfinished,
                scorer=settings.scorer,
                model=settings.model,
                checkpoint=settings.checkpoint,
            )
        elif settings.images is None:
            metrics = evaluate_run(
                run,
                image_set,
                unfinished,
                scorer=settings.scorer,
                against_references=settings.against_references,
                model=settings.model,
                checkpoint=settings.checkpoint,
            )
        else:
            metrics = evaluate_images(
                settings.images,
                run,
                image_set,
                unfinished,
                scorer=settings.scorer,
                model=settings.model,
            )
    return folder, read_json(folder / TABLE), str(metrics["text"])


def _resolve_templates(settings: MeasureSettings) -> Sequence[str]:
    """The prompts with `{}` for the subject; `UserError` for `--living` without a list for living subjects."""
    from customize.evaluation.dreambench import is_prompt_lists, make_moji_prompts, read_templates

    if settings.living and not any(is_prompt_lists(given) for given in settings.prompts):
        raise UserError("--living has no effect without a prompts_and_classes.txt. Leave it out.")
    return (
        read_templates(settings.prompts, living=settings.living) if settings.prompts else make_moji_prompts()
    )
