"""The planner's process of one size."""

from __future__ import annotations

from tests.planner.conftest import _process_of_one_size

__all__ = ["_process_of_one_size"]
