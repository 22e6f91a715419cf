"""Sizes and times written for people: one parser and one formatter for the whole project (`GiB` = 2^30, `GB` = 10^9)."""

from __future__ import annotations

import re

from flashlm.errors import ConfigError

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS[f"{_letter}ib"] = 1 << (10 * _power)
    _UNITS[_letter] = 1 << (10 * _power)
    _UNITS[f"{_letter}b"] = 1000**_power

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)


LEAST_BUDGET_BYTES = 1 << 20  # no model runs in less: a bare number below it was meant in another unit


def parse_size_bytes(size: str | int, *, allow_zero: bool = False) -> int:
    """Return a size in bytes from `8GiB`, `1.5 GB`, `900M` (binary) or a plain number of bytes.

    Raises:
        ConfigError: Not a size, an unknown unit, or not positive (below zero where zero is allowed).
    """
    if isinstance(size, int) and not isinstance(size, bool):
        size_bytes = size
    else:
        match = _SIZE.fullmatch(str(size))
        if match is None or match.group(2).lower() not in _UNITS:
            raise ConfigError(f"{size!r} is not a size: write it like 6GiB, 900MiB, 8GB, or a number of bytes")
        size_bytes = int(float(match.group(1)) * _UNITS[match.group(2).lower()])
    if size_bytes < 0 or (size_bytes == 0 and not allow_zero):
        raise ConfigError(f"a size must {'not be below' if allow_zero else 'be above'} zero, got {size!r}")
    return size_bytes


def parse_budget_bytes(size: str | int) -> int:
    """Return a memory budget in bytes: as `parse_size_bytes`, with a hint where the unit was forgotten.

    Raises:
        ConfigError: As there, or below 1 MiB.
    """
    size_bytes = parse_size_bytes(size)
    if size_bytes >= LEAST_BUDGET_BYTES:
        return size_bytes
    number = str(size).strip()
    hint = f": did you mean {number}GiB?" if number.isdigit() else ": give more"
    raise ConfigError(f"dram={number} is {size_bytes} bytes, and no model runs in so little{hint}")


def format_size(size_bytes: float) -> str:
    """Return `size_bytes` as people read it, in binary units: `6.50 GiB`, `12.0 MiB`, `512 B`."""
    for unit, digits in (("TiB", 2), ("GiB", 2), ("MiB", 1), ("KiB", 1)):
        scale = _UNITS[unit.lower()]
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"
