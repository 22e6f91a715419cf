"""The settings of a loaded model: how much memory, which mode, how long a context."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from flashlm.engine.plan_use import PlanUse, use_plan
from flashlm.errors import ConfigError
from flashlm.planner.plan_document import Plan, load_plan
from flashlm.sizes import parse_budget_bytes, parse_size_bytes

Mode = Literal["auto", "naive", "hybrid", "sparse", "experts"]
ResolvedMode = Literal["naive", "hybrid", "sparse", "experts"]
ExpertPolicyChoice = Literal["auto", "lru", "lfu", "pinned"]
CheckChoice = Literal["load", "all", "none"]
ENV_DRAM, ENV_MODE, ENV_CONTEXT, ENV_CHECK = "FLASHLM_DRAM", "FLASHLM_MODE", "FLASHLM_CONTEXT", "FLASHLM_CHECK"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user may choose when loading a pack.

    Attributes:
        dram_bytes: Bound on the whole process; None takes what the machine or the cgroup has free, less a margin.
        mode: `hybrid` pins what fits and streams the rest ahead of the compute; `naive` keeps nothing; `sparse` reads the
            rows that predictors ask for (approximate; needs a calibration); `experts` is what packs of experts run in;
            `auto` picks.
        context: Tokens that the KV cache may hold, of all sequences and beams together; None means `DEFAULT_CONTEXT`.
        pin_bytes: Pin no more of the streamed rows than this, whatever dram leaves; None is no further bound. In mode
            `experts`: hold no more experts than fit this, or the floor.
        expert_policy: What the cache of mode `experts` keeps: what was used last (`lru`), used most of late (`lfu`), or
            `lru` beside the experts that a calibration saw most (`pinned`); `auto`: what the calibration found best for the
            cache's size, `lru` without one. No choice changes a bit of the output.
        check: What is held against the pack's checksums: `load` everything that is read while loading (resident weights,
            pinned blocks, the first rows and experts of a cache), `all` what is streamed later too, `none` nothing.
        max_gap: Rows between two missing ones that are read through (mode `sparse`); this and what follows, None: as the
            planner says, from the device's profile; without one, defaults.
        staging_bytes: How far blocks are read ahead.
        piece_bytes, queue_depth: Size of a read and reads in flight.
        plan: The plan that some of this comes from, and what of it does not count; None without one.
    """

    dram_bytes: int | None = None
    mode: Mode = "auto"
    context: int | None = None
    pin_bytes: int | None = None
    expert_policy: ExpertPolicyChoice = "auto"
    check: CheckChoice = "load"
    max_gap: int | None = None
    staging_bytes: int | None = None
    piece_bytes: int | None = None
    queue_depth: int | None = None
    plan: PlanUse | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        if self.mode not in get_args(Mode):
            raise ConfigError(f"mode={self.mode!r} is unknown: choose one of {', '.join(get_args(Mode))}")
        if self.expert_policy not in get_args(ExpertPolicyChoice):
            known = ", ".join(get_args(ExpertPolicyChoice))
            raise ConfigError(f"expert_policy={self.expert_policy!r} is unknown: choose one of {known}")
        if self.check not in get_args(CheckChoice):
            raise ConfigError(f"check={self.check!r} is unknown: choose one of {', '.join(get_args(CheckChoice))}")
        if self.dram_bytes is not None and self.dram_bytes <= 0:
            raise ConfigError(f"dram must be above zero, got {self.dram_bytes}")
        if self.context is not None and (not isinstance(self.context, int) or self.context < 1):
            raise ConfigError(f"context={self.context!r} must be a whole number of tokens, at least 1")
        if self.pin_bytes is not None and self.pin_bytes < 0:
            raise ConfigError(f"pin must not be below zero, got {self.pin_bytes}")

    @property
    def max_pinned_bytes(self) -> int | None:
        """The most that may be pinned beside what `dram` allows."""
        return 0 if self.mode == "naive" else self.pin_bytes


def make_settings(
    dram: str | int | None = None,
    mode: str | None = None,
    context: int | str | None = None,
    pin: str | int | None = None,
    plan: str | Path | None = None,
    expert_policy: str | None = None,
    check: str | None = None,
) -> Settings:
    """Return settings from arguments; what is None comes from `plan`, then `FLASHLM_DRAM`, `_MODE`, `_CONTEXT`, `_CHECK`.

    Raises:
        ConfigError: A value that can't be read or is out of range.
    """
    used: PlanUse | None = None
    if plan is not None:
        planned = load_plan(Path(plan))
        asked = {
            "dram_bytes": None if dram is None else parse_budget_bytes(dram),
            "mode": mode,
            "context": _as_number(context),
        }
        used = use_plan(Path(plan), planned, asked, _overruled(planned, asked))
        dram = planned.dram_bytes if dram is None else dram
        mode = planned.mode if mode is None else mode
        context = planned.context if context is None else context
    dram = dram if dram is not None else os.environ.get(ENV_DRAM) or None
    mode = mode if mode is not None else os.environ.get(ENV_MODE) or "auto"
    context = context if context is not None else os.environ.get(ENV_CONTEXT) or None
    context = _as_number(context)
    check = check if check is not None else os.environ.get(ENV_CHECK) or "load"
    if isinstance(context, str):
        raise ConfigError(f"context={context!r} must be a whole number of tokens, at least 1")
    dram_bytes = None if dram is None else parse_budget_bytes(dram)
    pin_bytes = None if pin is None else parse_size_bytes(pin, allow_zero=True)
    return Settings(
        dram_bytes=dram_bytes,
        mode=mode,  # type: ignore[arg-type]  # checked there
        context=context,
        pin_bytes=pin_bytes,
        expert_policy="auto" if expert_policy is None else expert_policy,  # type: ignore[arg-type]  # checked there
        check=check,  # type: ignore[arg-type]  # checked there
        plan=used,
        **({} if used is None else used.reads),
    )


def _overruled(planned: Plan, asked: Mapping[str, object]) -> dict[str, str]:
    """Return the environment variables that a plan goes before, of those that say another thing."""
    said = {"dram_bytes": ENV_DRAM, "mode": ENV_MODE, "context": ENV_CONTEXT}
    found = {}
    for name, variable in said.items():
        text = os.environ.get(variable)
        if not text or asked[name] is not None:
            continue
        value = parse_size_bytes(text) if name == "dram_bytes" else text
        if str(value) != str(getattr(planned, name)):
            found[variable] = text
    return found


def _as_number(context: int | str | None) -> int | str | None:
    return int(context) if isinstance(context, str) and context.isdigit() else context
