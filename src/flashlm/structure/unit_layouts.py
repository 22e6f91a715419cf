"""How what was found in a model is laid out in a pack: units with their blocks, and the weights that go into them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

from flashlm.pack.units import Unit
from flashlm.rows.encodings import ENCODINGS, encoding_of
from flashlm.rows.layout import (
    MATRIX,
    MAX_BLOCK_BYTES,
    ROW_ALIGN_BYTES,
    ROWS_PER_STEP,
    Arrangement,
    LayerLayout,
    Part,
    bytes_of_row,
    choose_block_rows,
    choose_matrix_rows,
    ffn_parts,
    matrix_row_step,
    round_up,
    same_encoding,
)
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.families import FfnLayer
from flashlm.structure.find_units import EmbeddingLayer, FoundUnit, LinearLayer


def streamed_names(found: FoundUnit) -> tuple[str, ...]:
    """Return the state-dict names of the weights that go into a unit, and of biases that a pack names anew."""
    if isinstance(found, LinearLayer):
        return found.names
    if isinstance(found, EmbeddingLayer):
        return (found.weight,)
    if isinstance(found, ExpertLayer):
        return found.in_weight, found.out_weight
    return tuple(source.name for source in (*found.parts, *found.biases.values()))


@dataclass(frozen=True, kw_only=True)
class RowWriting:
    """How a conversion writes rows.

    Attributes:
        dtype: Element type of the pack, like "bfloat16": of rows that stay plain.
        quantize: Encoding of the others; None: all stay plain.
        kept: Encodings that a source has already and that are kept, by a unit's module: of its gate, up and down, of its up
            and down, or of its matrix.
    """

    dtype: str
    quantize: str | None = None
    kept: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def encodings_of(self, found: FoundUnit) -> tuple[str, ...]:
        """Return the encoding of each part of a unit's rows."""
        return self.kept.get(found.module) or same_encoding(self._encoding_of(found), _parts(found))

    def arrangement_of(self, found: FoundUnit) -> Arrangement:
        """Return how a unit's blocks are arranged: as the source has them, where its groups are kept."""
        is_plain = all(ENCODINGS[name].is_plain for name in self.kept.get(found.module, ()))
        return "row" if is_plain or isinstance(found, LinearLayer | EmbeddingLayer) else "block"

    def _encoding_of(self, found: FoundUnit) -> str:
        """Return the encoding that all parts of a unit's rows get: what does not fit the quantised one stays plain."""
        plain = encoding_of(self.dtype).name
        if isinstance(found, EmbeddingLayer):
            return plain  # a token reads one row of it: fewer bits would gain nothing
        if self.quantize is None or not ENCODINGS[self.quantize].fits(part_width(found)):
            return plain
        if isinstance(found, LinearLayer):
            row_bytes = bytes_of_row((self.quantize,), found.num_inputs)
            if matrix_row_step(row_bytes) * row_bytes > MAX_BLOCK_BYTES:
                return plain
        return self.quantize


def stated_encodings(found: Sequence[FoundUnit], quantised: Mapping[str, Any] | None) -> dict[str, tuple[str, ...]]:
    """Return the encodings that units have already by a config's `quantization_config`, by module, as `kept` takes them."""
    if not isinstance(quantised, Mapping):
        return {}
    if quantised.get("quant_method") == "mxfp4":
        return {each.module: same_encoding("mxfp4", _parts(each)) for each in found if isinstance(each, ExpertLayer)}
    left = quantised.get("modules_to_not_convert") or ["lm_head"]
    fitting = ENCODINGS["fp8_block"].fits
    return {
        each.module: same_encoding("fp8_block", _parts(each))
        for each in found
        if not isinstance(each, EmbeddingLayer)
        and fitting(part_width(each))
        and not any(n in each.module for n in left)
    }


def part_width(found: FoundUnit) -> int:
    """Return the elements of each part of a unit's rows."""
    return found.num_inputs if isinstance(found, LinearLayer) else found.hidden_size


