"""Conversion against the device: what dd writes, what a plain copy of the same bytes reaches, what `convert` reaches.

    python benchmarks/conversion.py --work DIR [--shape opt-1.3b] [--rounds 3]

A conversion reads as many bytes as it writes, on one device here. `copy` does just that and nothing else (direct I/O, four
reads of 4 MiB and one write at a time): it is the rate that a conversion could reach with no work of its own. Rounds take
the three in turn, the page cache dropped before each; medians and ratios count.

    python benchmarks/conversion.py --work DIR --pythons OLD_PYTHON NEW_PYTHON [--shape opt-1.3b] [--layers N] [--rounds 7]

Two checkouts against each other instead: each round converts and verifies with both, the first of a round changing, every
measurement in a process of its own after its imports. `old/new` are medians of the rounds' ratios of times: above 1 the new
one is faster. Both packs must have the same manifest, byte for byte.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import queue
import shutil
import statistics
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from capped import drop_page_cache
from device_rate import READ_BYTES, direct_chunks, direct_write_rate
from machine import describe_block_device, describe_commit, describe_machine, today

NUM_READS, NUM_BUFFERS = 4, 16


def copy_rate(files: list[Path], target: Path) -> float:
    """Copy `files` into `target` with overlapping direct reads and writes; remove it; return GB/s."""
    chunks = direct_chunks(files, 1 << 62)
    sources = {path: os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files}
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    free: queue.Queue[mmap.mmap] = queue.Queue()
    for _ in range(NUM_BUFFERS):
        free.put(mmap.mmap(-1, READ_BYTES))

    def read(chunk: tuple[Path, int, int]) -> mmap.mmap:
        buffer = free.get()
        os.preadv(sources[chunk[0]], [memoryview(buffer)[: chunk[2]]], chunk[1])
        return buffer

    start_s = time.perf_counter()
    try:
        with ThreadPoolExecutor(NUM_READS) as readers:
            position = 0
            for chunk, reading in zip(chunks, [readers.submit(read, chunk) for chunk in chunks], strict=True):
                buffer = reading.result()
                position += os.pwrite(out, memoryview(buffer)[: chunk[2]], position)
                free.put(buffer)
        os.fsync(out)
        return position / (time.perf_counter() - start_s) / 1e9
    finally:
        os.close(out)
        for descriptor in sources.values():
            os.close(descriptor)
        target.unlink(missing_ok=True)


def convert_rate(checkpoint: Path, pack: Path) -> float:
    """Convert, remove the pack, return GB/s of the pack's bytes."""
    import flashlm

    start_s = time.perf_counter()
    flashlm.convert(checkpoint, pack)
    elapsed_s = time.perf_counter() - start_s
    num_bytes = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    shutil.rmtree(pack)
    return num_bytes / elapsed_s / 1e9


def against_device(checkpoint: Path, num_bytes: int, folder: Path, rounds: int) -> dict[str, Any]:
    """Write with dd, copy and convert in turns; return rates and their ratios."""
    files = sorted(checkpoint.glob("*.safetensors")) if checkpoint.is_dir() else [checkpoint]
    rates: dict[str, list[float]] = {"dd_write": [], "copy": [], "convert": []}
    for _ in range(rounds):
        drop_page_cache([])
        rates["dd_write"].append(float(direct_write_rate(folder, num_bytes)["gb_per_s"]))
        drop_page_cache([])
        rates["copy"].append(copy_rate(files, folder / "copy.bin"))
        drop_page_cache([])
        rates["convert"].append(convert_rate(checkpoint, folder / "pack"))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    return {
        "what": "conversion against dd and a plain copy, GB/s",
        "rates_gb_per_s": rates,
        "medians_gb_per_s": medians,
        "convert_over_dd": medians["convert"] / medians["dd_write"],
        "convert_over_copy": medians["convert"] / medians["copy"],
        "copy_over_dd": medians["copy"] / medians["dd_write"],
        "peak_bytes": peak_bytes(),  # everything that was imported included
        "commit": describe_commit(Path(__file__).parent.parent),
    }


def timed(work: str, folder: Path) -> dict[str, Any]:
    """Convert or verify in this process; return seconds of wall and processor and the peak of memory.

    The same is done before with a tiny model, untimed: both verbs import what they need when it is needed.
    """
    import flashlm

    for name in ("tiny", "model"):
        if name == "model":
            drop_page_cache([])
        started_s, cpu_s = time.perf_counter(), time.process_time()
        if work == "convert":
            flashlm.convert(folder / name, folder / f"{name}-pack")
        else:
            flashlm.verify(folder / f"{name}-pack").raise_for_problems()
    wall_s, cpu_s = time.perf_counter() - started_s, time.process_time() - cpu_s
    commit = describe_commit(Path(flashlm.__file__).parents[2])
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak_bytes(), "commit": commit}


