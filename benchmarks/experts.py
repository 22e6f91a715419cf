"""Time per token of a mixture of experts larger than memory: flashlm at several budgets, llama.cpp, accelerate.

    python benchmarks/experts.py --shape olmoe-1b-7b --cap 4GiB --work DIR

Writes a random checkpoint of the shape, its pack and its GGUF into DIR, then runs every system in turn in a process of its
own whose memory, page cache included, the kernel caps. flashlm runs at the cap and at the budgets of `--budgets` (each
capped at its own). Routing is what random weights make of random tokens (see `random_weights.py`), or drawn (`--skews`).
Steps leave records in DIR, as in `hybrid.py`, whose steps these are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from expert_state import state_bytes
from hybrid import HERE, Record, Run, child, clean, convert, forget, is_same, log, make_checkpoint, make_gguf
from machine import block_queue, describe_block_device, describe_commit, describe_machine, today
from shapes import SHAPES

from flashlm.planner.machine import rates_of
from flashlm.planner.plan import make_plan
from flashlm.planner.shape import HitCurve, read_shape
from flashlm.probe.device_profile import DeviceProfile, profile_path
from flashlm.probe.probe import probe
from flashlm.sizes import format_size, parse_size_bytes

PEERS = ("llama.cpp", "accelerate")
STEPS = ("checkpoint", "convert", "probe", "accelerate", "gguf", "measure", "publish")


class Clock:
    """Lets cells begin until the minutes are up; the next run goes on there."""

    def __init__(self, minutes: float | None) -> None:
        self._ends_s = None if minutes is None else time.monotonic() + 60 * minutes

    def check(self) -> None:
        """Stop the program where the time is up."""
        if self._ends_s is not None and time.monotonic() > self._ends_s:
            log("the minutes are up; the same command goes on here")
            raise SystemExit(3)


def base_spec(run: Run) -> Record:
    """Return what all systems are given alike."""
    args = run.args
    return {
        "job": "measure",
        "context": args.context,
        "vocab_size": run.vocab_size,
        "prompt_tokens": args.prompt_tokens,
        "decode_tokens": args.tokens,
        "prefill_tokens": args.prefill_tokens,
        "num_prefills": 0,
        "num_threads": len(os.sched_getaffinity(0)),
    }


def flashlm_system(run: Run, budget: int, *, watch: bool) -> tuple[Record, int]:
    """Return spec and cap of flashlm at a budget; with `watch` the device is measured between tokens, beside the budget."""
    pack = run.path("pack")
    spec = {"system": "flashlm", "mode": "experts", "pack": str(pack), "dram_bytes": budget}
    spec |= {"num_prefills": run.args.prefills, "watch_device": watch}
    return base_spec(run) | spec, budget + (state_bytes(pack) if watch else 0)


def accelerate_system(run: Run) -> tuple[Record, int]:
    """Return spec and cap of accelerate."""
    spec = {"system": "accelerate", "checkpoint": str(run.path("checkpoint")), "dtype": "bfloat16"}
    spec |= {"offload_folder": str(run.path("offload")), "copy_resident": True}
    spec |= {"cpu_bytes": int(run.cap_bytes * run.args.accelerate_share), "decode_tokens": run.args.peer_tokens}
    return base_spec(run) | spec, run.cap_bytes


def systems(run: Run) -> dict[str, tuple[Record, int]]:
    """Return spec and cap of every system of a round by name."""
    args = run.args
    found = {"watched": flashlm_system(run, run.cap_bytes, watch=True)}
    found[f"experts-{format_size(run.cap_bytes).replace(' ', '')}"] = flashlm_system(run, run.cap_bytes, watch=False)
    if "llama.cpp" in args.peers:
        gguf = {"system": "llama.cpp", "gguf": str(run.path(f"{args.gguf_dtype}.gguf")), "dtype": args.gguf_dtype}
        spec = base_spec(run) | gguf | {"decode_tokens": args.peer_tokens}
        # Its OpenMP threads spin where they wait for each other; asleep they leave the core to whoever reads.
        found["llama.cpp"] = (spec, run.cap_bytes)
        found["llama.cpp-asleep"] = (spec | {"omp_wait_policy": "passive"}, run.cap_bytes)
        for kib in args.read_aheads:  # how much more the kernel reads at a page fault is the device's setting
            found[f"llama.cpp-ahead-{kib}KiB"] = (spec | {"read_ahead_kib": kib}, run.cap_bytes)
    for budget in sorted({*args.budgets} - {run.cap_bytes}):
        found[f"experts-{format_size(budget).replace(' ', '')}"] = flashlm_system(run, budget, watch=False)
    for skew in args.skews:
        spec, cap_bytes = flashlm_system(run, run.cap_bytes, watch=True)
        found[f"skew-{skew:g}"] = (spec | {"routing_skew": skew}, cap_bytes)
    return found


def run_cell(run: Run, clock: Clock, name: str, system: tuple[Record, int]) -> None:
    """Run one system in a process of its own, unless it was done before."""
    spec, cap_bytes = system
    done = run.record(name)
    if done is None or not is_same(done, spec, cap_bytes):
        clock.check()
    with read_ahead(run.folder, spec.get("read_ahead_kib")):
        record = child(run, name, spec, cap_bytes=cap_bytes, drop=True)
    tokens = [sample["wall_s"] for sample in record["result"].get("decode", [])]
    log(f"    s/token: {' '.join(f'{wall_s:.3f}' for wall_s in tokens) or 'none'}")


@contextmanager
def read_ahead(folder: Path, kib: int | None) -> Iterator[None]:
    """Set the read-ahead of the folder's device within the context; None leaves it. Needs root."""
    if kib is None:
        yield
        return
    queue = block_queue(folder)
    assert queue is not None
    setting = queue / "read_ahead_kb"
    before = setting.read_text()
    setting.write_text(f"{kib}\n")
    try:
        yield
    finally:
        setting.write_text(before)


