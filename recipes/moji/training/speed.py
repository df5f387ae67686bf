"""What a training step of `moji`'s denoiser costs on a CPU, and what each of the recipe's measures is worth.

    python -m recipes.moji.training.speed               about five minutes; nothing else should run

The step is the recipe's (`recipes.moji.denoiser`) on random latents and captions, which cost the same time. Every row
leaves out or changes one thing. Each is a process of its own, since allocator and threads are chosen when it starts;
rounds go through all rows in turn, and a row's figure is the median of its rounds. A second table shows where the time
of the recipe's own step goes, by torch's profiler. Writes `moji_training.md`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from backbone.cli.commands import run_main
from backbone.diffusion.losses import denoising_score_matching
from backbone.diffusion.noise import add_noise, generator, vp
from backbone.distributed.processes import average_in_place
from backbone.distributed.spawn import run_workers
from backbone.io.files import write_text
from backbone.io.progress import progress
from backbone.training.attention import fast_attention_backward
from backbone.training.loop import Update, train
from recipes.moji.autoencoder import CHANNELS
from recipes.moji.denoiser import build_scheduler, build_unet, inner_weights, timestep_density
from recipes.moji.training.muon import Muon

ALLOCATOR = {
    "MALLOC_TRIM_THRESHOLD_": "-1",
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TOP_PAD_": "268435456",
}
WARM_UP = 2
SECONDS = "seconds"


@dataclass(frozen=True)
class Way:
    """How a step is taken; the defaults are the recipe's on one core."""

    batch: int = 32
    processes: int = 1
    threads: int = 1
    plain_attention: bool = True
    channels_last: bool = True
    half: bool = True
    muon: bool = True
    allocator: bool = True


WAYS = {
    "the recipe, one process": Way(),
    "the recipe, two processes": Way(processes=2),
    "one process of two threads": Way(threads=2),
    "fused attention": Way(plain_attention=False),
    "contiguous memory": Way(channels_last=False),
    "fp32": Way(half=False),
    "AdamW for all weights": Way(muon=False),
    "the allocator's own settings": Way(allocator=False),
    "batch 16": Way(batch=16),
    "batch 64": Way(batch=64),
}


def main(
    rounds: Annotated[int, typer.Option(min=1, help="How often every row is measured.")] = 3,
    steps: Annotated[int, typer.Option(min=1, help="Steps of a measurement, after two to warm up.")] = 4,
    out: Annotated[Path, typer.Option(help="Where the table goes.")] = Path("build/benchmarks"),
) -> None:
    """Measures and writes the table."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    with progress(rounds * len(WAYS), "measuring") as bar:
        for _ in range(rounds):
            for name, way in WAYS.items():
                seconds[name].append(run_in_process(way, steps)[SECONDS])
                bar.advance(1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shares = run_in_process(WAYS["the recipe, one process"], steps, profiled=True)
    text = format_markdown(medians, shares)
    write_text(out / "moji_training.md", text)
    print(text)


def run_in_process(way: Way, steps: int, *, profiled: bool = False) -> dict[str, float]:
    """Measures in a new process with this way's allocator and threads: its seconds, or each operation's share."""
    environment = {key: value for key, value in os.environ.items() if key not in ALLOCATOR}
    environment |= {"OMP_NUM_THREADS": str(way.threads)} | (ALLOCATOR if way.allocator else {})
    task = json.dumps({"way": asdict(way), "steps": steps, "profiled": profiled})
    process = subprocess.run(
        [sys.executable, "-m", "recipes.moji.training.speed", "--measure", task],
        env=environment, check=True, capture_output=True, text=True,
    )  # fmt: skip
    measured: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return measured


def measure(task: str) -> None:
    """In the new process: prints its seconds a step, or the shares of the operations."""
    settings = json.loads(task)
    way = Way(**settings["way"])
    run_workers(measure_in_worker, (way, settings["steps"], settings["profiled"]), processes=way.processes)


def measure_in_worker(rank: int, way: Way, steps: int, profiled: bool) -> None:
    """One process of the training; the first one prints."""
    stepping = iterate_steps(way, rank, WARM_UP + steps)
    for _ in range(WARM_UP):
        next(stepping)
    if not profiled:
        times = [next(stepping) for _ in range(steps)]
        if rank == 0:
            print(json.dumps({SECONDS: statistics.median(times)}))
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        next(stepping)
    spent = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    total = sum(spent.values())
    print(json.dumps({name: value / total for name, value in spent.items()}))


def iterate_steps(way: Way, rank: int, steps: int) -> Iterator[float]:
    """The seconds of every step."""
    torch.manual_seed(0)
    memory = torch.channels_last if way.channels_last else torch.contiguous_format
    unet = build_unet().to(memory_format=memory)
    inner = {id(value) for value in inner_weights(unet)} if way.muon else set()
    matrices = [value for value in unet.parameters() if id(value) in inner]
    groups: list[dict[str, Any]] = [
        {"params": [value for value in unet.parameters() if id(value) not in inner]}
    ]
    groups += [{"params": matrices, "momentum": 0.95}] if matrices else []
    optimizer = Muon(groups, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    alpha_bar = build_scheduler().alphas_cumprod
    density = timestep_density(alpha_bar)

    def losses(step: int) -> Iterator[Tensor]:
        random = generator(0, step, rank)
        clean, noise = (torch.randn(way.batch, CHANNELS, 16, 16, generator=random) for _ in range(2))
        text = torch.randn(way.batch, 77, 256, generator=random)
        index = torch.multinomial(density, way.batch, replacement=True, generator=random)
        level = vp(alpha_bar[index])
        noisy = add_noise(clean, noise, level).contiguous(memory_format=memory)
        with torch.autocast("cpu", torch.bfloat16, enabled=way.half):
            predicted = unet(noisy, index, text).sample
        error = denoising_score_matching(
            predicted, clean, noise=noise, level=level, prediction_type="v_prediction"
        )
        yield error.mean()

    reports = train(
        losses, dict(unet.named_parameters()), optimizer=optimizer, lr_schedule=lambda step: 1.0, steps=steps,
        update=Update(reduce=average_in_place),
    )  # fmt: skip
    with fast_attention_backward(unet) if way.plain_attention else nullcontext():
        began = time.perf_counter()
        for _ in reports:
            yield time.perf_counter() - began
            began = time.perf_counter()


def format_markdown(medians: dict[str, float], shares: dict[str, float]) -> str:
    """Latents a second and their ratio to the recipe's, and the ten most expensive operations."""

    def pace(name: str) -> float:
        return WAYS[name].batch * WAYS[name].processes / medians[name]

    first, *_ = WAYS
    lines = [
        f"`python -m recipes.moji.training.speed`, torch {torch.__version__}, {os.cpu_count()} cores",
        "",
        "| a step of the denoiser | latents a step | seconds | latents a second | to the first |",
        "|---|---|---|---|---|",
    ]
    for name, seconds in medians.items():
        count = WAYS[name].batch * WAYS[name].processes
        ratio = pace(name) / pace(first)
        lines.append(f"| {name} | {count} | {seconds:.2f} | {pace(name):.1f} | {ratio:.2f} × |")
    lines += ["", "| operation | share of the step, one process |", "|---|---|"]
    expensive = sorted(shares, key=lambda name: -shares[name])[:10]
    lines += [f"| `{name}` | {100 * shares[name]:.1f} % |" for name in expensive]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        measure(sys.argv[2])
    else:
        run_main(main)
