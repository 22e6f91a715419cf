"""Time per token of a model twice the size of memory: flashlm (naive, hybrid), transformers + accelerate, llama.cpp.

    python benchmarks/hybrid.py --shape opt-6.7b --cap 7GiB --work DIR

Writes a random checkpoint of the shape, its pack and its GGUF into DIR, then runs every system in turn in a process of
its own whose memory, page cache included, the kernel caps. Every step leaves its record in DIR, so an interrupted run
continues where it stopped. `benchmarks/README.md` says what is measured and what is simulated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from capped import drop_page_cache, run_capped
from hybrid_report import publish, summarise
from machine import describe_block_device, describe_commit, describe_machine, machine_counters, today
from shapes import SHAPES

from flashlm.sizes import format_size, parse_size_bytes

HERE = Path(__file__).resolve().parent
SYSTEMS = ("naive", "hybrid", "accelerate", "accelerate-mapped", "llama.cpp")
STEPS = ("checkpoint", "gguf", "dd", "convert", "measure", "arithmetic")
OWN_ENTRIES = (
    "checkpoint",
    "pack",
    "float16.gguf",
    "bfloat16.gguf",
    "float16.partial",
    "bfloat16.partial",
    "offload",
    "few-layers",
    "dd.bin",
    "steps",
)
ARITHMETIC_LAYERS = 4

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One invocation: its settings and its folder (`DIR/<shape>`)."""

    args: argparse.Namespace
    folder: Path
    cap_bytes: int
    vocab_size: int
    num_layers: int
    weight_bytes: int

    def path(self, name: str) -> Path:
        """Return a path in the work folder."""
        return self.folder / name

    def record_path(self, step: str) -> Path:
        """Return where the record of `step` lies."""
        return self.folder / "steps" / f"{step}.json"

    def record(self, step: str) -> Record | None:
        """Return the record of a step that has succeeded, or None."""
        path = self.record_path(step)
        record: Record | None = json.loads(path.read_text()) if path.exists() else None
        return record if record and record["ok"] else None

    def keep(self, step: str, record: Record) -> Record:
        """Write the record of a step."""
        path = self.record_path(step)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(record, indent=1))
        partial.rename(path)
        return record


def log(text: str) -> None:
    """Say what happens, on stderr."""
    print(f"[{time.strftime('%H:%M:%S')}] {text}", file=sys.stderr, flush=True)


def child(run: Run, step: str, spec: Record, *, cap_bytes: int | None = None, drop: bool = False) -> Record:
    """Run a job of `hybrid_child.py` and return its record, an earlier one where the settings are the same.

    A failure is a record too, but the next run tries again.
    """
    done = run.record(step)
    if done and is_same(done, spec, cap_bytes):
        log(f"{step}: done before")
        return done
    spec_path, out_path = run.record_path(step).with_suffix(".spec"), run.record_path(step).with_suffix(".out")
    spec_path.parent.mkdir(parents=True, exist_ok=True)
    spec_path.write_text(json.dumps(spec, indent=1))
    out_path.unlink(missing_ok=True)
    cache_state = drop_page_cache(model_files(run)) if drop else "as found"
    log(f"{step}: started" + (f" under {format_size(cap_bytes)}" if cap_bytes else ""))
    load_before, counters = os.getloadavg()[0], machine_counters(run.folder)
    argv = [sys.executable, str(HERE / "hybrid_child.py"), str(spec_path), str(out_path)]
    ended: Record
    if cap_bytes:
        ended = asdict(run_capped(argv, limit_bytes=cap_bytes, timeout_s=run.args.timeout))
    else:
        start_s = time.monotonic()
        returncode = subprocess.run(argv, check=False).returncode
        ended = {"returncode": returncode, "wall_s": time.monotonic() - start_s}
    result = json.loads(out_path.read_text()) if out_path.exists() else {}
    ok = ended["returncode"] == 0 and result.get("finished", False)
    log(f"{step}: {'done' if ok else 'FAILED'} in {ended['wall_s']:.1f} s")
    ended |= {"cache_state": cache_state, "load_average_before": load_before, "cap_bytes": cap_bytes}
    ended["whole_machine"] = {name: now - counters[name] for name, now in machine_counters(run.folder).items()}
    return run.keep(step, {"ok": ok, "spec": spec, "run": ended, "result": result})