def measure_accelerate(run: Run, clock: Clock) -> None:
    """Run accelerate, and flashlm right before it: accelerate needs the checkpoint, whose place the GGUF may take."""
    if "accelerate" in run.args.peers:
        run_cell(run, clock, "accelerate-flashlm", flashlm_system(run, run.cap_bytes, watch=False))
        run_cell(run, clock, "accelerate-peer", accelerate_system(run))


def measure(run: Run, clock: Clock) -> None:
    """Run every system once per round, in turn; even rounds backwards, so that a drifting machine favours none."""
    for number in range(1, run.args.rounds + 1):
        every = list(systems(run).items())
        for name, system in every if number % 2 else every[::-1]:
            spec, cap_bytes = system
            if number > 1:  # one round of prompts is enough to see
                spec = spec | {"num_prefills": 0}
            run_cell(run, clock, f"round-{number}-{name}", (spec, cap_bytes))


def probe_device(run: Run) -> None:
    """Probe the device as a user would, once, before anything is measured."""
    if run.record("probe") is None:
        log("    flashlm probe")
        probe(run.folder)
        record = json.loads(profile_path(run.folder).read_text())
        (run.path("steps") / "probe.json").write_text(json.dumps({"ok": True, "profile": record}) + "\n")


def predict(run: Run, rows: list[Record]) -> list[Record]:
    """Return, for flashlm at each budget, what `flashlm plan` says beside what was measured.

    Three times: as a user gets it, with uniform routing; with the measured share of experts found; and with the device's
    rate between the tokens too, where it was measured.
    """
    record, config = run.record("probe"), run.path("pack") / "config.json"
    if record is None or not config.exists():
        return []
    shape, rates = (
        read_shape(run.path("pack")),
        rates_of(DeviceProfile.model_validate_json(json.dumps(record["profile"])), "bfloat16"),
    )
    found = []
    for row in rows:
        if row.get("failed") or "hit_share" not in row or row["system"].startswith("skew"):
            continue
        dram_bytes = run.cap_bytes if row["system"] == "watched" else row["cap_bytes"]
        measured = replace(
            shape, hits=HitCurve(points=((1e-9, row["hit_share"]), (1 - 1e-9, row["hit_share"])), origin="measured")
        )
        predicted = {"uniform": (shape, rates), "measured hits": (measured, rates)}
        if row.get("device_gb_per_s"):
            fresh = tuple(replace(each, gb_per_s=row["device_gb_per_s"]) for each in rates.random_settings)
            predicted["measured hits and rate"] = (measured, replace(rates, random_settings=fresh))
        found.append(
            {"system": row["system"], "dram_bytes": dram_bytes, "measured_s": row["s_per_token"]}
            | {
                name: make_plan(a_shape, a_rates, dram_bytes, context=run.args.context).token_s
                for name, (a_shape, a_rates) in predicted.items()
            }
        )
    return found


