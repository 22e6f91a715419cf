"""What a token and a prompt cost in each mode, from a model's shape, a placement and a machine's rates.

Units of which a token uses every block (feed-forward and linear layers) are read in one sequence through the staging;
experts are read layer by layer, once their router has spoken. A model may have both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from flashlm.memory.budget import ExpertSlots, Placement
from flashlm.memory.needs import torch_dtype
from flashlm.pack.units import Unit, dense_units, of_kind
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
from flashlm.planner.rates import Rates, ReadSetting
from flashlm.planner.shape import RELU_NAMES, ModelShape, SparseShape
from flashlm.rows.kernels import choose_strategy
from flashlm.rows.layout import LayerLayout
from flashlm.storage.reader import DEFAULT_PIECE_BYTES

# Pieces of 1 MiB in flight. Experts land one after the other rather than all at once at the end.
EXPERT_READS = ReadSetting(piece_bytes=DEFAULT_PIECE_BYTES, queue_depth=64, gb_per_s=0.0)
WIDENED_COPIES = 2  # what a prompt's expert is widened into in fp32 is written once and read once
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
class TouchedBytes:
    """Bytes of a row or layer that one token's arithmetic reads on average: of its dot products, and of its down part."""

    up: float
    down: float

    @property
    def total(self) -> float:
        """Both."""
        return self.up + self.down


def dense_bytes(layout: LayerLayout, firing_share: float) -> TouchedBytes:
    """Return what a layer costs in whole blocks: gate and up always, down where the neuron fires, unless it lies whole."""
    *dots, down = (layout.part_bytes(index) for index in range(layout.num_parts))
    return TouchedBytes(up=sum(dots), down=down if layout.is_by_block else down * firing_share)


def sparse_row_bytes(layout: LayerLayout, firing_share: float) -> TouchedBytes:
    """Return what a predicted row costs: its trigger always, the rest where the neuron fires."""
    trigger, *others, down = (part.num_bytes for part in layout.placed)
    return TouchedBytes(up=trigger + sum(others) * firing_share, down=down * firing_share)


@dataclass(frozen=True, slots=True)
class _DensePart:
    """Feed-forward and linear layers in an exact mode.

    Attributes:
        ffn_s: Computing feed-forward layers.
        streamed_cpu_s: Of that, beginning and ending the reads of blocks of any unit.
        pinned_ffn_s: Of that, what needs no read.
        read_s: Reading at the device's rate.
        gb_per_s: That rate.
        touched_bytes: Bytes of feed-forward layers that the arithmetic reads from memory.
        streamed_matrix_s: Computing linear layers that are streamed.
    """

    ffn_s: float
    streamed_cpu_s: float
    pinned_ffn_s: float
    read_s: float
    gb_per_s: float
    touched_bytes: float
    streamed_matrix_s: float


@dataclass(frozen=True, slots=True)
class _ExpertPart:
    """Layers of experts: time, bytes and reads that are not hidden; see `_expert_part`."""

    io_s: float = 0.0
    products_s: float = 0.0
    read_bytes: float = 0.0
    num_reads: float = 0.0
    touched_bytes: float = 0.0
    flash_s: float = 0.0


def exact_token(
    shape: ModelShape, placement: Placement, rates: Rates, use: DenseUse, *, reads_ahead: bool
) -> TokenCost:
    """Return the cost of a token in an exact mode: `hybrid` and `experts` (`reads_ahead`) or `naive`.

    What is streamed of dense units is read in one sequence. `hybrid` reads through everything that is computed, as far as
    its staging holds what lands meanwhile; `naive` only while a layer's own blocks are computed, and attention waits.
    """
    dense, experts = _dense_part(shape, placement, rates, use), _expert_part(shape, placement, rates)
    ffn_s = dense.ffn_s + experts.products_s
    rest_s = (
        _matrices_s(shape, rates) + _transformers_s(shape, rates) + len(shape.experts) * rates.expert_layer_overhead_s
    )
    compute_s = ffn_s + rest_s
    if reads_ahead:
        output_s = multiply_s(shape.output_bytes, rates.of(shape.output_encoding).matrix_gb_per_s)
        pauses_s = rest_s + dense.pinned_ffn_s - output_s - dense.streamed_matrix_s
        idle_s = _idle_s(shape, placement, dense.gb_per_s, max(pauses_s, 0.0), output_s)
        total_s = max(overlapped_s(dense.read_s + idle_s, compute_s, rates.overlap), idle_s)
    else:
        total_s = overlapped_s(dense.read_s, ffn_s, rates.overlap) + rest_s
    total_s += experts.io_s
    touched = shape.matrix_bytes + dense.touched_bytes + experts.touched_bytes
    return TokenCost(
        io_s=max(total_s - compute_s, 0.0),
        manage_s=0.0,
        compute_s=min(compute_s, total_s),
        read_bytes=placement.ring_bytes + experts.read_bytes,
        num_reads=sum(each.num_streamed for each in placement.dense) + experts.num_reads,
        touched_bytes=touched,
        flash_bound_s=dense.read_s + experts.flash_s,
        memory_bound_s=multiply_s(touched, rates.memory_gb_per_s),
    )


