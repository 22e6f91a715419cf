"""One pass at a time through a store of weights: the native turn, and the error of a pass that another one overtook.

A thread that begins a pass while an earlier one of its own stands open (it was broken off where nothing could close it, or
it goes on further up the stack) takes the turn over; the earlier one's slots are then used again, and it may not go on.
"""

from __future__ import annotations

from flashlm._native import Turn
from flashlm.errors import StorageError

__all__ = ["Turn", "overtaken"]


def overtaken() -> StorageError:
    """Return the error of a pass that may not go on."""
    return StorageError("this pass over a layer was broken off, and another one has begun: start anew", path="")
