"""Timing for the probe: medians, and calls whose code and data have left the processor's caches."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

NUM_ROUNDS = 5
PASSING_BYTES = 4 << 20  # more than the second-level cache of any core


def median_s(work: Callable[[], object], num_rounds: int = NUM_ROUNDS) -> float:
    """Return the median time of a call, the first, cold round left out."""
    times = []
    for _ in range(num_rounds + 1):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])


class Cold:
    """Times calls as they are in a model: between two of them its weights pass through the processor's caches.

    A call's own code and data are gone by then, which makes short calls from Python take two to three times as long as in
    a loop of their own.
    """

    def __init__(self) -> None:
        self._passing = torch.ones(PASSING_BYTES // 4)

    def pass_weights(self) -> float:
        """Read what stands for weights; return the time that it took."""
        started_s = time.perf_counter()
        self._passing.sum()
        return time.perf_counter() - started_s

    def median_s(self, work: Callable[[], object], num_rounds: int) -> float:
        """Return the median time of a call, the first one left out."""
        times = []
        for _ in range(num_rounds + 1):
            self.pass_weights()
            started_s = time.perf_counter()
            work()
            times.append(time.perf_counter() - started_s)
        return statistics.median(times[1:])
