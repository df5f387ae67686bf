"""Imports go down only: numbers, machine, methods, doors. Read from the source; nothing is imported."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ("customize", "edit", "align")
PACKAGES = ("backbone", *METHODS, "limner", "recipes", "benchmarks")  # limner: a door to the three methods
NUMBERS = ("backbone.noise", "backbone.steps", "backbone.ladders")
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets"}

Tree = dict[str, ast.Module]  # module name → source


def source_of(root: Path) -> Tree:
    """Every module of the project under `root`, parsed."""
    tree = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            tree[name] = ast.parse(path.read_text(encoding="utf-8"), str(path))
    return tree


def imported(statement: ast.AST, tree: Tree) -> list[str]:
    """The modules that an import statement names: `from a import b` is a.b where that is a module of ours."""
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    if isinstance(statement, ast.ImportFrom):
        assert statement.level == 0, "relative imports are banned"
        module = statement.module or ""
        inner = [f"{module}.{alias.name}" for alias in statement.names]
        return [module, *(name for name in inner if name in tree)]
    return []


def everywhere(module: ast.Module) -> Iterator[ast.AST]:
    return ast.walk(module)


def on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from on_import(child)


def upward(tree: Tree) -> list[str]:
    """`module imports module` for every import that the floors forbid."""
    found = []
    for name, module in tree.items():
        floor, own = name.split(".")[0], set(NUMBERS) | {"backbone"}
        for statement in everywhere(module):
            for target in imported(statement, tree):
                top = target.split(".")[0]
                if name in NUMBERS:
                    forbidden = target not in own and top not in {"torch", *sys.stdlib_module_names}
                elif floor == "backbone":
                    forbidden = top in {*METHODS, "limner", "recipes", "benchmarks", "tests"}
                elif floor in METHODS:
                    forbidden = top in {*METHODS, "limner", "recipes", "benchmarks", "tests"} - {floor}
                elif floor == "limner":
                    forbidden = top in {"recipes", "benchmarks", "tests"}
                else:
                    forbidden = top == "tests"
                if forbidden:
                    found.append(f"{name} imports {target}")
    return found


def heavy_on_import(start: str, tree: Tree) -> list[str]:
    """Chains like `edit.cli > edit.words > torch` along which importing `start` imports a heavy library."""
    chains, seen = [], {start}
    waiting: list[tuple[str, ...]] = [(start,)]
    while waiting:
        chain = waiting.pop()
        for statement in on_import(tree[chain[-1]]):
            for target in imported(statement, tree):
                parents = [target.rsplit(".", depth)[0] for depth in range(target.count(".") + 1)]
                if parents[-1] in HEAVY:
                    chains.append(" > ".join([*chain, target]))
                for module in parents:  # importing a.b runs a first
                    if module in tree and module not in seen:
                        seen.add(module)
                        waiting.append((*chain, module))
    return chains


PROJECT = source_of(ROOT)


def test_the_floor_of_numbers_is_where_this_test_looks_for_it() -> None:
    assert [name for name in NUMBERS if name not in PROJECT] == []


def test_imports_go_down_only() -> None:
    assert upward(PROJECT) == []


@pytest.mark.parametrize("name", sorted(name for name in PROJECT if name.endswith(".cli")))
def test_help_answers_without_the_heavy_libraries(name: str) -> None:
    assert heavy_on_import(name, PROJECT) == []


@pytest.mark.parametrize(
    ("where", "line", "complaint"),
    [
        ("backbone/noise.py", "import numpy", "backbone.noise imports numpy"),
        (
            "backbone/steps.py",
            "from backbone.console import UserError",
            "backbone.steps imports backbone.console",
        ),
        ("backbone/steps.py", "from backbone import files", "backbone.steps imports backbone.files"),
        ("backbone/files.py", "def f():\n    import edit.words", "backbone.files imports edit.words"),
        ("backbone/files.py", "from recipes.moji import loop", "backbone.files imports recipes.moji"),
        ("align/losses.py", "from customize.losses import x", "align.losses imports customize.losses"),
        ("edit/words.py", "from benchmarks import pie", "edit.words imports benchmarks"),
        ("edit/words.py", "from limner import cli", "edit.words imports limner"),
        ("limner/cli.py", "import recipes.small", "limner.cli imports recipes.small"),
        ("recipes/small.py", "import tests.backbone", "recipes.small imports tests.backbone"),
    ],
)
def test_a_broken_floor_is_named(tmp_path: Path, where: str, line: str, complaint: str) -> None:
    for path in ("backbone/files.py", where):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(line if path == where else "")
    assert upward(source_of(tmp_path)) == [complaint]


def test_what_the_floors_allow_is_not_complained_about(tmp_path: Path) -> None:
    for path, line in {
        "backbone/noise.py": "import math\nimport torch.nn.functional\nfrom torch import Tensor",
        "backbone/steps.py": "from backbone.noise import Level\nfrom backbone import noise",
        "backbone/model.py": "import diffusers\nfrom backbone import noise, steps",
        "edit/words.py": "import edit.blend\nfrom backbone.steps import step",
        "limner/cli.py": "from edit import words\nimport backbone.model",
        "benchmarks/pie.py": "import edit.words, align.losses\nfrom recipes import small",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(line)
    assert upward(source_of(tmp_path)) == []


def test_a_heavy_import_is_found_through_others_and_only_where_it_runs(tmp_path: Path) -> None:
    for path, line in {
        "edit/cli.py": "from edit.words import words\nfrom edit import light",
        "edit/words.py": "try:\n    import torch.nn\nexcept ImportError:\n    pass",
        "edit/light.py": (
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
            "def f():\n    import diffusers\nclass C:\n    def g(self):\n        import peft"
        ),
        "edit/__init__.py": "",
    }.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(line)
    assert heavy_on_import("edit.cli", source_of(tmp_path)) == ["edit.cli > edit.words > torch.nn"]
