"""Products by oneDNN and by the row kernel against float64; oneDNN's in gradient and second derivative too."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from flashlm.pru import products
from flashlm.pru.products import Linear, RepeatedProduct, linear

EPS = 2.0**-24
Change = Callable[[torch.dtype], AbstractContextManager[None]]


@pytest.fixture(autouse=True)
def always_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this build of torch has no oneDNN")
    monkeypatch.setattr(products, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(products, "_LEAST_FLOPS", 1)
    monkeypatch.setattr(products, "_LEAST_REPEATED_FLOPS", 1)
    monkeypatch.setattr(products, "_LEAST_REPEATED_ROWS", 1)


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


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("groups", "rows", "inputs", "outputs"), [(3, 5, 7, 20), (1, 1, 33, 2), (4, 20, 16, 64)])
def test_repeated_products(groups: int, rows: int, inputs: int, outputs: int, is_transposed: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(groups, inputs, outputs)
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous().transpose(1, 2)
    repeated = RepeatedProduct(weight, rows, 3)
    assert repeated._laid_out is not None
    for _ in range(3):
        x, summand = torch.randn(groups, rows, inputs), torch.randn(groups, rows, outputs)
        exact, before = torch.bmm(x.double(), weight.double()), summand.clone()
        for got, expected in ((repeated(x), exact), (repeated(x, summand), exact + before.double())):
            assert got.is_contiguous()
            torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(summand, before)


@pytest.mark.parametrize("reason", ["few rows", "small", "bf16", "autocast"])
def test_repeated_products_are_torchs_where_laying_out_does_not_pay(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_LEAST_REPEATED_FLOPS", 2 * 5 * 8 * 12)
    monkeypatch.setattr(products, "_LEAST_REPEATED_ROWS", 15)
    weight = torch.randn(2, 8, 12, dtype=torch.bfloat16 if reason == "bf16" else torch.float32)
    with torch.autocast("cpu", torch.bfloat16, enabled=reason == "autocast"):
        repeated = RepeatedProduct(weight, 4 if reason == "small" else 5, 2 if reason == "few rows" else 4)
    assert repeated._laid_out is None
    x = torch.randn(2, 5, 8, dtype=weight.dtype)
    assert torch.equal(repeated(x), torch.bmm(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("shape", [(37,), (1, 37), (2, 2, 37)])
def test_a_few_tokens_of_inference_by_the_row_kernel(
    shape: tuple[int, ...], has_bias: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    layer, x = Linear(37, 50, bias=has_bias, dtype=dtype), torch.randn(shape, dtype=dtype)
    monkeypatch.setattr(products, "linear", None)  # not called
    with torch.no_grad():
        got = layer(x)
        expected = F.linear(x.double(), layer.weight.double(), None if layer.bias is None else layer.bias.double())
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_the_row_kernel_whatever_dtype_is_default(default: torch.dtype, default_dtype: Change) -> None:
    torch.manual_seed(0)
    layer, x = Linear(64, 1000), torch.randn(2, 64)
    expected = F.linear(x, layer.weight, layer.bias).detach()
    with torch.no_grad(), default_dtype(default):
        got = layer(x)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def rows_by_kernel(layer: torch.nn.Module, x: torch.Tensor) -> bool:
    """Whether a call without gradients goes to the row kernel."""
    calls = []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(products.kernels, "linear", lambda *args: calls.append(args) or F.linear(*args))
        layer(x)
    return bool(calls)


@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, 8), (torch.bfloat16, 4), (torch.float16, 4), (torch.float64, 0)]
)
def test_how_many_tokens_go_to_the_row_kernel(dtype: torch.dtype, most: int) -> None:
    layer = Linear(6, 5, dtype=dtype)
    found = [count for count in range(1, 12) if rows_by_kernel(layer, torch.randn(count, 6, dtype=dtype))]
    assert found == list(range(1, most + 1))


def test_observers_see_torchs_own_operations() -> None:
    torch.manual_seed(0)
    layer, x = Linear(6, 5), torch.randn(2, 6)
    expected = F.linear(x, layer.weight, layer.bias)
    assert layer(x).requires_grad
    torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(layer)(x), expected)
        graph = make_fx(layer)(x)
        torch.testing.assert_close(graph(x + 1), F.linear(x + 1, layer.weight, layer.bias))
        assert torch.jit.trace(layer, x, check_trace=False)(torch.ones(3, 6)).shape == (3, 5)
        with FlopCounterMode(display=False) as counter:
            layer(x)
        assert counter.get_total_flops() == 2 * 2 * 6 * 5
        with FakeTensorMode() as mode:
            assert Linear(6, 5)(mode.from_tensor(x)).shape == (2, 5)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16


class Tagged(torch.Tensor):
    """A subclass, as quantizers and distributed weights are."""


def test_what_is_not_in_memory_as_it_reads_is_torchs() -> None:
    torch.manual_seed(0)
    layer, x = Linear(6, 5), torch.randn(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(layer(torch._neg_view(x)), F.linear(-x, layer.weight, layer.bias))
        assert isinstance(layer(x.as_subclass(Tagged)), Tagged)
        tagged = Linear(6, 5)
        tagged.weight = torch.nn.Parameter(tagged.weight.as_subclass(Tagged))
        assert isinstance(tagged(x), Tagged)
        layer.weight.data = layer.weight.t().contiguous().t()  # not laid out row by row
    assert not rows_by_kernel(layer, x)


def test_sizes_that_do_not_fit_are_torchs_errors() -> None:
    layer, x = Linear(6, 5), torch.randn(2, 6)
    with torch.no_grad():
        for wrong in (torch.randn(2, 7), x.double()):
            with pytest.raises(RuntimeError):
                layer(wrong)
        layer.weight = torch.nn.Parameter(torch.randn(50, 6))  # tied to more words than the bias has
        with pytest.raises(RuntimeError):
            layer(x)
        layer.bias = torch.nn.Parameter(torch.randn(1))
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        for inputs, outputs in ((0, 5), (6, 0)):
            with warnings.catch_warnings(action="ignore"):  # nothing to initialise
                assert Linear(inputs, outputs)(torch.randn(2, inputs)).shape == (2, outputs)


def test_rows_with_gaps_and_no_rows() -> None:
    layer, x = Linear(6, 5), torch.randn(6, 2).t()
    with torch.no_grad():
        assert rows_by_kernel(layer, x)
        torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
        assert layer(torch.randn(0, 6)).shape == (0, 5)


def test_onednn_switched_off_is_not_used() -> None:
    x, weight = torch.randn(4, 6), torch.randn(5, 6, requires_grad=True)
    torch._C._set_mkldnn_enabled(False)  # torch.backends.mkldnn.flags warns of GPUs
    try:
        assert type(linear(x, weight, torch.randn(5)).grad_fn).__name__ == "AddmmBackward0"
        assert RepeatedProduct(torch.randn(2, 6, 5), 4, 3)._laid_out is None
    finally:
        torch._C._set_mkldnn_enabled(True)
