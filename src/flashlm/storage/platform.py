"""What differs between operating systems, in one place: direct I/O, the page cache, syncing, cores, room, the heap.

On Linux all of it is tested. The macOS branches are written for and have not been run. What bounds a process's memory
is in `flashlm.memory.limits`; the native code has its own differences where they are (`native/file.cpp`).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

# What file systems without unnamed files say, and kernels that don't know them: these take the flag for a folder's.
_UNNAMED_REFUSED = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)

_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None


def set_direct(fd: int) -> bool:
    """Let reads and writes of an open file go past the page cache; return whether its file system can (tmpfs can't)."""
    try:
        if sys.platform == "darwin":
            fcntl.fcntl(fd, fcntl.F_NOCACHE, 1)
        else:
            fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError:
        return False
    return True


def drop_cached(fd: int) -> None:
    """Let go of an open file's pages in the page cache, as far as they are written; nothing where that can't be asked."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def drop_cached_file(path: Path) -> None:
    """`drop_cached` for a file that others have open; does nothing where it is gone."""
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            drop_cached(fd)
        finally:
            os.close(fd)


def sync(fd: int) -> None:
    """Return when an open file, or folder, is on the device.

    Raises:
        OSError: It can't be written.
    """
    if sys.platform == "darwin":
        fcntl.fcntl(fd, fcntl.F_FULLFSYNC)  # its fsync leaves the content in the device's cache
    else:
        os.fsync(fd)


def open_unnamed(folder: Path) -> int:
    """Open a new file in `folder` that has no name and is gone when the descriptor is closed, whatever happens.

    Raises:
        OSError: Nothing can be written there.
    """
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600)
        except OSError as error:
            if error.errno not in _UNNAMED_REFUSED or not folder.is_dir():
                raise
    fd, name = tempfile.mkstemp(prefix=".flashlm-", dir=folder)
    Path(name).unlink()
    return fd


def descriptor_path(fd: int) -> Path:
    """Return a path by which an open file can be opened again in this process."""
    return Path(f"/proc/self/fd/{fd}" if sys.platform == "linux" else f"/dev/fd/{fd}")


@dataclass(frozen=True, kw_only=True)
class DiskRoom:
    """The device of a folder.

    Attributes:
        total_bytes: Its size.
        free_bytes: What this user may still write.
    """

    total_bytes: int
    free_bytes: int


def disk_room(folder: Path) -> DiskRoom:
    """Return how much room the device of `folder` has.

    Raises:
        OSError: There is no such folder.
    """
    usage = shutil.disk_usage(folder)
    return DiskRoom(total_bytes=usage.total, free_bytes=usage.free)


def num_usable_cores() -> int:
    """Return the cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def release_free_memory() -> None:
    """Give freed memory back to the kernel, which glibc keeps between blocks that still live; elsewhere nothing."""
    if _malloc_trim is not None:
        _malloc_trim(0)
