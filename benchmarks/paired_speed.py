"""Two checkouts against each other, in turns: tokens and prompts in every mode, and the recurrent unit.

    python benchmarks/paired_speed.py OLD_PYTHON NEW_PYTHON --folder FOLDER [--case TEXT] [--rounds N] [--out FILE]

Each checkout's interpreter keeps one process; both load a case, then time the same work in turns, the first of a turn
changing. Times are medians of the rounds, wall clock and processor (all threads of the process, which other programs on the
machine disturb less); `old/new` are medians of the rounds' ratios: above 1 the new one is faster. Weights and predictors are
random. In a `FOLDER` in memory (tmpfs) reads cost a copy and no device, so that what the program does shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from machine import describe_commit, describe_machine, today

SIZES = {"vocab_size": 4096, "hidden_size": 2048, "num_hidden_layers": 4, "max_position_embeddings": 1024}
HEADS = {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64, "tie_word_embeddings": True}
DENSE = {"model_type": "llama", "intermediate_size": 2048, "hidden_act": "relu"}
MIXTURE = {"model_type": "qwen3_moe", "moe_intermediate_size": 128, "num_experts": 16, "num_experts_per_tok": 4}
MODES = {  # mode, rows of an expert (0: no experts), share of the streamed bytes that is kept
    "naive": ("naive", 0, 0.0),
    "hybrid, all streamed": ("hybrid", 0, 0.0),
    "hybrid, all pinned": ("hybrid", 0, 1.0),
    "sparse, a quarter held": ("sparse", 0, 0.25),
    "sparse, all held": ("sparse", 0, 1.0),
    "experts of 128, half held": ("experts", 128, 0.5),
    "experts of 40, all held": ("experts", 40, 1.0),
}
CASES = [f"{mode}, {dtype}" for dtype in ("bfloat16", "float32") for mode in MODES]
CASES += [f"recurrent M={size} g={groups}" for size, groups in ((64, 4), (128, 4), (400, 4), (400, 1))]
SIMULATED = "weights and predictors are random; models of 4 layers, hidden size 2048, 2048 rows"


def streamed(case: str, folder: Path) -> dict[str, Any]:
    """Load one case; return calls of each size."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

    import flashlm
    from flashlm.engine import model as loading
    from flashlm.pack.manifest import layer_path, read_manifest

    name, dtype = case.rsplit(", ", 1)
    mode, rows, share = MODES[name]
    source, pack = folder.parent / f"{dtype}-{rows}", folder / f"{dtype}-{rows}"
    if not (source / "config.json").exists():
        torch.manual_seed(0)
        kind = {**MIXTURE, "moe_intermediate_size": rows} if rows else DENSE
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**SIZES, **HEADS, **kind, dtype=dtype)).save_pretrained(
            source
        )
    if not pack.exists():
        flashlm.convert(source, pack, dtype=dtype)
    manifest = read_manifest(pack)
    kept_bytes = share * sum(layer_path(pack, each).stat().st_size for each in (*manifest.layers, *manifest.experts))
    if mode == "sparse":
        from tests.engine.calibrations import write_calibration

        write_calibration(pack)
        loading.place_sparse = sized(loading.place_sparse, share)
    bound = {} if mode == "sparse" else {"pin": int(kept_bytes)}
    model: Any = flashlm.load(pack, dram="12GiB", mode=mode, context=1024, **bound).eval()
    works: dict[str, Any] = {}
    for batch in (1, 16, 17, 64) if rows == 40 else (1, 16):
        ids, cache = torch.arange(batch * 8).view(batch, 8) * 7 % 4096, DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        works[f"token, batch {batch}"] = lambda ids=ids, cache=cache: (
            model(ids[:, -1:], past_key_values=cache),
            cache.crop(-1),
        )
    for length in (10, 300):
        prompt = torch.arange(length).view(1, -1) * 13 % 4096
        works[f"prompt of {length}"] = lambda prompt=prompt: model(prompt, logits_to_keep=1, use_cache=False)
    return works


def sized(place: Any, share: float) -> Any:
    """Return `place_sparse` with the budget that holds `share` of the rows, whatever else a checkout counts."""

    def find(layouts: Any, uses: Any, needs: Any, dram_bytes: int) -> Any:
        def try_place(budget_bytes: int) -> Any:
            try:
                placement = place(layouts, uses, needs, budget_bytes)
            except Exception:  # too little
                return None
            return placement if placement.cache_bytes >= wanted_bytes else None

        wanted_bytes = share * sum(each.num_rows * each.row_stride_bytes for each in layouts)
        low, high = 0, dram_bytes
        while high - low > 4096:
            middle = (low + high) // 2
            low, high = (middle, high) if try_place(middle) is None else (low, middle)
        return try_place(high)

    return find


