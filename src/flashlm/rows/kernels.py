"""Row kernels on tensors: the FFN's two products over a block of row-column bundles, for up to `MAX_TOKENS` tokens.

The work is done by `flashlm._native` (fp32 sums, threads, no GIL), which checks types, shapes, layouts and devices, too:
tensors go there as they are. Results depend on neither the cutting into blocks, nor the threads, nor the number of tokens:
a token gets the same bits alone and in a batch. They do depend on the instruction set (`FLASHLM_SIMD`), through its lanes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, TypeVar

import torch

from flashlm import _native
from flashlm._native import QuantizedTokens, RowBlock, RowFormat, SlotRef
from flashlm.rows.layout import BlockPart, LayerLayout

__all__ = [
    "MAX_TOKENS",
    "WIDEN_PIECE_BYTES",
    "GroupTable",
    "ProductTable",
    "QuantizedTokens",
    "RowBlock",
    "RowFormat",
    "SlotRef",
    "Strategy",
    "accumulate",
    "accumulate_blocks",
    "choose_plain_strategy",
    "choose_strategy",
    "linear",
    "matrix_rows",
    "multiplies_int8",
    "on_one_torch_thread",
    "one_torch_thread",
    "part_at",
    "project",
    "project_blocks",
    "quantize_tokens",
    "rows_at",
    "widen",
]

MAX_TOKENS: int = _native.MAX_TOKENS
WIDEN_PIECE_BYTES = 16 << 20  # fp32 scratch of one piece of a resident matrix; as fast as larger ones

Strategy = Literal["native", "widen"]
T = TypeVar("T")


def choose_strategy(layout: LayerLayout, dtype: torch.dtype) -> Strategy:
    """Return the faster way through matrix products for rows of `layout` on this processor.

    Args:
        layout: Their geometry.
        dtype: What the model computes in: tokens are not rounded to the narrower elements of a matrix.
    """
    plain = layout.plain
    return "widen" if plain is None or plain.dtype != dtype else choose_plain_strategy(dtype)


def choose_plain_strategy(dtype: torch.dtype) -> Strategy:
    """Return the faster way through matrix products for plain elements on this processor."""
    if dtype == torch.float32:
        return "native"
    multiplies_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "native" if dtype == torch.bfloat16 and multiplies_bf16 else "widen"


def one_torch_thread() -> AbstractContextManager[None]:
    """Hold torch to one thread in the calling thread: after a small product its threads spin on the cores of our kernels.

    Other threads, also those that begin meanwhile, keep their number; the caller gets its own back whatever ends the
    context, an interrupt too. A torch without OpenMP is left alone.
    """
    return _hold()


def on_one_torch_thread(call: Callable[[], T]) -> T:
    """Return what `call` returns, torch held to one thread as by `one_torch_thread`, with no step of Python in between."""
    return _hold().run(call)


def _hold() -> _native.ThreadHold:
    torch.get_num_threads()  # torch sets a new thread's number up on first use: after ours it would undo it
    return _native.ThreadHold(*_THREAD_SETTINGS, 1)


def _find_thread_settings() -> tuple[int, int, int]:
    """Return the addresses of the functions by which torch's own OpenMP and MKL are set, 0 for one that is not there."""
    folder = Path(torch.__file__).parent / "lib"
    path = next((folder / name for name in ("libtorch_cpu.so", "libtorch_cpu.dylib") if (folder / name).exists()), None)
    try:
        library = ctypes.CDLL(None if path is None else str(path))  # loaded already; looks in what it links to as well
    except OSError:
        return 0, 0, 0
    # MKL's name in small letters is there as well: it is Fortran's, and takes a pointer.
    names = ("omp_get_max_threads", "omp_set_num_threads", "MKL_Set_Num_Threads_Local")
    found = [getattr(library, name, None) for name in names]
    get_omp, set_omp, set_mkl = (ctypes.cast(each, ctypes.c_void_p).value or 0 if each else 0 for each in found)
    return get_omp, set_omp, set_mkl


_THREAD_SETTINGS = _find_thread_settings()  # not a cached function: torch.compile warns of those


