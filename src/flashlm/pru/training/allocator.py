"""Freed memory is kept for the next step, not handed back to the system.

A training step allocates the same large arrays again and again. glibc maps each afresh and unmaps it when freed, so every
page is faulted in and zeroed in every step: a fifth to a third of the step's time (docs/experiments.md).
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGEST = 2**31 - 1


def keep_freed_memory() -> bool:
    """Tell the C library so, for the whole process and from now on; returns whether it could be told.

    The process then stays as large as it once was; after some ten steps hardly a page is faulted in. Does nothing where
    the library is not glibc.
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018 - AttributeError elsewhere
        return all(libc.mallopt(option, _LARGEST) == 1 for option in (_MMAP_THRESHOLD, _TRIM_THRESHOLD))
    except (OSError, AttributeError, TypeError):
        return False