def summarise(run: Run) -> list[Record]:
    """Return a row for every system: medians over all tokens of all rounds but the first of each, which warms up."""
    rows = []
    every = {name: (cap, f"round-*-{name}") for name, (_, cap) in systems(run).items()}
    if "accelerate" in run.args.peers:
        every["accelerate-flashlm"] = (run.cap_bytes, "accelerate-flashlm")
        every["accelerate"] = (run.cap_bytes, "accelerate-peer")
    for name, (cap_bytes, pattern) in every.items():
        steps = [path.stem for path in sorted(run.path("steps").glob(f"{pattern}.json"))]
        done = [record for record in map(run.record, steps) if record is not None]
        samples = [sample for record in done for sample in record["result"]["decode"][1:]]
        if not samples:
            rows.append({"system": name, "cap_bytes": cap_bytes, "failed": True})
            continue
        row: Record = {
            "system": name,
            "cap_bytes": cap_bytes,
            "num_runs": len(done),
            "s_per_token": statistics.median(sample["wall_s"] for sample in samples),
            "s_per_token_of_runs": [
                statistics.median(sample["wall_s"] for sample in record["result"]["decode"][1:]) for record in done
            ],
            "peak_bytes": max(record["run"]["peak_bytes"] or 0 for record in done),
            "num_oom_kills": sum(record["run"]["num_oom_kills"] for record in done),
        }
        if "hit_experts" in samples[0]:
            row |= summarise_flashlm(
                run, samples, [each for record in done for each in record["result"].get("prefill", [])]
            )
        rows.append(row)
    return rows


def summarise_flashlm(run: Run, samples: list[Record], prompts: list[Record]) -> Record:
    """Return what the telemetry says of decode tokens and prompts, and how it compares with the device's rate then."""
    total = {key: sum(sample[key] for sample in samples) for key in ("hit_experts", "miss_experts", "bytes_read")}
    parts = {key: statistics.median(sample[key] for sample in samples) for key in ("wait_s", "submit_s", "manage_s")}
    waited_s = sum(sample["wait_s"] for sample in samples)
    read_bytes = total["bytes_read"] / len(samples)
    row: Record = {
        "hit_share": total["hit_experts"] / max(total["hit_experts"] + total["miss_experts"], 1),
        "read_bytes_per_token": read_bytes,
        **parts,
        "read_gb_per_s_while_waiting": total["bytes_read"] / waited_s / 1e9 if waited_s else None,
        "prompt_s": [sample["wall_s"] for sample in prompts],
        "prompt_read_bytes": [sample["bytes_read"] for sample in prompts],
    }
    if "device" in samples[0]:
        both = [(sample["wall_s"], floor_s(run, sample), sample["device"]["read_gb_per_s"]) for sample in samples]
        device = statistics.median(rate for _, _, rate in both)
        row |= {
            "device_gb_per_s": device,
            "memory_gb_per_s": statistics.median(sample["device"]["memory_gb_per_s"] for sample in samples),
            "waiting_of_device": row["read_gb_per_s_while_waiting"] / device if waited_s else None,
            "floor_s": statistics.median(floor for _, floor, _ in both),
            "share_of_roofline": statistics.median(floor / wall_s for wall_s, floor, _ in both),
            "prompt_of_reading": [
                sample["wall_s"] * sample["device"]["read_gb_per_s"] * 1e9 / sample["bytes_read"]
                for sample in prompts
                if sample["bytes_read"]
            ],
        }
    return row


def floor_s(run: Run, sample: Record) -> float:
    """Return what a token takes at least: its reads, or all weights that it touches, at the rates measured beside it."""
    device = sample["device"]
    return max(sample["bytes_read"] / device["read_gb_per_s"], active_bytes(run) / device["memory_gb_per_s"]) / 1e9


