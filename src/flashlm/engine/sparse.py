"""Rows on demand: the neuron cache, the slab that its slots are cut from, and the reads of what is missing.

One pass of one layer: the rows asked for are looked up; those that are missing are submitted together, each landing in its
slot; the caller computes on the rows that were held while they land, then on the rest (paper §3, design "Sparse decode").

A pass may be broken off at any instruction, by an interrupt above all, and what should clean up after it, too. So it is
noted before anything changes, with the ticket that its reads will have; a note that is there still when the next pass
begins is settled first: the reads land, and the rows are forgotten.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch

from flashlm.engine.counters import Counters
from flashlm.engine.forward_pass import counting
from flashlm.engine.row_check import RowCheck
from flashlm.engine.turn import Turn, overtaken
from flashlm.memory.neuron_cache import LayerCapacity, Lookup, NeuronCache
from flashlm.rows.layout import LayerLayout
from flashlm.storage.reader import AlignedBuffer, File, Reader, RowGeometry, Ticket


@dataclass(slots=True, eq=False)
class _Note:
    """A pass that has not come to its end: rows of `layer` that may be in the cache without having landed."""

    layer: int
    rows: torch.Tensor
    ticket: Ticket = field(default_factory=Ticket)


@dataclass(slots=True)
class RowFetch:
    """The rows of one pass, on their way.

    Attributes:
        layer: Whose they are.
        rows: int32 (num_rows,), ascending.
        lookup: Their slots; those that were held come first in `lookup.order`.
        address: Where slot 0 of the layer is.
        ticket: The reads under way; None once they have landed.
        note: What the store goes by where the pass is broken off.
    """

    layer: int
    rows: torch.Tensor
    lookup: Lookup
    address: int
    ticket: Ticket | None
    note: _Note


class SparseRows:
    """Gives scattered rows of any layer, from DRAM where the neuron cache holds them, else from flash.

    Args:
        reader: The model's reader.
        files: One open layer file per streamed layer.
        layouts: Their geometry.
        capacities: Slots of each layer.
        window: Policy `window(k)`; None is LRU.
        max_gap: Rows between two missing ones that are read through rather than begin another read.
        counters: The model's totals; what a forward pass causes is counted in the pass.

    Raises:
        StorageError: A pinned row can't be read.
    """

    def __init__(
        self,
        reader: Reader,
        files: Sequence[File],
        layouts: Sequence[LayerLayout],
        capacities: Sequence[LayerCapacity],
        *,
        window: int | None = None,
        max_gap: int = 0,
        counters: Counters | None = None,
    ) -> None:
        self._totals = counters or Counters()
        self.cache = NeuronCache(capacities, window=window)
        self.max_gap = max_gap
        self._reader = reader
        self._files = files
        self._layouts = layouts
        self._turn = Turn()
        self._open: _Note | None = None
        self._offsets = [0]
        for capacity, layout in zip(capacities, layouts, strict=True):
            self._offsets.append(self._offsets[-1] + capacity.num_slots * layout.row_stride_bytes)
        # Huge pages: a row then lies in one piece of physical memory, and scattered reads are up to twice as fast
        # (docs/experiments.md).
        self._slab = AlignedBuffer(slab_bytes(layouts, capacities))
        self._geometries = [
            RowGeometry(
                row_stride_bytes=layout.row_stride_bytes,
                block_rows=layout.block_rows,
                block_stride_bytes=layout.block_stride_bytes,
            )
            for layout in layouts
        ]
        self._check: RowCheck | None = None
        self._filled: list[tuple[int, torch.Tensor, torch.Tensor]] = []  # layer, rows, slots: what loading has read
        self._fill_pinned(capacities)

    @property
    def counters(self) -> Counters:
        """Where to count: the pass that runs in this thread, or the totals outside of one."""
        return counting(self._totals)

    def use_check(self, check: RowCheck, *, keeps: bool) -> None:
        """Hold the rows that are there already against the checksums; `keeps`: and every row that is read from now on.

        Raises:
            PackError: A row is damaged.
            StorageError: A block can't be read.
        """
        for layer in range(len(self._layouts)):
            filled = [(rows, slots) for each, rows, slots in self._filled if each == layer]
            if filled:
                rows, slots = (torch.cat(parts) for parts in zip(*filled, strict=True))
                check.held(layer, rows, slots, self._slab, self._offsets[layer])
        self._filled.clear()
        if keeps:
            check.learn()
            self._check = check

    def _fill_pinned(self, capacities: Sequence[LayerCapacity]) -> None:
        for layer, capacity in enumerate(capacities):
            rows = torch.arange(capacity.num_pinned, dtype=torch.int32)
            if len(rows):
                ticket = Ticket()
                self._submit(layer, rows, rows, ticket)
                self._reader.wait(ticket)
                self._filled.append((layer, rows, rows))

    def _submit(self, layer: int, rows: torch.Tensor, slots: torch.Tensor, ticket: Ticket) -> None:
        self._reader.submit_rows(
            self._files[layer],
            self._geometries[layer],
            rows,
            slots,
            self._slab,
            buffer_offset=self._offsets[layer],
            max_gap=self.max_gap,
            ticket=ticket,
        )

    def chunks(self, layer: int, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield `rows` in runs that fit into the layer's slots at once; mostly one."""
        room = max(self.cache.room(layer), 1)
        num_pinned = self.cache.layers[layer].num_pinned
        if len(rows) <= room:
            yield rows
            return
        first = int((rows < num_pinned).sum()) if num_pinned else 0
        stop = first + room
        yield rows[:stop]
        for start in range(stop, len(rows), room):
            yield rows[start : start + room]

    def fetch(self, layer: int, rows: torch.Tensor, *, is_same_step: bool = False) -> AbstractContextManager[RowFetch]:
        """Look `rows` (int32, ascending) up and begin to read what is missing; call `wait` before using that.

        The slots are valid until the context ends. An error or an interrupt leaves no row in the cache that did not land.

        Raises:
            ConfigError: The rows are not as stated, or do not fit.
            StorageError: A read is refused or fails (from `wait`).
        """
        return self._turn.take(self._enter, self._leave, layer, rows, is_same_step)

    def _enter(self, layer: int, rows: torch.Tensor, is_same_step: bool) -> RowFetch:
        if self._open is not None:
            self._settle(self._open)
        started_s = time.perf_counter()
        self._open = note = _Note(layer, rows)  # before the cache says that rows are there which have yet to be read
        try:
            return self._begin(note, started_s, is_same_step)
        except BaseException:
            self._settle(note)
            raise

    def _begin(self, note: _Note, started_s: float, is_same_step: bool) -> RowFetch:
        counters, layer, rows = self.counters, note.layer, note.rows
        lookup = self.cache.acquire(layer, rows, is_same_step=is_same_step)
        missing = lookup.order[lookup.num_held :]
        note.rows = rows[missing]
        managed_s = time.perf_counter()
        counters.manage_s += managed_s - started_s
        counters.hit_rows += lookup.num_held
        counters.miss_rows += len(missing)
        if len(missing):
            self._submit(layer, note.rows, lookup.slots[missing], note.ticket)
            counters.submit_s += time.perf_counter() - managed_s
        ticket = note.ticket if len(missing) else None
        return RowFetch(layer, rows, lookup, self._slab.address + self._offsets[layer], ticket, note)

    def _leave(self, fetch: RowFetch, has_failed: bool) -> None:
        try:
            if not has_failed:
                self.wait(fetch)
                self._open = None
        finally:
            if self._open is fetch.note:
                self._settle(fetch.note)

    def _settle(self, note: _Note) -> None:
        """Let the reads of a pass that was broken off land, and forget its rows."""
        self._reader.settle([note.ticket])
        self.cache.forget(note.layer, note.rows)
        self._open = None

    def wait(self, fetch: RowFetch) -> None:
        """Wait until the missing rows of `fetch` have landed.

        Raises:
            StorageError: A read failed, or the pass was overtaken by another one of its thread.
            PackError: A row is damaged (where that is checked).
        """
        if self._open is not fetch.note:
            raise overtaken()
        if fetch.ticket is None:
            return
        started_s = time.perf_counter()
        self._reader.wait(fetch.ticket)
        if self._check is not None:
            missing = fetch.lookup.order[fetch.lookup.num_held :]
            place = fetch.address - self._slab.address
            self._check.streamed(fetch.layer, fetch.rows[missing], fetch.lookup.slots[missing], self._slab, place)
        self.counters.wait_s += time.perf_counter() - started_s
        self.counters.bytes_read += fetch.ticket.num_bytes
        self.counters.num_reads += fetch.ticket.num_reads
        fetch.ticket = None

    def warm(self) -> None:
        """Fill every layer's free slots with its first rows, sequentially: the hottest, where rows are ordered by use."""
        for layer, capacity in enumerate(self.cache.layers):
            rows = torch.arange(capacity.num_pinned, capacity.num_slots, dtype=torch.int32)
            if len(rows):
                with self.fetch(layer, rows) as fetch:
                    self.wait(fetch)
                    self._filled.append((layer, rows, fetch.lookup.slots))


def slab_bytes(layouts: Sequence[LayerLayout], capacities: Sequence[LayerCapacity]) -> int:
    """Return the memory of the slots of all layers, and of one row more that gaps are read into."""
    slots_bytes = sum(
        capacity.num_slots * layout.row_stride_bytes for layout, capacity in zip(layouts, capacities, strict=True)
    )
    return slots_bytes + max(layout.row_stride_bytes for layout in layouts)
