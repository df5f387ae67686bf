"""Bytes that are counted without storage are those of real steps; what the planner takes fits, and is cheapest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from backbone.adapters.lora import add_lora
from backbone.families.location import PUBLISHED_CONFIGS
from backbone.io.console import UserError
from backbone.io.files import read_json, write_json
from backbone.memory import count
from backbone.memory.count import StepBytes, training_step_bytes
from backbone.memory.planner import (
    CPU_OFFLOAD,
    GIB,
    SAVINGS,
    TEXT_ON_CPU,
    MemoryEstimator,
    MemorySettings,
    Phase,
    Workload,
    applicable_savings,
    find_cheapest,
    peak_bytes,
    plan_memory,
    precision_name,
    usable_bytes,
)
from backbone.models.model import Backbone
from backbone.models.placement import KINDS, Placement
from backbone.training.attention import fast_attention_backward
from tests import tiny

PUBLISHED = PUBLISHED_CONFIGS / "stable-diffusion-1"
WRITERS: dict[str, Callable[[Path], Path]] = {
    "sd": tiny.tiny_pipeline,
    "xl": tiny.tiny_stable_diffusion_xl,
    "sd3": tiny.tiny_stable_diffusion_3,
    "flux": tiny.tiny_flux,
    "pixart": tiny.tiny_pixart,
    "z-image": tiny.tiny_z_image,
    "flux2": tiny.tiny_flux2_klein,
    "qwen-image": tiny.tiny_qwen_image,
    "krea2": tiny.tiny_krea2,
    "flux2-dev": tiny.tiny_flux2_dev,
    "chroma": tiny.tiny_chroma,
    "qwen-image-2.1": tiny.tiny_qwen_image21,
    "qwen-edit": tiny.tiny_qwen_edit,
}


NEWER = ("z-image", "flux2", "qwen-image", "krea2", "flux2-dev", "chroma", "qwen-image-2.1", "qwen-edit")
every = pytest.mark.parametrize(
    "name",  # the UNet of xl is sd's but for its blocks
    [pytest.param(name, marks=[pytest.mark.slow] * (name in (*NEWER, "xl"))) for name in WRITERS],
)


class Opened(dict[str, Backbone]):
    """The model of each family, written and opened when it is asked for."""

    def __init__(self, place: Path) -> None:
        super().__init__()
        self.place = place

    def __missing__(self, name: str) -> Backbone:
        folder = WRITERS[name](self.place / name)
        self[name] = Backbone.open(str(folder), device="cpu", precision="fp32")
        return self[name]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Backbone]:
    return Opened(tmp_path_factory.mktemp("planned"))


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Backbone:
    """Stable Diffusion 1.5's settings, without weights."""
    folder = tmp_path_factory.mktemp("sd15")
    write_json(folder / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    for part in ("unet", "vae", "text_encoder"):
        write_json(folder / part / "config.json", read_json(PUBLISHED / part / "config.json"))
    return Backbone.open(str(folder), device="cpu", precision="fp32")


def lora(model: Backbone, rows: int = 1, rank: int = 4, **more: object) -> Workload:
    targets = model.family.lora_targets["attention"]

    def trains(denoiser: nn.Module) -> list[torch.Tensor]:
        return list(add_lora(denoiser, "planned", rank=rank, alpha=rank, targets=targets).values())

    return replace(Workload(trains, rows), **more)  # type: ignore[arg-type]


def full(model: Backbone, rows: int = 1) -> Workload:
    return Workload(
        lambda denoiser: [v.requires_grad_(True) for v in denoiser.parameters()], rows, full_finetuning=True
    )


def counted(
    model: Backbone, device: str, dtype: torch.dtype, *, checkpointing: bool, rows: int = 3
) -> StepBytes:
    """A step of the CPU's, with storage or without."""
    outline = model.family.spec(model.location, dtype)
    network, text = outline.denoiser.instantiate(device), outline.blank_text(rows, device)
    lora(model).add_trainable(network)
    noisy, time = torch.zeros(rows, *model.latent_shape, device=device), torch.zeros(rows, device=device)
    return training_step_bytes(
        network,
        lambda: model.family.network(network, text)(noisy, time),
        device="cpu",
        autocast=None if dtype is torch.float32 else dtype,
        checkpointing=checkpointing,
        inputs=[noisy, *text.tensors()],
    )


@pytest.fixture(scope="module")
def account(sd15: Backbone) -> MemoryEstimator:
    """A LoRA, one row a step."""
    return MemoryEstimator(sd15, lora(sd15))


@pytest.fixture(scope="module")
def whole(sd15: Backbone) -> MemoryEstimator:
    """All weights."""
    return MemoryEstimator(sd15, full(sd15))


# Counting ---------------------------------------------------------------------------------------------------


@every
@pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.float32, False), (torch.bfloat16, True)])
def test_what_is_counted_without_storage_is_what_a_real_step_keeps(
    models: dict[str, Backbone], name: str, dtype: torch.dtype, checkpointing: bool
) -> None:
    bare, real = (
        counted(models[name], device, dtype, checkpointing=checkpointing) for device in ("meta", "cpu")
    )
    assert bare.saved == pytest.approx(real.saved, rel=0.02)
    assert bare.peak == pytest.approx(real.peak, rel=0.03)


