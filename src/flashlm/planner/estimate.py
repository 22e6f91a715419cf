"""What a token and a prompt cost in each mode, from a model's shape, a placement and a machine's rates."""

from __future__ import annotations

import math
from dataclasses import dataclass

from flashlm.memory.budget import Placement
from flashlm.memory.neuron_cache import LayerCapacity
from flashlm.planner.cost import (
    TokenCost,
    gemm_s,
    merged_reads,
    multiply_s,
    new_rows,
    overlapped_s,
    pause_idle_s,
    read_totals,
    scattered_read_s,
    stream_s,
)
from flashlm.planner.rates import Rates
from flashlm.planner.shape import RELU_NAMES, ModelShape, SparseShape
from flashlm.rows.layout import LayerLayout

SLOWER_WHILE_READING = 1.3  # what a pause takes beside reads that land, of the time alone (docs/experiments.md)
UNKNOWN_RELU_SHARE = 0.5  # of a ReLU FFN's neurons firing, where no calibration says: random weights


@dataclass(frozen=True, kw_only=True)
class DenseUse:
    """What an exact mode computes with: the share of each layer's neurons whose activation is not zero."""

    firing_share: float


def dense_use(shape: ModelShape) -> DenseUse:
    """Return how many neurons fire: all without exact zeros; what calibration saw, or half, with a ReLU."""
    if shape.activation not in RELU_NAMES:
        return DenseUse(firing_share=1.0)
    if shape.sparse is None:
        return DenseUse(firing_share=UNKNOWN_RELU_SHARE)
    shares = shape.sparse.active_shares
    return DenseUse(firing_share=sum(shares) / len(shares))


@dataclass(frozen=True, kw_only=True)
class RowBytes:
    """The bytes of a row that one token's arithmetic reads on average: the parts of its dot products, and its down part."""

    up: float
    down: float

    @property
    def total(self) -> float:
        """Both."""
        return self.up + self.down


def dense_row_bytes(layout: LayerLayout, firing_share: float) -> RowBytes:
    """Return what a row costs in whole blocks: gate and up always, down where the neuron fires."""
    part = layout.row_bytes / layout.num_parts
    return RowBytes(up=part * (layout.num_parts - 1), down=part * firing_share)


def sparse_row_bytes(layout: LayerLayout, firing_share: float) -> RowBytes:
    """Return what a predicted row costs: its trigger always, the rest where the neuron fires."""
    part = layout.row_bytes / layout.num_parts
    return RowBytes(up=part * (1 + (layout.num_parts - 2) * firing_share), down=part * firing_share)


def _block_bytes(shape: ModelShape) -> int:
    return max(layout.block_stride_bytes for layout in shape.layouts)


def exact_token(
    shape: ModelShape, placement: Placement, rates: Rates, use: DenseUse, *, reads_ahead: bool
) -> TokenCost:
    """Return the cost of a token in `hybrid` (`reads_ahead`) or `naive`.

    What is streamed is read in one sequence. `hybrid` reads through everything that is computed, as far as its staging
    holds what lands meanwhile; `naive` only while a layer's own blocks are computed, and attention waits.
    """
    rows = [(layout, dense_row_bytes(layout, use.firing_share)) for layout in shape.layouts]
    num_blocks = sum(placement.num_pinned) + sum(placement.num_streamed)
    streamed_cpu_s = sum(placement.num_streamed) * rates.block_cpu_s(_block_bytes(shape))
    ffn_s = (
        multiply_s(sum(layout.num_rows * row.up for layout, row in rows), rates.block_up_gb_per_s)
        + multiply_s(sum(layout.num_rows * row.down for layout, row in rows), rates.block_down_gb_per_s)
        + _num_runs(shape, placement) * rates.block_overhead_s
        + streamed_cpu_s
    )
    rest_s = _matrices_s(shape, rates) + _transformers_s(shape, rates)
    gb_per_s = rates.block_read_gb_per_s(_block_bytes(shape))
    read_s = stream_s(placement.streamed_bytes, gb_per_s)
    compute_s = ffn_s + rest_s
    if reads_ahead:
        pinned_s = (ffn_s - streamed_cpu_s) * sum(placement.num_pinned) / num_blocks
        output_s = multiply_s(shape.output_bytes, rates.matrix_gb_per_s)
        idle_s = _idle_s(shape, placement, gb_per_s, rest_s + pinned_s - output_s, output_s)
        total_s = max(overlapped_s(read_s + idle_s, compute_s, rates.overlap), idle_s)
    else:
        total_s = overlapped_s(read_s, ffn_s, rates.overlap) + rest_s
    touched = shape.matrix_bytes + sum(layout.num_rows * row.total for layout, row in rows)
    return TokenCost(
        io_s=max(total_s - compute_s, 0.0),
        manage_s=0.0,
        compute_s=min(compute_s, total_s),
        read_bytes=placement.streamed_bytes,
        num_reads=sum(placement.num_streamed),
        touched_bytes=touched,
        flash_bound_s=read_s,
        memory_bound_s=multiply_s(touched, rates.memory_gb_per_s),
    )


