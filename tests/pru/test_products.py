"""Products by oneDNN against float64, in value, gradient and second derivative."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from flashlm.pru import products
from flashlm.pru.products import linear

EPS = 2.0**-24


@pytest.fixture(autouse=True)
def always_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_LEAST_FLOPS", 1)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 7), (3, 4, 33), (1, 1)])
def test_value_and_gradients(shape: tuple[int, ...], has_bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = [shape, (19, shape[-1])] + ([(19,)] if has_bias else [])
    inputs = [torch.randn(size, generator=generator).requires_grad_() for size in sizes]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    y, exact = (f(*xs, *([] if has_bias else [None])) for f, xs in ((linear, inputs), (F.linear, wide)))
    assert type(y.grad_fn).__name__ != "AddmmBackward0"
    weights = torch.randn(exact.shape, generator=generator, dtype=torch.float64)
    grads = torch.autograd.grad((y * weights).sum(), inputs)
    expected = torch.autograd.grad((exact * weights).sum(), wide)
    num_terms = max(shape[-1], 19, y[..., 0].numel())
    for got, reference in zip([y, *grads], [exact, *expected], strict=True):
        bound = 4 * num_terms * EPS * max(1.0, reference.abs().max().item()) + 1e-6
        torch.testing.assert_close(got.double(), reference, rtol=0, atol=bound)


def test_second_derivatives() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    results = []
    for function in (linear, F.linear):
        (first,) = torch.autograd.grad(function(x, weight, None).square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), [x, weight]))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_functional_transforms_work() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(3, 4, 6), torch.randn(5, 6)
    expected = x @ weight.t()
    torch.testing.assert_close(torch.func.vmap(lambda one: linear(one, weight, None))(x), expected)
    _, tangent = torch.func.jvp(lambda w: linear(x, w, None), (weight,), (weight,))
    torch.testing.assert_close(tangent, expected)


def test_batched_products() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(3, 9, 4).transpose(1, 2), torch.randn(3, 9, 7)
    got = products.batched_product(a, b)
    torch.testing.assert_close(got.double(), torch.bmm(a.double(), b.double()), rtol=1e-5, atol=1e-5)


def test_strided_inputs() -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(6, 8, 3).transpose(0, 2)[:, ::2], torch.randn(6, 10).t()
    torch.testing.assert_close(linear(x, weight, None), F.linear(x, weight), rtol=1e-5, atol=1e-5)


def test_small_products_and_other_dtypes_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_LEAST_FLOPS", 1 << 20)
    weight = torch.randn(5, 6, requires_grad=True)
    assert type(linear(torch.randn(4, 6), weight, torch.randn(5)).grad_fn).__name__ == "AddmmBackward0"
    wide = weight.detach().double().requires_grad_()
    assert linear(torch.randn(4000, 6, dtype=torch.float64), wide, None).dtype == torch.float64
