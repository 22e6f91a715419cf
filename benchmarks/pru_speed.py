"""One PRU layer against the published step-by-step formulation and `nn.LSTM`: a training step, and one token.

    python benchmarks/pru_speed.py [--size 1400] [--groups 4] [--repeats 5] [--out benchmarks/results/pru_speed.json]

Training: batch 20, 70 steps, forward and backward, the input's gradient included, in fp32 and under bf16 autocast, twice:
in a process as it comes, and once it keeps freed memory as `flashlm pru train` does (`_kept`; the same for all
contestants). The floor beside it is the layer's arithmetic at the rate of one large product in that dtype in the same
run. Inference: one step at batch 1, 2, 4 and 8 in fp32 under `no_grad`; its bound is the layer's weight bytes at the rate
of a plain sum over memory larger than any cache, in the same run. Contestants alternate within a repeat; medians; the
first repeat warms up. Answers are checked first. A contestant that fails is named with its error. `--plot` draws the
result.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from machine import describe_commit, describe_machine, today
from published_pru import PublishedPRU

from flashlm import _native
from flashlm.pru import PRU
from flashlm.pru.products import linear
from flashlm.pru.training.allocator import keep_freed_memory

BATCH, STEPS, SUM_BYTES = 20, 70, 512 << 20
TOKENS_BEFORE = 40  # 20 ms: torch's threads spin on for 10 after a product, on the cores of whoever comes next
BATCHES = (1, 2, 4, 8)
Work = Callable[[], object]


def seconds(work: Work) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def medians(works: dict[str, Work], repeats: int, warm_ups: int = 1, num_before: int = 0) -> dict[str, float]:
    """Return the median time of each, in turns; `num_before` calls go before each one that is timed.

    They are what a token finds in use, another token before it, and not what the last contestant left behind.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats + warm_ups):
        for name, work in works.items():
            for _ in range(num_before):
                work()
            times[name].append(seconds(work))
    return {name: statistics.median(values[warm_ups:]) for name, values in times.items()}


def on(pru: PRU, path: str, *inputs: Any) -> Callable[[], torch.Tensor]:
    def forward() -> torch.Tensor:
        pru.path = path  # type: ignore[assignment]
        return pru(*inputs)[0]

    return forward


def training_flops(pru: PRU) -> int:
    """Multiply-adds twice, of both transforms: forward, by the weights, by the inputs."""
    num_weights = sum(parameter.numel() for parameter in pru.parameters() if parameter.dim() > 1)
    return 3 * 2 * num_weights * BATCH * STEPS


def training(pru: PRU, lstm: torch.nn.LSTM, is_bf16: bool, repeats: int) -> dict[str, Any]:
    published = PublishedPRU(pru)
    x = torch.randn(STEPS, BATCH, pru.input_size, requires_grad=True)
    state = (torch.zeros(1, BATCH, pru.hidden_size),) * 2
    forwards: dict[str, Callable[[], torch.Tensor]] = {
        "published": lambda: published(x, state)[0],
        "lstm": lambda: lstm(x)[0],
        "grouped": on(pru, "grouped", x),
        "folded": on(pru, "folded", x),
    }

    def step(forward: Callable[[], torch.Tensor]) -> Work:
        def work() -> None:
            with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
                loss = forward().float().square().mean()
            loss.backward()

        return work

    works, failed = {}, {}
    for name, forward in forwards.items():
        try:
            step(forward)()
            works[name] = step(forward)
        except RuntimeError as error:
            failed[name] = str(error).splitlines()[0]
    result: dict[str, Any] = {"seconds": medians(works, repeats, warm_ups=0), "failed": failed}
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    a, b = torch.randn(1400, 1400, dtype=dtype), torch.randn(5600, 1400, dtype=dtype)
    with torch.no_grad():
        product_s = medians({"product": lambda: linear(a, b, None)}, repeats * 3)["product"]
    rate = 2 * 1400 * 1400 * 5600 / product_s
    return result | {"product_gflop_per_s": rate / 1e9, "floor_s": training_flops(pru) / rate}


FRESH_LSTM = """
import statistics, sys, time, torch
size, batch, repeats = map(int, sys.argv[1:])
lstm = torch.nn.LSTM(size, size).eval()
x, state = torch.randn(1, batch, size), (torch.zeros(1, batch, size),) * 2
times = []
with torch.no_grad():
    for _ in range(repeats + 1):
        started_s = time.perf_counter()
        lstm(x, state)
        times.append(time.perf_counter() - started_s)
print(statistics.median(times[1:]))
"""


def fresh_lstm_s(size: int, batch: int, repeats: int) -> float:
    """Return a token's time of an `nn.LSTM` in a process of its own.

    torch lays the weights out anew for each call. Into fresh pages, as there, that takes several times as long as into
    memory that the process has kept, which is the case here once anything large has been freed.
    """
    argv = [sys.executable, "-c", FRESH_LSTM, str(size), str(batch), str(repeats)]
    return float(subprocess.run(argv, check=True, capture_output=True, text=True).stdout)


