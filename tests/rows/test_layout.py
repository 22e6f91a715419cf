from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from flashlm.errors import ConfigError
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.layout import (
    BLOCK_ALIGN_BYTES,
    GATED,
    MATRIX,
    MAX_BLOCK_BYTES,
    PART_ALIGN_BYTES,
    ROW_ALIGN_BYTES,
    ROWS_PER_STEP,
    UNGATED,
    LayerLayout,
    choose_block_rows,
    choose_matrix_rows,
    matrix_row_step,
    round_up,
)

SHAPES = {
    "num_rows": st.integers(1, 70_000),
    "parts": st.sampled_from([GATED, UNGATED, MATRIX]),
    "hidden_size": st.integers(1, 75).map(lambda groups: 256 * groups),
    "encodings": st.lists(st.sampled_from(sorted(ENCODINGS)), min_size=3, max_size=3).map(tuple),
}


def make_layout(*, parts, encodings, **shape) -> LayerLayout:
    return LayerLayout(parts=parts, encodings=encodings[: len(parts)], **shape)


@given(block_rows=st.integers(1, 64).map(lambda steps: steps * ROWS_PER_STEP), **SHAPES)
def test_blocks_cover_every_row_once_and_end_to_end(**shape) -> None:
    layout = make_layout(**shape)
    rows = [(layout.rows_of(block).start, layout.rows_of(block).stop) for block in range(layout.num_blocks)]
    assert rows[0][0] == 0
    assert rows[-1][1] == layout.num_rows
    assert all(before[1] == after[0] for before, after in pairwise(rows))
    assert all(start < stop for start, stop in rows)


@given(**SHAPES)
def test_parts_lie_side_by_side_each_of_its_own_encoding(**shape) -> None:
    layout = make_layout(block_rows=16, **shape)
    end = 0
    for index, name in enumerate(layout.encodings):
        part = layout.part(index)
        assert (part.encoding.name, part.offset_bytes) == (name, end)
        end += part.num_bytes
    assert end == layout.row_bytes
    assert (layout.plain is None) == (len(set(layout.encodings)) > 1 or not layout.part(0).encoding.is_plain)
    assert layout.weight_bytes == layout.num_rows * layout.row_bytes


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 48},
        {"encodings": ("q8_0",)},
        {"encodings": ("bf16", "int4")},
        {"arrangement": "block", "num_rows": 48},
        {"arrangement": "block", "block_rows": 16},
        {"arrangement": "block", "encodings": ("q8_0", "bf16"), "hidden_size": 48},
        {"arrangement": "block", "parts": MATRIX, "encodings": ("q8_0",)},
    ],
)
def test_rows_that_no_encoding_holds_are_refused(change) -> None:
    good = {"hidden_size": 64, "num_rows": 32, "parts": UNGATED, "encodings": ("bf16", "q8_0"), "block_rows": 16}
    LayerLayout(**good)
    with pytest.raises(ConfigError):
        LayerLayout(**(good | change))


