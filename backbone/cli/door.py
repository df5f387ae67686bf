"""The door from Python: calls of a package's exported functions go through here.

Such a call runs with torch's default settings, whatever the caller has set, and its messages name keywords in place of
flags.
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

from backbone.io.console import UserError, refuse_lost_folder, reword_messages

Function = TypeVar("Function", bound=Callable[..., Any])
# Separates sentences and their parts, one of which may be a command
PART = re.compile(r"((?<=[.:;])\s+|[`()])")
COMMAND = re.compile(r"\b(?:customize|edit|align|limner) [a-z]")
FLAG = re.compile(r"(?<![\w./-])--([a-z][a-z0-9-]*)")
PLAIN = {"int": int, "float": float, "bool": bool, "str": str}
AUTOCAST_DEVICES = ("cpu", "cuda", "mps", "xpu")


def open_door(
    function: Function, package: str, *, flags: Mapping[str, str], lock: threading.RLock | None = None
) -> Function:
    """The function as `package` exports it: None stands for a default, and numbers and text are converted.

    `flags` maps flags of the commands to the keywords that have another name than the flag. With a `lock` one thread
    calls at a time, for functions that change a model while they run.
    """

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        names = {**list_keywords(function), **flags}
        guard: AbstractContextManager[Any] = nullcontext() if lock is None else lock
        with guard, restore_torch_defaults(), reword_messages(lambda text: name_keywords(text, names)):
            try:
                refuse_lost_folder()
                return function(*args, **fit_keywords(function, keywords))
            except UserError as error:
                error.args = (name_keywords(str(error), names), *error.args[1:])
                raise

    call.__module__, call.__qualname__ = package, function.__name__  # as pickle finds it
    return call  # type: ignore[return-value]


def fit_keywords(function: Callable[..., Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords without None if there is a default, and with numbers and text converted to the annotated types.

    Raises `UserError`, naming the argument, for a value that does not fit.
    """
    from backbone.cli.options import Field, Option
    from backbone.cli.values.convert import convert_value

    unwrapped = inspect.unwrap(function)
    defaults = unwrapped.__kwdefaults__ or {}
    fitted = {name: value for name, value in keywords.items() if value is not None or name not in defaults}
    for name in fitted.keys() & defaults.keys():
        kind = PLAIN.get(str(unwrapped.__annotations__.get(name)).removesuffix(" | None"))
        if kind is not None:
            field = Field(name, kind, False, defaults[name], Option("", ""))
            fitted[name] = convert_value(field, fitted[name], name)
    return fitted


def list_keywords(function: Callable[..., Any]) -> dict[str, str]:
    """Flags without their leading hyphens → the function's keywords for them."""
    from backbone.cli.options import list_fields

    parameters = inspect.signature(function).parameters
    keywords = {name.replace("_", "-"): name for name in parameters}
    for kind in getattr(function, "settings_classes", ()):
        for field in list_fields(kind).values():
            for name in field.spellings if field.name in parameters else ():
                keywords.setdefault(name.replace("_", "-"), field.name)
    return keywords


def name_keywords(text: str, names: Mapping[str, str]) -> str:
    """A text with keywords in place of flags, except in commands that are to be copied."""

    def replace_flag(flag: re.Match[str]) -> str:
        name = flag[1]
        if name not in names and name.removeprefix("no-") in names:
            return f"{names[name.removeprefix('no-')]}=False"
        return names.get(name, flag[0])

    parts = PART.split(text)
    for number, part in enumerate(parts):
        command = COMMAND.search(part)
        end = len(part) if command is None else command.start()
        parts[number] = FLAG.sub(replace_flag, part[:end]) + part[end:]
    return "".join(parts)


@contextmanager
def restore_torch_defaults() -> Iterator[None]:
    """Inside the `with`, torch's settings are those of a fresh import, whatever the caller has set.

    Gradients are on, inference mode and autocast off, and new tensors are float32 on the CPU.
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