def is_same(record: Record, spec: Record, cap_bytes: int | None) -> bool:
    """Return whether a record was made with these settings."""
    return bool(record["spec"] == spec and record["run"]["cap_bytes"] == cap_bytes)


def must(record: Record, step: str) -> Record:
    """Return the record, or stop: nothing after `step` makes sense without it."""
    if not record["ok"]:
        raise SystemExit(f"{step} failed with status {record['run']['returncode']}: see the messages above")
    return record


def model_files(run: Run) -> list[Path]:
    """Return every weight file in the work folder."""
    folders = [run.path("checkpoint"), run.path("pack"), run.path("pack") / "flash"]
    files = [path for folder in folders if folder.exists() for path in folder.iterdir() if path.is_file()]
    return files + list(run.folder.glob("*.gguf"))


def gguf_path(run: Run) -> Path:
    """Return where the GGUF of the chosen dtype lies."""
    return run.path(f"{run.args.gguf_dtype}.gguf")


def make_checkpoint(run: Run) -> None:
    """Write the random checkpoint."""
    spec = {"job": "checkpoint", "shape": run.args.shape, "checkpoint": str(run.path("checkpoint"))}
    must(child(run, "checkpoint", spec), "checkpoint")


def make_gguf(run: Run) -> None:
    """Write the GGUF twin."""
    spec = {"job": "gguf", "shape": run.args.shape, "gguf": str(gguf_path(run)), "dtype": run.args.gguf_dtype}
    if getattr(run.args, "embeddings_larger", None):
        spec |= {"embeddings_larger": run.args.embeddings_larger}
    must(child(run, "gguf", spec), "gguf")


def measure_dd(run: Run) -> None:
    """Write as many bytes as the checkpoint has with dd."""
    if run.record("dd"):
        return
    from device_rate import direct_write_rate

    log(f"dd: writes {format_size(run.weight_bytes)} and removes it")
    run.keep("dd", {"ok": True, "result": direct_write_rate(run.folder, run.weight_bytes)})


def convert_to(run: Run, step: str, checkpoint: Path, pack: Path) -> Record:
    """Convert a checkpoint to a pack, the page cache empty; anew, since a resumed conversion has no time."""
    if run.record(step) is None:
        shutil.rmtree(pack, ignore_errors=True)
    spec = {"job": "convert", "checkpoint": str(checkpoint), "pack": str(pack), "dtype": "bfloat16"}
    return must(child(run, step, spec, drop=True), step)


def convert(run: Run) -> None:
    """Convert the checkpoint."""
    record = convert_to(run, "convert", run.path("checkpoint"), run.path("pack"))
    pack_bytes = sum(path.stat().st_size for path in run.path("pack").rglob("*") if path.is_file())
    run.keep("convert", record | {"pack_bytes": pack_bytes})


def measure_rates(run: Run, when: str) -> None:
    """Measure the device's sequential rate over the pack's layer files (the checkpoint's, without a pack)."""
    files, files_are = sorted((run.path("pack") / "flash").glob("layer-*.rows")), "the pack's layer files"
    if not files:
        files, files_are = sorted(run.path("checkpoint").glob("*.safetensors")), "the checkpoint"
    spec = {"job": "rates", "files": [str(path) for path in files], "files_are": files_are}
    spec |= {"limit_bytes": run.args.rate_bytes, "num_passes": run.args.rate_passes}
    child(run, f"rates-{when}", spec, drop=True)


def system_spec(run: Run, system: str) -> Record:
    """Return the spec of one measured system."""
    args = run.args
    spec: Record = {
        "job": "measure",
        "system": system,
        "context": args.context,
        "vocab_size": run.vocab_size,
        "prompt_tokens": args.prompt_tokens,
        "decode_tokens": args.peer_tokens,
        "prefill_tokens": args.prefill_tokens,
        "num_prefills": args.peer_prefills,
        "num_threads": len(os.sched_getaffinity(0)),
    }
    if system in ("naive", "hybrid"):
        spec |= {"system": "flashlm", "mode": system, "pack": str(run.path("pack")), "dram_bytes": run.cap_bytes}
        spec |= {"decode_tokens": args.tokens, "num_prefills": args.prefills if system == "hybrid" else 0}
    elif system.startswith("accelerate"):
        spec["system"] = "accelerate"
        cpu_bytes = int(run.cap_bytes * args.accelerate_share)
        spec |= {"checkpoint": str(run.path("checkpoint")), "offload_folder": str(run.path("offload"))}
        spec |= {"cpu_bytes": cpu_bytes, "dtype": args.accelerate_dtype}
        spec |= {"copy_resident": system == "accelerate"}
    else:
        spec |= {"gguf": str(gguf_path(run)), "dtype": args.gguf_dtype}
    return spec


