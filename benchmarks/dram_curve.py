"""Seconds a token over the memory that a model may have: one pack, many caps, flashlm beside llama.cpp's memory map.

    python benchmarks/dram_curve.py --shape opt-6.7b --caps 3.3GiB,5GiB,7GiB,9GiB,11GiB,14GiB --work DIR
    python benchmarks/dram_curve.py --shape deepseek-v3-4-layers --caps 2.5GiB,6GiB,12GiB --peer-caps "" --work DIR

Every point is a process of its own whose memory, page cache included, the kernel caps; `dram` is the cap. Before and after
each point the device's sequential rate is measured over the pack's files, which is what a point's reading is held against:
the floor is streamed bytes over that rate. flashlm's logits must be the same at every cap. Weights are random and so are
the token ids. Every step leaves its record in DIR, so an interrupted run continues where it stopped (the steps and the work
folder are those of `hybrid.py`).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from hybrid import HERE, Run, check_space, child, clean, convert, log, make_checkpoint, make_gguf, start, system_spec
from machine import describe_block_device, describe_commit, describe_machine, today
from shapes import SHAPES

from flashlm.sizes import format_size, parse_size_bytes

Record = dict[str, Any]


def measure_point(run: Run, system: str, cap_bytes: int) -> Record:
    """Run one system under one cap, the device's rate measured before and after; return its point of the curve."""
    name = f"curve-{system}-{cap_bytes}"
    files = sorted((run.path("pack") / "flash").glob("*.rows"))
    spec = {"job": "rates", "files": [str(path) for path in files], "files_are": "the pack's files of units"}
    spec |= {"limit_bytes": run.args.rate_bytes, "num_passes": run.args.rate_passes}
    capped = replace(run, cap_bytes=cap_bytes)
    before = child(run, f"{name}-before", spec, drop=True)
    measured = system_spec(capped, system)
    if system == "hybrid":
        measured |= {"mode": "auto"}  # without a calibration hybrid, of a mixture experts
    record = child(run, name, measured, cap_bytes=cap_bytes, drop=True)
    after = child(run, f"{name}-after", spec, drop=True)
    rates = [rate for each in (before, after) for rate in _reader_rates(each["result"])]
    samples = record["result"].get("decode", [])[1:]  # the first one fills caches
    point: Record = {
        "system": system,
        "cap_bytes": cap_bytes,
        "finished": record["ok"],
        "num_oom_kills": record["run"]["num_oom_kills"],
        "kernel_peak_bytes": record["run"]["peak_bytes"],
        "device_gb_per_s": statistics.median(rates),
        "device_gb_per_s_all": rates,
        "s_per_token_all": [sample["wall_s"] for sample in samples],
        "facts": record["result"].get("facts"),
    }
    logits = run.record_path(name).with_suffix(".npy")
    if system == "hybrid" and logits.exists():
        point["logits_xxh3"] = xxhash.xxh3_64_hexdigest(np.load(logits).tobytes())
    if samples:
        point["s_per_token"] = statistics.median(sample["wall_s"] for sample in samples)
        point["read_bytes_per_token"] = statistics.median(sample["disk_read_bytes"] for sample in samples)
        floor_s = point["read_bytes_per_token"] / 1e9 / point["device_gb_per_s"]
        point |= {"floor_s": floor_s, "share_of_floor": floor_s / point["s_per_token"]}
    return point


def _reader_rates(rates: Record) -> list[float]:
    return [float(rate) for rate in rates["sequential_gb_per_s"]["reader"]]


def describe(point: Record) -> str:
    """Return a point as one line."""
    line = f"{point['system']:>10} {format_size(point['cap_bytes']):>9}"
    if "s_per_token" not in point:
        return f"{line}  did not finish ({point['num_oom_kills']} kills)"
    return (
        f"{line}  {point['s_per_token']:6.2f} s/token, reads {format_size(point['read_bytes_per_token'])},"
        f" {point['share_of_floor']:.0%} of {point['device_gb_per_s']:.2f} GB/s"
    )


