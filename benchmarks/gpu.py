"""All GPU measurements in one command.

    python -m benchmarks.gpu --minutes 8 --out build/benchmarks/gpu
    python -m benchmarks.gpu --tiny --device cpu             every row in small, in seconds: does it run?

Nothing is compiled there, which would take most of the time, unless `--backend` names one.

No network and no file of weights: models of the true shapes get random weights on the device
(`benchmarks.speed.on_device`). Rows run in the order of their importance until the minutes are over; each is written
when it is done, with what was compared beside what was timed, and a second call goes on with the rows that are missing.
A row that fails says why and the others run. `gpu.md` is the table of all rows that there are, for
`benchmarks/results/gpu.md`.

The other side of a step is a plain re-statement of what diffusers' scripts do in it (`benchmarks.speed.customize`,
`benchmarks.align`, and `FlowScript` here for `train_dreambooth_lora_flux.py`), on the same model and the same adapter.
`bare` is forward, loss and backward alone on tensors that are there. Steps are timed many together, since a step here
never waits for the device; the scripts read their loss at every step, as they do.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageChops
from torch import Tensor

from backbone.cli.commands import run_main
from backbone.conditions.conditions import Conditions
from backbone.diffusion.noise import generator
from backbone.io.console import UserError, notify
from backbone.io.files import read_json, write_json, write_text
from backbone.media.transforms import crop_square, to_tensor
from backbone.memory.planner import GIB, MemoryEstimator, MemorySettings, has_bitsandbytes, plan_memory
from backbone.models.cache import VARIABLE
from backbone.models.compiled import CompiledBlocks
from backbone.models.model import Backbone
from backbone.models.sample import Request, sample
from backbone.training.hardware import use_tensor_cores
from backbone.training.run import take_steps
from benchmarks import align as preference
from benchmarks.speed.customize import (
    BareStep,
    Script,
    make_material,
    make_settings,
    measure_parity,
    predict,
    take_one_image,
)
from benchmarks.speed.edit import SOURCE, TARGETS, make_whole_edits, sample_image
from benchmarks.speed.lora import addmm, use_forward
from benchmarks.speed.on_device import build, write_configs
from benchmarks.speed.shapes import Parts, describe_machine, make_random_images
from customize.data.dataset import Bucket, TrainingData
from customize.objectives.dreambooth import DreamBooth
from customize.training.memory import make_workload
from edit.inversion.inversion import invert
from edit.methods.prompt_to_prompt.replace import replace as replace_words
from edit.methods.prompt_to_prompt.settings import ReplaceSettings

FAILURES = (
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    OSError,
    UserError,
)
SIZES = (8, 12, 16, 24)  # GiB of the planner's devices
Facts = dict[str, Any]


@dataclass
class Bench:
    """The rows' shared state: device, size, and the model that was built last."""

    device: str
    tiny: bool
    out: Path
    backend: str = "inductor"
    built: tuple[str, Parts] | None = field(default=None, init=False)
    drawing: dict[str, Backbone] = field(default_factory=dict, init=False)

    @property
    def precision(self) -> str:
        return "fp32" if self.device == "cpu" else "bf16"

    @property
    def steps(self) -> int:
        """Timed steps of each kind."""
        return 1 if self.tiny else 20

    def parts(self, shape: str) -> Parts:
        """A model of this shape; the previous one is freed."""
        if self.built is None or self.built[0] != shape:
            if self.built is not None:
                self.free()
            folder = write_configs(shape, self.out / "configs" / shape, tiny=self.tiny)
            resolution = 512 if shape == "flux" and not self.tiny else 0  # as diffusers' script has it
            self.built = (
                shape,
                build(folder, device=self.device, precision=self.precision, resolution=resolution),
            )
        return self.built[1]

    def moji(self, device: str) -> Backbone:
        """`moji` in fp32 on a device, for the rows that draw with it: one load for all of them."""
        if device not in self.drawing:
            self.drawing[device] = Backbone.open("moji", device=device, precision="fp32")
        return self.drawing[device]

    def free(self) -> None:
        """Free the device's memory."""
        self.built = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()

    def compiled(self, model: Backbone) -> CompiledBlocks:
        """The denoiser's blocks, compiled by the backend; by `none`, no block at all."""
        return CompiledBlocks([] if self.backend == "none" else [model.denoiser], backend=self.backend)

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.device == "cuda":
            torch.cuda.synchronize()

    def seconds(self, act: Callable[[int], object], count: int) -> float:
        """Seconds of one of `count` in a row, after the device was idle."""
        self.wait()
        began = time.perf_counter()
        act(count)
        self.wait()
        return (time.perf_counter() - began) / count

    @contextmanager
    def peak(self, facts: Facts, name: str) -> Iterator[None]:
        """Record the GPU's peak memory inside the `with`, in GiB."""
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        yield
        if self.device == "cuda":
            facts.setdefault("peak GiB", {})[name] = round(torch.cuda.max_memory_allocated() / GIB, 2)


