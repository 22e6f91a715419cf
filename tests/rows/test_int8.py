"""Tokens in 8 bits: how they are quantised, and their products at every instruction set, against float64."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm import _native
from flashlm.errors import ConfigError
from flashlm.rows import kernels
from flashlm.rows.encodings import ENCODINGS
from tests.rows.encoded import GROUPED, reference, tame_groups

EPS = 2.0**-24  # unit roundoff of fp32
INTEGERS = tuple(name for name in GROUPED if name != "fp8_block")
# Where a group's quants start that are unsigned and have an offset, or are taken for such: in bytes.
QUANTS_START = {"q4_0": 2, "q4_1": 4, "q5_0": 2, "q5_1": 4, "q4_k": 16, "q5_k": 16}
quick = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(autouse=True, params=_native.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_simd_level(request.param)
    yield request.param
    _native.set_simd_level(None)


def widened(tokens: kernels.QuantizedTokens, like: torch.Tensor) -> torch.Tensor:
    out = torch.empty_like(like)
    tokens.widen(out)
    return out.double()


def block_of(name: str, groups: np.ndarray, num_rows: int, width: int) -> kernels.RowBlock:
    stored = torch.from_numpy(groups.reshape(num_rows, -1))
    row_format = kernels.RowFormat.alike(stored.shape[1], width, ENCODINGS[name].code, 1)
    return kernels.RowBlock(stored, num_rows, row_format)


@given(
    exponents=st.tuples(st.integers(-44, 38), st.integers(-44, 38)),
    num_tokens=st.integers(1, 16),
    num_groups=st.integers(1, 5),
    seed=st.integers(0, 2**16),
)
def test_tokens_are_rounded_to_the_nearest_multiple_of_their_scale(exponents, num_tokens, num_groups, seed) -> None:
    random = np.random.default_rng(seed)
    scales = 10.0 ** random.integers(min(exponents), max(exponents) + 1, (num_tokens, num_groups, 1))
    x = (random.uniform(-1, 1, (num_tokens, num_groups, 32)) * scales).astype(np.float32)
    tokens = torch.from_numpy(x.reshape(num_tokens, -1))
    found = widened(kernels.quantize_tokens(tokens), tokens).numpy().reshape(x.shape)
    step = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64) / 127
    bound = np.where(step > 2.0**-126, 0.5001 * step, 127.1 * step)  # below that they count as 0
    assert (np.abs(found - x) <= bound).all()


@quick
@given(
    name=st.sampled_from(INTEGERS),
    num_groups=st.integers(1, 3),
    num_rows=st.integers(1, 40),
    num_tokens=st.one_of(st.integers(1, 16), st.integers(17, 40)),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_products_are_within_the_rounding_of_their_sums(
    name: str, num_groups: int, num_rows: int, num_tokens: int, with_bias: bool, seed: int
) -> None:
    """Of the quantised tokens: integers meet exactly, each 32 elements' scale and sum round a few times."""
    random = np.random.default_rng(seed)
    width = num_groups * ENCODINGS[name].group_elements
    groups = tame_groups(name, num_rows * num_groups, random)
    weights = torch.from_numpy(reference(name, groups).reshape(num_rows, width)).double()
    offsets = torch.zeros_like(weights)
    if name in QUANTS_START:
        without = groups.copy()
        without[:, QUANTS_START[name] :] = 0
        offsets = torch.from_numpy(reference(name, without).reshape(num_rows, width)).double()
    x = torch.from_numpy(random.standard_normal((num_tokens, width)).astype(np.float32))
    bias = torch.from_numpy(random.standard_normal(num_rows).astype(np.float32)) if with_bias else None
    tokens, out = kernels.quantize_tokens(x), torch.full((num_tokens, num_rows), float("nan"))
    block = block_of(name, groups, num_rows, width)
    if num_tokens > kernels.MAX_TOKENS and not kernels.multiplies_int8(ENCODINGS[name].code):
        with pytest.raises(ConfigError, match="at most 16 tokens"):
            kernels.project(tokens, block, 0, out, bias)
        return
    kernels.project(tokens, block, 0, out, bias)
    x_8 = widened(tokens, x)
    exact = x_8 @ weights.T + (0 if bias is None else bias.double())
    magnitude = x_8.abs() @ ((weights - offsets).abs() + offsets.abs()).T + (0 if bias is None else bias.double().abs())
    assert ((out.double() - exact).abs() <= 2 * (width / 32 + 8) * EPS * magnitude).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_threads_batching_and_cuts_change_no_bit(name: str) -> None:
    random, before = np.random.default_rng(5), _native.num_threads()
    num_rows, width = 103, 5 * 256
    groups = tame_groups(name, num_rows * width // ENCODINGS[name].group_elements, random)
    block = block_of(name, groups, num_rows, width)
    x = torch.from_numpy(random.standard_normal((16, width)).astype(np.float32))
    results = []
    for num_threads in (1, 2, 3):
        _native.set_num_threads(num_threads)
        out = torch.empty(16, num_rows)
        kernels.project(kernels.quantize_tokens(x), block, 0, out)
        results.append(out)
    _native.set_num_threads(before)
    for num_tokens in (1, 2, 3, 7):
        out = torch.empty(num_tokens, num_rows)
        kernels.project(kernels.quantize_tokens(x[:num_tokens]), block, 0, out)
        results.append(out)
    last = block_of(name, groups.reshape(num_rows, -1)[60:], num_rows - 60, width)
    out = torch.empty(16, num_rows - 60)
    kernels.project(kernels.quantize_tokens(x), last, 0, out)
    assert all(torch.equal(each, results[0][: len(each)]) for each in results)
    assert torch.equal(out, results[0][:, 60:])


@pytest.mark.parametrize("name", INTEGERS)
def test_of_many_tokens_threads_batching_and_cuts_change_no_bit(name: str) -> None:
    """A panel's rows and tokens do not meet; 2,304 elements take two panels."""
    if not kernels.multiplies_int8(ENCODINGS[name].code):
        pytest.skip("none here for this encoding")
    random, before = np.random.default_rng(5), _native.num_threads()
    num_rows, width, num_tokens = 103, 9 * 256, 37
    groups = tame_groups(name, num_rows * width // ENCODINGS[name].group_elements, random)
    block = block_of(name, groups, num_rows, width)
    x = torch.from_numpy(random.standard_normal((num_tokens, width)).astype(np.float32))
    bias = torch.from_numpy(random.standard_normal(num_rows).astype(np.float32))
    results = []
    for num_threads, some in ((1, 37), (2, 37), (3, 37), (2, 17), (2, 23)):
        _native.set_num_threads(num_threads)
        out = torch.empty(some, num_rows)
        kernels.project(kernels.quantize_tokens(x[:some]), block, 0, out, bias)
        results.append(out)
    _native.set_num_threads(before)
    wide = torch.full((num_tokens, num_rows + 5), float("nan"))  # a longer stride
    last = block_of(name, groups.reshape(num_rows, -1)[61:], num_rows - 61, width)
    kernels.project(kernels.quantize_tokens(x), last, 0, wide[:, 2 : 2 + num_rows - 61], bias[61:])
    assert all(torch.equal(each, results[0][: len(each)]) for each in results)
    assert torch.equal(wide[:, 2 : 2 + num_rows - 61], results[0][:, 61:])
    assert wide[:, :2].isnan().all()
    assert wide[:, 2 + num_rows - 61 :].isnan().all()


@pytest.mark.skipif(not {"avx2", "avx512"} <= set(_native.simd_levels()), reason="needs a processor with both")
@pytest.mark.parametrize("num_tokens", [5, 23])
@pytest.mark.parametrize("name", INTEGERS)
def test_avx512_gives_the_bits_of_avx2(name: str, num_tokens: int) -> None:
    random, width = np.random.default_rng(6), 3 * 256
    block = block_of(name, tame_groups(name, 11 * width // ENCODINGS[name].group_elements, random), 11, width)
    tokens = kernels.quantize_tokens(torch.from_numpy(random.standard_normal((num_tokens, width)).astype(np.float32)))
    outputs = torch.empty(num_tokens, 11), torch.empty(num_tokens, 11)
    for level, out in zip(("avx2", "avx512"), outputs, strict=True):
        _native.set_simd_level(level)
        if num_tokens > kernels.MAX_TOKENS and not kernels.multiplies_int8(ENCODINGS[name].code):
            pytest.skip("AVX2 has none of many tokens for this encoding")
        if num_tokens <= kernels.MAX_TOKENS and name in ("q4_0", "iq4_nl", "mxfp4"):
            pytest.skip("two groups at a time where AVX-512 can: other partial sums")
        kernels.project(tokens, block, 0, out)
    assert torch.equal(*outputs)


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "fp8_block"])
@pytest.mark.parametrize("num_tokens", [1, 3, 20])
def test_several_blocks_in_one_job_give_the_bits_of_each(name: str, num_tokens: int) -> None:
    random, width, num_rows = np.random.default_rng(7), 2 * 256, 45
    num_groups = num_rows * width // ENCODINGS[name].group_elements
    count = max(num_tokens, 3)
    blocks = [block_of(name, tame_groups(name, num_groups, random), num_rows, width) for _ in range(count)]
    biases = [torch.from_numpy(random.standard_normal(num_rows).astype(np.float32)) for _ in blocks]
    x = torch.from_numpy(random.standard_normal((num_tokens, width)).astype(np.float32))
    together = torch.empty(count, num_rows)
    kernels.project_blocks(kernels.quantize_tokens(x), blocks, 0, together, biases)
    for index, block in enumerate(blocks):
        alone = torch.empty(1, num_rows)
        token = x[index : index + 1] if num_tokens > 1 else x
        kernels.project(kernels.quantize_tokens(token), block, 0, alone, biases[index])
        assert torch.equal(alone[0], together[index])


def test_rows_of_other_elements_meet_the_tokens_as_they_were() -> None:
    random = np.random.default_rng(1)
    x = torch.from_numpy(random.standard_normal((3, 256)).astype(np.float32))
    plain = kernels.matrix_rows(torch.from_numpy(random.standard_normal((20, 256)).astype(np.float32)))
    for block in (block_of("fp8_block", tame_groups("fp8_block", 40, random), 20, 256), plain):
        outputs = torch.empty(3, 20), torch.empty(3, 20)
        kernels.project(kernels.quantize_tokens(x), block, 0, outputs[0])
        kernels.project(x, block, 0, outputs[1])
        assert torch.equal(*outputs)


@pytest.mark.parametrize("num_tokens", [2, 20])
@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
def test_what_is_not_finite_shows(value: float, num_tokens: int) -> None:
    if num_tokens > kernels.MAX_TOKENS and not kernels.multiplies_int8(ENCODINGS["q4_1"].code):
        pytest.skip("none here")
    x = torch.ones(num_tokens, 64)
    x[0, 40] = value
    out = torch.empty(num_tokens, 3)
    kernels.project(kernels.quantize_tokens(x), block_of("q4_1", np.full((6, 20), 17, np.uint8), 3, 64), 0, out)
    assert out[0].isnan().all()
    assert out[1:].isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    tokens, out = kernels.quantize_tokens(torch.ones(2, 64)), torch.empty(2, 3)
    block = block_of("q4_0", np.zeros((6, 18), np.uint8), 3, 64)
    for call, message in (
        (lambda: kernels.quantize_tokens(torch.ones(2, 48)), "whole groups of 32"),
        (lambda: kernels.quantize_tokens(torch.ones(2, 64).double()), "contiguous float32"),
        (lambda: kernels.project_blocks(tokens, [block], 0, out[:1]), r"\(1, 64\) expected"),
        (lambda: kernels.project(tokens, block_of("q4_0", np.zeros((3, 18), np.uint8), 3, 32), 0, out), "64 wide"),
        (lambda: kernels.project(tokens, block, 1, out), "part must be"),
        (lambda: kernels.project(tokens, block, 0, out[:1]), "out must be"),
        (lambda: kernels.project(tokens, block, 0, out, torch.ones(2)), "bias must be"),
        (lambda: tokens.widen(out), "out must be"),
    ):
        with pytest.raises(ConfigError, match=message):
            call()
