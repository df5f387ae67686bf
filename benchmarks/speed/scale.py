"""A simulated preference run over Pick-a-Pic v2 on 16 GPUs: hours, bytes, the bottleneck, and the gain from caches.

    python -m benchmarks.speed.scale                                        costs counted in operations (SD 1.5's shape)
    python -m benchmarks.speed.scale --steps build/benchmarks/align/steps-sd15-cuda.json  costs that were timed on a GPU

Nothing of that size was run. The costs of a pair are either the seconds that `benchmarks.align steps` measured on one
GPU, or operations counted on torch's `meta` device and divided by an assumed rate. Everything else is a stated
assumption and a flag: reading, decoding, and the exchange of gradients.

The simulation: every GPU takes the pairs of its share of a batch from a queue that its processor cores fill (reading is
shared by all), learns, and waits for the others to exchange gradients. A pair's costs, by what is cached:

    script   read and decode both files; encode; reference; learn
    cached   the first pass fills the caches: read, decode, encode. Then read latents; reference; learn
    bank     as cached, and the reference is evaluated at a draw's first visit alone
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from backbone.cli.command_line import settled_command
from backbone.cli.commands import script_app
from backbone.cli.flags import OUTPUT
from backbone.cli.options import Option
from backbone.io.console import UserError, run_app
from backbone.io.files import read_json, write_text

PAIRS, PROMPTS, RAW = 851_293, 58_960, 335_326_416_759
"""Pick-a-Pic v2's pairs without ties and their prompts (Wallace et al. 2024, section 5.1), and its bytes on the hub."""
BATCH = 2048  # pairs a step, as there
VISITS = (1, 2, 5, 10)
Way = Literal["script", "cached", "bank"]
WAYS: tuple[Way, ...] = ("script", "cached", "bank")
BANK_BYTES = 8  # two errors, float32, for a pair's draw

COSTS, MACHINES = "Costs", "Machines"  # panels of --help
app = script_app(__doc__)


@dataclass(frozen=True)
class Costs:
    """GPU seconds of a pair: encoding both images; the reference's forward; the model's forward and backward."""

    encode: float
    reference: float
    learn: float
    source: str = ""


@dataclass(frozen=True)
class Cluster:
    """Assumptions about the machines. No figure here was measured.

    read_rate       bytes a second that all GPUs together read from the shared store
    cores           processor cores beside each GPU
    decode          core-seconds for a pair: two JPEGs of about one megapixel decoded and resized
    exchange        seconds in which all GPUs average their gradients, once a step
    ahead           batches that a queue holds
    """

    gpus: int = 16
    read_rate: float = 2e9
    cores: int = 8
    decode: float = 0.034
    exchange: float = 0.05
    ahead: int = 2


class Sizes(NamedTuple):
    """Bytes of a pair: its files, and its latents as they are remembered."""

    raw: float
    latents: float


class Pass(NamedTuple):
    """One pass over the data: seconds, and how long each part of the machines was busy in them."""

    seconds: float
    busy: dict[str, float]

    @property
    def first(self) -> str:
        """The resource that is busy longest, which saturates first."""
        return max(self.busy, key=lambda name: self.busy[name])


def count_latent_bytes(side: int, channels: int, *, width: int) -> int:
    """Bytes of one picture's latent of `side` × `side` numbers of this many bytes."""
    return channels * side * side * width


def simulate(cluster: Cluster, *, steps: int, pairs: int, read: float, decode: float, compute: float) -> Pass:
    """`steps` steps of `pairs` pairs each over all GPUs, a queue between the processor cores and each GPU.

    A pair is `read` bytes, `decode` core-seconds and `compute` seconds of a GPU. A batch is begun when the queue has
    room, a step when its batch is there and the last exchange is over.
    """
    share = pairs / cluster.gpus
    reading, decoding = pairs * read / cluster.read_rate, share * decode / cluster.cores
    filling, learning = max(reading, decoding), share * compute
    filled = free = 0.0
    begun: deque[float] = deque(maxlen=cluster.ahead)
    for _ in range(steps):
        room = begun[0] if len(begun) == cluster.ahead else 0.0
        filled = max(filled, room) + filling
        start = max(filled, free)
        begun.append(start)
        free = start + learning + cluster.exchange
    busy = {
        "reading": steps * reading,
        "decoding": steps * decoding,
        "the GPUs": steps * learning,
        "exchanging gradients": steps * cluster.exchange,
    }
    return Pass(free, busy)


