"""Conversion against the device: what dd writes, what a plain copy of the same bytes reaches, what `convert` reaches.

    python benchmarks/conversion.py --work DIR [--shape opt-1.3b] [--rounds 3]

A conversion reads as many bytes as it writes, on one device here. `copy` does just that and nothing else (direct I/O, four
reads of 4 MiB and one write at a time): it is the rate that a conversion could reach with no work of its own. Rounds take
the three in turn, the page cache dropped before each; medians and ratios count.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import queue
import shutil
import statistics
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
    from flashlm.conversion.convert import convert

    start_s = time.perf_counter()
    convert(checkpoint, pack)
    elapsed_s = time.perf_counter() - start_s
    num_bytes = sum(path.stat().st_size for path in pack.rglob("*") if path.is_file())
    shutil.rmtree(pack)
    return num_bytes / elapsed_s / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what it writes, three times the model")
    parser.add_argument("--shape", default="opt-1.3b", help="model shape, random weights")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "conversion.json")
    args = parser.parse_args()
    from random_weights import write_checkpoint
    from shapes import config_of

    folder = args.work / "conversion"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        num_bytes = write_checkpoint(folder / "checkpoint", config_of(args.shape))
        files = sorted((folder / "checkpoint").glob("*.safetensors"))
        rates: dict[str, list[float]] = {"dd_write": [], "copy": [], "convert": []}
        for _ in range(args.rounds):
            drop_page_cache([])
            rates["dd_write"].append(float(direct_write_rate(folder, num_bytes)["gb_per_s"]))
            drop_page_cache([])
            rates["copy"].append(copy_rate(files, folder / "copy.bin"))
            drop_page_cache([])
            rates["convert"].append(convert_rate(folder / "checkpoint", folder / "pack"))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {name: statistics.median(values) for name, values in rates.items()}
    result: dict[str, Any] = {
        "what": "conversion against dd and a plain copy, GB/s",
        "shape": args.shape,
        "weights": "random",
        "bytes": num_bytes,
        "rates_gb_per_s": rates,
        "medians_gb_per_s": medians,
        "convert_over_dd": medians["convert"] / medians["dd_write"],
        "convert_over_copy": medians["convert"] / medians["copy"],
        "copy_over_dd": medians["copy"] / medians["dd_write"],
        "page_cache": "dropped before every measurement",
        "load_average": os.getloadavg()[0],
        "date": today(),
        "machine": describe_machine() | {"device": describe_block_device(args.work)},
        "commit": describe_commit(Path(__file__).parent.parent),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(
        json.dumps({key: result[key] for key in ("rates_gb_per_s", "convert_over_dd", "convert_over_copy")}, indent=1)
    )


if __name__ == "__main__":
    main()
