"""What a package exports is called through a door: torch as it comes, keywords in place of flags, None left out."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from backbone.cli.door import name_keywords, open_door, restore_torch_defaults
from backbone.cli.keywords import takes
from backbone.io.console import UserError, notify
from customize.settings import Settings

NAMES = {"prior": "prior", "class": "class_noun", "flip": "flip"}
SAID = {
    "--class has no effect with --prior off.": "class_noun has no effect with prior off.",
    "Leave out --no-flip, or --class.": "Leave out flip=False, or class_noun.",
    "Make one: customize import a --prior off. Or leave --prior out": "Make one: customize import a --prior off. Or "
    "leave prior out",
    "Say --class (customize train --class dog), or --prior": "Say class_noun (customize train --class dog), or prior",
    "Name a run of `customize train --flip`, or --flip": "Name a run of `customize train --flip`, or flip",
    "a--flip, /x/--flip and --resume stay": "a--flip, /x/--flip and --resume stay",
}


@pytest.mark.parametrize("text", SAID)
def test_flags_that_have_a_keyword_are_called_by_it_but_in_commands(text: str) -> None:
    assert name_keywords(text, NAMES) == SAID[text]


@takes(Settings)
def said(
    *, count: int = 1, share: float | None = None, progress: Callable[[], Any] = dict, **settings: Any
) -> Any:
    """Says what it was given."""
    if settings:
        notify("--class-images and --max-train-steps are said.")
        raise UserError("--class-images has no effect without --prior class-images.")
    return count, share, progress


def test_a_function_s_errors_and_lines_name_its_keywords(capsys: pytest.CaptureFixture[str]) -> None:
    door = open_door(said, "tests", flags={})
    with pytest.raises(UserError, match=r"^class_images has no effect without prior class-images"):
        door(class_images="x")
    notify("--class-images outside")
    assert capsys.readouterr().err == "class_images and steps are said.\n--class-images outside\n"
    with pytest.raises(UserError, match=r"^--class-images"):  # as a command calls it
        said(class_images="x")


def test_none_is_as_good_as_left_out_and_numbers_are_of_their_kind() -> None:
    door: Callable[..., Any] = open_door(said, "tests", flags={})
    assert door(count=None, share=None, progress=None) == (1, None, dict)
    assert door(count=torch.tensor(2), share="0.5") == (2, 0.5, dict)
    for wrong in (1.5, True, "x", torch.tensor(1.5), torch.tensor(True)):
        with pytest.raises(UserError, match=r"^count is .*not a whole number"):
            door(count=wrong)


def test_an_exported_function_can_be_pickled_and_is_one() -> None:
    import customize

    door = customize.train
    assert getattr(sys.modules[door.__module__], door.__qualname__) is door


def test_inside_torch_is_as_it_comes_and_afterwards_as_it_was() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            with restore_torch_defaults():
                product = torch.ones(2, 2, requires_grad=True) @ torch.ones(2, 2)
                assert product.dtype is torch.float32 and product.device.type == "cpu"
                product.sum().backward()
            assert torch.is_inference_mode_enabled() and torch.is_autocast_enabled("cpu")
            assert torch.ones(1).device.type == "meta" and torch.ones(1).dtype is torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.no_grad(), restore_torch_defaults():
        assert torch.is_grad_enabled()


def test_with_a_lock_one_thread_calls_at_a_time() -> None:
    inside: list[int] = []

    def count() -> int:
        inside.append(1)
        most = len(inside)
        threading.Event().wait(0.01)
        inside.pop()
        return most

    door, found = open_door(count, "tests", flags={}, lock=threading.RLock()), list[int]()
    threads = [threading.Thread(target=lambda: found.append(door())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [1] * 4