def test_the_peak_is_the_allocator_s_own(models: dict[str, Backbone]) -> None:
    """torch's profiler sees every allocation, those inside of operations too."""
    model = models["sd"]
    network = model.family.spec(model.location, torch.float32).denoiser.instantiate("cpu")
    parameters = lora(model).add_trainable(network)
    text = model.family.spec(model.location, torch.float32).blank_text(4, "cpu")
    noisy = torch.zeros(4, *model.latent_shape)

    def forward() -> torch.Tensor:
        return model.family.network(network, text)(noisy, torch.zeros(4))

    found = training_step_bytes(network, forward, device="cpu")
    activities = [ProfilerActivity.CPU]
    with fast_attention_backward(network), profile(activities=activities, profile_memory=True) as seen:
        forward().float().square().mean().backward()
    now = most = 0
    assert seen.profiler is not None and seen.profiler.kineto_results is not None
    events = [event for event in seen.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    assert all(value.grad is not None for value in parameters)
    assert found.peak == pytest.approx(most, rel=0.02)


@pytest.mark.slow
def test_published_figures_of_stable_diffusion(sd15: Backbone, account: MemoryEstimator) -> None:
    """A LoRA of rank 4 on attention at 512²: 1.486 GiB kept in fp32, 0.744 where all of it is bf16."""
    assert account.model_sizes("fp32").denoiser == 4 * 859_520_964
    assert account.model_sizes("bf16").text_encoders == 4 * 123_060_480
    assert account.step_bytes("fp32", False).saved / GIB == pytest.approx(1.486, abs=0.001)
    network, _ = MemoryEstimator(sd15, lora(sd15)).meta_trainable("bf16")
    for value in network.parameters():
        value.data = value.data.to(torch.bfloat16)
    plain = training_step_bytes(network, account.make_call(network, "bf16", 1)[0])
    assert plain.saved / GIB == pytest.approx(0.744, abs=0.001)
    assert plain.saved < account.step_bytes("bf16", False).saved < account.step_bytes("fp32", False).saved


# Monotony ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name != "z-image")) for name in NEWER]
)
def test_a_step_of_a_newer_family_keeps_what_is_counted(models: dict[str, Backbone], name: str) -> None:
    bare, real = (
        counted(models[name], device, torch.bfloat16, checkpointing=False, rows=1)
        for device in ("meta", "cpu")
    )
    assert bare.saved == pytest.approx(real.saved, rel=0.02)
    assert bare.peak == pytest.approx(real.peak, rel=0.03)


def test_operations_that_are_known_are_counted_as_those_that_are_called(
    models: dict[str, Backbone], monkeypatch: pytest.MonkeyPatch
) -> None:
    known: dict[object, object] = {}
    monkeypatch.setattr(count, "_OUTPUTS", known)
    first, second = (
        counted(models["sd"], "meta", torch.bfloat16, checkpointing=True, rows=1) for _ in range(2)
    )
    assert first == second
    assert any(known.values()) and not all(known.values())  # views are called


def test_the_batch_is_counted_although_nothing_looks_at_it() -> None:
    network = nn.Linear(4, 4)
    batch = [torch.zeros(1000), torch.zeros(3, 4)]
    counted, bare = (
        training_step_bytes(network, lambda: network(batch[1]), device="cpu", inputs=inputs)
        for inputs in (batch, ())
    )
    assert counted.peak - bare.peak == 4000 + 48 and counted.saved == bare.saved


@every
def test_more_rows_need_more_and_checkpointing_less(models: dict[str, Backbone], name: str) -> None:
    one, four = (MemoryEstimator(models[name], lora(models[name], rows)) for rows in (1, 4))
    assert four.step_bytes("fp32", False).saved == pytest.approx(
        4 * one.step_bytes("fp32", False).saved, rel=0.15
    )
    for account in (one, four):
        plain, again = account.step_bytes("fp32", False), account.step_bytes("fp32", True)
        assert again.saved < plain.saved / 2
        assert again.peak < plain.peak


@pytest.mark.slow
def test_every_measure_needs_no_more_than_its_absence(account: MemoryEstimator) -> None:
    for measure in SAVINGS:
        if measure.name != "8-bit optimiser":
            with_it = measure.enable(MemorySettings())
            assert peak_bytes(account, with_it) <= peak_bytes(account, measure.disable(with_it)), measure.name


