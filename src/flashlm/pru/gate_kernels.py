"""The gates of an LSTM step on the CPU, natively: for inference, and for training forward and backward.

In a training step written in torch they are some twenty small operations forward and thirty backward for each token
position; here one call each. They run on the calling thread, since torch's threads spin between its products.
"""

from __future__ import annotations

import torch

from flashlm import _native
from flashlm.errors import ConfigError
from flashlm.pru.observers import is_in_memory

_CODES = {torch.bfloat16: 0, torch.float32: 2}


def lstm_gates(
    input_gates: torch.Tensor, context_gates: torch.Tensor, c: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return h' and c', fp32 (B, M), of an LSTM step.

    Args:
        input_gates, context_gates: fp32 (B, 4M), contiguous; their sum is i, f, g, o before the activations.
        c: fp32 (B, M), contiguous.

    Raises:
        ConfigError: A shape, dtype or layout is not as stated.
    """
    batch, size = c.shape
    for name, tensor, shape in (("input_gates", input_gates, (batch, 4 * size)), ("c", c, (batch, size)),
                                ("context_gates", context_gates, (batch, 4 * size))):  # fmt: skip
        if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
            raise ConfigError(
                f"{name} must be contiguous float32 {shape}, got {str(tensor.dtype).removeprefix('torch.')}"
                f" {tuple(tensor.shape)}{'' if tensor.is_contiguous() else ', not contiguous'}"
            )
    h_next, c_next = torch.empty_like(c), torch.empty_like(c)
    _native.lstm_gates(
        input_gates.data_ptr(),
        context_gates.data_ptr(),
        c.data_ptr(),
        h_next.data_ptr(),
        c_next.data_ptr(),
        batch,
        size,
    )
    return h_next, c_next


def has_native_gates(weight: torch.Tensor, state: torch.Tensor) -> bool:
    """Return whether `StepGates` takes recurrent weights and a state of these dtypes and devices."""
    is_supported = weight.dtype in _CODES and state.dtype == torch.float32
    return is_supported and is_in_memory(weight) and is_in_memory(state) and state.numel() > 0


class StepGates:
    """The gates of a window's T steps, forward, and backward from what that kept.

    Args:
        dtype: Of the products: float32 or bfloat16.
        h0, c0: fp32 (..., d).
        num_steps: T.
        keeps_activations: Whether there will be a backward pass.

    Attributes:
        h, c: fp32 (T + 1, ..., d): before each step and after the last.
        h_low: h in the products' dtype; `h` itself in fp32.
        activations: fp32 (T, ..., 4d), or None.
    """

    def __init__(
        self, dtype: torch.dtype, h0: torch.Tensor, c0: torch.Tensor, num_steps: int, *, keeps_activations: bool = True
    ) -> None:
        self.h = torch.empty(num_steps + 1, *h0.shape, dtype=torch.float32, device=h0.device)
        self.c = torch.empty_like(self.h)
        self.h[0], self.c[0] = h0, c0
        self.h_low = self.h
        if dtype != torch.float32:
            self.h_low = torch.empty_like(self.h, dtype=dtype)
            self.h_low[0] = h0
        self.activations: torch.Tensor | None = None
        if keeps_activations:
            self.activations = self.h.new_empty(num_steps, *h0.shape[:-1], 4 * h0.shape[-1])

    def forward(self, t: int, gates: torch.Tensor) -> None:
        """Take step t; gates (..., 4d), contiguous, in the products' dtype, the context's part included."""
        h, h_low = self.h[t + 1], self.h_low[t + 1]
        _check(gates, h_low.dtype, 4 * h.numel())
        _native.lstm_forward(
            _CODES[h_low.dtype],
            gates.data_ptr(),
            self.c[t].data_ptr(),
            0 if self.activations is None else self.activations[t].data_ptr(),
            h.data_ptr(),
            self.c[t + 1].data_ptr(),
            0 if self.h_low is self.h else h_low.data_ptr(),
            h[..., 0].numel(),
            h.shape[-1],
        )


def backward_step(
    activations: torch.Tensor,
    c: torch.Tensor,
    c_next: torch.Tensor,
    grad_h: torch.Tensor,
    grad_h_next: torch.Tensor,
    grad_c: torch.Tensor,
    grad_gates: torch.Tensor,
    grad_c_before: torch.Tensor,
) -> None:
    """Go back over one step of `StepGates`; all contiguous, no output may be an input.

    Args:
        activations: fp32 (..., 4d) of the step.
        c, c_next: fp32 (..., d), before and after it.
        grad_h: fp32 (..., d), by the step's output.
        grad_h_next: (..., d) in the products' dtype, by what the next step's product took.
        grad_c: fp32 (..., d), by c_next.
        grad_gates: Output, (..., 4d) in the products' dtype.
        grad_c_before: Output, fp32 (..., d), by c.
    """
    low, size = grad_gates.dtype, c.numel()
    for tensor in (c, c_next, grad_h, grad_c, grad_c_before):
        _check(tensor, torch.float32, size)
    _check(activations, torch.float32, 4 * size)
    _check(grad_h_next, low, size)
    _check(grad_gates, low, 4 * size)
    _native.lstm_backward(
        _CODES[grad_gates.dtype],
        activations.data_ptr(),
        c.data_ptr(),
        c_next.data_ptr(),
        grad_h.data_ptr(),
        grad_h_next.data_ptr(),
        grad_c.data_ptr(),
        grad_gates.data_ptr(),
        grad_c_before.data_ptr(),
        c[..., 0].numel(),
        c.shape[-1],
    )


def _check(tensor: torch.Tensor, dtype: torch.dtype, num_elements: int) -> None:
    """Guard the raw addresses below: a caller's mistake must not become a write beyond an array."""
    if tensor.dtype != dtype or tensor.numel() != num_elements or not tensor.is_contiguous():
        raise AssertionError(f"expected contiguous {dtype} of {num_elements}, got {tensor.dtype} {tuple(tensor.shape)}")
