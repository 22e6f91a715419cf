"""How fast weights are multiplied with, per dtype: matrices, rows in blocks, scattered rows, predictors, prompts.

Per encoding that is not plain: matrices, the parts of blocks, experts, prompts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from flashlm.probe.device_profile import EncodedRates, ProductRates
from flashlm.probe.timing import median_s
from flashlm.rows import kernels
from flashlm.rows.encodings import Encoding
from flashlm.rows.layout import GATED, LayerLayout, same_encoding
from flashlm.rows.neurons import accumulate_blocks, block_at, operand, project_blocks
from flashlm.rows.products import fp32_linear, multiplies_int8
from flashlm.sparsity.calibration_document import PredictorEntry
from flashlm.sparsity.predictor import Predictor
from flashlm.storage.slab import SlabAllocator

HIDDEN, BLOCK_ROWS, NUM_BLOCKS, PARTS = 4096, 256, 48, 2  # 200 MB in 16 bits: far beyond any cache
RANK, PREDICTED_ROWS, NUM_PREDICTORS = 128, 16384, 16
EXPERT_HIDDEN, EXPERT_ROWS, EXPERT_PARTS, EXPERTS_TOGETHER = (
    2048,
    1024,
    3,
    4,
)  # shorter parts of rows than dense models'
GEMM_TOKENS = 128
ENCODED_BYTES, ENCODED_ROUNDS = 64 << 20, 3
DOWN_ROWS = 512  # neurons of a block of 4 MiB in 4 bits, at HIDDEN
ANY_BYTE = 0x2D  # as every byte of a group: no scale that it makes is infinite, or so small that products are subnormal
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


@torch.no_grad()
def product_rates(dtype: str) -> ProductRates:
    """Measure the products of decode and prefill with weights of one dtype, as the engine makes them."""
    element = DTYPES[dtype]
    weights = torch.zeros(NUM_BLOCKS * BLOCK_ROWS, PARTS * HIDDEN, dtype=element)
    weights[:] = torch.randn(PARTS * HIDDEN).to(element)
    with kernels.one_torch_thread():
        block_up_s, block_down_s = (median_s(work) for work in _block_products(weights))
        row_up_s, row_down_s = (median_s(work) for work in _row_products(weights))
        matrix_s = median_s(_matrices(weights))
        expert_s = median_s(_experts(weights))
        predictors = _predictors(element)
        tokens = torch.randn(1, HIDDEN)
        predictor_s = median_s(lambda: [predictor.predict(tokens) for predictor in predictors])
    part_bytes = weights.numel() * weights.element_size() / PARTS
    gemm_s = median_s(_gemm(dtype, weights))
    return ProductRates(
        dtype=dtype,
        matrix_gb_per_s=PARTS * part_bytes / matrix_s / 1e9,
        block_up_gb_per_s=part_bytes / block_up_s / 1e9,
        block_down_gb_per_s=part_bytes / 2 / block_down_s / 1e9,
        row_up_gb_per_s=part_bytes / row_up_s / 1e9,
        row_down_gb_per_s=part_bytes / 2 / row_down_s / 1e9,
        expert_gb_per_s=PARTS * part_bytes / expert_s / 1e9,
        predictor_gb_per_s=sum(predictor.num_bytes for predictor in predictors) / predictor_s / 1e9,
        gemm_gflop_per_s=2 * GEMM_TOKENS * BLOCK_ROWS * HIDDEN / gemm_s / 1e9,
    )


def _rows(weights: torch.Tensor, start: int, num_rows: int, slots: torch.Tensor | None = None) -> kernels.RowBlock:
    part = weights[start : start + num_rows] if slots is None else weights[start:]
    return kernels.matrix_rows(part, num_parts=PARTS, slots=slots)


def _every_second(num_rows: int) -> torch.Tensor:
    hidden = torch.zeros(1, num_rows)
    hidden[:, ::2] = 1.0
    return hidden


def _block_products(weights: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the dot products with all blocks, and the accumulation of every second row."""
    x, y, hidden, firing = (
        torch.randn(1, HIDDEN),
        torch.zeros(1, HIDDEN),
        torch.ones(1, BLOCK_ROWS),
        _every_second(BLOCK_ROWS),
    )
    blocks = [_rows(weights, block * BLOCK_ROWS, BLOCK_ROWS) for block in range(NUM_BLOCKS)]

    def up() -> None:
        for block in blocks:
            kernels.project(x, block, 0, hidden)

    def down() -> None:
        for block in blocks:
            kernels.accumulate(firing, block, y)

    return up, down


