"""Imports go down only, as ARCHITECTURE.md says."""

from __future__ import annotations

import ast
import importlib
import importlib.util
from pathlib import Path

import pytest

import flashlm

ROOT = Path(flashlm.__file__).parent
ORDER = (
    "native",
    "transformers_seam",
    "rows",
    "kernels",
    "pru",
    "storage",
    "pack",
    "memory",
    "sparsity",
    "planner",
    "engine",
    "cli",
)  # low to high
LEAVES = {"errors", "sizes", "interrupt", "console", "_native"}
TOP = {"__init__", "__main__", "_registration"}


def room(parts: tuple[str, ...]) -> str:
    """The room of a module path below `flashlm`."""
    name = parts[0].removesuffix(".py")
    return "cli" if name.startswith("cli") else name


def imported(path: Path) -> set[str]:
    """The rooms that a file imports from, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "flashlm":
            names = [node.module] if "." in node.module else [f"flashlm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name.startswith("flashlm.")]
        found |= {room(tuple(name.split(".")[1:])) for name in names}
    return found - LEAVES


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = room(path.relative_to(ROOT).parts)
    if own in TOP | LEAVES:
        return
    for other in imported(path) & set(ORDER):
        assert ORDER.index(other) <= ORDER.index(own), f"{own} must not import {other}"


@pytest.mark.parametrize("folder", ["benchmarks", "recipes"])
def test_what_is_taken_from_the_package_is_there(folder: str) -> None:
    """No test runs all benchmarks and recipes, so a name that has moved would go unnoticed."""
    taken = [
        (path, node.module, alias.name)
        for path in sorted((Path(__file__).parents[1] / folder).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "flashlm"
        for alias in node.names
    ]
    assert taken
    for path, module, name in taken:
        found = importlib.import_module(module)
        is_module = hasattr(found, "__path__") and importlib.util.find_spec(f"{module}.{name}")
        assert hasattr(found, name) or is_module, f"{path} takes {name} from {module}"
