"""The neuron cache: which rows of which layer are in DRAM, in which slot, and which go when room is needed.

Memory and reads are the caller's; here are only numbers, kept by the native `RowCache`. Policies: `window(k)` is the
paper's (§3.1: a row is dropped as soon as none of the last k tokens used it), `lru` keeps rows until their slot is needed.
Rows 0 to num_pinned - 1 of a layer never go. A layer's capacity is fixed; it comes from the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch

from flashlm import _native
from flashlm.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerCapacity:
    """Slots of one layer: `num_slots` of its `num_rows` rows fit, `num_pinned` of them pinned."""

    num_rows: int
    num_slots: int
    num_pinned: int = 0


@dataclass(frozen=True, slots=True)
class Lookup:
    """Where the rows of one step are.

    Attributes:
        slots: int32 (num_rows,), of each row asked for.
        order: int32 (num_rows,): positions in the question, those of rows that were held first, each group ascending.
        num_held: How many were held. The others' slots must be filled, or forgotten.
    """

    slots: torch.Tensor
    order: torch.Tensor
    num_held: int


class NeuronCache:
    """Slots for rows of several layers. One pass at a time.

    Args:
        layers: Capacity of each layer.
        window: Keep what the last `window` tokens used, at most (paper's k); None is LRU.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(self, layers: Sequence[LayerCapacity], *, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise ConfigError(f"window={window} must be at least 1 token, or None")
        self.layers = tuple(layers)
        self.window = window
        try:
            self._native = _native.RowCache(
                [(layer.num_rows, layer.num_slots, layer.num_pinned) for layer in layers], window or 0
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"the neuron cache can't be made: {error}") from error

    def room(self, layer: int) -> int:
        """Return how many rows of `layer` fit at once beside the pinned ones."""
        return self._native.room(layer)

    def occupancy(self, layer: int) -> int:
        """Return how many rows of `layer` are held, pinned ones included."""
        return self._native.occupancy(layer)

    def acquire(self, layer: int, rows: torch.Tensor, *, is_same_step: bool = False) -> Lookup:
        """Give every row a slot; those of rows that were not held have been taken from others.

        Args:
            layer: Its index.
            rows: int32 (num_rows,), contiguous, ascending.
            is_same_step: Continues the token of the call before (a token whose rows do not fit at once).

        Raises:
            ConfigError: They do not fit, or are not as stated; nothing has changed.
        """
        slots = torch.empty_like(rows)
        order = torch.empty_like(rows)
        try:
            num_held = self._native.acquire(layer, rows, slots, order, is_same_step)
        except ValueError as error:
            raise ConfigError(f"layer {layer}: {error}") from error
        return Lookup(slots, order, num_held)

    def forget(self, layer: int, rows: torch.Tensor) -> None:
        """Drop `rows`, whose slots hold nothing because their read failed; what `acquire` would refuse is not there."""
        with suppress(ConfigError):
            self._native.forget(layer, rows)
