"""The planner's score: predicted against measured time of a token, over shapes, budgets and modes.

    python benchmarks/planner.py --work DIR --shape opt-6.7b --shape llama-2-7b-relu [--pack PACK --text FILE]

The machine is probed right before the cells of each budget; then each cell runs in a process of its own under a memory limit
that the kernel enforces, page cache included. A shared machine drifts between the two, so its state (`device_state.py`) is
measured right after the probe and between a cell's tokens, and every cell is predicted twice: from the probe as it was, and
with that drift taken out. With --shape, weights are random and the rows of mode sparse TRACE-DRIVEN (simulated;
`row_trace.py`); reads, cache, bookkeeping and arithmetic are real. Half of the neurons of random weights fire, which the
prediction is told. With --pack (a calibrated pack) nothing is simulated, and what is held is set by shares of the FFN,
since the process outweighs such a small model. Cells leave their records in DIR; an interrupted run goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from device_state import STATE_BYTES, DeviceState
from ladder import MODELS, Record, child, log, make_pack, own_ids
from machine import describe_block_device, describe_commit, describe_machine, today

from flashlm.memory.budget import place, place_sparse
from flashlm.memory.cache_plan import plan_capacities
from flashlm.planner.cost import TokenCost
from flashlm.planner.estimate import DenseUse, dense_use, exact_token, sparse_token
from flashlm.planner.machine import rates_of
from flashlm.planner.plan import GAPS, MEMORY_RATES, model_needs
from flashlm.planner.probe import probe
from flashlm.planner.rates import Rates
from flashlm.planner.shape import ModelShape, read_shape
from flashlm.sizes import parse_size_bytes

HERE = Path(__file__).parent
BUDGETS = {"opt-6.7b": ("5.8GiB", "7GiB", "9GiB"), "llama-2-7b-relu": ("6.2GiB", "7.6GiB", "9.6GiB")}
SHARES = (0.25, 0.5, 0.75)  # of a small model's FFN
CONTEXT = 256
RANDOM_FIRES = 0.5
TOKENS = {"naive": (1, 2), "hybrid": (1, 4), "sparse": (12, 16)}  # warm, timed

Costed = Callable[[Rates], tuple[TokenCost, int]]


def fresh(pack: Path, shape: ModelShape, profiles: Record, name: str) -> tuple[Rates, Record]:
    """Probe the machine; return its rates and the device's state right after."""
    profile = probe(pack)
    profiles[name] = profile.model_dump(mode="json")
    state = DeviceState(pack, shape.layouts[0].block_stride_bytes, shape.layouts[0].row_stride_bytes)
    found = [state.measure() for _ in range(3)]
    return rates_of(profile, shape.dtype), {key: statistics.median(each[key] for each in found) for key in found[0]}


def cheapest_gap(costs: Callable[[int], TokenCost], gap: int | None) -> tuple[TokenCost, int]:
    """Return the cost with the gap that was taken; None takes the best."""
    best = gap if gap is not None else min(GAPS, key=lambda each: costs(each).total_s)
    return costs(best), best


def predict(
    shape: ModelShape, rates: Rates, *, mode: str, dram_bytes: int, is_random: bool, gap: int | None = None
) -> tuple[TokenCost, int]:
    """Return (the predicted cost, the gap that the planner takes) of a cell under a budget."""
    if mode != "sparse":
        use = DenseUse(firing_share=RANDOM_FIRES) if is_random else dense_use(shape)
        pins = 0 if mode == "naive" else None
        placement = place(shape.layouts, model_needs(shape, CONTEXT), dram_bytes, max_pinned_bytes=pins)
        return exact_token(shape, placement, rates, use, reads_ahead=mode != "naive"), 0
    sparse = shape.sparse
    if is_random:
        sparse = replace(sparse, active_shares=tuple(use.use_curve[0] * RANDOM_FIRES for use in sparse.uses))
    needs = model_needs(shape, CONTEXT, with_predictors=True)
    placement = place_sparse(shape.layouts, sparse.uses, needs, dram_bytes)
    return cheapest_gap(lambda each: sparse_token(shape, sparse, placement.cache, rates, max_gap=each), gap)


def predict_share(
    shape: ModelShape, rates: Rates, *, mode: str, share: float, gap: int | None = None
) -> tuple[TokenCost, int]:
    """Return the same for a share of the FFN in memory, whatever the process weighs."""
    if mode == "sparse":
        capacities = tuple(plan_capacities(shape.sparse.uses, int(sum(u.num_rows for u in shape.sparse.uses) * share)))
        return cheapest_gap(lambda each: sparse_token(shape, shape.sparse, capacities, rates, max_gap=each), gap)
    pins = int(shape.streamed_bytes * share) if mode == "hybrid" else 0
    placement = place(shape.layouts, model_needs(shape, CONTEXT), 2 << 30, max_pinned_bytes=pins)
    return exact_token(shape, placement, rates, dense_use(shape), reads_ahead=mode != "naive"), 0


