"""What reading reaches on a device, through our own reader: sizes, depths, patterns, batches of rows."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

import torch

from flashlm.probe.device_profile import Pattern, ReadPoint, RowReadPoint
from flashlm.probe.file import ProbeFile
from flashlm.storage.reader import DEFAULT_PIECE_BYTES, AlignedBuffer, Backend, Reader, ReadRequest, RowGeometry, Ticket

RANDOM_BYTES = (*(4096 << step for step in range(9)), 4 << 20)  # 4 KiB to 1 MiB, and 4 MiB
SEQUENTIAL_BYTES = (64 << 10, 256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 8, 32, 128)
ROW_BYTES = (4096, 8192, 16384, 32768, 65536)
SEGMENTS, SEGMENT_BYTES, SEGMENT_READS = 16, 1024, 32
ROW_BATCHES = (1, 100, 600, 3000)
NUM_ROUNDS = 3
BATCHES_OF_DEPTH = 32  # reads of a round, in depths: its beginning and end are then hardly felt
ROUND_BYTES = 96 << 20  # at most, of one round
BUFFER_BYTES = 256 << 20
BLOCK_ROWS = 256

Progress = Callable[[int, int, str], None]


class ReadProbe:
    """Measures one test file.

    Args:
        file: It.
        seconds: For all points together, about.
        progress: Called with points done, points in all, what.
    """

    def __init__(self, file: ProbeFile, seconds: float, progress: Progress) -> None:
        self._file = file
        self._buffer = AlignedBuffer(min(BUFFER_BYTES, file.num_bytes))
        self._buffer.numpy()[:] = 1  # touched, so that the first point pays for nothing
        self._generator = torch.Generator().manual_seed(0)
        self._progress = progress
        self._points = list(_points())
        self._point_s = seconds / (len(self._points) + len(ROW_BYTES) * len(ROW_BATCHES) + 1)
        self._num_done = 0

    @property
    def num_points(self) -> int:
        """Of both kinds."""
        return len(self._points) + len(ROW_BYTES) * len(ROW_BATCHES) + 1

    def _step(self, what: str) -> None:
        self._progress(self._num_done, self.num_points, what)
        self._num_done += 1

    def reads(self) -> list[ReadPoint]:
        """Measure every point that this machine's back ends allow."""
        found = []
        for pattern, read_bytes, depth, backend in self._points:
            self._step(f"{pattern} reads of {read_bytes >> 10} KiB, {depth} in flight")
            if read_bytes * 2 > self._file.num_bytes:
                continue
            found.append(self.point(pattern, read_bytes, depth, backend))
        return found

    def point(self, pattern: Pattern, read_bytes: int, depth: int, backend: Backend = "auto") -> ReadPoint:
        """Measure one point."""
        piece_bytes = min(read_bytes, DEFAULT_PIECE_BYTES)
        with Reader(backend=backend, queue_depth=depth, num_threads=depth, piece_bytes=piece_bytes) as reader:
            return self._measure(reader, pattern, read_bytes, depth)

    def _measure(self, reader: Reader, pattern: Pattern, read_bytes: int, depth: int) -> ReadPoint:
        num_places = self._file.num_bytes // read_bytes
        room = min(ROUND_BYTES, self._buffer.num_bytes) // read_bytes
        count = max(min(room, max(depth, 2) * BATCHES_OF_DEPTH, num_places), 1)
        # Landing in few places, as in other tools: what the processor's cache does for them is the same.
        num_slots = min(2 * depth, room) if pattern == "random" else room
        rates: list[float] = []
        cpus: list[float] = []
        latencies: list[float] = []
        next_place = 0
        with reader.open(self._file.path) as file:
            ends_s = time.perf_counter() + self._point_s
            while len(rates) < NUM_ROUNDS or time.perf_counter() < ends_s:
                if pattern == "random":
                    places = torch.randint(num_places, (count,), generator=self._generator).tolist()
                else:
                    places = [(next_place + index) % num_places for index in range(count)]
                    next_place = places[-1] + 1
                requests = [
                    ReadRequest(file, place * read_bytes, read_bytes, self._buffer, index % num_slots * read_bytes)
                    for index, place in enumerate(places)
                ]
                cpu_s, started_s = time.process_time(), time.perf_counter()
                if pattern == "sequential":
                    _stream(reader, requests, depth)
                else:
                    reader.read(requests)
                rates.append(count / (time.perf_counter() - started_s))
                cpus.append((time.process_time() - cpu_s) / count)
                if pattern == "random" and depth == 1:
                    latencies += _latencies(reader, requests)
        rate = statistics.median(rates)
        ordered = sorted(latencies)
        return ReadPoint(
            pattern=pattern,
            backend=reader.backend,
            read_bytes=read_bytes,
            queue_depth=depth,
            gb_per_s=rate * read_bytes / 1e9,
            reads_per_s=rate,
            cpu_s_per_read=statistics.median(cpus),
            latency_p50_s=ordered[len(ordered) // 2] if ordered else None,
            latency_p99_s=ordered[len(ordered) * 99 // 100] if ordered else None,
        )

    def row_reads(self) -> list[RowReadPoint]:
        """Measure batches of scattered rows, ascending in the file, as the neuron cache reads them."""
        found = []
        with Reader() as reader, reader.open(self._file.path) as file:
            for row_bytes in ROW_BYTES:
                geometry = RowGeometry(
                    row_stride_bytes=row_bytes, block_rows=BLOCK_ROWS, block_stride_bytes=BLOCK_ROWS * row_bytes
                )
                num_places = self._file.num_bytes // row_bytes // BLOCK_ROWS * BLOCK_ROWS
                for batch in ROW_BATCHES:
                    self._step(f"{batch} scattered rows of {row_bytes >> 10} KiB")
                    if batch > num_places // 4 or (batch + 1) * row_bytes > self._buffer.num_bytes:
                        continue
                    times: list[float] = []
                    ends_s = time.perf_counter() + self._point_s
                    while len(times) < NUM_ROUNDS or time.perf_counter() < ends_s:
                        rows = torch.randperm(num_places, generator=self._generator)[:batch].sort().values.int()
                        slots = torch.randperm(batch, generator=self._generator).int()
                        started_s = time.perf_counter()
                        reader.wait(reader.submit_rows(file, geometry, rows, slots, self._buffer))
                        times.append(time.perf_counter() - started_s)
                    found.append(RowReadPoint(row_bytes=row_bytes, num_rows=batch, seconds=statistics.median(times)))
        return found

    def segment_s(self) -> float:
        """Return what each further place in memory adds to a read: the same bytes landing in one place and in many."""
        self._step(f"{SEGMENTS} places for one read")
        with Reader() as reader, reader.open(self._file.path) as file:
            row_bytes = SEGMENT_BYTES if file.alignment_bytes <= SEGMENT_BYTES else file.alignment_bytes
            read_bytes = row_bytes * SEGMENTS
            num_places = self._file.num_bytes // read_bytes
            times: dict[int, list[float]] = {1: [], SEGMENTS: []}
            ends_s = time.perf_counter() + self._point_s
            while len(times[1]) < NUM_ROUNDS or time.perf_counter() < ends_s:
                places = torch.randperm(num_places, generator=self._generator)[:SEGMENT_READS].sort().values
                for parts, found in times.items():
                    geometry = RowGeometry(
                        row_stride_bytes=read_bytes // parts, block_rows=1 << 40, block_stride_bytes=read_bytes // parts
                    )
                    rows = (places[:, None] * parts + torch.arange(parts)).flatten().int()
                    slots = torch.randperm(len(rows), generator=self._generator).int()
                    started_s = time.perf_counter()
                    reader.wait(reader.submit_rows(file, geometry, rows, slots, self._buffer))
                    found.append(time.perf_counter() - started_s)
        one, many = (statistics.median(found) for found in times.values())
        return max(many - one, 0.0) / SEGMENT_READS / (SEGMENTS - 1)


def _latencies(reader: Reader, requests: list[ReadRequest]) -> list[float]:
    """Return what single reads take, one after the other, our calls included."""
    latencies = []
    for request in requests:
        started_s = time.perf_counter()
        reader.read([request])
        latencies.append(time.perf_counter() - started_s)
    return latencies


def _stream(reader: Reader, requests: list[ReadRequest], depth: int) -> None:
    """Read as the engine streams blocks: one submission and one wait each, `depth` in flight."""
    tickets: deque[Ticket] = deque()
    for request in requests:
        if len(tickets) == depth:
            reader.wait(tickets.popleft())
        tickets.append(reader.submit([request]))
    for ticket in tickets:
        reader.wait(ticket)


def _points() -> Iterator[tuple[Pattern, int, int, Backend]]:
    """Yield (pattern, read size, depth, back end); the back end that is not used by default gets a few points."""
    with Reader() as reader:
        own: Backend = "io_uring" if reader.backend == "io_uring" else "threads"
    for read_bytes in RANDOM_BYTES:
        for depth in DEPTHS:
            if read_bytes * depth <= ROUND_BYTES:
                yield "random", read_bytes, depth, own
    for read_bytes in SEQUENTIAL_BYTES:
        for depth in DEPTHS[1:]:
            if read_bytes * depth <= ROUND_BYTES:
                yield "sequential", read_bytes, depth, own
    if own == "io_uring":
        yield "random", 16384, 32, "threads"
        yield "sequential", 1 << 20, 8, "threads"
