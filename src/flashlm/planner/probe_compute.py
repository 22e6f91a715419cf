"""What computing reaches: memory, products, the model's own overhead, and what reading and computing leave of each other."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque
from collections.abc import Callable

import torch
from torch.nn import functional as F

from flashlm import kernels
from flashlm.memory.neuron_cache import LayerCapacity, NeuronCache
from flashlm.planner.probe_file import ProbeFile
from flashlm.planner.profile import ProductRates
from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest, Ticket

HIDDEN, BLOCK_ROWS, NUM_BLOCKS, PARTS = 4096, 256, 48, 2  # 200 MB in 16 bits: far beyond any cache
NUM_ROUNDS = 5
GEMM_TOKENS = 128
MEMORY_BYTES = 512 << 20
STREAM_BYTES = 4 << 20
STREAM_DEPTH = 24
OVERLAP_S = 1.0
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def _best_s(work: Callable[[], object], num_rounds: int = NUM_ROUNDS) -> float:
    """Return the median time, the first, cold round left out."""
    times = []
    for _ in range(num_rounds + 1):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[1:])


def memory_rates() -> tuple[float, float]:
    """Return (GB/s of a sum over memory, GB/s of filling fresh memory)."""
    started_s = time.perf_counter()
    fresh = torch.ones(MEMORY_BYTES // 4)
    touch_s = time.perf_counter() - started_s
    return MEMORY_BYTES / _best_s(fresh.sum) / 1e9, MEMORY_BYTES / touch_s / 1e9


def product_rates(dtype: str) -> ProductRates:
    """Measure the products of decode and prefill with weights of one dtype, as the engine makes them."""
    element = DTYPES[dtype]
    weights = torch.zeros(NUM_BLOCKS * BLOCK_ROWS, PARTS * HIDDEN, dtype=element)
    weights[:] = torch.randn(PARTS * HIDDEN).to(element)
    num_bytes = weights.numel() * weights.element_size()
    stride_bytes = PARTS * HIDDEN * weights.element_size()
    x, y = torch.randn(1, HIDDEN), torch.zeros(1, HIDDEN)

    def rows(start: int, count: int, parts: int = PARTS, width: int = HIDDEN) -> kernels.RowBlock:
        return kernels.RowBlock(weights.data_ptr() + start * stride_bytes, count, stride_bytes, width, element, parts)

    matrix = kernels.RowBlock(weights.data_ptr(), len(weights) * PARTS, stride_bytes // PARTS, HIDDEN, element, 1)
    outputs = torch.empty(1, len(weights) * PARTS)
    hidden = torch.ones(1, BLOCK_ROWS)

    def blocks() -> None:
        for block in range(NUM_BLOCKS):
            some = rows(block * BLOCK_ROWS, BLOCK_ROWS)
            kernels.project(x, some, 0, hidden)
            hidden.fill_(1.0)
            kernels.accumulate(hidden, some, y)

    order = torch.randperm(len(weights), generator=torch.Generator().manual_seed(0)).int()
    picked = [order[start : start + 2 * BLOCK_ROWS] for start in range(0, len(order), 2 * BLOCK_ROWS)]
    scattered_hidden = torch.ones(1, 2 * BLOCK_ROWS)

    def scattered() -> None:
        for slots in picked:
            some = rows(0, len(slots))
            some.slots = slots
            kernels.project(x, some, 0, scattered_hidden[:, : len(slots)].contiguous())
            kernels.accumulate(scattered_hidden[:, : len(slots)].contiguous(), some, y)

    gemm_s = _best_s(_gemm(dtype, weights))
    return ProductRates(
        dtype=dtype,
        matrix_gb_per_s=num_bytes / _best_s(lambda: kernels.project(x, matrix, 0, outputs)) / 1e9,
        block_gb_per_s=num_bytes / _best_s(blocks) / 1e9,
        scattered_gb_per_s=num_bytes / _best_s(scattered) / 1e9,
        gemm_gflop_per_s=2 * GEMM_TOKENS * BLOCK_ROWS * HIDDEN / gemm_s / 1e9,
    )


def _gemm(dtype: str, weights: torch.Tensor) -> Callable[[], object]:
    """Return one block's product with many tokens, the way the engine makes it for this dtype."""
    block = weights[:BLOCK_ROWS, :HIDDEN]
    if kernels.choose_strategy(dtype) == "native":
        tokens = torch.randn(GEMM_TOKENS, HIDDEN).to(weights.dtype)
        return lambda: F.linear(tokens, block)
    wide, tokens = torch.empty(BLOCK_ROWS, HIDDEN), torch.randn(GEMM_TOKENS, HIDDEN)
    stride_bytes = weights.stride(0) * weights.element_size()
    rows = kernels.RowBlock(weights.data_ptr(), BLOCK_ROWS, stride_bytes, HIDDEN, weights.dtype, PARTS)

    def widened() -> None:
        kernels.widen(rows, 0, wide)
        F.linear(tokens, wide)

    return widened


