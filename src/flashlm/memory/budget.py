"""The budget: how `dram`, which bounds the whole process, is shared out before a single weight is read.

    dram = process so far + resident weights + KV cache + working memory + staging + pinned blocks

All but the last two are needs; together with the smallest staging they make the floor, below which a model is refused.
What is left pins blocks of streamed rows, spread evenly over the layers. Pure arithmetic over `LayerLayout`s: this module
knows neither torch nor files. Design, "Memory"; the paper's §3.1 (what stays in DRAM).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashlm.errors import BudgetError
from flashlm.memory.cache_plan import LayerUse, least_slots, plan_capacities
from flashlm.memory.neuron_cache import LayerCapacity
from flashlm.rows.layout import BLOCK_ALIGN_BYTES, LayerLayout
from flashlm.sizes import format_size

MIN_STAGING_BLOCKS = 2
# Reads in flight cover the time in which nothing is consumed: attention, and above all the output layer. 128 MiB is
# 50 ms at 2.6 GB/s; taking more from the pinned share than a sixteenth would cost more reading than the gap does.
MAX_STAGING_BYTES = 128 << 20
STAGING_SHARE = 1 / 16
MAX_SPARSE_STAGING_BYTES = 32 << 20  # only prompts are streamed there


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


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where every block of every layer lives under one budget.

    Attributes:
        dram_bytes: The budget for the whole process.
        needs: What comes before pinning.
        num_pinned: Pinned blocks of each layer: its first ones.
        num_streamed: Streamed blocks of each layer: the rest.
        pinned_bytes: Memory of all pinned blocks.
        streamed_bytes: Bytes that one pass over all layers reads.
        num_slots: Staging slots of one block each; 0 where nothing is streamed.
        slot_bytes: Bytes of a slot.
        cache: Slots of each layer's neuron cache; None outside mode `sparse`.
        cache_bytes: Memory of these slots, or of those of experts.
        experts: Slots of each layer's expert cache; None outside mode `experts`, where the others are spare slots.
    """

    dram_bytes: int
    needs: Needs
    num_pinned: tuple[int, ...]
    num_streamed: tuple[int, ...]
    pinned_bytes: int
    streamed_bytes: int
    num_slots: int
    slot_bytes: int
    cache: tuple[LayerCapacity, ...] | None = None
    cache_bytes: int = 0
    experts: tuple[int, ...] | None = None

    @property
    def staging_bytes(self) -> int:
        """Bytes of the staging buffers."""
        return self.num_slots * self.slot_bytes

    @property
    def planned_bytes(self) -> int:
        """What the process should hold at its peak."""
        return self.needs.total_bytes + self.pinned_bytes + self.staging_bytes + self.cache_bytes


def floor_bytes(layouts: Sequence[LayerLayout], needs: Needs) -> int:
    """Return the smallest `dram` with which the model runs: its needs and two staging buffers."""
    return needs.total_bytes + MIN_STAGING_BLOCKS * _slot_bytes(layouts)


