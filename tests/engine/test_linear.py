"""Resident 16-bit layers that compute in fp32: few tokens, many, other dtypes, refusals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flashlm.engine.linear import WideningLinear, widen_linears
from flashlm.errors import ConfigError
from flashlm.rows import kernels

DTYPES = (torch.bfloat16, torch.float16)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 3), max_size=2),
    num_tokens=st.integers(0, 40),
    sizes=st.tuples(st.integers(1, 200), st.integers(1, 200)),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
    is_strided=st.booleans(),
)
@torch.no_grad()
def test_products_are_those_in_fp64_rounded_once(shape, num_tokens, sizes, dtype, has_bias, is_strided) -> None:
    inputs, outputs = sizes
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=has_bias, dtype=dtype))
    assert widen_linears(model) == 1
    x = torch.randn(*shape, num_tokens, 2 * inputs if is_strided else inputs).to(dtype)[..., :inputs]
    found = model(x)
    assert (found.dtype, found.shape) == (dtype, (*shape, num_tokens, outputs))
    layer = model[0]
    exact = x.double() @ layer.weight.double().T + (layer.bias.double() if has_bias else 0.0)
    scale = x.double().abs() @ layer.weight.double().abs().T + 1.0
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() + 1e-6 * scale).all()


@pytest.mark.parametrize("dtype", DTYPES)
@torch.no_grad()
def test_a_token_has_the_same_bits_alone_and_among_a_few(dtype: torch.dtype) -> None:
    layer = nn.Linear(96, 80, dtype=dtype)
    widen_linears(nn.Sequential(layer))
    assert isinstance(layer, WideningLinear)
    x = torch.randn(1, kernels.MAX_TOKENS, 96).to(dtype)
    together = layer(x)
    assert all(torch.equal(layer(x[:, at : at + 1]), together[:, at : at + 1]) for at in range(kernels.MAX_TOKENS))


@torch.no_grad()
def test_an_input_of_another_dtype_keeps_it() -> None:
    layer = nn.Linear(8, 4, dtype=torch.bfloat16)
    widen_linears(nn.Sequential(layer))
    x = torch.randn(2, 8)
    found = layer(x)
    assert found.dtype == torch.float32
    expected = x @ layer.weight.float().T + layer.bias.float()
    assert torch.allclose(found, expected, atol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    weight = torch.zeros(4, 8, dtype=torch.bfloat16)
    for x in (torch.zeros(1, 8), torch.zeros(1, 7).bfloat16(), torch.zeros(kernels.MAX_TOKENS + 1, 8).bfloat16()):
        with pytest.raises(ConfigError, match="expected"):
            kernels.linear(x, weight, None)
    with pytest.raises(ConfigError, match="contiguous"):
        kernels.linear(torch.zeros(1, 4).bfloat16(), weight.T, None)
    for bias in (torch.zeros(3), torch.zeros(1), torch.zeros(4, dtype=torch.bfloat16)):
        with pytest.raises(ConfigError, match="bias must be"):
            kernels.linear(torch.zeros(1, 8), torch.zeros(4, 8), bias)
