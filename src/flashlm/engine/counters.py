"""Traffic and time: of one forward pass, or a model's totals."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class Counters:
    """What the streamed layers have read, found in DRAM and waited for.

    Attributes:
        bytes_read: Bytes read from flash for rows that were consumed; gaps that were read through count.
        num_reads: Reads that took: blocks, runs of rows, or experts.
        pinned_bytes: Bytes of pinned blocks consumed; a linear layer that is pinned as a whole is an ordinary one, whose
            bytes do not count.
        num_pinned: Pinned blocks consumed.
        hit_rows: Rows that the neuron cache held.
        miss_rows: Rows that it did not.
        hit_experts: Experts that the expert cache held; one that several tokens need counts once.
        miss_experts: Experts that it did not.
        wait_s: Time spent waiting for reads to land.
        submit_s: Time spent handing reads to the system.
        manage_s: Time spent on the neuron cache's bookkeeping (the paper's memory management).
        predict_s: Time spent predicting rows.
    """

    bytes_read: int = 0
    num_reads: int = 0
    pinned_bytes: int = 0
    num_pinned: int = 0
    hit_rows: int = 0
    miss_rows: int = 0
    hit_experts: int = 0
    miss_experts: int = 0
    wait_s: float = 0.0
    submit_s: float = 0.0
    manage_s: float = 0.0
    predict_s: float = 0.0

    def add(self, other: Counters) -> None:
        """Add what another has counted; callers see to it that nobody else adds meanwhile."""
        for each in fields(Counters):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))
