"""`--help` of a benchmark or a recipe without the seconds that importing torch takes.

Such a script is a page to be read, with its imports at the top, and `python -m benchmarks.moji --help` needs of them no
more than their names. So where help is asked for, and there alone, the heavy libraries are stand-ins: modules that have
every name, behind which is nothing (as Sphinx's `autodoc_mock_imports` makes them). Nothing is computed with them,
since typer shows the help and ends the process.
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
    """Make stand-ins of the heavy libraries in a process that was started as `python -m SCRIPT --help`.

    To be called in the script's package, which Python imports before the script.
    """
    if sys.argv[:1] == ["-m"] and asks_for_help(sys.argv[1:]):
        sys.meta_path.insert(0, StandIns())


def asks_for_help(words: Sequence[str]) -> bool:
    """Whether a command line is `--help` or `COMMAND --help`; behind another flag it might be that flag's value."""
    return bool(words) and words[-1] in HELP and not any(word.startswith("-") for word in words[:-1])


class StandIns(MetaPathFinder, Loader):
    """Finds a stand-in for every module of the heavy libraries."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """Say that a stand-in is to be made; None for all other modules, which are looked for as usual."""
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
    """What a name stands for: a class to inherit from, a type in a hint, a decorator that changes nothing."""

    def __getattr__(cls, name: str) -> Any:
        return make_name(name)

    def __call__(cls, *values: Any, **named: Any) -> Any:
        return values[0] if len(values) == 1 and callable(values[0]) else cls

    def __getitem__(cls, key: Any) -> Any:
        return cls

    __matmul__ = __getitem__  # as in `torch.Tensor.__matmul__`


def make_name(name: str) -> Name:
    """A name of a stand-in; AttributeError for those by which Python asks what an object can do."""
    if name.startswith("__"):
        raise AttributeError(name)
    return Name(name, (), {})
