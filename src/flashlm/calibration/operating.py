"""Where a predictor's threshold stands: a ladder of recall levels, and what each of them costs on other text.

A level is a target for the share of truly active rows that are missed. The cutoff of a level is a quantile of the scores
of truly active rows on one part of the text (validation); recall, false positives and predicted rows are then counted on
another (held-out), so they are what a user will see.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

NUM_LEVELS = 24
LEVEL_RATIO = 0.75  # each level misses so much of what the one before it misses
# Other text misses a little more than the text that set the cutoff: 5.1 % for 4.5 %, on the demo model at rank 32.
CAUTION = 0.85

Floats = npt.NDArray[np.float32]
# Scores fp32 (num_tokens, num_rows) and truly active rows, bool alike: piece by piece of a text.
Scored = Iterable[tuple[Floats, npt.NDArray[np.bool_]]]


@dataclass(frozen=True, kw_only=True)
class Operating:
    """What a predictor does at one cutoff, counted on text that chose neither it nor the cutoff.

    Attributes:
        cutoff: Rows with a score above it are predicted.
        recall: Truly active rows that it predicted, over all truly active ones.
        false_positive: Inactive rows that it predicted, over all inactive ones.
        predicted_share: Predicted rows over all rows.
    """

    cutoff: float
    recall: float
    false_positive: float
    predicted_share: float


def recall_levels(recall: float) -> list[float]:
    """Return the ladder of recall targets from `recall`, a little more of it, upwards, each closer to 1."""
    return [1.0 - (1.0 - recall) * CAUTION * LEVEL_RATIO**step for step in range(NUM_LEVELS)]


def find_cutoffs(scored: Scored, levels: Iterable[float], *, max_values: int = 4 << 20, seed: int = 0) -> list[float]:
    """Return for each recall level the cutoff that this share of the truly active rows' scores is above.

    Of more than `max_values` scores a sample is used.
    """
    found = [scores[active] for scores, active in scored]
    values = np.concatenate(found) if found else np.zeros(1, dtype=np.float32)
    if len(values) > max_values:
        values = np.random.default_rng(seed).choice(values, max_values, replace=False)
    if not len(values):
        return [0.0 for _ in levels]
    values = np.sort(values)
    # Strictly above the cutoff: the next smaller number than the value at the quantile.
    places = [min(int(np.floor((1.0 - level) * len(values))), len(values) - 1) for level in levels]
    return [float(np.nextafter(values[place], np.float32(-np.inf))) for place in places]


def measure(scored: Scored, cutoffs: list[float]) -> list[Operating]:
    """Count recall, false positives and predicted rows at each cutoff."""
    num_active = num_all = 0
    hits = np.zeros(len(cutoffs), dtype=np.int64)
    predicted = np.zeros(len(cutoffs), dtype=np.int64)
    order = np.argsort(cutoffs, kind="stable")
    ascending = np.asarray(cutoffs, dtype=np.float32)[order]
    for scores, active in scored:
        num_active += int(active.sum())
        num_all += active.size
        predicted[order] += _num_above(scores.ravel(), ascending)
        hits[order] += _num_above(scores[active], ascending)
    return [
        Operating(
            cutoff=cutoff,
            recall=hit / num_active if num_active else 1.0,
            false_positive=(all_ - hit) / (num_all - num_active) if num_all > num_active else 0.0,
            predicted_share=all_ / num_all,
        )
        for cutoff, hit, all_ in zip(cutoffs, hits.tolist(), predicted.tolist(), strict=True)
    ]


def _num_above(values: Floats, ascending: Floats) -> npt.NDArray[np.int64]:
    """Return how many values are strictly above each of the ascending cutoffs."""
    if len(ascending) == 1:
        return np.array([np.count_nonzero(values > ascending[0])], dtype=np.int64)
    below = np.searchsorted(ascending, values, side="left")  # cutoffs that a value is above
    counts = np.bincount(below, minlength=len(ascending) + 1)
    return np.asarray(counts[::-1].cumsum()[::-1][1:], dtype=np.int64)


def pieces(num_tokens: int, size: int = 256) -> Iterator[slice]:
    """Cut a text into pieces that fit into memory."""
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))
