"""What checking costs: loading with and without, in turn, and the rates of xxh3 and of the device beside each other.

    python benchmarks/reliability/checking.py [--quick] [--pairs N]

A model of random weights (about 1 GiB, all of it read while loading). Each load is a process of its own; the page cache
plays no part, reads are direct. Times are medians of pairs; results go to benchmarks/results/reliability-checking.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from small_packs import COMMON

RESULT = Path(__file__).parents[1] / "results" / "reliability-checking.json"
LOAD = """
import json, sys, time
import flashlm, flashlm.engine.model
from transformers.utils import logging
logging.disable_progress_bar()
started_s, cpu_s = time.perf_counter(), time.process_time()
model = flashlm.load(sys.argv[1], dram="6GiB", context=64, check=sys.argv[2])
flash = model.flash
assert flash.placement.streamed_bytes == 0
print(json.dumps({"load_s": time.perf_counter() - started_s, "cpu_s": time.process_time() - cpu_s,
    "resident_s": flash.resident_load.elapsed_s, "resident_bytes": flash.resident_load.num_bytes,
    "pinned_bytes": flash.placement.pinned_bytes}))
"""
SHAPE = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 64_000}


def make_large_pack(folder: Path, num_hidden_layers: int) -> Path:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from flashlm.conversion.convert import convert

    config = AutoConfig.for_model("llama", **{**COMMON, **SHAPE, "num_hidden_layers": num_hidden_layers})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder / "source")
    convert(folder / "source", folder / "pack")
    return folder / "pack"


def load_once(pack: Path, check: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", LOAD, str(pack), check], capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def hash_rate() -> float:
    """GB/s of xxh3-64 over 4 MiB pieces of 256 MiB, best of five."""
    pieces = np.random.default_rng(0).integers(0, 255, 256 << 20, dtype=np.uint8).reshape(-1, 4 << 20)
    rates = []
    for _ in range(5):
        started_s = time.perf_counter()
        for piece in pieces:
            xxhash.xxh3_64_hexdigest(piece.data)
        rates.append(pieces.size / (time.perf_counter() - started_s) / 1e9)
    return max(rates)


def device_rate(pack: Path) -> float:
    """GB/s of flashlm's reader over the pack's rows, best of three."""
    from flashlm.pack.manifest import layer_path, read_manifest
    from flashlm.storage.reader import AlignedBuffer, Reader, ReadRequest

    manifest = read_manifest(pack)
    rates = []
    for _ in range(3):
        with Reader() as reader:
            size = max(layout.file_bytes for _, layout in manifest.files)
            buffer, num_bytes = AlignedBuffer(size), 0
            started_s = time.perf_counter()
            for entry, layout in manifest.files:
                file = reader.open(layer_path(pack, entry), expected_bytes=layout.file_bytes)
                reader.read([ReadRequest(file, 0, layout.file_bytes, buffer, 0)])
                num_bytes += layout.file_bytes
            rates.append(num_bytes / (time.perf_counter() - started_s) / 1e9)
    return max(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a smaller model, three pairs, nothing written")
    parser.add_argument("--pairs", type=int, default=9)
    arguments = parser.parse_args()
    num_pairs = 3 if arguments.quick else arguments.pairs
    runs: dict[str, list[dict[str, float]]] = {"load": [], "none": []}
    with tempfile.TemporaryDirectory() as folder:
        pack = make_large_pack(Path(folder), 4 if arguments.quick else 28)
        load_once(pack, "load")  # libraries into the page cache
        for _ in range(num_pairs):
            for check, found in runs.items():
                found.append(load_once(pack, check))
        device = device_rate(pack)
    ratios = [on["load_s"] / off["load_s"] for on, off in zip(runs["load"], runs["none"], strict=True)]
    resident = [on["resident_s"] / off["resident_s"] for on, off in zip(runs["load"], runs["none"], strict=True)]
    result: dict[str, Any] = {
        "script": "benchmarks/reliability/checking.py",
        "bytes": runs["load"][0]["resident_bytes"] + runs["load"][0]["pinned_bytes"],
        "load_s": {check: round(statistics.median(run["load_s"] for run in found), 3) for check, found in runs.items()},
        "cpu_s": {check: round(statistics.median(run["cpu_s"] for run in found), 3) for check, found in runs.items()},
        "ratio of load times, median of pairs": round(statistics.median(ratios), 3),
        "ratio of reading the resident file, median of pairs": round(statistics.median(resident), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "xxh3 GB/s": round(hash_rate(), 2),
        "device GB/s": round(device, 2),
    }
    print(json.dumps(result, indent=1))
    if not arguments.quick:
        sys.path.insert(0, str(Path(__file__).parents[1]))
        from machine import describe_commit, describe_machine, today

        result |= {"date": today(), "load_average": Path("/proc/loadavg").read_text().split()[0]}
        result |= {"machine": describe_machine(), "commit": describe_commit(Path(__file__).parents[2])}
        RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
