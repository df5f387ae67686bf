"""Memory planner: whether a training run fits a device, and the cheapest savings that make it fit.

The phases of a run are never in memory together: images are encoded, prompts are encoded (the encoders are freed
afterwards), predictions of the frozen base are cached, the denoiser is trained, previews are sampled. The bytes of each
are counted from the model's configs alone (`backbone.memory.count`), without weights. Savings are enabled in the order
of their cost until every phase fits; then unnecessary ones are disabled again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from backbone.conditions.conditions import Conditions
from backbone.conditions.control import Control
from backbone.distributed import processes
from backbone.distributed.device import PRECISIONS
from backbone.families.base import ModuleSpec
from backbone.families.components.latents import latent_space
from backbone.io.console import UserError, notify
from backbone.memory.count import StepBytes, forward_peak_bytes, tensor_bytes, training_step_bytes
from backbone.models.model import Backbone, decode_batch_size
from backbone.models.placement import (
    INSTALL,
    KINDS,
    Placement,
    enable_tiling,
    find_offloadable_layers,
    find_quantizable_layers,
)

Direction = Literal["encode", "decode"]
GIB = 2**30
CUDA_CONTEXT_BYTES = {"cuda": 0.6 * GIB}  # assumed, not measured: a process's share before its first tensor
FRAGMENTATION = 0.05  # assumed: the share of a device that its allocator cannot use
OPTIMIZER_STATE_BYTES = {"adamw": 8.0, "adamw8bit": 2.1, "prodigy": 16.0}  # per trained parameter
DEVICE_SIZES = (8, 12, 16, 24, 32, 40, 48, 80, 141)  # GiB of common GPUs
SAMPLING_BATCH = 8  # images sampled, or base predictions computed, in one call
OFFLOAD_SHARES = (0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class Workload:
    """The memory needs of a run besides the model's size.

    add_trainable             meta denoiser → its trained tensors, added if they are new (an adapter)
    batch_size                noisy latents in a training pass
    full_finetuning           whether the denoiser's own weights are trained, and so in fp32
    supports_compressed_base  whether training works on a quantised or CPU-offloaded base
    trains_text_encoders      whether the text encoders are needed at every step
    queries_base              whether predictions of the frozen base are cached beforehand
    extra_denoisers           further denoisers in memory (a frozen reference)
    has_ema                   whether an fp32 moving average of the trained tensors is kept
    references                images beside the noisy latents
    conditioned               (meta denoiser, conditions) → the conditions for training
    """

    add_trainable: Callable[[nn.Module], Iterable[Tensor]]
    batch_size: int
    full_finetuning: bool = False
    supports_compressed_base: bool = True
    trains_text_encoders: bool = False
    queries_base: bool = True
    extra_denoisers: int = 0
    has_ema: bool = False
    references: int = 0
    conditioned: Callable[[nn.Module, Conditions], Conditions] = lambda denoiser, conditions: conditions


@dataclass(frozen=True)
class MemorySettings:
    """The settings of a run that decide its memory."""

    precision: str = "fp32"
    checkpointing: bool = False
    optimizer: str = "adamw"
    placement: Placement = field(default_factory=Placement)
    fixed_optimizer: bool = False

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    @property
    def compilable(self) -> bool:
        """Whether the base lies on the device, not quantised, so that its blocks can be compiled."""
        return not self.placement.quantize and not self.placement.offload

    def settings(self) -> dict[str, Any]:
        """These settings under their names in a run's settings, without the optimiser."""
        return {
            "precision": self.precision,
            "gradient_checkpointing": self.checkpointing,
            "quantize": self.placement.quantize,
            "cpu_offload": self.placement.offload,
            "vae_tiling": self.placement.tiling,
            "text_on_cpu": self.placement.text_on_cpu,
            "one_by_one": self.placement.one_by_one,
        }


class Phase(NamedTuple):
    """Bytes of a phase: resident throughout, and the peak of its temporary tensors."""

    resident_bytes: int
    transient_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.resident_bytes + self.transient_bytes


