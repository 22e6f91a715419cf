"""The expert cache: which experts of which layer are in DRAM, in which slot, and which go when room is needed.

Memory and reads are the caller's; here are only numbers. A layer's capacity is fixed. Beside it there are a few spare slots
that all layers share: a prompt that needs more experts than a layer can hold reads the next one into a spare slot while an
expert that is still needed keeps its own, so nothing is read twice. At the end of a pass the spare slots are free again.

Policies: `lru` evicts what was not used for longest; `lfu` what was used least, where a use counts for half as much after
`HALF_LIFE_STEPS` steps of its layer, so that what was popular long ago does not stay for ever. Pinned experts stay, but for
those of a prompt that has all other slots waiting for their own use: the spare slots must come free.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, Protocol, get_args

from flashlm.errors import ConfigError

PolicyName = Literal["lru", "lfu"]
HALF_LIFE_STEPS = 32


class EvictionPolicy(Protocol):
    """Chooses, for one layer, what goes."""

    def use(self, experts: Sequence[int]) -> None:
        """Note one step's experts, the one needed last at the end."""

    def victim(self, candidates: Iterable[int]) -> int:
        """Return the one of `candidates` that goes first."""


class LeastRecentlyUsed:
    """Evicts what was not used for longest."""

    def __init__(self) -> None:
        self._last: dict[int, int] = {}
        self._clock = 0

    def use(self, experts: Sequence[int]) -> None:
        """Note one step's experts, the one needed last at the end."""
        for expert in experts:
            self._clock += 1
            self._last[expert] = self._clock

    def victim(self, candidates: Iterable[int]) -> int:
        """Return the one of `candidates` that goes first."""
        return min(candidates, key=lambda expert: (self._last.get(expert, 0), expert))


class LeastFrequentlyUsed:
    """Evicts what was used least, older uses counting less; among equals what was not used for longest."""

    def __init__(self, half_life_steps: int = HALF_LIFE_STEPS) -> None:
        self._growth = 2.0 ** (1.0 / half_life_steps)
        self._scores: dict[int, float] = {}
        self._recency = LeastRecentlyUsed()
        self._weight = 1.0

    def use(self, experts: Sequence[int]) -> None:
        """Note one step's experts, the one needed last at the end."""
        # Instead of shrinking every score, each step weighs more than the one before.
        self._weight *= self._growth
        if self._weight > 1e100:
            self._scores = {expert: score / self._weight for expert, score in self._scores.items()}
            self._weight = 1.0
        for expert in experts:
            self._scores[expert] = self._scores.get(expert, 0.0) + self._weight
        self._recency.use(experts)

    def victim(self, candidates: Iterable[int]) -> int:
        """Return the one of `candidates` that goes first."""
        scored = [(self._scores.get(expert, 0.0), expert) for expert in candidates]
        least = min(score for score, _ in scored)
        return self._recency.victim(expert for score, expert in scored if score == least)


_POLICIES: dict[str, type[LeastRecentlyUsed] | type[LeastFrequentlyUsed]] = {
    "lru": LeastRecentlyUsed,
    "lfu": LeastFrequentlyUsed,
}


class _Layer:
    def __init__(self, slots: Iterable[int], policy: EvictionPolicy, pinned: frozenset[int]) -> None:
        self.free = list(slots)
        self.capacity = len(self.free)
        self.slot_of: dict[int, int] = {}
        self.policy = policy
        self.pinned = pinned


