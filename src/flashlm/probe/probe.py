"""`probe`: measure a machine and one of its devices, and keep the profile."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from flashlm._version import __version__
from flashlm.errors import ConfigError
from flashlm.probe.compute import (
    block_overhead_s,
    matrix_overhead_s,
    memory_rates,
    model_overheads_s,
    overlap_shares,
)
from flashlm.probe.device_profile import DeviceProfile, device_id, profile_path, save_profile
from flashlm.probe.experts import expert_overheads_s
from flashlm.probe.file import choose_bytes, probe_file
from flashlm.probe.products import DTYPES, encoded_rates, product_rates
from flashlm.probe.reads import ReadProbe
from flashlm.probe.sparse import manage_row_s, sparse_layer_overhead_s
from flashlm.rows.encodings import ENCODINGS
from flashlm.storage.reader import Reader

DEFAULT_FILE_BYTES = 2 << 30
DEFAULT_SECONDS = 15.0  # of reading; the rest takes about as long again

Progress = Callable[[int, int, str], None]


def probe(
    folder: str | Path,
    *,
    file_bytes: int = DEFAULT_FILE_BYTES,
    seconds: float = DEFAULT_SECONDS,
    progress: Progress = lambda done, total, what: None,
    announce: Callable[[str], None] = lambda line: None,
) -> DeviceProfile:
    """Measure the device of `folder` and this machine, and keep the profile in the user's cache folder.

    Args:
        folder: On the device to measure; a file without a name is written in it.
        file_bytes: Size of that file; less where the device has little room.
        seconds: Spent on reading, about.
        progress: Called with steps done, steps in all, what.
        announce: Called with a line of warning.

    Raises:
        ConfigError: The folder is missing or read-only, or a setting out of range.
        StorageError: No room, or a read failed.
    """
    folder = Path(folder).expanduser()
    if seconds <= 0:
        raise ConfigError(f"seconds={seconds} must be above 0")
    device = device_id(folder)
    num_bytes = choose_bytes(folder, file_bytes)
    progress(0, 1, f"writing {num_bytes >> 20} MiB")
    with probe_file(folder, num_bytes) as file:
        with Reader() as reader, reader.open(file.path) as opened:
            backend, is_direct = reader.backend, opened.is_direct
        if not is_direct:
            announce(
                f"{folder} has no direct I/O (a tmpfs or an overlay?): what is measured is the page cache in part, and"
                " models will be read through it"
            )
        reads = ReadProbe(file, seconds, progress)
        points, row_points, segment_s = reads.reads(), reads.row_reads(), reads.segment_s()
        total = reads.num_points
        progress(total, total, "reading and computing at once")
        read_share, compute_share = overlap_shares(file)
    progress(total, total, "memory and products")
    memory, touch = memory_rates()
    token_s, layer_s = model_overheads_s()
    expert_layer_s, expert_group_s = expert_overheads_s()
    profile = DeviceProfile(
        flashlm_version=__version__,
        date=time.strftime("%Y-%m-%d %H:%M:%S"),
        device=device,
        file_system=file_system(folder),
        backend=backend,
        is_direct=is_direct,
        write_gb_per_s=file.write_gb_per_s,
        reads=tuple(points),
        row_reads=tuple(row_points),
        segment_s=segment_s,
        memory_read_gb_per_s=memory,
        first_touch_gb_per_s=touch,
        products=tuple(product_rates(dtype) for dtype in DTYPES),
        encoded=tuple(
            encoded_rates(each, int8=int8) for each in ENCODINGS.values() if not each.is_plain for int8 in (False, True)
        ),
        read_share=read_share,
        compute_share=compute_share,
        block_overhead_s=block_overhead_s(),
        token_overhead_s=token_s,
        matrix_overhead_s=matrix_overhead_s(),
        layer_overhead_s=layer_s,
        sparse_layer_overhead_s=sparse_layer_overhead_s(),
        expert_layer_overhead_s=expert_layer_s,
        expert_group_overhead_s=expert_group_s,
        manage_row_s=manage_row_s(),
    )
    save_profile(profile, profile_path(folder))
    return profile


def file_system(folder: Path) -> str:
    """Return the type of the file system that holds `folder`; "unknown" where it can't be told."""
    resolved = str(folder.resolve())
    mounts = [part for part in psutil.disk_partitions(all=True) if _is_below(resolved, part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def _is_below(path: str, mountpoint: str) -> bool:
    return path == mountpoint or path.startswith(mountpoint.rstrip("/") + "/")


def profile_rows(profile: DeviceProfile) -> list[tuple[str, str]]:
    """Return what `flashlm probe` prints beside the table of reads."""
    rows = [
        ("device", f"{profile.device}, {profile.file_system}, {'direct' if profile.is_direct else 'BUFFERED'} I/O"),
        ("reader", profile.backend),
        ("sequential", f"{profile.stream_gb_per_s:.2f} GB/s"),
        ("random reads", f"{profile.reads_per_s_at_saturation:,.0f} a second at most"),
        ("writing", f"{profile.write_gb_per_s:.2f} GB/s"),
        ("memory", f"{profile.memory_read_gb_per_s:.1f} GB/s; fresh pages {profile.first_touch_gb_per_s:.1f} GB/s"),
    ]
    for each in profile.products:
        rows.append(
            (
                f"products, {each.dtype}",
                f"one token {each.matrix_gb_per_s:.1f} GB/s (rows in blocks, up {each.block_up_gb_per_s:.1f} and down"
                f" {each.block_down_gb_per_s:.1f}; scattered {each.row_up_gb_per_s:.1f} and {each.row_down_gb_per_s:.1f};"
                f" predictors {each.predictor_gb_per_s:.1f}); 128 tokens {each.gemm_gflop_per_s:.0f} GFLOP/s",
            )
        )
    for coded in profile.encoded:
        rows.append(
            (
                f"products, {coded.encoding}{', int8' if coded.is_int8 else ''}",
                f"one token {coded.matrix_gb_per_s:.1f} GB/s (down in blocks {coded.down_gb_per_s:.1f}, experts"
                f" {coded.expert_gb_per_s:.1f}); 128 tokens {coded.gemm_gflop_per_s:.0f} GFLOP/s",
            )
        )
    rows += [
        (
            "reading and computing",
            f"at once, reads keep {profile.read_share:.0%} and computing {profile.compute_share:.0%} of their speed",
        ),
        (
            "a layer's overhead",
            f"{profile.layer_overhead_s * 1e3:.2f} ms a token; mode sparse {profile.sparse_layer_overhead_s * 1e3:.2f} more,"
            f" experts {profile.expert_layer_overhead_s * 1e3:.2f} and {profile.expert_group_overhead_s * 1e3:.2f} a group",
        ),
        ("cache lookup", f"{profile.manage_row_s * 1e9:.0f} ns a row"),
    ]
    return rows
