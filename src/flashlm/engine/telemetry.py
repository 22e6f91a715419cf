"""What every forward pass cost: bytes and reads, time waiting for flash, time in all; summed for each phase."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from flashlm.engine.counters import Counters
from flashlm.engine.forward_pass import Pass, Phase
from flashlm.sizes import format_size

MAX_RECORDS = 100_000


@dataclass(kw_only=True, slots=True, repr=False)
class ForwardRecord(Counters):
    """One forward pass of the whole model: what `Counters` count, and besides

    Attributes:
        phase: "prompt", "decode" or "verify"; of prompts and decoded tokens side by side, "prompt".
        num_sequences: Sequences in the batch.
        num_tokens: Tokens per sequence; sequences of different lengths packed in one row count as one.
        wall_s: Time of the pass.
    """

    phase: Phase
    num_sequences: int
    num_tokens: int
    wall_s: float

    @property
    def is_prefill(self) -> bool:
        """Whether the pass processed a prompt."""
        return self.phase == "prompt"

    @property
    def compute_s(self) -> float:
        """Time in which the pass was not waiting for flash."""
        return self.wall_s - self.wait_s

    def __repr__(self) -> str:
        """Show what it was and what it took; `dataclasses.asdict` has everything."""
        return (
            f"<{self.phase} pass: {self.num_sequences} x {self.num_tokens} tokens in {1e3 * self.wall_s:.1f} ms,"
            f" {format_size(self.bytes_read)} read>"
        )


@dataclass(kw_only=True, slots=True, repr=False)
class PhaseSummary(Counters):
    """Sums over passes of one phase; `tokens_per_s` counts the tokens of all sequences."""

    phase: Phase
    num_passes: int
    num_tokens: int
    wall_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens per second, or None before the first pass."""
        return self.num_tokens / self.wall_s if self.wall_s else None

    @property
    def read_gb_per_s(self) -> float | None:
        """Bytes read per second of the phase's time in 10^9, or None before the first pass."""
        return self.bytes_read / self.wall_s / 1e9 if self.wall_s else None

    @property
    def wait_share(self) -> float | None:
        """Share of the time spent waiting for flash, or None before the first pass."""
        return self.wait_s / self.wall_s if self.wall_s else None

    @property
    def hit_share(self) -> float | None:
        """Share of the rows asked for that the neuron cache held, or None where no rows were asked for."""
        asked = self.hit_rows + self.miss_rows
        return self.hit_rows / asked if asked else None

    @property
    def expert_hit_share(self) -> float | None:
        """Share of the experts asked for that the expert cache held, or None where none were asked for."""
        asked = self.hit_experts + self.miss_experts
        return self.hit_experts / asked if asked else None

    def to_dict(self) -> dict[str, Any]:
        """Return fields and rates as JSON-ready values."""
        names = ("tokens_per_s", "read_gb_per_s", "wait_share", "hit_share", "expert_hit_share")
        return asdict(self) | {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        """Show speed, traffic and waiting; `to_dict` has everything."""
        if not self.num_passes:
            return f"<{self.phase}: no passes>"
        passes = "1 pass" if self.num_passes == 1 else f"{self.num_passes} passes"
        speed = "" if self.tokens_per_s is None else f", {self.tokens_per_s:.2f} tokens/s"
        waited = "" if self.wait_share is None else f", {self.wait_share:.0%} of the time waiting"
        read = f", {format_size(self.bytes_read / self.num_passes)} read a pass"
        return f"<{self.phase}: {self.num_tokens} tokens in {passes}{speed}{read}{waited}>"


class Telemetry:
    """Collects a `ForwardRecord` per forward pass, of all threads in the order in which they end.

    Attributes:
        records: The last passes.
    """

    def __init__(self) -> None:
        self.records: deque[ForwardRecord] = deque(maxlen=MAX_RECORDS)

    def add(self, ended: Pass) -> None:
        """Record a pass that has ended."""
        counted = {each.name: getattr(ended.counters, each.name) for each in fields(Counters)}
        self.records.append(
            ForwardRecord(
                phase=ended.phase,
                num_sequences=ended.num_sequences,
                num_tokens=ended.num_tokens,
                wall_s=ended.wall_s,
                **counted,
            )
        )

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()

    def prefill(self) -> PhaseSummary:
        """Sum over the passes that processed prompts."""
        return self._summary("prompt")

    def decode(self) -> PhaseSummary:
        """Sum over the passes that took one token per sequence."""
        return self._summary("decode")

    def verify(self) -> PhaseSummary:
        """Sum over the passes that checked drafted tokens."""
        return self._summary("verify")

    def _summary(self, phase: Phase) -> PhaseSummary:
        return _summarise(phase, [record for record in list(self.records) if record.phase == phase])


def _summarise(phase: Phase, rows: Iterable[ForwardRecord]) -> PhaseSummary:
    rows = list(rows)
    return PhaseSummary(
        phase=phase,
        num_passes=len(rows),
        num_tokens=sum(row.num_sequences * row.num_tokens for row in rows),
        wall_s=sum(row.wall_s for row in rows),
        **{each.name: sum(getattr(row, each.name) for row in rows) for each in fields(Counters)},
    )
