"""A training step of whole recurrent models, by precision and by what the C library does with freed memory.

    python benchmarks/pru_train_step.py [--out benchmarks/results/pru_train_step.json] [RECIPE ...]

Each model takes a window of 70 steps of batch 20 from a vocabulary of 10,000: forward, loss, backward, clipping and the
optimiser's step, on random tokens and random weights (which change no time). The models of one precision alternate, one step
each in a round; medians of all rounds after the first `--warm-ups`. Pages faulted in a step are counted. The process is
measured as it comes first, then, once it keeps freed memory as `flashlm pru train` does, again. An epoch is the step's
time by 681, the number of windows in a text of Penn Treebank's size. The floor is the model's multiply-adds at the rate of
one large product in the same precision and run.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from machine import describe_commit, describe_machine, today

from flashlm.pru import PRUConfig, PRUForCausalLM
from flashlm.pru.products import linear
from flashlm.pru.training.allocator import keep_freed_memory
from flashlm.pru.training.optimiser import AveragingSGD
from flashlm.pru.training.regularisers import run_window
from flashlm.pru.training.settings import Recipe, read_recipe

RECIPES = Path(__file__).parents[1] / "recipes" / "pru"
DEFAULT = ("standard/pru-g4-m1400", "standard/pru-g2-m1200", "standard/lstm-m1000")
BATCH, STEPS, VOCABULARY, WINDOWS_PER_EPOCH = 20, 70, 10_000, 681


class Contestant:
    """A model, its optimiser and the state that is carried from window to window."""

    def __init__(self, recipe: Recipe) -> None:
        torch.manual_seed(0)
        self.recipe = recipe
        self.model = PRUForCausalLM(PRUConfig(vocab_size=VOCABULARY, **recipe.model)).train()
        self.optimiser = AveragingSGD(list(self.model.parameters()), recipe.training.weight_decay)
        self.tokens = torch.randint(0, VOCABULARY, (STEPS + 1, BATCH))
        self.state: Any = None

    @property
    def num_flops(self) -> int:
        """Multiply-adds twice: forward, by the weights, by the inputs. The tied matrix counts once, as the softmax."""
        weights = sum(parameter.numel() for parameter in self.model.parameters() if parameter.dim() > 1)
        return 3 * 2 * weights * BATCH * STEPS

    def step(self, is_bf16: bool) -> tuple[float, int]:
        """Take one; return seconds and pages faulted in."""
        faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        began_s = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            result = run_window(self.model, self.recipe.training, self.tokens[:-1], self.tokens[1:], self.state)
        result.loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.optimiser.parameters, self.recipe.training.clip)
        self.optimiser.step(1e-3)
        self.state = result.state
        took_s = time.perf_counter() - began_s
        return took_s, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - faults


def measure(contestants: list[Contestant], is_bf16: bool, rounds: int, warm_ups: int) -> dict[str, Any]:
    records: dict[str, list[tuple[float, int]]] = {each.recipe.name: [] for each in contestants}
    for number in range(rounds + warm_ups):
        for each in contestants:
            record = each.step(is_bf16)
            if number >= warm_ups:
                records[each.recipe.name].append(record)
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    a, b = torch.randn(1400, 1400, dtype=dtype), torch.randn(5600, 1400, dtype=dtype)
    times = []
    for _ in range(10):
        began_s = time.perf_counter()
        linear(a, b, None)
        times.append(time.perf_counter() - began_s)
    flops_per_s = 2 * 1400 * 1400 * 5600 / statistics.median(times)
    result: dict[str, Any] = {"product_gflop_per_s": flops_per_s / 1e9, "models": {}}
    for each in contestants:
        steps_s = [took_s for took_s, _ in records[each.recipe.name]]
        median_s = statistics.median(steps_s)
        result["models"][each.recipe.name] = {
            "step_s": median_s,
            "fastest_s": min(steps_s),
            "slowest_s": max(steps_s),
            "pages_faulted": statistics.median(faults for _, faults in records[each.recipe.name]),
            "epoch_s": median_s * WINDOWS_PER_EPOCH,
            "floor_s": each.num_flops / flops_per_s,
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=DEFAULT, help="names below recipes/pru, without .toml")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-ups", type=int, default=10, help="glibc takes some ten steps to settle")
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    contestants = [Contestant(read_recipe(RECIPES / f"{name}.toml")) for name in arguments.recipes]
    result: dict[str, Any] = {
        "machine": describe_machine(),
        **describe_commit(Path(__file__).parents[1]),
        "date": today(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "load_average_before": Path("/proc/loadavg").read_text().split()[0],
        "rounds": arguments.rounds,
        "num_parameters": {
            each.recipe.name: sum(parameter.numel() for parameter in each.model.parameters()) for each in contestants
        },
    }
    for keeps in (False, True):
        if keeps:
            result["keeps_freed_memory"] = keep_freed_memory()
        for precision in arguments.precisions:
            name = precision + ("_kept" if keeps else "")
            result[name] = measure(contestants, precision == "bf16", arguments.rounds, arguments.warm_ups)
            for model, row in result[name]["models"].items():
                print(
                    f"{name:9} {model:20} {row['step_s']:.3f} s/step, {row['epoch_s']:.0f} s/epoch,"
                    f" floor {row['floor_s']:.3f} s, {row['pages_faulted']:,.0f} pages",
                    flush=True,
                )
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
