"""Files read and written past the page cache, in large aligned pieces; a written file appears whole or not at all.

Where a file system can't do direct I/O (tmpfs, some network mounts) the same calls go through the page cache, which is
then told to drop the pages. All sizes here are multiples of `DIRECT_ALIGN_BYTES`, the largest logical block of common
devices, so the device's own need not be asked.
"""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import torch

from flashlm.errors import StorageError
from flashlm.rows.layout import round_up
from flashlm.sizes import format_size

DIRECT_ALIGN_BYTES = 4096
READ_BYTES = 4 << 20  # one system call
READ_THREADS = 4  # enough for a queue that a device can work on


class AlignedBuffer:
    """Page-aligned anonymous memory as a byte tensor.

    Attributes:
        memory: The memory, for system calls.
        bytes: The same memory as a torch.uint8 tensor; keeps it alive.
    """

    def __init__(self, num_bytes: int) -> None:
        self.memory = memoryview(mmap.mmap(-1, max(round_up(num_bytes, DIRECT_ALIGN_BYTES), DIRECT_ALIGN_BYTES)))
        self.bytes = torch.frombuffer(self.memory, dtype=torch.uint8)

    def __len__(self) -> int:
        return len(self.memory)


def _open(path: Path, flags: int) -> int:
    """Open directly, or through the page cache where the file system refuses."""
    try:
        return os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return os.open(path, flags | os.O_CLOEXEC, 0o644)


class DirectReader:
    """Reads byte ranges of any number of files, `READ_THREADS` pieces at once. One caller at a time; close it after."""

    def __init__(self) -> None:
        self._fds: dict[Path, int] = {}
        self._threads = ThreadPoolExecutor(READ_THREADS, thread_name_prefix="flashlm-direct-read")

    def __enter__(self) -> DirectReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown()
        for fd in self._fds.values():
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(fd)
        self._fds.clear()

    def read(self, path: Path, offset: int, num_bytes: int, buffer: AlignedBuffer, at: int = 0) -> torch.Tensor:
        """Read a range into `buffer` from its byte `at` (aligned) on; return a byte view of the buffer (no copy).

        The buffer must have room for the range rounded out to `DIRECT_ALIGN_BYTES` at both ends: see `room_bytes`.

        Raises:
            StorageError: The read failed, or the file ended early.
        """
        start = offset // DIRECT_ALIGN_BYTES * DIRECT_ALIGN_BYTES
        wanted = round_up(offset + num_bytes, DIRECT_ALIGN_BYTES) - start
        pieces = range(0, wanted, READ_BYTES)
        try:
            fd = self._fd(path)
            counts = self._threads.map(
                lambda low: _read_piece(fd, buffer.memory[at + low : at + min(low + READ_BYTES, wanted)], start + low),
                pieces,
            )
            got = max(sum(counts) + start - offset, 0)
        except OSError as error:
            raise StorageError(
                f"{path}: reading {num_bytes} bytes at {offset} failed: {error.strerror}",
                path=str(path), offset=offset, wanted_bytes=num_bytes, errno=error.errno,
            ) from error  # fmt: skip
        if got < num_bytes:
            raise StorageError(
                f"{path} ended early: {num_bytes} bytes wanted at {offset}, got {got}",
                path=str(path), offset=offset, wanted_bytes=num_bytes, got_bytes=got,
            )  # fmt: skip
        first = at + offset - start
        return buffer.bytes[first : first + num_bytes]

    def _fd(self, path: Path) -> int:
        if path not in self._fds:
            self._fds[path] = _open(path, os.O_RDONLY)
        return self._fds[path]


def _read_piece(fd: int, piece: memoryview, offset: int) -> int:
    """Fill `piece`; return the bytes read, fewer only at the end of the file."""
    got = 0
    while got < len(piece):
        count = os.preadv(fd, [piece[got:]], offset + got)
        got += count
        if count == 0 or got % DIRECT_ALIGN_BYTES:  # an odd length is the file's end
            break
    return got


def room_bytes(num_bytes: int) -> int:
    """Return the buffer size that holds any range of `num_bytes` with its rounded-out ends."""
    return round_up(num_bytes, DIRECT_ALIGN_BYTES) + DIRECT_ALIGN_BYTES


def temporary_path(path: Path) -> Path:
    """Return the sibling under which `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.tmp")


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
        self._fd = _open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def write(self, piece: memoryview, offset: int) -> None:
        """Write an aligned piece at an aligned offset."""
        self._guard(lambda: _write_all(self._fd, piece, offset))

    def __exit__(self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None) -> None:
        try:
            if kind is None:
                self._guard(self._commit)
        finally:
            os.close(self._fd)
            self._temporary.unlink(missing_ok=True)

    def _commit(self) -> None:
        os.ftruncate(self._fd, self.num_bytes)
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
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
        os.fsync(fd)
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
            os.fsync(file.fileno())
        temporary.rename(path)
        sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise write_error(path, error) from error


def write_error(path: Path, error: OSError) -> StorageError:
    """Return the error for a failed write to `path`; a full disk is told apart."""
    reason = f"can't be written: {error.strerror}"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = os.statvfs(path.parent)
        reason = (
            f"does not fit: no space left on the device ({format_size(free.f_bavail * free.f_frsize)} free)."
            " Free some and run the same command again: it goes on where it stopped"
        )
    return StorageError(f"{path} {reason}", path=str(path), errno=error.errno)
