"""How fast device and memory are at this moment: a second's worth of the reads and products that a token is made of.

A shared machine drifts by a factor of two within minutes. Measuring its state between the tokens of a run tells that drift
from the error of a prediction.
"""

from __future__ import annotations

import time
from collections import deque
from pathlib import Path

import numpy as np
import torch

from flashlm.rows import kernels
from flashlm.storage.reader import AlignedBuffer, File, Reader, ReadRequest, RowGeometry, Ticket

BLOCKS_IN_FLIGHT, NUM_BLOCKS = 16, 64
BATCH_ROWS, NUM_BATCHES = 600, 8  # a layer's misses
WIDTH, NUM_MATRIX_ROWS = 4096, 12288
STATE_BYTES = 192 << 20  # what it holds with blocks of 4 MiB, and then some


class DeviceState:
    """Measures the files of one pack, whose blocks and rows are so long."""

    def __init__(self, pack: Path, block_bytes: int, row_bytes: int) -> None:
        self._files = sorted((pack / "flash").glob("layer-*.rows"))
        self._block_bytes = block_bytes
        self._row_bytes = row_bytes
        self._random = np.random.default_rng(3)
        self._ring = AlignedBuffer(BLOCKS_IN_FLIGHT * block_bytes)
        self._slots = AlignedBuffer((BATCH_ROWS + 1) * row_bytes)
        for buffer in (self._ring, self._slots):
            buffer.numpy()[::4096] = 1  # touched
        self._weights = torch.ones(NUM_MATRIX_ROWS, WIDTH, dtype=torch.bfloat16)
        self._token = torch.randn(1, WIDTH).to(torch.bfloat16)
        self._next_file = 0

    def measure(self) -> dict[str, float]:
        """Return GB/s of a stream, seconds of a batch of `BATCH_ROWS` rows, and GB/s of products with matrices."""
        return {"stream_gb_per_s": self._stream(), "batch_s": self._rows(), "matrix_gb_per_s": self._matrix()}

    def _stream(self) -> float:
        with Reader(queue_depth=64) as reader:
            places: list[tuple[File, int]] = []
            while len(places) < NUM_BLOCKS:
                file = reader.open(self._files[self._next_file % len(self._files)])
                self._next_file += 1
                offsets = range(0, file.num_bytes - self._block_bytes + 1, self._block_bytes)
                places += [(file, offset) for offset in offsets]
            tickets: deque[Ticket] = deque()
            started_s = time.perf_counter()
            for index, (file, offset) in enumerate(places[:NUM_BLOCKS]):
                if len(tickets) == BLOCKS_IN_FLIGHT:
                    reader.wait(tickets.popleft())
                slot = index % BLOCKS_IN_FLIGHT * self._block_bytes
                tickets.append(reader.submit([ReadRequest(file, offset, self._block_bytes, self._ring, slot)]))
            for ticket in tickets:
                reader.wait(ticket)
            return NUM_BLOCKS * self._block_bytes / (time.perf_counter() - started_s) / 1e9

    def _rows(self) -> float:
        times = []
        with Reader() as reader:
            for _ in range(NUM_BATCHES):
                file = reader.open(self._files[int(self._random.integers(len(self._files)))])
                num_rows = file.num_bytes // self._row_bytes - 1
                count = min(BATCH_ROWS, num_rows // 2)
                geometry = RowGeometry(
                    row_stride_bytes=self._row_bytes, block_rows=1 << 40, block_stride_bytes=self._row_bytes
                )
                rows = torch.from_numpy(np.sort(self._random.choice(num_rows, count, replace=False)).astype(np.int32))
                started_s = time.perf_counter()
                slots = torch.arange(count, dtype=torch.int32)
                reader.wait(reader.submit_rows(file, geometry, rows, slots, self._slots))
                times.append((time.perf_counter() - started_s) * BATCH_ROWS / count)
        return float(np.median(times))

    def _matrix(self) -> float:
        """Return the rate of one token with square matrices, as the probe measures it."""
        stride_bytes = WIDTH * 2
        times = []
        for _ in range(5):
            started_s = time.perf_counter()
            for start in range(0, NUM_MATRIX_ROWS, WIDTH):
                out = torch.empty(1, WIDTH)
                address = self._weights.data_ptr() + start * stride_bytes
                matrix = kernels.RowBlock(address, WIDTH, stride_bytes, WIDTH, torch.bfloat16, 1)
                kernels.project(self._token.to(torch.float32).contiguous(), matrix, 0, out)
                out.to(torch.bfloat16)
            times.append(time.perf_counter() - started_s)
        return self._weights.numel() * 2 / float(np.median(times[1:])) / 1e9
