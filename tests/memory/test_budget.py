"""The budget never promises more than it has, shares it out by value, and refuses below the floor with figures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm.errors import BudgetError
from flashlm.memory.budget import MIN_STAGING_BLOCKS, NUM_SPARE_SLOTS, Needs, floor_bytes, is_close_to_floor, place
from flashlm.memory.cache_plan import LayerUse
from flashlm.pack.units import Unit, dense_units
from flashlm.rows.layout import GATED, MATRIX, UNGATED, LayerLayout

NUM_EXPERTS = 8
SIZES = st.integers(0, 1 << 22)
NEEDS = st.builds(Needs, process_bytes=SIZES, resident_bytes=SIZES, kv_cache_bytes=SIZES, working_bytes=SIZES)
SOME_NEEDS = Needs(process_bytes=1 << 20, resident_bytes=2 << 20, kv_cache_bytes=3 << 20, working_bytes=4 << 20)


def ffn(num_rows=256):
    layout = LayerLayout(hidden_size=64, num_rows=num_rows, parts=UNGATED, encodings=("bf16",) * 2, block_rows=32)
    return Unit.dense("ffn", layout)


def linear(num_rows=256):
    layout = LayerLayout(hidden_size=64, num_rows=num_rows, parts=MATRIX, encodings=("bf16",) * 1, block_rows=64)
    return Unit.dense("linear", layout)


def experts(num_active=2):
    layout = LayerLayout(hidden_size=64, num_rows=NUM_EXPERTS * 32, parts=GATED, encodings=("bf16",) * 3, block_rows=32)
    return Unit(kind="experts", layout=layout, num_active=num_active)


FFNS = st.lists(st.builds(ffn, st.integers(1, 400)), min_size=1, max_size=6)
ANY = st.lists(
    st.one_of(
        st.builds(ffn, st.integers(1, 400)),
        st.builds(linear, st.integers(1, 600)),
        st.builds(experts, st.integers(1, NUM_EXPERTS)),
    ),
    min_size=1,
    max_size=8,
)


@given(units=ANY, needs=NEEDS, spare_bytes=st.integers(0, 1 << 21), limit=st.none() | st.integers(0, 1 << 19))
def test_placement_of_any_units_stays_within_dram(units, needs, spare_bytes, limit):
    dram_bytes = floor_bytes(units, needs) + spare_bytes
    placement = place(units, needs, dram_bytes, max_pinned_bytes=limit)
    assert placement.planned_bytes <= dram_bytes
    assert limit is None or placement.pinned_bytes <= limit
    for unit, each in zip(dense_units(units), placement.dense, strict=True):
        assert each.num_pinned + each.num_streamed == unit.num_blocks
        assert each.pinned_bytes + each.streamed_bytes == unit.layout.file_bytes
    layers = [unit for unit in units if not unit.is_dense]
    for unit, num_slots in zip(layers, placement.experts, strict=True):
        assert unit.num_active <= num_slots <= NUM_EXPERTS
    assert (placement.num_slots >= MIN_STAGING_BLOCKS) == (placement.ring_bytes > 0)
    assert (placement.num_spare == 0) == (sum(placement.experts) == NUM_EXPERTS * len(layers))


@given(units=ANY, needs=NEEDS, spare_bytes=st.integers(0, 1 << 21))
def test_caches_of_experts_grow_only_once_all_else_is_pinned(units, needs, spare_bytes):
    """A pinned block saves its bytes in every token, a held expert only where the router chooses it."""
    placement = place(units, needs, floor_bytes(units, needs) + spare_bytes)
    if placement.ring_bytes and placement.experts:
        least = sum(unit.num_active for unit in units if not unit.is_dense)
        grown_bytes = (sum(placement.experts) - least) * placement.expert_bytes
        slot_bytes = max(unit.layout.block_stride_bytes for unit in dense_units(units))
        assert grown_bytes <= slot_bytes + NUM_SPARE_SLOTS * placement.expert_bytes


@given(needs=NEEDS, spare_bytes=st.integers(0, 1 << 20), num_layers=st.integers(1, 8))
def test_equal_layers_pin_equal_shares(needs, spare_bytes, num_layers):
    units = [ffn()] * num_layers
    placement = place(units, needs, floor_bytes(units, needs) + spare_bytes)
    num_pinned = [each.num_pinned for each in placement.dense]
    assert max(num_pinned) - min(num_pinned) <= 1


@given(units=FFNS, needs=NEEDS, spare_bytes=st.integers(0, 1 << 20), more_bytes=st.integers(0, 1 << 20))
def test_more_dram_never_streams_more_than_a_staging_buffer_more(units, needs, spare_bytes, more_bytes):
    base_bytes = floor_bytes(units, needs) + spare_bytes
    less = place(units, needs, base_bytes)
    more = place(units, needs, base_bytes + more_bytes)
    assert more.streamed_bytes <= less.streamed_bytes + more.staging_bytes - less.staging_bytes + more.slot_bytes


@given(needs=NEEDS, spare_bytes=st.integers(0, 1 << 21))
def test_a_neuron_cache_lies_beside_pinned_linear_layers(needs, spare_bytes):
    units = [linear(), ffn(), linear(128), ffn(300)]
    uses = [LayerUse(num_rows=unit.layout.num_rows, use_curve=(0.1, 0.2)) for unit in units if unit.kind == "ffn"]
    dram_bytes = floor_bytes(units, needs, uses) + spare_bytes
    placement = place(units, needs, dram_bytes, uses=uses)
    assert placement.planned_bytes <= dram_bytes
    assert placement.pinned_bytes == sum(unit.layout.file_bytes for unit in units if unit.kind == "linear")
    assert len(placement.rows) == 2
    with pytest.raises(BudgetError, match=r"staging, linear layers and one token's rows\."):
        place(units, needs, floor_bytes(units, needs, uses) - 1, uses=uses)


def test_below_the_floor_says_what_is_needed():
    units = [ffn()]
    floor = floor_bytes(units, SOME_NEEDS)
    with pytest.raises(BudgetError, match=r"below the 10\.0 MiB .* 2\.0 MiB resident weights") as caught:
        place(units, SOME_NEEDS, floor - 1)
    assert caught.value.needed_bytes == floor
    assert caught.value.available_bytes == floor - 1
    place(units, SOME_NEEDS, floor)


def test_everything_is_pinned_without_staging_where_it_fits():
    needs = Needs(process_bytes=0, resident_bytes=0, kv_cache_bytes=0, working_bytes=0)
    units = [linear(), ffn(), ffn()]
    placement = place(units, needs, sum(unit.layout.file_bytes for unit in units))
    assert [each.num_streamed for each in placement.dense] == [0, 0, 0]
    assert placement.num_slots == 0


@given(extra=st.integers(0, 2 << 20), bound=st.none() | st.integers(0, 2 << 20))
def test_experts_share_evenly_above_the_floor(extra, bound):
    units = [experts()] * 3
    floor = floor_bytes(units, SOME_NEEDS)
    placement = place(units, SOME_NEEDS, floor + extra, max_pinned_bytes=bound)
    assert placement.planned_bytes <= floor + extra
    assert all(2 <= capacity <= NUM_EXPERTS for capacity in placement.experts)
    assert max(placement.experts) - min(placement.experts) <= 1
    assert (placement.num_spare == 0) == (sum(placement.experts) == 3 * NUM_EXPERTS)
    more = place(units, SOME_NEEDS, floor + extra + (1 << 16), max_pinned_bytes=bound)
    assert sum(more.experts) >= sum(placement.experts)


def test_one_tokens_experts_are_the_floor():
    units = [experts()] * 3
    floor = floor_bytes(units, SOME_NEEDS)
    with pytest.raises(BudgetError, match="one token's experts") as error:
        place(units, SOME_NEEDS, floor - 1)
    assert (error.value.needed_bytes, error.value.available_bytes) == (floor, floor - 1)
    assert is_close_to_floor(units, place(units, SOME_NEEDS, floor))
    assert not is_close_to_floor(units, place(units, SOME_NEEDS, floor + (1 << 20)))
