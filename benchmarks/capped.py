"""Run a program in a fresh cgroup with a memory limit that the kernel enforces, page cache included, swap off.

The child enters the cgroup before it starts its interpreter, so that everything it ever allocates or reads through the
page cache counts. Three ways, the first that works: cgroup v1 (root); v2 (root, or a delegated subtree, which
`systemd-run --user --scope -p Delegate=yes` makes); a scope of systemd with `MemoryMax` (`cap_method` says which).
What the limit does not cover: page cache that somebody else filled before; drop it first.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
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
_LEAF = "flashlm-bench-main"  # where a group's own processes go


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
        interface: `cgroup v1`, `cgroup v2` or `systemd scope`.
        stdout, stderr: What the child wrote, where it was asked for; else empty.
    """

    returncode: int
    wall_s: float
    peak_bytes: int | None
    num_limit_hits: int
    num_major_faults: int
    num_oom_kills: int
    interface: str
    stdout: str = ""
    stderr: str = ""

    @property
    def was_killed(self) -> bool:
        """Whether the kernel ended it for memory; 137 is what a shell and systemd make of signal 9."""
        return self.num_oom_kills > 0 or self.returncode in (-signal.SIGKILL, 128 + signal.SIGKILL)


class CappingUnavailable(SystemExit):
    """No memory limit can be set here; the message says why and what would do."""


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


def _own_v2_folder(root: Path, proc_cgroup: Path = Path("/proc/self/cgroup")) -> Path:
    for line in proc_cgroup.read_text().splitlines():
        if line.startswith("0::"):
            return root / line.removeprefix("0::").strip().lstrip("/")
    return root


def _enable_v2_memory(folder: Path) -> None:
    """Let `folder` have children with memory limits.

    Its own processes must move to a leaf first; only in the true root, which containers do not see, they may stay.
    """
    control = folder / "cgroup.subtree_control"
    if "memory" in control.read_text().split():
        return
    if "memory" not in (folder / "cgroup.controllers").read_text().split():
        raise OSError(errno.ENOTSUP, "the memory controller is not delegated to this group", str(folder))
    try:
        control.write_text("+memory")
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.EOPNOTSUPP):
            raise
        leaf = folder / _LEAF
        leaf.mkdir(exist_ok=True)
        for pid in (folder / "cgroup.procs").read_text().split():
            with suppress(ProcessLookupError):
                (leaf / "cgroup.procs").write_text(pid)
        control.write_text("+memory")


def new_group(v1_root: Path = V1_ROOT, v2_root: Path = V2_ROOT) -> MemoryGroup:
    """Make a group without a limit yet.

    Raises:
        CappingUnavailable: It can't be made here.
    """
    name = f"flashlm-bench-{os.getpid()}-{time.monotonic_ns()}"
    try:
        if (v1_root / "memory.limit_in_bytes").exists():
            path = v1_root / name
            path.mkdir()
            return V1Group(path)
        own = _own_v2_folder(v2_root)
        if own.name == _LEAF:  # moved there by an earlier call
            own = own.parent
        _enable_v2_memory(own)
        path = own / name
        path.mkdir()
        return V2Group(path)
    except OSError as error:
        raise CappingUnavailable(
            f"cannot make a memory cgroup ({error}). Run as root, or inside\n"
            "    systemd-run --user --scope -p Delegate=yes -- python benchmarks/hybrid.py ..."
        ) from error


def scope_argv(argv: Sequence[str], limit_bytes: int, *, is_root: bool) -> list[str]:
    """Return the command that runs `argv` in a scope of systemd with a limit, the user's own unless we are root."""
    manager = [] if is_root else ["--user"]
    limits = ["-p", f"MemoryMax={limit_bytes}", "-p", "MemorySwapMax=0"]
    return ["systemd-run", *manager, "--scope", "--quiet", "--collect", *limits, "--", *argv]


def _scope_works(v2_root: Path = V2_ROOT) -> bool:
    if shutil.which("systemd-run") is None or not (v2_root / "cgroup.controllers").exists():
        return False
    probe = scope_argv(["true"], 64 << 20, is_root=os.geteuid() == 0)
    return subprocess.run(probe, capture_output=True, timeout=30, check=False).returncode == 0


def cap_method() -> str:
    """Return how `run_capped` caps here: `group` or `scope`.

    Raises:
        CappingUnavailable: In no way.
    """
    try:
        group = new_group()
    except CappingUnavailable:
        if _scope_works():
            return "scope"
        raise
    _remove(group)
    return "group"


def _remove(group: MemoryGroup) -> None:
    for _ in range(RMDIR_TRIES):
        with suppress(OSError):
            group.path.rmdir()
            break
        time.sleep(0.1)


@contextmanager
def memory_group(limit_bytes: int) -> Iterator[MemoryGroup]:
    """Make a cgroup limited to `limit_bytes` and remove it afterwards."""
    group = new_group()
    try:
        group.set_limit(limit_bytes)
        yield group
    finally:
        _remove(group)


def run_capped(
    argv: Sequence[str],
    *,
    limit_bytes: int,
    timeout_s: float | None = None,
    capture: bool = False,
    method: str = "group",
) -> CappedRun:
    """Run `argv` under a limit of `limit_bytes` and wait for it; stdout and stderr go where ours go, or are captured.

    Args:
        argv: The program.
        limit_bytes: Of everything that it holds.
        timeout_s: After so long it is killed, and `subprocess.TimeoutExpired` raised.
        capture: Whether to return what it writes.
        method: What `cap_method` returned. A scope of systemd is gone with its program: it has no counters afterwards.
    """
    if method == "scope":
        start_s = time.monotonic()
        argv = scope_argv(argv, limit_bytes, is_root=os.geteuid() == 0)
        returncode, stdout, stderr = _run(argv, timeout_s, capture=capture)
        return CappedRun(
            returncode=returncode,
            wall_s=time.monotonic() - start_s,
            peak_bytes=None,
            num_limit_hits=0,
            num_major_faults=0,
            num_oom_kills=0,
            interface="systemd scope",
            stdout=stdout,
            stderr=stderr,
        )
    with memory_group(limit_bytes) as group:
        # the shell enters the group, then becomes the program: nothing is allocated outside
        enter = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(group.path / "cgroup.procs"), *argv]
        start_s = time.monotonic()
        returncode, stdout, stderr = _run(enter, timeout_s, capture=capture)
        return CappedRun(
            returncode=returncode,
            wall_s=time.monotonic() - start_s,
            peak_bytes=group.peak_bytes(),
            num_limit_hits=group.num_limit_hits(),
            num_major_faults=group.num_major_faults(),
            num_oom_kills=group.num_oom_kills(),
            interface=group.interface,
            stdout=stdout,
            stderr=stderr,
        )


def _run(argv: Sequence[str], timeout_s: float | None, *, capture: bool) -> tuple[int, str, str]:
    pipe = subprocess.PIPE if capture else None
    child = subprocess.Popen(argv, stdout=pipe, stderr=pipe, text=True)
    try:
        stdout, stderr = child.communicate(timeout=timeout_s)
    except BaseException:
        child.kill()
        child.wait()
        raise
    return child.returncode, stdout or "", stderr or ""


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