class MemoryEstimator:
    """Counts the bytes of a run's phases for any settings, and caches each count.

    `device` is the type of the run's device, cuda or cpu; this machine may lack it.
    """

    def __init__(self, model: Backbone, work: Workload, *, device: str = "cuda") -> None:
        self.model, self.work = model, work
        self.latent_shape = model.latent_shape
        self.device = "cpu" if device == "cpu" else "cuda"
        self.meta_denoiser = lru_cache(self._build_meta_denoiser)
        self.meta_trainable = lru_cache(self._build_meta_trainable)
        self.step_bytes = lru_cache(self._count_step)
        self.forward_bytes = lru_cache(self._count_forward)
        self.autoencoder_bytes = lru_cache(self._count_autoencoder)
        self.model_sizes = lru_cache(self._measure_model)

    def phases(self, choice: MemorySettings) -> dict[str, Phase]:
        """The phases of the run, in order."""
        work, precision, placement = self.work, choice.precision, choice.placement
        sizes = self.model_sizes(precision)
        text_encoders = 0 if placement.text_on_cpu else sizes.text_encoders
        denoisers = self.denoiser_bytes(choice) * (1 + work.extra_denoisers) + sizes.frozen_additions
        batch = 1 if placement.one_by_one else SAMPLING_BATCH

        # Images are encoded one at a time.
        encode = self.autoencoder_bytes(precision, "encode", placement.tiling, 1)
        phases = {"encoding": Phase(sizes.autoencoder + text_encoders, encode)}
        if work.queries_base:
            phases["base predictions"] = Phase(denoisers, self.forward_bytes(precision, batch))

        # Trained tensors, their optimiser state and their average are fp32; full weights are the denoiser's own.
        trained = 4 * sizes.trained_parameters
        state = round(sizes.trained_parameters * OPTIMIZER_STATE_BYTES[choice.optimizer])
        resident = denoisers + state + trained * work.has_ema
        resident += 0 if work.full_finetuning else trained
        resident += text_encoders * work.trains_text_encoders
        step = self.step_bytes(precision, choice.checkpointing)
        update = 2 * trained  # gradients, and temporaries of the optimiser of the same size
        phases["training"] = Phase(resident, max(step.peak, update) + self.unpacked_layer_bytes(choice))

        # Images are sampled while the optimiser's state is in memory
        resident += sizes.autoencoder + text_encoders * (not work.trains_text_encoders)
        sampling = self.forward_bytes(precision, 2 * batch)  # classifier-free guidance
        rows = min(batch, decode_batch_size(self.latent_shape[-2:], self.model.factor))
        decoding = self.autoencoder_bytes(precision, "decode", placement.tiling, rows)
        transient = max(sampling, decoding) + self.unpacked_layer_bytes(choice)
        phases["previews"] = Phase(resident, transient)
        return phases

    def denoiser_bytes(self, choice: MemorySettings) -> int:
        """Bytes of the denoiser's weights on the device, quantised or without the offloaded layers."""
        parts, placement = self.model_sizes(choice.precision), choice.placement
        if placement.quantize:
            width = choice.dtype.itemsize
            return round(
                parts.denoiser
                - parts.linear_parameters * width
                + parts.linear_parameters * KINDS[placement.quantize]
            )
        return parts.denoiser - (round(self.offloaded_bytes(choice)) if placement.offload else 0)

    def offloaded_bytes(self, choice: MemorySettings) -> float:
        """Bytes of the denoiser's layers in CPU memory."""
        network = self.meta_denoiser(choice.precision)
        layers = find_offloadable_layers(network, choice.placement.offload)
        return float(sum(tensor_bytes(layer.parameters()) for layer in layers))

    def unpacked_layer_bytes(self, choice: MemorySettings) -> int:
        """Bytes of dequantised or uploaded weights while a layer computes: twice the largest layer."""
        if not (choice.placement.quantize or choice.placement.offload):
            return 0
        return 2 * self.model_sizes(choice.precision).largest_layer

    def remedies(self) -> list[str]:
        """Alternatives for the user where nothing fits."""
        return [
            *(["train an adapter instead of all weights"] if self.work.full_finetuning else []),
            *(["lower --batch"] if self.work.batch_size > 2 else []),
        ]

    # Counting ------------------------------------------------------------------------------------------------

    def _build_meta_denoiser(self, precision: str) -> nn.Module:
        """The denoiser on `meta`, in the precision of its weights in this run."""
        spec = self.model.family.spec(self.model.location, PRECISIONS[precision])
        network = self.model.widen(spec.denoiser.instantiate())
        return nn.Module.to(network, torch.float32) if self.work.full_finetuning else network

    def _measure_model(self, precision: str) -> ModelSizes:
        network = self.meta_denoiser(precision)
        denoiser = tensor_bytes(network.parameters())
        linear = [layer.weight.numel() for layer in find_quantizable_layers(network).values()]
        spec = self.model.family.spec(self.model.location, PRECISIONS[precision])
        layers = [tensor_bytes(layer.parameters()) for layer in find_offloadable_layers(network)]
        text = sum(tensor_bytes(part.instantiate().parameters()) for part in spec.text_encoders.values())
        autoencoder = tensor_bytes(spec.autoencoder.instantiate().parameters())
        trainable, tensors = self.meta_trainable(precision)
        trained = sum(value.numel() for value in tensors)
        frozen = tensor_bytes(trainable.parameters()) - tensor_bytes(tensors)
        frozen_additions = max(0, frozen - denoiser)  # none where the denoiser itself is trained
        return ModelSizes(
            denoiser, sum(linear), max(layers, default=0), autoencoder, text, trained, frozen_additions
        )

    def _build_meta_trainable(self, precision: str) -> tuple[nn.Module, list[Tensor]]:
        """The denoiser on `meta` and its trained tensors."""
        network = self._build_meta_denoiser(precision)
        return network, list(self.work.add_trainable(network))

    def _count_step(self, precision: str, checkpointing: bool) -> StepBytes:
        network = self.meta_trainable(precision)[0]
        forward, inputs = self.make_call(network, precision, self.work.batch_size)
        return training_step_bytes(
            network,
            forward,
            device=self.device,
            autocast=autocast_dtype(precision),
            checkpointing=checkpointing,
            inputs=inputs,
        )

    def _count_forward(self, precision: str, rows: int) -> int:
        network = self.meta_trainable(precision)[0]
        forward, inputs = self.make_call(network, precision, rows)
        return forward_peak_bytes(
            network, forward, device=self.device, autocast=autocast_dtype(precision), inputs=inputs
        )

    def make_call(
        self, network: nn.Module, precision: str, rows: int
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """A call of the denoiser with blank latents and prompts, and these inputs."""
        spec = self.model.family.spec(self.model.location, PRECISIONS[precision])
        noisy = torch.zeros(rows, *self.latent_shape, device="meta")
        references = tuple(torch.zeros_like(noisy) for _ in range(self.work.references))
        conditions = replace(
            spec.blank_text(rows), references=references, controls=self.controls(network, rows)
        )
        for value in conditions.tensors():
            value.requires_grad_(self.work.trains_text_encoders and value.is_floating_point())
        time = torch.zeros(rows, device="meta")
        conditioned = self.work.conditioned

        def forward() -> Tensor:
            return self.model.family.network(network, conditioned(network, conditions))(noisy, time)

        return forward, [noisy, *conditions.tensors()]

    def controls(self, network: nn.Module, rows: int) -> tuple[Control, ...]:
        """The controls of this many rows, alive throughout a call."""
        return ()

    def _count_autoencoder(self, precision: str, direction: Direction, tiles: bool, count: int) -> int:
        spec = self.model.family.spec(self.model.location, PRECISIONS[precision])
        sides = [latents * self.model.factor for latents in self.latent_shape[-2:]]
        shape = (3, *sides) if direction == "encode" else self.latent_shape
        tile = self.model.resolution // 2 if tiles else 0
        return autoencoder_peak_bytes(
            spec.autoencoder, direction, (count, *shape), device=self.device, tile=tile
        )


def autoencoder_peak_bytes(
    part: ModuleSpec, direction: Direction, shape: Sequence[int], *, device: str, tile: int = 0
) -> int:
    """The peak of encoding images, or decoding latents, of this shape [B, C, H, W]; `tile` pixels a side, 0: whole."""
    network: Any = part.instantiate()
    if tile:
        enable_tiling(network, tile)
    space, inputs = latent_space(network), torch.zeros(*shape, dtype=part.dtype, device="meta")
    if direction == "encode":
        return forward_peak_bytes(network, lambda: space.encode(network, inputs), device=device)
    return forward_peak_bytes(network, lambda: space.decode(network, inputs, part.dtype), device=device)


def usable_bytes(size: float, device: str) -> float:
    """The bytes available to tensors on a device of `size` GiB."""
    return size * GIB * (1 - FRAGMENTATION) - CUDA_CONTEXT_BYTES.get(device, 0.0)


class ModelSizes(NamedTuple):
    """Bytes of a model's components; `linear_parameters` (quantisable) and `trained_parameters` are counts.

    `frozen_additions` are weights added with the trained tensors: the copied encoder of a control-LoRA.
    """

    denoiser: int
    linear_parameters: int
    largest_layer: int
    autoencoder: int
    text_encoders: int
    trained_parameters: int
    frozen_additions: int = 0


def autocast_dtype(precision: str) -> torch.dtype | None:
    """The autocast dtype of a run's precision; None for fp32."""
    return None if precision == "fp32" else PRECISIONS[precision]


# Choosing ---------------------------------------------------------------------------------------------------


class Saving(NamedTuple):
    """A way to save memory: its name and cost, a test for it in settings, and how to enable and disable it."""

    name: str
    cost: str
    is_enabled: Callable[[MemorySettings], bool]
    enable: Callable[[MemorySettings], MemorySettings]
    disable: Callable[[MemorySettings], MemorySettings]
    always_keep: bool = False  # never disabled again: nothing is better without it


def _make_setting_saving(
    name: str, cost: str, setting: str, enabled: Any, disabled: Any, *, always_keep: bool = False
) -> Saving:
    """A saving that is one field of `MemorySettings`."""
    return Saving(
        name,
        cost,
        lambda choice: getattr(choice, setting) == enabled,
        lambda choice: replace(choice, **{setting: enabled}),
        lambda choice: replace(choice, **{setting: disabled}),
        always_keep,
    )


def _make_placement_saving(
    name: str, cost: str, setting: str, enabled: Any, disabled: Any, **reset: Any
) -> Saving:
    """A saving that is one field of the model's placement; `reset` are fields that it resets."""

    def set_field(choice: MemorySettings, value: Any) -> MemorySettings:
        return replace(choice, placement=replace(choice.placement, **{setting: value, **reset}))

    return Saving(
        name,
        cost,
        lambda choice: getattr(choice.placement, setting) == enabled,
        lambda choice: set_field(choice, enabled),
        lambda choice: set_field(choice, disabled),
    )


BF16 = _make_setting_saving(
    "bf16", "none where the processor has it", "precision", "bf16", "fp32", always_keep=True
)
EIGHT_BIT_OPTIMIZER = _make_setting_saving(
    "8-bit optimiser", "its state is rounded", "optimizer", "adamw8bit", "adamw"
)
GRADIENT_CHECKPOINTING = _make_setting_saving(
    "gradient checkpointing", "a third more time", "checkpointing", True, False
)
SINGLE_IMAGE_SAMPLING = _make_placement_saving(
    "sampling one image at a time", "slower", "one_by_one", True, False
)
VAE_TILING = _make_placement_saving("VAE tiling", "seams; images of few pixels change", "tiling", True, False)
TEXT_ON_CPU = _make_placement_saving(
    "text encoders on the CPU", "slower, once a prompt", "text_on_cpu", True, False
)
QUANTIZATION = (
    _make_placement_saving("base in 8 bits", "the base is rounded; slower", "quantize", "8bit", ""),
    _make_placement_saving("base in NF4", "the base is rounded more; slower", "quantize", "nf4", ""),
)
CPU_OFFLOAD = tuple(
    _make_placement_saving(
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
    """The settings for a device of `size` GiB, and for each saving the phases that would not fit without it."""

    settings: MemorySettings
    size: float
    usable_bytes: float
    phases: Mapping[str, Phase]
    reasons: Mapping[str, str]
    hint: str = ""

    def lines(self) -> list[str]:
        """The plan as a small table."""
        peak = max(phase.total_bytes for phase in self.phases.values())
        rows = [
            f"Memory of the device: {self.size:g} GiB, of which tensors can have {self.usable_bytes / GIB:.1f} "
            f"(assumed); the run needs {peak / GIB:.2f}.",
            *format_phases(self.phases),
            *(f"  {name}: {reason}" for name, reason in self.reasons.items()),
        ]
        return [*rows, *([self.hint] if self.hint else [])]


def format_phases(phases: Mapping[str, Phase]) -> list[str]:
    """A table of the phases in GiB, one line each."""
    lines = [f"  {'phase':<16} {'GiB':>7} {'weights, states':>16} {'computing':>10}"]
    for name, phase in phases.items():
        figures = phase.total_bytes / GIB, phase.resident_bytes / GIB, phase.transient_bytes / GIB
        lines.append(f"  {name:<16} {figures[0]:>7.2f} {figures[1]:>16.2f} {figures[2]:>10.2f}")
    return lines


def plan_memory(
    estimator: MemoryEstimator, size: float, start: MemorySettings, *, library: bool
) -> MemoryPlan:
    """The cheapest settings, starting from `start`, with which the run fits a device of `size` GiB.

    Savings of `start` are kept; on a CPU those that move weights to the CPU's memory have no effect and are ignored.
    `library` says whether bitsandbytes can be used.

    Raises `UserError` with the nearest remedy where nothing fits.
    """
    usable, requested = usable_bytes(size, estimator.device), start.placement
    if estimator.device == "cpu":
        start = replace(start, placement=replace(requested, text_on_cpu=False, offload=0.0))
    savings = applicable_savings(estimator.work, start, library=library, device=estimator.device)
    choice = find_cheapest(estimator, usable, start, savings)

    # Where it fits only with weights in the CPU's memory, or not at all, quantisation might help
    hint = ""
    if not library and (choice is None or choice.placement.offload):
        uncompressed = [
            saving
            for saving in applicable_savings(estimator.work, start, library=True, device=estimator.device)
            if saving not in CPU_OFFLOAD
        ]
        if find_cheapest(estimator, usable, start, uncompressed) is not None:
            hint = f"With bitsandbytes and a GPU it would fit in fewer bits: {INSTALL}"
    if choice is None:
        raise UserError(_describe_misfit(estimator, size, start, savings, hint))
    reasons, phases = _explain_savings(estimator, usable, start, choice), estimator.phases(choice)
    if estimator.device == "cpu":
        placement = replace(choice.placement, text_on_cpu=requested.text_on_cpu, offload=requested.offload)
        choice = replace(choice, placement=placement)
    return MemoryPlan(choice, size, usable, phases, reasons, hint)


def fit_to_memory(
    model: Backbone, work: Workload, size: float, start: MemorySettings
) -> tuple[Backbone, MemorySettings]:
    """Plan for the model's device of `size` GiB, print the plan, and return the (unloaded) model with its settings."""
    return fit(MemoryEstimator(model, work, device=model.device.type), size, start)


def fit(estimator: MemoryEstimator, size: float, start: MemorySettings) -> tuple[Backbone, MemorySettings]:
    """`fit_to_memory` for any estimator.

    A model opened with `compile` stays compiled where the plan allows it; otherwise a line says that it does not.
    Raises `UserError` where the model is sharded over processes.
    """
    processes.require_whole_model("--vram counts for a process alone; it")
    model = estimator.model
    on_gpu = model.device.type == "cuda"
    plan = plan_memory(estimator, size, start, library=on_gpu and has_bitsandbytes())
    for line in plan.lines():
        notify(line)
    choice = plan.settings
    if model.compiles and not choice.compilable:
        notify("Its blocks are not compiled: the base is compressed, or partly in the CPU's memory.")
    placed = Backbone(
        model.location,
        model.family,
        device=model.device,
        dtype=choice.dtype,
        placement=choice.placement,
        resolution=model.requested_resolution,
        widened=model.widened,
        compile=model.compiles and choice.compilable,
    )
    return placed, choice


def peak_bytes(estimator: MemoryEstimator, choice: MemorySettings) -> int:
    """Bytes of the largest phase."""
    return max(phase.total_bytes for phase in estimator.phases(choice).values())


def applicable_savings(
    work: Workload, start: MemorySettings, *, library: bool, device: str = "cuda"
) -> list[Saving]:
    """The savings that apply to this workload on a `device` (cpu, cuda), cheapest first."""
    has_own_memory = device != "cpu"  # separate from the CPU's memory
    frozen = work.supports_compressed_base and not work.full_finetuning
    apply = {
        TEXT_ON_CPU: has_own_memory and not work.trains_text_encoders,
        EIGHT_BIT_OPTIMIZER: library
        and work.full_finetuning
        and not start.fixed_optimizer
        and start.optimizer == "adamw",
        BF16: start.precision == "fp32",
        **dict.fromkeys(QUANTIZATION, frozen and library and not start.placement.offload),
        **dict.fromkeys(CPU_OFFLOAD, has_own_memory and frozen and not start.placement.quantize),
    }
    return [saving for saving in SAVINGS if apply.get(saving, True)]


def find_cheapest(
    estimator: MemoryEstimator, usable: float, start: MemorySettings, savings: Iterable[Saving]
) -> MemorySettings | None:
    """Enable savings in order until every phase fits, then disable those that are unnecessary, most expensive first.

    None where the run does not fit with all of them.
    """
    # Greedy: from the cheapest saving on, until the peak fits
    choice, enabled = start, list[Saving]()
    for saving in savings:
        if peak_bytes(estimator, choice) <= usable:
            break
        if not saving.is_enabled(choice):
            choice = saving.enable(choice)
            enabled.append(saving)
    if peak_bytes(estimator, choice) > usable:
        return None

    # A later saving may have made earlier ones unnecessary
    for saving in reversed(enabled):
        if saving.is_enabled(choice) and not saving.always_keep:
            reduced = saving.disable(choice)
            choice = reduced if peak_bytes(estimator, reduced) <= usable else choice
    return choice


def _explain_savings(
    estimator: MemoryEstimator, usable: float, start: MemorySettings, choice: MemorySettings
) -> dict[str, str]:
    """For each added saving, the phases that would not fit without it, and its cost."""
    reasons = {}
    for saving in SAVINGS:
        if not saving.is_enabled(choice) or saving.is_enabled(start):
            continue
        phases = estimator.phases(saving.disable(choice))
        over = [
            f"{name} would need {phase.total_bytes / GIB:.2f}"
            for name, phase in phases.items()
            if phase.total_bytes > usable
        ]
        need = f"without it {' and '.join(over)}; " if over else ""
        reasons[saving.name] = f"{need}cost: {saving.cost}"
    return reasons


def _describe_misfit(
    estimator: MemoryEstimator, size: float, start: MemorySettings, savings: Iterable[Saving], hint: str
) -> str:
    """The message for a run that does not fit with every saving, and the remedies."""
    choices = [start]
    for saving in savings:
        choices.append(saving.enable(choices[-1]))
    choice = min(choices, key=lambda settings: peak_bytes(estimator, settings))
    phases, least = estimator.phases(choice), peak_bytes(estimator, choice)
    most = max(phases, key=lambda name: phases[name].total_bytes)
    larger = next((gib for gib in DEVICE_SIZES if usable_bytes(gib, estimator.device) >= least), None)
    remedies = [
        *([f"install bitsandbytes ({INSTALL})"] if hint else []),
        *estimator.remedies(),
        *([f"take a device of {larger} GiB"] if larger is not None else []),
    ]
    remedy = ", or ".join(remedies) or "choose a smaller model"
    return (
        f"{estimator.model.location.name} does not fit {size:g} GiB: with every saving enabled, {most} needs "
        f"{least / GIB:.1f} GiB, and tensors can have {usable_bytes(size, estimator.device) / GIB:.1f}. "
        f"{remedy[0].upper()}{remedy[1:]}."
    )


def has_bitsandbytes() -> bool:
    """Whether bitsandbytes is installed."""
    from importlib.util import find_spec

    return find_spec("bitsandbytes") is not None


def precision_name(model: Backbone) -> str:
    """The name of the model's working precision."""
    return next(name for name, dtype in PRECISIONS.items() if dtype is model.dtype)