@dataclass(frozen=True)
class Row:
    """A row of the table: its key, what it is, and how it is measured."""

    key: str
    title: str
    measure: Callable[[Bench], Facts]


def main(
    minutes: Annotated[float, typer.Option(help="No row starts after this many minutes.")] = 8.0,
    out: Annotated[Path, typer.Option(help="Rows and table go here.")] = Path("build/benchmarks/gpu"),
    tiny: Annotated[bool, typer.Option("--tiny", help="Networks as small as they get.")] = False,
    device: Annotated[str, typer.Option(help="cuda or cpu.")] = "cuda",
    backend: Annotated[
        str,
        typer.Option(
            help="Backend of torch.compile; none: no compilation. Left out: inductor on a GPU, else none."
        ),
    ] = "",
    only: Annotated[
        list[str] | None, typer.Option(help="Only rows whose key starts with this; repeatable.")
    ] = None,
) -> None:
    """Measures the rows that are missing, and writes the table."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("There is no GPU here. Add --device cpu --tiny to see whether the rows run.")
    began = time.monotonic()
    bench = Bench(device, tiny, out, backend or ("inductor" if device == "cuda" else "none"))
    use_tensor_cores(torch.device(device))
    previous_cache = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = str(out / "cache")
    gc.freeze()  # a million objects of torch's modules, through which every row's collection would go
    try:
        for row in ROWS:
            selected = only is None or any(row.key.startswith(start) for start in only)
            path = out / "rows" / f"{row.key}.json"
            if not selected or (path.exists() and "failed" not in read_json(path)):
                continue
            if time.monotonic() - began > 60 * minutes:
                notify(f"{row.key} and what follows is left for another call.")
                break
            facts = measure(row, bench)
            write_json(path, facts)
            write_text(out / "gpu.md", format_markdown(out))
            notify(f"{row.key}: {facts.get('failed', 'done')} ({facts['took']:.0f} s)")
    finally:
        bench.free()
        gc.unfreeze()
        os.environ.pop(VARIABLE)
        if previous_cache is not None:
            os.environ[VARIABLE] = previous_cache
    text = format_markdown(out)
    write_text(out / "gpu.md", text)
    print(text)


def measure(row: Row, bench: Bench) -> Facts:
    """A row's figures, or the error."""
    began = time.monotonic()
    facts: Facts
    try:
        facts = row.measure(bench)
    except FAILURES as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        message = (str(error).splitlines() or [""])[0][:300]
        facts = {"failed": f"{type(error).__name__}: {message} ({Path(frame.filename).name}:{frame.lineno})"}
        bench.free()
    return {
        "title": row.title,
        **facts,
        "took": round(time.monotonic() - began, 1),
        "machine": describe_machine(bench.device),
    }


