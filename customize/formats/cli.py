"""The commands about files of adapters: export, import, info, merge, extract, resize."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backbone.cli import flags
from backbone.cli.commands import print_json
from backbone.cli.flags import OUTPUT, option
from backbone.io.console import UserError, format_count, notify, quote, show_plainly

ADAPTERS = "Files of adapters"  # the commands' section in the help
RESULT = "Result"  # a section of their options
Target = Literal["diffusers", "kohya", "comfyui", "animatediff"]
BaseFamily = Literal[
    "sd1", "sd2", "sdxl", "sd3", "flux", "pixart", "zimage", "flux2", "qwen", "krea2", "chroma", "qwen21"
]
Precision = Literal["fp32", "bf16", "fp16"]
File = Annotated[Path, typer.Argument(metavar="FILE", help="A run folder or an adapter's file.")]
Out = Annotated[
    Path, option("--out", "--output-dir", "--save-to", help="The file or folder to write.", panel=OUTPUT)
]


def rank_option(default_text: str) -> Any:
    """The option of the result's rank."""
    return option(
        "--rank",
        "--network-dim",
        "--new-rank",
        min=1,
        help="The rank of the result.",
        panel=RESULT,
        show_default=default_text,
    )


Rank = Annotated[int | None, rank_option("--energy says")]
Energy = Annotated[
    float | None,
    option(
        "--energy",
        min=0.01,
        max=1,
        help="The share of each layer's change to keep.",
        panel=RESULT,
        show_default="--rank says",
    ),
]


def base_option(help: str, default_text: str) -> Any:
    """The option that names the base model."""
    names = "--model", "--pretrained-model-name-or-path"
    return option(*names, metavar="MODEL", help=help, panel=flags.MODEL, show_default=default_text)


def register(app: typer.Typer) -> None:
    """Add the commands to `customize`."""
    commands: dict[str, Callable[..., None]] = {
        "export": export,
        "import": import_,
        "info": info,
        "merge": merge,
        "extract": extract,
        "resize": resize,
    }
    for name, command in commands.items():
        app.command(name, rich_help_panel=ADAPTERS)(command)


def export(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="A run folder of customize train, or any adapter's file.")
    ],
    out: Out,
    to: Annotated[
        Target, option("--to", help="The tool whose format is written.", panel=RESULT)
    ] = "diffusers",
    base: Annotated[
        BaseFamily | None,
        option(
            "--base", help="The family of the base model.", panel=RESULT, show_default="told from the layers"
        ),
    ] = None,
    precision: Annotated[
        Precision | None,
        option(
            "--precision",
            "--save-precision",
            help="Precision of the weights written.",
            panel=RESULT,
            show_default="as they are",
        ),
    ] = None,
    model: Annotated[
        str | None,
        base_option("The base model, which DoRA in ComfyUI's format needs.", "the run's"),
    ] = None,
) -> None:
    """Write an adapter for diffusers, kohya's tools (also A1111, Forge), ComfyUI or AnimateDiff, and verify it."""
    if to == "animatediff":
        for flag, value in (("--base", base), ("--model", model)):
            if value:
                raise UserError(
                    f"{flag} has no effect with --to animatediff, which converts motion adapters. Leave it out."
                )
        from customize.formats.animatediff import export_animatediff
        from customize.formats.convert import DTYPES
        from customize.formats.write import check_output

        check_output(out)
        notify(export_animatediff(run, out, dtype=DTYPES[precision] if precision else None))
        return
    from customize.formats.convert import export_adapter

    sentence = export_adapter(run, out, to, base=base, model=model, precision=precision)
    notify(sentence)


def import_(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A LoRA, LoHa, LoKr or DoRA of any of these tools, or an embedding."
        ),
    ],
    out: Annotated[
        Path,
        option(
            "--out",
            "--output-dir",
            help="A new run folder, or a file that ends in .safetensors.",
            panel=OUTPUT,
        ),
    ],
    token: Annotated[
        str | None,
        option(
            "--token",
            "--trigger-word",
            help="What you will write in prompts for it.",
            panel=RESULT,
            show_default="what the run or the learned word says, else [V]",
        ),
    ] = None,
    token_words: Annotated[
        str | None,
        option(
            "--token-words",
            help="The words it was trained with.",
            panel=RESULT,
            show_default="what the file says",
        ),
    ] = None,
    class_noun: Annotated[
        str,
        option(
            "--class",
            help="Class of the subject, in a word (dog).",
            panel=RESULT,
            show_default="what the file says",
        ),
    ] = "",
    model: Annotated[
        str | None,
        base_option("The base model that the adapter is for.", "what the file says"),
    ] = None,
) -> None:
    """Read another tool's adapter or embedding: into a run folder to sample from, or into a file of ours."""
    from customize.formats.convert import import_adapter

    notify(
        import_adapter(file, out, model=model, token=token, token_words=token_words, class_noun=class_noun)
    )


