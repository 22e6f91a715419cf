"""The expert cache never holds more than it may, gives no slot twice, and evicts what the policy says."""

from __future__ import annotations

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from flashlm.errors import BudgetError, ConfigError
from flashlm.memory.budget import Needs
from flashlm.memory.expert_budget import ExpertUse, expert_floor_bytes, is_close_to_floor, place_experts
from flashlm.memory.expert_cache import ExpertCache, LeastFrequentlyUsed, LeastRecentlyUsed, replay
from flashlm.rows.layout import LayerLayout

NUM_EXPERTS = 8


def run(cache, layer, needed, *, fail_at=None):
    """Go through a step as the engine does; return what was read."""
    step = cache.begin(layer, needed, needed)
    pending = list(step.misses)
    read = []
    contents = {}
    for position, expert in enumerate(sorted(needed)):
        while pending and (slot := step.take(pending[0])) is not None:
            contents[pending[0]] = slot
            read.append(pending.pop(0))
        assert expert in cache.held(layer), "an expert that is needed has no slot"
        if fail_at == position:
            cache.break_off((layer, each) for each in step.misses)
            assert not set(step.misses) & set(cache.held(layer))
            return read
        step.done(expert)
        contents.pop(expert, None)
    return read


@settings(max_examples=200, deadline=None)
@given(
    capacities=st.lists(st.integers(1, NUM_EXPERTS), min_size=1, max_size=3),
    policy=st.sampled_from(["lru", "lfu"]),
    num_pinned=st.integers(0, 2),
    num_spare=st.integers(1, 3),
    steps=st.lists(
        st.tuples(
            st.integers(0, 2),
            st.sets(st.integers(0, NUM_EXPERTS - 1), min_size=1).map(sorted),
            st.none() | st.integers(0, 7),
        ),
        max_size=20,
    ),
)
@example(  # pinned experts in all spare slots, everything else still to be used
    capacities=[1, 3],
    policy="lru",
    num_pinned=2,
    num_spare=2,
    steps=[(0, [0], None), (1, [3, 4, 5], None), (1, [0, 1, 2, 3, 4, 5], None)],
)
def test_slots_are_never_shared_and_nothing_is_read_twice(capacities, policy, num_pinned, num_spare, steps):
    pinned = [range(min(num_pinned, capacity - 1)) for capacity in capacities]
    cache = ExpertCache(capacities, num_spare=num_spare, policy=policy, pinned=pinned)
    for number, needed, fail_at in steps:
        layer = number % len(capacities)
        before = cache.held(layer)
        read = run(cache, layer, needed, fail_at=fail_at)
        assert len(set(read)) == len(read)
        assert not set(read) & set(before)
        for each, capacity in enumerate(capacities):
            assert len(cache.held(each)) <= capacity
            assert set(before) & set(pinned[layer]) <= set(cache.held(layer)) | set(needed)
        slots = [slot for each in range(len(capacities)) for slot in cache.held(each).values()]
        assert len(set(slots)) == len(slots)
        assert all(0 <= slot < cache.num_slots for slot in slots)


def test_everything_that_fits_is_read_once():
    cache = ExpertCache([NUM_EXPERTS])
    assert run(cache, 0, list(range(NUM_EXPERTS))) == list(range(NUM_EXPERTS))
    for _ in range(3):
        assert run(cache, 0, [1, 5, 7]) == []


def test_lru_evicts_what_was_not_used_for_longest():
    policy = LeastRecentlyUsed()
    policy.use([3, 1])
    policy.use([2])
    assert [policy.victim({1, 2, 3}), policy.victim({1, 2}), policy.victim({0, 1})] == [3, 1, 0]