# (a) The same as on a CPU -----------------------------------------------------------------------------------


@contextmanager
def without_tf32() -> Iterator[None]:
    """Inside the `with`, fp32 is fp32 in matrices and convolutions too, as on a CPU."""
    matrices, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(matrices)
        torch.backends.cudnn.allow_tf32 = convolutions


@without_tf32()
def compare_steps(device: str) -> Facts:
    """A step of DreamBooth on `moji`, in fp32, here and on a CPU: its loss, and its gradients."""
    results, material = [], make_material(open_on_cpu("moji"))
    for name in (device, "cpu"):
        model = Backbone.open("moji", device=name, precision="fp32")
        training = DreamBooth(model, move_data(material, model), make_settings(2))
        for number, value in enumerate(training.parameters.values()):
            value.data += 1e-2 * torch.randn(value.shape, generator=generator("apart", number)).to(
                value.device
            )
        with training.learning():
            loss = next(training.losses(1))
        gradients = torch.autograd.grad(loss, list(training.parameters.values()))
        results.append((float(loss), [gradient.cpu() for gradient in gradients]))
    (our_loss, ours), (their_loss, theirs) = results
    largest = max(float(gradient.abs().max()) for gradient in theirs)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return {
        "loss": their_loss,
        "loss apart": abs(our_loss - their_loss),
        "gradient apart": difference / largest,
    }


def open_on_cpu(name: str) -> Backbone:
    """A model on the CPU, where the same seed gives the same numbers."""
    return Backbone.open(name, device="cpu", precision="fp32")


def move_data(data: TrainingData, model: Backbone) -> TrainingData:
    """The same data on the model's device."""
    posteriors = [
        type(posterior)(posterior.mean.to(model.device), posterior.std.to(model.device))
        for posterior in data.posteriors
    ]
    conditions = cast(Conditions, data.conditions).to(model.device)
    return replace(data, posteriors=posteriors, conditions=conditions)


@without_tf32()
def compare_pictures(bench: Bench, draw: Callable[[Backbone], list[Image.Image]]) -> Facts:
    """Pictures of `moji` in fp32, here and on a CPU: the largest difference of a pixel, in 255ths."""
    ours, theirs = (draw(bench.moji(device)) for device in (bench.device, "cpu"))
    differences = [
        max(high for _, high in cast(Any, ImageChops.difference(first, second).getextrema()))
        for first, second in zip(ours, theirs, strict=True)
    ]
    return {"pictures": len(differences), "pixels apart, of 255": max(differences)}


def draw_samples(model: Backbone, steps: int = 10) -> list[Image.Image]:
    """Two samples."""
    requests = [Request("a dog in the snow", (0, number)) for number in range(2)]
    return list(sample(model, requests, steps=steps, guidance=4.0, seed=0))


def draw_edit(model: Backbone, steps: int = 10, targets: int = 2) -> list[Image.Image]:
    """An inversion and an edit of it to each target."""
    inversion = invert(model, sample_image(model), SOURCE, steps=steps)
    return replace_words(inversion, TARGETS[:targets], ReplaceSettings(cross=0.5, self_attention=0.5)).images


def compare_step_with_cpu(bench: Bench) -> Facts:
    return compare_steps(bench.device)


def compare_sample_with_cpu(bench: Bench) -> Facts:
    return compare_pictures(bench, lambda model: draw_samples(model, 2 if bench.tiny else 10))


def compare_edit_with_cpu(bench: Bench) -> Facts:
    return compare_pictures(bench, lambda model: draw_edit(model, *((2, 1) if bench.tiny else (10, 2))))


