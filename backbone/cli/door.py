"""The door from Python: what a package exports as a function is called through here.

Such a call finds torch as it comes, whatever the caller has set, and what it says names keywords in place of flags.
"""

from __future__ import annotations

import functools
import inspect
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

from backbone.io.console import UserError, refuse_lost_folder, rewording

Function = TypeVar("Function", bound=Callable[..., Any])
# Between sentences and their parts, of which one may be a command
PART = re.compile(r"((?<=[.:;])\s+|[`()])")
COMMAND = re.compile(r"\b(?:customize|edit|align|limner) [a-z]")
FLAG = re.compile(r"(?<![\w./-])--([a-z][a-z0-9-]*)")
PLAIN = {"int": int, "float": float, "bool": bool, "str": str}
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def open_door(
    function: Function, package: str, *, flags: Mapping[str, str], lock: threading.RLock | None = None
) -> Function:
    """The function as `package` exports it: None is as good as left out where it has a default, numbers and text fit.

    `flags` are those of commands that its keywords, and those of settings that it is given, have another name for.
    With a `lock` one thread calls at a time, for functions that change a model while they run.
    """

    @functools.wraps(function)
    def call(*args: Any, **named: Any) -> Any:
        names = {**keywords_of(function), **flags}
        held: AbstractContextManager[Any] = nullcontext() if lock is None else lock
        with held, restore_torch_defaults(), rewording(lambda text: name_keywords(text, names)):
            try:
                refuse_lost_folder()
                return function(*args, **fit_keywords(function, named))
            except UserError as error:
                error.args = (name_keywords(str(error), names), *error.args[1:])
                raise

    call.__module__, call.__qualname__ = package, function.__name__  # as pickle finds it
    return call  # type: ignore[return-value]


def fit_keywords(function: Callable[..., Any], named: Mapping[str, Any]) -> dict[str, Any]:
    """What was given by keyword, without None that says nothing, numbers and text of a function's own as it has them.

    Raises `UserError`, naming the argument, for what does not fit.
    """
    from backbone.cli.options import Field, Option
    from backbone.cli.values.convert import convert_value

    own = inspect.unwrap(function)
    usual = own.__kwdefaults__ or {}
    given = {name: value for name, value in named.items() if value is not None or name not in usual}
    for name in given.keys() & usual.keys():
        kind = PLAIN.get(str(own.__annotations__.get(name)).removesuffix(" | None"))
        if kind is not None:
            plain = Field(name, kind, False, usual[name], Option("", ""))
            given[name] = convert_value(plain, given[name], name)
    return given


def keywords_of(function: Callable[..., Any]) -> dict[str, str]:
    """Flags without their hyphens → the keywords of a function that mean the same."""
    from backbone.cli.options import fields_of

    known = inspect.signature(function).parameters
    found = {name.replace("_", "-"): name for name in known}
    for kind in getattr(function, "taken", ()):
        for one in fields_of(kind).values():
            for name in one.spellings if one.name in known else ():
                found.setdefault(name.replace("_", "-"), one.name)
    return found


def name_keywords(text: str, names: Mapping[str, str]) -> str:
    """A text with keywords in place of the flags that have one, but in commands that are to be copied."""

    def keyword(flag: re.Match[str]) -> str:
        name = flag[1]
        if name not in names and name.removeprefix("no-") in names:
            return f"{names[name.removeprefix('no-')]}=False"
        return names.get(name, flag[0])

    parts = PART.split(text)
    for number, part in enumerate(parts):
        command = COMMAND.search(part)
        end = len(part) if command is None else command.start()
        parts[number] = FLAG.sub(keyword, part[:end]) + part[end:]
    return "".join(parts)


@contextmanager
def restore_torch_defaults() -> Iterator[None]:
    """Inside, torch's settings are those of a fresh import, whatever the caller has set for this thread or for all.

    Gradients on, no inference mode, no autocast, tensors of float32 in the processor's memory.
    """
    torch = sys.modules.get("torch")
    if torch is None:  # nobody has set anything
        yield
        return
    with ExitStack() as state:
        state.enter_context(torch.inference_mode(False))
        state.enter_context(torch.enable_grad())
        for device in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(device):
                state.enter_context(torch.autocast(device, enabled=False))
        if torch.get_default_device().type != "cpu":
            state.enter_context(torch.device("cpu"))
        if (dtype := torch.get_default_dtype()) is not torch.float32:
            torch.set_default_dtype(torch.float32)
            state.callback(torch.set_default_dtype, dtype)
        yield
