"""Encodings: sizes, and the kernels of grouped ones at every instruction set of this machine, against float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm import _native
from flashlm.errors import ConfigError
from flashlm.rows import kernels
from flashlm.rows.encodings import ENCODINGS, encoding_of
from flashlm.rows.layout import GATED, LayerLayout
from flashlm.rows.products import Gemms
from flashlm.rows.quantize import QUANTIZERS
from flashlm.storage.slab import SlabAllocator
from tests.rows.encoded import FP16_PLACES, GROUPED, reference, tame_groups

EPS = 2.0**-24  # unit roundoff of fp32
Q8_0 = ENCODINGS["q8_0"]


@pytest.fixture(autouse=True, params=_native.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_simd_level(request.param)
    yield request.param
    _native.set_simd_level(None)


grouped = st.sampled_from(GROUPED)


@dataclass
class Case:
    """Rows with garbage (bytes of 255: a NaN scale) beyond their parts, and what they mean in float64."""

    rows: kernels.RowBlock
    weights: torch.Tensor  # float64 (num_rows, num_parts, width)
    x: torch.Tensor
    h: torch.Tensor


def make_case(
    name: str, num_groups: int, num_rows: int, num_tokens: int, num_parts: int, seed: int, *, by_slot: bool
) -> Case:
    random, encoding = np.random.default_rng(seed), ENCODINGS[name]
    num_stored, width = num_rows + 3, num_groups * encoding.group_elements
    groups = tame_groups(name, num_stored * num_parts * num_groups, random)
    row_bytes = num_parts * num_groups * encoding.group_bytes
    storage = np.full((num_stored, row_bytes + 7), 255, dtype=np.uint8)  # an odd stride: nothing is aligned
    storage[:, :row_bytes] = groups.reshape(num_stored, row_bytes)
    slots = torch.from_numpy(random.permutation(num_stored)[:num_rows].astype(np.int32)) if by_slot else None
    rows = kernels.RowBlock(
        torch.from_numpy(storage),
        num_rows,
        kernels.RowFormat.alike(row_bytes + 7, width, encoding.code, num_parts),
        slots,
    )
    weights = torch.from_numpy(reference(name, groups).reshape(num_stored, num_parts, width)).double()
    weights = weights[:num_rows] if slots is None else weights[slots.long()]
    x = torch.from_numpy(random.standard_normal((num_tokens, width)).astype(np.float32))
    h = torch.from_numpy(random.standard_normal((num_tokens, num_rows)).astype(np.float32))
    return Case(rows, weights, x, h)


cases = st.builds(
    make_case,
    grouped,
    st.integers(1, 3),
    st.integers(0, 40),
    st.integers(1, 16),
    st.integers(1, 3),
    st.integers(0, 2**16),
    by_slot=st.booleans(),
)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.parametrize("name", GROUPED)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(num_groups=st.integers(1, 9), num_rows=st.integers(1, 40), seed=st.integers(0, 2**16))
def test_random_bytes_widen_to_the_bits_of_the_reference(name: str, num_groups: int, num_rows: int, seed: int) -> None:
    """Also where scales are infinite, NaN or subnormal; which NaN is not compared."""
    encoding = ENCODINGS[name]
    random = np.random.default_rng(seed)
    stored = random.integers(0, 256, (num_rows, num_groups * encoding.group_bytes), dtype=np.uint8)
    width = num_groups * encoding.group_elements
    row_format = kernels.RowFormat.alike(stored.shape[1], width, encoding.code, 1)
    dst = torch.empty(num_rows, width)
    kernels.widen(kernels.RowBlock(torch.from_numpy(stored), num_rows, row_format), 0, dst)
    expected, found = reference(name, stored), dst.numpy().ravel()
    is_nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), is_nan)
    np.testing.assert_array_equal(found[~is_nan].view(np.uint32), expected[~is_nan].view(np.uint32))


@quick
@given(case=cases)
def test_products_are_within_the_rounding_of_their_sums(case: Case) -> None:
    x, h = case.x.double(), case.h.double()
    for part in range(case.rows.num_parts):
        out = torch.full((len(x), case.rows.num_rows), float("nan"))
        kernels.project(case.x, case.rows, part, out)
        weights = case.weights[:, part]
        bound = 2 * (case.rows.width + 1) * EPS * (x.abs() @ weights.abs().T)
        assert ((out.double() - x @ weights.T).abs() <= bound).all()
    y, down = case.x.clone(), case.weights[:, -1]
    kernels.accumulate(case.h, case.rows, y)
    bound = 2 * (case.rows.num_rows + 1) * EPS * (x.abs() + h.abs() @ down.abs())
    assert ((y.double() - (x + h @ down)).abs() <= bound).all()


@pytest.mark.parametrize("name", GROUPED)
@pytest.mark.parametrize("num_tokens", [1, 3, 4, 16])
def test_products_have_the_bits_of_the_decoded_values(name: str, num_tokens: int) -> None:
    """Decoding is exact and the order of sums is the width's alone, so the same values in fp32 give the same bits."""
    case = make_case(name, 3, 45, num_tokens, 3, 7, by_slot=False)
    wide = case.weights.float().reshape(45, -1)
    plain = kernels.matrix_rows(wide, num_parts=3)
    for part in range(3):
        outputs = [torch.empty(num_tokens, 45) for _ in range(2)]
        for rows, out in zip((case.rows, plain), outputs, strict=True):
            kernels.project(case.x, rows, part, out)
        assert torch.equal(*outputs)
    sums = [case.x.clone() for _ in range(2)]
    for rows, y in zip((case.rows, plain), sums, strict=True):
        kernels.accumulate(case.h, rows, y)
    assert torch.equal(*sums)


