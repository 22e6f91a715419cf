"""The block stream: pinned blocks from memory, the others read ahead of the compute through a ring of staging slots.

Streamed blocks are read in the order in which forward passes consume them, over and over: layer after layer, and from the
last layer into the next token's first. Whenever a block has been consumed its slot is handed to the next read at once, so
the device stays busy while anything else (attention, sampling, Python) runs; no thread of ours is needed for that. A caller
that jumps (an aborted forward pass) is noticed and the ring restarts at the layer that is asked for.

Blocks that lie one behind the other in memory are given together, as a run: small blocks would cost more in calls than in
bytes.

`read_ahead=False` is mode `naive`: a layer's reads are begun only when the layer is reached, and stop at its end.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from flashlm.engine.block_check import BlockCheck
from flashlm.engine.counters import Counters
from flashlm.errors import StorageError
from flashlm.memory.budget import Placement
from flashlm.pack.layout import LayerLayout
from flashlm.storage.reader import AlignedBuffer, File, Reader, ReadRequest, Ticket


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of a layer, in file order and one behind the other in memory.

    Attributes:
        blocks: Their numbers.
        address: Where the first one's rows begin.
    """

    blocks: range
    address: int


@dataclass(frozen=True, slots=True)
class _Step:
    """One streamed block in the cyclic order."""

    layer: int
    block: int
    file: File
    offset: int
    num_bytes: int


@dataclass(slots=True)
class _Landing:
    """A read on its way into a slot."""

    position: int
    slot: int
    ticket: Ticket


