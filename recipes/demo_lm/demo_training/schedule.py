"""Warm-up, stable, decay: a schedule whose end can be moved while it runs.

A run has two limits: steps, and optionally minutes. Minutes are counted in measured step times, in which a pause
(a step that took much longer than its neighbours: SIGSTOP, a laptop's sleep) counts as one ordinary step.
"""

from __future__ import annotations

from collections import deque
from statistics import median

PAUSE_FACTOR = 8.0
"""A step this many times slower than the median of its neighbours was interrupted, not slow."""


class RunningClock:
    """Seconds of training, pauses left out."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._recent_s: deque[float] = deque(maxlen=31)

    @property
    def step_s(self) -> float:
        """Median seconds of a recent step; 0 before the first."""
        return median(self._recent_s) if self._recent_s else 0.0

    def add(self, step_s: float) -> None:
        """Count one step that took `step_s` seconds of wall time."""
        is_pause = len(self._recent_s) >= 5 and step_s > PAUSE_FACTOR * self.step_s
        self.seconds += self.step_s if is_pause else step_s
        if not is_pause:
            self._recent_s.append(step_s)


class Schedule:
    """The learning-rate factor of each step, and when the run is over."""

    def __init__(self, *, steps: int, decay_steps: int, warmup_steps: int, max_s: float | None = None) -> None:
        self._steps = steps
        self._decay_steps = decay_steps
        self._warmup_steps = warmup_steps
        self._max_s = max_s
        self.decay_start: int | None = None
        """First step of the decay, once it has begun."""
        self.decay_start_s: float | None = None

    def state(self) -> dict[str, float | int | None]:
        """Return what a checkpoint keeps."""
        return {"decay_start": self.decay_start, "decay_start_s": self.decay_start_s}

    def restore(self, state: dict[str, float | int | None]) -> None:
        """Take up the state of an earlier process."""
        self.decay_start = state["decay_start"]
        self.decay_start_s = state["decay_start_s"]

    @property
    def is_decaying(self) -> bool:
        """Whether the decay has begun."""
        return self.decay_start is not None

    def factor(self, step: int, clock: RunningClock) -> float:
        """Return the factor on the learning rates in (0, 1], or 0 when the run is over; begins the decay when due."""
        if self.decay_start is None and self._decay_is_due(step, clock):
            self.decay_start, self.decay_start_s = step, clock.seconds
        if self.decay_start is None:
            return min(1.0, (step + 1) / max(1, self._warmup_steps))
        return max(0.0, 1.0 - self._decay_done(step, clock))

    def _decay_is_due(self, step: int, clock: RunningClock) -> bool:
        if step >= self._steps - self._decay_steps:
            return True
        return self._max_s is not None and clock.seconds + self._decay_steps * clock.step_s >= self._max_s

    def _decay_done(self, step: int, clock: RunningClock) -> float:
        """Return the part of the decay that is behind us: of its steps, or of the time left if time began it."""
        by_steps = (step - self.decay_start) / self._decay_steps
        if self._max_s is None:
            return by_steps
        by_time = (clock.seconds - self.decay_start_s) / max(self._max_s - self.decay_start_s, 1e-9)
        began_early = self.decay_start < self._steps - self._decay_steps
        return by_time if began_early else max(by_steps, by_time)