def test_a_step_broken_off_anywhere_loses_no_slot():
    """Whatever a step has popped and not yet put elsewhere is found again, also where finding it is broken off itself."""
    cache = ExpertCache([3, 2], num_spare=1)
    for layer in (0, 1):
        run(cache, layer, [0, 1])
    step = cache.begin(0, [1, 5, 6, 7], [1, 5, 6, 7])
    step.take(5)
    cache._layers[0].free.clear()  # popped, and then an interrupt
    cache._spare.clear()
    cache._layers[0].slot_of.pop(0)
    for _ in range(2):
        cache.break_off((0, expert) for expert in step.misses)
        slots = [slot for layer in (0, 1) for slot in cache.held(layer).values()]
        free = [slot for each in cache._layers for slot in each.free] + cache._spare
        assert sorted(slots + free) == list(range(cache.num_slots))
        assert [len(each.free) + len(each.slot_of) for each in cache._layers] == [3, 2]
        assert cache.held(0).keys() == {1}
    run(cache, 0, list(range(NUM_EXPERTS)))


def test_lfu_evicts_what_was_used_least_and_forgets_old_fame():
    policy = LeastFrequentlyUsed(half_life_steps=4)
    for _ in range(6):
        policy.use([1])
    policy.use([2])
    assert policy.victim({1, 2}) == 2
    for _ in range(40):
        policy.use([2])
    assert policy.victim({1, 2}) == 1


def test_lfu_scores_stay_finite():
    policy = LeastFrequentlyUsed(half_life_steps=3)
    for _ in range(2000):
        policy.use([1])
    policy.use([2])
    assert policy.victim({1, 2}) == 2


def test_a_trace_that_repeats_itself_hits():
    trace = [(layer, [1, 2]) for _ in range(3) for layer in (0, 1)]
    assert list(replay(trace, [2, 2], "lru")) == [(0, 2)] * 2 + [(2, 0)] * 4


def test_unknown_policies_and_bad_numbers_are_refused():
    with pytest.raises(ConfigError, match="choose one of lru, lfu"):
        ExpertCache([1], policy="fifo")
    with pytest.raises(ConfigError, match="needs a slot"):
        ExpertCache([1, 0])
    with pytest.raises(ConfigError, match="fewer experts must be pinned"):
        ExpertCache([2], pinned=[[0, 1]])


def uses(num_layers=3, num_experts=NUM_EXPERTS, num_active=2):
    layout = LayerLayout(hidden_size=64, num_rows=num_experts * 32, has_gate=True, dtype="bfloat16", block_rows=32)
    return [ExpertUse(layout=layout, num_active=num_active) for _ in range(num_layers)]


NEEDS = Needs(process_bytes=1 << 20, resident_bytes=2 << 20, kv_cache_bytes=1 << 19, working_bytes=1 << 18)


@given(extra=st.integers(0, 2 << 20), bound=st.none() | st.integers(0, 2 << 20))
def test_a_placement_stays_within_the_budget_and_above_the_floor(extra, bound):
    floor = expert_floor_bytes(uses(), NEEDS)
    placement = place_experts(uses(), NEEDS, floor + extra, max_cache_bytes=bound)
    assert placement.planned_bytes <= floor + extra
    assert all(2 <= capacity <= NUM_EXPERTS for capacity in placement.experts)
    assert max(placement.experts) - min(placement.experts) <= 1
    assert (placement.num_slots == 0) == (sum(placement.experts) == 3 * NUM_EXPERTS)
    more = place_experts(uses(), NEEDS, floor + extra + (1 << 16), max_cache_bytes=bound)
    assert sum(more.experts) >= sum(placement.experts)


def test_below_the_floor_is_refused_with_the_numbers():
    floor = expert_floor_bytes(uses(), NEEDS)
    with pytest.raises(BudgetError, match="one token's experts") as error:
        place_experts(uses(), NEEDS, floor - 1)
    assert (error.value.needed_bytes, error.value.available_bytes) == (floor, floor - 1)
    assert is_close_to_floor(uses(), place_experts(uses(), NEEDS, floor))
    assert not is_close_to_floor(uses(), place_experts(uses(), NEEDS, floor + (1 << 20)))
