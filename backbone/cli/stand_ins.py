"""`--help` of a benchmark or a recipe without the seconds that importing torch takes.

Such a script has its imports at the top, and `python -m benchmarks.moji --help` needs only their names. So for help,
and only then, the heavy libraries are replaced by stand-ins: modules that have every name and no code (as Sphinx's
`autodoc_mock_imports` makes them). Nothing is computed with them, since typer shows the help and ends the process.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

HEAVY = ("torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "datasets", "scipy")
HELP = ("--help", "-h")


def spare_heavy_imports() -> None:
    """Replace the heavy libraries by stand-ins in a process that was started as `python -m SCRIPT --help`.

    Called in the script's package, which Python imports before the script.
    """
    if sys.argv[:1] == ["-m"] and asks_for_help(sys.argv[1:]):
        sys.meta_path.insert(0, StandIns())


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line is `--help` or `COMMAND --help`; behind another flag it may be that flag's value."""
    return bool(words) and words[-1] in HELP and not any(word.startswith("-") for word in words[:-1])


class StandIns(MetaPathFinder, Loader):
    """Finds a stand-in for every module of the heavy libraries."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The spec of a stand-in for a heavy library; None for other modules, which are imported as usual."""
        return ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in HEAVY else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Make the stand-in."""
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing: a stand-in has no code."""


class StandIn(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        return make_name(name)


class Name(type):
    """Serves for any name: a class to inherit from, a type in a hint, a decorator that changes nothing."""

    def __getattr__(cls, name: str) -> Any:
        return make_name(name)

    def __call__(cls, *values: Any, **named: Any) -> Any:
        return values[0] if len(values) == 1 and callable(values[0]) else cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    __matmul__ = __getitem__  # as in `torch.Tensor.__matmul__`


def make_name(name: str) -> Name:
    """A name of a stand-in; AttributeError for dunder names, by which Python asks what an object can do."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Name(name, (), {})
