"""What every forward pass cost: bytes and reads, time waiting for flash, time in all; summed for prompt and decode."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from flashlm.engine.counters import Counters

MAX_RECORDS = 100_000


@dataclass(kw_only=True, slots=True)
class ForwardRecord(Counters):
    """One forward pass of the whole model: what `Counters` count, and besides

    Attributes:
        num_sequences: Sequences in the batch.
        num_tokens: Tokens per sequence; more than one is a prompt (prefill).
        wall_s: Time of the pass.
    """

    num_sequences: int
    num_tokens: int
    wall_s: float

    @property
    def is_prefill(self) -> bool:
        """Whether several tokens of a sequence were processed at once."""
        return self.num_tokens > 1

    @property
    def compute_s(self) -> float:
        """Time in which the pass was not waiting for flash."""
        return self.wall_s - self.wait_s


@dataclass(kw_only=True, slots=True)
class PhaseSummary(Counters):
    """Sums over passes of one phase; `tokens_per_s` counts the tokens of all sequences."""

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


class Telemetry:
    """Collects a `ForwardRecord` per forward pass from a model's running counters."""

    def __init__(self, counters: Counters) -> None:
        self.records: deque[ForwardRecord] = deque(maxlen=MAX_RECORDS)
        self._counters = counters
        self._before = replace(counters)
        self._started_s: float | None = None

    def begin(self) -> None:
        """Mark the start of a forward pass."""
        self._before = replace(self._counters)
        self._started_s = time.perf_counter()

    def end(self, *, num_sequences: int, num_tokens: int) -> None:
        """Record the pass that `begin` started."""
        if self._started_s is None:
            return
        self.records.append(
            ForwardRecord(
                num_sequences=num_sequences,
                num_tokens=num_tokens,
                wall_s=time.perf_counter() - self._started_s,
                **_differences(self._counters, self._before),
            )
        )
        self._started_s = None

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()

    def prefill(self) -> PhaseSummary:
        """Sum over the passes that processed prompts."""
        return _summarise(record for record in self.records if record.is_prefill)

    def decode(self) -> PhaseSummary:
        """Sum over the passes that produced one token per sequence."""
        return _summarise(record for record in self.records if not record.is_prefill)


def _differences(now: Counters, before: Counters) -> dict[str, Any]:
    return {each.name: getattr(now, each.name) - getattr(before, each.name) for each in fields(Counters)}


def _summarise(records: Iterable[ForwardRecord]) -> PhaseSummary:
    rows = list(records)
    return PhaseSummary(
        num_passes=len(rows),
        num_tokens=sum(row.num_sequences * row.num_tokens for row in rows),
        wall_s=sum(row.wall_s for row in rows),
        **{each.name: sum(getattr(row, each.name) for row in rows) for each in fields(Counters)},
    )
