"""What all tests share."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Tiny models gain nothing from threads, and on a busy machine their barriers cost more than the work."""
    import torch

    torch.set_num_threads(1)
