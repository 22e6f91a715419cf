"""Slabs: memory on a device, cut into slots, given out under one budget.

Rings, caches and pinned blocks are slabs. Whoever owns one hands out `SlotRef`s, places in a slab that keep its memory;
reads land there and kernels start there, and nobody above holds an address. A slab is charged to its allocator from when
it is made until the last reference to its memory, a read in flight included, is gone.

Only DRAM (`"cpu"`) can be had; another device is refused by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashlm._native import Account, AlignedBuffer, Slab, SlotRef
from flashlm.errors import BudgetError, ConfigError
from flashlm.sizes import format_size

__all__ = ["Budget", "Slab", "SlabAllocator", "SlotRef"]


@dataclass(frozen=True, slots=True)
class Budget:
    """What slabs may take of each kind of memory, in bytes; None: no bound, for tests and tools."""

    dram_bytes: int | None
    vram_bytes: int | None = 0


class SlabAllocator:
    """Makes slabs, and refuses what would outgrow the budget.

    Args:
        budget: Bounds; None is none.
    """

    def __init__(self, budget: Budget | None = None) -> None:
        self.budget = budget or Budget(None, None)
        self._dram = Account()

    def given_bytes(self, device: str = "cpu") -> int:
        """Return what is given out on a device and still held."""
        return self._dram.held_bytes if device == "cpu" else 0

    def slab(self, slot_bytes: int, num_slots: int, *, device: str = "cpu", huge_pages: bool = True) -> Slab:
        """Return `num_slots` slots of `slot_bytes` each, zeroed.

        Raises:
            BudgetError: They would outgrow the budget; nothing was allocated.
            ConfigError: No memory can be had on the device.
        """
        return self.slabs([(slot_bytes, num_slots * slot_bytes)], device=device, huge_pages=huge_pages)[0]

    def slabs(
        self,
        cuts: Sequence[tuple[int, int]],
        *,
        spare_bytes: int = 0,
        device: str = "cpu",
        huge_pages: bool = True,
    ) -> list[Slab]:
        """Return several slabs that lie one behind the other in one piece of memory.

        Args:
            cuts: Of each slab: the bytes of a slot, and of all its slots; its last slot may be cut short.
            spare_bytes: Memory behind the last one, for reads to pass over what nobody wants.
            device: Where.
            huge_pages: Ask for huge pages.

        Raises:
            BudgetError: They would outgrow the budget; nothing was allocated.
            ConfigError: No memory can be had on the device.
        """
        needed_bytes = sum(num_bytes for _, num_bytes in cuts) + spare_bytes
        self._check(device, needed_bytes)
        buffer = AlignedBuffer(needed_bytes, huge_pages, self._dram)
        made, start = [], 0
        for slot_bytes, num_bytes in cuts:
            made.append(Slab(buffer, start, num_bytes, slot_bytes, device))
            start += num_bytes
        return made

    def _check(self, device: str, needed_bytes: int) -> None:
        kind = "dram" if device == "cpu" else "vram"
        bound = self.budget.dram_bytes if device == "cpu" else self.budget.vram_bytes
        given_bytes = self.given_bytes(device)
        if bound is not None and given_bytes + needed_bytes > bound:
            raise BudgetError(
                f"a slab of {format_size(needed_bytes)} on {device} does not fit: of {format_size(bound)} for slabs in"
                f" {kind} {format_size(given_bytes)} are given out. This is a fault of the placement: please report it",
                needed_bytes=given_bytes + needed_bytes,
                available_bytes=bound,
            )
        if device != "cpu":
            raise ConfigError(f"memory on device {device!r} can't be had: slabs are in DRAM ('cpu')")
