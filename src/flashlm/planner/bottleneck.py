"""Which resource would make a plan faster: its cost with twice as much of each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from flashlm.planner.rates import Rates

MEMORY_RATES = (
    "matrix_gb_per_s", "block_up_gb_per_s", "block_down_gb_per_s", "row_up_gb_per_s", "row_down_gb_per_s",
    "expert_gb_per_s", "predictor_gb_per_s",
)  # fmt: skip


def would_help(token_s: Callable[[Rates, int], float], rates: Rates, dram_bytes: int) -> str:
    """Return of which resource twice as much would save most time.

    Args:
        token_s: The time of a token with given rates and dram.
        rates: The machine's.
        dram_bytes: The budget.
    """
    faster_flash = replace(
        rates,
        stream_gb_per_s={size: rate * 2 for size, rate in rates.stream_gb_per_s.items()},
        random_gb_per_s={size: rate * 2 for size, rate in rates.random_gb_per_s.items()},
        random_settings=tuple(replace(each, gb_per_s=each.gb_per_s * 2) for each in rates.random_settings),
    )
    encoded = {
        name: replace(
            each,
            matrix_gb_per_s=each.matrix_gb_per_s * 2,
            up_gb_per_s=each.up_gb_per_s * 2,
            down_gb_per_s=each.down_gb_per_s * 2,
            expert_gb_per_s=each.expert_gb_per_s * 2,
        )
        for name, each in rates.encoded.items()
    }
    faster_memory = replace(rates, encoded=encoded, **{name: getattr(rates, name) * 2 for name in MEMORY_RATES})
    times = {
        "flash speed": token_s(faster_flash, dram_bytes),
        "memory speed": token_s(faster_memory, dram_bytes),
        "dram": token_s(rates, dram_bytes * 2),
    }
    name = min(times, key=lambda each: times[each])
    return f"{name}: twice as much would give {token_s(rates, dram_bytes) / times[name]:.1f} x the speed"
