"""Whether a training run fits in a device's memory, and the cheapest set of measures that makes it fit.

A run goes through phases that are never in memory together: pictures are encoded, prompts are encoded (both kinds of
encoder are let go of afterwards), the untouched base is asked, the denoiser learns, pictures are shown. Each phase's
bytes are counted from the model's settings alone (`backbone.memory.count`); no weights are loaded. Measures are taken
in the order of their price, and those that turn out not to be needed are dropped again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from backbone.distributed.device import PRECISIONS
from backbone.io.console import UserError, notify
from backbone.memory.count import StepBytes, forward_peak_bytes, tensor_bytes, training_step_bytes
from backbone.models.model import Backbone
from backbone.models.placement import INSTALL, KINDS, Measures, lendable, quantizable, tiled

GIB = 2**30
CUDA_CONTEXT_BYTES = {"cuda": 0.6 * GIB}
"""Assumed, not measured: what a process takes on a GPU before its first tensor."""
FRAGMENTATION = 0.05  # assumed: the share of a device that its allocator cannot use
OPTIMIZER_STATE_BYTES = {
    "adamw": 8.0,
    "adamw8bit": 2.1,
    "prodigy": 16.0,
}  # bytes of an optimiser's state for a trained number
DEVICE_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GiB of devices that are sold
SAMPLING_BATCH = 8  # pictures that are drawn, or asked about, in one call
OFFLOAD_SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Workload:
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

    add_trainable: Callable[[nn.Module], Iterable[Tensor]]
    batch_size: int
    full_finetuning: bool = False
    supports_compressed_base: bool = True
    trains_text_encoders: bool = False
    queries_base: bool = True
    cached_counts: tuple[int, int] = (0, 0)
    extra_denoisers: int = 0
    has_ema: bool = False
    draws_previews: bool = True


@dataclass(frozen=True)
class MemorySettings:
    """How a run is held in memory."""

    precision: str = "fp32"
    checkpointing: bool = False
    optimizer: str = "adamw"
    measures: Measures = field(default_factory=Measures)
    fixed_optimizer: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def settings(self) -> dict[str, Any]:
        """As the settings of a run call it, but for the optimiser."""
        held = self.measures
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

    resident_bytes: int
    transient_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.resident_bytes + self.transient_bytes


class MemoryEstimator:
    """The bytes of a run's phases, for any choice; what has been counted once is remembered.

    `device` is that of the run, cuda or cpu, whatever this machine has.
    """

    def __init__(self, model: Backbone, work: Workload, *, device: str = "cuda") -> None:
        self.model, self.work = model, work
        self.device = "cpu" if device == "cpu" else "cuda"
        self.meta_denoiser = lru_cache(self._build_meta_denoiser)
        self.meta_trainable = lru_cache(self._build_meta_trainable)
        self.step_bytes = lru_cache(self._count_step)
        self.forward_bytes = lru_cache(self._count_forward)
        self.autoencoder_bytes = lru_cache(self._count_autoencoder)
        self.model_sizes = lru_cache(self._measure_model)

    def phases(self, choice: MemorySettings) -> dict[str, Phase]:
        """Every phase of the run, in order."""
        work, measures, parts = self.work, choice.measures, self.model_sizes(choice.precision)
        text = 0 if measures.text_on_cpu else parts.text_encoders
        cached = self.cached_bytes
        base = self.denoiser_bytes(choice) * (1 + work.extra_denoisers)
        learns = parts.trained_parameters
        states = round(learns * OPTIMIZER_STATE_BYTES[choice.optimizer]) + 4 * learns * work.has_ema
        held = (
            base
            + (0 if work.full_finetuning else 4 * learns)
            + states
            + cached
            + text * work.trains_text_encoders
        )
        one = measures.one_by_one
        found = {
            "encoding": Phase(
                parts.autoencoder + text,
                self.autoencoder_bytes(choice.precision, "encode", measures.tiling, 1),
            )
        }
        if work.queries_base:
            rows = 1 if one else SAMPLING_BATCH
            found["asking the base"] = Phase(base + cached, self.forward_bytes(choice.precision, rows))
        step = self.step_bytes(choice.precision, choice.checkpointing)
        updating = 4 * learns + 4 * learns  # gradients, and the optimiser's own of the same size for a moment
        found["learning"] = Phase(held, max(step.peak, updating) + self.unpacked_layer_bytes(choice))
        if work.draws_previews:
            count = 1 if one else SAMPLING_BATCH
            shown = held + parts.autoencoder + text * (not work.trains_text_encoders)
            drawing = self.forward_bytes(choice.precision, 2 * count)  # with a prompt and without
            decoding = self.autoencoder_bytes(choice.precision, "decode", measures.tiling, count)
            found["showing"] = Phase(shown, max(drawing, decoding) + self.unpacked_layer_bytes(choice))
        return found

    def denoiser_bytes(self, choice: MemorySettings) -> int:
        """Bytes of the denoiser's own weights on the device."""
        parts, measures = self.model_sizes(choice.precision), choice.measures
        if measures.quantize:
            width = choice.dtype.itemsize
            return round(
                parts.denoiser
                - parts.linear_parameters * width
                + parts.linear_parameters * KINDS[measures.quantize]
            )
        return parts.denoiser - (round(self.offloaded_bytes(choice)) if measures.offload else 0)

    def offloaded_bytes(self, choice: MemorySettings) -> float:
        """Bytes of the denoiser that lie in the CPU's memory."""
        network = self.meta_denoiser(choice.precision)
        layers = lendable(network, choice.measures.offload)
        return float(sum(tensor_bytes(layer.parameters()) for layer in layers))

    def unpacked_layer_bytes(self, choice: MemorySettings) -> int:
        """Bytes of a layer that is unpacked, or lent, for the moment in which it computes."""
        if not (choice.measures.quantize or choice.measures.offload):
            return 0
        return 2 * self.model_sizes(choice.precision).largest_layer

    @cached_property
    def cached_bytes(self) -> int:
        """Bytes of encoded pictures and prompts that stay on the device, fp32."""
        channels, height, width = self.model.latent_shape
        latents, prompts = self.work.cached_counts
        text = self.model.family.spec(self.model.location, torch.float32).blank_text(1)
        return 4 * channels * height * width * latents + tensor_bytes(text.values()) * prompts

    def usable_bytes(self, size: float) -> float:
        """Bytes of a device of `size` GiB that tensors can have."""
        return size * GIB * (1 - FRAGMENTATION) - CUDA_CONTEXT_BYTES.get(self.device, 0.0)

    # Counting ------------------------------------------------------------------------------------------------

    def _build_meta_denoiser(self, precision: str) -> nn.Module:
        """The denoiser without storage, in the precision that its weights have in this run."""
        outline = self.model.family.spec(self.model.location, PRECISIONS[precision])
        network = outline.denoiser.instantiate()
        return nn.Module.to(network, torch.float32) if self.work.full_finetuning else network

    def _measure_model(self, precision: str) -> ModelSizes:
        network = self.meta_denoiser(precision)
        own = tensor_bytes(network.parameters())
        linear = [layer.weight.numel() for layer in quantizable(network).values()]
        outline = self.model.family.spec(self.model.location, PRECISIONS[precision])
        layers = [tensor_bytes(layer.parameters()) for layer in lendable(network)]
        text = sum(tensor_bytes(part.instantiate().parameters()) for part in outline.text_encoders.values())
        autoencoder = tensor_bytes(outline.autoencoder.instantiate().parameters())
        trained = sum(value.numel() for value in self.meta_trainable(precision)[1])
        return ModelSizes(own, sum(linear), max(layers, default=0), autoencoder, text, trained)

    def _build_meta_trainable(self, precision: str) -> tuple[nn.Module, list[Tensor]]:
        """A bare denoiser with what learns on it."""
        outline = self.model.family.spec(self.model.location, PRECISIONS[precision])
        network = outline.denoiser.instantiate()
        if self.work.full_finetuning:
            nn.Module.to(network, torch.float32)
        return network, list(self.work.add_trainable(network))

    def _count_step(self, precision: str, checkpointing: bool) -> StepBytes:
        network = self.meta_trainable(precision)[0]
        return training_step_bytes(
            network,
            self.make_forward(network, precision, self.work.batch_size),
            device=self.device,
            autocast=autocast_dtype(precision),
            checkpointing=checkpointing,
        )

    def _count_forward(self, precision: str, rows: int) -> int:
        network = self.meta_trainable(precision)[0]
        ask = self.make_forward(network, precision, rows)
        return forward_peak_bytes(network, ask, device=self.device, autocast=autocast_dtype(precision))

    def make_forward(self, network: nn.Module, precision: str, rows: int) -> Callable[[], Tensor]:
        """A call of the denoiser with blank latents and prompts."""
        outline = self.model.family.spec(self.model.location, PRECISIONS[precision])
        text, noisy = outline.blank_text(rows), torch.zeros(rows, *self.model.latent_shape, device="meta")
        for value in text.values():
            value.requires_grad_(self.work.trains_text_encoders and value.is_floating_point())
        time = torch.zeros(rows, device="meta")
        return lambda: self.model.family.network(network, text)(noisy, time)

    def _count_autoencoder(self, precision: str, way: str, tiles: bool, count: int) -> int:
        """The autoencoder's own peak, encoding or decoding."""
        outline = self.model.family.spec(self.model.location, PRECISIONS[precision])
        network: Any = outline.autoencoder.instantiate()
        side = self.model.resolution
        if tiles:
            tiled(network, side // 2)
        channels, height, width = self.model.latent_shape
        shape = (count, 3, side, side) if way == "encode" else (count, channels, height, width)
        given = torch.zeros(shape, dtype=outline.autoencoder.dtype, device="meta")
        call = network.encode if way == "encode" else network.decode
        return forward_peak_bytes(network, lambda: call(given), device=self.device)


class ModelSizes(NamedTuple):
    """Bytes of a model's parts; `linear` counts the numbers that can lie in few bits, `trained` those that learn."""

    denoiser: int
    linear_parameters: int
    largest_layer: int
    autoencoder: int
    text_encoders: int
    trained_parameters: int


def autocast_dtype(precision: str) -> torch.dtype | None:
    """What a run of this precision computes in, where that is not fp32."""
    return None if precision == "fp32" else PRECISIONS[precision]


# Choosing ---------------------------------------------------------------------------------------------------


class Saving(NamedTuple):
    """One way to need less: what it is and costs, whether a choice has it, and the choice with it and without."""

    name: str
    cost: str
    is_enabled: Callable[[MemorySettings], bool]
    enable: Callable[[MemorySettings], MemorySettings]
    disable: Callable[[MemorySettings], MemorySettings]
    always_keep: bool = False  # taken once, it stays: without it nothing is better


def _setting_saving(
    name: str, price: str, setting: str, with_it: Any, without: Any, *, free: bool = False
) -> Saving:
    """A measure that is one setting of a choice."""
    return Saving(
        name,
        price,
        lambda choice: getattr(choice, setting) == with_it,
        lambda choice: replace(choice, **{setting: with_it}),
        lambda choice: replace(choice, **{setting: without}),
        free,
    )


def _placement_saving(
    name: str, price: str, setting: str, with_it: Any, without: Any, **others: Any
) -> Saving:
    """A measure of how the model is held; `others` are settings that it ends."""

    def put(choice: MemorySettings, value: Any) -> MemorySettings:
        return replace(choice, measures=replace(choice.measures, **{setting: value, **others}))

    return Saving(
        name,
        price,
        lambda choice: getattr(choice.measures, setting) == with_it,
        lambda choice: put(choice, with_it),
        lambda choice: put(choice, without),
    )


BF16 = _setting_saving("bf16", "none where the processor has it", "precision", "bf16", "fp32", free=True)
EIGHT_BIT_OPTIMIZER = _setting_saving(
    "8-bit optimiser", "its state is rounded", "optimizer", "adamw8bit", "adamw"
)
GRADIENT_CHECKPOINTING = _setting_saving(
    "gradient checkpointing", "a third more time", "checkpointing", True, False
)
SINGLE_IMAGE_SAMPLING = _placement_saving(
    "drawing one picture at a time", "slower previews", "one_by_one", True, False
)
VAE_TILING = _placement_saving("the autoencoder on tiles", "faint seams are possible", "tiling", True, False)
TEXT_ON_CPU = _placement_saving(
    "text encoders on the CPU", "slower, once a prompt", "text_on_cpu", True, False
)
QUANTIZATION = (
    _placement_saving("base in 8 bits", "the base is rounded; slower", "quantize", "8bit", ""),
    _placement_saving("base in NF4", "the base is rounded more; slower", "quantize", "nf4", ""),
)
CPU_OFFLOAD = tuple(
    _placement_saving(
        f"{share:.0%} of the base in the CPU's memory",
        "much slower",
        *("offload", share, share - OFFLOAD_SHARES[0]),
        quantize="",
    )
    for share in OFFLOAD_SHARES
)
SAVINGS = (
    BF16,
    SINGLE_IMAGE_SAMPLING,
    VAE_TILING,
    TEXT_ON_CPU,
    EIGHT_BIT_OPTIMIZER,
    GRADIENT_CHECKPOINTING,
    *QUANTIZATION,
    *CPU_OFFLOAD,
)  # cheapest first


@dataclass(frozen=True)
class MemoryPlan:
    """What was chosen for a device of `size` GiB and why: each measure with the phase that did not fit without it."""

    settings: MemorySettings
    size: float
    usable_bytes: float
    phases: Mapping[str, Phase]
    reasons: Mapping[str, str]
    hint: str = ""

    def lines(self) -> list[str]:
        """A small table for a person."""
        peak = max(phase.total_bytes for phase in self.phases.values())
        rows = [
            f"Memory of the device: {self.size:g} GiB, of which tensors can have {self.usable_bytes / GIB:.1f} "
            f"(assumed); the run needs {peak / GIB:.2f}.",
            *format_phases(self.phases),
            *(f"  {name}: {why}" for name, why in self.reasons.items()),
        ]
        return [*rows, *([self.hint] if self.hint else [])]


def format_phases(phases: Mapping[str, Phase]) -> list[str]:
    """The phases' bytes, a line each."""
    lines = [f"  {'phase':<16} {'GiB':>7} {'weights, states':>16} {'computing':>10}"]
    for name, phase in phases.items():
        figures = phase.total_bytes / GIB, phase.resident_bytes / GIB, phase.transient_bytes / GIB
        lines.append(f"  {name:<16} {figures[0]:>7.2f} {figures[1]:>16.2f} {figures[2]:>10.2f}")
    return lines


def plan_memory(account: MemoryEstimator, size: float, start: MemorySettings, *, library: bool) -> MemoryPlan:
    """The cheapest choice from `start` on that fits a device of `size` GiB; what `start` has is kept.

    `library` says whether bitsandbytes and a GPU are there. Raises `UserError`, in one sentence with the nearest
    remedy, where nothing fits.
    """
    usable = account.usable_bytes(size)
    allowed = applicable_savings(account.work, start, library=library)
    choice = find_cheapest(account, usable, start, allowed)
    missing = ""
    if not library and (choice is None or choice.measures.offload):
        others = [
            measure
            for measure in applicable_savings(account.work, start, library=True)
            if measure not in CPU_OFFLOAD
        ]
        if find_cheapest(account, usable, start, others) is not None:
            missing = f"With bitsandbytes and a GPU it would fit in fewer bits: {INSTALL}"
    if choice is None:
        raise UserError(_describe_misfit(account, size, start, allowed, missing))
    reasons = _explain_savings(account, usable, start, choice)
    return MemoryPlan(choice, size, usable, account.phases(choice), reasons, missing)


def fit_to_memory(
    model: Backbone, work: Workload, size: float, start: MemorySettings
) -> tuple[Backbone, MemorySettings]:
    """The model, not loaded yet, held so that the work fits its device of `size` GiB; says what was chosen and why."""
    on_gpu = model.device.type == "cuda"
    account = MemoryEstimator(model, work, device=model.device.type)
    found = plan_memory(account, size, start, library=on_gpu and has_bitsandbytes())
    for line in found.lines():
        notify(line)
    choice = found.settings
    held = Backbone(
        model.location, model.family, device=model.device, dtype=choice.dtype, measures=choice.measures
    )
    return held, choice


def peak_bytes(account: MemoryEstimator, choice: MemorySettings) -> int:
    """Bytes of the phase that needs most."""
    return max(phase.total_bytes for phase in account.phases(choice).values())


def applicable_savings(work: Workload, start: MemorySettings, *, library: bool) -> list[Saving]:
    """The measures that there are for this work, cheapest first."""
    frozen = work.supports_compressed_base and not work.full_finetuning
    apply = {
        TEXT_ON_CPU: not work.trains_text_encoders,
        EIGHT_BIT_OPTIMIZER: library
        and work.full_finetuning
        and not start.fixed_optimizer
        and start.optimizer == "adamw",
        BF16: start.precision == "fp32",
        **dict.fromkeys(QUANTIZATION, frozen and library and not start.measures.offload),
        **dict.fromkeys(CPU_OFFLOAD, frozen and not start.measures.quantize),
    }
    return [measure for measure in SAVINGS if apply.get(measure, True)]


def find_cheapest(
    account: MemoryEstimator, usable: float, start: MemorySettings, measures: Iterable[Saving]
) -> MemorySettings | None:
    """Measure after measure until all phases fit, then those dropped again that are not needed, dearest first."""
    choice, taken = start, list[Saving]()
    for measure in measures:
        if peak_bytes(account, choice) <= usable:
            break
        if not measure.is_enabled(choice):
            choice = measure.enable(choice)
            taken.append(measure)
    if peak_bytes(account, choice) > usable:
        return None
    for measure in reversed(taken):
        if measure.is_enabled(choice) and not measure.always_keep:
            less = measure.disable(choice)
            choice = less if peak_bytes(account, less) <= usable else choice
    return choice


def _explain_savings(
    account: MemoryEstimator, usable: float, start: MemorySettings, choice: MemorySettings
) -> dict[str, str]:
    """What each measure of the choice is there for: what would not fit without it."""
    reasons = {}
    for measure in SAVINGS:
        if not measure.is_enabled(choice) or measure.is_enabled(start):
            continue
        phases = account.phases(measure.disable(choice))
        over = [
            f"{name} would need {one.total_bytes / GIB:.2f}"
            for name, one in phases.items()
            if one.total_bytes > usable
        ]
        why = f"without it {' and '.join(over)}; " if over else ""
        reasons[measure.name] = f"{why}price: {measure.cost}"
    return reasons


def _describe_misfit(
    account: MemoryEstimator, size: float, start: MemorySettings, allowed: Iterable[Saving], missing: str
) -> str:
    """Why nothing fits, and what would."""
    choices = [start]
    for measure in allowed:
        choices.append(measure.enable(choices[-1]))
    choice = min(choices, key=lambda one: peak_bytes(account, one))
    phases, least = account.phases(choice), peak_bytes(account, choice)
    most = max(phases, key=lambda name: phases[name].total_bytes)
    larger = next((one for one in DEVICE_SIZES if account.usable_bytes(one) >= least), None)
    remedies = [
        *([f"install bitsandbytes ({INSTALL})"] if missing else []),
        *(["train an adapter instead of all weights"] if account.work.full_finetuning else []),
        *(["lower --train_batch_size"] if account.work.batch_size > 2 else []),
        *([f"take a device of {larger} GiB"] if larger is not None else []),
    ]
    remedy = ", or ".join(remedies) or "choose a smaller model"
    return (
        f"{account.model.location.name} does not fit {size:g} GiB: with every measure that there is, {most} needs "
        f"{least / GIB:.1f} GiB, and tensors can have {account.usable_bytes(size) / GIB:.1f}. "
        f"{remedy[0].upper()}{remedy[1:]}."
    )


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed."""
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def precision_name(model: Backbone) -> str:
    """The name of a model's working precision."""
    return next(name for name, dtype in PRECISIONS.items() if dtype is model.dtype)
