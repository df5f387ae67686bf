"""Data that outgrows memory, measured on this machine: `align train` from 2,000 to 200,000 prepared pairs of `moji`.

    python -m benchmarks.speed.large all                 resumable; writes build/benchmarks/large/large.md

1. Two prepared folders are generated: pairs of latents and conditions of `moji`'s shapes, random numbers, 14 pairs a
   prompt as in Pick-a-Pic v2. They have the files, columns and sizes that `align prepare` writes.
2. A training is started on each in a separate process, as `align train` starts it, except for the pictures that it
   draws and its evaluations, which cost the same at any size: seconds to its first step, on the clock and of processor,
   beside those of importing the libraries alone; memory at its end.
3. The steps of both are timed in turns in one process.
4. Real images are prepared: images a second beside what the encoder alone does with the same images in memory; and
   once more, killed half-way, with what the second try then had left to do. Beside the seconds stands the processor
   time of all processes: where both sides fill every core it is what bounds them, and other work does not count in it.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from unittest.mock import patch

import typer

from backbone.cli.commands import script_app
from backbone.io.console import notify, run_app
from backbone.io.files import read_json, write_json, write_text

if TYPE_CHECKING:
    from backbone.models.model import Backbone

FEW, MANY = 2_000, 200_000
PER_PROMPT = 14  # pairs, as in Pick-a-Pic v2
IMAGES_SHARD = 16_384  # rows of a generated shard
STEPS, BATCH, DRAWS = 20, 1, 16
TURNS, IN_TURN = 8, 3  # blocks of steps of each, timed in turns
PREPARED = 240  # pairs of real images
LIBRARIES = """
import gc; gc.set_threshold(200_000, 20, 100)  # as `backbone.io.console.run_app` has it
import torch, torch._dynamo, peft
from diffusers import UNet2DConditionModel
"""  # what a step cannot do without: diffusers and torch's optimisers import dynamo, peft imports transformers

app = script_app(__doc__)
Out = Annotated[Path, typer.Option(help="Folder of all files, outside of git.")]
OUT = Path("build/benchmarks/large")


@app.command("all")
def main(
    out: Out = OUT,
    few: Annotated[int, typer.Option(min=32, help="Images of the small source.")] = FEW,
    many: Annotated[int, typer.Option(min=32, help="Images of the large source.")] = MANY,
    model: Annotated[str, typer.Option(help="A diffusers folder, or moji.")] = "moji",
    pairs: Annotated[int, typer.Option(min=8, help="Pairs of real images to prepare.")] = PREPARED,
) -> None:
    """Measure everything and print the tables."""
    facts_file = out / "large.json"
    facts: dict[str, Any] = read_json(facts_file) if facts_file.is_file() else {}
    parts: dict[str, Callable[[], Any]] = {
        "libraries": time_imports,
        "few": lambda: run_start(generate(out / f"pairs-{few}", few, model), model),
        "many": lambda: run_start(generate(out / f"pairs-{many}", many, model), model),
        "steps": lambda: compare_steps(out / f"pairs-{few}", out / f"pairs-{many}", model),
        "preparing": lambda: measure_preparing(out, pairs, model),
        "killed": lambda: kill_preparing(out, pairs, model),
    }
    for name, measure in parts.items():
        if name not in facts:
            notify(f"Measuring: {name}.")
            facts[name] = measure()
            write_json(facts_file, facts)
    table = format_tables(facts, few, many, model)
    write_text(out / "large.md", table)
    print(table)


# Generated pairs ---------------------------------------------------------------------------------------------


def generate(folder: Path, count: int, model_name: str) -> Path:
    """A prepared folder of random pairs of the model's shapes; one that is there is taken as it is."""
    from backbone.io.run_folder import PREPARED, is_prepared
    from backbone.models.encode import describe_encoder
    from backbone.models.model import Backbone
    from backbone.training.prepared import PreparedFacts

    if is_prepared(folder):
        return folder
    model = Backbone.open(model_name, device="cpu")
    prompts = [f"a prompt of number {number}" for number in range(-(-count // PER_PROMPT))]
    write_texts(folder, model, prompts)
    write_pairs(folder, model, prompts, count)
    facts = PreparedFacts(
        "pairs",
        "generated",
        model.location.name,
        model.resolution,
        count,
        encoder=describe_encoder(model),
        finished=True,
    )
    write_json(folder / PREPARED, asdict(facts))
    return folder


def write_texts(folder: Path, model: Backbone, prompts: Sequence[str]) -> None:
    """The table of prompts, the empty one first, with random states of the encoder's shape."""
    import torch

    from backbone.data.table import KEY, Table
    from backbone.models.encode import cast_text, prompt_keys
    from backbone.training.prepared import PROMPTS

    random = torch.Generator().manual_seed(0)
    text, table = cast_text(model, model.encode_prompts(["a dog"]).text), Table(folder / PROMPTS)
    for first in range(0, len(prompts) + 1, IMAGES_SHARD // 16):
        chunk = ["", *prompts][first : first + IMAGES_SHARD // 16]
        states = {
            name: torch.randn(len(chunk), *value.shape[1:], generator=random).to(value.dtype)
            if value.is_floating_point()
            else value.repeat(len(chunk), *[1] * (value.ndim - 1))
            for name, value in text.items()
        }
        table.append({KEY: torch.from_numpy(prompt_keys(chunk).copy()), **states})
    table.describe()


def write_pairs(folder: Path, model: Backbone, prompts: Sequence[str], count: int) -> None:
    """The tables of images, as random latents, and of pairs of them."""
    import torch

    from align.pairs.prepared import IMAGES
    from backbone.data.table import KEY, Table
    from backbone.models.encode import stored_dtype
    from backbone.training.prepared import RECORDS

    random = torch.Generator().manual_seed(1)

    def keys(rows: int) -> torch.Tensor:
        return torch.randint(0, 256, (rows, 32), generator=random, dtype=torch.uint8)

    images, records = Table(folder / IMAGES), Table(folder / RECORDS)
    for first in range(0, count, IMAGES_SHARD // 2):
        rows = min(IMAGES_SHARD // 2, count - first)
        latents = torch.randn(2 * rows, *model.latent_shape, generator=random).to(stored_dtype(model))
        image_keys = keys(2 * rows)
        images.append({KEY: image_keys, "mean": latents})
        records.append(
            {
                KEY: keys(rows), "number": torch.arange(first, first + rows), "content": keys(rows),
                "contents": keys(2 * rows).view(rows, 2, 32), "images": image_keys.view(rows, 2, 32),
                "label": torch.ones(rows), "pair": torch.ones(rows, dtype=torch.bool),
                "both_bad": torch.zeros(rows, dtype=torch.bool), "bad": torch.zeros(rows, dtype=torch.bool),
                "prompt": [prompts[row // PER_PROMPT] for row in range(first, first + rows)],
                "user": [""] * rows, "name": [f"row {row}" for row in range(first, first + rows)],
                "problem": [""] * rows,
            }
        )  # fmt: skip
    images.describe()
    records.describe()


# Training from them -----------------------------------------------------------------------------------------


def run_start(folder: Path, model: str) -> dict[str, float]:
    """The output of `start`, run in a separate process with an empty bank."""
    command = [sys.executable, "-m", "benchmarks.speed.large", "start", str(folder), "--model", model]
    environment = {**os.environ, "LIMNER_CACHE": str(folder / f"cache-{time.time_ns()}")}
    process = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    facts: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return facts


def time_imports(times: int = 3) -> float:
    """Processor seconds of a process that only imports the libraries, the median of some."""

    def measure() -> float:
        began = processor_seconds()
        subprocess.run([sys.executable, "-c", LIBRARIES], check=True)
        return processor_seconds() - began

    return statistics.median(measure() for _ in range(times))


@app.command()
def start(
    folder: Annotated[Path, typer.Argument(help="A prepared folder.")],
    model: Annotated[str, typer.Option(help="A diffusers folder, or moji.")] = "moji",
    steps: Annotated[int, typer.Option(min=1, help="Optimiser steps.")] = STEPS,
) -> None:
    """Train some steps from a prepared folder, and print seconds and bytes as JSON."""
    import psutil

    training, began = open_training(folder, model)
    opened = training.opened_seconds
    step_seconds = take(training, steps)
    next(step_seconds)
    first, used = time.perf_counter(), time.process_time()
    ready = read_memory()
    for _ in step_seconds:
        pass
    facts = {
        "data": opened,
        "first_step": first - began,
        "first_step_processor": used - training.used_before,
        "processor_since_start": used,
        "since_process_start": time.time() - psutil.Process().create_time() - (time.perf_counter() - first),
        "pairs": len(training.data.train),
        **{f"{name}_at_first_step": value for name, value in ready.items()},
        **read_memory(),
        "bank_bytes": training.reference.values.nbytes,
    }
    print(json.dumps(facts))


def open_training(folder: Path, model_name: str) -> tuple[Any, float]:
    """A training as `align train` begins it, without evaluations; and when it was begun, all modules loaded."""
    from align.objectives import preference
    from align.objectives.dataset import make_preference_data, make_records
    from align.pairs.prepared import Prepared
    from align.settings import resolve_settings
    from backbone.models.model import Backbone

    began, used_before = time.perf_counter(), time.process_time()
    model = Backbone.open(model_name, device="cpu")
    options = {"pairs": str(folder), "held_out": 0.0, "batch": BATCH, "draws": DRAWS, "evaluation_draws": 1}
    settings = resolve_settings({**options, "steps": 10**6, "device": "cpu"}, model.defaults)
    started = time.perf_counter()
    training_records, held_out = make_records(Prepared(folder), settings).split(share=0.0, seed=0)
    data = make_preference_data(model, training_records, held_out, settings)
    opened = time.perf_counter() - started
    with patch.object(preference, "GAP_RECORDS", 0):
        training: Any = preference.PreferenceTraining(model, data, settings)
    training.opened_seconds, training.used_before = opened, used_before
    return training, began


def take(training: Any, steps: int) -> Iterator[float]:
    """Take this many more optimiser steps; yields the seconds of each."""
    from backbone.training.run import take_steps

    for report in take_steps(training, until=training.done + steps):
        yield report.seconds


def read_memory() -> dict[str, int]:
    """Bytes of this process: its peak resident set, its resident set now, and the part of that without a file."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    sizes = {line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.endswith(" kB")}
    return {"peak": sizes["VmHWM"], "resident": sizes["VmRSS"], "own": sizes["RssAnon"]}


def compare_steps(few: Path, many: Path, model: str) -> dict[str, Any]:
    """Median seconds of a step from each folder, blocks of steps in turns, and the ratios of the pairs of blocks."""
    trainings = [open_training(folder, model)[0] for folder in (few, many)]
    for training in trainings:
        list(take(training, IN_TURN))  # warm
    blocks = [[statistics.median(take(training, IN_TURN)) for training in trainings] for _ in range(TURNS)]
    ratios = sorted(second / first for first, second in blocks)
    return {
        "few": statistics.median(first for first, _ in blocks),
        "many": statistics.median(second for _, second in blocks),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
    }


# Preparing real images --------------------------------------------------------------------------------------


def write_images(folder: Path, count: int, side: int) -> Path:
    """A source of pairs: JPEG files, as Pick-a-Pic's are, of smooth random colours, twice the model's size."""
    import numpy as np
    from PIL import Image

    if (folder / "pairs.jsonl").is_file():
        return folder / "pairs.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    random, lines = np.random.default_rng(0), []
    for number in range(count):
        for name in ("chosen", "rejected"):
            pixels = Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8))
            large = pixels.resize((2 * side, 2 * side), Image.Resampling.BICUBIC)
            large.save(folder / f"{number}-{name}.jpg", quality=92)
        line = {"prompt": f"a dog, number {number // PER_PROMPT}", "chosen": f"{number}-chosen.jpg"}
        lines.append(json.dumps(line | {"rejected": f"{number}-rejected.jpg"}) + "\n")
    write_text(folder / "pairs.jsonl", "".join(lines))
    return folder / "pairs.jsonl"


def measure_preparing(out: Path, pairs: int, model_name: str) -> dict[str, float]:
    """Images a second and milliseconds of processor an image, in turns: the encoder's own and a whole preparation's.

    The encoder alone works on images that are in memory. Processor time is of one image more: the difference of
    preparing all and a quarter of them, so that what is loaded first is not in it.
    """
    import torch

    from align.pairs.read import read_preferences
    from align.training.prepare import prepare_pairs
    from backbone.models.encode import count_images_at_once
    from backbone.models.model import Backbone

    model = Backbone.open(model_name, device="cpu")
    source = read_preferences(write_images(out / "images", pairs, model.resolution))
    at_once = count_images_at_once(model, (model.resolution, model.resolution))
    pictures = torch.rand(at_once, 3, model.resolution, model.resolution) * 2 - 1

    def encode_all() -> None:
        for _ in range(-(-2 * pairs // at_once)):
            model.encode(pictures)

    def prepare(records: int = pairs) -> None:
        selected = replace(source, pairs=source.pairs[:records])
        prepare_pairs(selected, model, out / f"prepared-{time.time_ns()}", any_model=True, workers=1)

    def measure(act: Callable[[], None]) -> tuple[float, float]:
        began, used = time.perf_counter(), processor_seconds()
        act()
        seconds, used = time.perf_counter() - began, processor_seconds() - used
        return 2 * pairs / seconds, 1000 * used / (2 * pairs)

    encode_all()  # loaded and warm
    turns, quarter = [], pairs // 4
    for number in range(3):
        encoder_speed, encoder_used = measure(encode_all)
        fixed = measure(partial(prepare, quarter))[1]  # a quarter of them, and all of what is loaded first
        preparing_speed, used = measure(prepare)
        used = (used - fixed) * pairs / (pairs - quarter)
        turns.append((encoder_speed, encoder_used, preparing_speed, used))
        notify(
            f"Turn {number + 1}: the encoder {encoder_speed:.0f} images/s, {encoder_used:.1f} ms of processor; "
            f"preparing {preparing_speed:.0f}, {used:.1f} ms."
        )
    encoder_speed, encoder_used, preparing_speed, used = (
        statistics.median(column) for column in zip(*turns, strict=True)
    )
    return {
        "encoder": encoder_speed,
        "preparing": preparing_speed,
        "share": statistics.median(turn[2] / turn[0] for turn in turns),
        "encoder_processor": encoder_used,
        "processor": used,
        "processor_share": statistics.median(turn[1] / turn[3] for turn in turns),
    }


@app.command()
def preparing(
    out: Out = OUT,
    model: Annotated[str, typer.Option(help="A diffusers folder, or moji.")] = "moji",
    pairs: Annotated[int, typer.Option(min=8, help="Pairs of real images to prepare.")] = PREPARED,
) -> None:
    """Only the throughput of preparation, as JSON."""
    print(json.dumps(measure_preparing(out, pairs, model)))


def processor_seconds() -> float:
    """Processor seconds of this process and of its children that have ended."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def kill_preparing(out: Path, pairs: int, model_name: str) -> dict[str, int]:
    """Records that a preparation had written when it was killed half-way, and those that the next one added."""
    from backbone.data.table import Table
    from backbone.models.model import Backbone
    from backbone.training.prepared import RECORDS

    source = write_images(out / "images", pairs, Backbone.open(model_name).resolution)
    folder = out / f"killed-{time.time_ns()}"
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.large",
        "prepare-in-shards",
        str(source),
        str(folder),
        "--model",
        model_name,
    ]
    running = subprocess.Popen(command)
    while running.poll() is None and len(list((folder / RECORDS).glob("data-*.arrow"))) < 4:
        time.sleep(0.02)
    running.send_signal(signal.SIGKILL)
    running.wait()
    modified = {path: path.stat().st_mtime_ns for path in folder.rglob("data-*.arrow")}
    records = len(Table(folder / RECORDS))
    subprocess.run(command, check=True)
    unchanged = all(
        path.exists() and path.stat().st_mtime_ns == modified_at for path, modified_at in modified.items()
    )
    assert unchanged, "a shard was written twice"
    return {
        "pairs": pairs,
        "kept": records,
        "left": len(Table(folder / RECORDS)) - records,
        "shards_kept": len(modified),
    }


@app.command()
def prepare_in_shards(
    source: Annotated[Path, typer.Argument(help="What is prepared.")],
    folder: Annotated[Path, typer.Argument(help="The folder to write.")],
    model: Annotated[str, typer.Option(help="A diffusers folder, or moji.")] = "moji",
) -> None:
    """Prepare with a shard every second, so that a kill costs a second."""
    from align.pairs.read import read_preferences
    from align.training.prepare import prepare_pairs
    from backbone.models import encode
    from backbone.models.model import Backbone

    with patch.object(encode, "SHARD_SECONDS", 1.0):
        prepare_pairs(read_preferences(source), Backbone.open(model, device="cpu"), folder, any_model=True)


# Tables -----------------------------------------------------------------------------------------------------


def format_tables(facts: dict[str, Any], few: int, many: int, model: str) -> str:
    """The tables, as Markdown."""
    from backbone.models.model import Backbone

    opened = Backbone.open(model, device="cpu")
    first, second, steps = facts["few"], facts["many"], facts["steps"]
    preparing, killed = facts["preparing"], facts["killed"]
    libraries = f"{facts['libraries']:.2f} s"

    def row(name: str, key: str, unit: float, digits: int, word: str) -> str:
        a, b = first[key] / unit, second[key] / unit
        return f"| {name} | {a:.{digits}f} {word} | {b:.{digits}f} {word} | {b - a:+.{digits}f} {word} |"

    lines = [
        f"`align train` from generated pairs of `{opened.location.name}`'s shapes "
        f"({' × '.join(map(str, opened.latent_shape))}, {str(opened.dtype).removeprefix('torch.')}), steps of "
        f"{BATCH}, {DRAWS} draws, {STEPS} steps; nothing drawn or evaluated; CPU, {os.cpu_count()} cores.",
        "",
        f"| | {few:,} pairs | {many:,} pairs | difference |",
        "|---|---|---|---|",
        row("the prepared folder opened, records selected", "data", 1, 2, "s"),
        row("first step done, modules loaded", "first_step", 1, 2, "s"),
        row("the same in processor time", "first_step_processor", 1, 2, "s"),
        row("first step done, from the start of the process", "since_process_start", 1, 2, "s"),
        row("the same in processor time", "processor_since_start", 1, 2, "s"),
        f"| importing torch, peft and diffusers' network alone, processor time | {libraries} | {libraries} | |",
        row("highest resident memory", "peak", 1e6, 0, "MB"),
        row("of it no file's, at the end", "own", 1e6, 0, "MB"),
        row("bank of reference errors, a mapped file", "bank_bytes", 1e6, 1, "MB"),
        f"| a step, in turns | {1000 * steps['few']:.0f} ms | {1000 * steps['many']:.0f} ms | "
        f"{steps['ratio']:.3f}× ({steps['ratios'][0]:.3f} to {steps['ratios'][-1]:.3f}) |",
        "",
        "| preparing | |",
        "|---|---|",
        f"| the encoder alone, images in memory | {preparing['encoder']:.1f} images/s |",
        f"| files decoded, checked, encoded and written | {preparing['preparing']:.1f} images/s |",
        f"| share of the encoder's own bound, by the clock | {preparing['share']:.2f} |",
        f"| the encoder alone, processor time | {preparing['encoder_processor']:.1f} ms an image |",
        f"| the whole preparation, of all its processes | {preparing['processor']:.1f} ms an image |",
        f"| share of the encoder's own bound, by processor time | {preparing['processor_share']:.2f} |",
        f"| killed after {killed['kept']} of {killed['pairs']} pairs: left to the next try | {killed['left']} pairs |",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    run_app(app)
