"""How much a transformers cache will hold: what its tokens take, or a capacity that is allocated whatever it holds."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class CacheRoom:
    """A cache after a pass, in tokens of one sequence.

    Attributes:
        width: Positions that a new token attends to.
        num_cached: Tokens that there is room for, mean over the layers.
        capacity: The part of `num_cached` that layers of a fixed size allocate at once.
    """

    width: int
    num_cached: int
    capacity: int


def past_tokens(cache: Any) -> int:
    """Return the tokens of a sequence that `cache` holds; 0 for none, and for caches without attention layers."""
    if cache is None or not hasattr(cache, "get_seq_length"):
        return 0
    try:
        return int(cache.get_seq_length())
    except ValueError:  # transformers: "... the current cache seems to only contain linear attention layers"
        return 0


def cache_room(cache: Any, num_tokens: int) -> CacheRoom:
    """Return what `cache` takes once a sequence has `num_tokens` tokens; None is a cache that grows with them."""
    layers = list(getattr(cache, "layers", None) or ())
    fixed = [size for size in map(_fixed_tokens, layers) if size is not None]
    if not fixed and (size := _fixed_tokens(cache)) is not None:  # a class of the user's own
        layers, fixed = [cache], [size]
    if not fixed:
        return CacheRoom(width=num_tokens, num_cached=num_tokens, capacity=0)
    num_growing = len(layers) - len(fixed)
    return CacheRoom(
        width=max(num_tokens, *fixed),
        num_cached=-(-(sum(fixed) + num_growing * num_tokens) // len(layers)),
        capacity=sum(fixed) // len(layers),
    )


def _fixed_tokens(layer: Any) -> int | None:
    """Return the tokens that a layer of a fixed size allocates; None where it grows."""
    size = getattr(layer, "max_cache_len", None)
    return int(size) if isinstance(size, int) and size > 0 else None


class LiveCaches:
    """The caches that passes have used and that somebody still holds, with the memory each had after its last pass."""

    def __init__(self) -> None:
        self._num_bytes: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def note(self, cache: Any, num_bytes: int) -> None:
        """Remember what `cache` takes; None, and what can't be watched, is not remembered."""
        try:
            self._num_bytes[cache] = num_bytes
        except TypeError:
            return

    def others_bytes(self, cache: Any) -> int:
        """Return what all others take together."""
        # A copy is made in one step: other threads add caches meanwhile.
        noted = self._num_bytes.data.copy().items()  # type: ignore[attr-defined]  # not in its stub
        return sum(size for held, size in noted if (other := held()) is not None and other is not cache)

    def forget_dead(self) -> None:
        """Collect caches that are only held by cycles."""
        gc.collect()
