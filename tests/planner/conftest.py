"""The engine's tiny packs, for plans too, and a process of one size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.conftest import tiny_pack

__all__ = ["tiny_pack"]

PROCESS_BYTES = 600 << 20


@pytest.fixture(autouse=True, scope="module")
def _process_of_one_size() -> Iterator[None]:
    """Plans count what the process holds already: here that is what earlier tests left, which depends on their order."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flashlm.memory.needs.process_bytes", lambda: PROCESS_BYTES)
        yield
