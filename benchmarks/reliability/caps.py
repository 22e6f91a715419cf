"""Does the cap hold for what users do with a model? Every scenario in a process that the kernel kills beyond its budget.

    python benchmarks/reliability/caps.py [--quick] [--work FOLDER]

Packs have tiny layers and Qwen's vocabulary of 151,936, so that what a user asks for costs what it costs on real models
while a run takes seconds. `dram` is the smallest budget that loads (and, for some scenarios, 5 % more, and half-way to
holding everything); the limit of the control group is `dram`, page cache included, swap off. Three outcomes: it worked, it
raised `BudgetError`, it was killed. A scenario that must work and was refused counts as a fault too.

Writes `benchmarks/results/reliability-caps.json`. Needs a control group with a memory limit (see `capped.py`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

import caps_child
from capped import cap_method, run_capped
from machine import describe_commit, describe_machine, today

from flashlm.pack.manifest import read_manifest
from flashlm.sizes import format_size

REPOSITORY = Path(__file__).parents[2]
RESULT = REPOSITORY / "benchmarks" / "results" / "reliability-caps.json"
CHILD = Path(__file__).parent / "caps_child.py"
TIMEOUT_S = 300
GROUP_SIZE = 8  # scenarios of one process: what one leaves behind meets the next, and start-up is paid once
# Each once per family, in one process: what a first user does.
FAMILY_SCENARIOS = ("generate", "batch-8", "loss-512", "all-logits-512", "static-cache-512")
# fp16 multiplies resident weights by widening them on every processor: what differs is logits, losses and batches.
FP16_SCENARIOS = (
    "generate",
    "all-logits-512",
    "logits-to-keep-128",
    "loss-512",
    "loss-batch-8",
    "loss-2048",
    "batch-8-top-p",
)
BUDGET_SCENARIOS = ("generate", "batch-8", "loss-512", "scores-8")
QUICK = ("generate", "all-logits-512", "loss-512", "scores-and-logits-batch-8", "static-cache-400000", "batch-8")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One scenario and what became of it; sizes in bytes. Peak and (mean) time are of a process, which may run several."""

    pack: str
    scenario: str
    budget: str
    context: int
    dram_bytes: int
    cap_bytes: int
    peak_bytes: int | None
    outcome: str
    is_fault: bool
    message: str
    wall_s: float


def run_child(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(CHILD), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)}: {done.stderr[-2000:]}")
    return done.stdout


def floors(pack: Path, contexts: Sequence[int]) -> dict[int, int]:
    text = run_child("floors", str(pack), *map(str, contexts))
    return {int(context): floor for context, floor in json.loads(text.splitlines()[-1]).items()}


def run_scenarios(pack: Path, names: Sequence[str], budget: str, dram_bytes: int, method: str) -> Iterator[Row]:
    """Run scenarios in one capped process; the first that has no outcome was the last."""
    argv = [sys.executable, str(CHILD), "run", str(pack), str(dram_bytes), *names]
    done = run_capped(argv, limit_bytes=dram_bytes, timeout_s=TIMEOUT_S * len(names), capture=True, method=method)
    told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    context = max(caps_child.SCENARIOS[name].context for name in names)
    for name, found in zip(names, [*told, None], strict=False):
        if found is None:
            found = {
                "outcome": "killed" if done.was_killed else "failed",
                "message": done.stderr[-1000:],
                "peak_bytes": None,
            }
        refused = found["outcome"] == "BudgetError" and caps_child.SCENARIOS[name].must_work
        yield Row(
            pack=pack.name,
            scenario=name,
            budget=budget,
            context=context,
            dram_bytes=dram_bytes,
            cap_bytes=dram_bytes,
            peak_bytes=done.peak_bytes or found["peak_bytes"],
            outcome=found["outcome"],
            is_fault=refused or found["outcome"] in ("killed", "failed"),
            message=found["message"],
            wall_s=round(done.wall_s / len(names), 1),
        )
        if found["outcome"] in ("killed", "failed"):
            return


