"""The block stream: pinned blocks from memory, the others read ahead of the compute through a ring of staging slots.

Streamed blocks are read in the order in which forward passes consume them, over and over: unit after unit (projections of
attention, a feed-forward layer, the output layer), and from the last one into the next token's first. Whenever a block has
been consumed its slot is handed to the next read at once, so the device stays busy while anything else (attention, sampling,
Python) runs; no thread of ours is needed for that. A caller that jumps is noticed and the ring restarts at the unit that is
asked for.

A pass may be broken off at any instruction, by an interrupt above all, and what should clean up after it, too. So nothing
depends on that: every slot has the ticket of its last read from before the read begins, which slots are free follows from
two counts, and a pass that did not come to its end is known by its mark, on which the next one lets all reads land first.

Blocks that lie one behind the other in memory are given together, as a run: small blocks would cost more in calls than in
bytes.

`read_ahead=False` is mode `naive`: a unit's reads are begun only when it is reached, and stop at its end.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from functools import partial

import torch

from flashlm.engine.block_check import BlockCheck
from flashlm.engine.counters import Counters
from flashlm.engine.forward_pass import counting
from flashlm.engine.turn import Turn, overtaken
from flashlm.errors import StorageError
from flashlm.memory.budget import Placement
from flashlm.rows.layout import LayerLayout
from flashlm.storage.reader import File, Reader, ReadRequest, Ticket
from flashlm.storage.slab import SlabAllocator, SlotRef


@dataclass(frozen=True, slots=True)
class BlockRun:
    """Blocks of a unit, in file order and one behind the other in memory.

    Attributes:
        blocks: Their numbers.
        place: Where the first one's rows begin.
    """

    blocks: range
    place: SlotRef


@dataclass(frozen=True, slots=True)
class _Step:
    """One streamed block in the cyclic order."""

    unit: int
    block: int
    file: File
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """One pass over one unit."""

    unit: int


class BlockStream:
    """Gives the blocks of each dense unit in file order, wherever they live.

    Pinned blocks are read at construction, at the device's sequential rate.

    Args:
        reader: The model's reader.
        files: One open file per unit of which a token uses every block, in forward order.
        layouts: Their geometry.
        placement: What is pinned, and the staging.
        read_ahead: False begins a unit's reads only when it is reached.
        counters: The model's totals; what a forward pass causes is counted in the pass.
        check: What is held against checksums; None: nothing.
        slabs: Gives the memory of the ring and the pinned blocks; None: without a bound.

    Raises:
        BudgetError: The placement outgrows what slabs may take.
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
        slabs: SlabAllocator | None = None,
    ) -> None:
        slabs = slabs or SlabAllocator()
        self._totals = counters or Counters()
        self._check = check or BlockCheck()
        self._reader = reader
        self._read_ahead = read_ahead
        self._turn = Turn()
        self._pinned_bytes = [
            [layout.read_bytes(block) for block in range(each.num_pinned)]
            for layout, each in zip(layouts, placement.dense, strict=True)
        ]
        self._strides = [layout.block_stride_bytes for layout in layouts]
        self._run_blocks = [layout.run_blocks for layout in layouts]
        self._pinned = self._read_pinned(files, layouts, slabs)
        self._steps, self._first = _schedule(files, layouts, placement)
        self._files = files
        self._num_blocks = [layout.num_blocks for layout in layouts]
        self._slot_bytes = placement.slot_bytes
        ring = slabs.slab(placement.slot_bytes, placement.num_slots) if placement.num_slots else None
        self._ring = [ring.slot(slot) for slot in range(placement.num_slots)] if ring else []
        self._num_slots = placement.num_slots
        # Reads are numbered since the last restart. Read n is of step (first_step + n) % steps and goes to slot n % slots;
        # those from num_consumed to num_begun hold their slots.
        self._tickets: list[Ticket | None] = [None] * placement.num_slots  # of each slot's last read
        self._first_step = 0
        self._num_begun = 0
        self._num_consumed = 0
        self._open: _Pass | None = None  # the pass that has not come to its end
        self._check_first(files, layouts, placement)

    @property
    def counters(self) -> Counters:
        """Where to count: the pass that runs in this thread, or the totals outside of one."""
        return counting(self._totals)

    def _read_pinned(
        self, files: Sequence[File], layouts: Sequence[LayerLayout], slabs: SlabAllocator
    ) -> list[list[SlotRef]]:
        """Read every pinned block into slabs, one a unit; return where each unit's blocks are."""
        if not any(self._pinned_bytes):
            return [[] for _ in layouts]
        cuts = [(stride, sum(sizes)) for stride, sizes in zip(self._strides, self._pinned_bytes, strict=True)]
        pinned = [
            [slab.slot(block) for block in range(len(sizes))]
            for slab, sizes in zip(
                slabs.slabs(cuts, huge_pages=False),  # docs/experiments.md: first touch
                self._pinned_bytes,
                strict=True,
            )
        ]
        requests = [
            ReadRequest.into(place, file, layout.offset_of(block), layout.read_bytes(block))
            for file, layout, places in zip(files, layouts, pinned, strict=True)
            for block, place in enumerate(places)
        ]
        blocks = [(unit, block) for unit, sizes in enumerate(self._pinned_bytes) for block in range(len(sizes))]
        self._check.read(self._reader, requests, blocks)
        return pinned

    def _check_first(self, files: Sequence[File], layouts: Sequence[LayerLayout], placement: Placement) -> None:
        """Check one block of each unit of which none is pinned: a file of another unit or pack is noticed at once."""
        if not self._ring:
            return
        for unit, (file, layout, each) in enumerate(zip(files, layouts, placement.dense, strict=True)):
            if each.num_pinned == 0:
                request = ReadRequest.into(self._ring[0], file, layout.offset_of(0), layout.read_bytes(0))
                self._check.sample(self._reader, request, unit, 0)

    def pinned_bytes(self, unit: int) -> torch.Tensor | None:
        """Return the bytes of `unit` where all its blocks are pinned: uint8, as in its file; None where they are not.

        The tensor is a view that keeps the memory alive.
        """
        place = self.pinned_place(unit)
        return None if place is None else torch.from_numpy(place.numpy(sum(self._pinned_bytes[unit])))

    def pinned_place(self, unit: int) -> SlotRef | None:
        """Return where the first row of `unit` is where all its blocks are pinned; None where they are not."""
        is_pinned = len(self._pinned_bytes[unit]) == self._num_blocks[unit]
        return self._pinned[unit][0] if is_pinned else None

    def unit(self, unit: int) -> AbstractContextManager[Iterator[BlockRun]]:
        """Give the blocks of `unit`, in file order; each run is valid until the next one is taken.

        Only one forward pass at a time gets a unit; others wait. One that ends early costs what was read ahead.

        Raises:
            StorageError: A block can't be read; or there are fewer than the unit has, or the pass was overtaken by
                another one of its thread.
            PackError: A streamed block is damaged (where that is checked).
        """
        current = _Pass(unit)
        return self._turn.take(self._enter, partial(self._leave, current), current)

    def _enter(self, current: _Pass) -> Iterator[BlockRun]:
        if self._open is not None:
            self._restart_at(0)
        self._open = current
        if self._steps:
            self._aim(current.unit)
        return self._runs(current)

    def _leave(self, current: _Pass, runs: Iterator[BlockRun], has_failed: bool) -> None:
        if self._open is current:  # it has not come to its end, and was not overtaken
            self.settle()

    def settle(self) -> None:
        """Let all reads land and forget them: nothing is in flight then."""
        self._restart_at(0)
        self._open = None

    def _runs(self, current: _Pass) -> Iterator[BlockRun]:
        unit = current.unit
        self._check_is_open(current)
        counters = self.counters
        sizes, places = self._pinned_bytes[unit], self._pinned[unit]
        for start in range(0, len(sizes), self._run_blocks[unit]):
            blocks = range(start, min(start + self._run_blocks[unit], len(sizes)))
            counters.pinned_bytes += sum(sizes[start : blocks.stop])
            counters.num_pinned += len(blocks)
            yield BlockRun(blocks, places[start])
            self._check_is_open(current)
            if self._num_begun > self._num_consumed:  # asking begins the next pieces where some have landed meanwhile
                self._reader.is_done(self._ticket(self._num_begun - 1))
        next_block = len(sizes)
        while next_block < self._num_blocks[unit]:
            self._check_is_next(unit, next_block)
            run = range(next_block, next_block + self._land(unit))
            yield BlockRun(run, self._ring[self._num_consumed % self._num_slots])
            self._check_is_open(current)
            self._num_consumed += len(run)
            next_block = run.stop
            self._submit(unit)
        self._open = None

    def _land(self, unit: int) -> int:
        """Wait for the next block of `unit`; return how many there are by then, in neighbouring slots."""
        counters = self.counters
        joins = self._slot_bytes == self._strides[unit]
        most = min(self._run_blocks[unit], self._num_slots // 4) if joins else 1
        count = 0
        for number in range(self._num_consumed, self._num_begun):
            position = self._position(number)
            step, ticket = self._steps[position], self._ticket(number)
            if count == 0:
                started_s = time.perf_counter()
                self._reader.wait(ticket)
                counters.wait_s += time.perf_counter() - started_s
            else:
                follows = position > 0 and number % self._num_slots > 0  # of its neighbour, in the order and in memory
                if count >= most or not follows or step.unit != unit or not self._reader.is_done(ticket):
                    break
                self._reader.wait(ticket)
            self._check.streamed(step.unit, step.block, self._ring[number % self._num_slots], step.num_bytes)
            counters.bytes_read += step.num_bytes
            counters.num_reads += 1
            count += 1
        return count

    def _position(self, number: int) -> int:
        """Return the step of a read."""
        return (self._first_step + number) % len(self._steps)

    def _ticket(self, number: int) -> Ticket:
        ticket = self._tickets[number % self._num_slots]
        assert ticket is not None
        return ticket

    def _check_is_open(self, current: _Pass) -> None:
        """Refuse to go on with a pass whose slots hold another one's blocks."""
        if self._open is not current:
            raise overtaken()

    def _check_is_next(self, unit: int, block: int) -> None:
        """Refuse to give fewer blocks than the unit has, or others: a sum that lacks one would be wrong in silence."""
        first = self._first[unit]
        if first is not None and self._num_begun > self._num_consumed:
            wanted = first + block - len(self._pinned_bytes[unit])
            if self._position(self._num_consumed) == wanted:
                return
        raise StorageError(
            f"{self._files[unit].path.name} gave {block} of its {self._num_blocks[unit]} blocks, and the next one is not"
            " being read: this answer is lost, the next pass reads them anew",
            path=str(self._files[unit].path),
        )

    def _aim(self, unit: int) -> None:
        """Make the ring's next landing the first streamed block of `unit`, and fill it."""
        first = self._first[unit]
        if first is None:
            return
        if self._num_begun == self._num_consumed or self._position(self._num_consumed) != first:
            self._restart_at(first)
        self._submit(unit)

    def _restart_at(self, position: int) -> None:
        """Let all reads land, forget them, and continue at `position`. An interrupt leaves it to the next one."""
        self._reader.settle(ticket for ticket in self._tickets if ticket is not None)
        self._num_begun = self._num_consumed = 0
        self._first_step = position

    def _submit(self, unit: int) -> None:
        """Give every free slot the next read."""
        while self._num_begun - self._num_consumed < self._num_slots:
            step = self._steps[self._position(self._num_begun)]
            if not self._read_ahead and step.unit != unit:
                return
            slot = self._num_begun % self._num_slots
            request = ReadRequest.into(self._ring[slot], step.file, step.offset, step.num_bytes)
            self._tickets[slot] = ticket = Ticket()  # before its read begins: from here on the slot is waited for
            self._reader.submit([request], ticket)
            self._num_begun += 1

    def close(self) -> None:
        """Let the reads in flight land and release the buffers' readers."""
        with suppress(StorageError), self._turn.take(self.settle, lambda nothing, has_failed: None):
            pass


def _schedule(
    files: Sequence[File], layouts: Sequence[LayerLayout], placement: Placement
) -> tuple[list[_Step], list[int | None]]:
    """Return all streamed blocks in the order of use, and where each unit's first one stands (None: all pinned)."""
    steps: list[_Step] = []
    first: list[int | None] = []
    for unit, (file, layout) in enumerate(zip(files, layouts, strict=True)):
        streamed = range(placement.dense[unit].num_pinned, layout.num_blocks)
        first.append(len(steps) if streamed else None)
        steps += [_Step(unit, block, file, layout.offset_of(block), layout.read_bytes(block)) for block in streamed]
    return steps, first
