"""The time loop: native gates against the loop written in torch, forward and backward."""

from __future__ import annotations

import pytest
import torch

from flashlm.errors import ConfigError
from flashlm.pru import recurrence
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


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_outputs_may_be_written_to_before_going_backward(dtype: torch.dtype, groups: int) -> None:
    inputs = layer(dtype, groups, 8)
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