def run_cell(work: Path, step: str, spec: Record, cap_bytes: int | None) -> Record:
    record = child(work, step, spec, cap_bytes=None if cap_bytes is None else cap_bytes + STATE_BYTES)
    num_warm = TOKENS[spec["mode"]][0]
    timed = record["tokens"][num_warm:]
    states = record["states"][num_warm:]
    parts = ("wait_s", "submit_s", "predict_s", "manage_s", "bytes_read", "num_reads", "hit_rows", "miss_rows")
    return {
        "measured_s": statistics.median(token["wall_s"] for token in timed),
        "device": {name: statistics.median(state[name] for state in states) for name in states[0]},
        "measured": {part: statistics.median(token[part] for token in timed) for part in parts},
        "min_s": min(token["wall_s"] for token in timed),
        "max_s": max(token["wall_s"] for token in timed),
        "peak_bytes": record.get("peak_bytes"),
        "load_average": record["load_average"],
    }


def cell_spec(pack: Path, mode: str, dram_bytes: int, gap: int, trace: str | None, vocab_size: int) -> Record:
    num_tokens = sum(TOKENS[mode])
    return {
        "job": "rung", "pack": str(pack), "dram_bytes": dram_bytes, "mode": mode, "rows": "overlap", "window": None,
        "max_gap": gap, "context": CONTEXT, "vocab_size": vocab_size, "ids": None, "pin_bytes": None, "cache_rows": None,
        "num_tokens": num_tokens,
        "watch_device": True,
        "trace": {"model": trace, "num_tokens": num_tokens, "order": "random"} if trace and mode == "sparse" else None,
    }  # fmt: skip


def drifted(rates: Rates, before: Record, now: Record) -> Rates:
    """Return the rates as the device's state between the cell's tokens has them, by its state right after the probe."""
    stream, rows, matrix = (
        now[name] / before[name] for name in ("stream_gb_per_s", "thousand_rows_per_s", "matrix_gb_per_s")
    )
    return replace(
        rates,
        stream_gb_per_s={size: rate * stream for size, rate in rates.stream_gb_per_s.items()},
        random_gb_per_s={size: rate * rows for size, rate in rates.random_gb_per_s.items()},
        batch_latency_s=rates.batch_latency_s / rows,
        **{name: getattr(rates, name) * matrix for name in MEMORY_RATES},
    )


def cell(
    name: str, mode: str, budget: str, gap: int, measured: Record, state: Record, rates: Rates, costed: Costed
) -> Record:
    """Return a cell's record: predicted from the probe, and again with the drift taken out that happened since."""
    cost, paired = costed(rates)[0], costed(drifted(rates, state, measured["device"]))[0]
    errors = [each.total_s / measured["measured_s"] - 1.0 for each in (cost, paired)]
    log(
        f"{name} {mode} {budget}: measured {measured['measured_s']:.3f} s; predicted {cost.total_s:.3f} ({errors[0]:+.0%}),"
        f" with the cell's device {paired.total_s:.3f} ({errors[1]:+.0%})"
    )
    return {
        "shape": name, "mode": mode, "budget": budget, "max_gap": gap, "measured_s": measured["measured_s"],
        "predicted_s": cost.total_s, "error": errors[0], "paired_s": paired.total_s, "paired_error": errors[1],
        "predicted": asdict(cost), "paired": asdict(paired), "device_after_probe": state, **measured,
    }  # fmt: skip