def peak_bytes() -> int:
    """Return the most memory that this process has had."""
    status = Path("/proc/self/status").read_text().split()
    return int(status[status.index("VmHWM:") + 1]) * 1024  # rusage would have that of the parent


def timed_by(python: str, work: str, folder: Path) -> dict[str, Any]:
    """Do the same with the checkout that `python` has installed."""
    command = [str(Path(python).absolute()), str(Path(__file__).resolve()), "--timed", work, "--work", str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def compare(pythons: list[str], folder: Path, rounds: int) -> dict[str, Any]:
    """Convert and verify with both checkouts in turns; return times and ratios."""
    sides = dict(zip(("old", "new"), pythons, strict=True))
    result: dict[str, Any] = {"what": "conversion and verification in two checkouts, in turns"}
    times: dict[str, dict[str, list[dict[str, Any]]]] = {work: {"old": [], "new": []} for work in ("convert", "verify")}
    manifests = set()
    for number in range(rounds):
        for name in sorted(sides, reverse=number % 2 == 0):
            for work, found in times.items():
                found[name].append(timed_by(sides[name], work, folder))
                result[name] = found[name][-1].pop("commit")
            manifests.add((folder / "model-pack" / "flash" / "manifest.json").read_bytes())
            for pack in folder.glob("*-pack"):
                shutil.rmtree(pack)
        print({work: {name: round(found[name][-1]["wall_s"], 2) for name in sides} for work, found in times.items()})
    if len(manifests) != 1:
        raise SystemExit("the packs differ")
    for work, found in times.items():
        result[work] = {}
        for clock in ("wall_s", "cpu_s", "peak_bytes"):
            old, new = ([each[clock] for each in found[name]] for name in sides)
            ratio = statistics.median(before / after for before, after in zip(old, new, strict=True))
            result[work] |= {f"old_{clock}": statistics.median(old), f"new_{clock}": statistics.median(new)}
            result[work] |= {f"old/new_{clock}": ratio}
        result[work]["rounds"] = found
    return result


def _shape(args: argparse.Namespace) -> str:
    if args.source:
        return "/".join(args.source.absolute().parts[-2:])
    return args.shape if args.layers is None else f"{args.shape}, {args.layers} layers"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, help="folder for what it writes, three times the model")
    parser.add_argument("--shape", default="opt-1.3b", help="model shape, random weights")
    parser.add_argument("--source", type=Path, help="a GGUF file or model folder, in the place of random weights")
    parser.add_argument("--layers", type=int, help="another number of layers than the shape has")
    parser.add_argument("--pythons", nargs=2, help="OLD_PYTHON NEW_PYTHON: compare two checkouts")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "conversion.json")
    parser.add_argument("--timed", help=argparse.SUPPRESS)  # what a checkout's own process does
    args = parser.parse_args()
    if args.timed:
        print(json.dumps(timed(args.timed, args.work)))
        return
    from random_weights import write_checkpoint
    from shapes import config_of

    folder = args.work / "conversion"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    checkpoint = folder / "model"
    try:
        if args.source:
            checkpoint = args.source
            num_bytes = sum(
                path.stat().st_size for path in ([checkpoint] if checkpoint.is_file() else checkpoint.iterdir())
            )
        else:
            num_bytes = write_checkpoint(checkpoint, config_of(args.shape, num_layers=args.layers))
        if args.pythons:
            write_checkpoint(folder / "tiny", config_of("olmoe-tiny" if "olmoe" in args.shape else "opt-tiny"))
            result = compare(args.pythons, folder, args.rounds)
        else:
            result = against_device(checkpoint, num_bytes, folder, args.rounds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    result |= {
        "shape": _shape(args),
        "weights": "random",
        "bytes": num_bytes,
        "page_cache": "dropped before every measurement",
        "load_average": os.getloadavg()[0],
        "date": today(),
        "machine": describe_machine() | {"device": describe_block_device(args.work)},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    shown = {
        key: value
        for key, value in result.items()
        if "over" in key or key in ("rates_gb_per_s", "peak_bytes", "convert", "verify")
    }
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
