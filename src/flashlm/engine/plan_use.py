"""A saved plan and what becomes of it when a pack is loaded: what of it counts, and whether it is of this model at all."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from flashlm.errors import ConfigError
from flashlm.pack.manifest import Manifest
from flashlm.planner.outline import outline_of_pack
from flashlm.planner.plan_document import Plan
from flashlm.sizes import format_size

logger = logging.getLogger(__name__)

READ_SETTINGS = ("max_gap", "staging_bytes", "piece_bytes", "queue_depth")  # found for one budget and one mode


@dataclass(frozen=True, kw_only=True)
class PlanUse:
    """A plan that was given for a loading, beside other settings.

    Attributes:
        path: Its file.
        plan: What it says.
        notes: What of it, or of the environment, does not count, and why; ready for people.
        reads: The settings that count only for the plan's own budget and mode; empty for another.
    """

    path: Path
    plan: Plan
    notes: tuple[str, ...]
    reads: dict[str, int]


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
        asked: `dram_bytes`, `mode` and `context` as given; None for what the plan shall say.
        environment: Variables that would have said the same, and say another thing than the plan.
    """
    differing = [name for name, value in asked.items() if value not in (None, getattr(plan, name))]
    notes = [
        f"its {_shown(name, getattr(plan, name))} ({_shown(name, asked[name])} was asked for)" for name in differing
    ]
    reads = {name: getattr(plan, name) for name in READ_SETTINGS}
    if {"dram_bytes", "mode"} & set(differing):
        notes.append(
            "its " + ", ".join(f"{name}={value}" for name, value in reads.items()) + " (found for its own run)"
        )
        reads = {}
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
