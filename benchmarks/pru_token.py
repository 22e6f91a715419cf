"""One token of whole recurrent models, fed back with its state, by batch and precision.

    python benchmarks/pru_token.py [--out benchmarks/results/pru_token.json] [RECIPE ...]

A vocabulary of 10,000, random weights (which change no time), under `no_grad`, logits included. Each model is run twice: as
it is, and with the softmax by torch as any `nn.Linear` (`torch_softmax`); the two alternate, with 40 tokens of the same kind
before each one that is timed, and medians are of all rounds. The bound is the bytes of all weights at the rate of a plain
sum over memory larger than any cache in the same run; what a cache keeps between tokens lets a time fall below it.
`generate_s` is a token of transformers' greedy `generate`, batch 1, its own Python included.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from machine import describe_commit, describe_machine, today
from pru_speed import SUM_BYTES, TOKENS_BEFORE, medians, seconds
from pru_train_step import DEFAULT, RECIPES, VOCABULARY

from flashlm import _native
from flashlm.pru import PRUConfig, PRUForCausalLM, products
from flashlm.pru.training.settings import read_recipe

BATCHES = (1, 2, 4, 8)
GENERATED = 64


def token(model: PRUForCausalLM, batch: int, few_tokens: dict[torch.dtype, int]) -> Callable[[], object]:
    ids = torch.full((batch, 1), 5)
    state = model(ids).state

    def run() -> None:
        with patch.object(products, "FEW_TOKENS", few_tokens):
            model(ids, state=state)

    return run


def measure(model: PRUForCausalLM, repeats: int) -> dict[str, Any]:
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    memory = torch.ones(SUM_BYTES // 4)
    result: dict[str, Any] = {"weight_bytes": num_bytes, "tokens": []}
    with torch.no_grad():
        for batch in BATCHES:
            works = {"as_it_is": token(model, batch, products.FEW_TOKENS), "torch_softmax": token(model, batch, {})}
            times = medians(works, repeats, num_before=TOKENS_BEFORE)
            sum_s = medians({"sum": memory.sum}, 9)["sum"]
            bound_s = num_bytes * sum_s / SUM_BYTES
            result["tokens"].append(
                {
                    "batch": batch,
                    "seconds": times,
                    "bound_s": bound_s,
                    "memory_gb_per_s": SUM_BYTES / sum_s / 1e9,
                    "share_of_bound": bound_s / times["as_it_is"],
                    "torch_softmax/as_it_is": times["torch_softmax"] / times["as_it_is"],
                }
            )

    def generate() -> None:
        model.generate(torch.tensor([[5]]), max_new_tokens=GENERATED, do_sample=False, pad_token_id=0)

    generate()
    result["generate_s"] = statistics.median(seconds(generate) for _ in range(5)) / GENERATED
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=DEFAULT, help="names below recipes/pru, without .toml")
    parser.add_argument("--repeats", type=int, default=40)
    parser.add_argument(
        "--dtypes", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "machine": describe_machine(),
        **describe_commit(Path(__file__).parents[1]),
        "date": today(),
        "torch": torch.__version__,
        "threads": {"torch": torch.get_num_threads(), "kernels": _native.num_threads()},
        "simd": _native.simd_level(),
        "repeats": arguments.repeats,
        "load_average_before": Path("/proc/loadavg").read_text().split()[0],
        "models": {},
    }
    for dtype in arguments.dtypes:
        for name in arguments.recipes:
            recipe = read_recipe(RECIPES / f"{name}.toml")
            torch.manual_seed(0)
            model = PRUForCausalLM(PRUConfig(vocab_size=VOCABULARY, **recipe.model)).eval().to(getattr(torch, dtype))
            measured = result["models"][f"{recipe.name}, {dtype}"] = measure(model, arguments.repeats)
            for each in measured["tokens"]:
                print(
                    f"{recipe.name:20} {dtype:9} batch {each['batch']}: {1e3 * each['seconds']['as_it_is']:.2f} ms,"
                    f" torch's softmax {1e3 * each['seconds']['torch_softmax']:.2f}, bound {1e3 * each['bound_s']:.2f}",
                    flush=True,
                )
            print(f"{recipe.name:20} {dtype:9} generate: {1e3 * measured['generate_s']:.2f} ms a token", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
