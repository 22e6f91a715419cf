"""The time loop of a layer with a grouped context, forward and backward written out.

Three things make it faster than stepping through autograd: the loop runs in group-major layout, so that a step is one
batched product that accumulates onto the input's gates; the backward pass keeps the gates and does no graph
work; and the gradient of the recurrent weights is one product over all steps after the loop instead of one per step.
The state is fp32 whatever the products' dtype. No second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd.function import once_differentiable


class _GroupedRecurrence(torch.autograd.Function):
    """gates (T, g, B, 4d), weight (g, d, 4d), h0 and c0 (g, B, d), mask (T, 1, B, 1) or None → h and c (T, g, B, d)."""

    @staticmethod
    def forward(
        ctx: Any,
        gates: torch.Tensor,
        weight: torch.Tensor,
        h0: torch.Tensor,
        c0: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        num_steps, size = gates.shape[0], h0.shape[-1]
        activations = torch.empty_like(gates, dtype=c0.dtype)
        h_all = torch.empty(num_steps + 1, *h0.shape, dtype=c0.dtype, device=h0.device)
        c_all = torch.empty_like(h_all)
        h_all[0], c_all[0] = h0, c0
        for t in range(num_steps):
            h, c = h_all[t], c_all[t]
            step = activations[t]
            step.copy_(torch.baddbmm(gates[t], h.to(weight.dtype), weight))
            step[..., : 2 * size].sigmoid_()
            step[..., 2 * size : 3 * size].tanh_()
            step[..., 3 * size :].sigmoid_()
            i, f, g, o = step.chunk(4, dim=-1)
            torch.mul(f, c, out=c_all[t + 1])
            c_all[t + 1].addcmul_(i, g)
            torch.mul(o, c_all[t + 1].tanh(), out=h_all[t + 1])
            if mask is not None:  # beyond its end a sequence keeps its state
                c_all[t + 1] = torch.where(mask[t], c_all[t + 1], c)
                h_all[t + 1] = torch.where(mask[t], h_all[t + 1], h)
        ctx.save_for_backward(activations, h_all, c_all, weight, mask)
        ctx.dtypes = gates.dtype, h0.dtype
        return h_all[1:].clone(), c_all[1:].clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_h: torch.Tensor, grad_c: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        activations, h_all, c_all, weight, mask = ctx.saved_tensors
        num_steps, size = activations.shape[0], h_all.shape[-1]
        backward_weight = weight.transpose(1, 2).contiguous()
        d_gates = torch.empty_like(activations, dtype=weight.dtype)
        dh, dc = torch.zeros_like(h_all[0]), torch.zeros_like(c_all[0])
        for t in reversed(range(num_steps)):
            i, f, g, o = activations[t].chunk(4, dim=-1)
            dh, dc = dh + grad_h[t], dc + grad_c[t]
            held_h, held_c = dh, dc
            if mask is not None:
                dh, dc = dh * mask[t], dc * mask[t]
                held_h, held_c = held_h - dh, held_c - dc
            tanh_c = c_all[t + 1].tanh()
            d_step = d_gates[t]
            d_step[..., 3 * size :] = torch.ops.aten.sigmoid_backward(dh * tanh_c, o)
            dc = dc + torch.ops.aten.tanh_backward(dh * o, tanh_c)
            d_step[..., :size] = torch.ops.aten.sigmoid_backward(dc * g, i)
            d_step[..., size : 2 * size] = torch.ops.aten.sigmoid_backward(dc * c_all[t], f)
            d_step[..., 2 * size : 3 * size] = torch.ops.aten.tanh_backward(dc * i, g)
            dc = dc * f
            dh = torch.bmm(d_step, backward_weight).to(c_all.dtype)
            if mask is not None:
                dh, dc = dh + held_h, dc + held_c
        d_weight = None
        if ctx.needs_input_grad[1]:
            before = h_all[:-1].to(weight.dtype).transpose(0, 1).flatten(1, 2)  # (g, T·B, d)
            d_weight = torch.bmm(before.transpose(1, 2), d_gates.transpose(0, 1).flatten(1, 2))
        gates_dtype, h_dtype = ctx.dtypes
        return d_gates.to(gates_dtype), d_weight, dh.to(h_dtype), dc, None


def run_grouped(
    gates: torch.Tensor,
    weight: torch.Tensor,
    h0: torch.Tensor,
    c0: torch.Tensor,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a layer over time.

    Args:
        gates: (T, B, 4 * hidden_size): what the input and all biases give, order i, f, g, o.
        weight: (groups, d, 4 * d) with d = hidden_size / groups.
        h0: (B, hidden_size).
        c0: (B, hidden_size).
        mask: bool (T, B), False where a sequence has ended; None: all run to the end.

    Returns:
        Outputs (T, B, hidden_size), last h and last c (B, hidden_size); fp32, or fp64 for fp64 gates.
    """
    groups, size = weight.shape[:2]
    num_steps, batch = gates.shape[:2]
    state = torch.promote_types(gates.dtype, torch.float32)

    def by_group(x: torch.Tensor) -> torch.Tensor:
        return x.to(state).view(batch, groups, size).transpose(0, 1).contiguous()

    gates = gates.view(num_steps, batch, 4, groups, size).permute(0, 3, 1, 2, 4).flatten(3)
    steps = None if mask is None else mask.view(num_steps, 1, batch, 1)
    h, c = _GroupedRecurrence.apply(  # type: ignore[no-untyped-call]
        gates, weight.to(gates.dtype), by_group(h0), by_group(c0), steps
    )
    last_h, last_c = (x[-1].transpose(0, 1).flatten(1) for x in (h, c))
    return h.transpose(1, 2).flatten(2), last_h, last_c