def info(file: File, as_json: flags.Json = False) -> None:
    """Say what an adapter is: its format, rank, alpha, layers, base, size, and what its metadata says."""
    from customize.formats.convert import describe_adapter, inspect_adapter
    from customize.formats.words import describe_words, inspect_words

    words = inspect_words(file)
    facts = words or inspect_adapter(file)
    if as_json:
        print_json(facts)
    else:
        typer.echo(show_plainly(describe_words(words) if words else describe_adapter(facts)))


def merge(
    adapters: Annotated[
        list[str], typer.Argument(metavar="ADAPTERS", help="Run folders or files, as A:0.8 B:0.5.")
    ],
    out: Out,
    rank: Annotated[int | None, rank_option("exact")] = None,
    bake: Annotated[
        bool,
        option(
            "--bake", help="Merge into the model's weights: writes a whole diffusers folder.", panel=RESULT
        ),
    ] = False,
    model: Annotated[
        str | None,
        base_option("With --bake: the base model.", "the run's"),
    ] = None,
) -> None:
    """Merge adapters: exactly, at a given rank, or into the weights of a whole model."""
    from customize.formats.merging import merge as merging

    parts = merging.read_inputs(adapters)
    if bake:
        if rank is not None:
            raise UserError("A baked model has no rank. Leave out --rank or --bake.")
        base = model or next((part.concept.model for part in parts if part.concept is not None), None)
        if base is None:
            raise UserError("None of these files says which model it is for. Name one with --model.")
        from customize.formats.merging.bake import bake as bake_into_model

        changed = bake_into_model(parts, base, out)
        notify(f"{out} is {base} with {changed} tensors changed.")
        for part in parts:
            for token, words in part.concept.tokens.items() if part.concept is not None else ():
                notify(
                    f"Write “{words}” in prompts, where {token} stood in prompts with --concept {quote(part.source)}."
                )
        return
    if model is not None:
        raise UserError("--model has no effect without --bake. Leave it out.")
    from customize.formats.merging.merged_run import check_destination, save_merged

    check_destination(out, parts)
    weight_deltas: Any = {}
    if rank is None:
        result, weight_deltas = merging.merge_exact(parts), merging.sum_weight_deltas(parts)
    else:
        result, reduction = merging.merge_to_rank(parts, rank)
        notify(str(reduction))
    tokens = save_merged(out, result, parts, weight_deltas=weight_deltas)
    tokens_sentence = f" It answers to {', '.join(tokens)}." if tokens else ""
    notify(f"{out} holds {format_count(len(parts), 'adapter')} in one.{tokens_sentence}")


def extract(
    tuned: Annotated[
        str, typer.Argument(metavar="TUNED", help="The fine-tuned model: a folder or a checkpoint file.")
    ],
    base: Annotated[str, typer.Argument(metavar="BASE", help="The base model that it was fine-tuned from.")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
) -> None:
    """Extract the difference of two models as a LoRA."""
    from customize.formats.merging.merge import extract_lora
    from customize.formats.metadata import build_metadata
    from customize.formats.write import check_output, refuse_inside, write_adapter

    rank = require_rank_or_energy(rank, energy)
    check_output(out)
    refuse_inside(out, (tuned, base))
    adapter, reduction = extract_lora(tuned, base, rank=rank, energy=energy)
    write_adapter(out, adapter, "peft", metadata=build_metadata(adapter, title=out.stem))
    notify(f"{out}: {reduction}")


def resize(
    file: File,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
) -> None:
    """Change an adapter's rank; a LoHa or LoKr becomes a LoRA."""
    from customize.formats.merging.merge import resize_adapter
    from customize.formats.metadata import build_metadata
    from customize.formats.read import read_adapter
    from customize.formats.write import check_output, write_adapter

    rank = require_rank_or_energy(rank, energy)
    check_output(out)
    adapter, reduction = resize_adapter(read_adapter(file), rank=rank, energy=energy)
    write_adapter(out, adapter, "peft", metadata=build_metadata(adapter, source=file, title=out.stem))
    notify(f"{out}: {reduction}")


def require_rank_or_energy(rank: int | None, energy: float | None) -> int | None:
    """The rank; `UserError` unless exactly one of rank and energy is given."""
    if (rank is None) == (energy is None):
        raise UserError("Say how much to keep: either --rank 16 or --energy 0.95.")
    return rank
