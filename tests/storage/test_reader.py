"""The reader gives exactly the bytes of its files, or an error that says what was wrong."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm.errors import ConfigError, StorageError
from flashlm.storage.reader import AlignedBuffer, Backend, File, Reader, ReadRequest, Ticket

from .conftest import KIB, write_random

FILE_BYTES = [256 * KIB + 5, 64 * KIB, 516 * KIB]
BLOCK_BYTES = 4 * KIB  # of offsets and lengths in these tests
assert all(BLOCK_BYTES % unit == 0 for unit in (1, 512, 4096))


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("reads")
    return [write_random(folder / f"{n}.bin", n, seed=n) for n in FILE_BYTES]


@st.composite
def _ranges(draw: st.DrawFn) -> tuple[int, int, int]:
    """(file, first block, number of blocks), within the file."""
    index = draw(st.integers(0, len(FILE_BYTES) - 1))
    num_blocks = FILE_BYTES[index] // BLOCK_BYTES
    first = draw(st.integers(0, num_blocks - 1))
    return index, first, draw(st.integers(1, num_blocks - first))


def _submit(reader: Reader, files: list[File], batch: list[tuple[int, int, int]]) -> tuple[Ticket, AlignedBuffer]:
    """Read a batch side by side into one buffer."""
    buffer = AlignedBuffer(sum(length for _, _, length in batch) * BLOCK_BYTES)
    requests, at = [], 0
    for index, first, length in batch:
        requests.append(ReadRequest(files[index], first * BLOCK_BYTES, length * BLOCK_BYTES, buffer, at))
        at += length * BLOCK_BYTES
    return reader.submit(requests), buffer


def _expected(paths: list[Path], batch: list[tuple[int, int, int]]) -> bytes:
    ranges = [(paths[index].read_bytes(), first * BLOCK_BYTES, length * BLOCK_BYTES) for index, first, length in batch]
    return b"".join(content[start : start + length] for content, start, length in ranges)


@given(
    batches=st.lists(st.lists(_ranges(), min_size=0, max_size=5), min_size=1, max_size=5),
    piece_blocks=st.integers(1, 40),
    depth=st.integers(1, 5),
    direct=st.booleans(),
    order=st.randoms(use_true_random=False),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_batches_read_the_bytes_of_their_files_in_any_order_of_waiting(
    backend: Backend,
    paths: list[Path],
    batches: list[list[tuple[int, int, int]]],
    piece_blocks: int,
    depth: int,
    direct: bool,
    order: np.random.Generator,
) -> None:
    piece_bytes = piece_blocks * BLOCK_BYTES
    with Reader(backend=backend, queue_depth=depth, num_threads=depth, piece_bytes=piece_bytes) as reader:
        files = [reader.open(path, direct=direct) for path in paths]
        begun = [(batch, *_submit(reader, files, batch)) for batch in batches]
        order.shuffle(begun)
        for batch, ticket, buffer in begun:
            reader.wait(ticket)
            assert reader.is_done(ticket)
            assert buffer.numpy().tobytes() == _expected(paths, batch)
        num_bytes = sum(length * BLOCK_BYTES for batch in batches for _, _, length in batch)
        num_pieces = sum(-(-length // piece_blocks) for batch in batches for _, _, length in batch)
        assert reader.bytes_read == num_bytes
        assert reader.num_reads >= num_pieces
    assert reader.bytes_read == num_bytes


def test_two_threads_share_a_reader(reader: Reader, paths: list[Path]) -> None:
    files = [reader.open(path) for path in paths]
    wrong: list[object] = []

    def read_randomly(seed: int) -> None:
        random = np.random.default_rng(seed)
        try:
            for _ in range(150):
                batch = []
                for _ in range(random.integers(1, 4)):
                    index = int(random.integers(len(paths)))
                    num_blocks = FILE_BYTES[index] // BLOCK_BYTES
                    first = int(random.integers(num_blocks))
                    batch.append((index, first, int(random.integers(1, min(20, num_blocks - first) + 1))))
                ticket, buffer = _submit(reader, files, batch)
                if seed % 2:
                    while not reader.is_done(ticket):
                        pass
                reader.wait(ticket)
                if buffer.numpy().tobytes() != _expected(paths, batch):
                    wrong.append(batch)
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=read_randomly, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_ticket_of_a_thread_that_ended_can_be_waited_for(reader: Reader, paths: list[Path]) -> None:
    files = [reader.open(path, direct=False) for path in paths]
    batch = [(0, 0, 60), (2, 0, 100)]
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    begun: list[tuple[Ticket, AlignedBuffer]] = []
    thread = threading.Thread(target=lambda: begun.append(_submit(reader, files, batch)))
    thread.start()
    thread.join()
    ticket, buffer = begun[0]
    reader.wait(ticket)
    assert buffer.numpy().tobytes() == _expected(paths, batch)


@pytest.mark.parametrize("direct", [True, False])
def test_read_beyond_the_end_fails_with_what_was_wanted_and_got(reader: Reader, tmp_path: Path, direct: bool) -> None:
    path = write_random(tmp_path / "short.bin", 150 * KIB + 100, seed=3)
    file = reader.open(path, direct=direct)
    good, bad = AlignedBuffer(64 * KIB), AlignedBuffer(512 * KIB)
    tickets = [
        reader.submit([ReadRequest(file, 0, 512 * KIB, bad)]),
        reader.submit([ReadRequest(file, 0, 64 * KIB, good)]),
    ]
    with pytest.raises(
        StorageError, match=r"short\.bin: reading 65536 bytes at offset .* gave .*: the file ended"
    ) as e:
        reader.wait(tickets[0])
    assert e.value.path == str(path)
    assert e.value.errno is None
    assert (e.value.offset, e.value.wanted_bytes, e.value.got_bytes) == (128 * KIB, 64 * KIB, 22 * KIB + 100)
    reader.wait(tickets[1])
    assert good.numpy().tobytes() == path.read_bytes()[: 64 * KIB]


def test_file_truncated_after_it_was_opened_fails(reader: Reader, tmp_path: Path) -> None:
    path = write_random(tmp_path / "cut.bin", 256 * KIB, seed=4)
    file = reader.open(path)
    os.truncate(path, 8 * KIB)
    buffer = AlignedBuffer(32 * KIB)
    with pytest.raises(StorageError, match="the file ended") as e:
        reader.read([ReadRequest(file, 0, 32 * KIB, buffer)])
    assert (e.value.offset, e.value.wanted_bytes, e.value.got_bytes) == (0, 32 * KIB, 8 * KIB)
    assert not buffer.numpy()[8 * KIB :].any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"offset": 100}, "multiples of"),
        ({"num_bytes": 1000}, "multiples of"),
        ({"buffer_offset": 3}, "the address of"),
        ({"offset": -4096}, "the offset must be from 0"),
        ({"num_bytes": 0}, "the length more than 0"),
        ({"num_bytes": -4096}, "the length more than 0"),
        ({"num_bytes": 20 * KIB}, "does not fit a buffer of 16384 bytes"),
        ({"buffer_offset": 12 * KIB}, "does not fit a buffer of 16384 bytes"),
        ({"buffer_offset": -4096}, "does not fit a buffer of 16384 bytes"),
        ({"offset": 1 << 63}, "the offset must be from 0"),
    ],
)
def test_bad_request_is_refused_and_nothing_of_its_batch_is_begun(
    reader: Reader, random_file: Path, changes: dict[str, int], message: str
) -> None:
    file = reader.open(random_file)
    if not file.is_direct and ("multiples" in message or "address" in message):
        pytest.skip("this file system has no direct reads")
    good, buffer = AlignedBuffer(4 * KIB), AlignedBuffer(16 * KIB)
    bad = ReadRequest(**{"file": file, "offset": 0, "num_bytes": 8 * KIB, "buffer": buffer} | changes)
    for batch in ([bad], [ReadRequest(file, 4096, 4 * KIB, good), bad]):
        with pytest.raises(StorageError, match=rf"random\.bin: a read of .* is refused: .*{message}") as e:
            reader.submit(batch)
        assert (e.value.path, e.value.offset) == (str(random_file), bad.offset)
    assert reader.num_reads == 0


def test_offset_beyond_what_the_kernel_takes_fails(reader: Reader, random_file: Path) -> None:
    request = ReadRequest(reader.open(random_file), (1 << 63) - 4 * KIB, 4 * KIB, AlignedBuffer(4 * KIB))
    with pytest.raises(StorageError, match=r"random\.bin: reading 4096 bytes at offset 9223372036854771712 gave 0"):
        reader.read([request])


def test_closed_file_and_file_of_another_reader_are_refused(reader: Reader, random_file: Path) -> None:
    buffer = AlignedBuffer(4 * KIB)
    with Reader(backend="threads") as other:
        foreign = ReadRequest(other.open(random_file), 0, 4 * KIB, buffer)
        reader.open(random_file)  # has the number that the other has there
        with pytest.raises(StorageError, match="was opened by another reader"):
            reader.submit([foreign])
    with reader.open(random_file) as file:
        pass
    file.close()
    with pytest.raises(StorageError, match="the file is closed"):
        reader.submit([ReadRequest(file, 0, 4 * KIB, buffer)])


def test_file_closed_with_reads_in_flight_lets_them_land(reader: Reader, random_file: Path) -> None:
    file = reader.open(random_file)
    buffer = AlignedBuffer(1024 * KIB)
    ticket = reader.submit([ReadRequest(file, 0, 1024 * KIB, buffer)])
    file.close()
    reader.wait(ticket)
    assert buffer.numpy().tobytes() == random_file.read_bytes()


def test_a_ticket_owns_its_reads_from_before_they_begin(reader: Reader, random_file: Path) -> None:
    file, content = reader.open(random_file), random_file.read_bytes()
    buffer, ticket = AlignedBuffer(1024 * KIB), Ticket()
    reader.settle([ticket])  # nothing was begun, nothing is waited for
    for call in (reader.wait, reader.is_done):
        with pytest.raises(StorageError, match="nothing was begun for this ticket"):
            call(ticket)
    for half in (0, 512 * KIB):  # one ticket for two batches
        assert reader.submit([ReadRequest(file, half, 512 * KIB, buffer, half)], ticket) is ticket
    reader.settle([ticket])
    assert not ticket.is_in_flight
    assert buffer.numpy().tobytes() == content
    with Reader(backend="threads") as other, pytest.raises(StorageError, match="the ticket is of another reader"):
        other.submit([ReadRequest(other.open(random_file), 0, 4 * KIB, buffer)], ticket)


def test_a_failure_is_told_as_often_as_it_is_asked_for(reader: Reader, tmp_path: Path) -> None:
    path = write_random(tmp_path / "short.bin", 64 * KIB, seed=3)
    file = reader.open(path)
    os.truncate(path, 8 * KIB)
    ticket = reader.submit([ReadRequest(file, 0, 64 * KIB, AlignedBuffer(64 * KIB))])
    for _ in range(2):
        with pytest.raises(StorageError, match="gave 8192: the file ended"):
            reader.wait(ticket)
    reader.settle([ticket])  # what has failed is not in flight


def test_closed_reader_refuses_every_call(backend: Backend, random_file: Path) -> None:
    reader = Reader(backend=backend)
    file = reader.open(random_file)
    request = ReadRequest(file, 0, 4 * KIB, AlignedBuffer(4 * KIB))
    ticket = reader.submit([request])
    for _ in range(2):
        reader.close()
    file.close()
    calls = [
        lambda: reader.submit([request]),
        lambda: reader.submit([]),
        lambda: reader.wait(ticket),
        lambda: reader.is_done(ticket),
        lambda: reader.open(random_file),
    ]
    for call in calls:
        with pytest.raises(StorageError, match="the reader is closed"):
            call()
    assert backend in reader.describe()


def test_refused_open_keeps_no_descriptor(backend: Backend, random_file: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with Reader(backend=backend) as reader:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for path, message in [
            (tmp_path, os.strerror(errno.EISDIR)),
            (tmp_path / "missing", os.strerror(errno.ENOENT)),
            (tmp_path / "fifo", os.strerror(errno.EINVAL)),  # nobody writes to it: opening it must not wait
        ]:
            with pytest.raises(StorageError, match=f"{path.name} can't be opened: {message}") as e:
                reader.open(path)
            assert e.value.path == str(path)
            assert e.value.errno
        with pytest.raises(StorageError, match=r"random\.bin has 1048576 bytes, 5 expected") as e:
            reader.open(random_file, expected_bytes=5)
        assert (e.value.wanted_bytes, e.value.got_bytes) == (5, 1024 * KIB)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        reader.open(random_file, expected_bytes=1024 * KIB)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"backend": "floppy"}, "'floppy' is unknown: choose one of auto, io_uring, threads"),
        ({"queue_depth": 0}, "queue_depth 1 to 4096.*got queue_depth=0"),
        ({"num_threads": 5000}, "num_threads 1 to 1024.*num_threads=5000"),
        ({"piece_bytes": 5000}, "piece_bytes a multiple of 4096.*piece_bytes=5000"),
        ({"piece_bytes": 1 << 32}, "piece_bytes a multiple of 4096"),
        ({"queue_depth": -1}, "queue_depth=-1"),
    ],
)
def test_bad_setting_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Reader(**changes)  # type: ignore[arg-type]


def test_back_end_of_the_environment_is_taken_and_described(
    backend: Backend, random_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLASHLM_IO_BACKEND", backend)
    with Reader(queue_depth=5, num_threads=5) as reader:
        assert reader.describe() == f"{backend}, queue depth 5"
        file = reader.open(random_file, direct=False)
        assert not file.is_direct
        assert reader.describe() == f"{backend}, buffered, queue depth 5"
    monkeypatch.setenv("FLASHLM_IO_BACKEND", "tape")
    with pytest.raises(ConfigError, match="'tape' is unknown"):
        Reader()


@pytest.mark.parametrize("direct", [True, False])
def test_tmpfs_is_read_as_its_kernel_allows(reader: Reader, direct: bool) -> None:
    folder = Path("/dev/shm")
    if not os.access(folder, os.W_OK):
        pytest.skip("no /dev/shm to write to")
    path = folder / f"flashlm-test-{os.getpid()}"
    try:
        content = write_random(path, 300 * KIB + 1, seed=5).read_bytes()
        file = reader.open(path, direct=direct)
        assert direct or not file.is_direct
        assert file.is_direct or file.alignment_bytes == 1
        num_bytes = len(content) if file.alignment_bytes == 1 else 300 * KIB
        buffer = AlignedBuffer(num_bytes)
        reader.read([ReadRequest(file, 0, num_bytes, buffer)])
        assert buffer.numpy().tobytes() == content[:num_bytes]
    finally:
        path.unlink()


def test_buffered_reads_need_no_alignment(reader: Reader, random_file: Path) -> None:
    buffer = AlignedBuffer(200 * KIB)
    reader.read([ReadRequest(reader.open(random_file, direct=False), 12345, 100_001, buffer, 7)])
    assert buffer.numpy()[7 : 7 + 100_001].tobytes() == random_file.read_bytes()[12345 : 12345 + 100_001]


def test_range_through_the_page_cache_is_whole_or_an_error(reader: Reader, random_file: Path) -> None:
    file = reader.open(random_file)
    assert reader.read_range(file, 1001, 77) == random_file.read_bytes()[1001 : 1001 + 77]
    with pytest.raises(StorageError, match="gave 76: the file ended") as e:
        reader.read_range(file, 1024 * KIB - 76, 77)
    assert (e.value.wanted_bytes, e.value.got_bytes) == (77, 76)
