"""What is written as q8_0 is what GGUF's reference quantiser writes, byte for byte."""

from __future__ import annotations

import math

import gguf
import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm.errors import ConfigError
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.quantize import QUANTIZERS

Q8_0 = ENCODINGS["q8_0"]


def quantize(weights: torch.Tensor, padding: int = 0) -> np.ndarray:
    num_bytes = Q8_0.bytes_of(weights.shape[1])
    target = torch.full((len(weights), num_bytes + padding), 255, dtype=torch.uint8)
    QUANTIZERS["q8_0"](weights, target[:, :num_bytes])
    assert (target[:, num_bytes:] == 255).all()
    return target[:, :num_bytes].numpy()


def reference(weights: torch.Tensor) -> np.ndarray:
    return gguf.quants.quantize(weights.numpy(), gguf.GGMLQuantizationType.Q8_0)


@given(
    num_rows=st.integers(0, 9),
    num_groups=st.integers(1, 9),
    exponents=st.tuples(st.integers(-30, 5), st.integers(-30, 5)),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    padding=st.integers(0, 5),
    seed=st.integers(0, 2**16),
)
def test_bytes_are_the_references(num_rows, num_groups, exponents, dtype, padding, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(num_rows, num_groups, 32, generator=generator)
    scales = torch.randint(min(exponents), max(exponents) + 1, (num_rows, num_groups, 1), generator=generator)
    weights = (weights * 10.0**scales).to(dtype).float().view(num_rows, 32 * num_groups)
    weights.clamp_(-60000, 60000)
    np.testing.assert_array_equal(quantize(weights, padding), reference(weights))


@given(st.lists(st.floats(-127, 127, width=32), min_size=31, max_size=31))
@example([step / 2 for step in range(-15, 16)])  # halves: away from zero
@example([math.nextafter(0.5, 0)] * 31)
@example([0.0] * 31)
def test_ties_are_rounded_as_there(values: list[float]) -> None:
    weights = torch.tensor([[127.0, *values], [0.0] * 32, [1e-30] * 32], dtype=torch.float32)
    np.testing.assert_array_equal(quantize(weights), reference(weights))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 127 * 65520.0, -1e30])
def test_what_it_can_not_hold_is_refused(value: float) -> None:
    weights = torch.ones(3, 64)
    weights[1, 40] = value
    with pytest.raises(ConfigError, match="q8_0 holds no infinity, no NaN"):
        quantize(weights)
    weights[1, 40] = 127 * 65519.0
    assert np.isfinite(gguf.quants.dequantize(quantize(weights), gguf.GGMLQuantizationType.Q8_0)).all()


def test_arrays_that_do_not_fit_are_refused() -> None:
    target = torch.empty(2, 68, dtype=torch.uint8)
    for source, where, message in (
        (torch.ones(2, 48), target, "whole groups"),
        (torch.ones(2, 64, dtype=torch.bfloat16), target, "float32"),
        (torch.ones(64, 2).t(), target, "contiguous"),
        (torch.ones(2, 64), target[:, :34], "target must be"),
        (torch.ones(2, 64), target[:1].expand(2, 68), "rows apart"),
        (torch.ones(2, 64), target.view(torch.int8), "target must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            QUANTIZERS["q8_0"](source, where)