def recurrent(case: str) -> dict[str, Any]:
    import torch

    from flashlm.pru import PRU, PRUConfig, PRUForCausalLM

    size, groups = (int(word.split("=")[1]) for word in case.split()[1:])
    torch.manual_seed(0)
    layer, x, ids = PRU(size, size, groups=groups).eval(), torch.randn(1, 1, size), torch.tensor([[5]])
    model = PRUForCausalLM(PRUConfig(vocab_size=10_000, embedding_size=size, hidden_size=size, groups=groups)).eval()
    state, kept = layer(x)[1], model(ids).state
    return {"layer, token": lambda: layer(x, state), "model, token": lambda: model(ids, state=kept)}


def child(folder: Path) -> None:
    """Answer questions, one a line: what this is, which works a case has, what a work takes."""
    import torch

    import flashlm

    sys.path.insert(0, str(Path(flashlm.__file__).parents[2]))
    works: dict[str, Any] = {}
    answer: Any
    with torch.no_grad():
        for line in sys.stdin:
            asked = json.loads(line)
            if "case" in asked:
                works.clear()  # before the next model is loaded
                works = streamed(asked["case"], folder) if "float" in asked["case"] else recurrent(asked["case"])
                answer = list(works)
            elif "work" in asked:
                work, count = works[asked["work"]], asked["repeats"]
                started_s, cpu_s = time.perf_counter(), time.process_time()
                for _ in range(count):
                    work()
                answer = (time.perf_counter() - started_s) / count, (time.process_time() - cpu_s) / count
            else:
                answer = describe_commit(Path(flashlm.__file__).parents[2])
            print("ANSWER", json.dumps(answer), flush=True)


class Side:
    """One checkout's process."""

    def __init__(self, python: str, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        command = [
            str(Path(python).absolute()),
            str(Path(__file__).resolve()),
            "--child",
            "--folder",
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


def compare(old: Side, new: Side, work: str, rounds: int) -> dict[str, float]:
    first_s = [side.ask(work=work, repeats=1)[0] for side in (old, new)]
    repeats = max(1, min(200, int(0.06 / min(first_s))))
    times: dict[Side, list[list[float]]] = {old: [], new: []}
    for number in range(max(3, min(rounds, int(4 / min(first_s))))):  # a busy machine makes prompts long
        for side in (old, new) if number % 2 else (new, old):
            times[side].append(side.ask(work=work, repeats=repeats))
    found: dict[str, float] = {}
    for index, clock in enumerate(("wall", "cpu")):
        before, after = ([each[index] for each in times[side]] for side in (old, new))
        found |= {f"old_{clock}_s": statistics.median(before), f"new_{clock}_s": statistics.median(after)}
        found[f"old/new_{clock}"] = statistics.median(b / a for b, a in zip(before, after, strict=True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help="OLD_PYTHON NEW_PYTHON")
    parser.add_argument("--folder", type=Path, required=True, help="for checkpoints and packs, about 2 GB")
    parser.add_argument("--case", default="", help="only cases with this in their name")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        return child(arguments.folder)
    old, new = (
        Side(python, arguments.folder / name) for python, name in zip(arguments.pythons, ("old", "new"), strict=True)
    )
    result: dict[str, Any] = {"machine": describe_machine(), "date": today(), "simulated": SIMULATED}
    result |= {"rounds": arguments.rounds, "load_average": Path("/proc/loadavg").read_text().split()[0]}
    result |= {"old": old.ask(), "new": new.ask(), "cases": {}}
    for case in (each for each in CASES if arguments.case in each):
        works = [side.ask(case=case) for side in (old, new)].pop()
        result["cases"][case] = measured = {}
        for work in works:
            measured[work] = found = compare(old, new, work, arguments.rounds)
            ratios = f"wall {found['old/new_wall']:.3f}, cpu {found['old/new_cpu']:.3f}"
            print(f"{case:34} {work:16} {1e3 * found['new_wall_s']:9.3f} ms, old/new {ratios}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    return None


if __name__ == "__main__":
    main()
