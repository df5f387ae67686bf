"""The simulation of a large run, against numbers worked out by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from backbone.io.console import UserError
from backbone.io.files import write_json
from benchmarks.speed.scale import (
    PAIRS,
    RAW,
    Cluster,
    Costs,
    Sizes,
    count_latent_bytes,
    count_operations,
    describe_saturation,
    format_report,
    read_costs,
    simulate,
    simulate_passes,
    sum_hours,
)

CLUSTER = Cluster(gpus=4, read_rate=1000.0, cores=2, decode=0.0, exchange=0.5, ahead=2)
COSTS = Costs(encode=1.0, reference=2.0, learn=3.0, source="by hand")


def test_where_the_gpus_are_slow_only_the_first_batch_is_waited_for() -> None:
    """8 pairs are 2 a GPU: 8 · 250 / 1000 = 2 s to read, 2 · 3 + 0.5 = 6.5 s a step."""
    found = simulate(CLUSTER, steps=5, pairs=8, read=250.0, decode=0.0, compute=3.0)
    assert found.seconds == pytest.approx(2 + 5 * 6.5)
    assert found.first == "the GPUs"
    assert found.busy == {"reading": 10.0, "decoding": 0.0, "the GPUs": 30.0, "exchanging gradients": 2.5}


def test_where_reading_is_slow_the_last_step_alone_is_added() -> None:
    """10 s to read a batch, 6.5 s a step."""
    found = simulate(CLUSTER, steps=5, pairs=8, read=1250.0, decode=0.0, compute=3.0)
    assert found.seconds == pytest.approx(5 * 10 + 6.5)
    assert found.first == "reading"


def test_decoding_is_done_by_all_cores_and_beside_reading() -> None:
    """2 pairs a GPU · 12 core-seconds / 2 cores = 12 s."""
    found = simulate(CLUSTER, steps=3, pairs=8, read=250.0, decode=12.0, compute=3.0)
    assert found.seconds == pytest.approx(3 * 12 + 6.5)
    assert found.first == "decoding"


def test_the_queue_holds_no_more_than_it_can() -> None:
    """With one batch ahead the next is begun only when the last is taken: 2 s, then 6.5 s steps, never faster."""
    one = Cluster(gpus=4, read_rate=1000.0, cores=2, exchange=0.5, ahead=1)
    slow = simulate(one, steps=4, pairs=8, read=250.0, decode=0.0, compute=3.0)
    assert slow.seconds == pytest.approx(2 + 4 * 6.5)
    tight = simulate(one, steps=4, pairs=8, read=1000.0, decode=0.0, compute=3.0)
    assert tight.seconds == pytest.approx(4 * 8 + 6.5)


def test_the_bank_asks_the_reference_at_first_visits_alone() -> None:
    sizes = Sizes(0.0, 0.0)
    still = Cluster(gpus=1, exchange=0.0, decode=0.0)
    found = {
        way: sum_hours(simulate_passes(way, still, COSTS, sizes, draws=2, visits=5, pairs=2048)) * 3600 / 2048
        for way in ("script", "cached", "bank")
    }
    assert found["script"] == pytest.approx(10 * (1 + 2 + 3))
    assert found["cached"] == pytest.approx(1 + 10 * (2 + 3))
    assert found["bank"] == pytest.approx(1 + 2 * (2 + 3) + 8 * 3)


def test_a_single_visit_gains_nothing_from_the_bank() -> None:
    sizes = Sizes(400_000.0, 65_536.0)
    cached, bank = (
        sum_hours(simulate_passes(way, Cluster(), COSTS, sizes, draws=4, visits=1))
        for way in ("cached", "bank")
    )
    assert bank == cached


def test_bytes_of_the_data_set_as_latents() -> None:
    assert count_latent_bytes(64, 4, width=2) == 32_768
    assert round(2 * count_latent_bytes(64, 4, width=2) * PAIRS / 1e9) == 56
    assert round(RAW / 1e9) == 335


def test_what_is_busy_longest_is_named_with_its_share() -> None:
    found = simulate_passes("script", CLUSTER, COSTS, Sizes(0.0, 0.0), draws=1, visits=1, pairs=2048)
    assert describe_saturation(found) == "the GPUs (100 %)"


def test_costs_come_from_a_result_of_the_step_benchmark(tmp_path: Path) -> None:
    facts = {
        "shape": "sd15", "precision": "bf16", "machine": "cuda, x86_64", "encode_seconds_per_pair": 0.1,
        "seconds_per_pair": {"cached": 0.5, "bank": 0.3},
    }  # fmt: skip
    path = tmp_path / "steps.json"
    write_json(path, facts)
    found = read_costs(path)
    assert (found.encode, found.learn) == (0.1, 0.3)
    assert found.reference == pytest.approx(0.2)
    write_json(path, {**facts, "machine": "cpu, x86_64"})
    with pytest.raises(UserError, match="on a GPU"):
        read_costs(path)
    write_json(path, {})
    with pytest.raises(UserError, match=r"no result of .*benchmarks.align steps"):
        read_costs(path)


def test_operations_of_stable_diffusion() -> None:
    """Twice the multiplications that the layers of SD 1.5 do at 512²."""
    encode, forward, backward = count_operations("sd15")
    assert encode == pytest.approx(1.117e12, rel=0.01)
    assert forward == pytest.approx(0.803e12, rel=0.02)
    assert 1.0 < backward / forward < 1.3


def test_the_report_says_what_was_assumed() -> None:
    text = format_report(Cluster(), COSTS, Sizes(393_902.0, 65_536.0), draws=4, width=768)
    assert "Costs: by hand." in text and "Assumed: 16 GPUs" in text
    assert "| 1 × 1 | 416 |" in text and text.count("×  |") == 0
