"""`doctor`: what on this machine makes streaming slow or impossible, each finding with what to do about it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import psutil

from flashlm import _native
from flashlm.errors import ConfigError, FlashError
from flashlm.memory.limits import read_memory_limits
from flashlm.probe.device_profile import load_profile, profile_path
from flashlm.probe.probe import file_system
from flashlm.sizes import format_size
from flashlm.storage.platform import descriptor_path, disk_room, num_usable_cores, open_unnamed, sync
from flashlm.storage.reader import Reader

NETWORK = {
    "nfs",
    "nfs4",
    "cifs",
    "smb3",
    "smbfs",
    "sshfs",
    "fuse.sshfs",
    "9p",
    "ceph",
    "glusterfs",
    "lustre",
    "fuse.s3fs",
}
IN_MEMORY = {"tmpfs", "ramfs"}
LAYERED = {"overlay", "overlayfs", "aufs", "fuse.mergerfs"}
MIN_FREE_SHARE = 0.05
SMALL_SWAP_NOTE_BYTES = 64 << 20

Level = Literal["ok", "warn", "bad"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        what: Its name.
        level: "ok"; "warn" where it costs speed; "bad" where streaming can't work.
        fact: What was found.
        advice: What to do; empty where nothing is.
    """

    what: str
    level: Level
    fact: str
    advice: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as JSON can hold them."""
        return asdict(self)


def examine(folder: str | Path) -> list[Finding]:
    """Look at this machine and the device of `folder`; takes well under a second.

    Raises:
        ConfigError: No such folder.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder: give the one that will hold packs")
    return [
        *_file_system(folder),
        *_reading(folder),
        *_device(folder),
        *_space(folder),
        *_memory(),
        *_processor(),
        *_profile(folder),
        *_versions(),
    ]


def _file_system(folder: Path) -> Iterator[Finding]:
    kind = file_system(folder)
    if kind in NETWORK:
        advice = "keep packs on a disk of this machine: reads over a network are slower by far"
        yield Finding(what="file system", level="warn", fact=f"{kind}, over a network or a host's share", advice=advice)
    elif kind in IN_MEMORY:
        advice = "keep packs on a disk: here they take the very memory that is to be saved"
        yield Finding(what="file system", level="warn", fact=f"{kind}, in memory", advice=advice)
    elif kind in LAYERED:
        advice = "keep packs on a mounted volume: layers add work to every read and may refuse direct I/O"
        yield Finding(what="file system", level="warn", fact=kind, advice=advice)
    else:
        yield Finding(what="file system", level="ok", fact=kind)


def _reading(folder: Path) -> Iterator[Finding]:
    """Read a small file, without a name where that is possible, through the reader that models use."""
    try:
        with os.fdopen(open_unnamed(folder), "w+b") as file:
            file.write(b"\0" * 8192)
            file.flush()
            sync(file.fileno())
            with Reader() as reader:
                backend = reader.backend
                with reader.open(descriptor_path(file.fileno())) as opened:
                    is_direct, alignment_bytes = opened.is_direct, opened.alignment_bytes
    except OSError as error:
        advice = "probe and convert write there: choose a folder that you may write to"
        yield Finding(what="writing", level="warn", fact=f"{folder}: {error.strerror}", advice=advice)
        return
    except FlashError as error:
        yield Finding(what="reading", level="bad", fact=str(error), advice="choose another folder for packs")
        return
    if is_direct:
        yield Finding(what="direct I/O", level="ok", fact=f"yes, in blocks of {alignment_bytes} bytes")
    else:
        advice = "use another file system: through the page cache reads are copied and fight for memory"
        yield Finding(what="direct I/O", level="warn", fact="refused: reads go through the page cache", advice=advice)
    if backend == "io_uring":
        yield Finding(what="io_uring", level="ok", fact="in use")
    else:
        yield Finding(
            what="io_uring", level="warn", fact=_why_no_uring(), advice="threads are used: fewer random reads a second"
        )


def _why_no_uring() -> str:
    setting = Path("/proc/sys/kernel/io_uring_disabled")
    try:
        value = setting.read_text().strip()
    except OSError:
        return "not there, or refused by a container's seccomp filter"
    if os.environ.get("FLASHLM_IO_BACKEND") == "threads":
        return "turned off by FLASHLM_IO_BACKEND=threads"
    if value != "0":
        return f"turned off by the system (kernel.io_uring_disabled = {value})"
    return "refused, probably by a container's seccomp filter"


