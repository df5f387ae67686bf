"""Cost of a step of preference training here and in diffusers' script, both sides in one run.

    python -m benchmarks.align steps                    SD 1.5's shape, 512², bf16, two cores: about half an hour
    python -m benchmarks.align steps --shape moji       the embedded model's: a minute
    python -m benchmarks.align steps --shape sdxl --device cuda        for a GPU
    python -m benchmarks.align whole PAIRS              whole runs of `moji` on these pairs, both ways

The other side is a plain re-statement of what diffusers' `train_diffusion_dpo.py` does in a step: decode and encode
both pictures, encode the prompt, predict, predict again with the adapter off, backward. Its β is half of ours for
the same loss (`align.objectives.losses`). Parity comes first: on the same latents, noise and levels both sides have
one loss and one gradient. Then steps of every kind are timed in turn, and totals are composed from them: for P pairs
at K draws, each visited V times,

    script    P·K·V · script
    cached    P · encode + P·K·V · cached                       latents and text encoded once
    bank      P · encode + P·K · cached + P·K·(V − 1) · bank    the base model's errors cached, too

The script encodes in every step; here that is done once. On a CPU our steps also compute attention in the way whose
backward pass is faster (`backbone.training.attention`), for latents of up to 32 × 32; on SD 1.5's shape both sides
compute attention alike. A single pass over a huge set (V = 1) gains the latent cache alone. Weights are random if the
shape is not `moji`'s: they cost the same time. Peak memory is of a process of its own for each side. If other work
shares the machine, `--clock cpu` counts the seconds of this process's own.
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn

from align.objectives.dataset import Batch, Item, Items, PreferenceData, make_preference_data
from align.objectives.preference import PreferenceTraining
from align.objectives.reference import CachedReference
from align.pairs.read import read_preferences
from align.pairs.records import Pair, check_preferences
from align.settings import Settings
from backbone.adapters.lora import disable_adapters
from backbone.cli.commands import script_app
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import generator
from backbone.io.console import UserError, notify, run_app
from backbone.io.files import write_json, write_text
from backbone.models.model import Backbone
from backbone.training.run import take_steps
from benchmarks.speed.shapes import (
    CLOCKS,
    CLOCKS_OF,
    ClockFlag,
    Parts,
    describe_machine,
    encode_pictures,
    load_like_script,
    make_random_images,
    open_parts,
    read_peak_memory,
    run_module,
    time_in_turns,
    write_model_folder,
)

PAIRS, DRAWS, VISITS = 200, 8, (1, 2, 5, 10)
KINDS = ("script", "script, checkpointing", "cached", "cached, checkpointing", "bank", "bank, checkpointing")
IN_MEMORY = ("script", "script, checkpointing", "bank", "bank, checkpointing")

app = script_app(__doc__)


@app.command()
def steps(
    shape: Annotated[str, typer.Option(help="sd15, sdxl or moji.")] = "sd15",
    batch: Annotated[int, typer.Option(min=1, help="Pairs in a batch.")] = 1,
    warm: Annotated[int, typer.Option(min=1, help="Timed steps of each kind, after one that is not.")] = 5,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Of the frozen weights: fp32, bf16 or fp16.")] = "bf16",
    clock: ClockFlag = "wall",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/align"),
) -> None:
    """Parity, then steps of every kind in turn, then the totals."""
    with write_model_folder(shape) as model:
        parts = open_parts(model, device, precision)
        pictures = make_random_images(parts.model.resolution, 2 * batch)
        training = build_training(parts, batch)
        script = Script(parts, training, pictures)
        difference = measure_parity(training)
        notify(
            f"parity: loss {difference.here:.3f} differs by {difference.loss:.1e}, "
            f"gradients by {difference.gradient:.1e} of their largest entry"
        )
        calls = {kind: partial(take_step, kind, training, script) for kind in KINDS}
        seconds = time_in_turns(
            {**calls, "encoding": script.encode_once}, warm, device, clock=CLOCKS_OF[clock],
            say=lambda turn, kind, elapsed: notify(f"{turn}/{warm} {kind}: {elapsed:.2f} s"),
        )  # fmt: skip
        encoding = seconds.pop("encoding")
        del calls, parts, training, script
        gc.collect()
        flags = ["--batch", str(batch), "--device", device, "--precision", precision]
        peaks = {kind: run_module("benchmarks.align", "peak", kind, model, *flags) for kind in IN_MEMORY}
    median = {kind: statistics.median(values) / batch for kind, values in seconds.items()}
    facts: dict[str, Any] = {
        "shape": shape, "batch": batch, "warm_steps": warm, "precision": precision, "clock": clock,
        "parity": difference._asdict(),
        "seconds_per_pair": median, "all_seconds": seconds,
        "encode_seconds_per_pair": statistics.median(encoding) / batch,
        "machine": describe_machine(device), "peak_gib": peaks,
    }  # fmt: skip
    facts["totals"] = sum_totals(median, facts["encode_seconds_per_pair"])
    table = format_markdown(facts)
    write_json(out / f"steps-{shape}-{device}.json", facts)
    write_text(out / f"steps-{shape}-{device}.md", table)
    print(table)


@app.command()
def peak(
    kind: Annotated[str, typer.Argument(help="One of the rows of the table.")],
    model: Annotated[str, typer.Argument(help="A diffusers folder, or moji.")],
    batch: Annotated[int, typer.Option(min=1, help="Pairs in a batch.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Of the frozen weights: fp32, bf16 or fp16.")] = "bf16",
) -> None:
    """Two steps of one kind; prints the peak memory in GiB: resident, or the GPU's."""
    if kind not in KINDS:
        raise UserError(f"There is no kind {kind}. Choose one of {'; '.join(KINDS)}.")
    if kind.startswith("script"):
        parts = load_like_script(model, device, precision)
    else:  # as in a run: encode, free the encoders, load the denoiser
        backbone = Backbone.open(model, device=device, precision=precision)
        parts = Parts(backbone, backbone.autoencoder, backbone.encode_prompts)
        for picture in make_random_images(backbone.resolution, 2 * batch):
            encode_pictures(parts, [picture], torch.Generator().manual_seed(0))
        backbone.encode_prompts(["a dog"])
        backbone.free("autoencoder", "text_encoder")
        parts = replace(parts, autoencoder=nn.Identity())
    training = build_training(parts, batch)
    script = Script(parts, training, make_random_images(parts.model.resolution, 2 * batch))
    for _ in range(2):
        take_step(kind, training, script)
    print(json.dumps(read_peak_memory(device)))


