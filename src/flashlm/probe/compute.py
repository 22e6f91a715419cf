"""What computing reaches: memory, the model's own overhead, and what reading and computing leave of each other."""

from __future__ import annotations

import statistics
import threading
import time
from collections import deque

import torch
from torch import nn

from flashlm.probe.file import ProbeFile
from flashlm.probe.timing import Cold, median_s
from flashlm.rows import kernels
from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest, Ticket

HIDDEN = 4096
MEMORY_BYTES = 512 << 20
STREAM_BYTES = 4 << 20
STREAM_DEPTH = 24
OVERLAP_S = 1.0
NUM_ROUNDS = 3
RUN_ROWS, RUN_WIDTH = 64, 64
NUM_LAYERS, NUM_TOKENS = (2, 12), 30


def memory_rates() -> tuple[float, float]:
    """Return (GB/s of a sum over memory, GB/s of filling fresh memory)."""
    started_s = time.perf_counter()
    fresh = torch.ones(MEMORY_BYTES // 4)
    touch_s = time.perf_counter() - started_s
    return MEMORY_BYTES / median_s(fresh.sum) / 1e9, MEMORY_BYTES / touch_s / 1e9


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
        for _ in range(NUM_ROUNDS):
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


@torch.no_grad()
def block_overhead_s() -> float:
    """Return the time of a call for a run of blocks beside its bytes: the engine's steps on next to nothing."""
    weights = torch.zeros(RUN_ROWS, 2 * RUN_WIDTH)
    relu = nn.ReLU()
    tokens, output, bias = torch.zeros(1, RUN_WIDTH), torch.zeros(1, RUN_WIDTH), torch.zeros(2 * RUN_ROWS)

    def run() -> None:
        rows = kernels.RowBlock(weights.data_ptr(), RUN_ROWS, 8 * RUN_WIDTH, RUN_WIDTH, torch.float32, 2)
        hidden = torch.empty(1, RUN_ROWS)
        kernels.project(tokens, rows, 0, hidden, bias[RUN_ROWS:])
        kernels.accumulate(relu(hidden), rows, output)

    with kernels.one_torch_thread():
        return Cold().median_s(run, 100)


@torch.no_grad()
def matrix_overhead_s() -> float:
    """Return what the steps of our product with a resident 16-bit matrix take, less those of torch's."""
    layer = nn.Linear(RUN_WIDTH, RUN_WIDTH, dtype=torch.bfloat16)
    narrow = torch.randn(1, 1, RUN_WIDTH, dtype=torch.bfloat16)

    def multiply() -> torch.Tensor:
        return kernels.linear(narrow, layer.weight, layer.bias)

    cold = Cold()
    with kernels.one_torch_thread():
        return max(cold.median_s(multiply, 100) - cold.median_s(lambda: layer(narrow), 100), 0.0)


def model_overheads_s() -> tuple[float, float]:
    """Return what one token takes in transformers beside weights: (of the model, of each decoder layer).

    From two tiny models with few and with more layers.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    cold = Cold()

    def token_s(num_layers: int) -> float:
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=64, num_attention_heads=4, num_hidden_layers=num_layers
        )
        model = LlamaForCausalLM(config).eval()
        past = model(torch.zeros(1, 8, dtype=torch.long), use_cache=True).past_key_values
        one = torch.zeros(1, 1, dtype=torch.long)
        passing_s: list[float] = []
        for layer in model.model.layers:
            for module in (layer, layer.mlp):
                module.register_forward_pre_hook(lambda *_: passing_s.append(cold.pass_weights()))
        times = []
        for _ in range(NUM_TOKENS):
            passing_s.clear()
            started_s = time.perf_counter()
            model(one, past_key_values=past, use_cache=True)
            times.append(time.perf_counter() - started_s - sum(passing_s))
        return statistics.median(times[1:])

    with kernels.one_torch_thread(), torch.no_grad():
        few, many = NUM_LAYERS
        few_s, many_s = token_s(few), token_s(many)
    layer_s = max(many_s - few_s, 0.0) / (many - few)
    return max(few_s - few * layer_s, 0.0), layer_s