@given(block_rows=st.integers(1, 64).map(lambda steps: steps * ROWS_PER_STEP), **SHAPES)
def test_blocks_are_aligned_and_hold_their_rows(**shape) -> None:
    layout = make_layout(**shape)
    assert layout.row_stride_bytes % layout.row_align_bytes == 0
    assert 0 <= layout.row_stride_bytes - layout.row_bytes < layout.row_align_bytes
    assert (layout.row_stride_bytes == layout.row_bytes) or layout.row_align_bytes == ROW_ALIGN_BYTES
    for block in {0, layout.num_blocks // 2, layout.num_blocks - 1}:
        assert layout.offset_of(block) % BLOCK_ALIGN_BYTES == 0
        assert layout.read_bytes(block) % BLOCK_ALIGN_BYTES == 0
        assert layout.read_bytes(block) >= len(layout.rows_of(block)) * layout.row_stride_bytes
        assert layout.read_bytes(block) <= layout.block_stride_bytes
        assert layout.offset_of(block) + layout.read_bytes(block) <= layout.file_bytes


@given(**SHAPES)
def test_chosen_blocks_are_of_a_size_to_stream(**shape) -> None:
    assume(shape["parts"] != MATRIX)
    stride = make_layout(block_rows=16, **shape).row_stride_bytes
    block_rows = choose_block_rows(num_rows=shape["num_rows"], num_bytes=shape["num_rows"] * stride)
    layout = make_layout(block_rows=block_rows, **shape)
    assert block_rows % ROWS_PER_STEP == 0
    assert layout.block_stride_bytes <= max(
        MAX_BLOCK_BYTES, ROWS_PER_STEP * layout.row_stride_bytes + BLOCK_ALIGN_BYTES
    )


@given(
    num_rows=st.integers(1, 200_000),
    num_inputs=st.integers(1, 75).map(lambda groups: 256 * groups),
    encoding=st.sampled_from(sorted(ENCODINGS)),
    block_bytes=st.sampled_from([1 << 16, MAX_BLOCK_BYTES]),
)
def test_blocks_of_a_matrix_join_without_a_gap(num_rows: int, num_inputs: int, encoding: str, block_bytes: int) -> None:
    row_bytes = ENCODINGS[encoding].bytes_of(num_inputs)
    rows = choose_matrix_rows(num_rows=num_rows, row_bytes=row_bytes, block_bytes=block_bytes)
    layout = LayerLayout(
        hidden_size=num_inputs, num_rows=num_rows, parts=MATRIX, encodings=(encoding,), block_rows=rows
    )
    assert rows % ROWS_PER_STEP == 0
    step = matrix_row_step(row_bytes)
    if step * row_bytes > MAX_BLOCK_BYTES:  # no block of a usual size joins: each is padded
        assert layout.run_blocks == 1
        step = ROWS_PER_STEP
    else:
        assert layout.block_stride_bytes == rows * row_bytes
        assert layout.file_bytes - num_rows * row_bytes < BLOCK_ALIGN_BYTES
    assert layout.block_stride_bytes <= max(block_bytes, round_up(step * row_bytes, BLOCK_ALIGN_BYTES))


@st.composite
def layouts_by_block(draw: st.DrawFn, most: int = 40) -> LayerLayout:
    """Layers whose blocks hold their parts whole: of all encodings, of one block and many, with a shorter last one."""
    parts = draw(st.sampled_from([GATED, UNGATED]))
    encodings = tuple(draw(st.sampled_from(sorted(ENCODINGS))) for _ in parts)
    group = ENCODINGS[encodings[-1]].group_elements
    hidden = math.lcm(*(ENCODINGS[name].group_elements for name in encodings[:-1])) * draw(st.integers(1, min(most, 9)))
    return LayerLayout(
        parts=parts,
        encodings=encodings,
        hidden_size=hidden,
        num_rows=group * draw(st.integers(1, most)),
        block_rows=math.lcm(group, draw(st.sampled_from([1, ROWS_PER_STEP]))) * draw(st.integers(1, min(most, 12))),
        arrangement="block",
    )


@given(layouts_by_block())
def test_parts_of_a_block_lie_whole_one_behind_the_other(layout: LayerLayout) -> None:
    for block in range(layout.num_blocks):
        neurons = layout.rows_of(block)
        end = 0
        for name, part in zip(layout.encodings, layout.block_parts(len(neurons)), strict=True):
            assert part.encoding is ENCODINGS[name]
            assert part.offset_bytes % PART_ALIGN_BYTES == 0
            assert 0 <= part.offset_bytes - end < PART_ALIGN_BYTES
            shape = (len(neurons), layout.hidden_size)
            assert (part.num_rows, part.width) == (shape[::-1] if part.part == "down" else shape)
            assert part.row_stride_bytes == part.encoding.bytes_of(part.width)
            assert part.num_bytes == part.num_rows * part.row_stride_bytes
            assert part.format.width == part.width
            end = part.offset_bytes + part.num_bytes
        assert layout.read_bytes(block) == round_up(end, BLOCK_ALIGN_BYTES) <= layout.block_stride_bytes
    sizes = [layout.block_parts(len(layout.rows_of(block))) for block in range(layout.num_blocks)]
    for index in range(layout.num_parts):
        assert sum(parts[index].num_bytes for parts in sizes) == layout.part_bytes(index)
    assert layout.file_bytes == layout.offset_of(layout.num_blocks - 1) + layout.read_bytes(layout.num_blocks - 1)
    with pytest.raises(ConfigError, match="no row of this unit lies by itself"):
        _ = layout.row_stride_bytes


@given(layouts_by_block(), st.data())
def test_a_piece_of_a_part_holds_its_neurons(layout: LayerLayout, data: st.DataObject) -> None:
    group = ENCODINGS[layout.encodings[-1]].group_elements
    start, stop = sorted(data.draw(st.integers(0, layout.block_rows // group)) * group for _ in range(2))
    assume(start < stop)
    neurons = range(start, stop)
    for part in layout.whole_block:
        piece = part.piece(neurons)
        per_row = part.encoding.bytes_of(start) if part.part == "down" else start * part.row_stride_bytes
        assert piece.offset_bytes == part.offset_bytes + per_row
        assert piece.row_stride_bytes == part.row_stride_bytes
        assert part.offset_bytes <= piece.offset_bytes
        assert piece.offset_bytes + piece.num_bytes <= part.offset_bytes + part.num_bytes
        shape = (len(neurons), layout.hidden_size)
        assert (piece.num_rows, piece.width) == (shape[::-1] if part.part == "down" else shape)
    if group > 1:
        with pytest.raises(ConfigError, match="whole groups"):
            layout.whole_block[-1].piece(range(1, 1 + group))
