"""How fast device and memory are at this moment, in reads and products like those of a mixture of experts.

Measured between the tokens of a run: a shared machine drifts by a factor of two within minutes.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path

import numpy as np
import torch

from flashlm.pack.manifest import read_manifest
from flashlm.planner.estimate import EXPERT_READS
from flashlm.rows import kernels
from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest

NUM_SLOTS, NUM_READS = 8, 24
WIDTH, NUM_MATRIX_ROWS = 2048, 32768
MATRIX_BYTES = WIDTH * NUM_MATRIX_ROWS * 2


def state_bytes(pack: Path) -> int:
    """Return the memory that an `ExpertState` of the pack holds, and then some."""
    return NUM_SLOTS * read_manifest(pack).experts[0].layout.block_stride_bytes + MATRIX_BYTES + (16 << 20)


class ExpertState:
    """Measures reads of whole experts from all over a pack, and products with as much memory as ten of them."""

    def __init__(self, pack: Path) -> None:
        manifest = read_manifest(pack)
        self._files = [pack / "flash" / entry.file for entry in manifest.experts]
        self._layout = manifest.experts[0].layout
        self._random = np.random.default_rng(3)
        self._slots = AlignedBuffer(NUM_SLOTS * self._layout.block_stride_bytes)
        self._slots.numpy()[::4096] = 1  # touched
        self._weights = torch.ones(NUM_MATRIX_ROWS, WIDTH, dtype=torch.bfloat16)
        self._token = torch.randn(1, WIDTH)

    def measure(self) -> dict[str, float]:
        """Return GB/s of a batch of random experts, as the probe reads (one submission), and of products."""
        return {"read_gb_per_s": self._read(), "memory_gb_per_s": self._multiply()}

    def _read(self) -> float:
        layout, num_bytes = self._layout, self._layout.read_bytes(0)
        with Reader(queue_depth=EXPERT_READS.queue_depth) as reader:
            files = [reader.open(path) for path in self._files]
            requests = []
            for index in range(NUM_READS):
                file = files[int(self._random.integers(len(files)))]
                expert = int(self._random.integers(layout.num_blocks))
                slot = index % NUM_SLOTS * layout.block_stride_bytes
                requests.append(ReadRequest(file, layout.offset_of(expert), num_bytes, self._slots, slot))
            started_s = time.perf_counter()
            reader.read(requests)
            return NUM_READS * num_bytes / (time.perf_counter() - started_s) / 1e9

    def _multiply(self) -> float:
        rows = kernels.matrix_rows(self._weights)
        out = torch.empty(1, NUM_MATRIX_ROWS)
        times = []
        for _ in range(4):
            started_s = time.perf_counter()
            kernels.project(self._token, rows, 0, out)
            times.append(time.perf_counter() - started_s)
        return MATRIX_BYTES / statistics.median(times[1:]) / 1e9
