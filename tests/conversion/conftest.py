"""No progress bars of transformers."""

from __future__ import annotations

from tests.pack.conftest import _quiet

__all__ = ["_quiet"]