def choose_layouts(found: Sequence[FoundUnit], writing: RowWriting, block_rows: int | None = None) -> tuple[Unit, ...]:
    """Return the units that a conversion makes of what was found, in the same order.

    Args:
        found: Feed-forward layers or experts, and linear layers.
        writing: How rows are written.
        block_rows: Rows per block of feed-forward layers; None chooses: the same for all of one arrangement, for the
            largest.

    Raises:
        ConfigError: Rows, or a part's rows, are not whole groups of an encoding that is kept.
    """
    ffns = [each for each in found if isinstance(each, FfnLayer)]
    chosen: dict[Arrangement, int] = {}
    for arrangement in get_args(Arrangement):
        alike = [each for each in ffns if writing.arrangement_of(each) == arrangement]
        if alike:
            chosen[arrangement] = block_rows or _choose_ffn_rows(alike, arrangement, writing)
    layouts = [_ffn_layout(each, writing, chosen) for each in ffns]
    # The blocks of matrices fill the staging slots that those of feed-forward layers need.
    block_bytes = min(max((each.block_stride_bytes for each in layouts), default=MAX_BLOCK_BYTES), MAX_BLOCK_BYTES)
    return tuple(_unit(each, writing, chosen, block_bytes) for each in found)


def _choose_ffn_rows(layers: Sequence[FfnLayer], arrangement: Arrangement, writing: RowWriting) -> int:
    largest = max(layers, key=lambda layer: layer.num_rows)
    encodings = [writing.encodings_of(each) for each in layers]
    if arrangement == "row":
        row_bytes = bytes_of_row(writing.encodings_of(largest), largest.hidden_size)
        num_bytes = largest.num_rows * round_up(row_bytes, ROW_ALIGN_BYTES)
        return choose_block_rows(num_rows=largest.num_rows, num_bytes=num_bytes)
    step = math.lcm(ROWS_PER_STEP, *(ENCODINGS[names[-1]].group_elements for names in encodings))
    whole = max(_whole(each, writing).weight_bytes * largest.num_rows // each.num_rows for each in layers)
    return choose_block_rows(num_rows=largest.num_rows, num_bytes=whole, step=step)


def _whole(layer: FfnLayer, writing: RowWriting) -> LayerLayout:
    """Return a layer as one block."""
    return _ffn_layout(layer, writing, {"block": layer.num_rows})


def _parts(found: FoundUnit) -> tuple[Part, ...]:
    return MATRIX if isinstance(found, LinearLayer | EmbeddingLayer) else ffn_parts(has_gate=found.has_gate)


def _unit(found: FoundUnit, writing: RowWriting, block_rows: Mapping[Arrangement, int], block_bytes: int) -> Unit:
    if isinstance(found, FfnLayer):
        return Unit.dense("ffn", _ffn_layout(found, writing, block_rows))
    encodings = writing.encodings_of(found)
    if isinstance(found, ExpertLayer):
        layout = LayerLayout(
            hidden_size=found.hidden_size,
            num_rows=found.num_experts * found.num_rows,
            parts=_parts(found),
            encodings=encodings,
            block_rows=found.num_rows,
            arrangement=writing.arrangement_of(found),
        )
        return Unit(kind="experts", layout=layout, num_active=found.num_active)
    num_rows = found.num_outputs if isinstance(found, LinearLayer) else found.num_rows
    row_bytes = bytes_of_row(encodings, part_width(found))
    rows = choose_matrix_rows(num_rows=num_rows, row_bytes=row_bytes, block_bytes=block_bytes)
    layout = LayerLayout(
        hidden_size=part_width(found), num_rows=num_rows, parts=MATRIX, encodings=encodings, block_rows=rows
    )
    return Unit.dense("linear", layout) if isinstance(found, LinearLayer) else Unit.table(layout)


def _ffn_layout(layer: FfnLayer, writing: RowWriting, block_rows: Mapping[Arrangement, int]) -> LayerLayout:
    arrangement = writing.arrangement_of(layer)
    return LayerLayout(
        hidden_size=layer.hidden_size,
        num_rows=layer.num_rows,
        parts=_parts(layer),
        encodings=writing.encodings_of(layer),
        block_rows=block_rows[arrangement],
        arrangement=arrangement,
    )
