"""Timing for the probe: medians, and torch held to one thread as the engine holds it in decode."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

NUM_ROUNDS = 5


def median_s(work: Callable[[], object], num_rounds: int = NUM_ROUNDS) -> float:
    """Return the median time of a call, the first, cold round left out."""
    times = []
    for _ in range(num_rounds + 1):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Hold torch to one thread, as the engine does for a token: its threads would spin on the cores of our kernels."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