@pytest.mark.parametrize("name", GROUPED)
def test_threads_and_batching_change_no_bit(name: str) -> None:
    case, before = make_case(name, 5, 203, 9, 2, 3, by_slot=False), _native.num_threads()
    results = []
    for num_threads in (1, 2, 3):
        _native.set_num_threads(num_threads)
        out, y = torch.empty(9, 203), case.x.clone()
        kernels.project(case.x, case.rows, 0, out)
        kernels.accumulate(case.h, case.rows, y)
        results.append((out, y))
    _native.set_num_threads(before)
    alone, y_alone = torch.empty(1, 203), case.x[4:5].clone()
    kernels.project(case.x[4:5], case.rows, 0, alone)
    kernels.accumulate(case.h[4:5], case.rows, y_alone)
    for out, y in results:
        assert torch.equal(out, results[0][0])
        assert torch.equal(y, results[0][1])
        assert torch.equal(out[4:5], alone)
        assert torch.equal(y[4:5], y_alone)


def test_sizes() -> None:
    plain = {"bf16": (1, 2), "fp16": (1, 2), "fp32": (1, 4)}
    sizes = plain | {name: gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name.upper()]] for name in FP16_PLACES}
    sizes |= {"mxfp4": (32, 17), "fp8_block": (128, 132)}
    assert {each.name: (each.group_elements, each.group_bytes) for each in ENCODINGS.values()} == sizes
    assert encoding_of("bfloat16") == encoding_of(torch.bfloat16) == ENCODINGS["bf16"]
    assert [ENCODINGS[name].dtype for name in plain] == [torch.bfloat16, torch.float16, torch.float32]
    assert not any(ENCODINGS[name].is_plain for name in GROUPED)
    with pytest.raises(ConfigError, match="33 elements are not whole groups of 32"):
        Q8_0.bytes_of(33)
    for other in (torch.int8, "int8", "nothing"):
        with pytest.raises(ConfigError, match="rows must be bfloat16, float16 or float32"):
            encoding_of(other)
    with pytest.raises(ConfigError, match="48 elements is not made of whole groups"):
        kernels.RowFormat.alike(100, 48, Q8_0.code, 1)


@given(names=st.permutations(["bf16", "q8_0", "fp32"]), num_groups=st.integers(1, 9), by_slot=st.booleans())
def test_each_part_of_a_row_has_an_encoding_of_its_own(names: list[str], num_groups: int, by_slot: bool) -> None:
    """The same bits as each part alone, by row kernels and widened for matrix products; nothing is aligned."""
    random = np.random.default_rng(num_groups)
    width, num_rows, num_stored = 32 * num_groups, 16, 19
    layout = LayerLayout(
        hidden_size=width, num_rows=num_stored, parts=GATED, encodings=tuple(names), block_rows=num_stored
    )
    place = SlabAllocator().slab(layout.block_stride_bytes, 1).slot(0)
    content = place.numpy(num_stored * layout.row_stride_bytes).reshape(num_stored, -1)
    content[:] = 255
    weights = torch.from_numpy(random.standard_normal((num_stored, width)).astype(np.float32))
    alone = []
    for part in layout.placed:
        stored = torch.zeros(num_stored, part.num_bytes, dtype=torch.uint8)
        if part.encoding.dtype is None:
            QUANTIZERS[part.encoding.name](weights, stored)
        else:
            stored.view(part.encoding.dtype).copy_(weights)
        content[:, part.offset_bytes : part.offset_bytes + part.num_bytes] = stored.numpy()
        row_format = kernels.RowFormat.alike(part.num_bytes, width, part.encoding.code, 1)
        alone.append((stored, row_format))
    slots = torch.from_numpy(random.permutation(num_stored)[:num_rows].astype(np.int32)) if by_slot else None
    rows = kernels.rows_at(layout, place, num_rows, slots)
    x = torch.from_numpy(random.standard_normal((5, width)).astype(np.float32))
    h = torch.from_numpy(random.standard_normal((5, num_rows)).astype(np.float32))
    for index, (stored, row_format) in enumerate(alone):
        single = kernels.RowBlock(stored, num_rows, row_format, slots)
        for call, shape in ((kernels.project, (5, num_rows)), (kernels.widen, (num_rows, width))):
            mine, expected = torch.empty(shape), torch.empty(shape)
            if call is kernels.project:
                kernels.project(x, rows, index, mine)
                kernels.project(x, single, 0, expected)
            else:
                kernels.widen(rows, index, mine)
                kernels.widen(single, 0, expected)
            assert torch.equal(mine, expected)
    mine, expected = torch.zeros(5, width), torch.zeros(5, width)
    kernels.accumulate(h, rows, mine)
    kernels.accumulate(h, single, expected)  # of the last part
    assert torch.equal(mine, expected)
    gemm = Gemms(torch.float32).of(layout)
    assert gemm.dtype is None
    down = gemm.parts(layout, place, num_stored)[2]
    wide = torch.empty(num_stored, width)
    kernels.widen(kernels.RowBlock(alone[2][0], num_stored, alone[2][1]), 0, wide)
    assert torch.equal(down, wide)
