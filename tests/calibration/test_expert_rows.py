"""Reading rows of an expert wins only above a share of zeros that the device's rates set."""

from __future__ import annotations

import pytest

from flashlm.calibration.expert_rows import bound_row_reads, break_even

EXPERT = {"expert_bytes": 8 << 20, "row_bytes": 8 << 10, "stream_gb_per_s": 2.0}


def per_read(reads_per_s):
    """A device that makes so many reads a second, of any size up to its stream's rate."""
    return lambda num_bytes: min(num_bytes * reads_per_s / 1e9, 2.0)


def test_as_fast_at_random_as_in_sequence_any_zero_wins():
    bound = bound_row_reads(**EXPERT, zero_share=0.25, random_gb_per_s=lambda num_bytes: 2.0)
    assert bound.can_win
    assert bound.max_speedup == pytest.approx(1 / 0.75)
    assert bound.whole_s == pytest.approx((8 << 20) / 2e9)
    assert break_even(**EXPERT, random_gb_per_s=lambda num_bytes: 2.0) == 0.0


def test_slow_small_reads_need_many_zeros():
    """(1 - z) / rate(row / z) = 1 / stream gives z (1 - z) = row * reads / stream: 0.09 at these numbers, so z = 0.9."""
    random = per_read(0.09 * 2e9 / (8 << 10))
    assert break_even(**EXPERT, random_gb_per_s=random) == pytest.approx(0.9, abs=0.002)
    assert not bound_row_reads(**EXPERT, zero_share=0.85, random_gb_per_s=random).can_win
    assert bound_row_reads(**EXPERT, zero_share=0.95, random_gb_per_s=random).can_win


def test_without_zeros_both_ways_are_the_same():
    bound = bound_row_reads(**EXPERT, zero_share=0.0, random_gb_per_s=per_read(1e4))
    assert bound.max_speedup == 1.0
    assert not bound.can_win


def test_nothing_but_zeros_takes_no_time():
    bound = bound_row_reads(**EXPERT, zero_share=1.0, random_gb_per_s=per_read(1e4))
    assert bound.can_win
    assert bound.rows_s == 0.0
    assert bound.max_speedup == float("inf")