def rows_at(layout: LayerLayout, place: SlotRef, num_rows: int, slots: torch.Tensor | None = None) -> RowBlock:
    """Return rows of a streamed layer that lie in a slab.

    Args:
        layout: The layer's geometry.
        place: Where row 0 is.
        num_rows: How many: as many as `slots` has.
        slots: Which rows, by position from `place` on: int32 (num_rows,), contiguous. None: all, in order.

    Raises:
        ConfigError: A row ends beyond the memory.
    """
    return RowBlock(place, num_rows, layout.format, slots)


def part_at(part: BlockPart, block: SlotRef) -> RowBlock:
    """Return a part, or a piece of one, of a block that lies in a slab, as rows of one part.

    Args:
        part: Where it lies in the block.
        block: Where the block begins.

    Raises:
        ConfigError: A row ends beyond the memory.
    """
    return RowBlock(block.at(part.offset_bytes), part.num_rows, part.format, None)


def matrix_rows(matrix: torch.Tensor, *, num_parts: int = 1, slots: torch.Tensor | None = None) -> RowBlock:
    """Return the rows of a matrix in memory, which the block keeps.

    Args:
        matrix: (num_rows, num_parts * width) with contiguous rows; bfloat16, float16 or float32.
        num_parts: Parts of a row, of one width.
        slots: Which rows: int32 (number of rows,), contiguous. None: all, in order.

    Raises:
        ConfigError: A dtype or layout is not as stated, a slot is outside, or the matrix is not on the CPU.
    """
    return _native.matrix_rows(matrix, num_parts, slots)


def quantize_tokens(x: torch.Tensor) -> QuantizedTokens:
    """Return tokens in 8 bits for `project`: each 32 elements are multiples, -127 to 127, of a scale of their own.

    Products with rows of small integers are then made in integers, several times faster; with others of `x` as it is, which
    is kept.

    Args:
        x: fp32 (num_tokens, width), contiguous; whole groups of 32 elements. More than `MAX_TOKENS` tokens meet only what
            `multiplies_int8` says.

    Raises:
        ConfigError: A shape, dtype, layout or device is not as stated.
    """
    return QuantizedTokens(x)


def multiplies_int8(code: int) -> bool:
    """Return whether more than `MAX_TOKENS` tokens in 8 bits can be multiplied with parts of the encoding of this code."""
    return _native.has_int8_matrix(code)


def project(
    x: torch.Tensor | QuantizedTokens, rows: RowBlock, part: int, out: torch.Tensor, bias: torch.Tensor | None = None
) -> None:
    """Write out[t, r] = x[t] · row[r].part (+ bias[r]).

    Reads the part of every row once, whatever the number of tokens.

    Args:
        x: fp32 (num_tokens, width), contiguous; at most `MAX_TOKENS` tokens. Or in 8 bits, any number: more are matrix
            products, which add up in another order.
        rows: The rows.
        part: Index of the part within a row.
        out: fp32 (num_tokens, num_rows), any token stride.
        bias: fp32 (num_rows,), contiguous.

    Raises:
        ConfigError: A shape, dtype, layout or device is not as stated.
    """
    if isinstance(x, QuantizedTokens):
        x.project(rows, part, out, bias)
    else:
        _native.project(x, rows, part, out, bias)


def accumulate(h: torch.Tensor, rows: RowBlock, y: torch.Tensor) -> None:
    """Add y[t] += sum over r of h[t, r] · row[r].down, rows in ascending order.

    Rows whose activation is 0 for all tokens are not read.

    Args:
        h: fp32 (num_tokens, num_rows), any token stride.
        rows: The rows; down is their last part.
        y: fp32 (num_tokens, width), contiguous; at most `MAX_TOKENS` tokens.

    Raises:
        ConfigError: A shape, dtype, layout or device is not as stated.
    """
    _native.accumulate(h, rows, y)


