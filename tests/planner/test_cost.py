"""The cost model against the paper's own figures, and its parts against plain arithmetic and simulation."""

from __future__ import annotations

import math
import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm.memory.cache_plan import LayerUse
from flashlm.planner.cost import (
    MAX_RUN,
    Overlap,
    merged_reads,
    new_rows,
    overlapped_s,
    read_totals,
    scattered_read_s,
    stream_s,
)
from flashlm.planner.rates import Rates

# Paper, Fig 2b at 32 threads (MB/s by chunk) and §2.2: the M1 Max.
PAPER = Rates(
    stream_gb_per_s={1 << 20: 6.1},
    random_gb_per_s={4096: 0.597, 8192: 1.162, 16384: 2.103, 32768: 3.702, 65536: 5.063},
)
TOLERANCE = 0.10


def scattered_ms(num_bytes: float, num_rows: int, share: float, row_bytes: int) -> float:
    """I/O of one token whose misses are a share of all rows: `num_bytes` of them in all layers."""
    reads = merged_reads(share * num_rows, num_rows)
    one_layer = scattered_read_s(reads, row_bytes, PAPER.random_read_gb_per_s)
    layers = num_bytes / read_totals(reads, row_bytes)[0]
    return 1e3 * layers * one_layer


@pytest.mark.parametrize(
    ("total_gb", "read_share", "published_ms"),
    [
        (13.4, 1.0, 2196),  # Table 2, OPT 6.7B: naive, hybrid
        (13.4, 0.5, 1090),
        (14.0, 1.0, 2295),  # Table 3: Falcon, Persimmon, Phi-2, Llama 2
        (14.0, 0.5, 1147),
        (16.0, 1.0, 2622),
        (16.0, 0.5, 1311),
        (5.4, 1.0, 885),
        (5.4, 0.35, 309),
        (13.2, 1.0, 2166),
        (13.2, 0.45, 974),
    ],
)
def test_the_papers_streams(total_gb: float, read_share: float, published_ms: float) -> None:
    got_ms = 1e3 * stream_s(total_gb * 1e9 * read_share, PAPER.block_read_gb_per_s(1 << 20))
    assert got_ms == pytest.approx(published_ms, rel=0.02)


@pytest.mark.parametrize(
    ("traffic_gb", "num_rows", "share", "row_bytes", "published_ms"),
    [
        # Table 2: the traffic as the table states it, reads of half a bundle and of a whole one.
        (0.9, 16384, 0.1029, 8192, 738),
        (0.2, 16384, 0.024, 8192, 164),
        (0.2, 16384, 0.024, 16384, 87),
        # Table 3, fp32 and 16 bits: 2.4 % of OPT's FFN, 3.1 % of Falcon's.
        (32 * 16384 * 0.024 * 32768 / 1e9, 16384, 0.024, 32768, 105),
        (32 * 16384 * 0.024 * 16384 / 1e9, 16384, 0.024, 16384, 92),
        (32 * 18176 * 0.031 * 36352 / 1e9, 18176, 0.031, 36352, 161),
    ],
)
def test_the_papers_scattered_reads(
    traffic_gb: float, num_rows: int, share: float, row_bytes: int, published_ms: float
) -> None:
    # Half-bundles of one neuron lie apart: twice as many places, the same share.
    got_ms = scattered_ms(traffic_gb * 1e9, num_rows, share, row_bytes)
    assert got_ms == pytest.approx(published_ms, rel=TOLERANCE)


def test_rates_between_and_beyond_the_measured_sizes() -> None:
    assert PAPER.random_read_gb_per_s(16384) == pytest.approx(2.103)
    assert 2.103 < PAPER.random_read_gb_per_s(24576) < 3.702
    assert PAPER.random_read_gb_per_s(512) == pytest.approx(0.597 / 8)  # so many reads a second and no more
    assert PAPER.random_read_gb_per_s(1 << 20) == pytest.approx(5.063)


@given(st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_overlap_is_between_the_longer_and_the_sum(read_s: float, compute_s: float, a: float, b: float) -> None:
    overlap = Overlap(read_share=a, compute_share=b)
    both_s = overlapped_s(read_s, compute_s, overlap)
    assert max(read_s, compute_s) - 1e-9 <= both_s <= read_s + compute_s + 1e-9
    assert overlapped_s(read_s, compute_s, Overlap()) == pytest.approx(max(read_s, compute_s))


@pytest.mark.parametrize("max_gap", [0, 1, 3])
@pytest.mark.parametrize("share", [0.01, 0.2, 0.7])
def test_merged_reads_are_what_a_simulation_counts(max_gap: int, share: float) -> None:
    num_rows, generator = 200_000, random.Random(0)
    missing = [row for row in range(num_rows) if generator.random() < share]
    counted_reads, counted_rows = 1, 1
    for before, row in pairwise(missing):
        if row - before - 1 <= max_gap:
            counted_rows += row - before
        else:
            counted_reads += 1
            counted_rows += 1
    rows, reads = read_totals(merged_reads(len(missing), num_rows, max_gap), 1)
    if (1.0 - share) ** (max_gap + 1) > 0.1:  # runs beyond MAX_RUN are cut off
        assert reads == pytest.approx(counted_reads, rel=0.03)
        assert rows == pytest.approx(counted_rows, rel=0.03)
    assert rows <= counted_rows * 1.03


def test_merged_reads_at_the_ends() -> None:
    assert merged_reads(0, 100) == []
    assert merged_reads(100, 100) == [(100.0, 1.0)]
    assert max(rows for rows, _ in merged_reads(90, 100)) <= MAX_RUN


@given(st.integers(0, 4000), st.integers(0, 4000))
def test_a_larger_cache_never_misses_more(slots: int, more: int) -> None:
    use = LayerUse(num_rows=4000, use_curve=(0.1, 0.14, 0.17, 0.19, 0.205, 0.215))
    assert new_rows(use, slots) >= new_rows(use, slots + more) >= 0.0
    assert new_rows(use, 0) == pytest.approx(400)
    assert new_rows(use, 4000) == 0.0
    assert math.isfinite(new_rows(use, slots))


def test_a_read_pays_for_every_further_place_that_it_lands_in() -> None:
    reads = [(1.0, 10.0), (5.0, 2.0)]
    apart_s = scattered_read_s(reads, 1024, lambda size: 1.0, segment_s=5e-6)
    assert apart_s - scattered_read_s(reads, 1024, lambda size: 1.0) == pytest.approx(2 * 4 * 5e-6)
