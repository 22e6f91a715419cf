"""The neurons of blocks whose parts lie whole, of every encoding: products a few tokens at a time, together, and widened."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from flashlm.rows import kernels
from flashlm.rows.encodings import ENCODINGS
from flashlm.rows.layout import LayerLayout
from flashlm.rows.neurons import accumulate_blocks, block_at, neurons_at, operand, project_blocks
from flashlm.rows.products import Gemms
from flashlm.storage.slab import SlabAllocator
from tests.encoded_packs import random_unit
from tests.rows.test_layout import layouts_by_block

EPS = 2.0**-24


def placed(layout: LayerLayout, seed: int) -> tuple[list[kernels.SlotRef], list[torch.Tensor]]:
    """Return where the blocks of a random layer lie, and its parts in float64."""
    content, values = random_unit(layout, np.random.default_rng(seed))
    slab = SlabAllocator().slab(layout.block_stride_bytes, layout.num_blocks)
    slab.slot(0).numpy(layout.file_bytes)[:] = np.frombuffer(content, dtype=np.uint8)
    return [slab.slot(block) for block in range(layout.num_blocks)], [each.double() for each in values]


def close(found: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether found is x·weightsᵀ but for the rounding of sums in fp32."""
    bound = (len(weights[0]) + 8) * EPS * (x.double().abs() @ weights.abs().T)
    return bool(((found.double() - x.double() @ weights.T).abs() <= bound).all())


