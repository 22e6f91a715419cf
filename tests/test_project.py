"""What pyproject.toml asks for is what the package uses: nothing is missing, and nothing comes along for tests alone."""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import flashlm

ROOT = Path(__file__).parents[1]

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
EXTRAS = PROJECT["project"]["optional-dependencies"]


def imports(node: ast.AST) -> Iterator[str]:
    """Packages of others that a piece of code imports when it runs."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
    modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
    yield from {module.split(".")[0] for module in modules} - sys.stdlib_module_names - {"flashlm"}
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def names(requirements: list[str]) -> set[str]:
    return {re.split(r"[<>=\[ ]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


def test_dependencies_are_what_the_package_imports() -> None:
    distribution = {top: found[0].lower().replace("_", "-") for top, found in packages_distributions().items()}
    used = {
        distribution[package]
        for path in Path(flashlm.__file__).parent.rglob("*.py")
        for package in imports(ast.parse(path.read_text()))
    }
    dependencies = names(PROJECT["project"]["dependencies"])
    optional = {name for requirements in EXTRAS.values() for name in names(requirements)}
    tools = names([each for group in PROJECT["dependency-groups"].values() for each in group if isinstance(each, str)])
    assert dependencies <= used <= dependencies | optional
    assert not dependencies & tools


def test_the_makefiles_test_files_are_there() -> None:
    """A file that has moved would end a whole run of tests with nothing run."""
    text = (ROOT / "Makefile").read_text()
    engine = re.search(r"^SANITIZED_ENGINE := (.*)$", text, re.MULTILINE)
    assert engine is not None
    named = re.findall(r"tests/[\w/]+\.py", text) + [f"tests/engine/test_{name}.py" for name in engine[1].split()]
    assert [path for path in named if not (ROOT / path).exists()] == []
