"""The paper's Tables 2 and 3, measured: naive, hybrid, + predictor, + window, + bundle, + overlap, and what we add.

    python benchmarks/ladder.py --shape opt-6.7b --work DIR [--dram 7GiB] [--docs docs/ladder.md]
    python benchmarks/ladder.py --pack PACK --text FILE --work DIR        # a calibrated pack: nothing is simulated

With --shape, weights are random in the model's real shape and the rows of every token are TRACE-DRIVEN: a generator fitted
to the published curves names them (`row_trace.py`). Reads, cache, bookkeeping and arithmetic are real. Every rung runs in a
process of its own under a memory limit that the kernel enforces, page cache included. Each leaves its record in DIR, so an
interrupted run continues where it stopped.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from capped import drop_page_cache, run_capped
from machine import describe_block_device, describe_commit, describe_machine, today

HERE = Path(__file__).parent
Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Model:
    """How the paper ran a model: its trace, predictor ranks, window, and the share of it in DRAM."""

    trace: str
    ranks: tuple[int, ...]
    window: int
    share: float


def _ranks(*groups: tuple[int, int]) -> tuple[int, ...]:
    return tuple(rank for rank, count in groups for _ in range(count))


# Facts of the paper, appendices B and C. Phi-2's last group has none there; it gets its neighbours' 800.
MODELS = {
    "opt-6.7b": Model(trace="opt-6.7b", ranks=_ranks((128, 28), (1024, 4)), window=4, share=0.50),
    "falcon-7b": Model(trace="falcon-7b", ranks=_ranks((256, 28), (1152, 4)), window=4, share=0.53),
    "persimmon-8b": Model(trace="persimmon-8b", ranks=_ranks((256, 32), (1152, 4)), window=4, share=0.50),
    "phi-2": Model(
        trace="phi-2", ranks=_ranks((160, 8), (480, 4), (800, 8), (480, 4), (160, 4), (800, 4)), window=4, share=0.65
    ),
    "llama-2-7b-relu": Model(trace="llama-2-7b", ranks=_ranks((256, 14), (1024, 4), (256, 14)), window=2, share=0.55),
    "opt-tiny": Model(trace="opt-6.7b", ranks=_ranks((16, 4)), window=4, share=0.5),
}


@dataclass(frozen=True, kw_only=True)
class Rung:
    """One row of the table."""

    name: str
    mode: str
    rows: str = "overlap"
    window: bool = True  # policy window(k) of the paper; else LRU
    order: str = "random"
    max_gap: int = 0
    num_warm: int = 1
    num_timed: int = 3


RUNGS = (
    Rung(name="naive", mode="naive", num_timed=2),
    Rung(name="hybrid", mode="hybrid"),
    Rung(name="+ predictor", mode="sparse", rows="forgetful-unbundled", num_timed=3),
    Rung(name="+ window", mode="sparse", rows="serial-unbundled", num_warm=8, num_timed=12),
    Rung(name="+ bundle", mode="sparse", rows="serial", num_warm=8, num_timed=16),
    Rung(name="+ overlap", mode="sparse", num_warm=8, num_timed=16),
    Rung(name="LRU for window", mode="sparse", window=False, num_warm=12, num_timed=16),
    Rung(name="+ hot first", mode="sparse", window=False, order="hot_first", max_gap=1, num_warm=12, num_timed=16),
)


OVERHEAD_BYTES = 800_000_000  # process, KV cache, working memory and staging, beside the weights

COLUMNS = (
    "GB held", "share", "GB/token", "reads/token", "GB/s", "I/O ms", "management ms", "compute ms", "total ms",
    "vs naive", "vs hybrid",
)  # fmt: skip


def log(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def child(work: Path, step: str, spec: Record, *, cap_bytes: int | None, script: str = "ladder_child.py") -> Record:
    """Run one job in a child process, or take its record from an earlier run with the same spec."""
    out = work / f"{step}.json"
    asked = {"spec": spec, "cap_bytes": cap_bytes}
    if out.exists():
        before: Record = json.loads(out.read_text())
        if before.get("asked") == asked and before.get("finished"):
            return before
        out.unlink()
    log(f"{step}: started")
    spec_path = work / f"{step}.spec"
    spec_path.write_text(json.dumps(spec))
    cache_state = drop_page_cache([])
    argv = [sys.executable, str(HERE / script), str(spec_path), str(out)]
    if cap_bytes is None:
        subprocess.run(argv, check=False)
        extra: Record = {}
    else:
        done = run_capped(argv, limit_bytes=cap_bytes, timeout_s=1200)
        extra = {"peak_bytes": done.peak_bytes, "num_oom_kills": done.num_oom_kills, "returncode": done.returncode}
    record: Record = json.loads(out.read_text()) if out.exists() else {}
    record |= {"asked": asked, "page_cache": cache_state, "load_average": os.getloadavg()[0], **extra}
    out.write_text(json.dumps(record, indent=1))
    if not record.get("finished"):
        raise SystemExit(f"{step} failed: {extra}")
    log(f"{step}: done")
    return record


def make_pack(shape: str, work: Path) -> Path:
    """Return a pack of random weights, converted from a checkpoint that is removed again."""
    pack, checkpoint = work / "pack", work / "checkpoint"
    if (pack / "flash" / "manifest.json").exists():
        return pack
    from shapes import config_of

    script = {"script": "hybrid_child.py", "cap_bytes": None}
    if shutil.disk_usage(work).free < 38e9 and shape != "opt-tiny":
        raise SystemExit(f"{work} has {shutil.disk_usage(work).free / 1e9:.0f} GB free; 42 GB are needed")
    child(work, "checkpoint", {"job": "checkpoint", "checkpoint": str(checkpoint), "shape": shape}, **script)
    spec = {"job": "convert", "checkpoint": str(checkpoint), "pack": str(pack), "dtype": "bfloat16"}
    child(work, "convert", spec, **script)
    shutil.rmtree(checkpoint)
    assert config_of(shape)
    return pack


def rung_spec(rung: Rung, pack: Path, args: argparse.Namespace, vocab_size: int, model: Model | None) -> Record:
    num_tokens = rung.num_warm + rung.num_timed
    trace = None
    if model is not None and rung.mode == "sparse":
        trace = {"model": model.trace, "num_tokens": num_tokens, "order": rung.order}
    window = (model.window if model else args.window) if rung.window else None
    return {
        "job": "rung",
        "pack": str(pack),
        "dram_bytes": args.dram_bytes,
        "mode": rung.mode,
        "rows": rung.rows,
        "window": window,
        "max_gap": rung.max_gap,
        "trace": trace,
        "context": args.context,
        "vocab_size": vocab_size,
        "ids": args.ids[:num_tokens] if args.ids else None,
        "pin_bytes": args.held_bytes if rung.mode == "hybrid" else None,
        "cache_rows": args.cache_rows if rung.mode == "sparse" else None,
        "num_tokens": num_tokens,
    }


def summary(rung: Rung, record: Record, probe: Record) -> Record:
    """Return a row of the table: medians over the timed tokens, in milliseconds and bytes."""
    timed = record["tokens"][rung.num_warm :]

    def median(value: Any) -> float:
        return statistics.median(value(token) for token in timed)

    io_ms = median(lambda token: token["wait_s"] + token["submit_s"]) * 1e3
    manage_ms = median(lambda token: token["manage_s"]) * 1e3
    total_ms = median(lambda token: token["wall_s"]) * 1e3
    read_bytes = median(lambda token: token["bytes_read"])
    used = median(lambda token: token["hit_rows"] + token["miss_rows"])
    # Bytes that one token's arithmetic reads from memory: weights, predictors, and of every used row its trigger part;
    # of the rows that then fire (about half with random weights) the rest.
    touched = record["resident_bytes"] + record["predictor_bytes"]
    touched += (
        used * record["row_bytes"] * 0.75 if rung.mode == "sparse" else record["total_bytes"] - record["resident_bytes"]
    )
    row: Record = {
        "name": rung.name,
        "held_gb": record["held_bytes"] / 1e9,
        "held_share": record["held_bytes"] / record["total_bytes"],
        "read_gb": read_bytes / 1e9,
        "num_reads": median(lambda token: token["num_reads"]),
        "io_ms": io_ms,
        "manage_ms": manage_ms,
        "predict_ms": median(lambda token: token["predict_s"]) * 1e3,
        "compute_ms": median(lambda token: token["wall_s"] - token["wait_s"] - token["submit_s"] - token["manage_s"])
        * 1e3,
        "total_ms": total_ms,
        "min_total_ms": min(token["wall_s"] for token in timed) * 1e3,
        "rows_used": used,
        "new_rows": median(lambda token: token["miss_rows"]),
        "peak_bytes": record.get("peak_bytes"),
        "num_timed": len(timed),
        "touched_bytes": touched,
        "compute_floor_ms": touched / probe["memory_read_gb_per_s"] / 1e6,
        "occupancy": statistics.mean(record["occupancy"][rung.num_warm :]) if record["occupancy"] else None,
    }
    row["gb_per_s"] = read_bytes / io_ms / 1e6 if io_ms else None
    return row


def table(rows: list[Record], title: str) -> str:
    """Return the rows as a Markdown table."""
    lines = [title, "", "| |" + "".join(f" {name} |" for name in COLUMNS), "|---|" + "---:|" * len(COLUMNS)]
    naive = next(row["total_ms"] for row in rows if row["name"] == "naive")
    hybrid = next(row["total_ms"] for row in rows if row["name"] == "hybrid")
    for row in rows:
        rate = f"{row['gb_per_s']:.2f}" if row["gb_per_s"] and row["name"] not in ("naive", "hybrid") else ""
        cells = [
            f"{row['held_gb']:.2f}",
            f"{row['held_share']:.0%}",
            f"{row['read_gb']:.3f}",
            f"{row['num_reads']:,.0f}",
            rate,
            *(f"{row[name]:.1f}" for name in ("io_ms", "manage_ms", "compute_ms", "total_ms")),
            f"{naive / row['total_ms']:.1f}x",
            f"{hybrid / row['total_ms']:.1f}x",
        ]
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def own_ids(pack: Path, text: Path | None) -> list[int]:
    """Return the tokens of a text for a model of one's own."""
    from flashlm.calibration.evaluate import read_token_ids

    if text is None:
        raise SystemExit("--pack needs --text FILE: tokens that the model has not seen")
    ids: list[int] = read_token_ids(pack, text, max_tokens=4096).tolist()
    return ids


