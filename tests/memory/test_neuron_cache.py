"""The neuron cache against a model of it in plain Python: policies, capacity, pinned rows, forgetting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm.errors import ConfigError
from flashlm.memory.neuron_cache import LayerCapacity, NeuronCache


def _tensor(rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


class Model:
    """What the cache should hold: rows with the step of their last use."""

    def __init__(self, capacity: LayerCapacity, window: int | None) -> None:
        self.capacity, self.window, self.step = capacity, window, 0
        self.used: dict[int, tuple[int, int]] = {}
        self.order = 0

    def acquire(self, rows: list[int]) -> set[int]:
        """Return the rows that are held before; hold `rows` after."""
        self.step += 1
        held = {row for row in rows if row in self.used or row < self.capacity.num_pinned}
        for row in rows:
            if row in self.used:
                self._use(row)
        if self.window is not None:
            self.used = {row: use for row, use in self.used.items() if use[0] > self.step - self.window}
        for row in rows:
            if row not in held:
                if len(self.used) == self.capacity.num_slots - self.capacity.num_pinned:
                    del self.used[min(self.used, key=lambda each: self.used[each])]
                self._use(row)
        return held

    def _use(self, row: int) -> None:
        self.order += 1
        self.used[row] = (self.step, self.order)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_it_does_what_its_model_does(data: st.DataObject) -> None:
    num_rows = data.draw(st.integers(1, 40), "rows")
    num_slots = data.draw(st.integers(1, num_rows), "slots")
    num_pinned = data.draw(st.integers(0, num_slots), "pinned")
    window = data.draw(st.none() | st.integers(1, 4), "window")
    capacity = LayerCapacity(num_rows=num_rows, num_slots=num_slots, num_pinned=num_pinned)
    cache, model = NeuronCache([capacity], window=window), Model(capacity, window)
    contents: dict[int, int] = {row: row for row in range(num_pinned)}  # slot to the row whose bytes it holds
    for _ in range(data.draw(st.integers(1, 12), "steps")):
        rows = sorted(data.draw(st.sets(st.integers(0, num_rows - 1)), "wanted"))
        num_unpinned = sum(row >= num_pinned for row in rows)
        if num_unpinned > num_slots - num_pinned:
            with pytest.raises(ConfigError, match="do not fit"):
                cache.acquire(0, _tensor(rows))
            continue
        lookup = cache.acquire(0, _tensor(rows))
        held = {rows[index] for index in lookup.order[: lookup.num_held].tolist()}
        assert held == model.acquire(rows)
        assert sorted(lookup.order.tolist()) == list(range(len(rows)))
        slots = lookup.slots.tolist()
        assert len(set(slots)) == len(slots)
        for row, slot in zip(rows, slots, strict=True):
            if row in held:
                assert contents[slot] == row  # the bytes are still this row's
            contents[slot] = row
        assert cache.occupancy(0) == num_pinned + len(model.used)
        if rows and data.draw(st.booleans(), "forget"):
            lost = rows[: data.draw(st.integers(1, len(rows)), "lost")]
            cache.forget(0, _tensor(lost))
            for row in lost:
                model.used.pop(row, None)
            assert cache.occupancy(0) == num_pinned + len(model.used)


def test_the_window_is_the_papers() -> None:
    """With window(k) a row that none of the last k tokens used is read again; one that some used is not."""
    cache = NeuronCache([LayerCapacity(num_rows=10, num_slots=10)], window=2)
    for rows, num_held in (([0, 1], 0), ([1, 2], 1), ([3], 0), ([2, 1], 2), ([0], 0)):
        assert cache.acquire(0, _tensor(sorted(rows))).num_held == num_held, rows


def test_a_token_in_several_rounds_is_one_step() -> None:
    cache = NeuronCache([LayerCapacity(num_rows=10, num_slots=4)], window=1)
    cache.acquire(0, _tensor([0, 1]))
    cache.acquire(0, _tensor([2, 3]), is_same_step=True)
    assert cache.occupancy(0) == 4
    assert cache.acquire(0, _tensor([0, 1, 2, 3])).num_held == 4


@pytest.mark.parametrize(
    ("layers", "window"),
    [
        ([LayerCapacity(num_rows=4, num_slots=5)], None),
        ([LayerCapacity(num_rows=4, num_slots=0)], None),
        ([LayerCapacity(num_rows=4, num_slots=2, num_pinned=3)], None),
        ([LayerCapacity(num_rows=4, num_slots=2)], 0),
        ([LayerCapacity(num_rows=-1, num_slots=2)], None),
    ],
)
def test_numbers_that_do_not_fit_are_refused(layers: list[LayerCapacity], window: int | None) -> None:
    with pytest.raises(ConfigError):
        NeuronCache(layers, window=window)


@pytest.mark.parametrize("rows", [[1, 1], [2, 1], [-1], [10]])
def test_rows_that_do_not_ascend_within_the_layer_are_refused(rows: list[int]) -> None:
    cache = NeuronCache([LayerCapacity(num_rows=10, num_slots=4)])
    with pytest.raises(ConfigError, match="must ascend"):
        cache.acquire(0, _tensor(rows))
    assert cache.occupancy(0) == 0


def test_arrays_of_another_kind_are_refused() -> None:
    cache = NeuronCache([LayerCapacity(num_rows=10, num_slots=4)])
    with pytest.raises(ConfigError, match="int32"):
        cache.acquire(0, torch.tensor([1, 2]))
    with pytest.raises(ConfigError, match="contiguous"):
        cache.acquire(0, torch.arange(8, dtype=torch.int32)[::2])
