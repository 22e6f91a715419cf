"""Time per token of a mixture of experts larger than memory: flashlm at several budgets, llama.cpp, accelerate.

    python benchmarks/experts.py --shape olmoe-1b-7b --cap 4GiB --work DIR

Writes a random checkpoint of the shape, its pack and its GGUF into DIR, then runs every system in turn in a process of its
own whose memory, page cache included, the kernel caps. flashlm runs at the cap and at the budgets of `--budgets` (each
capped at its own). Routing is what random weights make of random tokens (see `random_weights.py`), or drawn (`--skews`).
Steps leave records in DIR, as in `hybrid.py`, whose steps these are.

With `--gguf q4_0` (or another of `gguf_twin.py`) the source is a quantised GGUF file, the same one for every system, and
BigMoeOnEdge is measured too, whose program `--bigmoe` names:

    python benchmarks/experts.py --shape qwen3-30b-a3b --gguf q4_0 --cap 8GiB --budgets 4GiB --peer-caps 8GiB,4GiB \\
        --activations exact,int8 --prefill-tokens 256,512 --bigmoe PROGRAM --work DIR
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
from typing import Any

from expert_state import state_bytes
from hybrid import (
    HERE,
    Record,
    Run,
    child,
    clean,
    convert,
    convert_to,
    forget,
    gguf_path,
    is_same,
    log,
    make_checkpoint,
    make_gguf,
)
from machine import block_queue, describe_block_device, describe_commit, describe_machine, today
from random_weights import MIXTURE_EMBEDDING_SCALE
from shapes import SHAPES

from flashlm.planner.choices import Activations
from flashlm.planner.machine import rates_of
from flashlm.planner.plan import make_plan
from flashlm.planner.shape import HitCurve, read_shape
from flashlm.probe.device_profile import DeviceProfile, profile_path
from flashlm.probe.probe import probe
from flashlm.sizes import format_size, parse_size_bytes

PEERS = ("llama.cpp", "llama.cpp-asleep", "accelerate")
MIB = 1 << 20
BIGMOE_BESIDE_BYTES = 256 * MIB  # beside weights, cache and KV cache: its buffers for a prompt, and programs
PEER_MARKS = ("C2P", "C5X", "C6*", "C7v")
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
        "decode_tokens": args.tokens + args.warm_up - 1,  # a first one is always added
        "prefill_tokens": max(args.prefill_tokens),
        "prefill_lengths": args.prefill_tokens,
        "num_prefills": 0,
        "num_threads": len(os.sched_getaffinity(0)),
    }


def flashlm_system(run: Run, budget: int, *, watch: bool, activations: str = "exact") -> tuple[Record, int]:
    """Return spec and cap of flashlm at a budget; with `watch` the device is measured between tokens, beside the budget."""
    pack = run.path("pack")
    spec = {"system": "flashlm", "mode": "experts", "pack": str(pack), "dram_bytes": budget}
    spec |= {"num_prefills": run.args.prefills if budget in run.args.peer_caps else 0, "watch_device": watch}
    if activations != "exact":
        spec |= {"activations": activations}
    return base_spec(run) | spec, budget + (state_bytes(pack) if watch else 0)


def llama_system(run: Run, cap_bytes: int) -> tuple[Record, int]:
    """Return spec and cap of llama.cpp's memory map; of a quantised file without its second, repacked copy of weights."""
    args = run.args
    spec = {"system": "llama.cpp", "gguf": str(gguf_path(run)), "dtype": args.gguf_dtype}
    spec |= {"decode_tokens": args.peer_tokens + args.warm_up - 1, "num_prefills": args.peer_prefills}
    if args.gguf:
        spec |= {"repacks": False}
    if args.read_ahead is not None:
        spec |= {"read_ahead_kib": args.read_ahead}
    return base_spec(run) | spec, cap_bytes


def bigmoe_system(run: Run, cap_bytes: int, options: str) -> tuple[Record, int]:
    """Return spec and cap of BigMoeOnEdge: what the cap leaves beside the weights that it always needs is its cache."""
    from gguf_twin import stored_bytes
    from shapes import config_of

    args, config = run.args, config_of(run.args.shape)
    resident = sum(size for name, size in stored_bytes(config, args.gguf_dtype).items() if "_exps." not in name)
    kv_bytes = 2 * 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * args.context
    logits_bytes = config.vocab_size * 4 * args.context  # it reserves them for every token of a prompt
    spec = {
        "job": "bigmoe",
        "system": "BigMoeOnEdge",
        "program": str(args.bigmoe.resolve()),
        "options": options.split(),
    }
    spec |= {"gguf": str(gguf_path(run)), "num_prefills": args.prefills, "built_from": args.bigmoe_built}
    spec |= {"cache_bytes": cap_bytes - resident - kv_bytes - logits_bytes - BIGMOE_BESIDE_BYTES}
    return base_spec(run) | spec, cap_bytes


