"""The file that `probe` reads: written once, without a name where the file system can, so that nothing is left behind."""

from __future__ import annotations

import errno
import mmap
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from flashlm.errors import ConfigError, StorageError
from flashlm.sizes import format_size

CHUNK_BYTES = 8 << 20
MIN_FREE_BYTES = 2 << 30  # left on the device, or a tenth of it if that is less
MIN_FILE_BYTES = 64 << 20
_UNNAMED_REFUSED = (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL)


@dataclass(frozen=True, kw_only=True)
class ProbeFile:
    """A written test file.

    Attributes:
        path: By which it can be opened while the descriptor lives.
        num_bytes: Its size.
        write_gb_per_s: Of writing and syncing it.
    """

    path: Path
    num_bytes: int
    write_gb_per_s: float


def choose_bytes(folder: Path, wanted_bytes: int) -> int:
    """Return how large the file may be: `wanted_bytes`, or half of what is free if that is less.

    Raises:
        ConfigError: No such folder.
        StorageError: It would fill the device.
    """
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        raise ConfigError(f"{folder} can't be probed: {error.strerror}") from error
    keep_bytes = min(MIN_FREE_BYTES, usage.total // 10)
    room_bytes = (usage.free - keep_bytes) // 2 // CHUNK_BYTES * CHUNK_BYTES
    if room_bytes < MIN_FILE_BYTES:
        raise StorageError(
            f"{folder} has {format_size(usage.free)} free: a probe needs {format_size(keep_bytes + 2 * MIN_FILE_BYTES)}"
            " so as not to fill the device. Free some, or probe another folder of it",
            path=str(folder),
            wanted_bytes=keep_bytes + 2 * MIN_FILE_BYTES,
            got_bytes=usage.free,
        )
    return min(wanted_bytes // CHUNK_BYTES * CHUNK_BYTES or CHUNK_BYTES, room_bytes)


@contextmanager
def probe_file(folder: Path, num_bytes: int) -> Iterator[ProbeFile]:
    """Write a file of random bytes in `folder`; it is gone when the context ends, however it ends.

    Raises:
        ConfigError: The folder can't be written to.
        StorageError: Writing failed.
    """
    descriptor = _open_unnamed(folder)
    try:
        rate = _fill(descriptor, folder, num_bytes)
        yield ProbeFile(path=Path(f"/proc/self/fd/{descriptor}"), num_bytes=num_bytes, write_gb_per_s=rate)
    finally:
        os.close(descriptor)


def _open_unnamed(folder: Path) -> int:
    if hasattr(os, "O_TMPFILE"):
        try:
            return os.open(folder, os.O_TMPFILE | os.O_RDWR, 0o600)
        except OSError as error:
            if error.errno not in _UNNAMED_REFUSED or not folder.is_dir():
                raise ConfigError(f"{folder} can't be probed: {error.strerror}") from error
    try:
        descriptor, name = tempfile.mkstemp(prefix=".flashlm-probe-", dir=folder)
    except OSError as error:
        raise ConfigError(f"{folder} can't be probed: {error.strerror}") from error
    Path(name).unlink()
    return descriptor


def _fill(descriptor: int, folder: Path, num_bytes: int) -> float:
    """Write random bytes past the page cache where that is possible; return GB/s, the sync included."""
    buffer = mmap.mmap(-1, CHUNK_BYTES)  # page-aligned, as direct writes want it
    with suppress(OSError):
        _set_direct(descriptor)
    started_s = time.perf_counter()
    random_s = 0.0
    try:
        for offset in range(0, num_bytes, CHUNK_BYTES):
            before_s = time.perf_counter()
            buffer[:] = os.urandom(CHUNK_BYTES)
            random_s += time.perf_counter() - before_s
            _write(descriptor, buffer, offset)
        os.fsync(descriptor)
    except OSError as error:
        raise StorageError(
            f"writing the probe's file in {folder} failed: {error.strerror}", path=str(folder)
        ) from error
    finally:
        buffer.close()
    return num_bytes / (time.perf_counter() - started_s - random_s) / 1e9


def _write(descriptor: int, buffer: mmap.mmap, offset: int) -> None:
    done = 0
    while done < CHUNK_BYTES:
        with memoryview(buffer) as view:
            done += os.pwritev(descriptor, [view[done:]], offset + done)


def _set_direct(descriptor: int) -> None:
    import fcntl

    fcntl.fcntl(descriptor, fcntl.F_SETFL, fcntl.fcntl(descriptor, fcntl.F_GETFL) | os.O_DIRECT)
