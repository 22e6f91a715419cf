"""The planner's score: predicted against measured time of a token, over shapes, budgets and modes.

    python benchmarks/planner.py --work DIR --shape opt-6.7b --shape llama-2-7b-relu [--pack PACK --text FILE]

The machine is probed right before the cells of each budget; then each cell runs in a process of its own under a memory limit
that the kernel enforces, page cache included. A shared machine drifts by a factor of two within minutes, so its state
(`device_state.py`: a stream, batches of rows, products) is measured between a cell's tokens, too, and every cell is
predicted twice: from the probe as it was, and with these three rates in the place of the probe's ("paired").

With --shape, weights are random and the rows of mode sparse TRACE-DRIVEN (simulated; `row_trace.py`); reads, cache,
bookkeeping and arithmetic are real. Half of the neurons of random weights fire, which the prediction is told. With --pack
(a calibrated pack) nothing is simulated, and what is held is set by shares of the FFN, since the process outweighs such a
small model. Cells leave their records in DIR; an interrupted run goes on there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

from device_state import BATCH_ROWS, STATE_BYTES
from ladder import MODELS, Record, child, log, make_pack, own_ids
from machine import describe_block_device, describe_commit, describe_machine, today

from flashlm.memory.budget import place
from flashlm.memory.cache_plan import plan_capacities
from flashlm.planner.bottleneck import MEMORY_RATES
from flashlm.planner.cost import TokenCost
from flashlm.planner.estimate import dense_use, exact_token, sparse_token
from flashlm.planner.machine import rates_of
from flashlm.planner.plan import GAPS, Candidate, candidates, model_needs
from flashlm.planner.rates import Rates
from flashlm.planner.shape import ModelShape, read_shape
from flashlm.probe.probe import probe
from flashlm.sizes import parse_size_bytes

HERE = Path(__file__).parent
BUDGETS = {"opt-6.7b": ("5.8GiB", "7GiB", "9GiB"), "llama-2-7b-relu": ("6.2GiB", "7.6GiB", "9.6GiB")}
SHARES = (0.25, 0.5, 0.75)  # of a small model's FFN
CONTEXT = 256
RANDOM_FIRES = 0.5
SMALL_TOKENS, SMALL_EVERY = 96, 16  # of a small model: so many, and the device measured once in so many
TOKENS = {"naive": (1, 2), "hybrid": (1, 4), "sparse": (12, 16)}  # warm, timed


class Turns:
    """Probes and scores one budget after another, `most` of them at most; what is in the work folder is not done again."""

    def __init__(self, most: int | None) -> None:
        self._left = most

    def score(self, path: Path, pack: Path, shape: ModelShape, cells: Callable[[Rates], list[Record]]) -> Record | None:
        if path.exists():
            return json.loads(path.read_text())
        if self._left == 0:
            return None
        profile = probe(pack)
        record = {"cells": cells(rates_of(profile, shape.dtype)), "profile": profile.model_dump(mode="json")}
        path.write_text(json.dumps(record, indent=1))
        self._left = None if self._left is None else self._left - 1
        return record


def told_of_random_weights(shape: ModelShape, mode: str) -> ModelShape:
    """Return the shape with the share of neurons that fires with random weights, of all or of those predicted."""
    shares = (use.use_curve[0] if mode == "sparse" else 1.0 for use in shape.sparse.uses)
    return replace(shape, sparse=replace(shape.sparse, active_shares=tuple(RANDOM_FIRES * share for share in shares)))


def plan_share(shape: ModelShape, rates: Rates, mode: str, share: float) -> Candidate:
    """Return the plan for a share of the FFN in memory, whatever the process weighs."""
    some = min(candidates(shape, rates, 2 << 30, CONTEXT, mode), key=lambda each: each.cost.total_s)
    if mode == "sparse":
        num_rows = sum(use.num_rows for use in shape.sparse.uses)
        placement = replace(some.placement, cache=tuple(plan_capacities(shape.sparse.uses, int(num_rows * share))))
        choices = [replace(some, placement=placement, max_gap=gap) for gap in GAPS]
    else:
        pins = int(shape.streamed_bytes * share)
        placement = place(shape.layouts, model_needs(shape, CONTEXT), 2 << 30, max_pinned_bytes=pins)
        choices = [replace(some, placement=placement)]
    return min(choices, key=lambda each: cost_of(each, shape, rates).total_s)


def cost_of(plan: Candidate, shape: ModelShape, rates: Rates) -> TokenCost:
    """Return what a plan costs on another machine."""
    if plan.mode == "sparse":
        return sparse_token(shape, shape.sparse, plan.placement.cache, rates, max_gap=plan.max_gap)
    return exact_token(shape, plan.placement, rates, dense_use(shape), reads_ahead=plan.mode != "naive")


def run_cell(work: Path, step: str, spec: Record, cap_bytes: int | None) -> Record:
    record = child(work, step, spec, cap_bytes=None if cap_bytes is None else cap_bytes + STATE_BYTES)
    num_warm, every = TOKENS[spec["mode"]][0], spec["watch_device"]
    # Where not every token follows a measurement, those that do are left out: they find cold caches.
    timed = [
        token for index, token in enumerate(record["tokens"]) if index >= num_warm and (every == 1 or index % every)
    ]
    states = record["states"][-(-num_warm // every) :]
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
        "watch_device": 1,
        "trace": {"model": trace, "num_tokens": num_tokens, "order": "random"} if trace and mode == "sparse" else None,
    }  # fmt: skip


def drifted(rates: Rates, shape: ModelShape, now: Record) -> Rates:
    """Return the rates as the device's state between the cell's tokens has them."""
    layout = shape.layouts[0]
    stream = now["stream_gb_per_s"] / rates.block_read_gb_per_s(layout.block_stride_bytes)
    row_s = layout.row_stride_bytes / (rates.random_read_gb_per_s(layout.row_stride_bytes) * 1e9)
    rows = (rates.batch_latency_s + BATCH_ROWS * row_s) / now["batch_s"]
    matrix = now["matrix_gb_per_s"] / rates.matrix_gb_per_s
    return replace(
        rates,
        stream_gb_per_s={size: rate * stream for size, rate in rates.stream_gb_per_s.items()},
        random_gb_per_s={size: rate * rows for size, rate in rates.random_gb_per_s.items()},
        batch_latency_s=rates.batch_latency_s / rows,
        **{name: getattr(rates, name) * matrix for name in MEMORY_RATES},
    )


def cell(name: str, budget: str, plan: Candidate, shape: ModelShape, rates: Rates, measured: Record) -> Record:
    """Return a cell's record: predicted from the probe, and again with the rates between its tokens."""
    cost, paired = (cost_of(plan, shape, each) for each in (rates, drifted(rates, shape, measured["device"])))
    errors = [each.total_s / measured["measured_s"] - 1.0 for each in (cost, paired)]
    log(
        f"{name} {plan.mode} {budget}: measured {measured['measured_s']:.3f} s; predicted {cost.total_s:.3f}"
        f" ({errors[0]:+.0%}), paired {paired.total_s:.3f} ({errors[1]:+.0%})"
    )
    return {
        "shape": name, "mode": plan.mode, "budget": budget, "max_gap": plan.max_gap,
        "staging_bytes": plan.placement.staging_bytes, "measured_s": measured["measured_s"],
        "predicted_s": cost.total_s, "error": errors[0], "paired_s": paired.total_s, "paired_error": errors[1],
        "predicted": asdict(cost), "paired": asdict(paired), **measured,
    }  # fmt: skip