class ExpertCache:
    """Slots for experts of several layers. One pass at a time.

    Args:
        capacities: Slots of each layer.
        num_spare: Slots that all layers share; at least one where a layer may need more experts at once than it holds.
        policy: "lru" or "lfu".
        pinned: For each layer the experts that stay once they are there; fewer than its capacity. None: none.

    Attributes:
        num_slots: All slots, numbered from 0.

    Raises:
        ConfigError: A value is out of range.
    """

    def __init__(
        self,
        capacities: Sequence[int],
        *,
        num_spare: int = 0,
        policy: PolicyName = "lru",
        pinned: Sequence[Iterable[int]] | None = None,
    ) -> None:
        if policy not in get_args(PolicyName):
            raise ConfigError(f"expert policy {policy!r} is unknown: choose one of {', '.join(get_args(PolicyName))}")
        if any(capacity < 1 for capacity in capacities) or num_spare < 0:
            raise ConfigError(f"every layer needs a slot, got {list(capacities)} and {num_spare} to spare")
        kept = [frozenset(experts) for experts in pinned] if pinned is not None else [frozenset()] * len(capacities)
        if any(len(experts) >= capacity for experts, capacity in zip(kept, capacities, strict=True) if experts):
            raise ConfigError("fewer experts must be pinned than a layer has slots")
        self.num_slots = sum(capacities) + num_spare
        self._layers = []
        first = 0
        for capacity, experts in zip(capacities, kept, strict=True):
            # Taken from the end: low slots first, so that experts read in order lie in order.
            slots = reversed(range(first, first + capacity))
            self._layers.append(_Layer(slots, _POLICIES[policy](), experts))
            first += capacity
        self._spare = list(range(first, first + num_spare))

    def held(self, layer: int) -> dict[int, int]:
        """Return the experts of `layer` that have a slot, with their slots."""
        return dict(self._layers[layer].slot_of)

    def begin(self, layer: int, needed: Sequence[int], by_recency: Sequence[int]) -> ExpertStep:
        """Begin a pass of `layer`.

        Args:
            layer: Its index.
            needed: The experts, in the order in which they will be asked for.
            by_recency: The same ones, the one that matters most for what follows at the end.
        """
        found = self._layers[layer]
        found.policy.use(by_recency)
        return ExpertStep(found, self._spare, needed)

    def break_off(self, misses: Iterable[tuple[int, int]]) -> None:
        """End steps that failed, wherever they stood: their `misses` are held no more, and no slot is lost.

        What was half done is not asked for: who has a slot is the truth, and whose it will be follows from that. So this may
        be broken off itself, and done again.

        Args:
            misses: (layer, expert).
        """
        for layer, expert in misses:
            self._layers[layer].slot_of.pop(expert, None)
        taken = {slot for each in self._layers for slot in each.slot_of.values()}
        free = [slot for slot in reversed(range(self.num_slots)) if slot not in taken]
        for each in self._layers:
            # A layer held no more than its capacity when the step began, and without its misses it holds no more.
            each.free = [free.pop() for _ in range(each.capacity - len(each.slot_of))]
        self._spare[:] = free


class ExpertStep:
    """One pass of one layer: gives slots to missing experts, and takes them from those that are not needed (any more).

    Attributes:
        hits: Needed experts that were held when the step began.
        misses: The others, in the order in which they were asked for.
    """

    def __init__(self, layer: _Layer, spare: list[int], needed: Sequence[int]) -> None:
        self._layer = layer
        self._spare = spare
        self._waiting = set(needed)
        self.hits = [expert for expert in needed if expert in layer.slot_of]
        self.misses = [expert for expert in needed if expert not in layer.slot_of]

    def slot(self, expert: int) -> int:
        """Return the slot of an expert that has one."""
        return self._layer.slot_of[expert]

    def take(self, expert: int) -> int | None:
        """Give a missing expert a slot, to be filled, or the step broken off; None: there is none before a `done`."""
        layer = self._layer
        if layer.free:
            slot = layer.free.pop()
        elif (victim := self._victim()) is not None:
            slot = layer.slot_of.pop(victim)
        elif self._spare:
            slot = self._spare.pop()
        else:
            return None
        layer.slot_of[expert] = slot
        return slot

    def done(self, expert: int) -> None:
        """Note that `expert` is not needed any more in this step."""
        self._waiting.discard(expert)
        layer = self._layer
        if len(layer.slot_of) <= layer.capacity:
            return
        victim = self._victim()
        if victim is None and not self._spare and any(each not in layer.slot_of for each in self._waiting):
            victim = expert  # a pinned one: with its slot kept, one that is still needed would never get any
        if victim is not None:
            self._spare.append(layer.slot_of.pop(victim))

    def _victim(self) -> int | None:
        layer = self._layer
        candidates = [each for each in layer.slot_of if each not in self._waiting and each not in layer.pinned]
        return layer.policy.victim(candidates) if candidates else None


def replay(
    trace: Iterable[tuple[int, Sequence[int]]],
    capacities: Sequence[int],
    policy: PolicyName,
    pinned: Sequence[Iterable[int]] | None = None,
    *,
    warm: Sequence[Sequence[int]] | None = None,
    num_spare: int = 1,
) -> Iterator[tuple[int, int]]:
    """Yield hits and misses of each step of a routing trace, as the engine would have them, without running a model.

    Args:
        trace: (layer, experts that a pass of it needs, in the order of their use).
        capacities, policy, pinned, num_spare: As in `ExpertCache`.
        warm: For each layer what the cache holds before, no more than its capacity, what matters most at the end.
    """
    cache = ExpertCache(capacities, num_spare=num_spare, policy=policy, pinned=pinned)
    for layer, experts in enumerate(warm or ()):
        _run(cache.begin(layer, sorted(experts), experts))
    for layer, experts in trace:
        step = cache.begin(layer, sorted(experts), experts)
        _run(step)
        yield len(step.hits), len(step.misses)


def _run(step: ExpertStep) -> None:
    """Go through a step in the engine's order: all reads that have room are begun, then experts are done one by one."""
    pending = deque(step.misses)
    for expert in [*step.hits, *step.misses]:
        while pending and step.take(pending[0]) is not None:
            pending.popleft()
        step.done(expert)