def score_shape(name: str, work: Path, keep: bool) -> tuple[list[Record], Record]:
    """Return the cells of one random shape, and the profile that they were predicted from."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    pack, model = make_pack(name, folder), MODELS[name]
    child(
        folder,
        "prepare",
        {"job": "prepare", "pack": str(pack), "model": model.trace, "ranks": list(model.ranks)},
        cap_bytes=None,
    )
    vocab_size = json.loads((pack / "config.json").read_text())["vocab_size"]
    shape, cells, profiles = read_shape(pack), [], {}
    for budget in BUDGETS[name]:
        rates, state = fresh(pack, shape, profiles, budget)
        dram_bytes = parse_size_bytes(budget)
        for mode in ("hybrid", "sparse"):
            costed = partial(predict, shape, mode=mode, dram_bytes=dram_bytes, is_random=True)
            _, gap = costed(rates)
            spec = cell_spec(pack, mode, dram_bytes, gap, model.trace, vocab_size)
            measured = run_cell(folder, f"cell-{mode}-{budget}", spec, dram_bytes)
            cells.append(cell(name, mode, budget, gap, measured, state, rates, partial(costed, gap=gap)))
    if not keep:
        import shutil

        shutil.rmtree(pack)
    return cells, profiles


def score_pack(pack: Path, text: Path, work: Path) -> tuple[list[Record], Record]:
    """Return the cells of a calibrated pack; nothing is simulated."""
    folder = work / pack.name
    folder.mkdir(parents=True, exist_ok=True)
    ids, vocab_size = own_ids(pack, text), json.loads((pack / "config.json").read_text())["vocab_size"]
    shape, cells, profiles = read_shape(pack), [], {}
    for share in SHARES:
        rates, state = fresh(pack, shape, profiles, str(share))
        for mode in ("hybrid", "sparse"):
            costed = partial(predict_share, shape, mode=mode, share=share)
            _, gap = costed(rates)
            spec = cell_spec(pack, mode, 2 << 30, gap, None, vocab_size)
            spec["ids"] = ids[: spec["num_tokens"]]
            spec["pin_bytes"] = int(shape.streamed_bytes * share) if mode == "hybrid" else None
            spec["cache_rows"] = (
                int(sum(use.num_rows for use in shape.sparse.uses) * share) if mode == "sparse" else None
            )
            measured = run_cell(folder, f"cell-{mode}-{share}", spec, None)
            budget = f"{share:.0%} of the FFN"
            cells.append(cell("demo model", mode, budget, gap, measured, state, rates, partial(costed, gap=gap)))
    return cells, profiles


def picks(cells: list[Record]) -> list[Record]:
    """Return for every shape and budget the mode predicted fastest, and how it compares with the fastest measured."""
    found = []
    for shape, budget in dict.fromkeys((each["shape"], each["budget"]) for each in cells):
        here = [each for each in cells if (each["shape"], each["budget"]) == (shape, budget)]
        picked = min(here, key=lambda each: each["predicted_s"])
        fastest = min(here, key=lambda each: each["measured_s"])
        slower = picked["measured_s"] / fastest["measured_s"] - 1.0
        found.append(
            {"shape": shape, "budget": budget, "picked": picked["mode"], "fastest": fastest["mode"], "slower": slower}
        )
    return found


def draw(cells: list[Record], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 6))
    for shape in dict.fromkeys(each["shape"] for each in cells):
        for mode, marker in (("hybrid", "o"), ("sparse", "^")):
            some = [each for each in cells if each["shape"] == shape and each["mode"] == mode]
            axes.scatter(
                [e["measured_s"] for e in some],
                [e["predicted_s"] for e in some],
                marker=marker,
                label=f"{shape}, {mode}",
            )
    low = min(min(e["measured_s"], e["predicted_s"]) for e in cells) * 0.8
    high = max(max(e["measured_s"], e["predicted_s"]) for e in cells) * 1.25
    axes.plot([low, high], [low, high], color="#888888", linewidth=1)
    axes.fill_between(
        [low, high], [low * 0.75, high * 0.75], [low * 1.25, high * 1.25], color="#888888", alpha=0.15, label="25 %"
    )
    axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="measured, s a token", ylabel="predicted, s a token")
    axes.set_title("The planner's score (7 B shapes: rows trace-driven, weights random)", fontsize=10)
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="folder for what it writes")
    parser.add_argument(
        "--shape", action="append", choices=list(BUDGETS), default=[], help="random weights in this shape"
    )
    parser.add_argument("--pack", type=Path, help="a calibrated pack")
    parser.add_argument("--text", type=Path, help="for --pack: tokens that are run")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of JSON and plot")
    parser.add_argument("--keep", action="store_true", help="leave the packs in the work folder")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("FLASHLM_CACHE", str(args.work / "profiles"))
    cells, profiles = [], {}
    for name in args.shape:
        found, profiles[name] = score_shape(name, args.work, args.keep)
        cells += found
    if args.pack is not None:
        found, profiles["demo model"] = score_pack(args.pack, args.text, args.work)
        cells += found
    errors, paired = (sorted(abs(each[name]) for each in cells) for name in ("error", "paired_error"))
    result = {
        "what": "predicted against measured time of a token",
        "simulated": "7 B shapes: rows of mode sparse TRACE-DRIVEN (simulated), weights random; demo model: nothing",
        "date": today(),
        "machine": describe_machine() | {"device": describe_block_device(args.work)},
        "commit": describe_commit(HERE.parent),
        "median_error": statistics.median(errors),
        "worst_error": errors[-1],
        "paired_median_error": statistics.median(paired),
        "paired_worst_error": paired[-1],
        "picks": picks(cells),
        "cells": cells,
        "profiles": profiles,
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "planner.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(cells, args.results / "planner.png")
    log(f"median error {result['median_error']:.0%}, worst {result['worst_error']:.0%} over {len(cells)} cells; with each"
        f" cell's device {result['paired_median_error']:.0%} and {result['paired_worst_error']:.0%}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