def one_step(pru: PRU, lstm: torch.nn.LSTM, batch: int, repeats: int) -> dict[str, Any]:
    x, memory = torch.randn(1, batch, pru.input_size), torch.ones(SUM_BYTES // 4)
    state = (torch.zeros(1, batch, pru.hidden_size),) * 2
    works: dict[str, Work] = {"lstm": lambda: lstm(x, state)}
    works |= {path: on(pru, path, x, state) for path in ("grouped", "native")}
    with torch.no_grad():
        result: dict[str, Any] = {"batch": batch, "seconds": medians(works, repeats * 10, num_before=TOKENS_BEFORE)}
        sum_s = medians({"sum": memory.sum}, repeats)["sum"]
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in pru.parameters())
    bound_s = num_bytes * sum_s / SUM_BYTES
    result["fresh_lstm_s"] = fresh_lstm_s(pru.hidden_size, batch, repeats * 10)
    result["fresh_lstm/native"] = result["fresh_lstm_s"] / result["seconds"]["native"]
    shares = {name: bound_s / value for name, value in result["seconds"].items() if name != "lstm"}
    return result | {
        "weight_bytes": num_bytes,
        "memory_gb_per_s": SUM_BYTES / sum_s / 1e9,
        "bound_s": bound_s,
        "share_of_bound": shares,
    }


def ratios(seconds_of: dict[str, float]) -> dict[str, float]:
    """How many times faster than each peer our paths are."""
    ours = [name for name in ("grouped", "folded", "native") if name in seconds_of]
    peers = [name for name in ("published", "lstm") if name in seconds_of]
    return {f"{peer}/{name}": seconds_of[peer] / seconds_of[name] for name in ours for peer in peers}


def check(pru: PRU, lstm: torch.nn.LSTM) -> None:
    x = torch.randn(STEPS, BATCH, pru.input_size)
    state = (torch.zeros(1, BATCH, pru.hidden_size),) * 2
    with torch.no_grad():
        expected = PublishedPRU(pru)(x, state)[0]
        for got in (on(pru, "grouped", x)(), on(pru, "folded", x)(), lstm(x)[0]):
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)


def plot(result: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    parts = {"fp32": result.get("training_fp32_kept"), "bf16 autocast": result.get("training_bf16_kept")}
    panels = [
        (f"training step, {name}", part["seconds"], part["floor_s"], "products alone")
        for name, part in parts.items()
        if part
    ]
    panels += [
        (f"one token, batch {row['batch']}", row["seconds"], row["bound_s"], "weights from memory, not cache")
        for row in result["one_step"][:1]
    ]
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 3.2))
    for axes, (title, values, floor, meaning) in zip(all_axes, panels, strict=True):
        axes.bar(list(values), [1e3 * value for value in values.values()])
        if floor is not None:
            axes.axhline(1e3 * floor, color="black", linestyle="--", label=meaning)
            axes.legend()
        axes.set(title=title, ylabel="ms (median)")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=1400)
    parser.add_argument("--groups", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--skip-bf16", action="store_true", help="where 16-bit products are emulated it takes minutes")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    pru = PRU(arguments.size, arguments.size, groups=arguments.groups)
    lstm = pru.to_lstm()
    check(pru, lstm)
    result: dict[str, Any] = {
        "machine": describe_machine(),
        **describe_commit(Path(__file__).parents[1]),
        "date": today(),
        "torch": torch.__version__,
        "threads": {"torch": torch.get_num_threads(), "kernels": _native.num_threads()},
        "simd": _native.simd_level(),
        "size": arguments.size,
        "groups": arguments.groups,
        "batch": BATCH,
        "steps": STEPS,
        "repeats": arguments.repeats,
        "load_average_before": Path("/proc/loadavg").read_text().split()[0],
    }
    result["one_step"] = [one_step(pru, lstm, batch, arguments.repeats) for batch in BATCHES]
    precisions = {"fp32": False} if arguments.skip_bf16 else {"fp32": False, "bf16": True}
    for suffix in ("", "_kept"):
        if suffix:
            result["keeps_freed_memory"] = keep_freed_memory()
        for name, is_bf16 in precisions.items():
            result[f"training_{name}{suffix}"] = training(pru, lstm, is_bf16, arguments.repeats)
    for part in [*(part for name, part in result.items() if name.startswith("training_")), *result["one_step"]]:
        part["times_faster"] = ratios(part["seconds"])
    print(json.dumps(result, indent=2))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")
    if arguments.plot:
        plot(result, arguments.plot)


if __name__ == "__main__":
    main()
