"""Settings shared by all training commands, each declared once: default, help text, panel, aliases."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

from backbone.cli.flags import DATA, MODEL, MODEL_HELP, OUTPUT, SPLIT_FILES, ModelOptions, out_option
from backbone.cli.options import Option, list_fields
from backbone.cli.values.build import build, check_values, read_settings
from backbone.cli.values.effects import drop_idle
from backbone.io.console import UserError, notify, notify_once, quote
from backbone.io.files import read_json
from backbone.io.records import RunRecord
from backbone.io.run_folder import CHECKPOINT, FINISHED, make_absolute, no_run_folder, read_steps_taken

FILE = "settings.json"
LEARNED_FROM = ("images", "pairs", "prompts", "clips")  # settings that name a folder or a file
NAMES_A_CHECKPOINT = re.compile(rf"latest|checkpoint-\d+|{re.escape(CHECKPOINT)}")
PANELS = (  # in the order of `--help`
    *("Data", "Concept", "Preference", "Online", "Method", "Training", "Adapter", "Loss", "Evaluation"),
    *("Memory", MODEL, OUTPUT),
)
ReportTo = Annotated[
    str,
    Option(
        "Where metrics go; tensorboard: its event files beside log.jsonl.",
        OUTPUT,
        aliases=("log-with",),
        choices=("jsonl", "tensorboard"),
        packages={"tensorboard": "tensorboard"},
    ),
]
WEIGHTINGS = ("none", "min-snr", "debiased")
SCHEDULES = ("cosine", "constant")
MOST_STEPS = 10**9  # of a training


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Settings of `customize train` and of `align train`. A subclass overrides defaults.

    Raises `UserError`, naming the argument, for a value that its Option does not allow.
    """

    model: Annotated[
        str,
        Option(
            MODEL_HELP,
            MODEL,
            aliases=("pretrained-model-name-or-path",),
            metavar="MODEL",
            joined=SPLIT_FILES,
        ),
    ] = "moji"
    flip: Annotated[
        bool,
        Option(
            "Train on mirrored images too (random horizontal flip).",
            "Data",
            aliases=("random-flip", "flip-aug"),
            by_model=True,
        ),
    ] = False
    steps: Annotated[
        int,
        Option(
            "Optimiser steps.", "Training", aliases=("max-train-steps",), by_model=True, min=1, max=MOST_STEPS
        ),
    ] = 400
    batch: Annotated[
        int, Option("Images in a batch.", "Training", aliases=("train-batch-size",), by_model=True, min=1)
    ] = 4
    learning_rate: Annotated[
        float, Option("Peak learning rate, reached after the warm-up.", "Training", by_model=True, min=0)
    ] = 1e-4
    lr_scheduler: Annotated[
        str,
        Option(
            "Learning-rate schedule after the warm-up: cosine decay to a twentieth of the rate, or constant.",
            "Training",
            choices=SCHEDULES,
        ),
    ] = "cosine"
    lr_warmup_steps: Annotated[int, Option("Steps of linear learning-rate warm-up.", "Training", min=0)] = 20
    weight_decay: Annotated[
        float, Option("Weight decay of AdamW.", "Training", aliases=("adam-weight-decay",), min=0)
    ] = 1e-2
    max_grad_norm: Annotated[
        float, Option("Clip the gradient's norm to this; 0: no clipping.", "Training", min=0)
    ] = 1.0
    seed: Annotated[int, Option("Seed of everything random.", "Training")] = 0
    rank: Annotated[
        int, Option("Rank of the adapter.", "Adapter", aliases=("network-dim",), by_model=True, min=1)
    ] = 16
    lora_alpha: Annotated[
        float,
        Option(
            "α of the adapter, whose update is scaled by α/rank.",
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
        Option("Evaluate every N steps.", "Evaluation", aliases=("evaluate-every",), by_model=True, min=1),
    ] = 50
    sample_steps: Annotated[
        int,
        Option(
            "Sampler steps of the images drawn for evaluation and previews.",
            "Evaluation",
            by_model=True,
            min=1,
        ),
    ] = 25
    guidance: Annotated[
        float,
        Option(
            "Guidance scale of the images drawn for evaluation and previews; 1: no guidance.",
            "Evaluation",
            aliases=("guidance-scale",),
            by_model=True,
            min=0,
        ),
    ] = 4.0
    precision: Annotated[
        str,
        Option(
            "Precision of the frozen base model; trained weights are always fp32.",
            "Memory",
            aliases=("mixed-precision",),
            choices=("auto", "fp32", "bf16", "fp16"),
            words={"no": {"precision": "fp32"}},
        ),
    ] = "auto"
    device: Annotated[str, Option("auto, cpu, cuda, cuda:1 or mps.", "Memory", metavar="DEVICE")] = "auto"
    gradient_checkpointing: Annotated[
        bool, Option("Recompute activations in the backward pass: less memory, a third more time.", "Memory")
    ] = False
    quantize: Annotated[
        str,
        Option(
            "Hold the frozen base model in 8-bit or NF4 weights (bitsandbytes, needs a GPU).",
            "Memory",
            choices=("8bit", "nf4"),
            packages=dict.fromkeys(("8bit", "nf4"), "bitsandbytes"),
            default_text="no",
        ),
    ] = ""
    cpu_offload: Annotated[
        float,
        Option(
            "Share of the base model's weights kept in CPU memory and moved to the GPU layer by layer.",
            "Memory",
            min=0,
            max=1,
        ),
    ] = 0.0
    vae_tiling: Annotated[
        bool, Option("Encode and decode images in tiles of half a side: seams are possible.", "Memory")
    ] = False
    text_on_cpu: Annotated[bool, Option("Keep the text encoders on the CPU.", "Memory")] = False
    one_by_one: Annotated[bool, Option("Draw one image at a time instead of a batch.", "Memory")] = False
    compile: Annotated[
        bool,
        Option(
            "Compile the denoiser's repeated blocks: quicker steps after slow first ones.",
            "Training",
            by_model=True,
            default_text="on a GPU",
            needs={"quantize": ("",), "cpu_offload": (0.0,)},
        ),
    ] = False
    workers: Annotated[
        int,
        Option(
            "Data-loading processes; 0: load in the training process. The trained weights do not depend on it.",
            "Memory",
            aliases=("dataloader-num-workers",),
            min=0,
        ),
    ] = 0
    checkpointing_steps: Annotated[
        int,
        Option("Save a checkpoint every N steps.", "Output", aliases=("save-every-n-steps",), min=1),
    ] = 100

    def __post_init__(self) -> None:
        check_values(self)
        if self.learning_rate == 0:
            notify_once("The learning rate is 0: what is trained at it learns nothing.")
        if self.lora_alpha <= 0:
            raise UserError(
                f"lora_alpha is {self.lora_alpha:g}; the adapter works with strength α/rank, so α has to be above 0."
            )


@dataclass(frozen=True, kw_only=True)
class RunFolderOptions:
    """The folder of a training run, which is not saved with its settings."""

    out: Annotated[Path | None, out_option("The run folder.", "runs/ and the data's name")] = None
    resume: Annotated[
        Path | None,
        Option(
            "Resume this run folder; latest: the one that this command writes to, else the newest in runs/.",
            "Output",
            aliases=("resume-from-checkpoint",),
            metavar="RUN",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class RunOptions(RunFolderOptions):
    """Options of a training command that are not saved with its settings."""

    vram: Annotated[
        float | None,
        Option(
            "Fit the run into this many GiB of GPU memory: prints and applies the settings it takes, or refuses.",
            "Memory",
            min=0.1,
            default_text="no limit",
        ),
    ] = None


@dataclass(frozen=True, kw_only=True)
class PrepareOptions(ModelOptions):
    """Options of `customize prepare` and of `align prepare`."""

    out: Annotated[
        Path,
        Option("The folder to write, or to resume.", OUTPUT, aliases=("output-dir",), metavar="FOLDER"),
    ]
    dataset_config_name: Annotated[
        str,
        Option("Config (subset) of a dataset on the hub.", DATA, default_text="its only one", metavar="NAME"),
    ] = ""
    split: Annotated[str, Option("Split of a dataset on the hub.", DATA)] = "train"
    flip: Annotated[
        bool,
        Option(
            "Train on mirrored images too (random horizontal flip).",
            DATA,
            aliases=("random-flip", "flip-aug"),
        ),
    ] = False
    skip_bad: Annotated[
        bool, Option("Skip records that cannot be used, and count them, instead of stopping.", DATA)
    ] = False
    num_proc: Annotated[
        int,
        Option(
            "Processes that decode images; 0: decode in the main process.",
            DATA,
            aliases=("preprocessing-num-workers", "dataloader-num-workers"),
            min=0,
        ),
    ] = 0


Made = TypeVar("Made", bound=TrainingSettings)
Declared = TypeVar("Declared")


def resolve(declared: type[Made], defaults: Mapping[str, Any], requested: Mapping[str, Any]) -> Made:
    """The settings of a run: the requested values over the defaults of the model and the method.

    Defaults that have no effect with the other settings are dropped. Raises `UserError` for an unknown setting.
    """
    merged = {**defaults, **requested}
    merged.setdefault("lora_alpha", float(merged["rank"]))
    return build(declared, drop_idle(declared, merged, requested))


def read_run_settings(declared: type[Declared], run: Path, program: str) -> Declared:
    """The settings of a run folder of `program`; `UserError` where it has none, or those of another version."""
    path = run / FILE
    if not run.exists():
        raise no_run_folder(run)
    if run.is_file():
        near = f" it lies in: {run.parent.absolute()}" if (run.parent / FILE).is_file() else " of a training"
        raise UserError(f"{run} is a file, and a run's folder is wanted. Name the folder{near}.")
    if not path.is_file():
        raise UserError(f"{run} is not a run of `{program}` ({FILE} is missing). Name another folder.")
    writer = " ".join(read_json(path, RunRecord).command.split()[:2])
    if writer != program and writer.endswith((" train", " train-control", " train-motion")):
        raise UserError(f"{run} is a run of `{writer}`, not of `{program}`. Name another folder.")
    return read_settings(declared, path)


def find_resumed(options: RunFolderOptions, program: str, default: Path | None) -> Path | None:
    """The run folder that `--resume` names, or None for a run that has not started.

    `latest`, as in diffusers' scripts, is the folder of --out, or `default`, the one that the same command uses without
    --out; so a command can be repeated until it is done, and starts where no step was saved yet. With neither
    (`default` is None) it is the run in runs/ that saved a step last. `RUN/latest` and `RUN/checkpoint-N` are RUN,
    which keeps only its newest checkpoint: `UserError` for another N.
    """
    path = options.resume
    assert path is not None
    if (path / FILE).is_file() or not NAMES_A_CHECKPOINT.fullmatch(path.name):
        refuse_lost_checkpoint(path, program)
        return path
    parent = path.parent if path.parent != Path() or path.is_file() else None
    if parent is None:
        run = options.out or default or _find_newest_run(Path("runs"), program)
    else:
        run = parent if (parent / FILE).is_file() else _find_newest_run(parent, program)
    if run is None or not (run / CHECKPOINT).is_file():
        if parent is None and default is not None:
            return None
        raise UserError(
            f"--resume {path} is the newest checkpoint of a run, and {run or parent or 'runs'} holds none. Name a run "
            "folder: --resume RUN."
        )
    step = read_steps_taken(run)
    if path.name.startswith("checkpoint-") and path.name != f"checkpoint-{step}":
        raise UserError(
            f"{run} keeps its newest checkpoint alone, that of step {step}. Write --resume {quote(run)}."
        )
    notify(f"Going on with {run} from step {step}.")
    return run


def refuse_lost_checkpoint(run: Path, program: str) -> None:
    """`UserError` for a finished run without its checkpoint: it would start again and replace its weights."""
    finished = any((run / name).is_file() for name in FINISHED)
    if finished and not (run / CHECKPOINT).is_file() and _is_run_of(program, run):
        hint = f" (--begin-from {quote(run)} learns on from them)" if program == "customize train" else ""
        raise UserError(
            f"{run} is finished and its {CHECKPOINT} is gone, so going on would begin anew and replace its weights. "
            f"Put that file back, or give the command another --out{hint}."
        )


def _find_newest_run(folder: Path, program: str) -> Path | None:
    """The run of a program in a folder that saved a step last, skipping damaged ones."""
    runs = []
    for path in folder.glob(f"*/{CHECKPOINT}"):
        with suppress(OSError):
            if _is_run_of(program, path.parent):
                runs.append((path.stat().st_mtime, path.parent))
    return max(runs)[1] if runs else None


def _is_run_of(program: str, run: Path) -> bool:
    """Whether a folder's record names this program; False where it cannot be read."""
    with suppress(UserError, OSError):
        return " ".join(read_json(run / FILE, RunRecord).command.split()[:2]) == program
    return False


def refuse_gone(run: Path, settings: Any) -> None:
    """`UserError` where the folder or file that a run learns from has been moved or removed."""
    for name in LEARNED_FROM:
        source = str(getattr(settings, name, None) or "")
        if source.startswith(os.sep) and not os.path.exists(source):
            raise UserError(
                f"{source}, from which {run} learns, is not there any more. Say where it lies now: --resume "
                f"{quote(run)} --{name} PATH"
            )


def resume_settings(saved: Made, run: Path, overrides: Mapping[str, Any] | None) -> tuple[Made, int]:
    """The settings of a resumed run, `saved` with `overrides` applied, and the number of steps it has taken.

    Raises `UserError` for a new number of steps that is not larger, and for a new rate of a run without further steps.
    """
    settings = replace(saved, **(overrides or {}))
    refuse_gone(run, settings)
    done = read_steps_taken(run)
    if overrides and "steps" in overrides and settings.steps <= done:
        raise UserError(f"{run} has taken {done} steps already. Give --steps more than that.")
    if overrides and "learning_rate" in overrides and settings.steps <= done:
        raise UserError(
            f"{run} has taken all of its {done} steps, so --learning-rate has no effect. Give --steps more than that "
            "too."
        )
    return settings, done


def find_changed_settings(
    saved: Any,
    requested: Mapping[str, Any],
    options: RunFolderOptions,
    run: Path,
    *,
    allowed: Collection[str] = (),
) -> dict[str, Any]:
    """The settings given with `--resume` that differ from the run's `saved` ones, an instance of its dataclass.

    Raises `UserError` for any that is not `allowed` to change: it would have no effect.
    """
    declared = list_fields(type(saved)) | list_fields(type(options))
    overrides = {
        name: value for name, value in requested.items() if not _is_same(value, getattr(saved, name))
    }
    implied = {"resume": options.resume, "out": run}
    option_values = {field.name: getattr(options, field.name) for field in fields(options)}
    set_options = [
        name
        for name, value in option_values.items()
        if value not in (declared[name].default, implied.get(name))
    ]
    for name in [name for name in [*overrides, *set_options] if name not in allowed]:
        flag = declared[name].option.metavar if declared[name].option.argument else declared[name].flag
        raise UserError(
            f"--resume {options.resume} goes on with that run's own settings, so {flag} has no effect. Leave out one "
            "of the two."
            + (
                f" What may be said anew: {', '.join(declared[option].flag for option in allowed)}."
                if allowed
                else ""
            )
        )
    return overrides


def _is_same(value: Any, saved: Any) -> bool:
    """Whether a value equals the run's own, whose paths are absolute."""
    if isinstance(value, (list, tuple)) and isinstance(saved, (list, tuple)):
        return len(value) == len(saved) and all(map(_is_same, value, saved))
    return bool(
        value == saved or (isinstance(value, (str, Path)) and make_absolute(str(value)) == str(saved))
    )