def overlap_shares(file: ProbeFile) -> tuple[float, float]:
    """Return the shares of the reading and the computing rate that are left while both run."""
    weights = torch.zeros(16384, HIDDEN, dtype=torch.bfloat16)
    matrix = kernels.RowBlock(weights.data_ptr(), len(weights), HIDDEN * 2, HIDDEN, weights.dtype, 1)
    x, out = torch.randn(1, HIDDEN), torch.empty(1, len(weights))
    depth = min(STREAM_DEPTH, file.num_bytes // STREAM_BYTES)
    buffer = AlignedBuffer(depth * STREAM_BYTES)
    buffer.numpy()[:] = 1
    kernels.project(x, matrix, 0, out)
    with Reader() as reader, reader.open(file.path) as opened:

        def stream(until_s: float) -> float:
            """Read in sequence until then; return blocks a second."""
            tickets: deque[Ticket] = deque()
            started_s, num_begun, num_done = time.perf_counter(), 0, 0
            while time.perf_counter() < until_s or tickets:
                while len(tickets) < depth and time.perf_counter() < until_s:
                    offset = num_begun * STREAM_BYTES % (file.num_bytes // STREAM_BYTES * STREAM_BYTES)
                    slot = num_begun % depth * STREAM_BYTES
                    tickets.append(reader.submit([ReadRequest(opened, offset, STREAM_BYTES, buffer, slot)]))
                    num_begun += 1
                if tickets:
                    reader.wait(tickets.popleft())
                    num_done += 1
            return num_done / (time.perf_counter() - started_s)

        def compute(until_s: float, rates: list[float]) -> None:
            started_s, count = time.perf_counter(), 0
            while time.perf_counter() < until_s:
                kernels.project(x, matrix, 0, out)
                count += 1
            rates.append(count / (time.perf_counter() - started_s))

        reading, computing = [], []
        for _ in range(NUM_ROUNDS // 2 + 1):
            alone_read = stream(time.perf_counter() + OVERLAP_S / 2)
            alone: list[float] = []
            compute(time.perf_counter() + OVERLAP_S / 2, alone)
            both: list[float] = []
            until_s = time.perf_counter() + OVERLAP_S
            worker = threading.Thread(target=compute, args=(until_s, both))
            worker.start()
            reading.append(stream(until_s) / alone_read)
            worker.join()
            computing.append(both[0] / alone[0])
    return min(statistics.median(reading), 1.0), min(statistics.median(computing), 1.0)


def block_overhead_s() -> float:
    """Return the time that a block costs beside its bytes: two kernel calls and an activation on next to nothing."""
    weights = torch.zeros(16, 2 * 64)
    rows = kernels.RowBlock(weights.data_ptr(), 16, 2 * 64 * 4, 64, torch.float32, 2)
    x, y = torch.zeros(1, 64), torch.zeros(1, 64)

    def blocks() -> None:
        for _ in range(100):
            hidden = torch.empty(1, 16)
            kernels.project(x, rows, 0, hidden)
            kernels.accumulate(F.relu(hidden), rows, y)

    return _best_s(blocks) / 100


def layer_overhead_s() -> float:
    """Return the time of a decoder layer of transformers for one token, from the difference of two tiny models."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def token_s(num_layers: int) -> float:
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=num_layers
        )
        model = LlamaForCausalLM(config).eval()
        past = model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).past_key_values
        one = torch.zeros(1, 1, dtype=torch.long)
        return _best_s(lambda: model(one, past_key_values=past, use_cache=True), 10)

    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the engine does for a token
    try:
        with torch.no_grad():
            return max(token_s(12) - token_s(2), 0.0) / 10
    finally:
        torch.set_num_threads(num_threads)


def manage_row_s() -> float:
    """Return the time of looking one row up in the neuron cache, misses among them."""
    num_rows, num_used = 16384, 1700
    cache = NeuronCache([LayerCapacity(num_rows=num_rows, num_slots=4000)])
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randperm(num_rows // 3, generator=generator)[:num_used].sort().values.int() for _ in range(24)]
    times = []
    for rows in tokens:
        started_s = time.perf_counter()
        cache.acquire(0, rows)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[4:]) / num_used
