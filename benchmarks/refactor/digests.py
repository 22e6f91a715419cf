"""Digests of what a tree computes: what a refactor is held against, bit by bit.

    python benchmarks/refactor/digests.py [--python TREE/.venv/bin/python] --out NEW.json [--against OLD.json] [--quick]

Runs tiny random models of every family, the demo model and, where its package and `gguf` are installed, SmolLM2-135M in
every mode, placement and phase (`digest_cases.py`), and writes the xxh3 of the logits, a line a case. With `--against` what
differs is printed, and the exit status is 1 where anything does. The tree is the one that is installed for `--python`; none
of its inner names is used, so a new tree's script runs an old tree. Without `--out` nothing is written.

Bits depend on the instruction set of the row kernels, which is set (`FLASHLM_SIMD`), and on torch, transformers and the
processor, which are recorded: digests from unlike ones are refused (exit status 2). A full run takes some minutes on two
cores, `--quick` less than one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from machine import describe_commit, describe_machine, today

CASES = Path(__file__).resolve().with_name("digest_cases.py")
FULL, SOME = [], ["--quick"]
LEVELS = {  # which kernels, and with which subjects
    "avx2": FULL,
    "avx512": [*SOME, "--with-demo"],
    "generic": SOME,
}
SAME = ("cpu", "cpu_flags", "versions")  # or bits can't be compared


def run_level(python: str, level: str, options: list[str], cache: Path, old: dict[str, Any] | None) -> dict[str, Any]:
    """Run the cases on the kernels of one level; return what the child tells: versions, subjects, cases.

    What differs from `old` is said as soon as a subject has ended.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("FLASHLM_")}
    own = {"FLASHLM_SIMD": level, "FLASHLM_CACHE": str(cache), "HF_HUB_OFFLINE": "1", "PYTHONHASHSEED": "0"}
    command = [python, str(CASES), *options]
    found: dict[str, Any] = {"cases": {}, "seconds": {}}
    with subprocess.Popen(command, env=kept | own, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            told = json.loads(line)
            if "subject" not in told:
                found |= told
                continue
            found["seconds"][told["subject"]] = told["seconds"]
            cases = {f"{level}: {name}": digests for name, digests in told["cases"].items()}
            found["cases"] |= cases
            print(f"{level}: {told['subject']:28} {told['seconds']:6.1f} s, {len(cases)} cases", file=sys.stderr)
            for line in [] if old is None else differences(old, {"cases": cases}, is_part=True):
                print(f"  differs: {line}", file=sys.stderr)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)}: exit status {process.returncode}")
    return found


def measure(python: str, options: list[str], old: dict[str, Any] | None, *, is_quick: bool) -> dict[str, Any]:
    """Return the document of a tree: environment and digests of all cases."""
    machine = describe_machine()
    levels = {
        name: options + (SOME if is_quick else how)
        for name, how in LEVELS.items()
        if name == "generic" or {"avx512": "avx512f"}.get(name, name) in machine["cpu_flags"]
    }
    levels = {name: levels[name] for name in list(levels)[:1]} if is_quick else levels
    started_s = time.perf_counter()
    document: dict[str, Any] = {"what": "xxh3 of logits and tokens: case, phase", "date": today()}
    document |= {"cpu": machine["cpu"], "cpu_flags": machine["cpu_flags"], "levels": list(levels), "cases": {}}
    with tempfile.TemporaryDirectory(prefix="flashlm-digests-") as cache:  # no profile of the machine decides anything
        for level, how in levels.items():
            found = run_level(python, level, how, Path(cache), old)
            document["cases"] |= found["cases"]
            document |= {"versions": found["versions"]}
            document.setdefault("skipped", {}).update(found["skipped"])
    tree = describe_commit(Path(found["flashlm"]).parents[1])
    return document | {"tree": tree, "seconds": round(time.perf_counter() - started_s)}


def differences(old: dict[str, Any], new: dict[str, Any], *, is_part: bool) -> list[str]:
    """Return a line for each case that is not the same; `is_part`: cases that only `old` has were not run."""
    lines = []
    for name in sorted(old["cases"].keys() | new["cases"].keys()):
        before, after = old["cases"].get(name), new["cases"].get(name)
        if after is None:
            lines += [] if is_part else [f"{name}: only in the old one"]
        elif before is None:
            lines.append(f"{name}: only in the new one")
        else:
            phases = [phase for phase in before | after if before.get(phase) != after.get(phase)]
            lines += [f"{name}: {', '.join(phases)}"] if phases else []
    return lines


def unlike(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return a line for each thing that bits depend on and that is not the same."""
    return [f"{key}: {old.get(key)} and {new.get(key)}" for key in SAME if old.get(key) != new.get(key)]


def dumps(document: dict[str, Any]) -> str:
    """Return the document as JSON, a line a case."""
    cases = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(found)}" for name, found in sorted(document["cases"].items())
    )
    head = json.dumps(document | {"cases": {}}, indent=1)
    return head.replace('"cases": {}', f'"cases": {{\n{cases}\n }}') + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default=sys.executable, help="of the tree; default: this one")
    parser.add_argument("--out", type=Path, help="file to write")
    parser.add_argument("--against", type=Path, help="file that another run wrote")
    parser.add_argument("--quick", action="store_true", help="some families, one dtype, one instruction set")
    parser.add_argument("--only", default="", help="only these subjects, comma-separated")
    parser.add_argument("--jobs", type=int, default=2, help="subjects side by side")
    parser.add_argument("--verbose", action="store_true", help="say where the bytes of each case are")
    arguments = parser.parse_args()
    old = None if arguments.against is None else json.loads(arguments.against.read_text())
    options = ["--jobs", str(arguments.jobs), "--only", arguments.only] + ["--verbose"] * arguments.verbose
    python = str(Path(arguments.python).absolute())  # not resolved: a venv's is a link
    new = measure(python, options, old, is_quick=arguments.quick)
    errors = [
        f"{name}: {phase}: {digest}"
        for name, found in new["cases"].items()
        for phase, digest in found.items()
        if digest.startswith("error")
    ]
    new["num_errors"] = len(errors)
    print(f"{len(new['cases'])} cases in {new['seconds']} s, {len(errors)} errors", *errors, sep="\n  ")
    if arguments.out is not None:
        arguments.out.write_text(dumps(new))
    if old is None:
        return 0
    if problems := unlike(old, new):
        print("these digests can't be compared:", *problems, sep="\n  ")
        return 2
    found = differences(old, new, is_part=arguments.quick or bool(arguments.only))
    print(*found, f"{len(found)} of {len(new['cases'])} cases differ", sep="\n")
    return 1 if found else 0


if __name__ == "__main__":
    raise SystemExit(main())
