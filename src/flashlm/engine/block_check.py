"""Blocks held against the manifest's checksums while they are read: nothing is read twice for it.

At loading the checksum of what has landed is computed while the next reads are under way; xxh3 is far faster than a
device (docs/reliability.md has both rates).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flashlm.engine.load_progress import advance
from flashlm.pack.checksums import check_bytes
from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest, Ticket
from flashlm.storage.slab import SlotRef

GROUP_BYTES = 32 << 20  # of reads that are waited for together
GROUPS_AHEAD = 8  # a queue stays full while this thread computes, or waits for a core


class BlockCheck:
    """What is checked of the streamed files.

    Args:
        entries: For each layer its file and the checksums of its blocks.
        what: What a block is called: "block" or "expert".
        at_load: Check what is read while loading.
        always: Check what is streamed, too.
    """

    def __init__(
        self,
        entries: Sequence[tuple[Path, Sequence[str]]] = (),
        what: str = "block",
        *,
        at_load: bool = False,
        always: bool = False,
    ) -> None:
        self._entries = entries
        self._what = what
        self._at_load = at_load
        self._always = always

    @property
    def checks_streamed(self) -> bool:
        """Whether what is streamed is checked."""
        return self._always

    def check(self, layer: int, block: int, content: object) -> None:
        """Hold the bytes of a block, as read, against its checksum.

        Raises:
            PackError: They differ.
        """
        path, checksums = self._entries[layer]
        check_bytes(content, checksums[block], path, f"{self._what} {block}")

    def read(
        self,
        reader: Reader,
        requests: Sequence[ReadRequest],
        blocks: Sequence[tuple[int, int]],
        tickets: list[Ticket] | None = None,
    ) -> None:
        """Read whole blocks at loading, and check them.

        Args:
            reader: Reads.
            requests: One for each block.
            blocks: Layer and number of each.
            tickets: Gets the ticket of each read before it begins, for an owner who goes on after an interrupt.

        Raises:
            StorageError: A read failed.
            PackError: A block is damaged.
        """
        for request, (layer, block) in zip(landed(reader, requests, tickets), blocks, strict=True):
            if not self._at_load:
                continue
            self.check(layer, block, content_of(request.buffer, request.buffer_offset, request.num_bytes))

    def sample(self, reader: Reader, request: ReadRequest, layer: int, block: int) -> None:
        """Read one block at loading, only to check it; nothing is read where loading checks nothing.

        Raises:
            StorageError: The read failed.
            PackError: The block is damaged.
        """
        if self._at_load:
            self.read(reader, [request], [(layer, block)])

    def streamed(self, layer: int, block: int, place: SlotRef, num_bytes: int) -> None:
        """Check a block that was streamed to `place`, where that is wanted.

        Raises:
            PackError: It is damaged.
        """
        if self._always:
            self.check(layer, block, place.numpy(num_bytes))


def content_of(buffer: AlignedBuffer, offset: int, num_bytes: int) -> npt.NDArray[np.uint8]:
    """Return a view of bytes in a buffer."""
    return buffer.numpy()[offset : offset + num_bytes]


def landed(
    reader: Reader, requests: Sequence[ReadRequest], tickets: list[Ticket] | None = None
) -> Iterator[ReadRequest]:
    """Yield each request once its bytes are there, in order; the next ones are read meanwhile.

    Args:
        reader: Reads.
        requests: What.
        tickets: Gets each ticket before its read begins. However this ends, no read is left in flight, unless an interrupt
            cuts the waiting short: who owns the memory then settles these.

    Raises:
        StorageError: A read failed.
    """
    tickets = [] if tickets is None else tickets
    begun: deque[tuple[list[ReadRequest], Ticket]] = deque()
    first = len(tickets)
    try:
        for group in _grouped(requests):
            ticket = Ticket()
            tickets.append(ticket)
            reader.submit(group, ticket)
            begun.append((group, ticket))
            if len(begun) > GROUPS_AHEAD:
                yield from _next_landed(reader, begun)
        while begun:
            yield from _next_landed(reader, begun)
    finally:
        reader.settle(tickets[first:])  # an error or an interrupt: somebody may free the buffers


def _next_landed(reader: Reader, begun: deque[tuple[list[ReadRequest], Ticket]]) -> list[ReadRequest]:
    group, ticket = begun[0]
    reader.wait(ticket)
    begun.popleft()
    advance(sum(request.num_bytes for request in group))
    return group


def _grouped(requests: Sequence[ReadRequest]) -> Iterator[list[ReadRequest]]:
    group: list[ReadRequest] = []
    for request in requests:
        group.append(request)
        if sum(each.num_bytes for each in group) >= GROUP_BYTES:
            yield group
            group = []
    if group:
        yield group