def count_waits(bench: Bench) -> Facts:
    """How often a step of customize and of align makes the processor wait, as torch itself sees it on a GPU."""
    parts, facts = bench.parts("sd15"), Facts()
    for name, training in (
        ("customize", DreamBooth(parts.model, make_material(parts.model), make_settings(1))),
        ("align", preference.build_training(parts, 1)),
    ):
        steps = take_steps(training, read_every=8)
        for _ in range(2):
            next(steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            set_sync_debug(bench.device, "warn")
            try:
                for _ in range(3):
                    next(steps)
            finally:
                set_sync_debug(bench.device, "default")
        waits = [str(warning.message) for warning in caught if "synchroniz" in str(warning.message)]
        places = sorted(
            {
                f"{Path(warning.filename).name}:{warning.lineno}"
                for warning in caught
                if "synchroniz" in str(warning.message)
            }
        )
        facts[f"{name}, in 3 steps"] = len(waits) if bench.device == "cuda" else "not seen on a CPU"
        if places:
            facts[f"{name}, where"] = ", ".join(places[:8])
    bench.free()
    return facts


def set_sync_debug(device: str, mode: str) -> None:
    """Let torch warn about every synchronisation with the GPU."""
    if device == "cuda":
        torch.cuda.set_sync_debug_mode(mode)


def run_suite(bench: Bench) -> Facts:
    """The tests that need a GPU."""
    if bench.device == "cpu":
        return {"tests": "need a GPU"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-m",
        "gpu",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu.py",
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=300)
    lines = process.stdout.strip().splitlines() or process.stderr.strip().splitlines() or ["it says nothing"]
    failed = [line for line in lines if line.startswith("FAILED")][:10]
    return {"tests": lines[-1], **({"those": "; ".join(failed)} if failed else {})}


# (b) A step of a LoRA ---------------------------------------------------------------------------------------


class FlowScript(Script):
    """The step of `train_dreambooth_lora_flux.py`: a flow's noise at a drawn time, and the velocity's squared error.

    Time is drawn evenly (its `--weighting_scheme none`), latents are shifted and scaled, text is encoded at every step
    unless that was done before. How tokens are packed is the family's, and costs both sides the same.
    """

    def __init__(self, parts: Parts, training: DreamBooth) -> None:
        from diffusers import FlowMatchEulerDiscreteScheduler

        self.parts, self.training = parts, training
        side, self.batch = parts.model.resolution, training.settings.batch
        self.pictures = make_random_images(round(1.25 * side), self.batch)
        self.class_pictures: list[bytes] = []
        self.random = torch.Generator().manual_seed(0)
        self.noise_scheduler = FlowMatchEulerDiscreteScheduler.from_config(
            parts.model.location.config("scheduler")
        )
        self.conditions = cast(Conditions, training.data.conditions)

    def loss(
        self, latents: Tensor, noise: Tensor, at: Tensor, conditions: Conditions, *, prior: bool
    ) -> Tensor:
        scheduler = self.noise_scheduler
        sigma = scheduler.sigmas.to(latents.device)[at].reshape(-1, 1, 1, 1)
        time = scheduler.timesteps.to(latents.device)[at]
        velocity = predict(self.parts.model, (1 - sigma) * latents + sigma * noise, time, conditions)
        return F.mse_loss(velocity, noise - latents)

    @torch.no_grad()
    def latents(self, files: Sequence[bytes]) -> Tensor:
        config = cast(Any, self.parts.autoencoder).config
        shift: float = (config.shift_factor or 0.0) * config.scaling_factor
        return super().latents(files) - shift


def compare_flow(training: DreamBooth) -> Facts:
    """Our loss of a flow on one image that is known exactly, and the script's formula at the same noise and time."""
    model, data_before = training.model, training.data
    training.data = data = replace(take_one_image(data_before), class_latents=None, class_rows=None)
    batch = training.draw_subject_batch(data.buckets[0], generator(0, "parity"))
    our_loss = training.loss(generator(0, "parity"), 1)
    ours = torch.autograd.grad(our_loss, list(training.parameters.values()), allow_unused=True)
    training.data = data_before
    clean = data.posteriors[0].mean.expand(len(batch.noisy), -1, -1, -1)
    noise = batch.target + clean
    level = model.path.levels[batch.level]
    sigma = level.b.to(clean).reshape(-1, 1, 1, 1)
    time = cast(Tensor, level.time).to(clean.device)
    text = cast(Conditions, data.conditions)[:1].repeat(len(clean))
    velocity = predict(model, (1 - sigma) * clean + sigma * noise, time, text)
    their_loss = F.mse_loss(velocity, noise - clean)
    theirs = torch.autograd.grad(their_loss, list(training.parameters.values()), allow_unused=True)
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=True) if a is not None and b is not None]
    largest = max(float(b.abs().max()) for _, b in pairs)
    difference = max(float((a - b).abs().max()) for a, b in pairs)
    return {
        "loss apart": abs(float(our_loss) - float(their_loss)),
        "gradient apart": difference / max(largest, 1e-30),
    }