def _row_products(weights: torch.Tensor) -> tuple[Callable[[], object], Callable[[], object]]:
    """Return the same over rows in a random order, two blocks' worth a call."""
    num_rows = 2 * BLOCK_ROWS
    x, y, hidden, firing = (
        torch.randn(1, HIDDEN),
        torch.zeros(1, HIDDEN),
        torch.ones(1, num_rows),
        _every_second(num_rows),
    )
    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(0)).int()
    picked = [order[start : start + num_rows] for start in range(0, len(order), num_rows)]
    groups = [_rows(weights, 0, num_rows, slots) for slots in picked]

    def up() -> None:
        for group in groups:
            kernels.project(x, group, 0, hidden)

    def down() -> None:
        for group in groups:
            kernels.accumulate(firing, group, y)

    return up, down


def _matrices(weights: torch.Tensor) -> Callable[[], object]:
    """Return products with square matrices, each a call with the conversions of a resident layer."""
    matrices = [kernels.matrix_rows(matrix) for matrix in weights.view(-1, HIDDEN, HIDDEN)]
    narrow = torch.randn(1, HIDDEN).to(weights.dtype)

    def multiply() -> None:
        for matrix in matrices:
            output = torch.empty(1, HIDDEN)
            kernels.project(narrow.to(torch.float32).contiguous(), matrix, 0, output)
            output.to(weights.dtype)

    return multiply


def _experts(weights: torch.Tensor) -> Callable[[], object]:
    """Return the products of a token with the experts that the weights make, some of them together."""
    width = EXPERT_PARTS * EXPERT_HIDDEN
    count = weights.numel() // (EXPERT_ROWS * width)
    experts = weights.view(-1)[: count * EXPERT_ROWS * width].view(count, EXPERT_ROWS, width)
    blocks = [kernels.matrix_rows(expert, num_parts=EXPERT_PARTS) for expert in experts]
    groups = [blocks[start : start + EXPERTS_TOGETHER] for start in range(0, count, EXPERTS_TOGETHER)]
    token = torch.ones(1, EXPERT_HIDDEN)

    def multiply() -> None:
        for group in groups:
            hidden = torch.empty(len(group), EXPERT_ROWS)
            for part in range(EXPERT_PARTS - 1):
                kernels.project_blocks(token, group, part, hidden)
            hidden.fill_(1.0)
            kernels.accumulate_blocks(hidden, group, torch.zeros(len(group), EXPERT_HIDDEN))

    return multiply


def _predictors(element: torch.dtype) -> list[Predictor]:
    entry = PredictorEntry(
        kind="trained", rank=RANK, threshold=0.5, recall=1.0, false_positive=0.0, predicted_share=0.1
    )
    return [
        Predictor(
            entry=entry,
            reduce=torch.ones(RANK, HIDDEN, dtype=element),
            expand=torch.ones(PREDICTED_ROWS, RANK, dtype=element),
            bias=torch.zeros(PREDICTED_ROWS),
            activation=torch.relu,
        )
        for _ in range(NUM_PREDICTORS)
    ]


def _gemm(dtype: str, weights: torch.Tensor) -> Callable[[], object]:
    """Return one block's product with many tokens, the way the engine makes it for this dtype."""
    block = weights[:BLOCK_ROWS, :HIDDEN]
    if kernels.choose_plain_strategy(weights.dtype) == "native":
        tokens = torch.randn(GEMM_TOKENS, HIDDEN).to(weights.dtype)
        return lambda: fp32_linear(tokens, block)
    wide, tokens = torch.empty(BLOCK_ROWS, HIDDEN), torch.randn(GEMM_TOKENS, HIDDEN)

    def widened() -> None:
        kernels.widen(_rows(weights, 0, BLOCK_ROWS), 0, wide)
        fp32_linear(tokens, wide)

    return widened


