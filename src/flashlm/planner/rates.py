"""The rates that the cost model multiplies with: what a device profile says about one dtype, as plain numbers."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from flashlm.planner.cost import Overlap


@dataclass(frozen=True, kw_only=True)
class ReadSetting:
    """One way to read: pieces of so many bytes, so many in flight, and the rate that was measured with it."""

    piece_bytes: int
    queue_depth: int
    gb_per_s: float


@dataclass(frozen=True, kw_only=True)
class EncodedProducts:
    """Rates of products with weights of one encoding, of encoded bytes.

    Attributes:
        matrix_gb_per_s: Of one token with whole matrices.
        up_gb_per_s, down_gb_per_s: With the gate and up parts, and with the down part, of blocks.
        expert_gb_per_s: With groups of experts.
        gemm_gflop_per_s: Of many tokens.
    """

    matrix_gb_per_s: float
    up_gb_per_s: float
    down_gb_per_s: float
    expert_gb_per_s: float
    gemm_gflop_per_s: float


@dataclass(frozen=True, kw_only=True)
class Rates:
    """Rates of one machine for one dtype. GB are 1e9 bytes.

    Attributes:
        stream_gb_per_s: By block size in bytes: sequential reads, as the engine makes them.
        random_gb_per_s: By read size in bytes: random reads at saturation.
        batch_latency_s: From submitting a batch of random reads to the first landing: what a batch costs beside its bytes.
        segment_s: What a read takes longer for each further row, since each lands in a place of its own.
        memory_gb_per_s: A plain read of memory.
        matrix_gb_per_s: Products of one token with whole resident matrices.
        block_up_gb_per_s, block_down_gb_per_s: With the up (or gate) and the down parts of the rows of blocks.
        row_up_gb_per_s, row_down_gb_per_s: With those of scattered rows of the neuron cache.
        expert_gb_per_s: With groups of experts.
        predictor_gb_per_s: With row predictors.
        gemm_gflop_per_s: Products of many tokens, as the engine makes them.
        block_overhead_s: Of a call for a run of blocks in an exact mode, beside its bytes.
        read_cpu_s: By block size in bytes: what the processor takes to begin and end the read of a block.
        token_overhead_s: Of transformers for one token, outside the layers and without weights.
        matrix_overhead_s: Of one product with a resident matrix, beside its bytes and what such a product takes in torch.
        expert_layer_overhead_s: Of one layer of experts: its router, sorting what it says, adding up.
        expert_group_overhead_s: Of the experts of a layer that are computed together, beside their bytes.
        layer_overhead_s: Of one decoder layer in transformers and in ours, for one token, without weights.
        sparse_layer_overhead_s: Of one layer in mode `sparse`, beside weights, predictor, lookup and reads.
        manage_row_s: Looking one row up in the neuron cache.
        overlap: What reading and computing at once leave of each other.
        stream_settings: Ways to read blocks in sequence; empty where none were compared.
        random_settings: Ways to read rows, with `piece_bytes` the size of a read.
        encoded: Products with weights that are not of the dtype, by encoding, where they keep a source's groups.
    """

    stream_gb_per_s: Mapping[int, float]
    random_gb_per_s: Mapping[int, float]
    batch_latency_s: float = 0.0
    segment_s: float = 0.0
    memory_gb_per_s: float = math.inf
    matrix_gb_per_s: float = math.inf
    block_up_gb_per_s: float = math.inf
    block_down_gb_per_s: float = math.inf
    row_up_gb_per_s: float = math.inf
    row_down_gb_per_s: float = math.inf
    expert_gb_per_s: float = math.inf
    predictor_gb_per_s: float = math.inf
    gemm_gflop_per_s: float = math.inf
    block_overhead_s: float = 0.0
    read_cpu_s: Mapping[int, float] = field(default_factory=dict)
    token_overhead_s: float = 0.0
    matrix_overhead_s: float = 0.0
    layer_overhead_s: float = 0.0
    sparse_layer_overhead_s: float = 0.0
    expert_layer_overhead_s: float = 0.0
    expert_group_overhead_s: float = 0.0
    manage_row_s: float = 0.0
    overlap: Overlap = field(default_factory=Overlap)
    stream_settings: tuple[ReadSetting, ...] = ()
    random_settings: tuple[ReadSetting, ...] = ()
    encoded: Mapping[str, EncodedProducts] = field(default_factory=dict)

    def of(self, encoding: str) -> EncodedProducts:
        """Return the rates of products with weights of an encoding: those of the dtype where it was not measured."""
        return self.encoded.get(encoding) or EncodedProducts(
            matrix_gb_per_s=self.matrix_gb_per_s,
            up_gb_per_s=self.block_up_gb_per_s,
            down_gb_per_s=self.block_down_gb_per_s,
            expert_gb_per_s=self.expert_gb_per_s,
            gemm_gflop_per_s=self.gemm_gflop_per_s,
        )

    def random_read_gb_per_s(self, num_bytes: float) -> float:
        """Return the rate of random reads of a size."""
        return _between(self.random_gb_per_s, num_bytes)

    def block_cpu_s(self, num_bytes: float) -> float:
        """Return what the processor takes to begin and end the read of a block of a size: the nearest one measured."""
        if not self.read_cpu_s:
            return 0.0
        return self.read_cpu_s[min(self.read_cpu_s, key=lambda size: abs(math.log(size / num_bytes)))]

    def block_read_gb_per_s(self, num_bytes: float) -> float:
        """Return the rate of a stream of blocks of a size."""
        return _between(self.stream_gb_per_s, num_bytes)

    def piece_read_gb_per_s(self, piece_bytes: int, queue_depth: int) -> float:
        """Return the rate of reads from anywhere, in pieces: the nearest size and depth measured, else a stream's."""
        if not self.random_settings:
            return self.block_read_gb_per_s(piece_bytes)

        def distance(setting: ReadSetting) -> tuple[float, float]:
            size, depth = setting.piece_bytes / piece_bytes, setting.queue_depth / queue_depth
            return abs(math.log(size)), abs(math.log(depth))

        return min(self.random_settings, key=distance).gb_per_s


def _between(rates: Mapping[int, float], num_bytes: float) -> float:
    """Return a rate at a size: between two measured sizes on the line through their logarithms.

    Below the smallest size the number of reads a second stays; above the largest, the rate.
    """
    sizes = sorted(rates)
    if num_bytes <= sizes[0]:
        return rates[sizes[0]] * num_bytes / sizes[0]
    if num_bytes >= sizes[-1]:
        return rates[sizes[-1]]
    after = bisect.bisect_right(sizes, num_bytes)
    low, high = sizes[after - 1], sizes[after]
    share = math.log(num_bytes / low) / math.log(high / low)
    return rates[low] * math.exp(share * math.log(rates[high] / rates[low]))
