"""A saved plan and what becomes of it when a pack is loaded: what of it counts, and whether it is of this model at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path

from flashlm.errors import ConfigError
from flashlm.pack.manifest import Manifest
from flashlm.planner.outline import outline_of_pack
from flashlm.planner.plan_document import Plan
from flashlm.sizes import format_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class PlannedReads:
    """How a plan reads; found for one budget and one mode, and of no use for others.

    Attributes:
        max_gap: Rows between two missing ones that are read through (mode `sparse`).
        staging_bytes: How far blocks are read ahead.
        piece_bytes, queue_depth: Size of a read and reads in flight.
    """

    max_gap: int
    staging_bytes: int
    piece_bytes: int
    queue_depth: int


@dataclass(frozen=True, kw_only=True)
class PlanUse:
    """A plan that was given for a loading, beside other settings.

    Attributes:
        path: Its file.
        plan: What it says.
        notes: What of it, or of the environment, does not count, and why; ready for people.
        reads: How it reads; None where another budget or mode was asked for than it was made for.
    """

    path: Path
    plan: Plan
    notes: tuple[str, ...]
    reads: PlannedReads | None


def use_plan(
    path: Path,
    plan: Plan,
    asked: Mapping[str, object],
    environment: Mapping[str, str],
) -> PlanUse:
    """Compare a plan with what was asked for beside it.

    Args:
        path: The plan's file.
        plan: The plan.
        asked: `dram_bytes`, `mode`, `context` and `activations` as given; None for what the plan shall say.
        environment: Variables that would have said the same, and say another thing than the plan.
    """
    differing = [name for name, value in asked.items() if value not in (None, getattr(plan, name))]
    notes = [
        f"its {_shown(name, getattr(plan, name))} ({_shown(name, asked[name])} was asked for)" for name in differing
    ]
    reads: PlannedReads | None = PlannedReads(
        max_gap=plan.max_gap,
        staging_bytes=plan.staging_bytes,
        piece_bytes=plan.piece_bytes,
        queue_depth=plan.queue_depth,
    )
    if {"dram_bytes", "mode"} & set(differing):
        its = ", ".join(f"{each.name}={getattr(plan, each.name)}" for each in fields(PlannedReads))
        notes.append(f"its {its} (found for its own run)")
        reads = None
    notes += [f"{name}={value} of the environment (the plan goes before it)" for name, value in environment.items()]
    return PlanUse(path=path, plan=plan, notes=tuple(notes), reads=reads)


def check_plan(use: PlanUse | None, pack: Path, manifest: Manifest) -> None:
    """Refuse a plan of a model with other layers, and say in one warning what of a plan does not count.

    Raises:
        ConfigError: The plan is another model's.
    """
    if use is None:
        return
    plan, here = use.plan, outline_of_pack(manifest)
    if plan.outline != here:
        raise ConfigError(
            f"the plan {use.path} is of another model: it was made for {plan.source} ({plan.outline}), but {pack} is"
            f" {here}. Make one with `flashlm plan {pack} --save FILE`"
        )
    said = [f"not used: {'; '.join(use.notes)}"] if use.notes else []
    if not _is_same_source(plan.source, pack, manifest):
        said.insert(0, f"it was made for {plan.source}, and this pack is {pack}, whose layers are alike")
    if said:
        logger.warning("plan %s: %s", use.path, "; ".join(said))


def _is_same_source(source: str, pack: Path, manifest: Manifest) -> bool:
    """Return whether a plan's source is the pack, or what the pack was converted from."""
    return any(
        source == str(known) or Path(source).expanduser().absolute() == Path(known).expanduser().absolute()
        for known in (pack, manifest.source.name)
    )


def _shown(name: str, value: object) -> str:
    return f"dram {format_size(value)}" if name == "dram_bytes" and isinstance(value, int) else f"{name} {value}"
