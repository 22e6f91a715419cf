"""What `flashlm pru eval` reports: a saved model on a split of a folder of text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from flashlm.errors import ConfigError
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.training.corpus import SPLITS, split_file
from flashlm.pru.training.dynamic import DynamicSettings, best_settings, gradient_rms, score_dynamically
from flashlm.pru.training.encoding import Encoding, Ids, read_lines
from flashlm.pru.training.evaluate import Score, exp, score
from flashlm.pru.training.processes import Processes
from flashlm.pru.training.saved import load_with_encoding

Report = Callable[[int, int, str], None]


def evaluate_folder(
    folder: Path,
    data: Path,
    *,
    split: str = "test",
    batch_size: int = 1,
    max_tokens: int | None = None,
    dynamic: DynamicSettings | None = None,
    has_grid: bool = False,
    grid_tokens: int | None = None,
    device: str = "auto",
    on_progress: Report = lambda done, total, what: None,
    note: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Score a split with a saved model.

    Args:
        folder: A run's folder, whose best model is taken, or a saved model's.
        data: Folder of text.
        split: train, valid or test.
        batch_size: Columns of the plain evaluation.
        max_tokens: Only so many tokens from the split's start.
        dynamic: Do dynamic evaluation too, with gradient statistics of the training text.
        has_grid: Find lr and lamb of `dynamic` on the validation text first.
        grid_tokens: Only so many tokens of it.
        device: `auto`, `cpu` or `cuda`.
        on_progress: Called with tokens done, in all, and what is going on.
        note: Called with lines for people.

    Raises:
        ConfigError: The text can't be read or encoded.
        PackError: The folder has no model, or a damaged one.
    """
    if split not in SPLITS:
        raise ConfigError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    model, encoding = load_with_encoding(folder)
    model.to(Processes(device).device)
    path = split_file(data, split)
    lines = read_lines(path)
    ids = encoding.encode(lines, str(path))[:max_tokens]
    num_unknown = encoding.count_unknown(lines)
    if num_unknown:
        note(f"{path}: {num_unknown:,} words are outside the vocabulary and count as unknown")
    result = score(model, ids, batch_size=batch_size)
    report = {"text": str(path), "batch_size": batch_size, "unknown_words": num_unknown, **_scored(result)}
    if max_tokens is None and batch_size == 1:
        num_words = sum(len(line.split()) + 1 for line in lines)
        report["perplexity_per_word"] = exp(result.loss_sum / (num_words - 1))
    if dynamic is not None:
        report["dynamic"] = _dynamic(model, encoding, data, ids, dynamic, has_grid, grid_tokens, on_progress, note)
    return report


def _scored(result: Score) -> dict[str, Any]:
    return {
        "num_tokens": result.num_tokens,
        "perplexity": result.perplexity,
        "loss": result.loss,
        "published_perplexity": result.published_perplexity,
    }


def _dynamic(
    model: PRUForCausalLM,
    encoding: Encoding,
    data: Path,
    ids: Ids,
    settings: DynamicSettings,
    has_grid: bool,
    grid_tokens: int | None,
    on_progress: Report,
    note: Callable[[str], None],
) -> dict[str, Any]:
    def read(split: str) -> Ids:
        path = split_file(data, split)
        return encoding.encode(read_lines(path), str(path))

    rms = gradient_rms(
        model, read("train"), settings, on_progress=lambda done, total: on_progress(done, total, "gradient statistics")
    )
    grid: list[dict[str, Any]] = []

    def tried(made: DynamicSettings, result: Score) -> None:
        grid.append({"lr": made.lr, "lamb": made.lamb, "perplexity": result.perplexity})
        note(f"lr {made.lr:.1e}, lamb {made.lamb:.1e}: {result.perplexity:.3f}")

    if has_grid:
        settings = best_settings(model, read("valid"), rms, settings, max_tokens=grid_tokens, on_tried=tried)
    result = score_dynamically(
        model, ids, rms, settings, on_progress=lambda done, total: on_progress(done, total, "dynamic evaluation")
    )
    return {"lr": settings.lr, "lamb": settings.lamb, "segment": settings.segment, **_scored(result), "grid": grid}
