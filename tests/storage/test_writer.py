"""Files that appear whole or not at all, and room that is asked for before."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from flashlm.errors import StorageError
from flashlm.storage.platform import descriptor_path, disk_room, num_usable_cores, open_unnamed
from flashlm.storage.reader import AlignedBuffer
from flashlm.storage.writer import AtomicFile, check_room, is_temporary, temporary_path, write_small_file


def test_an_atomic_file_is_there_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    piece = AlignedBuffer(8192).numpy()
    piece[:] = np.arange(8192) % 251
    with AtomicFile(path, 12_000) as file:
        file.write(piece, 0)
        assert not path.exists()
        assert is_temporary(temporary_path(path))
        file.write(piece[:4096], 8192)
    assert path.read_bytes() == piece.tobytes() + piece[: 12_000 - 8192].tobytes()
    assert [each.name for each in tmp_path.iterdir()] == ["rows"]


def test_an_atomic_file_that_is_given_up_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"before")
    with suppress(KeyboardInterrupt), AtomicFile(path, 4096) as file:
        file.write(AlignedBuffer(4096).numpy(), 0)
        raise KeyboardInterrupt
    assert path.read_bytes() == b"before"
    assert [each.name for each in tmp_path.iterdir()] == ["rows"]


def test_what_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"none/x can't be written: No such file") as raised:
        write_small_file(tmp_path / "none" / "x", b"")
    assert raised.value.errno == 2
    with pytest.raises(StorageError, match="can't be written"), AtomicFile(tmp_path / "none" / "x", 1):
        pass


def test_too_little_room_is_refused(tmp_path: Path) -> None:
    check_room(tmp_path, 0, what="nothing")
    with pytest.raises(StorageError, match=r"the pack does not fit on .* needed, .* free: free some") as raised:
        check_room(tmp_path, 1 << 60, what="the pack")
    assert raised.value.wanted_bytes == 1 << 60
    assert raised.value.got_bytes == pytest.approx(disk_room(tmp_path).free_bytes, rel=0.2)


def test_an_unnamed_file_can_be_opened_again_and_leaves_nothing(tmp_path: Path) -> None:
    fd = open_unnamed(tmp_path)
    with open(fd, "wb") as file:  # noqa: PTH123 - a descriptor
        file.write(b"content")
        file.flush()
        assert descriptor_path(fd).read_bytes() == b"content"
        assert not list(tmp_path.iterdir())


def test_this_process_has_a_core() -> None:
    assert num_usable_cores() >= 1
