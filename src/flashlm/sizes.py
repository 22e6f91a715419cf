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


def parse_size_bytes(size: str | int) -> int:
    """Return a size in bytes from `8GiB`, `1.5 GB`, `900M` (binary) or a plain number of bytes.

    Raises:
        ConfigError: Not a size, an unknown unit, or not positive.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        size_bytes = size
    else:
        match = _SIZE.fullmatch(str(size))
        if match is None or match.group(2).lower() not in _UNITS:
            raise ConfigError(f"{size!r} is not a size: write it like 6GiB, 900MiB, 8GB, or a number of bytes")
        size_bytes = int(float(match.group(1)) * _UNITS[match.group(2).lower()])
    if size_bytes <= 0:
        raise ConfigError(f"a size must be above zero, got {size!r}")
    return size_bytes


def format_size(size_bytes: float) -> str:
    """Return `size_bytes` as people read it, in binary units: `6.50 GiB`, `12.0 MiB`, `512 B`."""
    for unit, digits in (("TiB", 2), ("GiB", 2), ("MiB", 1), ("KiB", 1)):
        scale = _UNITS[unit.lower()]
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.{digits}f} {unit}"
    return f"{size_bytes:.0f} B"