def is_measured(run: Run, number: int, system: str) -> bool:
    """Return whether a system's record of a round is there."""
    record = run.record(f"round-{number}-{system}")
    return record is not None and is_same(record, system_spec(run, system), run.cap_bytes)


def measure(run: Run) -> None:
    """Run every system once per round, in turn; odd rounds backwards, so that a drifting machine favours none."""
    for number in range(1, run.args.rounds + 1):
        systems = run.args.systems if number % 2 else run.args.systems[::-1]
        if not all(is_measured(run, number, system) for system in systems):
            forget(run, [f"rates-round-{number}-"])  # the rates must be of the same time as what they judge
        measure_rates(run, f"round-{number}-before")
        for system in systems:
            record = child(
                run, f"round-{number}-{system}", system_spec(run, system), cap_bytes=run.cap_bytes, drop=True
            )
            tokens = [sample["wall_s"] for sample in record["result"].get("decode", [])]
            log(f"    s/token: {' '.join(f'{wall_s:.2f}' for wall_s in tokens) or 'none'}")
        measure_rates(run, f"round-{number}-after")


def measure_arithmetic(run: Run) -> None:
    """Time the prompt's arithmetic on a model of a few layers, all resident."""
    folder = run.path("few-layers")
    num_layers = min(ARITHMETIC_LAYERS, run.num_layers)
    checkpoint, pack = folder / "checkpoint", folder / "pack"
    spec: Record = {"job": "checkpoint", "shape": run.args.shape, "checkpoint": str(checkpoint)}
    must(child(run, "arithmetic-checkpoint", spec | {"num_layers": num_layers}), "arithmetic-checkpoint")
    convert_to(run, "arithmetic-pack", checkpoint, pack)
    spec = {"job": "arithmetic", "pack": str(pack), "dram_bytes": 2 * run.cap_bytes + (2 << 30), "mode": "hybrid"}
    spec |= {"context": run.args.context, "vocab_size": run.vocab_size, "prefill_tokens": run.args.prefill_tokens}
    child(run, "arithmetic", spec | {"full_layers": run.num_layers, "repeats": 3})


def check_space(run: Run) -> None:
    """Say what will be written and refuse where it does not fit."""
    todo = [step for step in run.args.steps if not run.record(step)]
    lasting = sum(run.weight_bytes for step in todo if step in ("checkpoint", "gguf", "convert"))
    if "arithmetic" in todo:
        lasting += 2 * run.weight_bytes * ARITHMETIC_LAYERS // run.num_layers
    # dd removes its file before the conversion begins
    before_conversion = sum(run.weight_bytes for step in todo if step in ("checkpoint", "gguf", "dd"))
    needed = max(lasting, before_conversion)
    free = shutil.disk_usage(run.folder).free
    log(f"writes about {format_size(needed)} more into {run.folder}, where {format_size(free)} are free")
    if free < needed * 1.02 + (1 << 30):
        raise SystemExit(f"not enough space: {format_size(needed * 1.02 + (1 << 30))} wanted. Choose another --work")


def clean(folder: Path) -> None:
    """Remove what this program writes into its folder, and the folder if nothing else is in it."""
    for name in OWN_ENTRIES:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    if folder.exists() and not any(folder.iterdir()):
        folder.rmdir()


def belongs(run: Run, step: str, record: Record) -> bool:
    """Return whether a record is of this run's rounds and cap, not of an earlier run with others."""
    words = step.removeprefix("rates-").split("-")
    if words[0] != "round":
        return True
    of_cap = step.startswith("rates-") or record["run"]["cap_bytes"] == run.cap_bytes
    return of_cap and int(words[1]) <= run.args.rounds


