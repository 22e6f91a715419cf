"""fp32 products of many rows on the CPU, by whichever of torch's two libraries is the faster on this processor.

torch multiplies fp32 matrices with MKL, which leaves half of the rate of AMD's processors with AVX-512 unused; oneDNN, which
torch carries too, does not: 436 against 216 GFLOP/s on two cores (docs/experiments.md). The choice is by processor and size
alone, never by timing, so a resumed run multiplies as it did before.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_LEAST_FLOPS = 1 << 25  # below, a call costs more than it saves


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x @ weight.T (+ bias), differentiable as often and in all ways as `torch.nn.functional.linear`.

    Args:
        x: (..., in).
        weight: (out, in).
        bias: (out,).
    """
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    y: torch.Tensor = _Product.apply(x.reshape(-1, x.shape[-1]), weight)  # type: ignore[no-untyped-call]
    return (y if bias is None else y + bias).view(*x.shape[:-1], len(weight))


def batched_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return a @ b of (g, n, k) and (g, k, m) as `torch.bmm`; outside autograd."""
    if not _is_for_onednn(a[0], b[0].t()):
        return torch.bmm(a, b)
    return torch.stack([_onednn_product(one, other.t()) for one, other in zip(a, b, strict=True)])


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ weight.T + bias, (..., out_features)."""
        return linear(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """a (n, k), b (m, k) → a @ b.T (n, m); any strides."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return _onednn_product(a, b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        grad_a = _Product.apply(grad, b.t()) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        grad_b = _Product.apply(grad.t(), a.t()) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
        return grad_a, grad_b


def _onednn_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    # rows with gaps between them send oneDNN to its reference code, a hundred times slower
    a, b = (x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous() for x in (a, b))
    product: torch.Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
    return product


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return bool(
        not torch.compiler.is_compiling()
        and torch._C._get_tracing_state() is None
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch.autograd.forward_ad._current_level < 0
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and 2 * x.numel() * len(weight) >= _LEAST_FLOPS
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkldnn.enabled
        and mkl_is_slow()
    )


@cache
def mkl_is_slow() -> bool:
    """Whether this is a processor of the kind on which oneDNN was measured to be twice as fast as MKL."""
    if torch.backends.cpu.get_cpu_capability() != "AVX512" or not torch.backends.mkl.is_available():  # type: ignore[no-untyped-call]
        return False
    try:
        vendor = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return vendor and hasattr(torch.ops.mkldnn, "_linear_pointwise")
