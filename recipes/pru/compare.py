"""Train several recipes side by side: epoch 1 of each, then epoch 2 of each, so that they are comparable whenever it stops.

    python recipes/pru/compare.py --data DATA --out OUT --epochs 8 recipes/pru/standard/*.toml
    python recipes/pru/compare.py --data DATA --out OUT --epochs 8 --seeds 1111,2222 recipes/pru/grid/*.toml
    python recipes/pru/compare.py --data DATA --out OUT --epochs 8 --set precision=bf16 recipes/pru/standard/*.toml

Resumable: killed and started again it goes on. After each epoch it writes OUT/results.json, OUT/results.md and
OUT/valid.png from what the runs have measured: curves, or with several seeds a dot for each. `--test` scores the best model
of each run on the test text at the end, at batch 1.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from machine import describe_commit, describe_machine, today

from flashlm.pru.training.allocator import keep_freed_memory
from flashlm.pru.training.corpus import Corpus, read_corpus
from flashlm.pru.training.metrics import METRICS_FILE, read_metrics
from flashlm.pru.training.reports import evaluate_folder
from flashlm.pru.training.saved import BEST
from flashlm.pru.training.settings import Recipe, assigned, make_recipe
from flashlm.pru.training.trainer import Trainer

TEST_FILE = "test.json"


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
    parser.add_argument("--test", action="store_true", help="score the best models on the test text at the end")
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
    if arguments.test:
        for folder, _ in runs:
            test(folder, arguments.data)
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


def test(folder: Path, data: Path) -> None:
    """Score a run's best model on the test text, where that was not done since the model was saved."""
    file = folder / TEST_FILE
    if not file.exists() or file.stat().st_mtime < (folder / BEST).stat().st_mtime:
        result = evaluate_folder(folder, data)
        file.write_text(json.dumps(result | {"text": Path(result["text"]).name}) + "\n")


def validations(folder: Path) -> list[dict[str, Any]]:
    return [row for row in read_metrics(folder / METRICS_FILE) if row["kind"] == "valid"]


def report(out: Path, runs: list[tuple[Path, Recipe]], corpus: Corpus) -> None:
    """Write what was measured so far as JSON, as a table and as a plot."""
    results = [result(folder, recipe) for folder, recipe in runs if validations(folder)]
    facts = {
        "machine": describe_machine(),
        **describe_commit(Path(__file__).parents[2]),
        "date": today(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "corpus": corpus.describe().removeprefix(f"{corpus.folder.parent}/"),  # no path of this machine
    }
    (out / "results.json").write_text(json.dumps(facts | {"runs": results}, indent=2) + "\n")
    (out / "results.md").write_text(table(results))
    plot(results, out / "valid.png")


def result(folder: Path, recipe: Recipe) -> dict[str, Any]:
    rows = validations(folder)
    run = json.loads((folder / "run.json").read_text())
    return {
        "name": recipe.name,
        "run": folder.name,
        "seed": recipe.training.seed,
        "precision": recipe.training.precision,
        "num_parameters": run["model"]["num_parameters"],
        "epochs": len(rows),
        "valid_perplexity": [row["perplexity"] for row in rows],
        "train_perplexity": [row["train_perplexity"] for row in rows],
        "median_step_s": statistics.median(row["median_step_s"] for row in rows),
        # steps times their median: pauses of a shared machine do not count
        "epoch_s": statistics.median(row["median_step_s"] * row["num_steps"] for row in rows),
        "epoch_cpu_s": statistics.median(row["training_cpu_s"] for row in rows),
    } | ({"test": json.loads((folder / TEST_FILE).read_text())} if (folder / TEST_FILE).exists() else {})


def table(results: list[dict[str, Any]]) -> str:
    lines = [
        "| run | parameters | epochs | valid perplexity | best | test | s/step | s/epoch |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in results:
        perplexities = row["valid_perplexity"]
        tested = f"{row['test']['perplexity']:.2f}" if "test" in row else ""
        lines.append(
            f"| {row['run']} | {row['num_parameters']:,} | {row['epochs']} | {perplexities[-1]:.2f} |"
            f" {min(perplexities):.2f} | {tested} | {row['median_step_s']:.3f} | {row['epoch_s']:.0f} |"
        )
    if len({row["seed"] for row in results}) > 1:
        lines += [
            "",
            "| recipe | parameters | best valid perplexity, by seed | mean | spread |",
            "|---|---|---|---|---|",
        ]
        for name, num_parameters, best in by_recipe(results):
            lines.append(
                f"| {name} | {num_parameters:,} | {', '.join(f'{value:.2f}' for value in best)} |"
                f" {statistics.mean(best):.2f} | {max(best) - min(best):.2f} |"
            )
    return "\n".join(lines) + "\n"


def by_recipe(results: list[dict[str, Any]]) -> list[tuple[str, int, list[float]]]:
    """Return name, parameters and each seed's best validation perplexity, the lowest mean first."""
    rows: dict[str, tuple[str, int, list[float]]] = {}
    for row in results:
        rows.setdefault(row["name"], (row["name"], row["num_parameters"], []))[2].append(min(row["valid_perplexity"]))
    return sorted(rows.values(), key=lambda item: statistics.mean(item[2]))


def plot(results: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if len({row["seed"] for row in results}) > 1:
        _draw_dots(axes, results)
    else:
        _draw_curves(axes, results)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=120)


def _draw_curves(axes: Any, results: list[dict[str, Any]]) -> None:
    for row in results:
        epochs = range(1, row["epochs"] + 1)
        label = f"{row['name']} ({row['num_parameters'] / 1e6:.1f} M)"
        axes.plot(epochs, row["valid_perplexity"], marker="o", label=label)
    axes.set(xlabel="epoch", ylabel="validation perplexity", yscale="log")
    axes.legend(fontsize="small")


def _draw_dots(axes: Any, results: list[dict[str, Any]]) -> None:
    rows = by_recipe(results)[::-1]
    for height, (_, _, best) in enumerate(rows):
        axes.plot(best, [height] * len(best), "o", color="tab:blue")
        axes.plot(statistics.mean(best), height, "|", color="black", markersize=12)
    axes.set_yticks(range(len(rows)), [f"{name} ({count / 1e6:.2f} M)" for name, count, _ in rows], fontsize="small")
    axes.set(xlabel="best validation perplexity: a dot a seed, a line their mean")


if __name__ == "__main__":
    main()