def active_bytes(run: Run) -> int:
    """Return the bytes of the weights that a token multiplies with."""
    from shapes import config_of, stored_shapes

    config = config_of(run.args.shape)
    share = config.num_experts_per_tok / getattr(config, "num_local_experts", getattr(config, "num_experts", 1))
    return sum(
        int(2 * math.prod(shape) * (share if ".experts." in name else "embed_tokens" not in name))
        for name, shape in stored_shapes(config).items()
    )


def publish(run: Run, rows: list[Record]) -> None:
    """Write the JSON and print the table."""
    whole = {
        "benchmark": "experts",
        "shape": run.args.shape,
        "date": today(),
        **describe_commit(HERE.parent),
        "machine": describe_machine() | {"block_device": describe_block_device(run.folder)},
        "simulated": "random weights, embeddings 64 times as large; random token ids; skew-*: drawn routing",
        "cap_bytes": run.cap_bytes,
        "weight_bytes": run.weight_bytes,
        "settings": {name: value for name, value in vars(run.args).items() if name not in ("work", "results")},
        "systems": rows,
        "predicted": (predicted := predict(run, rows)),
        "records": {path.stem: json.loads(path.read_text()) for path in sorted(run.path("steps").glob("*.json"))},
    }
    text = json.dumps(whole, indent=1).replace(str(run.folder), "WORK").replace(str(run.args.work), "WORK")
    run.args.results.mkdir(parents=True, exist_ok=True)
    (run.args.results / f"experts-{run.args.shape}.json").write_text(text + "\n")
    draw(run, rows)
    for row in predicted:
        errors = ", ".join(
            f"{name} {row[name]:.3f} ({row[name] / row['measured_s'] - 1:+.0%})"
            for name in ("uniform", "measured hits", "measured hits and rate")
            if name in row
        )
        print(f"{row['system']}: measured {row['measured_s']:.3f}; predicted with {errors}")
    print(
        "| system | cap | s/token | experts held | GB/token | GB/s waiting | of the device | share of roofline | killed |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cap = format_size(row["cap_bytes"])
        if row.get("failed"):
            print(f"| {row['system']} | {cap} | failed | | | | | | |")
            continue
        cells = [""] * 5
        if "hit_share" in row:
            rate, share, of_device = (
                row.get(name) for name in ("read_gb_per_s_while_waiting", "share_of_roofline", "waiting_of_device")
            )
            cells = [
                f"{row['hit_share']:.0%}",
                f"{row['read_bytes_per_token'] / 1e9:.3f}",
                "" if rate is None else f"{rate:.2f}",
                "" if of_device is None else f"{of_device:.0%}",
                "" if share is None else f"{share:.0%}",
            ]
        print(f"| {row['system']} | {cap} | {row['s_per_token']:.3f} | {' | '.join(cells)} | {row['num_oom_kills']} |")


def draw(run: Run, rows: list[Record]) -> None:
    """Plot seconds per token over the budget, every run a point, beside the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8))
    budgets = [row for row in rows if row["system"].startswith("experts-") and not row.get("failed")]
    budgets.sort(key=lambda row: row["cap_bytes"])
    for row in budgets:
        runs = row["s_per_token_of_runs"]
        axes.plot([row["cap_bytes"] / 2**30] * len(runs), runs, ".", color="C0", alpha=0.5)
    axes.plot(
        [row["cap_bytes"] / 2**30 for row in budgets], [row["s_per_token"] for row in budgets], "C0-o", label="flashlm"
    )
    peers = {"llama.cpp": "C1s", "llama.cpp-asleep": "C3^", "accelerate": "C2D"}
    for row in rows:
        if row["system"] in peers and not row.get("failed"):
            axes.plot(row["cap_bytes"] / 2**30, row["s_per_token"], peers[row["system"]], label=row["system"])
    axes.set(yscale="log", xlabel="memory of the process, GiB (kernel's cap)", ylabel="seconds per token")
    axes.set_title(f"{run.args.shape}, random weights in 16 bits, {run.weight_bytes / 1e9:.1f} GB", fontsize=10)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(run.args.results / f"experts-{run.args.shape}.png", dpi=110)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shapes = [name for name in SHAPES if name.startswith(("olmoe", "qwen3-30b", "gpt-oss"))]
    add("--shape", choices=shapes, default="olmoe-1b-7b", help="model shape (default: %(default)s)")
    add("--cap", default="4GiB", help="memory of every measured process (default: %(default)s)")
    add("--budgets", type=lambda text: [parse_size_bytes(each) for each in text.split(",") if each], default=[],
        help="further budgets of flashlm, like 3GiB,5GiB,6GiB,8GiB")  # fmt: skip
    add("--peers", type=lambda text: [each for each in text.split(",") if each], default=list(PEERS))
    add("--work", type=Path, required=True, help="folder for everything it writes (42 GB for OLMoE-1B-7B)")
    add("--keep", action="store_true", help="leave everything in the work folder at the end")
    add("--redo", type=lambda text: text.split(","), default=[], help="steps (or prefixes of them) to do again")
    add("--rounds", type=int, default=2)
    add("--tokens", type=int, default=10, help="decode tokens timed for flashlm, after one warm-up")
    add("--peer-tokens", type=int, default=4, help="decode tokens timed for the peers, after one warm-up")
    add("--prompt-tokens", type=int, default=4, help="before the decode tokens")
    add("--prefill-tokens", type=int, default=512)
    add("--prefills", type=int, default=1, help="timed prompts of flashlm")
    add("--context", type=int, default=576)
    add("--accelerate-share", type=float, default=0.7, help="part of the cap that accelerate may fill with weights")
    add("--gguf-dtype", choices=("float16", "bfloat16"), default="float16")
    add("--skews", type=lambda text: [float(each) for each in text.split(",") if each], default=[],
        help="runs at the cap with SIMULATED routing: Zipf exponents of the experts' popularity")  # fmt: skip
    add("--read-aheads", type=lambda text: [int(each) for each in text.split(",") if each], default=[],
        help="runs of llama.cpp with these read-aheads of the device, KiB (sets it, and back; root)")  # fmt: skip
    add("--minutes", type=float, help="begin no further cell after so many; the same command goes on there")
    add("--steps", type=lambda text: text.split(","), default=list(STEPS), help=f"which of {','.join(STEPS)}")
    add("--tight-disk", action="store_true", help="remove the checkpoint before the GGUF is written")
    add("--timeout", type=float, default=3600)
    add("--results", type=Path, default=HERE / "results")
    return parser.parse_args(argv)


def start(args: argparse.Namespace) -> Run:
    """Return the run of these arguments."""
    from shapes import config_of, stored_shapes

    config = config_of(args.shape)
    folder = args.work.resolve() / args.shape
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    return Run(
        args=args,
        folder=folder,
        cap_bytes=parse_size_bytes(args.cap),
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        weight_bytes=2 * sum(map(math.prod, stored_shapes(config).values())),
    )


def write_gguf(run: Run, clock: Clock) -> None:
    """Write the GGUF twin, in the place of the checkpoint where the disk is tight."""
    if "llama.cpp" not in run.args.peers:
        return
    if run.args.tight_disk:
        for name in ("checkpoint", "offload"):
            shutil.rmtree(run.path(name), ignore_errors=True)
    make_gguf(run)


def main() -> None:
    """Do the steps, print the table, write the results."""
    run = start(parse())
    forget(run, run.args.redo)
    clock = Clock(run.args.minutes)
    steps: dict[str, Callable[[], None]] = {
        "checkpoint": lambda: make_checkpoint(run) if run.record("convert") is None else None,
        "convert": lambda: convert(run) if run.record("convert") is None else None,
        "probe": lambda: probe_device(run),
        "accelerate": lambda: measure_accelerate(run, clock),
        "gguf": lambda: write_gguf(run, clock),
        "measure": lambda: measure(run, clock),
    }
    for name, step in steps.items():
        if name in run.args.steps:
            clock.check()
            step()
    if "publish" in run.args.steps:
        publish(run, summarise(run))
        if not run.args.keep:
            clean(run.folder)


if __name__ == "__main__":
    main()
