"""Inference at small batches on the CPU: both transforms as row kernels on weights that stay grouped.

At batch one a layer is bound by reading its weights. The row kernels stream each matrix once for all sequences, with
fp32 sums, from fp32, bf16 or fp16 weights. The grouped matrices are kept a second time, transposed, so that an output
is one row.
"""

from __future__ import annotations

import torch

from flashlm.kernels import MAX_TOKENS, ProductTable, one_torch_thread
from flashlm.pru.cell import PRUCell, State
from flashlm.pru.gate_kernels import lstm_gates
from flashlm.pru.observers import is_in_memory, is_recorded

MAX_BATCH = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NativeWeights:
    """A cell's weights as rows for the kernels; made anew when a parameter was written or replaced.

    Args:
        cell: On the CPU, in fp32, bf16 or fp16.
    """

    def __init__(self, cell: PRUCell) -> None:
        self._signature = _signature(cell)
        transform, context = cell.input_transform, cell.context_transform
        with torch.no_grad():
            biases = [transform.folded_bias(), context.folded_bias()]
        present = [bias.float() for bias in biases if bias is not None]
        bias = torch.stack(present).sum(dim=0).view(4, -1) if present else None
        levels = [weight.detach().contiguous() for weight in transform.weights]
        groups = list(context.weight.detach().transpose(1, 2).contiguous())
        self._input = _by_gate(levels, bias)
        self._context = _by_gate(groups, None)
        self._num_groups = len(groups)

    def is_of(self, cell: PRUCell) -> bool:
        """Return whether these are still the cell's weights."""
        return self._signature == _signature(cell)

    def input_gates(self, cell: PRUCell, x: torch.Tensor) -> torch.Tensor:
        """Return fp32 (num_tokens, 4M), both biases in, of fp32 (num_tokens, N); at most `MAX_TOKENS` tokens."""
        transform = cell.input_transform
        gates = x.new_empty(len(x), 4 * cell.hidden_size)
        self._input.project(torch.cat([z.flatten() for z in transform.level_inputs_of(x)]), gates)
        if transform.has_residual:
            gates.view(len(x), 4, -1).add_(x.unsqueeze(-2))
        return gates

    def context_gates(self, h: torch.Tensor) -> torch.Tensor:
        """Return fp32 (B, 4M) of contiguous fp32 h (B, M), without bias."""
        gates = h.new_empty(len(h), 4 * h.shape[1])
        by_group = h if len(h) == 1 else h.view(len(h), self._num_groups, -1).transpose(0, 1).contiguous()
        self._context.project(by_group, gates)
        return gates


def is_served(cell: PRUCell, num_steps: int, batch: int) -> bool:
    """Return whether the native step takes a sequence of this size: inference, CPU, few sequences."""
    weight = cell.context_transform.weight
    return (
        not torch.is_grad_enabled()
        and not is_recorded()
        and is_in_memory(weight)
        and weight.dtype in _DTYPES
        and 1 <= batch <= MAX_BATCH
        and 1 <= num_steps * batch <= MAX_TOKENS
        and not any(parameter.is_inference() for parameter in cell.parameters())  # their changes go unseen
    )


def run_native(
    cell: PRUCell, weights: NativeWeights, x: torch.Tensor, state: State
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Run a layer over (T, B, N) from h and c (B, M); returns fp32 outputs (T, B, M), h and c (B, M)."""
    num_steps, batch = x.shape[:2]
    outputs = []
    with one_torch_thread():
        gates = weights.input_gates(cell, x.reshape(-1, x.shape[-1]).float().contiguous()).view(num_steps, batch, -1)
        h, c = (part.float().contiguous() for part in state)
        for t in range(num_steps):
            h, c = lstm_gates(gates[t], weights.context_gates(h), c)
            outputs.append(h)
    return torch.stack(outputs), h, c


def _by_gate(weights: list[torch.Tensor], bias: torch.Tensor | None) -> ProductTable:
    """Return the products of matrices (4 * outputs, inputs), whose outputs follow each other within each of four gates.

    Args:
        weights: Each with its own part of the input.
        bias: fp32 (4, all outputs).
    """
    size = sum(len(weight) // 4 for weight in weights)
    parts, starts, biases = [], [], []
    x_start = start = 0
    for weight in weights:
        outputs = len(weight) // 4
        for gate in range(4):
            parts.append(weight[gate * outputs : (gate + 1) * outputs])
            starts.append((x_start, gate * size + start))
            biases.append(None if bias is None else bias[gate, start : start + outputs])
        x_start += weight.shape[1]
        start += outputs
    return ProductTable(parts, starts, biases)


def _signature(cell: PRUCell) -> tuple[tuple[int, int, torch.dtype], ...]:
    return tuple((parameter.data_ptr(), parameter._version, parameter.dtype) for parameter in cell.parameters())
