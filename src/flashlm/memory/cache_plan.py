"""How many slots of the neuron cache each layer gets: from measured use curves, under a budget.

A layer that keeps what its last k tokens used holds s_agg(k) of its rows and reads s_agg(k+1) - s_agg(k) of them per token
(paper §3.1, Fig 4a). So the use curve is a miss curve, too; slots go, step by step, to the layer whose next step saves the
most reads per slot. Pure arithmetic.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from flashlm.memory.neuron_cache import LayerCapacity

MIN_SLOTS = 32
LEAST_SHARE = 0.25  # of an average token's rows: at worst they take four rounds
TOKEN_MARGIN = 1.2  # tokens differ: slots for a window must hold more than the average


@dataclass(frozen=True, kw_only=True)
class LayerUse:
    """What is known of a layer's use: its rows and s_agg(1), s_agg(2), ... as shares of them, never falling."""

    num_rows: int
    use_curve: tuple[float, ...]

    @property
    def least_slots(self) -> int:
        """Slots below which a layer is not run."""
        first = self.use_curve[0] if self.use_curve else 1.0
        return min(self.num_rows, max(MIN_SLOTS, math.ceil(first * self.num_rows * LEAST_SHARE)))

    def window(self, num_slots: int) -> int:
        """Return how many tokens' rows the slots hold, up to those of the measured curve (paper §3.1: k)."""
        return sum(share * self.num_rows * TOKEN_MARGIN <= num_slots for share in self.use_curve)

    def steps(self) -> list[tuple[int, float]]:
        """Return (slots, rows read per token), slots rising, each step saving less per slot than the one before.

        The points are windows; those that lie above the line between their neighbours are left out.
        """
        points = [(self.least_slots, self._new_rows(0))]
        for k in range(1, len(self.use_curve) + 1):
            slots = min(self.num_rows, math.ceil(self.use_curve[k - 1] * self.num_rows * TOKEN_MARGIN))
            if slots > points[-1][0]:
                points.append((slots, self._new_rows(k)))
        if points[-1][0] < self.num_rows:
            points.append((self.num_rows, 0.0))
        return _convex(points)

    def _new_rows(self, k: int) -> float:
        curve = self.use_curve
        if not curve:
            return float(self.num_rows)
        at = min(k, len(curve) - 1)
        before = curve[at - 1] if at else 0.0
        return max(curve[at] - before, 0.0) * self.num_rows


def _convex(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the lower convex hull of points with rising first coordinates."""
    hull: list[tuple[int, float]] = []
    for x, y in points:
        while len(hull) > 1:
            (x1, y1), (x2, y2) = hull[-2:]
            if (y2 - y1) * (x - x1) < (y - y1) * (x2 - x1):
                break
            hull.pop()
        hull.append((x, y))
    return hull


def least_slots(layers: Sequence[LayerUse]) -> list[int]:
    """Return the smallest capacity of each layer."""
    return [layer.least_slots for layer in layers]


def plan_capacities(layers: Sequence[LayerUse], num_slots: int) -> list[LayerCapacity]:
    """Share `num_slots` slots out over layers.

    Args:
        layers: Their use.
        num_slots: Slots in all; at least `sum(least_slots(layers))`.

    Returns:
        A capacity per layer; all rows where everything fits.
    """
    granted = least_slots(layers)
    left = num_slots - sum(granted)
    queue: list[tuple[float, int, int, int]] = []  # -(reads saved per slot), layer, slots, index of the step

    def push(index: int, step: int, steps: list[tuple[int, float]]) -> None:
        if step >= len(steps):
            return
        slots = steps[step][0] - granted[index]
        saved = max(steps[step - 1][1] - steps[step][1], 0.0)
        heapq.heappush(queue, (-saved / slots, index, slots, step))

    all_steps = [layer.steps() for layer in layers]
    for index, steps in enumerate(all_steps):
        push(index, 1, steps)
    while queue and left > 0:
        _, index, slots, step = heapq.heappop(queue)
        taken = min(slots, left)
        granted[index] += taken
        left -= taken
        if taken == slots:
            push(index, step + 1, all_steps[index])
    return [
        LayerCapacity(num_rows=layer.num_rows, num_slots=slots) for layer, slots in zip(layers, granted, strict=True)
    ]