def _matrices_s(shape: ModelShape, rates: Rates) -> float:
    return multiply_s(shape.matrix_bytes, rates.matrix_gb_per_s) + shape.num_matrices * rates.matrix_overhead_s


def _transformers_s(shape: ModelShape, rates: Rates) -> float:
    return rates.token_overhead_s + len(shape.layouts) * rates.layer_overhead_s


def _num_runs(shape: ModelShape, placement: Placement) -> int:
    """Return the calls for blocks in a token: pinned and streamed ones join apart (`LayerLayout.run_blocks`)."""
    return sum(
        -(-num_pinned // layout.run_blocks) - (-num_streamed // layout.run_blocks)
        for layout, num_pinned, num_streamed in zip(
            shape.layouts, placement.num_pinned, placement.num_streamed, strict=True
        )
    )


def _idle_s(shape: ModelShape, placement: Placement, gb_per_s: float, layers_s: float, output_s: float) -> float:
    """Return how long the device idles in a token: after every layer's pause, and after the output layer's, too."""
    if not placement.streamed_bytes:
        return 0.0

    def idle_s(pause_s: float) -> float:
        return pause_idle_s(pause_s, placement.num_slots, placement.slot_bytes, gb_per_s)

    pause_s = layers_s / len(shape.layouts) * SLOWER_WHILE_READING
    return (len(shape.layouts) - 1) * idle_s(pause_s) + idle_s(pause_s + output_s * SLOWER_WHILE_READING)


def sparse_token(
    shape: ModelShape,
    sparse: SparseShape,
    capacities: tuple[LayerCapacity, ...],
    rates: Rates,
    *,
    max_gap: int = 0,
) -> TokenCost:
    """Return the cost of a token in mode `sparse`, layer by layer: predict, look up, read, compute hits, compute misses.

    The dot products of hits are computed while misses land; everything else is in sequence. A layer that needs more rows
    than it has slots for goes through them in several passes.
    """
    num_passes = 0
    io_s = manage_s = read_bytes = num_reads = up_bytes = down_bytes = flash_s = 0.0
    for layout, use, share, capacity in zip(shape.layouts, sparse.uses, sparse.active_shares, capacities, strict=True):
        used = (use.use_curve[0] if use.use_curve else 1.0) * layout.num_rows
        missing = min(new_rows(use, capacity.num_slots), used)
        row = sparse_row_bytes(layout, min(share / (used / layout.num_rows), 1.0) if used else 0.0)
        reads = merged_reads(missing, layout.num_rows, max_gap)
        hits_s = multiply_s((used - missing) * row.up, rates.row_up_gb_per_s)
        layer_read_s = scattered_read_s(
            reads, layout.row_stride_bytes, rates.random_read_gb_per_s, segment_s=rates.segment_s
        )
        flash_s += layer_read_s
        passes = max(math.ceil(used / capacity.num_slots), 1) if capacity.num_slots else 1
        num_passes += passes
        if missing:
            layer_read_s += passes * rates.batch_latency_s
        io_s += overlapped_s(layer_read_s, hits_s, rates.overlap) - hits_s
        manage_s += used * rates.manage_row_s
        bytes_, reads_ = read_totals(reads, layout.row_stride_bytes)
        read_bytes += bytes_
        num_reads += reads_
        up_bytes += used * row.up
        down_bytes += used * row.down
    compute_s = (
        _matrices_s(shape, rates)
        + _transformers_s(shape, rates)
        + multiply_s(sparse.predictor_bytes, rates.predictor_gb_per_s)
        + multiply_s(up_bytes, rates.row_up_gb_per_s)
        + multiply_s(down_bytes, rates.row_down_gb_per_s)
        + num_passes * rates.sparse_layer_overhead_s
    )
    touched = shape.matrix_bytes + sparse.predictor_bytes + up_bytes + down_bytes
    return TokenCost(
        io_s=io_s,
        manage_s=manage_s,
        compute_s=compute_s,
        read_bytes=read_bytes,
        num_reads=num_reads,
        touched_bytes=touched,
        flash_bound_s=flash_s,
        memory_bound_s=multiply_s(touched, rates.memory_gb_per_s),
    )


def prompt_s(shape: ModelShape, placement: Placement, rates: Rates, num_tokens: int, chunk_tokens: int) -> float:
    """Return the time of a prompt, in chunks: each reads what is streamed once while it is multiplied."""
    weights = (shape.matrix_bytes + shape.streamed_bytes) / shape.layouts[0].row_bytes
    num_weights = weights * shape.layouts[0].num_parts * shape.layouts[0].hidden_size
    num_chunks = max(math.ceil(num_tokens / chunk_tokens), 1)
    read_s = num_chunks * stream_s(placement.streamed_bytes, rates.block_read_gb_per_s(_block_bytes(shape)))
    return overlapped_s(read_s, gemm_s(num_weights, num_tokens, rates.gemm_gflop_per_s), rates.overlap)