@app.command()
def whole(
    pairs: Annotated[str, typer.Argument(help="Any source of pairs that `moji` may learn from.")],
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps of each side.")] = 200,
    batch: Annotated[int, typer.Option(min=1, help="Pairs in a batch.")] = 4,
    draws: Annotated[int, typer.Option(min=1, help="Noise samples of each pair, on our side.")] = DRAWS,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    precision: Annotated[str, typer.Option(help="Of the frozen weights: fp32, bf16 or fp16.")] = "bf16",
    out: Annotated[Path, typer.Option(help="Where the results go.")] = Path("build/benchmarks/align"),
) -> None:
    """Whole runs of `moji` with empty caches: the script's steps, then ours with the bank, encoding included."""
    preferences = check_preferences(read_preferences(pairs))
    ordered_pairs = [pair.ordered for pair in preferences.pairs if not pair.is_tie]
    settings = make_settings(batch, draws=draws, steps=steps, precision=precision, device=device)
    script_seconds = run_script(ordered_pairs, settings)
    with tempfile.TemporaryDirectory() as folder:
        previous_cache = os.environ.get("LIMNER_CACHE")
        os.environ["LIMNER_CACHE"] = folder  # empty caches
        began = time.perf_counter()
        model = Backbone.open("moji", device=device, precision=precision)
        training = PreferenceTraining(model, PreferenceData.empty(model), settings)
        training.train_on(make_preference_data(model, ordered_pairs, [], settings))
        for _ in take_steps(training):
            pass
        our_seconds = time.perf_counter() - began
        if previous_cache is None:
            del os.environ["LIMNER_CACHE"]
        else:
            os.environ["LIMNER_CACHE"] = previous_cache
    facts = {
        "pairs": len(ordered_pairs), "steps": steps, "batch": batch, "draws": draws,
        "visits_a_draw": steps * batch / (len(ordered_pairs) * draws),
        "seconds": {"script": script_seconds, "here": our_seconds}, "times_faster": script_seconds / our_seconds,
    }  # fmt: skip
    write_json(out / "whole-moji.json", facts)
    print(
        f"{len(ordered_pairs)} pairs, {steps} steps of {batch}: script {script_seconds:.1f} s, "
        f"here {our_seconds:.1f} s, {script_seconds / our_seconds:.2f}×"
    )


# The script's side ------------------------------------------------------------------------------------------


