from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashlm.conversion.casts import CastCounts
from flashlm.conversion.layer_file import LayerPart, LayerPools, fill_rows, read_layer
from flashlm.conversion.pipeline import ReadAhead
from flashlm.conversion.sources.tensors import StoredTensor
from flashlm.pack.checkpoint import read_header
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.layout import GATED, MATRIX, UNGATED, LayerLayout
from flashlm.storage.ranges import RangeReader
from flashlm.structure.families import PartSource


def _layer(folder: Path, layout: LayerLayout, axes: tuple[int, ...], dtype: torch.dtype, fused: bool):
    """Random parts in a file: along each axis, the first two as halves of one tensor if `fused`."""
    weights = [torch.randn(layout.num_rows, layout.hidden_size).to(dtype) for _ in axes]
    tensors: dict[str, torch.Tensor] = {}
    sources = []
    for index, (weight, axis) in enumerate(zip(weights, axes, strict=True)):
        tensors[f"t{index}"] = (weight if axis == 0 else weight.T).contiguous()
        sources.append(PartSource(name=f"t{index}", neuron_axis=axis))
    if fused and len(axes) > 1 and axes[0] == axes[1]:
        tensors["both"] = torch.cat([tensors.pop("t0"), tensors.pop("t1")], dim=axes[0])
        sources[0] = PartSource(name="both", neuron_axis=axes[0])
        sources[1] = PartSource(name="both", neuron_axis=axes[0], first_neuron=layout.num_rows)
    save_file(tensors, folder / "x.safetensors")
    entries = read_header(folder / "x.safetensors")
    return weights, tuple(LayerPart(source, entries[source.name]) for source in sources)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden_size=st.integers(1, 90),
    num_rows=st.integers(1, 150),
    axes=st.lists(st.sampled_from([0, 1]), min_size=1, max_size=3),
    fused=st.booleans(),
    dtypes=st.tuples(st.sampled_from([torch.float32, torch.bfloat16]), st.sampled_from(["bf16", "fp32"])),
    chunk_bytes=st.sampled_from([1, 20_000, 1 << 20]),
    panel_bytes=st.sampled_from([1, 10_000, 1 << 20]),
)
def test_rows_lie_where_the_layout_says(
    tmp_path: Path, hidden_size, num_rows, axes, fused, dtypes, chunk_bytes, panel_bytes
) -> None:
    row_parts = (MATRIX, UNGATED, GATED)[len(axes) - 1]
    layout = LayerLayout(
        hidden_size=hidden_size, num_rows=num_rows, parts=row_parts, encodings=(dtypes[1],) * len(axes), block_rows=16
    )
    weights, parts = _layer(tmp_path, layout, tuple(axes), dtypes[0], fused)
    pools = LayerPools(num_column_parts=sum(axes))
    file = torch.full((layout.file_bytes,), 255, dtype=torch.uint8)
    with RangeReader() as reader:
        chunks = read_layer(reader, layout, parts, pools, chunk_bytes=chunk_bytes, panel_bytes=panel_bytes)
        with ReadAhead(chunks, depth=2, pools=pools.reading) as ahead:
            for chunk in ahead:
                first, last = chunk.rows.start // 16, (chunk.rows.stop - 1) // 16
                start, stop = layout.offset_of(first), layout.offset_of(last) + layout.read_bytes(last)
                fill_rows(file[start:stop], layout, chunk, ("weight",) * len(parts), CastCounts())
                chunk.release()
    dtype = ENCODINGS[dtypes[1]].dtype
    itemsize = dtype.itemsize
    for row in range(num_rows):
        offset = layout.offset_of(row // 16) + row % 16 * layout.row_stride_bytes
        held = file[offset : offset + layout.row_bytes].view(dtype).view(layout.num_parts, hidden_size)
        assert torch.equal(held, torch.stack([weight[row] for weight in weights]).to(dtype))
        assert not file[offset + layout.row_bytes : offset + layout.row_stride_bytes].any()
    assert itemsize * hidden_size * layout.num_parts == layout.row_bytes


def stored(
    path: Path, name: str, num_rows: int, width: int, random: np.random.Generator
) -> tuple[StoredTensor, np.ndarray]:
    """A matrix of random bytes at an odd place of a file of its own, its rows in another order than they are wanted in."""
    encoding = ENCODINGS[name]
    raw = random.integers(0, 256, (num_rows, encoding.bytes_of(width)), dtype=np.uint8)
    raw &= 0x3B  # no scale is infinite, wherever it lies
    order = torch.from_numpy(random.permutation(num_rows))
    path.write_bytes(bytes(100) + raw.tobytes())
    entry = StoredTensor(
        name=path.name,
        path=path,
        dtype=torch.float32,
        shape=(num_rows, width),
        offset=100,
        encoding=name,
        num_rows=num_rows,
        width=width,
        stored_row_bytes=raw.shape[1],
        order=order if random.integers(2) else None,
    )
    return entry, raw if entry.order is None else raw[order.numpy()]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 9)),
    names=st.tuples(*[st.sampled_from(["q4_0", "q5_1", "q8_0", "q4_k", "q6_k", "mxfp4"])] * 3),
    block_rows=st.sampled_from([32, 96, 256, 512]),
    chunk_bytes=st.sampled_from([1, 300_000, 1 << 22]),
    panel_bytes=st.sampled_from([1, 100_000, 1 << 22]),
    seed=st.integers(0, 2**16),
)
def test_whole_parts_lie_where_the_layout_says(
    tmp_path: Path,
    sizes: tuple[int, int],
    names: tuple[str, str, str],
    block_rows: int,
    chunk_bytes: int,
    panel_bytes: int,
    seed: int,
) -> None:
    hidden, num_rows = 256 * sizes[0], 256 * sizes[1]
    assume(ENCODINGS[names[2]].fits(block_rows))
    layout = LayerLayout(
        hidden_size=hidden, num_rows=num_rows, parts=GATED, encodings=names, block_rows=block_rows, arrangement="block"
    )
    random = np.random.default_rng(seed)
    shapes = [(num_rows, hidden), (num_rows, hidden), (hidden, num_rows)]
    made = [stored(tmp_path / str(i), names[i], *shape, random) for i, shape in enumerate(shapes)]
    parts = tuple(
        LayerPart(PartSource(name=entry.name, neuron_axis=int(index == 2)), entry)
        for index, (entry, _) in enumerate(made)
    )
    pools = LayerPools(num_column_parts=1)
    file = torch.full((layout.file_bytes,), 255, dtype=torch.uint8)
    with RangeReader() as reader:
        chunks = read_layer(reader, layout, parts, pools, chunk_bytes=chunk_bytes, panel_bytes=panel_bytes)
        with ReadAhead(chunks, depth=2, pools=pools.reading) as ahead:
            for chunk in ahead:
                first, last = chunk.rows.start // block_rows, (chunk.rows.stop - 1) // block_rows
                start, stop = layout.offset_of(first), layout.offset_of(last) + layout.read_bytes(last)
                fill_rows(file[start:stop], layout, chunk, ("weight",) * 3, CastCounts())
                chunk.release()
    wanted = np.zeros(layout.file_bytes, dtype=np.uint8)
    for block in range(layout.num_blocks):
        rows = layout.rows_of(block)
        for index, placed in enumerate(layout.block_parts(len(rows))):
            raw = made[index][1]
            cut = [placed.encoding.bytes_of(end) for end in (rows.start, rows.stop)] if index == 2 else []
            piece = raw[:, slice(*cut)] if cut else raw[rows.start : rows.stop]
            at = layout.offset_of(block) + placed.offset_bytes
            wanted[at : at + placed.num_bytes] = piece.ravel()
    assert np.array_equal(file.numpy(), wanted)


def test_error_while_reading_ahead_comes_out_where_items_do() -> None:
    def items():
        yield 1
        raise OSError("broken")

    with ReadAhead(items(), depth=1, pools=()) as ahead:
        assert next(ahead) == 1
        with pytest.raises(OSError, match="broken"):
            next(ahead)


def test_reading_ahead_can_be_left_early() -> None:
    pools = LayerPools(num_column_parts=1)

    def items():
        while True:
            yield pools.rows.take(10)

    with ReadAhead(items(), depth=2, pools=pools.reading) as ahead:
        next(ahead)  # nothing is given back: the thread waits for a buffer
