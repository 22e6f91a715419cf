"""The file that `probe` reads: written once, without a name where the file system can, so that nothing is left behind."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from flashlm.errors import ConfigError, StorageError
from flashlm.sizes import format_size
from flashlm.storage.platform import descriptor_path, disk_room, open_unnamed, set_direct, sync

CHUNK_BYTES = 8 << 20
MIN_FREE_BYTES = 2 << 30  # left on the device, or a tenth of it if that is less
MIN_FILE_BYTES = 64 << 20


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
        room = disk_room(folder)
    except OSError as error:
        raise ConfigError(f"{folder} can't be probed: {error.strerror}") from error
    keep_bytes = min(MIN_FREE_BYTES, room.total_bytes // 10)
    fitting_bytes = (room.free_bytes - keep_bytes) // 2 // CHUNK_BYTES * CHUNK_BYTES
    if fitting_bytes < MIN_FILE_BYTES:
        raise StorageError(
            f"{folder} has {format_size(room.free_bytes)} free: a probe needs {format_size(keep_bytes + 2 * MIN_FILE_BYTES)}"
            " so as not to fill the device. Free some, or probe another folder of it",
            path=str(folder),
            wanted_bytes=keep_bytes + 2 * MIN_FILE_BYTES,
            got_bytes=room.free_bytes,
        )
    return min(wanted_bytes // CHUNK_BYTES * CHUNK_BYTES or CHUNK_BYTES, fitting_bytes)


@contextmanager
def probe_file(folder: Path, num_bytes: int) -> Iterator[ProbeFile]:
    """Write a file of random bytes in `folder`; it is gone when the context ends, however it ends.

    Raises:
        ConfigError: The folder can't be written to.
        StorageError: Writing failed.
    """
    try:
        descriptor = open_unnamed(folder)
    except OSError as error:
        raise ConfigError(f"{folder} can't be probed: {error.strerror}") from error
    try:
        rate = _fill(descriptor, folder, num_bytes)
        yield ProbeFile(path=descriptor_path(descriptor), num_bytes=num_bytes, write_gb_per_s=rate)
    finally:
        os.close(descriptor)


def _fill(descriptor: int, folder: Path, num_bytes: int) -> float:
    """Write random bytes past the page cache where that is possible; return GB/s, the sync included."""
    buffer = mmap.mmap(-1, CHUNK_BYTES)  # page-aligned, as direct writes want it
    set_direct(descriptor)
    started_s = time.perf_counter()
    random_s = 0.0
    try:
        for offset in range(0, num_bytes, CHUNK_BYTES):
            before_s = time.perf_counter()
            buffer[:] = os.urandom(CHUNK_BYTES)
            random_s += time.perf_counter() - before_s
            _write(descriptor, buffer, offset)
        sync(descriptor)
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
