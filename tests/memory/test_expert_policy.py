"""Policies made from counts pin and warm what was used most, and replays tell which keeps more of a trace."""

from __future__ import annotations

import pytest

from flashlm.errors import ConfigError
from flashlm.memory.expert_policy import POLICIES, capacities_at, make_policy, num_pinned, replay_share

COUNTS = [[5, 0, 9, 1, 7, 7]]


def test_the_most_used_are_pinned_and_held_first():
    policy = make_policy("pinned", [4], [2], COUNTS)
    assert policy.pinned == ((2, 4),)
    assert policy.warm == ((0, 5, 4, 2),)
    assert policy.eviction == "lru"
    assert make_policy("lfu", [4], [2], COUNTS).pinned == ((),)
    assert make_policy("lfu", [4], [2], COUNTS).eviction == "lfu"


def test_pinned_experts_leave_room_for_a_tokens():
    assert [num_pinned(capacity, 2) for capacity in (1, 2, 3, 4, 8)] == [0, 0, 1, 2, 4]


def test_without_counts_the_first_experts_are_held_and_none_is_pinned():
    policy = make_policy("lru", [3, 2], [1, 1], None)
    assert (policy.pinned, policy.warm) == (((), ()), ((0, 1, 2), (0, 1)))
    with pytest.raises(ConfigError, match="not known"):
        make_policy("pinned", [3], [1], None)


def test_a_share_holds_a_tokens_experts_at_least():
    assert capacities_at(0.25, [64, 8], [6, 3]) == [16, 3]


def hit_shares(trace, counts, capacity=4):
    found = {}
    for name in POLICIES:
        hits, misses = replay_share(trace, [capacity], make_policy(name, [capacity], [1], counts))
        assert hits + misses == len(trace)
        found[name] = hits / len(trace)
    return found


def test_steady_favourites_among_passers_by_are_kept_by_pinning_and_by_counting():
    """Experts 0 and 1 come round every eighth token, after six others: LRU never holds them, the others do."""
    trace = [
        (0, [expert]) for turn in range(40) for expert in (0, 1, *(2 + (turn * 6 + step) % 18 for step in range(6)))
    ]
    shares = hit_shares(trace, [[40, 40] + [13] * 18])
    assert shares["pinned"] > shares["lru"]
    assert shares["lfu"] > shares["lru"]


def test_a_topic_that_changes_is_followed_by_lru():
    trace = [(0, [4 * topic + step % 4]) for topic in range(5) for step in range(40)]
    shares = hit_shares(trace, [[40] * 20])
    assert shares["lru"] > shares["pinned"]
    assert shares["lru"] == pytest.approx(1 - 4 / 50, abs=0.03)
