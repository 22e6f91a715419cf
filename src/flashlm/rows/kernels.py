"""Row kernels on tensors: the FFN's two products over a block of row-column bundles, for up to `MAX_TOKENS` tokens.

The work is done by `flashlm._native` (fp32 sums, threads, no GIL); here shapes and dtypes are checked once, and
addresses taken. Results depend on neither the cutting into blocks, nor the threads, nor the number of tokens: a token
gets the same bits alone and in a batch. They do depend on the instruction set (`FLASHLM_SIMD`), through its lanes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import torch

from flashlm import _native
from flashlm.errors import ConfigError

MAX_TOKENS: int = _native.MAX_TOKENS
WIDEN_PIECE_BYTES = 16 << 20  # fp32 scratch of one piece of a resident matrix; as fast as larger ones

Strategy = Literal["native", "widen"]
T = TypeVar("T")

_DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


def choose_strategy(dtype: str) -> Strategy:
    """Return the faster way for rows of `dtype` on this processor."""
    if dtype == "float32":
        return "native"
    multiplies_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "native" if dtype == "bfloat16" and multiplies_bf16 else "widen"


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
    if bias is not None and not (_is_plain(bias, torch.float32) and bias.shape == (rows.num_rows,)):
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
        if len(dtypes) != 1 or any(w.dim() != 2 or w.stride(1) != 1 or not w.is_cpu for w in weights):
            raise ConfigError("the matrices must have one dtype and contiguous rows, on the CPU")
        if any(bias is not None and not _is_plain(bias, torch.float32) for bias in biases):
            raise ConfigError("the biases must be contiguous float32, on the CPU")
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
                    0,
                    4 * out_start,
                    0,
                    0 if bias is None else bias.data_ptr(),
                ]
                for weight, (_, out_start), bias in zip(weights, starts, biases, strict=True)
            ]
        )
        self._x_starts, self._of_x, self._of_out, self._of_stride = (torch.zeros_like(self._table) for _ in range(4))
        self._x_starts[:, 4] = torch.tensor([4 * x_start for x_start, _ in starts])
        self._of_x[:, 4] = self._of_out[:, 5] = self._of_stride[:, 6] = 1

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
            if not _is_plain(tensor, torch.float32) or tensor.numel() < num_tokens * size:
                raise ConfigError(
                    f"{name} must be contiguous float32 of {num_tokens} x {size}, got {_described(tensor)}"
                )
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise ConfigError(f"1 to {MAX_TOKENS} tokens at a time, got {num_tokens}")
        # whole tables are added: writing columns takes twice as many calls of torch, which a small layer's token feels
        table = torch.add(self._table, self._x_starts, alpha=num_tokens).add_(self._of_x, alpha=x.data_ptr())
        table.add_(self._of_out, alpha=out.data_ptr()).add_(self._of_stride, alpha=out.shape[1])
        _native.project_many(self._code, table.data_ptr(), len(table), num_tokens)


class GroupTable:
    """Products of fp32 tokens, in groups, with one matrix for each group, read as they lie: x[j] @ weight[j].

    Args:
        weight: (groups, d, n), contiguous; bfloat16, float16 or float32; its memory is kept alive here.

    Raises:
        ConfigError: A dtype or layout is not as stated.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        if weight.dtype not in _DTYPE_CODES or weight.dim() != 3 or not weight.is_contiguous():
            raise ConfigError(f"contiguous (groups, d, n) of 16 or 32 bits expected, got {_described(weight)}")
        self._owner = weight
        self._code = _DTYPE_CODES[weight.dtype]
        groups, size, width = weight.shape
        row_bytes = width * weight.element_size()
        self._table = torch.tensor(
            [[weight.data_ptr() + j * size * row_bytes, size, row_bytes, width, 4 * j * size, 0] for j in range(groups)]
        )
        self._out_starts, self._of_x, self._of_out = (torch.zeros_like(self._table) for _ in range(3))
        self._out_starts[:, 5] = 4 * width * torch.arange(groups)
        self._of_x[:, 4] = self._of_out[:, 5] = 1

    def accumulate(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add out[j, t] += x[t, j] @ weight[j], with the same bits for a token alone and among others.

        Args:
            x: fp32 (num_tokens, groups * d), contiguous; at most `MAX_TOKENS` tokens.
            out: fp32 (groups, num_tokens, n), contiguous.

        Raises:
            ConfigError: A size, dtype or layout is not as stated.
        """
        groups, size, width = self._owner.shape
        num_tokens = len(x)
        for name, tensor, shape in (("x", x, (num_tokens, groups * size)), ("out", out, (groups, num_tokens, width))):
            if tensor.dtype != torch.float32 or tensor.shape != shape or not tensor.is_contiguous():
                raise ConfigError(f"{name} must be contiguous float32 {shape}, got {_described(tensor)}")
        if not 1 <= num_tokens <= MAX_TOKENS:
            raise ConfigError(f"1 to {MAX_TOKENS} tokens at a time, got {num_tokens}")
        table = torch.add(self._table, self._out_starts, alpha=num_tokens).add_(self._of_x, alpha=x.data_ptr())
        table.add_(self._of_out, alpha=out.data_ptr())
        # zeros are taken too: an infinite or NaN weight must show, as it does in torch's products
        _native.accumulate_many(self._code, table.data_ptr(), groups, num_tokens, groups * size, True)


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
    if not x.is_cpu:
        raise ConfigError(f"x must be on the CPU, got {_described(x)}")
    if not _is_plain(weight, x.dtype):
        raise ConfigError(f"weight must be contiguous, got {_described(weight)}")
    if bias is not None and not (_is_plain(bias, x.dtype) and bias.shape == (out_features,)):
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
    if any(not _is_plain(b, torch.float32) or b.shape != out.shape[1:] for b in biases):
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
        if not _is_plain(tensor, torch.float32) or tensor.shape != shape:
            raise ConfigError(f"contiguous float32 {shape} expected, got {_described(tensor)}")


def widen(rows: RowBlock, part: int, dst: torch.Tensor) -> None:
    """Copy a part of every row to fp32 `dst` (num_rows, hidden_size), contiguous.

    Raises:
        ConfigError: A shape, dtype or layout is not as stated.
    """
    offset_bytes = _part_offset_bytes(rows, part)
    if not _is_plain(dst, torch.float32) or dst.shape != (rows.num_rows, rows.hidden_size):
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
    if not _is_plain(x, torch.float32) or x.dim() != 2 or x.shape[1] != rows.hidden_size:
        expected = f"(num_tokens, {rows.hidden_size})"
        raise ConfigError(f"tokens must be contiguous float32 {expected}, got {_described(x)}")
    num_tokens = x.shape[0]
    if num_tokens > MAX_TOKENS:
        raise ConfigError(f"the row kernels take at most {MAX_TOKENS} tokens, got {num_tokens}")
    return num_tokens


def _check_activations(name: str, h: torch.Tensor, num_tokens: int, rows: RowBlock) -> None:
    is_dense = h.dim() == 2 and (h.stride(1) == 1 or h.shape[1] <= 1)
    if h.dtype != torch.float32 or h.shape != (num_tokens, rows.num_rows) or not is_dense or not h.is_cpu:
        expected = f"({num_tokens}, {rows.num_rows})"
        raise ConfigError(f"{name} must be float32 {expected} with rows side by side, got {_described(h)}")


def _slots_address(rows: RowBlock) -> int:
    slots = rows.slots
    if slots is None:
        return 0
    if not _is_plain(slots, torch.int32) or slots.shape != (rows.num_rows,):
        raise ConfigError(f"slots must be contiguous int32 ({rows.num_rows},), got {_described(slots)}")
    return slots.data_ptr()


def _is_plain(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Return whether native code may be given the tensor's address: an address on another device would be dereferenced."""
    return tensor.dtype == dtype and tensor.is_contiguous() and tensor.is_cpu


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)} on {tensor.device} with strides {tensor.stride()}"