def measure_lora_step(shape: str) -> Callable[[Bench], Facts]:
    """A DreamBooth-LoRA step of this shape on every side."""

    def act(bench: Bench) -> Facts:
        parts = bench.parts(shape)
        material = make_material(parts.model)
        data = replace(material, buckets=[Bucket(material.buckets[0].rows)])  # without prior preservation
        training = DreamBooth(parts.model, data, make_settings(1))
        script = (FlowScript if shape == "flux" else Script)(parts, training)
        bare, facts = BareStep(training, data), Facts(parity={}, seconds={})
        if shape == "flux":
            facts["parity"]["script"] = compare_flow(training)
        else:
            parity = measure_parity(training)
            facts["parity"]["script"] = {"loss apart": parity.loss, "gradient apart": parity.gradient}

        def repeat(step: Callable[[], object]) -> Callable[[int], object]:
            return lambda count: [step() for _ in range(count)]

        ours = partial(take_more, training)
        sides: dict[str, Callable[[int], object]] = {
            "script": repeat(lambda: script.step(prior=False, text_once=False)),
            "script, text once": repeat(lambda: script.step(prior=False, text_once=True)),
            "here": ours, "bare": repeat(bare.step),
        }  # fmt: skip
        for name, run_steps in sides.items():
            time_steps(bench, facts, name, run_steps)
        compiled = bench.compiled(parts.model)
        facts["parity"]["compiled"] = compare_compiled(training, compiled)
        training.compiled = compiled
        time_steps(bench, facts, "here, compiled", ours)
        with compiled.active():
            time_steps(bench, facts, "bare, compiled", sides["bare"])
        times = facts["seconds"]
        facts["here, compiled / bare, compiled"] = times["here, compiled"] / times["bare, compiled"]
        facts["script / here, compiled"] = times["script"] / times["here, compiled"]
        bench.free()
        return facts

    return act


def take_more(training: DreamBooth, count: int) -> None:
    """Take `count` more steps, as `customize train` does."""
    training.settings = replace(training.settings, steps=training.done + count)
    for _ in take_steps(training):
        pass


class ReplayedBlocks(CompiledBlocks):
    """Compiled blocks that are recorded as CUDA graphs and replayed: torch.compile's mode `reduce-overhead`."""

    OPTIONS: ClassVar[Mapping[str, Any]] = {**CompiledBlocks.OPTIONS, "triton.cudagraphs": True}

    @contextmanager
    def active(self) -> Iterator[None]:
        """A step: what the last one left in the graphs' memory is overwritten."""
        torch.compiler.cudagraph_mark_step_begin()
        with super().active():
            yield


