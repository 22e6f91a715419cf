"""Inference at small batches on the CPU: both transforms as row kernels on the weights as they lie.

At batch one a layer is bound by reading its weights. The row kernels stream each matrix once for all sequences, with
fp32 sums, from fp32, bf16 or fp16 weights. Nothing of the weights is kept a second time, only where they are: whatever
way they are written to, through `.data`, numpy or shared memory, the next token uses what is there. (A transposed copy
of the grouped matrices, as it was until November 2026, is no faster and can't know of such writes: docs/experiments.md.)
"""

from __future__ import annotations

import torch

from flashlm.pru.cell import PRUCell, State
from flashlm.pru.gate_kernels import lstm_gates
from flashlm.pru.observers import is_in_memory, is_recorded
from flashlm.rows.kernels import MAX_TOKENS, GroupTable, ProductTable, one_torch_thread

MAX_BATCH = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_Tensors = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor, torch.Tensor | None]
_Place = tuple[int, torch.dtype, torch.Size]


class NativeWeights:
    """Where a cell's weights are, as tables for the kernels; made anew when a parameter lies elsewhere.

    Args:
        tensors: A cell's, each plain rows in memory.
    """

    def __init__(self, tensors: _Tensors) -> None:
        # kept: memory that is not freed can't become another tensor's, so an address says which one it is
        levels, self._level_biases = ([tensor.detach() for tensor in part] for part in tensors[:2])
        self._context_weight = tensors[2].detach()
        self._context_bias = None if tensors[3] is None else tensors[3].detach().unsqueeze(1)
        # of fp32 biases the kernels read the parameter itself, of others a copy that is made afresh for every call
        self._biases = [bias.float() for bias in self._level_biases]
        self._input = _by_gate(levels, self._biases)
        self._context = GroupTable(self._context_weight)
        self._places = _places(tensors)

    @classmethod
    def of(cls, cell: PRUCell, known: NativeWeights | None = None) -> NativeWeights | None:
        """Return the tables of a cell's weights, None where a weight is not plain rows in memory that a kernel takes.

        Args:
            cell: Whose weights.
            known: Returned where the weights still are what it was made of.
        """
        tensors = _tensors(cell)
        places = _places(tensors)
        if known is not None and known._places == places:
            return known
        weight = tensors[2]
        is_served = None not in places and all(tensor.dtype == weight.dtype for tensor in tensors[0])
        return cls(tensors) if is_served and weight.dtype in _DTYPES else None

    def input_gates(self, cell: PRUCell, x: torch.Tensor) -> torch.Tensor:
        """Return fp32 (num_tokens, 4M), the pyramid's bias in, of fp32 (num_tokens, N); at most `MAX_TOKENS` tokens."""
        transform = cell.input_transform
        for bias, source in zip(self._biases, self._level_biases, strict=True):
            if bias is not source:  # of 16 bits
                bias.copy_(source)
        gates = x.new_empty(len(x), 4 * cell.hidden_size)
        self._input.project(torch.cat([z.flatten() for z in transform.level_inputs_of(x)]), gates)
        if transform.has_residual:
            gates.view(len(x), 4, -1).add_(x.unsqueeze(-2))
        return gates

    def context_gates(self, h: torch.Tensor) -> torch.Tensor:
        """Return fp32 (B, 4M), the context's bias in, of contiguous fp32 h (B, M)."""
        groups, _, width = self._context_weight.shape
        gates = h.new_empty(groups, len(h), width)
        if self._context_bias is None:
            gates.zero_()
        else:
            gates.copy_(self._context_bias)
        self._context.accumulate(h, gates)
        return gates.view(groups, len(h), 4, -1).permute(1, 2, 0, 3).reshape(len(h), -1)


def is_served(num_steps: int, batch: int) -> bool:
    """Return whether the native step takes a sequence of this size now: inference, few sequences, nobody recording."""
    is_small = 1 <= batch <= MAX_BATCH and 1 <= num_steps * batch <= MAX_TOKENS
    return is_small and not torch.is_grad_enabled() and not is_recorded()


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


def _tensors(cell: PRUCell) -> _Tensors:
    """Return the pyramid's weights and biases, the context's weight and bias, as a parametrization gives them."""
    transform, context = cell.input_transform, cell.context_transform
    return list(transform.weights), list(transform.biases), context.weight, context.bias


def _places(tensors: _Tensors) -> list[_Place | None]:
    """Return what a table depends on of each tensor; None for one whose values are not contiguous in memory."""
    levels, level_biases, weight, bias = tensors
    present = [*levels, *level_biases, weight, *([] if bias is None else [bias])]
    return [
        (tensor.data_ptr(), tensor.dtype, tensor.shape) if is_in_memory(tensor) and tensor.is_contiguous() else None
        for tensor in present
    ]


def _by_gate(weights: list[torch.Tensor], biases: list[torch.Tensor]) -> ProductTable:
    """Return the products of matrices (4 * outputs, inputs), whose outputs follow each other within each of four gates.

    Args:
        weights: Each with its own part of the input.
        biases: fp32 (4 * outputs,) of each, or none.
    """
    size = sum(len(weight) // 4 for weight in weights)
    parts, starts, shares = [], [], []
    x_start = start = 0
    for level, weight in enumerate(weights):
        outputs = len(weight) // 4
        for gate in range(4):
            rows = slice(gate * outputs, (gate + 1) * outputs)
            parts.append(weight[rows])
            starts.append((x_start, gate * size + start))
            shares.append(biases[level][rows] if biases else None)
        x_start += weight.shape[1]
        start += outputs
    return ProductTable(parts, starts, shares)
