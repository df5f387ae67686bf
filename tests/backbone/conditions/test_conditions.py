"""What is done with conditions of every kind: rows, copies, joining, prompt dropout."""

from __future__ import annotations

import torch

from backbone.conditions.conditions import Conditions


def some(count: int, *, guidance: float | None = None) -> Conditions:
    """Conditions whose row n is full of n, with a mask of whole numbers."""
    rows = torch.arange(count)
    text = {
        "hidden": rows.float()[:, None, None].expand(-1, 3, 2).clone(),
        "mask": rows[:, None].expand(-1, 3),
    }
    return Conditions(text, None if guidance is None else torch.full((count,), guidance))


def numbers(conditions: Conditions) -> list[int]:
    """Which row each is; the same in every tensor."""
    hidden, mask = conditions.text["hidden"][:, 0, 0].tolist(), conditions.text["mask"][:, 0].tolist()
    assert hidden == mask
    return [int(number) for number in mask]


def test_rows_are_taken_by_numbers_slices_and_tensors() -> None:
    four = some(4, guidance=3.5)
    assert numbers(four[[3, 1]]) == numbers(four[torch.tensor([3, 1])]) == [3, 1]
    assert numbers(four[1:3]) == [1, 2]
    assert len(four[1:3]) == 2 and four[1:3].tensors()[-1].tolist() == [3.5, 3.5]


def test_copies_stand_one_behind_the_other() -> None:
    assert numbers(some(2).repeat(3)) == [0, 1, 0, 1, 0, 1]
    one = some(1).repeat(3)
    assert numbers(one) == [0, 0, 0]
    assert one.text["hidden"].stride(0) == 0  # a view


def test_parts_are_joined_in_order_with_their_guidance() -> None:
    joined = Conditions.cat([some(2, guidance=1.0), some(1, guidance=7.0)])
    assert numbers(joined) == [0, 1, 0]
    assert joined.guidance is not None and joined.guidance.tolist() == [1.0, 1.0, 7.0]


def test_dropping_replaces_the_prompt_and_nothing_else() -> None:
    four = some(4, guidance=2.0)
    dropped = four.drop(torch.tensor([False, True, False, True]), some(1))
    assert numbers(dropped) == [0, 0, 2, 0]
    assert dropped.guidance is four.guidance
    assert dropped.text["mask"].dtype is torch.int64