class BlockStream:
    """Gives the blocks of each layer in file order, wherever they live.

    Pinned blocks are read at construction, at the device's sequential rate.

    Args:
        reader: The reader, shared with nothing else while the stream lives.
        files: One open layer file per streamed layer.
        layouts: Their geometry.
        placement: What is pinned, and the staging.
        read_ahead: False begins a layer's reads only when it is reached.
        counters: Where traffic and time are added up.
        check: What is held against checksums; None: nothing.

    Raises:
        StorageError: A pinned block can't be read.
        PackError: A pinned block is damaged.
    """

    def __init__(
        self,
        reader: Reader,
        files: Sequence[File],
        layouts: Sequence[LayerLayout],
        placement: Placement,
        *,
        read_ahead: bool = True,
        counters: Counters | None = None,
        check: BlockCheck | None = None,
    ) -> None:
        self.counters = counters or Counters()
        self._check = check or BlockCheck()
        self._reader = reader
        self._read_ahead = read_ahead
        self._lock = threading.RLock()
        self._pinned_bytes = [
            [layout.read_bytes(block) for block in range(count)]
            for layout, count in zip(layouts, placement.num_pinned, strict=True)
        ]
        self._strides = [layout.block_stride_bytes for layout in layouts]
        self._run_blocks = [layout.run_blocks for layout in layouts]
        self._pinned, self._pinned_addresses = self._read_pinned(files, layouts, placement)
        self._steps, self._first = _schedule(files, layouts, placement)
        self._slot_bytes = placement.slot_bytes
        self._ring = AlignedBuffer(placement.staging_bytes) if placement.num_slots else None
        self._num_slots = placement.num_slots
        self._free_slots = deque(range(placement.num_slots))  # taken and given back in turn: neighbours hold neighbours
        self._landings: deque[_Landing] = deque()
        self._next_step = 0
        self._check_first(files, layouts, placement)

    def _read_pinned(
        self, files: Sequence[File], layouts: Sequence[LayerLayout], placement: Placement
    ) -> tuple[AlignedBuffer | None, list[list[int]]]:
        """Read every pinned block into one buffer; return it and the address of each layer's blocks."""
        if not placement.pinned_bytes:
            return None, [[] for _ in layouts]
        pool = AlignedBuffer(placement.pinned_bytes, huge_pages=False)  # docs/experiments.md: first touch
        addresses: list[list[int]] = []
        requests = []
        position = 0
        for file, layout, sizes in zip(files, layouts, self._pinned_bytes, strict=True):
            addresses.append([])
            for block, num_bytes in enumerate(sizes):
                requests.append(ReadRequest(file, layout.offset_of(block), num_bytes, pool, position))
                addresses[-1].append(pool.address + position)
                position += num_bytes
        blocks = [(layer, block) for layer, sizes in enumerate(self._pinned_bytes) for block in range(len(sizes))]
        self._check.read(self._reader, requests, blocks)
        return pool, addresses

    def _check_first(self, files: Sequence[File], layouts: Sequence[LayerLayout], placement: Placement) -> None:
        """Check one block of each layer of which none is pinned: a file of another layer or pack is noticed at once."""
        if self._ring is None:
            return
        for layer, (file, layout, num_pinned) in enumerate(zip(files, layouts, placement.num_pinned, strict=True)):
            if num_pinned == 0:
                request = ReadRequest(file, layout.offset_of(0), layout.read_bytes(0), self._ring, 0)
                self._check.sample(self._reader, request, layer, 0)

    @contextmanager
    def layer(self, layer: int) -> Iterator[Iterator[BlockRun]]:
        """Yield the blocks of `layer`, in file order; each run is valid until the next one is taken.

        Only one forward pass at a time gets a layer; others wait.

        Raises:
            StorageError: A block can't be read.
            PackError: A streamed block is damaged (where that is checked).
        """
        with self._lock:
            try:
                if self._steps:
                    self._aim(layer)
                yield self._runs(layer)
            except BaseException:
                self._restart_at(None)
                raise

    def _runs(self, layer: int) -> Iterator[BlockRun]:
        counters = self.counters
        sizes, addresses = self._pinned_bytes[layer], self._pinned_addresses[layer]
        for start in range(0, len(sizes), self._run_blocks[layer]):
            blocks = range(start, min(start + self._run_blocks[layer], len(sizes)))
            counters.pinned_bytes += sum(sizes[start : blocks.stop])
            counters.num_pinned += len(blocks)
            yield BlockRun(blocks, addresses[start])
            if self._landings:  # asking begins the next pieces where some have landed meanwhile
                self._reader.is_done(self._landings[-1].ticket)
        next_block = len(sizes)
        while self._landings and self._steps[self._landings[0].position].layer == layer:
            assert self._ring is not None
            last = self._landings[0].position
            run = range(next_block, next_block + self._land(layer))
            yield BlockRun(run, self._ring.address + self._landings[0].slot * self._slot_bytes)
            for _ in run:
                landing = self._landings.popleft()
                last = landing.position
                self._free_slots.append(landing.slot)
            next_block = run.stop
            self._submit(layer)
            if last + 1 == len(self._steps) or self._steps[last + 1].layer != layer:
                return

    def _land(self, layer: int) -> int:
        """Wait for the next block of `layer`; return how many there are by then, in neighbouring slots."""
        counters = self.counters
        assert self._ring is not None
        joins = self._slot_bytes == self._strides[layer]
        most = min(self._run_blocks[layer], self._num_slots // 4) if joins else 1
        count = 0
        before: _Landing | None = None
        for landing in self._landings:
            step = self._steps[landing.position]
            if before is None:
                started_s = time.perf_counter()
                self._reader.wait(landing.ticket)
                counters.wait_s += time.perf_counter() - started_s
            else:
                follows = landing.position == before.position + 1 and landing.slot == before.slot + 1
                if count >= most or not follows or step.layer != layer or not self._reader.is_done(landing.ticket):
                    break
                self._reader.wait(landing.ticket)
            counters.bytes_read += step.num_bytes
            counters.num_reads += 1
            self._check.streamed(step.layer, step.block, self._ring, landing.slot * self._slot_bytes, step.num_bytes)
            count += 1
            before = landing
        return count

    def _aim(self, layer: int) -> None:
        """Make the ring's next landing the first streamed block of `layer`, and fill it."""
        first = self._first[layer]
        if first is None:
            return
        if not self._landings or self._landings[0].position != first:
            self._restart_at(first)
        self._submit(layer)

    def _restart_at(self, position: int | None) -> None:
        """Let all reads land, forget them, and continue at `position` (None: wherever the next layer asks)."""
        while self._landings:
            # A failed read is somebody else's error by now; an interrupt leaves the rest for the next restart.
            with suppress(StorageError):
                self._reader.wait(self._landings[0].ticket)
            self._free_slots.append(self._landings.popleft().slot)
        self._next_step = position or 0

    def _submit(self, layer: int) -> None:
        """Give every free slot the next read."""
        assert self._ring is not None
        while self._free_slots:
            step = self._steps[self._next_step]
            if not self._read_ahead and step.layer != layer:
                return
            slot = self._free_slots.popleft()
            request = ReadRequest(step.file, step.offset, step.num_bytes, self._ring, slot * self._slot_bytes)
            self._landings.append(_Landing(self._next_step, slot, self._reader.submit([request])))
            self._next_step = (self._next_step + 1) % len(self._steps)

    def close(self) -> None:
        """Let the reads in flight land and release the buffers' readers."""
        with self._lock:
            self._restart_at(None)


def _schedule(
    files: Sequence[File], layouts: Sequence[LayerLayout], placement: Placement
) -> tuple[list[_Step], list[int | None]]:
    """Return all streamed blocks in the order of use, and where each layer's first one stands (None: all pinned)."""
    steps: list[_Step] = []
    first: list[int | None] = []
    for layer, (file, layout) in enumerate(zip(files, layouts, strict=True)):
        streamed = range(placement.num_pinned[layer], layout.num_blocks)
        first.append(len(steps) if streamed else None)
        steps += [_Step(layer, block, file, layout.offset_of(block), layout.read_bytes(block)) for block in streamed]
    return steps, first
