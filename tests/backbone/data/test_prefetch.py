"""Work ahead: the same results in the same order, errors said once, steps from any one on."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from backbone.data.prefetch import Movable, StepLoader, map_in_workers
from backbone.io.console import UserError


def test_results_come_in_order_however_many_work() -> None:
    for workers in (0, 2):
        found = list(
            map_in_workers(lambda item: 3 * item, range(20), workers=workers)
        )  # a lambda cannot be sent
        assert found == [3 * item for item in range(20)]


def test_a_mistake_of_a_worker_is_said_here_in_its_own_words() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise UserError("Item 3 is bad. Remove it.")
        return item

    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^Item 3 is bad\. Remove it\.$"):
            list(map_in_workers(work, range(5), workers=workers))


def test_a_worker_that_dies_is_one_sentence() -> None:
    with pytest.raises(UserError, match="worker process has ended"):
        list(map_in_workers(lambda item: os._exit(1), range(3), workers=1))


@dataclass
class Number(Movable):
    value: Tensor


@dataclass
class Several(Movable):
    on_host: ClassVar[tuple[str, ...]] = ("row",)

    value: Tensor
    row: Tensor
    inner: Number | None


def test_a_batch_takes_its_tensors_to_a_device_and_leaves_what_indexes_tables() -> None:
    value, row = torch.zeros(2), torch.tensor([1, 0])
    batch = Several(value, row, Number(value + 1))
    moved = batch.to(torch.device("meta"))
    assert moved.inner is not None
    assert moved.value.is_meta and moved.inner.value.is_meta and moved.row is row
    assert [tensor.tolist() for tensor in batch.tensors()] == [[0, 0], [1, 1]]
    assert Several(value, row, None).to(torch.device("meta")).inner is None


def test_steps_are_made_in_order_and_again_from_any_one() -> None:
    made: list[int] = []

    def make(step: int) -> list[Number]:
        made.append(step)
        return [Number(torch.tensor(step))]

    for workers in (0, 1):
        steps = StepLoader(make, 9, torch.device("cpu"), workers=workers)
        found = [int(steps.at(step)[0].value) for step in (1, 2, 3, 7, 8, 2, 12)]
        assert found == [1, 2, 3, 7, 8, 2, 12]
        steps.close()
    assert made == [1, 2, 3, 7, 8, 2, 12], "without workers nothing is made before it is asked for"
