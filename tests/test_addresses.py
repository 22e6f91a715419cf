"""Addresses stay below: only `rows` and `storage` know where memory is, everybody else holds tensors and slots."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import flashlm

ROOT = Path(flashlm.__file__).parent
ROOMS = {"rows", "storage"}
NAMES = {"data_ptr", "address", "from_address", "addressof", "__array_interface__"}


def addresses(path: Path) -> list[str]:
    """Return where a file takes an address, as `line: name`."""
    tree = ast.parse(path.read_text())
    return [
        f"{node.lineno}: {node.attr}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in NAMES
    ]


@pytest.mark.parametrize(
    "path",
    sorted(path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in ROOMS),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_address_is_taken(path: Path) -> None:
    assert addresses(path) == []
