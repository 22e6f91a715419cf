"""`model.safetensors` of a pack: every tensor that stays in DRAM, cast, in one file that transformers can load.

Tensors are ordered by how round their sizes are, so that each begins at a multiple of its own element size and the
large ones at 4096: the format allows no gaps, but the header may be padded with spaces and the order is free.
"""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from flashlm.conversion.casts import CastCounts
from flashlm.conversion.layer_file import typed
from flashlm.conversion.made import MadeTensor
from flashlm.conversion.pipeline import BufferPool, WriteBehind
from flashlm.conversion.sources.tensors import EncodedTensor, RowsRead
from flashlm.errors import PackError
from flashlm.pack.checkpoint import TORCH_DTYPES, TensorEntry
from flashlm.rows.layout import round_up
from flashlm.storage.ranges import RangeReader, bytes_of, room_bytes
from flashlm.storage.reader import AlignedBuffer
from flashlm.storage.writer import AtomicFile

DATA_ALIGN_BYTES = 4096
CHECKSUM_CHUNK_BYTES = 4 << 20
_WRITE_BYTES = 4 * CHECKSUM_CHUNK_BYTES
_READ_BYTES = 8 << 20
_DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True, kw_only=True)
class ResidentTensor:
    """One tensor to be written.

    Attributes:
        name: Its name in the pack.
        source: The checkpoint tensor it comes from.
        first: First row (axis 0) taken of it.
        shape: Its shape.
        dtype: Its type in the pack.
        made: How it is made, where it is no part of a single checkpoint tensor; `source` is then the first of several.
    """

    name: str
    source: TensorEntry
    first: int = 0
    shape: tuple[int, ...]
    dtype: torch.dtype
    made: MadeTensor | None = None

    @property
    def num_elements(self) -> int:
        """Its elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Its bytes in the pack."""
        return self.num_elements * self.dtype.itemsize

    @property
    def source_offset(self) -> int:
        """First byte in the checkpoint file."""
        row_elements = math.prod(self.source.shape[1:])
        return self.source.offset + self.first * row_elements * self.source.dtype.itemsize


def encoding_of(entry: TensorEntry) -> str:
    """Return how a tensor's elements are written where they are not plain; empty where they are."""
    return entry.encoding if isinstance(entry, EncodedTensor) else ""


def pack_dtype(source: torch.dtype, wanted: torch.dtype) -> torch.dtype:
    """Return the type in the pack: `wanted` for floating-point tensors, unchanged for others."""
    return wanted if source.is_floating_point else source


class ResidentPlan:
    """The file to be written: its header and its tensors in order.

    Attributes:
        header: First bytes of the file, padded to `DATA_ALIGN_BYTES`.
        tensors: The tensors in the order of their data.
        num_bytes: Bytes of the whole file.
    """

    def __init__(self, tensors: list[ResidentTensor]) -> None:
        self.tensors = sorted(tensors, key=lambda tensor: -_roundness(tensor.num_bytes))
        self.header = _header(self.tensors)
        self.num_bytes = len(self.header) + sum(tensor.num_bytes for tensor in self.tensors)


def _roundness(num_bytes: int) -> int:
    """Return the largest power of two up to `DATA_ALIGN_BYTES` that divides a size."""
    return min(num_bytes & -num_bytes, DATA_ALIGN_BYTES) if num_bytes else DATA_ALIGN_BYTES


