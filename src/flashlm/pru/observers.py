"""Who else is looking: native calls take addresses, so whatever follows torch's own operations would miss them."""

from __future__ import annotations

import torch
from torch import nn


def is_recorded() -> bool:
    """Whether operations are compiled, traced or dispatched elsewhere (make_fx, fake tensors, counters of operations)."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state() is not None
        or torch._C._len_torch_dispatch_stack() > 0
    )


def has_tangents() -> bool:
    """Whether forward-mode differentiation is on."""
    return torch.autograd.forward_ad._current_level >= 0


def is_transformed() -> bool:
    """Whether a transform of torch.func is at work: its tensors stand for others."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def is_in_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values are what lies at its address: on the CPU, no subclass, no lazy sign, no sparse layout."""
    return (
        type(tensor) in (torch.Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and not tensor.is_neg()
    )
