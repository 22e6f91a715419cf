"""What the expert cache keeps, chosen by how a model's experts were used: policies, pinned experts, replays to compare.

`lru` and `lfu` are those of `expert_cache`; `pinned` is `lru` in which the most used experts of each layer never go. Uses
are counts per expert; where none are known, nothing is pinned and the cache is filled with the first experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from flashlm.errors import ConfigError
from flashlm.memory.budget import NUM_SPARE_SLOTS
from flashlm.memory.expert_cache import PolicyName, replay

ExpertPolicy = Literal["lru", "lfu", "pinned"]
POLICIES: tuple[ExpertPolicy, ...] = ("lru", "lfu", "pinned")  # the simplest first: it wins where others are no better
REPLAYED_SHARES = (0.125, 0.25, 0.5, 0.75)


@dataclass(frozen=True, kw_only=True, slots=True)
class CachePolicy:
    """How one model's expert cache is run.

    Attributes:
        name: The policy.
        pinned: For each layer the experts that never go; empty in the others than `pinned`.
        warm: For each layer the experts that the cache is filled with at loading, the most used at the end.
    """

    name: ExpertPolicy
    pinned: tuple[tuple[int, ...], ...]
    warm: tuple[tuple[int, ...], ...]

    @property
    def eviction(self) -> PolicyName:
        """What decides among experts that are not pinned."""
        return "lfu" if self.name == "lfu" else "lru"


def num_pinned(capacity: int, num_active: int) -> int:
    """Return how many experts of a layer are pinned: half its slots, but the rest must hold a token's experts at once."""
    return max(min(capacity // 2, capacity - num_active), 0)


def make_policy(
    name: ExpertPolicy,
    capacities: Sequence[int],
    num_active: Sequence[int],
    counts: Sequence[Sequence[int]] | None,
) -> CachePolicy:
    """Return how to run a cache.

    Args:
        name: The policy.
        capacities: Slots of each layer.
        num_active: Experts of a token in each layer.
        counts: For each layer how often each expert was used; None where that is not known.

    Raises:
        ConfigError: `pinned` without counts.
    """
    if counts is None:
        if name == "pinned":
            raise ConfigError("expert_policy='pinned' pins the most used experts, and how they are used is not known")
        first = tuple(tuple(range(capacity)) for capacity in capacities)
        return CachePolicy(name=name, pinned=((),) * len(capacities), warm=first)
    ranked = [sorted(range(len(layer)), key=lambda expert: (-layer[expert], expert)) for layer in counts]
    pinned: list[tuple[int, ...]] = [()] * len(capacities)
    if name == "pinned":
        limits = [num_pinned(*each) for each in zip(capacities, num_active, strict=True)]
        pinned = [tuple(sorted(experts[:limit])) for experts, limit in zip(ranked, limits, strict=True)]
    warm = [tuple(reversed(experts[:capacity])) for experts, capacity in zip(ranked, capacities, strict=True)]
    return CachePolicy(name=name, pinned=tuple(pinned), warm=tuple(warm))


def capacities_at(share: float, num_experts: Sequence[int], num_active: Sequence[int]) -> list[int]:
    """Return slots of each layer that hold a share of its experts, a token's at least."""
    return [max(round(share * count), active) for count, active in zip(num_experts, num_active, strict=True)]


def replay_share(
    trace: Sequence[tuple[int, Sequence[int]]], capacities: Sequence[int], policy: CachePolicy
) -> tuple[int, int]:
    """Return hits and misses of a routing trace, one token after the other, in a cache as loading fills it."""
    hits = misses = 0
    steps = replay(trace, capacities, policy.eviction, policy.pinned, warm=policy.warm, num_spare=NUM_SPARE_SLOTS)
    for num_hits, num_misses in steps:
        hits, misses = hits + num_hits, misses + num_misses
    return hits, misses
