"""The row kernels at every instruction set of this machine, against float64 and against themselves, cut differently."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flashlm import _native
from flashlm.errors import ConfigError
from flashlm.rows import kernels
from flashlm.rows.encodings import encoding_of
from flashlm.rows.kernels import RowBlock, RowFormat

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
EPS = 2.0**-24  # unit roundoff of fp32


@pytest.fixture(autouse=True, params=_native.simd_levels())
def simd_level(request: pytest.FixtureRequest) -> Iterator[str]:
    _native.set_simd_level(request.param)
    yield request.param
    _native.set_simd_level(None)


@pytest.fixture(autouse=True)
def restore_threads() -> Iterator[None]:
    before = _native.num_threads()
    yield
    _native.set_num_threads(before)


@dataclass
class Case:
    """A block of `storage`'s rows, in which everything beyond the parts is NaN, so that a stray read shows."""

    storage: torch.Tensor  # (num_rows, stride elements)
    hidden_size: int
    num_parts: int
    num_rows: int
    x: torch.Tensor
    h: torch.Tensor
    bias: torch.Tensor
    slots: torch.Tensor | None = None

    @property
    def rows(self) -> RowBlock:
        dtype = self.storage.dtype
        stride_bytes, code = self.storage.stride(0) * dtype.itemsize, encoding_of(dtype).code
        row_format = RowFormat.alike(stride_bytes, self.hidden_size, code, self.num_parts)
        return RowBlock(self.storage, self.num_rows, row_format, self.slots)


def make_case(
    dtype: torch.dtype, hidden_size: int, num_rows: int, num_tokens: int, num_parts: int = 3, seed: int = 0
) -> Case:
    generator = torch.Generator().manual_seed(seed)
    used = num_parts * hidden_size
    stride = used + 5
    storage = torch.full((num_rows + 1, stride), float("nan"), dtype=dtype)
    storage[:num_rows, :used] = torch.randn(num_rows, used, generator=generator).to(dtype)
    return Case(
        storage,
        hidden_size,
        num_parts,
        num_rows,
        torch.randn(num_tokens, hidden_size, generator=generator),
        torch.randn(num_tokens, num_rows, generator=generator),
        torch.randn(num_rows, generator=generator),
    )


def part_view(case: Case, part: int) -> torch.Tensor:
    """Return a part of the rows as a (num_rows, hidden_size) view of their memory; a copy where there are slots."""
    view = case.storage[:, part * case.hidden_size : (part + 1) * case.hidden_size]
    return view[: case.num_rows] if case.slots is None else view[case.slots.long()]