def measure_other_step(shape: str, way: str) -> Callable[[Bench], Facts]:
    """A compiled step of this shape, as it is and another `way`: `CUDA graphs`, or `LoRA in one product`."""

    def act(bench: Bench) -> Facts:
        replays = way == "CUDA graphs"
        if replays and bench.device == "cpu":
            return {way: "need a GPU"}
        parts, facts = bench.parts(shape), Facts(parity={}, seconds={})
        material = make_material(parts.model)
        training = DreamBooth(
            parts.model, replace(material, buckets=[Bucket(material.buckets[0].rows)]), make_settings(1)
        )
        training.compiled = bench.compiled(parts.model)
        time_steps(bench, facts, "compiled", partial(take_more, training))
        product = partial(use_forward, parts.model.denoiser, addmm)
        changed = nullcontext if replays else product
        blocks = ReplayedBlocks([parts.model.denoiser]) if replays else bench.compiled(parts.model)
        facts["parity"][way] = compare_ways(training, blocks.active if replays else product)
        with changed():
            training.compiled = blocks
            time_steps(bench, facts, f"compiled, {way}", partial(take_more, training))
        times = facts["seconds"]
        facts[f"compiled / {way}"] = times["compiled"] / times[f"compiled, {way}"]
        bench.free()
        return facts

    return act


def time_steps(bench: Bench, facts: Facts, name: str, run_steps: Callable[[int], object]) -> None:
    """Time steps of one kind: two that are not counted, then many in a row; also their peak memory."""
    with bench.peak(facts, name):
        first = bench.seconds(run_steps, 1)
        if not bench.tiny:
            run_steps(1)
        facts["seconds"][name] = bench.seconds(run_steps, bench.steps)
    facts.setdefault("first step", {})[name] = round(first, 2)


def compare_compiled(training: DreamBooth, compiled: CompiledBlocks) -> Facts:
    """The gradients of a step with compiled blocks against those without."""
    return compare_ways(training, compiled.active)


def compare_ways(training: DreamBooth, way: Callable[[], AbstractContextManager[None]]) -> Facts:
    """The gradients of a step inside of a `with` against those without."""
    results = []
    for inside in (nullcontext, way):
        with training.learning(), inside():
            loss = next(training.losses(1))
            gradients = torch.autograd.grad(loss, list(training.parameters.values()), allow_unused=True)
        results.append((float(loss), [gradient for gradient in gradients if gradient is not None]))
    (plain_loss, ours), (changed_loss, theirs) = results
    largest = max(float(gradient.abs().max()) for gradient in ours)
    difference = max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
    return {"loss apart": abs(plain_loss - changed_loss), "gradient apart": difference / max(largest, 1e-30)}


# (c) An edit ------------------------------------------------------------------------------------------------


def measure_whole_edit(shape: str) -> Callable[[Bench], Facts]:
    """A whole edit by prompt-to-prompt here, by Direct Inversion's passes, and by null-text inversion."""

    def act(bench: Bench) -> Facts:
        model, steps = bench.parts(shape).model, 2 if bench.tiny else 50
        sides = ["ours", "ours, four targets", "Direct + P2P", "null-text + P2P, frozen"]
        facts = Facts(steps=steps, seconds={})
        warm = make_whole_edits(model, 2)
        edits = make_whole_edits(model, steps)
        for name in sides if shape == "sd15" else sides[:3]:
            if not bench.tiny:
                warm[name]()
            with bench.peak(facts, name):
                facts["seconds"][name] = bench.seconds(lambda _, name=name: edits[name](), 1)  # type: ignore[misc]
        facts["Direct / ours"] = facts["seconds"]["Direct + P2P"] / facts["seconds"]["ours"]
        bench.free()
        return facts

    return act


# (d) A step of preference training --------------------------------------------------------------------------


