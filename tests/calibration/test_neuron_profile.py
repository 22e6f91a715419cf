"""Profiles agree with what the definitions say, counted the slow way."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flashlm.calibration.neuron_profile import LayerProfile, UseCurve, pack_rows, unpack_rows

RUNS = st.integers(1, 20).flatmap(
    lambda rows: st.lists(
        st.integers(1, 12).flatmap(lambda tokens: hnp.arrays(np.bool_, (tokens, rows))), min_size=1, max_size=3
    )
)


def _shares_by_definition(runs: list[np.ndarray], k: int) -> list[float]:
    places = [run[end - k : end].any(axis=0).mean() for run in runs for end in range(k, len(run) + 1)]
    return [float(np.mean(places))] if places else []


@given(runs=RUNS)
@settings(deadline=None)
def test_the_use_curve_is_the_mean_over_all_places_of_k_tokens(runs: list[np.ndarray]) -> None:
    curve = UseCurve(runs[0].shape[1], max_window=8)
    for run in runs:
        curve.add(run)
    wanted = [share for k in range(1, 9) for share in _shares_by_definition(runs, k)]
    # Places of k and of k + 1 tokens are not the same ones, so the plain mean may fall; a curve never does.
    np.testing.assert_allclose(curve.shares, np.maximum.accumulate(wanted), rtol=1e-12)
    np.testing.assert_allclose(np.cumsum(curve.increments), curve.shares, rtol=1e-12)


@given(runs=RUNS, max_sampled_rows=st.integers(1, 25))
@settings(deadline=None)
def test_rates_and_pairs_are_counts(runs: list[np.ndarray], max_sampled_rows: int) -> None:
    num_rows = runs[0].shape[1]
    profile = LayerProfile(num_rows, max_sampled_rows=max_sampled_rows)
    for run in runs:
        profile.add(run)
    everything = np.concatenate(runs)
    assert profile.num_tokens == len(everything)
    assert profile.active_share == pytest.approx(everything.mean())
    np.testing.assert_allclose(profile.firing_rate, everything.mean(axis=0), rtol=1e-6)
    rows = profile.sampled_rows
    assert len(set(rows.tolist())) == len(rows) == min(num_rows, max_sampled_rows)
    for i, one in enumerate(rows):
        for j, other in enumerate(rows):
            assert profile.coactivation[i, j] == (everything[:, one] & everything[:, other]).sum()


@given(uses=hnp.arrays(np.bool_, hnp.array_shapes(min_dims=2, max_dims=2, max_side=40)))
def test_packed_rows_come_back(uses: np.ndarray) -> None:
    packed = pack_rows(uses)
    assert packed.nbytes == len(uses) * -(-uses.shape[1] // 8)
    np.testing.assert_array_equal(unpack_rows(packed, uses.shape[1]), uses)


def test_a_row_that_always_fires_costs_nothing_after_the_first_token() -> None:
    curve = UseCurve(4)
    uses = np.zeros((50, 4), dtype=bool)
    uses[:, 0] = True
    curve.add(uses)
    assert curve.shares == (0.25,) * 32
    assert curve.increments == (0.25,) + (0.0,) * 31
