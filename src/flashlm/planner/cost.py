"""The cost model: what a token takes, from bytes, rates and what overlaps. Plain functions, no state, seconds and bytes.

The paper prints no formula. Its accounting (§3, Tables 2 and 3) is: latency = I/O from flash + memory management +
compute, where I/O is bytes over the throughput that the device reaches at that read size and depth (Fig 2b). What is added
here: reads are priced by the distribution of their sizes after merging; a batch of reads has a beginning and an end; and
reading and computing, where they run at once, slow each other (`Overlap`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from flashlm.memory.cache_plan import LayerUse

FULL_RATE_BLOCKS = 8  # in flight, below which a stream loses speed: measured (docs/experiments.md)
MAX_RUN = 64  # rows of one merged read; longer ones are as rare as they are cheap


@dataclass(frozen=True, kw_only=True)
class Overlap:
    """What reading and computing at once leave of each other's speed; 1 and 1 where they don't meet.

    Attributes:
        read_share: Share of the reading rate that is left while the processor computes.
        compute_share: Share of the computing rate that is left while the device reads.
    """

    read_share: float = 1.0
    compute_share: float = 1.0


@dataclass(frozen=True, kw_only=True)
class TokenCost:
    """What one token takes.

    Attributes:
        io_s: Waiting for flash that no computing hides, and submitting reads.
        manage_s: Bookkeeping of the neuron cache.
        compute_s: Arithmetic and the model's own overhead.
        read_bytes: Bytes from flash.
        num_reads: Reads.
        touched_bytes: Bytes of weights that the arithmetic reads from memory.
        flash_bound_s: `read_bytes` at the device's rate for these reads.
        memory_bound_s: `touched_bytes` at the memory's rate.
    """

    io_s: float
    manage_s: float
    compute_s: float
    read_bytes: float
    num_reads: float
    touched_bytes: float
    flash_bound_s: float
    memory_bound_s: float

    @property
    def total_s(self) -> float:
        """The paper's sum: I/O + memory management + compute."""
        return self.io_s + self.manage_s + self.compute_s

    @property
    def roofline_s(self) -> float:
        """No program can be faster: the larger of both bounds (design, "Speed")."""
        return max(self.flash_bound_s, self.memory_bound_s)


def stream_s(num_bytes: float, gb_per_s: float) -> float:
    """Return the time of a sequential stream: bytes / rate. Paper Table 2: 13.4 GB / 6.1 GB/s = 2.196 s."""
    return num_bytes / (gb_per_s * 1e9)


def overlapped_s(read_s: float, compute_s: float, overlap: Overlap) -> float:
    """Return the time of reading and computing that run at once, each of which would take so long alone.

    Both go on at their share until one is done; the other goes on alone at full speed.
    """
    if read_s <= 0 or compute_s <= 0:
        return max(read_s, 0.0) + max(compute_s, 0.0)
    together_s = min(read_s / overlap.read_share, compute_s / overlap.compute_share)
    left_s = max(read_s - together_s * overlap.read_share, compute_s - together_s * overlap.compute_share)
    return min(together_s + left_s, read_s + compute_s)  # nobody is forced to overlap


def pause_idle_s(pause_s: float, num_slots: int, block_bytes: int, gb_per_s: float) -> float:
    """Return how long the device idles because of a pause in which no block is consumed.

    Attention, blocks that are pinned and the output layer are such pauses. Reads go on until the staging is full, and come
    back to their rate only with `FULL_RATE_BLOCKS` on the way; so what covers a pause is the staging beyond these.
    """
    ahead_s = (num_slots - FULL_RATE_BLOCKS) * block_bytes / (gb_per_s * 1e9)
    return max(pause_s - ahead_s, 0.0)


def merged_reads(num_missing: float, num_rows: int, max_gap: int = 0) -> list[tuple[float, float]]:
    """Return the reads that a token's missing rows make: (rows that a read spans, how many such reads).

    Missing rows lie as if drawn at random, the expected case for a neuron order that knows nothing. With a share p of the
    rows missing, the way to the next missing row is geometric; up to `max_gap` rows between two are read through. A read
    goes on with probability q = 1 - (1-p)^(max_gap+1), so reads of n missing rows are (1-q) q^(n-1) of all, and each
    step in it spans on average 1 + E[gap | gap <= max_gap] rows.

    Args:
        num_missing: Missing rows of the layer.
        num_rows: Its rows.
        max_gap: Rows between two missing ones that are read through.
    """
    if num_missing <= 0:
        return []
    p = min(num_missing / num_rows, 1.0)
    if p >= 1.0:
        return [(float(num_rows), 1.0)]
    goes_on = 1.0 - (1.0 - p) ** (max_gap + 1)
    weights = [p * (1.0 - p) ** gap for gap in range(max_gap + 1)]
    gap = sum(g * weight for g, weight in enumerate(weights)) / sum(weights)
    num_reads = num_missing * (1.0 - goes_on)
    reads = []
    for rows in range(1, MAX_RUN):
        count = num_reads * (1.0 - goes_on) * goes_on ** (rows - 1)
        if count < num_missing * 1e-9:
            break
        reads.append((rows + (rows - 1) * gap, count))
    return reads


def new_rows(use: LayerUse, num_slots: int) -> float:
    """Return the rows that a token misses in a layer whose cache has `num_slots` slots.

    A cache that holds what the last k tokens used has s_agg(k) of the rows and misses s_agg(k+1) - s_agg(k) (paper §3.1,
    Fig 4a); between two windows, the line between them.
    """
    steps = use.steps()
    if num_slots <= steps[0][0]:
        return steps[0][1]
    for (slots_before, rows_before), (slots, rows) in pairwise(steps):
        if num_slots <= slots:
            share = (num_slots - slots_before) / (slots - slots_before)
            return rows_before + share * (rows - rows_before)
    return 0.0


def scattered_read_s(
    reads: Sequence[tuple[float, float]],
    row_bytes: int,
    read_gb_per_s: Callable[[float], float],
    *,
    segment_s: float = 0.0,
) -> float:
    """Return the time of reads of different sizes at saturation: each takes its bytes / the rate at its size.

    Args:
        reads: As `merged_reads` returns them.
        row_bytes: Bytes of a row.
        read_gb_per_s: Rate of random reads of a size in bytes that land in one place, GB/s.
        segment_s: What each further row adds, which lands in a place of its own.
    """
    return math.fsum(
        count * (rows * row_bytes / (read_gb_per_s(rows * row_bytes) * 1e9) + max(rows - 1.0, 0.0) * segment_s)
        for rows, count in reads
        if count > 0
    )


def read_totals(reads: Sequence[tuple[float, float]], row_bytes: int) -> tuple[float, float]:
    """Return (bytes, reads) of a read distribution."""
    return (
        math.fsum(rows * count * row_bytes for rows, count in reads),
        math.fsum(count for _, count in reads),
    )


def multiply_s(num_bytes: float, gb_per_s: float) -> float:
    """Return the time of matrix-vector products over so many bytes of weights: they are bound by memory."""
    return num_bytes / (gb_per_s * 1e9)


def gemm_s(num_weights: float, num_tokens: float, gflop_per_s: float) -> float:
    """Return the time of matrix products of many tokens: 2 operations per weight and token."""
    return 2.0 * num_weights * num_tokens / (gflop_per_s * 1e9)