def measure_preference_step(shape: str) -> Callable[[Bench], Facts]:
    """A Diffusion-DPO step of this shape, and whole trainings composed for V visits of each draw."""

    def act(bench: Bench) -> Facts:
        parts = bench.parts(shape)
        training = preference.build_training(parts, 1)
        script = preference.Script(parts, training, make_random_images(parts.model.resolution, 2))
        parity = preference.measure_parity(training)
        facts = Facts(
            parity={"script": {"loss apart": parity.loss, "gradient apart": parity.gradient}}, seconds={}
        )
        for kind in ("script", "cached", "bank"):

            def steps(count: int, kind: str = kind) -> None:
                training.reference = (
                    preference.make_known_reference(training) if kind == "bank" else training.live
                )
                if kind == "script":
                    for _ in range(count):
                        script.step()
                    return
                for _ in take_steps(training, until=training.done + count):
                    pass

            time_steps(bench, facts, kind, steps)
            if kind != "script":
                training.compiled = bench.compiled(parts.model)
                time_steps(bench, facts, f"{kind}, compiled", steps)
                training.compiled = None
        encode = bench.seconds(lambda _: script.encode_once(), 1)
        facts["encoding a pair"] = encode
        times = facts["seconds"]
        best = {"script": times["script"]} | {
            kind: min(times[kind], times[f"{kind}, compiled"]) for kind in ("cached", "bank")
        }
        for visits in preference.VISITS:
            draws = preference.DRAWS
            total = encode + draws * best["cached"] + draws * (visits - 1) * best["bank"]
            facts[f"script / here, V = {visits}"] = draws * visits * best["script"] / total
        bench.free()
        return facts

    return act


# (e) The planner's estimate ---------------------------------------------------------------------------------


def compare_plan_with_peak(shape: str) -> Callable[[Bench], Facts]:
    """The planner's estimate of a training step's memory for devices of 8 to 24 GiB, and what torch allocated."""

    def act(bench: Bench) -> Facts:
        bench.free()
        folder = write_configs(shape, bench.out / "configs" / shape, tiny=bench.tiny)
        opened = Backbone.open(str(folder), device=bench.device, precision=bench.precision)
        settings = make_settings(1)
        account = MemoryEstimator(opened, make_workload(opened, settings), device=bench.device)
        facts = Facts()
        for size in SIZES[:1] if bench.tiny else SIZES:
            start = MemorySettings(bench.precision)
            try:
                plan = plan_memory(
                    account, size, start, library=bench.device == "cuda" and has_bitsandbytes()
                )
            except UserError as error:
                facts[f"{size} GiB"] = {"does not fit": str(error)[:120]}
                continue
            plan_settings = plan.settings
            parts = build(
                folder,
                device=bench.device,
                precision=plan_settings.precision,
                placement=plan_settings.placement,
                encoders=False,
            )
            data = make_material(parts.model)
            training_settings = replace(make_settings(1), gradient_checkpointing=plan_settings.checkpointing)
            training = DreamBooth(parts.model, data, training_settings)
            measured = Facts()
            with bench.peak(measured, "training"):
                for _ in take_steps(training, until=2):
                    pass
            planned = account.phases(plan_settings)["training"].total_bytes / GIB
            facts[f"{size} GiB"] = {
                "planned": round(planned, 2),
                "measured": measured.get("peak GiB", {}).get("training", "on a GPU alone"),
                **{name: value for name, value in plan_settings.settings().items() if value},
            }  # fmt: skip
            del parts, training, data
            bench.free()
        return facts

    return act


# (f) Preparation --------------------------------------------------------------------------------------------