def _device(folder: Path) -> Iterator[Finding]:
    queue = _block_device(folder)
    if queue is None:
        return
    name, removable = queue.parent.name, _read(queue.parent / "removable")
    target = str((Path("/sys/class/block") / name).resolve())
    if _read(queue / "rotational") == "1" and not name.startswith("vd"):
        advice = "use an SSD: a spinning disk answers a hundred random reads a second"
        yield Finding(what="device", level="warn", fact=f"{name}, rotational", advice=advice)
    elif "/usb" in target:
        advice = "use an internal NVMe disk: USB adds latency to every read"
        yield Finding(what="device", level="warn", fact=f"{name}, on USB", advice=advice)
    elif name.startswith("mmcblk") or removable == "1":
        advice = "use an internal NVMe disk: cards answer few reads a second"
        yield Finding(what="device", level="warn", fact=f"{name}, a card or removable", advice=advice)
    else:
        yield Finding(what="device", level="ok", fact=name)
    scheduler = _read(queue / "scheduler") or ""
    chosen = scheduler[scheduler.find("[") + 1 : scheduler.find("]")] if "[" in scheduler else ""
    if chosen not in ("", "none"):
        advice = f"worth a try, as root: echo none > {queue / 'scheduler'}"
        yield Finding(
            what="I/O scheduler",
            level="ok",
            fact=f"{chosen}: orders reads that flash could take as they come",
            advice=advice,
        )


def _block_device(folder: Path) -> Path | None:
    """Return the `queue` folder in sysfs of the disk that holds `folder`; None where there is none."""
    number = folder.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if not node.exists():
        return None
    node = node.resolve()
    for candidate in (node, node.parent):
        if (candidate / "queue").is_dir():
            return candidate / "queue"
    return None


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _space(folder: Path) -> Iterator[Finding]:
    room = disk_room(folder)
    is_tight = room.free_bytes < room.total_bytes * MIN_FREE_SHARE
    advice = "a pack is as large as its model: make room" if is_tight else ""
    fact = f"{format_size(room.free_bytes)} of {format_size(room.total_bytes)} free"
    yield Finding(what="disk", level="warn" if is_tight else "ok", fact=fact, advice=advice)


def _memory() -> Iterator[Finding]:
    limits = read_memory_limits()
    limit = (
        ""
        if limits.cgroup_limit_bytes is None
        else f", {format_size(limits.cgroup_limit_bytes)} for this control group"
    )
    fact = (
        f"{format_size(limits.available_bytes)} free{limit}; --dram would be {format_size(limits.default_dram_bytes)}"
    )
    yield Finding(what="memory", level="ok", fact=fact)
    used_bytes = psutil.swap_memory().used
    if used_bytes > SMALL_SWAP_NOTE_BYTES:
        advice = "lower --dram, or turn swap off: weights that are swapped out are read twice"
        yield Finding(what="swap", level="warn", fact=f"{format_size(used_bytes)} in use", advice=advice)
    else:
        yield Finding(what="swap", level="ok", fact=f"{format_size(used_bytes)} in use")
    huge = _read(Path("/sys/kernel/mm/transparent_hugepage/enabled")) or ""
    if "[never]" in huge:
        advice = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled (scattered reads get faster)"
        yield Finding(what="huge pages", level="warn", fact="turned off", advice=advice)


def _processor() -> Iterator[Finding]:
    level, count = _native.simd_level(), num_usable_cores()
    if level in ("scalar", "generic", "portable"):
        advice = "the kernels know AVX2, AVX-512 and NEON; without them decoding is slow"
        yield Finding(what="processor", level="warn", fact=f"{count} cores, plain C++ kernels", advice=advice)
    else:
        yield Finding(
            what="processor", level="ok", fact=f"{count} cores, {level} kernels on {_native.num_threads()} threads"
        )


def _profile(folder: Path) -> Iterator[Finding]:
    try:
        profile = load_profile(profile_path(folder))
    except ConfigError as error:
        yield Finding(what="profile", level="warn", fact=str(error), advice="run `flashlm probe`")
        return
    if profile is None:
        yield Finding(
            what="profile", level="ok", fact="none of this device yet", advice="`flashlm probe` makes one, for plans"
        )
    else:
        reads = f"{profile.reads_per_s_at_saturation:,.0f} reads a second"
        fact = f"{profile.stream_gb_per_s:.2f} GB/s sequential, {reads}, {profile.date}"
        is_old = not profile.encoded
        advice = "run `flashlm probe` again: plans of quantised models go by what this one did not measure"
        yield Finding(what="profile", level="warn" if is_old else "ok", fact=fact, advice=advice if is_old else "")


def _versions() -> Iterator[Finding]:
    found = []
    for name in ("flashlm", "torch", "transformers"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            yield Finding(what=name, level="bad", fact="not installed", advice=f"pip install {name}")
    yield Finding(what="versions", level="ok", fact=", ".join(found))
