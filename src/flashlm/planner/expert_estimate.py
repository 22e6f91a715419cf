"""What a token and a prompt cost in mode `experts`, from the shape, the expert cache and a machine's rates."""

from __future__ import annotations

import math

from flashlm.memory.budget import Placement
from flashlm.memory.expert_budget import ExpertUse
from flashlm.planner.cost import TokenCost, gemm_s, multiply_s, overlapped_s, stream_s
from flashlm.planner.expert_shape import ExpertShape
from flashlm.planner.rates import Rates, ReadSetting
from flashlm.rows.kernels import choose_strategy
from flashlm.storage.reader import DEFAULT_PIECE_BYTES

# Pieces of 1 MiB in flight. Experts land one after the other rather than all at once at the end.
EXPERT_READS = ReadSetting(piece_bytes=DEFAULT_PIECE_BYTES, queue_depth=64, gb_per_s=0.0)
WIDENED_COPIES = 2  # what a prompt's expert is widened into is twice its size, written once and read once


def expert_token(shape: ExpertShape, placement: Placement, rates: Rates) -> TokenCost:
    """Return the cost of a token, layer by layer: route, begin to read what is missing, compute what is held, what lands.

    A layer's reads begin when its router has spoken and end before the next layer; the products of all but the last
    expert run beside them, where there is time. Each of a token's experts is missed with the probability that the curve
    of hits leaves, so that the number of misses in a layer is binomial: layers that miss nothing give no time to those
    that wait.
    """
    io_s = ffn_s = read_bytes = num_reads = touched = flash_s = 0.0
    for use, held in zip(shape.uses, _held(placement), strict=True):
        miss_share = 1.0 - shape.hits.hit_share(held / use.num_experts)
        expert_bytes = use.layout.read_bytes(0)
        one_read_s = stream_s(expert_bytes, read_gb_per_s(rates, expert_bytes))
        one_product_s = _expert_s(use, rates)
        for misses in range(use.num_active + 1):
            share = (
                math.comb(use.num_active, misses) * miss_share**misses * (1 - miss_share) ** (use.num_active - misses)
            )
            groups = misses + (misses < use.num_active)
            products_s = use.num_active * one_product_s + groups * rates.expert_group_overhead_s
            ffn_s += share * products_s
            if misses:
                read_s = misses * one_read_s + rates.batch_latency_s
                beside_s = overlapped_s(read_s, products_s - one_product_s, rates.overlap)
                io_s += share * (beside_s + one_product_s - products_s)
        num_misses = use.num_active * miss_share
        flash_s += num_misses * one_read_s
        read_bytes += num_misses * expert_bytes
        num_reads += num_misses
        touched += use.num_active * expert_bytes
    compute_s = (
        ffn_s
        + len(shape.uses) * rates.expert_layer_overhead_s
        + multiply_s(shape.matrix_bytes, rates.matrix_gb_per_s)
        + shape.num_matrices * rates.matrix_overhead_s
        + rates.token_overhead_s
        + shape.num_layers * rates.layer_overhead_s
    )
    touched += shape.matrix_bytes
    return TokenCost(
        io_s=io_s,
        manage_s=0.0,
        compute_s=compute_s,
        read_bytes=read_bytes,
        num_reads=num_reads,
        touched_bytes=touched,
        flash_bound_s=flash_s,
        memory_bound_s=multiply_s(touched, rates.memory_gb_per_s),
    )


def expert_prompt_s(shape: ExpertShape, placement: Placement, rates: Rates, num_tokens: int) -> float:
    """Return the time of a prompt: every expert that any of its tokens needs is read once while others are multiplied.

    With uniform routing, num_active of E experts a token, an expert is needed by one of T tokens with probability
    1 - (1 - num_active / E)^T.
    """
    read_s = widen_s = 0.0
    num_weights = shape.matrix_bytes / _weight_bytes(shape)
    for use, held in zip(shape.uses, _held(placement), strict=True):
        needed = use.num_experts * (1.0 - (1.0 - use.num_active / use.num_experts) ** num_tokens)
        expert_bytes = use.layout.read_bytes(0)
        read_s += stream_s(needed * (1.0 - held / use.num_experts) * expert_bytes, read_gb_per_s(rates, expert_bytes))
        if choose_strategy(shape.dtype) == "widen":
            widen_s += multiply_s(needed * expert_bytes * 2 * WIDENED_COPIES, rates.memory_gb_per_s)
        num_weights += use.num_active * use.layout.block_rows * use.layout.num_parts * use.layout.hidden_size
    compute_s = gemm_s(num_weights, num_tokens, rates.gemm_gflop_per_s) + widen_s
    return overlapped_s(read_s, compute_s, rates.overlap)


def read_gb_per_s(rates: Rates, expert_bytes: int) -> float:
    """Return the rate at which experts are read: pieces from anywhere, many in flight."""
    piece_bytes = min(expert_bytes, EXPERT_READS.piece_bytes)
    return rates.piece_read_gb_per_s(piece_bytes, EXPERT_READS.queue_depth)


def _expert_s(use: ExpertUse, rates: Rates) -> float:
    """Return the time of one token's products with an expert, beside what calls take."""
    return multiply_s(use.layout.block_rows * use.layout.row_bytes, rates.expert_gb_per_s)


def _held(placement: Placement) -> tuple[int, ...]:
    assert placement.experts is not None
    return placement.experts


def _weight_bytes(shape: ExpertShape) -> float:
    layout = shape.uses[0].layout
    return layout.row_bytes / (layout.num_parts * layout.hidden_size)
