"""The budget: how `dram`, which bounds the whole process, is shared out before a single weight is read.

    dram = process so far + resident weights + KV cache + working memory + staging + pinned blocks + caches

The first four are needs. Needs, the smallest staging, and what one token uses of experts or predicted rows make the floor,
below which a model is refused. What is left goes by value: the bytes of reading that a byte of DRAM saves in a token.

* A block of a feed-forward or linear layer is read for every token, so pinning it saves its whole size: that is the most,
  and the same for all of them, so they are pinned evenly.
* A slot of an expert or neuron cache saves as much as it is hit, which is less: caches get what is left. Beside a neuron
  cache all linear layers are pinned: they are needed for every token, the blocks between them only for prompts.
* A table of embeddings saves one row: it is pinned only where nothing else is read any more.

Pure arithmetic over `Unit`s: this module knows neither torch nor files. Design, "Memory"; the paper's §3.1 (what stays in
DRAM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashlm.errors import BudgetError
from flashlm.memory.cache_plan import LayerUse, least_slots, plan_capacities
from flashlm.memory.neuron_cache import LayerCapacity
from flashlm.pack.units import Unit, dense_units, of_kind
from flashlm.rows.layout import BLOCK_ALIGN_BYTES
from flashlm.sizes import format_size

MIN_STAGING_BLOCKS = 2
# Reads in flight cover the time in which nothing is consumed: attention, and above all the output layer. 128 MiB is
# 50 ms at 2.6 GB/s; taking more from the pinned share than a sixteenth would cost more reading than the gap does.
MAX_STAGING_BYTES = 128 << 20
STAGING_SHARE = 1 / 16
MAX_SPARSE_STAGING_BYTES = 32 << 20  # only prompts are streamed there
# A prompt that needs more experts than a layer holds reads into one slot while another is computed.
NUM_SPARE_SLOTS = 2
CLOSE_TO_FLOOR = 1.25  # with fewer expert slots than this many times the floor's a warning is due


@dataclass(frozen=True, kw_only=True)
class Needs:
    """What a process must hold before anything can be pinned, in bytes.

    Attributes:
        process_bytes: Interpreter and libraries, as measured before loading.
        resident_bytes: Weights that stay in DRAM.
        predictor_bytes: Row predictors (mode `sparse`).
        kv_cache_bytes: The KV cache at the stated context.
        working_bytes: Activations, logits, scratch and allocator slack of the largest forward pass.
        slack_bytes: Of these, what is the same for every context.
    """

    process_bytes: int
    resident_bytes: int
    kv_cache_bytes: int
    working_bytes: int
    predictor_bytes: int = 0
    slack_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        """The sum."""
        weights_bytes = self.resident_bytes + self.predictor_bytes
        return self.process_bytes + weights_bytes + self.kv_cache_bytes + self.working_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """A unit whose first blocks are pinned and whose others go through the ring of staging slots; or all one of these.

    Attributes:
        num_pinned, num_streamed: Its blocks.
        pinned_bytes: Memory of those that are pinned.
        streamed_bytes: Bytes that a pass reads of the others.
    """

    num_pinned: int
    num_streamed: int
    pinned_bytes: int
    streamed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class RowCache:
    """A feed-forward layer whose predicted rows have slots in the neuron cache; prompts stream all its blocks.

    Attributes:
        capacity: Its slots.
        num_streamed: Its blocks.
        cache_bytes: Memory of the slots.
        streamed_bytes: Bytes that a pass over all rows reads.
    """

    capacity: LayerCapacity
    num_streamed: int
    cache_bytes: int
    streamed_bytes: int
    num_pinned: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertSlots:
    """A layer of experts: `num_slots` of its experts are held at a time.

    Attributes:
        num_slots: Slots of one expert each.
        cache_bytes: Their memory.
        streamed_bytes: Bytes that a token reads where none of its experts is held; 0 where all are.
    """

    num_slots: int
    cache_bytes: int
    streamed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Table:
    """A table of embeddings: all of it is pinned, or rows are read when a token asks for them.

    Attributes:
        pinned_bytes: Memory of the table; 0 where its rows are read.
        row_bytes: Bytes of a row.
    """

    pinned_bytes: int
    row_bytes: int


UnitPlacement = Blocks | RowCache | ExpertSlots | Table


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where every unit lives under one budget.

    Attributes:
        dram_bytes: The budget for the whole process.
        needs: What comes first.
        units: Of each unit, in forward order.
        num_slots: Staging slots of one block each; 0 where nothing is streamed.
        slot_bytes: Bytes of a slot.
        num_spare: Expert slots beside those of the layers; 0 where all experts are held.
        expert_bytes: Bytes of an expert's slot; 0 without experts.
        scratch_bytes: What reads of scattered rows need beside their slots.
    """

    dram_bytes: int
    needs: Needs
    units: tuple[UnitPlacement, ...]
    num_slots: int = 0
    slot_bytes: int = 0
    num_spare: int = 0
    expert_bytes: int = 0
    scratch_bytes: int = 0

    @property
    def dense(self) -> tuple[Blocks | RowCache, ...]:
        """Of each unit of which a token uses every block, in forward order."""
        return tuple(unit for unit in self.units if isinstance(unit, Blocks | RowCache))

    @property
    def tables(self) -> tuple[Table, ...]:
        """Of each table of embeddings that no linear layer shares."""
        return tuple(unit for unit in self.units if isinstance(unit, Table))

    @property
    def rows(self) -> tuple[LayerCapacity, ...]:
        """Slots of each layer's neuron cache; none outside mode `sparse`."""
        return tuple(unit.capacity for unit in self.units if isinstance(unit, RowCache))

    @property
    def experts(self) -> tuple[int, ...]:
        """Slots of each layer's expert cache; none without experts."""
        return tuple(unit.num_slots for unit in self.units if isinstance(unit, ExpertSlots))

    @property
    def pinned_bytes(self) -> int:
        """Memory of all pinned blocks and tables."""
        return sum(unit.pinned_bytes for unit in self.units if isinstance(unit, Blocks | Table))

    @property
    def ring_bytes(self) -> int:
        """Bytes that one pass over all dense units reads."""
        return sum(unit.streamed_bytes for unit in self.dense)

    @property
    def streamed_bytes(self) -> int:
        """Bytes that a token reads at most: of dense units, and its experts; its row of a table aside."""
        return sum(unit.streamed_bytes for unit in self.units if not isinstance(unit, Table))

    @property
    def cache_bytes(self) -> int:
        """Memory of caches, of rows or experts."""
        return self.scratch_bytes + sum(
            unit.cache_bytes for unit in self.units if isinstance(unit, RowCache | ExpertSlots)
        )

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging buffers, those of experts too."""
        return self.num_slots * self.slot_bytes + self.num_spare * self.expert_bytes

    @property
    def planned_bytes(self) -> int:
        """What the process should hold at its peak."""
        return self.needs.total_bytes + self.pinned_bytes + self.staging_bytes + self.cache_bytes


@dataclass(frozen=True, slots=True)
class _Sizes:
    """What the units take, whatever the budget."""

    units: Sequence[Unit]
    uses: Sequence[LayerUse]  # of feed-forward layers, where their rows are cached

    @property
    def slot_bytes(self) -> int:
        """A staging slot takes any block."""
        return max((unit.layout.block_stride_bytes for unit in dense_units(self.units)), default=0)

    @property
    def expert_bytes(self) -> int:
        return max((unit.layout.block_stride_bytes for unit in of_kind(self.units, "experts")), default=0)

    @property
    def row_bytes(self) -> int:
        return max((unit.layout.row_stride_bytes for unit in of_kind(self.units, "ffn")), default=0)

    @property
    def scratch_bytes(self) -> int:
        return self.row_bytes + BLOCK_ALIGN_BYTES if self.uses else 0

    @property
    def least_experts(self) -> int:
        """Slots without which a layer loses each expert before it comes round again."""
        return sum(unit.num_active for unit in of_kind(self.units, "experts"))

    @property
    def least_cache_bytes(self) -> int:
        """What one token uses of experts or predicted rows, and what reading them needs beside."""
        experts = of_kind(self.units, "experts")
        num_spare = NUM_SPARE_SLOTS if any(unit.num_active < unit.num_blocks for unit in experts) else 0
        rows_bytes = sum(least_slots(self.uses)) * self.row_bytes if self.uses else 0
        return (self.least_experts + num_spare) * self.expert_bytes + rows_bytes + self.scratch_bytes

    @property
    def held_linears_bytes(self) -> int:
        """Linear layers that must be pinned: all, beside a neuron cache."""
        linears = of_kind(self.units, "linear") if self.uses else []
        return sum(unit.layout.file_bytes for unit in linears)

    @property
    def blocks(self) -> list[list[int]]:
        """Bytes of each block that may be pinned, of each unit: none of experts, nor of rows that are cached."""
        return [
            [unit.layout.read_bytes(block) for block in range(unit.num_blocks)]
            if unit.kind == "linear" or (unit.kind == "ffn" and not self.uses)
            else []
            for unit in self.units
        ]

    @property
    def floor_rest(self) -> str:
        """What the floor holds beside the needs, in words."""
        words = ["staging"] if self.slot_bytes else []
        words += ["linear layers"] if self.held_linears_bytes else []
        words += ["one token's rows"] if self.uses else []
        words += ["one token's experts"] if self.expert_bytes else []
        return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def floor_bytes(units: Sequence[Unit], needs: Needs, uses: Sequence[LayerUse] = ()) -> int:
    """Return the smallest `dram` with which the model runs: needs, two staging buffers, what a token uses of caches."""
    sizes = _Sizes(units, uses)
    staging_bytes = MIN_STAGING_BLOCKS * sizes.slot_bytes
    return needs.total_bytes + staging_bytes + sizes.held_linears_bytes + sizes.least_cache_bytes


def place(
    units: Sequence[Unit],
    needs: Needs,
    dram_bytes: int,
    *,
    uses: Sequence[LayerUse] = (),
    max_pinned_bytes: int | None = None,
    staging_bytes: int | None = None,
) -> Placement:
    """Share `dram_bytes` out over staging, pinned blocks and caches.

    Args:
        units: What is streamed, in forward order.
        needs: What comes first, predictors included.
        dram_bytes: The budget of the whole process.
        uses: How each feed-forward layer's predicted rows are used (mode `sparse`); none: whole blocks.
        max_pinned_bytes: Pin and hold no more than this, or the floor; 0 keeps nothing (mode `naive`), None is no further
            bound.
        staging_bytes: Of the staging, as far as there is room for it; None takes a share of what is left.

    Raises:
        BudgetError: `dram_bytes` is below the floor; it says what is needed and for what.
    """
    sizes = _Sizes(units, uses)
    _check_floor(needs, floor_bytes(units, needs, uses), dram_bytes, sizes.floor_rest)
    spare_bytes = dram_bytes - needs.total_bytes
    dense_bytes = spare_bytes - sizes.least_cache_bytes
    blocks = sizes.blocks
    num_pinned, num_slots = _pin(blocks, sizes, dense_bytes, max_pinned_bytes, staging_bytes)
    pinned_bytes = sum(sum(some[:count]) for some, count in zip(blocks, num_pinned, strict=True))
    cache_bytes = spare_bytes - pinned_bytes - num_slots * sizes.slot_bytes - sizes.scratch_bytes
    bound = None if max_pinned_bytes is None else max_pinned_bytes - pinned_bytes
    capacities = iter(plan_capacities(uses, cache_bytes // sizes.row_bytes) if uses else ())
    experts, num_spare = _hold_experts(sizes, cache_bytes, bound)
    slots = iter(experts)
    left_bytes = cache_bytes - sum(experts) * sizes.expert_bytes
    if bound is not None:
        left_bytes = min(left_bytes, bound - sum(experts) * sizes.expert_bytes)
    if num_slots or num_spare:  # something else is read for every token
        left_bytes = 0
    return Placement(
        dram_bytes=dram_bytes,
        needs=needs,
        units=tuple(
            _expert_slots(unit, next(slots), sizes.expert_bytes, is_short=num_spare > 0)
            if unit.kind == "experts"
            else _table(unit, left_bytes)
            if unit.kind == "embedding"
            else _row_cache(unit, next(capacities))
            if unit.kind == "ffn" and uses
            else _blocks(unit, count)
            for unit, count in zip(units, num_pinned, strict=True)
        ),
        num_slots=num_slots,
        slot_bytes=sizes.slot_bytes if num_slots else 0,
        num_spare=num_spare,
        expert_bytes=sizes.expert_bytes,
        scratch_bytes=sizes.scratch_bytes,
    )


def _pin(
    blocks: list[list[int]], sizes: _Sizes, spare_bytes: int, limit_bytes: int | None, staging_bytes: int | None
) -> tuple[list[int], int]:
    """Return the pinned blocks of each unit, and the staging slots, which all take `spare_bytes` at most."""
    all_bytes = sum(map(sum, blocks))
    if all_bytes <= spare_bytes and not sizes.uses and (limit_bytes is None or all_bytes <= limit_bytes):
        return [len(some) for some in blocks], 0
    num_blocks = sum(unit.num_blocks for unit in dense_units(sizes.units))
    if sizes.uses:
        left_bytes = spare_bytes - sizes.held_linears_bytes - MIN_STAGING_BLOCKS * sizes.slot_bytes
        ahead_bytes = min(MAX_SPARSE_STAGING_BYTES, int(left_bytes * STAGING_SHARE))
        return [len(some) for some in blocks], MIN_STAGING_BLOCKS + ahead_bytes // sizes.slot_bytes
    if staging_bytes is None:
        staging_bytes = min(MAX_STAGING_BYTES, int(spare_bytes * STAGING_SHARE))
    num_slots = max(MIN_STAGING_BLOCKS, min(staging_bytes, spare_bytes) // sizes.slot_bytes)
    num_slots = max(MIN_STAGING_BLOCKS, min(num_slots, num_blocks))
    pinnable_bytes = spare_bytes - num_slots * sizes.slot_bytes
    if limit_bytes is not None:
        pinnable_bytes = min(pinnable_bytes, limit_bytes)
    return _spread_blocks(blocks, pinnable_bytes), num_slots


def _hold_experts(sizes: _Sizes, cache_bytes: int, limit_bytes: int | None) -> tuple[list[int], int]:
    """Return the slots of each layer of experts, evenly, and the spare ones."""
    experts = of_kind(sizes.units, "experts")
    if not experts:
        return [], 0
    each_bytes, all_experts = sizes.expert_bytes, [unit.num_blocks for unit in experts]
    num_slots = cache_bytes // each_bytes
    if limit_bytes is not None:
        num_slots = min(num_slots, max(limit_bytes // each_bytes, sizes.least_experts))
    if num_slots >= sum(all_experts):
        return all_experts, 0
    bounded = num_slots if limit_bytes is not None else num_slots - NUM_SPARE_SLOTS
    bounded = min(bounded, cache_bytes // each_bytes - NUM_SPARE_SLOTS)
    return _spread_slots([unit.num_active for unit in experts], all_experts, bounded), NUM_SPARE_SLOTS


def is_close_to_floor(units: Sequence[Unit], placement: Placement) -> bool:
    """Return whether the cache holds hardly more than one token's experts, so that next to nothing is found in it."""
    num_active = sum(unit.num_active for unit in of_kind(units, "experts"))
    return sum(placement.experts) < CLOSE_TO_FLOOR * num_active and placement.num_spare > 0