def accelerate_system(run: Run) -> tuple[Record, int]:
    """Return spec and cap of accelerate."""
    spec = {"system": "accelerate", "checkpoint": str(run.path("checkpoint")), "dtype": "bfloat16"}
    spec |= {"offload_folder": str(run.path("offload")), "copy_resident": True}
    spec |= {"cpu_bytes": int(run.cap_bytes * run.args.accelerate_share), "decode_tokens": run.args.peer_tokens}
    return base_spec(run) | spec, run.cap_bytes


def size_name(cap_bytes: int) -> str:
    """Return a size as a part of a name."""
    return format_size(cap_bytes).replace(" ", "")


def peer_systems(run: Run, cap_bytes: int) -> dict[str, tuple[Record, int]]:
    """Return spec and cap of every peer under one cap by name."""
    args = run.args
    found = {}
    spec, _ = llama_system(run, cap_bytes)
    if "llama.cpp" in args.peers:
        found["llama.cpp"] = (spec, cap_bytes)
    if "llama.cpp-asleep" in args.peers:
        # Its OpenMP threads spin where they wait for each other; asleep they leave the core to whoever reads.
        found["llama.cpp-asleep"] = (spec | {"omp_wait_policy": "passive"}, cap_bytes)
    for kib in args.read_aheads:  # how much more the kernel reads at a page fault is the device's setting
        found[f"llama.cpp-ahead-{kib}KiB"] = (spec | {"read_ahead_kib": kib}, cap_bytes)
    if args.bigmoe:
        for options in args.bigmoe_options:
            name = "".join(["BigMoeOnEdge", *options.replace(" --", "-").replace("--", "-").split()])
            found[name] = bigmoe_system(run, cap_bytes, options)
    suffix = "" if cap_bytes == run.cap_bytes else f"-{size_name(cap_bytes)}"
    return {f"{name}{suffix}": system for name, system in found.items()}


def systems(run: Run) -> dict[str, tuple[Record, int]]:
    """Return spec and cap of every system of a round by name."""
    args = run.args
    found = {}
    for budget in [run.cap_bytes, *sorted({*args.budgets, *args.peer_caps} - {run.cap_bytes})]:
        for kind in args.activations:
            suffix = "" if kind == "exact" else f"-{kind}"
            if budget in args.watched:
                name = "watched" if budget == run.cap_bytes else f"watched-{size_name(budget)}"
                found[f"{name}{suffix}"] = flashlm_system(run, budget, watch=True, activations=kind)
            name = f"experts-{size_name(budget)}{suffix}"
            found[name] = flashlm_system(run, budget, watch=False, activations=kind)
        if budget in args.peer_caps:
            found |= peer_systems(run, budget)
    for skew in args.skews:
        for kind in args.activations:
            spec, cap_bytes = flashlm_system(run, args.skew_budget, watch=True, activations=kind)
            name = f"skew-{skew:g}" + ("" if kind == "exact" else f"-{kind}")
            found[name] = (spec | {"routing_skew": skew, "num_prefills": 0}, cap_bytes)
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
    shape, profile = read_shape(run.path("pack")), DeviceProfile.model_validate_json(json.dumps(record["profile"]))
    found = []
    for row in rows:
        if row.get("failed") or not row["system"].startswith(("watched", "experts", "accelerate-flashlm")):
            continue
        kind: Activations = "int8" if row["system"].endswith("int8") else "exact"
        rates = rates_of(profile, shape.dtype, kind)
        dram_bytes = systems(run).get(row["system"], [{"dram_bytes": run.cap_bytes}])[0]["dram_bytes"]
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
                name: make_plan(a_shape, a_rates, dram_bytes, context=run.args.context, activations=kind).token_s
                for name, (a_shape, a_rates) in predicted.items()
            }
        )
    return found


