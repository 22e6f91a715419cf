"""The budget of a mixture-of-experts model: what `dram` leaves beside the needs becomes slots of one expert each.

    dram = process so far + resident weights + KV cache + working memory + expert slots

The floor is one token's experts in every layer: a smaller cache would lose every expert before its layer comes round again,
and read all of a token's experts for every token. Pure arithmetic, as in `budget`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flashlm.memory.budget import Needs, Placement, check_floor
from flashlm.rows.layout import LayerLayout

# A prompt that needs more experts than a layer holds reads into one while another is computed.
NUM_SPARE_SLOTS = 2
CLOSE_TO_FLOOR = 1.25  # with fewer slots than this many times the floor's a warning is due


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertUse:
    """One layer of experts: its geometry (block = expert), and how many of them a token uses."""

    layout: LayerLayout
    num_active: int

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return self.layout.num_blocks


def expert_floor_bytes(uses: Sequence[ExpertUse], needs: Needs) -> int:
    """Return the smallest `dram` with which the model runs: its needs, one token's experts, and the spare slots."""
    num_spare = NUM_SPARE_SLOTS if any(use.num_active < use.num_experts for use in uses) else 0
    return needs.total_bytes + (sum(use.num_active for use in uses) + num_spare) * slot_bytes(uses)


def slot_bytes(uses: Sequence[ExpertUse]) -> int:
    """Return the bytes of a slot."""
    return max(use.layout.block_stride_bytes for use in uses)


def place_experts(
    uses: Sequence[ExpertUse], needs: Needs, dram_bytes: int, *, max_cache_bytes: int | None = None
) -> Placement:
    """Share `dram_bytes` out over the expert slots of all layers, evenly.

    Args:
        uses: The layers of experts, in forward order.
        needs: What comes before.
        dram_bytes: The budget of the whole process.
        max_cache_bytes: Hold no more than this, or the floor; None is no further bound.

    Raises:
        BudgetError: `dram_bytes` is below the floor; it says what is needed and for what.
    """
    check_floor(needs, expert_floor_bytes(uses, needs), dram_bytes, "one token's experts")
    each_bytes = slot_bytes(uses)
    all_experts = [use.num_experts for use in uses]
    num_slots = (dram_bytes - needs.total_bytes) // each_bytes
    if max_cache_bytes is not None:
        num_slots = min(num_slots, max(max_cache_bytes // each_bytes, sum(use.num_active for use in uses)))
    capacities, num_spare = all_experts, 0
    if num_slots < sum(all_experts):
        num_spare = NUM_SPARE_SLOTS
        bounded = num_slots if max_cache_bytes is not None else num_slots - num_spare
        bounded = min(bounded, (dram_bytes - needs.total_bytes) // each_bytes - num_spare)
        capacities = _spread([use.num_active for use in uses], all_experts, bounded)
    return Placement(
        dram_bytes=dram_bytes,
        needs=needs,
        num_pinned=(),
        num_streamed=(),
        pinned_bytes=0,
        streamed_bytes=sum(use.num_active for use in uses) * each_bytes if num_spare else 0,
        num_slots=num_spare,
        slot_bytes=each_bytes,
        cache_bytes=sum(capacities) * each_bytes,
        experts=tuple(capacities),
    )


def is_close_to_floor(uses: Sequence[ExpertUse], placement: Placement) -> bool:
    """Return whether the cache holds hardly more than one token's experts, so that next to nothing is found in it."""
    assert placement.experts is not None
    return sum(placement.experts) < CLOSE_TO_FLOOR * sum(use.num_active for use in uses) and placement.num_slots > 0


def _spread(least: list[int], most: list[int], num_slots: int) -> list[int]:
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
