"""Time per token of a mixture of experts larger than memory: flashlm at several budgets, llama.cpp, accelerate.

    python benchmarks/experts.py --shape olmoe-1b-7b --cap 4GiB --work DIR

Writes a random checkpoint of the shape, its pack and its GGUF into DIR, then runs every system in turn in a process of its
own whose memory, page cache included, the kernel caps. flashlm runs at the cap and at the budgets of `--budgets` (each
capped at its own). Routing is what random weights make of random tokens, which is close to uniform: the worst case for a
cache. Steps leave records in DIR, as in `hybrid.py`, whose steps these are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from pathlib import Path

from hybrid import HERE, Record, Run, child, clean, convert, forget, log, make_checkpoint, make_gguf, measure_rates
from machine import describe_block_device, describe_commit, describe_machine, today
from shapes import SHAPES

from flashlm.sizes import format_size, parse_size_bytes

STEPS = {"checkpoint": make_checkpoint, "gguf": make_gguf, "convert": convert}
PEERS = ("llama.cpp", "accelerate")


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


def systems(run: Run) -> dict[str, tuple[Record, int]]:
    """Return spec and cap of every system by name."""
    args = run.args
    found: dict[str, tuple[Record, int]] = {}
    for budget in (*args.budgets, run.cap_bytes):
        spec = {"system": "flashlm", "mode": "experts", "pack": str(run.path("pack")), "dram_bytes": budget}
        found[f"experts-{format_size(budget).replace(' ', '')}"] = (
            base_spec(run) | spec | {"num_prefills": args.prefills},
            budget,
        )
    if "llama.cpp" in args.peers:
        spec = {"system": "llama.cpp", "gguf": str(run.path(f"{args.gguf_dtype}.gguf")), "dtype": args.gguf_dtype}
        found["llama.cpp"] = (base_spec(run) | spec | {"decode_tokens": args.peer_tokens}, run.cap_bytes)
    if "accelerate" in args.peers:
        spec = {"system": "accelerate", "checkpoint": str(run.path("checkpoint")), "dtype": "bfloat16"}
        spec |= {"offload_folder": str(run.path("offload")), "copy_resident": True}
        spec |= {"cpu_bytes": int(run.cap_bytes * args.accelerate_share), "decode_tokens": args.peer_tokens}
        found["accelerate"] = (base_spec(run) | spec, run.cap_bytes)
    return found


def measure(run: Run) -> None:
    """Run every system once per round, in turn; even rounds backwards, so that a drifting machine favours none."""
    for number in range(1, run.args.rounds + 1):
        measure_rates(run, f"round-{number}-before")
        every = list(systems(run).items())
        for name, (spec, cap_bytes) in every if number % 2 else every[::-1]:
            record = child(run, f"round-{number}-{name}", spec, cap_bytes=cap_bytes, drop=True)
            tokens = [sample["wall_s"] for sample in record["result"].get("decode", [])]
            log(f"    s/token: {' '.join(f'{wall_s:.3f}' for wall_s in tokens) or 'none'}")


def summarise(run: Run) -> list[Record]:
    """Return a row for every system: medians over all tokens of all rounds but the first of each, which warms up."""
    rates = [run.record(f"rates-round-{number}-before") for number in range(1, run.args.rounds + 1)]
    device = [gbs for rate in rates if rate for gbs in rate["result"]["sequential_gb_per_s"]["plain"]]
    memory = [rate["result"]["memory_read_gb_per_s"] for rate in rates if rate is not None]
    rows = []
    for name, (_, cap_bytes) in systems(run).items():
        records = [run.record(f"round-{number}-{name}") for number in range(1, run.args.rounds + 1)]
        done = [record for record in records if record is not None]
        samples = [sample for record in done for sample in record["result"]["decode"][1:]]
        if not samples:
            rows.append({"system": name, "cap_bytes": cap_bytes, "failed": True})
            continue
        row: Record = {
            "system": name,
            "cap_bytes": cap_bytes,
            "s_per_token": statistics.median(sample["wall_s"] for sample in samples),
            "peak_bytes": max(record["run"]["peak_bytes"] or 0 for record in done),
            "num_oom_kills": sum(record["run"]["num_oom_kills"] for record in done),
        }
        if "hit_experts" in samples[0]:
            total = {
                key: sum(sample[key] for sample in samples) for key in ("hit_experts", "miss_experts", "bytes_read")
            }
            waited_s, wall_s = (sum(sample[key] for sample in samples) for key in ("wait_s", "wall_s"))
            read_bytes = total["bytes_read"] / len(samples)
            row |= {
                "hit_share": total["hit_experts"] / (total["hit_experts"] + total["miss_experts"]),
                "read_bytes_per_token": read_bytes,
                "wait_share": waited_s / wall_s,
                "read_gb_per_s_while_waiting": total["bytes_read"] / waited_s / 1e9 if waited_s else None,
                "device_gb_per_s": statistics.median(device) if device else None,
                "memory_gb_per_s": statistics.median(memory) if memory else None,
            }
            if device and memory:
                touched_bytes = active_bytes(run)
                roofline_s = (
                    max(read_bytes / statistics.median(device), touched_bytes / statistics.median(memory)) / 1e9
                )
                row |= {"roofline_s": roofline_s, "share_of_roofline": roofline_s / row["s_per_token"]}
            prefills = [sample["wall_s"] for record in done for sample in record["result"].get("prefill", [])]
            row["prompt_s"] = statistics.median(prefills) if prefills else None
        rows.append(row)
    return rows


def active_bytes(run: Run) -> int:
    """Return the bytes of the weights that a token multiplies with."""
    from shapes import config_of, stored_shapes

    config = config_of(run.args.shape)
    share = config.num_experts_per_tok / config.num_experts
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
        "simulated": "random weights; random token ids; routing as these make it, close to uniform",
        "cap_bytes": run.cap_bytes,
        "weight_bytes": run.weight_bytes,
        "settings": {name: value for name, value in vars(run.args).items() if name not in ("work", "results")},
        "systems": rows,
        "records": {path.stem: json.loads(path.read_text()) for path in sorted(run.path("steps").glob("*.json"))},
    }
    text = json.dumps(whole, indent=1).replace(str(run.folder), "WORK").replace(str(run.args.work), "WORK")
    run.args.results.mkdir(parents=True, exist_ok=True)
    (run.args.results / f"experts-{run.args.shape}.json").write_text(text + "\n")
    print("| system | cap | s/token | experts held | GB/token | GB/s waiting | share of roofline |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for row in rows:
        if row.get("failed"):
            print(f"| {row['system']} | {format_size(row['cap_bytes'])} | failed | | | | |")
            continue
        cells = [""] * 4
        if "hit_share" in row:
            rate, share = row["read_gb_per_s_while_waiting"], row.get("share_of_roofline")
            cells = [
                f"{row['hit_share']:.0%}",
                f"{row['read_bytes_per_token'] / 1e9:.3f}",
                "" if rate is None else f"{rate:.2f}",
                "" if share is None else f"{share:.0%}",
            ]
        cap = format_size(row["cap_bytes"])
        print(f"| {row['system']} | {cap} | {row['s_per_token']:.3f} | {' | '.join(cells)} |")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    shapes = [name for name in SHAPES if name.startswith("olmoe")]
    add("--shape", choices=shapes, default="olmoe-1b-7b", help="model shape (default: %(default)s)")
    add("--cap", default="4GiB", help="memory of every measured process (default: %(default)s)")
    add("--budgets", type=lambda text: [parse_size_bytes(each) for each in text.split(",") if each], default=[],
        help="further budgets of flashlm, like 3GiB,5GiB,6GiB,8GiB")  # fmt: skip
    add("--peers", type=lambda text: [each for each in text.split(",") if each], default=list(PEERS))
    add("--work", type=Path, required=True, help="folder for everything it writes (42 GB for OLMoE-1B-7B)")
    add("--keep", action="store_true", help="leave everything in the work folder at the end")
    add("--redo", type=lambda text: text.split(","), default=[], help="steps (or prefixes of them) to do again")
    add("--rounds", type=int, default=1)
    add("--tokens", type=int, default=24, help="decode tokens timed for flashlm, after one warm-up")
    add("--peer-tokens", type=int, default=6, help="decode tokens timed for the peers, after one warm-up")
    add("--prompt-tokens", type=int, default=16)
    add("--prefill-tokens", type=int, default=512)
    add("--prefills", type=int, default=1, help="timed prompts of flashlm")
    add("--context", type=int, default=576)
    add("--accelerate-share", type=float, default=0.7, help="part of the cap that accelerate may fill with weights")
    add("--gguf-dtype", choices=("float16", "bfloat16"), default="bfloat16")
    add("--rate-bytes", type=parse_size_bytes, default=4 << 30)
    add("--rate-passes", type=int, default=3)
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


def main() -> None:
    """Do the steps, print the table, write the results."""
    run = start(parse())
    forget(run, run.args.redo)
    for name, step in STEPS.items():
        if name != "gguf" or "llama.cpp" in run.args.peers:
            step(run)
    measure(run)
    publish(run, summarise(run))
    if not run.args.keep:
        clean(run.folder)


if __name__ == "__main__":
    main()
