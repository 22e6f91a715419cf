"""Row kernels on tensors: the FFN's two products over a block of row-column bundles, for up to `MAX_TOKENS` tokens.

The work is done by `flashlm._native` (fp32 sums, threads, no GIL); here shapes and dtypes are checked once, and
addresses taken. Results depend on neither the cutting into blocks, nor the threads, nor the number of tokens: a token
gets the same bits alone and in a batch. They do depend on the instruction set (`FLASHLM_SIMD`), through its lanes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch

from flashlm import _native
from flashlm.errors import ConfigError

MAX_TOKENS: int = _native.MAX_TOKENS
WIDEN_PIECE_BYTES = 16 << 20  # fp32 scratch of one piece of a resident matrix; as fast as larger ones

Strategy = Literal["native", "widen"]

_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def choose_strategy(dtype: str) -> Strategy:
    """Return the faster way for rows of `dtype` on this processor."""
    if dtype == "float32":
        return "native"
    multiplies_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "native" if dtype == "bfloat16" and multiplies_bf16 else "widen"


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Hold torch to one thread: after a small product its threads spin on the cores that our kernels' threads want."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@dataclass(slots=True)
class RowBlock:
    """A block of rows in memory that someone else owns and keeps alive during the call.

    Attributes:
        address: Where row 0 starts.
        num_rows: Rows to work on: the block's, or as many as `slots` has.
        row_stride_bytes: From one row to the next.
        hidden_size: Elements of each part.
        dtype: bfloat16, float16 or float32.
        num_parts: 3 for `[gate | up | down]`, 2 for `[up | down]`; down is the last.
        slots: Which rows, by position in the block: int32 `(num_rows,)`, contiguous. None: all, in order.
    """

    address: int
    num_rows: int
    row_stride_bytes: int
    hidden_size: int
    dtype: torch.dtype
    num_parts: int
    slots: torch.Tensor | None = None


def project(x: torch.Tensor, rows: RowBlock, part: int, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Write out[t, r] = x[t] · row[r].part (+ bias[r]).

    Reads the part of every row once, whatever the number of tokens.

    Args:
        x: fp32 (num_tokens, hidden_size), contiguous; at most `MAX_TOKENS` tokens.
        rows: The rows.
        part: Index of the part within a row.
        out: fp32 (num_tokens, num_rows), any token stride.
        bias: fp32 (num_rows,), contiguous.

    Raises:
        ConfigError: A shape, dtype or layout is not as stated.
    """
    num_tokens = _check_tokens(x, rows)
    _check_activations("out", out, num_tokens, rows)
    offset_bytes = _part_offset_bytes(rows, part)
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (rows.num_rows,) or not bias.is_contiguous()):
        raise ConfigError(f"bias must be contiguous float32 ({rows.num_rows},), got {_described(bias)}")
    if num_tokens == 0 or rows.num_rows == 0:
        return
    _native.project(
        _DTYPE_CODES[rows.dtype],
        rows.address,
        rows.num_rows,
        rows.row_stride_bytes,
        offset_bytes,
        rows.hidden_size,
        x.data_ptr(),
        num_tokens,
        out.data_ptr(),
        out.stride(0),
        0 if bias is None else bias.data_ptr(),
        _slots_address(rows),
    )


class ProductTable:
    """Products of fp32 tokens with several matrices of one dtype, made in one job: small ones alone waste the threads.

    Args:
        weights: Each (num_rows, hidden_size) with contiguous rows, bfloat16, float16 or float32; kept alive here.
        starts: Of each: where its part of a token begins in `x`, and where its outputs begin in a token of `out`.
        biases: fp32 (num_rows,), contiguous, or None for each.

    Raises:
        ConfigError: Dtypes that differ, or rows that are not contiguous.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        starts: Sequence[tuple[int, int]],
        biases: Sequence[torch.Tensor | None] | None = None,
    ) -> None:
        biases = biases or [None] * len(weights)
        dtypes = {weight.dtype for weight in weights}
        if len(dtypes) != 1 or any(weight.dim() != 2 or weight.stride(1) != 1 for weight in weights):
            raise ConfigError("the matrices must have one dtype and contiguous rows")
        self._owners = (*weights, *biases)
        self._code = _DTYPE_CODES[dtypes.pop()]
        self._x_size = max(start + weight.shape[1] for weight, (start, _) in zip(weights, starts, strict=True))
        self._out_size = max(start + weight.shape[0] for weight, (_, start) in zip(weights, starts, strict=True))
        self._table = torch.tensor(
            [
                [
                    weight.data_ptr(),
                    weight.shape[0],
                    weight.stride(0) * weight.element_size(),
                    weight.shape[1],
                    4 * x_start,
                    4 * out_start,
                    0,
                    0 if bias is None else bias.data_ptr(),
                ]
                for weight, (x_start, out_start), bias in zip(weights, starts, biases, strict=True)
            ]
        )

    def project(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Write out[t, o + r] = x_part[t] · row[r] (+ bias[r]) for every matrix.

        Args:
            x: fp32, contiguous: for each distinct part of a token, in order, (num_tokens, its size); flat.
            out: fp32 (num_tokens, all outputs), contiguous; at most `MAX_TOKENS` tokens.

        Raises:
            ConfigError: A size, dtype or layout is not as stated.
        """
        num_tokens = out.shape[0]
        for name, tensor, size in (("x", x, self._x_size), ("out", out, self._out_size)):
            if tensor.dtype != torch.float32 or not tensor.is_contiguous() or tensor.numel() < num_tokens * size:
                raise ConfigError(
                    f"{name} must be contiguous float32 of {num_tokens} x {size}, got {_described(tensor)}"
                )
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise ConfigError(f"1 to {MAX_TOKENS} tokens at a time, got {num_tokens}")
        table = self._table.clone()
        table[:, 4].mul_(num_tokens).add_(x.data_ptr())
        table[:, 5] += out.data_ptr()
        table[:, 6] = out.shape[1]
        _native.project_many(self._code, table.data_ptr(), len(table), num_tokens)


