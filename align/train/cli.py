"""The command `align train`, and the options that several commands of `align` share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backbone.io.console import UserError, say

SOURCE_HELP = (
    "A folder of align sample, chosen/ and rejected/ (w/ and l/), .jsonl or .parquet, or a dataset's id."
)
MODEL_HELP = "moji, sd15, sdxl, sd3, flux, a diffusers folder, a checkpoint file (.safetensors), or a hub id."

Loss = Literal["dpo", "ipo", "hinge", "kto", "mapo", "dspo", "sft", "draft", "ddpo"]
Reference = Literal["bank", "live", "copy"]
Weighting = Literal["none", "min-snr", "debiased"]
Ties = Literal["drop", "model"]
Rise = Literal["warn", "stop"]
Scheduler = Literal["constant", "cosine"]
Quantized = Literal["8bit", "nf4"]
Model = Annotated[
    str | None,
    typer.Option("--model", "--pretrained-model-name-or-path", help=MODEL_HELP, show_default="moji"),
]
Concepts = Annotated[
    list[Path] | None,
    typer.Option(
        "--concept", help="A run folder of customize or align train; repeatable.", show_default="none"
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--mixed-precision", help="auto, fp32, bf16 or fp16.", show_default="auto"),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", show_default="auto")]
User = Annotated[
    str | None, typer.Option("--user", help="Only this person's choices.", show_default="everybody's")
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit", min=1, help="Only the first so many rows; a dataset is then streamed.", show_default="all"
    ),
]
Split = Annotated[str, typer.Option("--split", help="Of a dataset on the hub.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Leave bad records out instead of stopping.")]


def hyphens(name: str) -> str:
    """An option's name with hyphens, so that diffusers' own spelling with underscores serves too."""
    return name.replace("_", "-")


def train(
    source: Annotated[
        str | None, typer.Argument(help=SOURCE_HELP, show_default="drawn and ranked anew, with --online")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/NAME-OF-SOURCE")
    ] = None,
    model: Model = None,
    concept: Concepts = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", "--resume-from-checkpoint", help="Go on with this run folder."),
    ] = None,
    loss: Annotated[
        Loss | None,
        typer.Option(
            "--loss-type",
            help="draft and ddpo are with --online alone: reward gradients, policy gradients.",
            show_default="dpo",
        ),
    ] = None,
    beta: Annotated[
        float | None,
        typer.Option(
            "--beta-dpo",
            min=0,
            help="Means the same for every loss; see align.objectives.losses.",
            show_default="2000; mapo: 500; ipo: 200",
        ),
    ] = None,
    ties: Annotated[
        Ties | None, typer.Option("--ties", help="Leave ties out, or pull them level.", show_default="drop")
    ] = None,
    label_smoothing: Annotated[
        float | None,
        typer.Option("--label-smoothing", min=0, help="The share of wrong labels.", show_default="0"),
    ] = None,
    sft_weight: Annotated[
        float | None,
        typer.Option("--sft-weight", min=0, help="Adds so much of the winners' error.", show_default="0"),
    ] = None,
    safeguard: Annotated[
        float | None,
        typer.Option("--safeguard", max=1, help="Diffusion-SDPO's μ; below 0: off.", show_default="by model"),
    ] = None,
    mapo_weight: Annotated[float | None, typer.Option("--mapo-weight", min=0, show_default="0.1")] = None,
    dspo_pull: Annotated[float | None, typer.Option("--dspo-pull", min=0, show_default="1")] = None,
    full: Annotated[
        bool, typer.Option("--full", help="All weights of the denoiser instead of a LoRA.")
    ] = False,
    reference: Annotated[
        Reference | None,
        typer.Option(
            "--reference",
            help="The base's errors: banked at fixed draws, asked each time, or of a copy.",
            show_default="bank",
        ),
    ] = None,
    draws: Annotated[
        int | None, typer.Option("--draws", min=1, help="Noise draws of each pair.", show_default="16")
    ] = None,
    held_out: Annotated[
        float | None,
        typer.Option("--held-out", min=0, help="The share of prompts to judge by.", show_default="0.1"),
    ] = None,
    user: User = None,
    limit: Limit = None,
    split: Split = "train",
    skip_bad: SkipBad = False,
    any_model: Annotated[
        bool, typer.Option("--any-model", help="Learn from pictures that another model drew.")
    ] = False,
    prompt_dropout: Annotated[
        float | None,
        typer.Option(
            "--prompt-dropout",
            "--proportion-empty-prompts",
            min=0,
            max=1,
            help="For a pair.",
            show_default="0.1",
        ),
    ] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", help="Mirrored pairs too.", show_default="no-flip")
    ] = None,
    random_crop: Annotated[
        int | None,
        typer.Option(
            "--random-crop",
            min=0,
            help="Cut both pictures of a pair at one of so many places.",
            show_default="at the centre",
        ),
    ] = None,
    loss_weighting: Annotated[
        Weighting | None,
        typer.Option("--loss-weighting", help="Of errors, by their noise level.", show_default="by model"),
    ] = None,
    least_noise: Annotated[
        float | None,
        typer.Option(
            "--least-noise",
            min=0,
            max=1,
            help="Train above this share of the noise path.",
            show_default="by model",
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option("--steps", "--max-train-steps", min=1, help="Optimiser steps.", show_default="300"),
    ] = None,
    batch: Annotated[
        int | None, typer.Option("--train-batch-size", min=1, help="Pairs a step.", show_default="4")
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option("--micro-batch", min=1, help="Pairs at once.", show_default="the whole batch"),
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", min=0, show_default="by model")
    ] = None,
    lr_warmup_steps: Annotated[
        int | None, typer.Option("--lr-warmup-steps", min=0, show_default="20")
    ] = None,
    lr_scheduler: Annotated[Scheduler | None, typer.Option("--lr-scheduler", show_default="constant")] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "--network-dim", min=1, show_default="by model")
    ] = None,
    lora_alpha: Annotated[
        float | None, typer.Option("--lora-alpha", "--network-alpha", show_default="the rank")
    ] = None,
    lora_layers: Annotated[
        str | None, typer.Option("--lora-layers", help="attention or all.", show_default="by model")
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option("--weight-decay", "--adam-weight-decay", min=0, show_default="0.01")
    ] = None,
    max_grad_norm: Annotated[float | None, typer.Option("--max-grad-norm", min=0, show_default="1")] = None,
    evaluation_steps: Annotated[
        int | None, typer.Option("--evaluation-steps", "--evaluate-every", min=1, show_default="50")
    ] = None,
    evaluation_draws: Annotated[
        int | None, typer.Option("--evaluation-draws", min=1, show_default="4")
    ] = None,
    winner_tolerance: Annotated[
        float | None,
        typer.Option(
            "--winner-tolerance", min=0, help="How far winners' error may rise.", show_default="0.05"
        ),
    ] = None,
    on_winner_rise: Annotated[
        Rise | None, typer.Option("--on-winner-rise", help="Beyond that: warn, or stop.", show_default="warn")
    ] = None,
    checkpointing_steps: Annotated[
        int | None, typer.Option("--checkpointing-steps", min=1, show_default="50")
    ] = None,
    online: Annotated[
        str | None,
        typer.Option("--online", help="Draw, let this scorer rank, train, again.", show_default="off"),
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option("--prompts", help="With --online: what to draw.", show_default="none")
    ] = None,
    rounds: Annotated[
        int | None, typer.Option("--rounds", min=1, help="Of --online.", show_default="4")
    ] = None,
    per_prompt: Annotated[
        int | None, typer.Option("--per-prompt", min=2, help="Pictures, with --online.", show_default="4")
    ] = None,
    reward_steps: Annotated[
        int | None,
        typer.Option("--reward-steps", min=1, help="draft: K, the last steps that learn.", show_default="1"),
    ] = None,
    clip_range: Annotated[
        float | None, typer.Option("--clip-range", min=0, help="ddpo: of the ratio.", show_default="1e-4")
    ] = None,
    sample_steps: Annotated[
        int | None, typer.Option("--sample-steps", min=1, help="With --online.", show_default="by model")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", "--guidance-scale", min=0, help="With --online.", show_default="by model"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    precision: Precision = None,
    device: Device = None,
    vram: Annotated[
        float | None,
        typer.Option(
            "--vram",
            min=0.1,
            help="The device's memory in GiB: says what it takes to fit, and does it, or refuses.",
            show_default="not looked at",
        ),
    ] = None,
    quantize: Annotated[
        Quantized | None,
        typer.Option(
            "--quantize", help="The frozen base in fewer bits (bitsandbytes, a GPU).", show_default="no"
        ),
    ] = None,
    cpu_offload: Annotated[
        float | None,
        typer.Option(
            "--cpu-offload", min=0, max=1, help="The base's share in the CPU's memory.", show_default="0"
        ),
    ] = None,
    vae_tiling: Annotated[bool, typer.Option("--vae-tiling", help="The autoencoder on tiles.")] = False,
    text_on_cpu: Annotated[bool, typer.Option("--text-on-cpu", help="Text encoders on the CPU.")] = False,
    one_by_one: Annotated[bool, typer.Option("--one-by-one", help="Draw one picture at a time.")] = False,
) -> None:
    """Train a model on pairs, so that it draws what was preferred (Diffusion-DPO and its relatives)."""
    if resume is not None:
        from align.settings import read_settings

        settings = read_settings(resume)  # mistakes are answered before torch is imported
        if settings.online:
            from align.train.online import resume_online

            finished = resume_online(resume)
        else:
            from align.train.run import resume_taste

            finished = resume_taste(resume)
        _done(finished)
        return
    asked: dict[str, Any] = {
        "pairs": source or "",
        "model": model,
        "concepts": tuple(str(folder) for folder in concept or ()),
        "user": user,
        "limit": limit,
        "split": split,
        "ties": ties,
        "held_out": held_out,
        "skip_bad": skip_bad,
        "any_model": any_model,
        "loss": loss,
        "beta": beta,
        "label_smoothing": label_smoothing,
        "sft_weight": sft_weight,
        "safeguard": safeguard,
        "mapo_weight": mapo_weight,
        "dspo_pull": dspo_pull,
        "full": full,
        "reference": reference,
        "draws": draws,
        "prompt_dropout": prompt_dropout,
        "flip": flip,
        "random_crop": random_crop,
        "loss_weighting": loss_weighting,
        "least_noise": least_noise,
        "steps": steps,
        "batch": batch,
        "micro_batch": micro_batch,
        "gradient_checkpointing": gradient_checkpointing,
        "learning_rate": learning_rate,
        "lr_warmup_steps": lr_warmup_steps,
        "lr_scheduler": lr_scheduler,
        "rank": rank,
        "lora_alpha": lora_alpha,
        "lora_layers": lora_layers,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "evaluation_steps": evaluation_steps,
        "evaluation_draws": evaluation_draws,
        "winner_tolerance": winner_tolerance,
        "on_winner_rise": on_winner_rise,
        "checkpointing_steps": checkpointing_steps,
        "online": online,
        "prompts": None if prompts is None else str(prompts),
        "rounds": rounds,
        "per_prompt": per_prompt,
        "reward_steps": reward_steps,
        "clip_range": clip_range,
        "sample_steps": sample_steps,
        "guidance": guidance,
        "seed": seed,
        "precision": precision,
        "device": device,
        "quantize": quantize,
        "cpu_offload": cpu_offload,
        "vae_tiling": vae_tiling,
        "text_on_cpu": text_on_cpu,
        "one_by_one": one_by_one,
    }
    asked = {name: value for name, value in asked.items() if value is not None}
    from align.settings import resolved

    resolved(asked, {})  # contradictions are answered before torch is imported
    if online is not None:
        if vram is not None:
            raise UserError(
                "--vram plans for pairs that are there. With --online name the measures yourself."
            )
        if source is not None:
            raise UserError("--online draws its own pairs, so it takes no source. Leave out one of the two.")
        if prompts is None:
            raise UserError("--online needs prompts to draw. Add --prompts FILE.")
        from align.pairs.prompts import read_prompts

        read_prompts(prompts)
        from align.train.online import train_online

        finished = train_online(asked, out=out)
    else:
        if source is None:
            raise UserError(
                "Say what to learn from: align train PAIRS (see align train --help), or --online SCORER."
            )
        from align.pairs.read import read_preferences
        from align.pairs.records import check_preferences, describe_records

        found = check_preferences(
            read_preferences(source, user=user, limit=limit, split=split), skip_bad=skip_bad
        )
        say(f"{found.source} holds {describe_records(found.records)}.")
        from align.train.run import train_taste

        finished = train_taste(asked, found, out=out, vram=vram)
    _done(finished)


def _done(run: Path) -> None:
    say(f"{run}/report.html says how it went. Next: align compare moji {run} --prompts FILE")