def measure_curve(
    args: argparse.Namespace, pack: Path, vocab_size: int, model: Model | None, probe: Record, total_bytes: int
) -> list[Record]:
    """Return the sparse rung at several budgets: latency over the share of the model in DRAM (Fig 7)."""
    rung = next(rung for rung in RUNGS if rung.name == "LRU for window")
    points = []
    for share in map(float, args.shares.split(",")):
        dram_bytes = int(total_bytes * share + OVERHEAD_BYTES)
        spec = rung_spec(rung, pack, args, vocab_size, model) | {"dram_bytes": dram_bytes}
        record = child(pack.parent if model else args.work, f"share-{share}", spec, cap_bytes=dram_bytes)
        points.append(summary(rung, record, probe) | {"dram_bytes": dram_bytes})
    return points


def draw_curve(points: list[Record], name: str, simulated: str, path: Path) -> None:
    """Draw what a token takes over the share of the weights in DRAM."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    shares = [100 * point["held_share"] for point in points]
    for key, label in (
        ("total_ms", "total"),
        ("compute_ms", "compute"),
        ("io_ms", "flash"),
        ("manage_ms", "management"),
    ):
        axes.plot(shares, [point[key] for point in points], "o-", label=label)
    axes.set(
        xlabel="weights in DRAM, % of the model", ylabel="ms per token", title=f"{name}, sparse, bf16\n{simulated}"
    )
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--shape", choices=list(MODELS), help="random weights in this shape, trace-driven rows")
    source.add_argument("--pack", type=Path, help="a calibrated pack; its own predictors, nothing simulated")
    parser.add_argument("--work", type=Path, required=True, help="folder for what it writes")
    parser.add_argument("--dram", help="budget of the process; default: the paper's share of the model plus 0.8 GB")
    parser.add_argument("--text", type=Path, help="for --pack: the tokens that are run")
    parser.add_argument("--ffn-share", type=float, default=0.5, help="for --pack: share of the FFN's rows in DRAM")
    parser.add_argument("--context", type=int, default=256, help="tokens that the KV cache may hold")
    parser.add_argument("--window", type=int, default=4, help="k for --pack")
    parser.add_argument(
        "--shares", help="also draw latency over DRAM (the paper's Fig 7) at these shares, like 0.4,0.5,1"
    )
    parser.add_argument("--rungs", help="comma-separated names; default all")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON")
    parser.add_argument("--keep", action="store_true", help="leave the pack in the work folder")
    return parser.parse_args(argv)


def main() -> None:
    from flashlm.pack.manifest import read_manifest
    from flashlm.sizes import parse_size_bytes

    args = parse()
    name = args.shape or args.pack.name
    work = args.work / name
    work.mkdir(parents=True, exist_ok=True)
    pack = args.pack or make_pack(args.shape, work)
    manifest = read_manifest(pack)
    model = MODELS[args.shape] if args.shape else None
    total_bytes = manifest.resident.num_bytes + manifest.streamed_bytes
    share = model.share if model else 0.5
    args.dram_bytes = parse_size_bytes(args.dram) if args.dram else int(total_bytes * share + OVERHEAD_BYTES)
    args.ids, args.held_bytes, args.cache_rows = None, None, None
    if model is None:
        # A model so small that the process outweighs it: what is held is set by its share, not by the budget.
        args.dram_bytes = parse_size_bytes(args.dram or "2GiB")
        args.ids = own_ids(pack, args.text)
        args.held_bytes = int(manifest.streamed_bytes * args.ffn_share)
        args.cache_rows = int(sum(entry.num_rows for entry in manifest.layers) * args.ffn_share)
    if model is not None:
        spec = {"job": "prepare", "pack": str(pack), "model": model.trace, "ranks": list(model.ranks)}
        child(work, "prepare", spec, cap_bytes=None)
    row_bytes = manifest.row_stride_bytes
    sizes = [row_bytes, row_bytes // (3 if manifest.has_gate else 2) // 512 * 512]
    probe_spec = {"job": "probe", "pack": str(pack), "row_bytes": sizes, "batches": [400, 4000], "repeats": 15}
    probe = child(work, "probe-before", probe_spec, cap_bytes=None)
    chosen = [rung for rung in RUNGS if not args.rungs or rung.name in args.rungs.split(",")]
    vocab_size = json.loads((pack / "config.json").read_text())["vocab_size"]
    rows, records = [], {}
    for rung in chosen:
        step = "rung-" + rung.name.replace(" ", "-").replace("+", "plus")
        # The pages of the kernel's own bookkeeping count, too: the limit is dram, no more.
        record = child(work, step, rung_spec(rung, pack, args, vocab_size, model), cap_bytes=args.dram_bytes)
        records[rung.name] = record
        rows.append(summary(rung, record, probe))
    after = child(work, "probe-after", probe_spec, cap_bytes=None)
    simulated = "rows of each token: TRACE-DRIVEN (simulated), weights random" if model else "nothing simulated"
    title = f"**{name}**, bf16, dram {args.dram_bytes / 2**30:.2f} GiB (kernel-enforced). {simulated}."
    curve = measure_curve(args, pack, vocab_size, model, probe, total_bytes) if args.shares else []
    text = table(rows, title)
    print("\n" + text)
    result = {
        "what": "ladder of the paper's Table 2, measured",
        "shape": name,
        "simulated": simulated,
        "date": today(),
        "machine": describe_machine() | {"device": describe_block_device(work)},
        "commit": describe_commit(HERE.parent),
        "dram_bytes": args.dram_bytes,
        "probe_before": {key: probe[key] for key in ("random_reads", "memory_read_gb_per_s")},
        "probe_after": {key: after[key] for key in ("random_reads", "memory_read_gb_per_s")},
        "rows": rows,
        "curve": curve,
        "table": text,
        "tokens": {name: record["tokens"] for name, record in records.items()},
        "load_averages": {name: record["load_average"] for name, record in records.items()},
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / f"ladder-{name}.json").write_text(json.dumps(result, indent=1) + "\n")
    if curve:
        draw_curve(curve, name, simulated, args.results / f"ladder-{name}-dram.png")
    log(f"written: {args.results / f'ladder-{name}.json'}")
    if model is not None and not args.keep:
        shutil.rmtree(pack)


if __name__ == "__main__":
    main()
