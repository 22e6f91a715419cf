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
    """A range on its way into a buffer. What goes wrong is told by `wait`, even where the read could not be begun.

    Attributes:
        buffer: Where it lands.
    """

    def __init__(self, reader: Reader, wanted: FileRange, buffer: AlignedBuffer) -> None:
        self.buffer = buffer
        self._reader = reader
        self._wanted = wanted
        self._file: File | None = None
        self._ticket: Ticket | None = None  # None: there is nothing to be read directly
        self._first = 0  # byte of the buffer where the range begins
        self._error: StorageError | None = None

    def begin(self, file: File, at: int) -> None:
        """Submit the read to byte `at` of the buffer on; raises StorageError."""
        wanted, alignment = self._wanted, file.alignment_bytes
        if wanted.offset + wanted.num_bytes > file.num_bytes:
            got_bytes = max(file.num_bytes - wanted.offset, 0)
            raise StorageError(
                f"{file.path}: reading {wanted.num_bytes} bytes at offset {wanted.offset} gave {got_bytes}: the file ended",
                path=str(file.path),
                offset=wanted.offset,
                wanted_bytes=wanted.num_bytes,
                got_bytes=got_bytes,
            )
        self._file = file
        start = wanted.offset // alignment * alignment
        end = min(-(-(wanted.offset + wanted.num_bytes) // alignment), file.num_bytes // alignment) * alignment
        self._first = at + wanted.offset - start
        if wanted.num_bytes and end > start:
            self._ticket = self._reader.submit([ReadRequest(file, start, end - start, self.buffer, at)])

    def fail(self, error: StorageError) -> None:
        """Let `wait` raise `error`: the read could not be begun."""
        self._error = error

    def wait(self) -> torch.Tensor:
        """Return the bytes, uint8 (num_bytes,), once they are there: a view of the buffer.

        Raises:
            StorageError: The file can't be opened or read, or ends within the range.
        """
        if self._error is not None:
            raise self._error
        assert self._file is not None
        wanted, raw = self._wanted, bytes_of(self.buffer)[self._first : self._first + self._wanted.num_bytes]
        if self._ticket is not None:
            self._reader.wait(self._ticket)
        whole_bytes = self._file.num_bytes // self._file.alignment_bytes * self._file.alignment_bytes
        done = max(whole_bytes - wanted.offset, 0)
        if done < wanted.num_bytes:
            tail = self._reader.read_range(self._file, wanted.offset + done, wanted.num_bytes - done)
            raw[done:] = torch.frombuffer(bytearray(tail), dtype=torch.uint8)
        return raw

    def settle(self) -> None:
        """Let the read land or fail, so that the buffer may be used again."""
        if self._ticket is not None:
            self._reader.settle([self._ticket])


class RangeReader:
    """Reads ranges of any number of files; a context manager, for one thread at a time.

    Args:
        reader: Reads; it is closed with this one. None makes one.
    """

    def __init__(self, reader: Reader | None = None) -> None:
        self._reader = Reader() if reader is None else reader
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
        """
        read = RangeRead(self._reader, FileRange(path, offset, num_bytes), buffer)
        try:
            read.begin(self._file(path), at)
        except StorageError as error:
            read.fail(error)
        return read

    def read(self, path: Path, offset: int, num_bytes: int, buffer: AlignedBuffer, at: int = 0) -> torch.Tensor:
        """Read a range: `begin` and `wait`."""
        return self.begin(path, offset, num_bytes, buffer, at).wait()

    def ahead(self, ranges: Iterable[Wanted]) -> Iterator[tuple[Wanted, RangeRead]]:
        """Yield each range with its read, in order, while the next ones are on their way.

        Holds a few buffers of the longest range; a range's bytes are good until the next one is asked for.
        """
        begun: deque[tuple[Wanted, RangeRead]] = deque()
        free: list[AlignedBuffer] = []
        begun_bytes = 0
        for wanted in ranges:
            buffer = free.pop() if free else AlignedBuffer(0)
            if buffer.num_bytes < room_bytes(wanted.num_bytes):
                buffer = AlignedBuffer(room_bytes(wanted.num_bytes))
            begun.append((wanted, self.begin(wanted.path, wanted.offset, wanted.num_bytes, buffer)))
            begun_bytes += wanted.num_bytes
            while begun_bytes - begun[0][0].num_bytes > AHEAD_BYTES:
                yield begun[0]
                done, read = begun.popleft()
                begun_bytes -= done.num_bytes
                read.settle()
                free.append(read.buffer)
        yield from begun

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
