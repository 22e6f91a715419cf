"""What can be chosen by name, listed once: modes, expert policies, checks, activations.

Imports nothing, so that `--help` may read it.
"""

from __future__ import annotations

from typing import Literal, get_args

ResolvedMode = Literal["hybrid", "sparse", "naive", "experts"]
"""How a pack runs."""
Mode = Literal["auto", ResolvedMode]
"""What may be asked for; `auto` leaves the choice to `decide`."""
ExpertPolicyChoice = Literal["auto", "lru", "lfu", "pinned"]
CheckChoice = Literal["load", "all", "none"]
Activations = Literal["exact", "int8"]
"""What tokens are multiplied as with encoded weights: in fp32, or rounded to 8 bits."""

MODES: tuple[Mode, ...] = get_args(Mode)
EXPERT_POLICIES: tuple[ExpertPolicyChoice, ...] = get_args(ExpertPolicyChoice)
CHECKS: tuple[CheckChoice, ...] = get_args(CheckChoice)
ACTIVATIONS: tuple[Activations, ...] = get_args(Activations)
