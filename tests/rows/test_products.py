"""Products in fp32, by whichever library: against float64, whatever the strides; where torch must see them, by torch."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flashlm.rows.products import fp32_linear

EPS = 2.0**-24


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


def test_what_torch_must_see_is_left_to_torch() -> None:
    x, weight = torch.randn(64, 512), torch.randn(32, 512)
    x.requires_grad_(True)
    fp32_linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, weight.sum(dim=0).expand(64, -1), atol=1e-4)
    with torch.no_grad(), torch.autocast("cpu"):
        assert torch.equal(fp32_linear(x, weight), F.linear(x, weight))
        assert fp32_linear(x, weight).dtype == torch.bfloat16
