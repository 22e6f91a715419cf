"""The facts of a machine and a checkout that a benchmark result must carry."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

# what each level of x86-64 adds, highest first (the psABI's micro-architecture levels, one telling flag each)
X86_LEVELS = (("avx512vl", "x86-64-v4"), ("avx2", "x86-64-v3"), ("sse4_2", "x86-64-v2"))
NOTED_FLAGS = ("avx2", "f16c", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "asimd", "bf16", "sve")


def _cpu_field(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip().lower() == name:
            return value.strip()
    return ""


def _memory_bytes() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def describe_machine() -> dict[str, Any]:
    """Return processor, cores, instruction sets, memory, kernel and Python."""
    flags = set((_cpu_field("flags") or _cpu_field("features")).split())
    level = next((name for flag, name in X86_LEVELS if flag in flags), platform.machine())
    return {
        "cpu": _cpu_field("model name") or platform.machine(),
        "num_cpus": len(os.sched_getaffinity(0)),
        "cpu_level": level,
        "cpu_flags": [flag for flag in NOTED_FLAGS if flag in flags],
        "is_virtual": "hypervisor" in flags,
        "memory_bytes": _memory_bytes(),
        "swap_is_on": len(Path("/proc/swaps").read_text().splitlines()) > 1,
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def describe_block_device(folder: Path) -> dict[str, Any]:
    """Return what the kernel says of the device under `folder`; empty where it is no plain block device."""
    queue = block_queue(folder)
    if queue is None:
        return {}
    names = ("logical_block_size", "read_ahead_kb", "rotational", "scheduler")
    facts: dict[str, Any] = {name: (queue / name).read_text().strip() for name in names if (queue / name).exists()}
    return {"name": queue.parent.name, **facts}


def block_queue(folder: Path) -> Path | None:
    """Return where the kernel keeps the settings of the device under `folder`; None where it is no plain block device."""
    number = folder.stat().st_dev
    link = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not link.exists():
        return None
    device = link.resolve()
    return device / "queue" if (device / "queue").exists() else device.parent / "queue"


def machine_counters(folder: Path) -> dict[str, float]:
    """Return what the whole machine has done so far: device bytes and processor seconds, other programs' included.

    Differences over a run, held against the run's own figures, show whether somebody else was busy meanwhile.
    """
    ticks = [int(word) / os.sysconf("SC_CLK_TCK") for word in Path("/proc/stat").read_text().split("\n")[0].split()[1:]]
    user_s, nice_s, system_s, _, _, irq_s, softirq_s, steal_s = ticks[:8]
    counters = {"cpu_busy_s": user_s + nice_s + system_s + irq_s + softirq_s, "cpu_stolen_s": steal_s}
    number = folder.stat().st_dev
    stat = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}/stat")
    if stat.exists():
        words = stat.read_text().split()
        counters |= {"device_read_bytes": int(words[2]) * 512, "device_written_bytes": int(words[6]) * 512}
    return counters


def describe_commit(repository: Path) -> dict[str, Any]:
    """Return the commit and whether the tree differs from it; empty outside a git checkout."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True, text=True, check=True)
        return done.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "src", "native")
        return {"commit": git("rev-parse", "HEAD"), "source_differs_from_commit": bool(changed)}
    except (OSError, subprocess.CalledProcessError):
        return {}


def today() -> str:
    """Return the date in UTC, ISO 8601."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()