def _dense_part(shape: ModelShape, placement: Placement, rates: Rates, use: DenseUse) -> _DensePart:
    placed = list(zip(dense_units(shape.units), placement.dense, strict=True))
    ffns = [(unit.layout, each) for unit, each in placed if unit.kind == "ffn"]
    touched = [dense_bytes(layout, use.firing_share) for layout, _ in ffns]
    block_bytes = _block_bytes(shape)
    gb_per_s = rates.block_read_gb_per_s(block_bytes) if block_bytes else math.inf
    streamed_cpu_s = sum(each.num_streamed for _, each in placed) * rates.block_cpu_s(block_bytes or 1)
    ffn_s = (
        sum(_ffn_s(layout, rates, use.firing_share) for layout, _ in ffns)
        # Pinned and streamed blocks join apart (`LayerLayout.run_blocks`); a matrix that is all pinned is one product.
        + sum(
            -(-each.num_pinned // layout.run_blocks) - (-each.num_streamed // layout.run_blocks)
            for layout, each in ffns
        )
        * rates.block_overhead_s
        + streamed_cpu_s
    )
    num_blocks = sum(layout.num_blocks for layout, _ in ffns)
    num_pinned = sum(each.num_pinned for _, each in ffns)
    matrices_s = sum(
        multiply_s(each.streamed_bytes, rates.of(unit.layout.encodings[0]).matrix_gb_per_s)
        for unit, each in placed
        if unit.kind == "linear"
    )
    return _DensePart(
        ffn_s=ffn_s,
        streamed_cpu_s=streamed_cpu_s,
        pinned_ffn_s=(ffn_s - streamed_cpu_s) * num_pinned / num_blocks if num_blocks else 0.0,
        read_s=stream_s(placement.ring_bytes, gb_per_s),
        gb_per_s=gb_per_s,
        touched_bytes=sum(each.total for each in touched),
        streamed_matrix_s=matrices_s,
    )


def _ffn_s(layout: LayerLayout, rates: Rates, firing_share: float) -> float:
    """Return the time of a feed-forward layer's products."""
    touched = dense_bytes(layout, firing_share)
    if not layout.is_by_block:
        return multiply_s(touched.up, rates.block_up_gb_per_s) + multiply_s(touched.down, rates.block_down_gb_per_s)
    *dots, down = layout.encodings
    up_s = sum(multiply_s(layout.part_bytes(index), rates.of(name).up_gb_per_s) for index, name in enumerate(dots))
    return up_s + multiply_s(touched.down, rates.of(down).down_gb_per_s)


def _experts_s(layout: LayerLayout, rates: Rates) -> float:
    """Return the time of the products of all of a layer's experts."""
    if not layout.is_by_block:
        return multiply_s(layout.weight_bytes, rates.expert_gb_per_s)
    parts = enumerate(layout.encodings)
    return sum(multiply_s(layout.part_bytes(index), rates.of(name).expert_gb_per_s) for index, name in parts)


def _gemm_s(layout: LayerLayout, rates: Rates, num_tokens: float) -> float:
    """Return the time of the products of a layer with so many tokens."""
    num_weights = layout.num_weights / layout.num_parts
    return sum(gemm_s(num_weights, num_tokens, rates.of(name).gemm_gflop_per_s) for name in layout.encodings)


def _expert_part(shape: ModelShape, placement: Placement, rates: Rates) -> _ExpertPart:
    """Return what layers of experts take: route, begin to read what is missing, compute what is held, what lands.

    A layer's reads begin when its router has spoken and end before the next layer; the products of all but the last
    expert run beside them, where there is time. Each of a token's experts is missed with the probability that the curve
    of hits leaves, so that the number of misses in a layer is binomial: layers that miss nothing give no time to those
    that wait.
    """
    io_s = products_sum_s = read_bytes = num_reads = touched = flash_s = 0.0
    for unit, held in _held_experts(shape, placement):
        miss_share = 1.0 - shape.hits.hit_share(held / unit.num_blocks)
        expert_bytes = unit.layout.read_bytes(0)
        one_read_s = stream_s(expert_bytes, expert_read_gb_per_s(rates, expert_bytes))
        one_product_s = _experts_s(unit.layout, rates) / unit.num_blocks
        for misses in range(unit.num_active + 1):
            share = (
                math.comb(unit.num_active, misses) * miss_share**misses * (1 - miss_share) ** (unit.num_active - misses)
            )
            groups = misses + (misses < unit.num_active)
            products_s = unit.num_active * one_product_s + groups * rates.expert_group_overhead_s
            products_sum_s += share * products_s
            if misses:
                read_s = misses * one_read_s + rates.batch_latency_s
                beside_s = overlapped_s(read_s, products_s - one_product_s, rates.overlap)
                io_s += share * (beside_s + one_product_s - products_s)
        num_misses = unit.num_active * miss_share
        flash_s += num_misses * one_read_s
        read_bytes += num_misses * expert_bytes
        num_reads += num_misses
        touched += unit.num_active * expert_bytes
    return _ExpertPart(io_s, products_sum_s, read_bytes, num_reads, touched, flash_s)


def hit_share(shape: ModelShape, cost: TokenCost, placement: Placement) -> float | None:
    """Return the share of a token's experts that are found in memory; None in a model without."""
    if not shape.experts:
        return None
    num_dense = sum(each.num_streamed for each in placement.dense)
    return 1.0 - (cost.num_reads - num_dense) / sum(unit.num_active for unit in shape.experts)


def _held_experts(shape: ModelShape, placement: Placement) -> Iterator[tuple[Unit, int]]:
    """Yield each layer of experts with the number of its experts that are held."""
    for unit, each in zip(shape.units, placement.units, strict=True):
        if isinstance(each, ExpertSlots):
            yield unit, each.num_slots


def expert_read_gb_per_s(rates: Rates, expert_bytes: int) -> float:
    """Return the rate at which experts are read: pieces from anywhere, many in flight."""
    piece_bytes = min(expert_bytes, EXPERT_READS.piece_bytes)
    return rates.piece_read_gb_per_s(piece_bytes, EXPERT_READS.queue_depth)


def _block_bytes(shape: ModelShape) -> int:
    return max((unit.layout.block_stride_bytes for unit in dense_units(shape.units)), default=0)


def _matrices_s(shape: ModelShape, rates: Rates) -> float:
    linears = [unit.layout for unit in of_kind(shape.units, "linear")]
    others_bytes = shape.matrix_bytes - sum(layout.weight_bytes for layout in linears)
    streamed_s = sum(multiply_s(each.weight_bytes, rates.of(each.encodings[0]).matrix_gb_per_s) for each in linears)
    return streamed_s + multiply_s(others_bytes, rates.matrix_gb_per_s) + shape.num_matrices * rates.matrix_overhead_s


def _transformers_s(shape: ModelShape, rates: Rates) -> float:
    return rates.token_overhead_s + shape.num_layers * rates.layer_overhead_s


def _idle_s(shape: ModelShape, placement: Placement, gb_per_s: float, layers_s: float, output_s: float) -> float:
    """Return how long the device idles in a token: after every layer's pause, and after the output layer's, too."""
    if not placement.ring_bytes:
        return 0.0

    def idle_s(pause_s: float) -> float:
        return pause_idle_s(pause_s, placement.num_slots, placement.slot_bytes, gb_per_s)

    pause_s = layers_s / shape.num_layers * SLOWER_WHILE_READING
    return (shape.num_layers - 1) * idle_s(pause_s) + idle_s(pause_s + output_s * SLOWER_WHILE_READING)


def sparse_token(
    shape: ModelShape,
    sparse: SparseShape,
    placement: Placement,
    rates: Rates,
    *,
    max_gap: int = 0,
) -> TokenCost:
    """Return the cost of a token in mode `sparse`, layer by layer: predict, look up, read, compute hits, compute misses.

    The dot products of hits are computed while misses land; everything else is in sequence. A layer that needs more rows
    than it has slots for goes through them in several passes. Linear layers are pinned.
    """
    num_passes = 0
    io_s = manage_s = read_bytes = num_reads = up_bytes = down_bytes = flash_s = 0.0
    for layout, use, share, capacity in zip(
        shape.layouts, sparse.uses, sparse.active_shares, placement.rows, strict=True
    ):
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
    """Return the time of a prompt, in chunks: each reads what is streamed once while it is multiplied.

    Every expert that any of a chunk's tokens needs is read once. With uniform routing, num_active of E experts a token, an
    expert is needed by one of T tokens with probability 1 - (1 - num_active / E)^T.
    """
    num_chunks = max(math.ceil(num_tokens / chunk_tokens), 1)
    linears = [unit.layout for unit in of_kind(shape.units, "linear")]
    other_weights = shape.matrix_weights - sum(layout.num_weights for layout in linears)
    compute_s = gemm_s(other_weights, num_tokens, rates.gemm_gflop_per_s)
    compute_s += sum(_gemm_s(layout, rates, num_tokens) for layout in (*linears, *shape.layouts))
    read_s = widen_s = 0.0
    if placement.ring_bytes:
        read_s = stream_s(placement.ring_bytes, rates.block_read_gb_per_s(_block_bytes(shape)))
    for unit, held in _held_experts(shape, placement):
        layout = unit.layout
        needed = unit.num_blocks * (1.0 - (1.0 - unit.num_active / unit.num_blocks) ** min(num_tokens, chunk_tokens))
        expert_bytes = layout.read_bytes(0)
        missing_bytes = needed * (1.0 - held / unit.num_blocks) * expert_bytes
        read_s += stream_s(missing_bytes, expert_read_gb_per_s(rates, expert_bytes))
        if choose_strategy(layout, torch_dtype(shape.dtype)) == "widen":
            wide_bytes = layout.block_rows * layout.num_parts * layout.hidden_size * 4
            widen_s += multiply_s(needed * wide_bytes * WIDENED_COPIES, rates.memory_gb_per_s)
        compute_s += _gemm_s(layout, rates, num_tokens * unit.num_active / unit.num_blocks)
    return overlapped_s(num_chunks * read_s, compute_s + num_chunks * widen_s, rates.overlap)
