"""Single rows held against a pack whose checksums are those of blocks (mode `sparse`).

What is there after loading is checked block by block; a block of which only some rows are held is read whole once. To
check rows that are read later one by one, every block is read and checked once, and a checksum of each row kept (8 bytes).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
import xxhash

from flashlm.engine.block_check import BlockCheck, content_of, landed
from flashlm.errors import PackError
from flashlm.pack.checksums import ADVICE
from flashlm.rows.layout import LayerLayout
from flashlm.storage.reader import AlignedBuffer, File, Reader, ReadRequest

Bytes = npt.NDArray[np.uint8]
_BUFFER_BYTES = 64 << 20


class RowCheck:
    """Checks rows of any layer.

    Args:
        reader: Reads blocks.
        files: One open file per layer.
        layouts: Their geometry.
        blocks: Knows the checksums.
    """

    def __init__(
        self, reader: Reader, files: Sequence[File], layouts: Sequence[LayerLayout], blocks: BlockCheck
    ) -> None:
        self._reader = reader
        self._files = files
        self._layouts = layouts
        self._blocks = blocks
        self._sums: list[npt.NDArray[np.uint64]] = []

    def held(self, layer: int, rows: torch.Tensor, slots: torch.Tensor, slab: AlignedBuffer, offset: int) -> None:
        """Check rows that were read while loading.

        Args:
            layer: Whose they are.
            rows: int32 (num_rows,), ascending.
            slots: int32 (num_rows,): row i lies at `offset + slots[i] * row_stride_bytes`.
            slab: Where they are.
            offset: Where slot 0 of the layer is.

        Raises:
            PackError: A block that they belong to is damaged, or a row is not as its block has it.
            StorageError: A block can't be read.
        """
        layout = self._layouts[layer]
        slot_of = dict(zip(rows.tolist(), slots.tolist(), strict=True))
        for block in sorted({row // layout.block_rows for row in slot_of}):
            span = layout.rows_of(block)
            held = [(row, slot_of[row]) for row in span if row in slot_of]
            views = {row: _row(slab, offset, slot, layout) for row, slot in held}
            if len(held) == len(span):
                content = np.zeros(layout.read_bytes(block), dtype=np.uint8)
                for index, row in enumerate(span):
                    content[index * layout.row_stride_bytes : (index + 1) * layout.row_stride_bytes] = views[row]
                self._blocks.check(layer, block, content)
                continue
            whole = next(self._read(layer, [block]))[1]
            for row, view in views.items():
                if not np.array_equal(whole[row - span.start], view):
                    raise self._damaged(layer, row)

    def learn(self) -> None:
        """Read and check every block of every layer, and keep a checksum of each row.

        Raises:
            PackError: A block is damaged.
            StorageError: A block can't be read.
        """
        for layer, layout in enumerate(self._layouts):
            sums = np.zeros(layout.num_rows, dtype=np.uint64)
            for block, rows in self._read(layer, range(layout.num_blocks)):
                for row, content in zip(layout.rows_of(block), rows, strict=True):
                    sums[row] = xxhash.xxh3_64_intdigest(content.data)
            self._sums.append(sums)

    def streamed(self, layer: int, rows: torch.Tensor, slots: torch.Tensor, slab: AlignedBuffer, offset: int) -> None:
        """Check rows that have just landed; arguments as for `held`.

        Raises:
            PackError: One is damaged.
        """
        layout, sums = self._layouts[layer], self._sums[layer]
        for row, slot in zip(rows.tolist(), slots.tolist(), strict=True):
            if xxhash.xxh3_64_intdigest(_row(slab, offset, slot, layout).data) != sums[row]:
                raise self._damaged(layer, row)

    def _read(self, layer: int, blocks: Sequence[int]) -> Iterator[tuple[int, Bytes]]:
        """Yield blocks, checked, each as (rows, row_stride_bytes); valid until the next one is taken."""
        layout = self._layouts[layer]
        step = max(_BUFFER_BYTES // layout.block_stride_bytes, 1)
        buffer = AlignedBuffer(min(step, len(blocks)) * layout.block_stride_bytes)
        for first in range(0, len(blocks), step):
            some = blocks[first : first + step]
            requests = [
                ReadRequest(
                    self._files[layer],
                    layout.offset_of(block),
                    layout.read_bytes(block),
                    buffer,
                    index * layout.block_stride_bytes,
                )
                for index, block in enumerate(some)
            ]
            for block, request in zip(some, landed(self._reader, requests), strict=True):
                content = content_of(buffer, request.buffer_offset, request.num_bytes)
                self._blocks.check(layer, block, content)
                num_rows = len(layout.rows_of(block))
                yield block, content[: num_rows * layout.row_stride_bytes].reshape(num_rows, layout.row_stride_bytes)

    def _damaged(self, layer: int, row: int) -> PackError:
        return PackError(f"{self._files[layer].path}: row {row} is damaged. {ADVICE}")


def _row(slab: AlignedBuffer, offset: int, slot: int, layout: LayerLayout) -> Bytes:
    return content_of(slab, offset + slot * layout.row_stride_bytes, layout.row_stride_bytes)
