"""Exported names of a package that load their module on first use, so that `--help` imports no torch."""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import Any


def export_lazily(
    package: str,
    modules: Mapping[str, Sequence[str]],
    *,
    flags: Mapping[str, str] | None = None,
    lock: threading.RLock | None = None,
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """`__getattr__` and `__dir__` of a package that exports names of other modules, and `__version__`.

    Functions are called through `backbone.cli.door.open_door`, which gets `flags` and `lock`.
    """
    module_of = {name: module for module, names in modules.items() for name in names}
    opened: dict[str, Any] = {}

    def get(name: str) -> Any:
        if name == "__version__":
            from importlib.metadata import PackageNotFoundError, version  # which imports half of `email`

            try:
                return version("limner")
            except PackageNotFoundError:  # a source tree that was never installed
                return "0+unknown"
        if name not in module_of:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(module_of[name]), name)
        if not inspect.isroutine(value):
            return value
        if name not in opened:
            from backbone.cli.door import open_door

            opened[name] = open_door(value, package, flags=flags or {}, lock=lock)
        return opened[name]

    return get, lambda: sorted([*module_of, "__version__"])
