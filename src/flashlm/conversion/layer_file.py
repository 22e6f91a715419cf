"""One layer's weights from the checkpoint into its row file: gather, transpose, cast, checksum, write.

Weights that stay in their encoding are moved, not computed with: rows of gate and up as they are, and of `down`, whose
groups go across neurons, the groups that belong to a block's neurons.

Parts that lie neuron by neuron in the checkpoint are read in chunks of a few blocks. A part that lies the other way
(the down-projection of `nn.Linear`) is held in panels of whole columns, at most `PANEL_BYTES` each: the whole matrix
for models of up to some 10 B parameters, several passes over the file for larger ones. Transposing goes by tiles of
`TILE_COLUMNS`: 1.2 GB/s on one core, where `t().contiguous()` in bf16 reaches 0.5 and a plain strided copy 0.2.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import xxhash

from flashlm.conversion.casts import CastCounts
from flashlm.conversion.pipeline import BufferPool, WriteBehind
from flashlm.conversion.sources.tensors import EncodedTensor, RowsRead, by_rows
from flashlm.errors import ConfigError, PackError
from flashlm.pack.checkpoint import TensorEntry
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.layout import LayerLayout
from flashlm.rows.quantize import QUANTIZERS
from flashlm.storage.ranges import RangeReader, bytes_of
from flashlm.storage.reader import AlignedBuffer
from flashlm.storage.writer import AtomicFile
from flashlm.structure.families import PartSource

CHUNK_BYTES = 16 << 20  # of the row file: one write
AHEAD_BYTES = 128 << 20  # of chunks read while files are synced, where more than four fit
PANEL_BYTES = 256 << 20
PASS_BYTES = 16 << 20  # one read of a pass over a matrix that is held in panels
TILE_COLUMNS = 64
QUANTIZED_BYTES = 1 << 20  # of fp32 at a time


@dataclass(frozen=True)
class LayerPart:
    """One part of a layer's rows: where it is, and the checkpoint tensor that holds it."""

    source: PartSource
    entry: TensorEntry

    @property
    def neuron_axis(self) -> int:
        """The axis of the tensor, as the checkpoint holds it, along which neurons run."""
        is_turned = isinstance(self.entry, EncodedTensor) and self.entry.is_transposed
        return 1 - self.source.neuron_axis if is_turned else self.source.neuron_axis


@dataclass(frozen=True)
class RowChunk:
    """Weights of some whole blocks, as read.

    Attributes:
        rows: The rows.
        parts: For each part its weights as (rows, hidden_size) views in the checkpoint's dtype. Of blocks whose parts lie
            whole, as `by block`: `down` as (hidden_size, rows), and what is kept in its encoding as bytes of its rows.
        buffers: What the views lie in, with the pool to give it back to.
    """

    rows: range
    parts: tuple[torch.Tensor, ...]
    buffers: tuple[tuple[BufferPool, AlignedBuffer], ...]

    def release(self) -> None:
        """Give the buffers back; the views are void afterwards."""
        for pool, buffer in self.buffers:
            pool.give(buffer)


class LayerPools:
    """The buffers of a conversion: some chunks read, two panels, a few chunks to write.

    Args:
        num_column_parts: The most parts of a layer that are held in panels.
        num_chunks: Chunks that may be read before they are used.
    """

    def __init__(self, *, num_column_parts: int, num_chunks: int = 4) -> None:
        self.rows = BufferPool(num_chunks)
        self.panels = BufferPool(2 * max(num_column_parts, 1))
        self.passes = BufferPool(1)
        self.out = BufferPool(3)

    @property
    def reading(self) -> tuple[BufferPool, ...]:
        """The pools that the reading thread takes from."""
        return (self.rows, self.panels, self.passes)


