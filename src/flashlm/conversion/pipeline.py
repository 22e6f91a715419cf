"""The two threads beside a conversion: one reads ahead, one checks and writes behind, buffers go round between them.

Reading, copying and writing release the GIL, so on two cores the three overlap. Buffers are counted, which bounds
memory and holds back whichever side is faster.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Generic, TypeVar

from flashlm.pack.direct_file import AlignedBuffer

T = TypeVar("T")


class _PoolClosedError(Exception):
    """The pool was closed while a thread waited for a buffer."""


class BufferPool:
    """At most `num_buffers` buffers in use at once; each grows to what is asked of it.

    The buffer returned last is given out first, so that a pool that is never short allocates no more than it needs.
    """

    def __init__(self, num_buffers: int) -> None:
        self._free: queue.LifoQueue[AlignedBuffer | None] = queue.LifoQueue()
        self._is_closed = False
        for _ in range(num_buffers):
            self._free.put(AlignedBuffer(0))

    def take(self, num_bytes: int) -> AlignedBuffer:
        """Return a buffer of at least `num_bytes`, waiting until one is free."""
        buffer = self._free.get()
        if self._is_closed or buffer is None:
            self._free.put(None)
            raise _PoolClosedError
        if len(buffer) >= num_bytes:
            return buffer
        del buffer  # freed before its successor is made
        return AlignedBuffer(num_bytes)

    def give(self, buffer: AlignedBuffer) -> None:
        """Put `buffer` back."""
        self._free.put(buffer)

    def close(self) -> None:
        """Wake and stop whoever waits for a buffer."""
        self._is_closed = True
        self._free.put(None)


class ReadAhead(Generic[T]):
    """Runs a generator in a thread of its own, `depth` items ahead; its errors come out where its items do.

    Close it (it is a context manager) to stop the thread; `pools` are the ones that the generator may be waiting on.
    """

    def __init__(self, items: Iterator[T], *, depth: int, pools: tuple[BufferPool, ...]) -> None:
        self._items = items
        self._pools = pools
        self._queue: queue.Queue[T | BaseException | None] = queue.Queue(maxsize=depth)
        self._is_stopping = False
        self._thread = threading.Thread(target=self._run, name="flashlm-convert-read", daemon=True)

    def __enter__(self) -> Iterator[T]:
        self._thread.start()
        return self._received()

    def __exit__(self, *_: object) -> None:
        self._is_stopping = True
        for pool in self._pools:
            pool.close()
        while self._thread.is_alive():  # a full queue must not hold the thread
            try:
                self._queue.get(timeout=0.01)
            except queue.Empty:
                continue
        self._thread.join()

    def _run(self) -> None:
        try:
            for item in self._items:
                self._queue.put(item)
                if self._is_stopping:
                    return
            self._queue.put(None)
        except _PoolClosedError:
            return
        except BaseException as error:  # handed to the thread that reads the items
            self._queue.put(error)

    def _received(self) -> Iterator[T]:
        while (item := self._queue.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item


class WriteBehind:
    """Runs jobs one after the other in a thread of its own; the first error is raised by `finish` or a later `submit`.

    Buffers that a job uses must come from a pool and be given back by the job: that bounds the jobs in waiting.
    """

    def __init__(self) -> None:
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="flashlm-convert-write")
        self._jobs: list[Future[None]] = []

    def __enter__(self) -> WriteBehind:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown(wait=True, cancel_futures=False)

    def submit(self, job: Callable[[], None]) -> None:
        """Queue a job."""
        for done in [future for future in self._jobs if future.done()]:
            self._jobs.remove(done)
            done.result()
        self._jobs.append(self._executor.submit(job))

    def finish(self) -> None:
        """Wait for all jobs queued so far, then raise the first error among them."""
        jobs, self._jobs = self._jobs, []
        wait(jobs)  # none may outlive the file that it writes to
        for future in jobs:
            future.result()
