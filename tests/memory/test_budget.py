"""The budget never promises more than it has, spreads what it pins, and refuses below the floor with figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm.errors import BudgetError
from flashlm.memory.budget import MIN_STAGING_BLOCKS, Needs, floor_bytes, place
from flashlm.rows.layout import LayerLayout

SIZES = st.integers(0, 1 << 22)
LAYOUTS = st.lists(
    st.builds(
        LayerLayout,
        hidden_size=st.just(64),
        num_rows=st.integers(1, 400),
        has_gate=st.just(False),
        dtype=st.just("bfloat16"),
        block_rows=st.just(32),
    ),
    min_size=1,
    max_size=6,
)
NEEDS = st.builds(Needs, process_bytes=SIZES, resident_bytes=SIZES, kv_cache_bytes=SIZES, working_bytes=SIZES)


@given(layouts=LAYOUTS, needs=NEEDS, spare_bytes=st.integers(0, 1 << 20), limit=st.none() | st.integers(0, 1 << 18))
def test_placement_stays_within_dram(layouts, needs, spare_bytes, limit):
    dram_bytes = floor_bytes(layouts, needs) + spare_bytes
    placement = place(layouts, needs, dram_bytes, max_pinned_bytes=limit)
    assert placement.planned_bytes <= dram_bytes
    assert limit is None or placement.pinned_bytes <= limit
    for layout, pinned, streamed in zip(layouts, placement.num_pinned, placement.num_streamed, strict=True):
        assert pinned + streamed == layout.num_blocks
    if placement.streamed_bytes:
        assert placement.num_slots >= MIN_STAGING_BLOCKS


@given(layouts=LAYOUTS, needs=NEEDS, spare_bytes=st.integers(0, 1 << 20))
def test_pinned_and_streamed_bytes_cover_all_files(layouts, needs, spare_bytes):
    placement = place(layouts, needs, floor_bytes(layouts, needs) + spare_bytes)
    assert placement.pinned_bytes + placement.streamed_bytes == sum(
        layout.read_bytes(block) for layout in layouts for block in range(layout.num_blocks)
    )


@given(needs=NEEDS, spare_bytes=st.integers(0, 1 << 20), num_layers=st.integers(1, 8))
def test_equal_layers_pin_equal_shares(needs, spare_bytes, num_layers):
    layout = LayerLayout(hidden_size=64, num_rows=256, has_gate=False, dtype="bfloat16", block_rows=32)
    layouts = [layout] * num_layers
    placement = place(layouts, needs, floor_bytes(layouts, needs) + spare_bytes)
    assert max(placement.num_pinned) - min(placement.num_pinned) <= 1


@given(layouts=LAYOUTS, needs=NEEDS, spare_bytes=st.integers(0, 1 << 20), more_bytes=st.integers(0, 1 << 20))
def test_more_dram_never_streams_more_than_a_staging_buffer_more(layouts, needs, spare_bytes, more_bytes):
    base_bytes = floor_bytes(layouts, needs) + spare_bytes
    less = place(layouts, needs, base_bytes)
    more = place(layouts, needs, base_bytes + more_bytes)
    assert more.streamed_bytes <= less.streamed_bytes + more.staging_bytes - less.staging_bytes + more.slot_bytes


def test_below_the_floor_says_what_is_needed():
    layout = LayerLayout(hidden_size=64, num_rows=256, has_gate=False, dtype="bfloat16", block_rows=32)
    needs = Needs(process_bytes=1 << 20, resident_bytes=2 << 20, kv_cache_bytes=3 << 20, working_bytes=4 << 20)
    floor = floor_bytes([layout], needs)
    with pytest.raises(BudgetError, match=r"below the 10\.0 MiB .* 2\.0 MiB resident weights") as caught:
        place([layout], needs, floor - 1)
    assert caught.value.needed_bytes == floor
    assert caught.value.available_bytes == floor - 1
    place([layout], needs, floor)


def test_everything_is_pinned_without_staging_where_it_fits():
    layout = LayerLayout(hidden_size=64, num_rows=256, has_gate=False, dtype="bfloat16", block_rows=32)
    needs = Needs(process_bytes=0, resident_bytes=0, kv_cache_bytes=0, working_bytes=0)
    placement = place([layout, layout], needs, 2 * layout.file_bytes)
    assert placement.num_streamed == (0, 0)
    assert placement.num_slots == 0
