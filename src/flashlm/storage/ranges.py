"""Any byte ranges of any files, aligned or not, read directly: what conversion, verification and reordering go through.

On top of the reader: a range is rounded out to the alignment of its file, and what no direct read can give, the last bytes
of a file that do not fill a block, comes through the page cache. Several ranges may be on their way at once, which is what
keeps a device busy.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import torch

from flashlm.errors import StorageError
from flashlm.storage.platform import drop_cached_file
from flashlm.storage.reader import AlignedBuffer, File, Reader, ReadRequest, Ticket

ALIGN_BYTES = 4096  # of ranges as they are read; a file that wants more is read through the page cache
AHEAD_BYTES = 16 << 20  # what `ahead` has on its way behind the range that is looked at
MAX_OPEN_FILES = 64


@dataclass(frozen=True)
class FileRange:
    """Bytes `offset` to `offset + num_bytes` of the file at `path`."""

    path: Path
    offset: int
    num_bytes: int


Wanted = TypeVar("Wanted", bound=FileRange)


def room_bytes(num_bytes: int) -> int:
    """Return the buffer size that holds any range of `num_bytes` with its rounded-out ends; a multiple of `ALIGN_BYTES`."""
    return -(-num_bytes // ALIGN_BYTES) * ALIGN_BYTES + ALIGN_BYTES


def bytes_of(buffer: AlignedBuffer) -> torch.Tensor:
    """Return the memory of `buffer` as uint8 (num_bytes,), without a copy; keeps it alive."""
    return torch.from_numpy(buffer.numpy())


class RangeRead:
    """A range on its way to byte `at` of `buffer` on. It begins when this is made, which raises where it can't.

    Raises:
        StorageError: The file ends within the range, or is closed.
    """

    def __init__(self, reader: Reader, file: File, wanted: FileRange, buffer: AlignedBuffer, at: int) -> None:
        alignment = file.alignment_bytes
        begin, end = wanted.offset, wanted.offset + wanted.num_bytes
        if end > file.num_bytes:
            got_bytes = max(file.num_bytes - begin, 0)
            raise StorageError(
                f"{file.path}: reading {wanted.num_bytes} bytes at offset {begin} gave {got_bytes}: the file ended",
                path=str(file.path),
                offset=begin,
                wanted_bytes=wanted.num_bytes,
                got_bytes=got_bytes,
            )
        self._reader = reader
        self._file = file
        self._wanted = wanted
        start = begin // alignment * alignment
        # The last block of a file is seldom whole, and then no direct read can give it.
        direct_end = min(-(-end // alignment), file.num_bytes // alignment) * alignment
        self._num_direct = min(max(direct_end - begin, 0), wanted.num_bytes)
        first = at + begin - start
        self._bytes = bytes_of(buffer)[first : first + wanted.num_bytes]
        self._tickets: list[Ticket] = []
        if self._num_direct:
            self._tickets.append(reader.submit([ReadRequest(file, start, direct_end - start, buffer, at)]))

    def wait(self) -> torch.Tensor:
        """Return the bytes, uint8 (num_bytes,), once they are there: a view of the buffer.

        Raises:
            StorageError: The file can't be read, or has become shorter.
        """
        for ticket in self._tickets:
            self._reader.wait(ticket)
        done = self._num_direct
        if done < self._wanted.num_bytes:
            tail = self._reader.read_range(self._file, self._wanted.offset + done, self._wanted.num_bytes - done)
            self._bytes[done:] = torch.frombuffer(bytearray(tail), dtype=torch.uint8)
        return self._bytes

    def settle(self) -> None:
        """Let the read land or fail, so that the buffer may be used again."""
        self._reader.settle(self._tickets)


class FailedRead:
    """A read that could not be begun, in the place of one that was."""

    def __init__(self, error: StorageError) -> None:
        self._error = error

    def wait(self) -> torch.Tensor:
        """Raise why."""
        raise self._error

    def settle(self) -> None:
        """Do nothing: nothing is on its way."""


class RangeReader:
    """Reads ranges of any number of files; a context manager, for one thread at a time."""

    def __init__(self) -> None:
        self._reader = Reader()
        self._files: dict[Path, File] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._files:
            self._close_oldest()
        self._reader.close()

    def begin(self, path: Path, offset: int, num_bytes: int, buffer: AlignedBuffer, at: int = 0) -> RangeRead:
        """Begin to read a range into `buffer` from its byte `at`, a multiple of `ALIGN_BYTES`, on; return at once.

        The buffer must have room for the range with its rounded-out ends: see `room_bytes`.

        Raises:
            StorageError: The file can't be opened, or ends within the range.
        """
        return RangeRead(self._reader, self._file(path), FileRange(path, offset, num_bytes), buffer, at)

    def read(self, path: Path, offset: int, num_bytes: int, buffer: AlignedBuffer, at: int = 0) -> torch.Tensor:
        """Read a range: `begin` and `wait`."""
        return self.begin(path, offset, num_bytes, buffer, at).wait()

    def ahead(self, ranges: Iterable[Wanted]) -> Iterator[tuple[Wanted, RangeRead | FailedRead]]:
        """Yield each range with its read, in order, while the next ones are on their way; `wait` for it.

        Holds a few buffers of the longest range; a range's bytes are good until the next one is asked for.
        """
        begun: deque[tuple[Wanted, RangeRead | FailedRead, AlignedBuffer]] = deque()
        free: list[AlignedBuffer] = []
        begun_bytes = 0
        for wanted in ranges:
            buffer = free.pop() if free else AlignedBuffer(0)
            if buffer.num_bytes < room_bytes(wanted.num_bytes):
                buffer = AlignedBuffer(room_bytes(wanted.num_bytes))
            begun.append((wanted, self._try(wanted, buffer), buffer))
            begun_bytes += wanted.num_bytes
            while begun_bytes - begun[0][0].num_bytes > AHEAD_BYTES:
                first, read, buffer = begun[0]
                yield first, read
                begun.popleft()
                begun_bytes -= first.num_bytes
                read.settle()
                free.append(buffer)
        for first, read, _ in begun:
            yield first, read

    def _try(self, wanted: FileRange, buffer: AlignedBuffer) -> RangeRead | FailedRead:
        try:
            return self.begin(wanted.path, wanted.offset, wanted.num_bytes, buffer)
        except StorageError as error:
            return FailedRead(error)

    def _file(self, path: Path) -> File:
        if path not in self._files:
            if len(self._files) == MAX_OPEN_FILES:
                self._close_oldest()
            file = self._reader.open(path)
            if file.alignment_bytes > ALIGN_BYTES:
                file.close()
                file = self._reader.open(path, direct=False)
            self._files[path] = file
        return self._files[path]

    def _close_oldest(self) -> None:
        file = self._files.pop(next(iter(self._files)))
        if not file.is_direct:  # the weights of a model must not push everything else out of the page cache
            drop_cached_file(file.path)
        file.close()
