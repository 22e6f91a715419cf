"""Dynamic evaluation (Krause et al. 2018, §3-4): the model goes on learning from the text that it is being scored on.

Each segment is scored first, then a step is taken on it: down the gradient, scaled by each weight's root mean square
gradient on the training text, and back towards the trained weights. So no token is scored by a model that has seen it.
The mean of the root mean squares is over the means of the weight tensors, as in the published code; a PRU has other
tensors than an LSTM, so its best `lamb` need not be the published one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product

import torch

from flashlm.errors import ConfigError
from flashlm.pru.cell import State
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.training.batches import columns, windows
from flashlm.pru.training.encoding import Ids
from flashlm.pru.training.evaluate import PLAIN, Score
from flashlm.pru.training.regularisers import Pass, run_window

GRID_LR = (3e-5, 4e-5, 5e-5, 6e-5, 7e-5, 1e-4)  # for segments of 5 tokens, like the next
GRID_LAMB = (1e-3, 2e-3, 3e-3, 5e-3)
_GRID_SEGMENT = 5


@dataclass(frozen=True, kw_only=True)
class DynamicSettings:
    """How the model learns while it is scored; the defaults are the published ones.

    Attributes:
        lr: Learning rate.
        lamb: Share of the way back to the trained weights per segment, times each weight's relative gradient.
        epsilon: Added to each root mean square gradient.
        segment: Tokens between updates.
        statistics_batch_size: Columns of the training text for the gradient statistics.
    """

    lr: float = 5e-5
    lamb: float = 2e-3
    epsilon: float = 2e-5
    segment: int = 5
    statistics_batch_size: int = 100

    def __post_init__(self) -> None:
        for name in ("lr", "lamb", "epsilon", "segment", "statistics_batch_size"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be greater than 0, got {getattr(self, name)}")


def gradient_rms(
    model: PRUForCausalLM,
    ids: Ids,
    settings: DynamicSettings,
    *,
    max_batches: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[torch.Tensor]:
    """Return each parameter's root mean square gradient over the segments of a text.

    Args:
        model: On its device.
        ids: The training text.
        settings: Segment and columns.
        max_batches: Only so many segments; None: all.
        on_progress: Called with segments done and in all.
    """
    rows = columns(ids, min(settings.statistics_batch_size, len(ids) // 2)).to(model.device)
    pairs = list(windows(rows, settings.segment))[:max_batches]
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    state: tuple[State, ...] | None = None
    with _gradients(model):
        for done, (inputs, targets) in enumerate(pairs, 1):
            state = _backward(model, inputs, targets, state).state
            for total, parameter in zip(sums, model.parameters(), strict=True):
                assert parameter.grad is not None
                total.addcmul_(parameter.grad, parameter.grad)
            on_progress(done, len(pairs))
    return [(total / len(pairs)).sqrt_() for total in sums]


def score_dynamically(
    model: PRUForCausalLM,
    ids: Ids,
    rms: list[torch.Tensor],
    settings: DynamicSettings,
    *,
    max_tokens: int | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Score:
    """Score a text at batch 1, learning after each segment; the model's weights are put back at the end.

    Args:
        model: On its device.
        ids: int64 (num_tokens,).
        rms: What `gradient_rms` gave.
        settings: Learning rate, decay, segment.
        max_tokens: Only so many tokens from the text's start.
        on_progress: Called with tokens done and in all.
    """
    rows = columns(ids[:max_tokens], 1).to(model.device)
    trained = [parameter.detach().clone() for parameter in model.parameters()]
    mean = torch.stack([values.mean() for values in rms]).mean()
    pulls = [(settings.lamb * values / mean).clamp_(max=1.0) for values in rms]  # beyond 1 it would overshoot
    rates = [settings.lr / (values + settings.epsilon) for values in rms]
    state: tuple[State, ...] | None = None
    loss_sum, num_tokens = 0.0, 0
    try:
        with _gradients(model):
            for inputs, targets in windows(rows, settings.segment):
                result = _backward(model, inputs, targets, state)
                state = result.state
                loss_sum += result.cross_entropy.item() * targets.numel()
                num_tokens += targets.numel()
                _update(model, trained, pulls, rates)
                on_progress(num_tokens, rows.shape[0] - 1)
    finally:
        with torch.no_grad():
            for parameter, value in zip(model.parameters(), trained, strict=True):
                parameter.copy_(value)
    return Score(loss_sum=loss_sum, num_tokens=num_tokens, num_columns=1)


def best_settings(
    model: PRUForCausalLM,
    ids: Ids,
    rms: list[torch.Tensor],
    settings: DynamicSettings,
    *,
    max_tokens: int | None = None,
    on_tried: Callable[[DynamicSettings, Score], None] = lambda settings, score: None,
) -> DynamicSettings:
    """Return the settings of the published grid that score a validation text best.

    Args:
        model: On its device.
        ids: The validation text.
        rms: What `gradient_rms` gave.
        settings: Give segment and epsilon; the grid's values are for segments of 5 and are scaled to this one's length.
        max_tokens: Only so many tokens from the text's start.
        on_tried: Called after each.
    """
    scale = settings.segment / _GRID_SEGMENT
    tried = []
    for lamb, lr in product(GRID_LAMB, GRID_LR):
        candidate = replace(settings, lr=lr * scale, lamb=lamb * scale)
        result = score_dynamically(model, ids, rms, candidate, max_tokens=max_tokens)
        on_tried(candidate, result)
        tried.append((result.loss, candidate))
    return min(tried, key=lambda pair: pair[0])[1]


@contextmanager
def _gradients(model: PRUForCausalLM) -> Iterator[None]:
    """While entered the model takes gradients. In train mode, as cuDNN wants; dropouts are off by the settings passed."""
    was_training = model.training
    model.train()
    try:
        yield
    finally:
        model.train(was_training)
        model.zero_grad(set_to_none=True)


def _backward(
    model: PRUForCausalLM, inputs: torch.Tensor, targets: torch.Tensor, state: tuple[State, ...] | None
) -> Pass:
    model.zero_grad(set_to_none=True)
    result = run_window(model, PLAIN, inputs, targets, state)
    result.loss.backward()  # type: ignore[no-untyped-call]
    return result


@torch.no_grad()
def _update(
    model: PRUForCausalLM, trained: list[torch.Tensor], pulls: list[torch.Tensor], rates: list[torch.Tensor]
) -> None:
    for parameter, origin, pull, rate in zip(model.parameters(), trained, pulls, rates, strict=True):
        assert parameter.grad is not None
        step = (origin - parameter).mul_(pull).addcmul_(parameter.grad, rate, value=-1)
        parameter.add_(step)
