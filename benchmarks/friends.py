"""Closest-friend bundling, the paper's own negative result (section 3.2, Fig 12), on a real model's activations.

    python benchmarks/friends.py --pack PACK --text FILE [--tokens 4096] [--window 4] [--slots 0.25]

Every neuron is stored with the neuron that fires with it most often; one read brings both. What is counted, on the
activations of a calibration text (nothing is simulated but the cache; no timings): bytes and reads per token with and
without such bundles, and with rows chained by co-activation instead (`flashlm.calibration.order`), in one window(k)
cache each.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import describe_commit, describe_machine, today

import flashlm
from flashlm.calibration.evaluate import read_token_ids
from flashlm.calibration.order import neuron_order
from flashlm.engine.ffn import FlashFFN


def record(pack: Path, text: Path, num_tokens: int, window_tokens: int = 256) -> list[np.ndarray]:
    """Return the active rows of each layer, bool (num_tokens, num_rows)."""
    model = flashlm.load(pack, context=window_tokens)
    layers = [module for module in model.modules() if isinstance(module, FlashFFN)]
    parts: list[list[np.ndarray]] = [[] for _ in layers]

    def observe(layer: int, span: range, tokens: torch.Tensor, activated: torch.Tensor) -> None:
        parts[layer].append((activated > 0).numpy())

    for ffn in layers:
        ffn.observer = observe
    ids = read_token_ids(pack, text, max_tokens=num_tokens)
    runs: list[list[np.ndarray]] = [[] for _ in layers]
    for start in range(0, len(ids) // window_tokens * window_tokens, window_tokens):
        with torch.inference_mode():
            model(input_ids=ids[None, start : start + window_tokens], logits_to_keep=1)
        for layer, blocks in enumerate(parts):
            runs[layer].append(np.concatenate(blocks, axis=1))
            blocks.clear()
    return [np.concatenate(each) for each in runs]


def closest_friends(uses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return every row's closest friend, and in which share of its firings that one fires, too."""
    some = uses.astype(np.float32)
    together = some.T @ some
    fired = np.maximum(np.diag(together).copy(), 1.0)
    np.fill_diagonal(together, -1.0)
    friend = together.argmax(axis=1)
    return friend, together[np.arange(len(friend)), friend] / fired


def traffic(uses: np.ndarray, window: int, friend: np.ndarray | None, order: np.ndarray | None) -> dict[str, float]:
    """Return reads, rows read and rows held per token of a window(k) cache, over all tokens but the first 32.

    With friends a miss reads two rows, the friend too where it is held already (it lies in the same bundle); what came as a
    friend is held like a row that was used. With an order, missing neighbours are one read.
    """
    num_rows = uses.shape[1]
    last_used = np.full(num_rows, -(10**6))
    position = np.arange(num_rows)
    if order is not None:
        position[order] = np.arange(num_rows)
    totals = np.zeros(3)
    for token, used in enumerate(uses):
        held = last_used >= token - window
        missing = np.flatnonzero(used & ~held)
        num_reads, num_read = len(missing), len(missing)
        if friend is not None:
            num_read *= 2
            last_used[friend[missing]] = token
        if order is not None and len(missing):
            places = np.sort(position[missing])
            num_reads = 1 + int((np.diff(places) > 1).sum())
        last_used[used] = token
        if token >= 32:
            totals += (num_reads, num_read, held.sum())
    reads, rows, held_rows = totals / max(len(uses) - 32, 1)
    return {"reads": float(reads), "rows_read": float(rows), "rows_held": float(held_rows)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pack", type=Path, required=True, help="a pack of a ReLU model")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "friends.json")
    args = parser.parse_args()
    layers: list[dict[str, Any]] = []
    for index, uses in enumerate(record(args.pack, args.text, args.tokens)):
        half = len(uses) // 2  # friends and order from one half, traffic on the other
        friend, share = closest_friends(uses[:half])
        hottest = set(np.argsort(-uses[:half].sum(axis=0))[: max(uses.shape[1] // 100, 1)].tolist())
        layers.append(
            {
                "layer": index,
                "active_share": float(uses.mean()),
                "closest_friend_fires_too_mean": float(share[uses[:half].any(axis=0)].mean()),
                "friend_is_among_the_hottest_1_percent": float(np.mean([each in hottest for each in friend.tolist()])),
                "plain": traffic(uses[half:], args.window, None, None),
                "with_friend": traffic(uses[half:], args.window, friend, None),
                "source_order_merged": traffic(uses[half:], args.window, None, np.arange(uses.shape[1])),
                "hot_first_then_chained": traffic(uses[half:], args.window, None, neuron_order(uses[:half])),
            }
        )
    names = ("plain", "with_friend", "source_order_merged", "hot_first_then_chained")
    mean = {
        name: {key: float(np.mean([layer[name][key] for layer in layers])) for key in layers[0][name]} for name in names
    }
    result = {
        "what": "closest-friend bundling and neuron order: traffic per token and layer, counted on real activations",
        "pack": args.pack.name,
        "text": args.text.name,
        "tokens": args.tokens,
        "window": args.window,
        "mean": mean,
        "layers": layers,
        "date": today(),
        "machine": describe_machine(),
        "commit": describe_commit(Path(__file__).parent.parent),
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(mean, indent=1))
    for layer in layers:
        print({key: round(value, 3) for key, value in layer.items() if isinstance(value, float)})


if __name__ == "__main__":
    main()
