"""Train several recipes side by side: epoch 1 of each, then epoch 2 of each, so that they are comparable whenever it stops.

    python recipes/pru/compare.py --data DATA --out OUT --epochs 8 recipes/pru/standard/*.toml
    python recipes/pru/compare.py --data DATA --out OUT --epochs 8 --seeds 1111,2222 recipes/pru/grid/*.toml
    python recipes/pru/compare.py --data DATA --out OUT --epochs 8 --set precision=bf16 recipes/pru/standard/*.toml

Resumable: killed and started again it goes on. After each epoch it writes OUT/results.json, OUT/results.md and
OUT/valid.png from what the runs have measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flashlm.pru.training.allocator import keep_freed_memory
from flashlm.pru.training.corpus import Corpus, read_corpus
from flashlm.pru.training.metrics import METRICS_FILE, read_metrics
from flashlm.pru.training.settings import Recipe, assigned, make_recipe
from flashlm.pru.training.trainer import Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+", help="recipe files")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--epochs", type=int, required=True, help="of each run, in this call")
    parser.add_argument(
        "--seeds", type=lambda text: [int(part) for part in text.split(",")], help="default: the recipe's"
    )
    parser.add_argument("--set", dest="assignments", action="append", default=[], help="NAME=VALUE, over all recipes")
    parser.add_argument("--whole-runs", action="store_true", help="each run to its end, not in turns")
    parser.add_argument("--threads", type=int, default=None)
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()
    corpus = read_corpus(arguments.data)
    changes = assigned(arguments.assignments)
    runs = [
        (arguments.out / run_name(path, seed), with_seed(make_recipe(path, None, *changes), seed))
        for seed in arguments.seeds or [None]
        for path in arguments.recipes
    ]
    turns = [arguments.epochs] if arguments.whole_runs else range(1, arguments.epochs + 1)
    for epoch in turns:
        for folder, recipe in runs:
            train(corpus, recipe, folder, epoch)
            report(arguments.out, runs, corpus)


def run_name(path: Path, seed: int | None) -> str:
    return path.stem if seed is None else f"{path.stem}-seed{seed}"


def with_seed(recipe: Recipe, seed: int | None) -> Recipe:
    return recipe if seed is None else replace(recipe, training=replace(recipe.training, seed=seed))


def train(corpus: Corpus, recipe: Recipe, folder: Path, until_epoch: int) -> None:
    """Take a run to the end of an epoch; nothing is loaded where it is there already."""
    if len(validations(folder)) >= until_epoch:
        return
    Trainer(corpus, recipe, folder, note=lambda line: print(f"{folder.name}: {line}", flush=True)).run(until_epoch)


def validations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / METRICS_FILE) if row["kind"] == "valid"]


def report(out: Path, runs: list[tuple[Path, Recipe]], corpus: Corpus) -> None:
    """Write what was measured so far as JSON, as a table and as a plot."""
    results = [result(folder, recipe) for folder, recipe in runs if validations(folder)]
    (out / "results.json").write_text(json.dumps({"corpus": corpus.describe(), "runs": results}, indent=2) + "\n")
    (out / "results.md").write_text(table(results))
    plot(results, out / "valid.png")


def result(folder: Path, recipe: Recipe) -> dict[str, Any]:
    rows = validations(folder)
    run = json.loads((folder / "run.json").read_text())
    return {
        "name": recipe.name,
        "run": folder.name,
        "seed": recipe.training.seed,
        "num_parameters": run["model"]["num_parameters"],
        "epochs": len(rows),
        "valid_perplexity": [row["perplexity"] for row in rows],
        "train_perplexity": [row["train_perplexity"] for row in rows],
        "median_step_s": statistics.median(row["median_step_s"] for row in rows),
        # steps times their median: pauses of a shared machine do not count
        "epoch_s": statistics.median(row["median_step_s"] * row["num_steps"] for row in rows),
        "epoch_cpu_s": statistics.median(row["training_cpu_s"] for row in rows),
    }


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| run | parameters | epochs | valid perplexity | best | s/step | s/epoch |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in results:
        perplexities = row["valid_perplexity"]
        lines.append(
            f"| {row['run']} | {row['num_parameters']:,} | {row['epochs']} | {perplexities[-1]:.2f} |"
            f" {min(perplexities):.2f} | {row['median_step_s']:.3f} | {row['epoch_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for row in results:
        epochs = range(1, row["epochs"] + 1)
        axes.plot(
            epochs, row["valid_perplexity"], marker="o", label=f"{row['name']} ({row['num_parameters'] / 1e6:.1f} M)"
        )
    axes.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axes.legend(fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
