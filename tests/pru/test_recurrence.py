"""The time loop: native gates against the loop written in torch, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from flashlm.errors import ConfigError
from flashlm.pru import products, recurrence
from flashlm.pru.recurrence import run_dense, run_grouped

Tensors = list[torch.Tensor]


def layer(dtype: torch.dtype, groups: int, size: int, num_steps: int = 6, batch: int = 3) -> Tensors:
    """Return gates, weight, h0 and c0, to be differentiated."""
    generator = torch.Generator().manual_seed(groups + size)
    hidden = groups * size
    shapes = [(num_steps, batch, 4 * hidden), (groups, size, 4 * size), (batch, hidden), (batch, hidden)]
    parts = [torch.randn(*shape, generator=generator) * (0.3 if len(shape) == 3 else 1) for shape in shapes]
    dtypes = [dtype, dtype, torch.float32, torch.float32]
    return [part.to(each).requires_grad_() for part, each in zip(parts, dtypes, strict=True)]


def results(inputs: Tensors, wanted: str, monkeypatch: pytest.MonkeyPatch, is_native: bool) -> Tensors:
    """Return outputs, last h, last c, and the inputs' gradients by what is `wanted` of the three."""
    with monkeypatch.context() as patch:
        if not is_native:
            patch.setattr(recurrence, "has_native_gates", lambda weight, state: False)
        outputs = dict(zip(["y", "h", "c"], run_grouped(*inputs), strict=True))
    loss = sum((outputs[name].float() * torch.arange(1, 1 + outputs[name].numel()).view_as(outputs[name]).sin()).sum()
               for name in wanted)  # fmt: skip
    assert isinstance(loss, torch.Tensor)
    return [*outputs.values(), *torch.autograd.grad(loss, inputs, allow_unused=True)]


@pytest.mark.parametrize("wanted", ["y", "h", "c", "yhc"])
@pytest.mark.parametrize(("groups", "size", "num_steps"), [(1, 5, 6), (2, 16, 6), (4, 19, 6), (3, 33, 1)])
def test_native_gates_equal_torchs(
    groups: int, size: int, num_steps: int, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = layer(torch.float32, groups, size, num_steps)
    for got, expected in zip(
        results(inputs, wanted, monkeypatch, True), results(inputs, wanted, monkeypatch, False), strict=True
    ):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("groups", "size"), [(2, 16), (3, 5)])