def project_reference(case: Case, part: int, out: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Do what `kernels.project` does, in torch and float64."""
    product = case.x.double() @ part_view(case, part).double().T
    out.copy_(product if bias is None else product + bias.double())


def accumulate_reference(case: Case, y: torch.Tensor) -> None:
    """Do what `kernels.accumulate` does, in torch and float64, skipping the same rows."""
    is_active = (case.h != 0).any(dim=0)
    down = part_view(case, case.num_parts - 1)
    y.copy_(y.double() + case.h[:, is_active].double() @ down[is_active].double())


def projected(case: Case, part: int = 0, bias: torch.Tensor | None = None) -> torch.Tensor:
    out = torch.full((len(case.x), case.num_rows), float("nan"))
    kernels.project(case.x, case.rows, part, out, bias)
    return out


def accumulated(case: Case, y: torch.Tensor) -> torch.Tensor:
    y = y.clone()
    kernels.accumulate(case.h, case.rows, y)
    return y


def cut(case: Case, begin: int, end: int) -> RowBlock:
    return replace(case, storage=case.storage[begin:], num_rows=end - begin).rows


shapes = st.tuples(
    st.sampled_from(DTYPES),
    st.one_of(st.integers(1, 200), st.sampled_from([255, 256, 257, 384, 1030])),
    st.integers(0, 40),
    st.integers(1, 16),
    st.integers(2, 3),
    st.integers(0, 2**16),
)
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@quick
@given(shape=shapes, with_bias=st.booleans())
def test_project_is_within_the_rounding_of_its_sum(shape: tuple[torch.dtype, int, int, int, int, int], with_bias: bool):
    case = make_case(*shape)
    bias = case.bias if with_bias else None
    for part in range(case.num_parts):
        exact = torch.empty(len(case.x), case.num_rows, dtype=torch.float64)
        project_reference(case, part, exact, bias)
        magnitude = case.x.double().abs() @ part_view(case, part).double().abs().T
        tolerance = 2 * (case.hidden_size + 1) * EPS * (magnitude + case.bias.double().abs())
        assert ((projected(case, part, bias).double() - exact).abs() <= tolerance).all()


@quick
@given(shape=shapes)
def test_accumulate_is_within_the_rounding_of_its_sum(shape: tuple[torch.dtype, int, int, int, int, int]):
    case = make_case(*shape)
    exact = case.x.double()
    accumulate_reference(case, exact)
    down = part_view(case, case.num_parts - 1).double()
    magnitude = case.x.double().abs() + case.h.double().abs() @ down.abs()
    tolerance = 2 * (case.num_rows + 1) * EPS * magnitude
    assert ((accumulated(case, case.x).double() - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden_size", [1, 7, 8, 17, 4096])
def test_widen_is_exact(dtype: torch.dtype, hidden_size: int):
    case = make_case(dtype, hidden_size, 19, 1)
    for part in range(3):
        dst = torch.empty(19, hidden_size)
        kernels.widen(case.rows, part, dst)
        assert torch.equal(dst, part_view(case, part).float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_widen_is_exact_for_every_bit_pattern(dtype: torch.dtype):
    storage = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype).reshape(256, 256)
    dst = torch.empty(256, 128)
    for part in range(2):
        kernels.widen(kernels.matrix_rows(storage, num_parts=2), part, dst)
        expected = storage[:, part * 128 : (part + 1) * 128].float()
        assert torch.equal(dst.isnan(), expected.isnan())
        is_number = ~expected.isnan()
        assert torch.equal(dst.view(torch.int32)[is_number], expected.view(torch.int32)[is_number])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize("hidden_size", [61, 4096])
def test_cutting_threads_and_batching_change_no_bit(dtype: torch.dtype, num_tokens: int, hidden_size: int):
    num_rows = 203
    case = make_case(dtype, hidden_size, num_rows, num_tokens)
    case.h[:, ::3] = 0
    _native.set_num_threads(1)
    out, y = projected(case, 1, case.bias), accumulated(case, case.x)
    for num_threads in (2, 3):
        _native.set_num_threads(num_threads)
        assert torch.equal(projected(case, 1, case.bias), out)
        assert torch.equal(accumulated(case, case.x), y)
    for cuts in ((0, 1, 7, 100, num_rows), (0, 64, 128, 192, num_rows)):
        out_cut, y_cut = torch.empty_like(out), case.x.clone()
        for begin, end in itertools.pairwise(cuts):
            rows = cut(case, begin, end)
            kernels.project(case.x, rows, 1, out_cut[:, begin:end], case.bias[begin:end])
            kernels.accumulate(case.h[:, begin:end], rows, y_cut)
        assert torch.equal(out_cut, out)
        assert torch.equal(y_cut, y)
    for token in (0, num_tokens - 1):
        alone = replace(case, x=case.x[token : token + 1], h=case.h[token : token + 1])
        assert torch.equal(projected(alone, 1, case.bias)[0], out[token])
        assert torch.equal(accumulated(alone, alone.x)[0], y[token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 4, 9])
def test_slots_equal_a_gather(dtype: torch.dtype, num_tokens: int):
    case = make_case(dtype, 133, 40, num_tokens)
    slots = torch.randperm(40, generator=torch.Generator().manual_seed(1))[:23].to(torch.int32)
    picked = case.storage[slots.long()].contiguous()
    by_slot = replace(case, num_rows=23, slots=slots, h=case.h[:, :23])
    gathered = replace(by_slot, storage=picked, slots=None)
    assert torch.equal(projected(by_slot, 1), projected(gathered, 1))
    assert torch.equal(accumulated(by_slot, case.x), accumulated(gathered, case.x))
    dst = torch.empty(23, 133)
    kernels.widen(by_slot.rows, 2, dst)
    assert torch.equal(dst, picked[:, 266:399].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 3, 16])
def test_the_down_part_of_an_inactive_row_is_not_read(dtype: torch.dtype, num_tokens: int):
    case = make_case(dtype, 70, 40, num_tokens)
    inactive = torch.tensor([0, 5, 6, 7, 8, 30, 39])
    case.h[:, inactive] = 0
    case.h[0, 5] = -0.0
    expected = accumulated(case, case.x)
    case.storage[inactive, 140:210] = float("nan")
    assert torch.equal(accumulated(case, case.x), expected)
    assert expected.isfinite().all()


def test_an_unsupported_instruction_set_is_refused(simd_level: str):
    with pytest.raises(ValueError, match=r"'mmx' is not supported here; choose one of: .*generic"):
        _native.set_simd_level("mmx")
    assert _native.simd_level() == simd_level


def test_a_block_of_rows_lies_in_its_memory():
    def make(memory: object, num_rows: int, row_format: tuple[int, ...], *slots: torch.Tensor) -> RowBlock:
        return RowBlock(memory, num_rows, RowFormat.alike(*row_format), *slots)

    block = torch.zeros(4, 16, dtype=torch.bfloat16)
    slots = torch.tensor([3, 0], dtype=torch.int32)
    two = (32, 8, 0, 2)
    make(block, 4, two)
    make(block, 2, two, slots)
    for arguments, message in (
        ((block, 5, two), "5 rows ends beyond its memory of 128 bytes"),
        ((block[1:], 4, two), "beyond its memory of 96 bytes"),
        ((block, 2, two, slots + 1), "5 rows ends beyond"),
        ((block, 2, two, slots - 1), "beyond its memory"),
        ((block, 2, two, slots[:1]), r"slots must be contiguous int32 \(2,\)"),
        ((block, 2, two, slots.long()), "slots must be contiguous int32"),
        ((block, 2, (31, 8, 0, 2)), "a part of 16 bytes at 16 does not fit a row stride of 31 bytes"),
        ((block, 1, (32, 0, 0, 1)), "whole groups"),
        ((block, 1, (32, 8, 15, 1)), "encoding must be 0 to 14"),
        ((block, 1, (32, 8, 0, 0)), "num_parts"),
        ((block, 1, (1 << 20, 8, 0, 17)), "num_parts"),
        ((block.to("meta"), 4, two), "rows must be on the CPU.*meta"),
        ((3, 4, two), "rows must be a tensor"),
        ((block, 1, (2**63, 2**60, 0, 2)), "whole groups|does not fit"),
        ((block, 2**62, (2**40, 8, 0, 2)), "beyond its memory"),
    ):
        with pytest.raises(ConfigError, match=message):
            make(*arguments)
    with pytest.raises(ConfigError, match="a part of 16 bytes at 17 does not fit"):
        RowFormat(32, 8, [(0, 0), (0, 17)])
    with pytest.raises(ConfigError, match="does not fit"):
        RowFormat(32, 8, [(0, 2**64 - 1)])
    with pytest.raises(TypeError):
        make(block, -1, two)
    with pytest.raises(ValueError, match="at least 1"):
        _native.set_num_threads(0)


def test_a_block_keeps_its_memory():
    rows, dst = kernels.matrix_rows(torch.full((64, 1000), 7.0)), torch.empty(64, 1000)
    gc.collect()
    others = [torch.zeros(64, 1000) for _ in range(8)]
    kernels.widen(rows, 0, dst)
    assert (dst == 7.0).all()
    assert len(others) == 8


def test_the_tensor_calls_check_their_arguments():
    case = make_case(torch.bfloat16, 8, 4, 2)
    out = torch.empty(2, 4)
    for arguments, message in (
        ((case.x.double(), case.rows, 0, out), "tokens must be contiguous float32"),
        ((case.x.T, case.rows, 0, out), r"tokens must be .*\(num_tokens, 8\)"),
        ((torch.zeros(17, 8), case.rows, 0, torch.empty(17, 4)), "at most 16 tokens, got 17"),
        ((case.x, case.rows, 0, out.T.contiguous().T), "out must be float32"),
        ((case.x, case.rows, 0, out[:, :3]), r"out must be float32 \(2, 4\)"),
        ((case.x, case.rows, 0, torch.empty(1, 4).expand(2, 4)), r"out must be float32 \(2, 4\)"),
        ((case.x, case.rows, 3, out), "part must be 0 to 2, got 3"),
        ((case.x, case.rows, 0, out, case.bias[:3]), r"bias must be contiguous float32 \(4,\)"),
        (([0.0] * 8, case.rows, 0, out), "x must be a tensor"),
    ):
        with pytest.raises(ConfigError, match=message):
            kernels.project(*arguments)
    for bad in (torch.zeros(4, 8, dtype=torch.int8), torch.zeros(8, 4).T, torch.zeros(8), torch.zeros(4, 8).to("meta")):
        with pytest.raises(ConfigError, match="rows must be bfloat16"):
            kernels.matrix_rows(bad)
    with pytest.raises(ConfigError, match="num_parts"):
        kernels.matrix_rows(torch.zeros(4, 8), num_parts=0)
    with pytest.raises(ConfigError, match="does not fit a row stride"):
        kernels.matrix_rows(case.storage.as_strided((4, 24), (20, 1)))
    with pytest.raises(ConfigError, match="h must be float32"):
        kernels.accumulate(out[:1], case.rows, case.x)
    with pytest.raises(ConfigError, match="dst must be contiguous float32"):
        kernels.widen(case.rows, 0, torch.empty(4, 9))


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sizes=st.lists(st.tuples(st.integers(1, 90), st.integers(1, 300)), min_size=1, max_size=5),
    num_tokens=st.integers(1, 16),
    num_threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
)
def test_many_products_in_one_job_are_those_of_single_ones(sizes, num_tokens, num_threads, dtype, has_bias) -> None:
    """To the bit: the tasks cut rows only. Each matrix has its own part of a token, and its own place in the output."""
    _native.set_num_threads(num_threads)
    generator = torch.Generator().manual_seed(len(sizes) * num_tokens)
    weights = [torch.randn(rows, inputs, generator=generator).to(dtype) for rows, inputs in sizes]
    parts = [torch.randn(num_tokens, inputs, generator=generator) for _, inputs in sizes]
    biases = [torch.randn(rows, generator=generator) if has_bias else None for rows, _ in sizes]
    x_starts = [0, *itertools.accumulate(inputs for _, inputs in sizes)]
    out_starts = [0, *itertools.accumulate(rows for rows, _ in sizes)]
    table = kernels.ProductTable(weights, list(zip(x_starts, out_starts, strict=True))[:-1], biases)
    out = torch.full((num_tokens, out_starts[-1]), float("nan"))
    table.project(torch.cat([part.flatten() for part in parts]), out)
    for weight, part, bias, start in zip(weights, parts, biases, out_starts, strict=False):
        alone = torch.empty(num_tokens, len(weight))
        rows = kernels.matrix_rows(weight)
        kernels.project(part, rows, 0, alone, bias)
        assert torch.equal(out[:, start : start + len(weight)], alone)


def test_what_many_products_refuse() -> None:
    matrix = torch.ones(4, 6)
    with pytest.raises(ConfigError, match="one dtype"):
        kernels.ProductTable([matrix, matrix.half()], [(0, 0), (6, 4)])
    table = kernels.ProductTable([matrix], [(0, 0)])
    with pytest.raises(ConfigError, match="x must be contiguous float32 of 2 x 6"):
        table.project(torch.ones(6), torch.empty(2, 4))
    with pytest.raises(ConfigError, match="out must be"):
        table.project(torch.ones(12), torch.empty(2, 3))
    with pytest.raises(ConfigError, match="1 to 16 tokens"):
        table.project(torch.ones(17 * 6), torch.empty(17, 4))


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    hidden_size=st.integers(1, 300),
    num_rows=st.integers(1, 90),
    num_blocks=st.integers(1, 6),
    num_threads=st.integers(1, 3),
    dtype=st.sampled_from(DTYPES),
    has_bias=st.booleans(),
)
def test_blocks_in_one_job_have_the_bits_of_single_ones(
    hidden_size, num_rows, num_blocks, num_threads, dtype, has_bias
) -> None:
    _native.set_num_threads(num_threads)
    cases = [make_case(dtype, hidden_size, num_rows, 1, seed=seed) for seed in range(num_blocks)]
    x, blocks = cases[0].x, [case.rows for case in cases]
    for part in (0, 1):
        out = torch.full((num_blocks, num_rows), float("nan"))
        kernels.project_blocks(x, blocks, part, out, [case.bias for case in cases] if has_bias else [])
        for case, row in zip(cases, out, strict=True):
            single = projected(replace(case, x=x), part, case.bias if has_bias else None)
            assert torch.equal(row, single[0])
    y = torch.randn(num_blocks, hidden_size)
    expected = [accumulated(case, y[index : index + 1])[0] for index, case in enumerate(cases)]
    kernels.accumulate_blocks(torch.cat([case.h for case in cases]), blocks, y)
    assert torch.equal(y, torch.stack(expected))


def test_what_blocks_in_one_job_refuse() -> None:
    case, other = make_case(torch.float32, 8, 4, 1), make_case(torch.float32, 8, 5, 1)
    with pytest.raises(ConfigError, match="alike"):
        kernels.project_blocks(case.x, [case.rows, other.rows], 0, torch.empty(2, 4))
    with pytest.raises(ConfigError, match=r"\(2, 4\) expected"):
        kernels.project_blocks(case.x, [case.rows, case.rows], 0, torch.empty(1, 4))
    with pytest.raises(ConfigError, match=r"\(2, 8\) expected"):
        kernels.accumulate_blocks(torch.empty(2, 4), [case.rows, case.rows], torch.empty(1, 8))
    with pytest.raises(ConfigError, match="bias must be"):
        kernels.project_blocks(case.x, [case.rows], 0, torch.empty(1, 4), [torch.empty(3)])