def test_more_of_the_base_elsewhere_leaves_less_of_it(models: dict[str, Backbone]) -> None:
    for name in set(WRITERS) - set(NEWER):  # of whose tiny models the blocks are not nearly all
        model = models[name]
        account = MemoryEstimator(model, lora(model))
        left = [
            account.denoiser_bytes(MemorySettings(placement=Placement(offload=share)))
            for share in (0, 0.25, 0.5, 1)
        ]
        assert left == sorted(left, reverse=True) and left[-1] < left[0] / 2


def test_a_quantised_base_is_counted_by_its_bits(account: MemoryEstimator) -> None:
    parts = account.model_sizes("bf16")
    base = account.denoiser_bytes(MemorySettings("bf16", placement=Placement(quantize="nf4")))
    assert base == round(
        parts.denoiser - 2 * parts.linear_parameters + KINDS["nf4"] * parts.linear_parameters
    )
    assert 0.3 < parts.linear_parameters / 859_520_964 < 0.6


@pytest.mark.slow
def test_full_weights_are_in_fp32_with_gradients_and_two_moments(whole: MemoryEstimator) -> None:
    learning = whole.phases(MemorySettings("bf16", True))["training"]
    assert learning.resident_bytes == pytest.approx(859_520_964 * 12, rel=0.001)
    assert learning.transient_bytes > 4 * 859_520_964


# Choosing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "size", [*(pytest.param(size, marks=pytest.mark.slow) for size in (2.5, 3)), 4, 5, 6, 8]
)
def test_what_is_chosen_fits_and_nothing_of_it_can_be_left_out(account: MemoryEstimator, size: float) -> None:
    usable, start = usable_bytes(size, account.device), MemorySettings("bf16")
    choice = find_cheapest(account, usable, start, applicable_savings(account.work, start, library=True))
    assert choice is not None
    assert peak_bytes(account, choice) <= usable
    for measure in SAVINGS:
        if measure.is_enabled(choice) and not measure.always_keep:
            assert peak_bytes(account, measure.disable(choice)) > usable, measure.name


def test_where_all_fits_nothing_is_taken(account: MemoryEstimator) -> None:
    found = plan_memory(account, 80, MemorySettings("bf16"), library=True)
    assert found.settings == MemorySettings("bf16") and not found.reasons


def test_a_plan_says_what_it_chose_and_why(account: MemoryEstimator) -> None:
    text = "\n".join(plan_memory(account, 3, MemorySettings("bf16"), library=False).lines())
    assert "sampling one image at a time: without it previews would need" in text
    assert "3 GiB" in text


@pytest.mark.slow
def test_without_the_library_the_base_stays_whole_and_the_plan_says_what_is_missing(
    account: MemoryEstimator,
) -> None:
    for size in (2.5, 2.75, 3.0, 3.25):
        without = plan_memory(account, size, MemorySettings("bf16"), library=False)
        assert not without.settings.placement.quantize
        if without.settings.placement.offload:
            assert "bitsandbytes" in without.hint
            assert plan_memory(
                account, size, MemorySettings("bf16"), library=True
            ).settings.placement.quantize
            break
    else:
        pytest.fail("no size at which a part of the base had to go")


def test_what_does_not_fit_is_refused_with_the_nearest_remedy(account: MemoryEstimator) -> None:
    with pytest.raises(UserError, match=r"does not fit 1 GiB.*a device of 8 GiB"):
        plan_memory(account, 1, MemorySettings("bf16"), library=True)


@pytest.mark.slow
def test_all_weights_where_they_do_not_fit_are_refused_for_an_adapter(whole: MemoryEstimator) -> None:
    with pytest.raises(UserError, match=r"[Tt]rain an adapter instead of all weights"):
        plan_memory(whole, 8, MemorySettings("bf16"), library=True)


def test_what_the_user_chose_stays(account: MemoryEstimator) -> None:
    start = MemorySettings("bf16", placement=Placement(quantize="nf4"))
    assert plan_memory(account, 80, start, library=False).settings == start


def test_on_a_cpu_nothing_is_planned_into_the_memory_where_it_lies(account: MemoryEstimator) -> None:
    here, start = MemoryEstimator(account.model, account.work, device="cpu"), MemorySettings("bf16")
    allowed = applicable_savings(here.work, start, library=False, device=here.device)
    assert allowed and not {TEXT_ON_CPU, *CPU_OFFLOAD} & set(allowed)
    moved = replace(start, placement=Placement(text_on_cpu=True, offload=0.5))
    found = plan_memory(here, 80, moved, library=False)
    assert found.settings == moved and found.phases == here.phases(start)


def test_phases_are_sums() -> None:
    assert Phase(3, 4).total_bytes == 7


def test_precisions_have_their_names(models: dict[str, Backbone]) -> None:
    assert precision_name(models["sd"]) == "fp32"