def all_rows(work: Path, method: str, *, is_quick: bool) -> Iterator[Row]:
    everything = QUICK if is_quick else tuple(caps_child.SCENARIOS)
    for dtype, names in {"bf16": everything, **({} if is_quick else {"fp16": FP16_SCENARIOS})}.items():
        pack = make(work, "qwen2", dtype)
        least = floors(pack, sorted({caps_child.SCENARIOS[name].context for name in names}))
        for context, group in groups(names):
            yield from run_all(pack, group, "floor", least[context], method)
        if not is_quick:
            streamed = read_manifest(pack).streamed_bytes
            context = max(caps_child.SCENARIOS[name].context for name in BUDGET_SCENARIOS)
            floor = floors(pack, [context])[context]
            for budget, dram in (("floor + 5 %", floor * 105 // 100), ("half of the rows", floor + streamed // 2)):
                yield from run_all(pack, BUDGET_SCENARIOS, budget, dram, method)
    if is_quick:
        return
    for family in caps_child.FAMILIES:
        pack = make(work, family, "bf16")
        context = max(caps_child.SCENARIOS[name].context for name in FAMILY_SCENARIOS)
        yield from run_all(pack, FAMILY_SCENARIOS, "floor", floors(pack, [context])[context], method)


def groups(names: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
    """Yield scenarios that can share a process: of one context, without load arguments of their own, a few at a time."""
    of_context: dict[int, list[str]] = {}
    for name in names:
        todo = caps_child.SCENARIOS[name]
        if todo.load:
            yield todo.context, [name]
        else:
            of_context.setdefault(todo.context, []).append(name)
    for context, group in of_context.items():
        for start in range(0, len(group), GROUP_SIZE):
            yield context, group[start : start + GROUP_SIZE]


def run_all(pack: Path, names: Sequence[str], budget: str, dram_bytes: int, method: str) -> Iterator[Row]:
    """Run scenarios one after the other in one process, and what a killed process left in another."""
    rest = list(names)
    while rest:
        done = list(run_scenarios(pack, rest, budget, dram_bytes, method))
        yield from done
        rest = rest[len(done) :]


def make(work: Path, family: str, dtype: str) -> Path:
    pack = work / f"{family}-{dtype}"
    if not pack.exists():
        run_child("make", str(pack), family, dtype)
    return pack


def print_row(row: Row) -> None:
    peak = "?" if row.peak_bytes is None else format_size(row.peak_bytes)
    mark = "  FAULT" if row.is_fault else ""
    print(
        f"{row.pack:18} {row.scenario:28} {row.budget:17} dram {format_size(row.dram_bytes):>10}  peak {peak:>10} "
        f" {row.outcome}{mark}",
        flush=True,
    )


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    outcomes = [row.outcome for row in rows]
    counts = {name: outcomes.count(name) for name in ("worked", "BudgetError", "killed", "failed")}
    return {"num_tries": len(rows), **counts, "num_faults": sum(row.is_fault for row in rows)}


def write(rows: Sequence[Row], method: str, wall_s: float, *, is_complete: bool) -> None:
    facts = {"date": today(), "machine": describe_machine(), **describe_commit(REPOSITORY), "capped_by": method}
    document = facts | {"wall_s": round(wall_s), "is_complete": is_complete, **summary(rows)}
    RESULT.write_text(json.dumps(document | {"rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="six scenarios on one pack; writes nothing")
    parser.add_argument("--work", type=Path, help="where packs are made and kept; default: a temporary folder")
    options = parser.parse_args()
    method = cap_method()
    started_s = time.monotonic()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for row in all_rows(options.work or Path(folder), method, is_quick=options.quick):
            rows.append(row)
            print_row(row)
            if not options.quick:  # a run that is cut short leaves what it has
                write(rows, method, time.monotonic() - started_s, is_complete=False)
    totals = summary(rows)
    print(", ".join(f"{value} {name}" for name, value in totals.items()))
    if not options.quick:
        write(rows, method, time.monotonic() - started_s, is_complete=True)
        print(f"written to {RESULT.relative_to(REPOSITORY)}")
    sys.exit(1 if totals["num_faults"] else 0)


if __name__ == "__main__":
    main()
