"""The gates of an LSTM step on the CPU, natively: for inference, and for training forward and backward.

In a training step written in torch they are some twenty small operations forward and thirty backward for each token
position; here one call each. They run on the calling thread, since torch's threads spin between its products.
"""

from __future__ import annotations

import torch

from flashlm import _native
from flashlm.pru.observers import is_in_memory

_DTYPES = (torch.bfloat16, torch.float32)


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
    h_next, c_next = torch.empty_like(c), torch.empty_like(c)
    _native.lstm_gates(input_gates, context_gates, c, h_next, c_next)
    return h_next, c_next


def has_native_gates(weight: torch.Tensor, state: torch.Tensor) -> bool:
    """Return whether `StepGates` takes recurrent weights and a state of these dtypes and devices."""
    is_supported = weight.dtype in _DTYPES and state.dtype == torch.float32
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
        """Take step t; gates (..., 4d), contiguous, in the products' dtype, the context's part included.

        Raises:
            ConfigError: The gates are not as stated.
        """
        activations = None if self.activations is None else self.activations[t]
        h_low = None if self.h_low is self.h else self.h_low[t + 1]
        _native.lstm_forward(gates, self.c[t], activations, self.h[t + 1], self.c[t + 1], h_low)


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

    Raises:
        ConfigError: A size, dtype or layout is not as stated.
    """
    _native.lstm_backward(activations, c, c_next, grad_h, grad_h_next, grad_c, grad_gates, grad_c_before)
