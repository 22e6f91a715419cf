"""What all tests share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_torch_thread() -> None:
    """Tiny models gain nothing from threads, and on a busy machine their barriers cost more than the work."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _no_device_profile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What a user has probed on this machine must not decide what the tests' models do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True, scope="session")
def _freed_memory_goes_back() -> Iterator[None]:
    """Training commands run in this process would keep it, and budgets count what the process has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLASHLM_KEEP_FREED_MEMORY", "0")
        yield


@pytest.fixture
def default_dtype() -> Callable[[torch.dtype], AbstractContextManager[None]]:
    """Make another floating-point dtype torch's default, as users of 16-bit models do."""

    @contextmanager
    def change(dtype: torch.dtype) -> Iterator[None]:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            yield
        finally:
            torch.set_default_dtype(before)

    return change
