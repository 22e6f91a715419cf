"""Run a program in a fresh cgroup with a memory limit that the kernel enforces, page cache included, swap off.

The child enters the cgroup before it starts its interpreter, so that everything it ever allocates or reads through the
page cache counts. Works with cgroup v1 (root) and v2 (root, or a delegated subtree, which `systemd-run --user --scope
-p Delegate=yes` makes). What the limit does not cover: page cache that somebody else filled before; drop it first.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

V1_ROOT = Path("/sys/fs/cgroup/memory")
V2_ROOT = Path("/sys/fs/cgroup")
RMDIR_TRIES = 50


@dataclass(frozen=True, kw_only=True)
class CappedRun:
    """What became of a capped child.

    Attributes:
        returncode: Exit status; negative for a signal.
        wall_s: From start to exit.
        peak_bytes: The cgroup's highest use, page cache and kernel memory included; None if the kernel has no record.
        num_limit_hits: How often an allocation met the limit (v1 failcnt, 0 on newer kernels; v2 events max).
        num_major_faults: Page faults that had to wait for the device.
        num_oom_kills: Processes of the group that the kernel killed for memory.
        interface: `cgroup v1` or `cgroup v2`.
    """

    returncode: int
    wall_s: float
    peak_bytes: int | None
    num_limit_hits: int
    num_major_faults: int
    num_oom_kills: int
    interface: str


class MemoryGroup(Protocol):
    """A cgroup with a memory limit."""

    path: Path
    interface: str

    def set_limit(self, limit_bytes: int) -> None: ...
    def peak_bytes(self) -> int | None: ...
    def num_limit_hits(self) -> int: ...
    def num_major_faults(self) -> int: ...
    def num_oom_kills(self) -> int: ...


def _counter(path: Path, name: str) -> int:
    """Return the number after `name` in a file of `name number` lines; 0 where it is missing."""
    for line in path.read_text().splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return 0


class V1Group:
    """A group of the v1 memory controller."""

    interface = "cgroup v1"

    def __init__(self, path: Path) -> None:
        self.path = path

    def set_limit(self, limit_bytes: int) -> None:
        (self.path / "memory.limit_in_bytes").write_text(str(limit_bytes))
        (self.path / "memory.swappiness").write_text("0")
        with suppress(FileNotFoundError):  # no swap accounting on this kernel: swappiness 0 has to do
            (self.path / "memory.memsw.limit_in_bytes").write_text(str(limit_bytes))

    def peak_bytes(self) -> int | None:
        return int((self.path / "memory.max_usage_in_bytes").read_text())

    def num_limit_hits(self) -> int:
        # with swap off the two limits are equal, and the kernel charges memory+swap first
        files = ("memory.failcnt", "memory.memsw.failcnt")
        return sum(int((self.path / name).read_text()) for name in files if (self.path / name).exists())

    def num_major_faults(self) -> int:
        return _counter(self.path / "memory.stat", "total_pgmajfault")

    def num_oom_kills(self) -> int:
        return _counter(self.path / "memory.oom_control", "oom_kill")


class V2Group:
    """A group of the unified hierarchy."""

    interface = "cgroup v2"

    def __init__(self, path: Path) -> None:
        self.path = path

    def set_limit(self, limit_bytes: int) -> None:
        (self.path / "memory.max").write_text(str(limit_bytes))
        with suppress(FileNotFoundError):  # a kernel without swap
            (self.path / "memory.swap.max").write_text("0")

    def peak_bytes(self) -> int | None:
        peak = self.path / "memory.peak"  # since Linux 5.19
        return int(peak.read_text()) if peak.exists() else None

    def num_limit_hits(self) -> int:
        return _counter(self.path / "memory.events", "max")

    def num_major_faults(self) -> int:
        return _counter(self.path / "memory.stat", "pgmajfault")

    def num_oom_kills(self) -> int:
        return _counter(self.path / "memory.events", "oom_kill")


def _own_v2_folder() -> Path:
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        if line.startswith("0::"):
            return V2_ROOT / line.removeprefix("0::").strip().lstrip("/")
    return V2_ROOT


def _enable_v2_memory(folder: Path) -> None:
    """Let `folder` have children with memory limits; its own processes must move to a leaf first (not in the root)."""
    control = folder / "cgroup.subtree_control"
    if "memory" in control.read_text().split():
        return
    if folder != V2_ROOT:
        leaf = folder / "flashlm-bench-main"
        leaf.mkdir(exist_ok=True)
        for pid in (folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)
    control.write_text("+memory")


def _new_group() -> MemoryGroup:
    name = f"flashlm-bench-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if (V1_ROOT / "memory.limit_in_bytes").exists():
            path = V1_ROOT / name
            path.mkdir()
            return V1Group(path)
        own = _own_v2_folder()
        if own.name == "flashlm-bench-main":  # moved there by an earlier call
            own = own.parent
        _enable_v2_memory(own)
        path = own / name
        path.mkdir()
        return V2Group(path)
    except OSError as error:
        raise SystemExit(
            f"cannot make a memory cgroup ({error}). Run as root, or inside\n"
            "    systemd-run --user --scope -p Delegate=yes -- python benchmarks/hybrid.py ..."
        ) from error


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a cgroup limited to `limit_bytes` and remove it afterwards."""
    group = _new_group()
    try:
        group.set_limit(limit_bytes)
        yield group
    finally:
        for _ in range(RMDIR_TRIES):
            with suppress(OSError):
                group.path.rmdir()
                break
            time.sleep(0.1)


def run_capped(argv: Sequence[str], *, limit_bytes: int, timeout_s: float | None = None) -> CappedRun:
    """Run `argv` under a limit of `limit_bytes` and wait for it; stdout and stderr go where ours go."""
    with memory_group(limit_bytes) as group:
        # the shell enters the group, then becomes the program: nothing is allocated outside
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs"), *argv]
        start_s = time.monotonic()
        child = subprocess.Popen(enter)
        try:
            returncode = child.wait(timeout_s)
        except BaseException:
            child.kill()
            child.wait()
            raise
        return CappedRun(
            returncode=returncode,
            wall_s=time.monotonic() - start_s,
            peak_bytes=group.peak_bytes(),
            num_limit_hits=group.num_limit_hits(),
            num_major_faults=group.num_major_faults(),
            num_oom_kills=group.num_oom_kills(),
            interface=group.interface,
        )


def drop_page_cache(files: Sequence[Path]) -> str:
    """Empty the page cache, or (not root) drop the pages of `files`; return in words which it was."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3")
        return "whole page cache dropped before the run"
    except OSError:
        for path in files:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(descriptor)
        return "pages of the run's own files dropped before the run (posix_fadvise)"
