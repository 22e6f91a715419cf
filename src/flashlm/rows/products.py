"""Matrix products over one block of rows, for many tokens at once (prefill).

Two ways, chosen by encoding and processor, both summing over blocks in fp32:

* `native`: torch's product straight on the rows, of the model's own dtype. bf16 only where the processor multiplies it
  (AVX-512-BF16, AMX);
* `widen`: the block's parts are copied to fp32 and multiplied there. So are encodings that torch does not know; and where
  the processor does not multiply 16 bits, torch's products of these are several times slower (bf16 without AVX-512: 21
  against 80 GFLOP/s; fp16 through strided rows: 0.6).
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from flashlm.rows import kernels
from flashlm.rows.kernels import choose_strategy
from flashlm.rows.layout import BlockPart, LayerLayout


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
        self, layout: LayerLayout, place: kernels.SlotRef, num_rows: int, neurons: range | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor, torch.Tensor]:
        """Return the parts of a block, or of some of its neurons: gate (or None), up and down.

        Args:
            layout: The layer's geometry.
            place: Where the block begins.
            num_rows: Its rows.
            neurons: Which of these; None: all.

        Returns:
            Each (neurons, hidden_size), as views or widened; valid until the next call.
        """
        neurons = range(num_rows) if neurons is None else neurons
        if layout.is_by_block:
            views = self._whole_parts([part.piece(neurons) for part in layout.block_parts(num_rows)], place)
        else:
            first = place.at(neurons.start * layout.row_stride_bytes)
            if self.dtype is None:
                views = self._widened(layout, first, len(neurons))
            else:
                views = _views(layout, first, len(neurons), self.dtype)
        return (views[0] if layout.has_gate else None), views[-2], views[-1]

    def _take_scratch(self, num_elements: int) -> torch.Tensor:
        if self._scratch.numel() < num_elements:
            self._scratch = torch.empty(num_elements, dtype=torch.float32)
        return self._scratch[:num_elements]

    def _widened(self, layout: LayerLayout, place: kernels.SlotRef, num_rows: int) -> list[torch.Tensor]:
        parts = self._take_scratch(layout.num_parts * num_rows * layout.hidden_size)
        parts = parts.view(layout.num_parts, num_rows, layout.hidden_size)
        rows = kernels.rows_at(layout, place, num_rows)
        for part in range(layout.num_parts):
            kernels.widen(rows, part, parts[part])
        return list(parts)

    def _whole_parts(self, parts: list[BlockPart], place: kernels.SlotRef) -> list[torch.Tensor]:
        """Return parts that lie whole, each (neurons, hidden_size): `down` as the transposed view of what lies there."""
        sizes = [part.num_rows * part.width for part in parts]
        views = []
        for part, scratch in zip(parts, torch.split(self._take_scratch(sum(sizes)), sizes), strict=True):
            view = scratch.view(part.num_rows, part.width)
            kernels.widen(kernels.part_at(part, place), 0, view)
            views.append(view.t() if part.part == "down" else view)
        return views

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
    """The products of a model's units: each by the way that suits its encodings, all that widen with one scratch.

    Args:
        dtype: What the model computes in.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self._dtype = dtype
        self._made: dict[torch.dtype | None, BlockGemm] = {}

    def of(self, layout: LayerLayout) -> BlockGemm:
        """Return the products for rows of `layout`."""
        dtype = self._dtype if choose_strategy(layout, self._dtype) == "native" else None
        return self._made.setdefault(dtype, BlockGemm(dtype))


def _views(layout: LayerLayout, place: kernels.SlotRef, num_rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    memory = torch.from_numpy(place.numpy(num_rows * layout.row_stride_bytes))
    rows = memory.view(num_rows, layout.row_stride_bytes)
    return [rows[:, part.offset_bytes : part.offset_bytes + part.num_bytes].view(dtype) for part in layout.placed]
