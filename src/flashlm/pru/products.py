"""Products with dense matrices on the CPU, by whoever is fastest at them.

Many rows in fp32: torch multiplies with MKL, which leaves half of the rate of AMD's processors with AVX-512 unused; oneDNN,
which torch carries too, does not: 436 against 216 GFLOP/s on two cores (docs/experiments.md). The choice is by processor and
size alone, never by timing, so a resumed run multiplies as it did before.

A few rows in inference: the row kernel. It is as fast as torch by itself; but torch's threads spin on for a while after a
product, and so do the kernels', so a model that changes between the two loses a third of its time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flashlm.pru.observers import has_tangents, is_in_memory, is_recorded, is_transformed
from flashlm.rows import kernels
from flashlm.rows.onednn import mkl_is_slow, onednn_product

# Tokens of a call up to which the row kernel is the faster one in a model (docs/experiments.md).
FEW_TOKENS = {torch.float32: 8, torch.bfloat16: 4, torch.float16: 4}
_LEAST_FLOPS = 1 << 25  # below, a call costs more than it saves
# Below these, flops of one product and rows of all, laying the weight out costs more than it saves.
_LEAST_REPEATED_FLOPS = 1 << 23
_LEAST_REPEATED_ROWS = 256


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
    return torch.stack([onednn_product(one, other.t()) for one, other in zip(a, b, strict=True)])


class RepeatedProduct:
    """x @ weight many times over, outside autograd; the weight is laid out once, where that pays.

    Args:
        weight: (g, k, m), any strides.
        num_rows: n, of each x.
        num_times: How many products there will be.
    """

    def __init__(self, weight: torch.Tensor, num_rows: int, num_times: int) -> None:
        self._weight = weight
        is_large = 2 * num_rows * weight[0].numel() >= _LEAST_REPEATED_FLOPS
        self._laid_out: list[torch.Tensor] | None = None
        if is_large and num_rows * num_times >= _LEAST_REPEATED_ROWS and _is_onednn_better(weight):
            lay_out = torch.ops.mkldnn._reorder_linear_weight
            self._laid_out = [lay_out(one.t().contiguous(), num_rows) for one in weight]

    def __call__(self, x: torch.Tensor, summand: torch.Tensor | None = None) -> torch.Tensor:
        """Return x @ weight (+ summand), contiguous (g, n, m), of x (g, n, k) and summand (g, n, m)."""
        if self._laid_out is None:
            result = torch.bmm(x, self._weight) if summand is None else torch.baddbmm(summand, x, self._weight)
            return result.contiguous()
        product = torch.ops.mkldnn._linear_pointwise
        if summand is None:
            return torch.stack([product(a, w, None, "none", [], "") for a, w in zip(x, self._laid_out, strict=True)])
        parts = zip(x, summand, self._laid_out, strict=True)
        return torch.stack([product.binary(a, b, w, None, "add") for a, b, w in parts])


class Linear(nn.Linear):
    """`torch.nn.Linear` by `linear`, and by the row kernel for a few tokens of inference."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Return input @ weight.T + bias, (..., out_features)."""
        if _is_for_row_kernel(input, self.weight, self.bias):
            return kernels.linear(input, self.weight, self.bias)
        return linear(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """a (n, k), b (m, k) → a @ b.T (n, m); any strides."""

    @staticmethod
    def forward(ctx: Any, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(a, b)
        return onednn_product(a, b)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        a, b = ctx.saved_tensors
        grad_a = _Product.apply(grad, b.t()) if ctx.needs_input_grad[0] else None  # type: ignore[no-untyped-call]
        grad_b = _Product.apply(grad.t(), a.t()) if ctx.needs_input_grad[1] else None  # type: ignore[no-untyped-call]
        return grad_a, grad_b


def _is_for_row_kernel(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> bool:
    return (
        not torch.is_grad_enabled()
        and _is_unobserved()
        and is_in_memory(x)
        and is_in_memory(weight)
        and x.dtype == weight.dtype
        and weight.numel() > 0
        and x.shape[-1] == weight.shape[1]
        and x.shape[:-1].numel() <= FEW_TOKENS.get(weight.dtype, 0)
        and weight.is_contiguous()
        and (bias is None or _is_bias(bias, weight))
    )


def _is_bias(bias: torch.Tensor, weight: torch.Tensor) -> bool:
    is_plain = is_in_memory(bias) and bias.is_contiguous()
    return is_plain and bias.dtype == weight.dtype and bias.shape == weight.shape[:1]


def _is_for_onednn(x: torch.Tensor, weight: torch.Tensor) -> bool:
    return (
        _is_onednn_better(weight)
        and x.dtype == weight.dtype
        and x.device == weight.device
        and 2 * x.numel() * len(weight) >= _LEAST_FLOPS
    )


def _is_onednn_better(weight: torch.Tensor) -> bool:
    is_fp32 = weight.dtype == torch.float32 and weight.device.type == "cpu"
    return is_fp32 and _is_unobserved() and bool(torch.backends.mkldnn.enabled) and mkl_is_slow()


def _is_unobserved() -> bool:
    """Whether nothing must see torch's own operations, and none would change their dtype."""
    return not (is_recorded() or is_transformed() or has_tangents() or torch.is_autocast_enabled("cpu"))
