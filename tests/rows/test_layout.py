from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from flashlm.rows.layout import (
    BLOCK_ALIGN_BYTES,
    DTYPE_BYTES,
    MAX_BLOCK_BYTES,
    ROW_ALIGN_BYTES,
    ROWS_PER_STEP,
    LayerLayout,
    choose_block_rows,
)

SHAPES = {
    "hidden_size": st.integers(1, 20_000),
    "num_rows": st.integers(1, 70_000),
    "has_gate": st.booleans(),
    "dtype": st.sampled_from(sorted(DTYPE_BYTES)),
}


@given(block_rows=st.integers(1, 64).map(lambda steps: steps * ROWS_PER_STEP), **SHAPES)
def test_blocks_cover_every_row_once_and_end_to_end(**shape) -> None:
    layout = LayerLayout(**shape)
    rows = [(layout.rows_of(block).start, layout.rows_of(block).stop) for block in range(layout.num_blocks)]
    assert rows[0][0] == 0
    assert rows[-1][1] == layout.num_rows
    assert all(before[1] == after[0] for before, after in pairwise(rows))
    assert all(start < stop for start, stop in rows)


@given(block_rows=st.integers(1, 64).map(lambda steps: steps * ROWS_PER_STEP), **SHAPES)
def test_blocks_are_aligned_and_hold_their_rows(**shape) -> None:
    layout = LayerLayout(**shape)
    assert layout.row_stride_bytes % ROW_ALIGN_BYTES == 0
    assert 0 <= layout.row_stride_bytes - layout.row_bytes < ROW_ALIGN_BYTES
    for block in {0, layout.num_blocks // 2, layout.num_blocks - 1}:
        assert layout.offset_of(block) % BLOCK_ALIGN_BYTES == 0
        assert layout.read_bytes(block) % BLOCK_ALIGN_BYTES == 0
        assert layout.read_bytes(block) >= len(layout.rows_of(block)) * layout.row_stride_bytes
        assert layout.read_bytes(block) <= layout.block_stride_bytes
        assert layout.offset_of(block) + layout.read_bytes(block) <= layout.file_bytes


@given(**SHAPES)
def test_chosen_blocks_are_of_a_size_to_stream(**shape) -> None:
    block_rows = choose_block_rows(**shape)
    layout = LayerLayout(block_rows=block_rows, **shape)
    assert block_rows % ROWS_PER_STEP == 0
    assert layout.block_stride_bytes <= max(
        MAX_BLOCK_BYTES, ROWS_PER_STEP * layout.row_stride_bytes + BLOCK_ALIGN_BYTES
    )
