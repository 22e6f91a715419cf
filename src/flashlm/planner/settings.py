"""The settings of a loaded model, made once: from what was asked for, then a saved plan, then the environment.

`make_settings` is the only place that parses them. What it makes is frozen and handed on as one object, through
transformers too (`FlashConfig` holds it), so nothing is parsed twice. What is unknown, or is given and has no effect, is
announced by name.
"""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from flashlm.errors import ConfigError
from flashlm.planner.choices import (
    ACTIVATIONS,
    CHECKS,
    EXPERT_POLICIES,
    MODES,
    Activations,
    CheckChoice,
    ExpertPolicyChoice,
    Mode,
)
from flashlm.planner.plan_document import Plan, load_plan
from flashlm.planner.plan_use import PlannedReads, PlanUse, use_plan
from flashlm.sizes import parse_budget_bytes, parse_size_bytes

logger = logging.getLogger(__name__)

Name = TypeVar("Name", bound=str)

ENV_PREFIX = "FLASHLM_"
ENV_DRAM, ENV_MODE, ENV_CONTEXT, ENV_CHECK = "FLASHLM_DRAM", "FLASHLM_MODE", "FLASHLM_CONTEXT", "FLASHLM_CHECK"
# Read elsewhere: where profiles are kept, how files are read, which kernels run, whether programs that do not import
# flashlm know packs, and what training does with freed memory.
OTHER_VARIABLES = (
    "FLASHLM_AUTOLOAD",
    "FLASHLM_CACHE",
    "FLASHLM_IO_BACKEND",
    "FLASHLM_KEEP_FREED_MEMORY",
    "FLASHLM_SIMD",
)
VARIABLES = (ENV_DRAM, ENV_MODE, ENV_CONTEXT, ENV_CHECK, *OTHER_VARIABLES)


class Asked(TypedDict, total=False):
    """What may be asked for when a pack is loaded, as users write it. What is None or left out comes from elsewhere.

    Attributes:
        dram: Bound on the whole process ("6GiB" or bytes). Else the plan's, `FLASHLM_DRAM`, or what the machine or the
            cgroup has free, less a margin.
        mode: "auto" (sparse where a calibration met its error budget and it is expected to be faster, else hybrid),
            "hybrid", "sparse" or "naive"; a pack of experts runs in "experts", whatever is left to choose from. Else the
            plan's, `FLASHLM_MODE`, or "auto".
        context: Tokens that the KV cache may hold, of all sequences and beams together. Else the plan's,
            `FLASHLM_CONTEXT`, or 2048.
        pin: Pin no more of what is streamed than this ("1GiB" or bytes; 0 pins none). Else all that dram leaves.
        plan: File that `flashlm plan --save` wrote.
        expert_policy: What the cache of a pack of experts keeps: "lru", "lfu", "pinned" (needs a calibration), or "auto",
            what a calibration found best for the cache's size; without one lru. The output is the same with each.
        check: What is held against the pack's checksums: "load" what is read while loading, "all" what is streamed later
            too, "none" nothing. Else `FLASHLM_CHECK`, or "load".
        activations: "exact", or "int8": tokens are rounded to 8 bits for their products with weights in q8_0, q4_0 and
            the like, which is faster and not exact. Else the plan's, or "exact".
    """

    dram: str | int | None
    mode: str | None
    context: str | int | None
    pin: str | int | None
    plan: str | Path | None
    expert_policy: str | None
    check: str | None
    activations: str | None


NAMES = tuple(Asked.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What a user has chosen for loading a pack, parsed and checked.

    Attributes:
        dram_bytes: Bound on the whole process; None takes what the machine or the cgroup has free, less a margin.
        mode: `hybrid` pins what fits and streams the rest ahead of the compute; `naive` keeps nothing; `sparse` reads the
            rows that predictors ask for (approximate; needs a calibration); `experts` is what packs of experts run in;
            `auto` picks.
        context: Tokens that the KV cache may hold, of all sequences and beams together; None means `DEFAULT_CONTEXT`.
        pin_bytes: Pin no more of what is streamed than this, whatever dram leaves; None is no further bound. In mode
            `experts`: hold no more experts than fit this, or the floor.
        expert_policy: What the cache of mode `experts` keeps: what was used last (`lru`), used most often, recent
            uses counting more (`lfu`), or
            `lru` beside the experts that a calibration saw most (`pinned`); `auto`: what the calibration found best for the
            cache's size, `lru` without one. No choice changes a bit of the output.
        check: What is held against the pack's checksums: `load` everything that is read while loading (resident weights,
            pinned blocks, the first rows and experts of a cache), `all` what is streamed later too, `none` nothing.
        activations: What tokens are multiplied as with encoded weights: `exact` in fp32, `int8` rounded to 8 bits.
        plan: The plan that some of this comes from, and what of it does not count; None without one.
    """

    dram_bytes: int | None = None
    mode: Mode = "auto"
    context: int | None = None
    pin_bytes: int | None = None
    expert_policy: ExpertPolicyChoice = "auto"
    check: CheckChoice = "load"
    activations: Activations = "exact"
    plan: PlanUse | None = None

    def __post_init__(self) -> None:
        """Refuse values out of range."""
        _one_of("mode", self.mode, MODES)
        _one_of("expert_policy", self.expert_policy, EXPERT_POLICIES)
        _one_of("check", self.check, CHECKS)
        _one_of("activations", self.activations, ACTIVATIONS)
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

    @property
    def reads(self) -> PlannedReads | None:
        """How the plan reads; None without one that counts: then `decide` finds it by the device's profile."""
        return None if self.plan is None else self.plan.reads

    @property
    def is_checked(self) -> bool:
        """Whether what is read while loading is held against checksums."""
        return self.check != "none"


