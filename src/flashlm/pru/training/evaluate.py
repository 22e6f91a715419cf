"""Perplexity of a recurrent model on a text, token-exact, with the published variant beside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from flashlm.pru.cell import State
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.training.batches import columns, windows
from flashlm.pru.training.encoding import Ids
from flashlm.pru.training.regularisers import run_window
from flashlm.pru.training.settings import TrainingSettings

PLAIN = TrainingSettings(dropout=0, dropouth=0, dropouti=0, alpha=0, beta=0)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How well a text was predicted.

    Attributes:
        loss_sum: Cross-entropy over all predicted tokens, in nats.
        num_tokens: Predicted tokens: all but the first of each column.
        num_columns: Columns that the text was cut into.
    """

    loss_sum: float
    num_tokens: int
    num_columns: int

    @property
    def loss(self) -> float:
        """Nats per predicted token."""
        return self.loss_sum / self.num_tokens

    @property
    def perplexity(self) -> float:
        """Token-exact perplexity."""
        return exp(self.loss)

    @property
    def published_perplexity(self) -> float:
        """What the papers' code reports: the sum over a column's whole length, though nothing predicts its first token."""
        return exp(self.loss_sum / (self.num_tokens + self.num_columns))


def exp(loss: float) -> float:
    """Return e^loss, infinity where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def score(model: PRUForCausalLM, ids: Ids, *, batch_size: int = 1, window: int = 70) -> Score:
    """Score a text with the state carried through each column; the result depends on `window` by rounding only.

    Args:
        model: On its device; left in the mode that it was in.
        ids: int64 (num_tokens,).
        batch_size: Columns; 1 predicts every token but the first, more drop the tail that fills no row.
        window: Tokens of a forward pass.

    Raises:
        ConfigError: The text is too short.
    """
    rows = columns(ids, batch_size).to(model.device)
    was_training = model.training
    model.eval()
    state: tuple[State, ...] | None = None
    loss_sum, num_tokens = 0.0, 0
    try:
        for inputs, targets in windows(rows, window):
            result = run_window(model, PLAIN, inputs, targets, state)
            state = result.state
            loss_sum += result.cross_entropy.item() * targets.numel()
            num_tokens += targets.numel()
    finally:
        model.train(was_training)
    return Score(loss_sum=loss_sum, num_tokens=num_tokens, num_columns=batch_size)