def _header(tensors: list[ResidentTensor]) -> bytes:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for tensor in tensors:
        end = begin + tensor.num_bytes
        content[tensor.name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(content, separators=(",", ":")).encode()
    length = round_up(8 + len(text), DATA_ALIGN_BYTES) - 8
    return length.to_bytes(8, "little") + text.ljust(length)


@dataclass(frozen=True)
class _Piece:
    tensor: ResidentTensor
    elements: torch.Tensor
    buffer: AlignedBuffer


def read_resident(reader: RangeReader, plan: ResidentPlan, pool: BufferPool) -> Iterator[_Piece]:
    """Yield the checkpoint's elements in the plan's order, in pieces; each must give its buffer back to `pool`."""
    for tensor in plan.tensors:
        if isinstance(tensor.source, EncodedTensor) and tensor.made is None:
            yield from _read_encoded(reader, tensor, tensor.source, pool)
        elif tensor.made is None:
            yield from _read_tensor(reader, tensor, tensor.source, tensor.source_offset, tensor.num_elements, pool)
        elif tensor.made.is_joined:
            for entry in tensor.made.group.entries:
                num_elements = math.prod(entry.shape)
                yield from _read_tensor(reader, tensor, entry, entry.offset, num_elements, pool)
        else:
            yield _Piece(tensor, tensor.made.build(reader), pool.take(0))


def _read_tensor(
    reader: RangeReader, tensor: ResidentTensor, source: TensorEntry, offset: int, num_elements: int, pool: BufferPool
) -> Iterator[_Piece]:
    itemsize = source.dtype.itemsize
    piece_elements = _READ_BYTES // itemsize
    for start in range(0, num_elements, piece_elements):
        num_bytes = min(piece_elements, num_elements - start) * itemsize
        buffer = pool.take(room_bytes(num_bytes))
        raw = reader.read(source.path, offset + start * itemsize, num_bytes, buffer)
        yield _Piece(tensor, typed(raw, source.dtype), buffer)


def _read_encoded(
    reader: RangeReader, tensor: ResidentTensor, source: EncodedTensor, pool: BufferPool
) -> Iterator[_Piece]:
    """Yield a tensor that is known by its rows as values: a few rows at a time, but one that is turned as a whole."""
    num_rows = tensor.num_elements // source.width
    step = max(_READ_BYTES // (source.width * torch.float32.itemsize), 1)
    pieces: list[torch.Tensor] = []
    for start in range(tensor.first, tensor.first + num_rows, step):
        read = RowsRead([(source, range(start, min(start + step, tensor.first + num_rows)))])
        buffer = pool.take(read.room_bytes)
        (encoded,) = read.read(reader, buffer)
        if not source.is_transposed:
            yield _Piece(tensor, source.values(encoded).flatten(), buffer)
            continue
        pieces.append(source.values(encoded).clone())
        pool.give(buffer)
    if pieces:
        stored = (*tensor.shape[:-2], tensor.shape[-1], tensor.shape[-2])
        yield _Piece(tensor, torch.cat(pieces).view(stored).transpose(-1, -2).flatten(), pool.take(0))


class _Stream:
    """Fills aligned buffers with consecutive elements and hands each full one to the writer, checksummed in chunks."""

    def __init__(self, file: AtomicFile, pool: BufferPool, writer: WriteBehind, casts: CastCounts) -> None:
        self._file, self._pool, self._writer, self._casts = file, pool, writer, casts
        self._offset = 0  # of the buffer in the file
        self._used = 0
        self._buffer = pool.take(_WRITE_BYTES)
        self.checksums: list[str] = [""] * -(-file.num_bytes // CHECKSUM_CHUNK_BYTES)

    def put(self, elements: torch.Tensor, dtype: torch.dtype, name: str) -> None:
        """Append a one-dimensional tensor, cast to `dtype`."""
        while elements.numel():
            if self._used == _WRITE_BYTES:
                self.flush()
            count = min((_WRITE_BYTES - self._used) // dtype.itemsize, elements.numel())
            target = bytes_of(self._buffer)[self._used : self._used + count * dtype.itemsize].view(dtype)
            target.copy_(elements[:count])
            self._casts.check(target, elements[:count], name)
            self._used += count * dtype.itemsize
            elements = elements[count:]

    def flush(self) -> None:
        """Send what is buffered; only the last one may be short, and is padded to the alignment for the write."""
        buffer, used, offset = self._buffer, self._used, self._offset
        content = buffer.numpy()
        padded = round_up(used, DATA_ALIGN_BYTES)
        content[used:padded] = 0

        def write() -> None:
            try:
                for begin in range(0, used, CHECKSUM_CHUNK_BYTES):
                    chunk = content[begin : min(begin + CHECKSUM_CHUNK_BYTES, used)]
                    self.checksums[(offset + begin) // CHECKSUM_CHUNK_BYTES] = xxhash.xxh3_64_hexdigest(chunk.data)
                self._file.write(content[:padded], offset)
            finally:
                self._pool.give(buffer)

        self._writer.submit(write)
        self._offset += used
        self._used = 0
        self._buffer = self._pool.take(_WRITE_BYTES)


def write_resident(
    path: Path,
    plan: ResidentPlan,
    pieces: Iterator[_Piece],
    pools: tuple[BufferPool, BufferPool],
    writer: WriteBehind,
    casts: CastCounts,
) -> Generator[tuple[int, tuple[str, ...]]]:
    """Write the file from `pieces`; after each yield the bytes done, and at the end the checksums of its chunks.

    Args:
        path: The file; in place when the iterator is exhausted, and not before.
        plan: What to write.
        pieces: From `read_resident`.
        pools: The buffers of the pieces, and those to write from.
        writer: The writing thread.
        casts: Where weights that became zero are counted.
    """
    reading, writing = pools
    with AtomicFile(path, plan.num_bytes) as file:
        stream = _Stream(file, writing, writer, casts)
        try:
            stream.put(torch.frombuffer(bytearray(plan.header), dtype=torch.uint8), torch.uint8, "header")
            done = len(plan.header)
            for piece in pieces:
                stream.put(piece.elements, piece.tensor.dtype, piece.tensor.source.name)
                done += piece.elements.numel() * piece.tensor.dtype.itemsize
                reading.give(piece.buffer)
                yield done, ()
            stream.flush()
        finally:
            writer.finish()
    if done != plan.num_bytes:
        raise PackError(f"{path}: {plan.num_bytes} bytes planned, {done} written")
    yield plan.num_bytes, tuple(stream.checksums)


def is_same(reader: RangeReader, first: TensorEntry, second: TensorEntry) -> bool:
    """Return whether two checkpoint tensors are equal byte for byte. Reads both, a few MiB at a time."""
    if (first.dtype, first.shape, encoding_of(first)) != (second.dtype, second.shape, encoding_of(second)):
        return False
    buffers = AlignedBuffer(room_bytes(_READ_BYTES)), AlignedBuffer(room_bytes(_READ_BYTES))
    for start in range(0, first.num_bytes, _READ_BYTES):
        count = min(_READ_BYTES, first.num_bytes - start)
        begun = [
            reader.begin(entry.path, entry.offset + start, count, buffer)
            for entry, buffer in zip((first, second), buffers, strict=True)
        ]
        if not torch.equal(begun[0].wait(), begun[1].wait()):
            return False
    return True
