"""The time loop of a layer with a grouped context, forward and backward written out.

Three things make it faster than stepping through autograd: the loop runs in group-major layout, so that a step is one
batched product that accumulates onto the input's gates; the backward pass keeps the gates and does no graph
work; and the gradient of the recurrent weights is one product over all steps after the loop instead of one per step.
On the CPU the gates of a step are one native call; elsewhere, with masks and in compiled graphs they are torch's
operations, which is the same loop written out. The state is fp32 whatever the products' dtype. Without gradients nothing
but the states is kept. No second derivatives.
"""

from __future__ import annotations

from typing import Any

import torch

from flashlm.errors import ConfigError
from flashlm.pru.gate_kernels import StepGates, backward_step, has_native_gates
from flashlm.pru.observers import has_tangents, is_recorded
from flashlm.pru.products import RepeatedProduct, batched_product, linear


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
            c_next = (f * c).addcmul_(i, g)  # no out=: torch.export refuses it where gradients are on
            h_next = o * c_next.tanh()
            # where a sequence has no token it keeps its state
            c_all[t + 1] = c_next if mask is None else torch.where(mask[t], c_next, c)
            h_all[t + 1] = h_next if mask is None else torch.where(mask[t], h_next, h)
        ctx.save_for_backward(activations, h_all, c_all, weight, mask)
        ctx.dtypes = gates.dtype, h0.dtype
        return h_all[1:].clone(), c_all[1:].clone()

    @staticmethod
    def backward(ctx: Any, grad_h: torch.Tensor, grad_c: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        _refuse_second_derivatives()
        with torch.autocast(grad_h.device.type, enabled=False):
            return _GroupedRecurrence._go_back(ctx, grad_h, grad_c)

    @staticmethod
    def _go_back(ctx: Any, grad_h: torch.Tensor, grad_c: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
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
            d_weight = _weight_gradient(h_all, d_gates)
        gates_dtype, h_dtype = ctx.dtypes
        return d_gates.to(gates_dtype), d_weight, dh.to(h_dtype), dc, None


class _NativeRecurrence(torch.autograd.Function):
    """The same without a mask, on the CPU, the gates computed natively; the last c alone instead of all."""

    @staticmethod
    def forward(
        ctx: Any, gates: torch.Tensor, weight: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        steps = _run_steps(gates, weight, h0, c0, keeps_activations=True)
        ctx.save_for_backward(steps.activations, steps.h_low, steps.c, weight)
        ctx.set_materialize_grads(False)
        return steps.h[1:], steps.c[-1].clone()

    @staticmethod
    def backward(ctx: Any, grad_h: torch.Tensor | None, grad_c: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        _refuse_second_derivatives()
        with torch.autocast("cpu", enabled=False):  # the caller's would change the products' dtype
            return _NativeRecurrence._go_back(ctx, grad_h, grad_c)

    @staticmethod
    def _go_back(ctx: Any, grad_h: torch.Tensor | None, grad_c: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        activations, h_low, c_all, weight = ctx.saved_tensors
        num_steps = activations.shape[0]
        grad_h = torch.zeros_like(c_all[1:]) if grad_h is None else grad_h.resolve_neg().contiguous()
        dc = torch.zeros_like(c_all[0]) if grad_c is None else grad_c.resolve_neg().contiguous()
        dc_before = torch.empty_like(dc)
        dh = torch.zeros_like(h_low[0])
        d_gates = torch.empty_like(activations, dtype=weight.dtype)
        product = RepeatedProduct(weight.transpose(1, 2), dh.shape[1], num_steps)
        for t in reversed(range(num_steps)):
            backward_step(activations[t], c_all[t], c_all[t + 1], grad_h[t], dh, dc, d_gates[t], dc_before)
            dc, dc_before = dc_before, dc if t < num_steps - 1 else torch.empty_like(dc)  # the caller's stays as it is
            dh = product(d_gates[t])
        return d_gates, _weight_gradient(h_low, d_gates) if ctx.needs_input_grad[1] else None, dh.float(), dc


def _refuse_second_derivatives() -> None:
    # create_graph: what was saved would count as constant, and the result be wrong without a word
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise ConfigError("path='grouped' has no second derivatives; take path='folded'")


def _run_steps(
    gates: torch.Tensor, weight: torch.Tensor, h0: torch.Tensor, c0: torch.Tensor, *, keeps_activations: bool
) -> StepGates:
    steps = StepGates(weight.dtype, h0, c0, len(gates), keeps_activations=keeps_activations)
    product = RepeatedProduct(weight, gates.shape[2], len(gates))
    for t in range(len(gates)):
        steps.forward(t, product(steps.h_low[t], gates[t]))
    return steps


def _weight_gradient(h_all: torch.Tensor, d_gates: torch.Tensor) -> torch.Tensor:
    """Return the recurrent weights' gradient (g, d, 4d) of h before each step (T + 1, g, B, d) and the gates'."""
    before = h_all[:-1].to(d_gates.dtype).transpose(0, 1).flatten(1, 2)  # (g, T·B, d)
    return batched_product(before.transpose(1, 2), d_gates.transpose(0, 1).flatten(1, 2))


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
        mask: bool (T, B), False where a sequence has no token and keeps its state; None: it has one everywhere.

    Returns:
        Outputs (T, B, hidden_size), last h and last c (B, hidden_size); fp32, or fp64 for fp64 gates.
    """
    groups, size = weight.shape[:2]
    num_steps, batch = gates.shape[:2]
    device = gates.device.type
    state = torch.promote_types(gates.dtype, torch.float32)

    def by_group(x: torch.Tensor) -> torch.Tensor:
        return x.to(state).view(batch, groups, size).transpose(0, 1).contiguous()

    products = gates.dtype
    if torch.is_autocast_enabled(device) and products != torch.float64:
        products = torch.get_autocast_dtype(device)
    gates = gates.to(products).view(num_steps, batch, 4, groups, size).permute(0, 3, 1, 2, 4).flatten(3)
    weight = weight.to(products).contiguous()  # torch would lay a transposed one out anew at every step
    h0, c0 = by_group(h0), by_group(c0)
    with torch.autocast(device, enabled=False):  # all is in its dtype; autocast would convert the weights at every step
        if mask is None and not is_recorded() and has_native_gates(weight, c0):
            if torch.is_grad_enabled() or has_tangents():  # which an autograd function refuses
                h, c = _NativeRecurrence.apply(gates, weight, h0, c0)  # type: ignore[no-untyped-call]
            else:
                done = _run_steps(gates, weight, h0, c0, keeps_activations=False)
                h, c = done.h[1:], done.c[-1]
        else:
            steps = None if mask is None else mask.view(num_steps, 1, batch, 1)
            h, all_c = _GroupedRecurrence.apply(gates, weight, h0, c0, steps)  # type: ignore[no-untyped-call]
            c = all_c[-1]
    last_h, last_c = (x.transpose(0, 1).flatten(1) for x in (h[-1], c))
    y = h.transpose(1, 2).flatten(2)
    is_view = groups == 1 or batch == 1
    return (y.clone() if is_view else y), last_h, last_c  # the caller may write to it


def run_dense(
    x: torch.Tensor, weights: list[torch.Tensor], h0: torch.Tensor, c0: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a layer of `torch.nn.LSTM` with the same loop, as one group; its state stays fp32, which torch's does not.

    Args:
        x: (T, B, N).
        weights: weight_ih, weight_hh and, with bias, bias_ih and bias_hh.
        h0: (B, M).
        c0: (B, M).
        mask: As `run_grouped` takes it.

    Returns:
        As `run_grouped`.
    """
    weight_ih, weight_hh, *biases = weights
    bias = biases[0] + biases[1] if biases else None
    return run_grouped(linear(x, weight_ih, bias), weight_hh.t().unsqueeze(0), h0, c0, mask)
