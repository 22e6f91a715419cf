"""The training pass: `PRUForCausalLM` with the regularisers of AWD-LSTM (Merity et al. 2018, §3-4) and its loss.

Weight drop is drawn once per window, on the recurrent matrices only. Without regularisers, or in eval mode, the pass
equals the model's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import nn

from flashlm.pru.cell import State
from flashlm.pru.language_model import PRUForCausalLM
from flashlm.pru.module import PRU, emulates_16_bits
from flashlm.pru.recurrence import run_dense
from flashlm.pru.training.cross_entropy import cross_entropy
from flashlm.pru.training.settings import TrainingSettings


@dataclass(frozen=True)
class Pass:
    """What a window gave.

    Attributes:
        loss: What to minimise: cross-entropy, AR and TAR.
        cross_entropy: Mean over the window's tokens, in nats.
        state: (h, c) by layer, each (1, B, layer's size), detached.
    """

    loss: torch.Tensor
    cross_entropy: torch.Tensor
    state: tuple[State, ...]


def run_window(
    model: PRUForCausalLM,
    settings: TrainingSettings,
    inputs: torch.Tensor,
    targets: torch.Tensor,
    state: tuple[State, ...] | None,
) -> Pass:
    """Run the model over a window and compute its loss.

    Args:
        model: In train mode for dropout.
        settings: The regularisers.
        inputs: int64 (T, B).
        targets: int64 (T, B).
        state: Of the window before; None: zeros.
    """
    is_training = model.training
    x = embed(model.embedding, inputs, settings.dropoute if is_training else 0.0)
    x = drop(x, settings.dropouti, is_training, settings.is_locked)
    after: list[State] = []
    raw = x
    for position, layer in enumerate(model.layers):
        raw, last = _run_layer(layer, x, None if state is None else state[position], settings.weight_dropout)
        is_last = position == len(model.layers) - 1
        x = drop(raw, settings.dropout if is_last else settings.dropouth, is_training, settings.is_locked)
        after.append((last[0].detach(), last[1].detach()))
    likelihood = cross_entropy(model.decoder(x).flatten(0, 1), targets.flatten())
    loss = likelihood
    if settings.alpha:
        loss = loss + settings.alpha * x.float().pow(2).mean()
    if settings.beta and raw.shape[0] > 1:  # a window of one token has no difference, and the mean of none is NaN
        loss = loss + settings.beta * (raw[1:] - raw[:-1]).float().pow(2).mean()
    return Pass(loss, likelihood.detach(), tuple(after))


def drop(x: torch.Tensor, share: float, is_training: bool, is_locked: bool) -> torch.Tensor:
    """Drop features of x (T, B, F), scaled by 1 / (1 - share); locked: one mask (1, B, F) for all steps."""
    if not is_training or not share:
        return x
    if not is_locked:
        return F.dropout(x, share) if x.device.type != "cpu" else x * keep_mask(x, share)
    mask = torch.empty_like(x[:1]).bernoulli_(1 - share).div_(1 - share)
    return x * mask


def keep_mask(like: torch.Tensor, share: float) -> torch.Tensor:
    """Draw a dropout mask of x's shape and dtype: 0 with probability `share`, to 2^-16, else what keeps the mean.

    torch draws one number in a serial generator for each element, which is a tenth of a training step; here each 64-bit
    number serves four.
    """
    num_elements = like.numel()
    bits = torch.empty((num_elements + 3) // 4, dtype=torch.int64, device=like.device).random_(-(2**63), None)
    num_dropped = min(round(share * 2**16), 2**16 - 1)  # of the 2^16 values
    is_kept = bits.view(torch.int16)[:num_elements].view(like.shape) >= num_dropped - 2**15
    return is_kept.to(like.dtype).mul_(2**16 / (2**16 - num_dropped))


def embed(embedding: nn.Embedding, tokens: torch.Tensor, share: float) -> torch.Tensor:
    """Look words up, with a share of the vocabulary's vectors dropped whole and the others scaled (embedding dropout)."""
    weight = embedding.weight
    if share:
        mask = torch.empty(weight.shape[0], 1, device=weight.device, dtype=weight.dtype)
        weight = weight * mask.bernoulli_(1 - share).div_(1 - share)
    return F.embedding(tokens, weight)


def _run_layer(
    layer: nn.Module, x: torch.Tensor, state: State | None, weight_dropout: float
) -> tuple[torch.Tensor, State]:
    if isinstance(layer, PRU):
        layer.weight_dropout = weight_dropout
    is_autocast = torch.is_autocast_enabled(x.device.type)
    if isinstance(layer, PRU) or not (is_autocast or (layer.training and weight_dropout)):
        result: tuple[torch.Tensor, State] = layer(x, state)
        return result
    assert isinstance(layer, nn.LSTM)
    if is_autocast and emulates_16_bits(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return _run_lstm(layer, x.float(), state, weight_dropout)
    return _run_lstm(layer, x, state, weight_dropout)


def _run_lstm(
    layer: nn.LSTM, x: torch.Tensor, state: State | None, weight_dropout: float
) -> tuple[torch.Tensor, State]:
    # Not through the module: nn.LSTM caches its list of weights, and a replaced one would go unnoticed.
    weight_ih, weight_hh, *biases = cast(list[torch.Tensor], layer.all_weights[0])
    weights = [weight_ih, F.dropout(weight_hh, weight_dropout, layer.training), *biases]
    if state is None:
        zeros = weight_hh.new_zeros(1, x.shape[1], layer.hidden_size)
        state = zeros, zeros
    if x.device.type == "cpu" and torch.is_autocast_enabled("cpu"):  # oneDNN's is slower (docs/experiments.md)
        y, h, c = run_dense(x, weights, state[0][0], state[1][0])
        return y, (h.unsqueeze(0), c.unsqueeze(0))
    y, h, c = torch.lstm(x, state, weights, True, 1, 0.0, layer.training, False, False)
    return y, (h, c)