def place(
    layouts: Sequence[LayerLayout],
    needs: Needs,
    dram_bytes: int,
    *,
    max_pinned_bytes: int | None = None,
    staging_bytes: int | None = None,
) -> Placement:
    """Share `dram_bytes` out over staging and pinned blocks.

    Args:
        layouts: The streamed layers, in forward order.
        needs: What comes before.
        dram_bytes: The budget of the whole process.
        max_pinned_bytes: Pin no more than this; 0 keeps nothing (mode `naive`), None is no further bound.
        staging_bytes: Of the staging, as far as there is room for it; None takes a share of what is left.

    Raises:
        BudgetError: `dram_bytes` is below the floor; it says what is needed and for what.
    """
    check_floor(needs, floor_bytes(layouts, needs), dram_bytes, "staging")
    spare_bytes = dram_bytes - needs.total_bytes
    block_bytes = [[layout.read_bytes(block) for block in range(layout.num_blocks)] for layout in layouts]
    all_bytes = sum(map(sum, block_bytes))
    if all_bytes <= spare_bytes and (max_pinned_bytes is None or all_bytes <= max_pinned_bytes):
        return _placement(block_bytes, [len(blocks) for blocks in block_bytes], needs, dram_bytes, 0, 0)
    slot_bytes = _slot_bytes(layouts)
    if staging_bytes is None:
        staging_bytes = min(MAX_STAGING_BYTES, int(spare_bytes * STAGING_SHARE))
    num_slots = max(MIN_STAGING_BLOCKS, min(staging_bytes, spare_bytes) // slot_bytes)
    num_slots = max(MIN_STAGING_BLOCKS, min(num_slots, sum(map(len, block_bytes))))
    pinnable_bytes = spare_bytes - num_slots * slot_bytes
    if max_pinned_bytes is not None:
        pinnable_bytes = min(pinnable_bytes, max_pinned_bytes)
    num_pinned = _spread(block_bytes, pinnable_bytes)
    return _placement(block_bytes, num_pinned, needs, dram_bytes, num_slots, slot_bytes)


def place_sparse(layouts: Sequence[LayerLayout], uses: Sequence[LayerUse], needs: Needs, dram_bytes: int) -> Placement:
    """Share `dram_bytes` out over the staging of prompts and the neuron cache of mode `sparse`; nothing is pinned.

    Args:
        layouts: The streamed layers, in forward order.
        uses: How each is used.
        needs: What comes before, predictors included.
        dram_bytes: The budget of the whole process.

    Raises:
        BudgetError: Not even one token's rows fit.
    """
    slot_bytes = _slot_bytes(layouts)
    row_bytes = max(layout.row_stride_bytes for layout in layouts)
    scratch_bytes = row_bytes + BLOCK_ALIGN_BYTES
    least_bytes = (
        needs.total_bytes + MIN_STAGING_BLOCKS * slot_bytes + sum(least_slots(uses)) * row_bytes + scratch_bytes
    )
    check_floor(needs, least_bytes, dram_bytes, "staging and one token's rows")
    spare_bytes = dram_bytes - least_bytes
    num_slots = MIN_STAGING_BLOCKS + min(MAX_SPARSE_STAGING_BYTES, int(spare_bytes * STAGING_SHARE)) // slot_bytes
    cache_bytes = dram_bytes - needs.total_bytes - num_slots * slot_bytes - scratch_bytes
    capacities = plan_capacities(uses, cache_bytes // row_bytes)
    held_bytes = sum(
        capacity.num_slots * layout.row_stride_bytes for capacity, layout in zip(capacities, layouts, strict=True)
    )
    return Placement(
        dram_bytes=dram_bytes,
        needs=needs,
        num_pinned=(0,) * len(layouts),
        num_streamed=tuple(layout.num_blocks for layout in layouts),
        pinned_bytes=0,
        streamed_bytes=sum(layout.read_bytes(block) for layout in layouts for block in range(layout.num_blocks)),
        num_slots=num_slots,
        slot_bytes=slot_bytes,
        cache=tuple(capacities),
        cache_bytes=held_bytes + scratch_bytes,
    )


def check_floor(needs: Needs, least_bytes: int, dram_bytes: int, rest: str) -> None:
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


def _slot_bytes(layouts: Sequence[LayerLayout]) -> int:
    return max(layout.block_stride_bytes for layout in layouts)


def _spread(block_bytes: list[list[int]], pinnable_bytes: int) -> list[int]:
    """Return how many blocks each layer pins: one more block for every layer in turn until the next does not fit."""
    num_pinned = [0] * len(block_bytes)
    for block in range(max(map(len, block_bytes))):
        for layer, blocks in enumerate(block_bytes):
            if block >= len(blocks):
                continue
            if blocks[block] > pinnable_bytes:
                return num_pinned
            pinnable_bytes -= blocks[block]
            num_pinned[layer] += 1
    return num_pinned


def _placement(
    block_bytes: list[list[int]],
    num_pinned: list[int],
    needs: Needs,
    dram_bytes: int,
    num_slots: int,
    slot_bytes: int,
) -> Placement:
    pinned_bytes = sum(sum(blocks[:count]) for blocks, count in zip(block_bytes, num_pinned, strict=True))
    return Placement(
        dram_bytes=dram_bytes,
        needs=needs,
        num_pinned=tuple(num_pinned),
        num_streamed=tuple(len(blocks) - count for blocks, count in zip(block_bytes, num_pinned, strict=True)),
        pinned_bytes=pinned_bytes,
        streamed_bytes=sum(map(sum, block_bytes)) - pinned_bytes,
        num_slots=num_slots,
        slot_bytes=slot_bytes,
    )
