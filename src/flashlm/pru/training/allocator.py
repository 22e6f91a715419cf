"""Freed memory is kept for the next step, not handed back to the system.

A training step allocates the same large arrays again and again. glibc maps each afresh and unmaps it when freed, so every
page is faulted in and zeroed in every step: a fifth to a third of the step's time (docs/experiments.md).
"""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_NEVER = -1  # trim
_MMAP_FROM_BYTES = (2**31 - 1, 32 << 20)  # all but the largest arrays; what older versions allow at most


def keep_freed_memory() -> bool:
    """Tell the C library so, for the whole process and from now on; returns whether it could be told.

    The process then stays as large as it once was; after some ten steps hardly a page is faulted in. Does nothing where
    the library is not glibc, or where FLASHLM_KEEP_FREED_MEMORY is 0.
    """
    if os.environ.get("FLASHLM_KEEP_FREED_MEMORY") == "0":
        return False
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - AttributeError elsewhere
        is_kept = libc.mallopt(_TRIM_THRESHOLD, _NEVER) == 1
        return any(libc.mallopt(_MMAP_THRESHOLD, size) == 1 for size in _MMAP_FROM_BYTES) and is_kept
    except (OSError, AttributeError, TypeError):
        return False
