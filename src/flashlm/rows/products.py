"""Matrix products over one block of rows, for many tokens at once (prefill).

Three ways, chosen by encoding and processor, all summing over blocks in fp32:

* `native`: torch's product straight on the rows, of the model's own dtype. bf16 only where the processor multiplies it
  (AVX-512-BF16, AMX);
* `widen`: the block's parts are copied to fp32 and multiplied there. So are encodings that torch does not know; and where
  the processor does not multiply 16 bits, torch's products of these are several times slower (bf16 without AVX-512: 21
  against 80 GFLOP/s; fp16 through strided rows: 0.6);
* in 8 bits, where that is asked for: encoded parts as they lie meet tokens that are rounded, two times as fast as `widen`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from flashlm.rows import kernels
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.kernels import choose_strategy
from flashlm.rows.layout import BlockPart, LayerLayout
from flashlm.rows.onednn import mkl_is_slow, onednn_product

# oneDNN makes code for every shape that it meets, and keeps it: 0.7 MB each. So it meets few numbers of tokens and of rows;
# what a piece gives is copied from 256 KiB, too little to be counted.
TOKENS_AT_ONCE, TOKENS_STEP, ROWS_AT_ONCE = 128, 32, 512
LEAST_ELEMENTS = 1 << 14  # of tokens: below, a call costs more than it saves


def fp32_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return x·weightᵀ + bias as `F.linear`, in fp32 by whoever is faster. Inference only.

    Rows may be cut at multiples of 16 without changing a bit: who multiplies is chosen by the tokens.

    Args:
        x: (num_tokens, in_features).
        weight: (out_features, in_features), any strides.
        bias: (out_features,).
    """
    # rows apart take oneDNN a thousand times as long
    is_dense = weight.is_contiguous() or weight.t().is_contiguous()
    given = (x, weight) if bias is None else (x, weight, bias)
    if is_dense and all(map(_is_plain, given)) and x.numel() >= LEAST_ELEMENTS and mkl_is_slow():
        bias = None if bias is None else bias.contiguous()  # its stride is ignored there
        output = torch.empty(len(x), len(weight), dtype=torch.float32)
        step = ROWS_AT_ONCE if weight.is_contiguous() else len(weight)  # pieces of a transposed one would be copied
        for start in range(0, len(x), TOKENS_AT_ONCE):
            tokens = slice(start, start + TOKENS_AT_ONCE)
            for first in range(0, len(weight), step):
                rows = slice(first, first + step)
                some = None if bias is None else bias[rows]
                output[tokens, rows] = _by_onednn(x[tokens], weight[rows], some)
        return output
    return F.linear(x, weight, bias)


