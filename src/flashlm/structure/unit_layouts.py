"""How what was found in a model is laid out in a pack: units with their blocks, and the weights that go into them."""

from __future__ import annotations

from collections.abc import Sequence

from flashlm.pack.units import Unit
from flashlm.rows.layout import (
    DTYPE_BYTES,
    MATRIX,
    MAX_BLOCK_BYTES,
    LayerLayout,
    choose_block_rows,
    choose_matrix_rows,
    ffn_parts,
)
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.families import FfnLayer
from flashlm.structure.find_units import FoundUnit, LinearLayer


def streamed_names(found: FoundUnit) -> tuple[str, ...]:
    """Return the state-dict names of the weights that go into a unit, and of biases that a pack names anew."""
    if isinstance(found, LinearLayer):
        return (found.weight,)
    if isinstance(found, ExpertLayer):
        return found.in_weight, found.out_weight
    return tuple(source.name for source in (*found.parts, *found.biases.values()))


def ffn_block_rows(layers: Sequence[FfnLayer], dtype: str) -> int:
    """Return the rows per block of a model's feed-forward layers: the same for all of them, chosen for the largest."""
    largest = max(layers, key=lambda layer: layer.num_rows)
    return choose_block_rows(
        hidden_size=largest.hidden_size, num_rows=largest.num_rows, has_gate=largest.has_gate, dtype=dtype
    )


def choose_layouts(found: Sequence[FoundUnit], dtype: str, block_rows: int | None = None) -> tuple[Unit, ...]:
    """Return the units that a conversion to `dtype` makes of what was found, in the same order.

    Args:
        found: Feed-forward layers or experts, and linear layers.
        dtype: Element type, a key of `DTYPE_BYTES`.
        block_rows: Rows per block of feed-forward layers; None chooses.
    """
    ffns = [each for each in found if isinstance(each, FfnLayer)]
    if ffns and block_rows is None:
        block_rows = ffn_block_rows(ffns, dtype)
    layouts = [_ffn_layout(each, dtype, block_rows or 0) for each in ffns]
    # The blocks of matrices fill the staging slots that those of feed-forward layers need.
    block_bytes = min(max((each.block_stride_bytes for each in layouts), default=MAX_BLOCK_BYTES), MAX_BLOCK_BYTES)
    return tuple(_unit(each, dtype, block_rows or 0, block_bytes) for each in found)


def _unit(found: FoundUnit, dtype: str, block_rows: int, block_bytes: int) -> Unit:
    if isinstance(found, FfnLayer):
        return Unit.dense("ffn", _ffn_layout(found, dtype, block_rows))
    if isinstance(found, ExpertLayer):
        layout = LayerLayout(
            hidden_size=found.hidden_size,
            num_rows=found.num_experts * found.num_rows,
            parts=ffn_parts(has_gate=found.has_gate),
            dtype=dtype,
            block_rows=found.num_rows,
        )
        return Unit(kind="experts", layout=layout, num_active=found.num_active)
    row_bytes = found.num_inputs * DTYPE_BYTES[dtype]
    rows = choose_matrix_rows(num_rows=found.num_outputs, row_bytes=row_bytes, block_bytes=block_bytes)
    layout = LayerLayout(
        hidden_size=found.num_inputs, num_rows=found.num_outputs, parts=MATRIX, dtype=dtype, block_rows=rows
    )
    return Unit.dense("linear", layout)


def _ffn_layout(layer: FfnLayer, dtype: str, block_rows: int) -> LayerLayout:
    return LayerLayout(
        hidden_size=layer.hidden_size,
        num_rows=layer.num_rows,
        parts=ffn_parts(has_gate=layer.has_gate),
        dtype=dtype,
        block_rows=block_rows,
    )
