"""How far the reading of weights is, for whoever waits for a model to load.

Loading goes through transformers' `from_pretrained`, which hands no callback on; so the listener is found in the context
that loads, by the code that reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Progress = Callable[[int, int, str], None]


@dataclass(slots=True)
class _Loading:
    listener: Progress
    total_bytes: int = 0
    read_bytes: int = 0


_loading: ContextVar[_Loading | None] = ContextVar("flashlm_loading", default=None)


@contextmanager
def watch_loading(listener: Progress | None) -> Iterator[None]:
    """Let `listener` be called with (bytes read, bytes in all, "reading weights") by what loads a model inside."""
    token = _loading.set(None if listener is None else _Loading(listener))
    try:
        yield
    finally:
        _loading.reset(token)


def expect(num_bytes: int) -> None:
    """Say how much will be read."""
    loading = _loading.get()
    if loading is not None:
        loading.total_bytes += num_bytes


def advance(num_bytes: int) -> None:
    """Say that so much more has landed; reading beyond what was expected (to check what is read in part) is not told."""
    loading = _loading.get()
    if loading is not None and loading.total_bytes:
        loading.read_bytes = min(loading.read_bytes + num_bytes, loading.total_bytes)
        loading.listener(loading.read_bytes, loading.total_bytes, "reading weights")


def finish() -> None:
    """Say that all has been read."""
    loading = _loading.get()
    if loading is not None:
        advance(loading.total_bytes)