def score_shape(name: str, work: Path, keep: bool, turns: Turns) -> list[Record | None]:
    """Return a record for every budget of one random shape: its cells and the profile; None where that is still to do."""
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
    shape, found = read_shape(pack), []
    for budget in BUDGETS[name]:
        dram_bytes = parse_size_bytes(budget)

        def cells(rates: Rates, budget: str = budget, dram_bytes: int = dram_bytes) -> list[Record]:
            made = []
            for mode in ("hybrid", "sparse"):
                told = told_of_random_weights(shape, mode)
                plan = min(candidates(told, rates, dram_bytes, CONTEXT, mode), key=lambda each: each.cost.total_s)
                spec = cell_spec(pack, mode, dram_bytes, plan.max_gap, model.trace, vocab_size)
                measured = run_cell(folder, f"cell-{mode}-{budget}", spec, dram_bytes)
                made.append(cell(name, budget, plan, told, rates, measured))
            return made

        found.append(turns.score(folder / f"score-{budget}.json", pack, shape, cells))
    if not keep and all(found):
        import shutil

        shutil.rmtree(pack)
    return found


def score_pack(pack: Path, text: Path, work: Path, turns: Turns) -> list[Record | None]:
    """Return the same for shares of a calibrated pack's FFN; nothing is simulated."""
    folder = work / pack.name
    folder.mkdir(parents=True, exist_ok=True)
    ids, vocab_size = own_ids(pack, text), json.loads((pack / "config.json").read_text())["vocab_size"]
    shape, found = read_shape(pack), []
    for share in SHARES:

        def cells(rates: Rates, share: float = share) -> list[Record]:
            made = []
            for mode in ("hybrid", "sparse"):
                plan = plan_share(shape, rates, mode, share)
                spec = cell_spec(pack, mode, 2 << 30, plan.max_gap, None, vocab_size)
                spec["num_tokens"], spec["watch_device"] = SMALL_TOKENS, SMALL_EVERY
                spec["ids"] = ids[:SMALL_TOKENS]
                if mode == "hybrid":
                    spec["pin_bytes"] = int(shape.streamed_bytes * share)
                else:
                    spec["cache_rows"] = int(sum(use.num_rows for use in shape.sparse.uses) * share)
                measured = run_cell(folder, f"cell-{mode}-{share}", spec, None)
                made.append(cell("demo model", f"{share:.0%} of the FFN", plan, shape, rates, measured))
            return made

        found.append(turns.score(folder / f"score-{share}.json", pack, shape, cells))
    return found


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

    figure, both = pyplot.subplots(1, 2, figsize=(11, 5.5), sharex=True, sharey=True)
    values = [each[name] for each in cells for name in ("measured_s", "predicted_s", "paired_s")]
    low, high = min(values) * 0.8, max(values) * 1.25
    for axes, name, title in (
        (both[0], "predicted_s", "from a fresh probe"),
        (both[1], "paired_s", "with rates measured between the tokens"),
    ):
        for color, shape in enumerate(dict.fromkeys(each["shape"] for each in cells)):
            for mode, marker in (("hybrid", "o"), ("sparse", "^")):
                some = [each for each in cells if (each["shape"], each["mode"]) == (shape, mode)]
                axes.scatter(
                    [each["measured_s"] for each in some],
                    [each[name] for each in some],
                    marker=marker,
                    color=f"C{color}",
                    label=f"{shape}, {mode}",
                )
        axes.plot([low, high], [low, high], color="#888888", linewidth=1)
        axes.fill_between(
            [low, high], [low * 0.75, high * 0.75], [low * 1.25, high * 1.25], color="#888888", alpha=0.15, label="25 %"
        )
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
        axes.set(xlabel="measured, s a token", ylabel="predicted, s a token", title=title)
    both[0].legend(fontsize=8)
    figure.suptitle("The planner's score (7 B shapes: rows trace-driven, weights random: simulated)", fontsize=10)
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
    parser.add_argument("--most", type=int, help="stop after so many budgets; the next run goes on there")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    os.environ.setdefault("FLASHLM_CACHE", str(args.work / "profiles"))
    turns, found = Turns(args.most), []
    for name in args.shape:
        found += score_shape(name, args.work, args.keep, turns)
    if args.pack is not None:
        found += score_pack(args.pack, args.text, args.work, turns)
    if not all(found):
        log(f"{sum(each is None for each in found)} budgets are still to do")
        return
    cells = [each for record in found for each in record["cells"]]
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
        "profiles": [record["profile"] for record in found],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    (args.results / "planner.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(cells, args.results / "planner.png")
    log(f"median error {result['median_error']:.0%}, worst {result['worst_error']:.0%} over {len(cells)} cells; with each"
        f" cell's device {result['paired_median_error']:.0%} and {result['paired_worst_error']:.0%}")  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