def _check_floor(needs: Needs, least_bytes: int, dram_bytes: int, rest: str) -> None:
    """Refuse a budget below `least_bytes`, which are the needs and `rest`.

    Raises:
        BudgetError: It says what is needed and for what.
    """
    if dram_bytes >= least_bytes:
        return
    predictors = f" {format_size(needs.predictor_bytes)} predictors," if needs.predictor_bytes else ""
    # A lower context frees at most the KV cache and what passes take; what is fixed of working memory stays.
    can_help = least_bytes - needs.kv_cache_bytes - (needs.working_bytes - needs.slack_bytes) <= dram_bytes
    remedy = "Raise dram or lower the context." if can_help else f"Raise dram to {format_size(least_bytes)} or more."
    raise BudgetError(
        f"dram={format_size(dram_bytes)} is below the {format_size(least_bytes)} that this model needs at least:"
        f" {format_size(needs.process_bytes)} process, {format_size(needs.resident_bytes)} resident weights,{predictors}"
        f" {format_size(needs.kv_cache_bytes)} KV cache, {format_size(needs.working_bytes)} working memory,"
        f" {format_size(least_bytes - needs.total_bytes)} {rest}. {remedy}",
        needed_bytes=least_bytes,
        available_bytes=dram_bytes,
    )


