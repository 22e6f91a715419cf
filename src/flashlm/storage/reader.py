"""Direct reads of (file, offset, length → buffer), in flight together, with errors that name file, offset, wanted and got.

A thin typed face of the native reader. The back end is io_uring where the kernel allows it, else a pool of threads with
`pread`; a file on a file system that refuses direct reads (tmpfs, some overlays) is read through the page cache. Which of
these is in use `Reader.describe` tells. The native reader keeps buffers alive until reads that were begun have landed.

Whoever uses a part of a buffer again must know that no read into it is on its way any more, also where an exception, an
interrupt above all, came between: such an owner makes the `Ticket`, puts it where it is found again, and only then submits
with it. Before the next use it asks `settle` to let whatever was begun land.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self, get_args

import torch

from flashlm import _native
from flashlm._native import AlignedBuffer, SlotRef, Ticket
from flashlm.errors import ConfigError, StorageError

__all__ = ["AlignedBuffer", "Backend", "File", "ReadRequest", "Reader", "RowGeometry", "Ticket"]

Backend = Literal["auto", "io_uring", "threads"]
ENV_BACKEND = "FLASHLM_IO_BACKEND"

# docs/experiments.md, "read sizes and depths", has the measurements behind these.
DEFAULT_QUEUE_DEPTH = 256
DEFAULT_NUM_THREADS = 8
DEFAULT_PIECE_BYTES = 1 << 20
MAX_MERGED_BYTES = 1 << 20


class File:
    """A file opened by a `Reader`; a context manager.

    Attributes:
        path: Where it is.
        num_bytes: Its size when it was opened.
        is_direct: Whether reads go past the page cache.
        alignment_bytes: What offsets and lengths must be multiples of (1 where reads are buffered).
    """

    __slots__ = ("_id", "_reader", "alignment_bytes", "is_direct", "num_bytes", "path")

    def __init__(self, reader: _native.Reader, file_id: int, path: Path) -> None:
        self._reader = reader
        self._id = file_id
        self.path = path
        self.num_bytes, self.is_direct, self.alignment_bytes = reader.file_info(file_id)

    def close(self) -> None:
        """Close it; reads in flight still land. Closing twice does nothing."""
        if self._id:
            self._reader.close_file(self._id)
            self._id = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


@dataclass(slots=True)
class ReadRequest:
    """Read `num_bytes` at `offset` of `file` to `buffer_offset` of `buffer`."""

    file: File
    offset: int
    num_bytes: int
    buffer: AlignedBuffer
    buffer_offset: int = 0

    @classmethod
    def into(cls, place: SlotRef, file: File, offset: int, num_bytes: int) -> Self:
        """Return the request to read into a slot of a slab."""
        return cls(file, offset, num_bytes, place.buffer, place.buffer_offset)


@dataclass(slots=True, frozen=True, kw_only=True)
class RowGeometry:
    """Where rows lie in a file: row i at (i // block_rows) * block_stride_bytes + (i % block_rows) * row_stride_bytes."""

    row_stride_bytes: int
    block_rows: int
    block_stride_bytes: int


class Reader:
    """Reads batches of file ranges. Safe to share between threads; a context manager.

    Args:
        backend: "io_uring", "threads", or "auto": the environment's `FLASHLM_IO_BACKEND`, else io_uring where the kernel
            allows it, else threads.
        queue_depth: Pieces that io_uring keeps in flight.
        num_threads: Threads of the other back end: pieces that it keeps in flight.
        piece_bytes: Requests are cut into pieces of this size, a multiple of 4096.

    Raises:
        ConfigError: A setting is out of range, or io_uring was asked for and is refused.
    """

    def __init__(
        self,
        *,
        backend: Backend = "auto",
        queue_depth: int = DEFAULT_QUEUE_DEPTH,
        num_threads: int = DEFAULT_NUM_THREADS,
        piece_bytes: int = DEFAULT_PIECE_BYTES,
    ) -> None:
        wanted = os.environ.get(ENV_BACKEND, "auto") if backend == "auto" else backend
        if wanted not in get_args(Backend):
            raise ConfigError(f"I/O back end {wanted!r} is unknown: choose one of {', '.join(get_args(Backend))}")
        try:
            self._native = _native.Reader(wanted, queue_depth, num_threads, piece_bytes)
        except (ValueError, TypeError, RuntimeError) as error:  # TypeError: a negative number
            got = f"queue_depth={queue_depth}, num_threads={num_threads}, piece_bytes={piece_bytes}"
            raise ConfigError(f"{error}; got {got}") from error
        self._queue_depth = queue_depth if self.backend == "io_uring" else num_threads
        self._files: list[File] = []

    @property
    def backend(self) -> str:
        """Return "io_uring" or "threads"."""
        return self._native.backend

    @property
    def bytes_read(self) -> int:
        """Bytes that have landed so far."""
        return self._native.bytes_read

    @property
    def num_reads(self) -> int:
        """Reads that the device has been asked for and answered so far."""
        return self._native.num_reads

    def describe(self) -> str:
        """Return one line on what is in use, like "io_uring, direct, queue depth 128"."""
        kinds = {file.is_direct for file in self._files}
        access = {(): "", (True,): ", direct", (False,): ", buffered"}.get(tuple(kinds), ", direct and buffered")
        refused = f" (io_uring refused: {self._native.refusal})" if self._native.refusal else ""
        return f"{self.backend}{refused}{access}, queue depth {self._queue_depth}"

    def open(self, path: str | Path, *, expected_bytes: int | None = None, direct: bool = True) -> File:
        """Open a file for reading.

        Args:
            path: The file.
            expected_bytes: The size that it must have.
            direct: False reads through the page cache.

        Raises:
            StorageError: It can't be opened, or is not of the expected size.
        """
        path = Path(path)
        try:
            error, file_id = self._native.open(str(path), direct)
        except ValueError as closed:
            raise StorageError(f"{path} can't be opened: {closed}", path=str(path)) from closed
        if error:
            raise StorageError(f"{path} can't be opened: {os.strerror(error)}", path=str(path), errno=error)
        file = File(self._native, file_id, path)
        if expected_bytes is not None and file.num_bytes != expected_bytes:
            file.close()
            raise StorageError(
                f"{path} has {file.num_bytes} bytes, {expected_bytes} expected: it is truncated or from another pack",
                path=str(path),
                wanted_bytes=expected_bytes,
                got_bytes=file.num_bytes,
            )
        self._files.append(file)
        return file

    def submit(self, requests: Sequence[ReadRequest], ticket: Ticket | None = None) -> Ticket:
        """Begin a batch of reads and return at once.

        Args:
            requests: The reads.
            ticket: Made before by the owner of the buffers, to whom these reads then belong from before they begin; it may
                have others. None makes one.

        Raises:
            StorageError: A request is not aligned as its file needs, lies outside its buffer, or its file is closed; or the
                ticket is another reader's.
        """
        ticket = Ticket() if ticket is None else ticket
        for request in requests:
            if not 0 <= request.offset < 1 << 63 or request.num_bytes <= 0:
                raise _refused(request, "the offset must be from 0 to 2^63 - 1, the length more than 0")
            if request.buffer_offset < 0 or request.buffer_offset + request.num_bytes > request.buffer.num_bytes:
                where = f"at {request.buffer_offset} it does not fit a buffer of {request.buffer.num_bytes} bytes"
                raise _refused(request, where)
            if request.file._reader is not self._native:
                raise _refused(request, "the file was opened by another reader")
        try:
            if len(requests) == 1:
                one = requests[0]
                self._native.submit_one(ticket, one.file._id, one.offset, one.num_bytes, one.buffer, one.buffer_offset)
            else:
                self._native.submit(
                    ticket,
                    [(one.file._id, one.offset, one.num_bytes, one.buffer, one.buffer_offset) for one in requests],
                )
        except ValueError as error:
            if not requests:
                raise StorageError(str(error), path="") from error
            why, index = error.args if len(error.args) == 2 else (error, 0)
            raise _refused(requests[index], str(why)) from error
        return ticket

    def submit_rows(
        self,
        file: File,
        geometry: RowGeometry,
        rows: torch.Tensor,
        slots: torch.Tensor,
        buffer: AlignedBuffer,
        *,
        buffer_offset: int = 0,
        max_gap: int = 0,
        ticket: Ticket | None = None,
    ) -> Ticket:
        """Begin reads of scattered rows, each to its slot of `buffer`, in one submission; return at once.

        Neighbouring rows are one read with several destinations.

        Args:
            file: The layer's file; must be of this reader.
            geometry: Where its rows lie.
            rows: int32 (num_rows,), contiguous, ascending.
            slots: int32 (num_rows,), contiguous: row i lands at buffer_offset + slots[i] * row_stride_bytes.
            buffer: Where they land. Its last row_stride_bytes are scratch for gaps.
            buffer_offset: Where slot 0 is.
            max_gap: Rows between two wanted ones that are read through rather than begin another read.
            ticket: As in `submit`. It counts the reads that rows become, and their bytes, gaps included.

        Raises:
            ConfigError: Rows or slots are not as stated, or a slot is outside the buffer.
            StorageError: Not aligned as the file needs, rows that do not ascend, or the file or the reader is closed.
        """
        if file._reader is not self._native:
            raise StorageError(f"{file.path}: the file was opened by another reader", path=str(file.path))
        ticket = Ticket() if ticket is None else ticket
        try:
            self._native.submit_rows(
                ticket,
                file._id,
                geometry.row_stride_bytes,
                geometry.block_rows,
                geometry.block_stride_bytes,
                rows,
                slots,
                buffer,
                buffer_offset,
                max_gap,
                MAX_MERGED_BYTES,
            )
        except ValueError as error:
            why = error.args[0] if error.args else error
            raise StorageError(
                f"{file.path}: a read of {len(rows)} rows is refused: {why}", path=str(file.path)
            ) from error
        return ticket

    def is_done(self, ticket: Ticket) -> bool:
        """Return whether the reads of `ticket` have landed or failed.

        Raises:
            StorageError: The reader is closed, or has begun nothing for this ticket.
        """
        try:
            return self._native.is_done(ticket)
        except (ValueError, RuntimeError) as error:
            raise StorageError(str(error), path="") from error

    def wait(self, ticket: Ticket) -> None:
        """Wait until all reads of `ticket` have landed. An interrupted wait can be taken up again; each gives the same.

        Raises:
            StorageError: A read failed, the file ended too early or the reader was closed before the read began; none of
                the ticket's reads is in flight any more. Offset, wanted and got are those of the piece that failed.
                Or the reader is closed, or has begun nothing for this ticket.
        """
        try:
            failure = self._native.wait(ticket)
        except (ValueError, RuntimeError) as error:
            raise StorageError(str(error), path="") from error
        if failure is None:
            return
        code, path, offset, wanted, got = failure
        what = os.strerror(code) if code else "the file ended"
        raise StorageError(
            f"{path}: reading {wanted} bytes at offset {offset} gave {got}: {what}",
            path=path,
            offset=offset,
            wanted_bytes=wanted,
            got_bytes=got,
            errno=code or None,
        )

    def settle(self, tickets: Iterable[Ticket]) -> None:
        """Let all reads of `tickets` land or fail, whatever they are, so that their memory may be used again.

        May be interrupted, and taken up again.

        Raises:
            StorageError: The device gives no more answers; reads are in flight still.
        """
        for ticket in tickets:
            if not ticket.is_in_flight:
                continue
            try:
                self.wait(ticket)
            except StorageError:
                if ticket.is_in_flight:
                    raise

    def read(self, requests: Sequence[ReadRequest]) -> None:
        """Read a batch: `submit` and `wait`."""
        if requests:
            self.wait(self.submit(requests))

    def read_range(self, file: File, offset: int, num_bytes: int) -> bytes:
        """Read any range, aligned or not, through the page cache: for headers and tails.

        Raises:
            StorageError: The range ends beyond the file, or can't be read.
        """
        try:
            with file.path.open("rb") as plain:
                plain.seek(offset)
                content = plain.read(num_bytes)
        except OSError as error:
            raise StorageError(
                f"{file.path} can't be read: {error.strerror}", path=str(file.path), offset=offset, errno=error.errno
            ) from error
        if len(content) != num_bytes:
            raise StorageError(
                f"{file.path}: reading {num_bytes} bytes at offset {offset} gave {len(content)}: the file ended",
                path=str(file.path),
                offset=offset,
                wanted_bytes=num_bytes,
                got_bytes=len(content),
            )
        return content

    def close(self) -> None:
        """Let reads in flight land, fail those not begun, and close all files. Closing twice does nothing."""
        self._native.close()
        self._files.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        # Files keep the native reader, and its reads in flight, beyond this object.
        if hasattr(self, "_native"):
            self.close()


def _refused(request: ReadRequest, why: str) -> StorageError:
    return StorageError(
        f"{request.file.path}: a read of {request.num_bytes} bytes at offset {request.offset} is refused: {why}",
        path=str(request.file.path),
        offset=request.offset,
        wanted_bytes=request.num_bytes,
    )