def _by_onednn(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    missing = -len(x) % TOKENS_STEP
    filled = F.pad(x, (0, 0, 0, missing)) if missing else x
    return onednn_product(filled, weight, bias)[: len(x)]


def _is_plain(tensor: torch.Tensor) -> bool:
    return (
        type(tensor) in (torch.Tensor, torch.nn.Parameter)
        and tensor.dtype == torch.float32
        and tensor.is_cpu
        and not (tensor.requires_grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and bool(torch.backends.mkldnn.enabled)
        and not torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        and tensor.numel() > 0
    )


def multiplies_int8(encoding: str) -> bool:
    """Return whether this processor multiplies many tokens in 8 bits with weights of an encoding."""
    return kernels.multiplies_int8(ENCODINGS[encoding].code)


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens as a block's products take them.

    Attributes:
        plain: (num_tokens, hidden_size) in the dtype of the products.
        rounded: The same in 8 bits, where some parts take them so.
    """

    plain: torch.Tensor
    rounded: kernels.QuantizedTokens | None


# A part of some neurons, (neurons, hidden_size): as a tensor, or the rows and which part of them it is.
Part = torch.Tensor | tuple[kernels.RowBlock, int]


class BlockGemm:
    """Products of tokens with the parts of a block.

    Args:
        dtype: That of the rows and of the products on them as they lie; None: parts are widened to fp32.
        int8: Round tokens to 8 bits for their products with parts that are encoded, where the processor can.
    """

    def __init__(self, dtype: torch.dtype | None, *, int8: bool = False) -> None:
        self.dtype = dtype
        self._compute_dtype = dtype or torch.float32
        self._int8 = int8
        self._scratch = torch.empty(0, dtype=torch.float32)

    def prepare(self, tokens: torch.Tensor, layout: LayerLayout) -> Tokens:
        """Return `tokens` (num_tokens, hidden_size) as products with gate and up of a layer take them."""
        plain = tokens.to(self._compute_dtype).contiguous()
        is_rounded = any(map(self._is_rounded, layout.encodings[:-1]))
        return Tokens(plain, kernels.quantize_tokens(plain) if is_rounded else None)

    def held(self, layout: LayerLayout) -> AbstractContextManager[object]:
        """Return a context for what torch does between products with blocks of a layer.

        Ours, in 8 bits, want the cores for themselves: after each small operation torch's threads spin for a millisecond,
        as long as a product takes (128 tokens of a Llama of 7 B in q4_0: half the rate).
        """
        return kernels.one_torch_thread() if self.rounds(layout) else nullcontext()

    def rounds(self, layout: LayerLayout) -> bool:
        """Return whether no part of a layer's blocks is widened, since all meet tokens in 8 bits."""
        return layout.is_by_block and all(map(self._is_rounded, layout.encodings))

    def parts(
        self, layout: LayerLayout, place: kernels.SlotRef, num_rows: int, neurons: range | None = None
    ) -> tuple[Part | None, Part, Part]:
        """Return the parts of a block, or of some of its neurons: gate (or None), up and down.

        Args:
            layout: The layer's geometry.
            place: Where the block begins.
            num_rows: Its rows.
            neurons: Which of these; None: all.

        Returns:
            Each as views, widened, or as they lie; valid until the next call.
        """
        neurons = range(num_rows) if neurons is None else neurons
        parts: list[Part]
        if layout.is_by_block:
            parts = self._whole_parts([part.piece(neurons) for part in layout.block_parts(num_rows)], place)
        else:
            first = place.at(neurons.start * layout.row_stride_bytes)
            if self.dtype is None:
                parts = self._row_parts(layout, first, len(neurons))
            else:
                parts = list(_views(layout, first, len(neurons), self.dtype))
        return (parts[0] if layout.has_gate else None), parts[-2], parts[-1]

    def _take_scratch(self, num_elements: int) -> torch.Tensor:
        if self._scratch.numel() < num_elements:
            self._scratch = torch.empty(num_elements, dtype=torch.float32)
        return self._scratch[:num_elements]

    def _is_rounded(self, encoding: str) -> bool:
        return self._int8 and multiplies_int8(encoding)

    def _row_parts(self, layout: LayerLayout, place: kernels.SlotRef, num_rows: int) -> list[Part]:
        """Return parts that lie row by row; `down` is widened always: its sums go across rows."""
        scratch = self._take_scratch(layout.num_parts * num_rows * layout.hidden_size)
        rows = kernels.rows_at(layout, place, num_rows)
        parts: list[Part] = []
        for number, view in enumerate(scratch.view(layout.num_parts, num_rows, layout.hidden_size)):
            if number < layout.num_parts - 1 and self._is_rounded(layout.encodings[number]):
                parts.append((rows, number))
                continue
            kernels.widen(rows, number, view)
            parts.append(view)
        return parts

    def _whole_parts(self, parts: list[BlockPart], place: kernels.SlotRef) -> list[Part]:
        """Return parts that lie whole; of what is widened `down` is the transposed view of what lies there."""
        sizes = [0 if self._is_rounded(part.encoding.name) else part.num_rows * part.width for part in parts]
        found: list[Part] = []
        for part, scratch in zip(parts, torch.split(self._take_scratch(sum(sizes)), sizes), strict=True):
            rows = kernels.part_at(part, place)
            if not len(scratch):
                found.append((rows, 0))
                continue
            view = scratch.view(part.num_rows, part.width)
            kernels.widen(rows, 0, view)
            found.append(view.t() if part.part == "down" else view)
        return found

    def project(self, tokens: Tokens, part: Part, bias: torch.Tensor | None) -> torch.Tensor:
        """Return tokens·partᵀ + bias as fp32 (num_tokens, num_rows)."""
        if isinstance(part, tuple):
            assert tokens.rounded is not None
            return _multiply_int8(tokens.rounded, len(tokens.plain), part, bias)
        if self._compute_dtype is torch.float32:
            product = fp32_linear(tokens.plain, part)
        else:
            product = F.linear(tokens.plain, part).to(torch.float32)
        return product if bias is None else product.add_(bias)

    def accumulate(self, hidden: torch.Tensor, part: Part, output: torch.Tensor) -> None:
        """Add hidden·part, (num_tokens, num_rows)·(num_rows, hidden_size), to fp32 `output`."""
        if isinstance(part, tuple):
            output += _multiply_int8(kernels.quantize_tokens(hidden.contiguous()), len(hidden), part, None)
        elif self._compute_dtype is torch.float32:
            output += fp32_linear(hidden, part.t())
        else:
            output += hidden.to(self._compute_dtype) @ part


def _multiply_int8(
    tokens: kernels.QuantizedTokens, num_tokens: int, part: tuple[kernels.RowBlock, int], bias: torch.Tensor | None
) -> torch.Tensor:
    rows, number = part
    product = torch.empty(num_tokens, rows.num_rows, dtype=torch.float32)
    kernels.project(tokens, rows, number, product, bias)
    return product


class Gemms:
    """The products of a model's units: each by the way that suits its encodings, all that widen with one scratch.

    Args:
        dtype: What the model computes in.
        int8: Round tokens to 8 bits for their products with what is encoded.
    """

    def __init__(self, dtype: torch.dtype, *, int8: bool = False) -> None:
        self._dtype = dtype
        self._int8 = int8
        self._made: dict[torch.dtype | None, BlockGemm] = {}

    def of(self, layout: LayerLayout) -> BlockGemm:
        """Return the products for rows of `layout`."""
        dtype = self._dtype if choose_strategy(layout, self._dtype) == "native" else None
        return self._made.setdefault(dtype, BlockGemm(dtype, int8=self._int8))


def _views(layout: LayerLayout, place: kernels.SlotRef, num_rows: int, dtype: torch.dtype) -> list[torch.Tensor]:
    memory = torch.from_numpy(place.numpy(num_rows * layout.row_stride_bytes))
    rows = memory.view(num_rows, layout.row_stride_bytes)
    return [rows[:, part.offset_bytes : part.offset_bytes + part.num_bytes].view(dtype) for part in layout.placed]