def test_weights_laid_out_beforehand_change_nothing(groups: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer(torch.float32, groups, size)
    expected = results(inputs, "yhc", monkeypatch, False)
    made = []

    class Noted(products.RepeatedProduct):
        def __call__(self, *args: torch.Tensor) -> torch.Tensor:
            made.append(self._laid_out is not None)
            return super().__call__(*args)

    monkeypatch.setattr(recurrence, "RepeatedProduct", Noted)
    has_onednn = all(hasattr(torch.ops.mkldnn, name) for name in ("_linear_pointwise", "_reorder_linear_weight"))
    monkeypatch.setattr(products, "mkl_is_slow", lambda: has_onednn)
    monkeypatch.setattr(products, "_LEAST_REPEATED_FLOPS", 1)
    monkeypatch.setattr(products, "_LEAST_REPEATED_ROWS", 1)
    for got, reference in zip(results(inputs, "yhc", monkeypatch, True), expected, strict=True):
        torch.testing.assert_close(got, reference, rtol=1e-5, atol=1e-5)
    assert made == [has_onednn] * 12  # six steps, both ways


def test_native_gates_in_bf16_are_as_near_to_fp32_as_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = layer(torch.bfloat16, 2, 24)
    wide = [x.detach().float().requires_grad_() for x in inputs]
    exact = results(wide, "yc", monkeypatch, False)
    ours, theirs = (results(inputs, "yc", monkeypatch, is_native) for is_native in (True, False))
    for got, other, expected in zip(ours, theirs, exact, strict=True):
        error, their_error = ((x.float() - expected).norm() / expected.norm() for x in (got, other))
        assert error <= 1.2 * their_error + 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # native gates, and torch's
def test_second_derivatives_are_refused_and_not_wrong(dtype: torch.dtype) -> None:
    inputs = [x.detach().to(dtype).requires_grad_() for x in layer(torch.float32, 2, 8)]
    y, _, _ = run_grouped(*inputs)
    with pytest.raises(ConfigError, match="take path='folded'"):
        torch.autograd.grad(y.sum(), inputs[0], create_graph=True)


@pytest.mark.parametrize(("groups", "batch"), [(1, 3), (2, 3), (2, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_may_be_written_to_before_going_backward(dtype: torch.dtype, groups: int, batch: int) -> None:
    inputs = layer(dtype, groups, 8, batch=batch)
    with torch.no_grad():
        y, h, _ = run_grouped(*inputs)
        before = h.clone()
        y.zero_()
        assert torch.equal(h, before)
    y, _, _ = run_grouped(*inputs)
    expected = torch.autograd.grad(y.sum(), inputs[0])[0]
    y, _, c = run_grouped(*inputs)
    y.mul_(1.0)
    assert torch.equal(torch.autograd.grad(y.sum(), inputs[0])[0], expected)
    grad_c = torch.ones_like(c)
    y, _, c = run_grouped(*inputs)
    torch.autograd.grad(c, inputs[0], grad_c)
    assert torch.equal(grad_c, torch.ones_like(c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_results_are_the_same(dtype: torch.dtype) -> None:
    inputs = layer(dtype, 2, 9)
    expected = run_grouped(*inputs)
    with torch.no_grad():
        got = run_grouped(*inputs)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
        assert not one.requires_grad


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_default_dtype_changes_nothing(dtype: torch.dtype, default: torch.dtype) -> None:
    inputs = layer(dtype, 2, 40)
    expected = run_grouped(*inputs)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        got = run_grouped(*inputs)
        gradients = torch.autograd.grad(got[0].sum(), inputs)
    finally:
        torch.set_default_dtype(before)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(gradients, torch.autograd.grad(expected[0].sum(), inputs), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_going_backward_under_autocast_changes_nothing(
    dtype: torch.dtype, is_native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_native:
        monkeypatch.setattr(recurrence, "has_native_gates", lambda weight, state: False)
    inputs = layer(dtype, 2, 40)
    expected = torch.autograd.grad(run_grouped(*inputs)[0].sum(), inputs)
    for autocast in (torch.bfloat16, torch.float16):
        y = run_grouped(*inputs)[0]
        with torch.autocast("cpu", autocast):
            got = torch.autograd.grad(y.sum(), inputs)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


def test_forward_mode_is_refused_and_not_silently_zero() -> None:
    inputs = [x.detach() for x in layer(torch.float32, 2, 8)]
    with torch.autograd.forward_ad.dual_level():
        inputs[0] = torch.autograd.forward_ad.make_dual(inputs[0], torch.ones_like(inputs[0]))
        with pytest.raises(RuntimeError, match="jvp"):
            run_grouped(*inputs)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore:.*jit.trace.*")
def test_a_trace_computes_what_was_traced() -> None:
    inputs = [x.detach() for x in layer(torch.float32, 2, 8)]
    with torch.no_grad():
        traced = torch.jit.trace(lambda *x: run_grouped(*x)[0], inputs, check_trace=False)
        other = [x + 0.1 for x in inputs]
        torch.testing.assert_close(traced(*other), run_grouped(*other)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
def test_an_lstms_layer_through_the_same_loop(has_bias: bool) -> None:
    torch.manual_seed(0)
    lstm = torch.nn.LSTM(6, 8, bias=has_bias)
    x, state = torch.randn(5, 3, 6), (torch.randn(1, 3, 8), torch.randn(1, 3, 8))
    expected, (h, c) = lstm(x, state)
    got = run_dense(x, list(lstm.all_weights[0]), state[0][0], state[1][0])
    for one, other in zip(got, (expected, h[0], c[0]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    for one, other in zip(
        torch.autograd.grad(got[0].square().sum(), lstm.parameters()),
        torch.autograd.grad(expected.square().sum(), lstm.parameters()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("has_gradients", [False, True])
def test_a_recorded_graph_has_the_whole_loop(has_gradients: bool) -> None:
    """Native calls would not be in it, and what they leave behind in the trace would be passed off as the result."""
    inputs = [x.detach() for x in layer(torch.float32, 2, 8)]
    with torch.set_grad_enabled(has_gradients):
        graph = make_fx(lambda *args: run_grouped(*args)[0])(*inputs)
        inputs[0] = inputs[0] + 1
        torch.testing.assert_close(graph(*inputs), run_grouped(*inputs)[0], rtol=1e-5, atol=1e-5)
