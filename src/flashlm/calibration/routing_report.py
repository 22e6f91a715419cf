"""What a routing calibration found, for people and for programs."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flashlm.calibration.expert_rows import RowReadBound, bound_row_reads, break_even
from flashlm.errors import ConfigError
from flashlm.pack.manifest import Manifest
from flashlm.planner.machine import stored_rates
from flashlm.sizes import format_size
from flashlm.sparsity.routing import Routing

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RowReads:
    """Whether reading rows of experts apart could pay.

    Attributes:
        expert_bytes, row_bytes: What is read of an expert, and of one of its rows.
        bound: At the zeros that were measured; None where this device has no profile.
        break_even_zero_share: Zeros from which on it could; None where this device has no profile.
    """

    expert_bytes: int
    row_bytes: int
    bound: RowReadBound | None
    break_even_zero_share: float | None

    def verdict(self) -> str:
        """Return one line."""
        if self.bound is None or self.break_even_zero_share is None:
            return "not judged: this device has no profile (`flashlm probe` makes one)"
        speedup = self.bound.max_speedup
        rows = f"rows of {format_size(self.row_bytes)}; break-even at {self.break_even_zero_share:.0%} zeros"
        if self.bound.can_win:
            return f"at most {speedup:.2f} times as fast as a whole expert, if foreseen perfectly ({rows})"
        return f"can't win: takes {1 / speedup:.1f} times as long as a whole expert, if foreseen perfectly ({rows})"


def judge_row_reads(pack: Path, manifest: Manifest, routing: Routing) -> RowReads | None:
    """Return what reading rows apart could gain on the pack's device; None without zeros, or rows that lie by themselves."""
    zeros = [layer.zero_share for layer in routing.layers if layer.zero_share is not None]
    layout = manifest.experts[0].layout
    if not zeros or layout.is_by_block:
        return None
    sizes = {"expert_bytes": layout.read_bytes(0), "row_bytes": layout.row_stride_bytes}
    try:
        rates = stored_rates(pack, manifest.dtype)
    except ConfigError as error:
        logger.warning("reading rows of experts is not judged: %s", error)
        rates = None
    if rates is None:
        return RowReads(**sizes, bound=None, break_even_zero_share=None)
    stream_gb_per_s = rates.block_read_gb_per_s(sizes["expert_bytes"])
    return RowReads(
        **sizes,
        bound=bound_row_reads(
            **sizes,
            zero_share=sum(zeros) / len(zeros),
            stream_gb_per_s=stream_gb_per_s,
            random_gb_per_s=rates.random_read_gb_per_s,
        ),
        break_even_zero_share=break_even(
            **sizes, stream_gb_per_s=stream_gb_per_s, random_gb_per_s=rates.random_read_gb_per_s
        ),
    )


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """The whole calibration.

    Attributes:
        pack: The pack's folder.
        window_tokens: Tokens of a window; each starts without a past.
        num_active: Experts of a token in each layer.
        routing: What was written.
        row_reads: Whether reading rows of experts apart could pay; None where activations have no exact zeros, or rows
            don't lie by themselves.
        wall_s: Time that it took.
    """

    pack: Path
    window_tokens: int
    num_active: tuple[int, ...]
    routing: Routing
    row_reads: RowReads | None
    wall_s: float

    def layer_rows(self) -> list[tuple[str, ...]]:
        """Return the table of layers, its header first."""
        table: list[tuple[str, ...]] = [("layer", "experts", "a token's", "unused", "top 1/8", "top 1/4", "zeros")]
        for index, (layer, active) in enumerate(zip(self.routing.layers, self.num_active, strict=True)):
            table.append(
                (
                    str(index),
                    str(len(layer.counts)),
                    str(active),
                    str(layer.counts.count(0)),
                    f"{layer.top_share(1 / 8):.1%}",
                    f"{layer.top_share(1 / 4):.1%}",
                    "-" if layer.zero_share is None else f"{layer.zero_share:.1%}",
                )
            )
        return table

    def rows(self) -> list[tuple[str, str]]:
        """Return the summary."""
        rows = self.routing.rows()
        rows[0] = (rows[0][0], f"{rows[0][1]} in windows of {self.window_tokens}")
        if self.row_reads is not None:
            rows.append(("reading rows apart", self.row_reads.verdict()))
        return [
            *rows,
            (
                "policies replayed on",
                f"{self.routing.num_replayed_tokens} tokens, one by one, that pinning knew nothing of",
            ),
            ("time", f"{self.wall_s:.0f} s"),
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        reads = self.row_reads
        return {
            "pack": str(self.pack),
            "window_tokens": self.window_tokens,
            "num_active": list(self.num_active),
            "wall_s": self.wall_s,
            "row_reads": None
            if reads is None
            else {
                "expert_bytes": reads.expert_bytes,
                "row_bytes": reads.row_bytes,
                "max_speedup": None if reads.bound is None else reads.bound.max_speedup,
                "break_even_zero_share": reads.break_even_zero_share,
                "verdict": reads.verdict(),
            },
            **self.routing.model_dump(mode="json"),
        }
