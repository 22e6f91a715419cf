"""Ranges of files at any offset, read directly: the same bytes as a plain read gives, in order, or a named error."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm.errors import StorageError
from flashlm.storage import ranges as module
from flashlm.storage.ranges import AlignedBuffer, FileRange, RangeReader, bytes_of, room_bytes
from flashlm.storage.reader import ENV_BACKEND, Backend
from tests.storage.conftest import write_random

FILE_BYTES = (1, 4095, 4096, 200_003)


@pytest.fixture(scope="module", params=["on a disk", "in memory"])
def paths(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Files of a file system with direct I/O, and of one without."""
    if request.param == "on a disk":
        folder = tmp_path_factory.mktemp("ranges")
        yield [write_random(folder / f"{size}.bin", size, seed=size) for size in FILE_BYTES]
        return
    if not Path("/dev/shm").is_dir():
        pytest.skip("no /dev/shm here")
    with TemporaryDirectory(dir="/dev/shm") as name:
        yield [write_random(Path(name) / f"{size}.bin", size, seed=size) for size in FILE_BYTES]


@pytest.fixture(autouse=True)
def _with_either_backend(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV_BACKEND, backend)


@st.composite
def _range(draw: st.DrawFn) -> tuple[int, int, int]:
    index = draw(st.integers(0, len(FILE_BYTES) - 1))
    offset = draw(st.integers(0, FILE_BYTES[index]))
    return index, offset, draw(st.integers(0, FILE_BYTES[index] - offset))


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(wanted=st.lists(_range(), max_size=8), ahead_bytes=st.sampled_from([0, 5_000, 1 << 20]))
def test_ranges_are_what_a_plain_read_gives(
    wanted: list[tuple[int, int, int]], ahead_bytes: int, paths: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AHEAD_BYTES", ahead_bytes)
    monkeypatch.setattr(module, "MAX_OPEN_FILES", 2)
    expected = [paths[index].read_bytes()[offset : offset + size] for index, offset, size in wanted]
    with RangeReader() as reader:
        each = (FileRange(paths[index], offset, size) for index, offset, size in wanted)
        assert [read.wait().numpy().tobytes() for _, read in reader.ahead(each)] == expected
        buffer = AlignedBuffer(sum(room_bytes(size) for *_, size in wanted))
        begun, at = [], 0
        for index, offset, size in wanted:
            begun.append(reader.begin(paths[index], offset, size, buffer, at))
            at += room_bytes(size)
        assert [read.wait().numpy().tobytes() for read in begun] == expected


def test_bytes_of_a_buffer_are_its_memory() -> None:
    buffer = AlignedBuffer(8192)
    bytes_of(buffer)[3] = 7
    assert buffer.numpy()[3] == 7
    assert bytes_of(buffer).data_ptr() == buffer.numpy().ctypes.data
    assert bytes_of(AlignedBuffer(4096)).sum() == torch.tensor(0)  # the tensor keeps the memory


@pytest.mark.parametrize("offset", [0, 4_000, 5_000, 1 << 40])
def test_a_range_beyond_the_end_is_an_error(offset: int, tmp_path: Path) -> None:
    path = write_random(tmp_path / "x.bin", 4_500, seed=0)
    with RangeReader() as reader, pytest.raises(StorageError, match=r"x\.bin: .*the file ended") as raised:
        reader.read(path, offset, 4_501, AlignedBuffer(room_bytes(4_501)))
    assert (raised.value.offset, raised.value.wanted_bytes) == (offset, 4_501)
    assert raised.value.got_bytes == max(4_500 - offset, 0)


def test_a_file_cut_short_after_it_was_opened_is_an_error(tmp_path: Path) -> None:
    path = write_random(tmp_path / "x.bin", 50_000, seed=0)
    with RangeReader() as reader:
        buffer = AlignedBuffer(room_bytes(50_000))
        reader.read(path, 0, 50_000, buffer)
        os.truncate(path, 9_000)
        with pytest.raises(StorageError, match="the file ended"):
            reader.read(path, 0, 50_000, buffer)
        with pytest.raises(StorageError, match="the file ended"):
            reader.read(path, 49_990, 10, buffer)


def test_one_that_fails_does_not_hold_up_the_others(tmp_path: Path, paths: list[Path]) -> None:
    wanted = [FileRange(paths[3], 0, 9), FileRange(tmp_path / "none", 0, 9), FileRange(paths[3], 9, 9)]
    said = []
    with RangeReader() as reader:
        for each, read in reader.ahead(wanted):
            try:
                read.wait()
                said.append(str(each.offset))
            except StorageError as error:
                said.append(str(error))
    assert said == ["0", f"{tmp_path / 'none'} can't be opened: No such file or directory", "9"]