def accumulate(h: torch.Tensor, rows: RowBlock, y: torch.Tensor) -> None:
    """Add y[t] += sum over r of h[t, r] · row[r].down, rows in ascending order.

    Rows whose activation is 0 for all tokens are not read.

    Args:
        h: fp32 (num_tokens, num_rows), any token stride.
        rows: The rows.
        y: fp32 (num_tokens, hidden_size), contiguous; at most `MAX_TOKENS` tokens.

    Raises:
        ConfigError: A shape, dtype or layout is not as stated.
    """
    num_tokens = _check_tokens(y, rows)
    _check_activations("h", h, num_tokens, rows)
    offset_bytes = _part_offset_bytes(rows, rows.num_parts - 1)
    if num_tokens == 0 or rows.num_rows == 0:
        return
    _native.accumulate(
        _DTYPE_CODES[rows.dtype],
        rows.address,
        rows.num_rows,
        rows.row_stride_bytes,
        offset_bytes,
        rows.hidden_size,
        h.data_ptr(),
        h.stride(0),
        num_tokens,
        y.data_ptr(),
        _slots_address(rows),
    )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return x·weightᵀ + bias for a few tokens, in the dtype of all three; sums in fp32, rounded once.

    One call of ours and two of torch: around small matrices the calls are what takes the time.

    Args:
        x: (..., in_features), at most `MAX_TOKENS` tokens.
        weight: (out_features, in_features), contiguous; bfloat16, float16 or float32.
        bias: (out_features,), contiguous.

    Raises:
        ConfigError: A dtype, size or layout is not as stated.
    """
    out_features, in_features = weight.shape
    num_tokens = x.numel() // in_features
    if x.dtype != weight.dtype or x.shape[-1] != in_features or num_tokens > MAX_TOKENS or x.dtype not in _DTYPE_CODES:
        raise ConfigError(f"{weight.dtype} (up to {MAX_TOKENS}, {in_features}) expected, got {_described(x)}")
    if not weight.is_contiguous():
        raise ConfigError(f"weight must be contiguous, got {_described(weight)}")
    if bias is not None and (bias.dtype != x.dtype or bias.shape != (out_features,) or not bias.is_contiguous()):
        raise ConfigError(f"bias must be contiguous {x.dtype} ({out_features},), got {_described(bias)}")
    x = x.contiguous()
    out = torch.empty(*x.shape[:-1], out_features, dtype=torch.float32, device=x.device)
    if num_tokens:
        _native.linear(
            _DTYPE_CODES[x.dtype],
            weight.data_ptr(),
            out_features,
            in_features,
            x.data_ptr(),
            num_tokens,
            out.data_ptr(),
            0 if bias is None else bias.data_ptr(),
        )
    return out.to(x.dtype)


def project_blocks(
    x: torch.Tensor, blocks: Sequence[RowBlock], part: int, out: torch.Tensor, biases: Sequence[torch.Tensor] = ()
) -> None:
    """Write out[b, r] = x · row[r].part (+ bias[r]) for several blocks in one job, with the bits that `project` gives.

    Args:
        x: fp32 (1, hidden_size), contiguous.
        blocks: Of one dtype and without slots.
        part: Index of the part within a row.
        out: fp32 (number of blocks, num_rows), contiguous.
        biases: Of each block, fp32 (num_rows,), contiguous; none: no biases.

    Raises:
        ConfigError: A shape, dtype or layout is not as stated.
    """
    _check_blocks(blocks, x, 1, out)
    if any(b.dtype != torch.float32 or b.shape != out.shape[1:] or not b.is_contiguous() for b in biases):
        raise ConfigError(f"biases must be contiguous float32 ({out.shape[1]},)")
    addresses = [bias.data_ptr() for bias in biases] or [0] * len(blocks)
    table = torch.tensor(
        [
            [
                rows.address + _part_offset_bytes(rows, part),
                rows.num_rows,
                rows.row_stride_bytes,
                rows.hidden_size,
                x.data_ptr(),
                out.data_ptr() + 4 * index * out.shape[1],
                rows.num_rows,
                bias,
            ]
            for index, (rows, bias) in enumerate(zip(blocks, addresses, strict=True))
        ]
    )
    _native.project_many(_DTYPE_CODES[blocks[0].dtype], table.data_ptr(), len(blocks), 1)


def accumulate_blocks(h: torch.Tensor, blocks: Sequence[RowBlock], y: torch.Tensor) -> None:
    """Add y[b] += sum over r of h[b, r] · row[r].down for several blocks in one job, with the bits that `accumulate` gives.

    Args:
        h: fp32 (number of blocks, num_rows), contiguous.
        blocks: Of one dtype and without slots.
        y: fp32 (number of blocks, hidden_size), contiguous.

    Raises:
        ConfigError: A shape, dtype or layout is not as stated.
    """
    _check_blocks(blocks, y, len(blocks), h)
    table = torch.tensor(
        [
            [
                rows.address + _part_offset_bytes(rows, rows.num_parts - 1),
                rows.num_rows,
                rows.row_stride_bytes,
                rows.hidden_size,
                h.data_ptr() + 4 * index * h.shape[1],
                y.data_ptr() + 4 * index * y.shape[1],
            ]
            for index, rows in enumerate(blocks)
        ]
    )
    _native.accumulate_many(_DTYPE_CODES[blocks[0].dtype], table.data_ptr(), len(blocks))


def _check_blocks(blocks: Sequence[RowBlock], vectors: torch.Tensor, count: int, activations: torch.Tensor) -> None:
    first = blocks[0]
    for rows in blocks:
        is_alike = (rows.dtype, rows.num_rows, rows.hidden_size) == (first.dtype, first.num_rows, first.hidden_size)
        if not is_alike or rows.slots is not None:
            raise ConfigError("the blocks must be alike, and without slots")
    for tensor, shape in ((vectors, (count, first.hidden_size)), (activations, (len(blocks), first.num_rows))):
        if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
            raise ConfigError(f"contiguous float32 {shape} expected, got {_described(tensor)}")


def widen(rows: RowBlock, part: int, dst: torch.Tensor) -> None:
    """Copy a part of every row to fp32 `dst` (num_rows, hidden_size), contiguous.

    Raises:
        ConfigError: A shape, dtype or layout is not as stated.
    """
    offset_bytes = _part_offset_bytes(rows, part)
    if dst.dtype != torch.float32 or dst.shape != (rows.num_rows, rows.hidden_size) or not dst.is_contiguous():
        expected = f"({rows.num_rows}, {rows.hidden_size})"
        raise ConfigError(f"dst must be contiguous float32 {expected}, got {_described(dst)}")
    if rows.num_rows == 0:
        return
    _native.widen(
        _DTYPE_CODES[rows.dtype],
        rows.address,
        rows.num_rows,
        rows.row_stride_bytes,
        offset_bytes,
        rows.hidden_size,
        dst.data_ptr(),
        _slots_address(rows),
    )


def _part_offset_bytes(rows: RowBlock, part: int) -> int:
    if rows.dtype not in _DTYPE_CODES:
        raise ConfigError(f"rows must be bfloat16, float16 or float32, got {rows.dtype}")
    if not 0 <= part < rows.num_parts:
        raise ConfigError(f"part must be 0 to {rows.num_parts - 1}, got {part}")
    row_bytes = rows.num_parts * rows.hidden_size * rows.dtype.itemsize
    if row_bytes > rows.row_stride_bytes:
        raise ConfigError(f"a row of {row_bytes} bytes does not fit a row stride of {rows.row_stride_bytes} bytes")
    return part * rows.hidden_size * rows.dtype.itemsize


def _check_tokens(x: torch.Tensor, rows: RowBlock) -> int:
    if x.dtype != torch.float32 or x.dim() != 2 or x.shape[1] != rows.hidden_size or not x.is_contiguous():
        expected = f"(num_tokens, {rows.hidden_size})"
        raise ConfigError(f"tokens must be contiguous float32 {expected}, got {_described(x)}")
    num_tokens = x.shape[0]
    if num_tokens > MAX_TOKENS:
        raise ConfigError(f"the row kernels take at most {MAX_TOKENS} tokens, got {num_tokens}")
    return num_tokens


def _check_activations(name: str, h: torch.Tensor, num_tokens: int, rows: RowBlock) -> None:
    is_dense = h.dim() == 2 and (h.stride(1) == 1 or h.shape[1] <= 1)
    if h.dtype != torch.float32 or h.shape != (num_tokens, rows.num_rows) or not is_dense:
        expected = f"({num_tokens}, {rows.num_rows})"
        raise ConfigError(f"{name} must be float32 {expected} with rows side by side, got {_described(h)}")


def _slots_address(rows: RowBlock) -> int:
    slots = rows.slots
    if slots is None:
        return 0
    if slots.dtype != torch.int32 or slots.shape != (rows.num_rows,) or not slots.is_contiguous():
        raise ConfigError(f"slots must be contiguous int32 ({rows.num_rows},), got {_described(slots)}")
    return slots.data_ptr()


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} with strides {tensor.stride()}"
