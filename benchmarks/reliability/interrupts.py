"""How often a model was interrupted, in every mode and with both back ends, and what its next answers were.

`python benchmarks/reliability/interrupts.py [--quick]` makes tiny random packs, runs `interrupt_sweep.py` on each in a
process of its own (see there what is done), prints a table, and writes `benchmarks/results/reliability-interrupts.json`.
An answer counts as silently wrong where one bit of its logits is not what an undisturbed model gives and nothing was
raised. A process that ends by its watchdog, four minutes without progress, counts as a hang. Two processes run at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from machine import describe_commit, describe_machine, today  # noqa: E402

from tests.engine.interrupted import MODES, make_pack, sweep  # noqa: E402
from tests.storage.conftest import build_faults  # noqa: E402

BACKENDS = ("io_uring", "threads")
COUNTS = ("num_tried", "num_interrupted", "num_places", "num_wrong")


def by_function(where: dict[str, int]) -> dict[str, int]:
    """Return how many interrupts fell into each function: places are file:function:line."""
    counts: Counter[str] = Counter()
    for place, count in where.items():
        counts[place.rsplit(":", 1)[0]] += count
    return dict(counts.most_common())


def run(pack: Path, mode: str, backend: str, library: Path, quick: bool) -> dict[str, Any]:
    """Return what came of all kinds of interrupts in one mode with one back end."""
    points, double, timer, load, budget_s = (150, 50, 50, 3, 9) if quick else (600, 250, 250, 6, 90)
    arguments = [f"--points={points}", f"--double={double}", f"--timer={timer}", f"--beside={timer}", f"--load={load}"]
    done = sweep(pack, mode, library, backend, "--sites", *arguments, f"--budget-s={budget_s}")
    for result in done["results"].values():
        result["where"] = by_function(result["where"])
    return done | {"mode": mode, "backend": backend, "is_hang": done["exit_status"] != 0}


def main() -> None:
    """Run everything, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of it, in a few minutes")
    parser.add_argument("--mode", choices=MODES, action="append", help="only this; may be repeated")
    parser.add_argument("--out", type=Path, default=HERE.parent / "results" / "reliability-interrupts.json")
    args = parser.parse_args()
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        library = build_faults(Path(folder))
        if library is None:
            sys.exit("reads are delayed by a preloaded library: needs Linux and cc")
        print(
            f"{'mode':8} {'back end':8} {'kind':7} {'tried':>6} {'cut off':>8} {'places':>7} {'wrong':>6}  errors by name"
        )
        with ThreadPoolExecutor(max_workers=2) as pool:
            jobs = []
            for mode in args.mode or MODES:
                pack = make_pack(Path(folder), mode)
                jobs += [pool.submit(run, pack, mode, backend, library, args.quick) for backend in BACKENDS]
            for job in jobs:
                done = job.result()
                mode, backend = done["mode"], done["backend"]
                runs.append(done)
                for kind, result in done["results"].items():
                    tried, cut, places, wrong = (result[name] for name in COUNTS)
                    errors = ", ".join(f"{name} {count}" for name, count in result["errors"].items()) or "none"
                    print(f"{mode:8} {backend:8} {kind:7} {tried:6} {cut:8} {places:7} {wrong:6}  {errors}", flush=True)
                if done["is_hang"]:
                    print(f"{mode:8} {backend:8} ended early: {done['stderr']}", flush=True)
    results = [result for done in runs for result in done["results"].values()]
    total = {name: sum(result[name] for result in results) for name in COUNTS if name != "num_places"}
    total["num_hangs"] = sum(done["is_hang"] for done in runs)
    total["errors"] = dict(sum((Counter(result["errors"]) for result in results), Counter()))
    print(f"in all: {total}")
    document = {
        "date": today(),
        "what": "interrupts at bytecodes, twice, by signals, while loading; every later answer held to the bit",
        "machine": describe_machine(),
        "flashlm": describe_commit(HERE.parents[1]),
        "is_quick": args.quick,
        "total": total,
        "runs": runs,
    }
    args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