class Script:
    """diffusers' step, stated plainly, on the same model and adapter. `pictures` are encoded files, winners first."""

    def __init__(self, parts: Parts, training: PreferenceTraining, pictures: Sequence[bytes]) -> None:
        self.parts, self.training, self.pictures = parts, training, pictures
        self.random = torch.Generator().manual_seed(0)
        self.prompts = ["a dog in the snow"] * (len(pictures) // 2)
        self.beta = training.settings.beta / 2  # theirs has no ½

    def step(self) -> float:
        """One optimiser step; returns the loss, as the script logs it at every step."""
        model, training = self.parts.model, self.training
        latents, conditions = self.latents(), self.parts.encode(self.prompts)
        half = len(latents) // 2
        noise = torch.randn((half, *latents.shape[1:]), generator=self.random).to(latents).repeat(2, 1, 1, 1)
        index = torch.randint(0, len(model.path.levels), (half,), generator=self.random).repeat(2)
        level = model.path.levels[index]
        a, b = level.broadcast_like(latents)
        batch = Batch(
            a * latents + b * noise,
            noise if model.path.prediction_type == "epsilon" else a * noise - b * latents,
            index,
            conditions.repeat(2).to(latents.device),
            torch.ones(half),
            2,
        )
        loss = self.loss(batch)
        loss.backward()
        parameters = list(training.parameters.values())
        torch.nn.utils.clip_grad_norm_(parameters, training.settings.max_grad_norm)
        training.optimizer.step()
        training.optimizer.zero_grad(set_to_none=True)
        return loss.item()

    def loss(self, batch: Batch) -> Tensor:
        """−log σ(β·[(r_w − r_l) − (m_w − m_l)]), mean over pairs."""
        predicted = self.predict(batch)
        errors = (predicted - batch.target).square().mean((1, 2, 3))
        winner, loser = errors.chunk(2)
        with torch.no_grad(), disable_adapters(self.parts.model.denoiser):
            reference = (self.predict(batch) - batch.target).square().mean((1, 2, 3))
        reference_winner, reference_loser = reference.chunk(2)
        logits = (reference_winner - reference_loser) - (winner - loser)
        return -F.logsigmoid(self.beta * logits).mean()

    def predict(self, batch: Batch) -> Tensor:
        """The network's prediction, float32."""
        return self.parts.model.predict(batch.noisy, batch.index, batch.conditions)

    def latents(self) -> Tensor:
        """Both pictures of each pair decoded from their files and encoded."""
        return encode_pictures(self.parts, self.pictures, self.random)

    def encode_once(self) -> None:
        """Fill the caches for these pairs, to be timed."""
        self.latents()
        self.parts.encode(self.prompts)


def run_script(pairs: Sequence[Pair], settings: Settings) -> float:
    """Seconds of a whole run as the script does it."""
    began = time.perf_counter()
    parts = open_parts("moji", settings.device, settings.precision)
    model = parts.model
    training = PreferenceTraining(model, PreferenceData.empty(model), settings)
    script = Script(parts, training, [])
    for step in range(settings.steps):
        rows = [n % len(pairs) for n in range(step * settings.batch, (step + 1) * settings.batch)]
        script.pictures = [pairs[n].first.read() for n in rows] + [pairs[n].second.read() for n in rows]
        script.prompts = [pairs[n].prompt for n in rows]
        script.step()
    return time.perf_counter() - began


# Our side ---------------------------------------------------------------------------------------------------


def build_training(parts: Parts, batch: int) -> PreferenceTraining:
    """Our training with random latents and texts cached, and the cached reference error of every noise sample."""
    model = parts.model
    training = PreferenceTraining(model, PreferenceData.empty(model), make_settings(batch))
    random = generator(0, "material")
    config = cast(Any, model.denoiser).config
    latents = torch.randn(2 * batch, *model.latent_shape, generator=random)
    text = {"hidden": torch.randn(2, 77, config.cross_attention_dim, generator=random)}
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        text["pooled"] = torch.randn(2, width, generator=random)
    items = [Item((2 * n, 2 * n + 1), 1, 1.0, f"pair {n}") for n in range(batch)]
    training.set_data(PreferenceData(latents, None, Conditions(text), Items.of(items), Items.of([])))
    return training


def take_step(kind: str, training: PreferenceTraining, script: Script) -> None:
    """An optimiser step of this kind."""
    denoiser = cast(Any, training.model.denoiser)
    checkpointing = "checkpointing" in kind
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    else:
        denoiser.disable_gradient_checkpointing()
    denoiser.train(checkpointing)
    training.reference = make_known_reference(training) if kind.startswith("bank") else training.live
    if kind.startswith("script"):
        script.step()
        return
    training.settings = replace(training.settings, gradient_checkpointing=checkpointing)
    for _ in take_steps(training, until=training.done + 1):
        pass


def make_known_reference(training: PreferenceTraining) -> CachedReference:
    """A filled cache of base errors, of random values: they cost the same time."""
    shape = (len(training.data.train), training.settings.draws, 2)
    return CachedReference(training.live, "", torch.ones(shape))


class Parity(NamedTuple):
    """Our loss, and the differences of the script's loss and gradient, the latter relative to its largest entry."""

    here: float
    loss: float
    gradient: float


def measure_parity(training: PreferenceTraining, *, size: float = 1e-3) -> Parity:
    """Both sides on the same latents, noise and levels, the adapter moved off zero by noise of this size."""
    script = Script(Parts(training.model, nn.Identity(), lambda prompts: Conditions({})), training, [])
    start_values = {name: value.detach().clone() for name, value in training.parameters.items()}
    with torch.no_grad():
        for number, value in enumerate(training.parameters.values()):
            value.add_(size * torch.randn(value.shape, generator=generator(0, "parity", number)).to(value))
    rows = training.list_samples(1)
    batch = training.read_batch(rows)
    training.reference = training.live
    results = []
    for loss in (training.loss(rows)[0].mean(), script.loss(batch)):
        gradients = torch.autograd.grad(loss, list(training.parameters.values()), allow_unused=True)
        results.append((float(loss.detach()), [g for g in gradients if g is not None]))
    with torch.no_grad():
        for name, value in training.parameters.items():
            value.copy_(start_values[name])
    largest = max(float(g.abs().max()) for g in results[0][1])
    difference = max(float((a - b).abs().max()) for a, b in zip(results[0][1], results[1][1], strict=True))
    return Parity(results[0][0], abs(results[0][0] - results[1][0]), difference / largest)


def make_settings(
    batch: int, *, draws: int = DRAWS, steps: int = 10**6, precision: str = "bf16", device: str = "cpu"
) -> Settings:
    """Diffusers' own choices, where it has some: LoRA of rank 8 on attention, AdamW, β 2500 there and 5000 here."""
    return Settings(
        pairs="", batch=batch, steps=steps, draws=draws, rank=8, lora_alpha=8.0, beta=5000.0, prompt_dropout=0.0,
        learning_rate=1e-5, lr_warmup_steps=0, precision=precision, device=device, held_out=0.0, evaluation_draws=1,
    )  # fmt: skip


# Figures ----------------------------------------------------------------------------------------------------


def sum_totals(seconds: dict[str, float], encode: float) -> list[dict[str, float]]:
    """Seconds of 200 pairs at 8 draws, each visited V times, and how many times faster than the script."""
    rows = []
    for visits in VISITS:
        calls = PAIRS * DRAWS
        row: dict[str, float] = {"visits": visits}
        for suffix in ("", ", checkpointing"):
            script = calls * visits * seconds[f"script{suffix}"]
            cached = PAIRS * encode + calls * visits * seconds[f"cached{suffix}"]
            bank = (
                PAIRS * encode
                + calls * seconds[f"cached{suffix}"]
                + calls * (visits - 1) * seconds[f"bank{suffix}"]
            )
            row |= {
                f"script{suffix}": script,
                f"cached{suffix}": cached,
                f"bank{suffix}": bank,
                f"cached, times faster{suffix}": script / cached,
                f"bank, times faster{suffix}": script / bank,
            }
        without_checkpointing = (
            PAIRS * encode + calls * seconds["cached"] + calls * (visits - 1) * seconds["bank"]
        )
        row["bank without checkpointing against the script with it"] = (
            row["script, checkpointing"] / without_checkpointing
        )
        rows.append(row)
    return rows


def format_markdown(facts: dict[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [
        f"`{facts['shape']}`, {facts['precision']}, {facts['batch']} pairs a step, {facts['warm_steps']} warm steps of "
        f"each kind in turn, {CLOCKS[facts['clock']]} ({facts['machine']}). Parity: loss to "
        f"{facts['parity']['loss']:.1e}, gradient to {facts['parity']['gradient']:.1e}.",
        "",
        "| a step | seconds a pair | times faster |",
        "|---|---|---|",
    ]
    for kind, seconds in facts["seconds_per_pair"].items():
        base = facts["seconds_per_pair"]["script, checkpointing" if "checkpointing" in kind else "script"]
        lines.append(f"| {kind} | {seconds:.3f} | {base / seconds:.2f}× |")
    lines.append(f"| encoding a pair once | {facts['encode_seconds_per_pair']:.3f} | |")
    names = ("cached", "bank")
    lines += [
        "",
        f"Composed for {PAIRS} pairs at {DRAWS} draws, filling the caches counted:",
        "",
        "| visits a draw | script | latents cached | bank | both with checkpointing: cached | bank | bank without it |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in facts["totals"]:
        plain = [f"{row[f'{name}, times faster']:.2f}×" for name in names]
        saving = [f"{row[f'{name}, times faster, checkpointing']:.2f}×" for name in names]
        last = row["bank without checkpointing against the script with it"]
        cells = [f"{row['visits']:.0f}", f"{row['script']:.0f} s", *plain, *saving, f"{last:.2f}×"]
        lines.append("| " + " | ".join(cells) + " |")
    if "peak_gib" in facts:
        lines += ["", "| peak memory | GiB |", "|---|---|"]
        lines += [f"| {kind} | {size:.2f} |" for kind, size in facts["peak_gib"].items()]
    lines += ["", "A single pass over a huge set (V = 1) gains the latent cache alone.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    run_app(app)
