"""Sharing the neuron cache's slots out over layers."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from flashlm.memory.cache_plan import LayerUse, least_slots, plan_capacities

curves = st.lists(st.floats(0.001, 1.0), min_size=1, max_size=12).map(lambda shares: tuple(sorted(shares)))
uses = st.builds(LayerUse, num_rows=st.integers(1, 3000), use_curve=curves)


@given(layers=st.lists(uses, min_size=1, max_size=6), extra=st.integers(0, 5000))
def test_capacities_fit_the_slots_and_use_them(layers: list[LayerUse], extra: int) -> None:
    num_slots = sum(least_slots(layers)) + extra
    granted = plan_capacities(layers, num_slots)
    assert sum(each.num_slots for each in granted) == min(num_slots, sum(layer.num_rows for layer in layers))
    for layer, each in zip(layers, granted, strict=True):
        assert layer.least_slots <= each.num_slots <= layer.num_rows == each.num_rows


@given(layers=st.lists(uses, min_size=1, max_size=6), extra=st.integers(0, 3000))
def test_more_slots_never_take_any_away(layers: list[LayerUse], extra: int) -> None:
    num_slots = sum(least_slots(layers)) + extra
    few, more = plan_capacities(layers, num_slots), plan_capacities(layers, num_slots + 100)
    assert all(a.num_slots <= b.num_slots for a, b in zip(few, more, strict=True))


def test_slots_go_where_they_save_reads() -> None:
    steady = LayerUse(num_rows=1000, use_curve=(0.1, 0.101, 0.102, 0.103))
    varied = LayerUse(num_rows=1000, use_curve=(0.1, 0.2, 0.25, 0.26))
    granted = plan_capacities([steady, varied], sum(least_slots([steady, varied])) + 300)
    assert granted[1].num_slots > granted[0].num_slots
