"""Whether a training run fits in a device's memory, and the cheapest set of measures that makes it fit.

A run goes through phases that are never in memory together: pictures are encoded, prompts are encoded (both kinds of
encoder are let go of afterwards), the untouched base is asked, the denoiser learns, pictures are shown. Each phase's
bytes are counted from the model's settings alone (`backbone.memory.count`); no weights are loaded. Measures are taken
in the order of their price, and those that turn out not to be needed are dropped again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbone.distributed.device import PRECISIONS
from backbone.io.console import UserError, say
from backbone.memory.count import Step, asked_bytes, bytes_of, step_bytes
from backbone.models.model import Backbone
from backbone.models.placement import (
    INSTALL,
    KINDS,
    Placement,
    enable_tiling,
    find_offloadable_layers,
    find_quantizable_layers,
)

GIB = 2**30
CONTEXT = {"cuda": 0.6 * GIB}
"""Assumed, not measured: what a process takes on a GPU before its first tensor."""
FRAGMENTS = 0.05  # assumed: the share of a device that its allocator cannot use
STATES = {
    "adamw": 8.0,
    "adamw8bit": 2.1,
    "prodigy": 16.0,
}  # bytes of an optimiser's state for a trained number
SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GiB of devices that are sold
AT_ONCE = 8  # pictures that are drawn, or asked about, in one call
OFFLOADS = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Work:
    """What a run asks of memory, besides the model's size.

    trains      (a bare denoiser) → the tensors of it that learn, put there if they are new
    rows        noisy latents in a pass that learns
    full        whether the denoiser's own weights learn, and so are in fp32
    plain       whether a base in few bits, or one that lies elsewhere, can carry what learns
    text_learns whether the text encoders are needed at every step
    asks        whether the untouched base is asked beforehand
    kept        latents, and prompts, that stay on the device
    copies      further denoisers in memory (a frozen reference)
    shows       whether pictures are drawn while what learns is in memory
    """

    trains: Callable[[nn.Module], Iterable[Tensor]]
    rows: int
    full: bool = False
    plain: bool = True
    text_learns: bool = False
    asks: bool = True
    kept: tuple[int, int] = (0, 0)
    copies: int = 0
    averaged: bool = False
    shows: bool = True


@dataclass(frozen=True)
class Choice:
    """How a run is held in memory."""

    precision: str = "fp32"
    checkpointing: bool = False
    optimizer: str = "adamw"
    placement: Placement = field(default_factory=Placement)
    fixed_optimizer: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def settings(self) -> dict[str, Any]:
        """As the settings of a run call it, but for the optimiser."""
        held = self.placement
        return {
            "precision": self.precision,
            "gradient_checkpointing": self.checkpointing,
            "quantize": held.quantize,
            "cpu_offload": held.offload,
            "vae_tiling": held.tiling,
            "text_on_cpu": held.text_on_cpu,
            "one_by_one": held.one_by_one,
        }


class Phase(NamedTuple):
    """Bytes of a phase: those that lie there all the time, and those of its computations at their peak."""

    resident: int
    computing: int

    @property
    def bytes(self) -> int:
        return self.resident + self.computing


class Account:
    """The bytes of a run's phases, for any choice; what has been counted once is remembered.

    `device` is that of the run, cuda or cpu, whatever this machine has.
    """

    def __init__(self, model: Backbone, work: Work, *, device: str = "cuda") -> None:
        self.model, self.work = model, work
        self.device = "cpu" if device == "cpu" else "cuda"
        self.bare = lru_cache(self._bare)
        self.learner = lru_cache(self._learner)
        self.step = lru_cache(self._step)
        self.asked = lru_cache(self._asked)
        self.pictures = lru_cache(self._pictures)
        self.parts = lru_cache(self._parts)

    def phases(self, choice: Choice) -> dict[str, Phase]:
        """Every phase of the run, in order."""
        work, placement, parts = self.work, choice.placement, self.parts(choice.precision)
        text = 0 if placement.text_on_cpu else parts.text
        cached = self.cached_bytes
        base = self.base(choice) * (1 + work.copies)
        learns = parts.trained
        states = round(learns * STATES[choice.optimizer]) + 4 * learns * work.averaged
        held = base + (0 if work.full else 4 * learns) + states + cached + text * work.text_learns
        one = placement.one_by_one
        found = {
            "encoding": Phase(
                parts.autoencoder + text,
                self.pictures(choice.precision, "encode", placement.tiling, 1),
            )
        }
        if work.asks:
            rows = 1 if one else AT_ONCE
            found["asking the base"] = Phase(base + cached, self.asked(choice.precision, rows))
        step = self.step(choice.precision, choice.checkpointing)
        updating = 4 * learns + 4 * learns  # gradients, and the optimiser's own of the same size for a moment
        found["learning"] = Phase(held, max(step.peak, updating) + self.working(choice))
        if work.shows:
            count = 1 if one else AT_ONCE
            shown = held + parts.autoencoder + text * (not work.text_learns)
            drawing = self.asked(choice.precision, 2 * count)  # with a prompt and without
            decoding = self.pictures(choice.precision, "decode", placement.tiling, count)
            found["showing"] = Phase(shown, max(drawing, decoding) + self.working(choice))
        return found

    def base(self, choice: Choice) -> int:
        """Bytes of the denoiser's own weights on the device."""
        parts, placement = self.parts(choice.precision), choice.placement
        if placement.quantize:
            width = choice.dtype.itemsize
            return round(parts.denoiser - parts.linear * width + parts.linear * KINDS[placement.quantize])
        return parts.denoiser - (round(self.lent(choice)) if placement.offload else 0)

    def lent(self, choice: Choice) -> float:
        """Bytes of the denoiser that lie in the CPU's memory."""
        network = self.bare(choice.precision)
        layers = find_offloadable_layers(network, choice.placement.offload)
        return float(sum(bytes_of(layer.parameters()) for layer in layers))

    def working(self, choice: Choice) -> int:
        """Bytes of a layer that is unpacked, or lent, for the moment in which it computes."""
        if not (choice.placement.quantize or choice.placement.offload):
            return 0
        return 2 * self.parts(choice.precision).largest

    @cached_property
    def cached_bytes(self) -> int:
        """Bytes of encoded pictures and prompts that stay on the device, fp32."""
        latents, prompts = self.work.kept
        one = self.model.family.outline(self.model.location, torch.float32).blank(1)
        return 4 * math.prod(self.model.latent_shape) * latents + bytes_of(one.tensors()) * prompts

    def usable(self, size: float) -> float:
        """Bytes of a device of `size` GiB that tensors can have."""
        return size * GIB * (1 - FRAGMENTS) - CONTEXT.get(self.device, 0.0)

    # Counting ------------------------------------------------------------------------------------------------

    def _bare(self, precision: str) -> nn.Module:
        """The denoiser without storage, in the precision that its weights have in this run."""
        outline = self.model.family.outline(self.model.location, PRECISIONS[precision])
        network = outline.denoiser.bare()
        return nn.Module.to(network, torch.float32) if self.work.full else network

    def _parts(self, precision: str) -> Parts:
        network = self.bare(precision)
        own = bytes_of(network.parameters())
        linear = [layer.weight.numel() for layer in find_quantizable_layers(network).values()]
        outline = self.model.family.outline(self.model.location, PRECISIONS[precision])
        layers = [bytes_of(layer.parameters()) for layer in find_offloadable_layers(network)]
        text = sum(bytes_of(part.bare().parameters()) for part in outline.encoders.values())
        autoencoder = bytes_of(outline.autoencoder.bare().parameters())
        trained = sum(value.numel() for value in self.learner(precision)[1])
        return Parts(own, sum(linear), max(layers, default=0), autoencoder, text, trained)

    def _learner(self, precision: str) -> tuple[nn.Module, list[Tensor]]:
        """A bare denoiser with what learns on it."""
        outline = self.model.family.outline(self.model.location, PRECISIONS[precision])
        network = outline.denoiser.bare()
        if self.work.full:
            nn.Module.to(network, torch.float32)
        return network, list(self.work.trains(network))

    def _step(self, precision: str, checkpointing: bool) -> Step:
        network = self.learner(precision)[0]
        return step_bytes(
            network,
            self.question(network, precision, self.work.rows),
            device=self.device,
            autocast=autocast(precision),
            checkpointing=checkpointing,
        )

    def _asked(self, precision: str, rows: int) -> int:
        network = self.learner(precision)[0]
        ask = self.question(network, precision, rows)
        return asked_bytes(network, ask, device=self.device, autocast=autocast(precision))

    def question(self, network: nn.Module, precision: str, rows: int) -> Callable[[], Tensor]:
        """A call of the denoiser with blank latents and prompts."""
        outline = self.model.family.outline(self.model.location, PRECISIONS[precision])
        conditions = outline.blank(rows)
        noisy = torch.zeros(rows, *self.model.latent_shape, device="meta")
        for value in conditions.tensors():
            value.requires_grad_(self.work.text_learns and value.is_floating_point())
        time = torch.zeros(rows, device="meta")
        return lambda: self.model.family.network(network, conditions)(noisy, time)

    def _pictures(self, precision: str, way: str, tiles: bool, count: int) -> int:
        """The autoencoder's own peak, encoding or decoding."""
        outline = self.model.family.outline(self.model.location, PRECISIONS[precision])
        network: Any = outline.autoencoder.bare()
        side = self.model.resolution
        if tiles:
            enable_tiling(network, side // 2)
        shape = (3, side, side) if way == "encode" else self.model.latent_shape
        given = torch.zeros(count, *shape, dtype=outline.autoencoder.dtype, device="meta")
        call = network.encode if way == "encode" else network.decode
        return asked_bytes(network, lambda: call(given), device=self.device)


class Parts(NamedTuple):
    """Bytes of a model's parts; `linear` counts the numbers that can lie in few bits, `trained` those that learn."""

    denoiser: int
    linear: int
    largest: int
    autoencoder: int
    text: int
    trained: int


def autocast(precision: str) -> torch.dtype | None:
    """What a run of this precision computes in, where that is not fp32."""
    return None if precision == "fp32" else PRECISIONS[precision]


# Choosing ---------------------------------------------------------------------------------------------------


class Measure(NamedTuple):
    """One way to need less: what it is and costs, whether a choice has it, and the choice with it and without."""

    name: str
    price: str
    has: Callable[[Choice], bool]
    take: Callable[[Choice], Choice]
    drop: Callable[[Choice], Choice]
    free: bool = False  # taken once, it stays: without it nothing is better


def _setting(
    name: str, price: str, setting: str, with_it: Any, without: Any, *, free: bool = False
) -> Measure:
    """A measure that is one setting of a choice."""
    return Measure(
        name,
        price,
        lambda choice: getattr(choice, setting) == with_it,
        lambda choice: replace(choice, **{setting: with_it}),
        lambda choice: replace(choice, **{setting: without}),
        free,
    )


def _holding(name: str, price: str, setting: str, with_it: Any, without: Any, **others: Any) -> Measure:
    """A measure of how the model is held; `others` are settings that it ends."""

    def put(choice: Choice, value: Any) -> Choice:
        return replace(choice, placement=replace(choice.placement, **{setting: value, **others}))

    return Measure(
        name,
        price,
        lambda choice: getattr(choice.placement, setting) == with_it,
        lambda choice: put(choice, with_it),
        lambda choice: put(choice, without),
    )


BF16 = _setting("bf16", "none where the processor has it", "precision", "bf16", "fp32", free=True)
SMALL_STATES = _setting("8-bit optimiser", "its state is rounded", "optimizer", "adamw8bit", "adamw")
CHECKPOINTING = _setting("gradient checkpointing", "a third more time", "checkpointing", True, False)
ONE_BY_ONE = _holding("drawing one picture at a time", "slower previews", "one_by_one", True, False)
TILES = _holding("the autoencoder on tiles", "faint seams are possible", "tiling", True, False)
TEXT_ON_CPU = _holding("text encoders on the CPU", "slower, once a prompt", "text_on_cpu", True, False)
FEW_BITS = (
    _holding("base in 8 bits", "the base is rounded; slower", "quantize", "8bit", ""),
    _holding("base in NF4", "the base is rounded more; slower", "quantize", "nf4", ""),
)
LENT = tuple(
    _holding(
        f"{share:.0%} of the base in the CPU's memory",
        "much slower",
        *("offload", share, share - OFFLOADS[0]),
        quantize="",
    )
    for share in OFFLOADS
)
MEASURES = (
    BF16,
    ONE_BY_ONE,
    TILES,
    TEXT_ON_CPU,
    SMALL_STATES,
    CHECKPOINTING,
    *FEW_BITS,
    *LENT,
)  # cheapest first


@dataclass(frozen=True)
class Plan:
    """What was chosen for a device of `size` GiB and why: each measure with the phase that did not fit without it."""

    choice: Choice
    size: float
    usable: float
    phases: Mapping[str, Phase]
    reasons: Mapping[str, str]
    missing: str = ""

    def lines(self) -> list[str]:
        """A small table for a person."""
        peak = max(phase.bytes for phase in self.phases.values())
        rows = [
            f"Memory of the device: {self.size:g} GiB, of which tensors can have {self.usable / GIB:.1f} "
            f"(assumed); the run needs {peak / GIB:.2f}.",
            *table(self.phases),
            *(f"  {name}: {why}" for name, why in self.reasons.items()),
        ]
        return [*rows, *([self.missing] if self.missing else [])]


def table(phases: Mapping[str, Phase]) -> list[str]:
    """The phases' bytes, a line each."""
    lines = [f"  {'phase':<16} {'GiB':>7} {'weights, states':>16} {'computing':>10}"]
    for name, phase in phases.items():
        figures = phase.bytes / GIB, phase.resident / GIB, phase.computing / GIB
        lines.append(f"  {name:<16} {figures[0]:>7.2f} {figures[1]:>16.2f} {figures[2]:>10.2f}")
    return lines


def plan(account: Account, size: float, start: Choice, *, library: bool) -> Plan:
    """The cheapest choice from `start` on that fits a device of `size` GiB; what `start` has is kept.

    `library` says whether bitsandbytes and a GPU are there. Raises `UserError`, in one sentence with the nearest
    remedy, where nothing fits.
    """
    usable = account.usable(size)
    allowed = applying(account.work, start, library=library)
    choice = cheapest(account, usable, start, allowed)
    missing = ""
    if not library and (choice is None or choice.placement.offload):
        others = [measure for measure in applying(account.work, start, library=True) if measure not in LENT]
        if cheapest(account, usable, start, others) is not None:
            missing = f"With bitsandbytes and a GPU it would fit in fewer bits: {INSTALL}"
    if choice is None:
        raise UserError(_refusal(account, size, start, allowed, missing))
    reasons = _reasons(account, usable, start, choice)
    return Plan(choice, size, usable, account.phases(choice), reasons, missing)


def within(model: Backbone, work: Work, size: float, start: Choice) -> tuple[Backbone, Choice]:
    """The model, not loaded yet, held so that the work fits its device of `size` GiB; says what was chosen and why."""
    on_gpu = model.device.type == "cuda"
    account = Account(model, work, device=model.device.type)
    found = plan(account, size, start, library=on_gpu and has_library())
    for line in found.lines():
        say(line)
    choice = found.choice
    held = Backbone(
        model.location,
        model.family,
        device=model.device,
        dtype=choice.dtype,
        placement=choice.placement,
        resolution=model.asked_resolution,
    )
    return held, choice


def needed(account: Account, choice: Choice) -> int:
    """Bytes of the phase that needs most."""
    return max(phase.bytes for phase in account.phases(choice).values())


def applying(work: Work, start: Choice, *, library: bool) -> list[Measure]:
    """The measures that there are for this work, cheapest first."""
    frozen = work.plain and not work.full
    apply = {
        TEXT_ON_CPU: not work.text_learns,
        SMALL_STATES: library and work.full and not start.fixed_optimizer and start.optimizer == "adamw",
        BF16: start.precision == "fp32",
        **dict.fromkeys(FEW_BITS, frozen and library and not start.placement.offload),
        **dict.fromkeys(LENT, frozen and not start.placement.quantize),
    }
    return [measure for measure in MEASURES if apply.get(measure, True)]


def cheapest(account: Account, usable: float, start: Choice, placement: Iterable[Measure]) -> Choice | None:
    """Measure after measure until all phases fit, then those dropped again that are not needed, dearest first."""
    choice, taken = start, list[Measure]()
    for measure in placement:
        if needed(account, choice) <= usable:
            break
        if not measure.has(choice):
            choice = measure.take(choice)
            taken.append(measure)
    if needed(account, choice) > usable:
        return None
    for measure in reversed(taken):
        if measure.has(choice) and not measure.free:
            less = measure.drop(choice)
            choice = less if needed(account, less) <= usable else choice
    return choice


def _reasons(account: Account, usable: float, start: Choice, choice: Choice) -> dict[str, str]:
    """What each measure of the choice is there for: what would not fit without it."""
    reasons = {}
    for measure in MEASURES:
        if not measure.has(choice) or measure.has(start):
            continue
        phases = account.phases(measure.drop(choice))
        over = [
            f"{name} would need {one.bytes / GIB:.2f}" for name, one in phases.items() if one.bytes > usable
        ]
        why = f"without it {' and '.join(over)}; " if over else ""
        reasons[measure.name] = f"{why}price: {measure.price}"
    return reasons


def _refusal(account: Account, size: float, start: Choice, allowed: Iterable[Measure], missing: str) -> str:
    """Why nothing fits, and what would."""
    choices = [start]
    for measure in allowed:
        choices.append(measure.take(choices[-1]))
    choice = min(choices, key=lambda one: needed(account, one))
    phases, least = account.phases(choice), needed(account, choice)
    most = max(phases, key=lambda name: phases[name].bytes)
    larger = next((one for one in SIZES if account.usable(one) >= least), None)
    remedies = [
        *([f"install bitsandbytes ({INSTALL})"] if missing else []),
        *(["train an adapter instead of all weights"] if account.work.full else []),
        *(["lower --batch"] if account.work.rows > 2 else []),
        *([f"take a device of {larger} GiB"] if larger is not None else []),
    ]
    remedy = ", or ".join(remedies) or "choose a smaller model"
    return (
        f"{account.model.location.name} does not fit {size:g} GiB: with every measure that there is, {most} needs "
        f"{least / GIB:.1f} GiB, and tensors can have {account.usable(size) / GIB:.1f}. "
        f"{remedy[0].upper()}{remedy[1:]}."
    )


def has_library() -> bool:
    """Whether bitsandbytes is installed."""
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def precision_of(model: Backbone) -> str:
    """The name of a model's working precision."""
    return next(name for name, dtype in PRECISIONS.items() if dtype is model.dtype)
