"""The gates of an LSTM step at every instruction set of this machine, against float64 and against torch's gradients."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm import _native
from flashlm.errors import ConfigError
from flashlm.pru.gate_kernels import StepGates, backward_step, has_native_gates, lstm_gates

BF16_EPS = 2.0**-8  # unit roundoff of bf16's 8 bits


@pytest.fixture(autouse=True, params=_native.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_simd_level(request.param)
    yield request.param
    _native.set_simd_level(None)


def exact(gates: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h' and c' in float64."""
    i, f, g, o = gates.double().chunk(4, dim=-1)
    c_next = f.sigmoid() * c.double() + i.sigmoid() * g.tanh()
    return o.sigmoid() * c_next.tanh(), c_next


@pytest.mark.parametrize(("batch", "size"), [(1, 1), (3, 7), (8, 300)])
def test_a_step_of_inference(batch: int, size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    first, second = (4 * torch.randn(batch, 4 * size, generator=generator) for _ in range(2))
    first[0, 0], first[-1, -1] = 200.0, -200.0  # saturated
    c = torch.randn(batch, size, generator=generator)
    h_next, c_next = lstm_gates(first, second, c)
    exact_h, exact_c = exact(first.double() + second.double(), c)
    torch.testing.assert_close(c_next.double(), exact_c, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(h_next.double(), exact_h, rtol=2e-6, atol=2e-6)


def test_small_gates_keep_their_digits() -> None:
    gates = torch.zeros(1, 4 * 40)
    gates[:, 80:120] = torch.logspace(-30, 0, 40)  # tanh(x) is x there
    _, c_next = lstm_gates(gates, torch.zeros_like(gates), torch.zeros(1, 40))
    torch.testing.assert_close(c_next.double(), 0.5 * gates[:, 80:120].double().tanh(), rtol=1e-6, atol=0)


def test_a_nan_stays_one_and_infinities_saturate() -> None:
    gates, c = torch.zeros(1, 4 * 20), torch.ones(1, 20)
    gates[0, 3], gates[0, 44], gates[0, 25], gates[0, 6] = float("nan"), float("nan"), float("inf"), float("-inf")
    h_next, c_next = lstm_gates(gates, torch.zeros_like(gates), c)
    assert torch.nonzero(c_next.isnan())[:, 1].tolist() == [3, 4]
    assert torch.nonzero(h_next.isnan())[:, 1].tolist() == [3, 4]
    assert c_next[0, 5] == 1.0  # forgets nothing
    assert c_next[0, 6] == 0.5  # takes nothing in
    steps = StepGates(torch.bfloat16, torch.zeros(1, 20), c, 1)
    steps.forward(0, gates.bfloat16())
    assert torch.nonzero(steps.h_low[1].isnan())[:, 1].tolist() == [3, 4]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.integers(1, 5),
    size=st.integers(1, 70),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**16),
)
def test_training_forward_and_backward(batch: int, size: int, dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    gates, h0, c0 = (3 * draw(batch, 4 * size)).to(dtype), draw(batch, size), draw(batch, size)
    steps = StepGates(dtype, h0, c0, 1)
    steps.forward(0, gates)
    with torch.enable_grad():
        wide, before = gates.double().requires_grad_(), c0.double().requires_grad_()
        exact_h, exact_c = exact(wide, before)
    torch.testing.assert_close(steps.c[1].double(), exact_c, rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(steps.h[1].double(), exact_h, rtol=2e-6, atol=2e-6)
    assert torch.equal(steps.h_low[1], steps.h[1].to(dtype))  # rounded as torch rounds

    grad_h, grad_h_next, grad_c = draw(batch, size), draw(batch, size).to(dtype), draw(batch, size)
    grad_gates, grad_c_before = torch.full((batch, 4 * size), float("nan"), dtype=dtype), torch.empty(batch, size)
    backward_step(steps.activations[0], c0, steps.c[1], grad_h, grad_h_next, grad_c, grad_gates, grad_c_before)
    grads = torch.autograd.grad(
        [exact_h, exact_c], [wide, before], [grad_h.double() + grad_h_next.double(), grad_c.double()]
    )
    relative = 1e-5 if dtype == torch.float32 else BF16_EPS
    torch.testing.assert_close(grad_gates.double(), grads[0], rtol=relative, atol=1e-5)
    torch.testing.assert_close(grad_c_before.double(), grads[1], rtol=1e-5, atol=1e-5)


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="context_gates must be"):
        lstm_gates(torch.ones(1, 8), torch.ones(1, 7), torch.ones(1, 2))
    assert not has_native_gates(torch.ones(1, dtype=torch.float16), torch.ones(1))
    steps = StepGates(torch.float32, torch.zeros(1, 2), torch.zeros(1, 2), 1)
    with pytest.raises(ConfigError, match="gates must be float32 or bfloat16"):
        steps.forward(0, torch.ones(1, 8).half())
    with pytest.raises(ConfigError, match="gates must be contiguous float32 of 8 elements"):
        steps.forward(0, torch.ones(1, 7))
    good = [torch.ones(1, 8), *(torch.ones(1, 2) for _ in range(5)), torch.empty(1, 8), torch.empty(1, 2)]
    names = ("activations", "c_next", "grad_h", "grad_h_next", "grad_c", "grad_gates", "grad_c_before")
    for position, name in zip((0, 2, 3, 4, 5, 6, 7), names, strict=True):
        for bad in (good[position].double(), good[position][:, :1], good[position].to("meta")):
            with pytest.raises(ConfigError, match="gates must be" if name == "grad_gates" else name):
                backward_step(*good[:position], bad, *good[position + 1 :])
