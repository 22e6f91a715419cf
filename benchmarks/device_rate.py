"""The denominators of a streaming benchmark: what the device and the memory give in this run, on these files.

Two sequential rates over the same bytes: `plain` (threads calling preadv on O_DIRECT files, nothing of ours) and
`reader` (flashlm's own reader). Also a plain sequential direct write with dd, and the rate at which memory is read.
"""

from __future__ import annotations

import mmap
import os
import re
import statistics
import subprocess
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any

READ_BYTES = 4 << 20
QUEUE_DEPTH = 8
ALIGN_BYTES = 4096


def direct_chunks(files: Sequence[Path], limit_bytes: int) -> list[tuple[Path, int, int]]:
    """Return (file, offset, length) of aligned reads of `READ_BYTES` in file order, `limit_bytes` in all at most."""
    chunks: list[tuple[Path, int, int]] = []
    left = limit_bytes
    for path in files:
        size = path.stat().st_size // ALIGN_BYTES * ALIGN_BYTES
        for offset in range(0, size, READ_BYTES):
            if left <= 0:
                return chunks
            length = min(READ_BYTES, size - offset)
            chunks.append((path, offset, length))
            left -= length
    return chunks


def plain_read_pass(chunks: Sequence[tuple[Path, int, int]]) -> float:
    """Read the chunks directly, `QUEUE_DEPTH` at a time, and return GB/s. Raises OSError on a short read."""
    descriptors = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path, _, _ in chunks}
    buffers = [mmap.mmap(-1, READ_BYTES) for _ in range(QUEUE_DEPTH)]

    def read(job: tuple[int, tuple[Path, int, int]]) -> int:
        worker, (path, offset, length) = job
        got = os.preadv(descriptors[path], [memoryview(buffers[worker])[:length]], offset)
        if got != length:
            raise OSError(f"{path}: read {got} of {length} bytes at {offset}")
        return got

    try:
        with ThreadPoolExecutor(QUEUE_DEPTH) as pool:
            start_s = time.perf_counter()
            # job k uses buffer k mod depth; two jobs may share one for a moment, which is harmless here
            total = sum(pool.map(read, ((k % QUEUE_DEPTH, chunk) for k, chunk in enumerate(chunks))))
            return total / (time.perf_counter() - start_s) / 1e9
    finally:
        for descriptor in descriptors.values():
            os.close(descriptor)


def reader_pass(chunks: Sequence[tuple[Path, int, int]]) -> float:
    """Read the chunks through flashlm's reader, `QUEUE_DEPTH` in flight, and return GB/s."""
    from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest

    reader = Reader()
    files = {path: reader.open(path, expected_bytes=path.stat().st_size) for path, _, _ in chunks}
    ring = AlignedBuffer(QUEUE_DEPTH * READ_BYTES)
    in_flight: deque[Any] = deque()
    start_s = time.perf_counter()
    for number, (path, offset, length) in enumerate(chunks):
        if len(in_flight) == QUEUE_DEPTH:
            reader.wait(in_flight.popleft())
        slot = number % QUEUE_DEPTH * READ_BYTES
        in_flight.append(reader.submit([ReadRequest(files[path], offset, length, ring, slot)]))
    while in_flight:
        reader.wait(in_flight.popleft())
    elapsed_s = time.perf_counter() - start_s
    reader.close()
    return sum(length for _, _, length in chunks) / elapsed_s / 1e9


def sequential_rates(files: Sequence[Path], *, limit_bytes: int, num_passes: int) -> dict[str, list[float]]:
    """Return GB/s of every pass, `plain` and `reader` in turn; `reader` is left out where flashlm is not installed."""
    chunks = direct_chunks(files, limit_bytes)
    passes = {"plain": plain_read_pass}
    if find_spec("flashlm") is not None:
        passes["reader"] = reader_pass
    rates: dict[str, list[float]] = {name: [] for name in passes}
    for _ in range(num_passes):
        for name, run in passes.items():
            rates[name].append(run(chunks))
    return rates


def memory_read_rate(*, num_bytes: int = 1 << 30, num_passes: int = 5) -> float:
    """Return GB/s at which all cores together read memory (a sum over floats), median of the passes."""
    import torch

    values = torch.ones(num_bytes // 4)
    rates = []
    for _ in range(num_passes):
        start_s = time.perf_counter()
        values.sum()
        rates.append(num_bytes / (time.perf_counter() - start_s) / 1e9)
    return statistics.median(rates)


def direct_write_rate(folder: Path, num_bytes: int) -> dict[str, float | int | str]:
    """Write `num_bytes` with `dd oflag=direct conv=fsync` into `folder`, remove the file, return seconds and GB/s."""
    path = folder / "dd.bin"
    num_blocks = max(num_bytes // READ_BYTES, 1)
    argv = ["dd", "if=/dev/zero", f"of={path}", f"bs={READ_BYTES}", f"count={num_blocks}", "oflag=direct", "conv=fsync"]
    try:
        done = subprocess.run(argv, check=True, capture_output=True, text=True, env={**os.environ, "LC_ALL": "C"})
    finally:
        path.unlink(missing_ok=True)
    match = re.search(r"copied, ([\d.e+-]+) s", done.stderr)
    if match is None:
        raise RuntimeError(f"dd said {done.stderr!r}")
    seconds = float(match.group(1))
    written = num_blocks * READ_BYTES
    return {
        "command": " ".join(argv[:2] + argv[3:]),
        "bytes": written,
        "s": seconds,
        "gb_per_s": written / seconds / 1e9,
    }
