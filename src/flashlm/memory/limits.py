"""What memory this process may use: the machine's free memory and the limit of its control group.

Reads `/proc` and `/sys/fs/cgroup` (versions 1 and 2); elsewhere only the machine's free memory is known.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

MARGIN_BYTES = 512 << 20
MARGIN_SHARE = 0.05
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096

_CGROUP_ROOT = Path("/sys/fs/cgroup")
_UNLIMITED_BYTES = 1 << 60  # version 1 writes a number near 2^63 for "no limit"


@dataclass(frozen=True, kw_only=True)
class MemoryLimits:
    """What bounds this process now.

    Attributes:
        available_bytes: Memory that the machine could give, beyond what this process has.
        process_bytes: Resident memory of this process.
        cgroup_limit_bytes: The tightest limit of its control groups, or None.
        cgroup_used_bytes: What that group has charged, page cache that can be dropped not counted, or None.
    """

    available_bytes: int
    process_bytes: int
    cgroup_limit_bytes: int | None
    cgroup_used_bytes: int | None

    @property
    def reachable_bytes(self) -> int:
        """The most that this process as a whole can come to hold."""
        reachable = self.process_bytes + self.available_bytes
        if self.cgroup_limit_bytes is not None:
            others_bytes = max((self.cgroup_used_bytes or 0) - self.process_bytes, 0)
            reachable = min(reachable, self.cgroup_limit_bytes - others_bytes)
        return reachable

    @property
    def default_dram_bytes(self) -> int:
        """`reachable_bytes` less a margin of 5 % or 512 MiB, whichever is less."""
        reachable = self.reachable_bytes
        return reachable - min(MARGIN_BYTES, int(reachable * MARGIN_SHARE))


def read_memory_limits() -> MemoryLimits:
    """Measure what bounds this process now."""
    limit_bytes, used_bytes = _tightest_cgroup()
    return MemoryLimits(
        available_bytes=psutil.virtual_memory().available,
        process_bytes=process_bytes(),
        cgroup_limit_bytes=limit_bytes,
        cgroup_used_bytes=used_bytes,
    )


def room_bytes() -> int:
    """Return what this process could still allocate before the kernel refuses: page cache counts as droppable."""
    machine_bytes = int(psutil.virtual_memory().available)
    rooms = []
    for folder, names in _memory_groups():
        limit_bytes, used_bytes = _read_group(folder, *names)
        if limit_bytes is not None and used_bytes is not None:
            active = "total_active_file" if names[2].startswith("total_") else "active_file"
            rooms.append(limit_bytes - used_bytes + _stat_bytes(folder, active))
    return min(machine_bytes, *rooms) if rooms else machine_bytes


def _stat_bytes(folder: Path, name: str) -> int:
    try:
        lines = (folder / "memory.stat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.split()[0] == name), 0)


def process_bytes() -> int:
    """Return this process's resident memory in bytes."""
    try:
        with open("/proc/self/statm", "rb") as file:  # noqa: PTH123 - asked before every pass; psutil takes three times as long
            return int(file.read().split()[1]) * PAGE_BYTES
    except OSError:
        return int(psutil.Process().memory_info().rss)


def mapped_file_bytes() -> int:
    """Return how much of `process_bytes` are pages of files, libraries above all, in bytes; 0 where nothing tells."""
    try:
        return int(Path("/proc/self/statm").read_bytes().split()[2]) * PAGE_BYTES
    except OSError:
        return 0


def peak_process_bytes() -> int:
    """Return the most resident memory that this process has had, in bytes (Linux `VmHWM`; elsewhere the present value)."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return process_bytes()


def _tightest_cgroup() -> tuple[int | None, int | None]:
    """Return limit and use of the ancestor group with the least room, or (None, None) where nothing limits."""
    candidates = [_read_group(folder, *names) for folder, names in _memory_groups()]
    limited = [(limit, used) for limit, used in candidates if limit is not None]
    if not limited:
        return None, None
    return min(limited, key=lambda pair: pair[0] - (pair[1] or 0))


def _memory_groups() -> list[tuple[Path, tuple[str, str, str]]]:
    """Return every control-group folder that can limit this process's memory, with its file names."""
    version_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    version_2 = ("memory.max", "memory.current", "inactive_file")
    groups: list[tuple[Path, tuple[str, str, str]]] = []
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return groups
    for line in lines:
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            base, names = _CGROUP_ROOT / "memory", version_1
        elif number == "0":
            base, names = _CGROUP_ROOT, version_2
        else:
            continue
        folder = base / path.lstrip("/")
        while folder != base:
            groups.append((folder, names))
            folder = folder.parent
        groups.append((base, names))  # in a container the process's own group is mounted as the root
    return groups


def _read_group(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> tuple[int | None, int | None]:
    try:
        limit_text = (folder / limit_name).read_text().strip()
        used_bytes = int((folder / usage_name).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None, None
    if limit_text == "max" or int(limit_text) >= _UNLIMITED_BYTES:
        return None, None
    return int(limit_text), max(used_bytes - int(stat.get(cache_name, 0)), 0)
