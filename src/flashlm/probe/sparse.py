"""What mode `sparse` costs beside weights and reads: looking rows up, and the many small steps of a layer."""

from __future__ import annotations

import statistics
import time

import torch

from flashlm.memory.neuron_cache import LayerCapacity, NeuronCache
from flashlm.probe.timing import Cold
from flashlm.rows import kernels

NUM_ROWS, NUM_USED, NUM_SLOTS, WIDTH = 16384, 1700, 6000, 16


def _used_rows(num_tokens: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randperm(NUM_ROWS // 3, generator=generator)[:NUM_USED].sort().values.int() for _ in range(num_tokens)
    ]


def manage_row_s() -> float:
    """Return the time of looking one row up in the neuron cache, misses among them."""
    cache = NeuronCache([LayerCapacity(num_rows=NUM_ROWS, num_slots=4000)])
    times = []
    for rows in _used_rows(24):
        started_s = time.perf_counter()
        cache.acquire(0, rows)
        times.append(time.perf_counter() - started_s)
    return statistics.median(times[4:]) / NUM_USED


@torch.no_grad()
def sparse_layer_overhead_s() -> float:
    """Return the time of one layer's steps in mode `sparse` without weights worth the name, lookup and reads.

    The steps are the engine's: scores to rows, rows to slots, two groups of products, their hidden activations brought
    into order, and the accumulation.
    """
    cache = NeuronCache([LayerCapacity(num_rows=NUM_ROWS, num_slots=NUM_SLOTS)])
    weights = torch.ones(NUM_SLOTS, 2 * WIDTH)
    stride_bytes = 2 * WIDTH * weights.element_size()
    (used,) = _used_rows(1)
    lookup = cache.acquire(0, used)
    num_held = NUM_USED // 2
    scores = torch.full((1, NUM_ROWS), -1.0)
    scores[0, used.long()] = 1.0
    bias, tokens = torch.zeros(NUM_ROWS), torch.ones(1, WIDTH)

    def rows_in(slots: torch.Tensor) -> kernels.RowBlock:
        return kernels.RowBlock(weights.data_ptr(), len(slots), stride_bytes, WIDTH, torch.float32, 2, slots)

    def layer() -> None:
        output = torch.zeros(1, WIDTH)
        rows = (scores > 0.0)[0].nonzero().squeeze(1).to(torch.int32)
        order = lookup.order.long()
        grouped, slots = rows[order].long(), lookup.slots[order]
        hidden = torch.empty(1, len(rows))
        for part in (slice(0, num_held), slice(num_held, len(rows))):
            trigger = torch.empty(1, len(rows[part]))
            kernels.project(tokens, rows_in(slots[part]), 0, trigger, bias[grouped[part]])
            hidden[:, part] = torch.relu(trigger)
        ascending = torch.empty_like(hidden)
        ascending[:, order] = hidden
        kernels.accumulate(ascending, rows_in(lookup.slots), output)
        output.to(torch.bfloat16)

    with kernels.one_torch_thread():
        return Cold().median_s(layer, 50)
