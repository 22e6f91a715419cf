"""Files that appear whole or not at all: large ones in aligned pieces past the page cache, small ones in one go.

Each is written under a temporary name beside its place, synced, renamed, and the folder is synced. Where a file system can't
do direct I/O the same calls go through the page cache, which is then told to drop the pages. Offsets and lengths are
multiples of `DIRECT_ALIGN_BYTES`, the largest logical block of common devices, so the device's own need not be asked.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

from flashlm.errors import StorageError
from flashlm.sizes import format_size
from flashlm.storage.platform import disk_room, drop_cached, set_direct, sync

DIRECT_ALIGN_BYTES = 4096


def temporary_path(path: Path) -> Path:
    """Return the sibling under which `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


def is_temporary(path: Path) -> bool:
    """Return whether `path` is such a sibling, of whatever file: what a killed process leaves."""
    return path.name.startswith(".") and path.name.endswith(".tmp")


class AtomicFile:
    """A file written directly under a temporary name; renamed into place, synced, on a clean exit, else removed.

    Raises (from every method):
        StorageError: With errno; a full disk says how to go on.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = path
        self.num_bytes = num_bytes
        self._temporary = temporary_path(path)
        self._fd = -1

    def __enter__(self) -> AtomicFile:
        self._guard(self._create)
        return self

    def _create(self) -> None:
        self._fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
        set_direct(self._fd)

    def write(self, piece: Any, offset: int) -> None:
        """Write an aligned piece (anything with a buffer of bytes) at an aligned offset."""
        self._guard(lambda: _write_all(self._fd, memoryview(piece), offset))

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._guard(self._commit)
        finally:
            os.close(self._fd)
            self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        os.ftruncate(self._fd, self.num_bytes)
        sync(self._fd)
        drop_cached(self._fd)
        self._temporary.rename(self.path)
        sync_folder(self.path.parent)

    def _guard(self, action: Callable[[], None]) -> None:
        try:
            action()
        except OSError as error:
            raise write_error(self.path, error) from error


def _write_all(fd: int, piece: memoryview, offset: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwrite(fd, piece[done:], offset + done)


def sync_folder(folder: Path) -> None:
    """Make renames and removals in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sync(fd)
    finally:
        os.close(fd)


def write_small_file(path: Path, content: bytes) -> None:
    """Write a small file so that it appears whole or not at all, synced.

    Raises:
        StorageError: The file can't be written.
    """
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            sync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> StorageError:
    """Return the error for a failed write to `path`; a full disk is told apart."""
    reason = f"can't be written: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free_bytes = disk_room(path.parent).free_bytes
        reason = (
            f"does not fit: no space left on the device ({format_size(free_bytes)} free)."
            " Free some and run the same command again: it goes on where it stopped"
        )
    return StorageError(f"{path} {reason}", path=str(path), errno=error.errno)


def check_room(folder: Path, needed_bytes: int, *, what: str, advice: str = "free some") -> None:
    """Refuse before the work where `needed_bytes` more do not fit on the device of `folder`.

    Args:
        folder: Where they will be written.
        needed_bytes: How many.
        what: What they are, the subject of the sentence: "the pack".
        advice: What to do; ends the message.

    Raises:
        StorageError: The device has less free.
    """
    free_bytes = disk_room(folder).free_bytes
    if needed_bytes > free_bytes:
        raise StorageError(
            f"{what} does not fit on the device of {folder}: {format_size(needed_bytes)} ({needed_bytes} bytes) needed,"
            f" {format_size(free_bytes)} ({free_bytes} bytes) free: {advice}",
            path=str(folder),
            wanted_bytes=needed_bytes,
            got_bytes=free_bytes,
        )
