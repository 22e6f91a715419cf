"""Inference at small batches on the CPU: both transforms as row kernels on weights that stay grouped.

At batch one a layer is bound by reading its weights. The row kernels stream each matrix once for all sequences, with
fp32 sums, from fp32, bf16 or fp16 weights. The grouped matrices are kept a second time, transposed, so that an output
is one row.
"""

from __future__ import annotations

import torch

from flashlm.kernels import MAX_TOKENS, RowBlock, project
from flashlm.pru.cell import PRUCell, State, step

MAX_BATCH = 8
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class NativeWeights:
    """A cell's weights as rows for the kernels; made anew when a parameter was written or replaced.

    Args:
        cell: On the CPU, in fp32, bf16 or fp16.
    """

    def __init__(self, cell: PRUCell) -> None:
        self._signature = _signature(cell)
        self._levels = [weight.detach().contiguous() for weight in cell.input_transform.weights]
        context = cell.context_transform
        self._groups = list(context.weight.detach().transpose(1, 2).contiguous())
        with torch.no_grad():
            biases = [cell.input_transform.folded_bias(), context.folded_bias()]
        present = [bias.float() for bias in biases if bias is not None]
        self._bias = torch.stack(present).sum(dim=0) if present else None

    def is_of(self, cell: PRUCell) -> bool:
        """Return whether these are still the cell's weights."""
        return self._signature == _signature(cell)

    def input_gates(self, cell: PRUCell, x: torch.Tensor) -> torch.Tensor:
        """Return fp32 (num_tokens, 4M), both biases in, of fp32 (num_tokens, N); at most `MAX_TOKENS` tokens."""
        transform = cell.input_transform
        parts = []
        for z, weight, outputs in zip(transform.level_inputs_of(x), self._levels, transform.level_outputs, strict=True):
            parts.append(_product(z.contiguous(), weight).view(-1, 4, outputs))
        gates = torch.cat(parts, dim=-1)
        if transform.has_residual:
            gates += x.unsqueeze(-2)
        flat = gates.flatten(-2)
        return flat if self._bias is None else flat.add_(self._bias)

    def context_gates(self, h: torch.Tensor) -> torch.Tensor:
        """Return fp32 (B, 4M) of fp32 h (B, M), without bias."""
        size = self._groups[0].shape[1]
        chunks = h.chunk(len(self._groups), dim=-1)
        parts = [_product(x.contiguous(), w).view(-1, 4, size) for x, w in zip(chunks, self._groups, strict=True)]
        return torch.cat(parts, dim=-1).flatten(-2)


def is_served(cell: PRUCell, num_steps: int, batch: int) -> bool:
    """Return whether the native step takes a sequence of this size: inference, CPU, few sequences."""
    weight = cell.context_transform.weight
    return (
        not torch.is_grad_enabled()
        and weight.device.type == "cpu"
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
    gates = weights.input_gates(cell, x.reshape(-1, x.shape[-1]).float().contiguous()).view(num_steps, batch, -1)
    h, c = (part.float() for part in state)
    outputs = []
    for t in range(num_steps):
        h, c = step(gates[t] + weights.context_gates(h), c)
        outputs.append(h)
    return torch.stack(outputs), h, c


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], weight.shape[0])
    row_bytes = weight.shape[1] * weight.dtype.itemsize
    rows = RowBlock(
        address=weight.data_ptr(),
        num_rows=weight.shape[0],
        row_stride_bytes=row_bytes,
        hidden_size=weight.shape[1],
        dtype=weight.dtype,
        num_parts=1,
    )
    project(x, rows, 0, out)
    return out


def _signature(cell: PRUCell) -> tuple[tuple[int, int, torch.dtype], ...]:
    return tuple((parameter.data_ptr(), parameter._version, parameter.dtype) for parameter in cell.parameters())
