"""What `PRUForCausalLM` makes of the arguments that transformers' models take: served, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from flashlm.errors import ConfigError
from flashlm.pru.observers import is_recorded

IGNORED = -100  # as a label: predicts nothing

_REASONS = {
    "past_key_values": "the recurrent state is the cache: pass `state`, which the output before has",
    "cache_params": "the recurrent state is the cache: pass `state`, which the output before has",
    "inputs_embeds": "this model takes input_ids only",
    "output_attentions": "a recurrent model has no attentions",
    "position_ids": "a recurrent model has no positions",
    "token_type_ids": "this model has no token types; tokenizers give none with return_token_type_ids=False",
    "shift_labels": "labels are shifted here: pass `labels`",
}


def refuse_unserved(given: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first argument that this model does not serve; None and False ask for nothing.

    Raises:
        ConfigError: With the argument's name, and what to do.
    """
    for name, value in given.items():
        if name in _REASONS and (value is None or value is False):
            continue
        reason = _REASONS.get(name, "known are those of its forward()")
        raise ConfigError(f"PRUForCausalLM does not take {name!r}: {reason}")


def token_mask(attention_mask: torch.Tensor | None, input_ids: torch.Tensor, has_state: bool) -> torch.Tensor | None:
    """Return bool (T, B), False where there is no token; None where there is one everywhere.

    Args:
        attention_mask: (B, T) of ones and zeros; with a state it may be longer, its last T columns count.
        input_ids: (B, T).
        has_state: Whether there is text before.

    Raises:
        ConfigError: Another shape, or other values.
    """
    if attention_mask is None:
        return None
    batch, num_tokens = input_ids.shape
    if attention_mask.dim() == 2 and has_state and attention_mask.shape[1] > num_tokens:
        attention_mask = attention_mask[:, -num_tokens:]
    if attention_mask.shape != (batch, num_tokens):
        raise ConfigError(
            f"attention_mask must be {(batch, num_tokens)} like input_ids, got {tuple(attention_mask.shape)}"
        )
    mask = attention_mask != 0
    if not is_recorded():  # a graph can't branch on values: it masks always, which changes nothing where all are ones
        if bool((mask & (attention_mask != 1)).any()):
            raise ConfigError("attention_mask must be of ones and zeros: sequences packed into one row are not served")
        if bool(mask.all()):
            return None
    return mask.t()


def kept_positions(logits_to_keep: int | torch.Tensor) -> slice | torch.Tensor:
    """Return what to index the positions with.

    Raises:
        ConfigError: A negative count.
    """
    if isinstance(logits_to_keep, torch.Tensor):
        return logits_to_keep
    if logits_to_keep < 0:
        raise ConfigError(f"logits_to_keep must be at least 0, got {logits_to_keep}")
    return slice(-logits_to_keep, None)


def causal_loss(
    logits: torch.Tensor, labels: torch.Tensor, shape: torch.Size, num_items: torch.Tensor | int | None
) -> torch.Tensor:
    """Return the cross-entropy in nats of each label by the logits before it.

    Args:
        logits: (B, T, vocab_size).
        labels: int64 (B, T); -100 is not counted.
        shape: (B, T) of the input.
        num_items: Divides the sum; None: the number of labels that count.

    Raises:
        ConfigError: Shapes differ, or no label counts, so that the mean would be no number.
    """
    if labels.shape != shape:
        raise ConfigError(f"labels must be {tuple(shape)} like input_ids, got {tuple(labels.shape)}")
    if logits.shape[:2] != shape:
        raise ConfigError("labels need the logits of all tokens: leave logits_to_keep at 0")
    targets = labels[:, 1:].flatten().to(logits.device)
    divisor = (targets != IGNORED).sum() if num_items is None else num_items
    if not is_recorded() and not divisor:
        raise ConfigError(
            f"labels have nothing to predict: after the first token of each of {shape[0]} sequences all are {IGNORED}"
        )
    wide = logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32))
    total = F.cross_entropy(wide, targets, ignore_index=IGNORED, reduction="sum")
    return total / (divisor.to(total.device) if isinstance(divisor, torch.Tensor) else divisor)
