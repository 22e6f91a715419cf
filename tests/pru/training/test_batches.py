"""Columns and windows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flashlm.errors import ConfigError
from flashlm.pru.training.batches import SHORTEST, columns, draw_length, windows
from flashlm.pru.training.settings import TrainingSettings


def test_columns_are_consecutive_pieces_and_the_tail_is_dropped() -> None:
    assert columns(np.arange(11), 3).t().tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]]


def test_a_text_too_short_for_its_columns_is_refused() -> None:
    with pytest.raises(ConfigError, match="3 tokens are too few for batch_size=2"):
        columns(np.arange(3), 2)


@pytest.mark.parametrize("length", [1, 4, 5, 100])
def test_windows_predict_every_row_but_the_first_once(length: int) -> None:
    rows = columns(np.arange(20), 2)
    pairs = list(windows(rows, length))
    assert torch.equal(torch.cat([inputs for inputs, _ in pairs]), rows[:-1])
    assert torch.equal(torch.cat([targets for _, targets in pairs]), rows[1:])


def test_window_lengths_are_drawn_as_published() -> None:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.tensor([draw_length(TrainingSettings(), generator) for _ in range(20_000)], dtype=torch.float64)
    is_half = drawn < 52.5  # 3.5 standard deviations from either mean
    assert is_half.double().mean().item() == pytest.approx(0.05, abs=0.006)  # 4 standard errors
    assert drawn[~is_half].mean().item() == pytest.approx(69.5, abs=0.2)  # truncation takes a half
    assert drawn[is_half].mean().item() == pytest.approx(34.5, abs=0.7)
    assert drawn[~is_half].std().item() == pytest.approx(5, abs=0.2)


def test_window_lengths_stay_in_their_bounds() -> None:
    generator = torch.Generator().manual_seed(0)
    settings = TrainingSettings(bptt=10, max_extra_bptt=3)
    drawn = [draw_length(settings, generator) for _ in range(2000)]
    assert (min(drawn), max(drawn)) == (SHORTEST, 13)
    assert {draw_length(TrainingSettings(has_variable_bptt=False), generator) for _ in range(9)} == {70}
