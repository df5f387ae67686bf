"""The settings that every training has, each said once: its default, its help, its place, its other spellings."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, TypeVar

from backbone.io.console import UserError
from backbone.io.files import read_json
from backbone.io.flags import MODEL_HELP, SPLIT_FILES
from backbone.io.options import Option, build, check_values, effective, fields_of, read_settings
from backbone.io.records import RunRecord

FILE = "settings.json"
PANELS = (  # as `--help` shows them
    *("Data", "Concept", "Preference", "Online", "Method", "Training", "Adapter", "Loss", "Evaluation"),
    *("Memory", "Output"),
)
WEIGHTINGS = ("none", "min-snr", "debiased")
SCHEDULES = ("cosine", "constant")


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What `customize train` and `align train` are both told. A subclass says the defaults that it wants otherwise.

    Raises `UserError`, naming the argument, for a value that its Option does not allow.
    """

    model: Annotated[
        str,
        Option(MODEL_HELP, "Data", aliases=("pretrained-model-name-or-path",), joined=SPLIT_FILES),
    ] = "moji"
    flip: Annotated[
        bool,
        Option("Mirrored images too.", "Data", aliases=("random-flip", "flip-aug"), by_model=True),
    ] = False
    steps: Annotated[int, Option("Optimiser steps.", "Training", aliases=("max-train-steps",), min=1)] = 400
    batch: Annotated[
        int, Option("Images a step.", "Training", aliases=("train-batch-size",), by_model=True, min=1)
    ] = 4
    learning_rate: Annotated[
        float, Option("Of the optimiser, after the warm-up.", "Training", by_model=True, min=0)
    ] = 1e-4
    lr_scheduler: Annotated[
        str, Option("The learning rate's course after the warm-up.", "Training", choices=SCHEDULES)
    ] = "cosine"
    lr_warmup_steps: Annotated[int, Option("Steps in which the learning rate rises.", "Training", min=0)] = 20
    weight_decay: Annotated[float, Option("Of AdamW.", "Training", aliases=("adam-weight-decay",), min=0)] = (
        1e-2
    )
    max_grad_norm: Annotated[
        float, Option("Longer gradients are cut to this length; 0: never.", "Training", min=0)
    ] = 1.0
    seed: Annotated[int, Option("Everything random follows from it.", "Training")] = 0
    rank: Annotated[
        int, Option("Of the adapter.", "Adapter", aliases=("network-dim",), by_model=True, min=1)
    ] = 16
    lora_alpha: Annotated[
        float,
        Option(
            "The adapter works with strength α/rank.",
            "Adapter",
            aliases=("network-alpha",),
            by_model=True,
            default_text="the rank",
            min=1e-6,
        ),
    ] = 16.0
    lora_layers: Annotated[
        str,
        Option("Layers that get an adapter: attention or all.", "Adapter", by_model=True, metavar="LAYERS"),
    ] = "attention"
    loss_weighting: Annotated[
        str, Option("Loss weight per timestep.", "Loss", by_model=True, choices=WEIGHTINGS)
    ] = "none"
    evaluation_steps: Annotated[
        int,
        Option("Evaluate every so many steps.", "Evaluation", aliases=("evaluate-every",), min=1),
    ] = 50
    sample_steps: Annotated[
        int, Option("Sampler steps of the images that it draws.", "Evaluation", by_model=True, min=1)
    ] = 25
    guidance: Annotated[
        float,
        Option(
            "Guidance scale of the images that it draws; 1: none.",
            "Evaluation",
            aliases=("guidance-scale",),
            by_model=True,
            min=0,
        ),
    ] = 4.0
    precision: Annotated[
        str,
        Option(
            "Of the frozen base; what is trained is fp32.",
            "Memory",
            aliases=("mixed-precision",),
            choices=("auto", "fp32", "bf16", "fp16"),
            words={"no": {"precision": "fp32"}},
        ),
    ] = "auto"
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1 or mps.", "Memory", metavar="DEVICE")] = "auto"
    gradient_checkpointing: Annotated[bool, Option("Less memory, a third more time.", "Memory")] = False
    quantize: Annotated[
        str,
        Option(
            "The frozen base in fewer bits (bitsandbytes, a GPU).",
            "Memory",
            choices=("8bit", "nf4"),
            packages=dict.fromkeys(("8bit", "nf4"), "bitsandbytes"),
            default_text="no",
        ),
    ] = ""
    cpu_offload: Annotated[
        float,
        Option("Share of the base that stays in the CPU's memory.", "Memory", min=0, max=1),
    ] = 0.0
    vae_tiling: Annotated[bool, Option("The autoencoder works on tiles.", "Memory")] = False
    text_on_cpu: Annotated[bool, Option("Text encoders on the CPU.", "Memory")] = False
    one_by_one: Annotated[bool, Option("Draw one image at a time.", "Memory")] = False
    checkpointing_steps: Annotated[
        int,
        Option("A checkpoint every so many steps.", "Output", aliases=("save-every-n-steps",), min=1),
    ] = 100

    def __post_init__(self) -> None:
        check_values(self)
        if self.lora_alpha <= 0:
            raise UserError(
                f"lora_alpha is {self.lora_alpha:g}; the adapter works with strength α/rank, so α has to be above 0."
            )


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What a training command is told beside the settings, and does not keep with them."""

    out: Annotated[
        Path | None,
        Option(
            "The run folder.",
            "Output",
            aliases=("output-dir",),
            metavar="FOLDER",
            default_text="runs/ and the data's name",
        ),
    ] = None
    resume: Annotated[
        Path | None,
        Option("Go on with this run folder.", "Output", aliases=("resume-from-checkpoint",), metavar="RUN"),
    ] = None
    vram: Annotated[
        float | None,
        Option(
            "The device's memory in GiB: says what it takes to fit, and does it, or refuses.",
            "Memory",
            min=0.1,
            default_text="not looked at",
        ),
    ] = None


Made = TypeVar("Made", bound=TrainingSettings)


def resolve(declared: type[Made], usual: Mapping[str, Any], asked: Mapping[str, Any]) -> Made:
    """The settings of a run: what was asked for over what is usual for the model and the method.

    Nothing is left of what is usual and has no effect beside the rest. Raises `UserError` for what is not known.
    """
    merged = {**usual, **asked}
    merged.setdefault("lora_alpha", float(merged["rank"]))
    return build(declared, effective(declared, merged, asked))


def read_run_settings(declared: type[Made], run: Path, program: str) -> Made:
    """The settings of a run folder of `program`; `UserError` when it has none or they are of another version."""
    path = run / FILE
    if not run.exists():
        raise UserError(
            f"There is no run folder {run}. Check the spelling, and the folder that it is named from."
        )
    if not path.is_file():
        raise UserError(f"{run} is not a run of `{program}` ({FILE} is missing). Name another folder.")
    written = " ".join(read_json(path, RunRecord).command.split()[:2])
    if written != program and written.endswith(" train"):
        raise UserError(f"{run} is a run of `{written}`, not of `{program}`. Name another folder.")
    return read_settings(declared, path)


def refuse_beside_resume(
    settings: type, asked: Mapping[str, Any], run: RunOptions, *, allowed: Collection[str] = ()
) -> None:
    """`UserError` for anything but the `allowed` said beside `--resume`, which goes on with the run's own settings."""
    if run.resume is not None and re.fullmatch(r"latest|checkpoint-\d+", run.resume.name):
        raise UserError(
            f"--resume names a run folder, which goes on from its newest checkpoint, and {run.resume} is none. Write "
            f"--resume {run.out or 'runs/NAME'}."
        )
    known = fields_of(settings) | fields_of(type(run))
    others = [
        one.name for one in fields(run) if getattr(run, one.name) != one.default and one.name != "resume"
    ]
    for name in [name for name in [*asked, *others] if name not in allowed]:
        said = known[name].option.metavar if known[name].option.argument else known[name].flag
        raise UserError(
            f"--resume {run.resume} goes on with that run's own settings, so {said} has no effect. Leave out one of "
            "the two."
            + (f" What may be said anew: {', '.join(known[one].flag for one in allowed)}." if allowed else "")
        )