def measure_preparation(shape: str) -> Callable[[Bench], Facts]:
    """Images a second: decoded and cropped by one core, encoded in batches, and both one after the other."""

    def act(bench: Bench) -> Facts:
        import io

        model = bench.parts(shape).model
        side, count = model.resolution, 2 if bench.tiny else 32
        files = make_random_images(2 * side, 2) * (count // 2)

        def decode(_: int) -> Tensor:
            opened = [Image.open(io.BytesIO(content)).convert("RGB") for content in files]
            return torch.stack([to_tensor(crop_square(image, side)) for image in opened])

        facts, pictures = Facts(), decode(0)
        facts["decoded and cropped by one core, images/s"] = count / bench.seconds(decode, 1)
        for batch in (1, 2) if bench.tiny else (1, 8, 32):

            def encode(_: int, batch: int = batch) -> None:
                for chunk in pictures.split(batch):
                    model.encode(chunk)

            encode(0)
            facts[f"encoded in batches of {batch}, images/s"] = count / bench.seconds(encode, 1)
        best = max(value for name, value in facts.items() if name.startswith("encoded"))
        cores = best / facts["decoded and cropped by one core, images/s"]
        facts["cores that decode as fast as it encodes"] = cores
        facts["what limits it on 8 cores"] = "decoding" if cores > 8 else "the encoder"
        facts["of this machine's cores"] = os.cpu_count()
        bench.free()
        return facts

    return act


ROWS = (
    Row("a1-step", "CUDA = CPU: a step on `moji`, fp32", compare_step_with_cpu),
    Row("a2-waits", "Waits for the device inside a step", count_waits),
    Row("b1-sd15", "DreamBooth-LoRA step, SD 1.5", measure_lora_step("sd15")),
    Row("b2-flux", "DreamBooth-LoRA step, FLUX.1, 512²", measure_lora_step("flux")),
    Row("b3-sdxl", "DreamBooth-LoRA step, SDXL", measure_lora_step("sdxl")),
    Row("d1-sd15", "DPO step, SD 1.5", measure_preference_step("sd15")),
    Row("c1-sd15", "Prompt-to-prompt edit, SD 1.5", measure_whole_edit("sd15")),
    Row("b4-sd15", "DreamBooth-LoRA step, SD 1.5: CUDA graphs", measure_other_step("sd15", "CUDA graphs")),
    Row(
        "b5-sd15",
        "DreamBooth-LoRA step, SD 1.5: LoRA in one product",
        measure_other_step("sd15", "LoRA in one product"),
    ),
    Row("a3-sample", "CUDA = CPU: a sample of `moji`, fp32", compare_sample_with_cpu),
    Row("a4-edit", "CUDA = CPU: an edit on `moji`, fp32", compare_edit_with_cpu),
    Row("e1-sdxl", "Planned and measured memory of a step, SDXL", compare_plan_with_peak("sdxl")),
    Row("f1-sd15", "Preparation, SD 1.5's autoencoder", measure_preparation("sd15")),
    Row("d2-sdxl", "DPO step, SDXL", measure_preference_step("sdxl")),
    Row("c2-sdxl", "Prompt-to-prompt edit, SDXL", measure_whole_edit("sdxl")),
    Row("a5-suite", "The tests that need a GPU", run_suite),
)  # the most important first


# The table --------------------------------------------------------------------------------------------------


def format_markdown(out: Path) -> str:
    """All measured rows as Markdown."""
    lines, machine = ["# On a GPU", ""], ""
    for row in ROWS:
        path = out / "rows" / f"{row.key}.json"
        if not path.exists():
            lines += [f"## {row.title}", "", "Not measured yet.", ""]
            continue
        facts = dict(read_json(path))
        machine = facts.pop("machine")
        lines += [f"## {facts.pop('title')}", "", f"`python -m benchmarks.gpu --only {row.key}`", ""]
        if "failed" in facts:
            lines += [f"Failed: {facts['failed']}", ""]
            continue
        facts.pop("took")
        lines += ["| | |", "|---|---|", *_format_cells(facts), ""]
    return "\n".join([lines[0], "", f"Measured on: {machine or 'nothing yet'}.", *lines[1:]])


def _format_cells(facts: Facts, prefix: str = "") -> list[str]:
    lines = []
    for name, value in facts.items():
        title = f"{prefix}{name}"
        if isinstance(value, dict):
            lines += _format_cells(value, f"{title}: ")
        else:
            lines.append(f"| {title} | {f'{value:.4g}' if isinstance(value, float) else value} |")
    return lines


if __name__ == "__main__":
    run_main(main)
