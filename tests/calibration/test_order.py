"""Neuron order: hot first, then chained; always a permutation."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm.calibration.order import HOT_RATE, chain, neuron_order


@settings(max_examples=60, deadline=None)
@given(num_tokens=st.integers(0, 30), num_rows=st.integers(1, 40), seed=st.integers(0, 99), rate=st.floats(0, 1))
def test_it_is_a_permutation_with_the_hot_first_and_the_idle_last(
    num_tokens: int, num_rows: int, seed: int, rate: float
) -> None:
    uses = np.random.default_rng(seed).random((num_tokens, num_rows)) < rate
    order = neuron_order(uses)
    assert sorted(order.tolist()) == list(range(num_rows))
    rates = uses.sum(axis=0)[order] / max(num_tokens, 1)
    num_hot = int((rates >= HOT_RATE).sum()) if num_tokens else 0
    assert (rates[:num_hot] >= HOT_RATE).all()
    assert (np.diff(rates[:num_hot]) <= 0).all()
    num_fired = int((rates > 0).sum())
    assert (rates[:num_fired] > 0).all()
    assert (np.diff(order[num_fired:]) > 0).all()


def test_rows_that_fire_together_come_to_lie_together() -> None:
    random = np.random.default_rng(0)
    groups = np.repeat(np.arange(20), 5)
    random.shuffle(groups)
    fires = random.random((400, 20)) < 0.1
    uses = fires[:, groups] & (random.random((400, 100)) < 0.9)
    chained = groups[chain(uses, np.arange(100))]
    assert (np.diff(chained) != 0).sum() <= 25  # 19 steps between groups are the least
    assert (np.diff(groups) != 0).sum() > 80


def test_neighbours_save_reads() -> None:
    random = np.random.default_rng(1)
    groups = random.permutation(np.repeat(np.arange(25), 4))
    uses = (random.random((300, 25)) < 0.15)[:, groups]

    def num_reads(order: np.ndarray) -> int:
        ordered = uses[:, order].astype(np.int8)
        return int((np.diff(ordered, axis=1, prepend=0) == 1).sum())

    assert num_reads(neuron_order(uses)) < 0.5 * num_reads(np.arange(100))
