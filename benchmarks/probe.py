"""`flashlm probe`'s way of reading beside fio's, in turns: the same file, sizes, depths, direct, io_uring on both sides.

    python benchmarks/probe.py --work DIR [--rounds 5]

fio must be installed. Both read with one thread that keeps so many reads in flight, into huge pages, as models do: into
small ones a virtual disk is slower, because a read is then many pieces of physical memory. fio needs them reserved, which
takes root; it is run with small pages, its default, as well. Ratios count; single rates drift on a shared device.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from machine import describe_block_device, describe_commit, describe_machine, today

from flashlm.probe.file import ProbeFile
from flashlm.probe.reads import ReadProbe

HERE = Path(__file__).parent
FILE_BYTES = 2 << 30
HUGE_PAGES, NUM_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages"), 64
SECONDS = 1.0  # of fio; and of a point of ours, of which the probe makes some sixty
SECONDS_OF_ALL = 60.0
POINTS = (
    ("random", 4096, 1), ("random", 4096, 32), ("random", 16384, 1), ("random", 16384, 32), ("random", 65536, 32),
    ("random", 1 << 20, 8), ("sequential", 1 << 20, 8), ("sequential", 1 << 20, 32),
)  # fmt: skip


@contextmanager
def reserved_huge_pages() -> Iterator[None]:
    """Reserve 2 MiB pages for fio; give them back in the end."""
    before = HUGE_PAGES.read_text()
    HUGE_PAGES.write_text(str(NUM_HUGE_PAGES))
    try:
        if int(HUGE_PAGES.read_text()) < NUM_HUGE_PAGES:
            raise SystemExit(f"only {HUGE_PAGES.read_text().strip()} huge pages could be reserved")
        yield
    finally:
        HUGE_PAGES.write_text(before)


def fio_gb_per_s(path: Path, pattern: str, read_bytes: int, depth: int, memory: str) -> float:
    argv = [
        "fio", "--name=read", f"--filename={path}", "--direct=1", "--ioengine=io_uring", f"--iodepth={depth}", "--numjobs=1",
        f"--bs={read_bytes}", f"--rw={'randread' if pattern == 'random' else 'read'}", "--norandommap", "--randrepeat=0",
        f"--runtime={SECONDS}", "--time_based", "--readonly", "--output-format=json", f"--size={FILE_BYTES}",
        f"--iomem={memory}",
    ]  # fmt: skip
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout)["jobs"][0]["read"]["bw_bytes"]) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for the test file, on the device to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "probe.json")
    args = parser.parse_args()
    if shutil.which("fio") is None:
        raise SystemExit("fio is not installed")
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "probe.bin"
    try:
        subprocess.run(["dd", "if=/dev/urandom", f"of={path}", "bs=8M", f"count={FILE_BYTES >> 23}", "oflag=direct"],
                       check=True, capture_output=True)  # fmt: skip
        reads = ReadProbe(
            ProbeFile(path=path, num_bytes=FILE_BYTES, write_gb_per_s=1.0), SECONDS_OF_ALL, lambda *step: None
        )
        samples: dict[tuple[str, int, int], dict[str, list[float]]] = {
            point: {"flashlm": [], "fio": [], "fio_small_pages": []} for point in POINTS
        }
        measure = {
            "flashlm": lambda point: reads.point(*point).gb_per_s,
            "fio": lambda point: fio_gb_per_s(path, *point, memory="mmaphuge"),
            "fio_small_pages": lambda point: fio_gb_per_s(path, *point, memory="malloc"),
        }
        with reserved_huge_pages():
            for round_ in range(args.rounds):
                for point in POINTS:
                    for who in sorted(measure, reverse=bool(round_ % 2)):
                        samples[point][who].append(measure[who](point))
    finally:
        path.unlink(missing_ok=True)
    rows: list[dict[str, Any]] = []
    for (pattern, read_bytes, depth), found in samples.items():
        ratios, ratios_small = (
            statistics.median(ours / theirs for ours, theirs in zip(found["flashlm"], found[who], strict=True))
            for who in ("fio", "fio_small_pages")
        )
        rows.append(
            {
                "pattern": pattern, "read_bytes": read_bytes, "queue_depth": depth,
                "fio_gb_per_s": statistics.median(found["fio"]), "flashlm_gb_per_s": statistics.median(found["flashlm"]),
                "ratio": ratios, "ratio_to_fio_with_small_pages": ratios_small, "samples": found,
            }
        )  # fmt: skip
        print(f"{pattern} {read_bytes >> 10} KiB x {depth}: {rows[-1]['flashlm_gb_per_s']:.3f} GB/s, {ratios:.2f} of fio,"
              f" {ratios_small:.2f} of fio with small pages", flush=True)  # fmt: skip
    version = subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "what": "flashlm probe beside fio", "date": today(), "fio": version, "cache": "direct reads on both sides",
        "machine": describe_machine() | {"device": describe_block_device(args.work)},
        "commit": describe_commit(HERE.parent), "rows": rows,
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
