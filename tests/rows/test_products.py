"""Matrix products in fp32: what oneDNN takes, and what torch's own product takes in its place."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from flashlm.memory.limits import process_bytes
from flashlm.rows.products import fp32_linear

EPS = 2.0**-24


def is_product(found: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> bool:
    return torch.allclose(found, F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("cut", [lambda both: both[::2], lambda both: both[:1].expand(48), lambda both: both[48:]])
def test_a_bias_may_lie_in_any_way(cut: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """oneDNN reads the elements of a bias side by side, whatever its stride says."""
    x, weight, bias = torch.randn(20, 1024), torch.randn(48, 1024), cut(torch.randn(96))
    assert is_product(fp32_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("is_transposed", [False, True])
def test_rows_that_lie_apart_take_torchs_own_product(is_transposed: bool) -> None:
    """As blocks of plain rows do: oneDNN has only its reference loop for them."""
    rows = torch.randn(64, 3 * 256)[:, 256:512]
    weight = rows.t() if is_transposed else rows
    x = torch.randn(256, weight.shape[1])
    assert torch.equal(fp32_linear(x, weight), F.linear(x, weight))


def test_prompts_of_many_lengths_leave_no_memory_behind() -> None:
    """oneDNN keeps code of every shape."""
    weight, x = torch.randn(80, 600), torch.randn(300, 600)
    for num_tokens in (32, 64, 96, 300):
        fp32_linear(x[:num_tokens], weight)
    before = process_bytes()
    for num_tokens in range(40, 120):
        fp32_linear(x[:num_tokens], weight)
    assert process_bytes() - before < 16 << 20


@pytest.mark.parametrize("num_tokens", [1, 32, 127, 128, 129, 300])
def test_any_number_of_tokens_is_multiplied(num_tokens: int) -> None:
    weight, x, bias = torch.randn(80, 600), torch.randn(num_tokens, 600), torch.randn(80)
    assert is_product(fp32_linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("shape", [(0, 64, 48), (20, 0, 48), (20, 64, 0)])
def test_there_may_be_nothing_to_multiply(shape: tuple[int, int, int]) -> None:
    num_tokens, num_inputs, num_outputs = shape
    x, weight, bias = (
        torch.randn(num_tokens, num_inputs),
        torch.randn(num_outputs, num_inputs),
        torch.randn(num_outputs),
    )
    assert torch.equal(fp32_linear(x, weight, bias), F.linear(x, weight, bias))


@pytest.mark.parametrize("which", [0, 1, 2])
def test_whatever_wants_a_gradient_gets_one(which: int) -> None:
    given = [torch.randn(20, 64), torch.randn(48, 64), torch.randn(48)]
    given[which] = nn.Parameter(given[which])
    fp32_linear(*given).sum().backward()
    assert given[which].grad is not None
    with torch.no_grad():
        assert is_product(fp32_linear(*given), *given)


def test_it_is_traced_as_torchs_own_product() -> None:
    x, weight, bias = torch.randn(20, 64), torch.randn(48, 64), torch.randn(48)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit's
        traced = torch.jit.trace(lambda tokens: fp32_linear(tokens, weight, bias), x)
    assert is_product(traced(x[:7]), x[:7], weight, bias)


@settings(deadline=None, max_examples=40)
@given(
    num_tokens=st.sampled_from([0, 1, 17, 130]),
    num_inputs=st.integers(1, 1100),
    num_rows=st.integers(1, 70),
    strides=st.sampled_from(["dense", "gaps", "transposed"]),
    has_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_products_are_those_of_float64(
    num_tokens: int, num_inputs: int, num_rows: int, strides: str, has_bias: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, num_inputs, generator=random)
    weight = torch.randn(num_rows, num_inputs + 3 * (strides == "gaps"), generator=random)[:, :num_inputs]
    if strides == "transposed":
        weight = weight.t().contiguous().t()
    bias = torch.randn(num_rows, generator=random) if has_bias else None
    exact = x.double() @ weight.double().t() + (0 if bias is None else bias.double())
    bound = (
        (num_inputs + 2) * EPS * (x.double().abs() @ weight.double().abs().t() + (0 if bias is None else bias.abs()))
    )
    assert ((fp32_linear(x, weight, bias).double() - exact).abs() <= bound).all()


def test_autocast_is_torchs_own() -> None:
    x, weight = torch.randn(64, 512), torch.randn(32, 512)
    with torch.no_grad(), torch.autocast("cpu"):
        assert torch.equal(fp32_linear(x, weight), F.linear(x, weight))
