"""A routing trace, token by token, and what each cache policy makes of it.

Pinned experts are chosen by one part of the trace and judged on the other, so that no policy is measured on what it knows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flashlm.memory.expert_policy import (
    POLICIES,
    REPLAYED_SHARES,
    ExpertPolicy,
    capacities_at,
    make_policy,
    replay_share,
)
from flashlm.sparsity.routing import PolicyShares, best_of

MAX_REPLAYED_TOKENS = 2048  # more change the shares by less than texts differ, and take minutes

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Which experts every token was sent to.

    Attributes:
        experts: For each layer int32 (num_tokens, experts per token), as the router ranked them; numbers that are no
            expert's mean none.
        num_experts: Of each layer.
    """

    experts: Sequence[npt.NDArray[np.int32]]
    num_experts: Sequence[int]

    @property
    def num_tokens(self) -> int:
        """Tokens of the trace."""
        return len(self.experts[0])

    @property
    def num_active(self) -> list[int]:
        """Experts of a token in each layer."""
        return [layer.shape[1] for layer in self.experts]

    def part(self, tokens: range) -> RoutingTrace:
        """Return some of the tokens."""
        span = slice(tokens.start, tokens.stop)
        return RoutingTrace(experts=[layer[span] for layer in self.experts], num_experts=self.num_experts)

    def counts(self) -> list[tuple[int, ...]]:
        """Return for each layer how many tokens went to each expert."""
        found = []
        for layer, count in zip(self.experts, self.num_experts, strict=True):
            valid = layer[(layer >= 0) & (layer < count)]
            found.append(tuple(np.bincount(valid, minlength=count).tolist()))
        return found

    def steps(self) -> list[tuple[int, list[int]]]:
        """Return (layer, experts) of one token after the other, as `replay` takes them."""
        return [
            (layer, [expert for expert in dict.fromkeys(experts[token].tolist()) if 0 <= expert < count])
            for token in range(self.num_tokens)
            for layer, (experts, count) in enumerate(zip(self.experts, self.num_experts, strict=True))
        ]


def compare_policies(
    known: RoutingTrace,
    unseen: RoutingTrace,
    *,
    shares: Sequence[float] = REPLAYED_SHARES,
    progress: Progress = lambda done, total, what: None,
) -> tuple[PolicyShares, ...]:
    """Return what each policy finds in caches of several sizes while `unseen` runs token by token.

    Args:
        known: What is pinned, and held in the beginning, is what this part used most.
        unseen: The part that is replayed.
        shares: Slots over experts of each layer; it gets a token's experts at least, and equal sizes are tried once.
        progress: Called with replays done, replays in all, and what is being done.
    """
    steps, counts = unseen.steps(), known.counts()
    sizes = {tuple(capacities_at(share, unseen.num_experts, unseen.num_active)) for share in shares}
    sizes.discard(tuple(unseen.num_experts))
    results: list[PolicyShares] = []
    for capacities in sorted(sizes, key=sum):
        share = sum(capacities) / sum(unseen.num_experts)
        found: dict[ExpertPolicy, float] = {}
        for number, name in enumerate(POLICIES):
            what = f"{name}, {share:.0%} of the experts held"
            progress(len(results) * len(POLICIES) + number, len(sizes) * len(POLICIES), what)
            hits, misses = replay_share(steps, capacities, make_policy(name, capacities, unseen.num_active, counts))
            found[name] = hits / max(hits + misses, 1)
        results.append(PolicyShares(cache_share=share, **found, best=best_of(found)))
    return tuple(results)
