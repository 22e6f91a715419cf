"""Whether reading single rows of a missing expert could beat reading it whole: a bound, from measured rates.

Where an expert's inner activations are exactly zero (ReLU, its square, ReGLU), only the other rows are needed. The bound
grants everything: the rows are foreseen perfectly, for nothing, and neighbours among them are read together. What can't win
even so is not worth a predictor per expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

SEARCH_STEPS = 1000


@dataclass(frozen=True, kw_only=True, slots=True)
class RowReadBound:
    """Seconds to read one missing expert in two ways, on a device kept busy.

    Attributes:
        zero_share: Rows that a token does not need, over all.
        whole_s: The whole expert, as the stream reads blocks of its size.
        rows_s: The other rows, in runs of neighbours as long as chance makes them.
    """

    zero_share: float
    whole_s: float
    rows_s: float

    @property
    def can_win(self) -> bool:
        """Whether reading rows is faster at all."""
        return self.rows_s < self.whole_s

    @property
    def max_speedup(self) -> float:
        """How many times as fast reading rows is at most; below 1 it is slower."""
        return self.whole_s / self.rows_s if self.rows_s else float("inf")


def bound_row_reads(
    *,
    expert_bytes: int,
    row_bytes: int,
    zero_share: float,
    stream_gb_per_s: float,
    random_gb_per_s: Callable[[float], float],
) -> RowReadBound:
    """Return both times for one expert.

    Args:
        expert_bytes: What is read of a whole expert.
        row_bytes: What is read of one of its rows.
        zero_share: Rows that a token does not need, over all: 0 to 1.
        stream_gb_per_s: Rate of reads of whole experts, 1e9 bytes a second.
        random_gb_per_s: Rate of scattered reads by their size in bytes.
    """
    whole_s = expert_bytes / stream_gb_per_s / 1e9
    if zero_share <= 0.0:
        return RowReadBound(zero_share=0.0, whole_s=whole_s, rows_s=whole_s)
    # Where each row is needed with chance 1 - z, a run of needed ones has 1 / z rows on average.
    read_bytes = min(row_bytes / zero_share, expert_bytes)
    rows_s = (1.0 - zero_share) * expert_bytes / random_gb_per_s(read_bytes) / 1e9
    return RowReadBound(zero_share=zero_share, whole_s=whole_s, rows_s=rows_s)


def break_even(
    *, expert_bytes: int, row_bytes: int, stream_gb_per_s: float, random_gb_per_s: Callable[[float], float]
) -> float:
    """Return the share of zeros from which on, up to 1, reading rows can win."""
    for step in range(SEARCH_STEPS - 1, 0, -1):
        bound = bound_row_reads(
            expert_bytes=expert_bytes,
            row_bytes=row_bytes,
            zero_share=step / SEARCH_STEPS,
            stream_gb_per_s=stream_gb_per_s,
            random_gb_per_s=random_gb_per_s,
        )
        if not bound.can_win:
            return (step + 1) / SEARCH_STEPS
    return 0.0