def num_chunks_ahead(layouts: Iterable[LayerLayout]) -> int:
    """Return how many chunks to have buffers for: fewer where blocks, and so chunks, are large."""
    largest = max((layout.block_stride_bytes for layout in layouts), default=0)
    return min(max(AHEAD_BYTES // max(largest, CHUNK_BYTES), 4), 8)


def read_layer(
    reader: RangeReader,
    layout: LayerLayout,
    parts: tuple[LayerPart, ...],
    pools: LayerPools,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    panel_bytes: int = PANEL_BYTES,
) -> Iterator[RowChunk]:
    """Yield the rows of a layer in order, in chunks of whole blocks. Holds what `LayerPools` allows."""
    chunk_rows = max(chunk_bytes // layout.block_stride_bytes, 1) * layout.block_rows
    panel_rows = _panel_rows(layout, parts, chunk_rows, panel_bytes)
    for panel_start in range(0, layout.num_rows, panel_rows):
        panel = range(panel_start, min(panel_start + panel_rows, layout.num_rows))
        columns: dict[int, tuple[torch.Tensor, AlignedBuffer]] = {
            index: _read_panel(reader, part, layout, panel, pools, index)
            for index, part in enumerate(parts)
            if part.neuron_axis == 1
        }
        for start in range(panel.start, panel.stop, chunk_rows):
            rows = range(start, min(start + chunk_rows, panel.stop))
            tensors, buffer = _read_rows(reader, parts, layout, rows, pools.rows)
            for index, (matrix, _) in columns.items():
                tensors[index] = _columns(layout, index, matrix, rows, panel)
            buffers = [(pools.rows, buffer)]
            if rows.stop == panel.stop:
                buffers += [(pools.panels, used) for _, used in columns.values()]
            yield RowChunk(rows, tuple(tensors[index] for index in range(len(parts))), tuple(buffers))


def _columns(layout: LayerLayout, index: int, matrix: torch.Tensor, rows: range, panel: range) -> torch.Tensor:
    """Return the columns of a panel that belong to `rows`: as columns where parts lie whole, else turned to rows."""
    low, high = rows.start - panel.start, rows.stop - panel.start
    if not layout.is_by_block:
        return matrix[:, low:high].t()
    if matrix.dtype != torch.uint8:
        return matrix[:, low:high]
    encoding = ENCODINGS[layout.encodings[index]]
    return matrix[:, encoding.bytes_of(low) : encoding.bytes_of(high)]


def _panel_rows(layout: LayerLayout, parts: tuple[LayerPart, ...], chunk_rows: int, panel_bytes: int) -> int:
    neuron_bytes = sum(layout.hidden_size * part.entry.dtype.itemsize for part in parts if part.neuron_axis == 1)
    if layout.is_by_block:
        neuron_bytes = layout.part_bytes(layout.num_parts - 1) // layout.num_rows
    if neuron_bytes * layout.num_rows <= panel_bytes:
        return layout.num_rows
    return max(panel_bytes // neuron_bytes // chunk_rows, 1) * chunk_rows


def _read_rows(
    reader: RangeReader, parts: tuple[LayerPart, ...], layout: LayerLayout, rows: range, pool: BufferPool
) -> tuple[dict[int, torch.Tensor], AlignedBuffer]:
    """Read the row-wise parts of `rows` into one buffer."""
    wanted = {
        index: (by_rows(part.entry), range(part.source.first_neuron + rows.start, part.source.first_neuron + rows.stop))
        for index, part in enumerate(parts)
        if part.neuron_axis == 0
    }
    read = RowsRead(list(wanted.values()))
    buffer = pool.take(read.room_bytes)
    found = dict(zip(wanted, read.read(reader, buffer), strict=True))
    return {index: _as_written(layout, index, wanted[index][0], encoded) for index, encoded in found.items()}, buffer


def _as_written(layout: LayerLayout, index: int, entry: EncodedTensor, encoded: torch.Tensor) -> torch.Tensor:
    """Return rows as their part of the layout takes them: as they are where it has their encoding, else as values."""
    return encoded if is_kept(layout, index, entry) else entry.values(encoded)


def is_kept(layout: LayerLayout, index: int, entry: EncodedTensor) -> bool:
    """Return whether a part's rows go into the file in the encoding that they have."""
    return entry.encoding == layout.encodings[index] and entry.change is None


def _read_panel(
    reader: RangeReader, part: LayerPart, layout: LayerLayout, rows: range, pools: LayerPools, index: int
) -> tuple[torch.Tensor, AlignedBuffer]:
    """Read columns of a (hidden_size, neurons) matrix; return (hidden_size, rows) and the buffer that holds it.

    What is kept in its encoding is returned as bytes, (hidden_size, bytes of so many elements).
    """
    entry = by_rows(part.entry)
    first = part.source.first_neuron + rows.start
    kept = layout.is_by_block and is_kept(layout, index, entry)
    encoding = ENCODINGS[layout.encodings[index]]
    dtype = torch.uint8 if kept else entry.dtype
    cut = (
        slice(encoding.bytes_of(first), encoding.bytes_of(first + len(rows)))
        if kept
        else slice(first, first + len(rows))
    )
    width = cut.stop - cut.start
    whole = RowsRead([(entry, range(layout.hidden_size))])
    if len(rows) == entry.width and (kept or entry.is_plain) and whole.is_one_piece:
        buffer = pools.panels.take(whole.room_bytes)
        (encoded,) = whole.read(reader, buffer)
        return (encoded if kept else entry.values(encoded)), buffer
    buffer = pools.panels.take(layout.hidden_size * width * dtype.itemsize)
    panel = bytes_of(buffer)[: layout.hidden_size * width * dtype.itemsize].view(dtype).view(layout.hidden_size, width)
    lines = max(PASS_BYTES // entry.row_bytes, 1)
    for top in range(0, layout.hidden_size, lines):
        read = RowsRead([(entry, range(top, min(top + lines, layout.hidden_size)))])
        scratch = pools.passes.take(read.room_bytes)
        (encoded,) = read.read(reader, scratch)
        matrix = encoded if kept else entry.values(encoded)
        panel[top : top + len(matrix)].copy_(matrix[:, cut])
        pools.passes.give(scratch)
    return panel, buffer


def typed(raw: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return bytes as elements; a copy only where a file keeps them at an odd address."""
    return (raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()).view(dtype)


def write_layer(
    path: Path,
    layout: LayerLayout,
    chunks: Iterator[RowChunk],
    part_names: tuple[str, ...],
    pools: LayerPools,
    writer: WriteBehind,
    casts: CastCounts,
) -> Generator[tuple[int, tuple[str, ...]]]:
    """Write a layer's file from `chunks`; after each chunk yield the bytes done and the checksums of its blocks.

    The file is in place when the iterator is exhausted, and not before. Weights that became zero are counted in `casts`.

    Raises:
        StorageError: A write failed.
        PackError: A finite weight overflows the pack's dtype.
    """
    with AtomicFile(path, layout.file_bytes) as file:
        done_rows = 0
        checksums: list[str] = [""] * layout.num_blocks
        try:
            while done_rows < layout.num_rows:
                chunk = next(chunks)
                _submit_chunk(file, layout, chunk, part_names, pools, writer, casts, checksums)
                done_rows = chunk.rows.stop
                yield layout.offset_of(chunk.rows.start // layout.block_rows), ()
        finally:
            writer.finish()
    yield layout.file_bytes, tuple(checksums)


def _submit_chunk(
    file: AtomicFile,
    layout: LayerLayout,
    chunk: RowChunk,
    part_names: tuple[str, ...],
    pools: LayerPools,
    writer: WriteBehind,
    casts: CastCounts,
    checksums: list[str],
) -> None:
    first = chunk.rows.start // layout.block_rows
    last = (chunk.rows.stop - 1) // layout.block_rows
    start = layout.offset_of(first)
    num_bytes = layout.offset_of(last) + layout.read_bytes(last) - start
    out = pools.out.take(num_bytes)
    content = out.numpy()
    fill_rows(torch.from_numpy(content[:num_bytes]), layout, chunk, part_names, casts)
    chunk.release()

    def write() -> None:
        try:
            for block in range(first, last + 1):
                begin = layout.offset_of(block) - start
                checksums[block] = xxhash.xxh3_64_hexdigest(content[begin : begin + layout.read_bytes(block)].data)
            file.write(content[:num_bytes], start)
        finally:
            pools.out.give(out)

    writer.submit(write)


def fill_rows(
    out: torch.Tensor, layout: LayerLayout, chunk: RowChunk, part_names: tuple[str, ...], casts: CastCounts
) -> None:
    """Lay the rows of `chunk` into `out` (bytes, from the first block's start), padding with zeros."""
    if layout.is_by_block:
        _fill_blocks(out, layout, chunk, part_names, casts)
        return
    out.zero_()
    for start in range(chunk.rows.start, chunk.rows.stop, layout.block_rows):
        begin = layout.offset_of((start - chunk.rows.start) // layout.block_rows)
        num_rows = min(layout.block_rows, chunk.rows.stop - start)
        block = out[begin : begin + num_rows * layout.row_stride_bytes].view(num_rows, -1)
        low = start - chunk.rows.start
        for index, (part, placed) in enumerate(zip(chunk.parts, layout.placed, strict=True)):
            target = block[:, placed.offset_bytes : placed.offset_bytes + placed.num_bytes]
            source = part[low : low + num_rows]
            dtype = placed.encoding.dtype
            if dtype is None:
                if source.dtype == torch.uint8:
                    target.copy_(source)
                else:
                    _quantize(target, source, placed.encoding.name, part_names[index])
                continue
            elements = target.view(dtype)
            copy_tiled(elements, source)
            casts.check(elements, source, part_names[index])


def _fill_blocks(
    out: torch.Tensor, layout: LayerLayout, chunk: RowChunk, part_names: tuple[str, ...], casts: CastCounts
) -> None:
    """Lay blocks whose parts lie whole into `out`; only what lies between and behind them is zeroed."""
    for start in range(chunk.rows.start, chunk.rows.stop, layout.block_rows):
        begin = layout.offset_of((start - chunk.rows.start) // layout.block_rows)
        num_rows = min(layout.block_rows, layout.num_rows - start)
        low = start - chunk.rows.start
        end = begin
        for placed, part, name in zip(layout.block_parts(num_rows), chunk.parts, part_names, strict=True):
            first = begin + placed.offset_bytes
            out[end:first].zero_()
            end = first + placed.num_bytes
            target = out[first : first + placed.num_bytes].view(placed.num_rows, placed.row_stride_bytes)
            dtype = placed.encoding.dtype
            if dtype is None and placed.part == "down":
                target.copy_(part[:, placed.encoding.bytes_of(low) : placed.encoding.bytes_of(low + num_rows)])
                continue
            if dtype is None:
                target.copy_(part[low : low + num_rows])
                continue
            elements = target.view(dtype)
            source = part[:, low : low + num_rows] if placed.part == "down" else part[low : low + num_rows]
            elements.copy_(source)
            casts.check(elements, source, name)
        out[end : begin + layout.read_bytes(start // layout.block_rows)].zero_()


def _quantize(target: torch.Tensor, source: torch.Tensor, encoding: str, name: str) -> None:
    """Write `source` (num_rows, hidden_size) in an encoding that is not plain, in pieces that stay in the cache."""
    step = max(QUANTIZED_BYTES // (4 * source.shape[1]), 1)
    wide = torch.empty(min(step, len(source)), source.shape[1], dtype=torch.float32)
    for start in range(0, len(source), step):
        piece = source[start : start + step]
        copy_tiled(wide[: len(piece)], piece)
        try:
            QUANTIZERS[encoding](wide[: len(piece)], target[start : start + step])
        except ConfigError as error:
            raise PackError(f"{name} can't be quantised: {error}") from error


def copy_tiled(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy and cast a matrix; where the source is transposed, by tiles that stay in the cache."""
    if source.stride(1) == 1:
        target.copy_(source)
        return
    for column in range(0, target.shape[1], TILE_COLUMNS):
        target[:, column : column + TILE_COLUMNS].copy_(source[:, column : column + TILE_COLUMNS])