def near(found: torch.Tensor, exact: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> bool:
    """Whether found is exact but for the rounding of each 32 elements of x to 127 steps."""
    largest = F.pad(x.double().abs(), (0, -x.shape[1] % 32)).unflatten(1, (-1, 32)).amax(-1)
    steps = largest.repeat_interleave(32, dim=1)[:, : x.shape[1]] / 127
    bound = 0.51 * steps @ weights.abs().T + 1e-4 * (x.double().abs() @ weights.abs().T) + 1e-6
    return bool(((found.double() - exact).abs() <= bound).all())


@settings(deadline=None, max_examples=40)
@given(layout=layouts_by_block(most=3), num_tokens=st.integers(1, 16), seed=st.integers(0, 2**16))
def test_products_are_those_of_the_matrices(layout: LayerLayout, num_tokens: int, seed: int) -> None:
    places, (*dots, down) = placed(layout, seed)
    x = torch.randn(num_tokens, layout.hidden_size, generator=torch.Generator().manual_seed(seed))
    for block, place in enumerate(places):
        span = layout.rows_of(block)
        neurons = neurons_at(layout, place, len(span))
        h = torch.empty(num_tokens, len(span))
        for index, weights in enumerate(dots):
            neurons.project(x, index, h)
            assert close(h, x, weights[span.start : span.stop])
            alone = torch.empty(1, len(span))
            neurons.project(x[-1:], index, alone)
            assert torch.equal(alone, h[-1:])
        before = x.clone()
        y, last = before.clone(), before[-1:].clone()
        neurons.accumulate(h, y)
        neurons.accumulate(h[-1:], last)
        assert torch.equal(last, y[-1:])
        product = torch.zeros_like(y)
        neurons.accumulate(h, product)
        assert close(product, h, down[:, span.start : span.stop])
        assert torch.equal(y, before + product)


@settings(deadline=None, max_examples=30)
@given(layout=layouts_by_block(most=3), data=st.data())
def test_parts_are_widened_to_what_they_mean(layout: LayerLayout, data: st.DataObject) -> None:
    places, values = placed(layout, 0)
    gemm = Gemms(torch.float32).of(layout)
    group = ENCODINGS[layout.encodings[-1]].group_elements
    for block, place in enumerate(places):
        span = layout.rows_of(block)
        first = data.draw(st.integers(0, len(span) // group - 1)) * group
        stop = data.draw(st.integers(first // group + 1, len(span) // group)) * group
        *dots, down = (part for part in gemm.parts(layout, place, len(span), range(first, stop)) if part is not None)
        cut = slice(span.start + first, span.start + stop)
        for part, weights in zip(dots, values, strict=False):
            assert torch.equal(part.double(), weights[cut])
        assert torch.equal(down.double(), values[-1][:, cut].T)


@settings(deadline=None, max_examples=30)
@given(layout=layouts_by_block(most=3), seed=st.integers(0, 2**16))
def test_products_of_many_tokens_in_8_bits_are_near(layout: LayerLayout, seed: int) -> None:
    """Parts whose encoding this processor does not multiply so are widened, and exact."""
    places, values = placed(layout, seed)
    gemm = Gemms(torch.float32, int8=True).of(layout)
    x = torch.randn(40, layout.hidden_size, generator=torch.Generator().manual_seed(seed))
    for block, place in enumerate(places):
        span = layout.rows_of(block)
        *dots, down = (part for part in gemm.parts(layout, place, len(span)) if part is not None)
        assert gemm.rounds(layout) == all(isinstance(part, tuple) for part in (*dots, down))
        for part, weights in zip(dots, values, strict=False):
            h = gemm.project(gemm.prepare(x, layout), part, None)
            assert near(h, x.double() @ weights[span.start : span.stop].T, x, weights[span.start : span.stop])
        y = torch.ones_like(x)
        gemm.accumulate(h, down, y)
        assert near(
            y - 1, h.double() @ values[-1][:, span.start : span.stop].T, h, values[-1][:, span.start : span.stop]
        )


@settings(deadline=None, max_examples=40)
@given(
    layout=layouts_by_block(most=5),
    num_tokens=st.integers(1, 3),
    int8=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_run_of_blocks_gives_the_bits_of_one_after_the_other(
    layout: LayerLayout, num_tokens: int, int8: bool, with_bias: bool, seed: int
) -> None:
    places, _ = placed(layout, seed)
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(num_tokens, layout.hidden_size, generator=random)
    bias = torch.randn(layout.num_rows, generator=random) if with_bias else None
    run = neurons_at(layout, places[0], layout.num_rows, int8=int8)
    h, y = torch.empty(num_tokens, layout.num_rows), torch.ones(num_tokens, layout.hidden_size)
    alone, output = torch.empty_like(h), y.clone()
    run.project(operand(x, layout.encodings[:-1], int8=int8), 0, h, bias)
    run.accumulate(h, y)
    for block, place in enumerate(places):
        span = slice(layout.rows_of(block).start, layout.rows_of(block).stop)
        one = block_at(layout, place, span.stop - span.start, int8=int8)
        one.project(
            operand(x, layout.encodings[:-1], int8=int8), 0, alone[:, span], None if bias is None else bias[span]
        )
        one.accumulate(alone[:, span], output)
    assert torch.equal(h, alone)
    assert torch.equal(y, output)


@settings(deadline=None, max_examples=30)
@given(layout=layouts_by_block(most=3), seed=st.integers(0, 2**16))
def test_several_blocks_in_one_job_give_the_bits_of_each(layout: LayerLayout, seed: int) -> None:
    places, _ = placed(layout, seed)
    whole = [block for block in range(layout.num_blocks) if len(layout.rows_of(block)) == layout.block_rows]
    if not whole:
        return
    blocks = [block_at(layout, places[block], layout.block_rows) for block in whole]
    x = torch.randn(1, layout.hidden_size, generator=torch.Generator().manual_seed(seed))
    h = torch.empty(len(blocks), layout.block_rows)
    project_blocks(x, blocks, 0, h)
    y = torch.zeros(len(blocks), layout.hidden_size)
    accumulate_blocks(h, blocks, y)
    for index, neurons in enumerate(blocks):
        alone, output = torch.empty(1, layout.block_rows), torch.zeros(1, layout.hidden_size)
        neurons.project(x, 0, alone)
        neurons.accumulate(alone, output)
        assert torch.equal(alone[0], h[index])
        assert torch.equal(output[0], y[index])
