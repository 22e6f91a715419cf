"""Scattered rows: every row lands in its slot, neighbours are one read, gaps cost bytes but no slot."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm.errors import ConfigError, StorageError
from flashlm.storage.reader import AlignedBuffer, Reader, RowGeometry

STRIDE, BLOCK_ROWS, NUM_ROWS = 1024, 6, 50
GEOMETRY = RowGeometry(row_stride_bytes=STRIDE, block_rows=BLOCK_ROWS, block_stride_bytes=8192)  # padded blocks


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    content = np.zeros((-(-NUM_ROWS // BLOCK_ROWS), 8192), dtype=np.uint8)
    for row in range(NUM_ROWS):
        at = row % BLOCK_ROWS * STRIDE
        content[row // BLOCK_ROWS, at : at + STRIDE] = row + 1
    path = tmp_path_factory.mktemp("rows") / "layer.rows"
    path.write_bytes(content.tobytes())
    return path


def _ints(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.sets(st.integers(0, NUM_ROWS - 1), min_size=1),
    gap=st.integers(0, 4),
    seed=st.integers(0, 99),
    backend=st.sampled_from(["auto", "threads"]),
)
def test_every_row_lands_in_its_slot(path: Path, rows: set[int], gap: int, seed: int, backend: str) -> None:
    wanted = sorted(rows)
    slots = np.random.default_rng(seed).permutation(NUM_ROWS)[: len(wanted)].tolist()
    with Reader(backend=backend) as reader:  # type: ignore[arg-type]
        file = reader.open(path)
        buffer = AlignedBuffer(4096 + (NUM_ROWS + 1) * STRIDE)
        memory = buffer.numpy()
        memory[:] = 0
        ticket = reader.submit_rows(
            file, GEOMETRY, _ints(wanted), _ints(slots), buffer, buffer_offset=4096, max_gap=gap
        )
        reader.wait(ticket)
        landed = memory[4096:-STRIDE].reshape(NUM_ROWS, STRIDE)
        for row, slot in zip(wanted, slots, strict=True):
            assert (landed[slot] == row + 1).all()
        untouched = [slot for slot in range(NUM_ROWS) if slot not in slots]
        assert not landed[untouched].any()
        assert not memory[:4096].any()
        assert reader.bytes_read == ticket.num_bytes >= len(wanted) * STRIDE
        assert reader.num_reads == ticket.num_reads <= len(wanted)


def test_neighbours_are_one_read_and_gaps_are_read_through(path: Path) -> None:
    with Reader() as reader:
        file = reader.open(path)
        buffer = AlignedBuffer(16 * STRIDE)
        slots = _ints([9, 3, 4, 7])
        for rows, gap, num_reads, num_rows in (
            ([0, 1, 2, 3], 0, 1, 4),
            ([0, 1, 3, 4], 0, 2, 4),
            ([0, 1, 3, 4], 1, 1, 5),
            ([4, 5, 6, 7], 0, 2, 4),  # the block ends after row 5, and is padded
            ([4, 5, 6, 7], 2, 1, 6),
        ):
            ticket = reader.submit_rows(file, GEOMETRY, _ints(rows), slots, buffer, max_gap=gap)
            reader.wait(ticket)
            assert (ticket.num_reads, ticket.num_bytes) == (num_reads, num_rows * STRIDE), (rows, gap)


def test_bad_rows_are_refused_before_anything_is_read(path: Path) -> None:
    with Reader() as reader:
        file = reader.open(path)
        buffer = AlignedBuffer(8 * STRIDE)
        for rows, slots, error in (
            ([1, 1], [0, 1], StorageError),
            ([2, 1], [0, 1], StorageError),
            ([1, 2], [0, 7], ConfigError),  # the last row of the buffer is scratch
            ([1, 2], [-1, 0], ConfigError),
            ([1, 2], [0], ConfigError),
            ([], [], ConfigError),
        ):
            with pytest.raises(error):
                reader.submit_rows(file, GEOMETRY, _ints(rows), _ints(slots), buffer)
        assert reader.num_reads == 0


def test_a_row_beyond_the_file_is_an_error(path: Path) -> None:
    with Reader() as reader:
        file = reader.open(path)
        ticket = reader.submit_rows(file, GEOMETRY, _ints([3, 90]), _ints([0, 1]), AlignedBuffer(8 * STRIDE))
        with pytest.raises(StorageError, match="the file ended"):
            reader.wait(ticket)
