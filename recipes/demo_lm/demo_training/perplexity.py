"""Perplexity of a text, exactly: every token is scored once, and the context it is given is stated.

The text is one stream after a single document mark, cut into windows as long as the model's positions. They overlap, and
only what lies past the overlap is scored: every token but the first few of the text sees at least `overlap` tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

NUM_WINDOWS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """Negative log likelihood of a text, under both ways of counting."""

    nll_nats: float
    """Sum over all tokens of the text."""
    num_tokens: int
    """Tokens scored."""
    num_words: int
    """See `count_words`."""

    @property
    def per_token(self) -> float:
        """Perplexity per token of this tokenizer; not comparable across tokenizers."""
        return math.exp(self.nll_nats / self.num_tokens)

    @property
    def per_word(self) -> float:
        """Perplexity per word; comparable to word-level models on the same text."""
        return math.exp(self.nll_nats / self.num_words)


@dataclass(frozen=True)
class Window:
    """Tokens `begin` to `end` of the text, of which the first `num_context` are not scored."""

    begin: int
    end: int
    num_context: int


def count_words(text: str) -> int:
    """Count blank-separated words, and one end of line per line, as word-level papers do."""
    return len(text.split()) + text.count("\n")


def windows_over(num_tokens: int, length: int, overlap: int) -> list[Window]:
    """Return windows of `length` (the last may be shorter) that score each of `num_tokens` tokens exactly once."""
    if not 0 <= overlap < length:
        raise ValueError(f"overlap is {overlap}; it must be from 0 to {length - 1}")
    windows = [Window(0, min(length, num_tokens), 0)]
    while windows[-1].end < num_tokens:
        begin = windows[-1].end - overlap
        windows.append(Window(begin, min(begin + length, num_tokens), overlap))
    return windows


@torch.inference_mode()
def score_tokens(model: PreTrainedModel, ids: torch.Tensor, mark_id: int, overlap: int) -> float:
    """Return the negative log likelihood of `ids` (int64 [tokens]) in nats, summed in float64.

    Raises ValueError if `overlap` is not smaller than the model's positions.
    """
    inputs = torch.cat([torch.tensor([mark_id]), ids[:-1]])
    windows = windows_over(ids.numel(), model.config.max_position_embeddings, overlap)
    total_nats = 0.0
    for (length, num_context), alike in groupby(windows, key=lambda w: (w.end - w.begin, w.num_context)):
        spans = list(alike)
        for first in range(0, len(spans), NUM_WINDOWS_AT_ONCE):
            some = spans[first : first + NUM_WINDOWS_AT_ONCE]
            inputs_bt = torch.stack([inputs[w.begin : w.end] for w in some])
            targets_bt = torch.stack([ids[w.begin + num_context : w.end] for w in some])
            logits_btv = model(inputs_bt, use_cache=False, logits_to_keep=length - num_context).logits
            losses = F.cross_entropy(logits_btv.flatten(0, 1).float(), targets_bt.flatten(), reduction="none")
            total_nats += losses.double().sum().item()
    return total_nats
