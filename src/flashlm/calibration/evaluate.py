"""Perplexity of a pack on a text, token by token exact, in any mode, with the traffic that it took.

The text is cut into windows of the context's length; each starts without a past, and its first token is not predicted.
Exact modes take a window in pieces of a prompt. Mode `sparse` takes it token by token, so that what is measured is what
generation does: predictors, neuron cache and reads.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flashlm.engine.forward_pass import Phase
from flashlm.engine.load import load_opened
from flashlm.engine.opened import OpenedPack, open_pack
from flashlm.engine.prompts import read_tokenizer
from flashlm.engine.runtime import FlashRuntime
from flashlm.engine.session import Session
from flashlm.errors import ConfigError
from flashlm.planner.settings import as_mode, make_settings
from flashlm.sizes import format_size

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

PIECE_TOKENS = 128  # of a window at once, in exact modes
VERIFIED_TOKENS = 16  # where activations are rounded: what row kernels take at once
MIN_TOKENS = 2
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, kw_only=True)
class ModeEvaluation:
    """What one mode made of the text.

    Attributes:
        mode: As it ran.
        exactness: One line.
        num_tokens: Tokens predicted.
        nll: Mean negative log-likelihood of a token, in nats.
        wall_s: Time of all passes.
        num_passes: Forward passes.
        bytes_read, num_reads: Traffic of all passes.
        hit_share: Rows that the neuron cache held; None in exact modes.
    """

    mode: str
    exactness: str
    num_tokens: int
    nll: float
    wall_s: float
    num_passes: int
    bytes_read: int
    num_reads: int
    hit_share: float | None

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nll)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-ready values."""
        return asdict(self) | {"perplexity": self.perplexity}


def read_token_ids(opened: OpenedPack, text_path: Path, *, max_tokens: int | None) -> torch.Tensor:
    """Return the ids of a text, int64 (num_tokens,), with no special tokens.

    Raises:
        ConfigError: The text can't be read, or is too short.
        PackError: The pack has no tokenizer.
    """
    import torch

    try:
        text = text_path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the text can't be read from {text_path}: {error}") from error
    ids = read_tokenizer(opened)(text, add_special_tokens=False, verbose=False)["input_ids"][:max_tokens]
    if len(ids) < MIN_TOKENS:
        raise ConfigError(f"{text_path} has {len(ids)} tokens: perplexity needs at least {MIN_TOKENS}")
    return torch.tensor(ids, dtype=torch.int64)


def evaluate(
    pack: str | Path,
    text_path: str | Path,
    *,
    modes: Sequence[str],
    dram: str | int | None = None,
    window: int = 512,
    max_tokens: int | None = None,
    activations: str | None = None,
    progress: Progress = lambda done, total, what: None,
    on_loaded: Callable[[FlashRuntime], None] | None = None,
) -> list[ModeEvaluation]:
    """Return the perplexity of `pack` on a text in each of `modes`, one after the other, on the same windows.

    Args:
        pack: The pack's folder.
        text_path: A UTF-8 text.
        modes: Modes as `load` takes them.
        dram: Bound on the process.
        window: Tokens of a window, and of the KV cache.
        max_tokens: Only so many tokens from the start of the text.
        activations: As `load` takes them.
        progress: Called with tokens done, tokens in all, and the mode.
        on_loaded: Called after each loading.

    Raises:
        ConfigError: The text is too short or can't be read, or a setting is out of range.
        PackError, BudgetError, StorageError: As in `load`.
    """
    if window < MIN_TOKENS:
        raise ConfigError(f"window={window} must be at least {MIN_TOKENS} tokens")
    settings = make_settings(dram=dram, activations=activations)
    opened = open_pack(pack, is_checked=settings.is_checked)
    window = min(window, _num_positions(opened.config) or window)
    ids = read_token_ids(opened, Path(text_path), max_tokens=max_tokens)
    results = []
    for mode in modes:
        model = load_opened(opened, replace(settings, mode=as_mode(mode), context=window))
        if on_loaded is not None:
            on_loaded(model.flash)
        results.append(_evaluate(model, ids, window, progress))
        model.flash.close()
        del model
        gc.collect()
    return results


def _evaluate(model: PreTrainedModel, ids: torch.Tensor, window: int, progress: Progress) -> ModeEvaluation:
    session = Session(model)
    flash = session.flash
    phase: Phase = "prompt"
    piece = PIECE_TOKENS
    if flash.mode == "sparse":
        phase, piece = "decode", 1
    elif flash.decision.activations != "exact":  # a verified token has the bits of a decoded one
        phase, piece = "verify", VERIFIED_TOKENS
    total_nll, num_tokens = 0.0, 0
    started_s = time.perf_counter()
    for start in range(0, len(ids), window):
        session.reset()
        for step in session.score(ids[start : start + window].tolist(), piece_tokens=piece, phase=phase):
            total_nll -= step.logprob or 0.0
            num_tokens += 1
            progress(num_tokens, len(ids), flash.mode)
    wall_s = time.perf_counter() - started_s
    records = session.telemetry.records
    asked = sum(record.hit_rows + record.miss_rows for record in records)
    return ModeEvaluation(
        mode=flash.mode,
        exactness=flash.exactness,
        num_tokens=num_tokens,
        nll=total_nll / num_tokens,
        wall_s=wall_s,
        num_passes=len(records),
        bytes_read=sum(record.bytes_read for record in records),
        num_reads=sum(record.num_reads for record in records),
        hit_share=sum(record.hit_rows for record in records) / asked if asked else None,
    )


def _num_positions(config: Any) -> int | None:
    text = config.get_text_config(decoder=True)
    return getattr(text, "max_position_embeddings", None)


def rows(results: Sequence[ModeEvaluation]) -> list[tuple[str, str]]:
    """Return the table that `flashlm eval` prints."""
    table = []
    for result in results:
        cached = "" if result.hit_share is None else f", {result.hit_share:.0%} of its rows held"
        table += [
            (f"{result.mode}: perplexity", f"{result.perplexity:.4f} per token ({result.num_tokens} tokens predicted)"),
            (f"{result.mode}: exactness", result.exactness),
            (
                f"{result.mode}: traffic",
                f"{format_size(result.bytes_read // max(result.num_tokens, 1))} and"
                f" {result.num_reads / max(result.num_tokens, 1):.1f} reads a token{cached}",
            ),
            (f"{result.mode}: time", f"{result.wall_s:.1f} s in {result.num_passes} passes"),
        ]
    if len(results) > 1:
        change = results[-1].perplexity / results[0].perplexity - 1
        table.append((f"{results[-1].mode} against {results[0].mode}", f"perplexity {change:+.2%}"))
    return table
