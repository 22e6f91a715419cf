"""The plan as a document: made by `flashlm plan`, saved as JSON, and given back to `generate` or `load`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from flashlm.documents import DocumentKind, Strict
from flashlm.errors import ConfigError
from flashlm.planner.choices import Activations, ResolvedMode

PLAN_VERSION: Literal[4] = 4
MAX_PLAN_BYTES = 1 << 20


class Plan(Strict):
    """A placement and settings that can be saved and given back.

    Attributes:
        plan_version: Version of this document.
        source: What was planned for, by name.
        outline: Its streamed layers, by which a plan of another model is known.
        dram_bytes, context: The budget and the KV cache's tokens that it was made for.
        mode: To run in.
        activations: What tokens are multiplied as with encoded weights.
        is_exact: Whether every weight takes part in every token, and activations are not rounded.
        max_gap: Rows between two missing ones that are read through (mode `sparse`).
        window: Tokens whose rows the neuron cache holds in the median layer (mode `sparse`; the paper's k); else 0.
        hit_share: Of a token's experts, those found in memory (mode `experts`); else none.
        staging_bytes: How far reading goes ahead of the compute: the look-ahead of `hybrid`.
        piece_bytes, queue_depth: Size of a read and reads in flight.
        token_s, prompt_s: Expected, one token and a prompt of `prompt_tokens`.
        io_s, manage_s, compute_s: What the token is made of.
        read_bytes, num_reads: What a token reads.
        roofline_s: No program can be faster with these bytes.
        resident_bytes, pinned_bytes, cache_bytes, disk_bytes: Where the weights are.
        would_help: The resource of which twice as much would save most.
    """

    plan_version: Literal[4] = PLAN_VERSION
    source: str
    outline: str
    dram_bytes: Annotated[int, Field(gt=0)]
    context: Annotated[int, Field(gt=0)]
    mode: ResolvedMode
    activations: Activations = "exact"
    is_exact: bool
    max_gap: Annotated[int, Field(ge=0, le=64)] = 0
    window: Annotated[int, Field(ge=0)] = 0
    hit_share: Annotated[float, Field(ge=0, le=1)] | None = None
    staging_bytes: Annotated[int, Field(ge=0)]
    piece_bytes: Annotated[int, Field(ge=4096, le=16 << 20, multiple_of=4096)]
    queue_depth: Annotated[int, Field(ge=1, le=4096)]
    token_s: float
    prompt_s: float
    prompt_tokens: int
    io_s: float
    manage_s: float
    compute_s: float
    read_bytes: float
    num_reads: float
    roofline_s: float
    resident_bytes: int
    pinned_bytes: int
    cache_bytes: int
    disk_bytes: int
    would_help: str

    @property
    def tokens_per_s(self) -> float:
        """Decode speed."""
        return 1.0 / self.token_s


_KIND = DocumentKind(
    model=Plan,
    version_key="plan_version",
    max_bytes=MAX_PLAN_BYTES,
    advice="make a plan with `flashlm plan PACK --dram SIZE --save FILE`",
    error=ConfigError,
)


def save_plan(plan: Plan, path: Path) -> None:
    """Write a plan as JSON.

    Raises:
        StorageError: It can't be written.
    """
    _KIND.write(path, plan)


def load_plan(path: Path) -> Plan:
    """Read a plan that `save_plan` wrote.

    Raises:
        ConfigError: There is none, or it is damaged or of another version.
    """
    plan = _KIND.read(path)
    if plan is None:
        raise ConfigError(f"the plan {path} is not there: {_KIND.advice}")
    return plan
