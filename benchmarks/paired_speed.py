"""Two checkouts against each other, in turns: tokens and prompts in every mode, conversion, start-up, the recurrent unit.

    python benchmarks/paired_speed.py OLD_PYTHON NEW_PYTHON --folder FOLDER [--cases TEXT ...] [--rounds N] [--out FILE]

Each checkout's interpreter keeps one process; both load a case, then time the same work in turns, the first of a turn
changing. Times are medians of the rounds, wall clock and processor (all threads of the process, which other programs on the
machine disturb less); `old/new` are medians of the rounds' ratios: above 1 the new one is faster; `_quartiles` is where
half of the ratios lie. Weights are random. In a `FOLDER` in memory (tmpfs) reads cost a copy and no device, so that what the
program does shows. Conversion against a device, and verification, are in `conversion.py`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
from pathlib import Path
from typing import Any

from machine import describe_machine, today
from paired_works import CASES, SIMULATED


class Side:
    """One checkout's process."""

    def __init__(self, python: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(Path(python).absolute()),
            str(Path(__file__).resolve().with_name("paired_works.py")),
            str(folder.resolve()),
        ]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **asked: Any) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        print(json.dumps(asked), file=self._process.stdin, flush=True)
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise SystemExit(f"a process ended early: {asked}")


def compare(old: Side, new: Side, work: str, rounds: int, seconds: float) -> dict[str, Any]:
    first_s = [side.ask(work=work, repeats=1)[0] for side in (old, new)]
    repeats = max(1, min(200, int(0.06 / min(first_s))))
    times: dict[Side, list[list[float]]] = {old: [], new: []}
    for number in range(max(3, min(rounds, int(seconds / min(first_s))))):  # a busy machine makes prompts long
        for side in (old, new) if number % 2 else (new, old):
            times[side].append(side.ask(work=work, repeats=repeats))
    found: dict[str, Any] = {}
    for index, clock in enumerate(("wall", "cpu")):
        before, after = ([each[index] for each in times[side]] for side in (old, new))
        found |= {f"old_{clock}_s": statistics.median(before), f"new_{clock}_s": statistics.median(after)}
        ratios = [b / a for b, a in zip(before, after, strict=True)]
        found[f"old/new_{clock}"] = statistics.median(ratios)
        found[f"old/new_{clock}_quartiles"] = statistics.quantiles(ratios, n=4, method="inclusive")[::2]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help="OLD_PYTHON NEW_PYTHON")
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and packs, about 2 GB")
    parser.add_argument("--cases", nargs="+", default=[""], help="only cases with one of these in their name")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="for one work of a checkout, about; three rounds always"
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    old, new = (
        Side(python, arguments.folder / name) for python, name in zip(arguments.pythons, ("old", "new"), strict=True)
    )
    result: dict[str, Any] = {"machine": describe_machine(), "date": today(), "simulated": SIMULATED}
    result |= {"rounds": arguments.rounds, "load_average": Path("/proc/loadavg").read_text().split()[0]}
    result |= {"old": old.ask(), "new": new.ask(), "cases": {}}
    for case in (each for each in CASES if any(text in each for text in arguments.cases)):
        works = [side.ask(case=case) for side in (old, new)].pop()
        result["cases"][case] = measured = {}
        for work in works:
            measured[work] = found = compare(old, new, work, arguments.rounds, arguments.seconds)
            ratios = ", ".join(
                "{} {:.3f} ({:.3f} to {:.3f})".format(
                    clock, found[f"old/new_{clock}"], *found[f"old/new_{clock}_quartiles"]
                )
                for clock in ("wall", "cpu")
            )
            print(f"{case:34} {work:16} {1e3 * found['new_wall_s']:9.3f} ms, old/new {ratios}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
