"""How far a model may be made sparse: losses under masks, the CATS threshold, and the recall level of every layer.

The search looks at the validation part of the text only; what it ends with is judged on the held-out part. Differences are
taken token by token between the dense and the sparse model, which is far less noisy than either perplexity.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Losses = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Rise:
    """Perplexity of a sparse model against the dense one on the same tokens.

    Attributes:
        num_tokens: Tokens predicted.
        dense_nll, sparse_nll: Mean per token, in nats.
        error: Standard error of the relative rise, from the differences token by token.
    """

    num_tokens: int
    dense_nll: float
    sparse_nll: float
    error: float

    @classmethod
    def of(cls, dense: Losses, sparse: Losses) -> Rise:
        """Compare the losses (num_tokens,) of both."""
        difference = sparse - dense
        increase = math.exp(float(difference.mean()))
        error = increase * float(difference.std()) / math.sqrt(len(difference))
        return cls(num_tokens=len(dense), dense_nll=float(dense.mean()), sparse_nll=float(sparse.mean()), error=error)

    @property
    def increase(self) -> float:
        """The relative rise of perplexity, 0.01 for 1 %."""
        return math.exp(self.sparse_nll - self.dense_nll) - 1.0


def largest_passing(count: int, passes: Callable[[int], bool]) -> int | None:
    """Return the largest index that passes where smaller ones pass more easily; None where 0 does not pass."""
    low, high = -1, count  # the largest known to pass, the smallest known to fail
    while high - low > 1:
        middle = (low + high) // 2
        if passes(middle):
            low = middle
        else:
            high = middle
    return None if low < 0 else low


@dataclass(frozen=True, kw_only=True)
class Levels:
    """The recall level of every layer, and the rise that the search saw with them on the validation text."""

    levels: tuple[int, ...]
    rise: Rise
    has_passed: bool


def search_levels(
    evaluate: Callable[[tuple[int, ...]], Rise],
    predicted_rows: Sequence[Sequence[float]],
    miss_ratio: float,
    budget: float,
    isolated: Callable[[int], float],
) -> Levels:
    """Find levels that keep the rise within `budget` and predict few rows.

    Everything at the lowest level is tried first. If that is too much, each layer's own rise at that level (`isolated`) is
    measured; a level's rise is taken to shrink with what it misses, and levels are then raised one by one where a row more
    buys most. How far, is bisected with the whole model.

    Args:
        evaluate: The rise with a level for every layer.
        predicted_rows: Rows predicted by layer and level.
        miss_ratio: What a level misses over what the level before it misses.
        budget: Allowed rise.
        isolated: The rise in nats with only this layer at the lowest level and the others dense.
    """
    num_layers = len(predicted_rows)
    lowest = (0,) * num_layers
    rise = evaluate(lowest)
    if rise.increase <= budget:
        return Levels(levels=lowest, rise=rise, has_passed=True)
    hurts = [max(isolated(layer), 1e-6) for layer in range(num_layers)]
    path = _raising_path(predicted_rows, hurts, miss_ratio)
    seen = {0: rise}

    def passes_from_end(index: int) -> bool:
        place = len(path) - 1 - index
        if place not in seen:
            seen[place] = evaluate(path[place])
        return seen[place].increase <= budget

    found = largest_passing(len(path), passes_from_end)
    place = len(path) - 1 if found is None else len(path) - 1 - found
    if found is None:
        place = min(seen, key=lambda each: seen[each].increase)
    return Levels(levels=path[place], rise=seen[place], has_passed=found is not None)


def _raising_path(
    predicted_rows: Sequence[Sequence[float]], hurts: Sequence[float], miss_ratio: float
) -> list[tuple[int, ...]]:
    """Return level vectors from all lowest to all highest, each raising the layer that gains most per predicted row."""
    levels = [0] * len(hurts)
    path = [tuple(levels)]
    highest = len(predicted_rows[0]) - 1
    while True:
        gains = []
        for layer, level in enumerate(levels):
            if level < highest:
                gain = hurts[layer] * miss_ratio**level * (1.0 - miss_ratio)
                rows = max(predicted_rows[layer][level + 1] - predicted_rows[layer][level], 1e-3)
                gains.append((gain / rows, layer))
        if not gains:
            return path
        levels[max(gains)[1]] += 1
        path.append(tuple(levels))
