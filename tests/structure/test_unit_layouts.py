from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashlm.errors import ConfigError
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.layout import BLOCKS_PER_LAYER, MAX_BLOCK_BYTES, MIN_BLOCK_BYTES, ROWS_PER_STEP
from flashlm.structure.experts import ExpertLayer
from flashlm.structure.families import FfnLayer, PartSource
from flashlm.structure.find_units import LinearLayer
from flashlm.structure.unit_layouts import RowWriting, choose_layouts

PLAIN = ("bf16", "fp16", "fp32")


def ffn(number: int, *, hidden_size: int = 512, num_rows: int = 1024) -> FfnLayer:
    gate, up, down = (PartSource(name=f"{number}.{part}.weight") for part in ("gate", "up", "down"))
    return FfnLayer(
        module=f"layers.{number}.mlp",
        identities=(),
        hidden_size=hidden_size,
        num_rows=num_rows,
        activation="silu",
        gate=gate,
        up=up,
        down=down,
        gate_bias=None,
        up_bias=None,
        down_bias=None,
    )


@given(
    kept=st.lists(st.tuples(*[st.sampled_from(sorted(ENCODINGS))] * 3), min_size=1, max_size=4),
    hidden=st.integers(1, 40),
    rows=st.integers(1, 200),
)
@settings(deadline=None)
def test_units_whose_groups_are_kept_hold_their_parts_whole(kept, hidden, rows) -> None:
    found = [ffn(index, hidden_size=256 * hidden, num_rows=256 * rows) for index in range(len(kept))]
    writing = RowWriting(dtype="float32", kept={each.module: names for each, names in zip(found, kept, strict=True)})
    units = choose_layouts(found, writing)
    by_block = [unit.layout for unit in units if unit.layout.is_by_block]
    for unit, names in zip(units, kept, strict=True):
        assert unit.layout.encodings == names
        assert unit.layout.is_by_block == (not set(names) <= set(PLAIN))
    assert len({layout.block_rows for layout in by_block}) <= 1
    for layout in by_block:
        step = math.lcm(ROWS_PER_STEP, *(ENCODINGS[each.encodings[-1]].group_elements for each in by_block))
        assert layout.block_rows % step == 0
        one_step = step * layout.weight_bytes // layout.num_rows + 4096
        assert layout.block_stride_bytes <= max(MAX_BLOCK_BYTES, one_step) + 4096
        if layout.weight_bytes > 4 * BLOCKS_PER_LAYER * max(MIN_BLOCK_BYTES, one_step):
            assert layout.num_blocks >= BLOCKS_PER_LAYER


def test_experts_and_matrices_keep_their_encodings() -> None:
    experts = ExpertLayer(
        module="experts",
        hidden_size=512,
        num_rows=256,
        num_experts=4,
        num_active=2,
        has_gate=True,
        activation="silu",
        is_transposed=False,
        is_concatenated=True,
    )
    matrix = LinearLayer(module="q_proj", num_inputs=512, num_outputs=1024, has_bias=False)
    other = LinearLayer(module="k_proj", num_inputs=512, num_outputs=1024, has_bias=False)
    kept = {"experts": ("q8_0", "q8_0", "fp16"), "q_proj": ("q8_0",)}
    units = choose_layouts([experts, matrix, other], RowWriting(dtype="float32", kept=kept))
    assert [(unit.layout.encodings, unit.layout.arrangement) for unit in units] == [
        (("q8_0", "q8_0", "fp16"), "block"),
        (("q8_0",), "row"),
        (("fp32",), "row"),
    ]
    assert (units[0].layout.block_rows, units[0].num_active) == (256, 2)


def test_rows_that_are_no_whole_groups_are_refused() -> None:
    layer = ffn(0, num_rows=1040)
    with pytest.raises(ConfigError, match="1040 elements are not whole groups of 32"):
        choose_layouts([layer], RowWriting(dtype="float32", kept={layer.module: ("fp32", "fp32", "q8_0")}))
