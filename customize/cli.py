"""The command `customize`: example pictures, training, sampling, checking pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from backbone.io.console import UserError, run, say
from customize.formats import cli as files_cli

app = typer.Typer(
    help="Teach a diffusion model a new concept from a handful of pictures.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

Sampler = Literal["ddim", "heun", "ancestral"]
Method = Literal["lora", "full", "textual-inversion", "pivotal", "custom-diffusion"]
Adapter = Literal["lora", "dora", "loha", "lokr"]
Prior = Literal["base", "class-images", "off"]
Mask = Literal["files", "auto"]
Optimizer = Literal["adamw", "adamw8bit", "prodigy"]
Reports = Literal["jsonl", "tensorboard"]
Weighting = Literal["none", "min-snr", "debiased"]
Quantized = Literal["8bit", "nf4"]
MODEL_HELP = "moji, sd15, sdxl, sd3, flux, a diffusers folder, a checkpoint file (.safetensors), or a hub id."
Model = Annotated[str | None, typer.Option("--model", "--pretrained_model_name_or_path", help=MODEL_HELP)]
Precision = Annotated[
    str | None,
    typer.Option("--precision", "--mixed_precision", help="auto, fp32, bf16 or fp16.", show_default="auto"),
]
Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda or mps.", show_default="auto")]


def main() -> None:
    """The console script."""
    run(app)


@app.command()
def example(
    folder: Annotated[Path, typer.Argument(help="The folder to write; made when it is not there.")],
) -> None:
    """Write the packaged pictures of one particular dog."""
    from customize.data.example import write_example

    written = write_example(folder)
    say(f'{len(written)} pictures in {folder}. Next: customize train --images {folder} --token "[V]"')


@app.command()
def check(
    images: Annotated[
        str, typer.Option("--images", "--instance_data_dir", help="A folder of pictures, or a dataset.")
    ],
    model: Model = None,
    precision: Precision = None,
    device: Device = None,
    vram: Annotated[
        float | None,
        typer.Option(
            "--vram", min=0.1, help="Plan for a GPU with so many GiB.", show_default="what the run needs here"
        ),
    ] = None,
) -> None:
    """Open every picture, list all bad ones, and say what may go wrong and what the run will need."""
    from backbone.media.pictures import check as check_pictures
    from backbone.media.pictures import read_folder

    pictures = read_folder(images)
    check_pictures(pictures)
    captions = sum(picture.caption is not None for picture in pictures)
    say(f"{len(pictures)} pictures in {images} can be read ({captions} with captions).")
    from backbone.models.model import Backbone
    from customize.settings import resolved
    from customize.train.preflight import estimate, warnings_about

    opened = Backbone.open(model or "moji", device=device or "auto", precision=precision or "auto")
    for warning in warnings_about(pictures, resolution=opened.resolution):
        say(f"Warning: {warning}")
    settings = resolved(opened, {}, images=images, token="[V]", class_noun="")
    if vram is not None:
        from customize.train.memory import foreseen

        for sentence in foreseen(opened, settings, len(pictures), vram):
            say(sentence)
        return
    for sentence in estimate(opened, settings, len(pictures)).sentences():
        say(sentence)


@app.command()
def train(
    images: Annotated[
        str | None,
        typer.Option(
            "--images",
            "--instance_data_dir",
            help="A folder of pictures, a dataset's id, or folders as kohya's.",
        ),
    ] = None,
    token: Annotated[
        str, typer.Option("--token", "--trigger_word", help="What you will write in prompts for the subject.")
    ] = "[V]",
    class_noun: Annotated[
        str | None,
        typer.Option(
            "--class", help="What the subject is, in a word (dog).", show_default="guessed from the pictures"
        ),
    ] = None,
    concept: Annotated[
        list[str] | None,
        typer.Option(
            "--concept",
            help="One more subject, as FOLDER:TOKEN:CLASS; repeatable.",
            show_default="none",
        ),
    ] = None,
    model: Model = None,
    out: Annotated[
        Path | None, typer.Option(help="The run folder.", show_default="runs/NAME-OF-PICTURES")
    ] = None,
    resume: Annotated[
        Path | None, typer.Option("--resume", "--resume_from_checkpoint", help="Go on with this run folder.")
    ] = None,
    method: Annotated[
        Method | None,
        typer.Option(
            "--method",
            help="What is trained; pivotal: a word, then an adapter; custom-diffusion: cross-attention and a word.",
            show_default="lora",
        ),
    ] = None,
    steps: Annotated[
        str | None,
        typer.Option(
            "--steps",
            "--max_train_steps",
            show_default="by model",
            help="Optimiser steps; auto: until nothing improves.",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Everything random follows from it.")] = 0,
    learning_rate: Annotated[
        float | None, typer.Option("--learning_rate", min=0, show_default="by model")
    ] = None,
    lr_scheduler: Annotated[
        str | None, typer.Option("--lr_scheduler", help="cosine or constant.", show_default="cosine")
    ] = None,
    lr_warmup_steps: Annotated[
        int | None, typer.Option("--lr_warmup_steps", min=0, show_default="20")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--train_batch_size", min=1, show_default="by model", help="Pictures a step."),
    ] = None,
    rank: Annotated[
        int | None, typer.Option("--rank", "--network_dim", min=1, show_default="by model")
    ] = None,
    lora_alpha: Annotated[
        float | None,
        typer.Option("--lora_alpha", "--network_alpha", show_default="the rank", help="Strength, α/rank."),
    ] = None,
    lora_dropout: Annotated[
        float | None, typer.Option("--lora_dropout", min=0, max=0.99, show_default="0")
    ] = None,
    lora_layers: Annotated[
        str | None, typer.Option("--lora_layers", help="attention or all.", show_default="by model")
    ] = None,
    adapter: Annotated[
        Adapter | None, typer.Option("--adapter", help="The adapter's kind.", show_default="lora")
    ] = None,
    use_dora: Annotated[bool, typer.Option("--use_dora", help="The same as --adapter dora.")] = False,
    rank_pattern: Annotated[
        list[str] | None,
        typer.Option(
            "--rank_pattern", help="Layers of another rank, as attn2=8; repeatable.", show_default="none"
        ),
    ] = None,
    train_text_encoder: Annotated[
        bool, typer.Option("--train_text_encoder", help="The adapter on the text encoders too.")
    ] = False,
    text_encoder_lr: Annotated[
        float | None, typer.Option("--text_encoder_lr", min=0, show_default="1e-4")
    ] = None,
    num_vectors: Annotated[
        int | None,
        typer.Option("--num_vectors", min=1, max=32, help="Rows of the token's own word.", show_default="1"),
    ] = None,
    initializer_token: Annotated[
        str | None,
        typer.Option("--initializer_token", help="Where a word begins.", show_default="the class"),
    ] = None,
    words_learning_rate: Annotated[
        float | None, typer.Option("--words_learning_rate", min=0, show_default="5e-3")
    ] = None,
    instance_prompt: Annotated[
        str | None,
        typer.Option(
            "--instance_prompt",
            help="What pictures without a caption show.",
            show_default="a {token} {class}",
        ),
    ] = None,
    class_prompt: Annotated[str | None, typer.Option("--class_prompt", show_default="a {class}")] = None,
    token_words: Annotated[
        str | None,
        typer.Option("--token_words", help="The rare words behind the token.", show_default="found"),
    ] = None,
    prior: Annotated[
        Prior | None,
        typer.Option(
            "--prior",
            help="How the class is preserved: the base's answers, pictures that the base draws, or not at all.",
            show_default="base",
        ),
    ] = None,
    with_prior_preservation: Annotated[
        bool, typer.Option("--with_prior_preservation", help="The same as --prior class-images.")
    ] = False,
    num_class_images: Annotated[
        int | None,
        typer.Option("--num_class_images", min=1, help="With --prior class-images.", show_default="48"),
    ] = None,
    prior_loss_weight: Annotated[
        float | None,
        typer.Option("--prior_loss_weight", min=0, help="0: no prior preservation.", show_default="1"),
    ] = None,
    flip: Annotated[
        bool | None, typer.Option("--flip/--no-flip", help="Mirrored pictures too.", show_default="by model")
    ] = None,
    aspect_buckets: Annotated[
        bool,
        typer.Option(
            "--aspect_buckets", "--enable_bucket", help="Pictures keep their shape (1:2 to 2:1), uncropped."
        ),
    ] = False,
    mask: Annotated[
        Mask | None,
        typer.Option(
            "--mask",
            help="auto: for pictures without a mask file, where the model sees the class.",
            show_default="files",
        ),
    ] = None,
    checkpointing_steps: Annotated[
        int | None, typer.Option("--checkpointing_steps", min=1, show_default="100")
    ] = None,
    validation_steps: Annotated[
        int | None,
        typer.Option("--validation_steps", min=1, help="A preview sheet every so often.", show_default="500"),
    ] = None,
    evaluation_steps: Annotated[
        int | None,
        typer.Option(
            "--evaluate-every",
            "--evaluation_steps",
            min=0,
            help="0: never.",
            show_default="125; with --steps auto 50",
        ),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            "--patience", min=0, help="Stop after so many evaluations without a better one.", show_default="0"
        ),
    ] = None,
    scorer: Annotated[
        str | None,
        typer.Option(
            "--scorer", help="A folder of CLIP or DINO that measures.", show_default="the model's own"
        ),
    ] = None,
    validation_prompt: Annotated[
        list[str] | None,
        typer.Option(
            "--validation_prompt",
            help="A prompt of the sheet, repeatable; {} is the subject.",
            show_default="eight",
        ),
    ] = None,
    gradient_accumulation_steps: Annotated[
        int | None, typer.Option("--gradient_accumulation_steps", min=1, show_default="1")
    ] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient_checkpointing", help="Less memory, a third more time.")
    ] = False,
    optimizer: Annotated[Optimizer | None, typer.Option("--optimizer", show_default="adamw")] = None,
    use_8bit_adam: Annotated[
        bool, typer.Option("--use_8bit_adam", help="The same as --optimizer adamw8bit.")
    ] = False,
    ema_decay: Annotated[
        float | None,
        typer.Option("--ema_decay", min=0, max=0.99999, help="Keep an average.", show_default="0, none"),
    ] = None,
    loss_weighting: Annotated[
        Weighting | None,
        typer.Option("--loss_weighting", help="The weight of noise levels.", show_default="by model"),
    ] = None,
    snr_gamma: Annotated[
        float | None,
        typer.Option("--snr_gamma", min=0, help="Min-SNR weighting with this γ.", show_default="off"),
    ] = None,
    noise_offset: Annotated[float | None, typer.Option("--noise_offset", min=0, show_default="0")] = None,
    max_grad_norm: Annotated[float | None, typer.Option("--max_grad_norm", min=0, show_default="1")] = None,
    report_to: Annotated[
        Reports | None,
        typer.Option("--report_to", help="Curves for TensorBoard beside the log.", show_default="jsonl"),
    ] = None,
    push_to_hub: Annotated[
        bool, typer.Option("--push_to_hub", "--push-to-hub", help="Upload the finished run to the hub.")
    ] = False,
    hub_model_id: Annotated[
        str | None, typer.Option("--hub_model_id", help="Where to.", show_default="the run's name")
    ] = None,
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
            "--cpu_offload",
            min=0,
            max=1,
            help="The base's share in the CPU's memory.",
            show_default="0",
        ),
    ] = None,
    vae_tiling: Annotated[bool, typer.Option("--vae_tiling", help="The autoencoder on tiles.")] = False,
    text_on_cpu: Annotated[bool, typer.Option("--text_on_cpu", help="Text encoders on the CPU.")] = False,
    one_by_one: Annotated[bool, typer.Option("--one_by_one", help="Draw one picture at a time.")] = False,
) -> None:
    """Teach the model a subject from a few pictures (DreamBooth with LoRA)."""
    from backbone.media.pictures import check as check_pictures
    from backbone.media.pictures import read_folder

    if resume is not None:
        from customize.settings import read_settings

        read_settings(resume)  # mistakes are answered before torch is imported
        from customize.train.run import resume_concept

        finished = resume_concept(resume)
    elif images is None and not concept:
        raise UserError(
            "Say where the pictures are: --images FOLDER (customize example dog/ writes some to try)."
        )
    else:
        from customize.data.folders import is_concept_source, read_subjects
        from customize.settings import Subject, read_subject

        subjects: list[Subject] = []
        prompts: dict[str, str] = {}
        if images is not None and is_concept_source(images):
            subjects, prompts = read_subjects(images)
            for subject in subjects:
                say(f"{subject.images}: {subject.token} {subject.class_noun}, all subjects equally often.")
        elif images is not None:
            subjects = [Subject(images, token, class_noun or "", token_words or "")]
        subjects += [read_subject(flag) for flag in concept or []]
        asked: dict[str, Any] = {
            **prompts,
            "model": model,
            **step_count(steps),
            "seed": seed,
            "method": method,
            "adapter": "dora" if use_dora else adapter,
            "rank_pattern": tuple(rank_pattern or ()),
            "train_text_encoder": train_text_encoder or None,
            "text_encoder_lr": text_encoder_lr,
            "num_vectors": num_vectors,
            "initializer_token": initializer_token,
            "words_learning_rate": words_learning_rate,
            "prior": "class-images" if with_prior_preservation else prior,
            "num_class_images": num_class_images,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "gradient_checkpointing": gradient_checkpointing or None,
            "optimizer": "adamw8bit" if use_8bit_adam else optimizer,
            "ema_decay": ema_decay,
            "loss_weighting": "min-snr" if snr_gamma else loss_weighting,
            "snr_gamma": snr_gamma or None,
            "noise_offset": noise_offset,
            "learning_rate": learning_rate,
            "lr_scheduler": lr_scheduler,
            "lr_warmup_steps": lr_warmup_steps,
            "batch": batch,
            "rank": rank,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "lora_layers": lora_layers,
            **({} if instance_prompt is None else {"instance_prompt": instance_prompt}),
            "class_prompt": class_prompt,
            "prior_loss_weight": prior_loss_weight,
            "flip": flip,
            "aspect_buckets": aspect_buckets or None,
            "mask": mask,
            "checkpointing_steps": checkpointing_steps,
            "validation_steps": validation_steps,
            "evaluation_steps": evaluation_steps,
            **({} if patience is None else {"patience": patience}),
            "scorer": scorer,
            "report_to": report_to,
            "push_to_hub": push_to_hub or None,
            "hub_model_id": hub_model_id,
            "sheet_prompts": tuple(validation_prompt or ()),
            "max_grad_norm": max_grad_norm,
            "precision": precision,
            "device": device,
            "vram": vram,
            "quantize": quantize,
            "cpu_offload": cpu_offload,
            "vae_tiling": vae_tiling or None,
            "text_on_cpu": text_on_cpu or None,
            "one_by_one": one_by_one or None,
        }
        asked = {name: value for name, value in asked.items() if value is not None}
        for subject in subjects:
            check_pictures(read_folder(subject.images))  # mistakes are answered before torch is imported
        from customize.train.run import train_concept

        finished = train_concept(asked, subjects, out=out)
        token = subjects[0].token
    say(
        f'{finished}/sheet.png shows it. Next: customize sample "a {token} … in the snow" --concept {finished}'
    )


def step_count(asked: str | None) -> dict[str, int]:
    """What `--steps` asks for: a number, or `auto`; `UserError` for anything else."""
    if asked is None:
        return {}
    if asked == "auto":
        return {"patience": 3}
    if not asked.isdigit() or int(asked) < 1:
        raise UserError(f"--steps {asked} is neither a number of steps nor auto. Give one of them.")
    return {"steps": int(asked)}


@app.command()
def sample(
    prompts: Annotated[list[str], typer.Argument(help="What to draw; a concept's token names its subject.")],
    concept: Annotated[
        list[Path] | None,
        typer.Option("--concept", help="A run folder of customize train; repeatable.", show_default="none"),
    ] = None,
    model: Model = None,
    count: Annotated[
        int, typer.Option("--count", "--num_images_per_prompt", min=1, help="Pictures of each prompt.")
    ] = 1,
    steps: Annotated[
        int | None, typer.Option("--steps", "--num_inference_steps", min=1, show_default="by model")
    ] = None,
    guidance: Annotated[
        float | None,
        typer.Option("--guidance", "--guidance_scale", min=0, help="1: none.", show_default="by model"),
    ] = None,
    guidance_start: Annotated[
        float,
        typer.Option("--guidance_start", min=0, max=1, help="The share of the steps before guidance begins."),
    ] = 0.0,
    guidance_stop: Annotated[
        float,
        typer.Option("--guidance_stop", min=0, max=1, help="The share of the steps after which it ends."),
    ] = 1.0,
    seed: Annotated[int, typer.Option(help="Picture (i, j) depends on the seed, i and j only.")] = 0,
    negative: Annotated[
        str, typer.Option("--negative", "--negative_prompt", help="What to stay away from.")
    ] = "",
    sampler: Annotated[Sampler, typer.Option(help="How noise is walked down.")] = "ddim",
    scale: Annotated[float, typer.Option("--scale", help="How strongly the concepts work.")] = 1.0,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("samples"),
    precision: Precision = None,
    device: Device = None,
) -> None:
    """Draw pictures from prompts, with concepts or without."""
    from backbone.adapters.concept import read_concept, spoken

    learned = [read_concept(folder) for folder in concept or []]
    for prompt in [*prompts, negative]:
        spoken(prompt, learned)  # mistakes are answered before torch is imported
    from customize.sample import sample_to_folder

    sheet = sample_to_folder(
        prompts,
        concepts=learned,
        model=model,
        count=count,
        steps=steps,
        guidance=guidance,
        seed=seed,
        negative=negative,
        sampler=sampler,
        guided=(guidance_start, guidance_stop),
        scale=scale,
        out=out,
        precision=precision or "auto",
        device=device or "auto",
    )
    say(f"{len(prompts) * count} pictures in {out}; {sheet} shows them all.")


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="A run folder of customize train.")],
    pictures: Annotated[
        Path | None,
        typer.Option("--pictures", help="Compare these pNN-sNN.png instead of drawing.", show_default="none"),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A prompts_and_classes.txt of google/dreambooth.", show_default="moji's world"
        ),
    ] = None,
    living: Annotated[
        bool, typer.Option("--living/--thing", help="Which of that file's two lists of prompts.")
    ] = False,
    per_prompt: Annotated[int, typer.Option("--per-prompt", min=1, help="Pictures of each prompt.")] = 4,
    scorer: Annotated[
        Path | None,
        typer.Option("--scorer", help="A folder of CLIP or DINO.", show_default="the model's own"),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the pictures.")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Where the table goes.", show_default="RUN/dreambench")
    ] = None,
) -> None:
    """Measure a run by the DreamBench protocol: likeness, obedience, class, variety."""
    from customize.settings import read_settings

    read_settings(run)  # mistakes are answered before torch is imported
    from customize.evaluate.dreambench import evaluate_images, evaluate_run, moji_prompts, read_prompts

    if prompts is None:
        asked = moji_prompts()
    else:
        lists = read_prompts(prompts)
        asked = lists.living if living else lists.things
    folder = out or run / "dreambench"
    if pictures is None:
        found = evaluate_run(run, prompts=asked, per_prompt=per_prompt, scorer=scorer, seed=seed, out=folder)
    else:
        found = evaluate_images(
            pictures, run, prompts=asked, per_prompt=per_prompt, scorer=scorer, out=folder
        )
    typer.echo(found["text"])
    say(f"{folder}/sheet.png shows the pictures.")


files_cli.register(app)  # export, import, info, merge, extract, resize


if __name__ == "__main__":
    main()
