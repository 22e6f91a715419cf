"""Matrix products over one block of rows, for many tokens at once (prefill).

Two ways, chosen by dtype and processor, both summing over blocks in fp32:

* `native`: torch's product in bf16 straight on the rows. Only where the processor multiplies bf16 (AVX-512-BF16, AMX);
* `widen`: the block's parts are copied to fp32 and multiplied there. Elsewhere torch's products in 16 bits are several
  times slower than this (bf16 without AVX-512: 21 against 80 GFLOP/s; fp16 through strided rows: 0.6).
"""

from __future__ import annotations

import ctypes

import torch
from torch.nn import functional as F

from flashlm.rows import kernels
from flashlm.rows.kernels import Strategy, choose_strategy
from flashlm.rows.layout import DTYPE_BYTES, LayerLayout


class BlockGemm:
    """Products of tokens with the parts of a block.

    Args:
        dtype: Element type of the rows, a key of `DTYPE_BYTES`.
        strategy: How to multiply; None chooses.
    """

    def __init__(self, dtype: str, strategy: Strategy | None = None) -> None:
        self.strategy: Strategy = strategy or choose_strategy(dtype)
        self._dtype = getattr(torch, dtype)
        self._compute_dtype = self._dtype if self.strategy == "native" else torch.float32
        self._scratch = torch.empty(0, dtype=torch.float32)

    def prepare(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `tokens` (num_tokens, hidden_size) in the dtype of the products."""
        return tokens.to(self._compute_dtype).contiguous()

    def parts(
        self, layout: LayerLayout, address: int, num_rows: int
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return the block's gate (or None), up and down parts, each (num_rows, hidden_size), as views or widened."""
        views = (
            self._views(layout, address, num_rows)
            if self.strategy == "native"
            else self._widened(layout, address, num_rows)
        )
        return (views[0] if layout.has_gate else None), views[-2], views[-1]

    def _views(self, layout: LayerLayout, address: int, num_rows: int) -> list[torch.Tensor]:
        itemsize = DTYPE_BYTES[layout.dtype]
        num_bytes = num_rows * layout.row_stride_bytes
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        rows = torch.frombuffer(memory, dtype=self._dtype).view(num_rows, layout.row_stride_bytes // itemsize)
        return [
            rows[:, part * layout.hidden_size : (part + 1) * layout.hidden_size] for part in range(layout.num_parts)
        ]

    def _widened(self, layout: LayerLayout, address: int, num_rows: int) -> list[torch.Tensor]:
        needed = layout.num_parts * num_rows * layout.hidden_size
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.float32)
        parts = self._scratch[:needed].view(layout.num_parts, num_rows, layout.hidden_size)
        rows = kernels.RowBlock(
            address, num_rows, layout.row_stride_bytes, layout.hidden_size, self._dtype, layout.num_parts
        )
        for part in range(layout.num_parts):
            kernels.widen(rows, part, parts[part])
        return list(parts)

    def project(self, tokens: torch.Tensor, part: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Return tokens·partᵀ + bias as fp32 (num_tokens, num_rows)."""
        product = F.linear(tokens, part).to(torch.float32)
        return product if bias is None else product.add_(bias)

    def accumulate(self, hidden: torch.Tensor, part: torch.Tensor, output: torch.Tensor) -> None:
        """Add hidden·part, (num_tokens, num_rows)·(num_rows, hidden_size), to fp32 `output`."""
        if self._compute_dtype is torch.float32:
            output.addmm_(hidden, part)
        else:
            output += hidden.to(self._compute_dtype) @ part
