"""Experts on demand: the expert cache, the slab that its slots are cut from, and the reads of what is missing.

One pass of one layer: the reads of all missing experts are begun together (each in pieces, so that many are in flight), each
landing in its slot; the caller computes on experts as they come. Where a layer needs more experts at once than it can hold,
a prompt mostly, the next ones are begun as soon as others are done: every needed expert is read once.

A pass may be broken off at any instruction, by an interrupt above all, and what should clean up after it, too. So it is
noted before anything changes, with a ticket of every read before it begins; a note that is there still when the next pass
begins is settled first: the reads land, what the pass missed is forgotten, and the cache finds its slots again.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flashlm.engine.block_check import BlockCheck
from flashlm.engine.counters import Counters
from flashlm.engine.forward_pass import counting
from flashlm.engine.turn import Turn, overtaken
from flashlm.errors import StorageError
from flashlm.memory.budget import Placement
from flashlm.memory.expert_cache import ExpertCache, ExpertStep
from flashlm.memory.expert_policy import CachePolicy
from flashlm.rows.layout import LayerLayout
from flashlm.storage.reader import AlignedBuffer, File, Reader, ReadRequest, Ticket

WARM_BYTES = 256 << 20  # of reads begun together when the cache is filled at loading


@dataclass(slots=True)
class LayerTraffic:
    """Experts of one layer that were found in the cache, and that were read."""

    num_hits: int = 0
    num_misses: int = 0


@dataclass(slots=True, eq=False)
class _Note:
    """What has not come to its end: experts that may be in the cache without having landed, and their reads."""

    misses: list[tuple[int, int]] = field(default_factory=list)  # (layer, expert)
    tickets: list[Ticket] = field(default_factory=list)


@dataclass(slots=True, eq=False)
class _Pass:
    """One pass: reads under way by expert, experts still `pending` for want of a slot, and those that may be used."""

    step: ExpertStep
    pending: deque[int]
    ready: set[int]
    note: _Note
    begun: dict[int, Ticket] = field(default_factory=dict)


class ExpertStore:
    """Gives experts of any layer, from DRAM where the cache holds them, else from flash.

    Args:
        reader: The model's reader.
        files: One open file per layer of experts.
        layouts: Their geometry: block e is expert e.
        placement: Slots of each layer, and spare ones.
        policy: What goes when room is needed, what never goes, and what is there in the beginning.
        counters: The model's totals; what a forward pass causes is counted in the pass.
        check: What is held against checksums; None: nothing.

    Attributes:
        traffic: Hits and misses of each layer since loading.
    """

    def __init__(
        self,
        reader: Reader,
        files: Sequence[File],
        layouts: Sequence[LayerLayout],
        placement: Placement,
        *,
        policy: CachePolicy,
        counters: Counters | None = None,
        check: BlockCheck | None = None,
    ) -> None:
        self._check = check or BlockCheck()
        assert placement.experts is not None
        self._totals = counters or Counters()
        self.traffic = [LayerTraffic() for _ in layouts]
        self.policy = policy
        self.cache = ExpertCache(
            placement.experts, num_spare=placement.num_slots, policy=policy.eviction, pinned=policy.pinned
        )
        self._capacities = placement.experts
        self._reader = reader
        self._files = files
        self._layouts = layouts
        self._slot_bytes = placement.slot_bytes
        self._slab = AlignedBuffer(self.cache.num_slots * placement.slot_bytes)
        self._turn = Turn()
        self._open: _Note | None = None

    @property
    def counters(self) -> Counters:
        """Where to count: the pass that runs in this thread, or the totals outside of one."""
        return counting(self._totals)

    def describe(self) -> dict[str, Any]:
        """Return policy, slots and traffic of each layer, as JSON-ready values."""
        return {
            "policy": self.policy.name,
            "num_pinned": [len(experts) for experts in self.policy.pinned],
            "slot_bytes": self._slot_bytes,
            "slots": list(self._capacities),
            "num_experts": [layout.num_blocks for layout in self._layouts],
            "hits": [each.num_hits for each in self.traffic],
            "misses": [each.num_misses for each in self.traffic],
        }

    def experts(
        self, layer: int, needed: Sequence[int], by_recency: Sequence[int], *, held_first: bool
    ) -> AbstractContextManager[Iterator[list[tuple[int, int]]]]:
        """Give groups of (expert, address of its block), of all `needed` ones; addresses are valid until the next group.

        Only one forward pass at a time gets a layer; others wait. An error or an interrupt leaves no expert in the cache
        that did not land.

        Args:
            layer: Its index.
            needed: The experts, ascending.
            by_recency: The same, the one that is most likely to be needed next at the end.
            held_first: Give those that are held first, in one group while the others land, and then groups of what has
                landed; else one by one in the order of `needed`.

        Raises:
            StorageError: An expert can't be read; or fewer would be given than are needed, or the pass was overtaken by
                another one of its thread.
            PackError: An expert is damaged (where that is checked).
        """
        note = _Note()
        enter = partial(self._enter, note, layer, needed, by_recency, held_first)
        return self._turn.take(enter, partial(self._leave, note))

    def _enter(
        self, note: _Note, layer: int, needed: Sequence[int], by_recency: Sequence[int], held_first: bool
    ) -> Iterator[list[tuple[int, int]]]:
        started_s = time.perf_counter()
        self._settle()
        step = self.cache.begin(layer, needed, by_recency)
        note.misses = [(layer, expert) for expert in step.misses]
        self._open = note  # before slots change hands
        self.counters.hit_experts += len(step.hits)
        self.counters.miss_experts += len(step.misses)
        self.traffic[layer].num_hits += len(step.hits)
        self.traffic[layer].num_misses += len(step.misses)
        running = _Pass(step, deque(step.misses), set(step.hits), note)
        self.counters.manage_s += time.perf_counter() - started_s
        self._begin(layer, running)
        return self._serve_held_first(layer, running) if held_first else self._serve(layer, running, needed)

    def _leave(self, note: _Note, groups: Iterator[list[tuple[int, int]]] | None, has_failed: bool) -> None:
        if self._open is note:  # it has not come to its end, and was not overtaken
            self._settle()

    def _settle(self) -> None:
        """Let the reads of a pass that was broken off land, and forget its experts."""
        note = self._open
        if note is not None:
            self._reader.settle(note.tickets)
            self.cache.break_off(note.misses)
            self._open = None

    def _serve(self, layer: int, running: _Pass, needed: Sequence[int]) -> Iterator[list[tuple[int, int]]]:
        for expert in needed:
            if expert in running.begun:
                self._wait(layer, running, expert)
            yield self._group(running, [expert])
            self._end(layer, running, [expert])
        self._finish(layer, running)

    def _serve_held_first(self, layer: int, running: _Pass) -> Iterator[list[tuple[int, int]]]:
        landing = running.step.misses
        if hits := running.step.hits:
            yield self._group(running, hits)
            self._end(layer, running, hits)
        first = 0
        while first < len(landing):
            self._wait(layer, running, landing[first])
            last = first + 1
            while last < len(landing) and self._has_landed(running, landing[last]):
                self._wait(layer, running, landing[last])
                last += 1
            yield self._group(running, landing[first:last])
            self._end(layer, running, landing[first:last])
            first = last
        self._finish(layer, running)

    def _finish(self, layer: int, running: _Pass) -> None:
        """Note that all was given, and used."""
        step = running.step
        if running.pending or running.begun or len(running.ready) != len(step.hits) + len(step.misses):
            raise StorageError(
                f"layer {layer} gave {len(running.ready)} of {len(step.hits) + len(step.misses)} experts: this answer is"
                " lost, the next pass reads them anew",
                path=str(self._files[layer].path),
            )
        self._open = None

    def _has_landed(self, running: _Pass, expert: int) -> bool:
        ticket = running.begun.get(expert)
        return ticket is not None and self._reader.is_done(ticket)

    def _group(self, running: _Pass, experts: Sequence[int]) -> list[tuple[int, int]]:
        self._check_is_open(running)
        if not running.ready.issuperset(experts):
            raise StorageError(f"experts {sorted({*experts} - running.ready)} have not been read: start anew", path="")
        return [(each, self._slab.address + running.step.slot(each) * self._slot_bytes) for each in experts]

    def _end(self, layer: int, running: _Pass, experts: Sequence[int]) -> None:
        """Note that a group is used, and begin what has waited for its slots."""
        self._check_is_open(running)
        for expert in experts:
            running.step.done(expert)
        if running.pending:
            self._begin(layer, running)
        elif running.begun:  # asking begins the next pieces where some have landed meanwhile
            self._reader.is_done(next(reversed(running.begun.values())))

    def _check_is_open(self, running: _Pass) -> None:
        """Refuse to go on with a pass whose slots may hold another one's experts."""
        if self._open is not running.note:
            raise overtaken()

    def _begin(self, layer: int, running: _Pass) -> None:
        """Begin to read as many pending experts as there are slots for."""
        started_s = time.perf_counter()
        while running.pending:
            slot = running.step.take(running.pending[0])
            if slot is None:
                break
            expert = running.pending.popleft()
            running.begun[expert] = ticket = Ticket()
            running.note.tickets.append(ticket)  # before its read begins: from here on the slot is waited for
            self._reader.submit([self._request(layer, expert, slot)], ticket)
        self.counters.submit_s += time.perf_counter() - started_s

    def _request(self, layer: int, expert: int, slot: int) -> ReadRequest:
        layout = self._layouts[layer]
        num_bytes = layout.read_bytes(expert)
        return ReadRequest(self._files[layer], layout.offset_of(expert), num_bytes, self._slab, slot * self._slot_bytes)

    def _wait(self, layer: int, running: _Pass, expert: int) -> None:
        started_s = time.perf_counter()
        self._reader.wait(running.begun[expert])
        num_bytes = self._layouts[layer].read_bytes(expert)
        self._check.streamed(layer, expert, self._slab, running.step.slot(expert) * self._slot_bytes, num_bytes)
        del running.begun[expert]
        running.ready.add(expert)
        self.counters.wait_s += time.perf_counter() - started_s
        self.counters.bytes_read += self._layouts[layer].read_bytes(0)
        self.counters.num_reads += 1

    def warm(self) -> None:
        """Fill every layer's slots with the experts that the policy names, in the order of the file.

        Raises:
            StorageError: An expert can't be read.
            PackError: An expert is damaged.
        """
        note = _Note()
        with self._turn.take(partial(self._fill, note), partial(self._leave, note)):
            pass

    def _fill(self, note: _Note) -> None:
        self._settle()
        self._open = note
        batch: list[ReadRequest] = []
        blocks: list[tuple[int, int]] = []
        for layer, experts in enumerate(self.policy.warm):
            step = self.cache.begin(layer, sorted(experts), experts)
            note.misses += [(layer, expert) for expert in step.misses]
            for expert in step.misses:
                slot = step.take(expert)
                assert slot is not None
                batch.append(self._request(layer, expert, slot))
                blocks.append((layer, expert))
                step.done(expert)
                if len(batch) * self._slot_bytes >= WARM_BYTES:
                    self._check.read(self._reader, batch, blocks, note.tickets)
                    batch, blocks = [], []
        self._check.read(self._reader, batch, blocks, note.tickets)
        self._open = None