def _spread_blocks(blocks: list[list[int]], pinnable_bytes: int) -> list[int]:
    """Return how many blocks each unit pins: one more block for every unit in turn until the next does not fit."""
    num_pinned = [0] * len(blocks)
    for block in range(max(map(len, blocks))):
        for unit, sizes in enumerate(blocks):
            if block >= len(sizes):
                continue
            if sizes[block] > pinnable_bytes:
                return num_pinned
            pinnable_bytes -= sizes[block]
            num_pinned[unit] += 1
    return num_pinned


def _spread_slots(least: list[int], most: list[int], num_slots: int) -> list[int]:
    """Return slots of each layer: `least`, and the rest evenly up to `most`."""
    capacities = list(least)
    rest = num_slots - sum(least)
    while rest > 0:
        open_layers = [layer for layer, (has, limit) in enumerate(zip(capacities, most, strict=True)) if has < limit]
        if not open_layers:
            break
        lowest = min(capacities[layer] for layer in open_layers)
        for layer in [layer for layer in open_layers if capacities[layer] == lowest][:rest]:
            capacities[layer] += 1
            rest -= 1
    return capacities


def _blocks(unit: Unit, num_pinned: int) -> Blocks:
    sizes = [unit.layout.read_bytes(block) for block in range(unit.num_blocks)]
    return Blocks(
        num_pinned=num_pinned,
        num_streamed=len(sizes) - num_pinned,
        pinned_bytes=sum(sizes[:num_pinned]),
        streamed_bytes=sum(sizes[num_pinned:]),
    )


def _table(unit: Unit, left_bytes: int) -> Table:
    """Pin a table where there is room; a model has one of input embeddings."""
    is_pinned = unit.layout.file_bytes <= left_bytes
    return Table(pinned_bytes=unit.layout.file_bytes if is_pinned else 0, row_bytes=unit.layout.row_bytes)


def _row_cache(unit: Unit, capacity: LayerCapacity) -> RowCache:
    streamed = _blocks(unit, 0)
    return RowCache(
        capacity=capacity,
        num_streamed=streamed.num_streamed,
        cache_bytes=capacity.num_slots * unit.layout.row_stride_bytes,
        streamed_bytes=streamed.streamed_bytes,
    )


def _expert_slots(unit: Unit, num_slots: int, expert_bytes: int, *, is_short: bool) -> ExpertSlots:
    return ExpertSlots(
        num_slots=num_slots,
        cache_bytes=num_slots * expert_bytes,
        streamed_bytes=unit.num_active * expert_bytes if is_short else 0,
    )
