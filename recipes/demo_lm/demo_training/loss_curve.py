"""The loss curve as a picture."""

from __future__ import annotations

import logging
from itertools import pairwise
from pathlib import Path

import numpy as np

SMOOTHING_STEPS = 20


def draw_loss_curve(records: list[dict[str, float]], path: Path) -> bool:
    """Draw training loss (running mean) and validation loss over tokens; return False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        logging.getLogger(__name__).warning("no matplotlib, so no loss curve: pip install matplotlib")
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    tokens = np.array([record["tokens"] for record in records]) / 1e6
    losses = np.array([record["loss"] for record in records])
    width = min(SMOOTHING_STEPS, len(losses))
    axes.plot(
        tokens[width - 1 :], np.convolve(losses, np.ones(width) / width, "valid"), label=f"train, mean of {width} steps"
    )
    scored = [record for record in records if "valid_loss" in record]
    if scored:
        axes.plot(
            [r["tokens"] / 1e6 for r in scored], [r["valid_loss"] for r in scored], "o-", label="validation, first part"
        )
    decay = next(
        (r for before, r in pairwise(records) if before["lr_factor"] == 1.0 > r["lr_factor"]),
        None,
    )
    if decay is not None:
        axes.axvline(decay["tokens"] / 1e6, color="0.6", linestyle=":", label="decay begins")
    axes.set_xlabel("tokens seen (millions)")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    return True
