"""Which path of a PRU layer is fastest, by hidden size, batch, steps, groups, in training and in inference.

    python benchmarks/pru_paths.py [--out benchmarks/results/pru_paths.json]

One layer of M features in and out, fp32, CPU. Training: forward and backward, the input's gradient included. Inference:
under `no_grad`; `native` takes part where it serves. The paths alternate within a round, each after untimed calls of
its own: as many as fill 10 ms, at most 8, none where a call takes over 50 ms (torch's idle threads spin on for a while,
which would fall on the next path). Medians, and the median over rounds of each path's time against `grouped`'s. A case
gets `--case-s` seconds, at least three rounds and at most thirty. Answers are checked first. At the end: by how much
what `auto` takes is slower than the fastest path of its case.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from machine import describe_commit, describe_machine, today

from flashlm import _native
from flashlm.pru import PRU
from flashlm.pru.native_step import is_served

SIZES, GROUPS, BATCHES, STEPS = (64, 128, 256, 400, 600, 1000, 1400), (1, 2, 4), (1, 8, 20), (1, 16, 70)
MIN_ROUNDS, MAX_ROUNDS = 3, 30
MAX_WARM_UPS, WARM_UP_S = 8, 0.01
Work = Callable[[], object]


def works_of(pru: PRU, x: torch.Tensor, is_training: bool) -> dict[str, Work]:
    """Return each path's call; answers are compared."""

    def forward(path: str) -> torch.Tensor:
        pru.path = path  # type: ignore[assignment]
        return pru(x)[0]

    def training_step(path: str) -> None:
        forward(path).square().mean().backward()

    paths = ["grouped", "folded"]
    if is_served(pru.cells[0], *x.shape[:2]):  # type: ignore[arg-type]
        paths.append("native")
    expected = forward("grouped").detach()
    for path in paths[1:]:
        torch.testing.assert_close(forward(path), expected, rtol=0, atol=1e-5)
    call = training_step if is_training else forward
    return {path: (lambda path=path: call(path)) for path in paths}


def rounds_of(works: dict[str, Work], limit_s: float) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {path: [] for path in works}
    began_s = time.perf_counter()
    for number in range(MAX_ROUNDS):
        if number >= MIN_ROUNDS and time.perf_counter() - began_s > limit_s:
            break
        for path in list(works)[:: -1 if number % 2 else 1]:
            warm_s = time.perf_counter() + WARM_UP_S
            for _ in range(MAX_WARM_UPS):
                if time.perf_counter() > warm_s or (times[path] and times[path][-1] > 0.05):
                    break
                works[path]()
            start_s = time.perf_counter()
            works[path]()
            times[path].append(time.perf_counter() - start_s)
    return times


def measure(size: int, groups: int, batch: int, steps: int, is_training: bool, limit_s: float) -> dict[str, Any]:
    torch.manual_seed(0)
    pru = PRU(size, size, groups=groups)
    x = torch.randn(steps, batch, size, requires_grad=is_training)
    with torch.set_grad_enabled(is_training):
        taken = pru._path(pru.cells[0], x, None)  # type: ignore[arg-type]
        times = rounds_of(works_of(pru, x, is_training), limit_s)
    medians = {path: statistics.median(values) for path, values in times.items()}
    against = {
        path: statistics.median(a / b for a, b in zip(values, times["grouped"], strict=True))
        for path, values in times.items()
        if path != "grouped"
    }
    return {
        "work": "training" if is_training else "inference",
        "groups": groups,
        "size": size,
        "batch": batch,
        "steps": steps,
        "rounds": len(times["grouped"]),
        "seconds": medians,
        "ratio_to_grouped": against,
        "fastest": min(medians, key=lambda path: medians[path]),
        "auto": taken,
        "auto_over_fastest": medians[taken] / min(medians.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES)
    parser.add_argument("--case-s", type=float, default=0.2)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    began_s = time.perf_counter()
    result: dict[str, Any] = {
        "machine": describe_machine(),
        **describe_commit(Path(__file__).parents[1]),
        "date": today(),
        "torch": torch.__version__,
        "threads": {"torch": torch.get_num_threads(), "kernels": _native.num_threads()},
        "simd": _native.simd_level(),
        "load_average_before": Path("/proc/loadavg").read_text().split()[0],
        "cases": [],
    }
    for is_training, groups, size, steps, batch in product((False, True), GROUPS, arguments.sizes, STEPS, BATCHES):
        case = measure(size, groups, batch, steps, is_training, arguments.case_s)
        result["cases"].append(case)
        times = ", ".join(f"{path} {1e3 * seconds:.2f}" for path, seconds in case["seconds"].items())
        print(
            f"{case['work']:9} g {groups} M {size:4} steps {steps:2} batch {batch:2}: {times} ms;"
            f" fastest {case['fastest']}, auto {case['auto']} ({case['auto_over_fastest']:.2f})",
            flush=True,
        )
    lost = [case["auto_over_fastest"] for case in result["cases"]]
    result |= {
        "took_s": time.perf_counter() - began_s,
        "auto_over_fastest": {"mean": statistics.mean(lost), "largest": max(lost)},
    }
    print(result["auto_over_fastest"], f"{result['took_s']:.0f} s")
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