def summarise(run: Run) -> list[Record]:
    """Return a row for every system: medians over all tokens of all rounds but those of each that warm up."""
    rows = []
    every = {name: (cap, f"round-*-{name}") for name, (_, cap) in systems(run).items()}
    if "accelerate" in run.args.peers:
        every["accelerate-flashlm"] = (run.cap_bytes, "accelerate-flashlm")
        every["accelerate"] = (run.cap_bytes, "accelerate-peer")
    for name, (cap_bytes, pattern) in every.items():
        steps = [path.stem for path in sorted(run.path("steps").glob(f"{pattern}.json"))]
        if not steps:
            continue  # not measured
        done = [record for record in map(run.record, steps) if record is not None]
        samples = [sample for record in done for sample in record["result"]["decode"][run.args.warm_up :]]
        if not samples:
            rows.append({"system": name, "cap_bytes": cap_bytes, "failed": True})
            continue
        row: Record = {
            "system": name,
            "cap_bytes": cap_bytes,
            "num_runs": len(done),
            "s_per_token": statistics.median(sample["wall_s"] for sample in samples),
            "s_per_token_of_runs": [
                statistics.median(sample["wall_s"] for sample in record["result"]["decode"][run.args.warm_up :])
                for record in done
            ],
            "peak_bytes": max(record["run"]["peak_bytes"] or 0 for record in done),
            "num_oom_kills": sum(record["run"]["num_oom_kills"] for record in done),
        }
        prompts = [each for record in done for each in record["result"].get("prefill", [])]
        row["prompt_tokens_per_s"] = {
            num_tokens: statistics.median(
                num_tokens / each["wall_s"] for each in prompts if each["num_tokens"] == num_tokens
            )
            for num_tokens in sorted({each["num_tokens"] for each in prompts})
        }
        if "hit_experts" in samples[0]:
            row |= summarise_flashlm(run, samples, prompts)
        elif "demanded_bytes" in samples[0]:
            row |= {
                "hit_share": 1
                - sum(each["bytes_read"] for each in samples) / sum(each["demanded_bytes"] for each in samples),
                "read_bytes_per_token": statistics.mean(each["bytes_read"] for each in samples),
                **{key: statistics.median(each[key] for each in samples) for key in ("wait_s", "compute_s")},
            }
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
    from gguf_twin import stored_bytes
    from shapes import config_of, stored_shapes

    config = config_of(run.args.shape)
    share = config.num_experts_per_tok / getattr(config, "num_local_experts", getattr(config, "num_experts", 1))
    if run.args.gguf:
        sizes = stored_bytes(config, run.args.gguf)
        return sum(
            int(size * (share if "_exps." in name else "token_embd" not in name)) for name, size in sizes.items()
        )
    return sum(
        int(2 * math.prod(shape) * (share if ".experts." in name else "embed_tokens" not in name))
        for name, shape in stored_shapes(config).items()
    )


def result_name(run: Run) -> str:
    """Return the name of the files of the result."""
    return "-".join(filter(None, ("experts", run.args.shape, run.args.gguf)))


def short(record: Record) -> Record:
    """Return a record with its samples as columns: a line of numbers for what changes, a value for what does not."""
    for name in ("decode", "prefill"):
        samples = record.get("result", {}).get(name)
        if samples:
            flat = [sample | sample.pop("device", {}) for sample in samples]
            columns = {key: [_rounded(sample[key]) for sample in flat] for key in flat[0]}
            record["result"][name] = {
                key: values[0] if values.count(values[0]) == len(values) else " ".join(map(str, values))
                for key, values in columns.items()
            }
    return record


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def publish(run: Run, rows: list[Record]) -> None:
    """Write the JSON and print the table."""
    whole = {
        "benchmark": "experts",
        "shape": run.args.shape,
        "date": today(),
        **describe_commit(HERE.parent),
        "machine": describe_machine() | {"block_device": describe_block_device(run.folder)},
        "simulated": f"random weights, embeddings {run.args.embeddings_larger or MIXTURE_EMBEDDING_SCALE} times as large;"
        " random token ids; skew-*: drawn routing",
        "source": f"GGUF in {run.args.gguf}, the same file for every system"
        if run.args.gguf
        else "safetensors in bfloat16",
        "cap_bytes": run.cap_bytes,
        "weight_bytes": run.weight_bytes,
        "settings": {
            name: value for name, value in vars(run.args).items() if name not in ("work", "results", "bigmoe")
        },
        "systems": rows,
        "predicted": (predicted := predict(run, rows)),
        "records": {
            path.stem: short(json.loads(path.read_text())) for path in sorted(run.path("steps").glob("*.json"))
        },
    }
    text = json.dumps(whole, indent=1).replace(str(run.folder), "WORK").replace(str(run.args.work), "WORK")
    if run.args.bigmoe:
        text = text.replace(str(run.args.bigmoe.resolve()), "BIGMOE")
    run.args.results.mkdir(parents=True, exist_ok=True)
    (run.args.results / f"{result_name(run)}.json").write_text(text + "\n")
    draw(run, rows)
    for row in predicted:
        errors = ", ".join(
            f"{name} {row[name]:.3f} ({row[name] / row['measured_s'] - 1:+.0%})"
            for name in ("uniform", "measured hits", "measured hits and rate")
            if name in row
        )
        print(f"{row['system']}: measured {row['measured_s']:.3f}; predicted with {errors}")
    print(
        "| system | cap | s/token | experts held | GB/token | GB/s waiting | of the device | share of roofline"
        " | prompts, tokens/s | killed |"
    )
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        cap = format_size(row["cap_bytes"])
        if row.get("failed"):
            print(f"| {row['system']} | {cap} | failed | | | | | | | |")
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
        cells.append(", ".join(f"{rate:.1f} ({tokens})" for tokens, rate in row["prompt_tokens_per_s"].items()))
        print(f"| {row['system']} | {cap} | {row['s_per_token']:.3f} | {' | '.join(cells)} | {row['num_oom_kills']} |")