def simulate_passes(
    way: Way, cluster: Cluster, costs: Costs, sizes: Sizes, *, draws: int, visits: int, pairs: int = PAIRS
) -> list[tuple[int, Pass]]:
    """The passes of a run that visits each of a pair's draws so often: how many of a kind, and one of them.

    Filling the caches is a separate pass, in which no gradients are exchanged.
    """
    steps = -(-pairs // BATCH)
    count = draws * visits
    if way == "script":
        total = costs.encode + costs.reference + costs.learn
        pass_ = simulate(
            cluster, steps=steps, pairs=BATCH, read=sizes.raw, decode=cluster.decode, compute=total
        )
        return [(count, pass_)]
    without_exchange = replace(cluster, exchange=0.0)
    fill = simulate(
        without_exchange,
        steps=steps,
        pairs=BATCH,
        read=sizes.raw,
        decode=cluster.decode,
        compute=costs.encode,
    )
    reference_passes = draws if way == "bank" else count
    kinds = [(1, fill)]
    for number, compute in (
        (reference_passes, costs.reference + costs.learn),
        (count - reference_passes, costs.learn),
    ):
        if number:
            pass_ = simulate(
                cluster, steps=steps, pairs=BATCH, read=sizes.latents, decode=0.0, compute=compute
            )
            kinds.append((number, pass_))
    return kinds


def sum_hours(passes: list[tuple[int, Pass]]) -> float:
    """Hours of all passes together."""
    return sum(number * pass_.seconds for number, pass_ in passes) / 3600


def describe_saturation(passes: list[tuple[int, Pass]]) -> str:
    """The resource that is busy longest over all passes, and its share of the time."""
    busy: dict[str, float] = {}
    for number, pass_ in passes:
        for name, seconds in pass_.busy.items():
            busy[name] = busy.get(name, 0.0) + number * seconds
    first = max(busy, key=lambda name: busy[name])
    return f"{first} ({busy[first] / 36 / sum_hours(passes):.0f} %)"


# Costs ------------------------------------------------------------------------------------------------------


def read_costs(path: Path) -> Costs:
    """Costs from a results file of `benchmarks.align steps`; `UserError` for any other file, or one not from a GPU."""
    facts: dict[str, Any] = read_json(path)
    try:
        seconds, machine = facts["seconds_per_pair"], str(facts["machine"])
        learn, cached, encode = seconds["bank"], seconds["cached"], facts["encode_seconds_per_pair"]
    except (KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of `python -m benchmarks.align steps` ({error}).") from error
    if not machine.startswith("cuda"):
        raise UserError(f"{path} was timed on {machine}. Time the steps on a GPU, or leave out --steps.")
    source = f"seconds timed on one GPU: {facts['shape']}, {facts['precision']} ({machine})"
    return Costs(encode, cached - learn, learn, source)


def estimate_costs(shape: str, rate: float) -> Costs:
    """Costs from operations counted without computing, at `rate` operations a second of a GPU."""
    encode, forward, backward = (2 * count for count in count_operations(shape))
    source = (
        f"operations counted for {shape}, LoRA on attention: {encode / 1e12:.2f} TFLOP a pair to encode, "
        f"{forward / 1e12:.2f} to ask, {(forward + backward) / 1e12:.2f} to learn; {rate / 1e12:g} TFLOP/s assumed"
    )
    return Costs(encode / rate, forward / rate, (forward + backward) / rate, source)


def count_operations(shape: str) -> tuple[int, int, int]:
    """Floating-point operations for one picture: the autoencoder's encoding, a forward and a LoRA's backward pass."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch.utils.flop_counter import FlopCounterMode

    from backbone.adapters.lora import add_lora
    from benchmarks.speed.shapes import find_shape

    configs = find_shape(shape)
    with torch.device("meta"):
        autoencoder = AutoencoderKL.from_config(configs.autoencoder).requires_grad_(False)
        unet = UNet2DConditionModel.from_config(configs.unet).requires_grad_(False)
    add_lora(unet, "counted", rank=8, alpha=8, targets=("to_q", "to_k", "to_v", "to_out.0"))
    side, config = int(configs.unet["sample_size"]), unet.config
    noisy = torch.zeros(1, 4, side, side, device="meta")
    words = torch.zeros(1, 77, config.cross_attention_dim, device="meta")
    conditioning = None
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        conditioning = {
            "text_embeds": torch.zeros(1, width, device="meta"),
            "time_ids": torch.zeros(1, 6, device="meta"),
        }
    with FlopCounterMode(display=False) as encoding, torch.no_grad():
        autoencoder.encode(torch.zeros(1, 3, 8 * side, 8 * side, device="meta"))
    with FlopCounterMode(display=False) as forward:
        prediction = unet(noisy, torch.zeros(1, device="meta"), words, added_cond_kwargs=conditioning).sample
    with FlopCounterMode(display=False) as backward:
        prediction.square().mean().backward()
    return encoding.get_total_flops(), forward.get_total_flops(), backward.get_total_flops()


# Tables -----------------------------------------------------------------------------------------------------


def format_report(cluster: Cluster, costs: Costs, sizes: Sizes, *, draws: int, width: int) -> str:
    """The tables, as Markdown."""
    lines = [
        f"Costs: {costs.source}.",
        "",
        f"Assumed: {cluster.gpus} GPUs with {cluster.cores} cores each, {cluster.read_rate / 1e9:g} GB/s read by all "
        f"together, {cluster.decode * 1000:g} core-ms to decode a pair, {cluster.exchange * 1000:g} ms a step to "
        f"exchange gradients, {BATCH} pairs a step.",
        "",
        "| bytes | |",
        "|---|---|",
        f"| the data set | {RAW / 1e9:.0f} GB |",
        f"| latents, {sizes.latents / 1024:.0f} KiB a pair | {PAIRS * sizes.latents / 1e9:.0f} GB |",
        f"| prompts' states, bf16 ({width} × 77 numbers each) | {PROMPTS * width * 77 * 2 / 1e9:.0f} GB |",
        f"| cached base errors, {draws} noise samples | {PAIRS * draws * BANK_BYTES / 1e6:.0f} MB |",
        "",
        f"| noise samples × visits | steps | {' | '.join(f'{way}, hours' for way in WAYS)} | cached | bank | "
        f"{' | '.join(f'{way}: busy longest' for way in WAYS)} |",
        "|" + "---|" * 10,
    ]
    for number, visits in ((1, 1), *((draws, visits) for visits in VISITS)):
        runs = [simulate_passes(way, cluster, costs, sizes, draws=number, visits=visits) for way in WAYS]
        times = [sum_hours(passes) for passes in runs]
        steps = -(-PAIRS // BATCH) * number * visits
        cells = [
            f"{number} × {visits}",
            f"{steps:,}",
            *(f"{time:.1f}" for time in times),
            *(f"{times[0] / time:.2f}×" for time in times[1:]),
            *(describe_saturation(passes) for passes in runs),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


@dataclass(frozen=True, kw_only=True)
class ScaleSettings:
    """The machines, and what a pair costs them."""

    steps: Annotated[Path | None, Option("A result of benchmarks.align steps, timed on a GPU.", COSTS)] = None
    shape: Annotated[str, Option("Where operations are counted.", COSTS, choices=("sd15", "sdxl"))] = "sd15"
    rate: Annotated[
        float, Option("Assumed: TFLOP/s that a GPU reaches (a third of an A100's 312).", COSTS, min=1)
    ] = 104.0
    draws: Annotated[int, Option("Noise samples of each pair.", COSTS, min=1)] = 4
    gpus: Annotated[int, Option("All together.", MACHINES, min=1)] = 16
    cores: Annotated[int, Option("Beside each GPU.", MACHINES, min=1)] = 8
    read_rate: Annotated[float, Option("GB/s, all GPUs together.", MACHINES, min=0.001)] = 2.0
    decode: Annotated[float, Option("Core-milliseconds a pair.", MACHINES, min=0)] = 34.0
    exchange: Annotated[float, Option("Milliseconds a step.", MACHINES, min=0)] = 50.0
    out: Annotated[Path, Option("Where the table goes.", OUTPUT)] = Path("build/benchmarks/scale.md")

    @property
    def cluster(self) -> Cluster:
        """The machines in plain units."""
        return Cluster(self.gpus, self.read_rate * 1e9, self.cores, self.decode / 1000, self.exchange / 1000)


@settled_command(app, ScaleSettings, panels=(COSTS, MACHINES, OUTPUT))
def main(settings: ScaleSettings) -> None:
    """Simulate and print the tables."""
    rate = settings.rate * 1e12
    costs = read_costs(settings.steps) if settings.steps else estimate_costs(settings.shape, rate)
    side, width = (128, 2048) if "sdxl" in costs.source else (64, 768)
    sizes = Sizes(RAW / PAIRS, 2 * count_latent_bytes(side, 4, width=2))
    table = format_report(settings.cluster, costs, sizes, draws=settings.draws, width=width)
    write_text(settings.out, table)
    print(table)


if __name__ == "__main__":
    run_app(app)