def plot(points: list[Record], title: str, path: Path) -> None:
    """Draw seconds a token over the cap, a line for each system and the floor of ours."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for system in dict.fromkeys(point["system"] for point in points):
        drawn = sorted(
            (p for p in points if p["system"] == system and "s_per_token" in p), key=lambda p: p["cap_bytes"]
        )
        gib = [point["cap_bytes"] / 2**30 for point in drawn]
        (line,) = axes.plot(gib, [point["s_per_token"] for point in drawn], marker="o", label=system)
        if system == "hybrid":
            floors = [point["floor_s"] or math.nan for point in drawn]  # nothing is read: no floor on this axis
            axes.plot(gib, floors, linestyle=":", color=line.get_color(), label="bytes read / device rate (hybrid)")
    axes.set_xlabel("memory of the process, page cache included (GiB)")
    axes.set_ylabel("seconds a token")
    axes.set_yscale("log")
    axes.set_title(title, fontsize=10)
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=130)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    sizes = lambda text: [parse_size_bytes(each) for each in text.split(",") if each]  # noqa: E731
    add("--shape", choices=SHAPES, default="opt-6.7b", help="model shape (default: %(default)s)")
    add("--caps", type=sizes, default=sizes("3.3GiB,5GiB,7GiB,9GiB,11GiB,14GiB"), help="comma-separated")
    add("--peer-caps", type=sizes, default=sizes("3.3GiB,7GiB,14GiB"), help="of llama.cpp")
    add("--work", type=Path, required=True, help="folder for everything it writes (40 GB for 7 B parameters)")
    add("--keep", action="store_true", help="leave checkpoint, pack, GGUF and records in the work folder at the end")
    add("--clean", action="store_true", help="only remove what an earlier run left in the work folder")
    add("--tokens", type=int, default=5, help="decode tokens timed for flashlm, after one warm-up")
    add("--peer-tokens", type=int, default=2, help="decode tokens timed for llama.cpp, after one warm-up")
    add("--rate-bytes", type=parse_size_bytes, default=3 << 30, help="bytes of each pass over the files")
    add("--rate-passes", type=int, default=2, help="passes before and after each point")
    add("--timeout", type=float, default=1800, help="seconds after which a measured process is given up")
    add("--results", type=Path, default=HERE / "results", help="folder of the JSON and the plot")
    args = parser.parse_args(argv)
    fixed = {
        "cap": "7GiB",
        "context": 256,
        "prompt_tokens": 16,
        "prefill_tokens": 32,
        "prefills": 0,
        "peer_prefills": 0,
    }
    fixed |= {
        "gguf_dtype": "float16",
        "steps": ["checkpoint", "gguf", "convert"] if args.peer_caps else ["checkpoint", "convert"],
    }
    return argparse.Namespace(**vars(args), **fixed)


def main() -> None:
    """Make what is needed, measure every point, write JSON and plot."""
    args = parse()
    if args.clean:
        clean(args.work.resolve() / args.shape)
        return
    run = start(args)
    check_space(run)
    make_checkpoint(run)
    convert(run)
    if args.peer_caps:
        make_gguf(run)
    wanted = [("hybrid", cap) for cap in args.caps] + [("llama.cpp", cap) for cap in args.peer_caps]
    points = []
    for system, cap_bytes in wanted:
        points.append(measure_point(run, system, cap_bytes))
        log(describe(points[-1]))
    whole = {
        "benchmark": "dram_curve",
        "shape": args.shape,
        "date": today(),
        **describe_commit(HERE.parent),
        "machine": describe_machine() | {"block_device": describe_block_device(run.folder)},
        "simulated": "random weights (one pool of normals, std 0.02, cut at different offsets); random token ids",
        "cache_state": "page cache dropped before every process",
        "weight_bytes": run.weight_bytes,
        "logits_are_the_same": len({point["logits_xxh3"] for point in points if "logits_xxh3" in point}) == 1,
        "points": points,
    }
    name = f"dram-curve-{args.shape}"
    text = json.dumps(whole, indent=1).replace(str(run.folder), "WORK").replace(str(args.work), "WORK")
    (args.results / f"{name}.json").write_text(text + "\n")
    title = f"{args.shape}, 16 bits, {run.weight_bytes / 1e9:.1f} GB of random weights"
    plot(points, title, args.results / f"{name}.png")
    if not args.keep:
        clean(run.folder)


if __name__ == "__main__":
    main()