def gather(run: Run) -> Record:
    """Return the whole result: facts, settings, and every record."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted(run.path("steps").glob("*.json"))}
    records = {step: record for step, record in records.items() if belongs(run, step, record)}
    settings = {name: value for name, value in vars(run.args).items() if name not in ("work", "results", "docs")}
    whole = {
        "benchmark": "hybrid",
        "shape": run.args.shape,
        "date": today(),
        **describe_commit(HERE.parent),
        "machine": describe_machine() | {"block_device": describe_block_device(run.folder)},
        "simulated": "random weights (one pool of normals, std 0.02, cut at different offsets); random token ids",
        "cap_bytes": run.cap_bytes,
        "weight_bytes": run.weight_bytes,
        "num_layers": run.num_layers,
        "settings": settings,
        "records": records,
    }
    text = json.dumps(whole).replace(str(run.folder), "WORK").replace(str(run.args.work), "WORK")
    return summarise(json.loads(text), run.path("steps"))


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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--shape", choices=SHAPES, default="opt-6.7b", help="model shape (default: %(default)s)")
    add("--cap", default="7GiB", help="memory of every measured process, page cache included (default: %(default)s)")
    add("--work", type=Path, required=True, help="folder for everything it writes (45 GB for 7 B parameters)")
    add("--keep", action="store_true", help="leave checkpoint, pack, GGUF and records in the work folder at the end")
    add("--clean", action="store_true", help="only remove what an earlier run left in the work folder")
    add("--systems", type=lambda text: text.split(","), default=list(SYSTEMS), help="comma-separated, in order")
    add("--steps", type=lambda text: text.split(","), default=list(STEPS), help=f"which of {','.join(STEPS)}")
    add("--redo", type=lambda text: text.split(","), default=[], help="steps (or prefixes of them) to do again")
    add("--rounds", type=int, default=1, help="how often the whole cycle of systems runs (default: %(default)s)")
    add("--tokens", type=int, default=6, help="decode tokens timed for flashlm, after one warm-up")
    add("--peer-tokens", type=int, default=4, help="decode tokens timed for the peers, after one warm-up")
    add("--prompt-tokens", type=int, default=16, help="prompt before the decode tokens")
    add("--prefill-tokens", type=int, default=128, help="tokens of the timed prompt")
    add("--prefills", type=int, default=2, help="timed prompts of flashlm hybrid")
    add("--peer-prefills", type=int, default=0, help="timed prompts of the peers")
    add("--context", type=int, default=256, help="tokens that the KV cache may hold")
    add("--accelerate-share", type=float, default=0.85, help="part of the cap that accelerate may fill with weights")
    add("--accelerate-dtype", default="bfloat16", help="dtype that accelerate computes in")
    add("--gguf-dtype", choices=("float16", "bfloat16"), default="float16", help="dtype of the GGUF's matrices")
    add("--rate-bytes", type=parse_size_bytes, default=4 << 30, help="bytes of each pass over the files")
    add("--rate-passes", type=int, default=3, help="passes, before and after each round")
    add("--timeout", type=float, default=3600, help="seconds after which a measured process is given up")
    add("--results", type=Path, default=HERE / "results", help="folder of the JSON and the plot")
    add("--docs", type=Path, help="Markdown file whose table is replaced (docs/benchmarks.md)")
    args = parser.parse_args(argv)
    for given, known in ((args.systems, SYSTEMS), (args.steps, STEPS)):
        unknown = set(given) - set(known)
        if unknown:
            parser.error(f"{', '.join(sorted(unknown))} is unknown: choose from {', '.join(known)}")
    return args


def forget(run: Run, prefixes: list[str]) -> None:
    """Remove the records of the steps that are to be done again."""
    for path in run.path("steps").iterdir():
        if any(path.name.startswith(prefix) for prefix in prefixes):
            path.unlink()


def main() -> None:
    """Do the steps, print the table, write the results."""
    args = parse()
    if args.clean:
        clean(args.work.resolve() / args.shape)
        return
    run = start(args)
    forget(run, args.redo)
    check_space(run)
    steps = {
        "checkpoint": make_checkpoint,
        "gguf": make_gguf,
        "dd": measure_dd,
        "convert": convert,
        "measure": measure,
        "arithmetic": measure_arithmetic,
    }
    for name, do in steps.items():
        if name in args.steps:
            do(run)
    whole = gather(run)
    publish(whole, results=args.results, docs=args.docs)
    failed = [step for step, record in whole["records"].items() if not record["ok"]]
    if failed:
        log(
            f"failed: {', '.join(failed)}; the work folder stays, the same command tries them again, --clean removes it"
        )
    elif not args.keep:
        clean(run.folder)


if __name__ == "__main__":
    main()
