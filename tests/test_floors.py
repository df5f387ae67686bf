"""The house: imports go down only, and never in a circle. Read from the source; nothing is imported.

Lazy imports in functions and those under TYPE_CHECKING count too. A room is a folder or a file right inside a package,
or a folder inside such a room; `ROOMS` is the table of floors that CONTRIBUTING.md explains.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
METHODS = ("customize", "edit", "align")
PACKAGES = ("backbone", *METHODS, "limner", "recipes", "benchmarks")  # limner: a door to the three methods
NUMBERS = "backbone.diffusion"  # torch and the standard library only
HEAVY = {"torch", "diffusers", "transformers", "peft", "accelerate", "datasets"}
Floors = Mapping[str, tuple[tuple[str, ...], ...]]
# The rooms of each package from the ground up: a room imports from rooms of lower floors only.
ROOMS: Floors = {
    "backbone": (
        ("diffusion", "io", "examples"),
        ("conditions", "cli"),
        ("world", "families", "media", "distributed", "data"),
        ("models", "evaluation"),
        ("adapters", "training"),
        ("memory",),
    ),
    "customize": (
        ("settings", "control_settings", "sample_settings", "sampling"),
        ("methods",),
        ("data", "formats"),
        ("objectives", "evaluation"),
        ("training",),
        ("clips",),
        ("sketch",),
        ("api", "cli"),
    ),
    "edit": (
        ("checks", "phrases", "settings", "pictures", "attention"),
        ("sampling", "layout"),
        ("inversion",),
        ("masks",),
        ("result",),
        ("methods",),
        ("run",),
        ("paint",),
        ("cli",),
    ),
    "align": (
        ("settings", "pairs"),
        ("collect",),
        ("objectives", "comparison"),
        ("training",),
        ("api", "cli"),
    ),
}
# The rooms inside a room, in the same way; the modules beside them are not on the table.
INNER_ROOMS: Floors = {
    "backbone.cli": (("values",),),
    "backbone.media": (("sources",), ("control",)),
    "backbone.models": (("clips", "few_step"),),
    "backbone.world": (("rendering",),),
    "customize.clips": (("planned",),),
    "customize.formats": (("layers",), ("merging",)),
    "customize.training": (("reporting",), ("control", "transfer")),
    "edit.methods": (("prompt_to_prompt",),),
    "align.collect": (("label",),),
    "align.training": (("reporting",),),
}
FAMILIES = "backbone.families"  # its rooms are the families and what they share: folders beside one another
# Here modules stand in an order, but a room and what lies beside it import one another.
UNORDERED = {FAMILIES, "backbone.models"}

Tree = dict[str, ast.Module]  # module name → source
Imports = dict[str, set[str]]  # module name → what it imports


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
        modules = [name for name in inner if name in tree]
        return modules if len(modules) == len(inner) else [module, *modules]
    return []


def imports_of(tree: Tree) -> Imports:
    """For every module the modules that it names in any import: at the top, in functions, for types."""
    return {
        name: {target for statement in ast.walk(module) for target in imported(statement, tree)} - {name}
        for name, module in tree.items()
    }


def on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The statements that run when a module is imported: not those in functions or under TYPE_CHECKING."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from on_import(child)


def upward_between_packages(imports: Imports) -> list[str]:
    """`module imports module` for every import from a lower package into a higher one, or beside it."""
    found = []
    for name, targets in imports.items():
        package = name.split(".")[0]
        for target in sorted(targets):
            top = target.split(".")[0]
            if name.startswith(f"{NUMBERS}."):
                allowed = {"torch", *sys.stdlib_module_names}
                forbidden = not target.startswith(NUMBERS) and top not in allowed
            elif package == "backbone":
                forbidden = top in {*METHODS, "limner", "recipes", "benchmarks", "tests"}
            elif package in METHODS:
                forbidden = top in {*METHODS, "limner", "recipes", "benchmarks", "tests"} - {package}
            elif package == "limner":
                forbidden = top in {"recipes", "benchmarks", "tests"}
            else:
                forbidden = top == "tests" or (package == "benchmarks" and top == "recipes")
            if forbidden:
                found.append(f"{name} imports {target}")
    return found


def room_of(name: str, inside: str = "") -> str:
    """The folder or file right in `inside` (left out: in its package) that a module lies in, or is; '' for none."""
    inside = inside or name.split(".")[0]
    return name.removeprefix(f"{inside}.").split(".")[0] if name.startswith(f"{inside}.") else ""


def upward_between_rooms(imports: Imports, rooms: Floors = ROOMS) -> list[str]:
    """`module imports module` for every import into a room of the same or a higher floor of a package or room."""
    found = []
    for inside, rows in rooms.items():
        floors = {room: floor for floor, row in enumerate(rows) for room in row}
        for name, targets in imports.items():
            floor = floors.get(room_of(name, inside))
            if floor is None:
                continue
            for target in sorted(targets):
                other = room_of(target, inside)
                if other in floors and other != room_of(name, inside) and floors[other] >= floor:
                    found.append(f"{name} imports {target}")
    return found


def inner_rooms(imports: Imports) -> dict[str, set[str]]:
    """For every room the rooms inside it."""
    found: dict[str, set[str]] = {}
    for name in imports:
        parts = name.split(".")
        if len(parts) > 3 and parts[0] in ROOMS:
            found.setdefault(".".join(parts[:2]), set()).add(parts[2])
    return found


def circles_in_rooms(imports: Imports) -> dict[str, list[set[str]]]:
    """For every package and room circles of what lies right in it, each inner room taken as one."""
    insides = {name.rsplit(".", depth)[0] for name in imports for depth in range(1, name.count(".") + 1)}
    found = {}
    for inside in sorted(insides):
        edges: Imports = {}
        for name, targets in imports.items():
            if room := room_of(name, inside):
                others = {room_of(target, inside) for target in targets} - {"", room}
                edges.setdefault(room, set()).update(others)
        if rounds := circles(edges):
            found[inside] = rounds
    return found


def circles(imports: Imports) -> list[set[str]]:
    """Sets of modules that reach each other by imports of any kind (Tarjan 1972)."""
    edges = {name: {target for target in targets if target in imports} for name, targets in imports.items()}
    order: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found = []

    def visit(name: str) -> None:
        order[name] = lowest[name] = len(order)
        stack.append(name)
        for target in edges[name]:
            if target not in order:
                visit(target)
                lowest[name] = min(lowest[name], lowest[target])
            elif target in stack:
                lowest[name] = min(lowest[name], order[target])
        if lowest[name] == order[name]:
            position = stack.index(name)
            if len(stack) - position > 1:
                found.append(set(stack[position:]))
            del stack[position:]

    for name in edges:
        if name not in order:
            visit(name)
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


@cache
def project() -> Tree:
    """This one."""
    return source_of(ROOT)


@cache
def project_imports() -> Imports:
    """Its imports."""
    return imports_of(project())


COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for package in PACKAGES
    for path in (ROOT / package).rglob("cli.py")
)


def written(folder: Path, files: Mapping[str, str]) -> Tree:
    """Writes a small project and reads it back."""
    for path, line in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(line)
    return source_of(folder)


def test_packages_import_downwards_only() -> None:
    assert upward_between_packages(project_imports()) == []


def test_rooms_import_downwards_only() -> None:
    assert upward_between_rooms(project_imports()) == []


def test_rooms_inside_a_room_import_downwards_only() -> None:
    assert upward_between_rooms(project_imports(), INNER_ROOMS) == []


def test_the_table_of_floors_names_every_room_and_no_other() -> None:
    for package, rows in ROOMS.items():
        rooms = {room_of(name) for name in project() if name.startswith(f"{package}.")}
        assert {room for room in rooms if not room.startswith("__")} == {room for row in rows for room in row}
    inner = inner_rooms(project_imports())
    inner.pop(FAMILIES)
    assert inner == {room: {one for row in rows for one in row} for room, rows in INNER_ROOMS.items()}


def test_no_imports_run_in_a_circle() -> None:
    assert circles(project_imports()) == []


def test_no_rooms_run_in_a_circle() -> None:
    found = {room for room in circles_in_rooms(project_imports()) if room.split(".")[0] in ROOMS}
    assert found == UNORDERED


@pytest.mark.parametrize("name", COMMANDS)
def test_help_answers_without_the_heavy_libraries(name: str) -> None:
    assert heavy_on_import(name, project()) == []


@pytest.mark.parametrize(
    ("where", "line", "complaint"),
    [
        ("backbone/diffusion/noise.py", "import numpy", "backbone.diffusion.noise imports numpy"),
        (
            "backbone/diffusion/samplers.py",
            "from backbone.io.console import UserError",
            "backbone.diffusion.samplers imports backbone.io.console",
        ),
        ("backbone/io/files.py", "def f():\n    import edit.cli", "backbone.io.files imports edit.cli"),
        ("backbone/io/files.py", "from recipes.moji import x", "backbone.io.files imports recipes.moji"),
        ("align/losses.py", "from customize.losses import x", "align.losses imports customize.losses"),
        ("edit/words.py", "from benchmarks import pie", "edit.words imports benchmarks"),
        ("edit/words.py", "from limner import cli", "edit.words imports limner"),
        ("limner/cli.py", "import recipes.small", "limner.cli imports recipes.small"),
        ("recipes/small.py", "import tests.backbone", "recipes.small imports tests.backbone"),
        ("benchmarks/pie.py", "from recipes import small", "benchmarks.pie imports recipes"),
    ],
)
def test_an_import_of_a_higher_package_is_named(
    tmp_path: Path, where: str, line: str, complaint: str
) -> None:
    assert upward_between_packages(imports_of(written(tmp_path, {where: line}))) == [complaint]


def test_what_the_floors_allow_is_not_complained_about(tmp_path: Path) -> None:
    tree = written(
        tmp_path,
        {
            "backbone/diffusion/noise.py": "import math\nimport torch.nn.functional\nfrom torch import Tensor",
            "backbone/diffusion/samplers.py": "from backbone.diffusion.noise import Level",
            "backbone/models/model.py": "import diffusers\nfrom backbone.diffusion import noise, samplers",
            "edit/words.py": "import edit.blend\nfrom backbone.diffusion.samplers import step",
            "limner/cli.py": "from edit import words\nimport backbone.models.model",
            "benchmarks/pie.py": "import edit.words, align.losses",
            "recipes/small.py": "from benchmarks import pie",
        },
    )
    assert upward_between_packages(imports_of(tree)) == []


@pytest.mark.parametrize("line", ["import edit.high", "def f() -> None:\n    from edit.high import x"])
def test_an_import_of_a_higher_room_is_named(tmp_path: Path, line: str) -> None:
    tree = written(tmp_path, {"edit/low/page.py": line, "edit/high.py": "from edit.low.page import x"})
    rooms = {"edit": (("low",), ("high",))}
    assert upward_between_rooms(imports_of(tree), rooms) == ["edit.low.page imports edit.high"]


def test_an_import_of_a_higher_room_inside_a_room_is_named(tmp_path: Path) -> None:
    tree = written(
        tmp_path,
        {"edit/run/low/page.py": "import edit.run.high.page", "edit/run/high/page.py": "import edit.run.low"},
    )
    rooms = {"edit.run": (("low",), ("high",))}
    assert upward_between_rooms(imports_of(tree), rooms) == ["edit.run.low.page imports edit.run.high.page"]
    assert inner_rooms(imports_of(tree)) == {"edit.run": {"low", "high"}}


def test_rooms_in_a_circle_are_found_where_no_modules_are(tmp_path: Path) -> None:
    tree = written(
        tmp_path,
        {
            "edit/run/low/one.py": "import edit.run.open",
            "edit/run/open.py": "import edit.run.low.two",
            "edit/run/low/two.py": "",
        },
    )
    assert circles(imports_of(tree)) == []
    assert circles_in_rooms(imports_of(tree)) == {"edit.run": [{"low", "open"}]}


def test_circles_are_found_through_functions_and_types(tmp_path: Path) -> None:
    tree = written(
        tmp_path,
        {
            "edit/__init__.py": "",
            "edit/one.py": "from edit import two",
            "edit/two.py": "def f():\n    import edit.three",
            "edit/three.py": (
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from edit.one import x"
            ),
            "edit/apart.py": "import edit.one",
        },
    )
    assert circles(imports_of(tree)) == [{"edit.one", "edit.two", "edit.three"}]


def test_a_heavy_import_is_found_through_others_and_only_where_it_runs(tmp_path: Path) -> None:
    tree = written(
        tmp_path,
        {
            "edit/cli.py": "from edit.words import words\nfrom edit import light",
            "edit/words.py": "try:\n    import torch.nn\nexcept ImportError:\n    pass",
            "edit/light.py": (
                "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch\n"
                "def f():\n    import diffusers\nclass C:\n    def g(self):\n        import peft"
            ),
            "edit/__init__.py": "",
        },
    )
    assert heavy_on_import("edit.cli", tree) == ["edit.cli > edit.words > torch.nn"]