def widen(rows: RowBlock, part: int, dst: torch.Tensor) -> None:
    """Copy a part of every row to fp32 `dst` (num_rows, width), contiguous.

    Raises:
        ConfigError: A shape, dtype, layout or device is not as stated.
    """
    _native.widen(rows, part, dst)


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x·weightᵀ + bias for a few tokens, in the dtype of all three; sums in fp32, rounded once.

    One call of ours and two of torch: around small matrices the calls are what takes the time.

    Args:
        x: (..., in_features), at most `MAX_TOKENS` tokens.
        weight: (out_features, in_features), contiguous; bfloat16, float16 or float32.
        bias: (out_features,), contiguous.

    Raises:
        ConfigError: A dtype, size, layout or device is not as stated.
    """
    out = torch.empty(*x.shape[:-1], len(weight), dtype=torch.float32)
    _native.linear(x.contiguous(), weight, bias, out)
    return out.to(x.dtype)


def project_blocks(
    x: torch.Tensor | QuantizedTokens,
    blocks: Sequence[RowBlock],
    part: int,
    out: torch.Tensor,
    biases: Sequence[torch.Tensor] = (),
) -> None:
    """Write out[b, r] = x · row[r].part (+ bias[r]) for several blocks in one job, with the bits that `project` gives.

    Args:
        x: fp32 (1, width), contiguous, for all; or (number of blocks, width), x[b] for each. Or the same in 8 bits.
        blocks: Of one encoding and shape, and without slots.
        part: Index of the part within a row.
        out: fp32 (number of blocks, num_rows), contiguous.
        biases: Of each block, fp32 (num_rows,), contiguous; none: no biases.

    Raises:
        ConfigError: A shape, dtype, layout or device is not as stated.
    """
    if isinstance(x, QuantizedTokens):
        x.project_blocks(blocks, part, out, biases)
    else:
        _native.project_blocks(x, blocks, part, out, biases)


def accumulate_blocks(h: torch.Tensor, blocks: Sequence[RowBlock], y: torch.Tensor) -> None:
    """Add y[b] += sum over r of h[b, r] · row[r].down for several blocks in one job, with the bits that `accumulate` gives.

    Args:
        h: fp32 (number of blocks, num_rows), contiguous.
        blocks: Of one encoding and shape, and without slots.
        y: fp32 (number of blocks, width), contiguous.

    Raises:
        ConfigError: A shape, dtype, layout or device is not as stated.
    """
    _native.accumulate_blocks(h, blocks, y)


class ProductTable:
    """Products of fp32 tokens with several matrices of one dtype, made in one job: small ones alone waste the threads.

    Args:
        weights: Each (num_rows, width) with contiguous rows, bfloat16, float16 or float32; kept alive here.
        starts: Of each: where its part of a token begins in `x`, and where its outputs begin in a token of `out`.
        biases: fp32 (num_rows,), contiguous, or None for each.

    Raises:
        ConfigError: Dtypes that differ, rows that are not contiguous, or another device than the CPU.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        starts: Sequence[tuple[int, int]],
        biases: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        biases = biases or [None] * len(weights)
        self._owners = (*weights, *biases)
        self._native = _native.ProductTable(weights, starts, biases)

    def project(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write out[t, o + r] = x_part[t] · row[r] (+ bias[r]) for every matrix.

        Args:
            x: fp32, contiguous: for each distinct part of a token, in order, (num_tokens, its size); flat.
            out: fp32 (num_tokens, all outputs), contiguous; at most `MAX_TOKENS` tokens.

        Raises:
            ConfigError: A size, dtype or layout is not as stated.
        """
        self._native.project(x, out)


class GroupTable:
    """Products of fp32 tokens, in groups, with one matrix for each group, read as they lie: x[j] @ weight[j].

    Args:
        weight: (groups, d, n), contiguous; bfloat16, float16 or float32; its memory is kept alive here.

    Raises:
        ConfigError: A dtype or layout is not as stated.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        self._owner = weight
        self._native = _native.GroupTable(weight)

    def accumulate(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add out[j, t] += x[t, j] @ weight[j], with the same bits for a token alone and among others.

        Args:
            x: fp32 (num_tokens, groups * d), contiguous; at most `MAX_TOKENS` tokens.
            out: fp32 (groups, num_tokens, n), contiguous.

        Raises:
            ConfigError: A size, dtype or layout is not as stated.
        """
        self._native.accumulate(x, out)
