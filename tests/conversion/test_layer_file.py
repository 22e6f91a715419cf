from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from flashlm.conversion.casts import CastCounts
from flashlm.conversion.layer_file import LayerPart, LayerPools, fill_rows, read_layer
from flashlm.conversion.pipeline import ReadAhead
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
