"""Matrix products over one block of rows, for many tokens at once (prefill).

Two ways, chosen by encoding and processor, both summing over blocks in fp32:

* `native`: torch's product in bf16 straight on the rows. Only where the processor multiplies bf16 (AVX-512-BF16, AMX);
* `widen`: the block's parts are copied to fp32 and multiplied there. So are encodings that torch does not know; and where
  the processor does not multiply 16 bits, torch's products of these are several times slower (bf16 without AVX-512: 21
  against 80 GFLOP/s; fp16 through strided rows: 0.6).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from flashlm.rows import kernels
from flashlm.rows.kernels import choose_strategy
from flashlm.rows.layout import LayerLayout


class BlockGemm:
    """Products of tokens with the parts of a block.

    Args:
        dtype: That of the rows and of the products on them as they lie; None: parts are widened to fp32.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self._compute_dtype = dtype or torch.float32
        self._scratch = torch.empty(0, dtype=torch.float32)

    def prepare(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return `tokens` (num_tokens, hidden_size) in the dtype of the products."""
        return tokens.to(self._compute_dtype).contiguous()

    def parts(
        self, layout: LayerLayout, place: kernels.SlotRef, num_rows: int
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return the block's gate (or None), up and down parts, each (num_rows, hidden_size), as views or widened."""
        views = (
            self._widened(layout, place, num_rows)
            if self.dtype is None
            else _views(layout, place, num_rows, self.dtype)
        )
        return (views[0] if layout.has_gate else None), views[-2], views[-1]

    def _widened(self, layout: LayerLayout, place: kernels.SlotRef, num_rows: int) -> list[torch.Tensor]:
        needed = layout.num_parts * num_rows * layout.hidden_size
        if self._scratch.numel() < needed:
            self._scratch = torch.empty(needed, dtype=torch.float32)
        parts = self._scratch[:needed].view(layout.num_parts, num_rows, layout.hidden_size)
        rows = kernels.rows_at(layout, place, num_rows)
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


class Gemms:
    """The products of a model's units: each by the way that suits its encodings, all that widen with one scratch."""

    def __init__(self) -> None:
        self._made: dict[torch.dtype | None, BlockGemm] = {}

    def of(self, layout: LayerLayout) -> BlockGemm:
        """Return the products for rows of `layout`."""
        dtype = layout.plain.dtype if layout.plain and choose_strategy(layout) == "native" else None
        return self._made.setdefault(dtype, BlockGemm(dtype))


def _views(layout: LayerLayout, place: kernels.SlotRef, num_rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    memory = torch.from_numpy(place.numpy(num_rows * layout.row_stride_bytes))
    rows = memory.view(num_rows, layout.row_stride_bytes)
    return [rows[:, part.offset_bytes : part.offset_bytes + part.num_bytes].view(dtype) for part in layout.placed]