def make_settings(**asked: Unpack[Asked]) -> Settings:
    """Return settings from what was asked for; what is None comes from the plan, then from the environment.

    Raises:
        ConfigError: A value that can't be read or is out of range, or a name that is none of `Asked`.
    """
    if unknown := [name for name in asked if name not in NAMES]:
        raise ConfigError(f"there is no setting {_guessed(unknown, NAMES)}: there are {', '.join(NAMES)}")
    for line in unknown_variables(os.environ):
        logger.warning("%s", line)
    dram, mode, context = asked.get("dram"), asked.get("mode"), as_tokens(asked.get("context"))
    dram_bytes = None if dram is None else parse_budget_bytes(dram)
    activations = asked.get("activations")
    used: PlanUse | None = None
    if (plan := asked.get("plan")) is not None:
        planned = load_plan(Path(plan))
        given = {"dram_bytes": dram_bytes, "mode": mode, "context": context, "activations": activations}
        used = use_plan(Path(plan), planned, given, _overruled(planned, given))
        dram_bytes = planned.dram_bytes if dram_bytes is None else dram_bytes
        mode = planned.mode if mode is None else mode
        context = planned.context if context is None else context
        activations = planned.activations if activations is None else activations
    if dram_bytes is None and (text := os.environ.get(ENV_DRAM)):
        dram_bytes = parse_budget_bytes(text)
    if context is None:
        context = as_tokens(os.environ.get(ENV_CONTEXT) or None)
    pin = asked.get("pin")
    return Settings(
        dram_bytes=dram_bytes,
        mode=as_mode(mode or os.environ.get(ENV_MODE) or "auto"),
        context=context,
        pin_bytes=None if pin is None else parse_size_bytes(pin, allow_zero=True),
        expert_policy=_one_of("expert_policy", asked.get("expert_policy") or "auto", EXPERT_POLICIES),
        check=_one_of("check", asked.get("check") or os.environ.get(ENV_CHECK) or "load", CHECKS),
        activations=_one_of("activations", activations or "exact", ACTIVATIONS),
        plan=used,
    )


def as_mode(mode: str) -> Mode:
    """Return the mode of a name.

    Raises:
        ConfigError: There is none.
    """
    return _one_of("mode", mode, MODES)


def as_tokens(context: int | str | None) -> int | None:
    """Return a number of tokens as users write it.

    Raises:
        ConfigError: It is none, or below 1.
    """
    if context is None:
        return None
    number = int(context) if isinstance(context, str) and context.isdigit() else context
    if not isinstance(number, int) or number < 1:
        raise ConfigError(f"context={context!r} must be a whole number of tokens, at least 1")
    return number


def unknown_variables(environment: Mapping[str, str]) -> list[str]:
    """Return one sentence for each variable that looks like one of ours and is none."""
    unknown = sorted(name for name in environment if name.startswith(ENV_PREFIX) and name not in VARIABLES)
    return [f"{_guessed([name], VARIABLES)} of the environment is unknown, and not used" for name in unknown]


def _one_of(what: str, value: Any, known: tuple[Name, ...]) -> Name:
    """Return the one of `known` that `value` is.

    Raises:
        ConfigError: It is none.
    """
    for each in known:
        if value == each:
            return each
    raise ConfigError(f"{what}={value!r} is unknown: choose one of {', '.join(known)}")


def _guessed(names: Collection[str], known: Collection[str]) -> str:
    """Return names with what may have been meant."""
    shown = []
    for name in names:
        near = difflib.get_close_matches(name, known, n=1)
        shown.append(f"{name} (did you mean {near[0]}?)" if near else name)
    return ", ".join(shown)


def _overruled(planned: Plan, given: Mapping[str, object]) -> dict[str, str]:
    """Return the environment variables that a plan goes before, of those that say another thing."""
    said = {"dram_bytes": ENV_DRAM, "mode": ENV_MODE, "context": ENV_CONTEXT}
    found = {}
    for name, variable in said.items():
        text = os.environ.get(variable)
        if not text or given[name] is not None:
            continue
        value = parse_size_bytes(text) if name == "dram_bytes" else text
        if str(value) != str(getattr(planned, name)):
            found[variable] = text
    return found
