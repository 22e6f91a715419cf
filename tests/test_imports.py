"""Imports go down only, as ARCHITECTURE.md says."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flashlm

ROOT = Path(flashlm.__file__).parent
ORDER = (
    "native",
    "transformers_seam",
    "rows",
    "pru",
    "storage",
    "pack",
    "structure",
    "memory",
    "sparsity",
    "probe",
    "planner",
    "engine",
    "calibration",
    "conversion",
    "cli",
)  # low to high
LEAVES = {"errors", "sizes", "_native"}
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


def stated_arrows() -> dict[str, set[str]]:
    """What ARCHITECTURE.md says that each room imports: lines of `room → others` in a block of their own."""
    lines = (Path(__file__).parents[1] / "ARCHITECTURE.md").read_text().splitlines()
    arrows = [line.split(" → ") for line in lines if re.match(r"^ {4}\w+ +→ ", line)]
    return {own.strip(): set(others.split()) for own, others in arrows}


def test_every_arrow_that_is_stated_exists_and_no_other() -> None:
    found: dict[str, set[str]] = {name: set() for name in ORDER if name != "native"}
    for path in ROOT.rglob("*.py"):
        own = room(path.relative_to(ROOT).parts)
        if own in found:
            found[own] |= imported(path) & set(ORDER) - {own}
    assert stated_arrows() == {own: others for own, others in found.items() if others}


def files_imported(path: Path, files: dict[str, Path]) -> set[str]:
    """The modules of `files` that a file imports when it runs, those within functions too; not what only types need."""
    tree = ast.parse(path.read_text())
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in skipped:
            full = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in files else node.module for name in full}
        elif isinstance(node, ast.Import) and id(node) not in skipped:
            found |= {alias.name for alias in node.names}
    return found & set(files)


CIRCLE = pytest.mark.xfail(
    strict=True, reason="engine.model's load makes a FlashConfig, whose quantizer prepares a FlashModel"
)


@pytest.mark.parametrize("folder", [pytest.param("src", marks=CIRCLE), "benchmarks", "recipes"])
def test_no_file_imports_itself_in_a_circle(folder: str) -> None:
    root = Path(__file__).parents[1] / folder
    files = {".".join(path.relative_to(root).with_suffix("").parts): path for path in root.rglob("*.py")}
    if folder != "src":  # they are started as scripts, from their own folder
        files |= {path.stem: path for path in root.rglob("*.py")}
    graph = {name: files_imported(path, files) for name, path in files.items()}
    tuple(TopologicalSorter(graph).static_order())  # raises CycleError, which names the circle


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