@torch.no_grad()
def encoded_rates(encoding: Encoding, *, int8: bool) -> EncodedRates:
    """Measure the products of decode and prefill with weights of an encoding that is not plain, as the engine makes them."""
    memory = torch.full((ENCODED_BYTES,), ANY_BYTE, dtype=torch.uint8)
    with kernels.one_torch_thread():
        matrix_s, matrix_bytes = _encoded_matrices(memory, encoding, HIDDEN, HIDDEN, int8=int8)
        down_s, down_bytes = _encoded_matrices(memory, encoding, HIDDEN, DOWN_ROWS, int8=int8)
        expert_s, expert_bytes = _encoded_experts(encoding, int8=int8)
    gemm_s = median_s(_encoded_gemm(_encoded(memory, encoding, 0, BLOCK_ROWS, HIDDEN), encoding, int8=int8))
    return EncodedRates(
        encoding=encoding.name,
        is_int8=int8,
        matrix_gb_per_s=matrix_bytes / matrix_s / 1e9,
        down_gb_per_s=down_bytes / down_s / 1e9,
        expert_gb_per_s=expert_bytes / expert_s / 1e9,
        gemm_gflop_per_s=2 * GEMM_TOKENS * BLOCK_ROWS * HIDDEN / gemm_s / 1e9,
    )


def _encoded_gemm(block: kernels.RowBlock, encoding: Encoding, *, int8: bool) -> Callable[[], object]:
    wide, tokens = torch.empty(BLOCK_ROWS, HIDDEN), torch.randn(GEMM_TOKENS, HIDDEN)
    if int8 and multiplies_int8(encoding.name):
        product = torch.empty(GEMM_TOKENS, BLOCK_ROWS)
        return lambda: kernels.project(kernels.quantize_tokens(tokens), block, 0, product)

    def widened() -> None:
        kernels.widen(block, 0, wide)
        fp32_linear(tokens, wide)

    return widened


def _encoded(memory: torch.Tensor, encoding: Encoding, number: int, num_rows: int, width: int) -> kernels.RowBlock:
    """Return the matrix of a shape that lies behind `number` others."""
    row_bytes = encoding.bytes_of(width)
    row_format = kernels.RowFormat.alike(row_bytes, width, encoding.code, 1)
    start = number * num_rows * row_bytes
    return kernels.RowBlock(
        memory[start : start + num_rows * row_bytes].view(num_rows, row_bytes), num_rows, row_format
    )


def _encoded_matrices(
    memory: torch.Tensor, encoding: Encoding, num_rows: int, width: int, *, int8: bool
) -> tuple[float, int]:
    """Return the time of products with as many matrices as the memory holds, and their bytes."""
    num_bytes = num_rows * encoding.bytes_of(width)
    matrices = [_encoded(memory, encoding, index, num_rows, width) for index in range(len(memory) // num_bytes)]
    token, out = torch.ones(1, width), torch.empty(1, num_rows)

    def multiply() -> None:
        for matrix in matrices:
            kernels.project(operand(token, [encoding.name], int8=int8), matrix, 0, out)

    return median_s(multiply, ENCODED_ROUNDS), len(matrices) * num_bytes


def _encoded_experts(encoding: Encoding, *, int8: bool) -> tuple[float, int]:
    """Return the time of products with experts of as many bytes, some together, and their bytes."""
    layout = LayerLayout(
        hidden_size=EXPERT_HIDDEN,
        num_rows=EXPERT_ROWS,
        parts=GATED,
        encodings=same_encoding(encoding.name, GATED),
        block_rows=EXPERT_ROWS,
        arrangement="block",
    )
    count = ENCODED_BYTES // layout.block_stride_bytes // EXPERTS_TOGETHER * EXPERTS_TOGETHER
    slab = SlabAllocator().slab(layout.block_stride_bytes, count)
    slab.slot(0).numpy(count * layout.block_stride_bytes).fill(ANY_BYTE)
    experts = [block_at(layout, slab.slot(index), EXPERT_ROWS, int8=int8) for index in range(count)]
    token, hidden = torch.ones(1, EXPERT_HIDDEN), torch.empty(EXPERTS_TOGETHER, EXPERT_ROWS)

    def multiply() -> None:
        for start in range(0, count, EXPERTS_TOGETHER):
            group, x = experts[start : start + EXPERTS_TOGETHER], operand(token, [encoding.name], int8=int8)
            for part in range(EXPERT_PARTS - 1):
                project_blocks(x, group, part, hidden)
            hidden.fill_(1.0)
            accumulate_blocks(hidden, group, torch.zeros(len(group), EXPERT_HIDDEN))

    return median_s(multiply, ENCODED_ROUNDS), count * layout.weight_bytes