def draw(run: Run, rows: list[Record]) -> None:
    """Plot seconds per token over the budget, every run a point, beside the peers."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.5, 4.8))
    done = [row for row in rows if not row.get("failed")]
    for number, kind in enumerate(run.args.activations):
        ours = [row for row in done if row["system"].startswith("experts-")]
        ours = [row for row in ours if row["system"].endswith("-int8") == (kind == "int8")]
        ours.sort(key=lambda row: row["cap_bytes"])
        color, label = ("C0", "C4")[number], "flashlm" if kind == "exact" else f"flashlm, {kind} activations"
        for row in ours:
            runs = row["s_per_token_of_runs"]
            axes.plot([row["cap_bytes"] / 2**30] * len(runs), runs, ".", color=color, alpha=0.5)
        gib, times = [row["cap_bytes"] / 2**30 for row in ours], [row["s_per_token"] for row in ours]
        axes.plot(gib, times, "-o", color=color, label=label)
    peers = {"llama.cpp": "C1s", "llama.cpp-asleep": "C3^", "accelerate": "C2D"}
    peers |= dict(zip((name for name in peer_systems(run, run.cap_bytes) if "Moe" in name), PEER_MARKS, strict=False))
    for name, mark in peers.items():
        of_peer = [row for row in done if row["system"] in (name, f"{name}-{size_name(row['cap_bytes'])}")]
        if of_peer:
            gib, times = [row["cap_bytes"] / 2**30 for row in of_peer], [row["s_per_token"] for row in of_peer]
            axes.plot(gib, times, mark, label=name)
    axes.set(yscale="log", xlabel="memory of the process, GiB (kernel's cap)", ylabel="seconds per token")
    bits = run.args.gguf or "16 bits"
    title = f"{run.args.shape}, random weights in {bits}, {run.weight_bytes / 1e9:.1f} GB, random tokens"
    axes.set_title(title, fontsize=10)
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(run.args.results / f"{result_name(run)}.png", dpi=110)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shapes = [name for name in SHAPES if name.startswith(("olmoe", "qwen3-30b", "gpt-oss"))]
    add("--shape", choices=shapes, default="olmoe-1b-7b", help="model shape (default: %(default)s)")
    words = lambda text: [each for each in text.split(",") if each]  # noqa: E731
    sizes = lambda text: [parse_size_bytes(each) for each in words(text)]  # noqa: E731
    add("--cap", default="4GiB", help="memory of every measured process (default: %(default)s)")
    add("--budgets", type=sizes, default=[], help="further budgets of flashlm, like 3GiB,5GiB,6GiB,8GiB")
    add("--peers", type=words, default=list(PEERS))
    add("--peer-caps", type=sizes, help="caps of the peers, and of timed prompts (default: the cap)")
    add("--gguf", default="", help="quantised type of the source, like q4_0, mxfp4 (default: 16 bits in safetensors)")
    add("--embeddings-larger", type=int, help="than other weights, in a GGUF: the more, the less tokens are alike")
    add("--activations", type=words, default=["exact"], help="of flashlm: exact, int8 or both (default: exact)")
    add("--bigmoe", type=Path, help="program of BigMoeOnEdge, another peer of a GGUF source")
    add("--bigmoe-options", type=words, default=["--io-threads 4"],
        help="comma-separated ways to run it, each a system of its own, like '--io-threads 8,--overlap'")  # fmt: skip
    add("--bigmoe-built", default="", help="for the record: from what its program was built")
    add("--work", type=Path, required=True, help="folder for everything it writes (42 GB for OLMoE-1B-7B)")
    add("--keep", action="store_true", help="leave everything in the work folder at the end")
    add("--redo", type=lambda text: text.split(","), default=[], help="steps (or prefixes of them) to do again")
    add("--rounds", type=int, default=2)
    add("--tokens", type=int, default=10, help="decode tokens timed for flashlm and BigMoeOnEdge")
    add("--peer-tokens", type=int, default=4, help="decode tokens timed for the other peers")
    add("--prompt-tokens", type=int, default=4, help="before the decode tokens")
    add("--warm-up", type=int, default=1, help="decode tokens before those that are timed")
    add("--prefill-tokens", type=lambda text: [int(each) for each in text.split(",")], default=[512],
        help="lengths of the timed prompts, like 256,512 (default: 512)")  # fmt: skip
    add("--prefills", type=int, default=1, help="timed prompts of each length, of flashlm and BigMoeOnEdge")
    add("--peer-prefills", type=int, default=0, help="timed prompts of llama.cpp, of each length")
    add("--context", type=int, default=576)
    add("--accelerate-share", type=float, default=0.7, help="part of the cap that accelerate may fill with weights")
    add("--gguf-dtype", choices=("float16", "bfloat16"), default="float16")
    add("--skews", type=lambda text: [float(each) for each in text.split(",") if each], default=[],
        help="runs at the cap with SIMULATED routing: Zipf exponents of the experts' popularity")  # fmt: skip
    add("--skew-budget", type=parse_size_bytes, help="memory of those runs (default: the cap)")
    add("--watched", type=sizes, help="budgets at which the device is measured between tokens (default: the cap)")
    add("--read-ahead", type=int, help="KiB that the device reads ahead for llama.cpp (default: as it is set)")
    add("--read-aheads", type=lambda text: [int(each) for each in text.split(",") if each], default=[],
        help="runs of llama.cpp with these read-aheads of the device, KiB (sets it, and back; root)")  # fmt: skip
    add("--note", default="", help="for the record: what else is to be known of this run")
    add("--minutes", type=float, help="begin no further cell after so many; the same command goes on there")
    add("--steps", type=lambda text: text.split(","), default=list(STEPS), help=f"which of {','.join(STEPS)}")
    add("--tight-disk", action="store_true", help="remove the checkpoint before the GGUF is written")
    add("--timeout", type=float, default=3600)
    add("--results", type=Path, default=HERE / "results")
    args = parser.parse_args(argv)
    cap_bytes = parse_size_bytes(args.cap)
    args.peer_caps, args.watched = args.peer_caps or [cap_bytes], args.watched or [cap_bytes]
    args.skew_budget = args.skew_budget or cap_bytes
    if args.gguf:
        args.gguf_dtype, args.peers = args.gguf, [each for each in args.peers if each != "accelerate"]
    elif args.bigmoe:
        parser.error("--bigmoe needs --gguf: it is measured on the file that flashlm converts")
    return args


def start(args: argparse.Namespace) -> Run:
    """Return the run of these arguments."""
    from gguf_twin import stored_bytes
    from shapes import config_of, stored_shapes

    config = config_of(args.shape)
    folder = args.work.resolve() / args.shape
    (folder / "steps").mkdir(parents=True, exist_ok=True)
    if args.gguf:
        weight_bytes = sum(stored_bytes(config, args.gguf).values())
    else:
        weight_bytes = 2 * sum(map(math.prod, stored_shapes(config).values()))
    return Run(
        args=args,
        folder=folder,
        cap_bytes=parse_size_bytes(args.cap),
        vocab_size=config.vocab_size,
        num_layers=config.num_hidden_layers,
        weight_bytes=weight_bytes,
    )


def write_gguf(run: Run, clock: Clock) -> None:
    """Write the GGUF twin, in the place of the checkpoint where the disk is tight."""
    if not {"llama.cpp", "llama.cpp-asleep"} & {*run.args.peers}:
        return
    if run.args.tight_disk:
        for name in ("checkpoint", "offload"):
            shutil.rmtree(run.path(name), ignore_errors=True)
    make_gguf(run)


def convert_gguf(run: Run) -> None:
    """Write the GGUF and convert it, unless that was done."""
    if run.record("convert") is None:
        make_gguf(run)
        convert_to(run, "convert", gguf_path(run), run.path("pack"))


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
    if run.args.gguf:
        steps |= {"checkpoint": lambda: None, "convert": lambda: convert_gguf(run), "gguf": lambda: None}
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
